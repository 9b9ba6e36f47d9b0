import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("workflows", "data_prep", "ovd_models")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("**/*.py"))]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.py"))
SCRIPTS = [path for path in WORKFLOWS if "\ndef main(" in path.read_text()]
FORBIDDEN = {
    "ovd_models": {"workflows", "data_prep", "ray", "mlflow"},
    "data_prep": {"workflows", "mlflow"},
    "workflows": {"mlflow"},
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {"mlflow"} if path == ROOT / "workflows/common/tracking.py" else set()
    assert not set(imports(path)) & FORBIDDEN[package] - allowed


def test_no_workflow_bears_the_name_of_an_installed_module() -> None:
    # A script's own folder comes first on sys.path: `workflows/ray.py` would be what every `import ray` finds.
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not {path.stem for path in WORKFLOWS if path.stem != "__init__"} & installed


def test_every_package_is_installed_and_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == [f"{package}*" for package in PACKAGES]
    assert tuple(project["tool"]["mypy"]["packages"]) == PACKAGES


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {name.split("[")[0].split("=")[0].split(">")[0].lower().replace("_", "-") for name in wanted}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# Runs the scripts one after another in one process, which imports torch and Ray once, as `python workflows/x.py` would.
RUN_SCRIPTS = """
import contextlib, io, json, os, runpy, sys
answers = []
for script, flag in json.loads(sys.argv[1]):
    sys.argv, output, errors = [script, flag], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = runpy.run_path(script, run_name="__main__") and None
        except SystemExit as exit:
            code = exit.code
    answers.append((code, output.getvalue(), errors.getvalue()))
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    code: int | None
    output: str
    errors: str


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, str], Answer]:
    """What every script says to `--help` and to an unknown config."""
    cases = [(f"workflows/{path.name}", flag) for path in SCRIPTS for flag in ("--help", "--config=unheard")]
    ran = run(sys.executable, "-c", RUN_SCRIPTS, json.dumps(cases))
    assert ran.returncode == 0, ran.stderr
    return {case: Answer(*answer) for case, answer in zip(cases, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_every_script_shows_its_flags(script: str, answers: dict[tuple[str, str], Answer]) -> None:
    answer = answers[f"workflows/{script}", "--help"]
    assert answer.code == 0, answer.errors
    assert "--config" in answer.output


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS])
def test_unknown_config_is_one_line_and_exit_code_2(script: str, answers: dict[tuple[str, str], Answer]) -> None:
    answer = answers[f"workflows/{script}", "--config=unheard"]
    assert (answer.code, answer.output) == (2, "")
    assert len(answer.errors.strip().splitlines()) == 1
    assert "unheard" in answer.errors


@pytest.mark.parametrize("start", [("workflows/prepare_pairs.py",), ("-m", "workflows.prepare_pairs")])
def test_scripts_run_by_path_and_as_modules(start: tuple[str, ...]) -> None:
    answer = run(sys.executable, *start, "--config", "unheard")
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("target", ["help", "demo", "test", "test-slow", "lint", "bench"])
def test_make_knows_its_targets(target: str) -> None:
    planned = run("make", "-n", target)
    assert planned.returncode == 0, planned.stderr


def test_make_demo_runs_the_demo() -> None:
    assert "workflows/demo.py" in run("make", "-n", "demo").stdout
