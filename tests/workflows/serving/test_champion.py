import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from serving import endpoint, post, save_detector
from starlette.testclient import TestClient

from ovd_models.checkpoint_info import folder_digest
from workflows.common import registry, tracking
from workflows.serving import models, opening
from workflows.serving.api import build_api
from workflows.serving.models import ServedModel, load_served
from workflows.serving.sources import check_models, resolve_version


def register(folder: Path, storage: Path, value: float) -> None:
    with tracking.run(str(storage), experiment="codet", name=f"run {value}", params={}) as tracked:
        registry.register(tracked, folder, method="codet", data_set="x", metric="ap50_novel", value=value)


def test_a_new_champion_is_taken_up_while_requests_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register(save_detector(tmp_path / "first"), tmp_path, 0.1)
    opened = endpoint("models:/ovd-codet-x@champion", tmp_path, refresh_seconds=0.2)
    with TestClient(build_api(opened)) as client:
        before = client.get("/v1/model").json()
        assert before["version"] == "1"
        assert len(before["run_id"]) == 32
        register(save_detector(tmp_path / "second", seed=1), tmp_path, 0.2)
        digests, deadline = [], time.monotonic() + 30
        while client.get("/v1/model").json()["version"] == "1":
            assert time.monotonic() < deadline
            answer = post(client, "detect")
            assert answer.status_code == 200
            digests.append(answer.headers["x-model-digest"])
        after = client.get("/v1/model").json()
        assert post(client, "detect").headers["x-model-digest"] == after["digest"] != before["digest"]
        assert set(digests) <= {before["digest"], after["digest"]}
    opened.models.close()


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register(save_detector(tmp_path / "first"), tmp_path, 0.1)
    tries: list[float] = []
    outage = threading.Event()

    def load(*args: Any, **settings: Any) -> ServedModel:
        tries.append(time.monotonic())
        if outage.is_set():
            raise OSError("no route to host")
        return load_served(*args, **settings)

    monkeypatch.setattr(opening, "load_served", load)
    opened = endpoint("models:/ovd-codet-x@champion", tmp_path, refresh_seconds=0.1)
    outage.set()
    register(save_detector(tmp_path / "second", seed=1), tmp_path, 0.2)
    with TestClient(build_api(opened)) as client:
        wait_for(lambda: len(tries) > 5)
        pauses = [later - earlier for earlier, later in pairwise(tries[1:])]
        assert all(pause > 0.09 * 2**number for number, pause in enumerate(pauses)), pauses
        assert client.get("/v1/model").json()["version"] == "1"
        assert post(client, "detect").status_code == 200
        outage.clear()
        wait_for(lambda: client.get("/v1/model").json()["version"] == "2")
    opened.models.close()


def test_a_downloaded_model_is_deleted_once_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register(save_detector(tmp_path / "first"), tmp_path, 0.1)
    monkeypatch.setattr(registry, "is_local_uri", lambda *_, **__: False)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    check_models("models:/ovd-codet-x@champion", str(tmp_path))
    opened = endpoint("models:/ovd-codet-x@champion", tmp_path)
    assert list(temporary.glob("ovd-*")) == []
    with TestClient(build_api(opened)) as client:
        assert post(client, "detect").status_code == 200


def test_a_model_is_of_the_version_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, first = "models:/ovd-codet-x@champion", save_detector(tmp_path / "first")
    register(first, tmp_path, 0.1)
    found = resolve_version(uri, str(tmp_path))
    register(save_detector(tmp_path / "second", seed=1), tmp_path, 0.2)  # the alias moves after it was looked up
    monkeypatch.setattr(models, "resolve_version", lambda *_: found)
    model = load_served("", uri, str(tmp_path), texts=False, device="cpu")
    assert (model.version, model.digest) == ("1", folder_digest(first))


def wait_for(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
