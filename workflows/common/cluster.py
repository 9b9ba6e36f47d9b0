"""Joining Ray: the cluster this job runs on, or a small one on this machine."""

import importlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping

import ray
from ray._private import ray_constants
from ray._private.state import state
from ray.autoscaler.sdk import request_resources

from data_prep import s3
from ovd_models.errors import InputError
from workflows.common import quiet
from workflows.common.cli import WaitedError

POLL_SECONDS = 1.0
MAX_PORT = 65_535
ANSWER_SECONDS = 10.0
"""A cluster's address that does not answer for so long is refused."""

CPUS = max(4, os.cpu_count() or 1)
"""Of a Ray that is started here; oversubscribed, see `start_ray`."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report blocks for about one interval
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each line is printed twice
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # progress is one line of ours
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what goes wrong is raised in Python; Ray's native notes look like errors
    "RAY_prestart_worker_first_driver": "0",  # a process costs a second of CPU: start none in advance
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_maximum_startup_concurrency": str(CPUS),  # Ray warns of four times as many; its own is of real cores
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # keep freed image memory for the next image
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "OMP_WAIT_POLICY": "PASSIVE",  # as in this process, see `workflows`
}


def configure_ray() -> None:
    """Set what Ray's libraries read from the environment, also where no Ray is started."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "ray.data" in sys.modules:  # imported before the environment was set
        ray.data.DataContext.get_current().enable_progress_bars = False
    ray_constants.RAY_DISABLE_WORKER_LOG_PREFIX = True  # workers' lines as they print them; read at import
    for name in ("ray.data", "ray.train", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_ray() -> None:
    """Connect to the cluster this job runs on, or start Ray on this machine; does nothing if Ray is running."""
    configure_ray()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        join(os.environ["RAY_ADDRESS"])
        return
    # Oversubscribed CPUs: training, data tasks and serving wait on each other most of the time, and a pool of exactly
    # the machine's size can deadlock them.
    with quiet.native_code():
        ray.init(
            address="local",  # not a cluster that another user started here
            num_cpus=CPUS,
            include_dashboard=False,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": "workflows.common.quiet.setup"},
        )
    quiet.drop_native_lines()
    # Ray has installed a handler that aborts; this one ends the script as Ctrl-C does.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def join(address: str) -> None:
    """Connect to the cluster at an address.

    Raises:
        InputError: nothing answers there within seconds (Ray would wait for minutes), or no cluster does.
    """
    wrong = f"RAY_ADDRESS={address}"
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if "://" in address.removeprefix("ray://"):
            hint = "; jobs are submitted there with `ray job submit`" if address.startswith("http") else ""
            raise InputError(f"{wrong}: no address of a cluster{hint}, expected HOST:PORT, auto, or none")
        if not host or not port.isdecimal() or int(port) > MAX_PORT:  # the system would take its last 16 bits
            raise InputError(f"{wrong}: no address of a cluster, expected HOST:PORT, auto, or none")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(f"{wrong}: no answer ({error}), expected a running cluster, or no RAY_ADDRESS") from error
        if not speaks_grpc(f"{host}:{port}"):
            raise InputError(f"{wrong}: the answer is not a cluster's, expected a running one, or no RAY_ADDRESS")
    # A job may set the same variables: then they have its values here already, unless a URI has replaced them.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    variables = {name: os.environ[name] for name in ENVIRONMENT} | s3.adopted  # its processes have not inherited them
    try:
        with quiet.native_code():
            ray.init(
                logging_level=logging.WARNING,
                runtime_env={
                    "env_vars": variables,
                    "worker_process_setup_hook": "workflows.common.quiet.setup_on_cluster",
                },
            )
        quiet.drop_native_lines()
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{wrong}: no cluster ({reason}), expected a running one, or no RAY_ADDRESS") from error


def speaks_grpc(address: str) -> bool:
    """Whether a server of gRPC, as a cluster's is, answers within `ANSWER_SECONDS`; Ray would wait for two minutes."""
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # needs the cluster's certificates
        return True
    grpc = importlib.import_module("grpc")  # has no types
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


def require(cpus: float, gpus: float, wait_minutes: float, flags: str = "--workers") -> None:
    """Return once the cluster has these resources, which some flags ask for. A cluster that grows is asked for them.

    Raises:
        InputError: the cluster cannot have them.
        WaitedError: it has not grown in time.
    """
    needed = {"CPU": cpus, "GPU": gpus}
    missing = lacking(needed)
    if not missing:
        return
    wanted = ", ".join(f"{need:g} {name}s" for name, need in missing.items())
    if any(most(name) < need for name, need in missing.items()):
        found = ", ".join(f"{most(name):g} {name}s" for name in missing)
        raise InputError(f"{flags}: {wanted} are needed, the cluster has at most {found}")
    print(f"waiting up to {wait_minutes:g} minutes for the cluster to have {wanted}", flush=True)
    request_resources(bundles=[{"CPU": 1}] * math.ceil(cpus) + [{"GPU": 1}] * math.ceil(gpus))
    deadline = time.monotonic() + 60 * wait_minutes
    try:
        while lacking(needed):
            if time.monotonic() > deadline:
                raise WaitedError(f"the cluster has not grown to {wanted} in {wait_minutes:g} minutes")
            time.sleep(POLL_SECONDS)
    finally:
        request_resources(bundles=[])  # a request outlives its job, and would keep the machines


def most(name: str) -> float:
    """How much of a resource the cluster has, or can grow to."""
    limits = state.get_max_resources_from_cluster_config() or {}  # None where no autoscaler runs
    return float(max(resources().get(name, 0), limits.get(name, 0)))


def lacking(needed: Mapping[str, float]) -> dict[str, float]:
    """Those of some resources that the cluster has too little of."""
    have = resources()
    return {name: need for name, need in needed.items() if need > have.get(name, 0)}


def resources() -> dict[str, float]:
    """The cluster's resources by name."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def is_joined() -> bool:
    """Whether this process has joined a cluster, or its job runs on one."""
    return ray.is_initialized() or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def cores() -> int:
    """CPUs of the cluster, or the real ones of this machine, which Ray oversubscribes."""
    cpus = int(resources().get("CPU", 1))
    alone = len(ray.nodes()) == 1  # type: ignore[no-untyped-call]
    return max(1, min(cpus, os.cpu_count() or 1) if alone else cpus)
