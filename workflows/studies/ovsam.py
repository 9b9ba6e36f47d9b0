"""The study of OV-SAM's claims: one SAM a seed, from which every variant learns, with intervals over seeds.

each seed: SAM -> its embeddings, once -> OV-SAM from each teacher -> IoU, accuracy, cost beside SAM and the baselines
                                          OV-SAM of the first teacher -> accuracy as distracting names are added,
                                                                         and with other parts of CLIP in it
                                                                      -> mask AP of detectors' boxes
-> paired differences with 95 % intervals -> <storage>/reports/ovsam_study.json, .md

The baselines that OV-SAM is compared with are those that name novel things best, chosen by their own result. Further
teachers train for as many steps as give the same number of operations. Distracting names and other parts of CLIP are
tried on other scenes than the main table's. A killed study continues: each result is a file, and a training goes on
from its last checkpoint.

python -m workflows.studies.ovsam --config pictograms --teacher store/runs/clip/<run>/model
python -m workflows.studies.ovsam --config pictograms --teacher ... \
    --other-teachers store/runs/clip/<run of a ViT>/model --detectors store/runs/codet/<run>/model
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from data_prep import storage, tables
from data_prep.embeddings.texts import StoredEncoder, TextStore
from ovd_models.errors import InputError
from ovd_models.ovsam.checkpoints import load_ovsam_folder, load_sam_folder
from ovd_models.ovsam.head import fuse_scores
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.training import Clip2SamTraining, FeatureBatch, Sam2ClipTraining
from ovd_models.sam.model import SamConfig
from ovd_models.sam.training import SamTrainingConfig
from ovd_models.segments import MaskBatch
from ovd_models.vocabulary import Vocabulary, build_vocabulary
from workflows import ovsam, prepare_boxes
from workflows.common import cli, runs
from workflows.common.optimisation import Optimisation
from workflows.configs import ovsam as ovsam_configs
from workflows.reports import pointing as pointing_report
from workflows.reports.pointing import BASELINES, PROMPT_KINDS
from workflows.studies import ovsam_boxes
from workflows.studies import study as studies
from workflows.studies.ovsam_names import competing_names
from workflows.studies.study import Numbers

STUDY = "ovsam_study"
IMAGE_CROPS = tuple(name for name, config in BASELINES.items() if config.crop == "image")
FEATURES = tuple(name for name, config in BASELINES.items() if config.crop != "image")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One study."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint whose image tower is taken over, a convolutional one."""
    other_teachers: tuple[str, ...] = ()
    """More CLIP checkpoints, such as a vision transformer's, to compare with at equal compute."""
    training: ovsam_configs.Run = field(default_factory=ovsam_configs.pictograms)
    """What is trained; seeds and teachers are the study's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    vocabulary_sizes: tuple[int, ...] = (68, 1_203, 5_000, 22_000)
    """Names that compete: the set's own, filled up with distracting ones."""
    distractors: str = ""
    """A file with a name a line, such as LVIS's and ImageNet-21k's; if empty, names are composed."""
    vocabulary_images: int = 100
    """Of the evaluation set, this many images after those of the main table, or of all if there are none; all if 0.
    So parts of CLIP can be chosen here without a look at the main table's scenes."""
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)
    """CLIP's parts in base names to try; 0 is the label branch alone, 1 is CLIP."""
    betas: tuple[float, ...] = (0.0, 0.7, 0.8, 0.9, 1.0)
    """CLIP's parts in novel names to try with each."""
    novel_biases: tuple[float, ...] = (0.0, 0.5, 1.0)
    """What novel names gain, to try with each."""
    detectors: tuple[str, ...] = ()
    """Folders or URIs of ViLD or CoDet checkpoints, whose boxes are segmented and named."""
    detector_images: int = 0
    """Of the evaluation set, this many of its first images; all if 0."""


def pictograms() -> Run:
    """Three seeds; give it `--teacher`."""
    return Run()


def smoke() -> Run:
    """One seed, five steps; give it `--teacher`."""
    return Run(
        training=dataclasses.replace(ovsam_configs.smoke(), text_to_mask=False),
        seeds=(0,),
        vocabulary_sizes=(68, 100),
        alphas=(1.0,),
        betas=(1.0,),
        novel_biases=(0.0, 1.0),
        vocabulary_images=2,
        detector_images=2,
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "smoke": smoke}


def study(run: Run) -> dict[str, Any]:
    """Train and measure whatever is not there yet; the report is written anew after each seed.

    Raises:
        InputError: the teacher or a table is missing, or there are too few distracting names.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    names = competing_names(run.storage, run.training.boxes, run.vocabulary_sizes, run.distractors)
    results: dict[str, dict[int, Numbers]] = {}
    report: dict[str, Any] = {}
    for seed in run.seeds:
        for name, numbers in study_seed(run, seed, names):
            results.setdefault(name, {})[seed] = numbers
        report = {"seeds": list(run.seeds), "results": results, "differences": compare(results)}
        studies.write_report(run.storage, STUDY, report, as_table(report))
    return report


def study_seed(run: Run, seed: int, names: Sequence[str]) -> Iterator[tuple[str, Numbers]]:
    """What one seed measures, by name.

    `<variant>, <prompt>`, `<variant>, cost`, `names: <n>`, `fusions`, `<detector>: <row>`; those of further teachers
    begin with `teacher <n>: `.
    """
    base = with_seed(run, seed)
    base = dataclasses.replace(base, sam=trained_sam(base, seed))
    first = trained(base, seed, "ovsam")
    yield from named_rows(first, "")
    for number, teacher in enumerate(run.other_teachers, 1):
        own = at_equal_compute(dataclasses.replace(base, teacher=teacher), first)
        other = trained(own, seed, f"teacher_{number}")
        yield from named_rows(other, f"teacher {number}: ")
        yield f"teacher {number}: fusions", fused(run, own, seed, other)
    for size in run.vocabulary_sizes:
        yield f"names: {size}", asked_again(run, base, seed, first, names[:size])
    yield "fusions", fused(run, base, seed, first)
    for detector in run.detectors:
        for name, numbers in boxed(run, base, seed, first, detector).items():
            yield f"{detector}: {name}", numbers


def with_seed(run: Run, seed: int) -> ovsam_configs.Run:
    """The training of a seed."""
    stages = ("sam_stage", "sam2clip_stage", "clip2sam_stage", "text_stage")
    seeded = {stage: dataclasses.replace(getattr(run.training, stage), seed=seed) for stage in stages}
    return dataclasses.replace(run.training, storage=run.storage, teacher=run.teacher, **seeded)


# -------------------------------------------------------------------------------------------------------- trainings


@dataclass(frozen=True, kw_only=True)
class SamSettings:
    """All that the weights of a seed's SAM follow from."""

    storage: str
    boxes: str
    sam_model: SamConfig
    sam_training: SamTrainingConfig
    sam_stage: Optimisation
    batch_size: int
    flip_probability: float


def trained_sam(own: ovsam_configs.Run, seed: int) -> str:
    """The folder of a seed's SAM, trained if it is not there; what OV-SAM does with it makes no difference to it."""
    if own.sam:
        return own.sam
    settings = SamSettings(**{entry.name: getattr(own, entry.name) for entry in dataclasses.fields(SamSettings)})
    label = studies.label_of(seed, "sam", settings)

    def job() -> dict[str, Any]:
        return {"sam": ovsam.teach_sam(continued(own, label))}

    return str(studies.remembered(own.storage, STUDY, label, job)["sam"])


def trained(own: ovsam_configs.Run, seed: int, name: str) -> dict[str, Any]:
    """Train one OV-SAM and measure it, or read what an earlier study measured.

    A result belongs to the exact settings of its training, which its file's name bears a digest of.
    """
    label = studies.label_of(seed, name, own)

    def job() -> dict[str, Any]:
        found = ovsam.train(continued(own, label))
        rows = {", ".join(key): dict(values) for key, values in found.metrics.rows.items()}
        costs = {f"{key}, cost": dataclasses.asdict(cost) for key, cost in found.metrics.costs.items()}
        return {"model": found.model, "sam": found.outputs["sam"], "seconds": found.seconds, "rows": rows | costs}

    return studies.remembered(own.storage, STUDY, label, job)


def continued(own: ovsam_configs.Run, label: str) -> ovsam_configs.Run:
    """The training under the study's label, from where a killed study left it."""
    return dataclasses.replace(own, config=label, resume=runs.find_run(own.storage, "ovsam", label))


def named_rows(answer: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Numbers]]:
    """The rows of a training; those of SAM, which all teachers share, come with the first alone."""
    for name, numbers in answer["rows"].items():
        if not prefix or name not in ("sam, box", "sam, point", "sam, cost"):
            yield f"{prefix}{name}", numbers


def at_equal_compute(own: ovsam_configs.Run, first: Mapping[str, Any]) -> ovsam_configs.Run:
    """The training of another teacher with as many operations as the first one's: fewer steps, if one takes more."""
    clip, _ = ovsam.open_clip_teacher(own)
    reference = load_ovsam_folder(storage.local_folder(first["model"]))[0]
    other = OvSam(ovsam.model_config(own, reference.config.sam, clip))
    ratios = [
        theirs / ours for theirs, ours in zip(step_operations(reference, own), step_operations(other, own), strict=True)
    ]
    stages = (own.sam2clip_stage, own.clip2sam_stage)
    scaled = [
        dataclasses.replace(stage, steps=max(1, round(stage.steps * ratio)))
        for stage, ratio in zip(stages, ratios, strict=True)
    ]
    return dataclasses.replace(own, sam2clip_stage=scaled[0], clip2sam_stage=scaled[1])


def step_operations(model: OvSam, own: ovsam_configs.Run) -> tuple[int, int]:
    """Of a step of `sam2clip` and of `clip2sam` with one image, forward and backward."""
    sam = model.config.sam
    image = torch.zeros(3, sam.image_size, sam.image_size, dtype=torch.uint8)
    features = torch.zeros(1, sam.prompt_width, sam.embedding_side, sam.embedding_side)
    masks = MaskBatch((image,), (torch.ones_like(image[:1], dtype=torch.bool),), (torch.zeros(1, dtype=torch.int64),))
    text_KYD = torch.zeros(1, 1, model.config.tower.embed_dim)

    def operations(module: nn.Module, *inputs: Any) -> int:
        def step() -> None:
            torch.stack(list(module(*inputs).values())).sum().backward()  # type: ignore[no-untyped-call]

        return pointing_report.count_flops(step)

    return (
        operations(Sam2ClipTraining(model), FeatureBatch((image,), features)),
        operations(Clip2SamTraining(model, own.clip2sam), masks, text_KYD),
    )


# ------------------------------------------------------------------------------------------------ many names, detectors


def asked_again(run: Run, own: ovsam_configs.Run, seed: int, first: Mapping[str, Any], names: Sequence[str]) -> Numbers:
    """Accuracy by boxes with these names, of which distracting ones are nobody's.

    Args:
        run: the study.
        own: the training.
        seed: of the training.
        first: what the training gave.
        names: the set's own first.
    """
    told = "\n".join([*names, str(own.eval_images), str(run.vocabulary_images)])
    label = studies.label_of(seed, f"names-{len(names)}-{storage.sha256(told.encode())[:8]}", own)

    def job() -> dict[str, Any]:
        model, info = load_ovsam_folder(storage.local_folder(first["model"]))
        sam, _ = load_sam_folder(storage.local_folder(first["sam"]))
        _, encoder = ovsam.open_clip_teacher(own)
        stored = StoredEncoder(encoder, TextStore.of(run.storage, encoder.teacher))
        vocabulary: Vocabulary = build_vocabulary(stored, names, info.splits)
        categories = tables.read_table(run.storage, "categories", own.boxes).to_pylist()
        label_of = {row["category_id"]: names.index(row["name"]) for row in categories if row["split"]}
        rows = other_images(run, own)[: run.vocabulary_images or None]
        images = pointing_report.read_objects(run.storage, rows, label_of)
        collected, _ = pointing_report.segment_objects(images, vocabulary, model, sam, kinds=["box"])
        return {
            f"{variant}, {split}": values[f"accuracy_{split}"]
            for (variant, _), values in pointing_report.summarise(collected).items()
            for split in ("base", "novel")
            if variant != "sam"
        }

    return studies.remembered(run.storage, STUDY, label, job)


def other_images(run: Run, own: ovsam_configs.Run) -> list[dict[str, Any]]:
    """The evaluation set's images that the main table does not use; all where it uses all."""
    rows = tables.read_table(run.storage, "boxes", f"{own.boxes}-eval").to_pylist()
    return (rows[own.eval_images :] if own.eval_images else []) or rows


def fused(run: Run, own: ovsam_configs.Run, seed: int, first: Mapping[str, Any]) -> Numbers:
    """Accuracy by boxes with other parts of CLIP: `<alpha>, <beta>, <novel bias>: <split>` -> accuracy.

    Label branch and CLIP are asked once, on all `other_images`.
    """
    settings = list(itertools.product(run.alphas, run.betas, run.novel_biases))
    told = f"{settings} {own.eval_images}"
    label = studies.label_of(seed, f"fusions-{storage.sha256(told.encode())[:8]}", own)

    def job() -> dict[str, Any]:
        model, _ = load_ovsam_folder(storage.local_folder(first["model"]))
        _, encoder = ovsam.open_clip_teacher(own)
        names = ovsam.read_names(own, encoder)
        vocabulary = names.vocabulary
        label_of = {names.ids[name]: label for label, name in enumerate(vocabulary.names)}
        parts, wanted = [], []
        for objects in pointing_report.read_objects(run.storage, other_images(run, own), label_of):
            encoded = model.encode(objects.image)
            found, boxes_P4 = model.masks(encoded, objects.prompts("box"))
            parts.append(model.opinions(encoded, found, vocabulary, boxes_P4))
            wanted += objects.labels
        head_PK, clip_PK, seen_P = (torch.cat(part) for part in zip(*parts, strict=True))
        label_P, is_base_K = torch.tensor(wanted), cast(torch.Tensor, vocabulary.is_base)
        base_P = is_base_K[label_P]
        accuracies = {}
        for alpha, beta, bias in settings:
            scores_PK = fuse_scores(head_PK, clip_PK, is_base_K, seen_P, alpha=alpha, beta=beta, novel_bias=bias)
            right_P = (scores_PK[:, :-1].argmax(1) == label_P).double()
            for split, rows_P in (("base", base_P), ("novel", ~base_P)):
                accuracies[f"{alpha:g}, {beta:g}, {bias:g}: {split}"] = float(right_P[rows_P].mean())
        return accuracies

    return studies.remembered(run.storage, STUDY, label, job)


def boxed(run: Run, own: ovsam_configs.Run, seed: int, first: Mapping[str, Any], detector: str) -> dict[str, Numbers]:
    """Mask AP on a detector's boxes."""
    settings = ovsam_boxes.Run(
        storage=run.storage,
        model=first["model"],
        sam=first["sam"],
        detectors=(detector,),
        boxes=own.boxes,
        images=run.detector_images,
    )
    digest = storage.sha256(f"{detector} {run.detector_images}".encode())[:8]
    label = studies.label_of(seed, f"boxes-{digest}", own)
    return studies.remembered(run.storage, STUDY, label, lambda: dict(ovsam_boxes.compare(settings, detector)))


# ---------------------------------------------------------------------------------------------------------- report


def best_variant(results: studies.Results, variants: Sequence[str], kind: str) -> str:
    """Of these variants, the one that names novel things best with a kind of prompt, by its mean over seeds."""

    def accuracy(variant: str) -> float:
        return float(np.mean([entry["accuracy_novel"] for entry in results[f"{variant}, {kind}"].values()]))

    return max(variants, key=accuracy)


def claims_of(results: studies.Results) -> dict[str, tuple[str, str, str]]:
    """Claim -> metric, and what is compared with what (rows of `by_variant`); baselines are the best of their sort."""
    claims = {}
    for kind in (*PROMPT_KINDS, *(name for name in results if name.startswith("names: "))):
        ours = f"ovsam, {kind}"
        for sort, variants in (("image crops", IMAGE_CROPS), ("features", FEATURES)):
            best = best_variant(results, variants, kind)
            claim = f"OV-SAM above the best baseline of {sort} ({best}), {kind}: novel accuracy"
            claims[claim] = ("accuracy_novel", ours, f"{best}, {kind}")
        if kind not in PROMPT_KINDS:
            continue
        claims[f"OV-SAM above its SAM, {kind}: IoU"] = ("iou_all", ours, f"sam, {kind}")
        for other in sorted(name for name in results if name.startswith("teacher ") and name.endswith(f": {ours}")):
            teacher = other.partition(":")[0]
            claims[f"first teacher above {teacher}, {kind}: IoU"] = ("iou_all", ours, other)
            claims[f"first teacher above {teacher}, {kind}: novel accuracy"] = ("accuracy_novel", ours, other)
    return claims


def by_variant(results: studies.Results) -> studies.Results:
    """The results, and those of `names: <n>` as a row for each variant too."""
    rows: dict[str, dict[int, Numbers]] = {}
    for name, of_seeds in results.items():
        if name.startswith("names: "):
            for seed, numbers in of_seeds.items():
                for key, value in numbers.items():
                    variant, _, split = key.rpartition(", ")
                    rows.setdefault(f"{variant}, {name}", {}).setdefault(seed, {})[f"accuracy_{split}"] = value
    return {**results, **rows}


def compare(results: studies.Results) -> dict[str, Numbers]:
    """Paired differences of all claims over the seeds."""
    rows = by_variant(results)
    return studies.differences(rows, claims_of(rows))


def mean_of(results: studies.Results, name: str, key: str) -> float:
    """Over the seeds."""
    return float(np.mean([numbers[key] for numbers in results[name].values()]))


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means over seeds, and novel accuracy of each seed."""
    results: studies.Results = report["results"]
    lines = [
        "| | IoU base | novel | all | accuracy base | novel | novel accuracy of each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_seeds in results.items():
        if "iou_all" in next(iter(of_seeds.values())):
            keys = ("iou_base", "iou_novel", "iou_all", "accuracy_base", "accuracy_novel")
            each = ", ".join(f"{numbers['accuracy_novel']:.3f}" for numbers in of_seeds.values())
            lines.append(f"| {name} | {means(results, name, keys)} | {each} |")
    lines += ["", *studies.difference_table(report["differences"]), "", *cost_table(results)]
    columns = [name for name in results if name.startswith("names: ")]
    if columns:
        lines += ["", "| accuracy | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for key in next(iter(results[columns[0]].values())):
            lines.append(f"| {key} | " + " | ".join(means(results, column, [key]) for column in columns) + " |")
    for name in results:
        if name.endswith("fusions"):
            lines += ["", *fusion_table(results, name)]
    boxes = [name for name in results if "ap50_novel" in next(iter(results[name].values()))]
    if boxes:
        lines += ["", "| boxes of: masks | mask AP50 base | novel | mask AP base | novel |", "|---|---|---|---|---|"]
        columns = ["ap50_base", "ap50_novel", "ap_base", "ap_novel"]
        lines += [f"| {name} | {means(results, name, columns)} |" for name in boxes]
    return "\n".join(lines) + "\n"


def fusion_table(results: studies.Results, name: str) -> list[str]:
    """Markdown: parts of CLIP, those of the greatest harmonic mean of base and novel accuracy first."""
    settings = dict.fromkeys(key.partition(":")[0] for key in next(iter(results[name].values())))

    def accuracies(setting: str) -> tuple[float, float]:
        base, novel = (mean_of(results, name, f"{setting}: {split}") for split in ("base", "novel"))
        return base, novel

    def harmonic(setting: str) -> float:
        base, novel = accuracies(setting)
        return 2 * base * novel / max(base + novel, 1e-9)

    lines = [
        f"| {name}: alpha, beta, novel bias (other images) | accuracy base | novel | harmonic mean |",
        "|---|---|---|---|",
    ]
    for setting in sorted(settings, key=harmonic, reverse=True):
        base, novel = accuracies(setting)
        lines.append(f"| {setting} | {base:.3f} | {novel:.3f} | {harmonic(setting):.3f} |")
    return lines


def means(results: studies.Results, name: str, keys: Sequence[str]) -> str:
    """Cells with the means over the seeds."""
    return " | ".join(f"{mean_of(results, name, key):.3f}" for key in keys)


def cost_table(results: studies.Results) -> list[str]:
    """Markdown: what an image with four named boxes takes, and OV-SAM's part of the best baselines'."""
    lines = ["| cost | parameters | GFLOP | encode | one more prompt |", "|---|---|---|---|---|"]
    for name in results:
        if name.endswith(", cost"):
            parameters, flops, encode, prompt = (
                mean_of(results, name, key) for key in ("parameters", "flops", "encode_ms", "prompt_ms")
            )
            times = f"{encode:.1f} ms | {prompt:.1f} ms"
            lines.append(f"| {name[:-6]} | {parameters:,.0f} | {flops / 1e9:.2f} | {times} |")
    lines += ["", "| OV-SAM's part of | parameters | operations |", "|---|---|---|"]
    for best in dict.fromkeys(best_variant(results, variants, "box") for variants in (IMAGE_CROPS, FEATURES)):
        ratios = (
            mean_of(results, "ovsam, cost", key) / mean_of(results, f"{best}, cost", key)
            for key in ("parameters", "flops")
        )
        lines.append(f"| {best} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def main() -> None:
    """The script: measure, print, tell where the report is."""
    run = cli.parse(CONFIGS, __doc__)
    if run.training.config == "smoke":
        prepare_boxes.prepare(dataclasses.replace(prepare_boxes.smoke(), storage=run.storage))
    print(as_table(study(run)))
    print(f"report: {storage.join(run.storage, 'reports', f'{STUDY}.json')}")


if __name__ == "__main__":
    cli.execute(main)
