"""A real `mlflow server`: `pytest -m slow tests/workflows/common/test_tracking_server.py`."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from mlflow.tracking import MlflowClient

from workflows.common import outbox, registry, tracking

METRIC = "eval/ap50_novel"
START_SECONDS = 120


class Server:
    """An `mlflow server` on a database and a folder of artifacts that outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        stores = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        stores += ["--artifacts-destination", str(self.folder / "artifacts")]
        settings = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *stores], stdout=log, stderr=log, env=settings, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5)
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """End it and its workers at once."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def storage(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.5)
    return str(tmp_path)


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_a_run_goes_on_and_its_model_is_found_on_a_server(storage: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="a crash"),
        tracking.run(storage, experiment="server", name="codet x", params={"seed": 1}, key="codet/a") as first,
    ):
        first.log_metrics({METRIC: 0.4}, 5)
        raise ValueError("a crash")
    with tracking.run(storage, experiment="server", name="codet x", params={"seed": 1}, key="codet/a") as tracked:
        tracked.log_metrics({METRIC: 0.5}, 10)
        tracked.describe("text")
        folder = checkpoint(tmp_path / "model")
        registry.register(tracked, folder, method="codet", data_set="server", metric=METRIC, value=0.5)
    assert tracked.run_id == first.run_id
    run = MlflowClient(tracked.uri).get_run(tracked.run_id)
    assert (run.info.status, run.data.tags["mlflow.note.content"]) == ("FINISHED", "text")
    history = tracking.metric_history(tracked.uri, tracked.run_id, "eval/")
    assert history == {METRIC: [(5, 0.4), (10, 0.5)]}
    model = registry.model_folder("models:/ovd-codet-server@champion", storage)
    assert (model / "model.json").read_text() == "{}"


@pytest.mark.slow
def test_a_run_outlives_its_server(
    server: Server, storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    with tracking.run(storage, experiment="outage", name="codet x", params={}) as tracked:
        logger = tracked.logger()
        logger.log({"train/total_loss": 2.0}, 5)
        logger.flush(wait=True)
        server.kill()
        started = time.monotonic()
        logger.log({"train/total_loss": 1.0}, 10)
        logger.log_image(PIL.Image.new("RGB", (4, 4)), "scene", 10)
        logger.flush()
        assert time.monotonic() - started < 1  # the loop does not wait
        tracked.log_metrics({METRIC: 0.5}, 10)
        tracked.log_table({"name": ["anchor"]}, "eval/per_class.json")
        folder = checkpoint(tmp_path / "model")
        tracked.outbox.send(
            lambda: registry.register(tracked, folder, method="vild", data_set="x", metric=METRIC, value=0.5)
        )
        server.start()
        logger.flush(wait=True)
    assert "is away" not in capsys.readouterr().out
    assert not caplog.records
    client = MlflowClient(server.uri)
    assert client.get_run(tracked.run_id).info.status == "FINISHED"
    history = tracking.metric_history(server.uri, tracked.run_id, "")
    assert history == {METRIC: [(10, 0.5)], "train/total_loss": [(5, 2.0), (10, 1.0)]}
    assert {entry.path for entry in client.list_artifacts(tracked.run_id)} >= {"eval", "images"}
    assert registry.model_folder("models:/ovd-vild-x@champion", storage).is_dir()
