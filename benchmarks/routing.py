"""What routing by confidence buys: accuracy and escalations over the threshold, on bad pictures of easy-VQA.

    python benchmarks/routing.py [--questions 300] [--write docs/measured/routing.md]

The embedded model answers easy-VQA's clean test pictures without a mistake, so every picture gets noise of a random
strength here, up to where little can be seen. The first rung is the embedded model, the second the same model with
more budget, the last an oracle that always knows the answer. Every question is asked once per rung; the routes for all
thresholds follow from that, because a router's decision depends on nothing but the confidences (a test asserts it on
the real router).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from easy_vqa import get_test_image_paths, get_test_questions
from PIL import Image

from latent_tool import Budget, ConfidenceRouter, LatentReasoner, ReasoningRequest, ReasoningResult

STRONGEST_NOISE = 100.0  # standard deviation, in steps of the pixel values' 255
THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Row:
    """One line of the table: shares of all questions."""

    threshold: float
    accuracy: float
    first: float
    second: float
    oracle: float
    accepted_accuracy: float | None


def questions(count: int) -> list[tuple[ReasoningRequest, str]]:
    """Requests and their answers, drawn with a fixed seed; a request's own seed is its number."""
    texts, answers, images = get_test_questions()
    paths = get_test_image_paths()
    rng = np.random.default_rng(0)
    asked = []
    for number, i in enumerate(rng.choice(len(texts), count, replace=False)):
        pixels = np.asarray(Image.open(paths[images[i]]).convert("RGB"), dtype=np.float32)
        noise = rng.normal(0.0, rng.uniform(0.0, STRONGEST_NOISE), pixels.shape)
        picture = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
        asked.append((ReasoningRequest(image=picture, question=texts[i], seed=number), answers[i]))
    return asked


def measure(asked: Sequence[tuple[ReasoningRequest, str]], thresholds: Sequence[float] = THRESHOLDS) -> list[Row]:
    """Ask both rungs everything, then let a router decide for every threshold."""
    small = LatentReasoner(budget=Budget(iterations=0))
    rungs = (small, small.with_budget("quick"))
    requests = [request for request, _ in asked]
    answers = [rung.batch(requests) for rung in rungs]

    def recall(rung: int) -> Callable[[ReasoningRequest], ReasoningResult]:
        def answer(request: ReasoningRequest) -> ReasoningResult:
            return answers[rung][request.seed or 0]

        return answer

    def oracle(request: ReasoningRequest) -> str:
        return asked[request.seed or 0][1]

    rows = []
    for threshold in thresholds:
        router = ConfidenceRouter(rungs=[recall(0), recall(1), oracle], thresholds=threshold)
        results = router.batch(requests)
        ends = [result.route[-1].rung for result in results]
        right = [result.answer == answer for result, (_, answer) in zip(results, asked, strict=True)]
        own = [good for good, end in zip(right, ends, strict=True) if end < 2]
        rows.append(
            Row(
                threshold,
                sum(right) / len(right),
                *(ends.count(rung) / len(ends) for rung in range(3)),
                sum(own) / len(own) if own else None,
            )
        )
    return rows


def table(rows: Sequence[Row], count: int) -> str:
    """The rows as a page of the documentation."""
    lines = [
        "# Routing by confidence, measured",
        "",
        f"{count} test questions of easy-VQA (seed 0), each picture under noise of a random strength (standard",
        f"deviation 0 to {STRONGEST_NOISE:g} of 255). Rungs: the embedded model without search; the same with the",
        "quick budget; an oracle that always knows. `ConfidenceRouter` accepts at the threshold. Written by",
        "`python benchmarks/routing.py --write docs/measured/routing.md`.",
        "",
        "| threshold | accuracy of the route | ended at rung 1 | at rung 2 | escalated to the oracle "
        "| accuracy of what was not escalated |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        kept = "-" if row.accepted_accuracy is None else f"{row.accepted_accuracy:.1%}"
        shares = " | ".join(f"{share:.1%}" for share in (row.accuracy, row.first, row.second, row.oracle))
        lines.append(f"| {row.threshold:g} | {shares} | {kept} |")
    lines += [
        "",
        "The confidence is the pooled probability as it is, not calibrated, on pictures unlike those of its training.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--write", type=Path, help="file to write the table to")
    options = parser.parse_args()
    page = table(measure(questions(options.questions)), options.questions)
    print(page)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(page)


if __name__ == "__main__":
    main()
