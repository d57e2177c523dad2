"""The documented address of ``latent_tool.statistics``."""

from latent_tool.statistics import (
    Comparison,
    Interval,
    accuracy_interval,
    aurc,
    auroc,
    auroc_interval,
    coverage_at_risk,
    ece,
    ece_noise_floor,
    holm,
    mcnemar,
    paired_bootstrap,
    reliability,
    risk_coverage,
)

__all__ = [
    "Comparison",
    "Interval",
    "accuracy_interval",
    "aurc",
    "auroc",
    "auroc_interval",
    "coverage_at_risk",
    "ece",
    "ece_noise_floor",
    "holm",
    "mcnemar",
    "paired_bootstrap",
    "reliability",
    "risk_coverage",
]
