"""What a training asks of a cluster before any work."""

import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ovd_models.errors import InputError
from workflows.common import cluster, training
from workflows.common.optimisation import Optimisation

ROOT = Path(__file__).parents[3]
STAGE = Optimisation(steps=10, learning_rate=0.1)
GROWING = """
import sys, threading
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from workflows.common import cluster

cpus, minutes, arrives = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "arrives"
nodes = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
# What an autoscaler reports: it may add one node of 4 CPUs.
group = autoscaler_pb2.NodeGroupConfig(name="small", resources={"CPU": 4}, min_count=0, max_count=1)
head = autoscaler_pb2.NodeGroupConfig(name="head", resources={"CPU": 1}, min_count=1, max_count=1)
config = autoscaler_pb2.ClusterConfig(node_group_configs=[head, group])
ray._private.worker.global_worker.gcs_client.report_cluster_config(config.SerializeToString())

def require():
    try:
        cluster.require(cpus, 0, minutes)
        print("has", ray.cluster_resources()["CPU"], flush=True)
    except (ValueError, TimeoutError) as error:
        print(type(error).__name__, error, flush=True)

waiter = threading.Thread(target=require)
waiter.start()
waiter.join(3)
if arrives:
    nodes.add_node(num_cpus=4)
waiter.join()
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
def test_workers_that_a_cluster_cannot_have_are_refused_at_once(ray_cluster: None) -> None:
    training.start_ray_for(STAGE, wait_minutes=20)
    for settings, message in (
        ({"workers": 16}, "--workers: 9 CPUs are needed, the cluster has at most 4 CPUs"),
        ({"workers": 2, "use_gpu": True}, "--workers: 2 GPUs are needed, the cluster has at most 0 GPUs"),
    ):
        with pytest.raises(InputError, match=message):
            training.start_ray_for(STAGE, Optimisation(steps=1, learning_rate=0.1, **settings), wait_minutes=20)
    assert cluster.lacking({"CPU": 3, "GPU": 1}) == {"GPU": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpus", "minutes", "node", "last"),
    [
        (4, 5, "arrives", "has 5.0"),
        (6, 5, "none", "InputError --workers: 6 CPUs are needed, the cluster has at most 5 CPUs"),
        (5, 0.05, "none", "TimeoutError the cluster has not grown to 5 CPUs in 0.05 minutes"),
    ],
)
def test_a_cluster_that_grows_is_waited_for(cpus: int, minutes: float, node: str, last: str) -> None:
    command = [sys.executable, "-c", GROWING, str(cpus), str(minutes), node]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert last in lines, done.stdout + done.stderr
    waited = f"waiting up to {minutes:g} minutes for the cluster to have {cpus} CPUs"
    assert (waited in lines) == (not last.startswith("InputError"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "no address of a cluster; jobs are submitted there with `ray job submit`"),
        ("https://head:8265", "no address of a cluster; jobs are submitted there"),
        ("tcp://127.0.0.1:6379", "no address of a cluster, expected HOST:PORT, auto, or none"),
        ("head", "no address of a cluster, expected HOST:PORT"),
        ("head:", "no address of a cluster, expected HOST:PORT"),
        ("  ", "no address of a cluster, expected HOST:PORT"),
        ("AUTO", "no address of a cluster, expected HOST:PORT"),
        ("head:ray", "no address of a cluster, expected HOST:PORT"),
        (":6379", "no address of a cluster, expected HOST:PORT"),
        ("127.0.0.1:1", "no answer ([Errno 111] Connection refused)"),
        ("ray://127.0.0.1:1", "no answer ([Errno 111] Connection refused)"),
        ("127.0.0.1:99999", "no answer ("),
        ("no.such.host.invalid:6379", "no answer ("),
    ],
)
def test_a_left_over_address_is_refused_within_seconds(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)
    with pytest.raises(InputError) as caught:
        cluster.join(address)
    assert f"RAY_ADDRESS={address}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", b"-ERR unknown command\r\n"])
def test_a_server_that_is_no_cluster_is_refused_within_seconds(
    answer: bytes, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.5)

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(answer)
            self.request.recv(1)  # until the other side is gone

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"{scheme}127.0.0.1:{server.server_address[1]}"
        with pytest.raises(InputError, match=f"RAY_ADDRESS={address}: the answer is not a cluster's, expected"):
            cluster.join(address)
        server.shutdown()


def test_auto_without_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(**options: object) -> None:  # any Ray of this machine would be found
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(cluster.ray, "init", find)
    cluster.configure_ray()
    with pytest.raises(InputError, match=r"RAY_ADDRESS=auto: no cluster [(]Could not find any running") as caught:
        cluster.join("auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "local"])
def test_an_address_of_this_machine_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    assert not cluster.is_joined()
