"""How often the host waits for the device: never inside a pass, once for a token of all rows, rarely in a round.

Torch's meta device plays the accelerator. Its tensors have no numbers, so whatever reads one (``item``, ``tolist``,
``bool``, ``nonzero``, a mask as an index) raises, and whatever is brought to the CPU goes through one operation, which
is counted and answered with numbers of the test's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from pictures import draw_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_tool.method.asking import Asking
from latent_tool.method.reward import Logits
from latent_tool.method.search import Outcome, search
from latent_tool.models.loading import ModelSpec, load
from latent_tool.models.prefix import Prefix, Stems
from latent_tool.models.requests import Decode, Sample, Score, TokenLogProbabilities
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.settings import Budget, GenerationSettings, SamplingSettings, SearchSettings

META = torch.device("meta")
WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class Transfers(TorchDispatchMode):
    """Counts what comes from the device, and gives it numbers."""

    def __init__(self, numbers: Callable[[torch.Size], Tensor]) -> None:
        super().__init__()
        self.numbers = numbers
        self.sizes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(function).split(".")[1]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(each.device == META for each in tensors):
            assert name not in WAITS, name
            # A mask as an index: how many there are must be known.
            assert name != "index" or all(each.dtype != torch.bool for each in tensors[1:]), name
        if name in ("_to_copy", "copy_", "to"):  # without inference mode, and with it
            devices = [each for each in (*args, kwargs.get("device")) if isinstance(each, torch.device)]
            source = tensors[-1]
            target = tensors[0].device if len(tensors) == 2 else next(iter(devices), source.device)
            if source.device == META and target.type == "cpu":
                self.sizes.append(source.shape)
                return self.numbers(source.shape).to(kwargs.get("dtype") or source.dtype)
        return function(*args, **kwargs)


# ---------------------------------------------------------------------- a round of the search


class Far:
    """A model whose logits and attention are on the device."""

    def __init__(self, brings_attention: bool) -> None:
        self.brings_attention = brings_attention

    async def logits(
        self,
        latents: Tensor,
        patches: tuple[tuple[int, ...], ...],
        *,
        answer_only: bool = False,
        attention: bool = False,
    ) -> Logits:
        count, length, _ = latents.shape
        assert latents.device == META
        read = torch.empty(1, length, 10, device=META) if attention and self.brings_attention else None
        return Logits(torch.empty(count, length, 50, device=META), torch.empty(count, 50, device=META), read)

    async def attention(self, latents: Tensor, patches: tuple[int, ...]) -> Tensor:
        return torch.empty(len(latents), 10, device=META)


def searched(
    rounds: int, *, samples: int = 8, rises: bool = False, brings_attention: bool = True
) -> tuple[Outcome, int]:
    """A search of so many rounds and what it brought over, with rewards that fall, or rise now and then."""
    draw = random.Random(0)

    def numbers(shape: torch.Size) -> Tensor:
        return torch.tensor([draw.random() if rises else -draw.random() - len(told) for _ in range(shape.numel())])

    told: list[object] = []

    async def on_round(row: object) -> None:
        told.append(row)

    how = SearchSettings(samples=samples, patches_per_latent=2, variant={"scale": "absolute"}, sigma=0.3)
    budget = Budget(iterations=rounds, max_patches=6, patience=None)
    with Transfers(numbers) as transfers:
        asked = search(
            Far(brings_attention),
            torch.empty(4, 3, device=META),
            how,
            budget,
            generator=torch.Generator().manual_seed(0),
            on_round=on_round,
        )
        outcome = Asking(asked).outcome()
    assert len(outcome.rounds) == rounds + 1
    return outcome, len(transfers.sizes)


@pytest.mark.parametrize("samples", [4, 16])
def test_a_round_brings_its_rewards_over_once_and_once_for_every_walk(samples: int) -> None:
    """The samples, the updated state, its attention and how far it moved in one transfer; the proposals in another."""
    _, none = searched(0, samples=samples)
    assert none == 1
    for rounds in (1, 5):
        _, count = searched(rounds, samples=samples)
        assert count <= 1 + 2 * rounds
    _, count = searched(5, samples=samples, brings_attention=False)
    assert count <= 1 + 3 * 5


def test_only_accepted_cells_cost_another_transfer() -> None:
    outcome, count = searched(5, rises=True)
    accepted = sum(len(row.accepted) > 0 for row in outcome.rounds) and sum(len(row.accepted) for row in outcome.rounds)
    assert accepted
    assert count <= 1 + 2 * 5 + accepted


# ---------------------------------------------------------------------- passes of a model


@pytest.fixture(scope="module")
def far() -> Iterator[tuple[VisionLanguageModel, Prefix]]:
    """The embedded model and a prefix, moved to the device once everything was found out."""
    vlm = load(ModelSpec())
    prefix = vlm.prefill(vlm.prepare([draw_shapes()], "what is left of the square?"))
    assert vlm.shares_prefixes(prefix)
    vlm.model.to(META)
    for layer in prefix.cache.layers:
        layer.keys, layer.values = layer.keys.to(META), layer.values.to(META)
    yield (
        vlm,
        replace(
            prefix,
            features=prefix.features.to(META),
            last_logits=prefix.last_logits.to(META),
            positions=None if prefix.positions is None else prefix.positions.to(META),
            columns=prefix.columns.to(META),
            stems=Stems(),
        ),
    )


@contextmanager
def counted(token: int = 20) -> Iterator[Transfers]:
    """Transfers whose every number is that of a token which ends nothing."""
    with torch.inference_mode(), Transfers(lambda shape: torch.full(shape, float(token))) as transfers:
        yield transfers


def test_no_transfer_inside_a_pass(far: tuple[VisionLanguageModel, Prefix]) -> None:
    vlm, prefix = far
    latents = torch.empty(3, 4, prefix.features.shape[1], device=META)
    with counted() as transfers:
        for cells in ([(), (1, 2), (3,)], [(3,), (3, 1), (3, 2)], [(3, 1)] * 3):
            vlm.score_many([Score(prefix, latents, cells, attended=3)] * 2)
            vlm.attend(prefix, latents[0], cells[0])
    assert not transfers.sizes


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.2}], ids=["plain", "logits processors"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_token_of_all_rows_is_one_transfer_of_three_numbers_each(
    far: tuple[VisionLanguageModel, Prefix], rows: int, rules: dict[str, Any], sampled: bool
) -> None:
    vlm, prefix = far
    generation, tokens = GenerationSettings(**rules), 5
    latents = torch.empty(4, prefix.features.shape[1], device=META)
    with counted() as transfers:
        if sampled:
            sampling = SamplingSettings(samples=rows, temperature=0.7, top_p=0.9)
            (found,) = vlm.sample_many([Sample(prefix, tokens, sampling, generation=generation)])
        else:
            asked = [Decode(prefix, latents, (2,), tokens, generation=generation, floor=0.5) for _ in range(rows)]
            found = vlm.decode_many(asked)  # type: ignore[assignment]
    assert isinstance(found, list) and all(each.tokens == (20,) * tokens for each in found)
    assert transfers.sizes == [torch.Size([3 * rows])] * tokens


def test_teacher_forcing_brings_over_one_number_a_token(far: tuple[VisionLanguageModel, Prefix]) -> None:
    vlm, prefix = far
    latents = torch.empty(4, prefix.features.shape[1], device=META)
    asked = [TokenLogProbabilities(prefix, latents, (1,), tokens) for tokens in ([5, 6, 7], [8], [9, 10])]
    with counted() as transfers:
        vlm.token_log_probabilities_many(asked)
    assert transfers.sizes == [torch.Size([6])]


def test_a_look_at_a_number_is_found_out() -> None:
    """The checks have teeth: whatever waits for a number of the device fails or is counted."""
    rewards = torch.empty(8, device=META)
    with counted() as transfers:
        for look in (
            lambda: float(rewards[0]),
            lambda: bool(rewards[0]),
            rewards.nonzero,
            lambda: rewards[rewards > 0],
        ):
            with pytest.raises(AssertionError):
                look()
        for row in rewards:
            row.cpu()
        rewards.tolist()
    assert len(transfers.sizes) == 9
