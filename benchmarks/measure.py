"""CPU time and memory of a command, including all processes it starts, even those that outlive their parents.

CPU time comes from a control group made for the command. If this user may not make one, it is the sum of the processes'
last samples, which misses what they use after them.
"""

import ctypes
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / "runs" / "bench"
"""Folder of the benchmarks' figures and working files."""
SAMPLE_SECONDS = 0.25
LINGER_SECONDS = 15.0
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a command."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    """User and system time of all its processes."""
    peak_gb: float
    """Highest sum of the processes' proportional set sizes, in units of 10^9 bytes."""


def measure(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    cap_gb: float = float("inf"),
    sample_seconds: float = SAMPLE_SECONDS,
) -> Cost:
    """Run a command to its end, and kill the processes that it leaves behind.

    Args:
        command: program and arguments.
        log: file for its output.
        cwd: its working folder.
        env: its environment.
        cap_gb: memory at which all its processes are killed.
        sample_seconds: between two samples of memory; sampling costs CPU time too.
    """
    group = make_group()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
    earlier = set(descendants())
    enter = ["sh", "-c", 'echo 0 > "$0"/cgroup.procs; exec "$@"', str(group)] if group else []
    used: dict[tuple[int, str], float] = {}
    peak = 0.0
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen([*enter, *command], stdout=sink, stderr=subprocess.STDOUT, cwd=cwd, env=env)

    def sample() -> list[int]:
        nonlocal peak
        alive = [pid for pid in descendants() if pid not in earlier]
        used.update(filter(None, map(cpu_seconds, alive)))
        memory = sum(map(pss_bytes, alive)) / 1e9
        peak = max(peak, memory)
        if memory > cap_gb:
            kill(alive)
        return alive

    while process.poll() is None:
        sample()
        try:
            process.wait(sample_seconds)
        except subprocess.TimeoutExpired:
            continue
    wall = time.monotonic() - started
    while (left := sample()) and time.monotonic() - started - wall < LINGER_SECONDS:
        reap(left)
        time.sleep(SAMPLE_SECONDS)
    kill(left)
    while left:
        reap(left)
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
    cpu = group_seconds(group) if group else sum(used.values())
    return Cost(exit_code=process.returncode, wall_seconds=wall, cpu_seconds=cpu, peak_gb=peak)


def provenance(tree: Path = REPOSITORY) -> dict[str, str]:
    """The commit of the code and the machine, which every file of figures records."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"commit": commit, "machine": machine}


def write_figures(name: str, figures: Mapping[str, object]) -> None:
    """Write `runs/bench/<name>.json`: the figures and their provenance."""
    BENCH.mkdir(parents=True, exist_ok=True)
    (BENCH / f"{name}.json").write_text(json.dumps({**figures, **provenance()}, indent=1) + "\n")


def update_figures(name: str, figures: Mapping[str, float], tree: Path = REPOSITORY) -> None:
    """Update some figures of `runs/bench/<name>.json`, and keep the others."""
    BENCH.mkdir(parents=True, exist_ok=True)
    path = BENCH / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    rounded = {key: float(f"{value:.6g}") for key, value in figures.items()}
    path.write_text(json.dumps({**earlier, **rounded, **provenance(tree)}, indent=1) + "\n")


def make_group() -> Path | None:
    """A new control group that counts CPU time, below that of this process; None if that is not allowed."""
    roots = {"cpuacct": Path("/sys/fs/cgroup/cpuacct"), "": Path("/sys/fs/cgroup")}
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for controller, root in roots.items():
        for _, controllers, path in lines:
            if controller in controllers.split(","):
                group = root / path.lstrip("/") / f"measure-{os.getpid()}-{time.monotonic_ns()}"
                try:
                    group.mkdir()
                except OSError:
                    continue
                if (group / "cgroup.procs").exists():
                    return group
    return None


def group_seconds(group: Path) -> float:
    """The CPU time of an empty control group, which is then removed."""
    usage = group / "cpuacct.usage"
    if usage.exists():
        seconds = int(usage.read_text()) / 1e9
    else:
        seconds = int((group / "cpu.stat").read_text().split()[1]) / 1e6
    group.rmdir()
    return seconds


def descendants() -> list[int]:
    """All processes that this one started, directly or indirectly."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [os.getpid()]
    while queue:
        more = children.get(queue.pop(), [])
        found += more
        queue += more
    return found


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_seconds(pid: int) -> tuple[tuple[int, str], float] | None:
    """A unique identity of the process, and the CPU time it has used; None once it is gone."""
    fields = stat_fields(pid)
    return ((pid, fields[19]), (int(fields[11]) + int(fields[12])) / TICKS) if fields else None


def pss_bytes(pid: int) -> int:
    """Memory of a process, including its share of shared memory."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def resident_mb(field: str) -> float:
    """This process's memory (`VmRSS`), or its peak since `reset_peak` (`VmHWM`), in units of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1e6


def reset_peak() -> float:
    """Reset this process's peak memory, since imports have a peak of their own; returns its memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def kill(pids: Sequence[int]) -> None:
    """Kill processes, some of which may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def reap(pids: Sequence[int]) -> None:
    """Collect ended orphans, so that they do not stay as zombies."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue
