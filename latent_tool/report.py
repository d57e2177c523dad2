"""The documented address of ``latent_tool.views.report``."""

from latent_tool.views.report import report_html, summary_html, write_report

__all__ = ["report_html", "summary_html", "write_report"]
