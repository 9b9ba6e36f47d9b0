"""A cluster loses a machine with a replica of the endpoint while it answers."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import picture, post, save_detector

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys
import ray
from ray.cluster_utils import Cluster
from ray.util import state
from workflows import serve
from workflows.common import cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
lost, kept = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = nodes.address
cluster.start_ray()
nodes.wait_for_nodes()
run = serve.Run(model=sys.argv[1], storage=sys.argv[2], port=0, replicas=2, cpus=1)
with serve.serve_model(run) as url:
    print(url, flush=True)
    sys.stdin.readline()
    nodes.remove_node(lost, allow_graceful=False)
    print("removed", flush=True)
    sys.stdin.readline()
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    print("added", flush=True)
    sys.stdin.readline()
ray.shutdown()
nodes.shutdown()
"""


class Load:
    """Clients that send pictures until they are told to stop."""

    def __init__(self, url: str, clients: int) -> None:
        self.statuses, self.lasts, self.stopped = Counter[int](), Counter[int](), threading.Event()
        self.threads = ThreadPoolExecutor(clients)
        self.running = [self.threads.submit(self._send, url, seed) for seed in range(clients)]

    def _send(self, url: str, seed: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as session:
            while not self.stopped.is_set():
                status = post(session, "detect", picture(seed=seed)).status_code
                self.statuses[status] += 1
                if status == 503:
                    time.sleep(0.2)
            self.lasts[status] += 1

    def stop(self) -> None:
        self.stopped.set()
        for running in self.running:
            running.result()
        self.threads.shutdown()


def test_a_lost_machine_loses_no_request(tmp_path: Path) -> None:
    model = save_detector(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        env={**environment, "RAY_AUTH_MODE": "disabled"}, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    lines: list[str] = []

    def wait_for(start: str) -> str:
        for line in server.stdout or ():
            lines.append(line)
            if line.startswith(start):
                return line.strip()
        raise AssertionError("".join(lines))

    def step(start: str) -> None:
        assert server.stdin is not None
        server.stdin.write("\n")
        wait_for(start)

    try:
        load = Load(wait_for("http"), 4)
        time.sleep(3)
        before = load.statuses.total()
        step("removed")
        time.sleep(15)
        step("added")
        time.sleep(30)
        load.stop()
        server.stdin.write("\n")
        output, _ = server.communicate(timeout=120)
        assert server.returncode == 0, "".join(lines) + output
    finally:
        server.kill()
    print(f"{before} requests before, {load.statuses} in all")
    assert before > 0
    assert load.statuses.keys() <= {200, 503}, load.statuses
    assert load.lasts == {200: 4}
