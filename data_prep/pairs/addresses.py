"""Where a crawler may connect to: URLs read strictly, names looked up once, every address checked.

Only addresses of the public internet, or of networks explicitly allowed, are ever given out, and the last check is made
when the socket is opened, on the very address it will connect to.
"""

import asyncio
import ipaddress
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

MAX_URL_LENGTH = 8192
MAX_HOST_LENGTH = 253
MAX_DETAIL_LENGTH = 500
HOST_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
ENDS_IN_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)", re.ASCII)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments, and a metadata service of Oracle's cloud
        "192.88.99.0/24",  # retired relays of 6to4
        "168.63.129.16/32",  # what every machine of Azure can reach its host by
        "3fff::/20",  # documentation
    )
)
"""Networks nobody's web site is in, although Python 3.11 counts them as global."""

REMEMBERED_HOSTS = 100_000
REPEAT_SECONDS = 0.2
"""Pause before a lookup that failed for the moment is repeated."""
NEGATIVE_SECONDS = 30.0
"""How long a name is taken not to exist."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = tuple[int, str]
"""An address family and a literal address."""
Lookup = Callable[[str], list[Address]]
T = TypeVar("T")


class FetchError(Exception):
    """A URL that cannot be fetched; `transient` ones are worth another attempt.

    A `refusal` is ours: nobody was asked.
    """

    def __init__(
        self, reason: str, detail: str, *, transient: bool = False, refusal: bool = False, retry_after: float = 0.0
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail[:MAX_DETAIL_LENGTH].encode(errors="replace").decode()  # servers send what is no Unicode
        self.transient, self.refusal, self.retry_after = transient, refusal, retry_after

    def fresh(self) -> "FetchError":
        """The same, to be kept or raised again: one that was raised keeps what its frames hold."""
        return FetchError(
            self.reason,
            self.detail,
            transient=self.transient,
            refusal=self.refusal,
            retry_after=self.retry_after,
        )


def parse_url(text: str, base: URL | None = None) -> URL:
    """An absolute http or https URL, or a redirect's reference relative to `base`, with its host in canonical form.

    The very object is requested later, so that no second parser can see another host in it.

    Raises:
        FetchError: `bad_url`, it is none.
    """
    text = text.strip()
    if len(text) > MAX_URL_LENGTH:
        raise _bad_url(text, f"expected at most {MAX_URL_LENGTH} characters")
    try:
        url = base.join(URL(text)) if base else URL(text)
    except ValueError as error:
        raise _bad_url(text, f"{error}") from error
    if url.scheme not in ("http", "https"):
        raise _bad_url(text, "expected http or https")
    if not url.raw_host or re.search(r"[\s\x00-\x1f\x7f\\]", text.partition("?")[0]):
        raise _bad_url(text, "expected a host name and no spaces")
    if url.raw_user is not None or url.raw_password is not None:
        raise _bad_url(text, "expected no user name or password")
    host = _canonical_host(url.raw_host)
    if host is None:
        raise _bad_url(text, "expected a host name or address")
    return url if host == url.raw_host else url.with_host(host)


def _bad_url(text: str, problem: str) -> FetchError:
    return FetchError("bad_url", f"{text[:200]!r}: {problem}", refusal=True)


def _canonical_host(host: str) -> str | None:
    """A host with its name in lower case, without the root's dot, its IPv4 address in four decimal parts; else None."""
    if ":" in host:
        return None if "%" in host else host  # a zone names one of our own network cards
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
    if any(ip in network for network in NOT_PUBLIC):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


@dataclass(frozen=True, kw_only=True)
class LookupResult(Generic[T]):
    """What a question came to."""

    value: T | FetchError
    """The answer, or what to raise."""
    seconds: float
    """How long it holds."""
    weight: int = 1
    """Its share of the memory for answers."""


class LookupCache(Generic[T]):
    """Answers to slow questions: a key is asked about once at a time, its answer shared, and remembered for a while.

    The answers used longest ago are forgotten once all together weigh more than `capacity`.
    """

    def __init__(self, ask: Callable[[str], Coroutine[Any, Any, LookupResult[T]]], capacity: int) -> None:
        self._ask, self._capacity, self._weight = ask, capacity, 0
        self._answers: OrderedDict[str, tuple[float, LookupResult[T]]] = OrderedDict()
        self._running: dict[str, asyncio.Task[LookupResult[T]]] = {}

    async def get(self, key: str) -> T:
        """The answer for a key.

        Raises:
            FetchError: that is the answer.
        """
        expires, answer = self._answers.get(key, (0.0, None))
        if answer is None or expires < time.monotonic():
            if key not in self._running:
                self._running[key] = asyncio.create_task(self._remember(key))
            answer = await asyncio.shield(self._running[key])
        else:
            self._answers.move_to_end(key)
        if isinstance(answer.value, FetchError):
            raise answer.value.fresh()
        return answer.value

    async def _remember(self, key: str) -> LookupResult[T]:
        try:
            answer = await self._ask(key)
        finally:
            del self._running[key]
        if key in self._answers:
            self._weight -= self._answers.pop(key)[1].weight
        self._answers[key] = time.monotonic() + answer.seconds, answer
        self._weight += answer.weight
        while self._weight > self._capacity:
            _, (_, oldest) = self._answers.popitem(last=False)
            self._weight -= oldest.weight
        return answer


def look_up(host: str) -> list[Address]:
    """Addresses of a name from the system's resolver."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


class CheckedResolver(AbstractResolver):
    """Looks names up once in a while, and gives out addresses only if every one of them may be connected to."""

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
        self._names: LookupCache[list[Address]] = LookupCache(self._ask, REMEMBERED_HOSTS)

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
        """A socket for one `getaddrinfo` record.

        Raises:
            FetchError: `forbidden_address`.
        """
        family, kind, protocol, _, address = target
        self._check(str(address[0]), str(address[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Nothing is held open."""

    def _check(self, host: str, address: str) -> None:
        if not may_connect(address, self._allowed):
            raise FetchError("forbidden_address", f"{host} is {address}", refusal=True)

    async def _ask(self, host: str) -> LookupResult[list[Address]]:
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
            return LookupResult(value=error.fresh(), seconds=self._cache_seconds)
        return LookupResult(value=addresses, seconds=self._cache_seconds)

    async def _look_up(self, host: str) -> list[Address]:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, self._lookup, host)
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN:
                raise
            await asyncio.sleep(REPEAT_SECONDS)
            found = await loop.run_in_executor(self._threads, self._lookup, host)
        if not found:
            raise OSError("no addresses")
        return found
