"""Asking in LangGraph graphs, and confidence gates for them and for LangChain agents.

``reasoning_node`` answers the question in a graph's state, ``confidence_edge`` decides where the graph goes on,
``ConfidenceMiddleware`` gates the tool calls of an agent. The gates read results that are already there: as
``ReasoningResult``, or as the plain JSON types that a checkpointer kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from langchain_core.messages import ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import run_in_executor
from pydantic import ValidationError

from latent_tool.errors import CancelledError, InputError, LatentToolError, MissingExtraError, SettingsError
from latent_tool.langchain.attachments import is_left_out
from latent_tool.langchain.image_tool import describe
from latent_tool.langchain.messages import conversation, request_from_messages
from latent_tool.langchain.reasoner import LatentReasoner
from latent_tool.langchain.router import ConfidenceRouter
from latent_tool.langchain.runnable import Handover, hand_over, refuse_tools
from latent_tool.schema import ReasoningRequest, ReasoningResult, RouteStep, below_reason
from latent_tool.settings import Budget, BudgetLevel, ImagePolicy

try:
    from langchain.agents.middleware import AgentMiddleware
    from langgraph.errors import GraphBubbleUp
    from langgraph.prebuilt.tool_node import ToolCallRequest
    from langgraph.types import Command
except ImportError as error:
    raise MissingExtraError("The LangGraph integration", "langgraph") from error

__all__ = ["ConfidenceMiddleware", "confidence_edge", "reasoning_node"]

Reply = ToolMessage | Command[Any]
Answer = Reply | ReasoningResult | Exception


def reasoning_node(
    reasoner: Runnable[Any, ReasoningResult] | None = None,
    *,
    question: str = "question",
    image: str = "image",
    messages: str = "messages",
    key: str = "result",
    image_policy: ImagePolicy | None = None,
) -> Runnable[Any, dict[str, Any]]:
    """Return a node that asks about the image in the state and puts the result, as plain JSON types, under ``key``.

        graph.add_node("look", reasoning_node())

    With a question in the state, it is asked about the state's image or images; without, the last message is asked
    about the images of the conversation. Steps of the search go to the graph's stream writer.

    Args:
        reasoner: who answers: a ``LatentReasoner`` (the default) or a ``ConfidenceRouter``.
        question, image, messages: where the state holds these.
        key: where the result goes; ``confidence_edge`` reads it.
        image_policy: which images may be opened, whatever the reasoner's own policy: by default no files and no URLs.

    Raises ``SettingsError`` for a tool in the reasoner's place. Asking raises the errors of ``latent_tool.errors``.
    """
    asked = LatentReasoner() if reasoner is None else reasoner
    refuse_tools(asked)
    policy = image_policy or ImagePolicy.untrusted()

    def handed_over(state: Any) -> Handover:
        text = _read(state, question)
        if text is None:
            found = request_from_messages(_read(state, messages) or [], image=_read(state, image))
        else:
            shown = _read(state, image)
            found = ReasoningRequest.parse({"images": shown if isinstance(shown, list) else [shown], "question": text})
        return hand_over(asked, found, policy)

    def look(state: Any, config: RunnableConfig) -> dict[str, Any]:
        handover = handed_over(state)
        result = asked.invoke(handover.request, config)
        return {key: handover.with_warnings(result).model_dump(mode="json")}

    async def look_async(state: Any, config: RunnableConfig) -> dict[str, Any]:
        handover = await run_in_executor(config, handed_over, state)
        result = await asked.ainvoke(handover.request, config)
        return {key: handover.with_warnings(result).model_dump(mode="json")}

    return RunnableLambda(look, look_async, name="reasoning_node")


def confidence_edge(
    accept: str, otherwise: str, *, threshold: float | None = None, key: str = "result"
) -> Callable[[Any], str]:
    """Return a conditional edge that goes to ``accept`` when the result in the state is sure enough.

        graph.add_conditional_edges("look", confidence_edge("report", "ask_a_person", threshold=0.8))

    Args:
        accept: node for a result whose confidence reaches the threshold, unless the reasoner itself abstained.
        otherwise: node for any other result, one without a confidence included.
        threshold: in [0, 1]; ``None``: what the reasoner or router has decided (``result.accepted``).
        key: where the state holds the result, as ``ReasoningResult`` or as its fields.

    Raises ``SettingsError`` for a threshold out of range; the edge raises ``InputError`` when there is no result.
    """
    _require_share(threshold)

    def gate(state: Any) -> str:
        result = _parse(_read(state, key))
        if result is None:
            raise InputError(
                f"The state holds no result under {key!r}.",
                "Let a node put a reasoner's result there, or name the key.",
            )
        sure = result.accepted if threshold is None else _reaches(result, threshold) and result.accepted is not False
        if sure is None:
            raise InputError(
                "Nothing has decided whether the result is accepted.",
                "Give the edge a threshold, or the reasoner a min_confidence.",
            )
        return accept if sure else otherwise

    return gate


class ConfidenceMiddleware(AgentMiddleware[Any, Any, Any]):
    """Spends more on a tool call whose answer is not sure enough, before the agent sees it.

        create_agent(model, tools=[LatentReasoningTool()], middleware=[ConfidenceMiddleware(threshold=0.8)])

    The tool is called as the agent asked; while its confidence is below the threshold it is called again with each of
    ``budgets`` that has not been spent yet, then ``fallback`` is asked. The most confident answer (or the fallback's)
    becomes the ToolMessage, and is marked when it is still not reliable; the artifact's ``route`` tells what was tried.
    An error of the agent's own call is passed on; whatever fails later is told in the route and destroys no answer.

    The stricter of ``threshold`` and of the tool's own threshold decides.

    Args:
        threshold: confidence an answer must reach, in [0, 1].
        budgets: levels to try after the agent's own call, in this order.
        fallback: a chat model, or any other rung of a ``ConfidenceRouter``; ``None``: nobody else is asked.
        tool: name of the tool that is gated; other tools are left alone.
        image_policy: which images may be opened for the fallback.

    Raises ``SettingsError`` for a threshold out of range, a budget that is no level, or a fallback that cannot be a
    rung.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.8,
        budgets: Sequence[BudgetLevel] = ("thorough",),
        fallback: Runnable[Any, Any] | None = None,
        tool: str = "ask_about_image",
        image_policy: ImagePolicy | None = None,
    ) -> None:
        super().__init__()
        _require_share(threshold)
        self.threshold = threshold
        # One level alone may be named without a tuple.
        self.budgets = cast("tuple[BudgetLevel, ...]", (budgets,) if isinstance(budgets, str) else tuple(budgets))
        for level in self.budgets:
            Budget.level(level)
        self.fallback = None if fallback is None else ConfidenceRouter(rungs=[fallback], thresholds=threshold)
        self.tool = tool
        self.image_policy = ImagePolicy.untrusted() if image_policy is None else image_policy

    def wrap_tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Reply]) -> Reply:
        """Call the tool, and again if that is needed."""
        if request.tool_call["name"] != self.tool:
            return handler(request)
        calls = self._calls(request)
        reply: Answer | None = None
        while True:
            try:
                step = calls.send(reply)
            except StopIteration as end:
                final: Reply = end.value
                return final
            try:
                if isinstance(step, ReasoningRequest):
                    assert self.fallback is not None
                    reply = self.fallback.invoke(hand_over(self.fallback, step, self.image_policy).request)
                else:
                    reply = handler(step)
            except Exception as error:
                reply = _survivable(error)

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[Reply]]
    ) -> Reply:
        """``wrap_tool_call`` for agents that run asynchronously."""
        if request.tool_call["name"] != self.tool:
            return await handler(request)
        calls = self._calls(request)
        reply: Answer | None = None
        while True:
            try:
                step = calls.send(reply)
            except StopIteration as end:
                final: Reply = end.value
                return final
            try:
                if isinstance(step, ReasoningRequest):
                    assert self.fallback is not None
                    reply = await self.fallback.ainvoke(hand_over(self.fallback, step, self.image_policy).request)
                else:
                    reply = await handler(step)
            except Exception as error:
                reply = _survivable(error)

    def _calls(self, request: ToolCallRequest) -> Generator[ToolCallRequest | ReasoningRequest, Answer | None, Reply]:
        """Whom to ask next, given the reply of the one before; returns what the agent gets to see."""
        call = request.tool_call
        first = yield request
        if isinstance(first, Exception):
            raise first
        assert first is not None and not isinstance(first, ReasoningResult)
        result = _parse(first.artifact) if isinstance(first, ToolMessage) and first.status != "error" else None
        if not isinstance(first, ToolMessage):
            return first
        if result is None:
            return first if first.status == "error" else _unread(first)
        tried = _Tried(first, result, [call["args"].get("budget")], [result.budget])
        tried.route.append(self._step(0, "the agent's own budget", result))
        for level in self.budgets:
            if self._accepts(result):
                break
            if tried.has_spent(level):
                continue
            asked = request.override(tool_call={**call, "args": {**call["args"], "budget": level}})
            reply = yield asked
            found = _parse(reply.artifact) if isinstance(reply, ToolMessage) and reply.status != "error" else None
            tried.levels.append(level)
            if found is None or not isinstance(reply, ToolMessage):
                tried.route.append(_failed(len(tried.route), level, reply))
                continue
            result = found
            tried.budgets.append(result.budget)
            tried.route.append(self._step(len(tried.route), level, result))
            if self._rank(result) > self._rank(tried.best):
                tried.message, tried.best = reply, result
        if self.fallback is not None and not self._accepts(result):
            try:
                answer = yield self._question(request, self._at(tried.best))
            except InputError as error:  # the agent's arguments name no image that can be found again
                answer = error
            if isinstance(answer, ReasoningResult):
                tried.route += [step.model_copy(update={"rung": len(tried.route)}) for step in answer.route]
                if answer.accepted:
                    return self._reply(tried, answer, accepted=True)
            else:
                tried.route.append(_failed(len(tried.route), self.fallback.rungs[0].get_name(), answer))
        return self._reply(tried, tried.best, accepted=self._accepts(tried.best))

    def _question(self, request: ToolCallRequest, at: float) -> ReasoningRequest:
        """The tool call as a request, held to a threshold; its images are those that the tool has answered about."""
        arguments = request.tool_call["args"]
        messages = request.state["messages"] if isinstance(request.state, Mapping) else request.state.messages
        named = None if is_left_out(arguments.get("image")) else str(arguments["image"])
        chosen = conversation(messages, without=self.tool).choose(named)
        options = arguments.get("options") or None
        asked = {"images": list(chosen.references), "question": arguments["question"], "options": options}
        return ReasoningRequest.parse({**asked, "min_confidence": at})

    def _at(self, result: ReasoningResult) -> float:
        """The threshold for a result: this one, or the stricter one that it was already held to."""
        own = result.min_confidence if result.accepted is False else None
        return self.threshold if own is None else max(self.threshold, own)

    def _accepts(self, result: ReasoningResult) -> bool:
        return _reaches(result, self.threshold) and result.accepted is not False

    def _rank(self, result: ReasoningResult) -> tuple[bool, bool, float]:
        """What makes one answer better than another: accepted, possible to accept, confident."""
        return self._accepts(result), result.barred is None, result.confidence or 0.0

    def _step(self, number: int, name: str, result: ReasoningResult) -> RouteStep:
        sure, at = self._accepts(result), self._at(result)
        reason = result.barred or f"the confidence {'reaches' if sure else 'is below'} {at:g}"
        if result.barred is None and result.confidence is None:
            reason = "the answer has no confidence to compare"
        return RouteStep(
            rung=number,
            name=name,
            decision="accepted" if sure else "unsure",
            reason=reason,
            answer=result.answer,
            confidence=result.confidence,
            confidence_source=result.confidence_source,
            threshold=at,
        )

    def _reply(self, tried: _Tried, result: ReasoningResult, *, accepted: bool) -> ToolMessage:
        """The tool's message with what was decided; pictures in it stay."""
        asked = _parse(tried.message.artifact)
        decided = {
            "accepted": accepted,
            "abstained": not accepted,
            "abstain_reason": None if accepted else result.barred or below_reason(result.confidence, self._at(result)),
            "min_confidence": self._at(result),
            "route": tried.route,
            "image_numbers": asked.image_numbers if asked is not None else [],
        }
        result = result.model_copy(update=decided)
        content: Any = describe(result, spent=tried.has_spent("thorough"))
        if isinstance(tried.message.content, list):
            content = [{"type": "text", "text": content}, *tried.message.content[1:]]
        return tried.message.model_copy(update={"content": content, "artifact": result.model_dump(mode="json")})


@dataclass
class _Tried:
    """What was asked so far: the best message with its result, the levels and budgets spent, and the route."""

    message: ToolMessage
    best: ReasoningResult
    levels: list[str | None]
    budgets: list[Budget | None]
    route: list[RouteStep] = field(default_factory=list)

    def has_spent(self, level: BudgetLevel) -> bool:
        """Tell whether asking with this level would repeat a search that was made."""
        spent = [budget for budget in self.budgets if budget is not None]
        return level in self.levels or any(budget.replaced_by(level) == budget for budget in spent)


def _unread(message: ToolMessage) -> ToolMessage:
    """What the agent sees of a reply that cannot be gated: nothing that it could take for an answer."""
    told = "The tool gave no result with a confidence, so that its answer cannot be relied on. Do without it."
    return message.model_copy(update={"content": told, "status": "error", "artifact": None})


def _survivable(error: Exception) -> Exception:
    """The error, unless it asks the graph or the caller to stop."""
    if isinstance(error, GraphBubbleUp | CancelledError):
        raise error
    return error


def _failed(number: int, name: str, reply: Any) -> RouteStep:
    """The step of somebody who gave no answer, and why."""
    reason = "it gave no result"
    if isinstance(reply, Exception):
        reason = type(reply).__name__
        if isinstance(reply, LatentToolError):  # what others' errors say may hold addresses and keys
            reason += f": {reply}"
    elif isinstance(reply, ToolMessage) and reply.status == "error":
        reason = f"the tool answered with an error: {reply.text}"
    return RouteStep(rung=number, name=name, decision="failed", reason=reason)


def _read(state: Any, key: str) -> Any:
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)


def _parse(value: Any) -> ReasoningResult | None:
    if isinstance(value, ReasoningResult):
        return value
    try:
        return ReasoningResult.model_validate(value)
    except ValidationError:
        return None


def _reaches(result: ReasoningResult, threshold: float) -> bool:
    return result.confidence is not None and result.confidence >= threshold and result.barred is None


def _require_share(threshold: float | None) -> None:
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise SettingsError(f"The threshold {threshold!r} is no share.", "Give a number from 0 to 1.")
