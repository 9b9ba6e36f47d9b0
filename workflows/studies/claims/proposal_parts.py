"""Claims about proposals: what a network finds that was trained on base boxes, and how well."""

from dataclasses import replace
from typing import Any

from ovd_models.evaluation import recall_by_image
from workflows.common.teacher import untrained_teacher
from workflows.configs import vild as vild_configs
from workflows.studies import study as studies
from workflows.studies import vild as vild_study
from workflows.studies.claims.parts import Part
from workflows.studies.claims.sampled import ratio
from workflows.studies.claims.vild_parts import VildRun, of_width, prepared, sampled
from workflows.studies.study import AP50_COLUMNS, Claim, Metrics


def without_teacher(run: VildRun) -> VildRun:
    """The run for proposals, which depend on no teacher: an untrained one embeds the names of the checkpoint."""
    return prepared(replace(run, teacher=untrained_teacher(run.storage)))


def measure_proposals(run: VildRun, seed: int) -> dict[str, Metrics]:
    """Recall of proposals from base boxes, and from base and novel ones."""
    ready = without_teacher(run)
    base = studies.seeded(ready.training, ready.storage, ready.teacher, seed)
    both = replace(base, train_boxes=f"{base.boxes}-full", novel_boxes=True)
    return {"rpn-base": recall_of(base, seed), "rpn-base-and-novel": recall_of(both, seed)}


def measure_quality(run: VildRun, seed: int) -> dict[str, Metrics]:
    """Recall of proposals from base boxes by length of training, backbone and objectness; AP50 on weak and good ones.

    Both detectors distil the same embeddings, of the good proposals of seed 0.
    """
    ready, found = prepared(run), dict[str, Metrics]()
    base = studies.seeded(ready.training, ready.storage, ready.teacher, seed)
    for steps in run.rpn_steps:
        found[f"{steps} steps"] = recall_of(of_length(base, steps), seed)
    for width in run.widths:
        if width != 1:  # that is `base`
            found[f"width {width:g}"] = recall_of(replace(base, model=of_width(base.model, width)), seed)
    found["overlap"] = recall_of(of_overlap(base), seed)
    own = vild_study.variant_training(ready, "vild", seed)
    for steps in (run.weak_steps, base.rpn_stage.steps):
        proposals = vild_study.train_proposals(of_length(base, steps), seed)
        trained = vild_study.train_detector(replace(own, proposals=proposals), seed, "vild")
        found.setdefault(f"{steps} steps", {}).update(sampled(ready, trained))
    return found


def of_length(run: vild_configs.Run, steps: int) -> vild_configs.Run:
    """The training with another length of the first stage."""
    return replace(run, rpn_stage=replace(run.rpn_stage, steps=steps))


def of_overlap(own: vild_configs.Run) -> vild_configs.Run:
    """The training whose proposals' score predicts overlap with an object, from anchors near annotated ones alone."""
    return replace(own, model=replace(own.model, detector=replace(own.model.detector, objectness="overlap")))


def recall_of(own: vild_configs.Run, seed: int) -> Metrics:
    """Recall of a training's proposals; AR@100 with its values on other draws of the scenes."""
    proposals = vild_study.train_proposals(own, seed)

    def job(own: vild_configs.Run) -> dict[str, Any]:
        rows, boxes = vild_study.propose(proposals, own)
        ids = vild_study.ids_by_split(own)
        by_image = {split: recall_by_image(rows, boxes, of) for split, of in ids.items()}
        return {
            "metrics": vild_study.recall_of_boxes(own, rows, boxes),
            "by_image": {split: [values.tolist() for values in pair] for split, pair in by_image.items()},
        }

    found = studies.remember("vild", seed, "recall", own, job)
    metrics: Metrics = found["metrics"]
    return metrics | {f"ar100_{split}": ratio(*pair) for split, pair in found["by_image"].items()}


RECALL = {f"{split} AR@{limit}": f"ar{limit}_{split}" for split in ("novel", "base") for limit in (100, 300)}
RPN_SCHEDULE = (
    "`vild.py --config pictograms`, stage `rpn`, 200 steps of 8 scenes; 300 scenes with base and novel objects."
)

PROPOSALS = Part(
    number=2,
    statement="A proposal network trained on base boxes alone finds nearly all novel objects that one trained on base "
    "and novel boxes finds.",
    paper=("novel AR@100, 300, 1000 on LVIS: 39.3, 48.3, 55.6 from base boxes, 41.1, 50.9, 57.0 from all (ViLD)*",),
    settings=VildRun(),
    measure=measure_proposals,
    claims=(
        Claim(
            "novel AR@100: from base boxes no more than 0.05 below from all",
            "ar100_novel",
            "rpn-base",
            ("rpn-base-and-novel",),
            at_least=-0.05,
            paper=-0.018,
            source="LVIS*",
        ),
    ),
    columns=RECALL,
    schedule=RPN_SCHEDULE,
)
QUALITY = Part(
    number=3,
    seeds=5,
    statement="A better proposal network keeps more objects that it was never trained on.",
    paper=("not measured alone; the first stage is trained on base boxes (ViLD, section 3.2)",),
    settings=VildRun(),
    measure=measure_quality,
    claims=(
        Claim("novel AR@100: 200 steps above 50", "ar100_novel", "200 steps", ("50 steps",)),
        Claim(
            "novel AR@100: 400 steps no more than 0.02 below 200",
            "ar100_novel",
            "400 steps",
            ("200 steps",),
            at_least=-0.02,
        ),
        Claim("novel AP50 of ViLD: proposals of 200 steps above those of 50", "ap50_novel", "200 steps", ("50 steps",)),
    ),
    columns={**RECALL, **AP50_COLUMNS},
    schedule="`vild.py --config pictograms`, stage `rpn`, base boxes, 25 to 400 steps of 8 scenes; then backbones with "
    "half and one and a half times the channels, 200 steps; then `overlap`, an objectness that predicts how far an "
    "anchor overlaps an object instead of whether it is one (OLN, arXiv 2108.06753), 200 steps. AP50 is that of `vild` "
    "of claim 4 and of the same with proposals of 50 steps.",
)
