"""A dry run: what a step of each stage and its loading cost on this machine, and the cores that its workers need."""

import dataclasses
import math
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from workflows.common import cli, cluster, training
from workflows.common.runs import TrainingConfig
from workflows.common.tracking import MetricLogger
from workflows.common.training import Feed, Stage

R = TypeVar("R", bound=TrainingConfig)
STEPS, COUNTED = 10, 5
"""Steps of a stage in a dry run, and the last ones of them, which are measured."""
SHARED = ("batch_size", "detection_batch", "groups_per_step")
"""Fields of a training's run that its workers share."""


class Rehearsal(MetricLogger):
    """Stands for MLflow and Ray Train: runs a few steps of one worker's share in this process, and keeps nothing."""

    def __init__(self) -> None:
        super().__init__("", "")
        self._logged: list[tuple[float, float, Mapping[str, float]]] = []
        self._loading = 0.0
        self.bytes_per_step = 0.0
        """Rows of a step as they go to the worker."""
        self.checkpoint_bytes = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep them with the time and the CPU time."""
        self._logged.append((time.perf_counter(), time.process_time(), metrics))

    def log_image(self, *_: object) -> None:
        """Do nothing."""

    def flush(self, *, until: int | None = None, wait: bool = False) -> None:
        """Do nothing."""

    def fit(self, worker: Callable[[], None], stage: Stage, feeds: Mapping[str, Feed]) -> dict[str, Tensor]:
        """As `training.fit`; measures the loading of a step before."""
        self._loading = sum(map(loading_seconds, feeds.values()))
        self.bytes_per_step = sum(loaded_bytes(feed) / feed.every for feed in feeds.values())
        weights = training.fit(worker, stage, feeds)
        self.checkpoint_bytes = sum(file.stat().st_size for file in Path(stage.folder).rglob("*.pt"))
        return weights

    def costs(self) -> tuple[float, float, float]:
        """Seconds of a step without its loading, CPU seconds of a step with it, and those of its loading alone."""
        (before, used_before, _), (after, used, metrics) = self._logged[-2:]
        seconds = (after - before) * (1 - metrics["train/data_wait_fraction"]) / COUNTED
        return seconds, (used - used_before) / COUNTED, self._loading


def loading_seconds(feed: Feed) -> float:
    """CPU time of loading the rows of a step, on all threads of this process."""
    rows = feed.shape.rows_per_step
    feed.load(np.arange(rows))  # opens files
    started = time.process_time()
    feed.load(np.arange(rows, 3 * rows))
    return (time.process_time() - started) / 2


def loaded_bytes(feed: Feed) -> int:
    """Bytes of the rows of one batch of a stream."""
    return int(feed.load(feed.positions(feed.first)).nbytes)


def rehearse(run: R, stages: Mapping[str, str], train: Callable[[R, Stage, Rehearsal], Any]) -> None:
    """Print the resolved run; run some steps of each stage in this process, and print their costs and needs.

    Args:
        run: of a training.
        stages: name -> field of the run with its settings; those that the run does not train are left out.
        train: feeds a stage of a run that is one worker's share to its loop, through `Rehearsal.fit`.
    """
    cluster.configure_ray()
    print(cli.to_json(run))
    for name, field in stages.items():
        if field not in run.stages:
            continue
        settings, share, stand_in = getattr(run, field), one_worker(run, field), Rehearsal()
        with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
            own = getattr(share, field)
            train(
                share,
                Stage(job=f"dry run, {name}", name=name, settings=own, folder=f"{folder}/{name}"),
                stand_in,
            )
        step, used, loading = stand_in.costs()
        workers = max(1, settings.workers)
        device = torch.cuda.get_device_name() if training.device_of(settings) == "cuda" else "this CPU"
        cores, hours = math.ceil(workers * loading / step), settings.steps * step / 3600
        each, gigabytes = (
            "GPU" if settings.use_gpu else "worker",
            settings.steps * workers * stand_in.bytes_per_step / 1e9,
        )
        checkpoint = f"a checkpoint every {settings.checkpoint_every:,} steps: {stand_in.checkpoint_bytes / 1e6:.3g} MB"
        lines = (
            f"dry run, {name}: a worker's share takes {step:.3g} s a step on {device}, "
            f"{used:.3g} CPU s with its loading, which takes {loading:.3g} CPU s",
            f"    workers: {workers}, cores for loading: {cores}, hours for {settings.steps:,} steps: {hours:.3g}",
            f"    {each}-hours: {workers * hours:.3g}, images to the workers: {gigabytes:.3g} GB, "
            f"peak memory of a worker: {peak_gigabytes():.3g} GB, {checkpoint}",
        )
        print("\n".join(lines), flush=True)


def peak_gigabytes() -> float:
    """The most memory so far, in units of 10^9 bytes: of the GPU if this process uses one, else of the process."""
    if torch.cuda.is_available() and (most := torch.cuda.max_memory_allocated()):
        return most / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def one_worker(run: R, field: str) -> R:
    """The run with the share of one worker in a stage, which trains in this process for some steps."""
    workers = max(1, getattr(run, field).workers)
    shares = {name: max(1, getattr(run, name) // workers) for name in SHARED if hasattr(run, name)}
    short = {"workers": 0, "steps": STEPS, "log_every": COUNTED, "checkpoint_every": STEPS, "accumulate": 1}
    stages = {name: dataclasses.replace(getattr(run, name), **short) for name in cli.stages_of(run)}
    stages[field] = dataclasses.replace(stages[field], accumulate=getattr(run, field).accumulate)
    return dataclasses.replace(run, **shares, **stages)  # type: ignore[type-var]
