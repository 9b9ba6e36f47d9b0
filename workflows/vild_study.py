"""The study of ViLD's claims: every variant over several seeds, on shared proposals and embeddings, with intervals.

each seed: rpn (base boxes), rpn (base + novel boxes) -> AR of novel boxes
           proposals of the first -> embeddings -> supervised, text, image, vild, ensemble -> AP50
           text's regions -> CLIP on crops, text + CLIP
-> paired differences between variants, with 95 % intervals -> <storage>/reports/vild_study.json, .md

A killed study continues: each result is a file, and a training goes on from its last checkpoint.

python workflows/vild_study.py --config pictograms --teacher runs/runs/clip/<run>/model
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ovd_models
from data_prep import storage, tables
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_proposals
from ovd_models.preprocess import to_tensor
from ovd_models.rcnn import ProposalNetwork
from ovd_models.vild import ViLD
from workflows import cli, prepare_boxes, studies, training, vild, vild_configs, vild_sweep
from workflows.studies import Numbers
from workflows.teacher import read_categories

LIMITS = (100, 300, 1000)
"""Proposals of an image that recall is measured at."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One study."""

    storage: str = "runs"
    """Folder or URI that holds tables and runs."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    other_teachers: tuple[str, ...] = ()
    """More CLIP checkpoints, with which the ensemble is trained too."""
    training: vild_configs.Run = field(default_factory=vild_configs.pictograms)
    """What is trained; seeds and variants are the study's."""
    boxes: prepare_boxes.Run = field(default_factory=prepare_boxes.pictograms)
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = ("supervised", "text", "image", "vild", "ensemble")
    supervised_full: bool = True
    """Also train a supervised detector on boxes of base and novel categories."""


def pictograms() -> Run:
    """Three seeds; give it `--teacher`."""
    return Run()


def pictograms_mixed() -> Run:
    """The same where training images also show novel things, unnamed, as in the paper."""
    return dataclasses.replace(
        pictograms(), training=dataclasses.replace(vild_configs.pictograms(), train_boxes="pictograms-mixed")
    )


def smoke() -> Run:
    """One seed, five steps; give it `--teacher`."""
    return Run(training=vild_configs.smoke(), boxes=prepare_boxes.smoke(), seeds=(0,), variants=("text", "ensemble"))


CONFIGS: dict[str, Callable[[], Run]] = {
    "pictograms": pictograms,
    "pictograms_mixed": pictograms_mixed,
    "smoke": smoke,
}


def study(run: Run) -> dict[str, Any]:
    """Train and measure whatever is not there yet; returns the report.

    Raises:
        InputError: the teacher is missing.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    prepare_boxes.prepare_full(dataclasses.replace(run.boxes, storage=run.storage))
    results: dict[str, dict[int, Numbers]] = {}
    for seed in run.seeds:
        for name, numbers in study_seed(run, seed).items():
            results.setdefault(name, {})[seed] = numbers
    report = {"seeds": list(run.seeds), "results": results, "differences": studies.differences(results, CLAIMS)}
    studies.write_report(run.storage, f"vild_study_{run.training.train_table}", report, as_table(report))
    return report


def study_seed(run: Run, seed: int) -> dict[str, Numbers]:
    """Everything that one seed measures, by name."""
    base = with_seed(run, seed)
    full = f"{run.training.boxes}-full"
    found: dict[str, Numbers] = {}
    proposals = remembered(run, base, "rpn", lambda own: {"proposals": vild.train_rpn(own)})["proposals"]
    found["RPN, base boxes"] = recall(run, base, "rpn", proposals)
    novel = dataclasses.replace(base, train_boxes=full, novel_boxes=True)
    of_all = remembered(run, novel, "rpn_full", lambda own: {"proposals": vild.train_rpn(own)})["proposals"]
    found["RPN, base and novel boxes"] = recall(run, base, "rpn_full", of_all)

    base = dataclasses.replace(base, proposals=proposals)
    models: dict[str, str] = {}
    for variant in run.variants:
        answer = remembered(run, with_variant(base, variant), variant, train_variant)
        found[variant], models[variant] = answer["metrics"], answer["model"]
    if run.supervised_full:
        own = dataclasses.replace(with_variant(base, "supervised"), train_boxes=full, novel_boxes=True)
        found["supervised, novel boxes too"] = remembered(run, own, "supervised_full", train_variant)["metrics"]
    for number, teacher in enumerate(run.other_teachers, 1):
        own = dataclasses.replace(with_variant(base, "ensemble"), teacher=teacher)
        found[f"ensemble, teacher {number}"] = remembered(run, own, f"teacher_{number}", train_variant)["metrics"]
    if "text" in models:
        found |= remembered(run, base, "baselines", lambda own: crop_baselines(own, models["text"]))
    return found


def with_seed(run: Run, seed: int) -> vild_configs.Run:
    """The training of a seed."""
    return dataclasses.replace(
        run.training,
        storage=run.storage,
        teacher=run.teacher,
        rpn_stage=dataclasses.replace(run.training.rpn_stage, seed=seed),
        detector_stage=dataclasses.replace(run.training.detector_stage, seed=seed),
    )


def with_variant(run: vild_configs.Run, variant: str) -> vild_configs.Run:
    """The training of a variant; its scoring is the config's."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, variant=variant))


def remembered(
    run: Run, own: vild_configs.Run, name: str, job: Callable[[vild_configs.Run], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a job: read where it was done, else done, continuing what a killed study left.

    A result belongs to the exact settings of its training, which its file's name bears a digest of.
    """
    label = studies.label_of(own.rpn_stage.seed, name, own)

    def begin() -> dict[str, Any]:
        resume = training.find_run(run.storage, "vild", label)
        return job(dataclasses.replace(own, config=label, resume=resume))

    return studies.remembered(run.storage, "vild_study", label, begin)


def train_variant(run: vild_configs.Run) -> dict[str, Any]:
    """Train one detector and measure it."""
    trained = vild.train(run)
    return {"model": trained.model, "metrics": trained.metrics.summary(), "seconds": trained.seconds}


def crop_baselines(run: vild_configs.Run, model: str) -> dict[str, Any]:
    """What the teacher says about crops of a ViLD-text detector's regions."""
    detector = ovd_models.load(storage.local_folder(model))
    assert isinstance(detector.model, ViLD)
    sweep = vild_sweep.Run(score_threshold=run.score_threshold, max_detections=run.max_detections)
    seen = vild_sweep.record(detector, run.storage, f"{run.boxes}-eval", run.boxes)
    found = vild_sweep.baselines(detector, seen, run.teacher, detector.model.config.scoring, sweep)
    return {name: metrics.summary() for name, metrics in found.items()}


def recall(run: Run, own: vild_configs.Run, name: str, proposals: str) -> Numbers:
    """AR of the evaluation set's novel boxes, and of its base boxes."""

    def job(own: vild_configs.Run) -> dict[str, Any]:
        detector = ovd_models.load(storage.local_folder(proposals))
        assert isinstance(detector.model, ViLD)
        config = dataclasses.replace(detector.model.detector.config, pre_nms=max(LIMITS), post_nms=max(LIMITS))
        network = ProposalNetwork(config).eval()
        weights = detector.model.detector.state_dict()
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
        rows = tables.read_table(own.storage, "boxes", f"{own.boxes}-eval").to_pylist()
        categories, splits = read_categories(own.storage, own.boxes)
        images = [to_tensor(vild_sweep.open_tensor(own.storage, row)) for row in rows]
        found = [
            entry
            for start in range(0, len(images), 16)
            for entry in network.find_proposals(images[start : start + 16], max(LIMITS))
        ]
        numbers: Numbers = {}
        for split in ("novel", "base"):
            ids = [key for key, category in categories.items() if splits[category] == split]
            recalls = evaluate_proposals(rows, found, ids, LIMITS)
            numbers |= {f"ar{limit}_{split}": value for limit, value in recalls.items()}
        return numbers

    return remembered(run, own, f"recall_{name}", job)


# ---------------------------------------------------------------------------------------------------------- report

CLAIMS: studies.Claims = {
    "ViLD above ViLD-text": ("ap50_novel", "vild", "text"),
    "ensemble above ViLD-text": ("ap50_novel", "ensemble", "text"),
    "ensemble above ViLD-text, base": ("ap50_base", "ensemble", "text"),
    "CLIP on crops, objectness above none": ("ap50_novel", "CLIP on crops, objectness", "CLIP on crops"),
    "RPN, base and novel boxes above base": ("ar100_novel", "RPN, base and novel boxes", "RPN, base boxes"),
}
"""Claim -> metric, and what is compared with what."""


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means over seeds, and each seed."""
    lines = studies.ap_table(report["results"])
    lines += ["", "| novel boxes | AR@100 | AR@300 | AR@1000 |", "|---|---|---|---|"]
    for name, of_seeds in report["results"].items():
        values = list(of_seeds.values())
        if "ar100_novel" in values[0]:
            means = " | ".join(f"{np.mean([entry[f'ar{limit}_novel'] for entry in values]):.3f}" for limit in LIMITS)
            lines.append(f"| {name} | {means} |")
    lines += ["", *studies.difference_table(report["differences"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The script: measure, print, tell where the report is."""
    run = cli.parse(CONFIGS, __doc__)
    report = study(run)
    print(as_table(report))
    print(f"report: {storage.join(run.storage, 'reports', f'vild_study_{run.training.train_table}.json')}")


if __name__ == "__main__":
    cli.execute(main)
