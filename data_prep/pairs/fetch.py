"""Fetch images over HTTP: every URL gives its bytes or the reason for the failure.

    fetcher = Fetcher(FetchConfig())
    async with fetcher.open():
        fetched = await fetcher.fetch("https://example.com/cat.jpg")

Every hop of a URL takes the same steps: `parse_url`, a slot of its host, the host's robots.txt, a check of all its
addresses, and one request with a deadline, a minimum rate and a maximum size.
"""

import asyncio
import contextlib
import random
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import aiohttp
import pyarrow as pa
from yarl import URL

from data_prep.pairs import robots
from data_prep.pairs.addresses import CheckedResolver, FetchError, Lookup, look_up, parse_url
from data_prep.pairs.hosts import Host, Hosts
from data_prep.pairs.rows import STATUS, append_columns, fill_nulls
from data_prep.tables import FetchReason

REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
RETRY_AFTER_STATUSES = (429, 503)
KEEP_ALIVE_SECONDS = 4.0
"""Idle connections are kept this long; longer, those to a million hosts would use up the open files."""
UNSUPPORTED_ENCODINGS = ("br", "zstd", "compress")
ROBOTS_REDIRECTS = 5
ROBOTS_SHARE = 0.5
"""Share of the deadline that robots.txt may take."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are fetched."""

    user_agent: str = "ovd-ray/0.1 (image-text dataset crawler; honours robots.txt and X-Robots-Tag)"
    """robots.txt files name the crawler by the part before the slash."""
    deadline_seconds: float = 20.0
    """Per URL, including redirects, retries, pauses and waiting for robots.txt, but not waiting for a slot."""
    min_bytes_per_second: int = 1000
    """Minimum average rate of a body; 0 allows any."""
    grace_seconds: float = 5.0
    """The minimum rate applies after this time."""
    max_attempts: int = 3
    backoff_seconds: float = 0.5
    """Pause before the second attempt, doubled for each further one, plus a random time of up to the same length."""
    max_bytes: int = 20 << 20
    """Maximum size of a body, before and after content decoding."""
    max_redirects: int = 5
    concurrency: int = 128
    """Concurrent requests of one process."""
    per_host: int = 16
    """Concurrent requests of one process to one host and port. At most `host_failures` URLs are tried on a host that
    has never answered, so that silent hosts cannot occupy all of the process's requests."""
    host_failures: int = 4
    """After so many URLs of a host and port in a row without an answer, this process skips the rest of them."""
    dns_cache_seconds: float = 300.0
    dns_threads: int = 32
    """Concurrent name lookups of one process."""
    allow_networks: tuple[str, ...] = ()
    """Networks outside the public internet that may be fetched from, such as `127.0.0.1/32`."""
    respect_opt_out: bool = True
    """Skip images whose server sends `X-Robots-Tag: noai` or a similar directive, or `tdm-reservation: 1`."""
    respect_robots: bool = True
    """Skip images that their site's robots.txt disallows."""
    robots_cache_seconds: float = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The result of one URL."""

    content: bytes | None = None
    """The body, or None if it was not fetched."""
    reason: FetchReason | None = None
    """Why it was not fetched."""
    detail: str | None = None
    http_status: int | None = None
    """Status of the last response, if there was one."""
    attempts: int = 0
    """Attempts, not counting redirects; 0 if we refused to make a request."""


@dataclass(kw_only=True)
class _Visit:
    """The state of one URL."""

    remaining: float
    """Seconds to the deadline."""
    began: float = 0.0
    """When it first had a slot."""
    is_robots_txt: bool = False
    host: Host | None = None
    """The host of the last hop."""
    admitted: dict[str, Host] = field(default_factory=dict)
    """All hosts that admitted the URL; its hops may go to several."""
    status: int | None = None
    requested: bool = False
    """Whether this attempt has made a request."""
    resolving: bool = False

    def leave(self) -> None:
        """Leave all hosts."""
        for host in self.admitted.values():
            host.leave()
        self.admitted.clear()


class _Body:
    """Receives a body block by block and decodes it, holding at most the limit and one block."""

    def __init__(self, encoding: str, limit: int) -> None:
        self.content = bytearray()
        self.received = 0
        self._encoding, self._limit = encoding.strip().lower().removeprefix("x-"), limit
        self._stream: zlib._Decompress | None = None
        if self._encoding in UNSUPPORTED_ENCODINGS or "," in self._encoding:
            raise FetchError("http_status", f"200, but encoded as {encoding[:100]!r}, which was not requested")

    def feed(self, block: bytes) -> None:
        """Add the next block received."""
        self.received += len(block)
        self.content += self._decode(block) if self._encoding in ("gzip", "deflate") else block
        if max(self.received, len(self.content)) > self._limit:
            raise FetchError("too_large", f"more than {self._limit} bytes")

    def _decode(self, block: bytes) -> bytes:
        if self._stream is None:  # servers send "deflate" with and without a zlib header
            bits = 31 if self._encoding == "gzip" else 15 if block[0] & 15 == 8 else -15
            self._stream = zlib.decompressobj(bits)
        if self._stream.eof:
            return b""
        try:
            return self._stream.decompress(block, self._limit + 1 - len(self.content))
        except zlib.error as error:
            raise FetchError("http_status", f"200, but not encoded as {self._encoding}: {error}") from error

    def end(self) -> None:
        """Check that the body is complete."""
        if self._stream is not None and not self._stream.eof:
            raise FetchError("connect", f"the body ends before its {self._encoding} encoding does", transient=True)


class Fetcher:
    """Fetches URLs; concurrent fetches share connections, limits and what is known of hosts."""

    def __init__(self, config: FetchConfig, lookup: Lookup = look_up) -> None:
        self.config = config
        self._resolver = CheckedResolver(
            allow_networks=config.allow_networks,
            cache_seconds=config.dns_cache_seconds,
            retry_seconds=config.backoff_seconds,
            threads=config.dns_threads,
            lookup=lookup,
        )
        self._robots = robots.Robots(
            config.user_agent,
            cache_seconds=config.robots_cache_seconds,
            retry_seconds=config.backoff_seconds,
            get=self._get_robots_txt,
        )
        self._hosts = Hosts(slots=config.per_host, max_failures=config.host_failures)
        self._slots = asyncio.Semaphore(config.concurrency)
        self.gate = asyncio.Event()
        self.gate.set()
        """While it is cleared, no new request is made."""
        self._users = 0
        self._session: aiohttp.ClientSession | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep connections open; they close with the last of several concurrent users."""
        if self._session is None:
            self._session = self._open_session()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                session, self._session = self._session, None
                await session.close()

    async def fetch(self, url: str | None) -> Fetched:
        """Fetch a URL; failures are returned, not raised."""
        visit = _Visit(remaining=self.config.deadline_seconds)
        try:
            return await self._try(url, visit)
        finally:
            visit.leave()

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                resolver=self._resolver,
                use_dns_cache=False,
                keepalive_timeout=KEEP_ALIVE_SECONDS,
                socket_factory=self._resolver.open_socket,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            headers={
                "User-Agent": self.config.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "gzip, deflate",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def _try(self, url: str | None, visit: _Visit) -> Fetched:
        for attempt in range(1, self.config.max_attempts + 1):
            visit.requested = False
            try:
                content = await self._follow(parse_url(url or ""), visit, self.config.max_redirects)
            except FetchError as error:
                failure = error
            else:
                return Fetched(content=content, http_status=visit.status, attempts=attempt)
            pause = self.config.backoff_seconds * 2 ** (attempt - 1)
            pause = max(pause + random.uniform(0, pause), failure.retry_after)
            if failure.retry_after and visit.host:
                visit.host.paused_until = max(visit.host.paused_until, time.monotonic() + failure.retry_after)
            if not failure.transient or attempt == self.config.max_attempts or pause > visit.remaining:
                break
            await asyncio.sleep(pause)
            visit.remaining -= pause
        if visit.host and not failure.refusal:
            visit.host.record(failure, visit.began)
        return Fetched(
            reason=failure.reason,
            detail=failure.detail,
            http_status=visit.status,
            attempts=attempt - 1 if failure.refusal and not visit.requested else attempt,
        )

    async def _follow(self, url: URL, visit: _Visit, max_redirects: int) -> bytes:
        """The body of a URL, following redirects; each hop is checked like the first."""
        for _ in range(max_redirects + 1):
            body, location = await self._hop(url, visit)
            if visit.host:
                visit.host.record(None, visit.began)
            if location is None:
                return body
            url = parse_url(location, url)
        raise FetchError("too_many_redirects", f"more than {max_redirects}")

    async def _hop(self, url: URL, visit: _Visit) -> tuple[bytes, str | None]:
        """One request within the limits: the body, or where it redirects to."""
        # robots.txt is fetched within the slots of the URLs that wait for it: waiting for another could deadlock
        async with contextlib.nullcontext() if visit.is_robots_txt else self._slot(url, visit):
            started, seconds = time.monotonic(), visit.remaining
            try:
                async with asyncio.timeout(seconds):
                    visit.resolving = True
                    await self._resolver.resolve(url.raw_host or "")  # aiohttp resolves for new connections only
                    visit.resolving = False
                    if self.config.respect_robots and not visit.is_robots_txt:
                        refusal = await self._robots.refusal(url)
                        if refusal:
                            raise FetchError("opt_out", refusal, refusal=True)
                    return await self._request(url, visit)
            except TimeoutError:
                raise FetchError("dns" if visit.resolving else "timeout", f"no answer in {seconds:.3g} s") from None
            finally:
                visit.remaining -= time.monotonic() - started

    @contextlib.asynccontextmanager
    async def _slot(self, url: URL, visit: _Visit) -> AsyncIterator[None]:
        """A slot among the concurrent requests of the URL's host and of this process.

        Raises:
            FetchError: the host was given up, or asked for a pause beyond the URL's deadline.
        """
        name = f"{url.raw_host}:{url.port}"
        visit.host = host = self._hosts.get(name)
        host.users += 1
        try:
            if name not in visit.admitted:
                if not host.has_room():
                    visit.leave()  # a waiting URL must not hold a place that others may wait for
                await host.admit()
                visit.admitted[name] = host
            async with host.slots:
                visit.remaining = await host.wait_for_pause(visit.remaining)
                async with self._slots:
                    await self.gate.wait()
                    visit.began = visit.began or time.monotonic()
                    host.check_alive()
                    yield
        finally:
            host.users -= 1

    async def _get_robots_txt(self, url: URL) -> tuple[int, bytes]:
        visit = _Visit(remaining=self.config.deadline_seconds * ROBOTS_SHARE, is_robots_txt=True)
        try:
            return 200, await self._follow(url, visit, ROBOTS_REDIRECTS)
        except FetchError as error:
            if error.reason == "http_status" and visit.status:
                return visit.status, b""
            if error.reason in ("too_many_redirects", "bad_url"):
                return 404, b""
            raise

    async def _request(self, url: URL, visit: _Visit) -> tuple[bytes, str | None]:
        if self._session is None:  # a robots.txt whose URLs have ended
            raise FetchError("connect", "the session is over", refusal=True)
        visit.requested = True
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                visit.status = response.status
                return await self._read(response, visit)
        except aiohttp.InvalidURL as error:
            raise FetchError("bad_url", f"{error}") from error
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
            raise FetchError("tls", f"{error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise FetchError("connect", f"{type(error).__name__}: {error}", transient=True) from error

    async def _read(self, response: aiohttp.ClientResponse, visit: _Visit) -> tuple[bytes, str | None]:
        """The body of a response, or where it redirects to."""
        config, status, headers = self.config, response.status, response.headers
        if status < 400 and config.respect_opt_out and not visit.is_robots_txt:
            tags, reservation = headers.getall("X-Robots-Tag", []), headers.get("tdm-reservation", "")
            opted_out = robots.opt_out(tags, reservation, config.user_agent)
            if opted_out:
                raise FetchError("opt_out", opted_out)
        if status in REDIRECTS and "Location" in headers:
            return b"", headers["Location"]
        if status != 200:
            transient = status in TRANSIENT_STATUSES
            wait = robots.retry_after(headers.get("Retry-After", "")) if status in RETRY_AFTER_STATUSES else 0.0
            raise FetchError("http_status", f"{status} {response.reason}", transient=transient, retry_after=wait)
        if (response.content_length or 0) > config.max_bytes and not visit.is_robots_txt:
            raise FetchError("too_large", f"{response.content_length} bytes announced, at most {config.max_bytes}")
        body = _Body(headers.get("Content-Encoding", ""), robots.MAX_BYTES if visit.is_robots_txt else config.max_bytes)
        try:
            await self._receive(response, body)
        except FetchError as error:
            if error.reason != "too_large" or not visit.is_robots_txt:
                raise
        return bytes(body.content), None

    async def _receive(self, response: aiohttp.ClientResponse, body: _Body) -> None:
        rate, grace = self.config.min_bytes_per_second, self.config.grace_seconds
        started = asyncio.get_running_loop().time()
        pace = asyncio.timeout(grace if rate else None)
        try:
            async with pace:
                async for block in response.content.iter_any():
                    body.feed(block)
                    if rate:
                        pace.reschedule(started + max(grace, body.received / rate))
        except TimeoutError:
            raise FetchError("timeout", f"{body.received} bytes came slower than {rate} a second") from None
        body.end()


def with_fetch_status(rows: pa.Table, fetched: Sequence[Fetched]) -> pa.Table:
    """Append `STATUS`; `stage` is "fetch" for failures, else null. Values that rows have already stay."""
    values = {name: [getattr(result, name) for result in fetched] for name in STATUS if name != "stage"}
    stages = ["fetch" if result.reason else None for result in fetched]
    columns = {name: pa.array({"stage": stages, **values}[name], kind) for name, kind in STATUS.items()}
    given = {name: columns.pop(name) for name in STATUS if name in rows.column_names}
    return append_columns(fill_nulls(rows, given), columns)
