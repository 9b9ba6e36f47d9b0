"""One thread that runs the models of a replica, and batches the images that wait.

request --decode (pool)--> job --+--> encode images of one size together --> cache by digest --> answer each
a seen image ---------------> job +--------------------------------------------------------------> answer
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ovd_models.batches import TensorRecord, num_bytes
from workflows.serving.metrics import Metrics
from workflows.serving.models import ServedModel
from workflows.serving.texts import ByteLru

BLOCK = 1_000
"""Bytes of an entry of the cache beside its tensors, about."""


@dataclass(eq=False)
class Job:
    """A request at the model."""

    model: ServedModel
    key: tuple[str, str]
    """Digests of the model and of the image."""
    image: Tensor | None
    """[3, H, W] uint8; None if the image is encoded already."""
    encoded: Any
    answer: Callable[[Any], Any]
    """Called with the encoded image."""
    future: "Future[Any]" = field(default_factory=Future)
    milliseconds: dict[str, float] = field(default_factory=dict)
    queued: float = field(default_factory=time.perf_counter)


class ModelWorker:
    """Runs jobs in order, except that images of one size and model that wait are encoded together.

    Batches hold one size only: padding to the largest would let an answer depend on other clients' images.
    """

    def __init__(self, metrics: Metrics, *, threads: int, max_batch: int, cache_bytes: int) -> None:
        self._metrics, self._threads, self._max_batch = metrics, threads, max_batch
        self.images: ByteLru[tuple[str, str], Any] = ByteLru("images", cache_bytes, metrics)
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.last_done = time.monotonic()
        """When a model last answered, in seconds of `time.monotonic`."""
        self.busy_since: float | None = None
        """When the encoding or the answer at work began; None if none is."""
        threading.Thread(target=self._run, name="models", daemon=True).start()

    def submit(self, job: Job) -> "Future[Any]":
        """Queue a job; its future has the answer."""
        with self._lock:
            self._waiting.append(job)
        job.future.add_done_callback(lambda _: self._forget(job))
        self._signal.put(None)
        return job.future

    def _forget(self, job: Job) -> None:
        """Free the image of a job that was cancelled while it waited, as when its client is gone."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
                job.image = None

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            self._signal.get()
            jobs = self._take()
            if jobs:
                with torch.inference_mode():
                    self._step(jobs)
                self.busy_since = None

    def _take(self) -> list[Job]:
        """The next job, and those that can be encoded with it."""
        with self._lock:
            if not self._waiting:  # a batch took them
                return []
            jobs = [first := self._waiting.popleft()]
            if first.image is not None and first.model.batches:
                shape = first.image.shape
                same = [job for job in self._waiting if job.model is first.model and _has_shape(job, shape)]
                jobs += same[: self._max_batch - 1]
                for job in jobs[1:]:
                    self._waiting.remove(job)
            return jobs

    def _step(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        self.busy_since = time.monotonic()
        try:
            self._encode(jobs)
        except BaseException as error:
            for job in jobs:
                job.future.set_exception(error)
            return
        for job in jobs:
            started, self.busy_since = time.perf_counter(), time.monotonic()
            try:
                result = job.answer(job.encoded)
            except BaseException as error:
                job.future.set_exception(error)
            else:
                self.last_done = time.monotonic()
                job.milliseconds["answer"] = 1000 * (time.perf_counter() - started)
                job.future.set_result(result)

    def _encode(self, jobs: list[Job]) -> None:
        """Encode the images of jobs, each once, and keep them."""
        started = time.perf_counter()
        new = {job.key: job for job in jobs if job.image is not None}
        images = [job.image for job in new.values() if job.image is not None]
        if images:
            model = jobs[0].model
            encoded = dict(zip(new, map(_own, model.encode(images)), strict=True))
            self._metrics.batch.labels(model.name).observe(len(images))
            for key, value in encoded.items():
                self.images.put(key, value, num_bytes(value) + BLOCK)
            for job in jobs:
                job.encoded = encoded[job.key]
        ended = time.perf_counter()
        for job in jobs:
            job.milliseconds["queue"] = 1000 * (started - job.queued)
            job.milliseconds["encode"] = 1000 * (ended - started)
            job.image = None


def _has_shape(job: Job, shape: torch.Size) -> bool:
    return job.image is not None and job.image.shape == shape


def _own(encoded: Any) -> Any:
    """An encoded image in memory of its own: a view into its batch would keep all of it as long as itself."""
    return encoded.map(_copy_view) if isinstance(encoded, TensorRecord) else _copy_view(encoded)


def _copy_view(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
