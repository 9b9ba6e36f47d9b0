"""Fetch images over HTTP: every URL ends as bytes or as a reason why not.

    results = await Fetcher(FetchConfig()).fetch(["https://example.com/cat.jpg", ...])

Every hop of a URL goes the same way: `parse_url`, a slot of its host, the host's robots.txt, addresses that were all
checked, and one request held to a deadline, a minimum rate and a size.
"""

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import pyarrow as pa
from yarl import URL

from data_prep.pairs import robots
from data_prep.pairs.addresses import REMEMBERED_HOSTS, CheckedResolver, FetchError, Lookup, look_up, parse_url
from data_prep.pairs.body import Body

REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
RETRY_AFTER_STATUSES = (429, 503)
SILENCE = ("timeout", "connect", "dns")
"""Reasons that speak against a whole host."""
KEEP_ALIVE_SECONDS = 4.0
"""Connections wait this long for another URL of their host, lest those to a million hosts use up the open files."""
GIVEN_UP_SECONDS = 300.0
"""After which one URL may try whether a host answers again."""
ROBOTS_REDIRECTS = 5
ROBOTS_SHARE = 0.5
"""Part of the deadline that robots.txt may take."""


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are fetched."""

    user_agent: str = "ovd-ray/0.1 (image-text dataset crawler; honours robots.txt and X-Robots-Tag)"
    """Sites address the crawler by what stands before the slash."""
    deadline_seconds: float = 20.0
    """For one URL: its redirects, retries, pauses and wait for robots.txt together, without the wait for a slot."""
    min_bytes_per_second: int = 1000
    """Of a body on its way, on average since it began; 0 for any."""
    grace_seconds: float = 5.0
    """For which a body may be slower."""
    max_attempts: int = 3
    backoff_seconds: float = 0.5
    """Pause before the second attempt, doubled for each further one, with up to as much again at random."""
    max_bytes: int = 20 << 20
    """Largest body, before and after content decoding."""
    max_redirects: int = 5
    concurrency: int = 128
    """Requests at a time in one process."""
    per_host: int = 16
    """Requests at a time to one host and port, in one process; of one that has never answered no more than
    `host_failures` URLs are tried at all, so that silent hosts do not hold all the requests that may wait at a time."""
    host_failures: int = 4
    """URLs of one host and port in a row without an answer, after which this process leaves the rest of them."""
    dns_cache_seconds: float = 300.0
    dns_threads: int = 32
    """Name lookups at a time in one process."""
    allow_networks: tuple[str, ...] = ()
    """Networks outside the public internet that may be fetched from, such as `127.0.0.1/32`."""
    respect_opt_out: bool = True
    """Leave images whose server sends `X-Robots-Tag: noai` or its relatives, or `tdm-reservation: 1`."""
    respect_robots: bool = True
    """Leave images that their site's robots.txt disallows."""
    robots_cache_seconds: float = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What became of one URL."""

    content: bytes | None = None
    """The body, or None if it was not fetched."""
    reason: str | None = None
    """One of `tables.REASONS["fetch"]`, or None if it was fetched."""
    detail: str | None = None
    http_status: int | None = None
    """Status of the last response, if there was one."""
    attempts: int = 0
    """Times the URL was tried, redirects not counted; 0 if we refused to."""


T = TypeVar("T")
Then = Callable[[Fetched], Coroutine[Any, Any, T]]
"""What is done with each result."""


@dataclass(kw_only=True)
class _Host:
    """A host and port."""

    slots: asyncio.Semaphore
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set for an instant when a URL may have to wait no more."""
    trying: int = 0
    """URLs that it is asked for, with the pauses between their attempts."""
    users: int = 0
    """URLs that hold a slot or wait for one."""
    answered: float = 0.0
    """When it last did."""
    failures: int = 0
    """URLs in a row that ended in silence."""
    last: FetchError | None = None
    """How the last of these ended."""
    given_up_until: float = 0.0
    paused_until: float = 0.0
    """It asked for no request until then (`Retry-After`)."""

    def has_room(self, most: int) -> bool:
        """Whether one more URL may be tried: if it has never answered, only as many as would give it up."""
        return bool(self.answered) or self.failures >= most or self.trying + self.failures < most

    async def admit(self, most: int) -> None:
        """Wait until there is room."""
        while not self.has_room(most):
            await self.changed.wait()
        self.trying += 1

    def leave(self) -> None:
        """A URL is settled."""
        self.trying -= 1
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed.clear()

    def settle(self, failure: FetchError | None, began: float) -> None:
        """Count how a URL that began at a time ended here, None for well.

        Silence counts only if nobody else was answered meanwhile: what fails takes longest and so tends to come last.
        """
        now = time.monotonic()
        if failure is None or failure.reason not in SILENCE:
            self.failures, self.answered = 0, now
            self._wake()
        elif began >= self.answered:
            self.failures, self.last = self.failures + 1, failure.fresh()
            self.given_up_until = now + GIVEN_UP_SECONDS


@dataclass(kw_only=True)
class _Visit:
    """What is known of a URL so far."""

    remaining: float
    """Seconds to the deadline."""
    began: float = 0.0
    """When it first had a slot."""
    is_robots_txt: bool = False
    host: _Host | None = None
    """Where the last hop went."""
    hosts: dict[str, _Host] = field(default_factory=dict)
    """Where it is tried, since hops may go to several."""
    status: int | None = None
    asked: bool = False
    """Whether this attempt has made a request."""
    resolving: bool = False

    def leave(self) -> None:
        """Be tried nowhere."""
        for host in self.hosts.values():
            host.leave()
        self.hosts.clear()


async def _as_it_is(fetched: Fetched) -> Fetched:
    return fetched


class Fetcher:
    """Fetches batches of URLs; batches that overlap on an event loop share connections, limits and what was learnt.

    What it remembers of hosts stays bounded however many there are.
    """

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
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._slots = asyncio.Semaphore(config.concurrency)
        self.gate = open_gate()
        """No further request is made while it is cleared."""
        self._batches = 0
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, urls: Sequence[str | None]) -> list[Fetched]:
        """One result for each URL, in their order; never raises for a URL's sake."""
        return await self.fetch_then(urls, _as_it_is)

    async def fetch_then(self, urls: Sequence[str | None], then: Then[T]) -> list[T]:
        """What `then` makes of each URL's result as soon as that is there, in the order of the URLs."""
        if self._session is None:
            self._session = self._open_session()
        self._batches += 1
        try:
            return list(await asyncio.gather(*(self._fetch_one_then(url, then) for url in urls)))
        finally:
            self._batches -= 1
            if not self._batches:  # nobody tells a worker of its end, so no connection outlives the last batch
                session, self._session = self._session, None
                await session.close()

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

    async def _fetch_one_then(self, url: str | None, then: Then[T]) -> T:
        return await then(await self._fetch_one(url))

    async def _fetch_one(self, url: str | None) -> Fetched:
        visit = _Visit(remaining=self.config.deadline_seconds)
        try:
            return await self._try(url, visit)
        finally:
            visit.leave()

    async def _try(self, url: str | None, visit: _Visit) -> Fetched:
        for attempt in range(1, self.config.max_attempts + 1):
            visit.asked = False
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
            visit.host.settle(failure, visit.began)
        return Fetched(
            reason=failure.reason,
            detail=failure.detail,
            http_status=visit.status,
            attempts=attempt - 1 if failure.refusal and not visit.asked else attempt,
        )

    async def _follow(self, url: URL, visit: _Visit, max_redirects: int) -> bytes:
        """The body behind a URL and its redirects; each hop is checked like the first."""
        for _ in range(max_redirects + 1):
            body, location = await self._hop(url, visit)
            if visit.host:
                visit.host.settle(None, visit.began)
            if location is None:
                return body
            url = parse_url(location, url)
        raise FetchError("too_many_redirects", f"more than {max_redirects}")

    async def _hop(self, url: URL, visit: _Visit) -> tuple[bytes, str | None]:
        """One request within the limits: the body, or where it redirects to."""
        # a robots.txt uses the slots of the URLs that wait for it: asking for one more, it might wait for them
        async with contextlib.nullcontext() if visit.is_robots_txt else self._slot(url, visit):
            started, seconds = time.monotonic(), visit.remaining
            try:
                async with asyncio.timeout(seconds):
                    visit.resolving = True
                    await self._resolver.resolve(url.raw_host or "")  # here too: aiohttp asks for new connections only
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
        """One of the requests at a time of the URL's host, and of this process.

        Raises:
            FetchError: the host was given up, or asked for a pause that is longer than the URL's deadline.
        """
        name = f"{url.raw_host}:{url.port}"
        visit.host = host = self._host(name)
        host.users += 1
        try:
            if name not in visit.hosts:
                most = max(1, self.config.host_failures)
                if not host.has_room(most):
                    visit.leave()  # who waits holds nothing that others may wait for
                await host.admit(most)
                visit.hosts[name] = host
            async with host.slots:
                await self._pause(host, name, visit)
                async with self._slots:
                    await self.gate.wait()
                    now = time.monotonic()
                    visit.began = visit.began or now
                    if host.last and host.failures >= self.config.host_failures:
                        if now < host.given_up_until:
                            detail = f"{name} was given up after {host.failures} failures in a row: {host.last.detail}"
                            raise FetchError(host.last.reason, detail, refusal=True)
                        host.given_up_until = now + GIVEN_UP_SECONDS
                    yield
        finally:
            host.users -= 1

    async def _pause(self, host: _Host, name: str, visit: _Visit) -> None:
        """Wait as long as the host asked for."""
        while (wait := host.paused_until - time.monotonic()) > 0:
            if wait > visit.remaining:
                raise FetchError("http_status", f"{name} asked for a pause of {wait:.0f} s more", refusal=True)
            await asyncio.sleep(wait)
            visit.remaining -= wait

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(slots=asyncio.Semaphore(self.config.per_host))
            while len(self._hosts) > REMEMBERED_HOSTS and not self._hosts[oldest := next(iter(self._hosts))].users:
                del self._hosts[oldest]
        self._hosts.move_to_end(name)
        return self._hosts[name]

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
        if self._session is None:  # a robots.txt that nobody waits for any more
            raise FetchError("connect", "the session is over", refusal=True)
        visit.asked = True
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
        """A response as the body, or where it redirects to."""
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
        body = Body(headers.get("Content-Encoding", ""), robots.MAX_BYTES if visit.is_robots_txt else config.max_bytes)
        try:
            await self._receive(response, body)
        except FetchError as error:
            if error.reason != "too_large" or not visit.is_robots_txt:
                raise
        return bytes(body.content), None

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


def fetch_all(urls: Sequence[str | None], config: FetchConfig) -> list[Fetched]:
    """Fetch a few URLs from code that is not asynchronous."""
    return asyncio.run(Fetcher(config).fetch(urls))


def open_gate() -> asyncio.Event:
    """A gate that lets everything pass."""
    gate = asyncio.Event()
    gate.set()
    return gate


def with_status(rows: pa.Table, fetched: Sequence[Fetched]) -> pa.Table:
    """Append `stage` ("fetch" for failures, else null), `reason`, `detail`, `http_status`, `attempts`."""
    columns = {
        "stage": pa.array(["fetch" if result.reason else None for result in fetched], pa.string()),
        "reason": pa.array([result.reason for result in fetched], pa.string()),
        "detail": pa.array([result.detail for result in fetched], pa.string()),
        "http_status": pa.array([result.http_status for result in fetched], pa.int32()),
        "attempts": pa.array([result.attempts for result in fetched], pa.int32()),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows
