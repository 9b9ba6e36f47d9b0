"""Serve: a trained detector, or an OV-SAM, behind HTTP; every request names what it wants found.

checkpoint folder or models:/ URI --> replicas of Endpoint (Ray Serve)
multipart image, names --> Gate (bytes, queue) --> decode --> detect, or segment what is pointed at --> JSON

python workflows/serve.py --model runs/demo/codet --port 8000
python workflows/serve.py --model models:/ovd-codet-pictograms@champion --storage runs
serve run workflows.serve:app model=runs/demo/codet

curl -F image=@street.jpg -F 'vocabulary=["red umbrella", "anchor"]' http://127.0.0.1:8000/v1/detect
curl -F image=@street.jpg -F 'prompts={"points": [[120, 80]]}' http://127.0.0.1:8000/v1/segment      # an OV-SAM
"""

import asyncio
import contextlib
import dataclasses
import io
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, TypeVar, cast

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
from data_prep.embeddings.texts import PreloadedEncoder, TextStore
from ovd_models.checkpoints import Detector, read_info
from ovd_models.errors import InputError
from ovd_models.ovsam.checkpoints import Segmenter
from ovd_models.preprocess import to_tensor
from workflows.common import cli, cluster, tracking
from workflows.serving.requests import (
    RETRY_AFTER_SECONDS,
    Limits,
    ProblemError,
    RequestLimiter,
    as_problem,
    decode_upload,
    parse_prompts,
    parse_vocabulary,
)

T = TypeVar("T")
APP_NAME = "ovd"
SERVED = ("codet", "vild", "ovsam")
"""Methods whose checkpoints have a route."""
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Torch's threads sleep while they wait for each other: spinning, they answer 30 times slower on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One endpoint."""

    model: str = ""
    """The checkpoint: a folder, its URI, or models:/<name>@<alias>."""
    storage: str = "store"
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


class DetectedObject(BaseModel):
    """One object."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the image."""
    label: str
    score: float


class DetectResponse(BaseModel):
    """The answer of `/v1/detect`, best first."""

    width: int
    height: int
    detections: list[DetectedObject]


class RleMask(BaseModel):
    """COCO's run-length encoding."""

    size: tuple[int, int]
    """Height and width of the image."""
    counts: str


class SegmentedObject(BaseModel):
    """What a prompt points at."""

    mask: RleMask
    box: tuple[float, float, float, float]
    """Tight around the mask: x0, y0, x1, y1 in pixels of the image; zeros for an empty mask."""
    label: str
    score: float
    """The name's probability among those asked for."""
    iou: float | None
    """The model's own estimate of the mask's quality, if it makes one."""


class SegmentResponse(BaseModel):
    """The answer of `/v1/segment`, one entry a prompt, in their order."""

    width: int
    height: int
    segments: list[SegmentedObject]


class ModelResponse(BaseModel):
    """The answer of `/v1/model`."""

    method: str
    checkpoint: str
    teacher: str
    prompt_set: str
    vocabulary: list[str]


class HealthResponse(BaseModel):
    """The answer of `/healthz`."""

    status: str


Picture = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF")]
Vocabulary = Annotated[
    str | None, Form(description='JSON list of names, as ["red umbrella", "anchor"]; default: the model\'s own')
]


class Endpoint:
    """A replica: the detector or segmenter, and its routes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        folder = tracking.local_model(run.model, run.storage)
        load = ovd_models.load_segmenter if read_info(folder).method == "ovsam" else ovd_models.load
        self.served: Detector | Segmenter = load(folder, device="cuda" if run.gpus else "cpu")
        if run.texts:
            store = TextStore.of(run.storage, self.served.teacher)
            self.served.encoder = PreloadedEncoder(self.served.encoder, store)
        threads = run.threads or len(os.sched_getaffinity(0))
        # One request at a time with all cores beats several that share them; Ray's default is one thread.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes; Ray Serve asks for them once the replica is constructed."""
        return build_api(self)

    async def healthz(self) -> HealthResponse:
        """Answers as soon as the model is loaded, also while requests wait."""
        return HealthResponse(status="ok")

    async def model(self) -> ModelResponse:
        """What is served."""
        return ModelResponse(
            method=self.served.method,
            checkpoint=self.run.model,
            teacher=self.served.teacher,
            prompt_set=self.served.prompt_set,
            vocabulary=list(self.served.vocabulary),
        )

    async def detect(
        self,
        image: Picture,
        vocabulary: Vocabulary = None,
        score_threshold: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.05,
        max_detections: Annotated[int, Form(ge=1)] = 100,
        masks: Annotated[bool, Form(description="not offered by this model")] = False,
    ) -> DetectResponse:
        """Find the named things in an image."""
        if masks:
            raise ProblemError(422, "Bad parameter", "masks: this model finds boxes only, expected false")
        if max_detections > self.run.limits.max_detections:
            raise ProblemError(
                422, "Bad parameter", f"max_detections: {max_detections}, at most {self.run.limits.max_detections}"
            )
        detector = cast(Detector, self.served)

        def answer(picture: torch.Tensor, names: Sequence[str]) -> DetectResponse:
            found = detector.detect(picture, names, score_threshold=score_threshold, max_detections=max_detections)
            detections = [DetectedObject(**entry) for entry in found.to_list()]
            return DetectResponse(width=found.width, height=found.height, detections=detections)

        return await self._answer(image, vocabulary, answer, "Bad vocabulary")

    async def segment(
        self,
        image: Picture,
        prompts: Annotated[
            str,
            Form(description='JSON object with a list for each thing: "points", perhaps "point_labels", or "boxes"'),
        ],
        vocabulary: Vocabulary = None,
    ) -> SegmentResponse:
        """Segment what each prompt points at, and name it."""
        segmenter, asked = cast(Segmenter, self.served), parse_prompts(prompts, self.run.limits)

        def answer(picture: torch.Tensor, names: Sequence[str]) -> SegmentResponse:
            pixels, most = len(asked) * picture[0].numel(), self.run.limits.max_mask_pixels
            if pixels > most:
                detail = f"{len(asked)} masks of the image have {pixels:,} pixels, at most {most:,} are answered"
                raise ProblemError(422, "Bad prompts", f"prompts: {detail}")
            segments = [SegmentedObject(**entry) for entry in segmenter.segment(picture, asked, names).to_list()]
            return SegmentResponse(width=picture.shape[2], height=picture.shape[1], segments=segments)

        return await self._answer(image, vocabulary, answer, "Bad prompts or vocabulary")

    async def _answer(
        self, image: UploadFile, vocabulary: str | None, answer: Callable[[torch.Tensor, Sequence[str]], T], title: str
    ) -> T:
        """What the model says of a picture and names; what it refuses becomes a problem with this title."""
        names = self.served.vocabulary if vocabulary is None else parse_vocabulary(vocabulary, self.run.limits)
        content = await image.read()

        def job() -> T:
            return answer(to_tensor(decode_upload(content, self.run.limits.max_pixels)), names)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, job)
        except InputError as error:
            raise ProblemError(422, title, str(error)) from error


def build_api(endpoint: Endpoint) -> FastAPI:
    """The HTTP interface of one replica."""
    api = FastAPI(title="ovd-ray", description="Open-vocabulary vision", version=version("ovd-ray"))
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/problem+json": {}}}
        for status, text in {
            400: "undecodable image", 408: "body too slow", 413: "too many bytes or pixels", 415: "not an image",
            422: "bad vocabulary, prompts or parameter", 503: "queue full",
        }.items()
    }  # fmt: skip
    api.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    api.add_api_route("/healthz", endpoint.healthz)
    api.add_api_route("/v1/model", endpoint.model)
    if isinstance(endpoint.served, Segmenter):
        api.add_api_route("/v1/segment", endpoint.segment, methods=["POST"], responses=errors)
    else:
        api.add_api_route("/v1/detect", endpoint.detect, methods=["POST"], responses=errors)

    async def problem(request: Request, error: Exception) -> JSONResponse:
        return as_problem(error).response()

    for kind in (ProblemError, RequestValidationError, HTTPException):
        api.add_exception_handler(kind, problem)
    api.add_middleware(RequestLimiter, limits=endpoint.run.limits)
    return api


def check(run: Run) -> None:
    """Before any work, where a wrong checkpoint is one line; in a replica it would be a failed deployment.

    Raises:
        InputError: there is no such checkpoint, or its method is not served.
    """
    method = read_info(tracking.local_model(run.model, run.storage)).method
    if method not in SERVED:
        raise InputError(f"{run.model}: a checkpoint of method {method!r}, expected one of {', '.join(SERVED)}")


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
    check(run)
    return deployment(run)


@contextlib.contextmanager
def serve_model(run: Run) -> Iterator[str]:
    """The endpoint's base URL, answering while the block runs, inside a Ray that is already initialised.

    Raises:
        InputError: there is no such checkpoint, or the port is taken.
    """
    check(run)
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
    check(run)
    free_port(run.host, run.port)
    with contextlib.suppress(KeyboardInterrupt):  # the normal end of an endpoint
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
