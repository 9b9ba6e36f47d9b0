"""Jobs on a disk that fills up, a tmpfs in a namespace of its own: one line, exit 1, no half-written file."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = re.compile(r"PlacementGroupCleaner|core_worker\.cc|\(raylet\)")
"""Lines of Ray's own: about other Rays of this machine, and about actors that the job ends."""
ENTER = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def can_mount(place: Path) -> bool:
    try:
        mount = f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(str(place))}"
        return subprocess.run([*ENTER, mount], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("size", "job"),
    [
        ("1500k", "prepare_pairs.py"),  # while parts are saved
        # at a checkpoint; MLflow's database is on the same disk
        pytest.param("12m", "clip.py", marks=pytest.mark.slow),
        pytest.param("1500k", "prepare_pairs.py --crawlers 1", marks=pytest.mark.slow),
        pytest.param("12m", "clip.py --workers 1", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_ends_a_job_in_one_line(size: str, job: str, tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("no file system can be mounted here, expected user namespaces")
    command = f"{shlex.quote(sys.executable)} {ROOT}/workflows/{job} --config smoke --storage store"
    place = shlex.quote(str(tmp_path))
    script = f"mount -t tmpfs -o size={size} tmpfs {place}; cd {place}; {command}; echo $?; find . -name '*.tmp'"
    done = subprocess.run([*ENTER, script], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "1"  # and no temporary file after it
    errors = [line for line in done.stderr.splitlines() if not RAY.search(line)]
    (line,) = errors
    assert line.startswith("error: ")
    assert "No space left on device" in line
    if job.startswith("prepare_pairs.py"):
        assert re.match(r"error: /.+: cannot be written: ", line)
