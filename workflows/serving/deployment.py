"""The Ray Serve application: replicas that hold the models, their scaling, health and end."""

import ctypes
import hashlib
import logging
import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from workflows.serving import environment  # noqa: F401  # isort: skip  # before Ray Serve reads it

import torch
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ovd_models.errors import InputError
from workflows.common import registry
from workflows.serving.api import Endpoint, build_api
from workflows.serving.limits import RETRY_AFTER_SECONDS, Limits
from workflows.serving.metrics import DIRECTORY, Metrics
from workflows.serving.models import ModelSet, ServedModel, load_served, method_of, parse_models
from workflows.serving.texts import TextCache, VocabularyStore
from workflows.serving.worker import Job, ModelWorker

LOGGER = logging.getLogger("ray.serve")
TOKEN_VARIABLE = "OVD_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica needs to know."""

    model: str
    storage: str
    texts: bool
    threads: int
    device: Literal["cpu", "cuda"]
    max_batch: int
    image_cache_mb: int
    text_cache_mb: int
    refresh_seconds: float
    token_digest: str
    limits: Limits = field(default_factory=Limits)


def digest_of_token(token: str) -> str:
    """The SHA-256 of a bearer token; empty for none. Only this is kept and sent to replicas."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


class Replica:
    """One replica: an endpoint in a process of Ray Serve."""

    def __init__(self, settings: Settings) -> None:
        """Load the models."""
        self.settings = settings
        self.token_digest = settings.token_digest or digest_of_token(os.environ.get(TOKEN_VARIABLE, "").strip())
        self.endpoint = open_endpoint(settings)
        self._trim = threading.Thread(target=return_memory, args=(self.endpoint.worker,), daemon=True)
        self._trim.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the routes; Ray Serve calls this after constructing the replica."""
        return build_api(self.endpoint, self.token_digest)

    def check_health(self) -> None:
        """Run each model on a small image, unless the models have just answered; Ray Serve replaces a failing replica.

        Raises:
            RuntimeError: a model does not answer.
        """
        if time.monotonic() - self.endpoint.worker.last_done < 10:
            return
        probe_models(self.endpoint, timeout=25)


def open_endpoint(settings: Settings) -> Endpoint:
    """Load the models of a replica and warm them up.

    Raises:
        InputError: a checkpoint is missing or broken.
    """
    metrics, limits = Metrics(), settings.limits

    def load(name: str, uri: str) -> ServedModel:
        return load_served(name, uri, settings.storage, texts=settings.texts, device=settings.device)

    def newer(model: ServedModel) -> ServedModel | None:
        try:
            if registry.resolve_model(model.uri, settings.storage).version == model.version:
                return None
            return load(model.name, model.uri)
        except Exception:  # the registry is away, or the new version broken: the old one stays
            LOGGER.exception("model %s: no new version could be loaded", model.name)
            return None

    loaded = [load(name, uri) for name, uri in parse_models(settings.model).items()]
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
    if settings.refresh_seconds and any("@" in model.uri for model in loaded):

        def swapped(model: ServedModel) -> None:
            metrics.swaps.labels(model.name).inc()
            LOGGER.info("model %s is now version %s", model.name, model.version)

        models.watch(settings.refresh_seconds, swapped)
    return endpoint


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


def check_models(model: str, storage_uri: str) -> None:
    """Check the checkpoints before any work; in a replica the error would be a failed deployment.

    Raises:
        InputError: there is no such checkpoint, its method is not served, or two models have one name.
    """
    names: set[str] = set()
    for name, uri in parse_models(model).items():
        name = name or method_of(registry.local_model(uri, storage_uri))
        method_of(registry.local_model(uri, storage_uri))
        if name in names:
            raise InputError(f"--model {model}: two models named {name!r}, expected NAME=URI with different names")
        names.add(name)


def build(
    settings: Settings, *, replicas: int, max_replicas: int, gpus: float, cpus: float, log_requests: bool
) -> Application:
    """Configure the Ray Serve application."""
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads answer 30 times slower on a busy machine
        "MALLOC_ARENA_MAX": "2",  # memory of large uploads is returned
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
        DIRECTORY: f"{os.environ.get('TMPDIR', '/tmp')}/ovd-metrics-{uuid.uuid4().hex[:12]}",
    }
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas > replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas,
                initial_replicas=replicas,
                max_replicas=max_replicas,
                target_ongoing_requests=max(2, settings.max_batch),
                upscale_delay_s=5,
                downscale_delay_s=120,
            )
        }
    deploy = serve.deployment(
        name="Endpoint",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}},
        # The gate bounds what a replica accepts and lets health checks pass; these limits are a second guard.
        max_ongoing_requests=settings.limits.max_queued + settings.limits.max_uploads + 64,
        max_queued_requests=settings.limits.max_queued + settings.limits.max_uploads,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=60,
        logging_config=LoggingConfig(
            encoding="JSON", log_level="INFO" if log_requests else "WARNING", enable_access_log=False
        ),
        **scaling,
    )
    return deploy(serve.ingress()(Replica)).bind(settings)
