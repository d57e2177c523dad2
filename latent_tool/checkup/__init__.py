"""Find out what holds of one model on one machine: exactness, geometry, memory and speed, each with a remedy.

``latent_tool.doctor`` is the way in; ``run`` loads and reports, ``checks`` has one small function for each thing that
is looked at, ``naive`` the slow forward pass that they are compared with, and ``pixels`` how boxes are found by
changing the picture. The model is left as it was.
"""

from __future__ import annotations

from latent_tool.checkup.run import Finding, Report, doctor

__all__ = ["Finding", "Report", "doctor"]
