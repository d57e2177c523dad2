"""LangGraph: answers that are not sure enough wait for a person, and the graph goes on with what they say."""

from pathlib import Path
from typing import Any, TypedDict

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from latent_tool import LatentReasoner
from latent_tool.integrations.langgraph import confidence_edge

PICTURE = str(Path(__file__).parent / "images" / "shapes.png")


class State(TypedDict, total=False):
    question: str
    result: dict[str, Any]  # plain JSON types, so that any checkpointer can keep them
    answer: str


def build(threshold: float) -> Any:
    """look -> report, or look -> review (a person) when the confidence is below the threshold."""
    reasoner = LatentReasoner(budget={"iterations": 1})

    def look(state: State) -> State:
        result = reasoner.invoke({"image": PICTURE, "question": state["question"]})
        return {"result": result.model_dump(mode="json")}

    def report(state: State) -> State:
        return {"answer": state["result"]["answer"]}

    def review(state: State) -> State:
        result = state["result"]
        return {"answer": interrupt({key: result[key] for key in ("answer", "confidence")})}

    graph = StateGraph(State)
    graph.add_node("look", look)
    graph.add_node("report", report)
    graph.add_node("review", review)
    graph.add_edge(START, "look")
    graph.add_conditional_edges("look", confidence_edge("report", "review", threshold=threshold), ["report", "review"])
    graph.add_edge("report", END)
    graph.add_edge("review", END)
    return graph.compile(checkpointer=InMemorySaver())


def main() -> None:
    graph = build(threshold=0.95)
    for thread, question in enumerate(["what color is the circle?", "Where is the star?"]):
        config = {"configurable": {"thread_id": str(thread)}}
        state = graph.invoke({"question": question}, config)
        if "__interrupt__" in state:
            asked = state["__interrupt__"][0].value
            print(f"{question}  needs a person: {asked['answer']!r} has a confidence of {asked['confidence']:.2f}")
            state = graph.invoke(Command(resume="there is no star"), config)
        print(f"{question}  -> {state['answer']}")


if __name__ == "__main__":
    main()
