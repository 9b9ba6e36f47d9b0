"""Trainings whose workers, nodes and driver end at any moment equal undisturbed ones."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from trainings import TRAIN, largest_difference, weights_of

from workflows.common import runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAM = """
import dataclasses, os, random, signal, sys, threading, time
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from trainings import LAST, STAGES, TRAIN, smoke
from workflows.common import cluster, runs, training

method, storage, event, resume, delay, steps = *sys.argv[1:5], float(sys.argv[5]), int(sys.argv[6])
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
node = nodes.add_node(num_cpus=4)
nodes.add_node(num_cpus=4, resources={"spare": 1})
os.environ["RAY_ADDRESS"] = nodes.address
cluster.start_ray()
nodes.wait_for_nodes()
resources = {each["NodeID"]: each["Resources"] for each in ray.nodes()}
(node_id,) = [name for name, found in resources.items() if "CPU" in found and "spare" not in found]

@ray.remote(num_cpus=4, resources={"spare": 1})
class Occupied:
    def there(self):
        return True

occupied = Occupied.remote()  # nodes can be added by the main thread alone, so the spare one is there already
ray.get(occupied.there.remote())

run = smoke(method, storage)
every = 100 if event == "notice" else 10
settings = {"workers": 2, "steps": steps, "checkpoint_every": every, "log_every": 5}
stages = {name: dataclasses.replace(getattr(run, name), **settings) for name in STAGES[method]}
run = dataclasses.replace(run, **stages, resume=resume)

def last_stage():
    return f"{storage}/runs/{method}/{resume or runs.find_run(storage, method, 'smoke')}/{LAST[method]}"

def workers():
    names = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue
    return [pid for pid, name in names.items() if "RayTrainWorker" in name and os.getsid(pid) == os.getsid(0)]

def disturb():
    while not os.path.exists(last_stage()) or len(workers()) < 2:
        time.sleep(0.1)
    while not training.committed_step(last_stage()):
        time.sleep(0.02)
    time.sleep(delay)
    print(f"{event} at {time.time()} after step {training.committed_step(last_stage())}", flush=True)
    if event == "driver":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event == "worker" and (found := workers()):
        os.kill(random.choice(found), signal.SIGKILL)
    elif event in ("node", "notice"):
        ray.kill(occupied)
        if event == "notice":  # as a cloud takes spot nodes
            gcs = ray._private.worker.global_worker.gcs_client
            assert gcs.drain_node(node_id, 2, "a spot node is taken away", int(1000 * (time.time() + 20)))[0]
            time.sleep(20)
        nodes.remove_node(node, allow_graceful=False)

if event != "none":
    threading.Thread(target=disturb, daemon=True).start()
print("model:", TRAIN[method](run).model, flush=True)
ray.shutdown()
nodes.shutdown()
"""


def train(
    method: str, storage: Path, event: str = "none", *, resume: str = "", delay: float = 0.0, steps: int = 40
) -> str:
    """Train on two workers of a cluster of two nodes, disturbed once in the last stage; returns the output."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, method, str(storage), event, resume, str(delay), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"},
        start_new_session=True,
        timeout=400,
    )
    assert (done.returncode == 0) != (event == "driver"), done.stdout
    return done.stdout


def model_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("model: ")]
    return line.removeprefix("model: ")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model of a run of each training that nothing disturbs, made when it is first asked for."""

    class Models(dict[str, str]):
        def __missing__(self, method: str) -> str:
            self[method] = model_of(train(method, tmp_path_factory.mktemp(method)))
            return self[method]

    return Models()


@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_a_random_moment_changes_nothing(undisturbed: dict[str, str], tmp_path: Path, trial: int) -> None:
    method, event = list(TRAIN)[trial % 4], ("worker", "driver", "node")[trial % 3]
    output = train(method, tmp_path, event, delay=random.Random(trial).uniform(0.0, 3.0))
    if event == "driver":
        output = train(method, tmp_path, resume=runs.find_run(str(tmp_path), method, "smoke"))
    assert largest_difference(weights_of(undisturbed[method]), weights_of(model_of(output))) <= 1e-5


def test_a_notice_that_a_node_goes_is_answered_by_a_checkpoint(tmp_path: Path) -> None:
    whole = train("clip", tmp_path / "whole", steps=1000)
    output = train("clip", tmp_path / "noticed", "notice", delay=2.0, steps=1000)
    found = re.findall(r"clip train: a node will be taken away, saving step (\d+)", output)
    assert len(found) == 1, output
    step = int(found[0])
    assert 100 < step < 1000
    # Lines of steps that the second group of workers trained: it went on from the step that was saved.
    steps = [int(found) for found in re.findall(r"clip train (\d+)/1000", output)]
    assert steps.count(step) == 1
    assert max(Counter(steps).values()) == 2  # steps between the notice and the node's end are trained again
    assert min(found for found, count in Counter(steps).items() if count == 2) > step
    assert largest_difference(weights_of(model_of(whole)), weights_of(model_of(output))) <= 1e-5
