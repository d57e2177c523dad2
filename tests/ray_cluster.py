"""A Ray cluster of this machine alone, for tests; also for a machine that is busy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TESTS = Path(__file__).parent
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OTEL_SDK_DISABLED": "true",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Start a cluster and connect to it.

    Ports that are known beforehand spare Ray's processes from waiting for each other with time limits of their own.
    """
    os.environ.update(QUIET)
    import ray

    names = (
        "port",
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "metrics-export-port",
        "runtime-env-agent-port",
        "ray-client-server-port",
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *("--num-cpus=4", "--include-dashboard=false", f"--object-store-memory={100 * 2**20}"),
            *(f"--{name}={port}" for name, port in ports.items()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert head.stdout is not None
    try:
        said = ""
        while "--address" not in said and (line := head.stdout.readline()):  # how to join: it has started
            said += line
        assert "--address" in said, said
        ray.init(address=f"127.0.0.1:{ports['port']}", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=120)
        time.sleep(0.1)
