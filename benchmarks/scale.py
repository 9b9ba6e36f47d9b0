"""How time grows and shrinks with workers: docs/scale.md's model beside real runs of 1, 2 and 4 workers.

python benchmarks/scale.py

Workers wait as long as a slow host or a GPU would let them wait, so that four of them fit on two cores:

- `parts_error`: of a job of parts on Ray Data (`run_parts`), by the largest relative error of its predicted time.
- `feed_error`: of a training stream whose steps take as long as a GPU's, by the largest relative error of its
  predicted rate, where either the steps or the loading are the bottleneck.
- `slow_node_ratio`: time with one of four workers ten times as slow, over the time that three workers need. Ray Data
  gives each worker some parts in advance, and the end waits for those of the slow one.

Then it prints what the model says of 10^8 pairs and of trainings on 8 and 64 GPUs.
"""

import argparse
import contextlib
import heapq
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from measure import update_figures
from torch import nn

from data_prep.parts import Pool, run_parts
from ovd_models.batches import PairBatch
from workflows.common import cluster, training
from workflows.common.optimisation import Optimisation
from workflows.common.session import Session
from workflows.common.tracking import MetricLogger
from workflows.common.training import Stage

WORKERS = (1, 2, 4)
PARTS, PART_SECONDS = 120, 0.25
STEPS, ROWS = 60, 8
"""Steps of a stream and rows of a worker's share of a step."""


# -------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class Job:
    """A data job over many rows."""

    name: str
    cpu_ms: float
    """CPU time of a row."""
    megabytes: float
    """Read from the network for a row."""
    gpu_ms: float = 0.0
    """GPU time of a row."""


JOBS = (
    Job(name="crawl, HTTPS", cpu_ms=5.1, megabytes=0.11),
    Job(name="crawl, HTTP", cpu_ms=4.1, megabytes=0.11),
)
"""Measured by `make bench-pairs` on images of 110 KB: docs/crawl.md."""
LOADED_PER_CORE = 66.0
"""Training images a second of CPU time: 512 px files with masks and regions, `make bench-train`, docs/training.md."""
DECISIONS_PER_SECOND = 77_000
"""Rows through all global decisions on one node, `make bench-corpus`, docs/crawl.md."""


def job_hours(job: Job, rows: float, cores: int, gigabits: float, gpus: int = 0) -> dict[str, float]:
    """Hours that each resource needs; the largest is the time of the job, and names its bottleneck."""
    hours = {
        "cores": rows * job.cpu_ms / 1e3 / cores / 3600,
        "network": rows * job.megabytes * 8 / 1e3 / gigabits / 3600,
    }
    return hours | ({"GPUs": rows * job.gpu_ms / 1e3 / gpus / 3600} if job.gpu_ms else {})


def list_scheduling(seconds: Sequence[float], speeds: Sequence[float]) -> float:
    """Time until all parts are done if each free worker takes the next one.

    Args:
        seconds: of each part on a worker of speed 1.
        speeds: of the workers.
    """
    free = [(0.0, number) for number in range(len(speeds))]
    heapq.heapify(free)
    ends = []
    for part in seconds:
        start, number = heapq.heappop(free)
        ends.append(start + part / speeds[number])
        heapq.heappush(free, (ends[-1], number))
    return max(ends)


def step_seconds(compute: float, loading: float, cores: float) -> float:
    """Time of a step: of the slower of its computation and of loading all workers' rows on the data cores.

    Args:
        compute: seconds of a worker's step, with its exchange of gradients.
        loading: CPU seconds of the rows of all workers.
        cores: that load.
    """
    return max(compute, loading / cores)


# -------------------------------------------------------------------------------------------------------- real runs


class Waiting:
    """A worker on parts that wait; of a pool with a `slow` worker, the first takes ten times as long."""

    def __init__(self, folder: str, slow: bool) -> None:
        self.factor = 1.0
        if slow:
            with contextlib.suppress(FileExistsError):
                Path(folder, "taken").touch(exist_ok=False)
                self.factor = 10.0

    def __call__(self, seconds: float) -> tuple[float, float]:
        """Wait; returns the moments of the start and the end."""
        started = time.time()
        time.sleep(seconds * self.factor)
        return started, time.time()


def parts_seconds(workers: int, *, slow: bool = False) -> float:
    """From the start of the first part to the end of the last."""
    with tempfile.TemporaryDirectory() as folder:
        make = partial(Waiting, folder, slow)
        moments = [moment for _, moment in run_parts(make, [PART_SECONDS] * PARTS, Pool(workers=workers, cpus=0.25))]
    return max(end for _, end in moments) - min(start for start, _ in moments)


def slow_load(seconds: float, positions: np.ndarray) -> pa.Table:
    """Rows whose loading takes a time each, as decoding does on a core of its own."""
    time.sleep(seconds * len(positions))
    return pa.table({"position": positions})


def collate(rows: Mapping[str, np.ndarray]) -> PairBatch:
    """A batch of numbers."""
    return PairBatch(torch.as_tensor(rows["position"], dtype=torch.float32)[:, None], ())


def train_worker(stage: Stage, compute: float) -> None:
    """Steps that take as long as a GPU's; the time of a step goes to a file."""
    training.prepare_worker(stage.settings)
    session = Session(nn.Linear(1, 1), stage, torch.device("cpu"), MetricLogger("", ""))
    moments = []
    for batch in session.batches("rows", ROWS * session.world, collate):
        time.sleep(compute)
        session.update({"square": session.model(batch.images).square().mean()})
        moments.append(time.time())
        if session.due:
            session.checkpoint()
    if session.rank == 0:
        Path(stage.folder, "step_seconds").write_text(str(float(np.median(np.diff(moments[STEPS // 3 :])))))


def measured_step(workers: int, compute: float, load: float) -> float:
    """Median seconds of a step of a real training stream."""
    settings = Optimisation(steps=STEPS, learning_rate=1e-6, checkpoint_every=STEPS, log_every=STEPS, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(job="scale", name="scale", settings=settings, folder=f"{folder}/scale")
        feeds = {"rows": training.feed(partial(slow_load, load), ROWS * workers, settings)}
        training.fit(partial(train_worker, stage, compute), stage, feeds)
        return float(Path(stage.folder, "step_seconds").read_text())


def check(label: str, predicted: float, measured: float) -> float:
    """Print both; returns the relative error."""
    error = abs(predicted - measured) / measured
    print(f"{label:58} {predicted:8.3f} s {measured:8.3f} s {error:7.1%}", flush=True)
    return error


def check_model(cpus: int) -> dict[str, float]:
    """The model's errors."""
    print(f"{'':58} {'predicted':>10} {'measured':>10}")
    errors = []
    for workers in WORKERS:
        predicted = list_scheduling([PART_SECONDS] * PARTS, [1] * workers)
        errors.append(check(f"{PARTS} parts of {PART_SECONDS} s, {workers} workers", predicted, parts_seconds(workers)))
    figures = {"parts_error": max(errors)}
    slow = parts_seconds(4, slow=True)
    check("the same, 4 workers, one ten times as slow", list_scheduling([PART_SECONDS] * PARTS, [0.1, 1, 1, 1]), slow)
    figures["slow_node_ratio"] = slow / list_scheduling([PART_SECONDS] * PARTS, [1] * 3)
    errors = []
    for compute, load in ((0.2, 0.002), (0.05, 0.02)):
        for workers in WORKERS:
            cores = cpus - training.CPUS_PER_WORKER * workers
            predicted = step_seconds(compute, load * ROWS * workers, int(cores))
            name = f"a step of {compute} s, {ROWS} rows of {load} s a worker, {workers} workers"
            errors.append(check(name, predicted, measured_step(workers, compute, load)))
    return figures | {"feed_error": max(errors)}


# ------------------------------------------------------------------------------------------------------- what it says


def print_tables() -> None:
    """Hours of 10^8 pairs, and the cores that feed GPUs."""
    print("\n10^8 pairs: hours by resource, the largest is the job's")
    for job in JOBS:
        for cores, gigabits in ((32, 10), (256, 50), (1024, 200)):
            hours = job_hours(job, 1e8, cores, gigabits)
            shown = ", ".join(f"{name} {value:.1f}" for name, value in hours.items())
            bottleneck = max(hours, key=lambda name: hours[name])
            print(f"  {job.name}, {cores} cores, {gigabits} Gbit/s: {shown}; bottleneck: {bottleneck}")
    print(f"  global decisions on one node: {1e8 / DECISIONS_PER_SECOND / 3600:.1f}")
    print("\ncores that load for GPUs, by the images a second that one GPU trains")
    for rate in (10, 30, 100):
        row = ", ".join(f"{gpus} GPUs {gpus * rate / LOADED_PER_CORE:.0f}" for gpus in (8, 64))
        print(f"  {rate} images/s a GPU: {row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only print what the model says")
    if not parser.parse_args().tables:
        cluster.configure_ray()
        cpus = 8
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        figures = check_model(cpus)
        update_figures("scale", figures)
        print("\n".join(f"{name}: {value:.3f}" for name, value in figures.items()))
        ray.shutdown()
    print_tables()


if __name__ == "__main__":
    main()
