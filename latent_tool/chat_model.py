"""The address under which LangChain saves a ``ChatLatentReasoner`` and finds it again;
see ``latent_tool.langchain.chat_model``."""

from latent_tool.langchain.chat_model import ChatLatentReasoner

__all__ = ["ChatLatentReasoner"]
