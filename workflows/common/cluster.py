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
    "RAY_prestart_worker_first_driver": "0",  # a process costs a second of CPU: start none in advance
    "RAY_enable_worker_prestart": "0",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # keep freed image memory for the next image
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle torch threads would spin and take cores from data tasks
}


def configure_ray() -> None:
    """Set what Ray's libraries read from the environment, also where no Ray is started."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "ray.data" in sys.modules:  # imported before the environment was set
        ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_ray() -> None:
    """Connect to the cluster this job runs on, or start Ray on this machine; does nothing if Ray is running."""
    configure_ray()
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env={"env_vars": {"OMP_WAIT_POLICY": ENVIRONMENT["OMP_WAIT_POLICY"]}})
        return
    # Oversubscribed CPUs: training, data tasks and serving wait on each other most of the time, and a pool of exactly
    # the machine's size can deadlock them.
    ray.init(
        address="local",  # not a cluster that another user started here
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": "workflows.common.quiet.setup"},
    )
    # Ray has installed a handler that aborts; this one ends the script as Ctrl-C does.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def is_joined() -> bool:
    """Whether this process has joined a cluster, or its job runs on one."""
    return ray.is_initialized() or "RAY_ADDRESS" in os.environ


def cores() -> int:
    """CPUs of the cluster, or the real ones of this machine, which Ray oversubscribes."""
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    alone = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
    return max(1, min(cpus, os.cpu_count() or 1) if alone else cpus)
