"""What an operator sees of a server: an access log, Prometheus metrics, how the engine is, and a page at ``/``.

``WatchMiddleware`` stands before everything else, so that refused requests are seen, too. It writes down method, path
and status of a request and never its query, headers or body: a path that the server does not have is not repeated
either, since it may hold what somebody pasted there. This module knows nothing of questions.
"""

from __future__ import annotations

import base64
import hashlib
import html
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latent_tool.engine.running import running
from latent_tool.errors import MissingExtraError
from latent_tool.views.report import SHARED_STYLE

try:
    from starlette.responses import HTMLResponse, Response
except ImportError as error:
    raise MissingExtraError("The HTTP service", "serve") from error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from latent_tool.integrations.http_gate import Gate
    from latent_tool.schema import ReasoningResult

__all__ = ["WatchMiddleware", "Watcher", "engine_facts", "front_page"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_access = logging.getLogger("latent_tool.access")


def engine_facts(model: str, device: str | None) -> dict[str, Any]:
    """Tell how the engine of a model is: its device (what it was told to use until it is loaded), and its queue."""
    now = running(model)
    if now is None:
        return {"device": device, "loaded": False, "queue": 0}
    return {"device": now.device, "loaded": True, "queue": now.waiting}


class Watcher:
    """Counts what a server does.

    Args:
        gate: the server's gate, which knows the requests in hand.
        model: name of the model whose queue is shown; ``None``: there is none.
    """

    def __init__(self, gate: Gate, model: str | None = None) -> None:
        self.paths: Collection[str] = ()  # that the server has; set when all routes are there
        self._registry: Any = None
        try:
            import prometheus_client as prometheus
        except ImportError:
            return
        registry = self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "latent_tool_requests",
            "Requests by method, path and status.",
            ("method", "path", "status"),
            registry=registry,
        )
        self._seconds = prometheus.Histogram(
            "latent_tool_request_seconds",
            "Seconds from a request's headers to the end of its reply.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._answers = prometheus.Counter(
            "latent_tool_answers",
            "Answers: accepted, abstained, or ungated without a threshold.",
            ("verdict",),
            registry=registry,
        )
        self._confidence = prometheus.Histogram(
            "latent_tool_confidence",
            "Confidence of the answers that have one.",
            buckets=[tenth / 10 for tenth in range(1, 11)],
            registry=registry,
        )
        for name, meaning, value in (
            ("requests_in_hand", "Requests in hand, those that wait included.", lambda: gate.active),
            ("requests_capacity", "Requests in hand at most.", lambda: gate.places),
            ("held_bytes", "Bytes of the bodies of the requests in hand.", lambda: gate.held),
        ):
            prometheus.Gauge(f"latent_tool_{name}", meaning, registry=registry).set_function(value)
        if model is not None:
            for name, meaning, of in (
                ("queue", "Questions that wait for their turn in the engine.", lambda now: now.waiting),
                ("active", "Questions under way in the engine.", lambda now: now.active),
                ("loaded", "Whether the model is loaded.", lambda now: 1),
            ):

                def current(of: Any = of) -> float:
                    now = running(model)
                    return 0.0 if now is None else float(of(now))

                prometheus.Gauge(f"latent_tool_engine_{name}", meaning, registry=registry).set_function(current)

    def requested(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        if self._registry is not None:
            self._requests.labels(method, path, str(status)).inc()
            self._seconds.labels(path).observe(seconds)

    def answered(self, result: ReasoningResult) -> None:
        """Count an answer."""
        if self._registry is not None:
            verdict = {None: "ungated", True: "accepted", False: "abstained"}[result.accepted]
            self._answers.labels(verdict).inc()
            if result.confidence is not None:
                self._confidence.observe(result.confidence)

    def metrics(self) -> Response:
        """Return the counts in Prometheus' text format. Raises ``MissingExtraError`` without prometheus_client."""
        if self._registry is None:
            raise MissingExtraError("/metrics", "metrics")
        import prometheus_client as prometheus

        return Response(prometheus.generate_latest(self._registry), media_type=prometheus.CONTENT_TYPE_LATEST)


class WatchMiddleware:
    """Log and count every request when its reply has ended."""

    def __init__(self, app: ASGIApp, watcher: Watcher) -> None:
        self.app = app
        self.watcher = watcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, size = time.monotonic(), 0, 0  # status 0: the client went away before there was one
        counted = False

        def ended() -> None:
            nonlocal counted
            if counted:
                return
            counted = True
            seconds = time.monotonic() - began
            method = scope["method"] if scope["method"] in _METHODS else "other"
            path = scope["path"] if scope["path"] in self.watcher.paths else "other"
            self.watcher.requested(method, path, status, seconds)
            client = scope.get("client")
            _access.info(
                "%s %s %s %d, %d bytes, %.3f s", client[0] if client else "-", method, path, status, size, seconds
            )

        async def sending(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            size += len(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended()  # before it is sent: whoever has the whole reply finds it counted
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = status or 500
            raise
        finally:
            ended()


_STYLE = SHARED_STYLE + "main { max-width: 52rem; } code { font: .9em ui-monospace, monospace; }"
_STYLE_HASH = "sha256-" + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def front_page(title: str, facts: Mapping[str, Any], paths: Sequence[tuple[str, str]], example: str) -> Response:
    """Return a page that says what a server serves.

    Args:
        title: what it is.
        facts: names and values; those that are ``None`` are left out.
        paths: what can be asked for, and what it gives.
        example: lines for a shell.
    """

    def rows(pairs: Sequence[tuple[str, Any]], cell: str) -> str:
        return "".join(
            f'<tr><th scope="row">{cell.format(html.escape(name))}</th><td>{html.escape(str(value))}</td></tr>'
            for name, value in pairs
        )

    shown = [(name, value) for name, value in facts.items() if value is not None]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><table>{rows(shown, '{}')}</table>"
        f"<h2>What can be asked for</h2><div class='scroll'><table>{rows(paths, '<code>{}</code>')}</table></div>"
        f"<h2>For example</h2><pre>{html.escape(example)}</pre></main></body></html>\n"
    )
    policy = (
        f"default-src 'none'; style-src '{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(page, headers=headers)
