"""Which addresses a crawler may connect to: URLs are parsed strictly, names looked up once, every address checked.

Only addresses of the public internet or of explicitly allowed networks are returned. The last check is made when the
socket is opened, on the address it connects to.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar
from urllib.parse import urljoin

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_prep.tables import FetchReason

MAX_URL_LENGTH = 8192
MAX_HOST_LENGTH = 253
MAX_DETAIL_LENGTH = 500
HOST_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
ABSOLUTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://([^/?#]*)(.*)", re.DOTALL)
ENDS_IN_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)", re.ASCII)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments, and the metadata service of Oracle's cloud
        "192.88.99.0/24",  # retired 6to4 relays
        "168.63.129.16/32",  # the host of every virtual machine on Azure
        "3fff::/20",  # documentation
    )
)
"""Networks without public web sites that Python 3.11 counts as global."""

REMEMBERED_HOSTS = 100_000
REPEAT_SECONDS = 0.2
"""Pause before a lookup that failed temporarily is repeated."""
NEGATIVE_SECONDS = 30.0
"""How long a failed lookup is cached."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = tuple[int, str]
"""An address family and a literal address."""
Lookup = Callable[[str], list[Address]]
T = TypeVar("T")


@dataclass(eq=False)
class FetchError(Exception):
    """Why a URL cannot be fetched. Copy it with `replace` to keep it: a raised exception holds its frames' memory."""

    reason: FetchReason
    detail: str
    transient: bool = False
    """Another attempt may succeed."""
    refusal: bool = False
    """We refused to make the request."""
    retry_after: float = 0.0
    """Seconds that the server asked to wait."""
    answered: bool = False
    """The host answered, though nothing that can be read."""

    def __post_init__(self) -> None:
        self.detail = self.detail[:MAX_DETAIL_LENGTH].encode(errors="replace").decode()  # servers send invalid Unicode

    def __str__(self) -> str:
        return self.detail


def parse_url(text: str, base: URL | None = None) -> URL:
    """Parse an absolute http or https URL, or a redirect relative to `base`, and bring its host into canonical form.

    The path and query are kept as they are, since signed links are compared byte by byte: only spaces, control and
    non-ASCII characters are percent-encoded. They are the path of the returned object, which has no query of its own.
    It is the one requested later, so no second parser can find another host in it.

    Raises:
        FetchError: `bad_url`.
    """
    text = text.strip()
    if len(text) > MAX_URL_LENGTH:
        raise _bad_url(text, f"expected at most {MAX_URL_LENGTH} characters")
    found = ABSOLUTE.fullmatch(_absolute(text, base) if base else text)
    if not found or found[1].lower() not in ("http", "https"):
        raise _bad_url(text, "expected http or https")
    scheme, authority, target = found[1].lower(), found[2], found[3].partition("#")[0]
    if not authority or re.search(r"[\s\x00-\x20\x7f\\]", authority):
        raise _bad_url(text, "expected a host name and no spaces")
    try:
        url = URL(f"{scheme}://{authority}/")
    except ValueError as error:
        raise _bad_url(text, f"{error}") from error
    if "@" in authority:
        raise _bad_url(text, "expected no user name or password")
    host = _canonical_host(url.raw_host or "")
    if host is None:
        raise _bad_url(text, "expected a host name or address")
    url = url if host == url.raw_host else url.with_host(host)
    target = target if target.startswith("/") else f"/{target}"
    return URL.build(scheme=scheme, authority=url.raw_authority, path=quote_bytes(target), encoded=True)


def quote_bytes(text: str) -> str:
    """Percent-encode spaces, control and non-ASCII characters, and bytes of a header that are not UTF-8."""
    content = text.encode(errors="surrogateescape")
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in content)


def _absolute(location: str, base: URL) -> str:
    """A redirect's address; one with a host or an absolute path is taken as it is."""
    if ABSOLUTE.fullmatch(location) or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", location):
        return location
    if location.startswith("//"):
        return f"{base.scheme}:{location}"
    if location.startswith("/"):
        return f"{base.origin()}{location}"
    if location.startswith(("?", "#")) or not location:
        return f"{base.origin()}{base.raw_path.partition('?')[0]}{location}"
    try:
        return urljoin(str(base), location)
    except ValueError as error:
        raise _bad_url(location, str(error)) from error


def _bad_url(text: str, problem: str) -> FetchError:
    return FetchError("bad_url", f"{text[:200]!r}: {problem}", refusal=True)


def _canonical_host(host: str) -> str | None:
    """The host in lower case without a trailing dot, IPv4 addresses as four decimal parts; None if malformed."""
    if ":" in host:
        return None if "%" in host else host  # a zone names one of our own network interfaces
    name = host.lower().removesuffix(".")
    if len(name) > MAX_HOST_LENGTH or not HOST_NAME.fullmatch(name):
        return None
    if ENDS_IN_NUMBER.fullmatch(name):
        try:
            return socket.inet_ntoa(socket.inet_aton(name))
        except OSError:
            return None
    return name


@lru_cache(maxsize=4096)
def may_connect(address: str, allowed: tuple[Network, ...] = ()) -> bool:
    """Whether an IP address belongs to the public internet or to an allowed network.

    An IPv4 address wrapped in an IPv6 one (mapped, 6to4, NAT64) is checked itself.
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
    if any(ip in network for network in NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


@dataclass(frozen=True, kw_only=True)
class LookupResult(Generic[T]):
    """The result of a lookup."""

    value: T | FetchError
    """The result, or the error to raise."""
    seconds: float
    """How long it is valid."""
    weight: int = 1
    """Its share of the cache's capacity."""


class LookupCache(Generic[T]):
    """Caches slow lookups; concurrent requests for a key share one lookup.

    The least recently used results are dropped once the total weight exceeds `capacity`.
    """

    def __init__(self, look_up: Callable[[str], Coroutine[Any, Any, LookupResult[T]]], capacity: int) -> None:
        self._look_up, self._capacity, self._weight = look_up, capacity, 0
        self._results: OrderedDict[str, tuple[float, LookupResult[T]]] = OrderedDict()
        self._running: dict[str, asyncio.Task[LookupResult[T]]] = {}

    async def get(self, key: str) -> T:
        """The result for a key.

        Raises:
            FetchError: the result is an error.
        """
        expires, result = self._results.get(key, (0.0, None))
        if result is None or expires < time.monotonic():
            if key not in self._running:
                self._running[key] = asyncio.create_task(self._look_up_and_store(key))
            result = await asyncio.shield(self._running[key])
        else:
            self._results.move_to_end(key)
        if isinstance(result.value, FetchError):
            raise replace(result.value)
        return result.value

    async def _look_up_and_store(self, key: str) -> LookupResult[T]:
        try:
            result = await self._look_up(key)
        finally:
            del self._running[key]
        if key in self._results:
            self._weight -= self._results.pop(key)[1].weight
        self._results[key] = time.monotonic() + result.seconds, result
        self._weight += result.weight
        while self._weight > self._capacity:
            _, (_, oldest) = self._results.popitem(last=False)
            self._weight -= oldest.weight
        return result


def look_up(host: str) -> list[Address]:
    """Addresses of a name from the system's resolver."""
    records = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in records]


class CheckedResolver(AbstractResolver):
    """Resolves and caches names; returns addresses only if every one of them may be connected to."""

    def __init__(
        self,
        *,
        allow_networks: Sequence[str] = (),
        cache_seconds: float = 300.0,
        retry_seconds: float = 0.5,
        threads: int = 32,
        lookup: Lookup = look_up,
    ) -> None:
        self._allowed = tuple(ipaddress.ip_network(network) for network in allow_networks)
        self._cache_seconds, self._retry_seconds = cache_seconds, retry_seconds
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")
        self._names: LookupCache[list[Address]] = LookupCache(self._look_up_and_check, REMEMBERED_HOSTS)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of a host name or literal address.

        Raises:
            FetchError: `dns` if there are none, `forbidden_address` if any may not be connected to.
        """
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            addresses = await self._names.get(host)
        else:
            addresses = [(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, host)]
            self._check(host, host)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=int(socket.AI_NUMERICHOST)
            )
            for kind, address in addresses
        ]

    def open_socket(self, target: tuple[Any, ...]) -> socket.socket:
        """Open a socket for one `getaddrinfo` record.

        Raises:
            FetchError: `forbidden_address`.
        """
        family, kind, protocol, _, address = target
        self._check(str(address[0]), str(address[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Do nothing: no connection is held open."""

    def _check(self, host: str, address: str) -> None:
        if not may_connect(address, self._allowed):
            raise FetchError("forbidden_address", f"{host} is {address}", refusal=True)

    async def _look_up_and_check(self, host: str) -> LookupResult[list[Address]]:
        try:
            addresses = await self._look_up(host)
        except (OSError, UnicodeError) as error:
            transient = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            seconds = self._retry_seconds if transient else min(NEGATIVE_SECONDS, self._cache_seconds)
            return LookupResult(value=FetchError("dns", f"{host}: {error}", transient=transient), seconds=seconds)
        try:
            for _, address in addresses:
                self._check(host, address)
        except FetchError as error:
            return LookupResult(value=replace(error), seconds=self._cache_seconds)
        return LookupResult(value=addresses, seconds=self._cache_seconds)

    async def _look_up(self, host: str) -> list[Address]:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(self._threads, self._lookup, host)
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                raise
            await asyncio.sleep(REPEAT_SECONDS)
            addresses = await loop.run_in_executor(self._threads, self._lookup, host)
        if not addresses:
            raise OSError("no addresses")
        return addresses
