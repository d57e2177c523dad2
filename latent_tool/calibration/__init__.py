"""Turn a score into a probability and a threshold with a guarantee, for one configuration of model and prompt."""

from latent_tool.calibration.calibration import Calibration, Drift, Quality
from latent_tool.calibration.domain import DomainCheck, NoDomainCheck
from latent_tool.calibration.mapping import ProbabilityMapping
from latent_tool.calibration.threshold import NoThreshold, Threshold

__all__ = [
    "Calibration",
    "DomainCheck",
    "Drift",
    "NoDomainCheck",
    "NoThreshold",
    "ProbabilityMapping",
    "Quality",
    "Threshold",
]
