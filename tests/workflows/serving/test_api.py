import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from serving import (
    LIMITS,
    NAMES,
    encoded,
    endpoint,
    picture,
    post,
    problem,
    save_classifier,
    save_detector,
    save_detector_of_any_name,
    save_segmenter,
    save_text_segmenter,
)
from starlette.testclient import TestClient
from torchvision.ops import nms

import ovd_models
from ovd_models.batches import TensorRecord
from ovd_models.checkpoint_info import write_calibration
from ovd_models.detectors.masks import with_masks
from ovd_models.segments import Prompts
from ovd_models.vild.model import ViLD, ViLDConfig
from workflows.serving import opening
from workflows.serving.api import WEB, Endpoint, build_api
from workflows.serving.deployment import Replica, digest_of_token
from workflows.serving.metrics import DIRECTORY
from workflows.serving.worker import Job


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "boxes": save_detector(root / "boxes"),
        "words": save_detector_of_any_name(root / "words"),
        "pointer": save_segmenter(root / "pointer"),
        "masks": save_text_segmenter(root / "masks"),
        "clip": save_classifier(root / "clip"),
    }


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    models = ",".join(f"{name}={folder}" for name, folder in folders.items())
    return endpoint(models, tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def client(opened: Endpoint) -> Iterator[TestClient]:
    with TestClient(build_api(opened)) as client:
        yield client


def test_several_models_answer_by_name(client: TestClient, folders: dict[str, Path]) -> None:
    listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert list(listed) == list(folders)
    assert listed["pointer"]["routes"] == ["/v1/segment", "/v1/everything"]
    digests = {post(client, "detect", model=name).headers["x-model-digest"] for name in ("boxes", "words")}
    assert digests == {listed["boxes"]["digest"], listed["words"]["digest"]}
    assert client.get("/v1/model", params={"name": "clip"}).json()["method"] == "clip"
    assert "'clip' does not answer /v1/detect, but /v1/classify" in problem(post(client, "detect", model="clip"), 422)
    assert "expected one of boxes, words" in problem(post(client, "detect", model="nobody"), 422)
    problem(client.get("/v1/model", params={"name": "nobody"}), 422)


def test_detections_score_above_the_checkpoints_own_threshold_by_default(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, image = tmp_path / "calibrated", picture()
    shutil.copytree(folders["boxes"], folder)
    scores = [entry.score for entry in ovd_models.load(folder).detect(image, score_threshold=0.0)]
    middle = sorted(scores)[len(scores) // 2]
    write_calibration(folder, middle, "t")
    own = ovd_models.load(folder).info.score_threshold
    with TestClient(build_api(endpoint(str(folder), tmp_path))) as client:
        assert client.get("/v1/model").json()["score_threshold"] == own
        found = [entry["score"] for entry in post(client, "detect", image).json()["detections"]]
        lower = post(client, "detect", image, score_threshold="0").json()["detections"]
    assert 0 < len(found) < len(lower)
    assert found == pytest.approx(sorted((score for score in scores if score > own), reverse=True), abs=1e-4)


def test_each_route_answers_as_the_python_call(client: TestClient, folders: dict[str, Path]) -> None:
    image = picture()
    found = post(client, "detect", image, model="boxes", score_threshold="0.1").json()
    expected = ovd_models.load(folders["boxes"]).detect(image, score_threshold=0.1).to_list()
    assert [entry["label"] for entry in found["detections"]] == [entry["label"] for entry in expected]
    assert found["detections"][0]["box"] == pytest.approx(expected[0]["box"], abs=1e-3)
    segmenter = ovd_models.load_segmenter(folders["pointer"])
    segments = post(client, "segment", image, prompts='{"points": [[40, 30]]}').json()["segments"]
    assert segments[0]["mask"] == segmenter.segment(image, Prompts.create(points=[[40, 30]])).to_list()[0]["mask"]
    everything = post(client, "everything", image, points_per_side="4")
    assert everything.status_code == 200, everything.text
    assert bool(everything.json()["note"]) == (not everything.json()["segments"])
    lower = post(client, "everything", image, points_per_side="4", min_iou="0.125", min_stability="0.5").json()
    assert lower["segments"] or "a predicted IoU of 0.125 or more" in lower["note"]
    assert post(client, "everything", image, min_iou="2").status_code == 422
    by_name = post(client, "text-to-mask", image, vocabulary='["anchor", "snowman"]').json()
    masks = by_name["segments"]
    empty = [entry["label"] for entry in masks if not any(entry["box"])]
    assert by_name["note"] == (f"no mask for {', '.join(empty)}" if empty else "")
    assert [entry["label"] for entry in masks] == ["anchor", "snowman"]
    assert masks[0]["mask"]["size"] == [64, 96]
    labels = post(client, "classify", image, vocabulary=json.dumps(["cat", "dog", "tree"]), top="2").json()["labels"]
    best = ovd_models.load_classifier(folders["clip"]).classify(image, ["cat", "dog", "tree"], top=2)
    assert [entry["label"] for entry in labels] == list(best.labels)
    assert [entry["score"] for entry in labels] == pytest.approx(best.scores, abs=1e-5)
    assert "has no default vocabulary" in problem(post(client, "classify", image), 422)


def test_distinct_objects_are_chosen_before_the_limit(client: TestClient) -> None:
    names = json.dumps([f"name {row}" for row in range(LIMITS.max_names)])
    fields = {"model": "words", "vocabulary": names, "score_threshold": "0.05"}
    pairs = post(client, "detect", **fields).json()["detections"]
    objects = post(client, "detect", distinct="true", **fields).json()["detections"]
    boxes, limited = (torch.tensor([entry["box"] for entry in found]) for found in (objects, pairs))
    assert len(nms(boxes, torch.ones(len(boxes)), 0.5)) == len(boxes)
    assert len(nms(limited, torch.tensor([entry["score"] for entry in pairs]), 0.5)) < len(boxes)
    assert len(pairs) == 100
    assert objects[0] == pairs[0]


def test_a_raw_body_takes_its_fields_from_the_query(client: TestClient) -> None:
    fields = {"vocabulary": '["anchor"]', "score_threshold": "0.1", "max_detections": "3"}
    as_form = post(client, "detect", **fields).json()
    for media in ("image/jpeg", "application/octet-stream"):
        raw = client.post("/v1/detect", params=fields, content=picture(), headers={"content-type": media})
        assert raw.json() == as_form
    problem(client.post("/v1/detect", content=picture(), headers={"content-type": "text/plain"}), 415)
    assert "treshold" in problem(post(client, "detect", treshold="0.1"), 422)
    assert "vocabulary" in problem(client.post("/v1/detect", files={"image": picture(), "vocabulary": b"[]"}), 422)


def test_another_vocabulary_or_click_on_a_seen_image_skips_the_encoder(
    opened: Endpoint, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, encoded_sizes = picture(seed=7), []
    encode = type(next(iter(opened.models))).encode

    def counted(self: Any, images: Any) -> Any:
        encoded_sizes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(type(next(iter(opened.models))), "encode", counted)
    for names in (["anchor"], ["snowman", "umbrella"]):
        assert post(client, "detect", image, vocabulary=json.dumps(names)).status_code == 200
    for point in ([10, 10], [50, 30]):
        assert post(client, "segment", image, prompts=json.dumps({"points": [point]})).status_code == 200
    assert encoded_sizes == [1, 1]  # once by the detector, once by the segmenter


def test_waiting_images_of_one_size_are_encoded_together_with_equal_answers(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = endpoint(folders["boxes"], tmp_path, limits=dataclasses.replace(LIMITS, max_queued=16))
    (model,) = opened.models
    sizes, encode = [], type(model).encode
    images = [picture(seed=seed) for seed in range(5)] + [picture(60, 90, seed=9)]
    detector = ovd_models.load(folders["boxes"])
    alone = [detector.detect(image, score_threshold=0.05).to_list() for image in images]

    def slow(self: Any, tensors: Any) -> Any:
        sizes.append([tuple(tensor.shape[1:]) for tensor in tensors])
        if len(sizes) == 1:
            while len(opened.worker._waiting) + len(tensors) < len(images):
                time.sleep(0.005)
        return encode(self, tensors)

    monkeypatch.setattr(type(model), "encode", slow)
    with TestClient(build_api(opened)) as client, ThreadPoolExecutor(6) as pool:
        low = partial(post, client, "detect", score_threshold="0.05")
        answers = list(pool.map(lambda image: low(image).json()["detections"], images))
    assert max(map(len, sizes)) > 1
    assert all(len(set(batch)) == 1 for batch in sizes)
    for answer, expected in zip(answers, alone, strict=True):
        assert [entry["label"] for entry in answer] == [entry["label"] for entry in expected]
        assert [entry["score"] for entry in answer] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)


def test_a_cached_image_keeps_no_more_memory_than_is_counted(opened: Endpoint) -> None:
    for model in opened.models:
        images = [model.read(Image.open(io.BytesIO(picture(seed=seed)))) for seed in range(20, 24)]
        jobs = [Job(model, (model.digest, str(row)), image, None, lambda _: None) for row, image in enumerate(images)]
        with torch.inference_mode():
            opened.worker._encode(jobs)
        for job in jobs:
            encoded, size = opened.worker.images._entries[job.key]
            kept = sum({part.data_ptr(): part.nbytes() for part in storages(encoded)}.values())
            assert kept <= size, model.name


def test_a_long_answer_is_healthy_and_one_that_never_ends_is_not(folders: dict[str, Path], tmp_path: Path) -> None:
    replica: Any = Replica.__new__(Replica)
    replica.opening, replica.endpoint = opening, endpoint(folders["boxes"], tmp_path)
    replica.settings = SimpleNamespace(limits=dataclasses.replace(LIMITS, answer_seconds=1.0))
    worker, (model,) = replica.endpoint.worker, replica.endpoint.models
    begun, ended = threading.Event(), threading.Event()

    def answer(_: Any) -> None:
        begun.set()
        ended.wait(60)

    future = worker.submit(Job(model, ("", ""), None, None, answer))
    begun.wait(60)
    worker.last_done -= 60
    replica.check_health()
    time.sleep(1.1)
    with pytest.raises(RuntimeError, match="for more than 1 seconds"):
        replica.check_health()
    ended.set()
    future.result(60)
    replica.check_health()


def test_health_is_probed_while_requests_fail(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = endpoint(folders["boxes"], tmp_path)
    (model,), before = opened.models, opened.worker.last_done
    failing = opened.worker.submit(Job(model, ("", ""), None, None, lambda _: 1 / 0))
    assert isinstance(failing.exception(60), ZeroDivisionError)
    assert opened.worker.last_done == before


def storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage()
    for entry in vars(value).values() if isinstance(value, TensorRecord) else value if type(value) is tuple else ():
        yield from storages(entry)


def test_masks_are_made_for_those_who_want_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ViLDConfig()
    config = dataclasses.replace(config, detector=dataclasses.replace(config.detector, masks=True))
    folder, made = save_detector_of_any_name(tmp_path / "vild", ViLD(config)), []

    def counted(found: Any, logits: Any) -> Any:
        made.append(len(found))
        return with_masks(found, logits)

    monkeypatch.setattr("ovd_models.vild.model.with_masks", counted)
    fields = {"vocabulary": '["anchor", "cat"]', "score_threshold": "0"}
    with TestClient(build_api(endpoint(folder, tmp_path))) as client:
        plain = post(client, "detect", **fields).json()["detections"]
        assert made == []
        masked = post(client, "detect", masks="true", **fields).json()["detections"]
    assert made == [1]
    assert all("mask" in entry for entry in masked)
    assert plain == [{key: value for key, value in entry.items() if key != "mask"} for entry in masked]


def test_a_name_with_an_attribute_is_embedded_once(tmp_path: Path) -> None:
    folder = save_detector_of_any_name(tmp_path / "vild", ViLD(ViLDConfig()))
    opened, image, words = endpoint(folder, tmp_path), picture(), ["red", "blue"]
    with TestClient(build_api(opened)) as client:
        for names, computed in ((["anchor", "cat"], 2 + 4), (["cat", "anchor"], 6), (["cat"], 6), (["dog"], 6 + 3)):
            fields = {"vocabulary": json.dumps(names), "attributes": json.dumps(words), "score_threshold": "0"}
            found = post(client, "detect", image, **fields).json()["detections"]
            assert opened.texts.computed == computed
    expected = ovd_models.load(folder).detect(image, names, attributes=words, score_threshold=0.0).to_list()
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


def test_a_name_is_embedded_once(opened: Endpoint, client: TestClient) -> None:
    before = opened.texts.computed
    for names in (["a blue door", "zebra"], ["zebra"], ["zebra", "a blue door", "quay"]):
        assert post(client, "detect", model="words", vocabulary=json.dumps(names)).status_code == 200
    assert opened.texts.computed - before == 3
    fields = {"model": "words", "vocabulary": '["zebra"]'}
    assert post(client, "detect", **fields, prompt_set="a drawing of {a}|{name}").status_code == 200
    assert opened.texts.computed - before == 4  # another prompt set is another embedding
    assert "prompt" in problem(post(client, "detect", **fields, prompt_set="no field"), 422)


def test_names_that_take_too_long_are_given_up_and_go_on_at_the_next_try(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = endpoint(folders["words"], tmp_path, limits=dataclasses.replace(LIMITS, answer_seconds=1.0))
    (model,) = opened.models
    embed = type(model.predictor.encoder.encoder).embed_captions

    def slow(self: Any, captions: Any) -> Any:
        time.sleep(0.4)
        return embed(self, captions)

    names = [f"thing {number}" for number in range(20)]
    fields = {"vocabulary": json.dumps(names), "prompt_set": "|".join(["a {name}"] * 100)}  # five names at a time
    with TestClient(build_api(opened)) as client:
        assert post(client, "detect").status_code == 200
        monkeypatch.setattr(type(model.predictor.encoder.encoder), "embed_captions", slow)
        before = opened.texts.computed
        assert "took too long" in problem(post(client, "detect", **fields), 503)
        time.sleep(1.5)
        assert 0 < opened.texts.computed - before < 20
        statuses = {post(client, "detect", **fields).status_code for _ in range(5)}  # each embeds some
    assert 200 in statuses
    assert opened.texts.computed - before == 20


def test_names_have_synonyms_and_base_flags(client: TestClient) -> None:
    entry = {"name": "sofa", "synonyms": ["couch", "settee"], "base": True}
    for merge in ("mean", "max"):
        answer = post(
            client, "detect", model="words", vocabulary=json.dumps([entry, "zebra"]), merge=merge, score_threshold="0"
        )
        assert {found["label"] for found in answer.json()["detections"]} <= {"sofa", "zebra"}
    wrong = [{"name": "sofa", "synonyms": "couch"}, {"name": 1}, {"nam": "x"}, {"name": "x", "base": 1}]
    for broken in wrong:
        assert "entry 0" in problem(post(client, "detect", vocabulary=json.dumps([broken])), 422)


def test_a_vocabulary_is_stored_once_and_named_by_its_digest(
    folders: dict[str, Path], tmp_path: Path, client: TestClient
) -> None:
    stored = client.put("/v1/vocabularies", json=["anchor", "snowman"])
    assert stored.status_code == 200, stored.text
    digest = stored.json()["id"]
    assert client.put("/v1/vocabularies", json=["anchor", "snowman"]).json()["id"] == digest
    for text in (digest, json.dumps(digest)):
        by_id = post(client, "detect", vocabulary=text)
        assert by_id.json() == post(client, "detect", vocabulary='["anchor", "snowman"]').json()
    assert "is not stored" in problem(post(client, "detect", vocabulary="0" * 32), 422)
    problem(client.put("/v1/vocabularies", content=b"\xff\xfe"), 422)
    problem(client.put("/v1/vocabularies", json={"a": 1}), 422)
    # Another replica reads the file; beyond the limit of three, the oldest goes.
    with TestClient(build_api(endpoint(folders["boxes"], tmp_path))) as first:
        ids = [first.put("/v1/vocabularies", json=[name]).json()["id"] for name in (*NAMES, "anchor ", "sun")]
        assert len(set(ids)) == 4
        with TestClient(build_api(endpoint(folders["boxes"], tmp_path))) as second:
            assert post(second, "detect", vocabulary=ids[1]).status_code == 200
        assert len(list((tmp_path / "vocabularies").iterdir())) == 3


def test_a_token_guards_everything_but_the_pages(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = endpoint(folders["boxes"], tmp_path)
    with TestClient(build_api(opened, digest_of_token("secret"))) as client:
        for path in ("/", "/docs", "/healthz", "/openapi.json", "/web/app.js"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            problem(post(client, "detect") if not headers else client.get("/v1/model", headers=headers), 401)
        assert client.get("/metrics").headers["www-authenticate"] == "Bearer"
        client.headers["Authorization"] = "Bearer secret"
        assert post(client, "detect").status_code == 200
        assert client.get("/metrics").status_code == 200


REPLICA = """
import os, sys
from workflows.serving.metrics import Metrics
metrics = Metrics()
metrics.cache_bytes.labels("images").set(5)
if os.fork() == 0:  # a replica that dies
    again = Metrics()
    again.cache_bytes.labels("images").set(7)
    os._exit(0)
os.wait()
print(metrics.page().decode())
"""


def test_caches_of_replicas_that_died_are_not_counted(tmp_path: Path) -> None:
    variables = {**os.environ, DIRECTORY: str(tmp_path / "metrics")}
    shown = subprocess.run(
        [sys.executable, "-c", REPLICA], env=variables, cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert 'ovd_cache_bytes{cache="images"} 5.0' in shown.stdout.splitlines(), shown.stderr


def test_the_last_replica_of_a_machine_removes_the_shared_metrics(tmp_path: Path) -> None:
    script = """if True:
        import os, sys
        from pathlib import Path
        from workflows.serving.metrics import DIRECTORY, Metrics, remove_if_last
        metrics = Metrics()
        if os.fork() == 0:
            Metrics()
            remove_if_last()
            os._exit(0)
        os.wait()
        print(Path(os.environ[DIRECTORY]).exists())
        remove_if_last()
        print(Path(os.environ[DIRECTORY]).exists())
    """
    variables = {**os.environ, DIRECTORY: str(tmp_path / "metrics")}
    shown = subprocess.run(
        [sys.executable, "-c", script], env=variables, cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert shown.stdout.split() == ["True", "False"], shown.stderr


def test_paths_that_clients_make_up_are_not_counted_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    with TestClient(build_api(endpoint(folders["boxes"], tmp_path), digest_of_token("secret"))) as client:
        problem(client.get("/v1/made-up"), 401)
        problem(post(client, "detect"), 401)
        page = client.get("/metrics", headers={"Authorization": "Bearer secret"}).text
    assert "made-up" not in page
    assert 'route="/v1/detect",status="401"' in page


def test_requests_of_other_sites_pages_are_refused(client: TestClient) -> None:
    client.headers["Sec-Fetch-Site"] = "cross-site"
    try:
        assert "another site" in problem(post(client, "detect"), 403)
    finally:
        del client.headers["Sec-Fetch-Site"]


def test_browsers_ask_for_each_file_of_the_page_again(client: TestClient) -> None:
    for path in ("/", "/docs", "/web/app.js", "/v1/models"):
        assert client.get(path).headers["cache-control"] == "no-cache"
    tag = client.get("/web/app.js").headers["etag"]
    assert client.get("/web/app.js", headers={"if-none-match": tag}).status_code == 304


def test_a_wrong_method_names_the_right_one(client: TestClient) -> None:
    assert client.get("/v1/detect").headers["allow"] == "POST"


def test_prompts_and_attributes_have_limits(client: TestClient) -> None:
    assert "more than 100 templates" in problem(post(client, "detect", prompt_set="|".join(["{a}"] * 101)), 422)


def test_metrics_count_stages_batches_and_hits_without_user_data(client: TestClient) -> None:
    post(client, "detect", vocabulary='["anchor"]')
    client.get("/v1/secret-path")
    page = client.get("/metrics").text
    for name in ('stage="decode"', 'stage="encode"', 'stage="queue"', 'stage="answer"', "ovd_batch_images_bucket"):
        assert name in page
    assert re.search(r'ovd_cache_total\{cache="images",result="hit"\} [1-9]', page)
    assert "anchor" not in page
    assert "secret" not in page


def test_requests_bear_an_id_and_are_logged_without_user_data(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ray.serve")
    given = post_with(client, {"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = post_with(client, {"x-request-id": 'bad"id'}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    (record,) = [entry for entry in caplog.records if getattr(entry, "request_id", "") == "abc-1"]
    logged = vars(record)
    assert logged["route"] == "/v1/detect"
    assert logged["status"] == 200
    assert logged["total_ms"] > logged["answer_ms"] > 0
    assert "anchor" not in str(logged)


def post_with(client: httpx.Client, headers: dict[str, str]) -> httpx.Response:
    files = {"image": ("a.jpg", picture(), "image/jpeg")}
    return client.post("/v1/detect", files=files, data={"vocabulary": '["anchor"]'}, headers=headers)


def test_pages_work_without_another_host_and_forbid_inline_scripts(client: TestClient) -> None:
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in page.text
        assert "style=" not in page.text
        for asset in re.findall(r'(?:src|href)="(/web/[^"]+)"', page.text):
            assert client.get(asset).status_code == 200
    for file in WEB.rglob("*.*"):
        if file.suffix in (".html", ".js", ".css"):
            assert re.findall(r"https?://(?!www\.w3\.org)", file.read_text()) == []
    for path in ("/web/../api.py", "/web/%2e%2e/api.py", "/web//etc/passwd"):
        assert client.get(path).status_code == 404
    assert "access-control-allow-origin" not in client.get("/v1/model", headers={"Origin": "http://evil"}).headers


def test_the_openapi_examples_run_as_they_stand(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    image = (WEB / "samples" / "scene-1.jpg").read_bytes()
    for path, verbs in paths.items():
        content = verbs.get("post", {}).get("requestBody", {}).get("content", {})
        if "multipart/form-data" not in content:
            continue
        properties = content["multipart/form-data"]["schema"]["properties"]
        examples = {name: field["examples"][0] for name, field in properties.items() if "examples" in field}
        if path != "/v1/classify":  # the others here know the names of a table alone
            examples["vocabulary"] = '["anchor"]'
        answer = client.post(path, files={"image": ("a.jpg", image, "image/jpeg")}, data=examples)
        assert answer.status_code == 200, (path, answer.text)


def test_all_masks_of_a_huge_image_are_refused_before_memory_is_taken(client: TestClient) -> None:
    large = encoded(Image.new("RGB", (2_000, 2_000)), "PNG")
    answer = post(client, "text-to-mask", large, vocabulary=json.dumps(NAMES))
    assert "3 masks of the image have 12,000,000 pixels" in problem(answer, 422)


def test_model_page_names_the_digest_of_all_weights(client: TestClient, folders: dict[str, Path]) -> None:
    described = client.get("/v1/model").json()
    assert described["checkpoint"] == str(folders["boxes"])
    digest = hashlib.sha256()
    paths = [path for path in folders["boxes"].rglob("*") if path.suffix in (".safetensors", ".json", ".txt", ".npy")]
    assert {path.parent.name for path in paths} >= {"text"}
    for path in sorted(paths):
        digest.update(path.relative_to(folders["boxes"]).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    assert described["digest"] == digest.hexdigest()[:16]
