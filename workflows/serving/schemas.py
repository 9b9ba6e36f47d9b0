"""Responses of the HTTP API, for its OpenAPI description."""

from typing import Literal

from pydantic import BaseModel

Box = tuple[float, float, float, float]


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    """What is wrong and what was expected, in one sentence."""


class RleMask(BaseModel):
    """A mask in COCO's run-length encoding."""

    size: tuple[int, int]
    """Height and width of the image."""
    counts: str


class DetectedObject(BaseModel):
    """One detected object."""

    box: Box
    """x0, y0, x1, y1 in pixels of the image."""
    label: str
    score: float
    mask: RleMask | None = None


class DetectResponse(BaseModel):
    """Response of `/v1/detect`, best detection first."""

    width: int
    height: int
    detections: list[DetectedObject]


class SegmentedObject(BaseModel):
    """The object of one prompt."""

    mask: RleMask
    box: Box
    """Tight box of the mask: x0, y0, x1, y1 in pixels of the image; zeros for an empty mask."""
    label: str | None
    score: float | None
    """Probability of the label among the requested names."""
    iou: float | None
    """The model's estimate of the mask's IoU, if it predicts one."""


class SegmentResponse(BaseModel):
    """Response of `/v1/segment`, one entry per prompt in their order; of the others, all masks."""

    width: int
    height: int
    segments: list[SegmentedObject]
    note: str
    """Why there are no masks, or which names have none but empty ones; else empty."""


class Label(BaseModel):
    """A name of a whole image."""

    label: str
    score: float
    """Probability among the requested names."""


class ClassifyResponse(BaseModel):
    """Response of `/v1/classify`, most probable name first."""

    labels: list[Label]


class VocabularyResponse(BaseModel):
    """Response of `PUT /v1/vocabularies`."""

    id: str
    """Digest that the field `vocabulary` may be."""


class ModelResponse(BaseModel):
    """A served model."""

    name: str
    method: str
    checkpoint: str
    """As given to the server."""
    digest: str
    """Of its weights and config."""
    version: str
    """In the model registry; empty for a folder."""
    run_id: str
    """MLflow's; empty if unknown."""
    licence: str
    """Note about the weights; empty if unknown."""
    source: str
    """Released files that it was converted from, with their sha256; empty if it was trained here."""
    teacher: str
    prompt_set: str
    vocabulary: list[str]
    """Default names."""
    routes: list[str]
    masks: bool
    """Whether `/v1/detect` can answer masks."""
    score_threshold: float | None
    """Default of `/v1/detect`: the score of best F1 where the detector was evaluated; null for other models."""


class ModelsResponse(BaseModel):
    """All served models."""

    models: list[ModelResponse]


class HealthResponse(BaseModel):
    """Response of `/healthz`."""

    status: Literal["ok"] = "ok"
