"""LangGraph: answers that are not sure enough wait for a person, and the graph goes on with what they say."""

from pathlib import Path
from typing import Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from latent_tool import ImagePolicy, LatentReasoner
from latent_tool.integrations.langgraph import confidence_edge, reasoning_node

PICTURE = str(Path(__file__).parent / "images" / "shapes.png")


class State(TypedDict, total=False):
    question: str
    image: str
    result: dict[str, Any]  # plain JSON types
    answer: str


def main() -> None:
    graph = StateGraph(State)
    graph.add_node("look", reasoning_node(LatentReasoner(budget={"iterations": 1}), image_policy=ImagePolicy.local()))
    graph.add_node("report", lambda state: {"answer": state["result"]["answer"]})
    graph.add_node("review", lambda state: {"answer": interrupt(state["result"])})
    graph.add_edge(START, "look")
    graph.add_conditional_edges("look", confidence_edge("report", "review", threshold=0.95), ["report", "review"])
    app = graph.compile(checkpointer=InMemorySaver())
    for thread, question in enumerate(["what color is the circle?", "Where is the star?"]):
        config: Any = {"configurable": {"thread_id": str(thread)}}
        state = app.invoke({"question": question, "image": PICTURE}, config)
        if "__interrupt__" in state:
            print(f"{question}  needs a person: {state['__interrupt__'][0].value['answer']!r} is not sure enough")
            state = app.invoke(Command(resume="there is no star"), config)
        print(f"{question}  -> {state['answer']}")


if __name__ == "__main__":
    main()
