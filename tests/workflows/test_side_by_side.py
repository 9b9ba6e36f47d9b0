"""Several jobs on one machine, each with a Ray of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NOISE = ("Traceback", "Found multiple active Ray", "Failed to query", "Detected that the Ray Train controller")


def test_two_trainings_and_a_left_over_ray_do_not_meet(ray_cluster: None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    jobs = []
    for number, method in enumerate(("clip", "vild")):
        stages = ("optimisation",) if method == "clip" else ("rpn-stage", "detector-stage")
        flags = [flag for stage in stages for flag in (f"--{stage}.workers", "1")]
        command = [sys.executable, f"workflows/{method}.py", "--config", "smoke", "--storage", f"{tmp_path}/{number}"]
        jobs.append(
            subprocess.Popen(
                [*command, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        )
    for job in jobs:
        output, _ = job.communicate(timeout=400)
        assert job.returncode == 0, output
        assert not [line for line in output.splitlines() if any(part in line for part in NOISE)], output
