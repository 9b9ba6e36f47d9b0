import asyncio
import dataclasses
import ipaddress
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pyarrow as pa
import pytest
from aiohttp import web

from data_prep import website
from data_prep.fetch import (
    FetchConfig,
    Fetched,
    Fetcher,
    FetchError,
    ReadStage,
    fetch_all,
    may_connect,
    opt_out,
    parse_url,
)

LOCAL = FetchConfig(
    deadline_seconds=2.0, backoff_seconds=0.01, max_bytes=100_000, per_host=64, allow_networks=("127.0.0.1/32",)
)


def one(url: str | None, config: FetchConfig = LOCAL) -> Fetched:
    return fetch_all([url], config)[0]


def fetch_from(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], paths: list[str], config: FetchConfig
) -> list[Fetched]:
    """Fetch paths of a throw-away server on this process's event loop."""

    async def run() -> list[Fetched]:
        application = web.Application()
        application.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await Fetcher(config).fetch([f"http://127.0.0.1:{port}{path}" for path in paths])
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_an_image_comes_back_as_its_bytes(small_site: Path, served_site: str) -> None:
    found = one(f"{served_site}/images/1.jpg")
    assert found.content == website.image_path(small_site, 1).read_bytes()
    assert (found.reason, found.http_status, found.attempts) == (None, 200, 1)


def test_no_urls_give_no_results() -> None:
    assert fetch_all([], LOCAL) == []


@pytest.mark.parametrize(
    ("path", "reason", "status", "attempts"),
    [
        ("/missing/1.jpg", "http_status", 404, 1),
        ("/gone/1.jpg", "http_status", 410, 1),
        ("/server_error/1.jpg", "http_status", 500, 3),
        ("/disconnects/1.jpg", "connect", None, 3),
        ("/redirect_loop/1.jpg", "too_many_redirects", 302, 1),
        ("/redirect_private/1.jpg", "forbidden_address", 302, 1),
        ("/redirect_metadata/1.jpg", "forbidden_address", 302, 1),
        ("/redirect_file/1.jpg", "bad_url", 302, 1),
        ("/too_large/1.jpg", "too_large", 200, 1),
        ("/opt_out/1.jpg", "opt_out", 200, 1),
    ],
)
def test_faults_end_as_their_reason(served_site: str, path: str, reason: str, status: int, attempts: int) -> None:
    found = one(served_site + path)
    assert found.content is None
    assert (found.reason, found.http_status, found.attempts) == (reason, status, attempts)
    assert found.detail


def test_a_server_error_that_passes_is_retried(served_site: str) -> None:
    found = one(f"{served_site}/flaky/77.jpg")
    assert (found.reason, found.http_status, found.attempts) == (None, 200, 2)


def test_redirects_are_followed_to_the_image(small_site: Path, served_site: str) -> None:
    assert one(f"{served_site}/redirects/2.jpg").content == website.image_path(small_site, 2).read_bytes()


def test_a_hanging_server_costs_one_deadline_and_holds_up_nobody(served_site: str) -> None:
    config = dataclasses.replace(LOCAL, deadline_seconds=0.5)
    started = time.monotonic()
    found = fetch_all([f"{served_site}/hangs/{i}.jpg" for i in range(5)] + [f"{served_site}/images/1.jpg"], config)
    assert time.monotonic() - started < 2.0
    assert [row.reason for row in found] == ["timeout"] * 5 + [None]


def test_a_dripping_server_ends_at_the_deadline() -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x")
            await asyncio.sleep(0.1)
        return response

    started = time.monotonic()
    found = fetch_from(drip, ["/a"], dataclasses.replace(LOCAL, deadline_seconds=0.5))
    assert found[0].reason == "timeout"
    assert time.monotonic() - started < 2.0


def test_an_announced_size_over_the_cap_is_not_read() -> None:
    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(200_000))

    found = fetch_from(large, ["/a"], LOCAL)
    assert found[0].reason == "too_large"
    assert "200000 bytes announced" in str(found[0].detail)


def test_the_cap_counts_bytes_after_content_decoding() -> None:
    async def bomb(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=bytes(5_000_000))
        response.enable_compression(web.ContentCoding.gzip)
        return response

    assert fetch_from(bomb, ["/a"], LOCAL)[0].reason == "too_large"


def test_no_more_than_per_host_requests_run_at_a_time() -> None:
    running = most = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return web.Response(body=b"x")

    found = fetch_from(count, [f"/{i}" for i in range(20)], dataclasses.replace(LOCAL, per_host=3))
    assert [row.content for row in found] == [b"x"] * 20
    assert most == 3


def test_the_user_agent_says_who_we_are_and_the_wait_for_a_slot_does_not_count() -> None:
    agents = set()

    async def slow(request: web.Request) -> web.StreamResponse:
        agents.add(request.headers["User-Agent"])
        await asyncio.sleep(0.2)
        return web.Response(body=b"x")

    config = dataclasses.replace(LOCAL, per_host=1, deadline_seconds=0.6)
    found = fetch_from(slow, [f"/{i}" for i in range(5)], config)  # the last one waits for 0.8 s
    assert [row.reason for row in found] == [None] * 5
    assert agents == {"ovd-ray/0.1 (image-text dataset crawler; honours X-Robots-Tag)"}


def test_too_many_requests_wait_as_long_as_asked() -> None:
    times = []

    async def busy(request: web.Request) -> web.StreamResponse:
        times.append(time.monotonic())
        if len(times) == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return web.Response(body=b"x")

    found = fetch_from(busy, ["/a"], dataclasses.replace(LOCAL, deadline_seconds=5.0))
    assert found[0].content == b"x"
    assert times[1] - times[0] >= 1.0


@pytest.mark.parametrize(
    "url",
    [
        None, "", "   ", "not a url", "file:///etc/passwd", "ftp://example.com/a.jpg", "javascript:alert(1)",
        "data:image/png;base64,AAAA", "http://", "http:///a.jpg", "//example.com/a.jpg", "http://[::1/a.jpg",
        "http://example.com:99999/a.jpg", "http://exa mple.com/a.jpg", "http://a\\@b/a.jpg", "example.com/a.jpg",
    ],
)  # fmt: skip
def test_only_well_formed_http_urls_are_requested(url: str | None) -> None:
    found = one(url)
    assert (found.reason, found.http_status, found.attempts) == ("bad_url", None, 0)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1.2.3", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0.0.0.0", "0",
        "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fc00::1]",
        "[fd12:3456::1]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[64:ff9b::7f00:1]", "[64:ff9b::a00:1]",
        "[2002:7f00:1::]", "[2002:a00:1::1]", "[2001::1]", "[::127.0.0.1]", "127。0。0。1", "①27.0.0.1",
        "user@127.0.0.1", "example.com@10.0.0.1", "127.0.0.1.", "LOCALHOST", "localhost.",
    ],
)  # fmt: skip
def test_addresses_outside_the_public_internet_are_never_connected_to(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = []
    real = aiohttp.TCPConnector._wrap_create_connection

    async def watched(self, *args, **kwargs):
        connections.append(kwargs["addr_infos"])
        return await real(self, *args, **kwargs)

    monkeypatch.setattr(aiohttp.TCPConnector, "_wrap_create_connection", watched)
    found = one(f"http://{host}:9/a.jpg", FetchConfig(deadline_seconds=2.0, backoff_seconds=0.01))
    assert found.content is None
    assert found.reason in ("forbidden_address", "dns", "bad_url")
    assert connections == []
    if "。" not in host and "①" not in host and not host.endswith("."):
        assert found.reason == "forbidden_address"


def test_only_the_networks_that_are_allowed_are_added() -> None:
    loopback = (ipaddress.ip_network("127.0.0.1/32"),)
    assert may_connect("127.0.0.1", loopback)
    assert may_connect("::ffff:127.0.0.1", loopback)
    assert not may_connect("127.0.0.2", loopback)
    assert not may_connect("10.0.0.1", loopback)
    assert may_connect("8.8.8.8")
    assert may_connect("2606:4700::1111")
    assert may_connect("64:ff9b::808:808")


def test_one_forbidden_address_among_a_names_addresses_forbids_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(host: str) -> list[tuple[int, str]]:
        return [(2, "8.8.8.8"), (2, "10.0.0.1")]

    monkeypatch.setattr("data_prep.fetch._look_up", two)
    found = one("http://rebinding.example/a.jpg")
    assert (found.reason, found.detail) == ("forbidden_address", "rebinding.example is 10.0.0.1")


def test_the_connection_goes_to_the_address_that_was_checked(served_site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = []

    async def rebind(host: str) -> list[tuple[int, str]]:
        lookups.append(host)
        return [(2, "127.0.0.1")] if len(lookups) == 1 else [(2, "10.0.0.1")]

    monkeypatch.setattr("data_prep.fetch._look_up", rebind)
    port = served_site.rpartition(":")[2]
    found = fetch_all([f"http://pictograms.example:{port}/images/{i}.jpg" for i in range(4)], LOCAL)
    assert [row.reason for row in found] == [None] * 4
    assert lookups == ["pictograms.example"]


def test_a_name_that_does_not_resolve_is_a_dns_failure() -> None:
    found = one("http://no-such-host.invalid/a.jpg")
    assert (found.content, found.reason) == (None, "dns")


def test_a_port_nobody_listens_on_is_a_connect_failure() -> None:
    found = one("http://127.0.0.1:1/a.jpg")
    assert (found.reason, found.attempts) == ("connect", 3)


def test_plain_http_behind_https_is_a_tls_failure(served_site: str) -> None:
    found = one(served_site.replace("http://", "https://") + "/images/1.jpg")
    assert (found.reason, found.attempts) == ("tls", 1)


@pytest.mark.parametrize(
    ("header", "opted_out"),
    [
        ("noai", True), ("noimageai", True), ("NoIndex, nofollow", True), ("noml", True), ("none", True),
        ("all", False), ("nofollow", False), ("googlebot: noindex", False), ("ovd-ray: noai", True),
        ("otherbot: noindex, nofollow", False), ("unavailable_after: 25 Jun 2030 15:00:00 PST", False),
        ("max-image-preview: large, noai", True), ("*: noai", True), ("", False),
    ],
)  # fmt: skip
def test_opt_out_headers(header: str, opted_out: bool) -> None:
    assert (opt_out([header], "ovd-ray/0.1 (crawler)") is not None) == opted_out


def test_opt_out_can_be_switched_off_on_purpose(served_site: str) -> None:
    assert one(f"{served_site}/opt_out/3.jpg", dataclasses.replace(LOCAL, respect_opt_out=False)).content


def test_redirect_references_are_relative_to_the_page() -> None:
    base = parse_url("http://example.com/a/b.jpg?x=1")
    assert str(parse_url("c.jpg", base)) == "http://example.com/a/c.jpg"
    assert str(parse_url("//other.example/c.jpg", base)) == "http://other.example/c.jpg"
    assert str(parse_url("?y=2", base)) == "http://example.com/a/b.jpg?y=2"
    with pytest.raises(FetchError, match="expected http or https"):
        parse_url("file:///etc/passwd", base)


def test_local_files_are_rows_with_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    rows = ReadStage(LOCAL)(pa.table({"url": [str(tmp_path / "a.jpg")]}))
    assert rows["content"].to_pylist() == [b"abc"]
    assert rows["reason"].to_pylist() == [None]
