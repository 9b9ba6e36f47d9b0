"""The first hour of a new user, played on a fresh clone: the README's commands and Python as they are pasted.

make first-hour                                        24 minutes on two idle cores
python benchmarks/first_hour.py --config smoke         the same with tiny trainings
python benchmarks/first_hour.py --config smoke --pages docs/codet.md    further pages after the README

The README's list of URLs and folder of photographs are thirty of each. What the pages show for things that a fresh
machine without internet has not (buckets, clusters, released weights, published data sets) is listed, not run.

minutes           all commands together, without the installation
commands          how many ran
commands_failed   commands that did not exit with 0, or did not print what they should
not_run           commands that need what is not here
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

import documented
from head_node import started_head
from measure import BENCH, REPOSITORY, write_figures
from PIL import Image

NOISE = re.compile(
    r"WARNING|INFO |Tip:|FutureWarning|DeprecationWarning|UserWarning|Traceback|\(\w+ pid=|it/s\]|raylet|auth_token"
)
OWN = 30
"""Photographs and URLs of one's own."""
TIMEOUT = 3600
NOT_HERE = {
    r"make install|\. \.venv": "this environment is used",
    r"make (bench|claims)|python benchmarks|python workflows/claims|.*studies.finetune": "hours, and no first step",
    r"docker|helm|kubectl|serve (deploy|run)|ray |export ": "a cluster",
    r".*(s3:|BUCKET|HOST|OVD_TOKEN)": "a bucket or a cluster",
    r".*(--pretrained|RN50x16|sam_vit|FILE)": "released weights",
    r".*(COCO|TRAIN|lvis|coco_|cc3m|WORDNET|imagenet|SA-1B|laion)": "a published data set",
    r".*(CLIP_|VIT|CODET|VILD| SAM)": "several trainings that the page names",
}
"""Beginnings of commands that need what is not here, and what that is."""
SERVERS = {
    "python workflows/serve.py": "http://127.0.0.1:8000/healthz",
    "mlflow ui": "http://127.0.0.1:5000/",
}
"""Commands that run until Ctrl-C, and a URL that answers when they are ready."""
EXPECTED = {
    "python workflows/demo.py": "report:",
    "python workflows/predict.py": "index.html",
    **{f"python workflows/{name}.py": "next:" for name in ("prepare_pairs", "clip", "codet", "vild", "ovsam")},
    "curl": '{"width"',
}
"""What a command prints in the end."""
ADDED = {
    "--urls list.tsv": "--fetch.allow-networks 127.0.0.1/32",
    "--urls more.tsv": "--fetch.allow-networks 127.0.0.1/32",
}
"""Flags without which a command fails here: the thirty pictures are served from this machine."""
TINY = {
    "--output everything": "--points-per-side 2",
    "vild_sweep": "--boxes smoke-eval",
    "failures.py --model store/runs/vild": "--boxes smoke-eval",
    "codet.py --config photos": "--box-stage.steps 2 --joint-stage.steps 2",
    "codet.py --config finetune": "--box-stage.steps 2 --joint-stage.steps 2",
    "vild.py --config photos": "--rpn-stage.steps 2 --detector-stage.steps 2",
    "vild.py --config finetune": "--detector-stage.steps 2",
    "ovsam.py --config photos": "--sam-stage.steps 2 --sam2clip-stage.steps 2 --clip2sam-stage.steps 2",
}
"""Further flags for tiny trainings."""


@dataclass
class Hour:
    """The commands so far, in a clone of the repository."""

    clone: Path
    smoke: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    """Assignments so far, which hold for the commands after them."""
    servers: list[str] = field(default_factory=list)
    """The commands so far that serve models; requests are sent while the last fitting one runs."""

    def environment(self) -> dict[str, str]:
        """With the clone's packages first, and the programs of this environment."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PYTHONPATH": str(self.clone), "PATH": path, "OMP_WAIT_POLICY": "PASSIVE"}

    def in_shell(self, command: str) -> list[str]:
        """A command with the assignments before it."""
        return ["bash", "-c", "\n".join(["set -eo pipefail", *self.variables, command])]

    def name_of(self, command: str) -> str:
        """A short name for a command that has none yet."""
        program, *words = command.split()
        name = program if program != "python" else Path(words[0]).stem if words[0] != "-m" else words[1].split(".")[-1]
        count = sum(other.split("-")[0] == name for other in self.seconds)
        return f"{name}-{count + 1}" if count else name

    def run(self, command: str) -> str:
        """Run a command to its end; returns what it printed, which must have the expected text."""
        name, started = self.name_of(command), time.perf_counter()
        done = subprocess.run(
            self.in_shell(command), cwd=self.clone, env=self.environment(), text=True, timeout=TIMEOUT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.seconds[name] = time.perf_counter() - started
        (BENCH / "first_hour" / f"{name}.log").write_text(f"$ {command}\n{done.stdout}")
        expected = next((text for start, text in EXPECTED.items() if command.startswith(start)), "")
        if done.returncode or expected not in done.stdout:
            self.failed.append(f"{name}: {command}")
        self.report(name, command)
        return done.stdout

    @contextlib.contextmanager
    def running(self, command: str, url: str) -> Iterator[None]:
        """Start a server, wait until a URL answers, and end it after the block."""
        name, started = self.name_of(command), time.perf_counter()
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5)
            raise SystemExit(f"{url}: another server answers, expected its port to be free")
        with (BENCH / "first_hour" / f"{name}.log").open("wb") as log:
            server = subprocess.Popen(
                self.in_shell(f"exec {command}"), cwd=self.clone, env=self.environment(), stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            try:
                if not answers(url, server):
                    self.failed.append(f"{name}: {command}")
                yield
            finally:
                server.terminate()  # a job of `nohup` would ignore Ctrl-C's signal
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(60)
                # Its children too: those of `mlflow ui` outlive it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                self.seconds[name] = time.perf_counter() - started
                self.report(name, command)

    def report(self, name: str, command: str) -> None:
        """Print the time of a command and whether it failed."""
        failed = any(entry.startswith(f"{name}:") for entry in self.failed)
        print(f"{self.seconds[name]:7.1f} s  {'FAILED  ' if failed else ''}{command}", flush=True)

    def play(self, page: str) -> None:
        """Run a page's commands in its order, and the README's Python; that of other pages is run by the tests."""
        text, stem = (self.clone / page).read_text(), Path(page).stem
        for shown in documented.commands(text):
            command = self.filled_in(shown, stem)
            reason = next((why for start, why in NOT_HERE.items() if re.match(start, command)), "")
            if reason:
                self.not_run.append(f"{page}: {command} ({reason})")
            elif re.match(r"[A-Z_]+=", command):
                self.variables.append(self.adapted(command))
            else:
                self.play_command(self.adapted(command))
        if page == "README.md":
            (self.clone / "snippets.py").write_text(self.adapted(documented.snippets(text)))
            self.run("python snippets.py")

    def play_command(self, command: str) -> None:
        """Run a command; a server until it answers, and a request while the last server runs."""
        url = next((url for start, url in SERVERS.items() if command.startswith(start)), "")
        if url:
            with self.running(command, url):
                pass
            if "serve.py" in command:
                self.servers.append(command)
        elif command.startswith("curl"):
            kind = "ovsam" if "/v1/segment" in command else ""
            server = next((server for server in reversed(self.servers) if kind in server), "false")
            with self.running(server, SERVERS["python workflows/serve.py"]):
                self.run(command)
        else:
            self.run(command)

    def filled_in(self, command: str, page: str) -> str:
        """A command with the newest models in place of the documentation's words for them."""
        script = re.search(r"workflows[/.](?:studies\.)?(codet|vild|ovsam)", f"{command} workflows/{page}")
        method = script[1] if script else "codet"
        for word, pattern in {
            r"(?<!\$)\bCLIP\b(?!=)": "store/runs/clip/*/model",
            r"\bMODEL\b": f"store/runs/{method}/*/model",
            r"store/runs/ovsam/NAME": "store/runs/ovsam/*",
            r"\bRUN\b": f"store/runs/{method}/*",
            r"\bNAME\b": f"store/runs/{method}/*",
        }.items():
            # Without a study's, whose variants are not all what a page means.
            named = (path for path in self.clone.glob(pattern) if "/study-" not in str(path))
            found = sorted(named, key=lambda path: path.stat().st_mtime)
            if found:
                newest = found[-1].name if word == r"\bNAME\b" else str(found[-1].relative_to(self.clone))
                command = re.sub(word, newest, command)
        return command.replace("store/codet", "runs/demo/codet")

    def adapted(self, command: str) -> str:
        """What is run for what is shown: nothing is installed, and pictures come from this machine."""
        command = command.replace("make demo", "python workflows/demo.py --storage runs/demo")
        added = [ADDED]
        if self.smoke:  # a detector of ten steps finds nothing
            command = command.replace("print(found[0], ", "print(")
            command = re.sub(r"pictograms(_mixed)?(?!2)", "smoke", command).replace("--config sweeps", "--config smoke")
            command = command.replace("demo.py", "demo.py --config smoke")
            added.append(TINY)
        flags = (flags for table in added for shown, flags in table.items() if shown in command)
        return " ".join([command, *flags])


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


def play(hour: Hour, pages: Sequence[str]) -> str:
    """Play the README and further pages; returns what the demo printed."""
    photos = write_photos(hour.clone / "photos")
    write_others(hour.clone, photos)
    with serve_folder(photos / "images") as base:
        names = sorted(path.name for path in (photos / "images").iterdir())
        for file, first in (("list.tsv", 0), ("more.tsv", OWN)):
            rows = [
                f"{base}/{names[row % len(names)]}?{row}\ta dog beside a bicycle, number {row}"
                for row in range(first, first + OWN)
            ]
            (hour.clone / file).write_text("\n".join(["url\tcaption", *rows]))
        for page in ("README.md", *pages):
            hour.play(page)
    model = "$(ls -td store/runs/codet/photos-*/model | head -1)"
    own = "--images photos/images --names 'dog, person' --output own"
    hour.run(f"python workflows/predict.py --model {model} {own}")
    with started_head({**hour.environment(), "RAY_AUTH_MODE": "disabled"}) as head:
        job = f"python workflows/codet.py --config smoke --storage {hour.clone}/jobs"
        hour.run(f"ray job submit --address {head.address} --working-dir . -- {job}")
    return (BENCH / "first_hour/demo.log").read_text()


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


def write_photos(folder: Path) -> Path:
    """Thirty annotated photographs of the reference data, or as many noisy pictures; with COCO's annotations."""
    reference = Path(os.environ.get("OVD_REFERENCE_DATA", REPOSITORY.parent / "shared")) / "data/coco_photos"
    (folder / "images").mkdir(parents=True)
    if (reference / "instances.json").is_file():
        contents = json.loads((reference / "instances.json").read_text())
        contents["images"] = contents["images"][:OWN]
        kept = {entry["id"] for entry in contents["images"]}
        contents["annotations"] = [entry for entry in contents["annotations"] if entry["image_id"] in kept]
        for entry in contents["images"]:
            shutil.copy(reference / "images" / entry["file_name"], folder / "images")
        (folder / "instances.json").write_text(json.dumps(contents))
        return folder
    entries = [{"id": k, "file_name": f"{k}.jpg", "width": 320, "height": 240} for k in range(1, OWN + 1)]
    for entry in entries:
        Image.effect_noise((320, 240), 90).convert("RGB").save(folder / "images" / str(entry["file_name"]))
    boxes = [{"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [9, 9, 60, 60], "area": 3600, "iscrowd": 0}
             for k in range(1, OWN + 1)]  # fmt: skip
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}]
    contents = {"images": entries, "annotations": boxes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(contents))
    return folder


def write_others(clone: Path, photos: Path) -> None:
    """What further pages name: captions of the photographs, other folders of them, single ones, and a list of names."""
    annotated = json.loads((photos / "instances.json").read_text())
    lines = [f"{entry['file_name']}\ta dog and a person" for entry in annotated["images"]]
    (photos / "captions.tsv").write_text("\n".join(["file_name\tcaption", *lines]))
    for name, target in (("photos_val", photos), ("my_images", photos), ("other_photos", photos / "images")):
        (clone / name).symlink_to(target)
    for name in ("street.jpg", "picture.jpg"):
        shutil.copy(next((photos / "images").iterdir()), clone / name)
    (clone / "names.txt").write_text("umbrella\nanchor\n")
    (clone / "novel.txt").write_text(f"{annotated['categories'][0]['name']}\n")


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
    parser.add_argument("--pages", nargs="*", default=[], help="further pages, for example docs/codet.md")
    arguments = parser.parse_args()
    smoke = arguments.config == "smoke"
    work = BENCH / "first_hour"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY.as_uri(), work / "clone"], check=True)
    hour = Hour(work / "clone", smoke)
    lines, slowest = time_help(hour.clone, hour.environment())
    demo = play(hour, arguments.pages)
    noise = noise_of(demo)
    figures = {
        "config": "smoke" if smoke else "pictograms",
        "minutes": round(sum(hour.seconds.values()) / 60, 1),
        "commands": len(hour.seconds),
        "commands_failed": len(hour.failed),
        "help_lines_max": lines,
        "help_seconds_max": round(slowest, 2),
        "noise_lines": len(noise),
        "failed": hour.failed,
        "not_run": hour.not_run,
        "seconds": {name: round(value, 1) for name, value in hour.seconds.items()},
    }
    write_figures("first_hour", figures)
    print(json.dumps(figures, indent=1))
    print("\n".join(noise[:20]))


if __name__ == "__main__":
    main()
