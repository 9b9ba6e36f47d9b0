import time
from pathlib import Path

import pytest
from serving import endpoint, post, save_detector
from starlette.testclient import TestClient

from workflows.common import registry, tracking
from workflows.serving.api import build_api


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
        # A version that cannot be loaded leaves the old one in place.
        broken = save_detector(tmp_path / "broken", seed=2)
        (broken / "model.safetensors").write_bytes(b"broken")
        register(broken, tmp_path, 0.3)
        time.sleep(1)
        assert client.get("/v1/model").json()["version"] == "2"
        assert post(client, "detect").status_code == 200
        opened.models.close()
