"""Open the models of a replica: load them, warm them up, watch for new versions, give memory back."""

import ctypes
import logging
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image

from ovd_models.errors import first_line
from workflows.serving.api import Endpoint, build_api
from workflows.serving.metrics import Metrics
from workflows.serving.models import ModelSet, ServedModel, load_served
from workflows.serving.settings import Settings
from workflows.serving.sources import parse_models, resolve_version
from workflows.serving.texts import TextCache, VocabularyStore
from workflows.serving.worker import Job, ModelWorker

__all__ = ["build_api", "open_endpoint", "probe_models", "return_memory"]
LOGGER = logging.getLogger("ray.serve")
HEALTH_SIDE = 64
MIN_SPEEDUP = 1.5
"""Least speed-up by all cores for which they are used."""
MAX_PAUSE_SECONDS = 600.0
"""Longest pause before a new version that could not be loaded is tried again."""


def open_endpoint(settings: Settings) -> Endpoint:
    """Load the models of a replica and warm them up.

    Raises:
        InputError: a checkpoint is missing or broken.
    """
    metrics, limits = Metrics(), settings.limits

    def load(name: str, uri: str) -> ServedModel:
        return load_served(name, uri, settings.storage, texts=settings.texts, device=settings.device)

    loaded = [load(name, uri) for name, uri in parse_models(settings.model).items()]
    newer = _NewVersions(load, settings.storage, settings.refresh_seconds)
    models = ModelSet({model.name: model for model in loaded}, newer)
    worker = ModelWorker(
        metrics,
        threads=settings.threads or len(os.sched_getaffinity(0)),
        max_batch=settings.max_batch,
        cache_bytes=settings.image_cache_mb * 1_000_000,
    )
    texts = TextCache(settings.text_cache_mb * 1_000_000, metrics)
    endpoint = Endpoint(models, worker, texts, VocabularyStore(settings.storage, limits, metrics), metrics, limits)
    probe_models(endpoint, timeout=300)
    if settings.device == "cpu" and not settings.threads and (os.cpu_count() or 1) > 1:
        job = Job(loaded[0], (loaded[0].digest, ""), None, None, partial(_choose_threads, loaded[0]))
        LOGGER.info("the models run on %d threads", worker.submit(job).result(300))
    if settings.refresh_seconds and any("@" in model.uri for model in loaded):

        def swapped(model: ServedModel) -> None:
            metrics.swaps.labels(model.name).inc()
            LOGGER.info("model %s is now version %s", model.name, model.version)

        models.watch(settings.refresh_seconds, swapped)
    return endpoint


class _NewVersions:
    """Loads new versions of registered models; one that fails is tried again, after ever longer pauses."""

    def __init__(self, load: Callable[[str, str], ServedModel], storage: str, seconds: float) -> None:
        self._load, self._storage, self._seconds = load, storage, seconds
        self._pauses: dict[tuple[str, str], tuple[float, float]] = {}
        """By model and version: the pause after its last try in seconds, and when that ends."""
        self._reasons: dict[str, str] = {}

    def __call__(self, model: ServedModel) -> ServedModel | None:
        """The version behind the model's URI; None if the model has it, or it cannot be loaded at the moment."""
        version = ""
        try:
            version, _ = resolve_version(model.uri, self._storage)
            pause, ends = self._pauses.get((model.name, version), (self._seconds / 2, 0.0))
            if version == model.version or time.monotonic() < ends:
                return None
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            self._pauses[model.name, version] = pause, time.monotonic() + pause
            return self._load(model.name, model.uri)
        except Exception as error:  # the registry is away, or the new version broken: the old one stays
            reason = f"version {version or '?'}: {first_line(error)}"
            if self._reasons.get(model.name) != reason:
                self._reasons[model.name] = reason
                LOGGER.error("model %s: no new version could be loaded, %s", model.name, reason)
            return None


def probe_models(endpoint: Endpoint, timeout: float) -> None:
    """Encode a small image with each model.

    Raises:
        RuntimeError: a model fails, or takes longer than `timeout` seconds.
    """
    for model in endpoint.models:
        image = model.read(Image.new("RGB", (HEALTH_SIDE, HEALTH_SIDE), "grey"))
        job = Job(model, (model.digest, ""), None, None, partial(_encode, model, image))
        try:
            endpoint.worker.submit(job).result(timeout)
        except Exception as error:
            raise RuntimeError(f"model {model.name}: {type(error).__name__} {error}") from error


def _choose_threads(model: ServedModel, _: object) -> int:
    """Set the calling thread's torch threads to all cores, or to one where they hardly help: small models' operators.

    One thread leaves the other cores to decoding, to HTTP and to other replicas.
    """
    image, seconds = model.read(Image.new("RGB", (HEALTH_SIDE, HEALTH_SIDE), "grey")), {}
    for threads in (1, len(os.sched_getaffinity(0))):
        torch.set_num_threads(threads)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            model.encode([image])
            times.append(time.perf_counter() - started)
        seconds[threads] = min(times)
    best = min(seconds, key=lambda threads: seconds[threads])
    chosen = 1 if seconds[1] < MIN_SPEEDUP * seconds[best] else best
    torch.set_num_threads(chosen)
    return chosen


def _encode(model: ServedModel, image: torch.Tensor, _: object) -> None:
    model.encode([image])


def return_memory(worker: ModelWorker) -> None:
    """Give memory that large requests took back to the system, whenever the models have been idle for a second."""
    try:
        trim = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # no glibc
        return
    trimmed = 0.0
    while True:
        time.sleep(1)
        last = worker.last_done
        if last > trimmed and time.monotonic() - last > 1:
            trim(0)
            trimmed = time.monotonic()
