"""ViLD's claims over several seeds, all of which learn from the same region embeddings.

each seed: rpn (base boxes) -> proposals; those of one seed -> embeddings that all seeds learn from
           text, ensemble, vild, supervised, image -> AP50
           rpn (base and novel boxes) -> AR of novel boxes compared with the first one's
           text's regions -> CLIP on crops, text and CLIP
-> claims with 95 % intervals -> <storage>/reports/vild_study_<training table>.json, .md

python -m workflows.studies.vild --config pictograms --teacher store/runs/clip/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage teacher other_teachers parts")

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

import ovd_models
from data_prep import storage, tables
from data_prep.embeddings.teachers import EmbedConfig, Teacher, embed_regions
from ovd_models.checkpoints import load_encoder
from ovd_models.detectors.rcnn import ProposalNetwork
from ovd_models.evaluation import DetectionMetrics, evaluate_proposals
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import Variant, ViLD
from ovd_models.vocabulary import build_vocabulary
from workflows import prepare_boxes, vild
from workflows.common import cli, training
from workflows.common.teacher import read_categories
from workflows.configs import boxes as boxes_configs
from workflows.configs import vild as vild_configs
from workflows.reports.detections import read_box_images
from workflows.reports.failures import annotated_objects
from workflows.studies import study as studies
from workflows.studies import vild_sweep
from workflows.studies.study import Claim, Measurement, Metrics, Results, Study, StudyRun
from workflows.studies.vild_sweep import RecordedRegions

LIMITS = (100, 300, 1000)
"""Numbers of proposals per image at which recall is measured."""
Part = Literal["variants", "fusions", "proposals", "baselines", "supervised_full", "teachers"]
PARTS: tuple[Part, ...] = ("variants", "fusions", "proposals", "baselines", "supervised_full", "teachers")


@dataclass(frozen=True, kw_only=True)
class Run(StudyRun):
    """One study."""

    other_teachers: tuple[str, ...] = ()
    """More CLIP checkpoints, with which the ensemble is trained too."""
    training: vild_configs.Run = field(default_factory=vild_configs.pictograms)
    """Settings of all trainings; the study sets seed, variant, teacher and storage."""
    boxes: boxes_configs.Run = field(default_factory=boxes_configs.pictograms)
    regions_seed: int = 0
    """Seed of the proposal network whose regions are embedded, once for all seeds."""
    variants: tuple[Variant, ...] = ("text", "ensemble", "vild", "supervised", "image")
    one_head_weight: float = 0.5
    """w of `vild`, whose only head needs a higher one than the ensemble's second head, which learns nothing else."""
    parts: tuple[Part, ...] = PARTS
    """What is measured, in this order."""


def pictograms() -> Run:
    """Three seeds; requires `--teacher`. Without workers, since one study per seed, in parallel, uses more cores."""
    training = vild_configs.pictograms()
    rpn, detector = (replace(stage, workers=0) for stage in (training.rpn_stage, training.detector_stage))
    return Run(training=replace(training, rpn_stage=rpn, detector_stage=detector))


def pictograms_mixed() -> Run:
    """The same with training images that also show novel things, without boxes, as in the paper."""
    run = pictograms()
    return replace(run, training=replace(run.training, train_boxes="pictograms-mixed"))


def smoke() -> Run:
    """One seed, five steps; requires `--teacher`."""
    return Run(training=vild_configs.smoke(), boxes=boxes_configs.smoke(), seeds=(0,), variants=("text", "ensemble"))


CONFIGS: dict[str, Callable[[], Run]] = {
    "pictograms": pictograms,
    "pictograms_mixed": pictograms_mixed,
    "smoke": smoke,
}
NOVEL = "ap50_novel"
LVIS = "rare mask AP on LVIS"
CLAIMS = (
    Claim("novel AP50: ViLD above ViLD-text", NOVEL, "vild", ("text",), paper=0.06, source=LVIS),
    Claim("novel AP50: ensemble above ViLD-text", NOVEL, "ensemble", ("text",), paper=0.065, source=LVIS),
    Claim("novel AP50: ensemble", NOVEL, "ensemble", tested="mean", at_least=0.45),
    Claim("base AP50: ensemble close to ViLD-text", "ap50_base", "ensemble", ("text",), tested="mean", at_least=-0.02),
    Claim("novel AR@100: proposals from base boxes close to those from base and novel boxes",
          "ar100_novel", "rpn-base", ("rpn-base-and-novel",), tested="mean", at_least=-0.05),
    Claim("novel AP50: CLIP on crops, objectness above none", NOVEL, "clip-crops-objectness", ("clip-crops",)),
    Claim("all AP50: CLIP on crops, objectness above none", "ap50_all", "clip-crops-objectness", ("clip-crops",)),
    Claim("novel AP50: supervised by base boxes", NOVEL, "supervised", tested="mean", at_most=0.0),
)  # fmt: skip


def vild_study(run: Run) -> Study:
    """The study of a run; makes the tables with novel boxes if they are missing."""
    studies.require_teacher(run.teacher)
    prepare_boxes.prepare_full(replace(run.boxes, storage=run.storage))
    teachers = (run.teacher, *run.other_teachers) if run.other_teachers else ()
    measurements: dict[Part, list[Measurement]] = {
        "variants": [partial(measure_variant, run, variant) for variant in run.variants],
        "fusions": [partial(measure_regions, run, "ensemble", "fusions", measure_fusions)],
        "proposals": [partial(measure_proposals, run)],
        "baselines": [partial(measure_regions, run, "text", "baselines", vild_sweep.baselines)],
        "supervised_full": [partial(measure_supervised_full, run)],
        "teachers": [partial(measure_teacher, run, number, teacher) for number, teacher in enumerate(teachers)],
    }
    return Study(
        name=f"vild_study_{run.training.train_table}",
        storage=run.storage,
        seeds=run.seeds,
        measurements=[measure for part in run.parts for measure in measurements[part]],
        claims=CLAIMS,
        tables=result_tables,
    )


def result_tables(results: Results) -> list[str]:
    """Markdown: AP50, recall of proposals, and the teachers' accuracy."""
    return [
        *studies.metric_table(results, "", studies.AP50_COLUMNS, each=NOVEL),
        *studies.metric_table(results, "", {f"novel AR@{limit}": f"ar{limit}_novel" for limit in LIMITS}),
        *studies.metric_table(results, "", {"top-1, base": "top1_base", "top-1, novel": "top1_novel"}),
    ]


# --------------------------------------------------------------------------------------------------------- trainings


def train_proposals(own: vild_configs.Run, seed: int) -> str:
    """The checkpoint of a proposal network."""
    result = studies.remember("vild", seed, "rpn", own, lambda own: {"proposals": vild.train_rpn(own)})
    return str(result["proposals"])


def embed_proposals(own: vild_configs.Run, seed: int) -> str:
    """The `regions` table of a training's proposals."""

    def job(own: vild_configs.Run) -> dict[str, Any]:
        encoder = load_encoder(storage.local_folder(own.teacher))
        return {"regions": vild.embed_proposals(own, encoder, own.proposals).name}

    return str(studies.remember("vild", seed, "regions", own, job)["regions"])


def variant_training(run: Run, variant: Variant, seed: int, teacher: str = "") -> vild_configs.Run:
    """The training of a variant from the seed's own proposals and the embeddings that all seeds share."""
    own, shared = (studies.seeded(run.training, run.storage, run.teacher, each) for each in (seed, run.regions_seed))
    proposals, shared_proposals = train_proposals(own, seed), train_proposals(shared, run.regions_seed)
    shared = replace(shared, teacher=teacher or run.teacher, proposals=shared_proposals)
    regions = embed_proposals(shared, run.regions_seed)
    weight = run.one_head_weight if variant == "vild" else own.model.image_weight
    model = replace(own.model, variant=variant, image_weight=weight)
    return replace(own, teacher=shared.teacher, proposals=proposals, regions=regions, model=model)


def train_detector(own: vild_configs.Run, seed: int, name: str) -> dict[str, Any]:
    """Checkpoint and metrics of a detector."""

    def job(own: vild_configs.Run) -> dict[str, Any]:
        trained = vild.train(own)
        return {"model": trained.model, "metrics": trained.metrics.summary(), "seconds": trained.seconds}

    return studies.remember("vild", seed, name, own, job)


# ------------------------------------------------------------------------------------------------------ measurements


def train_variant(run: Run, variant: Variant, seed: int) -> dict[str, Any]:
    """Checkpoint and metrics of one variant."""
    return train_detector(variant_training(run, variant, seed), seed, variant)


def measure_variant(run: Run, variant: Variant, seed: int) -> dict[str, Metrics]:
    """AP50 of one variant."""
    return {variant: train_variant(run, variant, seed)["metrics"]}


def measure_supervised_full(run: Run, seed: int) -> dict[str, Metrics]:
    """AP50 of a supervised detector trained with boxes of base and novel categories."""
    own = replace(variant_training(run, "supervised", seed), train_boxes=f"{run.training.boxes}-full", novel_boxes=True)
    return {"supervised-novel-boxes": train_detector(own, seed, "supervised-novel-boxes")["metrics"]}


def measure_proposals(run: Run, seed: int) -> dict[str, Metrics]:
    """Recall of proposal networks trained on base boxes, and on base and novel boxes."""
    base = studies.seeded(run.training, run.storage, run.teacher, seed)
    novel = replace(base, train_boxes=f"{base.boxes}-full", novel_boxes=True)
    return {
        name: studies.remember("vild", seed, name, own, partial(recall, train_proposals(own, seed)))
        for name, own in (("rpn-base", base), ("rpn-base-and-novel", novel))
    }


def measure_regions(
    run: Run,
    variant: Variant,
    name: str,
    measure: Callable[[RecordedRegions, vild_sweep.Run], Mapping[str, DetectionMetrics]],
    seed: int,
) -> dict[str, Metrics]:
    """AP50 of the regions that a variant finds in the evaluation set, scored in other ways."""
    own = variant_training(run, variant, seed)
    model = train_detector(own, seed, variant)["model"]

    def job(own: vild_configs.Run) -> dict[str, Metrics]:
        sweep = vild_sweep.Run(
            storage=own.storage,
            boxes=f"{own.boxes}-eval",
            teacher=own.teacher,
            score_threshold=own.score_threshold,
            max_detections=own.max_detections,
            device=training.device_of(own.detector_stage),
        )
        recorded = vild_sweep.record(ovd_models.load(storage.local_folder(model), sweep.device), sweep)
        return {name: metrics.summary() for name, metrics in measure(recorded, sweep).items()}

    return studies.remember("vild", seed, name, own, job)


def measure_fusions(recorded: RecordedRegions, sweep: vild_sweep.Run) -> dict[str, DetectionMetrics]:
    """The ensemble's text head alone, and the paper's weights."""
    scoring = recorded.model.config.scoring
    paper = replace(scoring, image_temperature=scoring.temperature, base_image=1 / 3, novel_image=2 / 3)
    text_head = replace(scoring, base_image=0.0, novel_image=0.0)
    return {
        "ensemble-text-head": vild_sweep.measure(recorded, text_head, sweep),
        "ensemble-paper-scoring": vild_sweep.measure(recorded, paper, sweep),
    }


def measure_teacher(run: Run, number: int, teacher: str, seed: int) -> dict[str, Metrics]:
    """Accuracy of a teacher on annotated objects, and for all but the first, AP50 of the ensemble distilled from it."""
    own = studies.seeded(run.training, run.storage, teacher, seed)
    accuracy = studies.remember("vild", seed, f"teacher-{number}", own, name_objects)
    if not number:
        return {"teacher": accuracy}
    metrics = train_detector(variant_training(run, "ensemble", seed, teacher), seed, "ensemble")["metrics"]
    return {f"teacher-{number}": accuracy, f"ensemble-teacher-{number}": metrics}


def recall(proposals: str, own: vild_configs.Run) -> Metrics:
    """AR of proposals for the evaluation set's novel and base boxes."""
    return recall_of_boxes(own, *propose(proposals, own))


def recall_of_boxes(
    own: vild_configs.Run, rows: Sequence[Mapping[str, Any]], boxes: Sequence[tuple[Tensor, Tensor]]
) -> Metrics:
    """AR of the boxes that `propose` gives, for novel and base boxes."""
    metrics = {}
    for split, ids in ids_by_split(own).items():
        for limit, value in evaluate_proposals(rows, boxes, ids, LIMITS).items():
            metrics[f"ar{limit}_{split}"] = value
    return metrics


def ids_by_split(own: vild_configs.Run) -> dict[str, list[int]]:
    """Ids of novel and of base categories."""
    categories, splits = read_categories(own.storage, own.boxes)
    return {split: [key for key, name in categories.items() if splits[name] == split] for split in ("novel", "base")}


def propose(proposals: str, own: vild_configs.Run) -> tuple[list[Mapping[str, Any]], list[tuple[Tensor, Tensor]]]:
    """Rows of the evaluation set, and boxes [N, 4] with scores [N] of the proposals in each of its images."""
    detector = ovd_models.load(storage.local_folder(proposals), training.device_of(own.rpn_stage))
    assert isinstance(detector.model, ViLD)
    network = ProposalNetwork(replace(detector.model.detector.config, pre_nms=max(LIMITS), post_nms=max(LIMITS))).eval()
    weights = detector.model.detector.state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    network.to(detector.device)
    rows = tables.read_table(own.storage, "boxes", f"{own.boxes}-eval").to_pylist()
    read = [(row, to_tensor(image)) for row, image in read_box_images(own.storage, rows) if image is not None]
    images = [image for _, image in read]
    batches = [images[start : start + 16] for start in range(0, len(images), 16)]
    boxes = [
        (found.cpu(), scores.cpu())
        for batch in batches
        for found, scores in network.find_proposals([image.to(detector.device) for image in batch], max(LIMITS))
    ]
    return [row for row, _ in read], boxes


def name_objects(own: vild_configs.Run) -> Metrics:
    """Top-1 accuracy of the teacher's names for crops of annotated objects, by split."""
    categories, splits = read_categories(own.storage, own.boxes)
    names = list(categories.values())
    text_KD = build_vocabulary(load_encoder(storage.local_folder(own.teacher)), names).embeddings.numpy()
    teacher = Teacher(own.teacher, EmbedConfig(batch_size=128), training.device_of(own.detector_stage))
    correct: dict[str, list[bool]] = {"base": [], "novel": []}
    rows = tables.read_table(own.storage, "boxes", f"{own.boxes}-eval").to_pylist()
    for row, image in read_box_images(own.storage, rows):
        if image is None:
            continue
        objects = annotated_objects(row, image.copy, categories)
        if objects:
            boxes = np.stack([entry.box for entry in objects])
            (region_ND,) = embed_regions(teacher, [np.asarray(image)], [boxes], own.crops)
            for entry, best in zip(objects, (region_ND @ text_KD.T).argmax(1).tolist(), strict=True):
                correct[splits[entry.name]].append(names[best] == entry.name)
    return {f"top1_{split}": float(np.mean(values)) for split, values in correct.items()}


def main() -> None:
    """Run the study."""
    studies.run_study(vild_study(cli.parse(CONFIGS, __doc__)))


if __name__ == "__main__":
    cli.execute(main)
