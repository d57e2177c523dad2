"""What a score is worth: a probability, and a threshold with a guarantee, for one configuration.

A calibration is a file that ``latent_tool.calibration.fit`` (``latent-tool calibrate``) makes from a labelled run. It
belongs to one configuration (model, prompt, settings, budget, score), which its fingerprint names; use with another is
an error. Using one takes neither scikit-learn nor scipy, except for the drift check. This module knows scores and
configurations. It knows nothing of images or of LangChain.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latent_tool.errors import CalibrationError, CalibrationMismatchError, MissingExtraError, ModelNotFoundError
from latent_tool.files import write_whole
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings, explain_validation

__all__ = [
    "SCORES",
    "Calibration",
    "Drift",
    "NoThreshold",
    "ProbabilityMapping",
    "Quality",
    "Threshold",
    "configuration",
    "fingerprint",
    "score_of",
]

# To be raised when the code changes what a score means, so that older calibrations no longer fit.
SCORING = 2
EMBEDDED_FOLDER = Path(__file__).parents[1] / "models" / "embedded"
EMBEDDED_FILE = EMBEDDED_FOLDER / "calibration.json"
# The scores that every ``ReasoningResult`` can carry; a calibration of any other is of use to its maker alone.
SCORES = (
    "pooled_probability",
    "answer_probability",
    "plain_probability",
    "mean_token_probability",
    "first_token_entropy",
    "reward",
    "initial_reward",
    "top_k_mass",
    "visual_dependency",
)
# Probabilities nearer to 0 or 1 than this are not told apart: float32 does not hold them.
_EPSILON = 1e-7
# Files of a checkpoint folder that its answers do not depend on.
_NOT_THE_MODEL = {"calibration.json", "metrics.json"}
_MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
# Fields of the settings that the plain model (no latents) depends on.
_PROMPT_FIELDS = ("latent_position", "thinking_markers")


def fingerprint(**what: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of a ``configuration``; takes what that takes."""
    return digest(configuration(**what))


def digest(described: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a configuration: the same for the same content in any order."""
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def configuration(
    *,
    score: str,
    model: str = "embedded",
    revision: str | None = None,
    dtype: str = "auto",
    quantization_config: Any = None,
    system: str | None = None,
    images_first: bool = True,
    settings: SearchSettings | None = None,
    budget: Budget | None = None,
    generation: GenerationSettings | None = None,
    noise: NoiseSettings | None = None,
    method: str = "reasoner",
) -> dict[str, Any]:
    """What a score depends on besides the question and the seed, as plain JSON.

    This package counts up to its minor version. Not in it, since they leave scores alike but for rounding or are said
    to: the versions of torch and transformers, the device, threads and batches.

    Args:
        score: name of the score, such as ``"pooled_probability"``.
        model: ``"embedded"``, a checkpoint folder (known by its content, wherever it lies) or a hub id (known by its
            name and commit).
        settings, budget, generation: as the reasoner has them; ``None``: the defaults. ``deadline_s`` is left out: what
            a deadline cuts is not covered by a calibration. Without latents only what the plain model reads counts.
        noise: how the image is noised, for scores that need it.
        method: ``"reasoner"`` for what ``LatentReasoner`` does; anything else names another way to the answer.

    Raises ``ModelNotFoundError`` when a folder holds no model.
    """
    settings, budget = settings or SearchSettings(), budget or Budget()
    chosen = settings.model_dump(mode="json")
    limits = budget.model_dump(mode="json", exclude={"deadline_s"})
    if not settings.latents:
        chosen = {"latents": 0, **{name: chosen[name] for name in _PROMPT_FIELDS}}
        limits = {"max_new_tokens": budget.max_new_tokens}
    return {
        "scoring": SCORING,
        "latent_tool": ".".join(version("latent-tool").split(".")[:2]),
        "score": score,
        "method": method,
        "model": _model(model, revision),
        "dtype": "float32" if model == "embedded" and dtype == "auto" else dtype,
        "quantization": _plain(quantization_config),
        "system": system,
        "images_first": images_first,
        "settings": chosen,
        "budget": limits,
        "generation": (generation or GenerationSettings()).model_dump(mode="json"),
        "noise": None if noise is None else noise.model_dump(mode="json"),
    }


def is_folder(model: str) -> bool:
    """Whether a model is known by its content; a hub id is known by its commit, once it was downloaded."""
    return model == "embedded" or Path(model).expanduser().is_dir()


def _plain(value: Any) -> Any:
    """A quantisation config as JSON types."""
    if value is None:
        return None
    return json.loads(json.dumps(value.to_dict() if hasattr(value, "to_dict") else value, default=str))


def _model(model: str, revision: str | None) -> dict[str, Any]:
    if is_folder(model):
        return {"content": content_hash(EMBEDDED_FOLDER if model == "embedded" else Path(model).expanduser())}
    return {"name": model, "revision": _commit(model, revision) or revision or "main"}


def content_hash(folder: Path) -> str:
    """SHA-256, in hex, of a checkpoint folder: names and content of its weights, configuration and tokenizer."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _MODEL_SUFFIXES and path.name not in _NOT_THE_MODEL and path.is_file()
    )
    if not any(path.name == "config.json" for path in files):
        raise ModelNotFoundError(
            f"The directory {str(folder)!r} holds no model: config.json is missing.",
            "Give the folder that save_pretrained() wrote.",
        )
    whole = hashlib.sha256()
    for path in files:
        facts = path.stat()
        whole.update(f"{path.name}\0{_file_hash(path, facts.st_size, facts.st_mtime_ns)}\n".encode())
    return whole.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; read again only when its size or its time changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that a hub id stands for in the local cache; ``None`` if it was never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no valid hub id; loading it will say so
        return None
    return Path(found).parent.name if isinstance(found, str) else None


# ---------------------------------------------------------------------- what a calibration file holds

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Base of everything in a calibration file: frozen, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ProbabilityMapping(_Part):
    """A non-decreasing function from a score, larger meaning surer, to a probability.

    ``platt`` and ``temperature``: the logistic function of ``slope * z + intercept``, where ``z`` is the score or, with
    ``logit``, its log-odds. ``isotonic``: straight lines between the points ``(x, y)``, flat beyond the first and last.
    """

    kind: Literal["isotonic", "platt", "temperature"]
    logit: bool = Field(False, description="Whether z is the log-odds of the score, which then lies in [0, 1].")
    slope: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    intercept: Number = 0.0
    x: tuple[Number, ...] = ()
    y: tuple[Probability, ...] = ()

    @model_validator(mode="after")
    def _non_decreasing(self) -> Self:
        if self.kind == "isotonic":
            if not self.x or len(self.x) != len(self.y):
                raise ValueError("an isotonic mapping needs as many x as y, and at least one")
            if any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
                raise ValueError("x must rise")
            if any(b < a for a, b in zip(self.y, self.y[1:], strict=False)):
                raise ValueError("y must not fall")
        return self

    def __call__(self, score: float) -> float:
        """The probability, in [0, 1], that belongs to a finite score."""
        if self.kind == "isotonic":
            place = bisect.bisect_left(self.x, score)
            if place == 0:
                return self.y[0]
            if place == len(self.x):
                return self.y[-1]
            left, right = self.x[place - 1], self.x[place]
            low, high = self.y[place - 1], self.y[place]
            return min(high, low + (high - low) * (score - left) / (right - left))
        return logistic(self.slope * (log_odds(score) if self.logit else score) + self.intercept)


def log_odds(probability: float) -> float:
    """Log-odds of a probability that is kept away from 0 and 1."""
    kept = min(max(probability, _EPSILON), 1 - _EPSILON)
    return math.log(kept / (1 - kept))


def logistic(value: float) -> float:
    """The inverse of ``log_odds``, for any finite value."""
    if value < 0:
        power = math.exp(max(value, -700.0))
        return power / (1 + power)
    return 1 / (1 + math.exp(-value))


class Threshold(_Part):
    """Accept what scores at least ``score``: the share of errors among the accepted is then at most ``target_error``.

    This holds with probability ``confidence_level`` over the draw of the calibration items, for questions drawn like
    them.
    """

    score: Number = Field(description="The raw score that is compared, in its own units and direction.")
    probability: Probability = Field(description="The calibrated probability of that score.")
    target_error: Annotated[float, Field(gt=0, lt=1)]
    confidence_level: Annotated[float, Field(gt=0, lt=1)]
    tested: Count = Field(description="Scored items that the threshold was tested on; none of them chose the sequence.")
    accepted: Count = Field(description="Items among them that reach the threshold.")
    errors: Count = Field(description="Wrong answers among the accepted.")
    p_value: Probability = Field(description="P(so few errors or fewer) if the error rate were the target.")
    coverage: Probability = Field(description="Share of all tested items accepted; what has no score is not.")


class NoThreshold(_Part):
    """Why there is no threshold, and what would be needed."""

    reason: str
    target_error: Annotated[float, Field(gt=0, lt=1)]
    confidence_level: Annotated[float, Field(gt=0, lt=1)]
    needed_items: Count | None = Field(
        description="Labelled items, in all, that would be about enough if the shares of errors stayed as they are; "
        "None: more would not be expected to help."
    )
    reachable_error: Probability | None = Field(
        description="The smallest target error for which these items give a threshold. A hint for a fresh set of "
        "items: chosen after the fact, it carries no guarantee."
    )


class Quality(_Part):
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


class Drift(_Part):
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


class Calibration(_Part):
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
    provenance: dict[str, Any] = {}

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
        probability = None if cut else self.probability(raw)
        at = self.require_threshold().probability if min_confidence == "calibrated" else min_confidence
        if probability is None:
            why = "the deadline cut the work short" if cut else f"the score {self.score} was not measured"
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


_DRIFT_ITEMS = 20


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


def score_of(result: ReasoningResult, name: str) -> float | None:
    """The raw score of a result by its name (one of ``SCORES``); ``None`` where it was not measured.

    The visual dependency is the mean ``S`` of the answer's tokens.
    """
    if name == "visual_dependency":
        tokens = [] if result.grounding is None else result.grounding.tokens
        spread = [token.dependency for token in tokens if token.in_answer]
        return math.fsum(spread) / len(spread) if spread else None
    value: float | None = getattr(result.scores, name)
    return value
