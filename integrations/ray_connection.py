"""How a program comes to its Ray cluster, the same for the service and for evaluations."""

from __future__ import annotations

import logging
import os
import socket

from latent_tool.errors import MissingExtraError, ServiceUnavailableError, SettingsError

try:
    import ray
except ImportError as error:
    raise MissingExtraError("Ray", "ray") from error

__all__ = ["connect", "last_line"]


def connect(needed: dict[str, float], *, logs: bool = False) -> None:
    """Connect to the cluster of ``RAY_ADDRESS``, or start one of this machine alone, unless it is done already.

    Args:
        needed: what an engine takes, by Ray's names. This machine alone must have it: nothing will be added.
        logs: what the cluster's processes write is shown here.

    Raises ``ServiceUnavailableError`` when the cluster cannot be reached, ``SettingsError`` when there is no room.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    alone = not address
    try:
        _reach(address)
        # Without "local" it would be the last cluster that was started here, even one that has ended.
        ray.init(
            address="local" if alone else None,
            include_dashboard=False if alone else None,
            log_to_driver=logs,
            logging_level=logging.WARNING,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ServiceUnavailableError(
            f"The Ray cluster cannot be reached: {last_line(error)}", "Check RAY_ADDRESS, and that the cluster runs."
        ) from error
    there = ray.cluster_resources()
    for name, amount in needed.items():
        if alone and there.get(name, 0.0) < amount:
            raise SettingsError(
                f"One engine takes {amount:g} {name}, and this machine has {there.get(name, 0.0):g}.",
                "Ask for less, or name a cluster in RAY_ADDRESS.",
            )


def _reach(address: str) -> None:
    """Raise ``OSError`` if nobody listens at ``host:port``: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def last_line(error: Exception) -> str:
    """Return the last line of what an error says: Ray's say much before."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)
