"""What a score is worth: a probability, and a threshold with a guarantee, for one configuration.

A calibration is a file that ``latent_tool.calibration.fit`` (``latent-tool calibrate``) makes from a labelled run. It
belongs to one configuration, which its fingerprint names; use with another is an error. Using one takes neither
scikit-learn nor scipy, except for the drift check. This module knows nothing of images or of LangChain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from latent_tool.calibration.configuration import EMBEDDED_FOLDER, digest
from latent_tool.calibration.mapping import Count, Number, Part, Probability, ProbabilityMapping
from latent_tool.calibration.threshold import NoThreshold, Threshold
from latent_tool.errors import CalibrationError, CalibrationMismatchError, MissingExtraError
from latent_tool.files import write_whole
from latent_tool.schema import ReasoningResult
from latent_tool.scores import score_of
from latent_tool.settings import explain_validation

__all__ = ["Calibration", "Drift", "Quality"]

EMBEDDED_FILE = EMBEDDED_FOLDER / "calibration.json"
_DRIFT_ITEMS = 20


class Quality(Part):
    """What the calibration is worth on items it was not fitted on, by cross-validation."""

    folds: Count
    auroc: Probability | None = Field(description="Of the raw score; None if all answers are right or all wrong.")
    ece_before: Probability | None = Field(description="Of the raw score; None if it is no probability.")
    ece_after: Probability
    ece_noise_floor: Probability = Field(description="Mean ECE that perfectly calibrated probabilities would show.")
    log_loss: dict[str, Number] = Field(description="Of every mapping that was tried, in nats; the smallest was taken.")
    thresholds_found: Probability | None = Field(description="Share of folds in which a threshold was found.")
    coverage: Probability | None = Field(description="Mean share accepted of the items of the other fold.")
    error: Probability | None = Field(description="Share of errors among all those accepted.")


class Drift(Part):
    """Whether scores of unlabelled traffic look like those of the calibration."""

    drifted: bool = Field(
        description="The scores, or the share of answers without one, differ: the calibration may no longer hold."
    )
    p_value: Probability | None = Field(description="Of the scores; None where there are too few.")
    unscored_p_value: Probability = Field(description="Of the share without a score (Fisher's exact test).")
    level: Annotated[float, Field(gt=0, lt=1)] = Field(description="Of both tests together; each has a half of it.")
    distance: Probability | None = Field(
        description="Largest distance of the two distribution functions (Kolmogorov-Smirnov)."
    )
    scores: Count
    unscored: Count
    mean: Number | None
    reference_mean: Number


class Calibration(Part):
    """A score's mapping to probability and its threshold, bound to one configuration; a file of plain JSON."""

    schema_version: Literal["1"] = "1"
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    configuration: dict[str, Any] | None = Field(
        None, description="What the fingerprint was made of, where known; says what differs when it does not fit."
    )
    score: str = Field(min_length=1)
    higher_is_surer: bool = True
    mapping: ProbabilityMapping
    threshold: Threshold | None = None
    no_threshold: NoThreshold | None = None
    items: Count = Field(description="Labelled and scored items the mapping was fitted on.")
    right: Count = Field(description="Right answers among them.")
    unscored: Count = Field(0, description="Labelled items without a score; never accepted.")
    quality: Quality
    reference: tuple[Number, ...] = Field(min_length=1, description="Scores of calibration items, for the drift check.")
    provenance: dict[str, Any] = Field({}, description="Where it comes from, for people.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.threshold is None) == (self.no_threshold is None):
            raise ValueError("there is either a threshold or a reason why there is none")
        if self.configuration is not None and digest(self.configuration) != self.fingerprint:
            raise ValueError("the fingerprint is not that of the configuration")
        return self

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Calibration) -> Calibration:
        """A calibration from a file, its content, or ``"embedded"`` for that of the embedded model.

        Raises ``CalibrationError`` for what is not there or is no calibration.
        """
        if isinstance(source, Calibration):
            return source
        name = "the given content" if isinstance(source, Mapping) else repr(str(source))
        try:
            if isinstance(source, Mapping):
                return cls.model_validate(source)
            path = EMBEDDED_FILE if source == "embedded" else Path(source).expanduser()
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise CalibrationError(
                f"The calibration {name} cannot be read ({error.strerror or error}).",
                "Make one from a labelled run: latent-tool calibrate RUN --out FILE.",
            ) from None
        except ValidationError as error:
            raise CalibrationError(
                f"{name} is no calibration of this version: {explain_validation(error)}.",
                "Make it again: latent-tool calibrate RUN --out FILE.",
            ) from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; raises ``SettingsError`` when it cannot be written."""
        write_whole(path, (self.model_dump_json(indent=1) + "\n").encode())

    # ------------------------------------------------------------------ use

    def require(self, found: Mapping[str, Any]) -> None:
        """Raise ``CalibrationMismatchError``, saying what differs, unless ``found`` is the calibrated configuration."""
        if digest(found) == self.fingerprint:
            return
        known = self.configuration
        names = _differences(known, found) if known is not None else []
        what = f": {', '.join(names)}" if names else ""
        raise CalibrationMismatchError(
            f"The calibration was made for another configuration{what}.",
            "Use the configuration it was made for, or calibrate this one: latent-tool eval, then latent-tool "
            "calibrate.",
        )

    def probability(self, score: float | None) -> float | None:
        """The probability, in [0, 1], that an answer with this raw score is right; ``None`` without a score."""
        if score is None or not math.isfinite(score):
            return None
        return self.mapping(score if self.higher_is_surer else -score)

    def accepts(self, score: float | None) -> bool:
        """Whether a raw score reaches the threshold. Raises ``CalibrationError`` when the calibration has none."""
        threshold = self.require_threshold()
        if score is None or not math.isfinite(score):
            return False
        return score >= threshold.score if self.higher_is_surer else score <= threshold.score

    def require_threshold(self) -> Threshold:
        """The threshold. Raises ``CalibrationError``, saying why, when there is none."""
        if self.threshold is None:
            reason = self.no_threshold.reason if self.no_threshold is not None else "It has none."
            raise CalibrationError(
                f"The calibration has no threshold. {reason}",
                "Calibrate on more items or for a larger target error, or choose a number as the threshold yourself.",
            )
        return self.threshold

    def apply(self, result: ReasoningResult, min_confidence: float | Literal["calibrated"] | None) -> ReasoningResult:
        """A result with its calibrated confidence, and the verdict on it.

        A number is compared with the probability, ``"calibrated"`` stands for the threshold. What has no score, and
        what a deadline cut short, is not what was calibrated: it has no confidence and is abstained from.
        """
        raw = score_of(result, self.score)
        cut = "deadline" in (result.stop_reason, result.finish_reason)
        other = result.choices is not None and self.score != "option_probability"
        probability = None if cut or other else self.probability(raw)
        at = self.require_threshold().probability if min_confidence == "calibrated" else min_confidence
        if probability is None:
            why = "the deadline cut the work short" if cut else f"the score {self.score} was not measured"
            if other:
                why = f"it was chosen among options, and {self.score} is of free answers"
            note = f"The calibration does not hold for this answer: {why}."
            lost: dict[str, Any] = {"confidence": None, "confidence_source": "unscored", "min_confidence": at}
            return result.model_copy(
                update={**lost, "accepted": False, "abstained": True, "warnings": [*result.warnings, note]}
            )
        if min_confidence == "calibrated":
            accepted: bool | None = self.accepts(raw)
        else:
            accepted = None if min_confidence is None else probability >= min_confidence
        return result.model_copy(
            update={
                "confidence": probability,
                "confidence_source": "calibrated",
                "accepted": accepted,
                "abstained": None if accepted is None else not accepted,
                "min_confidence": at,
            }
        )

    def drift(self, scores: Sequence[float | None], level: float = 0.01) -> Drift:
        """Compare unlabelled traffic with the calibration's items.

        Two tests with half the level each: two-sample Kolmogorov-Smirnov of the raw scores, and Fisher's exact test of
        the share of answers that have none.

        Args:
            level: probability of a false alarm at most, for traffic like the calibration's; ties make it smaller.

        Raises ``CalibrationError`` for fewer than 20 scores, unless the missing ones say enough, and
        ``MissingExtraError`` without scipy.
        """
        try:
            from scipy.stats import fisher_exact, ks_2samp
        except ImportError:
            raise MissingExtraError("The drift check", "evaluation") from None
        if not 0 < level < 1:
            raise CalibrationError("The level of a drift check must lie between 0 and 1.", "Use 0.01, for example.")
        known = [score for score in scores if score is not None and math.isfinite(score)]
        lost = len(scores) - len(known)
        lost_p = float(fisher_exact([[len(known), lost], [self.items, self.unscored]]).pvalue)
        enough = len(known) >= _DRIFT_ITEMS
        if not enough and lost_p >= level / 2:
            raise CalibrationError(
                f"{len(known)} scores are too few to see a drift.", f"Collect at least {_DRIFT_ITEMS}."
            )
        test = ks_2samp(known, self.reference) if enough else None
        return Drift(
            drifted=lost_p < level / 2 or (test is not None and bool(test.pvalue < level / 2)),
            p_value=None if test is None else float(test.pvalue),
            unscored_p_value=min(1.0, lost_p),
            level=level,
            distance=None if test is None else float(test.statistic),
            scores=len(known),
            unscored=lost,
            mean=math.fsum(known) / len(known) if known else None,
            reference_mean=math.fsum(self.reference) / len(self.reference),
        )


def _differences(known: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Dotted names of what two configurations do not share, values left out."""
    names = []
    for name in sorted({*known, *found}):
        one, other = known.get(name), found.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and name != "model":
            names += [f"{name}.{inner}" for inner in _differences(one, other)]
        elif one != other:
            names.append(name)
    return names
