"""Prometheus metrics of the replicas of one machine: counts and times, never what a client sent."""

import os
import shutil
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of the folder in which the replicas of a machine share their metrics; prometheus_client reads it."""
LIVE = ".live"
"""End of the name of a file for each process that uses the folder."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        if DIRECTORY in os.environ:
            folder = Path(os.environ[DIRECTORY])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{os.getpid()}{LIVE}").touch()
        self.requests = Counter("ovd_requests", "Answered requests", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "ovd_seconds", "Seconds of a request by stage: queue, decode, text, encode, answer, total",
            ("route", "stage"), buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "ovd_batch_images", "Images encoded at a time", ("model",), buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.cache = Counter(
            "ovd_cache", "Look-ups of encoded images and embedded names", ("cache", "result"), registry=registry
        )
        self.cache_bytes = Gauge(
            "ovd_cache_bytes", "Bytes in a cache", ("cache",), registry=registry, multiprocess_mode="livesum"
        )
        self.swaps = Counter("ovd_model_swaps", "Models replaced by a new version", ("model",), registry=registry)

    def page(self) -> bytes:
        """Prometheus text of all replicas of this machine."""
        if DIRECTORY not in os.environ:
            return generate_latest(self.registry)
        for path in Path(os.environ[DIRECTORY]).glob("gauge_live*_*.db"):
            pid = path.stem.rpartition("_")[2]
            if not is_running(int(pid)):  # else the caches of dead replicas would be counted for ever
                multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return generate_latest(shared)


def remove_if_last() -> None:
    """Remove the shared folder if no other process of this machine uses it; called when a replica ends."""
    if DIRECTORY not in os.environ:
        return
    folder = Path(os.environ[DIRECTORY])
    (folder / f"{os.getpid()}{LIVE}").unlink(missing_ok=True)
    if not any(is_running(int(path.stem)) for path in folder.glob(f"*{LIVE}")):
        shutil.rmtree(folder, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
