"""``latent-tool calibrate``: from a labelled run to a calibration file, and whether traffic has drifted since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latent_tool.about import model_name
from latent_tool.commands import options
from latent_tool.commands.options import require_used
from latent_tool.errors import CalibrationError, SettingsError
from latent_tool.files import require_apart, require_writable

if TYPE_CHECKING:
    from latent_tool.calibration.calibration import Calibration, Drift
    from latent_tool.evaluation.domain import Checked
    from latent_tool.evaluation.runs import Row, Run
    from latent_tool.schema import Domain

__all__ = ["calibrate", "calibration_of", "check_drift"]


# What a run notes beside its model, and a calibration elsewhere.
_NOT_THE_MODEL = ("name", "dtype", "quantization")
# Options that say where a run's data set lies, in place of what the run says.
_WHERE = ("data", "preset", "images")
_LEFT_OUT = "Pictures are named for a domain check that is left out."
# What only fills the screen.
_NUMBERS = {"usual": True, "pixels": True, "damages": True, "held_back": True}
_NOT_SHOWN: dict[str, Any] = {"reference": True, "configuration": True, "domain": _NUMBERS}


class Kind(StrEnum):
    """Mappings from a score to a probability."""

    auto = "auto"
    isotonic = "isotonic"
    platt = "platt"
    temperature = "temperature"


def calibrate(
    context: typer.Context,
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
    domain: Annotated[
        bool,
        typer.Option(
            "--domain/--no-domain", help="Also fit the domain check, which tells questions unlike the calibration's."
        ),
    ] = True,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="The data set of the run, with its pictures, where it lies elsewhere now."),
    ] = None,
    preset: options.Preset = None,
    images: options.Images = None,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Further pictures, drawn like the run's, for the domain check; they need no labels. Without them, a "
            "part of the run's own questions is spent on it.",
        ),
    ] = None,
    false_alarms: Annotated[
        float | None,
        typer.Option(
            min=0.0005,
            max=0.5,
            metavar="SHARE",
            help="Share of questions like the calibration's that the domain check may refuse; by default the smallest "
            "of 0.01, 0.02 and 0.05 that there are pictures for.",
        ),
    ] = None,
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
    if not domain:
        require_used(context, "without --no-domain", *_WHERE, "pictures", "false_alarms")
    if drift_of is None:
        require_used(context, "with --check-drift", "level")
    else:
        fitting = (
            "score",
            "target_error",
            "confidence_level",
            "mapping",
            "seed",
            "pictures",
            "false_alarms",
            "partial",
        )
        require_used(context, "without --check-drift", *fitting)
    if drift_of is not None:
        from latent_tool.calibration.calibration import Calibration

        given = Calibration.load(drift_of)
        if given.domain is None:
            require_used(context, "with a calibration that has a domain check", *_WHERE)
        where: dict[str, Any] = {"data": data, "preset": preset, "images": images}
        drift = check_drift(given, load_run(run), method, level, domain=domain, **where)
        print(drift.model_dump_json(indent=2) if as_json else _drift_text(drift))
        if drift.drifted:
            raise typer.Exit(options.BELOW)
        return
    assert out is not None
    require_writable(out, ".json")
    require_apart([("--out", out)], [run / name for name in ("run.json", "summary.json")])
    made = calibration_of(
        load_run(run),
        score,
        method,
        target_error,
        confidence_level,
        mapping.value,
        seed,
        partial=partial,
        domain=domain,
        data=data,
        preset=preset,
        images=images,
        pictures=pictures,
        false_alarms=false_alarms,
    )
    made.save(out)
    if as_json:
        print(made.model_dump_json(indent=2, exclude=_NOT_SHOWN))
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
    domain: bool = True,
    data: str | None = None,
    preset: str | None = None,
    images: Path | None = None,
    pictures: str | None = None,
    false_alarms: float | None = None,
) -> Calibration:
    """Return a calibration from the labelled answers of one method of a run, with a domain check from its pictures.

    An answer that could not be found (an error), and one that says that it cannot be told, is an item without a score;
    rows without a label, and those that could not be asked, do not count.

    Args:
        score: by default ``option_probability`` where questions were asked by their options, else
            ``pooled_probability``.
        partial: also take a method that has not answered everything yet; what was answered first need not be like the
            rest.
        domain, data, preset, images, pictures, false_alarms: see the command; where nobody has said where
            the run's pictures lie and they are not found, the calibration has no domain check and says so.

    Raises ``SettingsError`` for an unknown method, pictures that are not where they were, and pictures for a check that
    is left out, ``CalibrationError`` for a score the run does not have, or has for
    free answers alone, and for a run that is not complete.
    """
    from latent_tool.calibration.domain import NoDomainCheck
    from latent_tool.calibration.fit import fit
    from latent_tool.evaluation.domain import Checked

    name = _method(run, method)
    answered, size = len(run.of(name)), run.manifest.dataset.size
    if answered < size and not partial:
        raise CalibrationError(
            f"{name} has answered {answered} of {size} questions.",
            "Let latent-tool eval finish, or take what is there (--partial).",
        )
    rows = [row for row in run.of(name) if row.usable and (row.decided or row.abstained)]
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
    where = {"data": data, "preset": preset, "images": images}
    if not domain and any(given is not None for given in (*where.values(), pictures, false_alarms)):
        raise SettingsError(_LEFT_OUT, "Give one of the two.")
    if domain:
        checked = _checked(run, rows, where, pictures, false_alarms, seed)
    else:
        checked = Checked(NoDomainCheck(reason="It was left out (--no-domain)."))
    return fit(
        [None if row.abstained else row.scores.get(score) for row in rows],
        [bool(row.correct) for row in rows],
        domain=checked.check,
        tested=[row.id not in checked.fitted for row in rows],
        refused=[row.id in checked.refused for row in rows],
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
            "model": model_name(str(run.manifest.model.get("name"))),
            "seed": seed,
            "domain": dict(checked.provenance),
            "latent_tool": run.manifest.latent_tool,
        },
    )


def _checked(
    run: Run,
    rows: Sequence[Row],
    where: Mapping[str, Any],
    pictures: str | None,
    false_alarms: float | None,
    seed: int,
) -> Checked:
    """The domain check; why there is none, where nobody named the pictures and they are not found."""
    from latent_tool.calibration.domain import NoDomainCheck
    from latent_tool.evaluation.datasets import load_dataset
    from latent_tool.evaluation.domain import Checked, check_of_run, items_of_run

    try:
        items = items_of_run(run, **where)
    except SettingsError as error:
        if _is_said(run, where) or pictures is not None:
            raise SettingsError(error.message, f"{error.hint} Or leave the domain check out (--no-domain).") from None
        return Checked(NoDomainCheck(reason=f"{error.message} {error.hint}"))
    further = [] if pictures is None else load_dataset(pictures, question="?", unlabelled=True, keep_going=True)
    return check_of_run(run, rows, items, pictures=further, level=false_alarms, seed=seed)


def check_drift(
    calibration: Calibration,
    run: Run,
    method: str | None = None,
    level: float = 0.01,
    *,
    domain: bool = True,
    data: str | None = None,
    preset: str | None = None,
    images: Path | None = None,
) -> Drift:
    """Compare the scores of a run, labelled or not, with those of a calibration; its pictures, too, where it can.

    ``domain``, ``data``, ``preset`` and ``images``: see the command. Pictures are compared where the calibration has a
    domain check; those of a run that does not say where they lie, and that are not found, are not. A picture counts
    once.

    Raises ``CalibrationMismatchError`` when the run was made with another configuration, ``SettingsError`` for
    pictures that are named and would not be compared, and for those that are not where they were.
    """
    from latent_tool.errors import CalibrationMismatchError

    where = {"data": data, "preset": preset, "images": images}
    if any(given is not None for given in where.values()):
        if not domain:
            raise SettingsError(_LEFT_OUT, "Give one of the two.")
        if calibration.domain is None:
            raise SettingsError(
                "Pictures are named, and the calibration has no domain check to compare them by.",
                "Leave them out, or fit a calibration that has one.",
            )
    name = _method(run, method)
    if run.fingerprint(name, calibration.score) != calibration.fingerprint:
        raise CalibrationMismatchError(
            f"The answers of {name} were made with another configuration than the calibration's.",
            "Compare runs of the same model, prompt, settings and budget.",
        )
    scores = [None if row.abstained else row.scores.get(calibration.score) for row in run.of(name)]
    domains = _domains(calibration, run, where) if domain and calibration.domain is not None else None
    return calibration.drift(scores, level, domains=domains)


def _is_said(run: Run, where: Mapping[str, Any]) -> bool:
    """Whether somebody has said where the run's data set lies."""
    return run.manifest.dataset.source is not None or any(given is not None for given in where.values())


def _domains(calibration: Calibration, run: Run, where: Mapping[str, Any]) -> list[Domain] | None:
    """What the calibration's domain check says of the run's pictures; ``None`` where they are not found."""
    from latent_tool.evaluation.domain import distinct, engine_of_run, items_of_run, look_at, one_each

    try:
        items = items_of_run(run, **where)
    except SettingsError as error:
        if _is_said(run, where):
            raise SettingsError(error.message, f"{error.hint} Or leave them out (--no-domain).") from None
        return None
    check = calibration.domain
    assert check is not None
    usable = one_each([item for item in items if item.problem is None])
    seen = distinct(look_at(engine_of_run(run), usable, run.manifest.system))
    return [check.verdict(pictures) for pictures in seen.values()]


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
        quantization_config=manifest.model.get("quantization"),
        system=manifest.system,
        settings=SearchSettings(**facts.settings),
        budget=Budget(**facts.budget),
        generation=None if facts.generation is None else GenerationSettings(**facts.generation),
        noise=NoiseSettings(**manifest.noise) if manifest.noise and score == "visual_dependency" else None,
    )
    described["model"] = {name: value for name, value in manifest.model.items() if name not in _NOT_THE_MODEL}
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
    if made.domain is not None:
        check = made.domain
        lines += [
            f"domain check at most {check.level:.1%} of questions like these are refused; fitted on {check.reference}, "
            f"{check.held} held back",
            f"             refused {made.refused} of those the threshold was found on",
        ]
        if (more := _more_pictures(made)) is not None:
            lines.append(f"             label nothing more: {more}")
    elif made.no_domain is not None:
        lines.append(f"no domain check: {made.no_domain.reason}")
    return "\n".join([*lines, f"written      {out}"])


def _more_pictures(made: Calibration) -> str | None:
    """How many more pictures would allow the next smaller rate of false alarms."""
    from latent_tool.calibration.domain import held_back_needed
    from latent_tool.calibration.domain_fit import LEVELS

    check = made.domain
    if check is None or check.level <= LEVELS[0]:
        return None
    missing = held_back_needed(LEVELS[0], len(check.held_back)) - check.held
    if missing <= 0:  # the rate was asked for
        return None
    return f"{missing} more pictures (--pictures) would allow {LEVELS[0]:.0%}"


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
    if drift.domain_p_value is not None:
        lines.append(f"the pictures: p = {drift.domain_p_value:.3g} by the domain check's parts together")
    return "\n".join([*lines, f"level {drift.level:g} for all together"])
