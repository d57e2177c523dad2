"""The documented address of ``latent_tool.langchain.messages``."""

from latent_tool.langchain.messages import image_block

__all__ = ["image_block"]
