"""Export a trained model to ONNX files that run without PyTorch, each checked against it.

checkpoint folder --> detector.onnx, names.npz, detect.py | image_tower.onnx, text_tower.onnx | sam_encoder.onnx,
                      sam_decoder.onnx | ovsam_encoder.onnx, ovsam_decoder.onnx, ovsam_namer.onnx, names.npz
                      --compared with PyTorch on images of several sizes--> export.json

python workflows/export.py --model runs/demo/codet --out runs/demo/exported
python runs/demo/exported/detect.py picture.jpg umbrella anchor      # needs onnxruntime, numpy and Pillow only
python workflows/export.py --model store/runs/clip/NAME/model --out exported_clip
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "model out images num_images int8 torch_export storage")

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import ovd_models
from data_prep import storage
from data_prep.boxes import folders
from data_prep.pictograms.world import SCENES, World
from data_prep.progress import working
from ovd_models.checkpoint_info import read_info
from ovd_models.checkpoints import load_model
from ovd_models.clip.model import ClipTextEncoder, load_clip
from ovd_models.errors import InputError
from ovd_models.export import detect as example
from ovd_models.export.files import OPSET, Array, Part, write_part
from ovd_models.export.parts import (
    SIZES,
    detector_part,
    image_tower_part,
    name_weights,
    ovsam_parts,
    sam_parts,
    text_tower_part,
)
from ovd_models.export.programs import write_program
from ovd_models.export.quantise import quantise
from ovd_models.predictors import Detector, Segmenter
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamModel
from ovd_models.vild.model import ViLD
from workflows.common import cli, models, output


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model; requires `--model` and `--out`."""

    model: str = ""
    """Checkpoint folder or URI: a CoDet, a ViLD, an OV-SAM, a CLIP or a SAM."""
    out: str = ""
    """Folder to write; it must not exist, or be empty."""
    images: str = ""
    """Folder or URI of pictures like those to come, on which a detector is compared and its 8-bit scales are chosen;
    scenes of the pictogram world if empty."""
    num_images: int = 32
    """Pictures of `images` that are used."""
    int8: bool = False
    """Also write `detector_int8.onnx`, whose convolutions and layers compute with 8-bit integers."""
    torch_export: bool = False
    """Also write a program of `torch.export`, `NAME.pt2`, of each part that it captures: not of detectors, where the
    number of regions depends on their scores."""
    threshold: float = 0.05
    """Score above which detections are compared."""
    storage: str = "store"
    """Where a `models:/` URI is looked up."""


CONFIGS: dict[str, Callable[[], Run]] = {"default": Run}


def export(run: Run) -> dict[str, float]:
    """Write the files of a model; returns the largest difference of each file from PyTorch.

    Raises:
        InputError: a flag is missing, the folder exists, the model is of a kind that is not exported, or a file does
            not compute what PyTorch does.
    """
    if not run.out:
        raise InputError("--out: missing, expected a folder to write")
    output.check_folder(run.out)
    folder = models.local_model(run.model, run.storage)
    differences: dict[str, float] = {}

    def save(target: Path) -> None:
        for part in write_model(run, folder, target):
            with working(f"{part.name}.onnx"):
                differences[f"{part.name}.onnx"] = write_part(part, target)
            if run.torch_export and part.program:
                differences[f"{part.name}.pt2"] = write_program(part, target)
            if run.int8 and part.name == "detector":
                with working("detector_int8.onnx"):
                    quantise(part, target / "detector.onnx", target / "detector_int8.onnx", part.examples)
        described = {"model": run.model, "opset": OPSET, "max_difference": differences}
        (target / "export.json").write_text(json.dumps(described, indent=1))

    output.write_folder(save, Path(run.out))
    return differences


def write_model(run: Run, folder: Path, target: Path) -> list[Part]:
    """The parts of a checkpoint; writes the names and the example of a detector.

    Raises:
        InputError: see `export`.
    """
    if (folder / "clip.json").is_file():
        clip, teacher = load_clip(folder)
        return [image_tower_part(clip), text_tower_part(ClipTextEncoder(clip.config, clip.model.text, teacher))]
    method = read_info(folder).method
    if method == "sam":
        return sam_parts(load_model(folder, SamModel))
    if method == "ovsam":
        return segmenter_parts(run, ovd_models.load_segmenter(folder, "cpu"), target)
    if method not in ("codet", "vild"):
        expected = "a CoDet, a ViLD, an OV-SAM, a CLIP or a SAM"
        raise InputError(f"{folder}: a model of method {method!r}, expected {expected}")
    return detector_parts(run, ovd_models.load(folder, "cpu"), target)


def detector_parts(run: Run, detector: Detector, target: Path) -> list[Part]:
    """The parts of a detector; writes its default names with their embeddings, its threshold, and the example."""
    names = detector.vocabulary
    if not names:
        raise InputError(f"{run.model}: no default names, expected some to compare the exported detector with")
    text_KD = detector.encoder.embed_names(names)
    part = detector_part(detector.model, read_images(run), text_KD, run.threshold)
    weights = image_weights(detector)
    np.savez(
        target / "names.npz",
        names=np.array(names),
        embeddings=text_KD.numpy(),
        image_weight=weights,
        threshold=np.float32(detector.info.score_threshold),
    )
    shutil.copyfile(example.__file__, target / "detect.py")
    tower = [text_tower_part(detector.encoder)] if isinstance(detector.encoder, ClipTextEncoder) else []
    return [part, *tower]


def segmenter_parts(run: Run, segmenter: Segmenter, target: Path) -> list[Part]:
    """The parts of an OV-SAM; writes its default names with their embeddings and weights."""
    names = segmenter.vocabulary
    if not names:
        raise InputError(f"{run.model}: no default names, expected some to compare the exported files with")
    vocabulary = segmenter.names(names)
    base_K = torch.zeros(len(names), dtype=torch.bool) if vocabulary.is_base is None else vocabulary.is_base
    weight_K, bias_K = (value.numpy().astype(np.float32) for value in name_weights(segmenter.model, base_K))
    text_KD = vocabulary.embeddings
    np.savez(target / "names.npz", names=np.array(names), embeddings=text_KD.numpy(), clip_weight=weight_K, bias=bias_K)
    tower = [text_tower_part(segmenter.encoder)] if isinstance(segmenter.encoder, ClipTextEncoder) else []
    return [*ovsam_parts(segmenter.model, text_KD, base_K), *tower]


def image_weights(detector: Detector) -> Array:
    """[K] float32 exponent of the distilled head for each default name; zeros for a detector without one."""
    names, model = detector.vocabulary, detector.model
    if not isinstance(model, ViLD):
        return np.zeros(len(names), np.float32)
    weights = {"base": model.config.scoring.base_image, "novel": model.config.scoring.novel_image}
    return np.array([weights[detector.info.splits[name]] for name in names], np.float32)


def read_images(run: Run) -> list[Tensor]:
    """Pictures [H, W, 3] uint8: those of `images`, or drawn ones of three sizes.

    Raises:
        InputError: there is no picture, or one cannot be read.
    """
    if run.images:
        paths = folders.list_images(run.images)[: run.num_images]
        return [to_tensor(storage.read_bytes(storage.join(run.images, path))).permute(1, 2, 0) for path in paths]
    world, rng = World.create(0), np.random.default_rng([0, 31])
    scenes = [Image.fromarray(world.scene(rng, SCENES).pixels) for _ in range(run.num_images)]
    sizes = [SIZES[index % len(SIZES)] for index in range(run.num_images)]
    return [torch.from_numpy(np.array(scene.resize(size[::-1]))) for scene, size in zip(scenes, sizes, strict=True)]


def main() -> None:
    """Export, check and describe."""
    run = cli.parse(CONFIGS, __doc__, writes=False)
    for file, difference in export(run).items():
        print(f"{run.out}/{file}: differs from PyTorch by at most {difference:.1e}")
    if (detect := Path(run.out, "detect.py")).is_file():
        print("next:", shlex.join(["python", str(detect), "PICTURE", "NAME"]))


if __name__ == "__main__":
    cli.execute(main)
