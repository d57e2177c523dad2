"""The address under which LangChain saves a ``ConfidenceRouter`` and finds it again;
see ``latent_tool.langchain.router``."""

from latent_tool.langchain.router import ConfidenceRouter

__all__ = ["ConfidenceRouter"]
