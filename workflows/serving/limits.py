"""Limits on requests, and refusals: `application/problem+json` (RFC 9457)."""

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ovd_models.errors import InputError

RETRY_AFTER_SECONDS = 1
MAX_SIDE = 65_535
"""Maximum side of an image in pixels; models pad thin images to a fraction of their length."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests to one replica."""

    max_queued: int = 16
    """Maximum waiting requests whose body has arrived; further ones are answered with 503."""
    max_uploads: int = 256
    """Maximum bodies on their way; further ones are answered with 503."""
    max_upload_bytes: int = 256_000_000
    """Maximum bytes of all bodies on their way or waiting; further ones are answered with 503."""
    max_bytes: int = 20_000_000
    """Maximum bytes of a request's body."""
    body_seconds: float = 30.0
    """Maximum seconds for the body to arrive; slower ones are answered with 408."""
    answer_seconds: float = 100.0
    """Maximum seconds from the whole body to the answer; after them the request is given up and answered with 503."""
    max_pixels: int = 50_000_000
    """Maximum pixels of an image."""
    max_names: int = 10_000
    max_name_characters: int = 100
    max_synonyms: int = 32
    """Maximum synonyms of a name."""
    max_vocabularies: int = 1_000
    """Maximum stored vocabularies; the oldest are removed."""
    max_detections: int = 1_000
    max_prompts: int = 32
    max_points: int = 32
    """Maximum points of a prompt."""
    max_prompt_characters: int = 10_000
    max_mask_pixels: int = 200_000_000
    """Maximum pixels of all masks of a response; each mask has the image's size."""


class ProblemError(HTTPException):
    """An error sent to the client (RFC 9457)."""

    def __init__(self, status: int, title: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        own = {503: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}.get(status, {})
        super().__init__(status, detail, {**(headers or {}), **own} or None)
        self.title = title

    def response(self) -> JSONResponse:
        """The `application/problem+json` response."""
        body = {"type": "about:blank", "title": self.title, "status": self.status_code, "detail": self.detail}
        return JSONResponse(body, self.status_code, self.headers, media_type="application/problem+json")


def refusal(field: str, detail: str) -> ProblemError:
    """422 about a field."""
    return ProblemError(422, f"Bad {field}", f"{field}: {detail}")


def as_problem(error: Exception) -> ProblemError:
    """Convert an exception to a problem; what is unexpected reveals no details."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestValidationError):
        faults = [f"{entry['loc'][-1]}: {entry['msg']}" for entry in error.errors()]
        return ProblemError(422, "Bad parameter", "; ".join(faults))
    if isinstance(error, HTTPException):
        too_large = error.status_code == 400 and "exceeded maximum size" in error.detail  # of a text field
        title = "Request too large" if too_large else "Bad request"
        return ProblemError(413 if too_large else error.status_code, title, error.detail, error.headers)
    if isinstance(error, InputError):
        return ProblemError(422, "Bad vocabulary or prompts", str(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return ProblemError(503, "Busy", "not enough memory for this request at the moment")
    return ProblemError(500, "Internal error", "the request could not be answered; the server's log says why")
