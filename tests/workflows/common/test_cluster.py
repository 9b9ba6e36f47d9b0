"""What a training asks of a cluster before any work."""

import dataclasses
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovd_models.errors import InputError
from workflows.common import cluster, runs, training
from workflows.common.optimisation import Optimisation
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import vild as vild_configs

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
state = autoscaler_pb2.GetClusterResourceStateReply()
state.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_resource_state())
constraints = state.cluster_resource_state.cluster_resource_constraints
print("requests left:", sum(len(each.resource_requests) for each in constraints))
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
        (5, 0.05, "none", "WaitedError the cluster has not grown to 5 CPUs in 0.05 minutes"),
    ],
)
def test_a_cluster_that_grows_is_waited_for(cpus: int, minutes: float, node: str, last: str) -> None:
    command = [sys.executable, "-c", GROWING, str(cpus), str(minutes), node]
    environment = {**os.environ, "RAY_enable_autoscaler_v2": "1"}  # as Ray's autoscaler sets it
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    lines = done.stdout.splitlines()
    assert last in lines, done.stdout + done.stderr
    waited = f"waiting up to {minutes:g} minutes for the cluster to have {cpus} CPUs"
    assert (waited in lines) == (not last.startswith("InputError"))
    assert "requests left: 0" in lines  # or machines would be kept for a job that has ended


GPU_TASK = """
import ray
import torch
from workflows.common import training
from workflows.common.optimisation import Optimisation

torch.cuda.is_available = lambda: False
ray.init(num_cpus=1, num_gpus=1, include_dashboard=False)
for workers in (0, 2):
    stage = Optimisation(steps=1, learning_rate=0.1, workers=workers, use_gpu=True)
    print(workers, *training.on_device(stage, lambda device: (device, ray.get_gpu_ids())))
ray.shutdown()
"""


@pytest.mark.slow
def test_a_driver_without_a_gpu_evaluates_on_one_of_the_cluster() -> None:
    done = subprocess.run([sys.executable, "-c", GPU_TASK], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["0 cpu []", "2 cuda [0]"], done.stderr


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
        ("127.0.0.1:99999", "no address of a cluster, expected HOST:PORT"),
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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of this machine's GPUs; it is in no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    return lambda count: monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_gpus_are_used_where_each_worker_has_one_and_nothing_else_is_said(
    gpus: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def used(count: int, **settings: Any) -> tuple[bool | None, bool | None]:
        gpus(count)
        run = codet_configs.smoke()
        stage = dataclasses.replace(run.box_stage, **settings)
        run = dataclasses.replace(run, detection_batch=2, box_stage=stage, joint_stage=stage)
        chosen = training.choose_devices(run, run.stages)
        return chosen.box_stage.use_gpu, chosen.joint_stage.use_gpu

    assert used(0) == (False, False)
    assert used(1) == used(2, workers=2) == (True, True)
    assert used(1, use_gpu=False) == (False, False)
    assert capsys.readouterr().out == ""
    assert used(1, workers=2) == (False, False)
    assert "box_stage: not on a GPU, 2 workers need one each; --workers 1 uses the GPUs here" in capsys.readouterr().out


def test_gpus_of_a_cluster_are_used_where_each_worker_can_have_one(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)  # the head's, where the script runs
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(cluster, "start_ray", lambda: None)
    monkeypatch.setattr(cluster.state, "get_max_resources_from_cluster_config", lambda: {"GPU": 2})
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 4.0})  # it has not grown yet

    def used(**settings: Any) -> bool | None:
        run = codet_configs.smoke()
        stage = dataclasses.replace(run.box_stage, **settings)
        run = dataclasses.replace(run, detection_batch=2, box_stage=stage)
        return training.choose_devices(run, run.stages).box_stage.use_gpu

    assert used(workers=2) is True
    assert used(workers=2, use_gpu=False) is False
    assert used(workers=0) is False
    monkeypatch.setattr(cluster.state, "get_max_resources_from_cluster_config", lambda: None)
    assert used(workers=2) is False
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    assert (used(workers=1), used(workers=2)) == (True, False)


def test_gpus_that_this_machine_lacks_are_refused_before_any_work(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    wanted = codet_configs.photos_8gpu()
    with pytest.raises(InputError, match=r"--use-gpu: 8 GPUs are needed, this machine has 1, expected --no-use-gpu"):
        training.choose_devices(wanted, wanted.stages)
    assert training.choose_devices(wanted, wanted.stages, dry_run=True) == wanted
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert training.choose_devices(wanted, wanted.stages) == wanted


@pytest.mark.parametrize(
    ("run", "trained"),
    [
        (codet_configs.photos_8gpu(), ["box_stage", "joint_stage"]),
        (dataclasses.replace(codet_configs.photos_8gpu(), box_model="boxes"), ["joint_stage"]),
        (dataclasses.replace(vild_configs.photos_8gpu(), proposals="rpn"), ["detector_stage"]),
        (dataclasses.replace(ovsam_configs.photos_8gpu(), sam="sam"), ["sam2clip_stage", "clip2sam_stage"]),
    ],
)
def test_stages_that_are_not_trained_need_no_gpus(run: Any, trained: list[str], gpus: Callable[[int], None]) -> None:
    gpus(1)
    assert list(run.stages) == trained
    alone = {name: dataclasses.replace(getattr(run, name), workers=1, use_gpu=True) for name in trained}
    fitted = dataclasses.replace(run, **alone)
    assert training.choose_devices(fitted, fitted.stages) == fitted


def test_a_training_begins_only_where_it_can(gpus: Callable[[int], None], tmp_path: Path) -> None:
    gpus(0)
    (tmp_path / "runs/codet/smoke-20261129").mkdir(parents=True)
    run = dataclasses.replace(codet_configs.smoke(), storage=str(tmp_path), resume="smoke-20261192")
    with pytest.raises(InputError, match=r"--resume smoke-20261192: no such run, .*; did you mean smoke-20261129\?"):
        runs.begin(run, "codet")
    assert runs.begin(dataclasses.replace(run, resume="smoke-20261129"), "codet").box_stage.use_gpu is False


def test_waiting_threads_sleep_in_a_script_that_trains_in_its_own_process() -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    shown = subprocess.run(
        [sys.executable, "-c", "from workflows.common import brief_help; import torch"],
        cwd=ROOT,
        env={**unset, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert "GOMP_SPINCOUNT = '0'" in shown.stderr  # 300,000 if nothing is set


JOINED = """
import json
import os
import ray
from ray.cluster_utils import Cluster
from data_prep import s3
from workflows.common import cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
os.environ["RAY_ADDRESS"] = nodes.address
given = {"OMP_WAIT_POLICY": "ACTIVE", "AWS_REGION": "us-east-1", "MINE": "yes"}
os.environ.update(given)  # as Ray does for the driver of a job
os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": given}, "metadata": {}})
s3.adopt("s3://bucket/ovd?endpoint_override=host:9000&scheme=http&region=eu-west-1")
cluster.start_ray()
names = ["AWS_ENDPOINT_URL_S3", "AWS_REGION", "OMP_WAIT_POLICY", "MINE"]
print("found:", *ray.get(ray.remote(lambda: [os.environ.get(name) for name in names]).remote()))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.slow
def test_workers_of_a_cluster_take_the_settings_of_the_uri_and_of_the_job() -> None:
    done = subprocess.run([sys.executable, "-c", JOINED], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert "found: http://host:9000 eu-west-1 ACTIVE yes" in done.stdout.splitlines(), done.stdout + done.stderr
