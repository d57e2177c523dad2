"""The variant of the search: a group in Python, and flat wherever settings are written down, as it always was."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.load import dumpd, load
from langchain_core.runnables import ConfigurableField
from pydantic import TypeAdapter

from latent_tool import LatentReasoner, ReasoningResult
from latent_tool.calibration.configuration import EMBEDDED_FOLDER, digest, fingerprint
from latent_tool.errors import SettingsError
from latent_tool.evaluation import parse_method
from latent_tool.langchain.call import CallOptions
from latent_tool.settings import Budget, SearchSettings, SearchVariant

OWN, GROUPED = set(SearchSettings.model_fields) - {"variant"}, set(SearchVariant.model_fields)
# As version 0.1.0 wrote the paper's setting down: with these and no other values, in whatever order.
PAPER: dict[str, Any] = {
    "latents": 4,
    "latent_position": "generation_start",
    "thinking_markers": "auto",
    "init": "token",
    "init_token": None,
    "reward": "top_k_entropy",
    "reward_position": "latents",
    "top_k": 10,
    "search_below": None,
    "init_noise": 0.0,
    "samples": 1,
    "antithetic": False,
    "baseline": "none",
    "normalise": False,
    "advantage_floor": 1e-4,
    "scale": "absolute",
    "sigma": 20.0,
    "sigma_decay": 0.95,
    "eta": 0.01,
    "patches_per_latent": 4,
    "proposals": "top",
    "view_depth": 0,
    "look_below": 0.9,
    "view_source": "attention",
    "min_gain": 0.0,
}
positive = st.floats(1e-6, 1e6)
stored = st.fixed_dictionaries(
    {},
    optional={
        "latents": st.integers(1, 256),
        "thinking_markers": st.sampled_from(["auto", None, ["<a>", "</a>"]]),
        "init": st.sampled_from(["token", "mean", "reasoning"]),
        "reward": st.sampled_from(["renormalised_top_k_entropy", "entropy"]),
        "reward_position": st.sampled_from(["latents", "answer", "both", "options"]),
        "top_k": st.integers(3, 100),
        "search_below": st.none() | st.floats(0.01, 1),
        "samples": st.sampled_from([0, 4, 8, 100]),
        "sigma": positive,
        "eta": positive,
        "patches_per_latent": st.integers(0, 256),
        "view_depth": st.integers(0, 4),
        "look_below": st.floats(0.01, 1),
        "min_gain": positive,
        "latent_position": st.sampled_from(["generation_start", "user_turn"]),
        "init_token": st.none() | st.text(max_size=5),
        "init_noise": positive,
        "antithetic": st.booleans(),
        "baseline": st.sampled_from(["leave_one_out", "none"]),
        "normalise": st.booleans(),
        "advantage_floor": positive,
        "scale": st.sampled_from(["embedding_rms", "absolute"]),
        "sigma_decay": st.floats(0.01, 1),
        "proposals": st.sampled_from(["new", "top"]),
        "view_source": st.sampled_from(["attention", "random"]),
    },
)
quickly = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def answered(chosen: SearchSettings) -> ReasoningResult:
    return ReasoningResult(answer="a", raw_text="a", confidence=None, confidence_source="unscored", settings=chosen)


# What is written down ---------------------------------------------------------------------------------------------


@quickly
@given(stored)
def test_what_is_stored_is_read_and_written_again(flat: dict[str, Any]) -> None:
    """By every way that reads settings, with every way that writes them, each naming a field once."""
    made = SearchSettings(**flat)
    whole = made.model_dump(mode="json")
    assert set(whole) == OWN | GROUPED and whole.items() >= flat.items()
    assert {name: value for name, value in whole.items() if name in GROUPED} == made.variant.model_dump(mode="json")
    brief = made.model_dump(mode="json", exclude_defaults=True)
    assert brief == {name: value for name, value in flat.items() if value != SearchSettings().model_dump()[name]}
    text = made.model_dump_json()
    assert json.loads(text) == whole
    assert SearchSettings(**whole) == SearchSettings(**brief) == SearchSettings.model_validate_json(text) == made
    assert ReasoningResult.model_validate_json(answered(made).model_dump_json()).settings == made
    assert answered(made).model_dump(mode="json")["settings"] == whole
    copy = pickle.loads(pickle.dumps(made))
    assert copy == made and hash(copy) == hash(made) and copy.variant == made.variant
    assert LatentReasoner(settings=flat).settings == made  # type: ignore[arg-type]


@quickly
@given(stored)
def test_the_group_and_the_flat_names_mean_the_same(flat: dict[str, Any]) -> None:
    own = {name: value for name, value in flat.items() if name in OWN}
    group = {name: value for name, value in flat.items() if name in GROUPED}
    made = SearchSettings(**flat)
    assert SearchSettings(**own, variant=group) == SearchSettings(**own, variant=SearchVariant(**group)) == made
    try:
        paper = SearchSettings.paper(**flat)
    except SettingsError:  # samples that do not go with the paper's other fields
        with pytest.raises(SettingsError):
            SearchSettings.paper(**own, variant=group)
    else:
        assert SearchSettings.paper(**own, variant=group) == paper
        assert paper.model_dump(mode="json") == {**PAPER, **flat}
    assert made.but(**flat) == made.but() == made


def test_the_defaults_and_the_paper_are_what_they_were() -> None:
    """As 0.1.0 wrote them, so that calibrations and runs made with it go on."""
    known = json.loads((EMBEDDED_FOLDER / "calibration.json").read_text())
    assert SearchSettings(**known["configuration"]["settings"]) == SearchSettings()
    assert SearchSettings().model_dump(mode="json") == known["configuration"]["settings"]
    assert fingerprint(score="pooled_probability") == known["fingerprint"]
    assert SearchSettings(**PAPER) == SearchSettings.paper()
    assert SearchSettings.paper().model_dump(mode="json") == PAPER
    written = {name: digest(made.model_dump(mode="json")) for name, made in _KNOWN.items()}
    assert written == {
        "default": "d07da525b5350954861ad87cfd5f7b1eba68b682baff286ba891da18a3918270",
        "paper": "6ce00638c2c8e1011238a0c2fe1571296fcd546d16f71f7503eceed22e313b00",
        "changed": "6131b0b11ecedc171edf7711d4c15a310a1cb9f7691e152f32ae193efb2c1a51",
    }


_KNOWN = {
    "default": SearchSettings(),
    "paper": SearchSettings.paper(),
    "changed": SearchSettings(
        init="token",
        samples=5,
        thinking_markers=("<a>", "</a>"),
        variant=SearchVariant(
            latent_position="user_turn",
            init_token="x",
            init_noise=0.1,
            antithetic=False,
            baseline="none",
            normalise=False,
            advantage_floor=0.5,
            scale="absolute",
            sigma_decay=0.5,
            proposals="top",
            view_source="random",
        ),
    ),
}


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
def test_a_reasoner_is_saved_as_before() -> None:
    reasoner = LatentReasoner(settings=SearchSettings.paper(latents=6, sigma_decay=0.5))
    saved = dumpd(reasoner)
    assert saved["kwargs"]["settings"] == {
        **{"latents": 6, "init": "token", "reward": "top_k_entropy", "reward_position": "latents"},
        **{"search_below": None, "samples": 1, "antithetic": False, "baseline": "none", "normalise": False},
        **{"scale": "absolute", "sigma": 20.0, "sigma_decay": 0.5, "eta": 0.01, "proposals": "top", "view_depth": 0},
    }
    assert load(saved, allowed_objects=[LatentReasoner], valid_namespaces=["latent_tool"]) == reasoner


def test_a_reasoner_s_settings_can_be_configured() -> None:
    open_ended = LatentReasoner().configurable_fields(settings=ConfigurableField(id="how"))
    for how in ({"sigma_decay": 0.5}, {"variant": {"sigma_decay": 0.5}}, SearchSettings(sigma_decay=0.5)):
        made, _ = open_ended.prepare({"configurable": {"how": how}})  # type: ignore[attr-defined]
        assert made.settings.variant.sigma_decay == 0.5


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_json_schemas_are_flat(mode: Any) -> None:
    schema = SearchSettings.model_json_schema(mode=mode)
    assert set(schema["properties"]) == OWN | GROUPED and "$defs" not in schema
    assert all("default" in described and "description" in described for described in schema["properties"].values())
    inside = ReasoningResult.model_json_schema(mode=mode)["$defs"]
    assert inside["SearchSettings"] == schema and "SearchVariant" not in inside
    twice = TypeAdapter(tuple[SearchSettings, list[SearchSettings]]).json_schema(mode=mode)
    assert twice["$defs"] == {"SearchSettings": schema}


def test_the_constructor_shows_the_group_alone() -> None:
    assert GROUPED.isdisjoint(inspect.signature(SearchSettings).parameters)
    assert {"variant", *OWN} <= set(inspect.signature(SearchSettings).parameters)


# Changes ----------------------------------------------------------------------------------------------------------


def test_a_change_of_the_group_keeps_its_other_fields() -> None:
    paper = SearchSettings.paper()
    changed = {**PAPER, "sigma_decay": 0.5}
    assert paper.but(sigma_decay=0.5).model_dump(mode="json") == changed
    assert paper.but(variant={"sigma_decay": 0.5}).model_dump(mode="json") == changed
    assert SearchSettings.paper(variant={"sigma_decay": 0.5}).model_dump(mode="json") == changed
    assert paper.but(sigma=1.0).variant == paper.variant
    assert paper.but(samples=4, variant=SearchVariant()).variant == SearchVariant()
    assert SearchSettings(variant=paper.variant, samples=1, sigma_decay=0.5).variant == paper.variant.but(
        sigma_decay=0.5
    )


# What is refused --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "out of range": ({"sigma_decay": 5}, "sigma_decay"),
    "out of range in the group": ({"variant": {"sigma_decay": 5}}, "sigma_decay"),
    "no such choice": ({"scale": "wide"}, "scale"),
    "no such choice in the group": ({"variant": {"scale": "wide"}}, "scale"),
    "a typing mistake": ({"sigma_decy": 0.5}, "Did you mean variant.sigma_decay?"),
    "a typing mistake in the group": ({"variant": {"sigma_decy": 0.5}}, "Did you mean sigma_decay?"),
    "a typing mistake beside it": ({"sampels": 4}, "Did you mean samples?"),
    "two of them": ({"sampels": 4, "antithetik": True}, "Did you mean samples and variant.antithetic?"),
    "far from any": ({"colour": "red"}, "colour"),
    "a field of its own in the group": ({"variant": {"samples": 4}}, "samples"),
    "no group": ({"variant": None}, "variant"),
    "no group, and a field of it": ({"variant": 3, "scale": "absolute"}, "variant"),
    "a dotted name": ({"variant.scale": "absolute"}, "variant.scale"),
    "odd and antithetic": ({"samples": 7, "antithetic": True}, "antithetic"),
}


@pytest.mark.parametrize(
    "make",
    [
        lambda values: SearchSettings(**values),
        lambda values: SearchSettings().but(**values),
        lambda values: SearchSettings.paper(**values),
        lambda values: LatentReasoner(settings=values),
        lambda values: LatentReasoner(settings={**SearchSettings().model_dump(), **values}),
    ],
    ids=["constructor", "but", "paper", "reasoner", "reasoner of what was stored"],
)
@pytest.mark.parametrize(("values", "named"), WRONG.values(), ids=WRONG)
def test_wrong_fields_are_named(make: Callable[[dict[str, Any]], Any], values: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make(values)
    assert named in str(caught.value)


def test_a_field_that_is_given_twice_is_refused() -> None:
    """Even with one value: which was meant, if they come to differ, nobody knows."""
    with pytest.raises(SettingsError, match="given twice, in variant and beside it: scale"):
        SearchSettings(variant={"scale": "absolute", "sigma_decay": 0.5}, scale="absolute")  # type: ignore[arg-type, call-arg]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("search:sigma_decay=5", "sigma_decay"),
        ("search:paper,scale=wide", "scale"),
        ("search:sigma_decy=0.5", "Did you mean sigma_decay?"),
        ("search:antithetik=true,iteration=3", "Did you mean antithetic and iterations?"),
        ("self-consistency:scale=absolute", "not known: scale"),
        ("self-consistency:temprature=1", "Did you mean temperature?"),
        ("search:variant=random", "variant"),
    ],
)
def test_wrong_fields_in_the_name_of_a_method(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_method(text)
    assert named in str(caught.value)
    asked = ("eval", "scenes:held_out:5850000-5850001", "--out", "run", "--method", text)
    done = command.run(*asked, folder=tmp_path)
    assert done.returncode == 2 and named in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "run").exists()


def test_names_of_methods_are_flat() -> None:
    found = parse_method("search:paper,sigma_decay=0.5,antithetic=true,samples=4,init_token=none").settings
    assert found == SearchSettings.paper(sigma_decay=0.5, antithetic=True, samples=4)
    assert parse_method("search:sigma_decay=0.5").described()["settings"]["sigma_decay"] == 0.5
    turned = SearchSettings(latents=0, variant=SearchVariant(latent_position="user_turn", sigma_decay=0.5))
    for name in ("greedy", "search"):
        assert parse_method(name, turned).settings.variant == SearchVariant(latent_position="user_turn")
    drawn = parse_method("random-latents:paper").settings.variant
    assert drawn == SearchSettings.paper().variant.but(antithetic=False, baseline="none", sigma_decay=1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda names: SearchSettings.from_mapping(names),
        lambda names: SearchSettings().but(variant=names),
        lambda names: Budget.coerce(names),
        lambda names: CallOptions.parse(names),
        lambda names: CallOptions.parse({"budget": names}),
        lambda names: LatentReasoner(settings=names),
        lambda names: LatentReasoner(budget=names),
        lambda names: LatentReasoner(generation=names),
        lambda names: LatentReasoner(image_policy=names),
    ],
)
@pytest.mark.parametrize("names", [{1: 2}, {None: 1, "samples": 4}, {("a",): 1}])
def test_names_that_are_no_texts_are_refused_by_a_typed_error(make: Any, names: Any) -> None:
    with pytest.raises(SettingsError, match=r"names that are no texts|is not valid") as caught:
        make(names)
    assert "Known fields" in str(caught.value)
