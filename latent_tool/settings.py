"""What a caller may choose: how much work (``Budget``), how the search works (``SearchSettings``), how the image is
noised (``NoiseSettings``) and which images may be opened (``ImagePolicy``).

Every class is frozen and validated when it is made; a value out of range raises ``SettingsError``. This module knows
nothing of torch, of models or of LangChain.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from latent_tool.errors import SettingsError
from latent_tool.validation import Settings

__all__ = [
    "PREFIX_CACHE_BYTES",
    "Budget",
    "BudgetLevel",
    "GenerationSettings",
    "ImagePolicy",
    "NoiseSettings",
    "SamplingSettings",
    "SearchSettings",
    "SearchVariant",
]

BudgetLevel = Literal["quick", "standard", "thorough"]
ImageFormat = Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Prefixes of images that are kept: 256 MiB hold a few of a large model; of a small one, their number is bounded.
PREFIX_CACHE_BYTES = 256 * 2**20


class Budget(Settings):
    """How much work one question may cost at most. A limit of ``None`` is no limit.

    The first limit that is reached ends the search, is named in the result's ``stop_reason``, and the best state found
    so far is decoded.
    """

    iterations: int = Field(10, ge=0, le=10_000, description="Rounds of the search; 0 scores the initial latents only.")
    max_candidates: int | None = Field(
        None, ge=1, description="States scored at most, the initial one included; a batch of 8 counts 8."
    )
    max_patches: int = Field(16, ge=0, le=4096, description="Image cells injected at most.")
    max_views: int = Field(
        8,
        ge=0,
        le=64,
        description="Windows of the picture that are looked at again at most, each encoded at its own resolution; 0: "
        "none.",
    )
    max_new_tokens: int = Field(256, ge=1, le=32_768, description="Tokens decoded at most for the answer.")
    deadline_s: Positive | None = Field(
        None,
        description="Seconds from the call to the last token: image loading, queueing, prefill, search and decoding; "
        "not the loading of the model.",
    )
    target_confidence: Probability | None = Field(
        0.98,
        description="Ask the plain model first, and stop there if the joint probability of its answer reaches this. "
        "None: never stop there.",
    )
    target_reward: Finite | None = Field(None, description="Stop as soon as the best reward reaches this value.")
    patience: int | None = Field(None, ge=1, description="Stop after this many rounds without a better reward.")

    @classmethod
    def level(cls, name: BudgetLevel) -> Budget:
        """Return the budget behind a name: ``"quick"``, ``"standard"`` or ``"thorough"``."""
        if not isinstance(name, str) or name not in _LEVELS:
            raise SettingsError(f"There is no budget level {name!r}.", f"Use one of: {', '.join(_LEVELS)}.")
        return _LEVELS[name]

    @classmethod
    def coerce(cls, value: Budget | BudgetLevel | Mapping[str, Any] | None) -> Budget:
        """Return a budget from a level's name, a mapping of fields, ``None`` (standard) or a budget."""
        if value is None:
            return _LEVELS["standard"]
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls.level(value)
        if isinstance(value, Mapping):
            return cls.from_mapping(value)
        raise SettingsError(
            f"A budget cannot be made from {type(value).__name__}.",
            "Pass a Budget, its fields as a dict, or one of: quick, standard, thorough.",
        )

    def replaced_by(self, wanted: Budget | BudgetLevel | Mapping[str, Any] | None) -> Budget:
        """Return what a request that asks for another budget gets; ``None`` asks for none.

        The name of a level says how hard to search: ``deadline_s``, ``max_candidates`` and ``max_new_tokens`` stay.
        """
        if wanted is None:
            return self
        budget = Budget.coerce(wanted)
        if not isinstance(wanted, str):
            return budget
        return budget.but(
            deadline_s=self.deadline_s, max_candidates=self.max_candidates, max_new_tokens=self.max_new_tokens
        )


_LEVELS: dict[str, Budget] = {
    "quick": Budget(iterations=3, max_patches=8, max_views=4, patience=2),
    "standard": Budget(),
    "thorough": Budget(iterations=40, max_patches=32, max_views=16, target_confidence=None),
}


class SearchVariant(Settings):
    """What only the paper's setting and controls change of a search; see ``SearchSettings.variant``."""

    latent_position: Literal["generation_start", "user_turn"] = Field(
        "generation_start", description="After the assistant header, or at the end of the user's turn."
    )
    init_token: str | None = Field(
        None, description="Token for init='token'; None: <|endoftext|> where it exists, else end of sequence."
    )
    init_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="Deviation of noise added once to where the latents start, in units of `scale`; a control."
    )

    antithetic: bool = Field(True, description="Draw noise in pairs (e, -e); needs an even number of samples.")
    baseline: Literal["leave_one_out", "none"] = Field("leave_one_out", description="Subtracted from each reward.")
    normalise: bool = Field(True, description="Divide the advantages by their standard deviation.")
    advantage_floor: Positive = Field(1e-4, description="Smallest deviation that advantages are divided by.")
    scale: Literal["embedding_rms", "absolute"] = Field(
        "embedding_rms", description="Unit of sigma: the RMS of the model's input embeddings, or none."
    )
    sigma_decay: Positive = Field(1.0, le=1.0, description="Factor on sigma after every round.")

    proposals: Literal["new", "top"] = Field(
        "new",
        description="The top m cells not yet injected, which are not scored again while the latents are within one "
        "sigma (root mean square) of where they were refused; or the top m, of which the new ones are added.",
    )
    view_source: Literal["attention", "random"] = Field(
        "attention",
        description="Where views are proposed: where the attention is densest, or anywhere, in the same number and "
        "sizes; a control.",
    )


class SearchSettings(Settings):
    """How the search works. The defaults are what measurements support; ``paper()`` is what the authors describe.

    What nobody needs to choose for a question of their own is in ``variant``, a ``SearchVariant``. Written down (JSON,
    dumps, names of methods), its fields stand beside the others; they may be given so here, too, also to ``but()`` and
    ``paper()``: ``settings.but(sigma_decay=0.9)``.

    What the defaults change, and why:

    ======================  =====================================  ====================================================
    field                   default instead of ``paper()``         reason
    ======================  =====================================  ====================================================
    ``reward``              ``renormalised_top_k_entropy``         the paper's reward also rises when the distribution
                                                                   goes flat; this one is lowest there
    ``reward_position``     where the answer begins                read there it ranks right above wrong answers; at
                                                                   latents that the model ignores it does not
    ``samples``,            8, antithetic, leave-one-out baseline, one sample without baseline has a variance that
    ``variant.antithetic``  normalised advantages                  buries the gradient; a batch of 8 costs little more
    and so on
    ``variant.scale``       noise in units of the embeddings' RMS  sigma then means the same for every model
    ``init``                the model's own greedy reasoning       the best start measured
    ``search_below``        0.7: search only where still unsure    four answers in five need no search, and searching
                                                                   them makes none of them better
    ``variant.proposals``   the top m cells *not yet injected*     otherwise later rounds propose what is already there;
                                                                   what was refused nearby is not scored again either
    ``view_depth``          2, the paper has none                  copies of cells hold nothing new; a window of the
                                                                   original, encoded again, does
    ======================  =====================================  ====================================================
    """

    latents: int = Field(8, ge=0, le=256, description="Latent thought tokens L; 0 is the plain model.")
    thinking_markers: Literal["auto"] | tuple[str, str] | None = Field(
        "auto",
        description="Opening and closing marker around the latents; 'auto' uses <think> and </think> where the "
        "tokenizer knows both as single tokens; None uses none.",
    )
    init: Literal["token", "mean", "reasoning"] = Field(
        "reasoning",
        description="Where the latents start: the embedding of the variant's `init_token`; the mean embedding; the "
        "model's own greedy thinking text cut to L (for a model without thinking markers, or that does not think: like "
        "'token').",
    )

    reward: Literal["renormalised_top_k_entropy", "top_k_entropy", "entropy", "neg_log_probability"] = Field(
        "renormalised_top_k_entropy", description="What the search maximises."
    )
    reward_position: Literal["latents", "answer", "both", "options"] = Field(
        "answer",
        description="Where the reward is read: at the latents, at the position that predicts the first answer token, "
        "the mean over all of them, or in the distribution over the options of the question.",
    )
    top_k: int = Field(
        10,
        ge=3,
        description="Tokens that the top-k rewards look at; where no first token has an even share of theirs or more, "
        "there is no search, see `search_below`.",
    )

    search_below: Probability | None = Field(
        0.7,
        description="Where the plain model has not reached the budget's target_confidence: decode from where the "
        "latents start, and search only if the joint probability of that answer is below this, and some first token's "
        "is at least 1 / top_k. None: always search.",
    )

    samples: int = Field(
        8,
        ge=0,
        le=4096,
        description="Noise samples per round, scored in one batch; 0: the latents stay.",
    )
    sigma: Positive = Field(
        0.3, description="Standard deviation of the noise on the latents, in units of the variant's `scale`."
    )
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.09,
        description="Step size of the gradient ascent, in units of the variant's `scale` squared; 0: draws without a "
        "step.",
    )

    patches_per_latent: int = Field(4, ge=0, le=256, description="Cells m a latent proposes per round; 0: no patches.")
    view_depth: int = Field(
        2,
        ge=0,
        le=4,
        description="Views: windows of the picture are looked at again, then windows inside the surest of them, so "
        "many levels deep; 0: none.",
    )
    look_below: Probability = Field(
        0.9,
        description="Windows are looked at where the joint probability of the plain model's answer is below this, or "
        "the answer means that it cannot be told.",
    )
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="A proposal, of cells or of a view, is accepted only if the reward rises by more than this; a view "
        "has to be surer by 15 percent, too.",
    )

    variant: SearchVariant = Field(SearchVariant(), description="What only `paper()` and controls change.")

    @model_validator(mode="before")
    @classmethod
    def _take_into_variant(cls, values: Any) -> Any:
        """What stands beside the group, as it is stored, goes into it."""
        if not isinstance(values, Mapping):
            return values
        beside = {name: value for name, value in values.items() if name in SearchVariant.model_fields}
        variant = values.get("variant", {})
        if not beside or not isinstance(variant, SearchVariant | Mapping):
            return values
        if isinstance(variant, Mapping) and (twice := beside.keys() & variant.keys()):
            raise ValueError(f"given twice, in variant and beside it: {', '.join(sorted(twice))}")
        own = {name: value for name, value in values.items() if name not in beside}
        return {**own, "variant": {**dict(variant), **beside}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        variant = self.variant
        if variant.antithetic and self.samples % 2:
            raise ValueError("antithetic noise needs an even number of samples; turn antithetic off or change samples")
        if variant.baseline == "leave_one_out" and 0 < self.samples < (4 if variant.antithetic else 2):
            raise ValueError(
                "a leave-one-out baseline needs at least 2 samples (4 when antithetic); set the baseline to 'none'"
            )
        if self.reward_position == "options" and self.reward in ("top_k_entropy", "neg_log_probability"):
            raise ValueError(
                f"{self.reward} can rise when the distribution over the options goes flat; use 'entropy' or "
                "'renormalised_top_k_entropy'"
            )
        if self.latents == 0 and self.init != type(self).model_fields["init"].default:
            raise ValueError("init has no meaning without latents; set latents >= 1")
        if self.thinking_markers not in ("auto", None) and not all(self.thinking_markers or ()):
            raise ValueError("thinking_markers are two non-empty strings")
        return self

    @model_serializer(mode="wrap")
    def _write_flat(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # else it is the schema
        values = handler(self)
        variant = values.pop("variant", {})
        return {**values, **variant}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        properties.update(handler.resolve_ref_schema(properties.pop("variant"))["properties"])
        return schema

    @classmethod
    def known_fields(cls) -> list[str]:
        own = [name for name in cls.model_fields if name != "variant"]
        return [*own, *(f"variant.{name}" for name in SearchVariant.model_fields)]

    def but(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, validated like a new one; of ``variant``, a mapping changes the
        fields that it names.
        """
        if isinstance(variant := changes.get("variant"), Mapping):
            changes["variant"] = {**dict(self.variant), **variant}
        return super().but(**changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the method as its authors describe it: one sample a round, plain ascent, no baseline, their reward.

        ``sigma``, its decay, ``eta`` and the start are the published command line's; other fields may be given, as to
        ``but()``.
        """
        paper = cls(
            latents=4,
            init="token",
            reward="top_k_entropy",
            reward_position="latents",
            search_below=None,
            samples=1,
            sigma=20.0,
            eta=0.01,
            view_depth=0,
            variant=SearchVariant(
                antithetic=False,
                baseline="none",
                normalise=False,
                scale="absolute",
                sigma_decay=0.95,
                proposals="top",
            ),
        )
        return paper.but(**changes)


class GenerationSettings(Settings):
    """What decoding changes of the model's own generation settings; ``None`` leaves the model's. Always greedy."""

    repetition_penalty: Positive | None = Field(None, description="Above 1, tokens already written become less likely.")
    no_repeat_ngram_size: int | None = Field(None, ge=0, description="No run of so many tokens comes twice; 0: off.")
    min_new_tokens: int | None = Field(None, ge=0, description="The answer does not end before so many tokens.")
    stop_strings: tuple[str, ...] | None = Field(None, description="The answer ends when its text holds one of these.")

    @field_validator("stop_strings")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all(value):
            raise ValueError("must not be empty strings")
        return value


class SamplingSettings(Settings):
    """How several answers to one question are drawn; their agreement is a measure of confidence."""

    samples: int = Field(10, ge=1, le=1024, description="Answers drawn, in one batch that shares the prefix.")
    temperature: Positive = Field(0.7, description="What the logits are divided by.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Only the most probable tokens that hold this share of the probability are drawn."
    )
    think: bool = Field(
        True, description="Let the model reason first, in words, where it has thinking markers; the reasoning is drawn."
    )


class NoiseSettings(Settings):
    """How the image is noised to measure visual dependency.

    Noise is added to the *processed* pixel values ``x`` (about unit variance): ``gaussian`` gives ``x + s n``,
    ``diffusion`` gives ``sqrt(1 - s^2) x + s n`` (the forward process of a diffusion model), ``n ~ N(0, I)``.
    """

    kind: Literal["diffusion", "gaussian"] = "diffusion"
    strength: Positive = Field(0.95, description="s: the share of noise (diffusion, at most 1) or its deviation.")
    draws: int = Field(1, ge=1, le=64, description="Noised images averaged, in log-probability.")
    seed: int = Field(0, ge=0, description="Seed of the noise.")
    threshold: Finite = Field(0.5, description="Nats above which a token counts as depending on the image.")

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.kind == "diffusion" and self.strength > 1:
            raise ValueError("the strength of diffusion noise is at most 1")
        return self


class ImagePolicy(Settings):
    """Which images may be opened, and how large they may be.

    Pillow images, bytes and data URIs are always accepted, within the limits; files and downloads only as allowed here.
    ``local()`` is for code and the command line, ``untrusted()`` for an agent's tool, and ``server()`` for whatever
    strangers can reach over a network.
    """

    files: Literal["any", "folders", "none"] = Field(
        "none", description="Files that may be read: any readable one, those inside `folders`, or none."
    )
    folders: tuple[Path, ...] = Field((), description="Folders for files='folders'; links out of them are refused.")
    hosts: tuple[str, ...] = Field(
        (),
        description="Hosts from which images may be downloaded, exactly as given: 'example.org' (default port) or "
        "'example.org:8443'. No wildcards; international names in their xn-- form.",
    )
    allow_http: bool = Field(False, description="Also download over http, not only https.")
    allow_private_hosts: bool = Field(
        False, description="Also connect to private, loopback and other addresses that are not public."
    )
    trust_environment: bool = Field(
        False,
        description="Use the proxy and the certificates named in the environment (HTTPS_PROXY, SSL_CERT_FILE). A proxy "
        "resolves host names itself, so that their addresses are not checked here.",
    )
    stall_s: Positive = Field(5.0, description="Seconds to connect at most, and between two pieces of a download.")
    download_s: Positive = Field(20.0, description="Seconds for a whole download at most, redirects included.")

    max_bytes: int = Field(20_000_000, ge=1, le=2**31, description="Bytes of the encoded image at most.")
    max_pixels: int = Field(40_000_000, ge=1, le=10**9, description="Width times height at most.")
    max_side: int = Field(20_000, ge=1, le=10**6, description="Width or height at most, in pixels.")
    max_frames: int = Field(10_000, ge=1, le=10**6, description="Frames at most; only the first is ever decoded.")
    max_images: int = Field(64, ge=1, le=10**4, description="Images of one request at most.")
    max_total_pixels: int = Field(
        160_000_000, ge=1, le=10**10, description="Pixels of all images of one request together at most."
    )
    formats: tuple[ImageFormat, ...] = Field(
        ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"), min_length=1, description="Formats that may be opened."
    )

    isolate: bool = Field(
        False,
        description="Decode bytes in a process of their own, which may crash, hang or run out of memory. Costs about "
        "0.2 s once and a few milliseconds per image; large images take about twice the time.",
    )
    decode_s: Positive = Field(20.0, description="Seconds that process may take.")
    decode_memory: int = Field(
        2_000_000_000, ge=200_000_000, description="Bytes of address space that process may take (not on Windows)."
    )

    @field_validator("hosts")
    @classmethod
    def _exact_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_exact_host(host) for host in hosts)

    @model_validator(mode="after")
    def _folders_are_meant(self) -> Self:
        if (self.files == "folders") != bool(self.folders):
            raise ValueError("files='folders' and a list of folders belong together")
        return self

    @classmethod
    def local(cls, **changes: Any) -> ImagePolicy:
        """Pillow images, bytes, data URIs and any readable file; no downloads."""
        return cls(**{"files": "any", **changes})

    @classmethod
    def untrusted(cls, **changes: Any) -> ImagePolicy:
        """Pillow images, bytes and data URIs; files and downloads only from where the caller allows."""
        if "files" not in changes and changes.get("folders"):
            changes["files"] = "folders"
        return cls(**changes)

    @classmethod
    def server(cls, **changes: Any) -> ImagePolicy:
        """``untrusted()``, and what is sent is decoded in a process of its own."""
        return cls.untrusted(**{"isolate": True, **changes})


def _exact_host(text: str) -> str:
    """An entry of ``hosts`` in lower case; refuses what could be read in two ways."""
    host, port = text.lower() if text.isascii() else text, None
    if match := re.fullmatch(r"(.*[^:]):([0-9]{1,5})|(\[.*\]):([0-9]{1,5})", host):
        host, port = match[1] or match[3], int(match[2] or match[4])
    name = re.fullmatch(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", host)
    number = re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", host.rpartition(".")[2])
    if name is None or number:
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ipaddress.ip_address(bare.replace("%", "?"))  # no zones
        except ValueError:
            raise ValueError("must be host names, without scheme, path, wildcard or trailing dot") from None
        host = f"[{address}]" if address.version == 6 else str(address)
    if port is not None and not 0 < port < 65536:
        raise ValueError("the port must be 1 to 65535")
    return host if port is None else f"{host}:{port}"
