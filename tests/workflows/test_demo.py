import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep import locks, tables
from ovd_models.errors import InputError
from workflows import demo

SCRIPT = Path(demo.__file__)
CHROMIUM = Path("/usr/bin/chromium")
STAGES = ["web site", "pairs", "boxes", "clip", "codet", "serve", "report"]


def test_only_the_demos_own_folder_is_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo.empty_folder(folder)
    (folder / "old").mkdir()
    demo.empty_folder(folder)
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(InputError, match="mine: not empty and not of an earlier demo, expected another --storage"):
        demo.empty_folder(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_demo_does_not_empty_the_folder_of_a_running_one(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo.empty_folder(folder)
    (folder / "results").touch()
    with locks.hold(str(tmp_path), "demo/demo"):
        second = start(folder, uuid.uuid4().hex)
        output, _ = second.communicate(timeout=100)
    assert second.returncode == 2
    assert output.endswith("expected one job of a name at a time\n")
    assert (folder / "results").exists()


def test_stages_are_timed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.04, 10.0, 10.5])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    seconds: dict[str, float] = {}
    for name in ("b", "a"):
        with demo.time_stage(name, seconds):
            pass
    assert list(seconds.items()) == [("b", 2.0), ("a", 0.5)]


def processes_with(mark: str) -> list[str]:
    """Command lines of the processes that inherited a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return [line for line in found if line]  # zombies have no command line


def left_behind(mark: str, seconds: float = 15) -> list[str]:
    """Processes that still run some seconds after the end; Ray's last helpers need a moment."""
    deadline = time.monotonic() + seconds
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.3)
    return processes_with(mark)


def start(storage: Path, mark: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-u", str(SCRIPT), "--config", "smoke", "--storage", str(storage)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**environment, "OVD_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@dataclass(frozen=True)
class FinishedDemo:
    folder: Path
    output: str
    seconds: float
    left: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedDemo]:
    folder, mark, began = tmp_path_factory.mktemp("demo") / "run", uuid.uuid4().hex, time.monotonic()
    with start(folder, mark) as job:
        output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    yield FinishedDemo(folder, output, time.monotonic() - began, left_behind(mark))


@pytest.mark.slow
def test_the_demo_leaves_no_process_behind(finished: FinishedDemo) -> None:
    assert finished.left == []


@pytest.mark.slow
def test_the_summary_has_all_figures(finished: FinishedDemo) -> None:
    summary = finished.summary
    assert set(summary) == {
        *("seconds", "stage_seconds", "pairs", "clip", "box_supervised", "codet", "detect_ms", "report"),
        *("mlflow_uri", "mlflow_experiment"),
    }
    assert list(summary["stage_seconds"]) == STAGES
    assert set(summary["pairs"]) == {"input", "kept", "rejected"}
    assert summary["pairs"]["kept"] + sum(summary["pairs"]["rejected"].values()) == summary["pairs"]["input"]
    assert set(summary["clip"]) == {"top1_base", "top1_novel"}
    for stage in ("box_supervised", "codet"):
        assert set(summary[stage]) == {"ap50_base", "ap50_novel"}
        assert all(0 <= value <= 1 for value in summary[stage].values())
    assert sum(summary["stage_seconds"].values()) <= summary["seconds"] + 1 <= finished.seconds + 1
    assert summary["detect_ms"] > 0
    assert Path(summary["report"]) == finished.folder / "report.html"
    assert summary["mlflow_uri"] == f"sqlite:///{finished.folder}/mlflow.db"
    assert summary["mlflow_experiment"] == "1"  # as in README's link


@pytest.mark.slow
def test_the_console_shows_the_table_and_where_to_look(finished: FinishedDemo) -> None:
    for wanted in ("AP50", "+ captions (CoDet)", "report.html", "mlflow ui --backend-store-uri", "serve.py --model"):
        assert wanted in finished.output
    ours = [
        line for line in finished.output.splitlines() if not re.match(r"(\x1b\[\d+m)?\(", line)
    ]  # "(actor pid=7) ..." is Ray's
    assert not [line for line in ours if "Traceback" in line]


@pytest.mark.slow
def test_the_demo_publishes_tables_and_a_checkpoint(finished: FinishedDemo) -> None:
    for table in ("pairs", "rejects", "concepts", "groups"):
        assert tables.find_manifest(str(finished.folder), table, "smoke") is not None
    assert (finished.folder / "codet/config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is absent")
def test_the_report_opens_in_a_browser(finished: FinishedDemo) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            problems: list[str] = []
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: problems.append(request.url) if "http" in request.url[:4] else None)
            page.goto((finished.folder / "report.html").as_uri())
            titles = page.locator("h2").all_inner_texts()
            broken = page.eval_on_selector_all("img", "all => all.filter(one => !one.naturalWidth).length")
            images = page.locator("img").count()
            wide = page.evaluate("document.documentElement.scrollWidth")
            text = page.inner_text("body")
        finally:
            browser.close()
    assert problems == []  # the page fetches nothing
    assert titles == [
        *("The world", "The crawl", "Concept groups", "Training", "Before and after captions", "Over HTTP", "Time")
    ]
    assert (broken, wide) == (0, 1200)
    assert images > 25
    assert all(reason in text for reason in finished.summary["pairs"]["rejected"])
    assert f"{finished.summary['codet']['ap50_base']:.3f}" in text


def write_every_page(finished: FinishedDemo) -> list[Path]:
    """The pages of all scripts that write one, about the demo's models and tables."""
    root = finished.folder
    (clip,) = (root / "runs/clip").glob("*/model")
    model, boxes = str(root / "codet"), ("--boxes", "smoke-eval")
    pictures, annotated = root / "images/smoke-eval", root / "annotated"
    shutil.copytree(pictures, annotated / "images")
    files = sorted(path.name for path in pictures.iterdir())
    contents = {
        "images": [{"id": k, "file_name": name, "width": 128, "height": 128} for k, name in enumerate(files, 1)],
        "annotations": [
            {"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [9, 9, 60, 60], "area": 3600, "iscrowd": 0}
            for k in range(1, len(files) + 1)
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "hand"}],
    }
    (annotated / "instances.json").write_text(json.dumps(contents))
    for script, *flags in (
        ("predict", "--model", model, "--images", str(pictures), "--output", str(root / "reports/predictions")),
        ("failures", "--model", model, "--teacher", str(clip), *boxes, "--storage", str(root)),
        ("compare", "--runs", model, model, *boxes, "--storage", str(root)),
        ("classify", "--model", str(clip), *boxes, "--storage", str(root)),
        ("prepare_boxes", "--config", "coco", "--name", "own", "--data", str(annotated), "--storage", str(root)),
    ):
        command = [sys.executable, str(SCRIPT.with_name(f"{script}.py")), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return [root / "report.html", *(root / "reports").rglob("*.html")]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is absent")
def test_every_page_fits_a_phone_a_tablet_and_a_screen(finished: FinishedDemo) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    pages = write_every_page(finished)
    kinds = {re.split(r"[-.]", str(path.relative_to(finished.folder)).removeprefix("reports/"))[0] for path in pages}
    assert kinds == {"report", "eval", "pairs", "predictions/index", "failures", "compare", "classify", "boxes"}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        widths = {}
        for path in pages:
            for width in (390, 768, 1440):
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.goto(path.as_uri())
                widths[path.name, width] = page.evaluate("document.documentElement.scrollWidth")
                page.close()
        browser.close()
    assert {key: wide for key, wide in widths.items() if wide > key[1]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["== pairs", "== codet"])
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path, stage: str) -> None:
    mark = uuid.uuid4().hex
    with start(tmp_path / "run", mark) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if line.startswith(stage):
                break
        time.sleep(6)
        os.killpg(job.pid, signal.SIGINT)  # a terminal sends it to the whole foreground group
        rest, _ = job.communicate(timeout=60)
    # 130 is the script's; 1 if Ray's own threads fail first when its worker ends
    assert job.returncode in (130, 1), rest
    assert "Traceback" not in rest
    assert left_behind(mark) == []
