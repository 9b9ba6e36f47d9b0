"""Joining Ray: the cluster this job runs on, or a small one on this machine."""

import logging
import os
import signal
import sys
import threading

import ray

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks for about one interval
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line is printed twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # progress is one line of ours
    "RAY_prestart_worker_first_driver": "0",  # a process costs a second of CPU: only as many as are needed
    "RAY_enable_worker_prestart": "0",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # pictures come and go: their memory is kept for the next one
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle torch threads spin otherwise, and take the cores from the data tasks
}


def configure_ray() -> None:
    """What Ray's libraries are told, also where no Ray is started."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "ray.data" in sys.modules:  # else it reads the environment once it is imported, and not all jobs need it
        ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_ray() -> None:
    """Connect to the cluster this job runs on, or start one on this machine; nothing if that was done."""
    configure_ray()
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env={"env_vars": {"OMP_WAIT_POLICY": ENVIRONMENT["OMP_WAIT_POLICY"]}})
        return
    # More CPUs on paper than the machine has: training, data tasks and serving wait on each other most of the time,
    # and a pool of exactly the machine's size can deadlock them.
    ray.init(
        address="local",  # and not the cluster that somebody started here
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": "workflows.common.quiet.setup"},
    )
    # Ray has put a handler of its own, which aborts; this one ends the script as Ctrl-C does.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def is_joined() -> bool:
    """Whether this process has joined a cluster, or its job runs on one."""
    return ray.is_initialized() or "RAY_ADDRESS" in os.environ


def cores() -> int:
    """CPUs that can work at a time: those of the cluster, or of this machine, whose number in Ray is one on paper."""
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    alone = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
    return max(1, min(cpus, os.cpu_count() or 1) if alone else cpus)
