"""A run that is killed and resumed equals an undisturbed one, for every training."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from trainings import LAST, STAGES, TRAIN, largest_difference, smoke, weights_of

from ovd_models.errors import InputError
from workflows import codet
from workflows.common import runs, tracking, training
from workflows.common.session import Session, step_seed

ROOT = Path(__file__).parents[2]
QUICK = [("clip", ""), ("codet", "")]
LONGER = [("vild", ""), ("ovsam", ""), ("clip", "shards")]
"""Methods, and how they shuffle where it is not the default."""


class CrashError(Exception):
    """Stands for the end of the process."""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "shuffle"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in LONGER)]
)
def test_a_run_that_ends_in_the_middle_resumes_exactly(
    method: str, shuffle: str, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = smoke(method, str(tmp_path), shuffle)
    whole = TRAIN[method](run)
    end_step = Session.end_step

    def crash_after_7(session: Session, *arguments: Any) -> None:
        end_step(session, *arguments)
        if session.stage.name == LAST[method] and session.step == 7:
            raise CrashError

    monkeypatch.setattr(Session, "end_step", crash_after_7)
    with pytest.raises(Exception, match=r"CrashError|^$"):
        TRAIN[method](run)
    monkeypatch.undo()
    name = runs.find_run(str(tmp_path), method, "smoke")
    assert training.committed_step(f"{tmp_path}/runs/{method}/{name}/{LAST[method]}") == 5
    resumed = TRAIN[method](dataclasses.replace(run, resume=name))
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) <= 1e-5
    client = MlflowClient(tracking.tracking_uri(str(tmp_path)))
    tracked = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in tracked] == ["FINISHED", "FINISHED"]
    assert {run.info.run_id for run in tracked} == {whole.run_id, resumed.run_id}


@pytest.mark.ray
def test_a_resumed_run_keeps_its_settings(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = smoke("codet", str(tmp_path))
    codet.train(run)
    name = runs.find_run(str(tmp_path), "codet", "smoke")
    longer = dataclasses.replace(run, resume=name, joint_stage=dataclasses.replace(run.joint_stage, steps=25))
    with pytest.raises(InputError, match=r"--resume: --joint-stage\.steps is 25, the run began with 10"):
        codet.train(longer)
    capsys.readouterr()
    quieter = dataclasses.replace(run, resume=name, joint_stage=dataclasses.replace(run.joint_stage, log_every=5))
    codet.train(quieter)
    assert "no longer equal" not in capsys.readouterr().out


@dataclass(frozen=True)
class Script:
    """A training run as a process of its own."""

    method: str
    storage: Path
    workers: int
    shuffle: str

    def command(self, *flags: str) -> list[str]:
        settings = {"steps": 10, "checkpoint-every": 5, "log-every": 1, "workers": self.workers, "max-failures": 0}
        stages = [
            flag
            for stage in STAGES[self.method]
            for name, value in settings.items()
            for flag in (f"--{stage.replace('_', '-')}.{name}", str(value))
        ]
        shared = ["--config", "smoke", "--storage", str(self.storage)]
        even = ["--no-text-to-mask"] if self.method == "ovsam" else []
        order = ["--shuffle", self.shuffle, "--buffer-pairs", "50"] if self.shuffle else []
        return [sys.executable, str(ROOT / f"workflows/{self.method}.py"), *shared, *even, *order, *stages, *flags]

    def run(self, *flags: str) -> str:
        """The folder of the finished model."""
        done = subprocess.run(self.command(*flags), capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("model: ")]
        return line.removeprefix("model: ")

    def kill_after_a_checkpoint(self) -> str:
        """Begin a run, kill it by SIGKILL once its last stage has a checkpoint, and return its name."""
        before = set((self.storage / "runs" / self.method).glob("smoke-*"))
        process = subprocess.Popen(
            self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
        )
        deadline = time.monotonic() + 240
        try:
            while time.monotonic() < deadline:
                for folder in set((self.storage / "runs" / self.method).glob("smoke-*")) - before:
                    if 0 < training.committed_step(str(folder / LAST[self.method])) < 10:
                        return folder.name
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise AssertionError("no checkpoint in time")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("method", "shuffle"), [*QUICK, *LONGER])
def test_a_killed_process_resumes_exactly(method: str, shuffle: str, workers: int, tmp_path: Path) -> None:
    script = Script(method, tmp_path, workers, shuffle)
    whole = script.run()
    name = script.kill_after_a_checkpoint()
    resumed = script.run("--resume", name)
    assert Path(resumed).parent.name == name
    assert largest_difference(weights_of(whole), weights_of(resumed)) <= 1e-5


def test_every_step_and_rank_has_a_seed_of_its_own() -> None:
    seeds = [step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(max(seeds))
