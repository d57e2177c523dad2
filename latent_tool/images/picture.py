"""``Picture``: an image reference on its way to whoever opens it, with the policy under which that may be done.

Those who take a question from somebody else (a tool, a service, a graph's node) open nothing themselves: they say which
policy holds, and the reasoner opens every picture once. This module knows neither models nor LangChain.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from latent_tool.images.load import LoadedImage, load_image, load_images, portable_image
from latent_tool.words import shown_image

if TYPE_CHECKING:
    from latent_tool.settings import ImagePolicy

__all__ = ["Picture", "open_pictures", "portable_picture"]


class Picture:
    """An image reference that is opened once, whoever asks for it first.

    Args:
        reference: what ``load_image`` takes.
        policy: the policy that decides whether it may be opened, whatever that of the one who opens it; ``None``: the
            opener's own.
    """

    def __init__(self, reference: object, policy: ImagePolicy | None = None) -> None:
        self.reference = reference
        self.policy = policy
        self._opened: dict[ImagePolicy, LoadedImage] = {}
        self._opening = threading.Lock()

    def load(self, policy: ImagePolicy, *, deadline: float | None = None) -> LoadedImage:
        """Open the picture, or return what was opened before; ``policy`` holds where it has none of its own.

        The image is shared and must not be changed. Raises what ``load_image`` raises.
        """
        policy = self.policy or policy
        with self._opening:
            if policy not in self._opened:
                self._opened[policy] = load_image(self.reference, policy, deadline=deadline)
            return self._opened[policy]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was left out or changed when it was opened; empty before."""
        return next((opened.warnings for opened in self._opened.values()), ())

    def shown(self) -> str:
        """Say in a few words what the reference is, without its bytes or credentials."""
        return shown_image(self.reference)

    def __repr__(self) -> str:
        return f"Picture({self.shown()})"

    def __reduce__(self) -> tuple[type[Picture], tuple[object, ImagePolicy | None]]:
        return type(self), (self.reference, self.policy)


def open_pictures(
    references: Sequence[object], policy: ImagePolicy, *, deadline: float | None = None
) -> list[LoadedImage]:
    """Open all images of one request: a ``Picture`` under its own policy, anything else under ``policy``.

    The limits of ``policy`` on the number of images and on their pixels hold in any case. ``deadline`` is an instant of
    ``time.monotonic()``. The images must not be changed. Raises what ``load_images`` raises.
    """

    def load(reference: object, governing: ImagePolicy, *, deadline: float | None = None) -> LoadedImage:
        if isinstance(reference, Picture):
            return reference.load(policy, deadline=deadline)
        return load_image(reference, policy, deadline=deadline)

    governing = next((each.policy for each in references if isinstance(each, Picture) and each.policy), policy)
    loaded = load_images(references, governing, deadline=deadline, load=load)
    if governing != policy:
        load_images([each.image for each in loaded], policy, deadline=deadline)
    return loaded


def portable_picture(
    reference: object, policy: ImagePolicy, *, deadline: float | None = None
) -> tuple[str, tuple[str, ...]]:
    """Read an image as text for another machine; return it and what was changed, one sentence each.

    A ``Picture`` with a policy is opened under it, so that what the policy forbids is not left to the other machine.
    See ``portable_image`` for the rest.
    """
    if not isinstance(reference, Picture):
        return portable_image(reference, policy, deadline=deadline)
    if reference.policy is None:
        return portable_image(reference.reference, policy, deadline=deadline)
    (opened,) = open_pictures([reference], policy, deadline=deadline)
    stream = io.BytesIO()
    opened.image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode(), opened.warnings
