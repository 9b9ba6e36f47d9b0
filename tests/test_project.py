import ast
import json
import os
import re
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
SHARED_FOLDERS = {("workflows", name) for name in ("common", "configs", "inputs", "reports", "serving")}
WORKFLOWS = sorted((ROOT / "workflows").glob("*.py"))
SCRIPTS = [path for path in WORKFLOWS if path.stem != "__init__"]
"""All files at the top of `workflows/` are scripts."""
STUDIES = [path for path in sorted((ROOT / "workflows/studies").glob("*.py")) if "\ndef main(" in path.read_text()]
RUNNABLE = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (*SCRIPTS, *STUDIES)]
SHARED = [path for path in SOURCES if path.relative_to(ROOT).parts[:2] in SHARED_FOLDERS]
FOLDERS = sorted({path.parent for path in SOURCES})
MLFLOW = {ROOT / "workflows/common/tracking.py", ROOT / "workflows/common/registry.py"}
"""What imports it."""
FORBIDDEN = {
    "ovd_models": {"workflows", "data_prep", "ray", "mlflow"},
    "data_prep": {"workflows", "mlflow"},
    "workflows": {"mlflow"},
}


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = {"mlflow"} if path in MLFLOW else set()
    imported = {module.partition(".")[0] for module in imported_modules(path)}
    assert not imported & FORBIDDEN[package] - allowed


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_scripts_import_scripts(path: Path) -> None:
    scripts = {f"workflows.{script.stem}" for script in SCRIPTS}
    imported = {".".join(module.split(".")[:2]) for module in imported_modules(path)}
    assert not imported & scripts
    above = {
        "common": {"configs", "inputs", "reports", "serving", "studies"},
        "configs": {"inputs", "reports", "serving", "studies"},
        "reports": {"inputs", "serving", "studies"},
        "inputs": {"serving", "studies"},
    }
    room = path.relative_to(ROOT / "workflows").parts[0]
    assert not imported & {f"workflows.{other}" for other in above.get(room, {"studies"})}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_holds_at_most_20_files(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
    assert len(files) <= 20


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
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


# Runs the scripts one after another in one process, which imports torch and Ray once, as `python -m workflows.x` would.
RUN_SCRIPTS = """
import contextlib, io, json, os, runpy, sys
answers = []
for script, flag in json.loads(sys.argv[1]):
    sys.argv, output, errors = [script, flag], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = runpy.run_module(script, run_name="__main__") and None
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
    """The output of every script for `--help` and for an unknown config."""
    cases = [(script, flag) for script in RUNNABLE for flag in ("--help", "--help-all", "--config=unheard")]
    ran = run(sys.executable, "-c", RUN_SCRIPTS, json.dumps(cases))
    assert ran.returncode == 0, ran.stderr
    return {case: Answer(*answer) for case, answer in zip(cases, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize("script", RUNNABLE)
def test_every_script_shows_its_flags(script: str, answers: dict[tuple[str, str], Answer]) -> None:
    short, full = answers[script, "--help"], answers[script, "--help-all"]
    assert (short.code, full.code) == (0, 0), short.errors + full.errors
    assert len(short.output.splitlines()) <= 60
    shown = re.findall(r"^  (--[a-z0-9-]+)", short.output, re.MULTILINE)
    assert 3 <= len(shown) <= 18
    assert set(shown) <= {*re.findall(r"--[a-z][a-z0-9.-]*", full.output), "--help-all"}  # `--sam-model.depth` is one
    configs = re.search(r"one of (.*?) \(default", full.output.replace("\n", " "))
    assert configs is not None
    names = configs.group(1).split(", ")
    assert len(names) == 1 or all(re.search(rf"^  {name} +\S", short.output, re.MULTILINE) for name in names)


def test_help_needs_none_of_the_packages_that_take_seconds() -> None:
    block = "import sys; sys.modules |= dict.fromkeys(('torch', 'ray', 'mlflow', 'pyarrow', 'numpy'))"
    start = "import runpy; sys.argv = ['x', '--help']; runpy.run_module('workflows.codet', run_name='__main__')"
    answer = run(sys.executable, "-c", f"{block}; {start}")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "--teacher" in answer.stdout


@pytest.mark.parametrize("script", RUNNABLE)
def test_unknown_config_is_one_line_and_exit_code_2(script: str, answers: dict[tuple[str, str], Answer]) -> None:
    answer = answers[script, "--config=unheard"]
    assert (answer.code, answer.output) == (2, "")
    assert len(answer.errors.strip().splitlines()) == 1
    assert "unheard" in answer.errors


@pytest.mark.parametrize("start", [("workflows/prepare_pairs.py",), ("-m", "workflows.prepare_pairs")])
def test_scripts_run_by_path_and_as_modules(start: tuple[str, ...]) -> None:
    answer = run(sys.executable, *start, "--config", "unheard")
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1


def test_help_may_be_cut_short() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "workflows/codet.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
