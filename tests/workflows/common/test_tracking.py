import dataclasses
import json
import multiprocessing
import os
import pickle
import shlex
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from data_prep import locks, tables
from ovd_models.errors import InputError
from workflows.common import outbox, registry, tracking

METRIC = "eval/ap50_novel"
MODEL = "ovd-codet-pictograms"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose database has its tables, which take MLflow seconds to create."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking._open(tracking.tracking_uri(str(folder)), str(folder), "empty")
    return folder


@pytest.fixture
def storage(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a store"
    folder.mkdir()
    with sqlite3.connect(template / "mlflow.db") as source, sqlite3.connect(folder / "mlflow.db") as target:
        source.backup(target)
    return str(folder)


def found(tracked: tracking.TrackedRun) -> Any:
    return MlflowClient(tracked.uri).get_run(tracked.run_id)


def checkpoint(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "model.json").write_text(content)
    return folder


def test_parameters_metrics_and_tags_come_back(storage: str) -> None:
    params = {"train.lr": 0.1, "names": "x" * 9000, **{f"p{i}": i for i in range(250)}}
    with tracking.run(storage, experiment="codet", name="smoke", params=params, tags={"pairs": "abc"}) as tracked:
        tracked.log_metrics({"train/loss": 2.0, "train/images_per_second": np.float32(7)}, step=1)
        tracked.log_metrics({"train/loss": 1.0}, step=2)
    run = found(tracked)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "smoke"
    assert len(run.data.params) == 252
    assert run.data.params["train.lr"] == "0.1"
    assert run.data.tags["pairs"] == "abc"
    history = MlflowClient(tracked.uri).get_metric_history(tracked.run_id, "train/loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.0), (2, 1.0)]


def test_commit_is_a_tag(storage: str) -> None:
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        pass
    tags = found(tracked).data.tags
    if tracking._git_tags():
        assert len(tags["mlflow.source.git.commit"]) == 40
        assert tags["git_dirty"] in ("true", "false")


def test_artifacts_lie_in_the_storage_and_not_in_the_working_directory(storage: str, tmp_path: Path) -> None:
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        tracked.log_image(PIL.Image.new("RGB", (4, 4)), "pictures/found")
        tracked.log_image(np.zeros((4, 4, 3), np.uint8), "scene", step=3)
        tracked.log_table({"name": ["anchor"], "ap50": [0.5]}, "per_class.json")
        tracked.log_text("<p>", "report.html")
    files = {path.name for path in (Path(storage) / "mlartifacts").rglob("*") if path.is_file()}
    assert {"found.jpg", "per_class.json", "report.html"} <= files
    assert any(name.startswith("scene+step+3+") for name in files)
    assert {path.name for path in tmp_path.iterdir()} == {"a store"}


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_status_says_how_the_run_ended(storage: str, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        raise error
    assert found(tracked).info.status == status


def write_from_worker(pickled: bytes) -> None:
    logger = pickle.loads(pickled)
    for step in range(1500):
        logger.log({"train/loss": 1 / (step + 1)}, step)
    logger.flush(wait=True)
    logger.log({"train/never_flushed": 1.0}, 0)


def test_worker_writes_through_a_pickled_logger(storage: str) -> None:
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        logger = tracked.logger()
        logger.log({"train/unsent": 1.0}, 0)
        with ProcessPoolExecutor(1) as pool:
            pool.submit(write_from_worker, pickle.dumps(logger)).result()
    run = found(tracked)
    assert set(run.data.metrics) == {"train/loss"}
    assert len(MlflowClient(tracked.uri).get_metric_history(tracked.run_id, "train/loss")) == 1500


def test_a_logger_without_metrics_opens_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    tracking.MetricLogger("", "").flush(wait=True)
    assert not list(tmp_path.iterdir())


def test_champion_moves_only_to_a_better_version(storage: str, tmp_path: Path) -> None:
    champions = []
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        for number, value in enumerate([0.5, 0.4, 0.5, 0.6, float("nan")]):
            folder = checkpoint(tmp_path / str(number), f"{number}: {value}")
            registry.register(tracked, folder, method="codet", data_set="pictograms", metric=METRIC, value=value)
            champions.append(tracked.client.get_model_version_by_alias(MODEL, "champion").version)
    assert champions == [1, 1, 1, 4, 4]
    assert (registry.model_folder(f"models:/{MODEL}@champion", storage) / "model.json").read_text() == "3: 0.6"
    assert (registry.model_folder(f"models:/{MODEL}/2", storage) / "model.json").read_text() == "1: 0.4"
    best = MlflowClient(tracked.uri).get_model_version_by_alias(MODEL, "champion")
    assert (best.tags["metric"], best.tags["value"]) == (METRIC, "0.6")


@pytest.mark.parametrize("lost", ["create_model_version", "set_logged_model_tags", "set_registered_model_alias"])
def test_a_repeated_registration_makes_no_second_version(
    lost: str, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.05)
    call, answers = getattr(MlflowClient, lost), iter([False])

    def lose_the_first_answer(*given: Any, **options: Any) -> Any:
        answer = call(*given, **options)
        if next(answers, True):
            return answer
        raise MlflowException("API request failed: connection reset")

    monkeypatch.setattr(MlflowClient, lost, lose_the_first_answer)
    folder = checkpoint(tmp_path / "model", "{}")
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        options: Any = {"method": "codet", "data_set": "pictograms", "metric": METRIC, "value": 0.5}
        tracked.outbox.send(lambda: registry.register(tracked, folder, **options))
    (version,) = tracked.client.search_model_versions(f"name = '{MODEL}'")
    assert tracked.client.get_model_version_by_alias(MODEL, "champion").version == version.version
    (output,) = found(tracked).outputs.model_outputs
    assert json.loads(tracked.client.get_logged_model(output.model_id).tags["mlflow.modelVersions"])


def test_an_outage_is_no_missing_champion(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def register(value: float) -> None:
        folder = checkpoint(tmp_path / str(value), str(value))
        registry.register(tracked, folder, method="codet", data_set="pictograms", metric=METRIC, value=value)

    def down(*given: object) -> None:
        raise MlflowException("the server is down", error_code=TEMPORARILY_UNAVAILABLE)

    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        register(0.5)
        with monkeypatch.context() as patch, pytest.raises(MlflowException, match="the server is down"):
            patch.setattr(MlflowClient, "get_model_version_by_alias", down)
            register(0.4)
    assert MlflowClient(tracked.uri).get_model_version_by_alias(MODEL, "champion").tags["value"] == "0.5"


def test_a_model_is_linked_to_its_run_and_metrics(storage: str, tmp_path: Path) -> None:
    with tracking.run(storage, experiment="pictograms", name="codet smoke", params={}) as tracked:
        tracked.log_metrics({METRIC: 0.4, "train/loss": 1.0}, step=5)
        tracked.log_metrics({METRIC: 0.5}, step=10)
        folder = checkpoint(tmp_path / "model", "{}")
        registry.register(tracked, folder, method="codet", data_set="pictograms", metric=METRIC, value=0.5)
    (output,) = found(tracked).outputs.model_outputs
    assert output.step == 10
    model = tracked.client.get_logged_model(output.model_id)
    assert (model.source_run_id, model.model_type, model.status) == (tracked.run_id, "codet", "READY")
    assert [(each.key, each.value, each.step) for each in model.metrics] == [(METRIC, 0.5, 10)]
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": MODEL, "version": 1}]
    assert tracked.client.get_model_version(MODEL, "1").run_id == tracked.run_id
    history = tracking.metric_history(tracked.uri, tracked.run_id, "eval/")
    assert history == {METRIC: [(5, 0.4), (10, 0.5)]}


def test_data_sets_are_inputs_with_their_digests(storage: str) -> None:
    schema = tables.SCHEMAS["concepts"]
    rows = pa.table([pa.array([], entry.type) for entry in schema], schema=schema)
    part = tables.write_part(storage, "concepts", "x", "part.parquet", rows)
    manifest = tables.publish(storage, "concepts", "x", [part], producer="test", config_hash="")
    with tracking.run(storage, experiment="x", name="smoke", params={}) as tracked:
        for _ in range(2):
            tracked.log_data_set(storage, "concepts", "x", "training")
    (entry,) = found(tracked).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("concepts/x", manifest.digest)
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize("uri", ["models:/", "models:/x", "models:/x@champion", "models:/x/1", "runs:/x/y"])
def test_unknown_model_is_bad_input(storage: str, uri: str) -> None:
    with pytest.raises(InputError, match=uri):
        registry.model_folder(uri, storage)


def test_model_lookup_creates_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=r"mlflow\.db does not exist"):
        registry.model_folder("models:/x@champion", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_remote_storage_needs_a_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        tracking.tracking_uri("gs://bucket/ovd")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_uri("gs://bucket/ovd") == "http://tracking:5000"


def test_tracking_uri_from_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking.tracking_uri(str(tmp_path)) == "http://tracking:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.tracking_uri(tmp_path.as_uri()) == f"sqlite:///{tmp_path}/mlflow.db"


def open_run(storage: str) -> None:
    with tracking.run(storage, experiment="codet", name="smoke", params={}):
        pass


@pytest.mark.slow
def test_first_runs_of_a_storage_may_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with ProcessPoolExecutor(4) as pool:
        for opened in [pool.submit(open_run, str(tmp_path)) for _ in range(4)]:
            opened.result()


def test_an_experiment_that_another_job_creates_meanwhile_is_used(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_run(storage)
    find, answers = MlflowClient.get_experiment_by_name, [None]
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda *given: answers.pop() if answers else find(*given)
    )
    open_run(storage)
    assert not answers
    client = MlflowClient(tracking.tracking_uri(storage))
    (experiment,) = (each for each in client.search_experiments() if each.name == "codet")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_deleted_experiment_is_one_line_that_says_how_to_restore_it(storage: str) -> None:
    open_run(storage)
    uri = tracking.tracking_uri(storage)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name("codet")
    assert found is not None
    client.delete_experiment(found.experiment_id)
    with pytest.raises(InputError, match="MLflow experiment 'codet': deleted, expected it back") as caught:
        open_run(storage)
    assert "\n" not in str(caught.value)
    command = str(caught.value).split("`")[1].replace(" mlflow ", f" {sys.executable} -m mlflow ")
    subprocess.run(command, shell=True, check=True)
    open_run(storage)


def start_and_die(storage: str) -> None:
    with tracking.run(storage, experiment="codet", name="killed", params={}):
        os.kill(os.getpid(), signal.SIGKILL)


def test_runs_of_killed_processes_end_with_the_next_one(storage: str) -> None:
    killed = [multiprocessing.Process(target=start_and_die, args=(storage,)) for _ in range(2)]
    for process in killed:
        process.start()
        process.join()
    with (
        tracking.run(storage, experiment="vild", name="alive", params={}) as alive,
        tracking.run(storage, experiment="codet", name="smoke", params={}),
    ):
        runs = alive.client.search_runs([each.experiment_id for each in alive.client.search_experiments()])
        assert sorted(run.info.status for run in runs if run.info.run_name == "killed") == ["KILLED", "KILLED"]
        assert found(alive).info.status == "RUNNING"


def hold_lock(storage: str, name: str, held: Event, ended: Event) -> None:
    with locks.hold(storage, name):
        held.set()
        ended.wait()


def test_a_training_of_another_machine_ends_if_nobody_holds_its_lock(storage: str) -> None:
    Path(storage, "runs/codet/a").mkdir(parents=True)
    held, ended = multiprocessing.Event(), multiprocessing.Event()
    holder = multiprocessing.Process(target=hold_lock, args=(storage, "runs/codet/a", held, ended))
    holder.start()
    held.wait()
    elsewhere = dataclasses.replace(locks.Holder.this_process(), machine="another boot")
    with tracking.run(storage, experiment="x", name="x", params={}) as tracked:
        client, experiment = tracked.client, found(tracked).info.experiment_id
        ids = {}
        for key in ("codet/a", "codet/on another storage"):
            ids[key] = client.create_run(experiment, tags={"process": elsewhere.to_json(), "run": key}).info.run_id
        tracking.end_dead_runs(client, storage)
        assert {client.get_run(each).info.status for each in ids.values()} == {"RUNNING"}
        ended.set()
        holder.join()
        tracking.end_dead_runs(client, storage)
        assert [client.get_run(each).info.status for each in ids.values()] == ["KILLED", "RUNNING"]
        assert found(tracked).info.status == "RUNNING"


def test_a_run_goes_on_in_the_run_of_its_key(storage: str) -> None:
    with (
        pytest.raises(ValueError),
        tracking.run(
            storage, experiment="codet", name="smoke", params={"seed": 1, "resume": ""}, key="codet/a"
        ) as first,
    ):
        first.log_metrics({"train/loss": 2.0}, step=5)
        raise ValueError
    assert found(first).info.status == "FAILED"
    with tracking.run(
        storage, experiment="codet", name="smoke", params={"seed": 1, "resume": "a", "new": 2}, key="codet/a"
    ) as second:
        second.log_metrics({"train/loss": 1.0}, step=10)
        assert found(second).info.status == "RUNNING"
    assert second.run_id == first.run_id
    run = found(second)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1", "resume": "", "new": "2"}
    assert tracking.metric_history(second.uri, second.run_id, "train/") == {"train/loss": [(5, 2.0), (10, 1.0)]}
    with tracking.run(storage, experiment="codet", name="smoke", params={}, key="codet/b") as other:
        assert other.run_id != first.run_id


def test_a_description_links_to_the_run_of_a_key_and_is_not_overwritten(storage: str) -> None:
    with tracking.run(storage, experiment="clip", name="clip smoke", params={}, key="clip/a") as teacher:
        pass
    with tracking.run(storage, experiment="codet", name="smoke", params={}) as tracked:
        link = tracked.link_to("clip/a")
        assert link.startswith("[clip smoke](#/experiments/")
        assert link.endswith(f"/runs/{teacher.run_id})")
        assert tracked.link_to("clip/b") == tracked.link_to("") == ""
        tracked.describe("first")
        tracked.describe("second")
    assert found(tracked).data.tags["mlflow.note.content"] == "first"


class Server:
    """MLflow's tracking, which can be away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = False
        for name in ("log_batch", "log_image", "log_text", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, self.unless_away(getattr(MlflowClient, name)))

    def unless_away(self, method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.is_away:
                raise MlflowException("API request failed: connection refused")
            return method(*arguments, **options)

        return call


@pytest.mark.parametrize("returns", [True, False])
def test_an_outage_ends_neither_a_loop_nor_a_run(
    returns: bool, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(outbox, "FILE_END_SECONDS", 1.0)
    server = Server(monkeypatch)
    with tracking.run(storage, experiment="x", name="smoke", params={}) as tracked:
        logger = tracked.logger()
        logger.log({"train/loss": 2.0}, 5)
        logger.flush(wait=True)
        server.is_away = True
        logger.log({"train/loss": 1.0}, 10)
        logger.log_image(PIL.Image.new("RGB", (4, 4)), "scene", 10)
        logger.flush()
        tracked.log_metrics({METRIC: 0.5}, 10)
        tracked.log_text("text", "a.txt")
        if not returns:
            logger.flush(wait=True)
            tracked.outbox.wait()
        server.is_away = False
        logger.flush(wait=True)
    printed = capsys.readouterr().out.splitlines()
    history = tracking.metric_history(tracked.uri, tracked.run_id, "")
    assert found(tracked).info.status == "FINISHED"
    if returns:
        assert history == {METRIC: [(10, 0.5)], "train/loss": [(5, 2.0), (10, 1.0)]}
        assert list(Path(storage).rglob("a.txt"))
        assert not printed
    else:
        assert history == {"train/loss": [(5, 2.0)]}
        assert [line.startswith(f"MLflow at {tracked.uri} is away: 2 results") for line in printed] == [True, True]


def test_the_way_to_the_runs_is_a_page_or_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.how_to_open("https://mlflow.example/", "7").startswith("https://mlflow.example/#/experiments/7?")
    monkeypatch.setenv("PATH", "")
    command, page = tracking.how_to_open("sqlite:////a b/mlflow.db", "7").split("   then ")
    program, *words = shlex.split(command)
    assert Path(program).is_file() and words == ["ui", "--backend-store-uri", "sqlite:////a b/mlflow.db"]
    assert page == "http://127.0.0.1:5000/#/experiments/7?workflowType=machine_learning"


def test_no_line_shows_the_password_of_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: str
) -> None:
    server = "http://me:s3cret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"http://\*\*\*@127.0.0.1:9: no MLflow tracking there") as refused:
        tracking.check_server(storage)
    with pytest.raises(InputError, match=r"not found in http://\*\*\*@127.0.0.1:9") as missing:
        registry.resolve_model(f"models:/{MODEL}@champion", storage)
    outgoing = tracking.open_outbox(server)
    monkeypatch.setattr(outgoing, "_patience", 0.1)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.02)
    outgoing.send(lambda: MlflowClient(server).search_experiments())
    outgoing.wait()
    away = capsys.readouterr().out
    assert "MLflow at http://***@127.0.0.1:9 is away: 1 results were not sent" in away
    shown = [tracking.how_to_open(f"postgresql://{login}@host/mlflow", "7") for login in ("me:s3cret", "s3cret")]
    assert "s3cret" not in " ".join([str(refused.value), str(missing.value), away, *shown])
