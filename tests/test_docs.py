"""The documentation: error lines say what was expected or are explained, and commands are right."""

import ast
import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import documented
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from serving import endpoint, save_classifier, save_detector_of_any_name, save_segmenter, save_text_segmenter

from data_prep.embeddings.teachers import EmbedConfig
from ovd_models.checkpoint_info import write_calibration
from ovd_models.checkpoints import load_encoder
from ovd_models.vild.model import ViLD, ViLDConfig
from workflows import embed, prepare_boxes
from workflows.common import cli, registry, tracking
from workflows.configs import boxes as boxes_configs
from workflows.serving.api import build_api

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("workflows", "data_prep", "ovd_models") for path in (ROOT / package).rglob("*.py")]
SAYS_WHAT_TO_DO = ("expected", "`", "see ", "did you mean", "; ")
"""Parts of messages that need no page."""
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def input_errors(path: Path) -> Iterator[tuple[int, str]]:
    """Line and message of each `raise InputError(...)` with a literal message; `{}` stands for its values."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        if ast.unparse(node.exc.func) != "InputError" or not node.exc.args:
            continue
        (message,) = node.exc.args
        if isinstance(message, ast.Constant):
            yield node.lineno, str(message.value)
        elif isinstance(message, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in message.values)
            yield node.lineno, "".join(parts)


def longest_words(message: str) -> str:
    """The longest part of a message between its values, as the page of troubleshooting quotes it."""
    return max(re.split(r"\{\}", message), key=len).strip(" :(),")


ERRORS = [
    (f"{path.relative_to(ROOT)}:{line}", message) for path in sorted(SOURCES) for line, message in input_errors(path)
]
BARE = [
    (place, message)
    for place, message in ERRORS
    if not any(part in message for part in SAYS_WHAT_TO_DO) and len(longest_words(message)) > 3
]
"""Messages that do not say what was expected."""


def test_errors_are_found() -> None:
    assert len(ERRORS) > 300
    assert 5 < len(BARE) < 80


@pytest.mark.parametrize(("place", "message"), BARE, ids=[place for place, _ in BARE])
def test_an_error_says_what_was_expected_or_is_explained(place: str, message: str) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert longest_words(message) in page, f"{place}: {message}"


# ------------------------------------------------------------------------------------------------ commands, snippets


def commands() -> Iterator[tuple[str, str]]:
    """Page and command of every `python workflows/...`, in a block of code or inside a line."""
    for page in (ROOT / "README.md", *PAGES):
        text = page.read_text()
        for line in (*documented.commands(text), *documented.inline_commands(text)):
            if (at := line.find("python workflows/")) >= 0:
                yield str(page.relative_to(ROOT)), line[at:]


COMMANDS = sorted(set(commands()))


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 60
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/index.md", "docs/crawl.md", "docs/evaluation.md"}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {line[17:70]}" for page, line in COMMANDS])
def test_a_command_names_a_script_and_flags_that_exist(page: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(command.replace("\\|", "|"), comments=True)
    _, script, *arguments = words
    assert (ROOT / script).is_file()
    for number, word in enumerate(arguments[:-1]):
        if word == "--storage":
            arguments[number + 1] = str(tmp_path)
        if word == "--config" and arguments[number + 1] == "NAME":
            arguments[number + 1] = "smoke"
    module = import_module(".".join(Path(script).with_suffix("").parts))
    cli.parse(module.CONFIGS, None, arguments)


def known_flags() -> set[str]:
    """The flags of all scripts with their groups, and those that benchmarks read."""
    of_ray_job_submit = {"--runtime-env-json", "--working-dir"}
    found = {"--flag", "--scores.scorers", *of_ray_job_submit}  # any, and one that is a table
    for path in (*(ROOT / "workflows").glob("[!_]*.py"), *(ROOT / "workflows/studies").glob("[!_]*.py")):
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for make in getattr(module, "CONFIGS", {}).values():
            run = make()
            found |= set(cli.flags_of(run, cli.stages_of(run)))
    for path in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'"(--[a-z][\w-]*)"', path.read_text()))
    return found | {flag.partition(".")[0] for flag in found}


def test_a_flag_that_a_page_names_exists() -> None:
    known, pages = known_flags(), (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES)
    named = {(page.name, flag) for page in pages for flag in re.findall(r"`(--[a-z][\w.-]*\w)", page.read_text())}
    assert len(named) > 100
    assert not {(page, flag) for page, flag in named if flag not in known and flag.replace("no-", "") not in known}


def test_snippets_run_as_they_are_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_detector_of_any_name(Path("runs/demo/codet"))
    write_calibration(model, 0.0, "test")  # else an untrained model finds nothing
    scene = Path("runs/demo/images/pictograms-eval/000000.jpg")
    scene.parent.mkdir(parents=True)
    Image.effect_noise((200, 150), 90).convert("RGB").save(scene)
    shutil.copy(scene, "street.jpg")
    with tracking.run("runs/demo", experiment="pictograms", name="a", params={}, tags={}) as tracked:
        registry.register(tracked, model, method="codet", data_set="pictograms", metric="ap", value=0.5)
    save_segmenter(Path("store/runs/ovsam/NAME/model"))
    save_text_segmenter(Path("store/runs/ovsam/NAME/text_model"))
    for page in ("README.md", "docs/walkthrough.md", "docs/ovsam.md"):
        Path("found.png").unlink(missing_ok=True)
        exec(compile(documented.snippets((ROOT / page).read_text()), page, "exec"), {})
        assert Image.open("found.png").width


@pytest.mark.slow
def test_the_commands_of_all_pages_run_as_they_are_pasted() -> None:
    pages = [str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "docs"]
    subprocess.run(
        [sys.executable, "benchmarks/first_hour.py", "--config", "smoke", "--pages", *pages], cwd=ROOT, check=True
    )
    found = json.loads((ROOT / "runs/bench/first_hour.json").read_text())
    assert found["failed"] == []
    assert found["commands"] > 60


def run_snippets(page: str, *changes: tuple[str, str]) -> dict[str, Any]:
    """Run a page's Python with some words changed, each of which it must have; returns its variables."""
    code, variables = documented.snippets((ROOT / page).read_text()), dict[str, Any]()
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(compile(code, page, "exec"), variables)
    return variables


def test_vilds_queries_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_detector_of_any_name(Path("RUN/model"), ViLD(ViLDConfig()))
    Image.effect_noise((120, 90), 90).convert("RGB").save("a.jpg")
    assert run_snippets("docs/vild.md")["detector"].method == "vild"


def test_the_client_gets_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_detector_of_any_name(Path("model"))
    Image.effect_noise((120, 90), 90).convert("RGB").save("street.jpg")
    with answering(build_api(endpoint(model, tmp_path))) as address:
        variables = run_snippets("docs/serving.md", ("127.0.0.1:8000", address), ('"0.3"', '"0"'))
    found = variables["answer"].json()["detections"]
    assert {entry["label"] for entry in found} <= {"red umbrella", "anchor"}
    assert len(capsys.readouterr().out.splitlines()) == len(found) > 0


@contextlib.contextmanager
def answering(api: FastAPI) -> Iterator[str]:
    """Serve an API from a thread; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_a_released_clip_becomes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_classifier(Path("own"))
    run_snippets("docs/clip.md", ('"RN50x16", "openai"', '"own"'), ("store/rn50x16", "store/clip"))
    assert load_encoder(Path("store/clip")).embed_names(["cat"]).shape == (1, 128)


def test_stored_regions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_boxes.prepare(dataclasses.replace(boxes_configs.smoke(), name="pictograms", train_images=6, eval_images=2))
    teacher = str(save_classifier(Path("clip")))
    embed.embed(dataclasses.replace(embed.pictograms(), teacher=teacher, pairs="", embed=EmbedConfig(actors=0)))
    found = run_snippets("docs/teachers.md")["found"]
    assert found.embeddings.shape == (len(found.boxes), 128)
