"""Kill an embedding job or its actors at random points: the same bytes come out, and little is embedded again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_embed import files_of, make_tables
from test_prepare_pairs_kills import MOST_REFETCHED, children_named

from ovd_models.clip.model import Clip, ClipConfig, save_clip

pytestmark = pytest.mark.slow
IMAGES = 640
PROGRAM = """
import sys
from counting_stage import CountingStage
from data_prep.embeddings.teachers import EmbedConfig
from workflows import embed

storage, teacher = sys.argv[1:]
embed.RegionStage = CountingStage
embed.embed(embed.Run(storage=storage, teacher=teacher, name="t", boxes="t", embed=EmbedConfig(actors=1)))
"""


@dataclass(frozen=True)
class Undisturbed:
    """A finished job."""

    tables: Path
    """A storage with the images alone."""
    teacher: str
    files: dict[str, bytes]
    shards: int
    seconds: float


def start(root: Path, teacher: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    ours = {"RAY_AUTH_MODE": "disabled", "COUNTED": str(root / "counted"), "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), teacher],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**environment, **ours}, start_new_session=True,
    )  # fmt: skip


def finish(job: subprocess.Popen[str]) -> None:
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output


def wait_for_first(job: subprocess.Popen[str], root: Path) -> float:
    while job.poll() is None and not list((root / "staging").rglob("*.json")):
        time.sleep(0.01)
    return time.monotonic()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    images, root, folder = (tmp_path_factory.mktemp(name) for name in ("tables", "undisturbed", "clip"))
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), folder)
    make_tables(images, IMAGES)
    shutil.copytree(images, root, dirs_exist_ok=True)
    job = start(root, str(folder))
    first = wait_for_first(job, root)
    finish(job)
    shards = (root / "counted").read_text().splitlines()
    assert len(shards) == len(set(shards)) == 80
    return Undisturbed(images, str(folder), files_of(root), len(shards), time.monotonic() - first)


@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_a_random_point_changes_nothing(undisturbed: Undisturbed, tmp_path: Path, trial: int) -> None:
    root, kind = tmp_path / "storage", ("driver", "actor")[trial % 2]
    shutil.copytree(undisturbed.tables, root)
    job = start(root, undisturbed.teacher)
    wait_for_first(job, root)
    time.sleep(random.Random(trial).uniform(0.0, 0.8) * undisturbed.seconds)
    if kind == "actor":
        for pid in children_named(job, "MapWorker"):
            os.kill(pid, signal.SIGKILL)
    else:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        job = start(root, undisturbed.teacher)
    finish(job)
    again = len((root / "counted").read_text().splitlines()) / undisturbed.shards - 1
    print(f"{kind} killed: {again:.2%} of the shards were embedded again")
    assert files_of(root) == undisturbed.files
    assert again <= MOST_REFETCHED
    assert not list(root.rglob("*.tmp"))
