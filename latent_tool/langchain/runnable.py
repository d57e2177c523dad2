"""What the Runnables that answer a ``ReasoningRequest`` have in common, and how a question is handed to any Runnable.

This module knows LangChain's Runnables and requests; it knows nothing of how an answer is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from langchain_core.runnables import RunnableSequence, RunnableSerializable, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.runnables.configurable import DynamicRunnable

from latent_tool.images.picture import Picture, open_pictures
from latent_tool.schema import ReasoningRequest, ReasoningResult
from latent_tool.settings import ImagePolicy

__all__ = ["Handover", "RequestRunnable", "first_step", "hand_over", "with_images"]


class RequestRunnable(RunnableSerializable[ReasoningRequest, ReasoningResult]):
    """A Runnable from a request to a result that opens the request's images itself, each under its policy."""


def first_step(runnable: Any) -> Any:
    """What a Runnable's input reaches first, below retries, fallbacks, bindings and chains."""
    while True:
        if isinstance(runnable, RunnableBindingBase):
            runnable = runnable.bound
        elif isinstance(runnable, RunnableWithFallbacks):
            runnable = runnable.runnable
        elif isinstance(runnable, DynamicRunnable):
            runnable = runnable.default
        elif isinstance(runnable, RunnableSequence):
            runnable = runnable.first
        else:
            return runnable


@dataclass(frozen=True)
class Handover:
    """A question as a Runnable is asked it.

    Attributes:
        request: what the Runnable is given.
        pictures: the images of the request, which are opened once, in its order.
    """

    request: ReasoningRequest
    pictures: tuple[Picture, ...]

    def with_warnings(self, result: ReasoningResult) -> ReasoningResult:
        """The result with what was changed of the images when they were opened, where it does not say so itself."""
        warnings = [each for picture in self.pictures for each in picture.warnings if each not in result.warnings]
        return result.model_copy(update={"warnings": [*warnings, *result.warnings]}) if warnings else result


def hand_over(reasoner: Any, request: ReasoningRequest, policy: ImagePolicy) -> Handover:
    """Hand a request to ``reasoner`` when ``policy`` decides which images may be opened, not the reasoner's own.

    A reasoner of this package opens the images itself, within its deadline. Any other Runnable does not know the
    policy, and is given the pictures opened: this takes time, and raises what ``load_images`` raises.
    """
    pictures = tuple(Picture(reference, policy) for reference in request.image_references)
    images: list[Any] = [*pictures]
    if not isinstance(first_step(reasoner), RequestRunnable):
        images = [each.image for each in open_pictures(pictures, policy)]
    return Handover(with_images(request, images), pictures)


def with_images(request: ReasoningRequest, images: list[Any]) -> ReasoningRequest:
    """The request with other images in the place of its own, as ``image`` or ``images`` as they were given."""
    return request.model_copy(update={"images": images} if request.images is not None else {"image": images[0]})
