"""The address under which LangChain saves a ``LatentReasoningTool`` and finds it again;
see ``latent_tool.langchain.tool``."""

from latent_tool.langchain.tool import LatentReasoningTool

__all__ = ["LatentReasoningTool"]
