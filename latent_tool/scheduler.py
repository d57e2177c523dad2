"""The documented address of ``latent_tool.engine.scheduler``."""

from latent_tool.engine.scheduler import Scheduler, get_scheduler

__all__ = ["Scheduler", "get_scheduler"]
