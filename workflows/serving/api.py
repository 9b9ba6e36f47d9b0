"""The HTTP API of a detector or an OV-SAM: request fields, responses and routes."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar, cast

import torch
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import ovd_models
from data_prep.embeddings.texts import PreloadedEncoder, TextStore
from ovd_models.checkpoints import read_info
from ovd_models.errors import InputError
from ovd_models.predictors import Detector, Segmenter
from ovd_models.preprocess import to_tensor
from workflows.common import registry
from workflows.serving.requests import (
    Limits,
    ProblemError,
    RequestLimiter,
    as_problem,
    decode_upload,
    parse_prompts,
    parse_vocabulary,
)

T = TypeVar("T")
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {}}}
    for status, text in {
        400: "undecodable image", 408: "body too slow", 413: "too many bytes or pixels", 415: "not an image",
        422: "bad vocabulary, prompts or parameter", 503: "queue full",
    }.items()
}  # fmt: skip

ImageField = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF")]
VocabularyField = Annotated[
    str | None,
    Form(description='JSON list of names such as ["red umbrella", "anchor"]; default: the model\'s vocabulary'),
]
PromptsField = Annotated[
    str, Form(description='JSON object: "points", optionally with "point_labels", or "boxes", one entry per object')
]


class DetectedObject(BaseModel):
    """One detected object."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the image."""
    label: str
    score: float


class DetectResponse(BaseModel):
    """Response of `/v1/detect`, best detection first."""

    width: int
    height: int
    detections: list[DetectedObject]


class RleMask(BaseModel):
    """A mask in COCO's run-length encoding."""

    size: tuple[int, int]
    """Height and width of the image."""
    counts: str


class SegmentedObject(BaseModel):
    """The object of one prompt."""

    mask: RleMask
    box: tuple[float, float, float, float]
    """Tight box of the mask: x0, y0, x1, y1 in pixels of the image; zeros for an empty mask."""
    label: str
    score: float
    """Probability of the label among the requested names."""
    iou: float | None
    """The model's estimate of the mask's IoU, if it predicts one."""


class SegmentResponse(BaseModel):
    """Response of `/v1/segment`, one entry per prompt, in the order of the prompts."""

    width: int
    height: int
    segments: list[SegmentedObject]


class ModelResponse(BaseModel):
    """Response of `/v1/model`."""

    method: str
    checkpoint: str
    teacher: str
    prompt_set: str
    vocabulary: list[str]


class HealthResponse(BaseModel):
    """Response of `/healthz`."""

    status: Literal["ok"] = "ok"


class Endpoint:
    """One replica: a detector or segmenter and its routes."""

    def __init__(
        self, model: str, storage_uri: str, *, texts: bool, threads: int, device: Literal["cpu", "cuda"], limits: Limits
    ) -> None:
        """Load the checkpoint `model`; with `texts`, embeddings of known names are read from the teacher's `texts`."""
        self.checkpoint, self.limits = model, limits
        folder = registry.local_model(model, storage_uri)
        load = ovd_models.load_segmenter if read_info(folder).method == "ovsam" else ovd_models.load
        self.served: Detector | Segmenter = load(folder, device=device)
        if texts:
            store = TextStore(storage_uri, self.served.teacher)
            self.served.encoder = PreloadedEncoder(self.served.encoder, store)
        threads = threads or len(os.sched_getaffinity(0))
        # One request at a time on all cores is faster than several that share them; Ray's default is one thread.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the routes; Ray Serve calls this after constructing the replica."""
        return build_api(self)

    async def healthz(self) -> HealthResponse:
        """Answer as soon as the model is loaded, even while requests wait."""
        return HealthResponse()

    async def model(self) -> ModelResponse:
        """Describe the served model."""
        return ModelResponse(
            method=self.served.method,
            checkpoint=self.checkpoint,
            teacher=self.served.teacher,
            prompt_set=self.served.prompt_set,
            vocabulary=list(self.served.vocabulary),
        )

    async def detect(
        self,
        image: ImageField,
        vocabulary: VocabularyField = None,
        score_threshold: Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)] = 0.05,
        max_detections: Annotated[int, Form(ge=1)] = 100,
        masks: Annotated[bool, Form(description="not offered by this model")] = False,
    ) -> DetectResponse:
        """Detect objects of the given names."""
        if masks:
            raise ProblemError(422, "Bad parameter", "masks: this model finds boxes only, expected false")
        most = self.limits.max_detections
        if max_detections > most:
            raise ProblemError(422, "Bad parameter", f"max_detections: {max_detections}, at most {most}")
        detector = cast(Detector, self.served)

        def run(tensor: torch.Tensor, names: Sequence[str]) -> DetectResponse:
            found = detector.detect(tensor, names, score_threshold=score_threshold, max_detections=max_detections)
            detections = [DetectedObject(**entry) for entry in found.to_list()]
            return DetectResponse(width=found.width, height=found.height, detections=detections)

        return await self._run(image, vocabulary, run, "Bad vocabulary")

    async def segment(
        self, image: ImageField, prompts: PromptsField, vocabulary: VocabularyField = None
    ) -> SegmentResponse:
        """Segment and name the object of each prompt."""
        segmenter, parsed = cast(Segmenter, self.served), parse_prompts(prompts, self.limits)

        def run(tensor: torch.Tensor, names: Sequence[str]) -> SegmentResponse:
            pixels, most = len(parsed) * tensor[0].numel(), self.limits.max_mask_pixels
            if pixels > most:
                detail = f"{len(parsed)} masks of the image have {pixels:,} pixels, at most {most:,} are answered"
                raise ProblemError(422, "Bad prompts", f"prompts: {detail}")
            segments = [SegmentedObject(**entry) for entry in segmenter.segment(tensor, parsed, names).to_list()]
            return SegmentResponse(width=tensor.shape[2], height=tensor.shape[1], segments=segments)

        return await self._run(image, vocabulary, run, "Bad prompts or vocabulary")

    async def _run(
        self, image: UploadFile, vocabulary: str | None, run: Callable[[torch.Tensor, Sequence[str]], T], title: str
    ) -> T:
        """Run the model on the decoded image and names; its `InputError` becomes a problem with this title."""
        names = self.served.vocabulary if vocabulary is None else parse_vocabulary(vocabulary, self.limits)
        content = await image.read()

        def job() -> T:
            return run(to_tensor(decode_upload(content, self.limits.max_pixels)), names)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, job)
        except InputError as error:
            raise ProblemError(422, title, str(error)) from error


def build_api(endpoint: Endpoint) -> FastAPI:
    """Build the HTTP interface of one replica."""
    api = FastAPI(title="ovd-ray", description="Open-vocabulary vision", version=version("ovd-ray"))
    api.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    api.add_api_route("/healthz", endpoint.healthz)
    api.add_api_route("/v1/model", endpoint.model)
    if isinstance(endpoint.served, Segmenter):
        api.add_api_route("/v1/segment", endpoint.segment, methods=["POST"], responses=ERRORS)
    else:
        api.add_api_route("/v1/detect", endpoint.detect, methods=["POST"], responses=ERRORS)

    async def problem(request: Request, error: Exception) -> JSONResponse:
        return as_problem(error).response()

    for kind in (RequestValidationError, HTTPException):
        api.add_exception_handler(kind, problem)
    api.add_middleware(RequestLimiter, limits=endpoint.limits)
    return api
