import json
import os
import re
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

from data_prep import tables
from ovd_models.errors import InputError
from workflows import demo

SCRIPT = Path(demo.__file__)
CHROMIUM = Path("/usr/bin/chromium")
STAGES = ["web site", "pairs", "boxes", "clip", "codet", "serve", "report"]


def test_only_the_demos_own_folder_is_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo.clear(folder)
    (folder / "old").mkdir()
    demo.clear(folder)
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(InputError, match="mine: not empty and not of an earlier demo, expected another --storage"):
        demo.clear(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_stopwatch_keeps_stages_in_order() -> None:
    watch = demo.Stopwatch()
    for name in ("b", "a"):
        with watch.stage(name):
            time.sleep(0.11)
    assert list(watch.seconds) == ["b", "a"]
    assert all(0.1 <= value < 2 for value in watch.seconds.values())


def marked(mark: str) -> list[str]:
    """Command lines of the processes that inherited a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return [line for line in found if line]  # those that ended but were not yet waited for have none


def left_behind(mark: str, seconds: float = 15) -> list[str]:
    """What still runs some seconds after the end: Ray's last helpers need a moment."""
    deadline = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.3)
    return marked(mark)


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
class Told:
    folder: Path
    output: str
    seconds: float
    left: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    folder, mark, began = tmp_path_factory.mktemp("demo") / "run", uuid.uuid4().hex, time.monotonic()
    with start(folder, mark) as job:
        output, _ = job.communicate(timeout=400)
    assert job.returncode == 0, output
    yield Told(folder, output, time.monotonic() - began, left_behind(mark))


@pytest.mark.slow
def test_the_demo_leaves_no_process_behind(told: Told) -> None:
    assert told.left == []


@pytest.mark.slow
def test_the_summary_has_the_promised_form(told: Told) -> None:
    summary = told.summary
    assert set(summary) == {
        *("seconds", "stage_seconds", "pairs", "clip", "box_supervised", "codet", "detect_ms", "mlflow_uri", "report")
    }
    assert list(summary["stage_seconds"]) == STAGES
    assert set(summary["pairs"]) == {"input", "kept", "rejected"}
    assert summary["pairs"]["kept"] + sum(summary["pairs"]["rejected"].values()) == summary["pairs"]["input"]
    assert set(summary["clip"]) == {"top1_base", "top1_novel"}
    for stage in ("box_supervised", "codet"):
        assert set(summary[stage]) == {"ap50_base", "ap50_novel"}
        assert all(0 <= value <= 1 for value in summary[stage].values())
    assert sum(summary["stage_seconds"].values()) <= summary["seconds"] + 1 <= told.seconds + 1
    assert summary["detect_ms"] > 0
    assert Path(summary["report"]) == told.folder / "report.html"
    assert summary["mlflow_uri"] == f"sqlite:///{told.folder}/mlflow.db"


@pytest.mark.slow
def test_the_console_shows_the_table_and_where_to_look(told: Told) -> None:
    for wanted in ("AP50", "+ captions (CoDet)", "report.html", "mlflow ui --backend-store-uri", "serve.py --model"):
        assert wanted in told.output
    ours = [
        line for line in told.output.splitlines() if not re.match(r"(\x1b\[\d+m)?\(", line)
    ]  # "(actor pid=7) ..." is Ray's
    assert not [line for line in ours if "Traceback" in line]


@pytest.mark.slow
def test_the_demos_tables_and_checkpoint_are_whole(told: Told) -> None:
    for table in ("pairs", "rejects", "concepts", "groups"):
        assert tables.find_manifest(str(told.folder), table, "smoke") is not None
    assert (told.folder / "codet/config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is absent")
def test_the_report_opens_in_a_browser(told: Told) -> None:
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
            page.goto((told.folder / "report.html").as_uri())
            titles = page.locator("h2").all_inner_texts()
            broken = page.eval_on_selector_all("img", "all => all.filter(one => !one.naturalWidth).length")
            images = page.locator("img").count()
            wide = page.evaluate("document.documentElement.scrollWidth")
            text = page.inner_text("body")
        finally:
            browser.close()
    assert problems == []  # nothing is fetched: the page explains itself
    assert titles == [
        *("The world", "The crawl", "Concept groups", "Training", "Before and after captions", "Over HTTP", "Time")
    ]
    assert (broken, wide) == (0, 1200)
    assert images > 25
    assert all(reason in text for reason in told.summary["pairs"]["rejected"])
    assert f"{told.summary['codet']['ap50_base']:.3f}" in text


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
    # 130 is ours; 1 when Ray's own threads meet the end of its worker first
    assert job.returncode in (130, 1), rest
    assert "Traceback" not in rest
    assert left_behind(mark) == []
