"""An agent that looks at a picture with the tool, and passes on what it may rely on.

Its own model is scripted so that this runs offline; put any chat model with tool calling in its place.
"""

from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from PIL import Image

from latent_tool import LatentReasoner, LatentReasoningTool
from latent_tool.langchain.messages import image_block

PICTURE = Path(__file__).parent / "images" / "shapes.png"


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def main() -> None:
    call = {"name": "ask_about_image", "args": {"question": "what is right of the red circle?"}, "id": "1"}
    model = Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("It is the blue square.")]))
    agent = create_agent(model, tools=[LatentReasoningTool(reasoner=LatentReasoner(budget="quick"))])

    question = HumanMessage([image_block(Image.open(PICTURE)), {"type": "text", "text": "What is beside the circle?"}])
    for message in agent.invoke({"messages": [question]})["messages"]:
        if isinstance(message, ToolMessage):
            print(f"tool to model:\n{message.content}\nartifact: {len(message.artifact['patches'])} patches")
        elif message.text:
            print(f"{message.type}: {message.text}")


if __name__ == "__main__":
    main()
