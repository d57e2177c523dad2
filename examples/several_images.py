"""Several images in a conversation: the tool asks about those that a call names, and says which they were."""

from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from PIL import Image

from latent_tool import LatentReasoner, LatentReasoningTool
from latent_tool.langchain.messages import image_block

IMAGES = Path(__file__).parent / "images"


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def main() -> None:
    looks = [("1", "What color is the circle?"), ("2", "How many bars are there?")]
    calls = [
        {"name": "ask_about_image", "args": {"image": image, "question": question}, "id": image}
        for image, question in looks
    ]
    model = Scripted(messages=iter([AIMessage("", tool_calls=calls), AIMessage("A red circle, and three bars.")]))
    agent = create_agent(model, tools=[LatentReasoningTool(reasoner=LatentReasoner(budget="quick"))])
    pictures = [image_block(Image.open(IMAGES / name)) for name in ("shapes.png", "chart.png")]
    question = HumanMessage([*pictures, {"type": "text", "text": "What do you see?"}])
    for message in agent.invoke({"messages": [question]})["messages"]:
        if isinstance(message, ToolMessage):
            print(message.artifact["image_numbers"], message.artifact["answer"])


if __name__ == "__main__":
    main()
