"""LangChain: the Runnables, the tool and the chat model."""
