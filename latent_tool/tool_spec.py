"""The documented address of ``latent_tool.langchain.image_tool``."""

from latent_tool.langchain.image_tool import ImageTool, ToolArguments, ToolReply

__all__ = ["ImageTool", "ToolArguments", "ToolReply"]
