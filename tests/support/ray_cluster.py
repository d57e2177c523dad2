"""A Ray cluster of this machine alone, for tests; also for a machine that is busy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

TESTS = Path(__file__).parent
ATTEMPTS = 5
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

    Ray gives its own processes 15 seconds to start. On a machine that is too busy for that, it is tried again.
    """
    os.environ.update(QUIET)
    import ray

    for _ in range(ATTEMPTS):
        (port,) = free_ports(1)
        head, said = _start(port)
        if head.poll() is None:
            break
    else:
        raise AssertionError(said)
    try:
        ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
    finally:
        head.send_signal(signal.SIGTERM)
        head.communicate(timeout=120)


def _start(port: int) -> tuple[subprocess.Popen[str], str]:
    """The head of a cluster, when it has started or failed, and what it said."""
    names = ("dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port", "ray-client-server-port")
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"),
            *("--node-ip-address=127.0.0.1", "--num-cpus=4", "--include-dashboard=false"),
            f"--object-store-memory={100 * 2**20}",
            # Ports that are known beforehand spare Ray's processes from waiting for each other.
            *(f"--{name}={free}" for name, free in zip(names, free_ports(len(names)), strict=True)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert head.stdout is not None
    said = ""
    while "--address" not in said and (line := head.stdout.readline()):  # how to join is said when it has started
        said += line
    if "--address" not in said:
        head.communicate(timeout=60)
    return head, said
