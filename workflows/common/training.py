"""What every training loop shares: optimiser, schedule, checkpoint, resume, precision, and the Ray Train call.

The loop itself stays visible in each workflow.
"""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
import ray.data
import ray.train
import torch
from pyarrow import fs
from ray.train.torch import TorchTrainer
from timm.optim.muon import Muon
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from data_prep import storage
from data_prep.streams.plans import Stream
from ovd_models.errors import InputError
from workflows.common import cluster

Batch = TypeVar("Batch")
DRIVER_CHECKPOINTS = ("driver_checkpoint/a", "driver_checkpoint/b")
"""Written in turn, so that one is whole at any time."""
MIN_SCHEDULE_STEPS = 10
"""One cycle has no shorter form."""
REQUIRED_DIVISOR = 5
"""Steps in a block of a stream; `checkpoint_every` is a multiple of it, so that a resumed stream is exact."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a model is optimised, with which schedule, and on how many workers."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    optimiser: Literal["adamw", "sgd", "muon"] = "adamw"
    """`sgd` has a momentum of 0.9; `muon` takes orthogonalised steps for matrices and kernels, and AdamW's, half as
    long, for all else. Both decay matrices and kernels alone."""
    warmup: float = 0.1
    """Part of the steps in which the learning rate rises."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """One cycle of learning rate and momentum, or a linear rise and a cosine to zero with constant momentum."""
    ema_decay: float = 0.0
    """Keep an average of the weights that decays so much a step, and end with it; 0 keeps none."""
    decay_at: tuple[float, ...] = ()
    """Instead of `schedule`: parts of the steps after which the learning rate falls to a tenth."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; None leaves gradients as they are."""
    checkpoint_every: int = 100
    """Steps; a multiple of 5."""
    log_every: int = 10
    """Steps."""
    seed: int = 0
    workers: int = 1
    """Processes that train together; 0 trains inside the driver, for debugging."""
    use_gpu: bool = False
    max_failures: int = 2
    """How often a lost worker is replaced before the run fails."""
    waiting_bytes: int = 256 << 20
    """Of decoded images that wait for a worker."""

    def __post_init__(self) -> None:
        """Check what the streams rely on."""
        if self.steps < 1:
            raise InputError(f"steps: {self.steps}, expected at least 1")
        for name in ("learning_rate", "clip_norm", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value}, expected more than 0")
        if list(self.decay_at) != sorted(self.decay_at) or not all(0 < part < 1 for part in self.decay_at):
            raise InputError(f"decay_at: {self.decay_at}, expected rising parts between 0 and 1")
        for name in ("warmup", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected 0 to less than 1")
        if self.workers < 0:
            raise InputError(f"workers: {self.workers}, expected 0 or more")
        if self.checkpoint_every < 1 or self.checkpoint_every % REQUIRED_DIVISOR:
            raise InputError(f"checkpoint_every: {self.checkpoint_every}, expected a multiple of {REQUIRED_DIVISOR}")


def committed_step(run_dir: str) -> int:
    """The step of the last whole checkpoint below a Ray Train run's folder, 0 if there is none."""
    checkpoint = last_checkpoint(run_dir)
    return 0 if checkpoint is None else step_of(checkpoint)


def step_of(checkpoint: ray.train.Checkpoint) -> int:
    """The step that a checkpoint was made after."""
    with checkpoint.as_directory() as folder:
        return int(torch.load(Path(folder) / "progress.pt", weights_only=True, map_location="cpu")["step"])


def other_than(name: str) -> str:
    """The other one of `DRIVER_CHECKPOINTS`."""
    first, second = DRIVER_CHECKPOINTS
    return second if name == first else first


def last_checkpoint(run_dir: str) -> ray.train.Checkpoint | None:
    """The checkpoint of the latest step, of those that Ray Train committed and a loop inside the driver left."""
    filesystem, path = storage.resolve(run_dir)
    found = [
        ray.train.Checkpoint(f"{path}/{name}", filesystem)
        for name in DRIVER_CHECKPOINTS
        if storage.exists(storage.join(run_dir, name, "progress.pt"))
    ]
    if storage.exists(storage.join(run_dir, "checkpoint_manager_snapshot.json")):
        committed = ray.train.Result.from_path(path, storage_filesystem=filesystem).checkpoint
        found += [] if committed is None else [committed]
    return max(found, key=step_of) if len(found) > 1 else next(iter(found), None)


def start_ray_for(*stages: Optimisation) -> None:
    """Start Ray, unless all of these train inside the driver."""
    cluster.configure_ray()
    if any(stage.workers for stage in stages):
        cluster.start_ray()


class Trainer(TorchTrainer):
    """A trainer that leaves Ctrl-C as it is.

    Ray's own handler stays in place after `fit`, and ends the script with 0 or 1 whatever it was doing.
    """

    def _register_sigint_handler(self, controller: object) -> None:
        """Keep the script's handler: `KeyboardInterrupt` ends `fit`, and Ray ends its processes with the driver."""


def fit(
    worker: Callable[[], None],
    settings: Optimisation,
    run_dir: str,
    streams: Mapping[str, Callable[[int], Stream]],
) -> None:
    """Run a training loop on Ray Train until its last step is checkpointed; continues what `run_dir` holds.

    Args:
        worker: the loop, run by every worker.
        settings: steps and workers.
        run_dir: folder or URI of this run.
        streams: for each data set, a function from the step to start at to its stream.
    """
    if committed_step(run_dir) >= settings.steps:
        return
    parent, name = run_dir.rsplit("/", 1)
    filesystem, path = storage.resolve(parent)
    filesystem.create_dir(path, recursive=True)

    def from_committed(make: Callable[[int], Stream]) -> Callable[[], Stream]:
        # Called whenever a group of workers starts, so that a replaced group gets the rest of the stream.
        return lambda: make(committed_step(run_dir))

    limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=settings.waiting_bytes * max(1, settings.workers)
    )
    options = ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)
    Trainer(
        worker,
        # Half a CPU each leaves room for the data tasks that feed them; threads are set by `prepare_worker`.
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": 0.5, **({"GPU": 1} if settings.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        # Inside the driver Ray Train hands on whatever it is given.
        datasets={key: from_committed(make) for key, make in streams.items()},  # type: ignore[misc]
        dataset_config=ray.train.DataConfig(enable_shard_locality=False, execution_options=options),
    ).fit()


def prepare_worker(settings: Optimisation) -> torch.device:
    """Seeds, threads and device of this worker: its share of the node's cores, where Ray would leave it one."""
    context = ray.train.get_context()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // max(1, context.get_local_world_size())))
    torch.manual_seed(settings.seed)
    return torch.device(ray.train.torch.get_device()) if settings.use_gpu else torch.device("cpu")


def build_optimiser(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """AdamW over all weights, SGD with momentum, or Muon."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)
    kernels = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    muon: torch.optim.Optimizer = Muon(groups, lr=rate, momentum=0.9, betas=(0.9, 0.999), fallback_lr_scale=0.5)
    return muon


def device_of(settings: Optimisation) -> str:
    """Where a trained model is evaluated: in the driver, on a GPU if training took some and the driver has one."""
    return "cuda" if settings.use_gpu and torch.cuda.is_available() else "cpu"


def build_schedule(
    optimiser: torch.optim.Optimizer, settings: Optimisation
) -> torch.optim.lr_scheduler.OneCycleLR | torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's course over all steps."""
    if settings.decay_at:
        return torch.optim.lr_scheduler.LambdaLR(optimiser, partial(step_factor, settings))
    if settings.schedule == "cosine":
        rising = math.ceil(settings.warmup * settings.steps)
        return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, rising, settings.steps))
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        settings.learning_rate,
        total_steps=max(settings.steps, MIN_SCHEDULE_STEPS),
        pct_start=max(settings.warmup, 2 / settings.steps if settings.steps > MIN_SCHEDULE_STEPS else 0.5),
    )


def step_factor(settings: Optimisation, step: int) -> float:
    """What the learning rate is multiplied by at a step of a schedule with `decay_at`."""
    done = step / settings.steps
    rise = 0.01 + 0.99 * done / settings.warmup if done < settings.warmup else 1.0
    return float(rise * 0.1 ** sum(done >= part for part in settings.decay_at))


def warmup_cosine(step: int, rising: int, steps: int) -> float:
    """The factor of the learning rate in a step, from 0: (step + 1) / rising at first, then half a cosine to zero."""
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential average that forgets faster in its first steps, so that the first weights do not stay in it."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current  # a counter
        return averaged.lerp(current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average


class Session:
    """A model in training: its optimiser, schedule and position, saved and restored together."""

    def __init__(self, model: nn.Module, settings: Optimisation, device: torch.device, run_dir: str) -> None:
        self.settings, self.device, self.run_dir, self.step = settings, device, run_dir, 0
        self.module = model.to(device).to(memory_format=torch.channels_last)  # faster convolutions
        self.optimiser = build_optimiser(model, settings)
        self.schedule = build_schedule(self.optimiser, settings)
        decay = settings.ema_decay
        self.average = AveragedModel(self.module, avg_fn=moving_average(decay), use_buffers=True) if decay else None
        self._next = DRIVER_CHECKPOINTS[0]
        self._restore()
        world = ray.train.get_context().get_world_size()
        self.model = DistributedDataParallel(self.module) if world > 1 else self.module
        self.model.train()

    def _restore(self) -> None:
        given = ray.train.get_checkpoint() if self.settings.workers else None
        checkpoint = given or last_checkpoint(self.run_dir)  # a run begun inside the driver may go on in workers
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.module.load_state_dict(load_weights(folder))
            progress = torch.load(Path(folder) / "progress.pt", weights_only=True, map_location=self.device)
        if self.average is not None:
            self.average.load_state_dict(progress["average"])
        self.optimiser.load_state_dict(progress["optimiser"])
        self.schedule.load_state_dict(progress["schedule"])
        self.step = int(progress["step"])
        if checkpoint.path.endswith(self._next):  # it stays while the next one is written
            self._next = other_than(self._next)

    def autocast(self) -> AbstractContextManager[Any]:
        """The bfloat16 context on a GPU, where it pays; nothing on CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def update(self, loss: Tensor) -> None:
        """One optimiser step.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.step}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip_norm)
        self.optimiser.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.step += 1

    @property
    def due(self) -> bool:
        """Whether the step just done ends with a checkpoint."""
        return self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps

    @property
    def done(self) -> bool:
        """Whether this was the last step; the stream may hold more."""
        return self.step >= self.settings.steps

    def checkpoint(self, metrics: Mapping[str, float]) -> None:
        """Save from rank 0 and report from all ranks; returns when the checkpoint is committed."""
        report = {"step": self.step, **metrics}
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(report)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(self.module.state_dict(), Path(folder) / "model.pt")
            if self.average is not None:
                torch.save(self.average.module.state_dict(), Path(folder) / "average.pt")
            progress = {
                "average": {} if self.average is None else self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
            }
            torch.save(progress, Path(folder) / "progress.pt")
            if not self.settings.workers:  # Ray Train keeps no checkpoints of a loop inside the driver
                storage.upload_folder(Path(folder), storage.join(self.run_dir, self._next))
                self._next = other_than(self._next)
                return
            ray.train.report(report, checkpoint=ray.train.Checkpoint.from_directory(folder))


def load_weights(folder: str | Path, name: str = "model.pt") -> dict[str, Tensor]:
    """The model's state dict in a training checkpoint's folder."""
    weights: dict[str, Tensor] = torch.load(Path(folder) / name, weights_only=True, map_location="cpu")
    return weights


def final_weights(run_dir: str) -> dict[str, Tensor]:
    """The state dict of a finished run: the average where one was kept.

    Raises:
        InputError: the run has no checkpoint.
    """
    checkpoint = last_checkpoint(run_dir)
    if checkpoint is None:
        raise InputError(f"{run_dir}: no checkpoint, expected a finished training run")
    with checkpoint.as_directory() as folder:
        name = "average.pt" if (Path(folder) / "average.pt").is_file() else "model.pt"
        return load_weights(folder, name)


class Meter:
    """Averages of what a loop reports, and the shares of time that went into data and checkpoints."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps, self._images = 0, 0
        self._spent = dict.fromkeys(("data_wait", "checkpoint"), 0.0)
        self._since = time.perf_counter()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, timing how long each was waited for."""
        iterator = iter(batches)
        while True:
            with self.timing("data_wait"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def timing(self, what: Literal["data_wait", "checkpoint"]) -> Iterator[None]:
        """Count the time of the block."""
        started = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - started

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """One step's losses and images."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())
        self._steps += 1
        self._images += images

    def collect(self) -> dict[str, float]:
        """The averages since the last call, under MLflow's names."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        result = {f"train/loss_{name}": total / max(1, self._steps) for name, total in self._sums.items()}
        result["train/images_per_second"] = self._images / seconds
        result |= {f"train/{what}_fraction": min(1.0, spent / seconds) for what, spent in self._spent.items()}
        self._sums, self._steps, self._images, self._spent = {}, 0, 0, dict.fromkeys(self._spent, 0.0)
        self._since = time.perf_counter()
        return result


def open_run(storage_uri: str, workflow: str, config: str, resume: str) -> str:
    """The folder of the run to continue, or of a new one, named after its config and the microsecond it began in.

    Raises:
        InputError: there is no run of the name to continue.
    """
    name = resume or f"{config}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = storage.absolute(storage.join(storage_uri, "runs", workflow, name))
    if resume and not storage.exists(run_dir):
        raise InputError(f"--resume {resume}: no such run, {run_dir} does not exist")
    return run_dir


def hold_to_inputs(run_dir: str, inputs: Mapping[str, str]) -> None:
    """Note what a run learns from in its `inputs.json`, and hold it to what is noted there.

    Args:
        run_dir: its folder.
        inputs: name -> digest of a table, id of a teacher and so on.

    Raises:
        InputError: an input is another one than the run began with.
    """
    uri = storage.join(run_dir, "inputs.json")
    before = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    for name, value in inputs.items():
        if before.get(name, value) != value:
            raise InputError(f"{run_dir}: began with {name} {before[name]}, now has {value}, expected the same")
    if not inputs.keys() <= before.keys():
        storage.write_bytes(uri, json.dumps({**before, **inputs}, indent=1).encode())


def find_run(storage_uri: str, workflow: str, config: str) -> str:
    """The name of the last run of a config, as `--resume` takes it; empty if there is none."""
    filesystem, path = storage.resolve(storage.join(storage_uri, "runs", workflow))
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return max((str(info.base_name) for info in found if info.base_name.startswith(f"{config}-")), default="")


def check_shared(field: str, size: int, workers: int) -> None:
    """Raise InputError where a batch cannot be shared evenly among the workers."""
    if size < max(1, workers) or size % max(1, workers):
        raise InputError(f"{field}: {size}, expected a multiple of the {max(1, workers)} workers")


def print_progress(job: str, step: int, steps: int, metrics: Mapping[str, float]) -> None:
    """One line of progress."""
    losses = " ".join(
        f"{name.removeprefix('train/loss_')} {value:.3f}" for name, value in metrics.items() if "/loss_" in name
    )
    rate, wait = metrics["train/images_per_second"], metrics["train/data_wait_fraction"]
    print(f"{job} {step}/{steps}  {losses}  {rate:.0f} images/s  data wait {wait:.1%}", flush=True)
