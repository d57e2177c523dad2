"""Results with every part that a page can show, and hostile ones."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw

from latent_tool.schema import (
    CellAttention,
    ControlAnswer,
    Controls,
    Grounding,
    Patch,
    ReasoningResult,
    Scores,
    TokenDependency,
    TraceRow,
    Usage,
)
from latent_tool.settings import Budget, NoiseSettings, SearchSettings

BLUE, RED, PAPER = (30, 90, 200), (200, 30, 30), (245, 245, 240)


QUESTION = "What colour is the circle?"


HOSTILE = (
    "<img src=x onerror=alert(1)>\"'</script><script>window.hacked = 1</script></style></svg></pre>"
    "{{ 7 * 7 }}{% raw %}<!-- ]]> & &lt; \u202ereversed\u202c \x00\x1b[31m\ud800 end"
)


def scene() -> Image.Image:
    """60 x 60 pixels, 5 x 5 cells of 12: a blue disc inside the cells (1, 1) to (2, 2), a red square."""
    image = Image.new("RGB", (60, 60), PAPER)
    draw = ImageDraw.Draw(image)
    draw.ellipse((13, 13, 34, 34), fill=BLUE)
    draw.rectangle((40, 42, 56, 56), fill=RED)
    return image


def a_result(**changes: Any) -> ReasoningResult:
    """A result with every part that a page can show."""
    placed = [((1, 1), 0.052), ((2, 1), 0.047), ((1, 2), 0.031), ((2, 2), 0.040), ((4, 4), 0.011), (None, 0.009)]
    patches = [
        Patch(
            rank=rank,
            image=0,
            cell=rank + 5,
            box=None if at is None else (12.0 * at[0], 12.0 * at[1], 12.0 * at[0] + 12, 12.0 * at[1] + 12),
            attention=attention,
            gain=0.031 - 0.004 * rank,
            latent=rank // 2,
        )
        for rank, (at, attention) in enumerate(placed)
    ]
    accepted = {2: [5, 6, 7], 3: [8], 7: [9, 10]}
    best = 0.62
    trace = []
    for number in range(11):
        current = 0.62 + 0.028 * number - 0.03 * (number % 3 == 2)
        best = max(best, current)
        trace.append(
            TraceRow(
                round=number,
                reward=current,
                best_reward=best,
                mean_sampled_reward=0.6 if number else None,
                top_k_mass=0.9,
                first_token_probability=round(0.4 + 0.05 * number, 2),
                sigma=0.25 if number else None,
                accepted=accepted.get(number, []),
                candidates=1 + 9 * number,
                seconds=0.05 * number,
            )
        )
    tokens = [
        ("The", 0.1),
        (" disc", 0.8),
        ("\n", -0.6),
        (" looks", -1.9),
        (" blue", 5.2),
        (".\n", 0.0),
        (" blue", 4.1),
    ]
    values: dict[str, Any] = {
        "answer": "blue",
        "raw_text": "The disc\n looks blue.\n blue",
        "confidence": 0.93,
        "confidence_source": "answer_probability",
        "accepted": True,
        "abstained": False,
        "min_confidence": 0.8,
        "scores": Scores(reward=0.9, initial_reward=0.62, answer_probability=0.93, first_token_entropy=0.21),
        "patches": patches,
        "image_sizes": [(60, 60)],
        "trace": trace,
        "grounding": Grounding(
            tokens=[
                TokenDependency(token=token, probability=0.9, dependency=s, in_answer=i == 6)
                for i, (token, s) in enumerate(tokens)
            ],
            mean=1.1,
            share_above=0.43,
            noise=NoiseSettings(),
        ),
        "controls": Controls(
            latents_off=ControlAnswer(answer="blue", confidence=0.71, agrees=True),
            image_noised=ControlAnswer(answer="red", confidence=0.34, agrees=False),
        ),
        "usage": Usage(
            candidates=91,
            decoder_calls=34,
            prompt_tokens=58,
            image_cells=25,
            latent_tokens=8,
            patch_tokens=6,
            generated_tokens=7,
            seconds={"images": 0.003, "prefill": 0.021, "search": 0.412, "decode": 0.064},
        ),
        "stop_reason": "iterations",
        "finish_reason": "stop",
        "model": "embedded",
        "settings": SearchSettings(sigma=0.25, thinking_markers=("<think>", "</think>")),
        "budget": Budget(deadline_s=20),
        "seed": 7,
        "warnings": ["The image is small."],
    }
    return ReasoningResult(**{**values, **changes})


def attended_result(**changes: Any) -> ReasoningResult:
    """With the attention to all 25 cells of the scene: most to the red square, less to the rest, row by row."""
    cells = [
        CellAttention(
            image=0,
            cell=5 * row + column,
            box=(12.0 * column, 12.0 * row, 12.0 * column + 12, 12.0 * row + 12),
            weight=0.08 if (column, row) == (4, 4) else 0.01 * row,
        )
        for row in range(5)
        for column in range(5)
    ]
    return a_result(**{"attention": cells, **changes})


def hostile_result() -> ReasoningResult:
    control = ControlAnswer(answer=HOSTILE, confidence=None, agrees=True)
    good = a_result()
    assert good.grounding is not None
    token = good.grounding.tokens[0].model_copy(update={"token": HOSTILE[:40]})
    return good.model_copy(
        update={
            "answer": HOSTILE,
            "raw_text": HOSTILE,
            "model": HOSTILE,
            "warnings": [HOSTILE],
            "controls": Controls(latents_off=control, image_noised=control),
            "grounding": good.grounding.model_copy(update={"tokens": [token] * 3}),
            "usage": good.usage.model_copy(update={"seconds": {HOSTILE: 1.0}}) if good.usage else None,
        }
    )
