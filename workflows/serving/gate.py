"""The ASGI middleware in front of all routes: token, limits, security headers, request ids, log and metrics."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workflows.serving.limits import Limits, ProblemError, as_problem
from workflows.serving.metrics import Metrics

LOGGER = logging.getLogger("ray.serve")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
MIN_BYTES_PER_SECOND = 512
GRACE_SECONDS = 5.0
"""A body may arrive more slowly than `MIN_BYTES_PER_SECOND` for so long."""
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
     b"form-action 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),  # else browsers mix the page's files of two versions
]  # fmt: skip


@dataclass
class Journal:
    """What the log says about one request: no image, no name, no address."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    values: dict[str, object] = field(default_factory=dict)
    """Route, model, sizes, milliseconds by stage."""


class Gate:
    """Admits requests; any exception behind it becomes a problem response without internal details.

    A body is read whole before the application sees the request, so a slow one holds no place in the queue; memory is
    bounded whatever clients send.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        routes: frozenset[str],
        token_digest: str = "",
        *,
        adds_ids: bool = True,
    ) -> None:
        """Wrap `app`; with the SHA-256 of a token, requests under `/v1/` and `/metrics` must bear it.

        Only `routes` are counted and logged by their names: other paths are what a client sends.
        """
        self.routes = routes
        self.app, self.limits, self.metrics, self.token_digest = app, limits, metrics, token_digest
        self.adds_ids = adds_ids
        self.uploads = self.held_bytes = self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        journal = Journal(given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["journal"] = journal
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = list(HEADERS)
                if self.adds_ids:
                    own.append((b"x-request-id", journal.request_id.encode()))
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in present)]
            await send(message)

        try:
            self._check_token(scope, headers)
            if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
                raise ProblemError(403, "Another site's", "this request comes from another site's page")
            if scope["method"] in ("POST", "PUT"):
                await self._bounded(scope, headers, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except Exception as error:
            problem = as_problem(error)
            if problem.status_code == 500:
                LOGGER.exception("request %s failed", journal.request_id)
            if not status:
                await problem.response()(scope, receive, send_with_headers)
        finally:
            self._note(scope, journal, status)

    def _note(self, scope: Scope, journal: Journal, status: int) -> None:
        """Count and log an answered request."""
        path = scope["path"]
        known = path if path.startswith("/v1/") and path in self.routes else "other"
        seconds = time.perf_counter() - journal.started
        self.metrics.requests.labels(known, str(status or 499)).inc()
        if known != "other":
            self.metrics.seconds.labels(known, "total").observe(seconds)
            fields = {"request_id": journal.request_id, "route": known, "status": status or 499}
            LOGGER.info("request", extra=fields | {"total_ms": round(1000 * seconds, 2)} | journal.values)

    def _check_token(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        guarded = scope["path"].startswith("/v1/") or scope["path"] == "/metrics"
        if not self.token_digest or not guarded:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).hexdigest()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(digest, self.token_digest):
            raise ProblemError(401, "Not authorised", "expected the header Authorization: Bearer TOKEN")

    async def _bounded(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Read the body within the limits, then let the application answer."""
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.max_bytes:
            raise self._too_large()
        self._check_queue()
        if self.uploads >= self.limits.max_uploads:
            raise ProblemError(503, "Busy", f"{self.uploads} requests are arriving; try again")
        self.uploads += 1
        held = 0
        try:
            try:
                chunks: list[bytes] = []
                async for chunk in self._chunks(receive):
                    held += len(chunk)
                    self.held_bytes += len(chunk)
                    if held > self.limits.max_bytes:
                        raise self._too_large()
                    if self.held_bytes > self.limits.max_upload_bytes:
                        raise ProblemError(503, "Busy", "too many bytes are arriving; try again")
                    chunks.append(chunk)
            finally:
                self.uploads -= 1
            self._check_queue()
            self.requests += 1
            try:
                async with asyncio.timeout(self.limits.answer_seconds):
                    await self.app(scope, _replay(b"".join(chunks), receive), send)
            except TimeoutError:
                raise ProblemError(503, "Busy", "the answer took too long; try again") from None
            finally:
                self.requests -= 1
        except _DisconnectedError:
            return
        finally:
            self.held_bytes -= held

    def _check_queue(self) -> None:
        if self.requests > self.limits.max_queued:
            raise ProblemError(503, "Busy", f"{self.requests} requests are being answered or waiting; try again")

    def _too_large(self) -> ProblemError:
        return ProblemError(413, "Request too large", f"a request may have {self.limits.max_bytes:,} bytes")

    async def _chunks(self, receive: Receive) -> AsyncIterator[bytes]:
        """The parts of a body, while it arrives fast enough."""
        started, received = time.monotonic(), 0
        limit = self.limits.body_seconds
        while True:
            elapsed = time.monotonic() - started
            slow = elapsed > GRACE_SECONDS and received < elapsed * MIN_BYTES_PER_SECOND
            patience = min(limit, GRACE_SECONDS) if received < MIN_BYTES_PER_SECOND * GRACE_SECONDS else limit
            try:
                message = await asyncio.wait_for(receive(), 0 if slow else patience - elapsed)
            except TimeoutError:
                detail = f"the body took longer than {patience:g} seconds to arrive"
                raise ProblemError(408, "Bad request", detail) from None
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            received += len(message.get("body", b""))
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return


class _DisconnectedError(Exception):
    """The client has gone before its body was whole."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body at once, then the connection's own messages."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
