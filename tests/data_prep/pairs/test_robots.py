import asyncio
import contextlib
import datetime
import email.utils
import socket
import time
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from aiohttp import web
from fetching import fetch_all
from yarl import URL

from data_prep.pairs import robots
from data_prep.pairs.addresses import Address, FetchError
from data_prep.pairs.fetch import FetchConfig, Fetched, Fetcher
from data_prep.pairs.robots import Robots, opt_out, parse_rules, product_token, retry_after

AGENT = "ovd-ray/0.1 (crawler)"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOCAL = FetchConfig(deadline_seconds=5.0, backoff_seconds=0.01, allow_networks=("127.0.0.1/32",))


class Sites:
    """A web of robots.txt files: each an answer, or what getting it raises."""

    def __init__(self, **files: tuple[int, bytes] | FetchError) -> None:
        self.files = files
        self.requests: Counter[str] = Counter()

    async def get(self, url: URL) -> tuple[int, bytes]:
        assert url.path == "/robots.txt"
        self.requests[str(url.origin())] += 1
        await asyncio.sleep(0.01)
        answer = self.files.get(url.host or "", (404, b""))
        if isinstance(answer, FetchError):
            raise answer
        return answer

    def robots(self, cache_seconds: float = 60.0) -> Robots:
        return Robots(AGENT, cache_seconds=cache_seconds, retry_seconds=0.1, get=self.get)


def refusal(content: bytes, path: str) -> str | None:
    sites = Sites(host=(200, content))
    return asyncio.run(sites.robots().refusal(URL(f"http://host{path}")))


def test_a_disallowed_url_is_refused_and_others_are_not() -> None:
    assert refusal(b"User-agent: *\nDisallow: /private/", "/private/cat.jpg") == "robots.txt disallows it"
    assert refusal(b"User-agent: *\nDisallow: /private/", "/cat.jpg") is None


@pytest.mark.parametrize(
    ("content", "path", "allowed"),
    [
        ("", "/a.jpg", True),
        ("User-agent: *\nDisallow:", "/a.jpg", True),
        ("User-agent: *\nDisallow: /", "/a.jpg", False),
        ("User-agent: *\nDisallow: /\nAllow: /public/", "/public/a.jpg", True),  # the longest match counts
        ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", True),  # of equals, allow
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$", "/x/a.jpg?size=2", True),
        ("User-agent: *\nDisallow: /*?size=", "/a.jpg?size=2", False),
        ("User-agent: *\nDisallow: /caf%C3%A9/", "/café/a.jpg", False),
        ("User-agent: otherbot\nDisallow: /", "/a.jpg", True),
        ("User-agent: otherbot\nDisallow: /\nUser-agent: *\nDisallow: /b", "/a.jpg", True),
        ("User-agent: OVD-Ray\nDisallow: /", "/a.jpg", False),
        ("User-agent: ovd-ray/2.0\nDisallow: /", "/a.jpg", False),
        ("User-agent: ovd\nDisallow: /", "/a.jpg", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: ovd-ray\nDisallow: /b", "/a.jpg", True),  # ours replaces all's
        ("User-agent: otherbot\nUser-agent: ovd-ray\nDisallow: /", "/a.jpg", False),
        ("User-agent: ovd-ray\nUser-agent: otherbot\nDisallow: /", "/a.jpg", False),
        ("User-agent: ovd-ray\nDisallow: /b\nUser-agent: ovd-ray\nDisallow: /a", "/a.jpg", False),  # groups are merged
        ("User-agent: *\n# a comment\n\nDisallow: / # another", "/a.jpg", False),
        ("User-agent: ovd-ray\nSitemap: http://host/s.xml\nUser-agent: otherbot\nDisallow: /", "/a.jpg", False),
        ("User-agent: otherbot\nCrawl-delay: 5\nUser-agent: ovd-ray\nDisallow: /b", "/a.jpg", True),
        ("\ufeffUser-agent: *\r\nDisallow: /\r\n", "/a.jpg", False),
        ("user-agent:*\rdisallow:/", "/a.jpg", False),
        ("Disallow: /", "/a.jpg", True),  # spoken to nobody
        ("<html><body>Not found</body></html>", "/a.jpg", True),
    ],
)
def test_rules_are_read_as_the_rfc_says(content: str, path: str, allowed: bool) -> None:
    assert (refusal(content.encode(), path) is None) == allowed


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        (200, "robots.txt disallows it"), (204, "robots.txt disallows it"), (304, None), (400, None), (401, None),
        (403, None), (404, None), (410, None), (429, None), (500, "robots.txt answered 500"),
        (503, "robots.txt answered 503"),
    ],
)  # fmt: skip
def test_an_absent_file_allows_all_and_a_failing_server_nothing(status: int, refused: str | None) -> None:
    sites = Sites(host=(status, b"User-agent: *\nDisallow: /"))
    assert asyncio.run(sites.robots().refusal(URL("http://host/a.jpg"))) == refused


@pytest.mark.parametrize("reason", ["dns", "connect", "timeout", "tls", "forbidden_address"])
def test_where_nobody_answers_for_the_file_the_url_fails_the_same_way(reason: str) -> None:
    sites = Sites(host=FetchError(reason, "no luck", transient=reason == "connect"))
    with pytest.raises(FetchError, match=r"robots\.txt: no luck") as raised:
        asyncio.run(sites.robots().refusal(URL("http://host/a.jpg")))
    assert (raised.value.reason, raised.value.transient) == (reason, reason == "connect")


def test_a_site_is_asked_once_for_all_its_urls_and_again_when_the_answer_is_old() -> None:
    sites = Sites(host=(200, b"User-agent: *\nDisallow: /private/"))

    async def run() -> None:
        reader = sites.robots(cache_seconds=0.2)
        found = await asyncio.gather(*(reader.refusal(URL(f"http://host/{i}.jpg")) for i in range(1000)))
        assert found == [None] * 1000
        assert sites.requests == {"http://host": 1}
        await asyncio.sleep(0.25)
        await reader.refusal(URL("http://host/a.jpg"))
        assert sites.requests == {"http://host": 2}

    asyncio.run(run())


def test_scheme_and_port_make_another_site() -> None:
    sites = Sites()

    async def run() -> None:
        reader = sites.robots()
        for url in ("http://host/a", "http://host:80/b", "https://host/a", "http://host:8080/a", "http://other/a"):
            await reader.refusal(URL(url))

    asyncio.run(run())
    assert set(sites.requests.values()) == {1}
    assert set(sites.requests) == {"http://host", "https://host", "http://host:8080", "http://other"}


def test_sites_met_longest_ago_are_forgotten_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robots, "REMEMBERED_RULES", 100)
    sites = Sites(large=(200, b"User-agent: *\n" + b"Disallow: /x\n" * 80))

    async def run() -> None:
        reader = sites.robots()
        for host in [*(f"host{i}" for i in range(120)), "large", "host0", "host119", "large"]:
            await reader.refusal(URL(f"http://{host}/a"))

    asyncio.run(run())
    assert sites.requests["http://host0"] == 2  # forgotten for newer ones
    assert sites.requests["http://host119"] == 1
    assert sites.requests["http://large"] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"".join(b"User-agent: bot%d\n" % i for i in range(12_000)) + b"Disallow: /x\n" * 12_000,
        b"".join(b"User-agent: *\nUser-agent: bot%d\n" % i for i in range(9_000)) + b"Disallow: /x\n" * 9_000,
        b"User-agent: *\n" + b"Disallow: /*a*b*a*b*a*b*a*b*a*b$\n" * 4_990,
        b"User-agent: *\nDisallow: /" + b"*ab" * 150_000 + b"c\n",
        b"User-agent: *\n" + b"Disallow: /%\xff\xfe%zz\n" * 4_990,
        b"\x00" * robots.MAX_BYTES,
    ],
)
def test_a_hostile_file_costs_little(content: bytes) -> None:
    tracemalloc.start()
    started = time.process_time()
    rules, _ = parse_rules(content, "ovd-ray")
    if rules.parsed:
        rules.parsed.can_fetch("http://host/" + "ab" * 4000, "ovd-ray")
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 3.0
    assert peak < 40 << 20


def test_a_file_of_endless_rules_closes_the_site() -> None:
    found = refusal(b"User-agent: *\n" + b"Disallow: /x\n" * 6000, "/a.jpg")
    assert found == "robots.txt has more than 5000 lines for us"


def test_only_the_first_half_megabyte_is_read() -> None:
    filler = b"# padding\n" * (robots.MAX_BYTES // 10)
    assert refusal(b"User-agent: *\nDisallow: /a\n" + filler + b"Disallow: /b\n", "/a") is not None
    assert refusal(b"User-agent: *\nDisallow: /a\n" + filler + b"Disallow: /b\n", "/b") is None


def test_the_product_token_is_what_stands_before_the_slash() -> None:
    assert product_token("OVD-ray/0.1 (crawler; +https://example.com/)") == "ovd-ray"
    assert product_token("ovd-ray") == "ovd-ray"


@pytest.mark.parametrize(
    ("header", "opted_out"),
    [
        ("noai", True), ("noimageai", True), ("NoIndex, nofollow", True), ("noml", True), ("none", True),
        ("noimageindex", True), ("all", False), ("nofollow", False), ("", False), ("noaircraft", False),
        ("googlebot: noindex", False), ("otherbot: noindex, nofollow", False), ("otherbot/2.0: noai", False),
        ("ovd-ray: noai", True), ("OVD-Ray : NoAI", True), ("ovd-ray/0.1: noai", True), ("*: noai", True),
        ("otherbot: nofollow, ovd-ray: noai", True), ("ovd-ray: nofollow, otherbot: noai", False),
        ("noai, otherbot: noindex", True), ("otherbot: noindex, *: noai", True),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", False), ("unavailable_after: 2030-06-25T15:00:00Z", False),
        ("unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT", False),
        ("unavailable_after: Tue, 25 Jun 2030 15:00:00 GMT, noai", True),
        ("max-image-preview: large, noai", True), ("max-snippet: 20, nofollow", False),
    ],
)  # fmt: skip
def test_opt_out_headers(header: str, opted_out: bool) -> None:
    assert (opt_out([header], "", AGENT) is not None) == opted_out


def test_any_of_several_headers_opts_out() -> None:
    assert opt_out([], "", AGENT) is None
    assert opt_out(["otherbot: noindex", "noai"], "", AGENT) == "X-Robots-Tag: noai"
    assert opt_out([], " 1 ", AGENT) == "tdm-reservation: 1"
    assert opt_out(["all"], "0", AGENT) is None


@pytest.mark.parametrize("digits", ["Jan 99999999999999999999 00:00:00 GMT", "Jan 2030 00:00:00 +99999999999999999"])
def test_a_date_of_many_digits_asks_for_nothing(digits: str) -> None:
    assert retry_after(f"Mon, 01 {digits}") == 0.0


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("7") == 7.0
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    assert retry_after(email.utils.format_datetime(soon, usegmt=True)) == pytest.approx(60, abs=2)
    assert retry_after(soon.strftime("%A, %d-%b-%y %H:%M:%S GMT")) == pytest.approx(60, abs=2)
    assert retry_after(soon.strftime("%a %b %d %H:%M:%S %Y")) == pytest.approx(60, abs=2)  # asctime, without a zone


@pytest.mark.parametrize(
    "header",
    ["", "soon", "-5", "1e9", "²", "1" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 2015 07:28:00 GMT"],
)
def test_a_past_or_unreadable_retry_after_asks_for_nothing(header: str) -> None:
    assert retry_after(header) == 0.0


# Over HTTP


def fetch_from(images: Handler, paths: list[str], robots_txt: Handler, config: FetchConfig = LOCAL) -> list[Fetched]:
    """Fetch from a throw-away server that answers to every name."""

    def lookup(host: str) -> list[Address]:
        return [] if host.endswith(".invalid") else [(socket.AF_INET, "127.0.0.1")]

    async def run() -> list[Fetched]:
        application = web.Application()
        application.router.add_get("/robots.txt", robots_txt)
        application.router.add_get("/{path:.*}", images)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        try:
            return await fetch_all(Fetcher(config, lookup), [f"http://site.example:{port}{path}" for path in paths])
        finally:
            await runner.cleanup()

    return asyncio.run(run())


async def fine(request: web.Request) -> web.StreamResponse:
    """An image, as it were."""
    return web.Response(body=b"x")


def saying(text: str, status: int = 200) -> Handler:
    """A robots.txt."""

    async def say(request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status)

    return say


def test_a_disallowed_url_is_never_asked_for_and_the_file_is_read_once() -> None:
    requests: Counter[str] = Counter()

    async def count(request: web.Request) -> web.StreamResponse:
        requests[request.path] += 1
        return web.Response(body=b"x")

    async def rules(request: web.Request) -> web.StreamResponse:
        requests[request.path] += 1
        return web.Response(text="User-agent: ovd-ray\nDisallow: /private/\n")

    found = fetch_from(count, ["/private/a", "/b", *(f"/{i}" for i in range(100))], rules)
    assert (found[0].reason, found[0].detail, found[0].attempts) == ("opt_out", "robots.txt disallows it", 0)
    assert [row.content for row in found[1:]] == [b"x"] * 101
    assert (requests["/robots.txt"], requests["/private/a"]) == (1, 0)


def test_robots_txt_can_be_ignored_on_purpose() -> None:
    config = replace(LOCAL, respect_robots=False)
    assert fetch_from(fine, ["/a"], saying("User-agent: *\nDisallow: /"), config)[0].content == b"x"


def test_a_server_that_fails_to_give_its_robots_txt_is_left_alone() -> None:
    found = fetch_from(fine, ["/a"], saying("", status=503))
    assert (found[0].reason, found[0].detail, found[0].attempts) == ("opt_out", "robots.txt answered 503", 0)


def test_headers_of_robots_txt_itself_opt_nothing_out() -> None:
    async def tagged(request: web.Request) -> web.StreamResponse:
        return web.Response(text="User-agent: *\nAllow: /", headers={"X-Robots-Tag": "noindex"})

    assert fetch_from(fine, ["/a"], tagged)[0].content == b"x"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("/rules", "opt_out"), ("/loop", None), ("file:///etc/passwd", None), ("http://10.0.0.1/", "forbidden_address"),
        ("http://no-such-host.invalid/", "dns"), ("http://127.0.0.1:1/", "connect"),
    ],
)  # fmt: skip
def test_redirects_of_robots_txt_are_followed_and_checked(location: str, reason: str | None) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/loop":
            return web.Response(status=302, headers={"Location": "/loop"})
        return web.Response(text="User-agent: *\nDisallow: /a")

    async def redirect(request: web.Request) -> web.StreamResponse:
        return web.Response(status=301, headers={"Location": location})

    assert fetch_from(answer, ["/a"], redirect)[0].reason == reason


def test_each_hop_of_a_redirect_asks_its_own_site() -> None:
    async def to_closed(request: web.Request) -> web.StreamResponse:
        assert request.host.startswith("site")
        location = f"http://closed.example:{request.url.port}/private"
        return web.Response(status=302, headers={"Location": location})

    async def rules(request: web.Request) -> web.StreamResponse:
        return web.Response(text="User-agent: *\nDisallow: /private" if request.host.startswith("closed") else "")

    found = fetch_from(to_closed, ["/private"], rules)[0]
    assert (found.reason, found.detail, found.http_status) == ("opt_out", "robots.txt disallows it", 302)


def test_an_endless_robots_txt_is_cut_off_and_its_beginning_counts() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(b"User-agent: *\nDisallow: /a\n")
            for _ in range(10_000):
                await response.write(b"# padding\n" * 1000)
        return response

    found = fetch_from(fine, ["/a", "/b"], endless, replace(LOCAL, deadline_seconds=10.0))
    assert [row.reason for row in found] == ["opt_out", None]
