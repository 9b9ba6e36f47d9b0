"""Requests from anybody: bounded before they are read, parsed, or refused with a sentence that says why.

Refusals are `application/problem+json` (RFC 9457).
"""

import asyncio
import io
import json
import logging
import time
from dataclasses import dataclass

import PIL.Image
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovd_models.errors import InputError
from ovd_models.images import FORMATS, has_image_magic, to_rgb, upright
from ovd_models.segments import Prompts

LOGGER = logging.getLogger("ray.serve")
RETRY_AFTER_SECONDS = 1
MAX_SIDE = 65_535
"""Of an image: models widen thin ones, to a part of their length."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may cost."""

    max_queued: int = 16
    """Requests that may wait in a replica; more are answered with 503."""
    max_bytes: int = 20_000_000
    """Of a request's body."""
    body_seconds: float = 30.0
    """A body that takes longer to arrive is answered with 408."""
    max_pixels: int = 50_000_000
    """Of an image."""
    max_names: int = 2_000
    max_name_characters: int = 100
    max_detections: int = 1_000
    max_prompts: int = 32
    max_points: int = 32
    """Of a prompt."""
    max_prompt_characters: int = 10_000
    max_mask_pixels: int = 200_000_000
    """Of all masks of an answer, each of which has the image's size."""


class ProblemError(Exception):
    """An error as the client sees it (RFC 9457)."""

    def __init__(self, status: int, title: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.title, self.detail = status, title, detail

    def response(self) -> JSONResponse:
        """`application/problem+json`."""
        body = {"type": "about:blank", "title": self.title, "status": self.status, "detail": self.detail}
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else None
        return JSONResponse(body, self.status, headers, media_type="application/problem+json")


class RequestLimiter:
    """Lets only so many requests, each of so many bytes, be in the process at once.

    Stands before anything reads the body, so what a replica holds is bounded whatever clients send. Nothing that
    goes wrong behind it leaves as more than a sentence.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.requests = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
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
                error = ProblemError(
                    500, "Internal error", "the request could not be answered; the server's log says why"
                )
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
            if complete:  # a client that stays connected while it waits for the answer
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                seconds = self.limits.body_seconds
                raise HTTPException(408, f"the body took longer than {seconds:g} seconds to arrive") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limits.max_bytes:
                raise HTTPException(413, too_large.detail)  # the one kind that FastAPI's body parser lets through
            return message

        self.requests += 1
        try:
            await self.app(scope, receive_some, send)
        finally:
            self.requests -= 1


def as_problem(error: Exception) -> ProblemError:
    """What the client is told."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestValidationError):
        faults = [f"{entry['loc'][-1]}: {entry['msg']}" for entry in error.errors()]
        return ProblemError(422, "Bad parameter", "; ".join(faults))
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == 400 and "exceeded maximum size" in detail:  # a text field; names alone never need so much
        return ProblemError(413, "Request too large", detail)
    return ProblemError(error.status_code, "Request too large" if error.status_code == 413 else "Bad request", detail)


def parse_vocabulary(text: str, limits: Limits) -> tuple[str, ...]:
    """Names from a JSON list, each once, in the order given.

    Raises:
        ProblemError: 422, and what is wrong.
    """

    def bad(detail: str) -> ProblemError:
        return ProblemError(422, "Bad vocabulary", f"vocabulary: {detail}")

    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        raise bad('not JSON, expected a list as ["red umbrella", "anchor"]') from None
    if not isinstance(names, list):
        raise bad(f"a JSON {type(names).__name__}, expected a list of names")
    if not names:
        raise bad("empty, expected at least one name")
    if len(names) > limits.max_names:
        raise bad(f"{len(names):,} names, at most {limits.max_names:,} are accepted")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise bad(f"entry {index} is {json.dumps(name)[:40]}, expected a non-empty string")
        if len(name) > limits.max_name_characters:
            raise bad(f"entry {index} has {len(name):,} characters, at most {limits.max_name_characters} are accepted")
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise bad(f"entry {index} holds half of a surrogate pair, expected text")
    return tuple(dict.fromkeys(name.strip() for name in names))


def parse_prompts(text: str, limits: Limits) -> Prompts:
    """Prompts from a JSON object of `points`, `point_labels` and `boxes`.

    Raises:
        ProblemError: 422, and what is wrong.
    """

    def bad(detail: str) -> ProblemError:
        return ProblemError(422, "Bad prompts", f"prompts: {detail}")

    if len(text) > limits.max_prompt_characters:
        raise bad(f"{len(text):,} characters, at most {limits.max_prompt_characters:,} are accepted")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise bad('not JSON, expected an object as {"points": [[120, 80]]}') from None
    if not isinstance(fields, dict) or not fields.keys() <= {"points", "point_labels", "boxes"}:
        raise bad("expected an object of points, point_labels and boxes")
    try:
        prompts = Prompts.create(**fields)
    except InputError as error:
        raise bad(str(error)) from error
    if len(prompts) > limits.max_prompts:
        raise bad(f"{len(prompts):,} given, at most {limits.max_prompts:,} are accepted")
    if prompts.points is not None and prompts.points.shape[1] > limits.max_points:
        raise bad(f"{prompts.points.shape[1]:,} points in one, at most {limits.max_points:,} are accepted")
    return prompts


def decode_upload(content: bytes, max_pixels: int) -> PIL.Image.Image:
    """The image, whose declared size is checked before any pixel is decoded.

    Raises:
        ProblemError: 400, 413 or 415.
    """
    if not has_image_magic(content):
        raise ProblemError(415, "Not an image", f"image: expected one of {', '.join(FORMATS)}")
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
        size = f"{image.width} x {image.height} pixels"
        fits = image.width * image.height <= max_pixels and max(image.size) <= MAX_SIDE
        picture = to_rgb(upright(image)) if fits else None
    except PIL.Image.DecompressionBombError:
        picture, size = None, "too many pixels"
    except Exception as error:  # decoders raise whatever their format's parser meets
        raise ProblemError(400, "Undecodable image", f"image: broken or truncated ({type(error).__name__})") from error
    if picture is None:
        most = f"at most {max_pixels:,} pixels are accepted, {MAX_SIDE:,} a side"
        raise ProblemError(413, "Image too large", f"image: {size}, {most}")
    return picture
