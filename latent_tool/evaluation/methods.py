"""Ways to an answer that are compared on the same questions, by name.

    greedy               the plain model
    reasoning            its own greedy reasoning as latents, no search: where the search starts
    search               the reasoner as it is set: by default it searches only where it is unsure
    search-no-patches    the search without injecting patches
    patches-no-search    patches injected, the latents left where they start
    random-latents       draws around the start, no gradient, as many evaluations; the best by the same reward
    random-draw          one draw around the start, whatever its reward
    self-consistency     several answers drawn from the plain model; the most common one

A name may carry settings: ``search:paper``, ``search:latents=4,search_below=none``, ``search:budget=quick``,
``self-consistency:samples=5,temperature=1``. This module knows settings; it calls no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from latent_tool.errors import SettingsError
from latent_tool.settings import Budget, SamplingSettings, SearchSettings, SearchVariant
from latent_tool.validation import Settings, did_you_mean

__all__ = ["DEFAULT_METHODS", "METHODS", "Method", "parse_method"]

METHODS = (
    "greedy",
    "reasoning",
    "search",
    "search-no-patches",
    "patches-no-search",
    "random-latents",
    "random-draw",
    "self-consistency",
)
DEFAULT_METHODS = ("greedy", "reasoning", "search")
# Evaluations of the random control when the run has no search to match: the start, and ten rounds of draws.
_ROUNDS = 10


@dataclass(frozen=True)
class Method:
    """One way to an answer.

    ``matches``: name of the method whose evaluations, question by question, the random control matches.
    """

    name: str
    kind: Literal["answer", "random", "sample"]
    settings: SearchSettings
    budget: Budget
    sampling: SamplingSettings | None = None
    matches: str | None = None

    def budget_for(self, candidates: int | None) -> Budget:
        """Return the budget when the matched method scored so many states (rounded up to whole rounds)."""
        if self.kind != "random" or candidates is None:
            return self.budget
        rounds = math.ceil(max(candidates - 1, 0) / max(self.settings.samples, 1))
        return self.budget.but(iterations=rounds, max_candidates=1 + rounds * self.settings.samples)

    def described(self) -> dict[str, Any]:
        """Return the method as plain JSON, for the manifest of a run."""
        return {
            "name": self.name,
            "kind": self.kind,
            "settings": self.settings.model_dump(mode="json"),
            "budget": self.budget.model_dump(mode="json"),
            "sampling": None if self.sampling is None else self.sampling.model_dump(mode="json"),
            "matches": self.matches,
        }


def parse_method(
    text: str, settings: SearchSettings | None = None, budget: Budget | None = None, *, seen: tuple[Method, ...] = ()
) -> Method:
    """Return a method from its name.

    Args:
        text: see this module's description.
        settings, budget: what a name without settings of its own means by the search.
        seen: methods that come before it; the random control matches the first search among them.

    Raises ``SettingsError``.
    """
    name = text.strip()
    base, _, rest = name.partition(":")
    if base not in METHODS:
        raise SettingsError(f"There is no method {base!r}.", f"Use one of: {', '.join(METHODS)}.")
    settings, budget = settings or SearchSettings(), budget or Budget()
    if not settings.latents:
        settings = _plain(settings).but(latents=SearchSettings().latents)
    words = [word.strip() for word in rest.split(",") if word.strip()]
    preset = next((word for word in words if "=" not in word), None)
    if preset not in (None, "paper", "default") or sum("=" not in word for word in words) > 1:
        raise SettingsError(f"{text!r} names no preset.", "Use paper or default, then name=value pairs.")
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if preset == "paper":
        settings = SearchSettings.paper()
    elif preset == "default":
        settings = SearchSettings()
    if base == "self-consistency":
        sampling = SamplingSettings(**_chosen(given, SamplingSettings))
        limits = budget.but(**_chosen(given, Budget))
        _nothing_left(given, text, SamplingSettings, Budget)
        return Method(name, "sample", _plain(settings), limits, sampling)
    if "budget" in given:
        budget = Budget.coerce(given.pop("budget"))  # type: ignore[arg-type]  # any other name is refused there
    settings = settings.but(**_chosen(given, SearchSettings))
    budget = budget.but(**_chosen(given, Budget))
    _nothing_left(given, text, SearchSettings, Budget)
    return _shaped(Method(name, "answer", settings, budget), base, seen)


def _shaped(method: Method, base: str, seen: tuple[Method, ...]) -> Method:
    """What the name of a method changes of the settings."""
    settings, budget = method.settings, method.budget
    if base == "greedy":
        return replace(method, settings=_plain(settings))
    always = settings.but(search_below=None)  # what a part of the search does alone is seen where nothing stops it
    if base == "reasoning":
        return replace(method, settings=always.but(init="reasoning"), budget=budget.but(iterations=0))
    if base == "search-no-patches":
        return replace(method, settings=always.but(patches_per_latent=0))
    if base == "patches-no-search":
        return replace(method, settings=always.but(samples=0))
    if base == "random-draw":
        drawn = always.but(variant={"init_noise": settings.sigma})
        return replace(method, settings=drawn, budget=budget.but(iterations=0))
    if base == "random-latents":
        matched = next((each.name for each in seen if each.name.partition(":")[0] == "search"), None)
        draws = max(settings.samples, 8)
        drawn = always.but(
            eta=0,
            patches_per_latent=0,
            samples=draws,
            variant={"antithetic": False, "baseline": "none", "sigma_decay": 1.0},
        )
        return replace(method, kind="random", settings=drawn, budget=budget.but(iterations=_ROUNDS), matches=matched)
    return method


def _plain(settings: SearchSettings) -> SearchSettings:
    """The plain model with the same prompt."""
    position = settings.variant.latent_position
    return SearchSettings(
        latents=0, thinking_markers=settings.thinking_markers, variant=SearchVariant(latent_position=position)
    )


def _fields(owner: type[Settings]) -> list[str]:
    """The fields of ``owner`` as names of methods have them: those of a group by their own name."""
    return [name.rpartition(".")[2] for name in owner.known_fields()]


def _chosen(given: dict[str, str], owner: type[Settings]) -> Mapping[str, Any]:
    """The fields of ``owner`` among what was given, taken out of it; pydantic reads them from their text."""
    values = {name: given.pop(name) for name in _fields(owner) if name in given}
    return {name: None if value.lower() == "none" else value for name, value in values.items()}


def _nothing_left(given: Mapping[str, str], text: str, *owners: type[Settings]) -> None:
    if given:
        nearest = did_you_mean(given, [name for owner in owners for name in _fields(owner)])
        raise SettingsError(
            f"{text!r} names settings that are not known: {', '.join(given)}.",
            nearest
            + "Use fields of SearchSettings and Budget (of SamplingSettings for self-consistency), or budget=quick.",
        )
