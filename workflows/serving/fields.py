"""What requests hold: fields of each route, from a multipart form or from the query beside a raw image, and images."""

import json
from typing import Any, Literal, TypeVar

import PIL.Image
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from ovd_models.errors import InputError
from ovd_models.images import FORMATS, ImageError, has_image_magic, open_picture
from ovd_models.sam.model import EverythingConfig
from ovd_models.segments import Prompts
from workflows.serving.limits import MAX_SIDE, Limits, ProblemError, refusal

F = TypeVar("F", bound="Fields")
NAMES_EXAMPLE = '["red umbrella", "anchor", "cat"]'


class Fields(BaseModel):
    """Fields of every route that takes an image."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, max_length=100, description="name of a served model; default: the first that can")
    vocabulary: str | None = Field(
        None,
        description="JSON list of names, or of objects {name, synonyms, base}, or the id of a stored vocabulary; "
        "default: the model's vocabulary",
        examples=[NAMES_EXAMPLE],
    )
    prompt_set: str = Field(
        "", max_length=2_000, description="prompt set of the names, or templates such as `a drawing of {a}|{name}`"
    )
    merge: Literal["mean", "max"] = Field(
        "mean", description="whether a name's embedding is the mean of its synonyms', or its score the maximum"
    )


class DetectFields(Fields):
    """Fields of `/v1/detect`."""

    score_threshold: float | None = Field(
        None, ge=0, le=1, description="detections score above it; by default the checkpoint's own, see `/v1/model`"
    )
    max_detections: int = Field(100, ge=1)
    distinct: bool = Field(False, description="only the best name of each object; else one detection for each name")
    masks: bool = Field(False, description="masks too, if the model predicts them")
    attributes: str = Field("", description='for ViLD: JSON list of words that go with any name, `["red", "blue"]`')


class SegmentFields(Fields):
    """Fields of `/v1/segment`."""

    prompts: str = Field(
        description='JSON object: "points", optionally with "point_labels", or "boxes", one entry per object',
        examples=['{"points": [[64, 64]]}'],
    )


class EverythingFields(Fields):
    """Fields of `/v1/everything`."""

    points_per_side: int = Field(16, ge=1, le=32, description="clicks along each side of the image")
    min_iou: float = Field(EverythingConfig.min_iou, ge=0, le=1, description="minimum predicted IoU of a mask")
    min_stability: float = Field(
        EverythingConfig.min_stability,
        ge=0,
        le=1,
        description="minimum IoU of a mask at a higher and at a lower threshold",
    )


class TextToMaskFields(Fields):
    """Fields of `/v1/text-to-mask`."""


class ClassifyFields(Fields):
    """Fields of `/v1/classify`."""

    top: int = Field(5, ge=1, le=10_000, description="number of names in the answer")


def body_schema(fields: type[Fields]) -> dict[str, Any]:
    """The OpenAPI description of a route's body and, for raw images, of its query parameters."""
    schema = fields.model_json_schema()
    image = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"}
    form = {
        "type": "object",
        "properties": {"image": image} | schema["properties"],
        "required": ["image", *schema.get("required", [])],
        "additionalProperties": False,
    }
    raw = {"schema": {"type": "string", "format": "binary"}}
    query = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": f"for a raw body: {value.get('description', '')}",
            "schema": {key: entry for key, entry in value.items() if key not in ("description", "examples")},
        }
        for name, value in schema["properties"].items()
    ]
    content = {"multipart/form-data": {"schema": form}, "image/*": raw, "application/octet-stream": raw}
    return {"parameters": query, "requestBody": {"required": True, "content": content}}


async def read_request(request: Request, kind: type[F]) -> tuple[bytes, F]:
    """The image and the fields of a request.

    Raises:
        ProblemError: 415 or 422.
        RequestValidationError: a field is unknown, missing or out of range.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    values: dict[str, Any] = dict(request.query_params)
    if media == "multipart/form-data":
        async with request.form(max_files=4, max_fields=20) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) != (name == "image"):
                    raise refusal(name, "expected a file" if name == "image" else "a file, expected text")
            image = form.get("image")
            if not isinstance(image, UploadFile):
                raise refusal("image", "missing, expected a file")
            content = await image.read()
            values |= {name: value for name, value in form.items() if name != "image"}
    elif media.startswith("image/") or media == "application/octet-stream":
        content = await request.body()
    elif media in ("", "application/json", "application/x-www-form-urlencoded"):
        raise refusal("image", "missing, expected multipart/form-data with a file, or a body of type image/*")
    else:
        raise ProblemError(
            415,
            "Not an image",
            f"image: a body of type {media[:50] or 'none'}, expected multipart/form-data or image/*",
        )
    try:
        return content, kind.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


def parse_attributes(text: str, limits: Limits) -> tuple[str, ...]:
    """Parse a JSON list of words.

    Raises:
        ProblemError: 422.
    """
    if not text:
        return ()
    try:
        words = json.loads(text)
        json.dumps(words, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or len(words) > 50 or not all(isinstance(word, str) and word for word in words):
        raise refusal("attributes", 'expected a JSON list of up to 50 words as ["red", "blue"]')
    if max(map(len, words), default=0) > limits.max_name_characters:
        raise refusal("attributes", f"a word has more than {limits.max_name_characters} characters")
    return tuple(words)


def parse_prompts(text: str, limits: Limits) -> Prompts:
    """Parse a JSON object of `points`, `point_labels` and `boxes`.

    Raises:
        ProblemError: 422, naming the fault.
    """
    if len(text) > limits.max_prompt_characters:
        raise refusal("prompts", f"{len(text):,} characters, at most {limits.max_prompt_characters:,} are accepted")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise refusal("prompts", 'not JSON, expected an object as {"points": [[120, 80]]}') from None
    if not isinstance(fields, dict) or not fields.keys() <= {"points", "point_labels", "boxes"}:
        raise refusal("prompts", "expected an object of points, point_labels and boxes")
    try:
        prompts = Prompts.create(**fields)
    except InputError as error:
        raise refusal("prompts", str(error)) from error
    if len(prompts) > limits.max_prompts:
        raise refusal("prompts", f"{len(prompts):,} given, at most {limits.max_prompts:,} are accepted")
    if prompts.points is not None and prompts.points.shape[1] > limits.max_points:
        most = f"at most {limits.max_points:,} are accepted"
        raise refusal("prompts", f"{prompts.points.shape[1]:,} points in one, {most}")
    return prompts


def decode_upload(content: bytes, max_pixels: int) -> PIL.Image.Image:
    """Decode an image after checking its declared size.

    Raises:
        ProblemError: 400, 413 or 415.
    """
    if not has_image_magic(content):
        raise ProblemError(415, "Not an image", f"image: expected one of {', '.join(FORMATS)}")
    most = f"at most {max_pixels:,} pixels are accepted, {MAX_SIDE:,} a side"
    try:
        picture = open_picture(content, max_pixels=max_pixels)
        if max(picture.size) > MAX_SIDE:
            size = f"{picture.size[0]} x {picture.size[1]} pixels"
            raise ProblemError(413, "Image too large", f"image: {size}, {most}")
        return picture.decode()
    except ImageError as error:
        if error.reason == "too_many_pixels":
            size = str(error).removeprefix("image: ").partition(", at most")[0]
            raise ProblemError(413, "Image too large", f"image: {size}, {most}") from error
        raise ProblemError(400, "Undecodable image", "image: broken or truncated, expected a whole file") from error
