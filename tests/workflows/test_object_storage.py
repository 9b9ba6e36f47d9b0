"""Jobs whose storage is a bucket on a server with S3's API: data, trainings, evaluation, serving, wrong settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import object_storage
import pytest
from trainings import LAST, STAGES, largest_difference, weights_of

from data_prep import locks, storage, tables
from workflows.common import runs, teacher, training

ROOT = Path(__file__).parents[2]
STORE = "s3://bucket/ovd"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield variables


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "workflows" / script), "--storage", STORE, *flags]


def run(script: str, *flags: str, cwd: Path, expected: int = 0) -> str:
    """The output of a script that ends with an exit code; its errors if that is not 0."""
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == expected, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "PlacementGroupCleaner" not in line]  # other Rays here
    assert "Traceback" not in "\n".join(errors)
    return done.stderr if expected else done.stdout


def left_over(server: dict[str, str]) -> list[str]:
    """Temporary files, probes, locks and staged parts."""
    found = re.compile(r"\.tmp$|\.probe|/locks/|/staging/")
    return [key for key in object_storage.keys(server) if found.search(key)] + object_storage.unfinished(server)


def model_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("model: ")]
    return line.removeprefix("model: ")


def test_boxes_and_names_are_prepared_in_a_bucket(server: dict[str, str], tmp_path: Path) -> None:
    run("prepare_boxes.py", "--config", "smoke", cwd=tmp_path)
    assert tables.read_table(STORE, "boxes", "smoke-train").num_rows == 48
    model = teacher.untrained_teacher(STORE)
    assert "embedded" in run("embed_texts.py", "--model", model, "--boxes", "smoke", cwd=tmp_path)
    assert left_over(server) == []
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_and_a_second_job_end_with_2_and_one_line(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.hold(STORE, "boxes/smoke"):
        found = run("prepare_boxes.py", "--config", "smoke", cwd=tmp_path, expected=2)
    assert re.fullmatch(rf"error: boxes/smoke: being written by .*, pid {os.getpid()} of .*, expected one .*\n", found)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    found = run("prepare_boxes.py", "--config", "smoke", cwd=tmp_path, expected=2)
    assert time.monotonic() - started < 60  # most of it imports on a busy machine
    assert re.fullmatch(r"error: --storage s3://bucket/ovd: cannot be written \(Could not connect .*\n", found)


@pytest.mark.slow
@pytest.mark.parametrize("method", STAGES)
def test_a_smoke_training_reads_and_writes_a_bucket(method: str, server: dict[str, str], tmp_path: Path) -> None:
    model = model_of(run(f"{method}.py", "--config", "smoke", cwd=tmp_path))
    assert model.startswith(f"{STORE}/runs/{method}/smoke-")
    assert left_over(server) == []
    if method != "clip":
        assert "metrics, pictures" in run("evaluate.py", "--model", model, "--boxes", "smoke-eval", cwd=tmp_path)
    keys = object_storage.keys(server, "ovd/mlartifacts/")
    assert any(re.search(r"/smoke/models/m-\w+/artifacts/\w+\.json$", key) for key in keys), keys
    if method == "codet":
        check_serving(model, tmp_path)


def check_serving(model: str, cwd: Path) -> None:
    """Serve a model of a bucket and ask for its description."""
    process = subprocess.Popen(
        command("serve.py", "--model", model, "--port", "0"), stdout=subprocess.PIPE, text=True, cwd=cwd
    )
    try:
        assert process.stdout is not None
        (url,) = re.findall(r"at (http://\S+);", next(line for line in process.stdout if line.startswith("serving")))
        with urllib.request.urlopen(f"{url}/v1/model", timeout=60) as answer:
            assert json.load(answer)["method"] == "codet"
    finally:
        process.terminate()
        process.wait(timeout=120)


@pytest.mark.slow
def test_pairs_are_crawled_embedded_and_searched_in_a_bucket(server: dict[str, str], tmp_path: Path) -> None:
    assert "rows kept" in run("prepare_pairs.py", "--config", "smoke", cwd=tmp_path)
    assert "regions/smoke: " in run("embed.py", "--config", "smoke", cwd=tmp_path)
    assert f"sheet: {STORE}/reports/" in run("search.py", "--config", "smoke", cwd=tmp_path)
    assert left_over(server) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_training_resumes_from_a_bucket(workers: int, server: dict[str, str], tmp_path: Path) -> None:
    settings = {"steps": 10, "checkpoint-every": 5, "log-every": 1, "workers": workers, "max-failures": 0}
    flags = ["--config", "smoke"]
    for stage in STAGES["codet"]:
        for name, value in settings.items():
            flags += [f"--{stage.replace('_', '-')}.{name}", str(value)]
    whole = model_of(run("codet.py", *flags, cwd=tmp_path))
    first = whole.split("/")[-2]
    killed = subprocess.Popen(
        command("codet.py", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    try:
        while (name := runs.find_run(STORE, "codet", "smoke")) == first or not (
            training.committed_step(f"{STORE}/runs/codet/{name}/{LAST['codet']}")
        ):
            assert killed.poll() is None
            assert time.monotonic() < deadline
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    resumed = model_of(run("codet.py", *flags, "--resume", name, cwd=tmp_path))
    assert left_over(server) == []
    one, two = (weights_of(str(storage.local_folder(model))) for model in (whole, resumed))
    assert largest_difference(one, two) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["expired", "lost"])
@pytest.mark.parametrize("job", ["prepare_pairs.py", "prepare_pairs.py --crawlers 1", "clip.py", "codet.py"])
def test_a_job_that_loses_its_storage_ends_in_one_line_and_goes_on(
    job: str, fault: str, server: dict[str, str], tmp_path: Path
) -> None:
    """The key is deleted, or the bucket is, once the job has saved a part of the crawl or its first checkpoint."""
    key = object_storage.use_keys_only(server)
    script, *flags = job.split()
    flags += ["--config", "smoke"]
    if script == "clip.py":
        flags += ["--optimisation.steps", "60", "--optimisation.checkpoint-every", "5"]
    if script == "codet.py":
        flags += ["--box-stage.steps", "60", "--box-stage.checkpoint-every", "5"]
    running = subprocess.Popen(
        command(script, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, **key},
    )  # fmt: skip
    saved = r"/staging/pairs/.*/parts/" if script == "prepare_pairs.py" else r"/runs/.*checkpoint"
    deadline = time.monotonic() + 300
    while not any(re.search(saved, name) for name in object_storage.keys(key)):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.3)  # the server answers in this process
    if fault == "expired":
        object_storage.forget(key)
    else:
        object_storage.remove_bucket(key)
    printed, errors = running.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if not re.search(r"PlacementGroupCleaner|core_worker\.cc", line)]
    assert running.returncode == 1, printed + errors
    assert len(lines) == 1, errors
    (line,) = lines
    assert line.startswith("error: ") and "bucket" in line and "ovd/" in line
    assert re.search("Access Key Id|ACCESS_DENIED|Forbidden" if fault == "expired" else "bucket", line), line

    object_storage.post(server, "reset-auth", b"1e9")
    if fault == "lost":
        object_storage.client(server).create_bucket(Bucket=object_storage.BUCKET)
    else:
        names = [name.split("/") for name in object_storage.keys(server, "ovd/runs/")]
        for name in {parts[3] for parts in names if parts[2] == Path(script).stem}:
            flags += ["--resume", name]
    run(script, *flags, cwd=tmp_path)
    assert left_over(server) == []
