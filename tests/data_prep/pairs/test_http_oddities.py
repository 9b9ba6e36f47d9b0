# ruff: noqa: E501  # one line for each case
"""Addresses and answers as the web has them: what is asked for, byte by byte, and what urllib gets beside it."""

import gzip
import zlib
from dataclasses import replace

import pytest
from exact_server import LOCAL, OK, fetch_exactly, urllib_exactly
from reference import REFERENCE
from reference_data import needs

from data_prep.pairs.addresses import parse_url, quote_bytes

VERBATIM = [
    "/a%2Cb.jpg", "/a%27b.jpg", "/thumb/http%3A%2F%2Forigin%2Fx.jpg", "/p%7Eq.jpg", "/a%28b%29.jpg", "/q?sig=ab%2Fcd%3D%3D",
    "/q2?url=http%3A%2F%2Fo%2Fx.jpg%3Fa%3D1%26b%3D2", "/q3?c=a%40b.iam", "/q4?s=a+b%2Bc", "/q6?a=1%2C2",
    "/q7?t=2020-01-01T00%3A00%3A00Z", "/q8?w=a%20b", "/plain,comma.jpg", "/semi;a=1.jpg", "/pipe%7Cx.jpg", "/pipe|x.jpg",
    "/lower%c3%a9.jpg", "//double//slash.jpg", "/dot/../up.jpg", "/./here.jpg", "/q10?a=b?c=d", "/q11?a[]=1", "/br[1].jpg",
    "/pct%zz.jpg", "/pct%", "/pct%4", "/%E4%F6.jpg", "/caret^x.jpg", "/q12?a&b", "/q13?a=&amp;b=1", "/empty?", "/two??",
    "/eq?=", "/back\\slash.jpg", '/quote"x.jpg', "/lt<gt>.jpg", "/curly{1}.jpg", "/back`tick.jpg", "/star*.jpg", "/at@x.jpg",
    "/colon:x.jpg", "/%2e%2e/x.jpg", "/%41bc.jpg", "/plus+x.jpg", "/bang!.jpg", "/q?X-Amz-Signature=0aF%2f", "/q?a=1;b=2",
    "/q?a=%00", "/s3/key%20with%20spaces.jpg", "/q?path=../x", "/.", "/a/.", "/a//", "/?", "/?q=1",
]  # fmt: skip
"""Request targets that are asked for as they are listed."""
QUOTED = {
    "/a b.jpg": "/a%20b.jpg",
    "/caf\u00e9.jpg": "/caf%C3%A9.jpg",
    "/\u5716.jpg?n=\u5716": "/%E5%9C%96.jpg?n=%E5%9C%96",
    "/a\tb.jpg": "/a%09b.jpg",
    "/a\nb.jpg": "/a%0Ab.jpg",
    "/mixed%20 \u00e9%C3%A9": "/mixed%20%20%C3%A9%C3%A9",
    "/q?w=a b": "/q?w=a%20b",
    "/frag.jpg#x": "/frag.jpg",
    "/frag.jpg?a=1#x?b": "/frag.jpg?a=1",
    "/emoji\U0001f600": "/emoji%F0%9F%98%80",
    "": "/",
    "?q=1": "/?q=1",
}
"""What is quoted, and what is left out."""


def test_addresses_arrive_as_they_are_listed() -> None:
    answers = {target.encode(): OK for target in VERBATIM}
    found, asked = fetch_exactly(answers, VERBATIM)
    assert sorted(asked) == sorted(answers)
    assert [one.content for one in found] == [b"body"] * len(VERBATIM)
    by_urllib = urllib_exactly(answers, VERBATIM)
    assert sum(body is None for body in by_urllib) <= 2  # so does urllib


@pytest.mark.parametrize("path", QUOTED)
def test_only_spaces_controls_and_other_alphabets_are_quoted(path: str) -> None:
    found, asked = fetch_exactly({QUOTED[path].encode(): OK}, [path])
    assert asked == [QUOTED[path].encode()]
    assert found[0].content == b"body"


@needs("cases/urls.tsv")
def test_reported_addresses_arrive_at_least_where_urllibs_do() -> None:
    lines = (REFERENCE / "cases/urls.tsv").read_text().splitlines()[1:]
    paths = [line.split("\t")[0].removeprefix("http://HOST:PORT") for line in lines]
    answers = {quote_bytes(path.partition("#")[0]).encode(): OK for path in paths}
    found, _ = fetch_exactly(answers, paths)
    by_urllib = urllib_exactly(answers, paths)
    arrived = [one.content is not None for one in found]
    assert all(ours for ours, theirs in zip(arrived, by_urllib, strict=True) if theirs is not None)
    assert sum(arrived) == len(paths) == 28


@pytest.mark.parametrize(
    ("location", "target"),
    [
        (b"/new%2Cb.jpg?s=%2F", b"/new%2Cb.jpg?s=%2F"),
        (b"/a b.jpg", b"/a%20b.jpg"),
        (b"/caf\xe9.jpg", b"/caf%E9.jpg"),
        (b"/caf\xc3\xa9.jpg", b"/caf%C3%A9.jpg"),
        (b"/sig?X=a%2Bb%3D", b"/sig?X=a%2Bb%3D"),
        (b"/frag.jpg#part", b"/frag.jpg"),
        (b"other.jpg", b"/folder/other.jpg"),
        (b"../up.jpg", b"/up.jpg"),
        (b"./here.jpg", b"/folder/here.jpg"),
        (b"?q=%2F", b"/folder/old?q=%2F"),
        (b"/empty?", b"/empty?"),
        (b"/dot/../x.jpg", b"/dot/../x.jpg"),
        (b"//127.0.0.1:PORT/b%2Cc", b"/b%2Cc"),
        (b"http://127.0.0.1:PORT/c%2Cd e", b"/c%2Cd%20e"),
        (b"  /spaces.jpg  ", b"/spaces.jpg"),
        (b"/[1].jpg", b"/[1].jpg"),
    ],
)
def test_redirects_are_followed_as_they_are_sent(location: bytes, target: bytes) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    found, asked = fetch_exactly({b"/folder/old": moved, target: OK}, ["/folder/old"])
    assert asked == [b"/folder/old", target]
    assert (found[0].content, found[0].http_status) == (b"body", 200)


HEAD, LENGTH = b"HTTP/1.1 200 OK\r\n", b"Content-Length: 4\r\n"
ANSWERS = {
    "203": b"HTTP/1.1 203 Transformed\r\n" + LENGTH + b"\r\nbody",
    "201": b"HTTP/1.1 201 Created\r\n" + LENGTH + b"\r\nbody",
    "206 whole": b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-3/4\r\n" + LENGTH + b"\r\nbody",
    "length twice": HEAD + LENGTH + LENGTH + b"\r\nbody",
    "length listed twice": HEAD + b"Content-Length: 4, 4\r\n\r\nbody",
    "length padded": HEAD + b"Content-Length:   4  \r\n\r\nbody",
    "length negative": HEAD + b"Content-Length: -1\r\n\r\nbody",
    "no length": HEAD + b"\r\nbody",
    "bytes behind the body": HEAD + LENGTH + b"\r\nbodyEXTRA",
    "bytes behind a closed body": HEAD + b"Connection: close\r\n" + LENGTH + b"\r\nbodyEXTRA",
    "length and chunks": HEAD + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    "a space behind a chunk's size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n4 \r\nbody\r\n0\r\n\r\n",
    "a header of 9 kB": HEAD + b"X: " + b"a" * 9_000 + b"\r\n" + LENGTH + b"\r\nbody",
    "a header of 60 kB": HEAD + b"X: " + b"a" * 60_000 + b"\r\n" + LENGTH + b"\r\nbody",
    "90 headers": HEAD + b"".join(b"X%d: %s\r\n" % (n, b"a" * 500) for n in range(90)) + LENGTH + b"\r\nbody",
    "a reason of 20 kB": b"HTTP/1.1 200 " + b"a" * 20_000 + b"\r\n" + LENGTH + b"\r\nbody",
    "no reason": b"HTTP/1.1 200\r\n" + LENGTH + b"\r\nbody",
    "a reason in Cyrillic": b"HTTP/1.1 200 \xd0\x9e\xd0\x9a\r\n" + LENGTH + b"\r\nbody",
    "HTTP 1.0": b"HTTP/1.0 200 OK\r\n\r\nbody",
    "line feeds only": b"HTTP/1.1 200 OK\nContent-Length: 4\n\nbody",
    "latin-1 in a header": HEAD + b"X-T: caf\xe9\r\n" + LENGTH + b"\r\nbody",
    "a control in a header": HEAD + b"X: a\x01b\r\n" + LENGTH + b"\r\nbody",
    "a space in a header's name": HEAD + b"Bad Name : x\r\n" + LENGTH + b"\r\nbody",
    "a header without a colon": HEAD + b"garbage\r\n" + LENGTH + b"\r\nbody",
    "a folded header": HEAD + b"X: a\r\n b\r\n" + LENGTH + b"\r\nbody",
    "continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "early hints first": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK,
    "gzip": HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"body", mtime=0),
    "gzip of two members": HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"bo", mtime=0) + gzip.compress(b"dy", mtime=0),
    "gzip of five members": HEAD + b"Content-Encoding: gzip\r\n\r\n" + b"".join(map(gzip.compress, [b"b", b"o", b"", b"d", b"y"])),
    "gzip and padding": HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"body", mtime=0) + bytes(9),
    "x-gzip": HEAD + b"Content-Encoding: x-gzip\r\n\r\n" + gzip.compress(b"body", mtime=0),
    "deflate": HEAD + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(b"body"),
    "raw deflate": HEAD + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(b"body")[2:-4],
    "identity": HEAD + b"Content-Encoding: identity\r\n" + LENGTH + b"\r\nbody",
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_browsers_and_urllib_read_are_read(name: str) -> None:
    found, asked = fetch_exactly({b"/x": ANSWERS[name]}, ["/x"])
    assert (found[0].content, found[0].reason, found[0].attempts) == (b"body", None, 1)
    assert len(asked) <= 2


@pytest.mark.parametrize(
    ("answer", "reason", "attempts"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "http_status", 1),
        (b"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n", "http_status", 1),
        (b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-3/9\r\n" + LENGTH + b"\r\nbody", "http_status", 1),
        (b"HTTP/1.1 206 Part\r\nContent-Range: bytes 5-8/9\r\n" + LENGTH + b"\r\nbody", "http_status", 1),
        (b"HTTP/1.1 206 Part\r\nContent-Range: bytes 0-3/*\r\n" + LENGTH + b"\r\nbody", "http_status", 1),
        (b"HTTP/1.1 206 Part\r\n" + LENGTH + b"\r\nbody", "http_status", 1),
        (HEAD + b"Content-Length: 9\r\n\r\nbody", "connect", 3),
        (HEAD + b"Content-Length: 9\r\nContent-Length: 9\r\n\r\nbody", "connect", 1),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "connect", 1),
        (b"HTTP/1.1 abc\r\n\r\n", "connect", 1),
        (HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"body", mtime=0)[:-4], "connect", 3),
        (HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"bo", mtime=0) + gzip.compress(b"dy", mtime=0)[:-9], "connect", 3),
        (HEAD + b"Content-Encoding: br\r\n" + LENGTH + b"\r\nbody", "http_status", 1),
    ],
)  # fmt: skip
def test_answers_without_a_whole_body_are_not_read(answer: bytes, reason: str, attempts: int) -> None:
    found, _ = fetch_exactly({b"/x": answer}, ["/x"])
    assert (found[0].content, found[0].reason, found[0].attempts) == (None, reason, attempts)
    assert "\n" not in (found[0].detail or "")


def test_answers_that_cannot_be_parsed_do_not_give_up_the_host() -> None:
    broken = {f"/{number}".encode(): b"SSH-2.0-OpenSSH\r\n\r\n" for number in range(8)}
    found, _ = fetch_exactly({**broken, b"/fine": OK}, [*(target.decode() for target in broken), "/fine"])
    assert found[-1].content == b"body"
    assert {one.attempts for one in found} == {1}


def test_a_lenient_body_ends_at_the_limit() -> None:
    answer = HEAD + b"Content-Length: 4000\r\nContent-Length: 4000\r\n\r\n" + bytes(4000)
    config = replace(LOCAL, max_bytes=1000)
    found, _ = fetch_exactly({b"/x": answer}, ["/x"], config)
    assert found[0].reason == "too_large"


def test_opt_outs_of_lenient_answers_count() -> None:
    answer = HEAD + LENGTH + LENGTH + b"X-Robots-Tag: noai\r\n\r\nbody"
    assert fetch_exactly({b"/x": answer}, ["/x"])[0][0].reason == "opt_out"


def test_the_host_is_still_canonical() -> None:
    url = parse_url("HTTP://B\u00fccher.example.:80/A%2CB?")
    assert (url.raw_host, url.port, url.raw_path_qs) == ("xn--bcher-kva.example", 80, "/A%2CB?")
