"""A stage of a training: its call of Ray Train, and its checkpoints. `session.py` has the parts of the loop."""

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.v2._internal.execution.context
import torch
import torch.distributed
from pyarrow import parquet
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from torch import Tensor

from data_prep import storage
from data_prep.streams.plans import Integers, Stream, StreamShape, stream
from ovd_models.errors import InputError
from workflows.common import cli, cluster, quiet
from workflows.common.optimisation import Optimisation

DRIVER_CHECKPOINTS = ("driver_checkpoint/a", "driver_checkpoint/b")
"""Written in turn, so that one of them is complete at any time."""
NOT_FINITE = "not_finite.json"
"""Written by a worker whose loss is not finite."""
BAD_INPUT = "bad_input.txt"
"""Written by a worker that met bad input: the line that says what."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training with a schedule and checkpoints of its own."""

    job: str
    """Start of its progress lines, such as `codet boxes`."""
    name: str
    settings: Optimisation
    folder: str
    """Folder or URI of its checkpoints."""
    first_step: int = 0
    """Steps of the stages before it; metrics of all stages share one axis of steps."""
    wait_minutes: float = 20.0
    """Minutes to wait for its workers to start, all tries together."""


class NotFiniteError(FloatingPointError):
    """A loss is infinite or no number."""

    def __init__(self, job: str, step: int, losses: Sequence[str], saved: Sequence[str] = ()) -> None:
        """Name the step.

        Args:
            job: start of the message.
            step: of the stage, from 0.
            losses: those of this worker that are not finite.
            saved: URIs of the batches of the step.
        """
        names = ", ".join(losses) or "the loss"
        places = f"; its rows are in {', '.join(saved)}" if saved else ""
        super().__init__(f"{job}: {names} not finite at step {step}{places}")
        self.job, self.step, self.losses = job, step, tuple(losses)


# ------------------------------------------------------------------------------------------------------- checkpoints


def committed_step(folder: str) -> int:
    """The step of the last complete checkpoint of a stage, 0 if there is none."""
    checkpoint = last_checkpoint(folder)
    return 0 if checkpoint is None else step_of(checkpoint)


def step_of(checkpoint: ray.train.Checkpoint) -> int:
    """The step after which a checkpoint was made."""
    assert checkpoint.filesystem is not None  # Ray Train finds it for any path
    with checkpoint.filesystem.open_input_stream(f"{checkpoint.path}/step") as stream:
        return int(stream.read())


def other_than(name: str) -> str:
    """The other one of `DRIVER_CHECKPOINTS`."""
    first, second = DRIVER_CHECKPOINTS
    return second if name == first else first


def last_checkpoint(folder: str) -> ray.train.Checkpoint | None:
    """The latest checkpoint of a stage, whether Ray Train committed it or a loop inside the driver wrote it."""
    filesystem, path = storage.resolve(folder)
    found = [
        ray.train.Checkpoint(f"{path}/{name}", filesystem)
        for name in DRIVER_CHECKPOINTS
        if storage.exists(storage.join(folder, name, "step"))  # written last
    ]
    if storage.exists(storage.join(folder, "checkpoint_manager_snapshot.json")):
        committed = ray.train.Result.from_path(path, storage_filesystem=filesystem).checkpoint
        found += [] if committed is None else [committed]
    return max(found, key=step_of) if len(found) > 1 else next(iter(found), None)


def load_weights(folder: str | Path, name: str = "model.pt") -> dict[str, Tensor]:
    """The model's state dict in a training checkpoint's folder."""
    weights: dict[str, Tensor] = torch.load(Path(folder) / name, weights_only=True, map_location="cpu")
    return weights


def final_weights(folder: str) -> dict[str, Tensor]:
    """The state dict of a finished stage: the average where one was kept.

    Raises:
        InputError: the stage has no checkpoint.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"{folder}: no checkpoint, expected a finished training run")
    with checkpoint.as_directory() as local:
        name = "average.pt" if (Path(local) / "average.pt").is_file() else "model.pt"
        return load_weights(local, name)


# --------------------------------------------------------------------------------------------------------- Ray Train


RAY_LOGGERS = ("ray.train.v2._internal.util", ray.train.v2._internal.execution.context.__file__)
"""Those of the errors of a loop and of the uploads of its checkpoints."""
R = TypeVar("R")
T = TypeVar("T")
CPUS_PER_WORKER = 0.5
"""Leaves room for the data tasks that feed a worker; threads are set by `prepare_worker`."""


def start_ray_for(*stages: Optimisation, wait_minutes: float) -> None:
    """Start Ray, unless all of these train inside the driver.

    Raises:
        InputError: the cluster cannot have the resources of a stage and a CPU for its data tasks.
        WaitedError: it has not grown to have them in time.
    """
    cluster.configure_ray()
    if any(stage.workers for stage in stages):
        cluster.start_ray()
        gpus = max(stage.workers * bool(stage.use_gpu) for stage in stages)
        cluster.require(1 + CPUS_PER_WORKER * max(stage.workers for stage in stages), gpus, wait_minutes)


def choose_devices(run: R, stages: Mapping[str, Optimisation], *, dry_run: bool = False) -> R:
    """A training's run with the stages of some of its fields on GPUs, where they do not say and there are enough.

    Those of the cluster, or of this machine if the run is in none; a stage without workers is always on this one.

    Raises:
        InputError: a stage asks for GPUs that this machine lacks, and it is no cluster; or no cluster answers.
    """
    joined, changes = cluster.is_joined(), {}
    for name, stage in stages.items():
        needed, here = max(1, stage.workers), torch.cuda.device_count()
        if stage.use_gpu and here < needed and not (joined or dry_run):
            expected = "--no-use-gpu, fewer --workers, or a cluster (RAY_ADDRESS or `ray job submit`)"
            raise InputError(f"--use-gpu: {needed} GPUs are needed, this machine has {here}, expected {expected}")
        if stage.use_gpu is None:
            if joined and stage.workers:
                cluster.start_ray()
                here = int(cluster.most("GPU"))
            changes[name] = dataclasses.replace(stage, use_gpu=here >= needed)
            if 0 < here < needed:
                print(f"{name}: not on a GPU, {needed} workers need one each; --workers {here} uses the GPUs here")
    return dataclasses.replace(run, **changes) if changes else run  # type: ignore[type-var]


@dataclass(frozen=True)
class Feed:
    """The stream of a stage, from any step on."""

    load: Callable[[Any], Any]
    """Makes rows of positions of the stream."""
    shape: StreamShape
    last: int
    """Number of its batches."""
    every: int
    """Steps from one batch of this stream to the next."""
    first: int = 0
    """The first step with a batch of it."""

    def positions(self, step: int) -> Integers:
        """Positions of a step's rows, none if the step has no batch of this stream."""
        return self.shape.of_step(step // self.every) if step % self.every == self.first else np.zeros(0, np.int64)

    def __call__(self, step: int) -> Stream:
        """The stream from a step on."""
        return stream(self.load, self.shape, step // self.every, self.last)


def feed(
    load: Callable[[Any], Any], rows_per_step: int, settings: Optimisation, every: int = 1, first: int = 0
) -> Feed:
    """The stream of a stage.

    Args:
        load: makes rows of positions of the stream.
        rows_per_step: rows in a batch, over all workers.
        settings: of the stage.
        every: steps from one batch of this stream to the next.
        first: the first step with a batch of it.

    Raises:
        InputError: no image of the table can be read.
    """
    load(np.zeros(1, np.int64))  # here, where a person sees the message, before any worker starts
    shape = StreamShape(rows_per_step=rows_per_step, workers=settings.workers)
    return Feed(load, shape, -(-settings.steps // every), every, first)


class Trainer(TorchTrainer):
    """A trainer that does not replace the script's Ctrl-C handler.

    Ray's own handler stays in place after `fit` and ends the script with 0 or 1, whatever it was doing.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Keep the script's handler: `KeyboardInterrupt` ends `fit`, and Ray ends its processes with the driver."""


def fit(worker: Callable[[], None], stage: Stage, feeds: Mapping[str, Feed]) -> dict[str, Tensor]:
    """Run a training loop on Ray Train until its last step is checkpointed; returns the final weights.

    Continues from the last checkpoint in the stage's folder.

    Args:
        worker: the loop, run by every worker.
        stage: steps, workers and folder.
        feeds: the stream of each data set.

    Raises:
        NotFiniteError: a loss is not finite; the rows of its step are saved in the stage's folder.
        InputError: a worker met bad input.
        WaitedError: other jobs hold what the workers need, or a lost machine is not replaced.
    """
    settings = stage.settings
    if committed_step(stage.folder) >= settings.steps:
        return final_weights(stage.folder)
    parent, name = stage.folder.rsplit("/", 1)
    filesystem, path = storage.resolve(parent)
    filesystem.create_dir(path, recursive=True)
    take(stage, BAD_INPUT), take(stage, NOT_FINITE)  # of a run that was killed

    def from_committed(make: Feed) -> Callable[[], Stream]:
        # Called whenever a group of workers starts, so that a replaced group gets the rest of the stream.
        return lambda: make(committed_step(stage.folder))

    limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=settings.waiting_bytes * max(1, settings.workers)
    )
    options = ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)
    trainer = Trainer(
        partial(run_loop, worker, stage),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=bool(settings.use_gpu),
            resources_per_worker={"CPU": CPUS_PER_WORKER, **({"GPU": 1} if settings.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures,
                # Of starts, which are tried for ever by default; the field is missing in the older class's types.
                controller_failure_limit=settings.max_failures,  # type: ignore[call-arg]
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        # Inside the driver Ray Train passes on whatever it is given.
        datasets={key: from_committed(make) for key, make in feeds.items()},  # type: ignore[misc]
        dataset_config=ray.train.DataConfig(enable_shard_locality=False, execution_options=options),
    )
    os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = str(60 * stage.wait_minutes / (1 + settings.max_failures))
    try:
        trainer.fit()
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise
        raise cli.WaitedError(
            f"{stage.job}: the cluster had no room for the {settings.workers} workers in {stage.wait_minutes:g} minutes"
        ) from error
    finally:
        if message := take(stage, BAD_INPUT):
            raise InputError(message)
    raise_if_not_finite(stage, feeds)
    return final_weights(stage.folder)


def run_loop(worker: Callable[[], None], stage: Stage) -> None:
    """Run a loop; record a loss that is not finite, or bad input, which another attempt would meet again.

    All workers meet such a loss, and end in order. One that met bad input alone raises it, which ends the others, and
    the next attempt ends at once.
    """
    if storage.exists(storage.join(stage.folder, BAD_INPUT)):
        return
    try:
        worker()
    except InputError as error:
        line = str(getattr(error, "cause", error))  # of a task of Ray's, whose own text is a traceback
        storage.write_bytes(storage.join(stage.folder, BAD_INPUT), line.encode())
        if ray.train.get_context().get_world_size() > 1:
            raise
    except NotFiniteError as error:
        if error.losses:  # this worker's
            record = json.dumps({"step": error.step, "losses": error.losses})
            storage.write_bytes(storage.join(stage.folder, NOT_FINITE), record.encode())


def take(stage: Stage, name: str) -> str:
    """The text of a file that `run_loop` wrote, which is deleted; empty if there is none."""
    filesystem, path = storage.resolve(uri := storage.join(stage.folder, name))
    if not storage.exists(uri):
        return ""
    text = storage.read_bytes(uri).decode()
    filesystem.delete_file(path)
    return text


def raise_if_not_finite(stage: Stage, feeds: Mapping[str, Feed]) -> None:
    """Save the rows of the step that `run_loop` recorded, if any, and raise its error."""
    text = take(stage, NOT_FINITE)
    if not text:
        return
    record = json.loads(text)
    step, saved = record["step"], []
    for name, stream_of in feeds.items():
        if len(positions := stream_of.positions(step)):
            buffer = io.BytesIO()
            parquet.write_table(stream_of.load(positions), buffer)
            saved.append(storage.join(stage.folder, f"not_finite_{step}_{name}.parquet"))
            storage.write_bytes(saved[-1], buffer.getvalue())
    raise NotFiniteError(stage.job, step, record["losses"], saved)


Fit = Callable[[Callable[[], None], Stage, Mapping[str, Feed]], dict[str, Tensor]]
"""`fit`, or what stands for it in a dry run."""


def prepare_worker(settings: Optimisation) -> torch.device:
    """Set the seed, the threads and the logging of this worker; returns its device.

    Threads: this worker's share of the node's cores, where Ray would leave it a single one.
    """
    quiet.hide_storage_failures(*RAY_LOGGERS)
    context = ray.train.get_context()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(settings.threads or max(1, cores // max(1, context.get_local_world_size())))
    torch.manual_seed(settings.seed)
    return torch.device(ray.train.torch.get_device()) if settings.use_gpu else torch.device("cpu")


def device_of(settings: Optimisation) -> str:
    """Where the driver evaluates a trained model: on a GPU if the training used GPUs and the driver has one."""
    return "cuda" if settings.use_gpu and torch.cuda.is_available() else "cpu"


def on_device(settings: Optimisation, work: Callable[[str], T]) -> T:
    """Do what comes after a stage on a device like its own, whose name `work` gets.

    A driver without a GPU, as on a cluster's head, gives work after a training on the workers' GPUs to a machine that
    has one.
    """
    device = device_of(settings)
    if device == "cpu" and settings.use_gpu and settings.workers:
        result: T = ray.get(ray.remote(work).options(num_gpus=1).remote("cuda"))
        return result
    return work(device)
