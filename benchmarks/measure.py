"""What a command costs: CPU and memory of all processes it starts, also of those that outlive their parents.

CPU comes from a control group of the command's own. Where this user may not make one, it is the sum of what each
process had used when last seen, which misses what happens between two looks.
"""

import ctypes
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_SECONDS = 0.25
LINGER_SECONDS = 15.0
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a command took."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    """User and system time of all processes."""
    peak_gb: float
    """Highest sum of the processes' proportional set sizes, in units of 10^9 bytes."""


def measure(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    cap_gb: float = float("inf"),
    look_seconds: float = LOOK_SECONDS,
) -> Cost:
    """Run a command to its end, and end what it leaves behind.

    Args:
        command: program and arguments.
        log: file that gets what it prints.
        cwd: its working folder.
        env: its environment.
        cap_gb: memory at which all its processes are killed.
        look_seconds: between two looks at memory; looking costs CPU too.
    """
    group = make_group()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
    others = set(descendants())
    enter = ["sh", "-c", 'echo 0 > "$0"/cgroup.procs; exec "$@"', str(group)] if group else []
    used: dict[tuple[int, str], float] = {}
    peak = 0.0
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen([*enter, *command], stdout=sink, stderr=subprocess.STDOUT, cwd=cwd, env=env)

    def look() -> list[int]:
        nonlocal peak
        alive = [pid for pid in descendants() if pid not in others]
        used.update(filter(None, map(cpu_seconds, alive)))
        memory = sum(map(pss_bytes, alive)) / 1e9
        peak = max(peak, memory)
        if memory > cap_gb:
            kill(alive)
        return alive

    while process.poll() is None:
        look()
        try:
            process.wait(look_seconds)
        except subprocess.TimeoutExpired:
            continue
    wall = time.monotonic() - started
    while (left := look()) and time.monotonic() - started - wall < LINGER_SECONDS:
        reap(left)
        time.sleep(LOOK_SECONDS)
    kill(left)
    while left:
        reap(left)
        left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
    cpu = group_seconds(group) if group else sum(used.values())
    return Cost(exit_code=process.returncode, wall_seconds=wall, cpu_seconds=cpu, peak_gb=peak)


def provenance(tree: Path) -> dict[str, str]:
    """What a file of figures says about where they come from: the commit of the code, and the machine."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return {"commit": told.stdout.strip(), "machine": machine}


def make_group() -> Path | None:
    """A new control group that counts CPU time, below the one of this process, or None where that is not allowed."""
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
    """The CPU time of a control group, which is empty by now and goes."""
    usage = group / "cpuacct.usage"
    if usage.exists():
        seconds = int(usage.read_text()) / 1e9
    else:
        seconds = int((group / "cpu.stat").read_text().split()[1]) / 1e6
    group.rmdir()
    return seconds


def descendants() -> list[int]:
    """All processes that this one started, directly or not."""
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
    """The fields of /proc/<pid>/stat from the state on; none once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cpu_seconds(pid: int) -> tuple[tuple[int, str], float] | None:
    """An identity of the process, which no later one shares, and the CPU time it has used."""
    fields = stat_fields(pid)
    return ((pid, fields[19]), (int(fields[11]) + int(fields[12])) / TICKS) if fields else None


def pss_bytes(pid: int) -> int:
    """Memory of a process, its share of what is shared included."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def resident_mb(field: str) -> float:
    """`VmRSS` of this process, or its highest since `forget_peak`, `VmHWM`, in units of 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1e6


def forget_peak() -> float:
    """Start this process's highest memory anew, since importing has a peak of its own; returns what it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb("VmRSS")


def kill(pids: Sequence[int]) -> None:
    """End processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def reap(pids: Sequence[int]) -> None:
    """Take note of ended orphans, so that they vanish."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue
