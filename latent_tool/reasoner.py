"""The address under which LangChain saves a ``LatentReasoner`` and finds it again;
see ``latent_tool.langchain.reasoner``."""

from latent_tool.langchain.reasoner import LatentReasoner

__all__ = ["LatentReasoner"]
