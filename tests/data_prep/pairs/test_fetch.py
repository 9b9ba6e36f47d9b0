import asyncio
import contextlib
import datetime
import email.utils
import gzip
import itertools
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import trustme
from aiohttp import web
from aiohttp.abc import ResolveResult
from fetching import fetch_all
from yarl import URL

from data_prep.pairs import hosts, responses
from data_prep.pairs.addresses import FetchError
from data_prep.pairs.fetch import FetchConfig, Fetched, Fetcher, with_fetch_status
from data_prep.pictograms import website

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOCAL = FetchConfig(
    deadline_seconds=2.0, backoff_seconds=0.01, max_bytes=100_000, per_host=64, allow_networks=("127.0.0.1/32",)
)


def one(url: str | None, config: FetchConfig = LOCAL) -> Fetched:
    return several([url], config)[0]


def several(urls: list[str | None], config: FetchConfig = LOCAL) -> list[Fetched]:
    return asyncio.run(fetch_all(Fetcher(config), urls))


@contextlib.asynccontextmanager
async def serving(handler: Handler, *, robots_txt: Handler | None = None, tls: ssl.SSLContext | None = None) -> Any:
    """Port of a throw-away server on this process's event loop, without a robots.txt unless told."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/robots.txt":
            return await handler(request)
        return await robots_txt(request) if robots_txt else web.Response(status=404)

    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def fetch_from(
    handler: Handler, paths: list[str], config: FetchConfig = LOCAL, robots_txt: Handler | None = None
) -> list[Fetched]:
    """Fetch paths of such a server."""

    async def run() -> list[Fetched]:
        async with serving(handler, robots_txt=robots_txt) as port:
            return await fetch_all(Fetcher(config), [f"http://127.0.0.1:{port}{path}" for path in paths])

    return asyncio.run(run())


async def fine(request: web.Request) -> web.StreamResponse:
    """An image, as it were."""
    return web.Response(body=b"x")


def test_an_image_comes_back_as_its_bytes(small_site: Path, served_site: str) -> None:
    found = one(f"{served_site}/images/1.jpg")
    assert found.content == website.image_path(small_site, 1).read_bytes()
    assert (found.reason, found.http_status, found.attempts) == (None, 200, 1)


def test_no_urls_give_no_results() -> None:
    assert several([]) == []


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


def test_a_hanging_server_costs_one_deadline_and_delays_no_other_url(served_site: str) -> None:
    fetcher = Fetcher(replace(LOCAL, deadline_seconds=0.5, host_failures=8))
    finished: list[Fetched] = []

    async def note(url: str) -> None:
        finished.append(await fetcher.fetch(url))

    async def run() -> None:
        async with fetcher.open():
            hanging = [f"{served_site}/hangs/{i}.jpg" for i in range(5)]
            await asyncio.gather(*(note(url) for url in [*hanging, f"{served_site}/images/1.jpg"]))

    asyncio.run(run())
    assert [row.reason for row in finished] == [None] + ["timeout"] * 5
    assert {row.attempts for row in finished} == {1}


def test_an_announced_size_over_the_cap_is_not_read() -> None:
    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(200_000))

    found = fetch_from(large, ["/a"], LOCAL)
    assert found[0].reason == "too_large"
    assert "200000 bytes announced" in str(found[0].detail)


def test_the_user_agent_says_who_we_are_and_the_wait_for_a_slot_does_not_count() -> None:
    agents = set()

    async def slow(request: web.Request) -> web.StreamResponse:
        agents.add(request.headers["User-Agent"])
        await asyncio.sleep(0.3)
        return web.Response(body=b"x")

    config = replace(LOCAL, per_host=1, deadline_seconds=1.2)
    found = fetch_from(slow, [f"/{i}" for i in range(5)], config)  # the last one waits for 1.2 s
    assert [row.reason for row in found] == [None] * 5
    assert agents == {"ovd-ray/0.1 (image-text dataset crawler; honours robots.txt and X-Robots-Tag)"}


def test_a_port_nobody_listens_on_is_a_connect_failure() -> None:
    found = one("http://127.0.0.1:1/a.jpg")
    assert (found.reason, found.attempts) == ("connect", 3)


def test_plain_http_behind_https_is_a_tls_failure(served_site: str) -> None:
    found = one(served_site.replace("http://", "https://") + "/images/1.jpg")
    assert (found.reason, found.attempts) == ("tls", 1)


def test_opt_out_can_be_switched_off_on_purpose(served_site: str) -> None:
    assert one(f"{served_site}/opt_out/3.jpg", replace(LOCAL, respect_opt_out=False)).content


def test_rows_gain_the_columns_of_their_fetch(served_site: str) -> None:
    rows = pa.table({"url": [f"{served_site}/images/1.jpg", f"{served_site}/missing/1.jpg"], "caption": ["a", "b"]})
    found = with_fetch_status(rows, several(rows["url"].to_pylist())).drop_columns(["url", "detail"])
    assert found.to_pylist() == [
        {"caption": "a", "stage": None, "reason": None, "http_status": 200, "attempts": 1},
        {"caption": "b", "stage": "fetch", "reason": "http_status", "http_status": 404, "attempts": 1},
    ]


def test_what_a_server_says_fits_into_a_table_whatever_its_bytes() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_robots = b"GET /robots.txt" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 no\r\n" if is_robots else b"HTTP/1.1 200 \xff\r\nX-Robots-Tag: noai, \xff\xfe\r\n")
        writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async def run() -> pa.Table:
        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            url = f"http://127.0.0.1:{port}/a"
            return with_fetch_status(pa.table({"url": [url]}), await fetch_all(Fetcher(LOCAL), [url]))
        finally:
            server.close()

    rows = asyncio.run(run())
    assert rows["reason"].to_pylist() == ["opt_out"]
    assert rows["detail"].to_pylist()[0].startswith("X-Robots-Tag: noai")


def test_nothing_is_requested_while_the_gate_is_closed(served_site: str) -> None:
    async def run() -> list[str]:
        fetcher, events = Fetcher(LOCAL), []

        async def note(number: int) -> None:
            assert (await fetcher.fetch(f"{served_site}/images/{number}.jpg")).content
            events.append("fetched")

        fetcher.gate.clear()
        async with fetcher.open():
            fetching = asyncio.gather(*(note(number) for number in range(3)))
            await asyncio.sleep(0.2)
            events.append("opened")
            fetcher.gate.set()
            await fetching
        return events

    assert asyncio.run(run()) == ["opened", "fetched", "fetched", "fetched"]


# Deadline and rate


def dripping(seconds: float, count: int = 1000, sent: list[bytes] | None = None) -> Handler:
    """A body of one byte every so often; `sent` collects the bytes."""
    sent = [] if sent is None else sent

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(count):
                await response.write(b"x")
                sent.append(b"x")
                await asyncio.sleep(seconds)
        return response

    return drip


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_dripping_server_ends_at_the_deadline(everywhere: bool) -> None:
    config = replace(LOCAL, deadline_seconds=2.0, min_bytes_per_second=0)
    sent: list[bytes] = []
    found = fetch_from(dripping(0.1, sent=sent), ["/a"], config, dripping(0.1, sent=sent) if everywhere else None)
    assert (found[0].reason, found[0].attempts) == ("timeout", 1)
    assert len(sent) * 0.1 <= 1.2 * config.deadline_seconds + 0.1  # the last is for the server to end


def test_a_head_that_drips_ends_at_the_deadline_of_the_lenient_parser() -> None:
    def drip(listener: socket.socket) -> None:
        opened = listener.accept()[0]
        with opened, contextlib.suppress(OSError):
            opened.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(100):
                opened.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=drip, args=(listener,))
        server.start()
        host, port = listener.getsockname()
        address = ResolveResult(hostname=host, host=host, port=port, family=socket.AF_INET, proto=0, flags=0)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not whole after 0\.5 s"):
            responses.get_leniently(
                URL(f"http://{host}:{port}/"),
                [address],
                {},
                limit=1000,
                seconds=0.5,
                open_socket=lambda record: socket.socket(*record[:3]),
            )
        assert time.monotonic() - started < 2.5  # of the 5 s that the server takes
        server.join()


def test_a_body_slower_than_the_least_rate_ends_after_the_grace() -> None:
    config = replace(LOCAL, deadline_seconds=20.0, min_bytes_per_second=1000, grace_seconds=0.3)
    sent: list[bytes] = []
    found = fetch_from(dripping(0.05, sent=sent), ["/a"], config)
    assert found[0].reason == "timeout"
    assert "slower than 1000 a second" in str(found[0].detail)
    assert len(sent) <= 10  # 0.3 s of 20


def test_a_body_that_stops_is_given_the_time_its_first_part_has_earned() -> None:
    async def stop(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(bytes(1000))
        await asyncio.sleep(3600)
        return response

    config = replace(LOCAL, deadline_seconds=20.0, min_bytes_per_second=1000, grace_seconds=0.1)
    started = time.monotonic()
    found = fetch_from(stop, ["/a"], config)[0]
    assert (found.reason, found.detail) == ("timeout", "1000 bytes came slower than 1000 a second")
    assert time.monotonic() - started > 1.0


def test_a_body_that_is_fast_enough_may_outlast_the_grace() -> None:
    config = replace(LOCAL, min_bytes_per_second=10, grace_seconds=0.1)
    assert fetch_from(dripping(0.02, count=25), ["/a"], config)[0].content == b"x" * 25


# Size and encoding


def encoded(body: bytes, encoding: str) -> Handler:
    """A body sent as it is with a content encoding on the label."""

    async def send(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers={"Content-Encoding": encoding})

    return send


RAW_DEFLATE = zlib.compressobj(wbits=-15)
RAW_DEFLATED = RAW_DEFLATE.compress(b"image" * 100) + RAW_DEFLATE.flush()


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(b"image" * 100, mtime=0), "gzip"),
        (gzip.compress(b"image" * 100, mtime=0), "X-GZip"),
        (gzip.compress(b"image" * 100, mtime=0) + b"what some servers append", "gzip"),
        (zlib.compress(b"image" * 100), "deflate"),
        (RAW_DEFLATED, "deflate"),
        (b"image" * 100, "identity"),
        (b"image" * 100, "UTF-8"),
        (b"image" * 100, "none"),
    ],
)
def test_bodies_come_back_decoded(body: bytes, encoding: str) -> None:
    assert fetch_from(encoded(body, encoding), ["/a"])[0].content == b"image" * 100


@pytest.mark.parametrize(
    ("body", "encoding", "reason", "attempts"),
    [
        (b"brotli", "br", "http_status", 1),
        (b"zstandard", "zstd", "http_status", 1),
        (gzip.compress(gzip.compress(b"image", mtime=0), mtime=0), "gzip, gzip", "http_status", 1),
        (b"not gzip at all", "gzip", "http_status", 1),
        (gzip.compress(b"image" * 100, mtime=0)[:-9], "gzip", "connect", 3),
    ],
)
def test_bodies_that_cannot_be_decoded_say_so(body: bytes, encoding: str, reason: str, attempts: int) -> None:
    found = fetch_from(encoded(body, encoding), ["/a"])[0]
    assert (found.content, found.reason, found.attempts) == (None, reason, attempts)
    assert encoding.partition(",")[0] in str(found.detail)


def test_only_encodings_that_are_decoded_are_asked_for() -> None:
    asked = set()

    async def look(request: web.Request) -> web.StreamResponse:
        asked.add(request.headers["Accept-Encoding"])
        return web.Response(body=b"x")

    fetch_from(look, ["/a"])
    assert asked == {"gzip, deflate"}


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "raw deflate"])
def test_a_bomb_never_expands_beyond_the_cap(encoding: str) -> None:
    deflater = zlib.compressobj(9, wbits={"gzip": 31, "deflate": 15, "raw deflate": -15}[encoding])
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(200)) + deflater.flush()  # 200 MB in 200 kB
    tracemalloc.start()
    found = fetch_from(encoded(bomb, encoding.removeprefix("raw ")), ["/a"], replace(LOCAL, max_bytes=10**6))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found[0].reason, found[0].attempts) == ("too_large", 1)
    assert peak < 6e6


@pytest.mark.parametrize("block", [1 << 16, 1 << 30])  # aiohttp's, and the whole body of the lenient parser
def test_a_body_of_very_many_gzip_members_is_refused_at_once(block: int) -> None:
    content = gzip.compress(b"", mtime=0) * 100_000
    body, started = responses.Body("gzip", 20 << 20), time.process_time()
    with pytest.raises(FetchError, match="200, but of more than 1,000 gzip members") as raised:
        for start in range(0, len(content), block):
            body.feed(content[start : start + block])
    assert raised.value.reason == "http_status"
    assert time.process_time() - started < 1


def test_the_cap_counts_bytes_that_decode_to_nothing() -> None:
    async def nothing(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(gzip.compress(b"x", mtime=0))
            for _ in range(1000):
                await response.write(bytes(1 << 16))
        return response

    assert fetch_from(nothing, ["/a"])[0].reason == "too_large"


# Retries


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_busy_servers_are_left_alone_as_long_as_they_ask(status: int, as_date: bool) -> None:
    times = []

    async def busy(request: web.Request) -> web.StreamResponse:
        times.append(time.time())
        if len(times) > 1:
            return web.Response(body=b"x")
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
        header = email.utils.format_datetime(soon, usegmt=True) if as_date else "1"
        return web.Response(status=status, headers={"Retry-After": header})

    found = fetch_from(busy, ["/a"], replace(LOCAL, deadline_seconds=5.0))
    assert (found[0].content, found[0].attempts) == (b"x", 2)
    assert times[1] - times[0] >= 0.9  # a date has whole seconds


def test_a_host_that_asks_for_a_pause_is_left_alone_by_all_its_urls() -> None:
    times: list[tuple[float, str]] = []

    async def busy(request: web.Request) -> web.StreamResponse:
        times.append((time.monotonic(), request.path))
        if len(times) == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return web.Response(body=b"x")

    found = fetch_from(busy, ["/a", "/b", "/c"], replace(LOCAL, deadline_seconds=5.0, per_host=1))
    assert [result.content for result in found] == [b"x"] * 3
    assert [path for _, path in times].count("/a") == 2
    assert all(later - times[0][0] >= 0.9 for later, _ in times[1:])


def test_urls_of_a_host_that_asks_for_a_long_pause_are_not_asked_for() -> None:
    asked: list[str] = []

    async def busy(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(status=429, headers={"Retry-After": "3600"})

    found = fetch_from(busy, ["/a", "/b"], replace(LOCAL, per_host=1))
    assert asked == ["/a"]
    assert [(result.reason, result.attempts) for result in found] == [("http_status", 1), ("http_status", 0)]
    assert "asked for a pause of 36" in str(found[1].detail)


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    requests: list[str] = []

    async def busy(request: web.Request) -> web.StreamResponse:
        requests.append(request.path)
        return web.Response(status=429, headers={"Retry-After": "3600"})  # waiting would take an hour

    found = fetch_from(busy, ["/a"])
    assert (found[0].reason, found[0].http_status, found[0].attempts) == ("http_status", 429, 1)
    assert requests == ["/a"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 501])
def test_final_answers_are_asked_for_once(status: int) -> None:
    requests = Counter()

    async def refuse(request: web.Request) -> web.StreamResponse:
        requests[request.path] += 1
        return web.Response(status=status, headers={"Retry-After": "1"})

    found = fetch_from(refuse, ["/a"])
    assert (found[0].reason, found[0].http_status, found[0].attempts) == ("http_status", status, 1)
    assert requests == {"/a": 1}


def test_the_pauses_between_attempts_double() -> None:
    times = []

    async def fail(request: web.Request) -> web.StreamResponse:
        times.append(time.monotonic())
        return web.Response(status=500)

    fetch_from(fail, ["/a"], replace(LOCAL, max_attempts=4, backoff_seconds=0.1, deadline_seconds=10.0))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(pauses) == 3
    assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True))


# Hosts


def test_a_server_never_sees_more_requests_at_a_time_than_its_share() -> None:
    log: list[tuple[float, int]] = []

    async def count(request: web.Request) -> web.StreamResponse:
        log.append((time.monotonic(), 1))
        await asyncio.sleep(0.01)
        log.append((time.monotonic(), -1))
        return web.Response(body=b"x")

    paths = [f"/{i}" for i in range(60)]
    found = fetch_from(count, paths, replace(LOCAL, per_host=3), count)
    assert [row.content for row in found] == [b"x"] * 60
    running = list(itertools.accumulate(change for _, change in log))
    assert len(log) == 2 * (60 + 1)  # robots.txt too
    assert max(running) == 3


def test_a_process_keeps_to_its_number_of_requests() -> None:
    running = most = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return web.Response(body=b"x")

    async def run() -> list[Fetched]:
        config = replace(LOCAL, concurrency=5)
        async with serving(count, robots_txt=count) as port:
            urls = [f"http://host{i % 20}.example:{port}/{i}" for i in range(60)]
            return await fetch_all(Fetcher(config, lambda _: [(2, "127.0.0.1")]), urls)

    assert [row.content for row in asyncio.run(run())] == [b"x"] * 60
    assert most == 5


def test_a_host_that_hangs_is_given_up_and_the_others_are_not() -> None:
    requests: Counter[str] = Counter()

    async def hang(request: web.Request) -> web.StreamResponse:
        requests[request.host.partition(":")[0]] += 1
        if request.host.startswith("dead"):
            await asyncio.sleep(3600)
        return web.Response(body=b"x")

    async def run() -> list[Fetched]:
        config = replace(LOCAL, deadline_seconds=1.0, per_host=4, host_failures=8)
        async with serving(hang) as port:
            urls = [f"http://{host}.example:{port}/{i}" for i in range(500) for host in ("dead", "alive")]
            return await fetch_all(Fetcher(config, lambda _: [(2, "127.0.0.1")]), urls)

    found = asyncio.run(run())
    assert {row.reason for row in found[::2]} == {"timeout"}
    assert [row.content for row in found[1::2]] == [b"x"] * 500
    assert requests["alive.example"] == 500
    assert requests["dead.example"] == 8
    given_up = [row for row in found[::2] if "given up after" in str(row.detail)]
    assert len(given_up) == 500 - requests["dead.example"]
    assert {row.attempts for row in given_up} == {0}


def test_a_host_whose_robots_txt_hangs_is_given_up_too() -> None:
    requests: list[str] = []

    async def hang(request: web.Request) -> web.StreamResponse:
        requests.append(request.path)
        await asyncio.sleep(3600)
        raise AssertionError

    paths = [f"/{i}" for i in range(500)]
    found = fetch_from(fine, paths, replace(LOCAL, deadline_seconds=1.0, per_host=16), hang)
    assert len(requests) <= LOCAL.host_failures
    assert {row.reason for row in found} == {"timeout"}
    assert str(found[0].detail).startswith("robots.txt: no answer")


def test_silent_hosts_do_not_hold_all_requests_that_a_process_may_make_at_a_time() -> None:
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    requests: Counter[str] = Counter()

    async def hang(request: web.Request) -> web.StreamResponse:
        host = request.host.partition(":")[0]
        running[host] += 1
        requests[host] += 1
        most[host] = max(most[host], running[host])
        await asyncio.sleep(3600 if host.startswith("dead") else 0.05)
        running[host] -= 1
        return web.Response(body=b"x")

    finished: list[bool] = []

    async def run() -> list[Fetched]:
        config = replace(LOCAL, deadline_seconds=6.0, per_host=8, host_failures=2, concurrency=16)
        hosts = ["dead1", "dead2", "dead3", "alive"]
        async with serving(hang) as port:
            urls = [f"http://{host}.example:{port}/{i}" for host in hosts for i in range(100)]
            fetcher = Fetcher(config, lambda _: [(2, "127.0.0.1")])

            async def note(url: str) -> Fetched:
                fetched = await fetcher.fetch(url)
                finished.append(fetched.content is not None)
                return fetched

            async with fetcher.open():
                return list(await asyncio.gather(*(note(url) for url in urls)))

    found = asyncio.run(run())
    assert [row.content for row in found[300:]] == [b"x"] * 100
    assert finished[:100] == [True] * 100  # no URL waited for the dead hosts
    assert [requests[f"dead{i}.example"] for i in (1, 2, 3)] == [2, 2, 2]
    assert most["alive.example"] == 8  # all of its share, once it had answered


@pytest.mark.parametrize("host_failures", [1, 4])
def test_urls_that_wait_for_each_others_hosts_all_end(host_failures: int) -> None:
    asked: Counter[str] = Counter()

    async def mirrors(request: web.Request) -> web.Response:
        if not request.host.startswith("front"):
            return web.Response(status=503)
        asked[request.path] += 1
        mirror = "bc"[(int(request.path[1:]) + asked[request.path]) % 2]  # each attempt goes to the other one
        location = f"http://{mirror}.example:{request.url.port}{request.path}"
        return web.Response(status=302, headers={"Location": location})

    async def run() -> list[Fetched]:
        config = replace(LOCAL, host_failures=host_failures, respect_robots=False)
        async with serving(mirrors) as port:
            urls = [f"http://front.example:{port}/{i}" for i in range(20)]
            fetcher = Fetcher(config, lambda _: [(2, "127.0.0.1")])
            return await asyncio.wait_for(fetch_all(fetcher, urls), 30)

    assert {row.reason for row in asyncio.run(run())} == {"http_status"}


def test_urls_that_nobody_waits_for_any_more_leave_their_places() -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600 if request.path < "/2" else 0)
        return web.Response(body=b"x")

    async def run() -> list[Fetched]:
        async with serving(hang) as port:
            fetcher = Fetcher(replace(LOCAL, host_failures=4, respect_robots=False), lambda _: [(2, "127.0.0.1")])
            first = asyncio.create_task(fetch_all(fetcher, [f"http://a.example:{port}/1{i}" for i in range(9)]))
            await asyncio.sleep(0.5)
            first.cancel()
            return await asyncio.wait_for(fetch_all(fetcher, [f"http://a.example:{port}/2{i}" for i in range(9)]), 10)

    assert [row.content for row in asyncio.run(run())] == [b"x"] * 9


def test_an_answer_now_and_then_keeps_a_host() -> None:
    async def sometimes(request: web.Request) -> web.StreamResponse:
        if int(request.path[1:]) % 3:
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=404)

    config = replace(LOCAL, per_host=1, host_failures=3)
    found = fetch_from(sometimes, [f"/{i}" for i in range(30)], config)
    assert Counter(row.reason for row in found) == {"http_status": 10, "connect": 20}
    assert not any("given up" in str(row.detail) for row in found)


def test_a_host_that_was_given_up_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GIVEN_UP_SECONDS", 0.5)
    requests: list[str] = []
    is_up = asyncio.Event()

    async def recover(request: web.Request) -> web.StreamResponse:
        requests.append(request.path)
        await is_up.wait()
        return web.Response(body=b"x")

    async def run() -> None:
        config = replace(LOCAL, per_host=1, host_failures=2, deadline_seconds=0.5)
        async with serving(recover) as port:
            fetcher = Fetcher(config)
            urls = [f"http://127.0.0.1:{port}/{i}" for i in range(5)]
            for asked in (2, 2 + 1):
                assert [row.reason for row in await fetch_all(fetcher, urls)] == ["timeout"] * 5
                assert len(requests) == asked
                await asyncio.sleep(0.6)
            is_up.set()
            for _ in range(2):
                assert [row.content for row in await fetch_all(fetcher, urls)] == [b"x"] * 5

    asyncio.run(run())


def test_what_is_known_of_hosts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "REMEMBERED_HOSTS", 50)

    async def run() -> tuple[list[Fetched], int]:
        async with serving(fine) as port:
            fetcher = Fetcher(replace(LOCAL, concurrency=16), lambda _: [(2, "127.0.0.1")])
            found = []
            for start in range(0, 300, 30):
                urls = [f"http://host{i}.example:{port}/a" for i in range(start, start + 30)]
                found += await fetch_all(fetcher, urls)
            return found, len(fetcher._hosts.by_name)

    found, remembered = asyncio.run(run())
    assert [row.content for row in found] == [b"x"] * 300
    assert remembered <= 50


def test_open_files_are_few_after_many_hosts() -> None:
    async def run() -> int:
        async with serving(fine) as port:
            fetcher = Fetcher(LOCAL, lambda _: [(2, "127.0.0.1")])
            await fetch_all(fetcher, [f"http://host{i}.example:{port}/a" for i in range(200)])
            await asyncio.sleep(0.2)
            return len(list(Path("/proc/self/fd").iterdir()))

    before = len(list(Path("/proc/self/fd").iterdir()))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    assert asyncio.run(run()) - before < 60


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def fetch_tls(authority: trustme.CA, name: str) -> Fetched:
    """Fetch from `localhost.example` of a server whose certificate is for `name`."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(tls)

    async def run() -> Fetched:
        async with serving(fine, tls=tls) as port:
            fetcher = Fetcher(LOCAL, lambda _: [(2, "127.0.0.1")])
            return (await fetch_all(fetcher, [f"https://localhost.example:{port}/a"]))[0]

    return asyncio.run(run())


def test_a_certificate_nobody_vouches_for_is_a_tls_failure(authority: trustme.CA) -> None:
    found = fetch_tls(authority, "localhost.example")
    assert (found.content, found.reason) == (None, "tls")


@pytest.mark.parametrize(("name", "reason"), [("localhost.example", None), ("other.example", "tls")])
def test_a_certificate_counts_if_its_authority_is_trusted_and_the_name_is_right(
    name: str, reason: str | None, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(tls)
    script = (
        "import sys, json; from data_prep.pairs.fetch import *; import asyncio\n"
        "config = FetchConfig(allow_networks=('127.0.0.1/32',))\n"
        "fetcher = Fetcher(config, lambda _: [(2, '127.0.0.1')])\n"
        "async def run():\n"
        "    async with fetcher.open():\n"
        "        return (await fetcher.fetch(sys.argv[1])).reason\n"
        "print(json.dumps(asyncio.run(run())))"
    )

    async def run() -> Any:
        async with serving(fine, tls=tls) as port:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, f"https://localhost.example:{port}/a",
                env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "authority.pem")}, stdout=subprocess.PIPE,
            )  # fmt: skip
            return json.loads((await child.communicate())[0])

    assert asyncio.run(run()) == reason
