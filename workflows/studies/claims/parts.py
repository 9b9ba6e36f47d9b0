"""One claim's part: its settings, its measurement with a seed, and the JSON file in which the result is kept.

part, seed --measure--> docs/claims/<number>-<seed>.json --judge--> holds, or not, or undecided

The files are committed, so the page is rendered without any training. A file holds the settings it was measured with; a
part whose settings are others does not read it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovd_models.errors import InputError
from ovd_models.metrics.matching import interval
from workflows.common import cli, tracking
from workflows.studies import study as studies
from workflows.studies.claims.sampled import Sampled
from workflows.studies.study import Claim, ClaimResult, Metrics, Result, Results

Draws = dict[str, dict[str, list[float]]]
OF_A_PLACE = ("storage", "teacher", "box_model", "seeds", "use_gpu", "threads", "held_out")
"""Last names of settings that differ between machines and change no result; no part reads a folder of `held_out`."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One claim of the papers and how it is measured."""

    number: int
    statement: str
    """As the paper means it."""
    paper: tuple[str, ...]
    """The paper's numbers, each with its source."""
    schedule: str
    """What is trained, and how it differs from the named configs."""
    claims: tuple[Claim, ...]
    """The rule: the claim holds if all of these do. The first one is the headline."""
    settings: Any
    """A dataclass with `storage` and `teacher`."""
    measure: Callable[[Any, int], Mapping[str, Metrics]]
    """Trains what is missing and measures with a seed: settings, seed -> metrics by variant."""
    columns: Mapping[str, str]
    """Columns of the table of results: header -> metric."""
    picture: Callable[[Any, int], Image.Image] | None = None
    """Draws what a seed has learned: settings, seed -> picture; that of the first seed is on the page."""
    picture_text: str = ""
    """What the picture shows."""
    seeds: int = 3
    """How many seeds the claim is measured with, from 0: five if the means of three are within the bounds, but an
    interval is not."""
    remark: str = ""
    """What limits the measurement, or why the claim does not hold."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a part measured with one seed."""

    claim: int
    seed: int
    commit: str
    measured: str
    """Time of the end, UTC."""
    seconds: float
    """Wall time, without attempts that were killed; a training that an earlier part made costs nothing."""
    cpu_seconds: float
    """CPU time of the process, on all cores."""
    settings: dict[str, Any]
    results: dict[str, Metrics]
    draws: Draws = field(default_factory=dict)
    """The rule's metrics on other draws of the images: variant -> metric -> values."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim as measured so far."""

    part: Part
    records: tuple[Record, ...]
    judged: tuple[ClaimResult, ...]

    @property
    def seeds(self) -> list[int]:
        """Seeds with a result."""
        return [record.seed for record in self.records]

    @property
    def results(self) -> Results:
        """Results by variant."""
        found: dict[str, Result] = {}
        for record in self.records:
            for variant, metrics in record.results.items():
                found.setdefault(variant, Result({})).by_seed[record.seed] = metrics
        return found

    @property
    def holds(self) -> bool | None:
        """Whether every claim of the part holds; None if one has fewer seeds than the part is measured with."""
        if not self.judged or len(self.judged) < len(self.part.claims):
            return None
        if any(len(judged.ours) < self.part.seeds for judged in self.judged):
            return None
        return all(judged.holds for judged in self.judged)

    def interval_over_images(self, judged: ClaimResult) -> tuple[float, float] | None:
        """95 % interval of a claim's mean if the images were others, over the seeds with draws; None without any."""
        metric, pair = judged.claim.metric, (judged.claim.variant, judged.baseline)
        draws, means = [], []
        for record in self.records:
            own, other = (record.draws.get(variant, {}).get(metric) for variant in pair)
            if record.seed in judged.ours and own is not None and (other is not None or not judged.baseline):
                draws.append(np.subtract(own, 0.0 if other is None else other))
                means.append(judged.ours[record.seed])
        return interval(np.mean(draws, axis=0), float(np.mean(means))) if draws else None


def judge(part: Part, records: Sequence[Record]) -> Verdict:
    """Judge a part by its records."""
    verdict = Verdict(part=part, records=tuple(records), judged=())
    results = verdict.results
    return replace(verdict, judged=tuple(found for claim in part.claims if (found := studies.judge(claim, results))))


def measure(part: Part, seed: int, storage: str, teacher: str) -> Record:
    """Measure a part with a seed; trainings that exist in the storage are not repeated."""
    wall, cpu = time.perf_counter(), time.process_time()
    measured = part.measure(replace(part.settings, storage=storage, teacher=teacher), seed)
    results = {
        variant: {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for variant, metrics in measured.items()
    }
    return Record(
        claim=part.number,
        seed=seed,
        commit=tracking.git_state()[0],
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - wall, 1),
        cpu_seconds=round(time.process_time() - cpu, 1),
        settings=settings_of(part),
        results=results,
        draws=draws_of(part, measured),
    )


def draws_of(part: Part, measured: Mapping[str, Metrics]) -> Draws:
    """The values on other draws of the images, of the metrics of the part's rule."""
    found: Draws = {}
    for claim in part.claims:
        for variant in (claim.variant, *claim.baselines):
            value = measured.get(variant, {}).get(claim.metric)
            if isinstance(value, Sampled):
                found.setdefault(variant, {})[claim.metric] = [round(each, 5) for each in value.draws.tolist()]
    return found


def picture_path(folder: str, number: int) -> Path:
    """The file of a part's picture."""
    return Path(folder) / f"{number:02}.jpg"


def draw(part: Part, seed: int, storage: str, teacher: str, folder: str) -> None:
    """Write a part's picture, if it draws one and there is none."""
    path = picture_path(folder, part.number)
    if part.picture is not None and not path.exists():
        settings = replace(part.settings, storage=storage, teacher=teacher)
        path.parent.mkdir(parents=True, exist_ok=True)
        part.picture(settings, seed).save(path, quality=85)


def settings_of(part: Part) -> dict[str, Any]:
    """A part's flat settings, without those of a place, as they are in JSON."""
    flat = {name: value for name, value in cli.flatten(part.settings).items() if name.split(".")[-1] not in OF_A_PLACE}
    found: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return found


def record_path(folder: str, number: int, seed: int) -> Path:
    """The file of a part's result with a seed."""
    return Path(folder) / f"{number:02}-{seed}.json"


def write_record(folder: str, record: Record) -> Path:
    """Write a result; a killed job leaves no half of a file."""
    path = record_path(folder, record.claim, record.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
    temporary.replace(path)
    return path


def read_record(folder: str, part: Part, seed: int) -> Record | None:
    """A part's result with a seed; None if there is none.

    Settings that are only on one side are not compared: a config that gains a field keeps its results.

    Raises:
        InputError: the file is malformed, of another claim or seed, or was measured with other settings.
    """
    path = record_path(folder, part.number, seed)
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_text()))
        results = {
            str(name): {str(key): float(value) for key, value in of.items()} for name, of in record.results.items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {error}, expected a result of workflows/claims.py") from error
    if (record.claim, record.seed) != (part.number, seed):
        raise InputError(f"{path}: claim {record.claim}, seed {record.seed}, expected {part.number} and {seed}")
    ours = settings_of(part)
    for name, value in record.settings.items():
        if name in ours and ours[name] != value:
            raise InputError(
                f"{path}: measured with {name} {value!r}, expected {ours[name]!r}; move the file away to measure again"
            )
    return replace(record, results=results)
