"""One file per agent framework; imported as ``latent_tool.integrations.<name>``."""
