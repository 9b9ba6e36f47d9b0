import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workflows.serving import environment

CONFIG = """global
    maxconn 10
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    option abortonclose
    errorfile 502 FOLDER/500.http
    errorfile 503 FOLDER/500.http
    errorfile 504 FOLDER/500.http
frontend prometheus
    bind :METRICS
frontend http_frontend
    bind 127.0.0.1:PORT
    http-request return status 200 if { path /known }
    default_backend nobody
backend nobody
listen stats
  bind *:STATS
"""


@pytest.mark.skipif(not environment.haproxy_environment(), reason="no HAProxy on this platform")
def test_haproxy_refuses_with_problems_stays_local_and_ends_with_its_parent(tmp_path: Path) -> None:
    ports = {}
    for name in ("METRICS", "PORT", "STATS"):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports[name] = str(probe.getsockname()[1])
    text = CONFIG.replace("FOLDER", str(tmp_path))
    for name, port in ports.items():
        text = text.replace(name, port)
    (tmp_path / "haproxy.cfg").write_text(text)
    (tmp_path / "500.http").write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    variables = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": ports["METRICS"],
        "RAY_SERVE_HAPROXY_STATS_PORT": ports["STATS"],
        "OVD_REQUEST_SECONDS": "1",
    }
    own = environment.haproxy_environment()
    script = own["RAY_SERVE_HAPROXY_BINARY_PATH"]
    command = [script, "-db", "-f", str(tmp_path / "haproxy.cfg")]
    start = f"import subprocess, time; print(subprocess.Popen({command!r}).pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, env={**os.environ, **own, **variables}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        body = exchange(int(ports["PORT"]), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert body.startswith(b"HTTP/1.1 503")
        assert b"application/problem+json" in body
        assert b"retry-after: 2" in body.lower()
        slow = exchange(int(ports["PORT"]), b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
        assert slow.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in slow
        assert exchange(int(ports["PORT"]), b"POST / HTTP/1.1\r\nHo").startswith(b"HTTP/1.1 408")
        bound = (tmp_path / "haproxy.cfg.ovd").read_text()
        assert bound.count("bind 127.0.0.1:") == 3
        with socket.create_connection(("127.0.0.1", int(ports["PORT"])), timeout=5) as kept:
            for _ in range(2):  # the second request comes after HAProxy was told to end
                kept.sendall(b"GET /known HTTP/1.1\r\nHost: x\r\n\r\n")
                assert kept.recv(1000).startswith(b"HTTP/1.1 200")
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.3)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    if shutil.which("setpriv"):
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()
    else:
        os.kill(pid, signal.SIGTERM)


def exchange(port: int, sent: bytes) -> bytes:
    """What HAProxy answers before it closes the connection; it may still be starting."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with connection:
        connection.sendall(sent)
        answer = b""
        while part := connection.recv(4_096):
            answer += part
    return answer
