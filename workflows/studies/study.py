"""One study: measurements over several seeds, remembered as files, and the claims they are compared with.

measurements, seed by seed --> a file for each --> results by variant --> claims --> <storage>/reports/<name>.json, .md

A killed study continues: finished results are read from their files, and an unfinished training resumes from its last
checkpoint.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from scipy import stats

from data_prep import storage
from ovd_models.errors import InputError
from workflows.common import cli, runs
from workflows.common.optimisation import Optimisation
from workflows.configs import clip, codet, ovsam, vild


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """Settings that all studies have."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    seeds: tuple[int, ...] = (0, 1, 2)


Metrics = dict[str, float]
Measurement = Callable[[int], Mapping[str, Metrics]]
"""Trains and measures with a seed: seed -> metrics by variant."""
R = TypeVar("R", clip.Run, codet.Run, ovsam.Run, vild.Run)
S = TypeVar("S", codet.Run, ovsam.Run, vild.Run)


@dataclass(frozen=True)
class Result:
    """Metrics of one variant."""

    by_seed: dict[int, Metrics]

    def has(self, metrics: Iterable[str]) -> bool:
        """Whether these metrics were measured."""
        return set(metrics) <= set(next(iter(self.by_seed.values())))

    def values(self, metric: str) -> list[float]:
        """The metric of each seed."""
        return [metrics[metric] for metrics in self.by_seed.values()]

    def mean(self, metric: str) -> float:
        """Mean of the metric over seeds."""
        return float(np.mean(self.values(metric)))


Results = Mapping[str, Result]
"""Results by variant."""
AP50_COLUMNS = {"base AP50": "ap50_base", "novel AP50": "ap50_novel"}


@dataclass(frozen=True)
class Claim:
    """A statement about a metric of a variant, or about its difference from a baseline's with the same seed."""

    statement: str
    metric: str
    variant: str
    baselines: tuple[str, ...] = ()
    """The one with the highest mean is subtracted; nothing is if empty."""
    _: dataclasses.KW_ONLY
    tested: Literal["interval", "mean"] = "interval"
    """Whether the whole 95 % interval or only the mean must be within the bounds."""
    at_least: float = 0.0
    at_most: float | None = None
    paper: float | None = None
    """The paper's value, if known."""
    source: str = ""
    """Metric, data set and source of the paper's value."""


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """A claim as measured."""

    claim: Claim
    baseline: str
    """The baseline that was subtracted; empty if none."""
    ours: dict[int, float]
    """Value, or difference from the baseline, by seed."""
    mean: float
    interval: tuple[float, float] | None
    """95 % interval of the mean; None for a single seed."""
    holds: bool


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return float(mean - half), float(mean + half)


def best_variant(results: Results, variants: Iterable[str], metric: str) -> str:
    """The measured variant with the highest mean of a metric, the first of equal ones; empty if none is measured."""
    measured = [variant for variant in variants if variant in results]
    return max(measured, key=lambda variant: results[variant].mean(metric), default="")


def judge(claim: Claim, results: Results) -> ClaimResult | None:
    """Measure a claim over the seeds that have both of its sides; None if no seed has."""
    baseline = best_variant(results, claim.baselines, claim.metric)
    if claim.variant not in results or (claim.baselines and not baseline):
        return None
    ours = {seed: metrics[claim.metric] for seed, metrics in results[claim.variant].by_seed.items()}
    if baseline:
        theirs = results[baseline].by_seed
        ours = {seed: value - theirs[seed][claim.metric] for seed, value in ours.items() if seed in theirs}
    if not ours:
        return None
    mean, interval = float(np.mean(list(ours.values()))), confidence_interval(list(ours.values()))
    low, high = (mean, mean) if claim.tested == "mean" else interval or (math.nan, math.nan)
    holds = claim.at_least <= low and (claim.at_most is None or high <= claim.at_most)
    return ClaimResult(claim=claim, baseline=baseline, ours=ours, mean=mean, interval=interval, holds=holds)


# ------------------------------------------------------------------------------------------------------ measurements


def require_teacher(teacher: str) -> None:
    """Raise InputError if no CLIP checkpoint is given."""
    if not teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")


def seeded(run: S, storage_uri: str, teacher: str, seed: int) -> S:
    """The training with this storage, this teacher and the seed in each stage."""
    changes: dict[str, Any] = {"storage": storage_uri, "teacher": teacher}
    for field in dataclasses.fields(run):
        stage = getattr(run, field.name)
        if isinstance(stage, Optimisation):
            changes[field.name] = dataclasses.replace(stage, seed=seed)
    return dataclasses.replace(run, **changes)


def remember(
    method: Literal["clip", "codet", "ovsam", "vild"],
    seed: int,
    name: str,
    run: R,
    job: Callable[[R], Mapping[str, Any]],
    *settings: object,
) -> dict[str, Any]:
    """The result of a job, read from its file if that exists, else computed and written.

    The file's name has a digest of the training's settings, except its storage, and of the further settings. The job
    gets the training under that name, with an unfinished run of the name to resume.
    """
    digest = storage.sha256(f"{cli.to_json(dataclasses.replace(run, storage=''))}{settings}".encode())[:8]
    label = f"study-{seed}-{name}-{digest}"
    path = storage.join(run.storage, "reports", f"{method}_study", f"{label}.json")
    if not storage.exists(path):
        print(f"study: {label}", flush=True)
        resume = runs.find_run(run.storage, method, label)
        result = job(dataclasses.replace(run, config=label, resume=resume))
        storage.write_bytes(path, json.dumps(result).encode())
    remembered: dict[str, Any] = json.loads(storage.read_bytes(path))
    return remembered


# ------------------------------------------------------------------------------------------------------------ report


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that the report follows from."""

    name: str
    """File name of the report."""
    storage: str
    seeds: tuple[int, ...]
    measurements: Sequence[Measurement]
    claims: Sequence[Claim]
    tables: Callable[[Results], list[str]]
    """The method's tables in Markdown."""
    figure: Callable[[Results], bytes] | None = None
    """Draws a PNG for a complete study."""


@dataclass(frozen=True)
class Report:
    """What has been measured so far."""

    results: Results
    claims: list[ClaimResult]
    text: str
    """Markdown."""


def run_study(study: Study) -> Report:
    """Take each measurement with every seed, rewrite the report after each, and print the last one.

    Seeds are innermost, so that an unfinished study has intervals for its first measurements.
    """
    path = storage.join(study.storage, "reports", study.name)
    results: dict[str, Result] = {}
    report = write_report(study, results, path)
    for measure in study.measurements:
        for seed in study.seeds:
            for variant, metrics in measure(seed).items():
                results.setdefault(variant, Result({})).by_seed[seed] = metrics
            report = write_report(study, results, path)
    if study.figure:
        storage.write_bytes(f"{path}.png", study.figure(results))
    print(f"{report.text}\nreport: {path}.json")
    return report


def write_report(study: Study, results: Results, path: str) -> Report:
    """Write the report as JSON and Markdown."""
    claims = [judged for claim in study.claims if (judged := judge(claim, results))]
    text = "\n".join([*study.tables(results), *claim_table(claims)])
    content = {
        "seeds": study.seeds,
        "results": {variant: result.by_seed for variant, result in results.items()},
        "claims": [dataclasses.asdict(judged) for judged in claims],
    }
    storage.write_bytes(f"{path}.json", json.dumps(content, indent=1).encode())
    storage.write_bytes(f"{path}.md", text.encode())
    return Report(results, claims, text)


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines of a table, the header first, and an empty line; none if there is nothing but a header."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if len(lines) < 2:
        return []
    return [lines[0], "|---" * (lines[0].count(" | ") + 1) + "|", *lines[1:], ""]


def metric_table(results: Results, title: str, columns: Mapping[str, str], each: str = "") -> list[str]:
    """Markdown: means over seeds of the results that have all metrics, which `columns` maps from headers.

    The values of the metric `each` are shown for each seed too.
    """
    rows = [[title, *columns, *(["each seed"] if each else [])]]
    for variant, result in results.items():
        if result.has(columns.values()):
            values = [", ".join(f"{value:.3f}" for value in result.values(each))] if each else []
            rows.append([variant, *(f"{result.mean(metric):.3f}" for metric in columns.values()), *values])
    return table(rows)


def claim_table(claims: Iterable[ClaimResult]) -> list[str]:
    """Markdown table of measured claims."""
    rows = [["claim", "required", "paper", "mean", "95 % interval", "seeds", "holds"]]
    for judged in claims:
        claim = judged.claim
        paper = "" if claim.paper is None else f"{claim.paper:+.3f} ({claim.source})"
        interval = format_interval(judged.interval) if judged.interval else "none from one seed"
        cells = [requirement(claim), paper, f"{judged.mean:+.3f}", interval, str(len(judged.ours)), outcome(judged)]
        rows.append([statement(judged), *cells])
    return table(rows)


def statement(judged: ClaimResult) -> str:
    """A claim's statement, with the baseline that was chosen, if there was a choice."""
    chosen = f" ({judged.baseline})" if len(judged.claim.baselines) > 1 else ""
    return judged.claim.statement + chosen


def requirement(claim: Claim) -> str:
    """The bounds of a claim."""
    required = f"{claim.tested} at least {claim.at_least:g}"
    return required if claim.at_most is None else f"{required}, at most {claim.at_most:g}"


def format_interval(interval: tuple[float, float]) -> str:
    """An interval's ends."""
    return "{:+.3f} to {:+.3f}".format(*interval)


def outcome(judged: ClaimResult) -> str:
    """Whether a claim holds, in a word."""
    undecided = judged.claim.tested == "interval" and judged.interval is None
    return "yes" if judged.holds else "undecided" if undecided else "no"
