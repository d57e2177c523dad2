"""The address under which LangChain saves a ``RemoteReasoner`` and finds it again;
see ``latent_tool.langchain.remote``."""

from latent_tool.langchain.remote import RemoteReasoner

__all__ = ["RemoteReasoner"]
