"""``latent-tool calibrate``: from a labelled run to a calibration file, and whether traffic has drifted since."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_tool.commands import options
from latent_tool.errors import CalibrationError, SettingsError
from latent_tool.files import require_apart, require_writable

if TYPE_CHECKING:
    from latent_tool.calibration.calibration import Calibration, Drift
    from latent_tool.evaluation.runs import Run

__all__ = ["calibrate", "calibration_of", "check_drift"]


class Kind(StrEnum):
    """Mappings from a score to a probability."""

    auto = "auto"
    isotonic = "isotonic"
    platt = "platt"
    temperature = "temperature"


def calibrate(
    run: Annotated[Path, typer.Argument(help="Folder of a run: what latent-tool eval wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="The calibration file to write.")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Which score becomes the confidence; by default option_probability where questions were asked by "
            "their options, else pooled_probability.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Whose answers, if the run has several methods.", show_default=False)
    ] = None,
    target_error: Annotated[float, typer.Option(help="Share of errors allowed among the accepted.")] = 0.05,
    confidence_level: Annotated[float, typer.Option(help="How sure to be of that.")] = 0.9,
    mapping: Annotated[Kind, typer.Option(help="How a score becomes a probability.")] = Kind.auto,
    seed: Annotated[int, typer.Option(help="Seed of the split and the folds.")] = 0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Also take a run that is not complete; the file then says so.")
    ] = False,
    drift_of: Annotated[
        Path | None,
        typer.Option(
            "--check-drift", metavar="FILE.json", help="Instead: have the scores of RUN, labelled or not, drifted?"
        ),
    ] = None,
    level: Annotated[float, typer.Option(help="Probability of a false alarm of --check-drift, at most.")] = 0.01,
    as_json: options.AsJson = False,
) -> None:
    """Turn a score into a probability, with a threshold for a target error.

    Exit code 3: no threshold exists (the file is written without one), or a drift was found.

    Example: latent-tool eval questions.jsonl --method search --out run && latent-tool calibrate run --out mine.json
    """
    from latent_tool.evaluation.runs import load_run

    if (out is None) == (drift_of is None):
        raise SettingsError(
            "Give either --out or --check-drift.",
            "--out FILE.json writes a calibration, --check-drift FILE.json uses one.",
        )
    if drift_of is not None:
        from latent_tool.calibration.calibration import Calibration

        drift = check_drift(Calibration.load(drift_of), load_run(run), method, level)
        print(drift.model_dump_json(indent=2) if as_json else _drift_text(drift))
        if drift.drifted:
            raise typer.Exit(options.BELOW)
        return
    assert out is not None
    require_writable(out, ".json")
    require_apart([("--out", out)], [run / name for name in ("run.json", "summary.json")])
    made = calibration_of(
        load_run(run), score, method, target_error, confidence_level, mapping.value, seed, partial=partial
    )
    made.save(out)
    if as_json:
        print(made.model_dump_json(indent=2, exclude={"reference", "configuration"}))
    else:
        print(_text(made, out))
    if made.threshold is None:
        raise typer.Exit(options.BELOW)


def calibration_of(
    run: Run,
    score: str | None = None,
    method: str | None = None,
    target_error: float = 0.05,
    confidence_level: float = 0.9,
    mapping: Any = "auto",
    seed: int = 0,
    *,
    partial: bool = False,
) -> Calibration:
    """A calibration from the labelled answers of one method of a run.

    An answer that could not be found (an error) is an item without a score; rows without a label, and those that could
    not be asked, do not count.

    Args:
        score: by default ``option_probability`` where questions were asked by their options, else
            ``pooled_probability``.
        partial: also take a method that has not answered everything yet; what was answered first need not be like the
            rest.

    Raises ``SettingsError`` for an unknown method, ``CalibrationError`` for a score the run does not have, or has for
    free answers alone, and for a run that is not complete.
    """
    from latent_tool.calibration.fit import fit

    name = _method(run, method)
    answered, size = len(run.of(name)), run.manifest.dataset.size
    if answered < size and not partial:
        raise CalibrationError(
            f"{name} has answered {answered} of {size} questions.",
            "Let latent-tool eval finish, or take what is there (--partial).",
        )
    rows = [row for row in run.of(name) if row.usable and (row.correct is not None or row.error is not None)]
    facts = run.manifest.methods[name]
    chosen = any(row.scores.get("option_probability") is not None for row in rows)
    score = score or ("option_probability" if chosen else "pooled_probability")
    if chosen and score != "option_probability":
        raise CalibrationError(
            f"Questions of this run were asked by their options; the score {score!r} is of free answers.",
            "Calibrate option_probability, or evaluate with --free-text.",
        )
    if score not in facts.fingerprints or all(row.scores.get(score) is None for row in rows):
        known = sorted({each for row in rows for each, value in row.scores.items() if value is not None})
        raise CalibrationError(
            f"The answers of {name} have no score {score!r}.", f"They have: {', '.join(known) or 'none'}."
        )
    return fit(
        [row.scores.get(score) for row in rows],
        [bool(row.correct) for row in rows],
        score=score,
        configuration=_configuration(run, name, score),
        fingerprint=run.fingerprint(name, score),
        mapping=mapping,
        target_error=target_error,
        confidence_level=confidence_level,
        seed=seed,
        provenance={
            "dataset": run.manifest.dataset.name,
            "dataset_fingerprint": run.manifest.dataset.fingerprint,
            "questions": len(rows),
            "answered": f"{answered} of {size}",
            "method": name,
            "model": run.manifest.model.get("name"),
            "seed": seed,
            "latent_tool": run.manifest.latent_tool,
        },
    )


def check_drift(calibration: Calibration, run: Run, method: str | None = None, level: float = 0.01) -> Drift:
    """Compare the scores of a run, labelled or not, with those of a calibration.

    Raises ``CalibrationMismatchError`` when the run was made with another configuration.
    """
    from latent_tool.errors import CalibrationMismatchError

    name = _method(run, method)
    if run.fingerprint(name, calibration.score) != calibration.fingerprint:
        raise CalibrationMismatchError(
            f"The answers of {name} were made with another configuration than the calibration's.",
            "Compare runs of the same model, prompt, settings and budget.",
        )
    return calibration.drift([row.scores.get(calibration.score) for row in run.of(name)], level)


def _method(run: Run, wanted: str | None) -> str:
    if wanted is None and len(run.methods) != 1:
        raise SettingsError(
            f"The run has {len(run.methods)} methods.", f"Choose one with --method: {', '.join(run.methods)}."
        )
    name = run.methods[0] if wanted is None else wanted
    run.of(name)
    return name


def _configuration(run: Run, method: str, score: str) -> dict[str, Any] | None:
    """What a method's fingerprint was made of, so that the calibration can say what differs; ``None`` if not known."""
    from latent_tool.calibration.configuration import configuration, digest
    from latent_tool.settings import Budget, GenerationSettings, NoiseSettings, SearchSettings

    manifest, facts = run.manifest, run.manifest.methods[method]
    described = configuration(
        score=score,
        dtype=manifest.model.get("dtype", "auto"),
        system=manifest.system,
        settings=SearchSettings(**facts.settings),
        budget=Budget(**facts.budget),
        generation=None if facts.generation is None else GenerationSettings(**facts.generation),
        noise=NoiseSettings(**manifest.noise) if manifest.noise and score == "visual_dependency" else None,
    )
    described["model"] = {name: value for name, value in manifest.model.items() if name not in ("name", "dtype")}
    if "content" not in described["model"]:
        described["model"]["name"] = manifest.model.get("name")
    for images_first in (True, False):
        tried = {**described, "images_first": images_first}
        if digest(tried) == run.fingerprint(method, score):
            return tried
    return None


def _text(made: Calibration, out: Path) -> str:
    """A calibration for people."""
    quality = made.quality
    lines = [
        f"{made.score}: {made.items} labelled answers, {made.right} right; {made.unscored} without the score",
        f"mapping      {made.mapping.kind} (log-loss "
        + ", ".join(f"{kind} {loss:.4f}" for kind, loss in quality.log_loss.items())
        + ")",
        f"ECE          {_number(quality.ece_before)} -> {quality.ece_after:.3f} "
        f"(noise floor {quality.ece_noise_floor:.3f}), {quality.folds}-fold cross-validation",
        f"AUROC        {_number(quality.auroc)}",
    ]
    if made.threshold is not None:
        found = made.threshold
        side = ">=" if made.higher_is_surer else "<="
        lines += [
            f"threshold    {made.score} {side} {found.score:.6g}, a probability of {found.probability:.3f}",
            f"             at most {found.target_error:.1%} errors among those, {found.confidence_level:.0%} sure",
            f"             tested on {found.tested}: {found.accepted} accepted, {found.errors} wrong; "
            f"p = {found.p_value:.3g}",
            f"on new items {_number(quality.coverage)} accepted, {_number(quality.error)} of them wrong "
            "(cross-validation)",
        ]
    elif made.no_threshold is not None:
        lines.append(f"no threshold {made.no_threshold.reason}")
    return "\n".join([*lines, f"written      {out}"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _drift_text(drift: Drift) -> str:
    verdict = "the scores have drifted: calibrate again" if drift.drifted else "no drift is seen"
    lines = [verdict]
    if drift.p_value is not None:
        lines.append(
            f"{drift.scores} scores, mean {drift.mean:.4f} against {drift.reference_mean:.4f}; "
            f"distance {drift.distance:.3f}, p = {drift.p_value:.3g}"
        )
    lines.append(
        f"{drift.unscored} of {drift.scores + drift.unscored} without a score, p = {drift.unscored_p_value:.3g}"
    )
    return "\n".join([*lines, f"level {drift.level:g} for both together"])
