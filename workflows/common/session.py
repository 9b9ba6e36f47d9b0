"""The training loop's shared parts: optimiser, batches on the device, precision, metrics, checkpoints.

The loop itself stays visible in each workflow:

    session = Session(model, stage, device, logger)
    for batch in session.batches("boxes", run.detection_batch, DetectionCollate()):
        with session.autocast():
            losses = session.model(batch)
        session.update(losses)
        session.end_step(losses, run.detection_batch)
"""

import contextlib
import itertools
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import torch
import torch.distributed
from PIL import Image
from ray.train import CheckpointConsistencyMode, CheckpointUploadMode
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data_prep import storage
from workflows.common.acceleration import DeviceCopies, PinnedCollate, autocast_dtype, compile_backbones
from workflows.common.optimisation import STEPS_PER_BLOCK, build_optimiser, build_schedule, moving_average
from workflows.common.tracking import MetricLogger
from workflows.common.training import (
    DRIVER_CHECKPOINTS,
    NotFiniteError,
    Stage,
    last_checkpoint,
    load_weights,
    other_than,
    step_of,
)

QUIET_SECONDS = 10.0
"""Between log lines that are further apart, lines tell the steps and the time."""
CHECKPOINT_STEPS = 2 * STEPS_PER_BLOCK
"""A stream resumes exactly at multiples of this, also one that comes every second step."""


@dataclass(frozen=True)
class Validated:
    """What a model reached between two steps."""

    metrics: Mapping[str, float]
    """Under MLflow's names without `eval/`."""
    pictures: Sequence[Image.Image] = ()
    """Results on the same images every time."""


class Session:
    """A model in training on one worker: optimiser, schedule, position and metrics; resumed from its checkpoint."""

    def __init__(self, model: nn.Module, stage: Stage, device: torch.device, logger: MetricLogger) -> None:
        """Move the model to the device and restore the stage's last checkpoint.

        Args:
            model: with the weights to start from.
            stage: settings, names and the folder of checkpoints.
            device: of this worker.
            logger: writes metrics to MLflow, from rank 0.
        """
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.stage, self.settings, self.device, self.logger, self.step = stage, stage.settings, device, logger, 0
        self.meter = Meter()
        self._replaced = 0
        self._uploading = self._committed = 0  # steps of the last checkpoint and of the last one that is committed
        self._unchecked: list[
            tuple[int, tuple[str, ...], Tensor]
        ] = []  # steps, names and values of losses or gradients
        self._notice, self._saved_on_notice = False, False  # of the end of a node
        self._part = 0  # of the batch, from 0 to `accumulate` - 1
        if device.type == "cuda" and self.world > 1:
            model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        if self.settings.compile:
            compile_backbones(model)
        self.module = model.to(device).to(memory_format=torch.channels_last)  # faster convolutions
        self.optimiser = build_optimiser(model, self.settings)
        self.schedule = build_schedule(self.optimiser, self.settings)
        self.dtype = autocast_dtype(self.settings.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        decay = self.settings.ema_decay
        self.average = AveragedModel(self.module, avg_fn=moving_average(decay), use_buffers=True) if decay else None
        self._next = DRIVER_CHECKPOINTS[0]
        self._restore()
        self.model = DistributedDataParallel(self.module) if self.world > 1 else self.module
        self.model.train()
        self._begun = self.step
        self._began_at = self._told_at = time.perf_counter()

    def _restore(self) -> None:
        checkpoint = last_checkpoint(self.stage.folder)
        given = ray.train.get_checkpoint() if self.settings.workers else None
        if given is not None and (checkpoint is None or step_of(given) > step_of(checkpoint)):
            checkpoint = given
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            self.module.load_state_dict(load_weights(folder))
            progress = torch.load(Path(folder) / "progress.pt", weights_only=True, map_location=self.device)
        if self.average is not None:
            self.average.load_state_dict(progress["average"])
        self.optimiser.load_state_dict(progress["optimiser"])
        self.schedule.load_state_dict(progress["schedule"])
        self.scaler.load_state_dict(progress["scaler"])
        self.step = int(progress["step"])
        if checkpoint.path.endswith(self._next):  # kept while the next one is written
            self._next = other_than(self._next)

    def batches(self, name: str, batch_size: int, collate: Any, prefetch: int = 2) -> Iterator[Any]:
        """This worker's share of the batches of a data set on its device, in `accumulate` parts, until the last step.

        Waiting time is measured.

        Args:
            name: of the data set.
            batch_size: rows in a batch, over all workers.
            collate: rows -> batch.
            prefetch: batches prepared ahead.
        """
        shard, size = ray.train.get_dataset_shard(name), batch_size // (self.world * self.settings.accumulate)
        to_device = DeviceCopies(self.device) if self.device.type == "cuda" else None
        if to_device is not None:
            collate = PinnedCollate(collate)
        windows = (
            shard.iter_torch_batches(batch_size=size, collate_fn=collate, prefetch_batches=prefetch)
            for _ in itertools.count()
        )
        batches = itertools.chain.from_iterable(windows)
        while not self.done:
            with self.meter.timing("data_wait"):
                batch = next(batches)
            self._count_replaced(batch.unreadable)
            torch.manual_seed(self._seed())
            if isinstance(self.model, DistributedDataParallel):  # else each part would wait for the other workers
                self.model.require_backward_grad_sync = self._is_last_part
            yield batch.to(self.device) if to_device is None else to_device(batch)

    def _seed(self) -> int:
        """Each part of a step draws from a seed of its own, so that a resumed run equals an undisturbed one."""
        return step_seed(self.settings.seed, self.step, self.rank + self.world * self._part)

    def generator(self) -> torch.Generator:
        """A generator on the CPU with this part's seed."""
        return torch.Generator().manual_seed(self._seed())

    @property
    def _is_last_part(self) -> bool:
        return self._part == self.settings.accumulate - 1

    def _count_replaced(self, unreadable: Sequence[str]) -> None:
        """Count this rank's images that could not be read, and print the first."""
        if unreadable and not self._replaced:
            print(f"{self.stage.job}: replaced an image that cannot be read: {unreadable[0]}", flush=True)
        self._replaced += len(unreadable)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the model's forward pass in the stage's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """One optimiser step on the sum of the losses, after the last part of the batch.

        Whether the sum and the gradient are finite is read where the host waits anyway: before the next log line and
        checkpoint.
        """
        values = torch.stack(list(losses.values()))
        self._unchecked.append((self.step, tuple(losses), values.detach()))
        loss = values.sum()
        if not self._part:
            self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss / self.settings.accumulate).backward()  # type: ignore[no-untyped-call]
        self._part = (self._part + 1) % self.settings.accumulate
        if self._part:
            return
        self.scaler.unscale_(self.optimiser)
        if self.settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.module.parameters(), self.settings.clip_value)
        gradients = [value.grad for value in self.module.parameters() if value.grad is not None]
        norm = nn.utils.get_total_norm(gradients).to(self.device)
        if not self.scaler.is_enabled():  # which skips such steps
            self._unchecked.append((self.step, ("gradient",), norm[None]))
        if self.settings.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.settings.clip_norm, norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.step += 1

    def _check_losses(self) -> None:
        """Refuse to go on after a loss or gradient that is not finite, on all ranks at once; every rank calls this."""
        sums = torch.stack([torch.tensor(0.0, device=self.device), *(values.sum() for *_, values in self._unchecked)])
        broken = ~torch.isfinite(sums)  # counted from 1, so that 0 stands for none
        first = torch.where(broken.any(), broken.int().argmax(), len(sums))
        if self.world > 1:
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        number = int(first) - 1
        if number >= len(self._unchecked):
            self._unchecked.clear()
            return
        step, names, values = self._unchecked[number]
        own = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
        raise NotFiniteError(self.stage.job, step, own)

    def _all_replaced(self) -> int:
        """The replaced images of all ranks since the training or its last resume began; every rank calls this."""
        if self.world == 1:
            return self._replaced
        count = torch.tensor(self._replaced, device=self.device)
        torch.distributed.all_reduce(count)
        return int(count)

    def end_step(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Log and checkpoint when due, after the last part of the batch.

        Metrics are sent when the checkpoint after them is committed: steps that a crash undoes are never logged.

        Args:
            losses: of the step or its part.
            images: of the step, over all workers.

        Raises:
            NotFiniteError: a loss since the last log line was not finite.
        """
        self.meter.add(losses, images / self.settings.accumulate)
        if self._part:
            return
        logs = self.step % self.settings.log_every == 0
        if logs:
            self._check_losses()
        replaced = self._all_replaced() if logs else 0
        if self.rank == 0 and logs:
            metrics = self.meter.collect()
            logged = {**metrics, "train/learning_rate": max(map(float, self.schedule.get_last_lr()))}
            logged |= {"train/replaced_images": replaced} if replaced else {}
            self.logger.log(logged, self.run_step)
            print_progress(self._label, metrics, self._times())
            self._told_at = time.perf_counter()
        elif self.rank == 0 and time.perf_counter() - self._told_at >= QUIET_SECONDS:
            print(f"{self._label}  {self._times()}", flush=True)  # no losses, which would wait for the device
            self._told_at = time.perf_counter()
        if self.due or (logs and self._must_save()):
            with self.meter.timing("checkpoint"):
                committed = self.checkpoint()
            self.logger.flush(until=self.stage.first_step + committed, wait=self.done)

    @property
    def _label(self) -> str:
        return f"{self.stage.job} {self.step}/{self.settings.steps}"

    def _times(self) -> str:
        """The time since the start and that to the end."""
        elapsed = time.perf_counter() - self._began_at
        left = elapsed / (self.step - self._begun) * (self.settings.steps - self.step)
        return f"{tqdm.format_interval(elapsed)}, {tqdm.format_interval(left)} left"

    def validate(self, every: int, measure: Callable[[nn.Module], "Validated"]) -> None:
        """Measure the weights, or their average, and log the results under `eval/`.

        Rank 0 does so while the others wait at their next exchange of gradients; not after the last step, when the
        evaluation of the trained model follows.

        Args:
            every: steps from one measurement to the next; 0 for none.
            measure: gets the model in evaluation mode.
        """
        if self.rank or self._part or not every or self.step % every or self.done:
            return
        model = self.module if self.average is None else self.average.module
        model.eval()
        with torch.no_grad(), self.autocast():
            found = measure(model)
        model.train()
        self.logger.log({f"eval/{name}": value for name, value in found.metrics.items()}, self.run_step)
        for number, picture in enumerate(found.pictures):
            self.logger.log_image(picture, f"validation_{number}", self.run_step)
        values = " ".join(f"{name} {value:.3f}" for name, value in found.metrics.items())
        print(f"{self._label}  {values}", flush=True)

    def _must_save(self) -> bool:
        """Whether a node is about to be taken away, as spot nodes are, and this step can end with a checkpoint.

        Once for each group of workers: Ray Train replaces the group when the node goes. Every rank calls this.
        """
        if not self.settings.workers or self._saved_on_notice:
            return False
        self._notice = self._notice or ray.train.get_preemption_info() is not None
        if not self._notice or self.step % CHECKPOINT_STEPS:
            return False
        if self.rank == 0:
            print(f"{self.stage.job}: a node will be taken away, saving step {self.step}", flush=True)
        self._saved_on_notice = True
        return True

    @property
    def run_step(self) -> int:
        """Steps done, with those of the stages before."""
        return self.stage.first_step + self.step

    @property
    def due(self) -> bool:
        """Whether the step just done ends with a checkpoint; not between the parts of a batch."""
        return not self._part and (self.step % self.settings.checkpoint_every == 0 or self.done)

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.settings.steps

    def checkpoint(self) -> int:
        """Save from rank 0 and report from all ranks; returns the last step whose checkpoint is committed.

        Ray Train uploads what was saved to a local folder beside the next steps. First the upload before is waited
        for, so that at most one is under way, and at the end of the training the last one.

        Raises:
            NotFiniteError: a loss was not finite; nothing is saved.
        """
        self._check_losses()
        self._wait_for_upload()
        report = {"step": self.step}
        if self.rank != 0:
            ray.train.report(report, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        elif self.settings.workers:
            folder = tempfile.mkdtemp(prefix="ovd-")
            try:
                self._write(Path(folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)  # a full disk would get fuller with each retry
                raise
            checkpoint = ray.train.Checkpoint.from_directory(folder)  # deleted after its upload
            ray.train.report(report, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        else:  # Ray Train keeps no checkpoints of a loop inside the driver
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder))
                storage.upload_folder(Path(folder), storage.join(self.stage.folder, self._next))
            self._next = other_than(self._next)
        self._uploading = self.step
        if self.done or not self.settings.workers:
            self._wait_for_upload()
        return self._committed

    def _write(self, folder: Path) -> None:
        """Write the files of a checkpoint."""
        torch.save(self.module.state_dict(), folder / "model.pt")
        if self.average is not None:
            torch.save(self.average.module.state_dict(), folder / "average.pt")
        progress = {
            "average": {} if self.average is None else self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }
        torch.save(progress, folder / "progress.pt")
        (folder / "step").write_text(str(self.step))  # read alone where the rest is not needed

    def _wait_for_upload(self) -> None:
        """Return when the last reported checkpoint is committed; the other ranks wait for rank 0 at their next one."""
        if self.rank == 0 and self.settings.workers and self._uploading > self._committed:
            ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        self._committed = self._uploading


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's global generators in a step, different for every step and rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


class Meter:
    """Averages of losses, and the fractions of time spent waiting for data and writing checkpoints."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._added: Counter[str] = Counter()  # parts with a loss; some have only boxes, others only captions
        self._parts, self._images = 0, 0.0
        self._spent = dict.fromkeys(("data_wait", "checkpoint"), 0.0)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def timing(self, what: Literal["data_wait", "checkpoint"]) -> Iterator[None]:
        """Add the block's time."""
        started = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - started

    def add(self, losses: Mapping[str, Tensor], images: float) -> None:
        """Add the losses of a step or its part, which stay on their device until `collect`, and its images."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float()
        self._added.update(losses.keys())
        self._parts += 1
        self._images += images

    def collect(self) -> dict[str, float]:
        """The averages since the last call, under MLflow's names."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        totals = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        averages = {name: total / self._added[name] for name, total in zip(self._sums, totals, strict=True)}
        result = {f"train/loss_{name}": average for name, average in averages.items()}
        result["train/total_loss"] = sum(totals) / max(1, self._parts)
        result["train/images_per_second"] = self._images / seconds
        result |= {f"train/{what}_fraction": min(1.0, spent / seconds) for what, spent in self._spent.items()}
        self._sums, self._parts, self._images, self._spent = {}, 0, 0.0, dict.fromkeys(self._spent, 0.0)
        self._added.clear()
        self._since = time.perf_counter()
        return result


def print_progress(step: str, metrics: Mapping[str, float], times: str) -> None:
    """One line of progress."""
    losses = " ".join(
        f"{name.removeprefix('train/loss_')} {value:.3f}" for name, value in metrics.items() if "/loss_" in name
    )
    rate, wait = metrics["train/images_per_second"], metrics["train/data_wait_fraction"]
    print(f"{step}  {losses}  {rate:.3g} images/s  data wait {wait:.1%}  {times}", flush=True)
