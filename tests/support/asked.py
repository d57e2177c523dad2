"""What the tests of the frameworks share: the tool, a picture, and the two ways an agent can go on."""

from __future__ import annotations

import base64
import io
from typing import Any

from pictures import draw_shapes
from PIL import Image

from latent_tool import Budget, ImagePolicy, LatentReasoner, ReasoningResult, SearchSettings
from latent_tool.langchain.image_tool import NAME, ImageTool

CIRCLE = "what color is the circle?"
UNSURE = "I am not sure."
# The threshold, and what the agent ends with: no answer reaches a confidence of 1.
BRANCHES = [(0.5, "red"), (1.0, UNSURE)]
OUTSIDE = "/etc/hostname"


def small_tool(min_confidence: float | None = 0.5, **policy: Any) -> ImageTool:
    """A tool that searches just enough to have everything in its result."""
    reasoner = LatentReasoner(
        budget=Budget(iterations=1, max_patches=4),
        settings=SearchSettings(search_below=None, latents=2, samples=4, patches_per_latent=2),
    )
    return ImageTool(reasoner=reasoner, min_confidence=min_confidence, image_policy=ImagePolicy.untrusted(**policy))


def png(colour: tuple[int, int, int] = (220, 25, 25)) -> bytes:
    stream = io.BytesIO()
    draw_shapes(colour=colour).save(stream, "PNG")
    return stream.getvalue()


def base64_png() -> str:
    return base64.b64encode(png()).decode()


URI = f"data:image/png;base64,{base64_png()}"
GREEN = (20, 150, 40)


def said(text: str) -> str:
    """How an agent goes on that reads what the tool has written."""
    return UNSURE if "NOT RELIABLE" in text else text.partition("Answer: ")[2].partition("\n")[0]


def decided(result: Any) -> str:
    """How a program goes on that has the structured result."""
    result = ReasoningResult.model_validate(result)
    assert result.confidence is not None and result.min_confidence is not None
    assert result.accepted is (result.confidence >= result.min_confidence)
    assert result.patches == [] or result.patches[0].box is not None
    return result.answer if result.accepted else UNSURE


def is_overlay(data: bytes) -> bool:
    """Whether these bytes are a PNG that is larger than the picture: it has a frame and a caption."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "PNG" and image.width > 200


__all__ = [
    "BRANCHES",
    "CIRCLE",
    "GREEN",
    "NAME",
    "OUTSIDE",
    "UNSURE",
    "URI",
    "base64_png",
    "decided",
    "is_overlay",
    "png",
    "said",
    "small_tool",
]
