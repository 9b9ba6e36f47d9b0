"""The HTTP API: one replica's models and the routes to them."""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ovd_models.batches import num_bytes
from ovd_models.detectors.region_query import RegionQuery
from ovd_models.errors import InputError
from ovd_models.predictors import Classifier, Detector, Segmenter, TextSegmenter
from ovd_models.sam.model import EverythingConfig
from workflows.serving.fields import (
    ClassifyFields,
    DetectFields,
    EverythingFields,
    Fields,
    SegmentFields,
    TextToMaskFields,
    body_schema,
    decode_upload,
    parse_attributes,
    parse_prompts,
    read_request,
)
from workflows.serving.gate import Gate, Journal
from workflows.serving.limits import Limits, ProblemError, as_problem, refusal
from workflows.serving.metrics import Metrics
from workflows.serving.models import ModelSet, ServedModel
from workflows.serving.schemas import (
    ClassifyResponse,
    DetectResponse,
    HealthResponse,
    ModelResponse,
    ModelsResponse,
    Problem,
    SegmentResponse,
    VocabularyResponse,
)
from workflows.serving.texts import ByteLru, TextCache, VocabularyStore, Words, is_vocabulary_id, parse_words
from workflows.serving.worker import Job, ModelWorker

R = TypeVar("R")
WEB = Path(__file__).parent / "web"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
    for status, text in {
        400: "undecodable image", 401: "missing or wrong token", 403: "from another site's page",
        408: "body too slow", 413: "too many bytes or pixels", 415: "not an image",
        422: "bad vocabulary, prompts or parameter", 503: "queue full",
    }.items()
}  # fmt: skip
MAX_EVERYTHING_PIXELS = 4_000_000
"""Maximum pixels of an image of which all masks are wanted."""
MAX_QUERY_BYTES = 64_000_000
MAX_TEMPLATES = 100
"""Of a request's own prompts; the largest published set, CLIP's for ImageNet, has 80."""


class Endpoint:
    """What one replica needs to answer: its models, its thread for them, caches and metrics."""

    def __init__(
        self,
        models: ModelSet,
        worker: ModelWorker,
        texts: TextCache,
        vocabularies: VocabularyStore,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self.models, self.worker, self.texts, self.vocabularies = models, worker, texts, vocabularies
        self.metrics, self.limits = metrics, limits
        self._decoding, self._embedding = ThreadPoolExecutor(2, "decode"), ThreadPoolExecutor(2, "texts")
        self._queries: ByteLru[tuple[Any, ...], RegionQuery] = ByteLru("queries", MAX_QUERY_BYTES, metrics)

    # -------------------------------------------------------------------------------------------------- routes

    async def detect(self, request: Request) -> Response:
        """Detect objects of the given names."""
        content, fields = await read_request(request, DetectFields)
        most = self.limits.max_detections
        if fields.max_detections > most:
            raise refusal("max_detections", f"{fields.max_detections}, at most {most}")
        model = self.models.find(fields.model, "detect")
        if fields.masks and not masks_of(model):
            raise refusal("masks", "this model finds boxes only, expected false")
        query = await self._query(model, fields, request, parse_attributes(fields.attributes, self.limits))
        assert isinstance(model.predictor, Detector)
        own = model.predictor.info.score_threshold
        find = partial(
            model.predictor.find,
            query=query,
            score_threshold=own if fields.score_threshold is None else fields.score_threshold,
            max_detections=fields.max_detections,
            distinct=fields.distinct,
            masks=fields.masks,
        )

        def answer(encoded: Any) -> dict[str, Any]:
            found = find(encoded).to(torch.device("cpu"))
            return {"width": found.width, "height": found.height, "detections": found.to_list()}

        return await self._answer(model, content, answer, request)

    async def segment(self, request: Request) -> Response:
        """Segment and name the object of each prompt."""
        content, fields = await read_request(request, SegmentFields)
        prompts = parse_prompts(fields.prompts, self.limits)
        model = self.models.find(fields.model, "segment")
        query = await self._query(model, fields, request)
        assert isinstance(model.predictor, Segmenter)
        segmenter = model.predictor.model

        def answer(encoded: Any) -> dict[str, Any]:
            height, width = encoded.sam.size
            self._check_masks(len(prompts), width, height, "prompts")
            segments = segmenter.segment(encoded, prompts, query.names)
            return {"width": width, "height": height, "segments": segments.to_list(), "note": segments.note}

        return await self._answer(model, content, answer, request)

    async def everything(self, request: Request) -> Response:
        """Find and name all masks of an image."""
        content, fields = await read_request(request, EverythingFields)
        model = self.models.find(fields.model, "everything")
        query = await self._query(model, fields, request)
        assert isinstance(model.predictor, Segmenter)
        segmenter = model.predictor.model

        def answer(encoded: Any) -> dict[str, Any]:
            height, width = encoded.sam.size
            if height * width > MAX_EVERYTHING_PIXELS:
                most = f"at most {MAX_EVERYTHING_PIXELS:,} are accepted here"
                raise ProblemError(413, "Image too large", f"image: {width} x {height} pixels, {most}")
            most_masks = max(1, self.limits.max_mask_pixels // (width * height))
            settings = EverythingConfig(
                points_per_side=fields.points_per_side,
                points_per_batch=min(64, most_masks),
                min_iou=fields.min_iou,
                min_stability=fields.min_stability,
                max_masks=most_masks,
            )
            segments = segmenter.everything(encoded, query.names, settings)
            return {"width": width, "height": height, "segments": segments.to_list(), "note": segments.note}

        return await self._answer(model, content, answer, request)

    async def text_to_mask(self, request: Request) -> Response:
        """Find the mask of each name."""
        content, fields = await read_request(request, TextToMaskFields)
        model = self.models.find(fields.model, "text-to-mask")
        query = await self._query(model, fields, request)
        assert isinstance(model.predictor, TextSegmenter)
        segmenter, names = model.predictor, query.names

        def answer(encoded: Any) -> dict[str, Any]:
            height, width = encoded.sam.size
            self._check_masks(len(names), width, height, "vocabulary")
            segments = segmenter.find(encoded, names)
            return {"width": width, "height": height, "segments": segments.to_list(), "note": segments.note}

        return await self._answer(model, content, answer, request)

    async def classify(self, request: Request) -> Response:
        """Name a whole image."""
        content, fields = await read_request(request, ClassifyFields)
        model = self.models.find(fields.model, "classify")
        query = await self._query(model, fields, request)
        assert isinstance(model.predictor, Classifier)
        classifier = model.predictor

        def answer(encoded: Any) -> dict[str, Any]:
            found = classifier.find(encoded, query.names, fields.top)
            pairs = zip(found.labels, found.scores, strict=True)
            return {"labels": [{"label": label, "score": score} for label, score in pairs]}

        return await self._answer(model, content, answer, request)

    async def put_vocabulary(self, request: Request) -> VocabularyResponse:
        """Store a vocabulary once; the answer's id can be the field `vocabulary` of any request."""
        try:
            text = (await request.body()).decode()
        except UnicodeDecodeError:
            raise refusal("vocabulary", "not UTF-8, expected a JSON list of names") from None
        words = parse_words(text, self.limits)
        return VocabularyResponse(id=await self._in_pool(self._embedding, self.vocabularies.put, words))

    async def healthz(self) -> HealthResponse:
        """Answer as soon as the models are loaded, even while requests wait."""
        return HealthResponse()

    async def model(self, name: str | None = None) -> ModelResponse:
        """Describe a served model, the first one without a name."""
        found = [model for model in self.models if name in (None, model.name)]
        if not found:
            raise refusal("name", f"{(name or '')[:100]!r} is not served")
        return describe(found[0])

    async def list_models(self) -> ModelsResponse:
        """Describe all served models."""
        return ModelsResponse(models=[describe(model) for model in self.models])

    async def metrics_page(self) -> Response:
        """Metrics of this machine's replicas, for Prometheus."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -------------------------------------------------------------------------------------------------- steps

    def _check_masks(self, count: int, width: int, height: int, field: str) -> None:
        pixels, most = count * width * height, self.limits.max_mask_pixels
        if pixels > most:
            raise refusal(field, f"{count} masks of the image have {pixels:,} pixels, at most {most:,} are answered")

    async def _in_pool(self, pool: ThreadPoolExecutor, job: Callable[..., R], *args: Any) -> R:
        return await asyncio.get_running_loop().run_in_executor(pool, job, *args)

    async def _query(
        self, model: ServedModel, fields: Fields, request: Request, attributes: tuple[str, ...] = ()
    ) -> RegionQuery:
        """The embedded names of a request; recent queries are kept."""
        text = fields.vocabulary
        # Text first: a repeated request need not be parsed again.
        key = (model.digest, model.predictor.teacher, text, fields.prompt_set, fields.merge, attributes)
        query = self._queries.get(key)
        if query is not None:
            return query
        started = time.perf_counter()
        words: Words | None = None
        if text is not None and is_vocabulary_id(text):
            words = await self._in_pool(self._embedding, self.vocabularies.get, text.strip().strip('"'))
        elif text is not None:
            words = parse_words(text, self.limits)
        if fields.prompt_set.count("|") >= MAX_TEMPLATES:
            raise refusal("prompt_set", f"more than {MAX_TEMPLATES} templates")
        count = len(attributes) * len(words.names if words else model.predictor.vocabulary)
        if count > self.limits.max_names:
            raise refusal("attributes", f"{count:,} pairs of a word and a name, at most {self.limits.max_names:,}")
        embed = partial(
            model.query,
            words,
            self.texts,
            prompt_set=fields.prompt_set,
            merge=fields.merge,
            attributes=attributes,
            deadline=time.monotonic() + self.limits.answer_seconds,
        )
        try:
            query = await self._in_pool(self._embedding, embed)
        except InputError as error:
            raise ProblemError(422, "Bad vocabulary", f"vocabulary: {error}") from error
        self._note(request, "text", 1000 * (time.perf_counter() - started))
        self._queries.put(key, query, num_bytes(query) + 100 * len(query.names) + len(text or ""))
        return query

    async def _answer(
        self, model: ServedModel, content: bytes, answer: Callable[[Any], dict[str, Any]], request: Request
    ) -> Response:
        """Decode the image unless it is known, queue the job at the models, and answer."""
        key = (model.digest, hashlib.sha256(content).hexdigest())
        encoded = self.worker.images.get(key)
        image = None
        if encoded is None:
            started = time.perf_counter()
            image = await self._in_pool(self._decoding, self._decode, model, content)
            self._note(request, "decode", 1000 * (time.perf_counter() - started))
        job = Job(model, key, image, encoded, answer)
        try:
            result = await asyncio.wrap_future(self.worker.submit(job))
        except InputError as error:
            raise ProblemError(422, "Bad prompts or vocabulary", str(error)) from error
        for stage, milliseconds in job.milliseconds.items():
            self._note(request, stage, milliseconds)
        journal: Journal = request.state.journal
        journal.values |= {"model": model.name, "digest": model.digest, "bytes": len(content), "seen": image is None}
        headers = {"x-model-digest": model.digest}
        return Response(json.dumps(result, separators=(",", ":")), media_type="application/json", headers=headers)

    def _decode(self, model: ServedModel, content: bytes) -> torch.Tensor:
        picture: PIL.Image.Image = decode_upload(content, self.limits.max_pixels)
        return model.read(picture)

    def _note(self, request: Request, stage: str, milliseconds: float) -> None:
        """Record the time of a stage, in the metrics and in the log."""
        journal: Journal = request.state.journal
        journal.values[f"{stage}_ms"] = round(milliseconds, 2)
        self.metrics.seconds.labels(request.url.path, stage).observe(milliseconds / 1000)


def masks_of(model: ServedModel) -> bool:
    """Whether a model's detections have masks."""
    if not isinstance(model.predictor, Detector):
        return False
    return model.predictor.predicts_masks


def describe(model: ServedModel) -> ModelResponse:
    """What `/v1/model` says of a model."""
    return ModelResponse(
        name=model.name,
        method=model.method,
        checkpoint=model.uri,
        digest=model.digest,
        version=model.version,
        run_id=model.run_id,
        licence=model.licence,
        source=model.source,
        teacher=model.predictor.teacher,
        prompt_set=model.predictor.prompt_set,
        vocabulary=list(model.predictor.vocabulary),
        routes=[f"/v1/{task}" for task in model.tasks],
        masks=masks_of(model),
        score_threshold=model.predictor.info.score_threshold if isinstance(model.predictor, Detector) else None,
    )


async def _send_page(path: Path, request: Request) -> Response:
    return FileResponse(path)


def build_api(endpoint: Endpoint, token_digest: str = "", *, adds_ids: bool = True) -> FastAPI:
    """Build the HTTP interface of one replica: routes of its models, pages, limits.

    Ray Serve itself adds the header `x-request-id`; elsewhere `adds_ids` does.
    """
    api = FastAPI(
        title="ovd-ray",
        description="Open-vocabulary vision: name what is to be found.",
        version=version("ovd-ray"),
        docs_url=None,
        redoc_url=None,
    )
    tasks: dict[str, tuple[Callable[..., Any], type[Fields], Any]] = {
        "detect": (endpoint.detect, DetectFields, DetectResponse),
        "segment": (endpoint.segment, SegmentFields, SegmentResponse),
        "everything": (endpoint.everything, EverythingFields, SegmentResponse),
        "text-to-mask": (endpoint.text_to_mask, TextToMaskFields, SegmentResponse),
        "classify": (endpoint.classify, ClassifyFields, ClassifyResponse),
    }
    offered = {task for model in endpoint.models for task in model.tasks}
    for task, (handler, fields, answer) in tasks.items():
        if task in offered:
            responses: dict[int | str, dict[str, Any]] = {200: {"model": answer}, **ERRORS}
            api.add_api_route(
                f"/v1/{task}", handler, methods=["POST"], responses=responses, openapi_extra=body_schema(fields)
            )
    names = {"schema": {"type": "array", "items": {}}, "example": ["red umbrella", "anchor"]}
    stored = {"requestBody": {"required": True, "content": {"application/json": names}}}
    own: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 408, 413, 422, 503)}
    api.add_api_route("/v1/vocabularies", endpoint.put_vocabulary, methods=["PUT"], responses=own, openapi_extra=stored)
    api.add_api_route("/v1/model", endpoint.model, responses={401: ERRORS[401], 422: ERRORS[422]})
    api.add_api_route("/v1/models", endpoint.list_models, responses={401: ERRORS[401]})
    api.add_api_route("/healthz", endpoint.healthz)
    api.add_api_route("/metrics", endpoint.metrics_page, include_in_schema=False)
    for path, page in {"/": "index.html", "/docs": "docs.html"}.items():
        api.add_route(path, partial(_send_page, WEB / page), include_in_schema=False)
    api.mount("/web", StaticFiles(directory=WEB))

    async def problem(request: Request, error: Exception) -> JSONResponse:
        path = request.url.path.removeprefix("/v1/")
        if isinstance(error, HTTPException) and error.status_code == 404 and path in tasks:
            error = ProblemError(
                404, "Not served", f"no served model answers /v1/{path}, but {endpoint.models.tasks()}"
            )
        return as_problem(error).response()

    for kind in (RequestValidationError, HTTPException):
        api.add_exception_handler(kind, problem)
    api.add_middleware(
        Gate,
        limits=endpoint.limits,
        metrics=endpoint.metrics,
        routes=frozenset(route.path for route in api.routes if isinstance(route, APIRoute)),
        token_digest=token_digest,
        adds_ids=adds_ids,
    )
    return api
