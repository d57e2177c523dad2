"""Calibration: what a file holds, what is refused, what the guarantee is worth, and whose configuration it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom, binomtest
from scripted_agents import CIRCLE, small_reasoner

from latent_tool import Budget, ConfidenceRouter, LatentReasoner, ReasoningResult, SearchSettings
from latent_tool.calibration import Calibration, NoThreshold, ProbabilityMapping, Quality, Threshold
from latent_tool.calibration.configuration import EMBEDDED_FOLDER, configuration, content_hash, digest, fingerprint
from latent_tool.calibration.domain import NoDomainCheck
from latent_tool.calibration.fit import MIN_ITEMS, MIN_OF_EACH, fit
from latent_tool.calibration.threshold import find_threshold, passing_threshold, split_items, threshold_sequence
from latent_tool.errors import (
    CalibrationError,
    CalibrationMismatchError,
    InputError,
    ModelNotFoundError,
    SettingsError,
    TooFewItemsError,
)
from latent_tool.schema import Grounding, Scores, TokenDependency
from latent_tool.scores import RESULT_SCORES, SCORES, score_of
from latent_tool.settings import GenerationSettings, NoiseSettings
from latent_tool.statistics import ece

pytestmark = pytest.mark.disable_socket
CONFIGURATION = {"made": "up"}


def sample(count: int, seed: int = 0, sharpness: float = 1.0) -> tuple[list[float], list[bool]]:
    """Scores and labels: with ``sharpness=1`` a score is the probability of being right, else a power of it."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(2.2, 0.55, count)
    return (chance**sharpness).tolist(), (rng.random(count) < chance).tolist()


def made(scores: list[Any], correct: list[bool], **options: Any) -> Calibration:
    return fit(scores, correct, **{"score": "answer_probability", "configuration": CONFIGURATION, **options})


def by_hand(reasoner: LatentReasoner, score: float = 0.5, **changes: Any) -> Calibration:
    """A calibration of a reasoner's own configuration: halves the raw score's log-odds, accepts from ``score`` on."""
    described = reasoner.configuration()
    threshold = Threshold(
        score=score,
        probability=0.5,
        target_error=0.05,
        confidence_level=0.9,
        tested=100,
        accepted=60,
        errors=0,
        p_value=0.04,
        coverage=0.6,
    )
    fields: dict[str, Any] = {
        "fingerprint": digest(described),
        "configuration": described,
        "score": described["score"],
        "mapping": ProbabilityMapping(kind="temperature", logit=True, slope=0.5),
        "threshold": threshold,
        "items": 100,
        "right": 80,
        "quality": Quality(
            folds=10,
            auroc=0.9,
            ece_before=0.1,
            ece_after=0.02,
            ece_noise_floor=0.02,
            log_loss={"temperature": 0.3},
            thresholds_found=1.0,
            coverage=0.6,
            error=0.01,
        ),
        "reference": (0.1, 0.5, 0.9),
        "no_domain": NoDomainCheck(reason="It was made by hand."),
    }
    return Calibration(**{**fields, **changes})


def without_threshold(reasoner: LatentReasoner) -> Calibration:
    why = NoThreshold(
        reason="Too many are wrong.", target_error=0.05, confidence_level=0.9, needed_items=None, reachable_error=None
    )
    return by_hand(reasoner, threshold=None, no_threshold=why)


# ---------------------------------------------------------------------- fingerprint


def test_a_fingerprint_names_what_a_score_depends_on() -> None:
    one = fingerprint(score="answer_probability")
    assert one == fingerprint(score="answer_probability", settings=SearchSettings(), budget=Budget(deadline_s=3))
    assert one == fingerprint(score="answer_probability", dtype="float32", model=str(EMBEDDED_FOLDER))
    others: list[dict[str, Any]] = [
        {"score": "reward"},
        {"system": "Be brief."},
        {"images_first": False},
        {"settings": SearchSettings(latents=4)},
        {"settings": SearchSettings(thinking_markers=None)},
        {"budget": Budget.level("quick")},
        {"budget": Budget(max_new_tokens=10)},
        {"generation": GenerationSettings(repetition_penalty=1.1)},
        {"noise": NoiseSettings()},
        {"method": "random-latents"},
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct"},
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": "abc"},
        {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "dtype": "bfloat16"},
        {"quantization_config": {"load_in_4bit": True}},
    ]
    found = [fingerprint(**{"score": "answer_probability", **each}) for each in others]
    assert len({one, *found}) == len(others) + 1
    plain = fingerprint(score="a", settings=SearchSettings(latents=0))
    assert plain == fingerprint(score="a", settings=SearchSettings(latents=0, sigma=9.0), budget=Budget(iterations=3))
    assert plain != fingerprint(score="a", settings=SearchSettings(latents=0), budget=Budget(max_new_tokens=3))


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    (second / "README.md").write_text("words")
    (second / "calibration.json").write_text("{}")
    assert content_hash(first) == content_hash(second)
    (second / "model.safetensors").write_bytes(b"Weights")
    assert content_hash(first) != content_hash(second)
    with pytest.raises(ModelNotFoundError):
        content_hash(tmp_path)


# ---------------------------------------------------------------------- fitting


def test_the_mapping_makes_probabilities_of_overconfident_scores() -> None:
    scores, correct = sample(1500, sharpness=0.2)
    found = made(scores, correct)
    assert found.quality.ece_before is not None and found.quality.ece_before > 0.08
    assert found.quality.ece_after < found.quality.ece_noise_floor + 0.02
    fresh, truth = sample(20_000, seed=1, sharpness=0.2)
    probabilities = np.array([found.probability(each) for each in fresh])
    assert ece(probabilities, np.array(truth)) < 0.04
    assert found.mapping.kind == min(found.quality.log_loss, key=lambda kind: found.quality.log_loss[kind])


@pytest.mark.parametrize("kind", ["isotonic", "platt", "temperature"])
def test_what_is_stored_is_what_scikit_learn_says(kind: Any) -> None:
    """The stored numbers, evaluated without scikit-learn, against its own prediction."""
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    scores, correct = sample(400, sharpness=0.5)
    found = made(scores, correct, mapping=kind)
    grid = np.linspace(0.01, 0.99, 60)
    own = np.array([found.probability(each) for each in grid])
    assert np.all(np.diff(own) >= 0) and found.mapping.kind == kind
    if kind == "isotonic":
        model = IsotonicRegression(y_min=1 / 402, y_max=1 - 1 / 402, out_of_bounds="clip").fit(scores, correct)
        assert np.allclose(own, model.predict(grid), atol=1e-9)
    else:
        z = np.log(np.array(scores) / (1 - np.array(scores)))[:, None]
        model = LogisticRegression(C=np.inf, fit_intercept=kind == "platt").fit(z, correct)
        assert np.allclose(own, model.predict_proba(np.log(grid / (1 - grid))[:, None])[:, 1], atol=2e-3)


def test_a_score_that_falls_when_sure_is_turned() -> None:
    scores, correct = sample(600)
    entropies = [2 - 2 * each for each in scores]
    found = made(entropies, correct, score="first_token_entropy", target_error=0.15)
    assert found.threshold is not None and not found.higher_is_surer
    assert found.quality.ece_before is None  # an entropy is no probability
    assert found.accepts(0.0) and not found.accepts(2.0) and found.accepts(found.threshold.score)
    low, high = found.probability(1.9), found.probability(0.1)
    assert low is not None and high is not None and low < high
    with pytest.raises(CalibrationError):
        made(entropies, correct, score="first_token_entropy", mapping="temperature")


def test_too_few_items_say_how_many() -> None:
    scores, correct = sample(MIN_ITEMS - 1)
    with pytest.raises(TooFewItemsError, match=f"{MIN_ITEMS} are needed") as caught:
        made(scores, correct)
    assert "1 more" in caught.value.hint
    with pytest.raises(TooFewItemsError, match=f"{MIN_OF_EACH} are needed"):
        made([0.5] * 200, [True] * 195 + [False] * 5)
    with pytest.raises(TooFewItemsError):  # items without a score do not count
        made([None] * 150 + [0.5] * 50, [True, False] * 100)


@pytest.mark.parametrize(
    "wrong", [{"target_error": 0}, {"target_error": 1}, {"confidence_level": 1.0}, {"mapping": "spline"}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError):
        made(*sample(200), **wrong)


def test_missing_scores_are_counted_and_never_accepted() -> None:
    scores, correct = sample(500)
    found = made([*scores, *[None] * 100, math.nan], [*correct, *[True] * 101], target_error=0.15)
    assert (found.items, found.unscored) == (500, 101)
    assert found.probability(None) is None and found.probability(math.nan) is None
    assert found.accepts(None) is False and found.accepts(math.nan) is False


def test_useless_scores_give_no_threshold_and_say_so() -> None:
    rng = np.random.default_rng(0)
    found = made(rng.random(500).tolist(), (rng.random(500) < 0.5).tolist())
    assert found.threshold is None and found.no_threshold is not None
    assert found.no_threshold.needed_items is None and "not expected" in found.no_threshold.reason
    with pytest.raises(CalibrationError, match="not expected"):
        found.accepts(0.9)


def test_too_few_items_for_a_threshold_say_how_many_would_do() -> None:
    scores, correct = sample(150)
    found = made(scores, correct, target_error=0.05)
    assert found.no_threshold is not None
    needed, reachable = found.no_threshold.needed_items, found.no_threshold.reachable_error
    assert needed is not None and needed > 150 and str(needed) in found.no_threshold.reason
    assert reachable is not None and made(scores, correct, target_error=reachable).threshold is not None


def test_what_is_a_probability_is_known_by_its_name() -> None:
    named = {name for name in SCORES if name.endswith("_probability")}
    assert {name for name, score in SCORES.items() if score.probability} == named | {"agreement"}
    scores, correct = sample(400)
    dependency = made(scores, correct, score="visual_dependency")  # all of them happen to lie in [0, 1]
    assert dependency.quality.ece_before is None and "temperature" not in dependency.quality.log_loss
    assert not dependency.mapping.logit
    with pytest.raises(CalibrationError, match="outside"):
        made([1.5, *scores[1:]], correct)


def test_a_larger_share_without_a_score_is_a_drift() -> None:
    scores, correct = sample(500)
    found = made([*scores, *[None] * 5], [*correct, *[False] * 5])
    fresh, _ = sample(200, seed=5)
    assert not found.drift([*fresh, None, None]).drifted
    lost = found.drift([*fresh, *[None] * 30])
    assert lost.drifted and lost.unscored_p_value < 0.005 and lost.p_value is not None and lost.p_value > 0.005
    gone = found.drift([None] * 50)
    assert gone.drifted and (gone.p_value, gone.distance, gone.mean) == (None, None, None)
    with pytest.raises(CalibrationError, match="too few"):
        found.drift(fresh[:10])


# ---------------------------------------------------------------------- the guarantee


def test_a_single_threshold_by_hand() -> None:
    """At 90 % confidence and 5 % error, no error takes 45 accepted items; 44 are not enough."""
    assert binom.cdf(0, 45, 0.05) <= 0.1 < binom.cdf(0, 44, 0.05)
    found = find_threshold(np.ones(60), np.ones(60, dtype=bool), 0.05, 0.9)
    assert isinstance(found, Threshold) and (found.tested, found.accepted, found.errors) == (51, 51, 0)
    assert isinstance(find_threshold(np.ones(50), np.ones(50, dtype=bool), 0.05, 0.9), NoThreshold)


def test_the_guarantee_holds_and_mapie_agrees() -> None:
    """200 random splits: the true error exceeds the target at most as often as promised; same thresholds as MAPIE."""
    from mapie.risk_control import BinaryClassificationController

    target, level, splits = 0.1, 0.9, 200
    pool, right = (np.array(each) for each in sample(100_000, seed=5))
    order = np.argsort(-pool)
    surest, errors = pool[order], np.cumsum(~right[order]) / np.arange(1, len(pool) + 1)
    rng = np.random.default_rng(6)
    violated = found_some = theirs = same = 0
    for split in range(splits):
        chosen = rng.choice(len(pool), 400, replace=False)
        values, labels = pool[chosen], right[chosen]
        found = passing_threshold(values, labels, target, level, seed=split)
        if found is not None:
            found_some += 1
            count = int(np.searchsorted(-surest, -found.score, side="right"))
            violated += bool(errors[count - 1] > target)
        if split % 10:
            continue
        design, test = split_items(400, split)
        steps = threshold_sequence(values[design], len(test), target, level)
        controller = BinaryClassificationController(
            lambda x: np.stack([1 - x[:, 0], x[:, 0]], 1),
            "precision",
            1 - target,
            level,
            list_predict_params=steps,
            fwer_method="fixed_sequence",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns when there is no threshold
            controller.calibrate(values[test][:, None], labels[test].astype(int))
        # Its p values are the smaller of Hoeffding's and the exact ones, which float rounding may give one error more.
        taken = values[test] >= steps[:, None]
        accepted, wrong = taken.sum(1), (taken & ~labels[test]).sum(1)
        p_values = np.asarray(controller.p_values).ravel()
        assert np.all(p_values >= binom.cdf(wrong, accepted, target) - 1e-12)
        assert np.all(p_values <= binom.cdf(wrong + 1, accepted, target) + 1e-12)
        valid = np.asarray(controller.valid_predict_params)
        passed = np.flatnonzero(np.cumprod(p_values <= 1 - level))
        assert valid.tolist() == sorted(steps[passed].tolist()) or valid.tolist() == steps[passed].tolist()
        if len(valid):
            assert found is not None and found.score <= valid.min()
            same += bool(found.score == valid.min())
            theirs += 1
    assert theirs > 10 and same >= theirs / 2
    assert found_some > 100
    assert binomtest(violated, splits, 1 - level, alternative="greater").pvalue > 0.01


# ---------------------------------------------------------------------- files


def test_a_file_survives_and_is_read_strictly(tmp_path: Path) -> None:
    found = made(*sample(400), provenance={"data": "synthetic"})
    path = tmp_path / "c.json"
    found.save(path)
    assert Calibration.load(path) == Calibration.load(str(path)) == found
    assert Calibration.load(json.loads(path.read_text())) == found
    whole = json.loads(path.read_text())
    wrong: list[Any] = [
        {**whole, "schema_version": "4"},
        {**whole, "fingerprint": "0" * 64},
        {**whole, "extra": 1},
        {**whole, "threshold": None, "no_threshold": None},
        {**whole, "reference": []},
        {**whole, "mapping": {"kind": "isotonic", "x": [0, 1], "y": [0.5, 0.2]}},
        {**whole, "mapping": {"kind": "isotonic", "x": [1, 1], "y": [0.5, 0.6]}},
        {},
    ]
    for each in wrong:
        path.write_text(json.dumps(each))
        with pytest.raises(CalibrationError) as caught:
            Calibration.load(path)
        assert caught.value.hint
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CalibrationError):
        Calibration.load(path)
    with pytest.raises(CalibrationError):
        Calibration.load(tmp_path / "nowhere.json")


def test_using_one_takes_neither_scikit_learn_nor_scipy(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    made(*sample(400), target_error=0.2).save(path)
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['scipy'] = None\n"
        "from latent_tool.calibration.calibration import Calibration\n"
        f"c = Calibration.load({str(path)!r}); print(c.probability(0.9), c.accepts(0.99))\n"
        "from latent_tool.errors import MissingExtraError\n"
        "try: c.drift([0.5] * 50)\n"
        "except MissingExtraError: print('missing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "True\nmissing\n" in done.stdout


# ---------------------------------------------------------------------- drift


def test_drift_is_seen_and_not_imagined() -> None:
    found = made(*sample(1000))
    alarms = sum(found.drift(sample(200, seed=seed)[0], level=0.05).drifted for seed in range(1, 101))
    assert binomtest(alarms, 100, 0.05, alternative="greater").pvalue > 0.001
    moved = found.drift([each**3 for each in sample(200, seed=1)[0]])
    assert moved.drifted and moved.p_value < moved.level and moved.mean < moved.reference_mean
    some = found.drift([*sample(50, seed=2)[0], None, math.nan])
    assert (some.scores, some.unscored) == (50, 2)
    with pytest.raises(CalibrationError, match="20"):
        found.drift([0.5] * 19)
    with pytest.raises(CalibrationError):
        found.drift([0.5] * 50, level=0)


# ---------------------------------------------------------------------- in a reasoner and a router


def test_a_calibrated_reasoner_says_probabilities(picture: Image.Image) -> None:
    request = {"image": picture, "question": CIRCLE}
    plain = small_reasoner()
    raw = plain.invoke(request)
    assert raw.confidence is not None
    reasoner = small_reasoner(calibration=by_hand(plain))
    result = reasoner.invoke(request)
    assert result.confidence_source == "calibrated" and result.scores == raw.scores
    odds = math.sqrt(raw.confidence / (1 - raw.confidence)) if raw.confidence < 1 else math.inf
    assert result.confidence == pytest.approx(odds / (1 + odds) if odds < math.inf else 1.0, abs=2e-3)
    assert (result.accepted, result.abstained) == (None, None)
    *_, streamed = reasoner.stream(request)
    assert isinstance(streamed, ReasoningResult) and streamed.confidence == result.confidence
    (batched,) = reasoner.batch([request])
    assert batched.confidence == pytest.approx(result.confidence, abs=1e-4)

    # A number is compared with the probability, not with the raw score.
    between = (result.confidence + raw.confidence) / 2
    if result.confidence < between < raw.confidence:
        assert reasoner.invoke({**request, "min_confidence": between}).accepted is False
    for score, accepted in ((0.0, True), (1.1, False)):
        sure = small_reasoner(calibration=by_hand(plain, score), min_confidence="calibrated").invoke(request)
        assert (sure.accepted, sure.abstained, sure.min_confidence) == (accepted, not accepted, 0.5)
        routed = ConfidenceRouter(
            rungs=[small_reasoner(calibration=by_hand(plain, score)), lambda request: "other"],
            thresholds="calibrated",
        ).invoke(request)
        assert [step.decision for step in routed.route] == ["accepted"] if accepted else ["unsure", "accepted"]
        assert (routed.route[0].threshold, routed.route[0].confidence_source) == (0.5, "calibrated")


def test_another_configuration_is_an_error_before_any_work(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small_reasoner()
    own = by_hand(plain)
    others: list[tuple[dict[str, Any], str]] = [
        ({"settings": SearchSettings(latents=2, samples=6)}, "settings.samples"),
        ({"budget": Budget(iterations=2)}, "budget.iterations"),
        ({"images_first": False}, "images_first"),
        ({"generation": GenerationSettings(repetition_penalty=1.2)}, "generation.repetition_penalty"),
        ({"confidence": "reward"}, "answer_probability"),
    ]
    for changes, named in others:
        with pytest.raises(CalibrationMismatchError, match=named):
            small_reasoner(**{"calibration": own, **changes})
    with pytest.raises(CalibrationMismatchError, match="budget"):
        small_reasoner(calibration=own).with_budget("quick")
    with pytest.raises(CalibrationMismatchError):
        small_reasoner(calibration=by_hand(plain, configuration=None, fingerprint="0" * 64))

    def never(*arguments: Any) -> Any:
        raise AssertionError("work was begun")

    reasoner = small_reasoner(calibration=own)
    monkeypatch.setattr(LatentReasoner, "engine", never)
    monkeypatch.setattr("latent_tool.images.load.load_image", never)
    request = {"image": picture, "question": CIRCLE}
    for wrong in ({**request, "budget": "quick"}, {**request, "system": "Be brief."}):
        with pytest.raises(CalibrationMismatchError):
            reasoner.invoke(wrong)
    (answer,) = reasoner.batch([{**request, "budget": "quick"}], return_exceptions=True)
    assert isinstance(answer, CalibrationMismatchError)
    other = tmp_path / "model"  # the content of a folder is looked at before it is loaded
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(CalibrationMismatchError, match="model"):
        small_reasoner(model=str(other), calibration=own).invoke(request)


def test_a_threshold_that_does_not_exist_is_an_error() -> None:
    plain = small_reasoner()
    with pytest.raises(CalibrationError, match="needs a calibration"):
        small_reasoner(min_confidence="calibrated")
    bare = without_threshold(plain)
    with pytest.raises(CalibrationError, match="Too many are wrong"):
        small_reasoner(calibration=bare, min_confidence="calibrated")
    with pytest.raises(CalibrationError, match="Too many are wrong"):
        ConfidenceRouter(rungs=[small_reasoner(calibration=bare)], thresholds="calibrated")
    with pytest.raises(SettingsError, match="rung 0 has no calibration"):
        ConfidenceRouter(rungs=[plain], thresholds=["calibrated"])
    for wrong in ("sure", 1.5, math.nan):
        with pytest.raises(SettingsError):
            small_reasoner(min_confidence=wrong)


def test_what_is_not_calibrated_is_not_accepted(picture: Image.Image) -> None:
    plain = small_reasoner()
    own = by_hand(plain)
    kept: dict[str, Any] = {"answer": "red", "raw_text": "red", "confidence_source": "answer_probability"}
    cut = ReasoningResult(
        **kept, confidence=1.0, scores=Scores(answer_probability=1.0), stop_reason="deadline", finish_reason="stop"
    )
    for wanted in (None, 0.5, "calibrated"):
        judged = own.apply(cut, wanted)  # type: ignore[arg-type]
        assert (judged.confidence, judged.confidence_source, judged.abstained) == (None, "unscored", True)
        assert any("deadline" in warning for warning in judged.warnings)
    unscored = ReasoningResult(**kept, confidence=1.0)
    assert own.apply(unscored, None).abstained is True
    # A rung whose confidence is not calibrated is not accepted by a calibrated threshold.
    sure = ReasoningResult(**kept, confidence=1.0, accepted=True, min_confidence=0.1)
    result = ConfidenceRouter(rungs=[lambda request: sure], thresholds="calibrated").invoke(
        {"image": picture, "question": CIRCLE}
    )
    assert result.abstained and result.route[0].reason == "the confidence is not calibrated"


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_it_is_part_of_a_saved_reasoner() -> None:
    from langchain_core.load import dumpd, load

    reasoner = small_reasoner(calibration=by_hand(small_reasoner()), min_confidence="calibrated")
    saved = dumpd(reasoner)
    assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]) == reasoner


def test_scores_are_found_by_their_names() -> None:
    tokens = [TokenDependency(token=str(i), probability=0.5, dependency=float(i), in_answer=i > 0) for i in range(3)]
    result = ReasoningResult(
        answer="a",
        raw_text="a",
        confidence=None,
        confidence_source="unscored",
        scores=Scores(reward=0.25),
        grounding=Grounding(tokens=tokens, mean=1.0, share_above=0.5, noise=NoiseSettings()),
    )
    assert score_of(result, "reward") == 0.25
    assert score_of(result, "visual_dependency") == 1.5
    assert score_of(result, "answer_probability") is None
    assert all(score_of(result, name) is None for name in RESULT_SCORES if name not in ("reward", "visual_dependency"))
    for name in ("agreement", "masked_entropy_gain", "rewards"):
        with pytest.raises(SettingsError, match="carries the score"):
            score_of(result, name)


def test_the_shipped_calibration_is_that_of_the_shipped_model() -> None:
    """Made by ``make calibration``; a new model, or new defaults of the search, need a new one."""
    shipped = Calibration.load("embedded")
    assert shipped.score == "pooled_probability"
    assert shipped.fingerprint == fingerprint(score=shipped.score)
    assert LatentReasoner(calibration="embedded").calibration == shipped
    assert shipped.items >= MIN_ITEMS and "4000000" in shipped.provenance["dataset"]


def test_errors_are_input_errors() -> None:
    assert issubclass(CalibrationError, InputError)
    assert configuration(score="a")["budget"].keys().isdisjoint({"deadline_s"})
