"""What a score is worth: a probability, and a threshold with a guarantee, for one configuration.

A calibration is a file that ``latent_tool.calibration.fit`` (``latent-tool calibrate``) makes from a labelled run. It
belongs to one configuration, which its fingerprint names; use with another is an error. Using one takes neither
scikit-learn nor scipy, except for the drift check. This module knows nothing of images or of LangChain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from latent_tool.calibration.configuration import EMBEDDED_FOLDER, content_hash, digest
from latent_tool.calibration.domain import DomainCheck, NoDomainCheck
from latent_tool.calibration.mapping import Count, Number, Part, Probability, ProbabilityMapping
from latent_tool.calibration.threshold import NoThreshold, Threshold
from latent_tool.cannot_tell import CANNOT_TELL_REASON
from latent_tool.errors import CalibrationError, CalibrationMismatchError, MissingExtraError, SettingsError
from latent_tool.files import expanded, write_whole
from latent_tool.schema import NOT_CHECKED, Domain, ReasoningResult
from latent_tool.scores import score_of
from latent_tool.validation import explain_validation

__all__ = ["Calibration", "Drift", "Quality", "embedded_domain"]

EMBEDDED_FILE = EMBEDDED_FOLDER / "calibration.json"
_DRIFT_ITEMS = 20
_LIST = re.compile(r"\[\s+((?:-?[0-9.]+(?:[eE][-+]?[0-9]+)?,?\s+)+)\]")
_FORMAT_1 = (
    "The calibration's file is of format 1, which has no domain check: nothing tells whether a question is like those "
    "of the calibration. Calibrate again for one (latent-tool calibrate RUN --out FILE)."
)


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
        description="The scores, the share of answers without one, or what the pictures look like differ: the "
        "calibration may no longer hold."
    )
    p_value: Probability | None = Field(description="Of the scores; None where there are too few.")
    unscored_p_value: Probability = Field(description="Of the share without a score (Fisher's exact test).")
    domain_p_value: Probability | None = Field(
        None, description="Of the domain check's p-values, its parts together; None where they were not compared."
    )
    level: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Of all tests together: a half for the scores and the share without one, a half for the domain's "
        "p-values; where those are not compared, all of it for the former two. They share theirs equally."
    )
    distance: Probability | None = Field(
        description="Largest distance of the two distribution functions (Kolmogorov-Smirnov)."
    )
    scores: Count
    unscored: Count
    mean: Number | None
    reference_mean: Number


class Calibration(Part):
    """A score's mapping to probability, its threshold and its domain check, bound to one configuration.

    A file of plain JSON. One of format 1, which had no domain check, is read and says so; a domain check of format 2
    compared other numbers, and its file is refused.
    """

    schema_version: Literal["1", "2", "3"] = "3"
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    configuration: dict[str, Any] | None = Field(
        None, description="What the fingerprint was made of, where known; says what differs when it does not fit."
    )
    score: str = Field(min_length=1)
    higher_is_surer: bool = True
    mapping: ProbabilityMapping
    threshold: Threshold | None = None
    no_threshold: NoThreshold | None = None
    domain: DomainCheck | None = Field(None, description="Tells questions that are unlike the calibration's.")
    no_domain: NoDomainCheck | None = Field(None, description="Why there is no domain check.")
    refused: Count = Field(
        0, description="Labelled items that the domain check refused, of those the threshold was found on."
    )
    items: Count = Field(description="Labelled and scored items the mapping was fitted on.")
    right: Count = Field(description="Right answers among them.")
    unscored: Count = Field(0, description="Labelled items without a score; never accepted.")
    quality: Quality
    reference: tuple[Number, ...] = Field(min_length=1, description="Scores of calibration items, for the drift check.")
    provenance: dict[str, Any] = Field({}, description="Where it comes from, for people.")

    @model_validator(mode="before")
    @classmethod
    def _known_check(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("schema_version") == "2" and given.get("domain") is not None:
            raise ValueError("a domain check of format 2 compares other numbers than pictures are described by now")
        return given

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.threshold is None) == (self.no_threshold is None):
            raise ValueError("there is either a threshold or a reason why there is none")
        if self.schema_version == "1":
            if self.domain is not None:
                raise ValueError("a file of format 1 has no domain check")
        elif (self.domain is None) == (self.no_domain is None):
            raise ValueError("there is either a domain check or a reason why there is none")
        if self.configuration is not None and digest(self.configuration) != self.fingerprint:
            raise ValueError("the fingerprint is not that of the configuration")
        return self

    # ------------------------------------------------------------------ files

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Calibration) -> Calibration:
        """Return a calibration from a file, its content, or ``"embedded"`` for that of the embedded model.

        Raises ``CalibrationError`` for what is not there or is no calibration.
        """
        if isinstance(source, Calibration):
            return source
        name = "the given content" if isinstance(source, Mapping) else repr(str(source))
        try:
            if isinstance(source, Mapping):
                return cls.model_validate(source)
            path = EMBEDDED_FILE if source == "embedded" else expanded(source)
            return cls.model_validate_json(path.read_bytes())
        except (OSError, SettingsError) as error:
            why = error.message if isinstance(error, SettingsError) else error.strerror or error
            raise CalibrationError(
                f"The calibration {name[:200]} cannot be read ({why}).",
                "Make one from a labelled run: latent-tool calibrate RUN --out FILE.",
            ) from None
        except ValidationError as error:
            raise CalibrationError(
                f"{name} is no calibration of this version: {explain_validation(error)}.",
                "Make it again: latent-tool calibrate RUN --out FILE.",
            ) from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; raises ``SettingsError`` when it cannot be written."""
        text = self.model_dump_json(indent=1)
        # Numbers of one list stand on one line.
        text = _LIST.sub(lambda found: "[" + ", ".join(found[1].replace(",", " ").split()) + "]", text)
        write_whole(path, (text + "\n").encode())

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
        """Return the probability, in [0, 1], that an answer with this raw score is right; ``None`` without a score."""
        if score is None or not math.isfinite(score):
            return None
        return self.mapping(score if self.higher_is_surer else -score)

    def accepts(self, score: float | None) -> bool:
        """Tell whether a raw score reaches the threshold. Raises ``CalibrationError`` when the calibration has none."""
        threshold = self.require_threshold()
        if score is None or not math.isfinite(score):
            return False
        return score >= threshold.score if self.higher_is_surer else score <= threshold.score

    def require_threshold(self) -> Threshold:
        """Return the threshold. Raises ``CalibrationError``, saying why, when there is none."""
        if self.threshold is None:
            reason = self.no_threshold.reason if self.no_threshold is not None else "It has none."
            raise CalibrationError(
                f"The calibration has no threshold. {reason}",
                "Calibrate on more items or for a larger target error, or choose a number as the threshold yourself.",
            )
        return self.threshold

    @property
    def lacks(self) -> str | None:
        """What a user of this calibration should know that it lacks, or ``None``."""
        if self.domain is not None:
            return None
        if self.no_domain is None:
            return _FORMAT_1
        return f"The calibration has no domain check. {self.no_domain.reason}"

    def apply(
        self,
        result: ReasoningResult,
        min_confidence: float | Literal["calibrated"] | None,
        *,
        check_domain: bool = True,
    ) -> ReasoningResult:
        """Return a result with its calibrated confidence, and the verdict on it.

        A number is compared with the probability, ``"calibrated"`` stands for the threshold. What has no score, and
        what a deadline cut short, is not what was calibrated: it has no confidence and is abstained from. So is,
        whatever its confidence, what the domain check refused (``result.domain``) or did not see, and an answer that
        says that it cannot be told.

        Args:
            check_domain: ``False``: leave the domain check out; the result's warnings say so.
        """
        raw = score_of(result, self.score)
        cut = "deadline" in (result.stop_reason, result.finish_reason)
        other = result.choices is not None and self.score != "option_probability"
        probability = None if cut or other else self.probability(raw)
        at = self.require_threshold().probability if min_confidence == "calibrated" else min_confidence
        cannot_tell = result.abstain_reason == CANNOT_TELL_REASON
        notes = self._domain_notes(check_domain)
        if probability is None:
            why = "the deadline cut the work short" if cut else f"the score {self.score} was not measured"
            if other:
                why = f"it was chosen among options, and {self.score} is of free answers"
            notes.append(f"The calibration does not hold for this answer: {why}.")
            lost: dict[str, Any] = {"confidence": None, "confidence_source": "unscored", "min_confidence": at}
            found = result.model_copy(update=lost).abstaining(CANNOT_TELL_REASON if cannot_tell else why)
        else:
            if min_confidence == "calibrated":
                accepted: bool | None = self.accepts(raw)
            else:
                accepted = None if min_confidence is None else probability >= min_confidence
            sure = {"confidence": probability, "confidence_source": "calibrated"}
            found = result.model_copy(update=sure).decided(accepted, at)
            if cannot_tell:
                found = found.abstaining(CANNOT_TELL_REASON)
        if not check_domain:
            found = found.model_copy(update={"domain": None})
        elif self.domain is not None:
            if result.domain is None:
                found = found.abstaining(NOT_CHECKED)
            elif result.domain.refused:
                found = found.abstaining(result.domain.unlike())
        return found.model_copy(update={"warnings": [*found.warnings, *notes]})

    def _domain_notes(self, check_domain: bool) -> list[str]:
        """What a result must say of a domain check that was not made."""
        if self.domain is not None and not check_domain:
            return [
                "The domain check of the calibration is switched off: its threshold may not hold for this question."
            ]
        return [] if self.lacks is None else [self.lacks]

    def drift(
        self, scores: Sequence[float | None], level: float = 0.01, *, domains: Sequence[Domain] | None = None
    ) -> Drift:
        """Compare unlabelled traffic with the calibration's items.

        Two-sample Kolmogorov-Smirnov of the raw scores, and Fisher's exact test of the share of answers that have none;
        with ``domains`` also Kolmogorov-Smirnov of every part's p-values against those of the held-back questions.

        Args:
            level: probability of a false alarm at most, for traffic like the calibration's; ties make it smaller.
            domains: the domain check's verdicts on the traffic (``result.domain``), one for every picture: repeated
                ones would count as evidence that they are not.

        Raises ``CalibrationError`` for fewer than 20 scores, unless the missing ones say enough, for verdicts of
        another check, and ``MissingExtraError`` without scipy.
        """
        try:
            from scipy.stats import fisher_exact, ks_2samp
        except ImportError:
            raise MissingExtraError("The drift check", "evaluation") from None
        if not 0 < level < 1:
            raise CalibrationError("The level of a drift check must lie between 0 and 1.", "Use 0.01, for example.")
        domain_p = None if not domains else self._domain_drift(domains)
        share = level if domain_p is None else level / 2
        known = [score for score in scores if score is not None and math.isfinite(score)]
        lost = len(scores) - len(known)
        lost_p = float(fisher_exact([[len(known), lost], [self.items, self.unscored]]).pvalue)
        enough = len(known) >= _DRIFT_ITEMS
        if not enough and lost_p >= share / 2 and domain_p is None:
            raise CalibrationError(
                f"{len(known)} scores are too few to see a drift.", f"Collect at least {_DRIFT_ITEMS}."
            )
        test = ks_2samp(known, self.reference) if enough else None
        return Drift(
            drifted=lost_p < share / 2
            or (test is not None and bool(test.pvalue < share / 2))
            or (domain_p is not None and domain_p < share),
            p_value=None if test is None else float(test.pvalue),
            unscored_p_value=min(1.0, lost_p),
            domain_p_value=domain_p,
            level=level,
            distance=None if test is None else float(test.statistic),
            scores=len(known),
            unscored=lost,
            mean=math.fsum(known) / len(known) if known else None,
            reference_mean=math.fsum(self.reference) / len(self.reference),
        )

    def _domain_drift(self, domains: Sequence[Domain]) -> float | None:
        """The p-value of all parts together, by Bonferroni; ``None`` for fewer than 20 verdicts."""
        from scipy.stats import ks_2samp

        check = self.domain
        if check is None or any(set(each.parts) != set(check.held_back) for each in domains):
            raise CalibrationError(
                "The verdicts are not those of this calibration's domain check.", "Answer with this calibration."
            )
        if len(domains) < _DRIFT_ITEMS:
            return None
        tests = [
            ks_2samp([each.parts[part] for each in domains], check.held_back_p_values(part)).pvalue
            for part in check.held_back
        ]
        return min(1.0, len(tests) * float(min(tests)))


@lru_cache(maxsize=1)
def _embedded() -> Calibration | None:
    """The embedded model's own calibration, if it is of the weights that are there."""
    try:
        found = Calibration.load("embedded")
    except CalibrationError:
        return None
    model = (found.configuration or {}).get("model")
    return found if model == {"content": content_hash(EMBEDDED_FOLDER)} else None


def embedded_domain(dtype: str = "auto") -> DomainCheck | None:
    """Return the domain check that ships with the embedded model; ``None`` where it was fitted for other weights or
    types.
    """
    found = _embedded() if dtype in ("auto", "float32") else None
    return None if found is None else found.domain


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
