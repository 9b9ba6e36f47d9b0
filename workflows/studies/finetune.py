"""Fine-tuning on few images: a detector of the pictogram world's first style, continued on its second.

second style: a pool of scenes with base boxes --each seed its own images--> 10, 50, 200 of them --> codet.py --config
finetune --> AP50 on 300 further scenes with all names, beside the detector as it was
-> claims with 95 % intervals -> <storage>/reports/finetune_study.json, .md, .png

python -m workflows.studies.finetune --box-model runs/demo/runs/codet/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "box_model counts storage")

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import matplotlib.figure

from data_prep import storage, tables
from ovd_models.errors import InputError
from workflows import codet, prepare_boxes
from workflows.common import cli
from workflows.configs import boxes as boxes_configs
from workflows.configs import codet as codet_configs
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.reports import evaluation
from workflows.studies import study as studies
from workflows.studies.study import Claim, Metrics, Results, Study, StudyRun

ZERO_SHOT = "zero-shot"
CLAIM_IMAGES = 50
METRIC = "ap50_all"


@dataclass(frozen=True, kw_only=True)
class Run(StudyRun):
    """One study."""

    box_model: str = ""
    """The detector that is continued: a checkpoint folder or URI of `codet.py`."""
    counts: tuple[int, ...] = (10, 50, 200)
    """Numbers of labelled images."""
    boxes: boxes_configs.Run = field(default_factory=boxes_configs.second_style)
    """The pool of labelled images and the test set; the pool has room for the images of all seeds."""
    training: codet_configs.Run = field(default_factory=codet_configs.finetune)
    """Settings of all trainings; the study sets seed, tables, detector and storage."""


def pictograms() -> Run:
    """Three seeds; requires `--box-model`. A tiny detector learns at higher rates than a published one."""
    training = codet_configs.finetune()
    stage = replace(training.joint_stage, steps=300, learning_rate=1e-3, workers=0)
    return Run(
        boxes=replace(boxes_configs.second_style(), name="finetune-pool", train_images=600),
        training=replace(training, box_stage=stage, joint_stage=stage, detection_batch=8, validate_every=0),
    )


def smoke() -> Run:
    """One seed, five steps; requires `--box-model`."""
    training = pictograms().training
    stage = replace(training.joint_stage, steps=5, checkpoint_every=5)
    return Run(
        seeds=(0,),
        counts=(4, 8),
        boxes=replace(boxes_configs.second_style(), name="finetune-pool", train_images=8, eval_images=8),
        training=replace(training, box_stage=stage, joint_stage=stage, detection_batch=2),
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "smoke": smoke}


def label(count: int) -> str:
    """The variant's name of a number of images."""
    return f"{count} images"


def finetune_study(run: Run) -> Study:
    """The study of a run.

    Raises:
        InputError: the detector is missing, or the pool is too small.
    """
    if not run.box_model:
        raise InputError("--box-model: missing, expected a checkpoint folder of `python workflows/codet.py`")
    needed = max(run.counts) * (max(run.seeds) + 1)
    if run.boxes.train_images < needed:
        raise InputError(f"--boxes.train-images: {run.boxes.train_images}, expected {needed} for seed {max(run.seeds)}")
    claims = [
        Claim(f"AP50 of all names: {label(count)} above zero-shot", METRIC, label(count), (ZERO_SHOT,), at_least=least)
        for count, least in ((count, 0.1 if count == CLAIM_IMAGES else 0.0) for count in run.counts)
    ]
    return Study(
        name="finetune_study",
        storage=run.storage,
        seeds=run.seeds,
        measurements=[partial(measure_as_is, run), *(partial(measure_count, run, count) for count in run.counts)],
        claims=claims,
        tables=result_tables,
        figure=partial(draw_curve, run.counts),
    )


def measure_as_is(run: Run, seed: int) -> dict[str, Metrics]:
    """Metrics of the detector before any fine-tuning; the same for every seed."""
    prepare_boxes.prepare(replace(run.boxes, storage=run.storage))
    training = replace(run.training, storage=run.storage, box_model=run.box_model)

    def job(own: codet_configs.Run) -> Metrics:
        settings = EvaluationRun(storage=own.storage, model=own.box_model, boxes=f"{run.boxes.name}-eval")
        return dict(evaluation.evaluate(settings).metrics.summary())

    return {ZERO_SHOT: studies.remember("codet", 0, ZERO_SHOT, training, job, run.boxes)}


def measure_count(run: Run, count: int, seed: int) -> dict[str, Metrics]:
    """Metrics after training on `count` images."""
    name = publish_share(run, count, seed)
    training = studies.seeded(run.training, run.storage, storage.join(run.box_model, "text"), seed)
    training = replace(training, boxes=name, box_model=run.box_model)

    def job(own: codet_configs.Run) -> dict[str, Any]:
        trained = codet.train(own)
        return {"model": trained.model, "metrics": trained.metrics.codet.summary()}

    return {label(count): studies.remember("codet", seed, name, training, job, run.boxes)["metrics"]}


def publish_share(run: Run, count: int, seed: int) -> str:
    """Publish the first `count` of a seed's own images under a name of their own; returns it."""
    pool, name = run.boxes.name, f"{run.boxes.name}-{seed}-{count}"
    settings = replace(run.boxes, storage=run.storage, name=name)
    if tables.find_manifest(run.storage, "boxes", f"{name}-eval") is None:
        digest = storage.sha256(cli.to_json(replace(settings, storage="")).encode())[:16]
        rows = tables.read_table(run.storage, "boxes", f"{pool}-train").slice(seed * max(run.counts), count)
        categories = tables.read_table(run.storage, "categories", pool)
        prepare_boxes.publish_rows(settings, "categories", name, categories, digest)
        prepare_boxes.publish_rows(settings, "boxes", f"{name}-train", rows, digest)
        test = tables.read_table(run.storage, "boxes", f"{pool}-eval")
        prepare_boxes.publish_rows(settings, "boxes", f"{name}-eval", test, digest)
    return name


# ------------------------------------------------------------------------------------------------------------ report


def result_tables(results: Results) -> list[str]:
    """Markdown: AP50 of each number of images."""
    return studies.metric_table(results, "", {"AP50": METRIC, **studies.AP50_COLUMNS}, each=METRIC)


def draw_curve(counts: Sequence[int], results: Results) -> bytes:
    """A PNG: AP50 over the number of labelled images."""
    figure = matplotlib.figure.Figure(figsize=(5, 3.2))
    axis = figure.subplots()
    places = [0, *(1 + index for index in range(len(counts)))]
    lines = {METRIC: "all names", "ap50_base": "base, labelled", "ap50_novel": "novel, not labelled"}
    for metric, name in lines.items():
        variants = [ZERO_SHOT, *map(label, counts)]
        axis.plot(places, [results[variant].mean(metric) for variant in variants], marker="o", label=name)
    axis.set(xlabel="labelled images", ylabel="AP50", xticks=places, xticklabels=[0, *counts], ylim=(0, 1))
    axis.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=110, bbox_inches="tight")
    return png.getvalue()


def main() -> None:
    """Run the study."""
    studies.run_study(finetune_study(cli.parse(CONFIGS, __doc__)))


if __name__ == "__main__":
    cli.execute(main)
