"""The application on a cluster: `serve deploy`, a model in object storage, more replicas under load, draining."""

import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from head_node import RAY, Head, free_ports, started_head
from object_storage import BUCKET, client, s3_server
from serving import NAMES, picture, save_detector

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Object storage with two checkpoints."""
    with s3_server() as variables:
        for seed in (0, 1):
            folder = save_detector(tmp_path_factory.mktemp("model"), seed)
            for path in folder.rglob("*"):
                if path.is_file():
                    key = f"models/{seed}/{path.relative_to(folder)}"
                    client(variables).upload_file(str(path), BUCKET, key)
        yield variables


@pytest.fixture(scope="module")
def head(variables: dict[str, str]) -> Iterator[Head]:
    quiet = {"RAY_AUTH_MODE": "disabled", "OVD_TOKEN": "secret", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with started_head({**variables, **quiet}) as started:
        yield started


@pytest.fixture(scope="module")
def port() -> int:
    return free_ports(40)[-1]


def deploy(head: Head, folder: Path, port: int, **args: Any) -> None:
    """`serve deploy` of the published file with other arguments, until the application runs."""
    config = yaml.safe_load((ROOT / "deploy/serve.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"storage": f"s3://{BUCKET}/ovd", "gpus": 0, "cpus": 0.5, **args}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(RAY.with_name("serve")), "deploy", "--address", head.address, str(folder / "serve.yaml")]
    sent = subprocess.run(command, env=head.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert sent.returncode == 0, sent.stdout + sent.stderr


def wait_for_model(url: str, uri: str, seconds: float = 180) -> None:
    deadline, seen = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            answer = ask_model(url)
            seen = answer.text
            if answer.status_code == 200 and answer.json()["checkpoint"] == uri:
                return
        except httpx.HTTPError as error:
            seen = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{uri} is not served: {seen}")


def ask_model(url: str) -> httpx.Response:
    return httpx.get(f"{url}/v1/model", headers={"authorization": "Bearer secret"}, timeout=20)


class Load:
    """Clients that send one request after the other until they are told to stop."""

    def __init__(self, url: str, clients: int) -> None:
        self.url, self.stopped, self.statuses = url, threading.Event(), Counter[int]()
        self.threads = ThreadPoolExecutor(clients)
        self.running = [self.threads.submit(self._send, number) for number in range(clients)]

    def _send(self, number: int) -> None:
        headers = {"authorization": "Bearer secret", "content-type": "image/png"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=120) as session:
            sent = 0
            while not self.stopped.is_set():
                content = picture(seed=0) + f"{number}-{sent}".encode()  # a digest of its own
                sent += 1
                try:
                    answer = session.post("/v1/detect", content=content, params={"vocabulary": '["anchor"]'})
                    self.statuses[answer.status_code] += 1
                except httpx.HTTPError:
                    self.statuses[0] += 1

    def stop(self) -> Counter[int]:
        self.stopped.set()
        for running in self.running:
            running.result()
        self.threads.shutdown()
        return self.statuses


def replicas(head: Head) -> int:
    """Running replicas, as the controller counts them."""
    command = [str(RAY.with_name("serve")), "status", "--address", head.address]
    shown = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=60)
    status = yaml.safe_load(shown.stdout)
    return int(status["applications"]["ovd"]["deployments"]["Endpoint"]["replica_states"].get("RUNNING", 0))


def test_a_model_in_object_storage_is_deployed_scaled_replaced_and_drained(
    head: Head, port: int, tmp_path: Path
) -> None:
    url, (first, second) = f"http://127.0.0.1:{port}", (f"s3://{BUCKET}/models/{seed}" for seed in (0, 1))
    deploy(head, tmp_path, port, model=first, replicas=1, max_replicas=2)
    wait_for_model(url, first)
    assert httpx.get(f"{url}/v1/model", timeout=20).status_code == 401
    assert replicas(head) == 1

    load = Load(url, 16)
    deadline = time.monotonic() + 120
    while replicas(head) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    scaled = replicas(head)
    deploy(head, tmp_path, port, model=second, replicas=2, max_replicas=2)
    wait_for_model(url, second)
    time.sleep(5)
    statuses = load.stop()
    assert scaled == 2
    assert statuses.keys() <= {200, 503}, statuses
    assert statuses[200] > 50
    answer = httpx.post(
        f"{url}/v1/detect",
        content=picture(seed=0),
        params={"vocabulary": '["anchor", "umbrella"]'},
        headers={"authorization": "Bearer secret", "content-type": "image/png"},
        timeout=60,
    )
    assert answer.status_code == 200
    assert {entry["label"] for entry in answer.json()["detections"]} <= set(NAMES)
