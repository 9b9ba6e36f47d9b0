"""Serve trained models over HTTP, with a web page; each request names the objects to find.

checkpoint folder or models:/ URI --> replicas (Ray Serve) behind HAProxy
image, names --> gate (token, bytes, queue) --> decode --> encode, batched --> detect, segment, classify --> JSON

python workflows/serve.py --model runs/demo/codet --port 8000
python workflows/serve.py --model detector=models:/ovd-codet-pictograms@champion,pointer=store/runs/ovsam/NAME/model
serve run workflows.serve:app model=runs/demo/codet

curl -F image=@street.jpg -F 'vocabulary=["red umbrella", "anchor"]' http://127.0.0.1:8000/v1/detect
curl -F image=@street.jpg -F 'prompts={"points": [[120, 80]]}' http://127.0.0.1:8000/v1/segment      # an OV-SAM
"""

from workflows.common import brief_help

brief_help.answer(
    __name__, __file__, "model storage host port token_file replicas max_replicas gpus threads refresh_seconds"
)

import contextlib
import dataclasses
import io
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflows.serving.deployment import (  # isort: skip  # before Ray Serve is imported elsewhere
    LOOPBACK,
    TOKEN_VARIABLE,
    build,
    digest_of_token,
    find_controller,
    listening_address,
)

import click
import ray
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from data_prep.progress import working
from ovd_models.errors import InputError
from workflows.common import cli, cluster
from workflows.serving.limits import Limits
from workflows.serving.settings import Settings
from workflows.serving.sources import check_models

APPLICATION = "ovd"
"""Name in Ray Serve."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One endpoint."""

    model: str = ""
    """The checkpoint: a folder, its URI, or models:/<name>@<alias>; several as NAME=URI, separated by commas."""
    storage: str = "store"
    """Storage of models:/ URIs, of the teacher's `texts` and of vocabularies that clients store."""
    texts: bool = True
    """Read embeddings of names from the teacher's `texts`, held in memory by each replica; embed only other names."""
    host: str = "127.0.0.1"
    """On another host than this machine alone, a token is required."""
    port: int = 8000
    """0 chooses a free port."""
    token_file: str = ""
    """File with the bearer token that requests must have; or set the variable OVD_TOKEN."""
    replicas: int = 1
    """Copies of the models, at least."""
    max_replicas: int = 0
    """Copies at most: under load, Ray Serve adds some; 0 for no more than `replicas`."""
    cpus: float = 1
    """CPUs that Ray reserves for a replica."""
    threads: int = 0
    """Threads of a replica's models; 0 chooses one or all cores by a measurement at the start."""
    gpus: float | None = None
    """GPUs of a replica, such as 0.5 for two replicas on one; None for one if each replica can have it, else 0."""
    wait_minutes: float = 20.0
    """How long a cluster that grows is waited for."""
    max_batch: int = 8
    """Images of waiting requests that are encoded together at most."""
    image_cache_mb: int = 64
    """Encoded images that a replica keeps: other names or prompts for a seen image skip the encoder."""
    text_cache_mb: int = 64
    """Embedded names that a replica keeps."""
    refresh_seconds: float = 15.0
    """How often a new version behind a models:/<name>@<alias> is looked for; 0 for never."""
    log_requests: bool = True
    """Log one JSON line per request to Ray's log of the replica."""
    limits: Limits = field(default_factory=Limits)


def local() -> Run:
    """One replica on this machine."""
    return Run()


CONFIGS = {"local": local}


def check(run: Run) -> None:
    """Check the models and the token before any work.

    Raises:
        InputError: a number is out of range, a checkpoint is missing or not served, or strangers could reach the
            endpoint.
    """
    for name in ("replicas", "max_batch"):
        if getattr(run, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name)}: expected 1 or more")
    for name in ("cpus", "gpus", "threads", "max_replicas", "image_cache_mb", "text_cache_mb", "refresh_seconds"):
        if (getattr(run, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(run, name):g}: expected 0 or more")
    if 0 < run.max_replicas < run.replicas:
        raise InputError(f"--max-replicas {run.max_replicas}: expected 0, or at least the {run.replicas} of --replicas")
    check_models(run.model, run.storage)
    if run.host not in LOOPBACK and not read_token(run):
        raise InputError(
            f"--host {run.host}: others can reach it, expected --token-file or the variable {TOKEN_VARIABLE}"
        )


def read_token(run: Run) -> str:
    """The bearer token; empty for none.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    if not run.token_file:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(run.token_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {run.token_file}: cannot be read ({type(error).__name__})") from error
    if not token:
        raise InputError(f"--token-file {run.token_file}: empty, expected a token")
    return token


def count_gpus(run: Run) -> float:
    """GPUs of a replica: those asked for, or one if this machine, or the cluster, has one for each."""
    if run.gpus is not None:
        return run.gpus
    if ray.is_initialized():
        have = cluster.resources().get("GPU", 0)
    else:
        import torch  # here, since it takes seconds

        have = torch.cuda.device_count()
    return float(have >= max(run.replicas, run.max_replicas))


def build_application(run: Run) -> Application:
    """Configure the Ray Serve application."""
    gpus = count_gpus(run)
    settings = Settings(
        model=run.model,
        storage=run.storage,
        texts=run.texts,
        threads=run.threads,
        device="cuda" if gpus else "cpu",
        max_batch=run.max_batch,
        image_cache_mb=run.image_cache_mb,
        text_cache_mb=run.text_cache_mb,
        refresh_seconds=run.refresh_seconds,
        token_digest=digest_of_token(read_token(run)),
        limits=run.limits,
    )
    return build(
        settings,
        replicas=run.replicas,
        max_replicas=run.max_replicas,
        gpus=gpus,
        cpus=run.cpus,
        log_requests=run.log_requests,
    )


class BadArgumentError(click.ClickException, RayServeException):
    """Of `app`: its line is all that `serve run` (click) prints and that `serve status` (Ray Serve) shows."""

    exit_code = 2


def app(args: dict[str, Any]) -> Application:
    """Build the application of `serve run workflows.serve:app model=FOLDER [field=value ...]`.

    Raises:
        BadArgumentError: an argument is not a field of `Run` or has the wrong type, or there is no such checkpoint.
    """
    try:
        run = read_arguments(args)
        check(run)
    except InputError as error:
        raise BadArgumentError(str(error)) from error
    return build_application(run)


def read_arguments(args: dict[str, Any]) -> Run:
    """The run of the arguments `field=value`.

    Raises:
        InputError: one is not a field of `Run` or has the wrong type.
    """
    known = [entry.name for entry in dataclasses.fields(Run)]
    for name in args:
        if name not in known:
            hint = cli.did_you_mean(name, known)
            raise InputError(f"{name}: unknown argument, expected one of {', '.join(known)}{hint}")
    try:
        return TypeAdapter(Run).validate_python(args)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{place}={fault['input']}: {fault['msg']}") from error


@contextlib.contextmanager
def serve_model(run: Run) -> Iterator[str]:
    """Serve while the block runs; yields the base URL. Ray must be initialised.

    Where Ray Serve already runs, as on a cluster that others use, its address is used and it goes on afterwards.

    Raises:
        InputError: there is no such checkpoint, the port is taken, the cluster has too little for the replicas, or
            serves an application of this name.
        WaitedError: it has not grown in time.
    """
    shared = find_controller() is not None
    if shared:
        host, port = listening_address()
        run = dataclasses.replace(run, host=host, port=port)
    check(run)
    gpus = count_gpus(run)
    cluster.require(
        run.replicas * run.cpus, run.replicas * gpus, run.wait_minutes, flags="--replicas, --cpus and --gpus"
    )
    if APPLICATION in serve.status().applications:
        raise InputError(f"the cluster already serves an application {APPLICATION!r}, expected none of this name")
    port = run.port if shared else free_port(run.host, run.port)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        print(f"loading {run.model} on {'GPUs' if gpus else 'CPUs'}", flush=True)
        options = {"host": run.host, "port": port, "request_timeout_s": 120}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        with working("loading"):
            serve.run(build_application(run), name=APPLICATION)
        yield f"http://{run.host}:{port}"
    finally:
        others = serve.status().applications.keys() - {APPLICATION}
        with contextlib.redirect_stdout(io.StringIO()):  # Ray prints there that its own controller ends
            if shared or others:
                with contextlib.suppress(TimeoutError):  # answers under way; Ray Serve goes on waiting for them
                    serve.delete(APPLICATION)
            else:
                serve.shutdown()  # type: ignore[no-untyped-call]


def free_port(host: str, port: int) -> int:
    """Check that a port is free, or choose one if it is 0.

    Raises:
        InputError: the port is taken, or the host is not an address of this machine that Ray Serve can listen on.
    """
    if ":" in host:
        raise InputError(f"--host {host}: IPv6, on which Ray Serve's proxy never answers; expected IPv4 or a name")
    if not 0 <= port <= cluster.MAX_PORT:
        raise InputError(f"--port {port}: expected 0, for a free one, to {cluster.MAX_PORT}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error
        return int(probe.getsockname()[1])


def main() -> None:
    """Serve until Ctrl-C."""
    run = cli.parse(CONFIGS, __doc__, writes=False)
    check(run)
    free_port(run.host, run.port)
    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop
        print("starting Ray", flush=True)
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
