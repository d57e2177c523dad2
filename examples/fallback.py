"""Confidence-thresholded fallback: a small model first, more budget next, a strong model only for what is left.

The strong model is scripted here so that the example runs offline; put any chat model in its place.
"""

from pathlib import Path

from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from latent_tool import ConfidenceRouter, LatentReasoner

IMAGES = Path(__file__).parent / "images"
QUESTIONS = [
    ("shapes.png", "what color is the circle?"),
    ("shapes.png", "Where is the star?"),
]


def main() -> None:
    strong = GenericFakeChatModel(messages=iter([AIMessage("There is no star.")]), name="strong-model")
    small = LatentReasoner(budget={"iterations": 0})
    router = ConfidenceRouter(
        rungs=[small, small.with_budget("quick"), strong], thresholds=[0.99, 0.99, None], costs=[1, 4, 100]
    )
    results = router.batch([{"image": IMAGES / name, "question": question} for name, question in QUESTIONS])
    for (_, question), result in zip(QUESTIONS, results, strict=True):
        print(f"{question}\n  -> {result.answer}   (cost {sum(step.cost for step in result.route):g})")
        for step in result.route:
            print(f"     {step.name}: {step.decision}, {step.reason}")


if __name__ == "__main__":
    main()
