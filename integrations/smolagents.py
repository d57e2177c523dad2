"""The tool for smolagents.

    ask, show = image_tools()
    agent = CodeAgent(tools=[ask, show], model=model)
    agent.run("Which bar is tallest?", additional_args={"chart": image})

``ask_about_image`` returns a dict, so that an agent that writes code can branch on ``r["confidence"]``;
``show_evidence`` returns the picture of the newest answer, unless the tool has ``allow_overlay=False``. The whole
result is in ``ask.last.result``. An image may be a Pillow image among the agent's variables, a path, a URL or a data
URI.
"""

from __future__ import annotations

import io
from typing import Any

from latent_tool.errors import InputError, MissingExtraError
from latent_tool.langchain.image_tool import BRIEF_SCHEMA, DESCRIPTION, NAME, ImageTool, NamedImageArguments, ToolReply

try:
    from smolagents import Tool
except ImportError as error:
    raise MissingExtraError("The smolagents integration", "smolagents") from error

__all__ = ["AskAboutImage", "ShowEvidence", "image_tools"]

_FIELDS = NamedImageArguments.model_fields


def image_tools(tool: ImageTool | None = None) -> tuple[AskAboutImage, ShowEvidence]:
    """Return the tool, and one that shows what its newest answer rests on.

    ``tool`` says who answers, from which threshold on, and which images may be opened.
    """
    ask = AskAboutImage(tool)
    return ask, ShowEvidence(ask)


class AskAboutImage(Tool):
    """Asks, and returns answer, confidence, evidence and advice as a dict. Errors are raised, and say what to do."""

    name = NAME
    description = DESCRIPTION
    inputs = {  # noqa: RUF012
        # Typed "image", an argument would not pass the check of agents that call tools.
        "image": {"type": "any", "description": "The image: a variable that holds it, a path, a URL or a data URI."},
        "question": {"type": "string", "description": _FIELDS["question"].description},
        "options": {"type": "array", "nullable": True, "description": _FIELDS["options"].description},
        "budget": {"type": "string", "nullable": True, "description": _FIELDS["budget"].description},
    }
    output_type = "object"
    output_schema = BRIEF_SCHEMA

    def __init__(self, tool: ImageTool | None = None) -> None:
        super().__init__()
        self.tool = tool or ImageTool()
        image = str(self.tool.arguments(named=True).model_fields["image"].description)
        held = image.replace("Which image: ", "The image: a variable that holds it, ")
        self.inputs = {**self.inputs, "image": {"type": "any", "description": held}}
        self.last: ToolReply | None = None

    def forward(
        self, image: Any, question: str, options: list[str] | None = None, budget: str | None = None
    ) -> dict[str, Any]:
        named = isinstance(image, str)
        asked = {"question": question, "options": options, "budget": budget}
        arguments = {"image": image if named else None, **asked, "overlay": self.tool.allow_overlay}
        self.last = None
        self.last = self.tool.ask(arguments, shown=() if named else [image])
        return self.last.brief


class ShowEvidence(Tool):
    """Shows the newest image that was asked about, with the regions marked that the answer rests on."""

    name = "show_evidence"
    description = f"Shows the image of the newest answer of {NAME}, with the regions marked that the answer rests on."
    inputs: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    output_type = "image"

    def __init__(self, ask: AskAboutImage) -> None:
        super().__init__()
        self.ask = ask

    def forward(self) -> Any:
        from PIL import Image

        if self.ask.last is None:
            raise InputError("Nothing has been answered yet.", f"Call {NAME} first.")
        if not self.ask.last.pictures:
            raise InputError("Pictures are not returned here.", f"Read 'evidence' of what {NAME} returned.")
        return Image.open(io.BytesIO(self.ask.last.pictures[0]))
