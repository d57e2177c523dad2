"""Say why the hub did not deliver: no such name, no network, no access, no room on the disk, each with its remedy."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from latent_tool.errors import (
    DiskFullError,
    HubUnreachableError,
    LatentToolError,
    ModelAccessError,
    ModelNotFoundError,
)

__all__ = ["gated", "hub_error"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Where transformers passes no cause on, its words are all there is.
_UNREACHABLE = ("couldn't connect to", "we couldn't connect", "connection error", "name resolution")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def gated(model: str) -> ModelAccessError:
    """Return the error of a model whose conditions this user has not accepted."""
    return ModelAccessError(
        f"The hub does not give {model!r} to this user: it is gated or private.",
        f"Accept its conditions on https://huggingface.co/{model}, then log in (hf auth login) or pass token=.",
    )


def hub_error(error: BaseException, model: str, revision: str | None, offline: bool) -> LatentToolError | None:
    """Return what an error of loading says of the hub or the disk; ``None`` if it says nothing of either.

    Args:
        offline: whether the hub was not to be asked.
    """
    causes = list(_causes(error))
    if any(isinstance(each, OSError) and each.errno in _FULL for each in causes):
        return DiskFullError(
            f"There is no room on the disk for {model!r}.",
            "Make room (hf cache prune), or set HF_HOME to a folder on a larger disk.",
        )
    if any(isinstance(each, GatedRepoError) for each in causes):
        return gated(model)
    if any(isinstance(each, RevisionNotFoundError) for each in causes):
        return ModelNotFoundError(f"{model!r} has no revision {revision!r}.", "Check the branch, tag or commit.")
    if any(isinstance(each, RepositoryNotFoundError | HFValidationError) for each in causes):
        return ModelNotFoundError(
            f"The hub has no model {model!r}, or it is private.",
            "Check the spelling (latent-tool models lists names), or log in (hf auth login) if it is yours.",
        )
    if offline or any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        if any(isinstance(each, LocalEntryNotFoundError | OfflineModeIsEnabled) for each in causes):
            return ModelNotFoundError(
                f"{model!r} is not on this machine, and the hub is not to be asked.",
                f"Download it first where there is a network: hf download {model}",
            )
        return None
    words = " ".join(str(each).lower() for each in causes)
    unreachable = any(isinstance(each, LocalEntryNotFoundError | ConnectionError) for each in causes)
    if unreachable or any(text in words for text in _UNREACHABLE):
        return HubUnreachableError(
            f"{model!r} is not on this machine, and the hub cannot be reached.",
            f"Check the network and the proxy, or download it elsewhere (hf download {model}) and give its folder.",
        )
    return None
