"""How long a training stands still when one of its workers is killed: from the kill to the next line of progress.

make bench-recovery

Trains CLIP's smoke config on two workers, kills one of them at a random step, `--kills` times, and writes
runs/bench/recovery.json: `seconds_to_next_step` is the median and `seconds_to_next_step_max` the longest.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measure import REPOSITORY, descendants, write_figures

STEPS, LINE_EVERY = 4_000, 5
STEP = re.compile(r"clip train (\d+)/")
TURNS_SECONDS = 2.0
"""Lines that come this soon after a kill are of steps before it."""


def workers() -> list[int]:
    """The workers of Ray Train that this process has started."""
    return [pid for pid in descendants() if b"RayTrainWorker" in command_line(pid)]


def command_line(pid: int) -> bytes:
    """The command line of a process; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def steps_of(training: "subprocess.Popen[str]") -> Iterator[int]:
    """The steps of the lines of progress as they are printed."""
    assert training.stdout is not None
    for line in training.stdout:
        if found := STEP.match(line):
            yield int(found[1])
    raise SystemExit(f"error: the training ended with {training.wait()} before all kills")


def kill_workers(kills: int, storage: str) -> list[float]:
    """Seconds from each kill to the first step after it."""
    flags = {"workers": 2, "steps": STEPS, "log-every": LINE_EVERY, "checkpoint-every": 50, "max-failures": kills}
    words = [word for name, value in flags.items() for word in (f"--optimisation.{name}", str(value))]
    command = [sys.executable, "workflows/clip.py", "--config", "smoke", "--storage", storage, *words]
    training = subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, start_new_session=True)
    rng, seconds = random.Random(0), []
    try:
        steps = steps_of(training)
        for _ in range(kills):
            wanted = next(steps) + rng.randrange(60, 160)
            while next(steps) < wanted:
                pass
            killed = time.monotonic()
            os.kill(rng.choice(workers()), signal.SIGKILL)
            while next(steps) and time.monotonic() - killed < TURNS_SECONDS:
                pass
            seconds.append(time.monotonic() - killed)
            print(f"next step after {seconds[-1]:.1f} s", flush=True)
    finally:
        os.killpg(training.pid, signal.SIGTERM)
        training.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    with tempfile.TemporaryDirectory(prefix="ovd-") as storage:
        seconds = kill_workers(parser.parse_args().kills, storage)
    figures = {
        "seconds_to_next_step": round(statistics.median(seconds), 1),
        "seconds_to_next_step_max": round(max(seconds), 1),
    }
    write_figures("recovery", figures)


if __name__ == "__main__":
    main()
