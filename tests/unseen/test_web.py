# ruff: noqa: E501  # one line for each case
"""Further addresses, redirects and answers, written before the code that reads them was looked at."""

import gzip
import zlib

import pytest
from exact_server import OK, fetch_exactly

from data_prep.pairs.addresses import parse_url

VERBATIM = [
    "/img/%D0%BA%D0%BE%D1%82.jpg", "/w_600,h_400,c_fill/v1/a%20b.jpg", "/_next/image?url=%2Fp%2F1.jpg&w=3840&q=75",
    "/x?Expires=1&Signature=ab~cd-__&Key-Pair-Id=K", "/o/a%2Fb%2Fc.jpg?alt=media&token=1-2", "/%20lead.jpg", "/a%0Ab.jpg",
    "/q?x=%", "/q?=&&=", "/a%2E%2E/b", "/a/../../b.jpg", "/path;jsessionid=0A?x", "/x?u=http://b/c?d=e", "/x?a='b'",
    "/x?q=[1,2]&r={3}", "/%%20x", "/x?%2", "/http://o/x.jpg", "/x?a#", "/%F0%9F%98%80", "/x?a=%e9", "/!$&'()*+,;=:@",
]  # fmt: skip
QUOTED = {
    "/\u3000x.jpg": "/%E3%80%80x.jpg",
    "/a\u00a0b": "/a%C2%A0b",
    "/x?n=\u00e9&s=%C3%A9": "/x?n=%C3%A9&s=%C3%A9",
    "/cafe\u0301.jpg": "/cafe%CC%81.jpg",
    "/x\x7f.jpg": "/x%7F.jpg",
    "/x?a b#c d": "/x?a%20b",
}


@pytest.mark.parametrize("path", VERBATIM)
def test_an_address_is_asked_for_as_listed(path: str) -> None:
    target = path.partition("#")[0].encode()
    found, asked = fetch_exactly({target: OK}, [path])
    assert asked == [target]
    assert found[0].content == b"body"


@pytest.mark.parametrize("path", QUOTED)
def test_what_must_be_quoted_is_quoted(path: str) -> None:
    found, asked = fetch_exactly({QUOTED[path].encode(): OK}, [path])
    assert asked == [QUOTED[path].encode()]
    assert found[0].content == b"body"


@pytest.mark.parametrize("url", [" http://h/x", "http://h/x ", "HTTP://h/x", "http://h/x\r", "http://H/x"])
def test_what_surrounds_an_address_is_no_part_of_it(url: str) -> None:
    assert str(parse_url(url)) == "http://h/x"


LOCATIONS = {
    b"b.jpg": b"/d/b.jpg",
    b"?x=1": b"/d/a?x=1",
    b"//127.0.0.1:PORT/x": b"/x",
    b"/x#frag": b"/x",
    "/\u5716.jpg".encode(): b"/%E5%9C%96.jpg",
    b"HTTP://127.0.0.1:PORT/x?s=%2f%3D": b"/x?s=%2f%3D",
    b"/x \t": b"/x",
    b"/a,b'c(d)": b"/a,b'c(d)",
    b"../up?u=../x": b"/up?u=../x",
    b"./here%2fx": b"/d/here%2fx",
    b"/x?next=http://o/y": b"/x?next=http://o/y",
}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("status", [b"301 Moved", b"308"])
def test_a_redirect_is_followed_as_sent(location: bytes, status: bytes) -> None:
    moved = b"HTTP/1.1 " + status + b"\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    found, asked = fetch_exactly({b"/d/a": moved, LOCATIONS[location]: OK}, ["/d/a"])
    assert asked == [b"/d/a", LOCATIONS[location]]
    assert found[0].content == b"body"


@pytest.mark.parametrize(
    "location",
    [b"data:image/png;base64,AA", b"ftp://127.0.0.1/x", b"http://", b"javascript:x", b"http://[::1", b"http://a:b/"],
)
def test_a_redirect_to_no_web_address_is_final(location: bytes) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
    found, asked = fetch_exactly({b"/a": moved}, ["/a"])
    assert asked == [b"/a"]
    assert found[0].content is None
    assert found[0].reason in ("bad_url", "http_status", "forbidden_address")


def ok(headers: bytes, body: bytes = b"body") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


READ = {
    "no reason phrase": b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nbody",
    "1.0 without length": b"HTTP/1.0 200 OK\r\n\r\nbody",
    "no headers": b"HTTP/1.1 200 OK\r\n\r\nbody",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "x-gzip": ok(b"Content-Encoding: x-gzip", gzip.compress(b"body")),
    "GZIP": ok(b"Content-Encoding: GZIP", gzip.compress(b"body")),
    "zlib deflate": ok(b"Content-Encoding: deflate", zlib.compress(b"body")),
    "raw deflate": ok(b"Content-Encoding: deflate", raw_deflate(b"body")),
    "identity": ok(b"Content-Encoding: identity\r\nContent-Length: 4"),
    "no coding": ok(b"Content-Encoding: \r\nContent-Length: 4"),
    "utf-8 is no coding": ok(b"Content-Encoding: UTF-8\r\nContent-Length: 4"),
    "binary is no coding": ok(b"Content-Encoding: binary\r\nContent-Length: 4"),
    "length twice in one": ok(b"Content-Length: 4, 4"),
    "chunk extension": ok(b"Transfer-Encoding: chunked", b"4;name=x\r\nbody\r\n0\r\n\r\n"),
    "chunk trailer": ok(b"Transfer-Encoding: chunked", b"4\r\nbody\r\n0\r\nX-Sum: 1\r\n\r\n"),
    "chunk zeros": ok(b"Transfer-Encoding: chunked", b"0004\r\nbody\r\n0\r\n\r\n"),
    "chunked and a length": ok(b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"4\r\nbody\r\n0\r\n\r\n"),
    "latin-1 header": ok(b"X-Name: caf\xe9\r\nContent-Length: 4"),
    "folded header": ok(b"X-Name: a\r\n b\r\nContent-Length: 4"),
    "space before colon": ok(b"X-Name : a\r\nContent-Length: 4"),
    "200 cookies": ok(b"\r\n".join(b"Set-Cookie: a%d=b" % number for number in range(90)) + b"\r\nContent-Length: 4"),
    "text/html of a picture": ok(b"Content-Type: text/html\r\nContent-Length: 4"),
    "no type": ok(b"Content-Type:\r\nContent-Length: 4"),
    "bad type": ok(b"Content-Type: image/jpeg; charset=\"\r\nContent-Length: 4"),
    "202": b"HTTP/1.1 202 Accepted\r\nContent-Length: 4\r\n\r\nbody",
    "206 of all": b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-3/4\r\nContent-Length: 4\r\n\r\nbody",
    "other lengths": ok(b"Content-Length: 4\r\nContent-Length: 9"),
    "negative length": ok(b"Content-Length: -1"),
    "lower-case": b"HTTP/1.1 200 ok\r\ncontent-length:4\r\n\r\nbody",
    "two codings": ok(b"Content-Encoding: gzip\r\nContent-Length: %d" % len(gzip.compress(b"body")), gzip.compress(b"body")),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_whole_body_is_read(name: str) -> None:
    found, _ = fetch_exactly({b"/a": READ[name]}, ["/a"])
    assert (found[0].content, found[0].reason) == (b"body", None)


REFUSED = {
    "cut by length": ok(b"Content-Length: 9"),
    "cut chunk": ok(b"Transfer-Encoding: chunked", b"9\r\nbody"),
    "no last chunk": ok(b"Transfer-Encoding: chunked", b"4\r\nbody\r\n"),
    "cut gzip": ok(b"Content-Encoding: gzip", gzip.compress(b"body" * 99)[:-12]),
    "part of 9": b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-3/9\r\nContent-Length: 4\r\n\r\nbody",
    "second part": b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 4-7/8\r\nContent-Length: 4\r\n\r\nbody",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "302 without location": b"HTTP/1.1 302 Found\r\nContent-Length: 4\r\n\r\nbody",
    "410": b"HTTP/1.1 410 Gone\r\nContent-Length: 4\r\n\r\nbody",
    "no HTTP": b"body",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_rejected(name: str) -> None:
    found, asked = fetch_exactly({b"/a": REFUSED[name]}, ["/a"])
    assert found[0].content is None
    assert found[0].reason in ("http_status", "connect", "bad_url")
    assert len(asked) <= 6  # aiohttp repeats a request whose connection closes without an answer
    assert "\n" not in (found[0].detail or "")
