"""Does choosing among answers beat any one of them, and which probability should be the confidence?

    latent-tool eval scenes:hard:3000000-3000799 --out out/tuning --method all
    python benchmarks/choice.py out/tuning

Runs that are there are looked at; no model is asked.

Several runs are pooled. What a rule learns (how confidence becomes a probability for each method, a threshold) it
learns on the other folds alone. Each row is compared with greedy and with reasoning on the same questions (McNemar,
exact). Use seeds from 3,000,000 here: what is chosen on them may then be measured on others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from latent_tool.evaluation import Row, load_run
from latent_tool.evaluation.report import markdown_table, number, p_value, with_interval
from latent_tool.statistics import accuracy_interval, auroc_interval, ece, ece_noise_floor, mcnemar

# For every fold, questions to learn from and questions to choose for.
Rule = Callable[["Table", Sequence[int], Sequence[int]], list[str]]

CEILING = "(any method right: what a perfect choice would reach)"


@dataclass
class Table:
    """The same questions by several methods: one list of rows per method, in one order."""

    rows: dict[str, list[Row]]

    def right(self, method: str, place: int) -> bool:
        return self.rows[method][place].correct is True

    def confidence(self, method: str, place: int) -> float:
        """The confidence that comes with an answer, as log-odds; of samples, their agreement."""
        row = self.rows[method][place]
        name = "agreement" if "votes" in row.details else "pooled_probability"
        value = min(max(row.scores.get(name) or 0.0, 1e-4), 1 - 1e-4)
        return float(np.log(value / (1 - value)))


def read(folders: Sequence[str]) -> Table:
    """The questions that every method of every run answered."""
    rows: dict[str, list[Row]] = {}
    for folder in folders:
        run = load_run(folder)
        by_id = {name: {row.id: row for row in run.of(name) if row.correct is not None} for name in run.methods}
        shared = [name for name in by_id["greedy"] if all(name in known for known in by_id.values())]
        for name, known in by_id.items():
            rows.setdefault(name, []).extend(known[each] for each in shared)
    if len({len(each) for each in rows.values()}) != 1:
        raise SystemExit("The runs have not the same methods.")
    return Table(rows)


def calibrated(table: Table, methods: Sequence[str], learn: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """Probability ``(methods, places)`` that each method's answer is right, by its confidence."""
    found = []
    for method in methods:
        known = np.array([[table.confidence(method, place)] for place in learn])
        right = np.array([table.right(method, place) for place in learn])
        asked = np.array([[table.confidence(method, place)] for place in places])
        if right.all() or not right.any():
            found.append(np.full(len(places), right.mean()))
            continue
        found.append(LogisticRegression().fit(known, right).predict_proba(asked)[:, 1])
    return np.array(found)


def surest(methods: Sequence[str]) -> Rule:
    """The method whose calibrated confidence is highest."""

    def choose(table: Table, learn: Sequence[int], places: Sequence[int]) -> list[str]:
        best = calibrated(table, methods, learn, places).argmax(0)
        return [methods[place] for place in best]

    return choose


def loudest(methods: Sequence[str]) -> Rule:
    """The method whose confidence is highest as it stands."""

    def choose(table: Table, learn: Sequence[int], places: Sequence[int]) -> list[str]:
        return [max(methods, key=lambda method: table.confidence(method, place)) for place in places]

    return choose


def fallback(first: str, second: str) -> Rule:
    """The first method, or the second where the first is less sure than the threshold that was best on the others."""

    def choose(table: Table, learn: Sequence[int], places: Sequence[int]) -> list[str]:
        def accuracy(threshold: float) -> float:
            taken = [first if table.confidence(first, place) >= threshold else second for place in learn]
            return float(np.mean([table.right(name, place) for name, place in zip(taken, learn, strict=True)]))

        sure = [table.confidence(first, place) for place in learn]
        candidates = [-np.inf, *np.quantile(sure, np.linspace(0.02, 0.6, 30)).tolist()]
        threshold = max(candidates, key=accuracy)
        return [first if table.confidence(first, place) >= threshold else second for place in places]

    return choose


def vote(methods: Sequence[str]) -> Rule:
    """The answer for which the calibrated log-odds of the methods that give it add up highest."""

    def choose(table: Table, learn: Sequence[int], places: Sequence[int]) -> list[str]:
        chances = calibrated(table, methods, learn, places).clip(1e-4, 1 - 1e-4)
        chosen = []
        for column, place in enumerate(places):
            totals: dict[str, float] = {}
            for chance, method in zip(chances[:, column], methods, strict=True):
                answer = table.rows[method][place].details["canonical"]
                totals[answer] = totals.get(answer, 0.0) + float(np.log(chance / (1 - chance)))
            best = max(totals, key=lambda answer: totals[answer])
            chosen.append(next(name for name in methods if table.rows[name][place].details["canonical"] == best))
        return chosen

    return choose


def rules(methods: Sequence[str]) -> dict[str, Rule]:
    """Every rule for these methods, by name."""
    single = [name for name in methods if not name.startswith("self-consistency")]
    searches = [name for name in single if name.startswith(("search", "random-latents"))]
    found: dict[str, Rule] = {}
    if {"greedy", "reasoning"} <= set(methods):
        found["most confident of greedy and reasoning"] = loudest(["greedy", "reasoning"])
        found["surest (calibrated) of greedy and reasoning"] = surest(["greedy", "reasoning"])
    found["surest (calibrated) of all but samples"] = surest(single)
    found["surest (calibrated) of all"] = surest(methods)
    found["vote of all but samples"] = vote(single)
    found["vote of all"] = vote(methods)
    for name in [*(["reasoning"] if "reasoning" in methods else []), *searches, *sorted(set(methods) - set(single))]:
        found[f"greedy, but {name} where unsure"] = fallback("greedy", name)
    for name in searches:
        if "reasoning" in methods:
            found[f"reasoning, but {name} where unsure"] = fallback("reasoning", name)
    return found


# Ways to make one confidence of an answer's probability after thinking and its probability before.
POOLS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "after thinking": lambda after, before: after,
    "before thinking": lambda after, before: before,
    "geometric mean": lambda after, before: np.sqrt(after * before),
    "arithmetic mean": lambda after, before: (after + before) / 2,
    "the smaller one": np.minimum,
}


def pools(table: Table) -> list[list[str]]:
    """AUROC, and ECE above its noise floor, of every way to pool, for every method that thinks; agreement beside it."""
    found = []
    for method, rows in table.rows.items():
        right = np.array([row.correct is True for row in rows])
        if any("votes" in row.details for row in rows):
            found.append([method, "agreement", *_quality(np.array([row.scores["agreement"] for row in rows]), right)])
            continue
        after, before = (
            np.array([row.scores.get(name) or 0.0 for row in rows])
            for name in ("answer_probability", "plain_probability")
        )
        for name, pool in POOLS.items() if (after != before).any() else [("plain model", POOLS["after thinking"])]:
            found.append([method, name, *_quality(pool(after, before), right)])
    return found


def _quality(values: np.ndarray, right: np.ndarray) -> list[str]:
    area = auroc_interval(values.tolist(), right.tolist())
    excess = ece(values.tolist(), right.tolist()) - ece_noise_floor(values.tolist())[0]
    return [with_interval(area._asdict()), number(max(0.0, excess))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--folds", type=int, default=10)
    given = parser.parse_args()
    table = read(given.runs)
    methods = list(table.rows)
    count = len(table.rows["greedy"])
    outcomes = {name: [table.right(name, place) for place in range(count)] for name in methods}
    folds = KFold(given.folds, shuffle=True, random_state=0)
    for name, rule in rules(methods).items():
        right = [False] * count
        for learn, places in folds.split(np.zeros(count)):
            for place, chosen in zip(places, rule(table, learn.tolist(), places.tolist()), strict=True):
                right[place] = table.right(chosen, place)
        outcomes[name] = right
    outcomes[CEILING] = [any(table.right(name, place) for name in methods) for place in range(count)]
    rows = []
    for name, right in outcomes.items():
        share = accuracy_interval(sum(right), count)
        cells = [name, f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"]
        for base in ("greedy", "reasoning"):
            if base not in outcomes or name in (base, CEILING):  # the ceiling cannot be worse: nothing to test
                cells += ["-", "-"]
                continue
            compared = mcnemar(outcomes[base], right)
            cells += [f"{compared.fixed} / {compared.broken}", p_value(compared.p)]
        rows.append(cells)
    tried = len(outcomes) - 2
    print(f"{count} questions of {', '.join(given.runs)}; {tried} ways compared with greedy, p as it is for one alone:")
    print(f"expect one p below 0.05 in twenty by chance, and count only those below {0.05 / tried:.4f} (Bonferroni).\n")
    print(markdown_table(["rule", "accuracy", "fixed / broken vs greedy", "p", "vs reasoning", "p"], rows))
    print("\nThe answer's joint probability as a confidence:\n")
    print(markdown_table(["answers of", "confidence", "AUROC", "ECE above its floor"], pools(table)))


if __name__ == "__main__":
    main()
