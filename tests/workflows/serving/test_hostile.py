"""Hostile requests at the application as Ray Serve runs it: slow, half-sent, huge, fuzzed; and killed replicas."""

import contextlib
import io
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from measure import descendants
from PIL import Image
from serving import encoded, picture, png_that_declares, post, save_detector, save_segmenter

from ovd_models.errors import InputError
from workflows import serve
from workflows.serving.limits import Limits

LIMITS = Limits(max_queued=16, max_bytes=8_000_000, max_pixels=4_000_000, max_names=2_000, body_seconds=10)
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("hostile")
    models = f"boxes={save_detector(root / 'boxes')},pointer={save_segmenter(root / 'pointer')}"
    run = serve.Run(model=models, storage=str(root), port=0, limits=LIMITS, image_cache_mb=8)
    with serve.serve_model(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def connect(client: httpx.Client, sent: bytes) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30)
    connection.sendall(sent)
    return connection


def head(length: int, path: str = "/v1/detect") -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: image/jpeg", f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.slow
def test_trickling_bodies_and_half_sent_headers_hold_up_nobody(client: httpx.Client) -> None:
    slow = [connect(client, head(5_000) + b"\xff\xd8") for _ in range(40)]
    slow += [connect(client, b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Ty") for _ in range(40)]
    started = time.monotonic()
    for _ in range(5):
        assert post(client, "detect").status_code == 200
    assert time.monotonic() - started < 5
    deadline = time.monotonic() + 30
    for connection in slow:  # all are answered with 408 or closed, long before a client would notice
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        answer = connection.recv(1_000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")
        connection.close()


@pytest.mark.slow
def test_memory_returns_after_large_uploads(client: httpx.Client) -> None:
    post(client, "detect")
    (replica,), (proxy,) = processes("ServeReplica"), processes("bin/haproxy")
    time.sleep(3)
    before = resident(replica), resident(proxy)
    large = encoded(Image.effect_noise((2_000, 1_900), 80).convert("RGB"), "PNG")
    large = large[: LIMITS.max_bytes - 10_000]  # truncated: read, held and refused
    with ThreadPoolExecutor(24) as pool:
        statuses = set(pool.map(lambda _: post(client, "detect", large).status_code, range(48)))
        statuses |= set(pool.map(lambda _: post(client, "detect", big_picture()).status_code, range(24)))
    assert statuses <= {200, 400, 503}
    time.sleep(4)
    assert resident(replica) - before[0] < 300e6
    assert resident(proxy) - before[1] < 150e6


def big_picture() -> bytes:
    return encoded(Image.new("RGB", (2_000, 1_900), "red"), "PNG")


def processes(word: str) -> list[int]:
    """Process ids of this session's Ray whose command line has a word."""
    found = []
    for pid in descendants():
        with contextlib.suppress(OSError):
            if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.slow
def test_a_killed_replica_loses_no_request(client: httpx.Client) -> None:
    statuses: list[int] = []
    stop = threading.Event()

    def send(seed: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            while not stop.is_set():
                response = post(own, "detect", picture(seed=seed))
                statuses.append(response.status_code)
                if response.status_code == 503:
                    assert int(response.headers["retry-after"]) >= 1
                    assert response.headers["content-type"] == "application/problem+json"
                    time.sleep(0.2)

    with ThreadPoolExecutor(6) as pool:
        sending = [pool.submit(send, seed) for seed in range(6)]
        time.sleep(2)
        for pid in processes("ServeReplica"):
            os.kill(pid, signal.SIGKILL)
        time.sleep(12)
        stop.set()
        for each in sending:
            each.result()
    assert set(statuses) <= {200, 503}
    assert statuses[-1] == 200


# ------------------------------------------------------------------------------------------------------- fuzzing


def files() -> list[bytes]:
    """Broken, odd and hostile files."""
    whole = picture()
    odd = [Image.new(mode, (31, 17)) for mode in ("CMYK", "P", "LA", "I;16", "F", "1", "HSV", "YCbCr")]
    saved = []
    for image in odd:
        for kind in ("PNG", "TIFF", "JPEG", "GIF"):
            try:
                saved.append(encoded(image, kind))
            except (OSError, ValueError, KeyError):
                continue
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    chance = random.Random(0)
    cut = [whole[: chance.randrange(1, len(whole))] for _ in range(30)]
    flipped = []
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 20)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        flipped.append(bytes(content))
    bombs = [png_that_declares(side, side) for side in (1, 50, 2_001, 60_000, 2**31 - 1)]
    texts = [
        b"",
        b"\0",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"GIF89a",
        b"\xff\xd8\xff\xe1\xff\xff",
    ]
    animated = []
    for kind in ("GIF", "WEBP", "PNG"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        animated.append(stream.getvalue())
    return [*saved, *cut, *flipped, *bombs, *texts, *animated, encoded(Image.new("RGB", (1, 1)), "PNG")]


FIELDS: list[dict[str, Any]] = [
    {"vocabulary": json.dumps(["x"] * 2_001)},
    {"vocabulary": json.dumps([f"name {n}" for n in range(2_000)])},
    {"vocabulary": json.dumps(["😀", "umbrella ☂"])},
    {"vocabulary": "[" * 50_000},
    {"vocabulary": '["\\u0000"]'},
    {"vocabulary": "NaN"},
    {"vocabulary": '[{"name": "a", "synonyms": [[]]}]'},
    {"vocabulary": "../../etc/passwd"},
    {"vocabulary": "f" * 32},
    {"score_threshold": "nan"},
    {"score_threshold": "1e999"},
    {"max_detections": "-1"},
    {"max_detections": "9" * 400},
    {"masks": "maybe"},
    {"merge": "median"},
    {"prompt_set": "{name.__class__}"},
    {"prompt_set": "a {a}" * 500},
    {"model": "../x"},
    {"attributes": '["red"]'},
    {"attributes": "{}"},
    {"unknown": "1"},
]
PROMPTS = [
    '{"points": [[NaN, 1]]}',
    '{"points": [[1e308, 1]]}',
    '{"points": [[-1, -1]]}',
    '{"points": []}',
    '{"boxes": [[9, 9, 1, 1]]}',
    '{"boxes": [[0, 0, Infinity, 5]]}',
    '{"points": [[1, 1]], "point_labels": [7]}',
    '{"points": {"x": 1}}',
    '{"points": "abc"}',
    '{"points": [[[1, 1], [2]]]}',
    '{"points": [[1, 1]], "boxes": [[0, 0, 5, 5], [1, 1, 3, 3]]}',
    "null",
    "[]",
    "1",
    '""',
    '{"points": [[1, 1]], "point_labels": [null]}',
    '{"boxes": [[0, 0, 1e-30, 1e-30]]}',
    '{"boxes": [["a", 0, 1, 1]]}',
]


def check_answer(response: httpx.Response) -> None:
    assert response.status_code < 500 or response.status_code == 503, (response.status_code, response.text)
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json", response.text
        assert response.json()["detail"]


@pytest.mark.slow
def test_hand_made_requests_are_answered_or_refused(client: httpx.Client) -> None:
    sent = 0
    for content in files():
        check_answer(post(client, "detect", content))
        check_answer(post(client, "segment", content, prompts='{"points": [[1, 1]]}'))
        sent += 2
    for fields in FIELDS:
        check_answer(post(client, "detect", **fields))
        sent += 1
    for prompts in PROMPTS:
        check_answer(post(client, "segment", prompts=prompts))
        sent += 1
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=", "text/plain", "image/jpeg; x"):
        check_answer(client.post("/v1/detect", content=b"abc", headers={"content-type": content_type}))
        sent += 1
    assert sent >= 250
    assert post(client, "detect").status_code == 200


@pytest.mark.slow
def test_requests_drawn_from_the_openapi_description_are_answered_or_refused(client: httpx.Client) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        settings = hypothesis.settings(
            max_examples=40, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )

        @hypothesis.seed(0)
        @settings
        @hypothesis.given(case=operation.as_strategy())
        def send(case: Any) -> None:
            nonlocal sent
            try:
                response = case.call(base_url=str(client.base_url))
            except (requests.RequestException, UnicodeError, ValueError):
                return  # the client refuses to send it
            assert response.status_code < 500 or response.status_code == 503, response.text
            assert "Traceback" not in response.text
            sent += 1

        send()
    assert sent >= 100
    assert post(client, "detect").status_code == 200


def test_a_host_that_others_reach_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OVD_TOKEN", raising=False)
    model = str(save_detector(tmp_path / "model"))
    with pytest.raises(InputError, match="--token-file or the variable OVD_TOKEN"):
        serve.check(serve.Run(model=model, host="0.0.0.0"))
    (tmp_path / "token").write_text("secret\n")
    serve.check(serve.Run(model=model, host="0.0.0.0", token_file=str(tmp_path / "token")))
    with pytest.raises(InputError, match="cannot be read"):
        serve.check(serve.Run(model=model, host="0.0.0.0", token_file=str(tmp_path / "nothing")))
