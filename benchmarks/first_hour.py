"""The first hour of a new user, played on a fresh clone: the README's commands, then pictures and URLs of one's own.

make first-hour                                        about a quarter of an hour on two idle cores
python benchmarks/first_hour.py --config smoke         the same steps with tiny trainings

minutes           all commands together, without the installation
commands_failed   commands that did not exit with 0, or did not print what they should
help_lines_max    lines of the longest `--help`
help_seconds_max  time of the slowest `--help`, best of two
noise_lines       lines of `make demo` that are not ours: Ray's, tqdm's, warnings, and repeated ones
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from head_node import started_head
from measure import BENCH, REPOSITORY, write_figures

NOISE = re.compile(
    r"WARNING|INFO |Tip:|FutureWarning|DeprecationWarning|UserWarning|Traceback|\(\w+ pid=|it/s\]|raylet|auth_token"
)
OWN = 30
"""Photographs and URLs of one's own."""
PORT, MLFLOW_PORT = 8765, 5765
TIMEOUT = 3600
SNIPPETS = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Hour:
    """The commands so far, in a clone of the repository."""

    clone: Path
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """With the clone's packages first, and the programs of this environment."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PYTHONPATH": str(self.clone), "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}

    def run(self, name: str, command: Sequence[str], expected: str = "") -> str:
        """Run a command to its end; returns what it printed, which must have the expected text."""
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=self.clone, env=self.environment(), text=True, timeout=TIMEOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.seconds[name] = time.perf_counter() - started
        (BENCH / "first_hour" / f"{name}.log").write_text(done.stdout)
        if done.returncode or expected not in done.stdout:
            self.failed.append(name)
        print(f"{name:16} {self.seconds[name]:7.1f} s  {'FAILED' if name in self.failed else ''}", flush=True)
        return done.stdout

    @contextlib.contextmanager
    def running(self, name: str, command: Sequence[str], url: str) -> Iterator[None]:
        """Start a server, wait until a URL answers, and end it after the block."""
        started = time.perf_counter()
        with (BENCH / "first_hour" / f"{name}.log").open("wb") as log:
            server = subprocess.Popen(
                command, cwd=self.clone, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
            try:
                if not answers(url, server):
                    self.failed.append(name)
                yield
            finally:
                # Its children too: those of `mlflow ui` outlive it. A job of `nohup` would ignore Ctrl-C's signal.
                os.killpg(server.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(60)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                self.seconds[name] = time.perf_counter() - started
                print(f"{name:16} {self.seconds[name]:7.1f} s  {'FAILED' if name in self.failed else ''}", flush=True)


def answers(url: str, server: "subprocess.Popen[bytes]") -> bool:
    """Whether a URL answers within minutes."""
    for _ in range(300):
        if server.poll() is not None:
            return False
        try:
            return bool(urllib.request.urlopen(url, timeout=5).status == 200)
        except OSError:
            time.sleep(1)
    return False


def script(name: str, *flags: str) -> list[str]:
    """The command of a script of `workflows/`."""
    return ["python", f"workflows/{name}.py", *flags]


def play(hour: Hour, smoke: bool) -> str:
    """Run all steps; returns what the demo printed."""
    config = ["--config", "smoke", "--storage", "runs/demo"] if smoke else []
    demo = hour.run("demo", script("demo", *config), "report:")
    model = ["--model", "runs/demo/codet"]
    (images,) = [path.parent for path in (hour.clone / "runs/demo/images").glob("*-eval/000000.jpg")]
    hour.run("smoke", script("codet", "--config", "smoke", "--joint-stage.steps", "10"), "next:")
    snippet = "\n".join(SNIPPETS.findall((hour.clone / "README.md").read_text()))
    if smoke:  # a detector of ten steps finds nothing
        snippet = snippet.replace("pictograms-eval", "smoke-eval").replace("print(found[0], ", "print(")
        snippet = snippet.replace("ovd-codet-pictograms", "ovd-codet-smoke")
    hour.run("snippets", ["python", "-c", snippet])
    predict = script("predict", *model, "--images", str(images.relative_to(hour.clone)), "--names", "cup, hand, bishop")
    hour.run("predict", predict, "index.html")
    with hour.running("serve", script("serve", *model, "--port", str(PORT)), f"http://127.0.0.1:{PORT}/healthz"):
        form = ["-F", f"image=@{images}/000000.jpg", "-F", 'vocabulary=["cup", "hand"]']
        hour.run("request", ["curl", "-sf", *form, f"http://127.0.0.1:{PORT}/v1/detect"], '"detections"')
    database = f"sqlite:///{hour.clone}/runs/demo/mlflow.db"
    page = ["mlflow", "ui", "--port", str(MLFLOW_PORT), "--backend-store-uri", database]
    with hour.running("mlflow", page, f"http://127.0.0.1:{MLFLOW_PORT}/"):
        pass
    own_pictures(hour, images, smoke)
    with started_head({**hour.environment(), "RAY_AUTH_MODE": "disabled"}) as head:
        submit = ["ray", "job", "submit", "--address", head.address, "--working-dir", "."]
        hour.run(
            "job", [*submit, "--", *script("codet", "--config", "smoke", "--storage", f"{hour.clone}/jobs")], "next:"
        )
    return demo


def own_pictures(hour: Hour, images: Path, smoke: bool) -> None:
    """A crawl of thirty URLs, and a training on thirty annotated pictures."""
    teacher = ["--teacher", str(newest(hour.clone / "runs/demo/runs/clip"))]
    with serve_folder(images) as base:
        names = sorted(path.name for path in images.glob("*.jpg"))
        rows = [
            f"{base}/{names[row % len(names)]}?{row}\ta red cup and a black hand, number {row}" for row in range(OWN)
        ]
        (hour.clone / "list.tsv").write_text("\n".join(["url\tcaption", *rows]))
        flags = ["--config", "web", "--name", "mine", "--urls", "list.tsv", "--fetch.allow-networks", "127.0.0.1/32"]
        hour.run("crawl", script("prepare_pairs", *flags), "next:")
    photos = reference_photos() or write_photos(hour.clone / "photos", images)
    flags = ["--config", "photos", "--data", str(photos), "--held-out", "5", *teacher]
    stages = [f"--{stage}.{key}" for stage in ("box-stage", "joint-stage") for key in ("steps", "checkpoint-every")]
    tiny = [word for flag in stages for word in (flag, "5")] if smoke else []
    hour.run("photos", script("codet", *flags, *tiny), "next:")


def newest(folder: Path) -> Path:
    """The model of the last run in a folder."""
    return max(folder.glob("*/model"), key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; yields the base URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            """Do nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def reference_photos() -> Path | None:
    """The folder of photographs of the reference data, if it is there."""
    folder = Path(os.environ.get("OVD_REFERENCE_DATA", REPOSITORY.parent / "shared")) / "data/coco_photos"
    return folder if (folder / "instances.json").is_file() else None


def write_photos(folder: Path, images: Path) -> Path:
    """Thirty drawn scenes in COCO's form, where there are no photographs."""
    (folder / "images").mkdir(parents=True)
    files = sorted(images.glob("*.jpg"))[:OWN]
    for path in files:
        shutil.copy(path, folder / "images")
    entries = [{"id": k, "file_name": path.name, "width": 128, "height": 128} for k, path in enumerate(files, 1)]
    boxes = [{"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [9, 9, 60, 60], "area": 3600, "iscrowd": 0}
             for k in range(1, len(files) + 1)]  # fmt: skip
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "hand"}]
    contents = {"images": entries, "annotations": boxes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(contents))
    return folder


def time_help(clone: Path, environment: dict[str, str]) -> tuple[int, float]:
    """Lines of the longest `--help`, and seconds of the slowest."""
    lines, slowest = 0, 0.0
    scripts = [*(clone / "workflows").glob("*.py"), *(clone / "workflows/studies").glob("*.py")]
    for path in sorted(each for each in scripts if "brief_help.answer" in each.read_text()):
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            module = ".".join(path.relative_to(clone).with_suffix("").parts)
            shown = subprocess.run(
                ["python", "-m", module, "--help"],
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            seconds.append(time.perf_counter() - started)
        lines, slowest = max(lines, len(shown.stdout.splitlines())), max(slowest, min(seconds))
    return lines, slowest


def noise_of(output: str) -> list[str]:
    """Lines that are not ours, and lines that follow an equal one."""
    lines = [line for line in output.splitlines() if line.strip()]
    repeated = [line for line, before in zip(lines[1:], lines, strict=False) if line == before]
    return [line for line in lines if NOISE.search(line)] + repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=("pictograms", "smoke"), default="pictograms")
    smoke = parser.parse_args().config == "smoke"
    work = BENCH / "first_hour"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY.as_uri(), work / "clone"], check=True)
    hour = Hour(work / "clone")
    lines, slowest = time_help(hour.clone, hour.environment())
    demo = play(hour, smoke)
    noise = noise_of(demo)
    figures = {
        "config": "smoke" if smoke else "pictograms",
        "minutes": round(sum(hour.seconds.values()) / 60, 1),
        "commands_failed": len(hour.failed),
        "help_lines_max": lines,
        "help_seconds_max": round(slowest, 2),
        "noise_lines": len(noise),
        "failed": hour.failed,
        "seconds": {name: round(value, 1) for name, value in hour.seconds.items()},
    }
    write_figures("first_hour", figures)
    print(json.dumps(figures, indent=1))
    print("\n".join(noise[:20]))


if __name__ == "__main__":
    main()
