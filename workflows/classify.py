"""Zero-shot classification by any CLIP, as its paper measures it: top-1 and top-5 accuracy, prompts compared.

folders, a list or boxes --squares, CLIP--> features --+
names --each prompt set--> text embeddings ------------+--> accuracy, calibration, confusions, page

python workflows/classify.py --model store/runs/clip/RUN/model --boxes pictograms-eval --prompts photo colours
python workflows/classify.py --model ViT-B-32 --pretrained openai --data imagenet/val --names wordnet_names.tsv
python workflows/classify.py --model MODEL --data labels.tsv --prompts imagenet 'a drawing of {a}|{name}'
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "model pretrained data names boxes storage prompts top output device")

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from data_prep import storage
from data_prep.boxes.cleaning import SkipReport
from data_prep.embeddings.crops import FITS, CropConfig, square
from data_prep.embeddings.labelled import LabelledSet, read_boxes, read_labelled
from data_prep.embeddings.teachers import EmbedConfig, Teacher, embed_regions, store_released, unit
from data_prep.progress import Progress
from data_prep.streams.images import read_all, try_image
from ovd_models.clip.classification import Answers, answer
from ovd_models.clip.model import load_text_encoder
from ovd_models.errors import InputError
from ovd_models.predictors import find_device
from workflows.common import cli, tracking
from workflows.reports.classification import render

READ_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """A CLIP, a labelled set and the prompts to compare."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """Folder or URI of a CLIP checkpoint, or with `pretrained` an open_clip architecture such as `ViT-B-32`."""
    pretrained: str = ""
    """Released weights of that architecture: a tag (`openai`), or the path or URI of a file."""
    data: str = ""
    """A folder with a folder of images for each class, or a .tsv or .csv file with the columns `file` and `label`."""
    names: str = ""
    """For `data`: a file with a folder or label, a tab, and its name on each line; if empty, labels are the names."""
    boxes: str = ""
    """Name of a `boxes` table whose boxes are classified, instead of `data`."""
    crops: CropConfig = field(default_factory=CropConfig)
    """For `boxes`: the crops of a box."""
    prompts: tuple[str, ...] = ()
    """Prompt sets to compare, or templates such as `a drawing of {a}|{name}`; if empty, the checkpoint's own."""
    top: int = 5
    """k of top-k accuracy, beside top-1."""
    images: int = 0
    """Number of images, from the start; 0 means all."""
    batch_size: int = 64
    device: str = "auto"
    """Device of the CLIP, such as `cuda:1`; `auto` is a GPU if there is one."""
    output: str = ""
    """File for the numbers, in JSON."""


CONFIGS = {"default": Run}


def read_set(run: Run) -> LabelledSet:
    """The images and their labels.

    Raises:
        InputError: neither or both of `data` and `boxes` are given, or what is given is malformed.
    """
    if bool(run.data) == bool(run.boxes):
        raise InputError("--data, --boxes: expected one of them")
    if run.top < 1:
        raise InputError(f"--top {run.top}: expected at least 1")
    found = read_boxes(run.storage, run.boxes) if run.boxes else read_labelled(run.data, run.names)
    return found.first(run.images) if run.images else found


def embed_set(teacher: Teacher, labelled: LabelledSet, crops: CropConfig) -> tuple[npt.NDArray[np.float32], list[int]]:
    """The unit features [N, D] of the examples that can be read, and their numbers; names those that cannot.

    Raises:
        InputError: no image can be read.
    """
    features: list[npt.NDArray[np.float32]] = []
    numbers: list[int] = []
    skipped = SkipReport()
    progress = Progress("classify", "images", len(labelled.images))
    for first in range(0, len(labelled.images), READ_AT_A_TIME):
        places = range(first, min(first + READ_AT_A_TIME, len(labelled.images)))
        read = read_all(try_image, [labelled.images[place] for place in places])
        good = [(place, image) for place, image in zip(places, read, strict=True) if isinstance(image, Image.Image)]
        for image in read:
            if isinstance(image, str):
                skipped.add("images that cannot be read", image)
        features.append(embed_images(teacher, labelled, good, crops))
        numbers += [number for place, _ in good for number in labelled.examples_of(place)]
        progress.add(len(places))
    progress.close()
    if skipped:
        print(f"left out: {skipped}", flush=True)
    if not numbers:
        raise InputError(f"{labelled.origin}: no image can be read, expected some")
    return np.concatenate(features), numbers


def embed_images(
    teacher: Teacher, labelled: LabelledSet, good: list[tuple[int, Image.Image]], crops: CropConfig
) -> npt.NDArray[np.float32]:
    """Unit features of the examples of some images, in their order: whole images, or crops of their boxes."""
    if labelled.boxes is not None:
        pixels = [np.asarray(image.convert("RGB")) for _, image in good]
        found = embed_regions(teacher, pixels, [labelled.boxes[place] for place, _ in good], crops)
        return np.concatenate([np.empty((0, teacher.clip.config.embed_dim), np.float32), *found]).astype(np.float32)
    fit = FITS[teacher.clip.config.resize_mode]

    def cut(start: int) -> npt.NDArray[np.uint8]:
        part = good[start : start + teacher.config.batch_size]
        return np.stack([square(image.convert("RGB"), teacher.side, fit, teacher.margin) for _, image in part])

    starts = range(0, len(good), teacher.config.batch_size)
    return unit(teacher.embed_squares(partial(cut, start) for start in starts))


def classify(run: Run) -> tuple[LabelledSet, list[int], dict[str, Answers], str]:
    """Classify a set with each prompt set; also returns the numbers of the classified examples, and the CLIP's id.

    Raises:
        InputError: the model, the set or a prompt set is missing or malformed.
    """
    if not run.model:
        raise InputError("--model: missing, expected a CLIP checkpoint, or an architecture with --pretrained")
    device = find_device(run.device)
    labelled = read_set(run)
    model = store_released(run.storage, run.model, run.pretrained) if run.pretrained else run.model
    folder = storage.local_folder(model)
    encoder = load_text_encoder(folder)
    encoder.tower.to(device)
    encoders = {prompts: encoder.with_prompts(prompts) for prompts in run.prompts or (encoder.prompt_set,)}
    config = EmbedConfig(batch_size=run.batch_size, gpus=int(device.type != "cpu"))
    teacher = Teacher(str(folder), config, str(device))
    features, numbers = embed_set(teacher, labelled, run.crops)
    labels = torch.tensor([labelled.labels[number] for number in numbers])
    scale = float(teacher.clip.model.logit_scale.detach().exp())
    answers = {
        prompts: answer(torch.from_numpy(features), own.embed_names(labelled.names), labels, scale=scale, top=run.top)
        for prompts, own in encoders.items()
    }
    return labelled, numbers, answers, teacher.id


def numbers_of(answers: dict[str, Answers]) -> Iterator[tuple[str, dict[str, float]]]:
    """The numbers of each prompt set, best first."""
    for prompts, found in sorted(answers.items(), key=lambda item: -item[1].top1):
        yield prompts, found.numbers()


def main() -> None:
    """Classify, print and log the accuracy, and write the page."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.check_server(run.storage)
    started = time.perf_counter()
    labelled, numbers, answers, teacher_id = classify(run)
    name = run.boxes or run.data.rstrip("/").rpartition("/")[2]
    page = render(labelled, numbers, answers, title=f"Zero-shot: {name}", model=run.model)
    uri = storage.join(run.storage, "reports", f"classify-{name}.html")
    storage.write_bytes(uri, page.encode())
    results = dict(numbers_of(answers))
    print(f"{'prompts':24}{'top-1':>8}{f'top-{run.top}':>8}{'by class':>10}{'ECE':>8}{'fitted':>8}")
    for prompts, row in results.items():
        print(f"{prompts[:23]:24}" + "".join(f"{row[key]:{width}.3f}" for key, width in COLUMNS))
    with tracking.run(
        run.storage,
        experiment=run.boxes.removesuffix("-eval") or name,
        name=f"classify {name}",
        params=cli.flatten(run),
        tags={"method": "clip", "teacher": teacher_id},
    ) as tracked:
        tracked.log_metrics({f"eval/{key}": value for key, value in next(iter(results.values())).items()})
        tracked.log_text(page, "eval/page.html")
    if run.output:
        storage.write_bytes(run.output, (json.dumps(results, indent=1) + "\n").encode())
    print(f"{len(numbers):,} examples of {len(labelled.names):,} names, {time.perf_counter() - started:.0f} s")
    print(f"page: {uri}")
    teacher = ("--teacher", run.model, *(("--pretrained", run.pretrained) if run.pretrained else ()))
    print(
        "next:",
        cli.script_command("codet", "--config", "photos", "--data", "PHOTOS", *teacher, "--storage", run.storage),
    )


COLUMNS = (("top1", 8), ("topk", 8), ("mean_of_classes", 10), ("calibration_error", 8), ("calibration_error_fitted", 8))

if __name__ == "__main__":
    cli.execute(main)
