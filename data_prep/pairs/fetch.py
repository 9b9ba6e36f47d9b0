"""Fetch images over HTTP: every URL gives its bytes or the reason for the failure.

    fetcher = Fetcher(FetchConfig())
    async with fetcher.open():
        fetched = await fetcher.fetch("https://example.com/cat.jpg")

Every hop of a URL takes the same steps: `parse_url`, a slot of its host, the host's robots.txt, a check of all its
addresses, and one request with a deadline, a minimum rate and a maximum size.
"""

import asyncio
import contextlib
import http.client
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import aiohttp
import pyarrow as pa
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from data_prep.pairs import robots
from data_prep.pairs.addresses import CheckedResolver, FetchError, Lookup, look_up, parse_url
from data_prep.pairs.hosts import Host, Hosts
from data_prep.pairs.responses import Body, get_leniently, is_complete
from data_prep.pairs.rows import STATUS, append_columns, fill_nulls
from data_prep.tables import FetchReason

REDIRECTS = (301, 302, 303, 307, 308)
MAX_HEADER = 256 << 10
"""Maximum bytes of a header field and of the status line, as in browsers."""
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
RETRY_AFTER_STATUSES = (429, 503)
KEEP_ALIVE_SECONDS = 4.0
"""Idle connections are kept this long; longer, those to a million hosts would use up the open files."""
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
    """Maximum size of a body, before and after content decoding, and of an image in a shard."""
    max_redirects: int = 5
    concurrency: int = 128
    """Concurrent requests of one process."""
    per_host: int = 16
    """Concurrent requests of one process to one host and port. At most `host_failures` URLs are tried on a host that
    has never answered, so that silent hosts cannot occupy all of the process's requests."""
    host_failures: int = 4
    """After so many URLs of a host and port in a row without an answer, this process skips its URLs, but for one every
    five minutes, until one is answered."""
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
        self._headers = {
            "User-Agent": config.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "gzip, deflate",
        }
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
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
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
            try:
                async with self._session.get(url, allow_redirects=False) as response:
                    return await self._read(response, visit)
            except aiohttp.ClientResponseError as error:  # not parsed
                return await self._request_leniently(url, visit, error)
        except aiohttp.InvalidURL as error:
            raise FetchError("bad_url", f"{error}") from error
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
            raise FetchError("tls", f"{error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise FetchError("connect", f"{type(error).__name__}: {error}", transient=True) from error

    async def _request_leniently(self, url: URL, visit: _Visit, error: Exception) -> tuple[bytes, str | None]:
        """See `get_leniently`; what it cannot parse either is final, but a sign that the host answers."""
        limit = self._limit(visit)
        ask = partial(
            get_leniently,
            url,
            await self._resolver.resolve(url.raw_host or ""),
            self._headers,
            limit=limit,
            seconds=visit.remaining,
            open_socket=self._resolver.open_socket,
        )
        try:
            response = await asyncio.to_thread(ask)
        except TimeoutError:
            raise
        except (http.client.HTTPException, OSError, ValueError):
            detail = f"{type(error).__name__}: {error}"
            raise FetchError("connect", " ".join(detail.split()), answered=True) from error
        location = self._check_head(response.status, response.reason, response.headers, None, visit)
        if location is not None:
            return b"", location
        body = Body(response.headers.get("Content-Encoding", ""), limit)
        with self._cut_robots_txt(visit):
            body.feed(response.content)
            body.end()
        return bytes(body.content), None

    async def _read(self, response: aiohttp.ClientResponse, visit: _Visit) -> tuple[bytes, str | None]:
        """The body of a response, or where it redirects to."""
        headers = response.headers
        location = self._check_head(response.status, response.reason, headers, response.content_length, visit)
        if location is not None:
            return b"", location
        body = Body(headers.get("Content-Encoding", ""), self._limit(visit))
        with self._cut_robots_txt(visit):
            await self._receive(response, body)
        return bytes(body.content), None

    def _limit(self, visit: _Visit) -> int:
        return robots.MAX_BYTES if visit.is_robots_txt else self.config.max_bytes

    @contextlib.contextmanager
    def _cut_robots_txt(self, visit: _Visit) -> Iterator[None]:
        """Take what there is of a robots.txt that is too large."""
        try:
            yield
        except FetchError as error:
            if error.reason != "too_large" or not visit.is_robots_txt:
                raise

    def _check_head(
        self,
        status: int,
        reason: str | None,
        headers: CIMultiDictProxy[str] | CIMultiDict[str],
        length: int | None,
        visit: _Visit,
    ) -> str | None:
        """Where a response redirects to; None if its body is to be read.

        Raises:
            FetchError: it is not to be read.
        """
        config, visit.status = self.config, status
        if status < 400 and config.respect_opt_out and not visit.is_robots_txt:
            tags, reservation = headers.getall("X-Robots-Tag", []), headers.get("tdm-reservation", "")
            opted_out = robots.opt_out(tags, reservation, config.user_agent)
            if opted_out:
                raise FetchError("opt_out", opted_out)
        if status in REDIRECTS and "Location" in headers:
            return headers["Location"]
        if not is_complete(status, headers.get("Content-Range", "")):
            transient = status in TRANSIENT_STATUSES
            wait = robots.retry_after(headers.get("Retry-After", "")) if status in RETRY_AFTER_STATUSES else 0.0
            raise FetchError("http_status", f"{status} {reason}", transient=transient, retry_after=wait)
        if (length or 0) > config.max_bytes and not visit.is_robots_txt:
            raise FetchError("too_large", f"{length} bytes announced, at most {config.max_bytes}")
        return None

    async def _receive(self, response: aiohttp.ClientResponse, body: Body) -> None:
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
