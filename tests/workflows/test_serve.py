import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import (
    LIMITS,
    NAMES,
    encoded,
    endpoint,
    picture,
    png_that_declares,
    post,
    problem,
    save_detector,
    save_segmenter,
)
from starlette.testclient import TestClient

import ovd_models
from data_prep.embeddings.texts import TextStore
from ovd_models.checkpoints import save_checkpoint
from ovd_models.errors import InputError
from ovd_models.predictors import Segmenter
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.segments import Prompts
from ovd_models.vocabulary import EmbeddingTable
from workflows import serve
from workflows.common import models, registry, tracking
from workflows.serving.api import build_api


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def client(ray_cluster: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    storage = str(tmp_path_factory.mktemp("storage"))
    run = serve.Run(model=str(checkpoint), storage=storage, port=0, limits=LIMITS)
    with serve.serve_model(run) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def detect(client: httpx.Client, content: bytes | None = None, **fields: Any) -> httpx.Response:
    return post(client, "detect", content, **fields)


@pytest.mark.ray
def test_detect_returns_boxes_of_the_given_names(client: httpx.Client) -> None:
    response = detect(client, vocabulary=json.dumps(["anchor", "snowman"]), score_threshold=0, max_detections=7)
    assert response.status_code == 200, response.text
    found = response.json()
    assert (found["width"], found["height"]) == (96, 64)
    assert 0 < len(found["detections"]) <= 7
    scores = [entry["score"] for entry in found["detections"]]
    assert scores == sorted(scores, reverse=True)
    for entry in found["detections"]:
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 <= x1 <= 96
        assert 0 <= y0 <= y1 <= 64
        assert entry["label"] in ("anchor", "snowman")


@pytest.mark.ray
def test_model_describes_the_checkpoint(client: httpx.Client, checkpoint: Path) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    model = client.get("/v1/model").json()
    assert model["method"] == "codet"
    assert model["checkpoint"] == str(checkpoint)
    assert model["teacher"].startswith("table:")
    assert model["vocabulary"] == list(NAMES)


@pytest.mark.ray
def test_the_api_has_an_openapi_description(client: httpx.Client) -> None:
    assert "text/html" in client.get("/").headers["content-type"]
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/healthz", "/v1/model", "/v1/models", "/v1/vocabularies", "/v1/detect"}
    assert {"400", "413", "415", "422", "503"} <= set(paths["/v1/detect"]["post"]["responses"])


@pytest.mark.ray
def test_exif_rotation_is_applied(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64)).save(buffer, "JPEG", exif=exif)
    found = detect(client, buffer.getvalue()).json()
    assert (found["width"], found["height"]) == (64, 96)


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA"])
def test_common_formats_and_modes_are_read(client: httpx.Client, kind: str, mode: str) -> None:
    assert detect(client, encoded(Image.new(mode, (40, 30)), kind)).status_code == 200


@pytest.mark.ray
@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_extreme_shapes_are_answered(client: httpx.Client, size: tuple[int, int]) -> None:
    response = detect(client, encoded(Image.new("RGB", size), "PNG"))
    assert response.status_code == 200, response.text


@pytest.mark.ray
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 415),
        (b"<html>not found</html>", 415),
        (b"%PDF-1.7", 415),
        (picture()[:300], 400),
        (b"\xff\xd8\xff", 400),
        (b"GIF89a" + b"\0" * 50, 400),
        (png_that_declares(50, 50), 400),
        (png_that_declares(2_001, 2_000), 413),
        (png_that_declares(60_000, 60_000), 413),
        (png_that_declares(65_536, 1), 413),
    ],
)
def test_bad_images_are_refused(client: httpx.Client, content: bytes, status: int) -> None:
    assert "image" in problem(detect(client, content), status)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        ("anchor", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1}', "list"),
        ("[]", "empty"),
        ('["anchor", 3]', "entry 1"),
        ('["anchor", "  "]', "entry 1"),
        ('["anchor", null]', "entry 1"),
        (json.dumps(["x" * 101]), "101 characters"),
        (json.dumps(["x"] * 21), "21 names"),
        ('["\\ud83d"]', "surrogate"),
        ('["zebra"]', "zebra"),  # the table of this checkpoint has no such name
    ],
)
def test_bad_vocabularies_are_refused(client: httpx.Client, vocabulary: str, expected: str) -> None:
    assert expected in problem(detect(client, vocabulary=vocabulary), 422)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("score_threshold", "2"),
        ("score_threshold", "nan"),
        ("score_threshold", "high"),
        ("max_detections", "0"),
        ("max_detections", "1001"),
        ("masks", "true"),
    ],
)
def test_bad_parameters_are_named(client: httpx.Client, field: str, value: str) -> None:
    assert field in problem(detect(client, **{field: value}), 422)


@pytest.mark.ray
def test_malformed_requests_are_problems_too(client: httpx.Client) -> None:
    assert "image" in problem(client.post("/v1/detect", data={"vocabulary": "[]"}), 422)
    assert "image" in problem(client.post("/v1/detect", data={"image": "text"}), 422)
    assert "image" in problem(client.post("/v1/detect", json={"image": 1}), 422)
    headers = {"content-type": "multipart/form-data"}
    problem(client.post("/v1/detect", content=b"no boundary", headers=headers), 400)
    problem(client.get("/v1/nothing"), 404)
    problem(client.get("/v1/detect"), 405)


@pytest.mark.ray
def test_too_many_bytes_are_refused_while_they_arrive(client: httpx.Client) -> None:
    assert "600,000" in problem(detect(client, picture() + b"\0" * 600_000), 413)

    def endless() -> Iterator[bytes]:  # chunked, so that no header says how long it is
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        for _ in range(100):
            yield b"\xff" * 20_000

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert "600,000" in problem(client.post("/v1/detect", content=endless(), headers=headers), 413)


@pytest.mark.ray
def test_slow_bodies_are_refused(client: httpx.Client) -> None:
    url = client.base_url
    lines = (
        "POST /v1/detect HTTP/1.1",
        "Host: x",
        "Content-Type: multipart/form-data; boundary=x",
        "Content-Length: 90",
    )
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(head + b"--x")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer


@pytest.mark.ray
def test_a_full_queue_answers_503_with_retry_after_while_health_answers(client: httpx.Client) -> None:
    content = picture(2400, 1600)
    with ThreadPoolExecutor(24) as pool:
        pending = [pool.submit(detect, client, content) for _ in range(24)]
        assert client.get("/healthz").status_code == 200
        responses = [entry.result() for entry in pending]
    refused = [response for response in responses if response.status_code != 200]
    assert len(responses) - len(refused) >= 1 + LIMITS.max_queued
    assert refused
    for response in refused:
        problem(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    assert detect(client).status_code == 200


def test_unexpected_errors_reveal_no_details(checkpoint: Path, tmp_path: Path) -> None:
    opened = endpoint(checkpoint, tmp_path)
    (model,) = opened.models

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    model.predictor.find = broken
    with TestClient(build_api(opened)) as client:
        response = detect(client)
        assert "secret" not in problem(response, 500)
        assert client.get("/healthz").status_code == 200


def test_embeddings_are_read_from_the_teachers_store(checkpoint: Path, tmp_path: Path) -> None:
    (model,) = endpoint(checkpoint, tmp_path).models
    teacher = model.predictor.encoder
    known_KD = teacher.embed_names(NAMES[:1])
    known = EmbeddingTable(("parasol",), known_KD, teacher.teacher, teacher.prompt_set)
    TextStore(str(tmp_path), teacher.teacher).import_table(known)
    with TestClient(build_api(endpoint(checkpoint, tmp_path))) as client:
        answers = [detect(client, vocabulary=json.dumps([name])).json() for name in (NAMES[0], "parasol")]
        assert [entry["score"] for entry in answers[0]["detections"]] == [
            entry["score"] for entry in answers[1]["detections"]
        ]
        assert {entry["label"] for entry in answers[1]["detections"]} == {"parasol"}
    (without,) = endpoint(checkpoint, tmp_path, texts=False).models
    with pytest.raises(InputError, match="parasol"):
        without.predictor.encoder.embed_names(["parasol"])


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Segmenter]]:
    folder = save_segmenter(tmp_path_factory.mktemp("segmenter"))
    with TestClient(build_api(endpoint(folder, folder / "storage"))) as client:
        yield client, ovd_models.load_segmenter(folder)


def segment(client: httpx.Client, prompts: object, **fields: Any) -> httpx.Response:
    files = {"image": ("picture.png", encoded(Image.open(io.BytesIO(picture())), "PNG"), "image/png")}
    text = prompts if isinstance(prompts, str) else json.dumps(prompts)
    return client.post("/v1/segment", files=files, data={"prompts": text, **fields})


def test_prompts_are_segmented_and_named(segmenting: tuple[TestClient, Segmenter]) -> None:
    client, segmenter = segmenting
    assert client.get("/v1/model").json()["method"] == "ovsam"
    assert set(client.get("/openapi.json").json()["paths"]) == {
        *("/healthz", "/v1/model", "/v1/models", "/v1/vocabularies"),
        *("/v1/segment", "/v1/everything"),
    }
    pixels = Image.open(io.BytesIO(picture()))
    for given in ({"points": [[40, 30], [90, 60]]}, {"boxes": [[10, 5, 60, 50]]}):
        answer = segment(client, given, vocabulary=json.dumps(["anchor", "snowman"]))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["width"], found["height"]) == (96, 64)
        expected = segmenter.segment(pixels, Prompts.create(**given), ["anchor", "snowman"]).to_list()
        assert [entry["mask"] for entry in found["segments"]] == [entry["mask"] for entry in expected]
        assert [entry["label"] for entry in found["segments"]] == [entry["label"] for entry in expected]
        assert [entry["score"] for entry in found["segments"]] == pytest.approx([entry["score"] for entry in expected])


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("points", "not JSON"),
        ("[1]", "an object of points"),
        ({"point": [[1, 1]]}, "an object of points"),
        ({}, "empty"),
        ({"points": [[1]]}, "points[0]"),
        ({"points": [["a", 1]]}, "points[0]"),
        ('{"points": [[NaN, 1]]}', "lies outside"),
        ({"points": [[96, 1]]}, "lies outside the image of 96 x 64"),
        ({"boxes": [[5, 5, 5, 9]]}, "boxes[0]"),
        ({"points": [[1, 1]], "point_labels": [[0]]}, "none is on the object"),
        ({"boxes": [[1, 1, 9, 9]] * 33}, "at most 32"),
        ({"points": [[1, 1]] * 3_000}, "at most 10,000"),
        ({"points": [[[1, 1]] * 33, [[1, 1]]]}, "33 points in one, at most 32"),
    ],
)
def test_bad_prompts_are_refused(segmenting: tuple[TestClient, Segmenter], prompts: object, expected: str) -> None:
    assert expected in problem(segment(segmenting[0], prompts), 422)


def test_a_segmenters_names_and_images_are_checked_too(segmenting: tuple[TestClient, Segmenter]) -> None:
    client = segmenting[0]
    assert "zebra" in problem(segment(client, {"points": [[1, 1]]}, vocabulary='["zebra"]'), 422)
    files = {"image": ("picture.png", b"<html>", "image/png")}
    problem(client.post("/v1/segment", files=files, data={"prompts": '{"points": [[1, 1]]}'}), 415)
    large = {"image": ("picture.png", encoded(Image.new("RGB", (2_000, 1_500)), "PNG"), "image/png")}
    answer = client.post("/v1/segment", files=large, data={"prompts": '{"points": [[1, 1], [2, 2], [3, 3]]}'})
    assert "3 masks of the image have 9,000,000 pixels, at most 8,000,000" in problem(answer, 422)
    problem(client.post("/v1/detect", files=files), 404)


def test_a_checkpoint_without_a_route_is_refused(tmp_path: Path) -> None:
    save_checkpoint(SamModel(SamConfig(depth=1, global_blocks=())), None, tmp_path, splits={}, run={})
    with pytest.raises(InputError, match="a checkpoint of method 'sam', expected one of codet, vild, ovsam"):
        serve.check(serve.Run(model=str(tmp_path)))


def test_a_disconnected_client_frees_its_place(checkpoint: Path, tmp_path: Path) -> None:
    opened = endpoint(checkpoint, tmp_path)
    api = build_api(opened)
    scope = {"type": "http", "method": "POST", "path": "/v1/detect", "raw_path": b"/v1/detect", "query_string": b""}
    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    async def send_requests() -> None:
        for _ in range(opened.limits.max_queued + 5):
            await api({**scope, "headers": headers}, receive, send)

    asyncio.run(send_requests())
    assert not [message for message in messages if message.get("status") == 503]


def test_checkpoint_is_found_by_folder_uri_or_registered_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking.run(str(tmp_path), experiment="codet", name="smoke", params={}) as tracked:
        registry.register(tracked, checkpoint, method="codet", data_set="x", metric="ap50_novel", value=0.5)
    for model in (str(checkpoint), checkpoint.as_uri(), "models:/ovd-codet-x@champion"):
        folder = models.local_model(model, str(tmp_path))
        assert (folder / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_builder_reads_command_line_arguments(checkpoint: Path) -> None:
    assert serve.app({"model": str(checkpoint), "replicas": "2"})
    for arguments, expected in (
        ({"modle": "x"}, "modle: unknown argument, .*; did you mean model?"),
        ({"model": str(checkpoint), "replicas": "two"}, "replicas=two: "),
        ({}, "--model: missing"),
        ({"model": "nothing"}, "nothing: "),
    ):
        with pytest.raises(serve.BadArgumentError, match=expected) as caught:
            serve.app(arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model"),
        (["--model", "nothing"], "nothing"),
        (["--model", "other"], "format 99"),
        (["--model", "models:/x@champion"], "models:/x@champion"),
        (["--config", "cloud"], "cloud"),
        (["--replicas", "0"], "--replicas 0: expected 1 or more"),
        (["--max-batch", "0"], "--max-batch 0: expected 1 or more"),
        (["--gpus", "-1"], "--gpus -1: expected 0 or more"),
        (["--threads", "-1"], "--threads -1: expected 0 or more"),
        (["--refresh-seconds", "-1"], "--refresh-seconds -1: expected 0 or more"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas 2: expected 0, or at least the 3 of --replicas"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"format": 99}')
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])
    with pytest.raises(InputError, match=expected) as caught:
        serve.main()
    assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_a_cluster_too_small_for_the_replicas_is_refused(checkpoint: Path, ray_cluster: None) -> None:
    expected = r"--replicas, --cpus and --gpus: 1 GPUs are needed, the cluster has at most 0 GPUs"
    with pytest.raises(InputError, match=expected), serve.serve_model(serve.Run(model=str(checkpoint), port=0, gpus=1)):
        pass


def test_taken_port_is_bad_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        serve.free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"--host ::1: IPv6"):
        serve.free_port("::1", 0)


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_script_serves_until_it_is_stopped_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, serve.__file__, "--model", str(checkpoint), "--port", "0"]
    # Without the ports and folders of this process's HAProxy.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    variables = inherited | {"TMPDIR": str(tmp_path)}
    script = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=variables
    )
    watchdog = threading.Timer(300, script.kill)  # a start takes long where other jobs fill the machine
    watchdog.start()
    try:
        assert script.stdout is not None
        assert script.stdout.readline() == f"config: local --model {checkpoint} --port 0\n"
        assert script.stdout.readline() == "starting Ray\n"
        assert script.stdout.readline() == f"loading {checkpoint} on CPUs\n"
        line = next((line for line in script.stdout if not line.startswith("loading: ")), "")  # how long it takes
        assert line.startswith("serving"), line or script.communicate()[1]
        url = line.split(" at ")[1].split(";")[0]
        with httpx.Client(base_url=url, timeout=60) as client:
            assert detect(client).status_code == 200
        script.terminate()
        output, errors = script.communicate()
        assert (script.returncode, output) == (0, "stopped\n"), errors
        deadline = time.monotonic() + 20
        while processes_of_session(script.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_of_session(script.pid) == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
        assert list(tmp_path.glob("ovd-*")) == []
        assert not Path(f"/tmp/ovd-haproxy-{script.pid}").exists()
    finally:
        watchdog.cancel()
        for pid in processes_of_session(script.pid):
            os.kill(pid, signal.SIGKILL)
