"""The documented address of ``latent_tool.views.overlay``."""

from latent_tool.views.overlay import overlay, overlay_data_uri, overlay_png, overlays, show

__all__ = ["overlay", "overlay_data_uri", "overlay_png", "overlays", "show"]
