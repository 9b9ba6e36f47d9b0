"""Fetch images over HTTP: every URL ends as bytes or as a reason why not.

    results = await Fetcher(FetchConfig()).fetch(["https://example.com/cat.jpg", ...])

Only addresses of the public internet, or of networks explicitly allowed, are ever connected to: each hop's host is
resolved here, every address is checked, and the connection is made to those very addresses.
"""

import asyncio
import ipaddress
import random
import re
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import pyarrow as pa
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_prep import storage

REDIRECTS = (301, 302, 303, 307, 308)
TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
READ_BYTES = 1 << 16
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are fetched."""

    user_agent: str = "ovd-ray/0.1 (image-text dataset crawler; honours X-Robots-Tag)"
    deadline_seconds: float = 20.0
    """For one URL: all its redirects, retries and pauses together, without the wait for a free slot."""
    max_attempts: int = 3
    backoff_seconds: float = 0.5
    """Pause before the second attempt, doubled for each further one, with up to as much again at random."""
    max_bytes: int = 20 << 20
    """Largest body, after content decoding."""
    max_redirects: int = 5
    concurrency: int = 128
    """Requests at a time in one process."""
    per_host: int = 16
    """Requests at a time to one host and port, in one process."""
    dns_cache_seconds: float = 300.0
    allow_networks: tuple[str, ...] = ()
    """Networks outside the public internet that may be fetched from, such as `127.0.0.1/32`."""
    respect_opt_out: bool = True
    """Leave images whose server sends `X-Robots-Tag: noai` or its relatives, or `tdm-reservation: 1`."""


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
    """Requests made, redirects not counted."""


class FetchError(Exception):
    """A URL that cannot be fetched; `transient` ones are worth another attempt."""

    def __init__(self, reason: str, detail: str, *, transient: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail
        self.transient, self.retry_after = transient, retry_after


@dataclass
class _Progress:
    """What is known of a URL so far, should its deadline strike."""

    remaining: float
    attempts: int = 0
    status: int | None = None
    resolving: bool = False


class Fetcher:
    """Fetches batches of URLs; batches that overlap on an event loop share connections and limits."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._resolver = CheckedResolver(config)
        self._hosts: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(config.per_host))
        self._slots = asyncio.Semaphore(config.concurrency)
        self._batches = 0
        self._session: aiohttp.ClientSession | None = None

    async def fetch(self, urls: Sequence[str | None]) -> list[Fetched]:
        """One result for each URL, in their order; never raises for a URL's sake."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, resolver=self._resolver, use_dns_cache=False),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                headers={"User-Agent": self.config.user_agent, "Accept": "image/*,*/*;q=0.5"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        self._batches += 1
        try:
            return list(await asyncio.gather(*(self._fetch_one(url) for url in urls)))
        finally:
            self._batches -= 1
            if not self._batches:  # nobody tells a worker of its end, so no connection outlives the last batch
                session, self._session = self._session, None
                await session.close()

    async def _fetch_one(self, url: str | None) -> Fetched:
        progress = _Progress(self.config.deadline_seconds)
        for attempt in range(1, self.config.max_attempts + 1):
            progress.attempts = attempt
            try:
                content = await self._follow(url or "", progress)
            except FetchError as error:
                failure = error
            else:
                return Fetched(content=content, http_status=progress.status, attempts=attempt)
            pause = self.config.backoff_seconds * 2 ** (attempt - 1)
            pause = max(pause + random.uniform(0, pause), failure.retry_after)
            if not failure.transient or attempt == self.config.max_attempts or pause > progress.remaining:
                break
            await asyncio.sleep(pause)
            progress.remaining -= pause
        attempts = 0 if failure.reason in ("bad_url", "forbidden_address") and progress.status is None else attempt
        return Fetched(reason=failure.reason, detail=failure.detail, http_status=progress.status, attempts=attempts)

    async def _follow(self, text: str, progress: _Progress) -> bytes:
        """The body behind a URL and its redirects; each hop is checked like the first."""
        url = parse_url(text)
        for _ in range(self.config.max_redirects + 1):
            async with self._hosts[f"{url.raw_host}:{url.port}"], self._slots:
                started = time.monotonic()
                try:
                    async with asyncio.timeout(progress.remaining):
                        body, location = await self._request(url, progress)
                except TimeoutError:
                    reason = "dns" if progress.resolving else "timeout"
                    raise FetchError(reason, f"no answer in {self.config.deadline_seconds:g} s") from None
                finally:
                    progress.remaining -= time.monotonic() - started
            if location is None:
                return body
            url = parse_url(location, url)
        raise FetchError("too_many_redirects", f"more than {self.config.max_redirects}")

    async def _request(self, url: URL, progress: _Progress) -> tuple[bytes, str | None]:
        """One request: the body, or where it redirects to."""
        assert self._session is not None
        progress.resolving = True
        await self._resolver.resolve(url.raw_host or "")  # here too: aiohttp does not ask about literal addresses
        progress.resolving = False
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                progress.status = response.status
                return await self._read(response)
        except aiohttp.InvalidURL as error:
            raise FetchError("bad_url", f"{error}") from error
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
            raise FetchError("tls", f"{error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise FetchError("connect", f"{type(error).__name__}: {error}", transient=True) from error

    async def _read(self, response: aiohttp.ClientResponse) -> tuple[bytes, str | None]:
        config, status = self.config, response.status
        if status < 400 and config.respect_opt_out:
            opted_out = opt_out(response.headers.getall("X-Robots-Tag", []), config.user_agent)
            if opted_out or response.headers.get("tdm-reservation", "").strip() == "1":
                raise FetchError("opt_out", opted_out or "tdm-reservation: 1")
        if status in REDIRECTS and "Location" in response.headers:
            return b"", response.headers["Location"]
        if status != 200:
            retry_after = response.headers.get("Retry-After", "")
            raise FetchError(
                "http_status",
                f"{status} {response.reason}",
                transient=status in TRANSIENT_STATUSES,
                retry_after=float(retry_after) if retry_after.isdigit() else 0.0,
            )
        if (response.content_length or 0) > config.max_bytes:
            raise FetchError("too_large", f"{response.content_length} bytes announced, at most {config.max_bytes}")
        body = bytearray()
        async for block in response.content.iter_chunked(READ_BYTES):
            body += block
            if len(body) > config.max_bytes:
                raise FetchError("too_large", f"more than {config.max_bytes} bytes")
        return bytes(body), None


class CheckedResolver(AbstractResolver):
    """Looks names up once in a while, and gives out addresses only if every one of them may be connected to."""

    def __init__(self, config: FetchConfig) -> None:
        self._seconds = config.dns_cache_seconds
        self._allowed = tuple(ipaddress.ip_network(network) for network in config.allow_networks)
        self._lookups: dict[str, tuple[float, asyncio.Task[list[tuple[int, str]]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a host name or literal address.

        Raises:
            FetchError: `dns` if there are none, `forbidden_address` if any may not be connected to.
        """
        expires, lookup = self._lookups.get(host, (0.0, None))
        if lookup is None or expires < time.monotonic():
            lookup = asyncio.create_task(_look_up(host))
            self._lookups[host] = time.monotonic() + self._seconds, lookup
        try:
            addresses = await asyncio.shield(lookup)
        except (OSError, UnicodeError) as error:
            self._lookups.pop(host, None)
            transient = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            raise FetchError("dns", f"{host}: {error}", transient=transient) from error
        for _, address in addresses:
            if not may_connect(address, self._allowed):
                raise FetchError("forbidden_address", f"{host} is {address}")
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=int(socket.AI_NUMERICHOST)
            )
            for kind, address in addresses
        ]

    async def close(self) -> None:
        """Nothing is held open."""


async def _look_up(host: str) -> list[tuple[int, str]]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


def parse_url(text: str, base: URL | None = None) -> URL:
    """An absolute http or https URL, or a redirect's reference relative to `base`.

    The very object is requested later, so that no second parser can see another host in it.

    Raises:
        FetchError: `bad_url`, it is none.
    """
    text = text.strip()
    try:
        url = base.join(URL(text)) if base else URL(text)
    except ValueError as error:
        raise FetchError("bad_url", f"{text[:200]!r}: {error}") from error
    if url.scheme not in ("http", "https"):
        raise FetchError("bad_url", f"{text[:200]!r}: expected http or https")
    if not url.raw_host or re.search(r"[\s\x00-\x1f\x7f\\]", text.partition("?")[0]):
        raise FetchError("bad_url", f"{text[:200]!r}: expected a host name and no spaces")
    return url


def may_connect(address: str, allowed: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()) -> bool:
    """Whether an IP address is one of the public internet, or of an allowed network.

    IPv4 addresses wrapped in IPv6 ones (mapped, 6to4, NAT64) count as what they wrap.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped is not None:
            return may_connect(str(wrapped), allowed)
        if ip.is_site_local:
            return False
    if any(ip in network for network in allowed):
        return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def opt_out(headers: Sequence[str], user_agent: str = "") -> str | None:
    """The `X-Robots-Tag` value that asks crawlers like this one to leave the image, or None.

    A value that starts with the name of an agent speaks to that agent alone.
    """
    product = user_agent.partition("/")[0].strip().lower()
    for header in headers:
        agent, colon, rest = header.lower().partition(":")
        addressed = bool(colon) and agent.strip() not in ("unavailable_after", "max-image-preview", "max-snippet")
        if addressed and agent.strip() not in ("*", product) and "," not in agent:
            continue
        directives = rest if addressed and "," not in agent else header.lower()
        if OPT_OUT_DIRECTIVES & {directive.strip() for directive in directives.split(",")}:
            return f"X-Robots-Tag: {header[:200]}"
    return None


def fetch_all(urls: Sequence[str | None], config: FetchConfig) -> list[Fetched]:
    """Fetch a few URLs from code that is not asynchronous."""
    return asyncio.run(Fetcher(config).fetch(urls))


class FetchStage:
    """Table rows with a `url` -> the same rows with `content`, or why there is none."""

    def __init__(self, config: FetchConfig) -> None:
        self.fetcher = Fetcher(config)

    async def __call__(self, rows: pa.Table) -> pa.Table:
        """Calls may overlap on one event loop; they share its connections."""
        return with_content(rows, await self.fetcher.fetch(rows["url"].to_pylist()))


class ReadStage:
    """Like `FetchStage` for rows whose `url` is a file, by path or URI, that is known to exist."""

    def __init__(self, config: FetchConfig) -> None:
        """Takes the config only to stand in for the other stage."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Read each file."""
        return with_content(rows, [Fetched(content=storage.read_bytes(uri)) for uri in rows["url"].to_pylist()])


def with_content(rows: pa.Table, fetched: Sequence[Fetched]) -> pa.Table:
    """Append `content`, `stage` ("fetch" for failures, else null), `reason`, `detail`, `http_status`, `attempts`."""
    columns = {
        "content": pa.array([result.content for result in fetched], pa.large_binary()),
        "stage": pa.array(["fetch" if result.reason else None for result in fetched], pa.string()),
        "reason": pa.array([result.reason for result in fetched], pa.string()),
        "detail": pa.array([result.detail for result in fetched], pa.string()),
        "http_status": pa.array([result.http_status for result in fetched], pa.int32()),
        "attempts": pa.array([result.attempts for result in fetched], pa.int32()),
    }
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows
