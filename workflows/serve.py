"""Serve: a trained detector behind HTTP; every request names what it wants found.

checkpoint folder or models:/ URI --> replicas of Endpoint (Ray Serve)
multipart image, names --> Gate (bytes, queue) --> decode --> detect --> JSON

python workflows/serve.py --model runs/demo/codet --port 8000
python workflows/serve.py --model models:/ovd-codet-pictograms@champion --storage runs
serve run workflows.serve:app model=runs/demo/codet

curl -F image=@street.jpg -F 'vocabulary=["red umbrella", "anchor"]' http://127.0.0.1:8000/v1/detect
"""

import workflows.startup

import asyncio
import contextlib
import dataclasses
import io
import logging
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

import ray
import torch
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, TypeAdapter, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig
from starlette.exceptions import HTTPException

import ovd_models
from data_prep.texts import PreloadedEncoder, TextStore
from ovd_models.checkpoints import read_info
from ovd_models.errors import InputError
from ovd_models.preprocess import to_tensor
from workflows import cli, cluster, tracking
from workflows.http_input import RETRY_AFTER_SECONDS, Gate, Limits, ProblemError, as_problem, decode, parse_vocabulary

APP_NAME = "ovd"
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Torch's threads sleep while they wait for each other: spinning, they answer 30 times slower on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One endpoint."""

    model: str = ""
    """The checkpoint: a folder, its URI, or models:/<name>@<alias>."""
    storage: str = "runs"
    """Where a models:/ URI and the teacher's `texts` are looked up."""
    texts: bool = True
    """Take embeddings of names from the teacher's `texts`, which a replica then holds in memory; other names are
    embedded."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    replicas: int = 1
    """Copies of the model; each answers one request at a time, with all its threads."""
    threads: int = 0
    """Threads of a replica; 0 takes the machine's cores."""
    gpus: float = 0
    """GPUs of a replica."""
    limits: Limits = field(default_factory=Limits)


def local() -> Run:
    """One replica on this machine."""
    return Run()


CONFIGS = {"local": local}


class Detection(BaseModel):
    """One object."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the image."""
    label: str
    score: float


class Found(BaseModel):
    """The answer of `/v1/detect`, best first."""

    width: int
    height: int
    detections: list[Detection]


class Model(BaseModel):
    """The answer of `/v1/model`."""

    method: str
    checkpoint: str
    teacher: str
    prompt_set: str
    vocabulary: list[str]


class Health(BaseModel):
    """The answer of `/healthz`."""

    status: str


class Endpoint:
    """A replica: the detector and its routes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        folder = tracking.local_model(run.model, run.storage)
        self.detector = ovd_models.load(folder, device="cuda" if run.gpus else "cpu")
        if run.texts:
            store = TextStore.of(run.storage, self.detector.teacher)
            self.detector.encoder = PreloadedEncoder(self.detector.encoder, store)
        threads = run.threads or len(os.sched_getaffinity(0))
        # One request at a time with all cores beats several that share them; Ray's default is one thread.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes; Ray Serve asks for them once the replica is constructed."""
        return build_api(self)

    async def healthz(self) -> Health:
        """Answers as soon as the model is loaded, also while requests wait."""
        return Health(status="ok")

    async def model(self) -> Model:
        """What is served."""
        served = self.detector
        return Model(
            method=served.method,
            checkpoint=self.run.model,
            teacher=served.teacher,
            prompt_set=served.prompt_set,
            vocabulary=list(served.vocabulary),
        )

    async def detect(
        self,
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF")],
        vocabulary: Annotated[
            str | None, Form(description='JSON list of names, as ["red umbrella", "anchor"]; default: the model\'s own')
        ] = None,
        score_threshold: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.05,
        max_detections: Annotated[int, Form(ge=1)] = 100,
        masks: Annotated[bool, Form(description="not offered by this model")] = False,
    ) -> Found:
        """Find the named things in an image."""
        if masks:
            raise ProblemError(422, "Bad parameter", "masks: this model finds boxes only, expected false")
        if max_detections > self.run.limits.max_detections:
            raise ProblemError(
                422, "Bad parameter", f"max_detections: {max_detections}, at most {self.run.limits.max_detections}"
            )
        names = self.detector.vocabulary if vocabulary is None else parse_vocabulary(vocabulary, self.run.limits)
        content = await image.read()

        def answer() -> Found:
            picture = decode(content, self.run.limits.max_pixels)
            found = self.detector.detect(
                to_tensor(picture), names, score_threshold=score_threshold, max_detections=max_detections
            )
            detections = [Detection(**entry) for entry in found.to_list()]
            return Found(width=found.width, height=found.height, detections=detections)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, answer)
        except InputError as error:
            raise ProblemError(422, "Bad vocabulary", str(error)) from error


def build_api(endpoint: Endpoint) -> FastAPI:
    """The HTTP interface of one replica."""
    api = FastAPI(title="ovd-ray", description="Open-vocabulary object detection", version=version("ovd-ray"))
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/problem+json": {}}}
        for status, text in {
            400: "undecodable image", 408: "body too slow", 413: "too many bytes or pixels", 415: "not an image",
            422: "bad vocabulary or parameter", 503: "queue full",
        }.items()
    }  # fmt: skip
    api.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    api.add_api_route("/healthz", endpoint.healthz)
    api.add_api_route("/v1/model", endpoint.model)
    api.add_api_route("/v1/detect", endpoint.detect, methods=["POST"], responses=errors)

    async def problem(request: Request, error: Exception) -> JSONResponse:
        return as_problem(error).response()

    for kind in (ProblemError, RequestValidationError, HTTPException):
        api.add_exception_handler(kind, problem)
    api.add_middleware(Gate, limits=endpoint.run.limits)
    return api


def deployment(run: Run) -> Application:
    """The application, not yet running."""
    deploy = serve.deployment(
        name="Endpoint",
        num_replicas=run.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": run.gpus, "runtime_env": {"env_vars": THREADS}},
        # The gate counts a replica's requests and answers /healthz whatever waits; Serve's own limits stand behind it.
        max_ongoing_requests=run.limits.max_queued + 64,
        max_queued_requests=run.limits.max_queued + 64,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_SECONDS),
        graceful_shutdown_wait_loop_s=0.2,
    )
    return deploy(serve.ingress()(Endpoint)).bind(run)


def app(args: dict[str, Any]) -> Application:
    """The application of `serve run workflows.serve:app model=FOLDER [field=value ...]`.

    Raises:
        InputError: an argument is no field of `Run`, or of the wrong type, or there is no such checkpoint.
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
    read_info(tracking.local_model(run.model, run.storage))
    return deployment(run)


@contextlib.contextmanager
def serving(run: Run) -> Iterator[str]:
    """The endpoint's base URL, answering while the block runs, inside a Ray that is already initialised.

    Raises:
        InputError: there is no such checkpoint, or the port is taken.
    """
    # Here a wrong checkpoint is one line; in a replica it would be a failed deployment.
    read_info(tracking.local_model(run.model, run.storage))
    port = free_port(run.host, run.port)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        options = {"host": run.host, "port": port, "request_timeout_s": 120}
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        serve.run(deployment(run), name=APP_NAME, logging_config=quiet)
        yield f"http://{run.host}:{port}"
    finally:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray reports there that its own controller ends
            serve.shutdown()  # type: ignore[no-untyped-call]


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: it is taken, or the host is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error
        return int(probe.getsockname()[1])


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    read_info(tracking.local_model(run.model, run.storage))
    free_port(run.host, run.port)
    with contextlib.suppress(KeyboardInterrupt):  # the normal end of an endpoint
        cluster.start_ray()
        try:
            with serving(run) as url:
                print(f"serving {run.model} at {url}; API: {url}/docs; Ctrl-C stops it", flush=True)
                threading.Event().wait()
        finally:
            ray.shutdown()
    print("stopped")


if __name__ == "__main__":
    cli.execute(main)
