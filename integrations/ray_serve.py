"""The HTTP service on a Ray cluster: one engine per replica, questions fused, replicas added as they are needed.

    serve.run(application(LatentReasoner(), replicas=(1, 8), num_gpus=1))

It is the service of ``http_service`` with the same paths, limits and errors. Ray's proxy spreads the requests over the
replicas; a replica gathers those that arrive together (``@serve.batch``) and answers them in shared forward passes.
What no replica can take waits at the proxy, and beyond ``max_queued`` is refused with 503 and ``Retry-After``.

With ``serve run latent_tool.integrations.ray_serve:from_arguments model=... num_gpus=1``, or in a Serve config file,
no Python is needed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.runnables import Runnable
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from latent_tool.errors import MissingExtraError, SettingsError
from latent_tool.integrations.http_service import LOOPBACK, ServiceLimits, create_app
from latent_tool.integrations.ray_connection import connect
from latent_tool.langchain.reasoner import OPTIONS_KEY, LatentReasoner
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import Budget, ImagePolicy

try:
    from ray import serve
    from ray.serve import Application
    from ray.serve.config import BackpressureConfig
except ImportError as error:
    raise MissingExtraError("Ray Serve", "ray") from error

__all__ = ["Arguments", "application", "from_arguments", "run"]


@dataclass(frozen=True)
class _Asked:
    """A question on its way into a batch."""

    reasoner: Runnable[Any, ReasoningResult]
    request: ReasoningRequest
    cancelled: threading.Event


class Replica:
    """One process with one engine.

    Args:
        service: the arguments of ``create_app``.
        batch_size: questions gathered at most.
        batch_wait_s: seconds to wait for more of them.
        batches: groups of questions under way at most; the engine's scheduler advances all of them in step.
    """

    def __init__(self, service: dict[str, Any], batch_size: int, batch_wait_s: float, batches: int) -> None:
        self.service = service
        self.sizes: deque[int] = deque(maxlen=1000)

        async def together(asked: list[_Asked]) -> list[ReasoningResult | Exception]:
            return await self._answer(asked)

        gather = serve.batch(
            max_batch_size=batch_size, batch_wait_timeout_s=batch_wait_s, max_concurrent_batches=batches
        )
        self._together: Callable[[_Asked], Awaitable[ReasoningResult | Exception]] = gather(together)
        reasoner = service["reasoner"]
        if isinstance(reasoner, LatentReasoner):
            reasoner.engine()  # a replica that cannot load its model never becomes healthy

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(**self.service, ask=self._ask)

    async def _ask(self, reasoner: Runnable[Any, ReasoningResult], request: ReasoningRequest) -> ReasoningResult:
        asked = _Asked(reasoner, request, threading.Event())
        try:
            answer = await self._together(asked)
        except asyncio.CancelledError:
            asked.cancelled.set()  # it leaves the batch, and the others go on
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _answer(self, asked: list[_Asked]) -> list[ReasoningResult | Exception]:
        self.sizes.append(len(asked))
        answers: list[Any] = await asked[0].reasoner.abatch(
            [each.request for each in asked],
            [{"configurable": {OPTIONS_KEY: {"cancelled": each.cancelled}}} for each in asked],
            return_exceptions=True,
        )
        return answers

    def statistics(self) -> dict[str, Any]:
        """Return the process, and the sizes of its last 1,000 batches."""
        return {"pid": os.getpid(), "batches": list(self.sizes)}


def application(
    reasoner: Runnable[Any, ReasoningResult],
    *,
    policy: ImagePolicy | None = None,
    token: str | SecretStr | None = None,
    limits: ServiceLimits | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
    replicas: int | tuple[int, int] = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    batch_size: int = 8,
    batch_wait_s: float = 0.01,
    max_ongoing: int = 32,
    max_queued: int = 128,
    name: str = "latent_tool",
) -> Application:
    """Return the service as a Ray Serve application.

    Args:
        reasoner: who answers; it is sent to the replicas and loads its model there.
        policy, token, limits, hosts: see ``create_app``.
        replicas: how many, or the fewest and the most, between which Ray chooses by the requests under way.
        num_cpus, num_gpus: what a replica takes; a fraction of a GPU lets several share it.
        batch_size: questions gathered for shared forward passes at most.
        batch_wait_s: seconds to wait for more of them.
        max_ongoing: requests a replica has in hand at most.
        max_queued: requests that wait at each proxy for a replica; more are refused with 503.
        name: of the deployment.

    Raises ``SettingsError`` for arguments that do not fit together.
    """
    limits = limits or ServiceLimits(max_requests=max_ongoing)
    if not 1 <= batch_size <= max_ongoing <= limits.max_requests:
        raise SettingsError(
            f"batch_size {batch_size}, max_ongoing {max_ongoing} and the limits' max_requests {limits.max_requests} "
            "are not in rising order.",
            "A replica must be able to hold a whole batch; raise max_ongoing or max_requests.",
        )
    fewest, most = replicas if isinstance(replicas, tuple) else (replicas, replicas)
    if not 0 <= fewest <= most or most < 1 or num_cpus < 0 or num_gpus < 0:
        raise SettingsError(
            f"{fewest} to {most} replicas with {num_cpus:g} CPUs and {num_gpus:g} GPUs cannot be had.",
            "Name the fewest first, at least one at most, and no negative shares.",
        )
    service: dict[str, Any] = {
        "reasoner": reasoner,
        "policy": policy,
        "token": token,
        "limits": limits,
        "hosts": None if hosts is None else tuple(hosts),
    }
    create_app(**service)  # so that what is wrong is said here and not by a replica
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        scaling = {
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                "initial_replicas": max(1, fewest),
                "target_ongoing_requests": batch_size,
            }
        }
    deployment = serve.deployment(
        name=name,
        ray_actor_options={
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            # Threads that spin make a small model many times slower on a busy machine.
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
        },
        max_ongoing_requests=max_ongoing,
        max_queued_requests=max_queued,
        backpressure_config=BackpressureConfig(retry_after_s=limits.retry_after_s),
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=20.0,
        **scaling,
    )(serve.ingress()(Replica))
    return deployment.bind(service, batch_size, batch_wait_s, max_ongoing // batch_size)


def run(
    application: Application,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    blocking: bool = True,
) -> None:
    """Start the application at an address, on the cluster named by ``RAY_ADDRESS`` or on this machine alone.

    ``num_cpus`` and ``num_gpus``: what this machine alone must have, for one replica at least.

    Raises ``ServiceUnavailableError`` when the cluster cannot be reached, ``SettingsError`` when there is no room.
    """
    connect({"CPU": num_cpus, "GPU": num_gpus}, logs=True)
    serve.start(http_options={"host": host, "port": port})
    serve.run(application, name="latent_tool", blocking=blocking)


class Arguments(BaseModel):
    """What ``serve run`` and Serve config files may set."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("embedded", description="Checkpoint directory or hub id.")
    device: str = "auto"
    dtype: str = "auto"
    compile: Literal["auto"] | bool = Field("auto", description="Compile the passes after image and question.")
    budget: str = Field("standard", description="quick, standard or thorough.")
    deadline_s: float | None = Field(None, description="Seconds per question at most.")
    min_confidence: float | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    batch_size: int = 8
    max_ongoing: int = 32
    max_queued: int = 128
    token_variable: str = Field(
        "LATENT_TOOL_TOKEN", description="Environment variable with the token, where the application is built."
    )


def from_arguments(arguments: Arguments) -> Application:
    """Return an application builder for ``serve run`` and Serve config files."""
    reasoner = LatentReasoner(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        compile=arguments.compile,
        budget=Budget.coerce(arguments.budget).but(deadline_s=arguments.deadline_s),  # type: ignore[arg-type]
        min_confidence=arguments.min_confidence,
    )
    return application(
        reasoner,
        token=os.environ.get(arguments.token_variable) or None,
        replicas=(arguments.min_replicas, arguments.max_replicas),
        num_cpus=arguments.num_cpus,
        num_gpus=arguments.num_gpus,
        batch_size=arguments.batch_size,
        max_ongoing=arguments.max_ongoing,
        max_queued=arguments.max_queued,
    )
