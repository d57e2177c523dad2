"""Answers that are not sure enough are looked for again with more work before the agent sees them, then marked.

The agent's own model is scripted here so that the example runs offline.
"""

from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from PIL import Image

from latent_tool import LatentReasoner, LatentReasoningTool
from latent_tool.integrations.langgraph import ConfidenceMiddleware
from latent_tool.langchain.messages import image_block

PICTURE = Path(__file__).parent / "images" / "shapes.png"


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def main() -> None:
    call = {"name": "ask_about_image", "args": {"question": "Where is the star?"}, "id": "1"}
    model = Scripted(messages=iter([AIMessage("", tool_calls=[call]), AIMessage("I cannot tell.")]))
    tool = LatentReasoningTool(reasoner=LatentReasoner(budget={"iterations": 0}))
    agent = create_agent(model, tools=[tool], middleware=[ConfidenceMiddleware(threshold=1.0, budgets=("quick",))])
    question = HumanMessage([image_block(Image.open(PICTURE)), {"type": "text", "text": "Where is the star?"}])
    for message in agent.invoke({"messages": [question]})["messages"]:
        if isinstance(message, ToolMessage):
            print(*(f"{step['decision']}: {step['reason']}" for step in message.artifact["route"]), sep="\n")


if __name__ == "__main__":
    main()
