"""Kills of jobs and of their processes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

TESTS = Path(__file__).parent

MOST_REPEATED = 0.05
"""Share of the work that a killed job may do again."""


def children_named(job: subprocess.Popen[str], words: str) -> list[int]:
    """Processes of the job's session whose command line holds the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if words in (entry / "cmdline").read_text() and os.getsid(int(entry.name)) == job.pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def start(program: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Run a program with the tests' helpers in a session of its own, and on no cluster that is there."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # The project comes first, or `workflows` would be the tests' folder.
    paths = os.pathsep.join(filter(None, (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**environment, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths, **variables},
    )  # fmt: skip


def finish(job: subprocess.Popen[str], timeout: float) -> str:
    """The output of a job that succeeds."""
    output, _ = job.communicate(timeout=timeout)
    assert job.returncode == 0, output
    return output


def join_cluster_that_loses_a_node(storage: str, saved: str, seconds: float) -> Cluster:
    """Join a new cluster of two nodes of two CPUs. One ends some time after the job has saved files of a pattern."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    node = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()

    def kill() -> None:
        while not list(Path(storage).glob(saved)):
            time.sleep(0.02)
        time.sleep(seconds)
        cluster.remove_node(node, allow_graceful=False)
        print("node removed", flush=True)

    threading.Thread(target=kill, daemon=True).start()
    return cluster
