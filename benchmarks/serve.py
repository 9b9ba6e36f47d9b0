"""The endpoint under load: overhead, throughput, overload, a killed replica, a new champion.

make bench-serve        # prints a table and writes runs/bench/serve.json; needs the demo's model, or --model FOLDER
python benchmarks/serve.py --model runs/demo/codet --seconds 60

The load comes from a second process on loopback. Pictures are scenes of the pictogram world, every one of them new to
the server unless a figure says otherwise.

overhead_p50_ms: median of `POST /v1/detect` minus that of `detector.detect(bytes, names).to_list()` in this process
throughput_fraction: images per CPU-second of the replica, 16 clients, over those of `detect` on batches in this process
second_prompt_speedup: median of a request for a new picture over that for the same picture with other names
overload_failures: requests answered by neither 200 nor 503 in a minute at four times the capacity
overload_memory_growth_mb: growth of the replica's memory by that minute
start_seconds: from the start of the script to the first answer
lost_on_kill, lost_on_swap: requests answered by neither 200 nor 503 while the replica is killed, or a champion changes
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the replicas, before torch reads it

import numpy as np
import torch
from measure import BENCH, REPOSITORY, cpu_seconds, descendants, pss_bytes, update_figures
from PIL import Image

CLIENTS = 16
NAMES = ("umbrella", "anchor", "snowman", "telephone", "scissors", "cat", "cow", "star")
OTHER_NAMES = ("heart", "moon", "sun", "flower", "key", "gear", "cloud", "cup")
PARTS = ["overhead", "throughput", "overload", "kill", "swap"]
TARGETS = {
    "overhead_p50_ms": "at most 12",
    "throughput_fraction": "at least 0.9",
    "second_prompt_speedup": "at least 5",
    "overload_failures": "0",
    "overload_memory_growth_mb": "at most 100",
    "start_seconds": "at most 15",
    "lost_on_kill": "0",
    "lost_on_swap": "0",
}


def draw_pictures(count: int) -> list[bytes]:
    """Scenes as JPEG files."""
    from data_prep.pictograms.world import SCENES, World, encode_jpeg

    world, rng = World.create(), np.random.default_rng(0)
    return [encode_jpeg(world.scene(rng, SCENES).pixels) for _ in range(count)]


class Sender:
    """A client with one connection; every picture gets a new digest by bytes that decoders do not read."""

    def __init__(self, url: str, seed: int) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.seed, self.sent = parts.hostname or "", parts.port or 80, seed, 0
        self.connection = http.client.HTTPConnection(self.host, self.port, timeout=120)

    def fresh(self, picture: bytes) -> bytes:
        """The picture with a digest of its own."""
        self.sent += 1
        return picture + f"{self.seed}-{self.sent}".encode()

    def detect(self, picture: bytes, names: tuple[str, ...] = NAMES) -> int:
        """Status of a request; 0 if there was no answer."""
        query = "/v1/detect?vocabulary=" + json.dumps(names).replace(" ", "%20").replace('"', "%22")
        try:
            self.connection.request("POST", query, picture, {"Content-Type": "image/jpeg"})
            answer = self.connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            return 0
        return answer.status


def load(url: str, seconds: float, clients: int) -> dict[str, int]:
    """Statuses of a load by `clients` that send one request after another; refused ones wait as they are told to."""
    pictures, statuses, lock = draw_pictures(32), Counter[int](), threading.Lock()
    end = time.monotonic() + seconds

    def run(seed: int) -> None:
        sender, own = Sender(url, seed), Counter[int]()
        while time.monotonic() < end:
            status = sender.detect(sender.fresh(pictures[sender.sent % len(pictures)]))
            own[status] += 1
            if status == 503:
                time.sleep(0.1)
        with lock:
            statuses.update(own)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {str(status): count for status, count in statuses.items()}


def start_load(url: str, seconds: float, clients: int) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--load", url, "--seconds", str(seconds), "--clients", str(clients)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def statuses_of(process: "subprocess.Popen[str]") -> Counter[str]:
    output, _ = process.communicate()
    return Counter(json.loads(output))


def failures(statuses: Counter[str]) -> int:
    return sum(count for status, count in statuses.items() if status not in ("200", "503"))


@contextlib.contextmanager
def endpoint(model: str, storage: Path, *flags: str) -> Iterator[tuple[str, float]]:
    """Start `serve.py`; yields its URL and the seconds to its first answer."""
    command = [sys.executable, str(REPOSITORY / "workflows/serve.py"), "--model", model, "--port", "0"]
    picture = draw_pictures(1)[0]
    log = (BENCH / "serve.log").open("w")
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--storage", str(storage), *flags], stdout=subprocess.PIPE, stderr=log, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " at " not in line:
                raise SystemExit(f"serve.py did not start, see {log.name}")
            url = line.split(" at ")[1].split(";")[0]
            sender = Sender(url, 0)
            while sender.detect(picture) != 200:
                time.sleep(0.05)
            yield url, time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def replicas() -> list[int]:
    """Process ids of the endpoint's replicas."""
    found = []
    for pid in descendants():
        with contextlib.suppress(OSError):
            if b"ServeReplica" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def cpu_of(pids: list[int]) -> float:
    return sum(used[1] for used in map(cpu_seconds, pids) if used)


def measure_overhead(url: str, model: str, rounds: int) -> dict[str, float]:
    """Latencies over HTTP and in this process, alternated, and those of a picture that the server has seen."""
    import ovd_models

    detector, sender = ovd_models.load(model), Sender(url, 1)
    own, http_new, http_seen = [], [], []
    for index, picture in enumerate(draw_pictures(rounds)):
        content = sender.fresh(picture)
        steps = [
            (own, lambda content=content: detector.detect(content, NAMES).to_list()),
            (http_new, lambda content=content: sender.detect(content)),
            (http_seen, lambda content=content: sender.detect(content, OTHER_NAMES)),
        ]
        for times, step in steps:
            started = time.perf_counter()
            step()
            if index >= 5:  # the first ones warm up
                times.append(1000 * (time.perf_counter() - started))
    own_ms, new_ms, seen_ms = map(statistics.median, (own, http_new, http_seen))
    return {
        "process_p50_ms": own_ms,
        "http_p50_ms": new_ms,
        "overhead_p50_ms": new_ms - own_ms,
        "second_prompt_p50_ms": seen_ms,
        "second_prompt_speedup": new_ms / seen_ms,
    }


def measure_throughput(url: str, model: str, seconds: float) -> dict[str, float]:
    """Images per CPU-second of the bare batched model and of the replica."""
    import ovd_models

    detector, pictures = ovd_models.load(model), draw_pictures(64)
    torch.set_num_threads(1)  # the most images per CPU-second
    before = time.process_time()
    for start in range(0, len(pictures), 8):
        detector.detect(pictures[start : start + 8], NAMES)
    before, count = time.process_time(), 0
    while time.process_time() - before < seconds / 2:
        for start in range(0, len(pictures), 8):
            count += len(detector.detect(pictures[start : start + 8], NAMES))
    bare = count / (time.process_time() - before)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pids = replicas()
    used = cpu_of(pids)
    statuses = statuses_of(start_load(url, seconds, CLIENTS))
    served = statuses["200"] / (cpu_of(pids) - used)
    return {
        "bare_images_per_cpu_second": bare,
        "served_images_per_cpu_second": served,
        "throughput_fraction": served / bare,
        "images_per_second": statuses["200"] / seconds,
    }


def measure_overload(url: str, seconds: float, clients: int) -> dict[str, float]:
    """Failures and growth of memory under a load far above capacity."""
    (pid,) = replicas()
    statuses_of(start_load(url, 10, CLIENTS))  # caches are full, and threads have their memory
    time.sleep(3)
    before = pss_bytes(pid)
    statuses = statuses_of(start_load(url, seconds, clients))
    time.sleep(3)
    return {
        "overload_clients": clients,
        "overload_answered": statuses["200"],
        "overload_refused": statuses["503"],
        "overload_failures": failures(statuses),
        "overload_memory_growth_mb": (pss_bytes(pid) - before) / 1e6 if [pid] == replicas() else float("nan"),
    }


def measure_kill(url: str) -> dict[str, float]:
    """Requests lost when the only replica is killed under load."""
    process = start_load(url, 25, 8)
    time.sleep(6)
    for pid in replicas():
        os.kill(pid, signal.SIGKILL)
    statuses = statuses_of(process)
    return {"kill_answered": statuses["200"], "kill_refused": statuses["503"], "lost_on_kill": failures(statuses)}


def register(folder: Path, storage: Path, value: float) -> None:
    """Register a checkpoint; the higher value becomes champion."""
    from workflows.common import registry, tracking

    with tracking.run(str(storage), experiment="bench", name=f"bench {value}", params={}) as tracked:
        registry.register(tracked, folder, method="codet", data_set="bench", metric="ap50_novel", value=value)


def measure_swap(model: str, storage: Path) -> dict[str, float]:
    """Requests lost when a new champion is registered under load."""
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "model"
        shutil.copytree(model, other)
        info = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(info | {"run": {"note": "second version"}}))
        register(Path(model), storage, 0.1)
        with endpoint("models:/ovd-codet-bench@champion", storage, "--refresh-seconds", "1") as (url, _):
            process = start_load(url, 20, 8)
            time.sleep(5)
            register(other, storage, 0.2)
            statuses = statuses_of(process)
            parts = urlsplit(url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
            connection.request("GET", "/v1/model")
            version = json.loads(connection.getresponse().read())["version"]
    if version != "2":
        raise SystemExit(f"the new champion was not taken up: version {version}")
    return {"swap_answered": statuses["200"], "lost_on_swap": failures(statuses)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/codet", help="a detector's checkpoint folder")
    parser.add_argument("--seconds", type=float, default=60, help="length of the overload")
    parser.add_argument("--clients", type=int, default=4 * (CLIENTS + 1), help="clients of the overload")
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}; the other figures stay")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.seconds, arguments.clients)))
        return
    if not Path(arguments.model, "config.json").is_file():
        raise SystemExit(f"{arguments.model}: no checkpoint; `make demo` trains one, or give --model FOLDER")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what it has started
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    Image.open(io.BytesIO(draw_pictures(1)[0])).load()
    BENCH.mkdir(parents=True, exist_ok=True)
    parts = arguments.only.split(",") if arguments.only else PARTS
    with tempfile.TemporaryDirectory() as storage:
        if parts != ["swap"]:
            with endpoint(arguments.model, Path(storage)) as (url, seconds):
                record({"start_seconds": seconds})
                if "overhead" in parts:
                    record(measure_overhead(url, arguments.model, 105))
                if "throughput" in parts:
                    record(measure_throughput(url, arguments.model, 15))
                if "overload" in parts:
                    record(measure_overload(url, arguments.seconds, arguments.clients))
                if "kill" in parts:
                    record(measure_kill(url))
        if "swap" in parts:
            record(measure_swap(arguments.model, Path(storage)))


def record(figures: dict[str, float]) -> None:
    """Print figures and write them, since a later part may fail."""
    update_figures("serve", figures)
    for name, value in figures.items():
        print(f"{name:32} {value:>12.3f}   {TARGETS.get(name, '')}", flush=True)


if __name__ == "__main__":
    main()
