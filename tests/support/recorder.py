"""A callback handler that writes down what it is told, and the options of one call."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from latent_tool.langchain.reasoner import OPTIONS_KEY


class Recorder(BaseCallbackHandler):
    """Writes down runs and steps, and may act on every step."""

    def __init__(self, on_step: Any = None) -> None:
        self.starts: list[dict[str, Any]] = []
        self.ends: list[Any] = []
        self.errors: list[BaseException] = []
        self.steps: list[dict[str, Any]] = []
        self.on_step = on_step

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.starts.append(kwargs)

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.ends.append(outputs)

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        assert name == "latent_step"
        self.steps.append(data)
        if self.on_step is not None:
            self.on_step()


def options(**values: Any) -> dict[str, Any]:
    return {"configurable": {OPTIONS_KEY: values}}
