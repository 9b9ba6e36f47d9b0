import asyncio
import contextlib
import dataclasses
import ipaddress
import random
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web
from fetching import fetch_all
from yarl import URL

from data_prep.pairs.addresses import (
    Address,
    CheckedResolver,
    FetchError,
    Lookup,
    LookupCache,
    LookupResult,
    may_connect,
    parse_url,
)
from data_prep.pairs.fetch import FetchConfig, Fetched, Fetcher

CONFIG = FetchConfig(deadline_seconds=2.0, backoff_seconds=0.01)
CONNECTIONS: list[Any] = []
WATCHING = threading.Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and WATCHING.is_set() and arguments[0].family != socket.AF_UNIX:
        CONNECTIONS.append(arguments[1])


sys.addaudithook(_watch)  # the interpreter itself tells of every connection; a hook cannot be taken off again


@pytest.fixture
def connections() -> Iterator[list[Any]]:
    """Every address that a socket of this process is connected to during the test."""
    CONNECTIONS.clear()
    WATCHING.set()
    yield CONNECTIONS
    WATCHING.clear()


def fetch(url: str, lookup: Lookup | None = None) -> Fetched:
    fetcher = Fetcher(CONFIG, lookup) if lookup else Fetcher(CONFIG)
    return asyncio.run(fetch_all(fetcher, [url]))[0]


def family(address: str) -> Address:
    return (socket.AF_INET6 if ":" in address else socket.AF_INET, address)


@contextlib.asynccontextmanager
async def redirecting() -> AsyncIterator[str]:
    """Base URL of a server on 127.0.0.2 that redirects to what its query says."""

    async def redirect(request: web.Request) -> web.StreamResponse:
        if "to" not in request.query:
            return web.Response(status=404)
        return web.Response(status=302, headers={"Location": request.query["to"]})

    application = web.Application()
    application.router.add_get("/{path:.*}", redirect)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.2", 0).start()
    try:
        yield f"http://127.0.0.2:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_a_url_is_read_and_its_address_judged() -> None:
    assert str(parse_url("http://Example.com/cat.jpg")) == "http://example.com/cat.jpg"
    assert may_connect("8.8.8.8")
    assert not may_connect("10.0.0.1")


BAD = [
    "", "   ", "not a url", "file:///etc/passwd", "ftp://example.com/a.jpg", "gopher://127.0.0.1/",
    "javascript:alert(1)", "data:image/png;base64,AAAA",
    "http://", "http:///a.jpg", "//example.com/a.jpg", "http:example.com/a.jpg",
    "http:/example.com/a.jpg", "http://[::1/a.jpg", "http://[::1]x/a.jpg", "http://example.com:99999/a.jpg",
    "http://127.0.0.1:80:80/", "http://exa mple.com/a.jpg", "http://exa\tmple.com/", "http://exa\nmple.com/",
    "http://a\\@b/a.jpg", "http://b\\a.jpg", "http:\\\\127.0.0.1/", "example.com/a.jpg", "http://user@example.com/",
    "http://user:word@example.com/", "http://:word@example.com/", "http://example.com;@10.0.0.1/",
    "http://example.com%2f@10.0.0.1/", "http://[fe80::1%25eth0]/", "http://[::1%lo]/", "http://127%2e0.0.1/",
    "http://%31%32%37.0.0.1/", "http://localhost%20/", "http://127.0.0.1%0d%0a/", "http://exam\x00ple.com/",
    "http://127.0.0.1../", "http://a..b/", "http://.a/", "http://./", "http://1.2.3.4.5/", "http://256.0.0.1/",
    "http://4294967296/", "http://08.0.0.1/", "http://example.0x1/", "http://127.0.0.1\u200b/", "http://a\u00adb.com/",
    "http://" + "a" * 64 + ".com/", "http://" + "a." * 130 + "com/", "http://example.com/" + "a" * 9000,
]  # fmt: skip
FORBIDDEN = [
    "127.0.0.1", "127.1.2.3", "localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "2130706433", "0x7f000001",
    "0X7F.1", "0177.0.0.1", "017700000001", "127.1", "0.0.0.0", "0", "0.1.2.3", "10.0.0.1", "10.255.255.255",
    "0xa.0.0.1", "012.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "3232235521", "169.254.169.254",
    "0xa9fea9fe", "2852039166", "169.254.43518", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "168.63.129.16", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]", "[::FFFF:a9fe:a9fe]", "[::ffff:0:127.0.0.1]", "[::127.0.0.1]", "[fe80::1]", "[fc00::1]",
    "[fd12:3456::1]", "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "[ff0e::1]", "[2001:db8::1]", "[3fff::1]",
    "[100::1]", "[5f00::1]", "[64:ff9b::7f00:1]", "[64:ff9b::10.0.0.1]", "[64:ff9b::169.254.169.254]",
    "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2002:a00:1::1]", "[2002:a9fe:a9fe::1]", "[2001::1]",
    "[2001:0:4136:e378:8000:63bf:3fff:fdd2]", "127。0。0。1", "①27.0.0.1", "１２７.0.0.1", "ℓocalhost", "⑩.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD)
def test_only_well_formed_http_urls_are_requested(url: str, connections: list[Any]) -> None:
    found = fetch(url)
    assert (found.reason, found.http_status, found.attempts) == ("bad_url", None, 0)
    assert connections == []


@pytest.mark.parametrize("host", FORBIDDEN)
def test_addresses_outside_the_public_internet_are_never_connected_to(host: str, connections: list[Any]) -> None:
    found = fetch(f"http://{host}:9/a.jpg")
    assert (found.reason, found.http_status, found.attempts) == ("forbidden_address", None, 0)
    assert connections == []


@pytest.mark.parametrize("host", [host.strip("[]") for host in FORBIDDEN if host.startswith("[")] + ["10.0.0.1"])
def test_names_that_resolve_to_such_addresses_are_never_connected_to(host: str, connections: list[Any]) -> None:
    found = fetch("http://harmless.example/a.jpg", lambda _: [family(host)])
    assert (found.reason, found.detail) == ("forbidden_address", f"harmless.example is {host}")
    assert connections == []


@pytest.mark.parametrize("order", [("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8"), ("2606:4700::1", "::1")])
def test_one_forbidden_address_among_a_names_addresses_forbids_the_name(
    order: tuple[str, str], connections: list[Any]
) -> None:
    found = fetch("http://mixed.example/a.jpg", lambda _: [family(address) for address in order])
    assert found.reason == "forbidden_address"
    assert connections == []


def test_no_redirect_leads_to_a_forbidden_connection(connections: list[Any]) -> None:
    forbidden = [f"http://{host}:9/x" for host in FORBIDDEN] + ["//10.0.0.1/x", "//[::1]/x", "https://127.0.0.1/x"]
    bad = [url for url in BAD if "://" in url and url.isprintable() and len(url) < 2000]
    config = dataclasses.replace(CONFIG, deadline_seconds=10.0, allow_networks=("127.0.0.2/32",))

    async def run() -> list[Fetched]:
        async with redirecting() as base_url:
            starts = [str(parse_url(base_url).with_query(to=target)) for target in forbidden + bad]
            return await fetch_all(Fetcher(config), starts)

    found = asyncio.run(run())
    assert [row.reason for row in found[: len(forbidden)]] == ["forbidden_address"] * len(forbidden)
    assert {row.reason for row in found[len(forbidden) :]} <= {"bad_url", "too_many_redirects", "http_status"}
    assert {row.attempts for row in found} == {1}
    assert {address for address, *_ in connections} == {"127.0.0.2"}


def test_the_connection_goes_to_the_address_that_was_checked(connections: list[Any]) -> None:
    answers = iter(["127.0.0.2", "10.0.0.1", "127.0.0.1"])
    config = dataclasses.replace(CONFIG, allow_networks=("127.0.0.2/32",))

    async def run() -> list[Fetched]:
        async with redirecting() as base_url:
            port = base_url.rpartition(":")[2]
            starts = [f"http://rebinding.example:{port}/?to={number}" for number in range(4)]
            return await fetch_all(Fetcher(config, lambda _: [family(next(answers))]), starts)

    assert [row.reason for row in asyncio.run(run())] == ["http_status"] * 4  # the second hop has no `to`: 404
    assert {address for address, *_ in connections} == {"127.0.0.2"}
    assert next(answers) == "10.0.0.1"


def test_a_name_that_moves_to_a_forbidden_address_is_left_although_a_connection_is_open() -> None:
    answers = iter(["127.0.0.2", "10.0.0.1"])
    config = dataclasses.replace(CONFIG, allow_networks=("127.0.0.2/32",), dns_cache_seconds=0.0, respect_robots=False)

    async def run() -> list[Fetched]:
        async with redirecting() as base_url:
            port = base_url.rpartition(":")[2]
            fetcher = Fetcher(config, lambda _: [family(next(answers, "10.0.0.1"))])
            return await fetch_all(fetcher, [f"http://rebinding.example:{port}/?to=x"])

    assert asyncio.run(run())[0].reason == "forbidden_address"


def test_a_socket_is_opened_to_a_public_address_only() -> None:
    resolver = CheckedResolver()
    for address in ("10.0.0.1", "::1", "169.254.169.254"):
        with pytest.raises(FetchError) as raised:
            resolver.open_socket((family(address)[0], socket.SOCK_STREAM, 6, "", (address, 80)))
        assert raised.value.reason == "forbidden_address"
    with resolver.open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))) as opened:
        assert opened.family == socket.AF_INET


def test_only_the_networks_that_are_allowed_are_added() -> None:
    loopback = (ipaddress.ip_network("127.0.0.1/32"),)
    assert may_connect("127.0.0.1", loopback)
    assert may_connect("::ffff:127.0.0.1", loopback)
    assert not may_connect("127.0.0.2", loopback)
    assert not may_connect("10.0.0.1", loopback)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "2606:4700::1111",
     "2a00:1450::1", "64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::1"],
)  # fmt: skip
def test_the_public_internet_may_be_connected_to(address: str) -> None:
    assert may_connect(address)


def test_redirect_references_are_relative_to_the_page() -> None:
    base = parse_url("http://example.com/a/b.jpg?x=1")
    assert str(parse_url("c.jpg", base)) == "http://example.com/a/c.jpg"
    assert str(parse_url("//other.example/c.jpg", base)) == "http://other.example/c.jpg"
    assert str(parse_url("?y=2", base)) == "http://example.com/a/b.jpg?y=2"
    with pytest.raises(FetchError, match="expected http or https"):
        parse_url("file:///etc/passwd", base)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("http://EXAMPLE.com./a", "example.com"), ("http://faß.de/", "xn--fa-hia.de"), ("http://a_b.de/", "a_b.de"),
        ("http://bücher.example/", "xn--bcher-kva.example"), ("http://8.8.2056/", "8.8.8.8"),
        ("http://0x08080808/", "8.8.8.8"), ("http://8.8.8.8./", "8.8.8.8"), ("http://3com.com/", "3com.com"),
        ("http://Example.com.:8080/", "example.com"), ("http://[2606:4700:0::1]/", "2606:4700::1"),
        ("http://example.com?@10.0.0.1/", "example.com"),
        ("http://example.com#@10.0.0.1/", "example.com"), ("http://0x.example/", "0x.example"),
    ],
)  # fmt: skip
def test_one_host_has_one_spelling(text: str, host: str) -> None:
    assert parse_url(text).raw_host == host


def test_a_name_is_looked_up_once_for_all_that_ask_and_again_when_the_answer_is_old() -> None:
    lookups: Counter[str] = Counter()

    def count(host: str) -> list[Address]:
        lookups[host] += 1
        time.sleep(0.02)
        return [family("8.8.8.8")]

    async def run() -> None:
        resolver = CheckedResolver(cache_seconds=0.2, lookup=count)
        await asyncio.gather(*(resolver.resolve(f"host{i % 10}.example") for i in range(1000)))
        await resolver.resolve("host0.example")
        assert set(lookups.values()) == {1}
        assert len(lookups) == 10
        await asyncio.sleep(0.25)
        await resolver.resolve("host0.example")
        assert lookups["host0.example"] == 2

    asyncio.run(run())


def test_a_dead_name_is_not_looked_up_for_each_of_its_urls() -> None:
    lookups: list[str] = []

    def dead(host: str) -> list[Address]:
        lookups.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    found = asyncio.run(fetch_all(Fetcher(CONFIG, dead), [f"http://dead.example/{i}.jpg" for i in range(10_000)]))
    assert {row.reason for row in found} == {"dns"}
    assert lookups == ["dead.example"]


def test_as_many_lookups_run_at_a_time_as_there_are_threads() -> None:
    all_here = threading.Barrier(32, timeout=10.0)

    def meet(host: str) -> list[Address]:
        all_here.wait()
        return [family("8.8.8.8")]

    async def run() -> None:
        resolver = CheckedResolver(threads=32, lookup=meet)
        await asyncio.gather(*(resolver.resolve(f"host{i}.example") for i in range(64)))

    asyncio.run(run())


def test_nearly_all_hosts_recover_from_a_resolver_that_fails_three_times_in_ten() -> None:
    chance, lookups = random.Random(0), Counter[str]()
    lock = threading.Lock()

    def flaky(host: str) -> list[Address]:
        with lock:
            lookups[host] += 1
            if chance.random() < 0.3:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [family("127.0.0.2")]

    async def run() -> list[Fetched]:
        config = dataclasses.replace(
            CONFIG, allow_networks=("127.0.0.2/32",), deadline_seconds=20.0, respect_robots=False, max_redirects=0
        )
        async with redirecting() as base_url:
            port = base_url.rpartition(":")[2]
            urls = [f"http://host{i}.example:{port}/?to=/" for i in range(2000)]
            return await fetch_all(Fetcher(config, flaky), urls)

    found = asyncio.run(run())
    recovered = sum(row.reason == "too_many_redirects" for row in found)  # the server was reached
    assert recovered >= 0.99 * 2000
    assert {row.reason for row in found} <= {"too_many_redirects", "dns"}
    assert max(row.attempts for row in found) <= 3
    assert max(lookups.values()) <= 6


def test_a_lookup_that_fails_for_the_moment_is_not_held_against_the_name() -> None:
    answers = iter([socket.EAI_AGAIN, socket.EAI_AGAIN, 0])

    def flaky(host: str) -> list[Address]:
        code = next(answers)
        if code:
            raise socket.gaierror(code, "Temporary failure in name resolution")
        return [family("8.8.8.8")]

    async def run() -> None:
        resolver = CheckedResolver(retry_seconds=0.05, lookup=flaky)
        with pytest.raises(FetchError) as raised:
            await resolver.resolve("a.example")
        assert raised.value.transient
        await asyncio.sleep(0.06)
        assert (await resolver.resolve("a.example"))[0]["host"] == "8.8.8.8"

    asyncio.run(run())


def test_a_name_no_resolver_takes_is_a_dns_failure() -> None:
    found = fetch("http://no-such-host.invalid/a.jpg")
    assert (found.content, found.reason) == (None, "dns")
    assert fetch("http://nothing.example/a.jpg", lambda _: []).detail == "nothing.example: no addresses"


def test_shared_answers_stay_within_their_capacity() -> None:
    asked: Counter[str] = Counter()

    async def ask(key: str) -> LookupResult[str]:
        asked[key] += 1
        return LookupResult(value=key.upper(), seconds=60.0, weight=len(key))

    async def run() -> None:
        shared = LookupCache(ask, capacity=6)
        for key in ("a", "b", "c", "a", "four", "a", "b"):  # `four` drives out b, the one used longest ago
            assert await shared.get(key) == key.upper()
        await shared.get("too long to be kept")
        assert asked == {"a": 1, "b": 2, "c": 1, "four": 1, "too long to be kept": 1}

    asyncio.run(run())


def test_answers_keep_nothing_of_those_they_were_raised_for() -> None:
    class Body:
        """Something large."""

    async def ask(key: str) -> LookupResult[str]:
        return LookupResult(value=FetchError("dns", "no such name"), seconds=60.0)

    async def run() -> None:
        shared = LookupCache(ask, capacity=10)
        bodies = []
        for _ in range(3):
            body = Body()
            bodies.append(weakref.ref(body))
            with contextlib.suppress(FetchError):
                await shared.get("a")
            del body
        assert [body() for body in bodies] == [None] * 3

    asyncio.run(run())


def test_the_one_who_asked_may_leave_without_the_answer() -> None:
    async def ask(key: str) -> LookupResult[str]:
        await asyncio.sleep(0.05)
        return LookupResult(value=key, seconds=60.0)

    async def run() -> None:
        shared = LookupCache(ask, capacity=10)
        first, second = asyncio.create_task(shared.get("a")), asyncio.create_task(shared.get("a"))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == "a"

    asyncio.run(run())


def test_a_redirect_that_no_parser_reads_is_a_bad_address() -> None:
    with pytest.raises(FetchError, match="Invalid IPv6 URL") as caught:
        parse_url("ht\ttp://[x", URL("http://example.org/a"))
    assert caught.value.reason == "bad_url"
