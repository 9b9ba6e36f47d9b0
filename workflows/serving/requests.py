"""Untrusted HTTP requests: limits, parsing and refusals, which are `application/problem+json` (RFC 9457)."""

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from functools import partial

import PIL.Image
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovd_models.errors import InputError
from ovd_models.images import FORMATS, ImageError, has_image_magic, open_picture
from ovd_models.segments import Prompts

LOGGER = logging.getLogger("ray.serve")
RETRY_AFTER_SECONDS = 1
MAX_SIDE = 65_535
"""Maximum side of an image in pixels; models pad thin images to a fraction of their length."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests to one replica."""

    max_queued: int = 16
    """Maximum waiting requests; further ones are answered with 503."""
    max_bytes: int = 20_000_000
    """Maximum bytes of a request's body."""
    body_seconds: float = 30.0
    """Maximum seconds for the body to arrive; slower ones are answered with 408."""
    max_pixels: int = 50_000_000
    """Maximum pixels of an image."""
    max_names: int = 2_000
    max_name_characters: int = 100
    max_detections: int = 1_000
    max_prompts: int = 32
    max_points: int = 32
    """Maximum points of a prompt."""
    max_prompt_characters: int = 10_000
    max_mask_pixels: int = 200_000_000
    """Maximum pixels of all masks of a response; each mask has the image's size."""


class ProblemError(HTTPException):
    """An error sent to the client (RFC 9457)."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(status, detail, {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None)
        self.title = title

    def response(self) -> JSONResponse:
        """The `application/problem+json` response."""
        body = {"type": "about:blank", "title": self.title, "status": self.status_code, "detail": self.detail}
        return JSONResponse(body, self.status_code, self.headers, media_type="application/problem+json")


class RequestLimiter:
    """ASGI middleware that limits the number of requests in the process and the bytes of each.

    It runs before anything reads the body, so memory is bounded whatever clients send. Any exception behind it becomes
    a problem response without internal details.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.requests = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if scope["method"] == "POST":
                await self._bounded(scope, receive, note_start)
            else:
                await self.app(scope, receive, note_start)
        except Exception as error:
            if not isinstance(error, ProblemError):
                LOGGER.exception("request failed")
                detail = "the request could not be answered; the server's log says why"
                error = ProblemError(500, "Internal error", detail)
            if not started:
                await error.response()(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.requests > self.limits.max_queued:
            raise ProblemError(503, "Busy", f"{self.requests} requests are being answered or waiting; try again")
        too_large = ProblemError(413, "Request too large", f"a request may have {self.limits.max_bytes:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_bytes:
            raise too_large
        deadline = time.monotonic() + self.limits.body_seconds
        received, complete = 0, False

        async def receive_some() -> Message:
            nonlocal received, complete
            if complete:  # the client stays connected while it waits for the response
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                detail = f"the body took longer than {self.limits.body_seconds:g} seconds to arrive"
                raise ProblemError(408, "Bad request", detail) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.max_bytes:
                raise too_large
            return message

        self.requests += 1
        try:
            await self.app(scope, receive_some, send)
        finally:
            self.requests -= 1


def as_problem(error: Exception) -> ProblemError:
    """Convert an exception of FastAPI to a problem."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestValidationError):
        faults = [f"{entry['loc'][-1]}: {entry['msg']}" for entry in error.errors()]
        return ProblemError(422, "Bad parameter", "; ".join(faults))
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and "exceeded maximum size" in error.detail:  # of a text field
        return ProblemError(413, "Request too large", error.detail)
    return ProblemError(error.status_code, "Bad request", error.detail)


def _refusal(field: str, detail: str) -> ProblemError:
    return ProblemError(422, f"Bad {field}", f"{field}: {detail}")


def parse_vocabulary(text: str, limits: Limits) -> tuple[str, ...]:
    """Parse a JSON list of names; repeated names are dropped.

    Raises:
        ProblemError: 422, naming the fault.
    """
    refusal = partial(_refusal, "vocabulary")
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        raise refusal('not JSON, expected a list as ["red umbrella", "anchor"]') from None
    if not isinstance(names, list):
        raise refusal(f"a JSON {type(names).__name__}, expected a list of names")
    if not names:
        raise refusal("empty, expected at least one name")
    if len(names) > limits.max_names:
        raise refusal(f"{len(names):,} names, at most {limits.max_names:,} are accepted")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise refusal(f"entry {index} is {json.dumps(name)[:40]}, expected a non-empty string")
        if len(name) > limits.max_name_characters:
            most = limits.max_name_characters
            raise refusal(f"entry {index} has {len(name):,} characters, at most {most} are accepted")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise refusal(f"entry {index} holds half of a surrogate pair, expected text")
    return tuple(dict.fromkeys(name.strip() for name in names))


def parse_prompts(text: str, limits: Limits) -> Prompts:
    """Parse a JSON object of `points`, `point_labels` and `boxes`.

    Raises:
        ProblemError: 422, naming the fault.
    """
    refusal = partial(_refusal, "prompts")
    if len(text) > limits.max_prompt_characters:
        raise refusal(f"{len(text):,} characters, at most {limits.max_prompt_characters:,} are accepted")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise refusal('not JSON, expected an object as {"points": [[120, 80]]}') from None
    if not isinstance(fields, dict) or not fields.keys() <= {"points", "point_labels", "boxes"}:
        raise refusal("expected an object of points, point_labels and boxes")
    try:
        prompts = Prompts.create(**fields)
    except InputError as error:
        raise refusal(str(error)) from error
    if len(prompts) > limits.max_prompts:
        raise refusal(f"{len(prompts):,} given, at most {limits.max_prompts:,} are accepted")
    if prompts.points is not None and prompts.points.shape[1] > limits.max_points:
        raise refusal(f"{prompts.points.shape[1]:,} points in one, at most {limits.max_points:,} are accepted")
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
