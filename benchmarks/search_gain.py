"""Does the search help, and what does it cost? Accuracy, confidence and cost on questions the model never saw.

    python benchmarks/search_gain.py --questions 300

Half of the questions are held-out scenes, half are hard ones. Every row answers the same questions: ``fixed`` and
``broken`` count the answers that differ from the plain model's for the better and for the worse, with the two-sided
sign test of their difference (McNemar, exact). Greedy decoding of the plain model is the first row.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from latent_tool.engine.engine import Engine, get_engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.models.loading import ModelSpec
from latent_tool.scenes import Split, generate
from latent_tool.settings import Budget, SearchSettings

BATCH = 16
ALWAYS = Budget(target_confidence=None)
# (name, settings, budget)
ROWS: dict[str, tuple[SearchSettings, Budget]] = {
    "plain greedy": (SearchSettings(latents=0), Budget()),
    "greedy reasoning as latents, no search": (SearchSettings(), Budget(iterations=0)),
    "default": (SearchSettings(), Budget()),
    "always search": (SearchSettings(), ALWAYS),
    "always search, no patches": (SearchSettings(patches_per_latent=0), ALWAYS),
    "reward at latents": (SearchSettings(reward_position="latents"), ALWAYS),
    "reward at both": (SearchSettings(reward_position="both"), ALWAYS),
    "paper": (SearchSettings.paper(), Budget()),
    "paper, from greedy reasoning": (SearchSettings.paper(init="reasoning"), Budget()),
}


@dataclass(frozen=True)
class Answered:
    """One question under one setting."""

    right: bool
    confidence: float
    reward: float | None
    initial_reward: float | None
    patches: int
    candidates: int


def questions(count: int, first_seed: int) -> list[tuple[Job, str]]:
    """Half held-out, half hard; at most three questions per picture."""
    asked: list[tuple[Job, str]] = []
    splits: tuple[Split, ...] = ("held_out", "hard")
    for share, split in enumerate(splits, start=1):
        seed = first_seed
        while len(asked) < count * share // len(splits):
            scene = generate(seed, split)
            asked += [(Job((scene.image,), question.text), question.answer) for question in scene.questions[:3]]
            seed += 1
        del asked[count * share // len(splits) :]
    return asked


def answer(engine: Engine, asked: list[tuple[Job, str]], how: tuple[SearchSettings, Budget]) -> list[Answered]:
    answered = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        jobs = [Job(job.images, job.question, settings=how[0], budget=how[1]) for job, _ in part]
        for outcome, (_, truth) in zip(engine.answer_many(jobs), part, strict=True):
            assert isinstance(outcome, Outcome), outcome
            result = engine.result(outcome)
            answered.append(
                Answered(
                    result.answer.strip().lower() == truth.lower(),
                    result.confidence or 0.0,
                    result.scores.reward,
                    result.scores.initial_reward,
                    len(result.patches),
                    outcome.search.candidates if outcome.search else 0,
                )
            )
    return answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=700_000)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    given = parser.parse_args()
    engine = get_engine(ModelSpec(model=given.model, dtype="float32"))
    asked = questions(given.questions, given.first_seed)
    print(f"{len(asked)} questions, seeds from {given.first_seed}\n")
    print("| settings | accuracy | fixed / broken | p | AUROC | reward before -> after | patches | candidates | s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    base: list[Answered] | None = None
    for name in given.rows:
        began = time.perf_counter()
        rows = answer(engine, asked, ROWS[name])
        seconds = (time.perf_counter() - began) / len(rows)
        base = base or rows
        fixed = sum(new.right and not old.right for new, old in zip(rows, base, strict=True))
        broken = sum(old.right and not new.right for new, old in zip(rows, base, strict=True))
        p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
        right = [row.right for row in rows]
        auroc = roc_auc_score(right, [row.confidence for row in rows]) if 0 < sum(right) < len(right) else float("nan")
        rewards = [(row.initial_reward or 0.0, row.reward) for row in rows if row.reward is not None]
        moved = "-"
        if rewards:
            before, after = (sum(pair) / len(rewards) for pair in zip(*rewards, strict=True))
            moved = f"{before:.4f} -> {after:.4f}"
        patches = sum(row.patches for row in rows) / len(rows)
        candidates = sum(row.candidates for row in rows) / len(rows)
        print(
            f"| {name} | {sum(right) / len(right):.3f} | {fixed} / {broken} | {p:.2f} | {auroc:.3f} | {moved} "
            f"| {patches:.1f} | {candidates:.0f} | {seconds:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
