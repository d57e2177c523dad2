"""The options of a call, and how those of several places become one: what LangChain's own merging would lose, stays.

LangChain merges ``config["configurable"]`` one level deep: of two dicts under ``"latent_reasoner"`` the later one
replaces the earlier one whole, a threshold included. So whatever is bound to a reasoner goes into the reasoner itself
(see ``runnable``), and every option may also be a key of its own, such as ``"latent_reasoner_min_confidence"``, which
no merging can lose. docs/langchain.md has the table of precedence.

This module knows configs; it knows nothing of Runnables or models.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.utils import ConfigurableFieldSpec
from pydantic import ConfigDict, Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from latent_tool.errors import SettingsError
from latent_tool.settings import Budget, BudgetLevel
from latent_tool.validation import Settings

__all__ = ["OPTIONS_KEY", "CallOptions", "Threshold", "config_specs", "first_given", "split_options", "stricter"]

OPTIONS_KEY = "latent_reasoner"

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Threshold = float | Literal["calibrated"] | None


class CallOptions(Settings):
    """What one call may change: the content of ``config["configurable"]["latent_reasoner"]``.

    A field of the request itself wins over these, and these win over the reasoner's own. ``None`` names nothing.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    budget: Budget | BudgetLevel | None = Field(
        None,
        description="A Budget, its fields, or quick, standard or thorough, beside which the reasoner's own deadline, "
        "max_candidates and max_new_tokens hold.",
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed of the search.")
    min_confidence: Unit | Literal["calibrated"] | None = Field(
        None, description="Abstain below this confidence, or below the calibration's own threshold."
    )
    cancelled: SkipJsonSchema[threading.Event | None] = Field(
        None, description="Set it from another thread to stop the call within one step of the search."
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _coerce_budget(cls, value: Any) -> Budget | str | None:
        budget = None if value is None else Budget.coerce(value)
        return value if isinstance(value, str) else budget

    @classmethod
    def parse(cls, value: Any) -> CallOptions:
        """Return options from options, a mapping of their fields, or ``None``. Raises ``SettingsError``."""
        if value is None:
            return cls()
        if isinstance(value, CallOptions):
            return value
        if isinstance(value, Mapping):
            return cls.from_mapping(value)
        raise SettingsError(
            f"config['configurable'][{OPTIONS_KEY!r}] is {type(value).__name__}, not a dict.",
            f"Known fields: {', '.join(cls.model_fields)}.",
        )

    @classmethod
    def of(
        cls,
        config: RunnableConfig,
        named: Mapping[str, Any] | None = None,
        around: RunnableConfig | None = None,
    ) -> CallOptions:
        """Read the options of a call from its config, its keyword arguments ``named``, and the run ``around`` it.

        What stands nearer to the call wins field by field: keyword arguments, the config, the surrounding run. The
        threshold is the strictest that config and surrounding run name, unless a keyword argument names one. Raises
        ``SettingsError``; other keys of ``configurable`` are not looked at.
        """
        options = _options_in(config)
        if around is not None and not isinstance(options, Settled):
            options = _options_in(around).overridden_by(options)
        return options.but(**cls(**named).given) if named else options

    @property
    def given(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in self if value is not None}

    def overridden_by(self, nearer: CallOptions) -> Self:
        """These options with those of ``nearer`` in their place, but the stricter threshold of the two."""
        threshold = stricter(self.min_confidence, nearer.min_confidence)
        return self.but(**{**nearer.given, "min_confidence": threshold})


class Settled(CallOptions):
    """Options that a router has decided for a rung: nothing is added from the runs around it."""


def _options_in(config: RunnableConfig) -> CallOptions:
    """The options that a config holds, in one dict or in keys of their own."""
    configurable = config.get("configurable") or {}
    nested = CallOptions.parse(configurable.get(OPTIONS_KEY))
    if isinstance(nested, Settled):
        return nested
    single = {name: configurable[key] for key, name in _SINGLE_KEYS.items() if configurable.get(key) is not None}
    return CallOptions(**single).overridden_by(nested) if single else nested


_SINGLE_KEYS = {f"{OPTIONS_KEY}_{name}": name for name in ("budget", "seed", "min_confidence")}


def split_options(config: Mapping[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
    """Return the options that a config holds and the config without them, apart from the event that stops a call.

    An event belongs to one moment and not to a reasoner, so that it stays where it is.
    """
    options = _options_in(RunnableConfig(configurable=config.get("configurable") or {}))
    configurable = {
        key: value
        for key, value in (config.get("configurable") or {}).items()
        if key != OPTIONS_KEY and key not in _SINGLE_KEYS
    }
    if options.cancelled is not None:
        configurable[OPTIONS_KEY] = {"cancelled": options.cancelled}
    rest = {key: value for key, value in config.items() if key != "configurable"}
    return options.but(cancelled=None), {**rest, "configurable": configurable} if configurable else rest


def config_specs() -> list[ConfigurableFieldSpec]:
    """Return what may stand in ``configurable`` of a call."""
    return [
        ConfigurableFieldSpec(
            id=OPTIONS_KEY,
            annotation=CallOptions | None,
            name="Options of a call",
            description="Budget, seed, threshold and stop event of one call of a reasoner.",
            is_shared=True,
        )
    ]


def stricter(one: Threshold, other: Threshold, calibrated: float | None = None) -> Threshold:
    """Return the stricter of two thresholds; ``None`` is none.

    Args:
        one, other: in [0, 1], or ``"calibrated"``.
        calibrated: the probability at the calibration's own threshold; ``None``: not known here.

    Raises ``SettingsError`` for a number beside ``"calibrated"`` where that is not known: either might be lost.
    """
    if one is None or other is None:
        return other if one is None else one
    if calibrated is None and isinstance(one, str) != isinstance(other, str):
        raise SettingsError(
            f"It cannot be told which is stricter, {one} or {other}: the calibration is not known here.",
            "Name one of them, or give the number to the reasoner that has the calibration.",
        )
    return max(one, other, key=lambda each: (calibrated or 0.0) if isinstance(each, str) else each)


def first_given(*values: Any) -> Any:
    """Return the first value that is not ``None``, or ``None``."""
    return next((value for value in values if value is not None), None)
