import json
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from head_node import RAY, Head, started_head
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head({"RAY_AUTH_MODE": "disabled"}) as started:
        yield started


def submit(head: Head, *entrypoint: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of the project, from its folder or another one, until the job ends."""
    code = "." if folder == ROOT else str(ROOT)
    command = [str(RAY), "job", "submit", "--address", head.address, "--working-dir", code, "--", *entrypoint]
    return subprocess.run(command, env=head.environment, cwd=folder, capture_output=True, text=True, timeout=300)


NOISE = ("Traceback", "WARNING", "INFO worker.py", "Tip:", "FutureWarning", "DeprecationWarning", "Found multiple")
"""Parts of lines that say nothing to the person who submitted a job."""


def lines_of(job: subprocess.CompletedProcess[str]) -> list[str]:
    """What the job itself printed; Ray's own lines come first, if the tail begins early."""
    _, _, printed = job.stdout.partition("Tailing logs until the job exits")
    lines = [line for line in printed.splitlines()[1:] if line and not line.startswith("---")]
    return [line for line in lines if "job_manager.py" not in line and not line.startswith("Running entrypoint")]


@pytest.mark.slow
@pytest.mark.ray
def test_every_script_runs_as_a_job_and_is_quiet(head: Head, tmp_path: Path) -> None:
    home, elsewhere = f"file://{tmp_path}/store", tmp_path / "elsewhere"
    elsewhere.mkdir()

    def job(script: str, *flags: str) -> str:
        done = submit(head, "python", f"workflows/{script}.py", *flags, "--storage", home, folder=elsewhere)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        lines = lines_of(done)
        assert not [line for line in lines if any(part in line for part in NOISE)], lines
        return "\n".join(lines)

    job("prepare_pairs", "--config", "smoke")
    job("prepare_boxes", "--config", "smoke")
    for method in ("clip", "vild", "codet", "ovsam"):
        printed = job(method, "--config", "smoke")
        assert "model: " in printed
        if method == "vild":
            model = next(line for line in printed.splitlines() if line.startswith("model: "))
    job("evaluate", "--model", model.removeprefix("model: "), "--boxes", "smoke-eval", "--images", "4")
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_refuses_a_storage_that_is_deleted_with_it(head: Head) -> None:
    job = submit(head, "python", "workflows/codet.py", "--config", "smoke")
    assert job.returncode == 1  # Ray's, for any failure
    assert lines_of(job)[0].startswith("error: --storage store: relative, expected a URI or an absolute path")


@pytest.mark.ray
def test_codet_trains_as_a_job(head: Head, tmp_path: Path) -> None:
    job = submit(head, "python", "workflows/codet.py", "--config", "smoke", "--storage", tmp_path.as_uri())
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
    assert "succeeded" in job.stdout
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/codet/**/config.json")]
    assert configs
    assert {config["method"] for config in configs} == {"codet"}


@pytest.mark.slow
@pytest.mark.ray
def test_bad_arguments_fail_the_job_and_are_the_last_line(head: Head) -> None:
    job = submit(head, "python", "workflows/codet.py", "--config", "unheard")
    assert job.returncode == 1  # Ray's, for any failure
    assert "--config unheard: unknown" in job.stdout


@pytest.mark.slow
def test_with_a_token_file_the_client_needs_the_token_mode_too(tmp_path: Path) -> None:
    # As docs/cluster.md says. Any local ray.init() writes such a file.
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("f" * 64)
    with started_head({"HOME": str(tmp_path)}) as guarded:
        refused = submit(guarded, "echo", "done")
        assert refused.returncode == 1
        assert "Missing authentication token" in refused.stderr
        assert "RAY_AUTH_MODE is currently 'disabled'" in refused.stderr
        with_mode = Head(guarded.address, {**guarded.environment, "RAY_AUTH_MODE": "token"})
        accepted = submit(with_mode, "echo", "done")
        assert accepted.returncode == 0, accepted.stderr
        stranger = Head(guarded.address, {**with_mode.environment, "RAY_AUTH_TOKEN": "0" * 64})
        assert "Invalid authentication token" in submit(stranger, "echo", "done").stderr


def test_job_carries_the_code_and_nothing_else(tmp_path: Path) -> None:
    # Ray refuses a working directory of more than 100 MiB.
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = zipfile.ZipFile(package).namelist()
    assert "workflows/common/cli.py" in names
    assert not [name for name in names if name.split("/")[0] in {".git", ".venv", "runs", "store", "mlruns"}]
    assert package.stat().st_size < 20 * 2**20
