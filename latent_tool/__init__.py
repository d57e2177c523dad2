"""latent_tool: confidence-guided latent reasoning with images, as a tool that agents can gate on.

The public names are resolved when they are first used, so that importing the package loads neither torch, nor
transformers, nor LangChain.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_tool.checkup import doctor
    from latent_tool.langchain.chat_model import ChatLatentReasoner
    from latent_tool.langchain.reasoner import LatentReasoner
    from latent_tool.langchain.remote import RemoteReasoner
    from latent_tool.langchain.router import ConfidenceRouter
    from latent_tool.langchain.tool import LatentReasoningTool
    from latent_tool.schema import Patch, ReasoningRequest, ReasoningResult
    from latent_tool.settings import Budget, ImagePolicy, SearchSettings

__all__ = [
    "Budget",
    "ChatLatentReasoner",
    "ConfidenceRouter",
    "ImagePolicy",
    "LatentReasoner",
    "LatentReasoningTool",
    "Patch",
    "ReasoningRequest",
    "ReasoningResult",
    "RemoteReasoner",
    "SearchSettings",
    "doctor",
]

_HOMES = {
    "Budget": "settings",
    "ChatLatentReasoner": "langchain.chat_model",
    "ConfidenceRouter": "langchain.router",
    "ImagePolicy": "settings",
    "LatentReasoner": "langchain.reasoner",
    "LatentReasoningTool": "langchain.tool",
    "Patch": "schema",
    "ReasoningRequest": "schema",
    "ReasoningResult": "schema",
    "RemoteReasoner": "langchain.remote",
    "SearchSettings": "settings",
    "doctor": "checkup",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
