"""The study of ViLD's claims: every variant over several seeds, on shared embeddings, with intervals.

each seed: rpn (base boxes) -> proposals; those of one seed -> embeddings that all seeds learn from
           text, ensemble, vild, supervised, image -> AP50
           rpn (base + novel boxes) -> AR of novel boxes beside the first one's
           text's regions -> CLIP on crops, text + CLIP
-> paired differences between variants, with 95 % intervals -> <storage>/reports/vild_study.json, .md

A killed study continues: each result is a file, and a training goes on from its last checkpoint. Seeds are innermost,
and what the claims rest on most comes first, so that the report of an unfinished study says most.

python -m workflows.studies.vild --config pictograms --teacher store/runs/clip/<run>/model
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

import ovd_models
from data_prep import storage, tables
from data_prep.embeddings.teachers import EmbedConfig, Teacher, embed_regions
from ovd_models.checkpoints import Detector, load_encoder
from ovd_models.detectors.rcnn import ProposalNetwork
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_proposals
from ovd_models.preprocess import to_tensor
from ovd_models.vild.model import Variant, ViLD
from ovd_models.vocabulary import build_vocabulary
from workflows import prepare_boxes, vild
from workflows.common import cli, runs
from workflows.common.teacher import read_categories
from workflows.configs import vild as vild_configs
from workflows.reports.detections import read_box_image
from workflows.reports.failures import annotated_objects
from workflows.studies import study as studies
from workflows.studies import vild_sweep
from workflows.studies.study import Numbers

LIMITS = (100, 300, 1000)
"""Proposals of an image that recall is measured at."""
Results = dict[str, dict[int, Numbers]]
"""By name, then by seed."""
Part = Literal["variants", "fusions", "proposals", "baselines", "supervised_full", "teachers"]
RPN_BASE, RPN_FULL = "RPN, base boxes", "RPN, base and novel boxes"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One study."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    other_teachers: tuple[str, ...] = ()
    """More CLIP checkpoints, with which the ensemble is trained too."""
    training: vild_configs.Run = field(default_factory=vild_configs.pictograms)
    """What is trained; seeds and variants are the study's."""
    boxes: prepare_boxes.Run = field(default_factory=prepare_boxes.pictograms)
    seeds: tuple[int, ...] = (0, 1, 2)
    regions_seed: int = 0
    """Seed of the proposal network whose regions are embedded, once for all seeds."""
    variants: tuple[Variant, ...] = ("text", "ensemble", "vild", "supervised", "image")
    one_head_weight: float = 0.5
    """w of `vild`, whose one head needs more of it than the second head of the ensemble, which does nothing else."""
    parts: tuple[Part, ...] = ("variants", "fusions", "proposals", "baselines", "supervised_full", "teachers")
    """What is measured, in this order."""


def pictograms() -> Run:
    """Three seeds; give it `--teacher`. Each training runs inside the study: a study for each seed fills more cores."""
    training = vild_configs.pictograms()
    rpn, detector = (dataclasses.replace(stage, workers=0) for stage in (training.rpn_stage, training.detector_stage))
    return Run(training=dataclasses.replace(training, rpn_stage=rpn, detector_stage=detector))


def pictograms_mixed() -> Run:
    """The same where training images also show novel things, unnamed, as in the paper."""
    run = pictograms()
    return dataclasses.replace(run, training=dataclasses.replace(run.training, train_boxes="pictograms-mixed"))


def smoke() -> Run:
    """One seed, five steps; give it `--teacher`."""
    return Run(training=vild_configs.smoke(), boxes=prepare_boxes.smoke(), seeds=(0,), variants=("text", "ensemble"))


CONFIGS: dict[str, Callable[[], Run]] = {
    "pictograms": pictograms,
    "pictograms_mixed": pictograms_mixed,
    "smoke": smoke,
}


def study(run: Run) -> dict[str, Any]:
    """Train and measure whatever is not there yet; returns the report, which is written after every result.

    Raises:
        InputError: the teacher is missing.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    prepare_boxes.prepare_full(dataclasses.replace(run.boxes, storage=run.storage))
    seeds = {seed: with_seed(run, seed) for seed in run.seeds}
    results: Results = {}
    report = as_report(run, results)
    for measure in measurements(run):
        for seed, own in seeds.items():
            for name, numbers in measure(run, own).items():
                results.setdefault(name, {})[seed] = numbers
            report = as_report(run, results)
    return report


def measurements(run: Run) -> Iterator[Callable[[Run, vild_configs.Run], dict[str, Numbers]]]:
    """What is measured with every seed, by name, in order."""
    teachers = (run.teacher, *run.other_teachers) if run.other_teachers else ()
    measures: dict[Part, list[Callable[[Run, vild_configs.Run], dict[str, Numbers]]]] = {
        "variants": [partial(measure_variant, variant=variant) for variant in run.variants],
        "fusions": [measure_fusions],
        "proposals": [measure_proposals],
        "baselines": [measure_baselines],
        "supervised_full": [measure_supervised_full],
        "teachers": [partial(measure_teacher, number=number, teacher=own) for number, own in enumerate(teachers)],
    }
    for part in run.parts:
        yield from measures[part]


def first_stage(run: Run, own: vild_configs.Run) -> vild_configs.Run:
    """The training with the proposals of its seed, and the embeddings that all seeds share."""
    seeds = (own.rpn_stage.seed, run.regions_seed)
    proposals, of_shared = (str(remembered(run, with_seed(run, seed), "rpn", train_rpn)["proposals"]) for seed in seeds)
    shared = dataclasses.replace(with_seed(run, run.regions_seed), teacher=own.teacher, proposals=of_shared)
    regions = str(remembered(run, shared, "regions", embed_regions_of)["regions"])
    return dataclasses.replace(own, proposals=proposals, regions=regions)


def measure_variant(run: Run, own: vild_configs.Run, variant: Variant) -> dict[str, Numbers]:
    """AP50 of one variant."""
    return {variant: trained_variant(run, own, variant)["metrics"]}


def trained_variant(run: Run, own: vild_configs.Run, variant: Variant) -> dict[str, Any]:
    """One variant's checkpoint and metrics."""
    return remembered(run, with_variant(run, first_stage(run, own), variant), variant, train_variant)


def measure_proposals(run: Run, own: vild_configs.Run) -> dict[str, Numbers]:
    """Recall of proposal networks trained on base boxes, and on base and novel boxes."""
    base = str(remembered(run, own, "rpn", train_rpn)["proposals"])
    novel = dataclasses.replace(own, train_boxes=f"{own.boxes}-full", novel_boxes=True)
    full = str(remembered(run, novel, "rpn_full", train_rpn)["proposals"])
    return {
        RPN_BASE: remembered(run, own, "recall_rpn", partial(recall, base)),
        RPN_FULL: remembered(run, own, "recall_rpn_full", partial(recall, full)),
    }


def measure_fusions(run: Run, own: vild_configs.Run) -> dict[str, Numbers]:
    """AP50 of the ensemble under other scorings, without training it anew."""
    model = str(trained_variant(run, own, "ensemble")["model"])
    return remembered(run, own, "fusions", partial(fusions, model))


def measure_baselines(run: Run, own: vild_configs.Run) -> dict[str, Numbers]:
    """What the teacher says about crops of ViLD-text's regions."""
    model = str(trained_variant(run, own, "text")["model"])
    return remembered(run, own, "baselines", partial(crop_baselines, model))


def measure_supervised_full(run: Run, own: vild_configs.Run) -> dict[str, Numbers]:
    """AP50 of a supervised detector that has seen boxes of base and novel categories."""
    own = dataclasses.replace(
        with_variant(run, first_stage(run, own), "supervised"), train_boxes=f"{own.boxes}-full", novel_boxes=True
    )
    return {"supervised, novel boxes too": remembered(run, own, "supervised_full", train_variant)["metrics"]}


def measure_teacher(run: Run, own: vild_configs.Run, number: int, teacher: str) -> dict[str, Numbers]:
    """How well a teacher names annotated objects, and the ensemble that learnt from it."""
    own = dataclasses.replace(own, teacher=teacher)
    named = remembered(run, own, f"teacher_{number}_names", name_objects)
    if not number:
        return {"teacher": named}
    metrics = trained_variant(run, own, "ensemble")["metrics"]
    return {f"teacher {number}": named, f"ensemble, teacher {number}": metrics}


def with_seed(run: Run, seed: int) -> vild_configs.Run:
    """The training of a seed."""
    return dataclasses.replace(
        run.training,
        storage=run.storage,
        teacher=run.teacher,
        rpn_stage=dataclasses.replace(run.training.rpn_stage, seed=seed),
        detector_stage=dataclasses.replace(run.training.detector_stage, seed=seed),
    )


def with_variant(run: Run, own: vild_configs.Run, variant: Variant) -> vild_configs.Run:
    """The training of a variant; its scoring is the config's."""
    weight = run.one_head_weight if variant == "vild" else own.model.image_weight
    return dataclasses.replace(own, model=dataclasses.replace(own.model, variant=variant, image_weight=weight))


def remembered(
    run: Run, own: vild_configs.Run, name: str, job: Callable[[vild_configs.Run], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a job: read where it was done, else done, continuing what a killed study left.

    A result belongs to the exact settings of its training, which its file's name bears a digest of.
    """
    label = studies.label_of(own.rpn_stage.seed, name, own)

    def begin() -> dict[str, Any]:
        resume = runs.find_run(run.storage, "vild", label)
        return job(dataclasses.replace(own, config=label, resume=resume))

    return studies.remembered(run.storage, "vild_study", label, begin)


def train_rpn(run: vild_configs.Run) -> dict[str, Any]:
    """Train one proposal network."""
    return {"proposals": vild.train_rpn(run)}


def embed_regions_of(run: vild_configs.Run) -> dict[str, Any]:
    """Embed the regions of `run.proposals`."""
    encoder = load_encoder(storage.local_folder(run.teacher))
    return {"regions": vild.embed_proposals(run, encoder, run.proposals).name}


def train_variant(run: vild_configs.Run) -> dict[str, Any]:
    """Train one detector and measure it."""
    trained = vild.train(run)
    return {"model": trained.model, "metrics": trained.metrics.summary(), "seconds": trained.seconds}


def fusions(model: str, run: vild_configs.Run) -> dict[str, Any]:
    """What an ensemble's two heads say together, fused in other ways."""
    detector, seen, sweep = recorded(model, run)
    assert isinstance(detector.model, ViLD)
    scoring = detector.model.config.scoring
    ways = {
        "ensemble, its text head alone": {"base_image": 0.0, "novel_image": 0.0},
        "ensemble, ViLD's own scoring": {
            "image_temperature": scoring.temperature, "base_image": 1 / 3, "novel_image": 2 / 3,
        },
    }  # fmt: skip
    return {
        name: vild_sweep.measure(detector, seen, seen.records, dataclasses.replace(scoring, **changes), sweep).summary()
        for name, changes in ways.items()
    }


def recorded(model: str, run: vild_configs.Run) -> tuple[Detector, vild_sweep.RecordedRegions, vild_sweep.Run]:
    """A detector, the evaluation set as it sees it, and how detections are taken from that."""
    detector = ovd_models.load(storage.local_folder(model))
    sweep = vild_sweep.Run(score_threshold=run.score_threshold, max_detections=run.max_detections)
    return detector, vild_sweep.record(detector, run.storage, f"{run.boxes}-eval", run.boxes), sweep


def crop_baselines(model: str, run: vild_configs.Run) -> dict[str, Any]:
    """What the teacher says about crops of a ViLD-text detector's regions."""
    detector, seen, sweep = recorded(model, run)
    assert isinstance(detector.model, ViLD)
    found = vild_sweep.baselines(detector, seen, run.teacher, detector.model.config.scoring, sweep)
    return {name: metrics.summary() for name, metrics in found.items()}


def recall(proposals: str, own: vild_configs.Run) -> Numbers:
    """AR of the evaluation set's novel boxes, and of its base boxes."""
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


def name_objects(own: vild_configs.Run) -> Numbers:
    """How often the teacher's best name of an annotated object's crop is the right one: top-1 by split."""
    categories, splits = read_categories(own.storage, own.boxes)
    names = list(categories.values())
    text_KD = build_vocabulary(load_encoder(storage.local_folder(own.teacher)), names).embeddings.numpy()
    teacher = Teacher(own.teacher, EmbedConfig(batch_size=128))
    right: dict[str, list[bool]] = {"base": [], "novel": []}
    for row in tables.read_table(own.storage, "boxes", f"{own.boxes}-eval").to_pylist():
        things = annotated_objects(row, read_box_image(own.storage, row), categories)
        if things:
            (rows,) = embed_regions(
                teacher, [np.asarray(things[0].image)], [np.stack([thing.box for thing in things])], own.crops
            )
            for thing, best in zip(things, (rows @ text_KD.T).argmax(1).tolist(), strict=True):
                right[splits[thing.name]].append(names[best] == thing.name)
    return {f"top1_{split}": float(np.mean(values)) for split, values in right.items()}


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a metric of one result, or its paired difference from another one's, should be."""

    statement: str
    metric: str
    one: str
    two: str = ""
    """What is subtracted, of the same seed; nothing if empty."""
    least: float = -math.inf
    most: float = math.inf
    surely: bool = False
    """The whole interval must be in the range, not the mean alone."""


CLAIMS = (
    Claim(
        statement="novel AP50: ViLD above ViLD-text",
        metric="ap50_novel", one="vild", two="text", least=0.0, surely=True,
    ),
    Claim(
        statement="novel AP50: ensemble above ViLD-text",
        metric="ap50_novel", one="ensemble", two="text", least=0.0, surely=True,
    ),
    Claim(statement="novel AP50 of the ensemble", metric="ap50_novel", one="ensemble", least=0.45),
    Claim(
        statement="base AP50: ensemble no more than 0.02 below ViLD-text",
        metric="ap50_base", one="ensemble", two="text", least=-0.02,
    ),
    Claim(
        statement="novel AR@100: proposals from base boxes no more than 0.05 below those from base and novel boxes",
        metric="ar100_novel", one=RPN_BASE, two=RPN_FULL, least=-0.05,
    ),
    Claim(
        statement="novel AP50: CLIP on crops, with objectness above without",
        metric="ap50_novel", one="CLIP on crops, objectness", two="CLIP on crops", least=0.0, surely=True,
    ),
    Claim(
        statement="all AP50: CLIP on crops, with objectness above without",
        metric="ap50_all", one="CLIP on crops, objectness", two="CLIP on crops", least=0.0, surely=True,
    ),
    Claim(statement="novel AP50 of supervised training on base boxes", metric="ap50_novel", one="supervised", most=0.0),
)  # fmt: skip


def weigh(results: Results) -> list[dict[str, Any]]:
    """The claims about what is measured: mean, 95 % interval over seeds, and whether they hold."""
    found = []
    for claim in CLAIMS:
        if claim.one not in results or (claim.two and claim.two not in results):
            continue
        one, two = results[claim.one], results[claim.two] if claim.two else {}
        seeds = [seed for seed in one if not claim.two or seed in two]
        values = [one[seed][claim.metric] - (two[seed][claim.metric] if claim.two else 0.0) for seed in seeds]
        numbers = studies.paired(values)
        tested = (numbers["low"], numbers["high"]) if claim.surely else (numbers["mean"],)
        holds = all(claim.least <= value <= claim.most for value in tested)
        found.append({"statement": claim.statement, **numbers, "each": values, "holds": holds})
    return found


def as_report(run: Run, results: Results) -> dict[str, Any]:
    """The report on what is measured so far, written to the storage too."""
    report = {"seeds": list(run.seeds), "results": results, "claims": weigh(results)}
    studies.write_report(run.storage, f"vild_study_{run.training.train_table}", report, as_table(report))
    return report


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means over seeds, and each seed."""
    lines = table_of(report["results"], {"base AP50": "ap50_base", "novel AP50": "ap50_novel"}, each="ap50_novel")
    lines += table_of(report["results"], {f"novel AR@{limit}": f"ar{limit}_novel" for limit in LIMITS})
    lines += table_of(report["results"], {"top-1, base": "top1_base", "top-1, novel": "top1_novel"})
    lines += ["| claim | mean | 95 % interval | seeds | holds |", "|---|---|---|---|---|"]
    for row in report["claims"]:
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}" if row["seeds"] > 1 else "unknown"
        held = "yes" if row["holds"] else "no"
        lines.append(f"| {row['statement']} | {row['mean']:+.3f} | {interval} | {row['seeds']:.0f} | {held} |")
    return "\n".join(lines) + "\n"


def table_of(results: Results, columns: Mapping[str, str], each: str = "") -> list[str]:
    """Lines of a table of the results that have these metrics: means over seeds, and one metric of each seed."""
    more = ("each seed",) if each else ()
    lines = [f"| | {' | '.join((*columns, *more))} |", "|---" * (1 + len(columns) + len(more)) + "|"]
    for name, of_seeds in results.items():
        values = list(of_seeds.values())
        if set(columns.values()) <= set(values[0]):
            cells = [f"{np.mean([entry[metric] for entry in values]):.3f}" for metric in columns.values()]
            cells += [", ".join(f"{entry[each]:.3f}" for entry in values)] if each else []
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def main() -> None:
    """The script: measure, print, tell where the report is."""
    run = cli.parse(CONFIGS, __doc__)
    report = study(run)
    print(as_table(report))
    print(f"report: {storage.join(run.storage, 'reports', f'vild_study_{run.training.train_table}.json')}")


if __name__ == "__main__":
    cli.execute(main)
