"""A Ray head node as `ray start --head` makes it, beside all others of the machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RAY = Path(sys.executable).parent / "ray"


@dataclass(frozen=True)
class Head:
    """A head node of its own: other Ray instances of this machine are neither seen nor touched."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports below the range that the kernel gives to clients, so that none is taken in between."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() % 5_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            break
    return found


def processes_of(folder: str) -> list[int]:
    """Processes whose command line names the folder, or that work in it: some of Ray's change their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command, place = (entry / "cmdline").read_bytes(), (entry / "cwd").readlink()
            except OSError:
                continue
            if folder.encode() in command or place.is_relative_to(folder):
                found.append(int(entry.name))
    return found


def end(folder: str) -> None:
    """End what the head node started: `ray stop` would end every Ray of the machine."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_of(folder):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 4
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.2)


@contextlib.contextmanager
def started_head(variables: dict[str, str]) -> Iterator[Head]:
    """A head node; `variables` are added to the environment in which it is started and asked."""
    folder = tempfile.mkdtemp(prefix="ovdjob", dir="/tmp")  # socket paths below it must stay short
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "runtime-env-agent-port", "ray-client-server-port", "node-manager-port")
    names += ("object-manager-port", "min-worker-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **kept,
        "PATH": f"{RAY.parent}{os.pathsep}{kept['PATH']}",  # as in an activated environment: the jobs' `python`
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        **variables,
    }
    command = [str(RAY), "start", "--head", f"--temp-dir={folder}", "--num-cpus=4", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--max-worker-port={ports['min-worker-port'] + 200}"]
    try:
        started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
        assert started.returncode == 0, started.stdout + started.stderr
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", environment)
    finally:
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)
