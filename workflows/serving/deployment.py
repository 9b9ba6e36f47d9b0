"""The Ray Serve application: replicas that hold the models, their scaling, health and end.

The driver imports this without torch; `opening.py` loads the models in the replicas.
"""

import hashlib
import logging
import os
import threading
import time
import uuid
from typing import Any

from workflows.serving import environment  # noqa: F401  # isort: skip  # before Ray Serve reads it

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ovd_models.errors import InputError
from workflows.serving.limits import RETRY_AFTER_SECONDS
from workflows.serving.metrics import DIRECTORY, remove_if_last
from workflows.serving.settings import Settings

TOKEN_VARIABLE = "OVD_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def digest_of_token(token: str) -> str:
    """The SHA-256 of a bearer token; empty for none. Only this is kept and sent to replicas."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


class Replica:
    """One replica: an endpoint in a process of Ray Serve."""

    def __init__(self, settings: Settings) -> None:
        """Load the models."""
        self.settings = settings
        self.token_digest = settings.token_digest or digest_of_token(os.environ.get(TOKEN_VARIABLE, "").strip())
        host, _ = listening_address()
        if host not in LOOPBACK and not self.token_digest:
            raise InputError(f"host {host}: others can reach it, expected token_file or the variable {TOKEN_VARIABLE}")
        from workflows.serving import opening  # torch and the models: seconds that the driver need not spend

        logging.disable(logging.NOTSET)  # scripts keep the processes of their Ray quiet; this log is a file
        self.opening = opening
        self.endpoint = opening.open_endpoint(settings)
        threading.Thread(target=opening.return_memory, args=(self.endpoint.worker,), daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        """Build the routes; Ray Serve calls this after constructing the replica."""
        return self.opening.build_api(self.endpoint, self.token_digest, adds_ids=False)

    def __del__(self) -> None:
        """Remove this application's temporary files on the machine; Ray Serve calls this when it ends a replica."""
        remove_if_last()

    def check_health(self) -> None:
        """Run each model on a small image, unless one is at work or has just answered.

        Ray Serve replaces a replica that fails this three times in a row. What a model is at may take as long as a
        request may wait for its answer; after that nobody waits for it.

        Raises:
            RuntimeError: a model does not answer.
        """
        worker, seconds = self.endpoint.worker, self.settings.limits.answer_seconds
        since = worker.busy_since
        if since is not None and time.monotonic() - since > seconds:
            raise RuntimeError(f"the models have been at one request for more than {seconds:g} seconds")
        if since is not None or time.monotonic() - worker.last_done < 10:
            return
        self.opening.probe_models(self.endpoint, timeout=25)


def find_controller() -> Any:
    """The actor that runs Ray Serve on this cluster; None if nothing is served."""
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def listening_address() -> tuple[str, int]:
    """The host and port on which Ray Serve listens, wherever they were set."""
    options = ray.get(find_controller().get_http_config.remote())
    return str(options.host or "0.0.0.0"), int(options.port)


def build(
    settings: Settings, *, replicas: int, max_replicas: int, gpus: float, cpus: float, log_requests: bool
) -> Application:
    """Configure the Ray Serve application."""
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads answer 30 times slower on a busy machine
        # Freed memory is used again, since new pages cost a quarter of the CPU time; `return_memory` waits for a pause.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
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
