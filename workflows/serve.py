"""Serve a trained detector or OV-SAM over HTTP; each request names the objects to find.

checkpoint folder or models:/ URI --> replicas of Endpoint (Ray Serve)
multipart image, names --> RequestLimiter (bytes, queue) --> decode --> detect, or segment by prompts --> JSON

python workflows/serve.py --model runs/demo/codet --port 8000
python workflows/serve.py --model models:/ovd-codet-pictograms@champion --storage store
serve run workflows.serve:app model=runs/demo/codet

curl -F image=@street.jpg -F 'vocabulary=["red umbrella", "anchor"]' http://127.0.0.1:8000/v1/detect
curl -F image=@street.jpg -F 'prompts={"points": [[120, 80]]}' http://127.0.0.1:8000/v1/segment      # an OV-SAM
"""

import contextlib
import dataclasses
import io
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from ovd_models.checkpoints import read_info
from ovd_models.errors import InputError
from workflows.common import cli, cluster, registry
from workflows.serving.api import Endpoint
from workflows.serving.requests import RETRY_AFTER_SECONDS, Limits

SERVED_METHODS = ("codet", "vild", "ovsam")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One endpoint."""

    model: str = ""
    """The checkpoint: a folder, its URI, or models:/<name>@<alias>."""
    storage: str = "store"
    """Storage of models:/ URIs and of the teacher's `texts`."""
    texts: bool = True
    """Read embeddings of names from the teacher's `texts`, held in memory by each replica; embed only other names."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 chooses a free port."""
    replicas: int = 1
    """Copies of the model; each answers one request at a time, with all its threads."""
    threads: int = 0
    """Threads of a replica; 0 uses all cores."""
    gpus: float = 0
    """GPUs of a replica."""
    limits: Limits = field(default_factory=Limits)


def local() -> Run:
    """One replica on this machine."""
    return Run()


CONFIGS = {"local": local}


def check_model(run: Run) -> None:
    """Check the checkpoint before any work; in a replica the error would be a failed deployment.

    Raises:
        InputError: there is no such checkpoint, or its method is not served.
    """
    method = read_info(registry.local_model(run.model, run.storage)).method
    if method not in SERVED_METHODS:
        raise InputError(f"{run.model}: a checkpoint of method {method!r}, expected one of {', '.join(SERVED_METHODS)}")


def build_application(run: Run) -> Application:
    """Configure the Ray Serve application."""
    # Torch's threads wait for each other asleep: spinning, they answer 30 times slower on a busy machine.
    environment = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}
    deploy = serve.deployment(
        name="Endpoint",
        num_replicas=run.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": run.gpus, "runtime_env": environment},
        # RequestLimiter counts the requests of a replica and lets /healthz pass; these limits are only a second guard.
        max_ongoing_requests=run.limits.max_queued + 64,
        max_queued_requests=run.limits.max_queued + 64,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        graceful_shutdown_wait_loop_s=0.2,
    )
    return deploy(serve.ingress()(Endpoint)).bind(
        run.model,
        run.storage,
        texts=run.texts,
        threads=run.threads,
        device="cuda" if run.gpus else "cpu",
        limits=run.limits,
    )


def app(args: dict[str, Any]) -> Application:
    """Build the application of `serve run workflows.serve:app model=FOLDER [field=value ...]`.

    Raises:
        InputError: an argument is not a field of `Run` or has the wrong type, or there is no such checkpoint.
    """
    known = [entry.name for entry in dataclasses.fields(Run)]
    for name in args:
        if name not in known:
            raise InputError(f"{name}: unknown argument, expected one of {', '.join(known)}")
    try:
        run = TypeAdapter(Run).validate_python(args)
    except ValidationError as error:
        fault = error.errors()[0]
        raise InputError(f"{fault['loc'][0]}: {fault['msg']}") from error
    check_model(run)
    return build_application(run)


@contextlib.contextmanager
def serve_model(run: Run) -> Iterator[str]:
    """Serve while the block runs; yields the base URL. Ray must be initialised.

    Raises:
        InputError: there is no such checkpoint, or the port is taken.
    """
    check_model(run)
    port = free_port(run.host, run.port)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        options = {"host": run.host, "port": port, "request_timeout_s": 120}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        serve.run(build_application(run), name="ovd", logging_config=quiet)
        yield f"http://{run.host}:{port}"
    finally:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray prints there that its own controller ends
            serve.shutdown()  # type: ignore[no-untyped-call]


def free_port(host: str, port: int) -> int:
    """Check that a port is free, or choose one if it is 0.

    Raises:
        InputError: the port is taken, or the host is not an address of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error
        return int(probe.getsockname()[1])


def main() -> None:
    """Serve until Ctrl-C."""
    run = cli.parse(CONFIGS, __doc__, writes=False)
    check_model(run)
    free_port(run.host, run.port)
    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop
        cluster.start_ray()
        try:
            with serve_model(run) as url:
                print(f"serving {run.model} at {url}; API: {url}/docs; Ctrl-C stops it", flush=True)
                threading.Event().wait()
        finally:
            ray.shutdown()
    print("stopped")


if __name__ == "__main__":
    cli.execute(main)
