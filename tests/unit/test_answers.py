"""The first thing a stranger does is right: the demo, easy-VQA's test pictures, and scenes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import easy_vqa
import pytest
from PIL import Image

from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job, Outcome
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.scenes import generate
from latent_tool.schema import ReasoningResult
from latent_tool.settings import Budget
from latent_tool.views.overlay import overlay

ROOT = Path(__file__).parents[2]
EASY_VQA = Path(easy_vqa.__file__).parent / "data" / "test"


def test_the_demo_is_right_and_looks_at_the_right_place() -> None:
    """The question of ``make demo``, always searched: the green triangle spans (120, 166) to (183, 223)."""
    question = {"image": ROOT / "examples" / "images" / "shapes.png", "question": "What is below the blue square?"}
    sure = LatentReasoner().invoke(question)
    assert sure.answer == "green triangle" and sure.stop_reason == "confident"
    result = LatentReasoner(budget=Budget(target_confidence=None)).invoke(question)
    assert result.answer == "green triangle"
    assert result.confidence is not None
    assert result.confidence > 0.9
    assert result.patches
    on_triangle = [
        patch
        for patch in result.patches
        if patch.box and patch.box[0] < 183 and patch.box[2] > 120 and patch.box[1] < 223 and patch.box[3] > 166
    ]
    assert result.patches[0] in on_triangle
    with Image.open(ROOT / "examples" / "images" / "shapes.png") as picture:
        stream = io.BytesIO()
        overlay(result, picture).save(stream, "PNG")
    assert stream.tell() > 1000


@pytest.mark.parametrize(
    ("picture", "question", "answer"),
    [
        ("shapes.png", "How many shapes are there?", "3"),
        ("shapes.png", "What shape is at the bottom?", "triangle"),
        ("chart.png", "Which bar is tallest?", "blue"),
        ("chart.png", "How many bars are there?", "3"),
        ("number.png", "What number is shown?", "47"),
    ],
)
def test_the_example_pictures(picture: str, question: str, answer: str) -> None:
    result = LatentReasoner(budget="quick").invoke(
        {"image": ROOT / "examples" / "images" / picture, "question": question}
    )
    assert result.answer == answer


def results(engine: Engine, jobs: list[Job]) -> list[ReasoningResult]:
    found = []
    for outcome in engine.answer_many(jobs):
        assert isinstance(outcome, Outcome), outcome
        found.append(engine.result(outcome))
    return found


def test_ten_pictures_of_easy_vqas_test_split(engine: Engine) -> None:
    """The complete method with the standard budget, on the first question about each of ten pictures."""
    asked: dict[int, tuple[str, str]] = {}
    for question, answer, picture in json.loads((EASY_VQA / "questions.json").read_text()):
        asked.setdefault(picture, (question, answer))
    chosen = dict(list(asked.items())[:10])
    assert len(chosen) == 10
    jobs = []
    for picture, (question, _) in chosen.items():
        with Image.open(EASY_VQA / "images" / f"{picture}.png") as image:
            jobs.append(Job((image.convert("RGB"),), question))
    assert [result.answer for result in results(engine, jobs)] == [answer for _, answer in chosen.values()]


def test_scenes_it_never_saw(engine: Engine) -> None:
    """At least eight in ten of 40 questions; the model card's figure is higher, and chance far lower."""
    asked = [
        (scene.image, scene.questions[0]) for scene in (generate(seed, "held_out") for seed in range(900_000, 900_040))
    ]
    jobs = [Job((image,), question.text) for image, question in asked]
    right = sum(
        result.answer == question.answer.lower()
        for result, (_, question) in zip(results(engine, jobs), asked, strict=True)
    )
    assert right >= 32
