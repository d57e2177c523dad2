"""Passes in few fixed shapes over buffers that are reused, compiled once a shape, and replayed as CUDA graphs on a GPU.

A pass over rows behind shared prefixes is padded up to buckets: rows, prefixes, tokens of a pass, columns after the
prefix and columns of the prefix. What is padded is masked, so that a pass equals the plain one (``SharedRows``) up to
rounding. Every shape is compared with the plain pass when it is first run; one that differs, or that cannot be
compiled, ends the compilation for this model, and the plain pass goes on.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from latent_tool.errors import SettingsError
from latent_tool.models.decoder import Decoder
from latent_tool.models.shared_prefix import Block, SharedRows, attending, over_prefix

__all__ = ["Compile", "Grid", "Pass", "Shape", "StaticPasses", "SuffixBuffers", "as_compile", "bucket", "prefix_bucket"]

Compile = Literal["auto"] | bool

# Shapes that are compiled for one model at most: each takes seconds to minutes, and memory for what it was compiled to.
MOST_SHAPES = 32
PREFIXES = (1, 2, 4, 8)
ROWS = (1, 4, 8, 16, 32, 64)  # of a prefix
LENGTHS = (1, 16, 32, 64, 128, 256)  # tokens of one pass
COLUMNS = tuple(64 << power for power in range(10))  # after the prefix
KEPT = (1, *LENGTHS[1:])  # positions whose logits are computed
# Attention scores to the prefix that one layer of a pass holds at most: with more, launching is not what takes time.
_MOST_SCORES = 2**26
# What all buffers may take: so much, or on a GPU a share of its memory.
_MOST_BYTES = 2**31
_SHARE = 1 / 8
# Runs of a shape that are compared with the plain pass: on a GPU the first two come before the graph is replayed.
_COMPARED = {"cuda": 3}

_log = logging.getLogger(__name__)


def as_compile(value: object) -> Compile:
    """Return what the setting ``compile`` means. Raises ``SettingsError`` for what it does not know."""
    known: dict[object, Compile] = {"auto": "auto", "on": True, "off": False, True: True, False: False}
    if not isinstance(value, str | bool) or value not in known:
        raise SettingsError(f"compile is {str(value)[:40]!r}.", "Use 'auto', True or False ('on' or 'off').")
    return known[value]


def bucket(count: int, sizes: Sequence[int]) -> int | None:
    """Return the smallest of the sizes that holds a count; ``None``: none does."""
    return next((size for size in sizes if count <= size), None)


def prefix_bucket(length: int) -> int:
    """Return the columns of a prefix's buffer: at most a quarter more than the prefix has, or 256."""
    step = max(256, (1 << (length - 1).bit_length() - 1) // 4) if length > 1 else 256
    return -(-length // step) * step


@dataclass(frozen=True)
class Shape:
    """What a pass is compiled for, after padding.

    ``prefixes``: in one pass; ``rows``: of each; ``prefix`` and ``suffix``: columns of their buffers; ``length``:
    tokens a row; ``kept``: positions with logits; ``tap``: positions whose attention is read, counted from the end.
    """

    prefixes: int
    rows: int
    prefix: int
    suffix: int
    length: int
    kept: int
    tap: tuple[int, int | None] | None = None

    @property
    def places(self) -> int:
        """Rows of the whole pass."""
        return self.prefixes * self.rows


@dataclass(frozen=True)
class Grid:
    """Where rows stand in a pass: ``rows`` places for each of ``prefixes``; ``caches``: those of the prefixes."""

    prefixes: int
    rows: int
    caches: tuple[DynamicCache, ...]

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> tuple[Grid, list[int]] | None:
        """Return the grid for rows, and the place of every row; ``None``: they are too many."""
        prefixes = bucket(len(blocks), PREFIXES)
        rows = bucket(max(block.stop - block.start for block in blocks), ROWS)
        if prefixes is None or rows is None:
            return None
        places = [at * rows + row for at, block in enumerate(blocks) for row in range(block.stop - block.start)]
        return cls(prefixes, rows, tuple(block.prefix.cache for block in blocks)), places


def _buffer(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of zeros that stays where it is."""
    buffer = torch.zeros(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    if like.device.type == "cuda":
        torch._dynamo.mark_static_address(buffer, guard=False)
    return buffer


class _Layer:
    """Keys and values of one layer, ``(R, Hkv, columns, D)``."""

    def __init__(self, rows: int, columns: int, like: DynamicLayer) -> None:
        self.keys, self.values = (
            _buffer((rows, each.shape[1], columns, each.shape[3]), each) for each in (like.keys, like.values)
        )


class _Stored:
    """Room for one prefix in every layer, and which one is there; a ``Block`` reads it like a prefix."""

    def __init__(self, room: int, like: DynamicCache) -> None:
        self.layers = [_Layer(1, room, layer) for layer in like.layers]
        self.count = _buffer((), like.layers[0].keys, torch.long).fill_(room)
        self._held: weakref.ref[DynamicCache] | None = None

    @property
    def cache(self) -> _Stored:
        """What holds the layers."""
        return self

    def hold(self, cache: DynamicCache) -> None:
        """Copy a prefix to here, if it is not here already."""
        if self._held is not None and self._held() is cache:
            return
        self._held = None
        length = cache.layers[0].keys.shape[2]
        for own, layer in zip(self.layers, cache.layers, strict=True):
            for buffer, states in ((own.keys, layer.keys), (own.values, layer.values)):
                buffer[:, :, :length] = states
                buffer[:, :, length:] = 0  # whatever stood there: a masked NaN is still one
        self.count.fill_(length)
        self._held = weakref.ref(cache)


class SuffixBuffers:
    """Room for what follows the prefixes of a grid's rows, and the rows whose keys and values are there."""

    def __init__(self, places: int, columns: int, like: DynamicCache) -> None:
        self.columns = columns
        self.layers = [_Layer(places, columns, layer) for layer in like.layers]
        self.every = [each for layer in self.layers for each in (layer.keys, layer.values)]
        self._owner: weakref.ref[Any] | None = None

    @property
    def owner(self) -> Any:
        """The rows that are here, if they are still in use."""
        return None if self._owner is None else self._owner()

    def give(self, owner: Any) -> None:
        """Note whose keys and values are here now."""
        self._owner = None if owner is None else weakref.ref(owner)


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of ``SuffixBuffers`` as the model sees it: new keys and values are written into columns of it."""

    def __init__(self, layer: _Layer, prefix: int, columns: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self._prefix, self._columns = prefix, columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._columns, key_states)
        self.values.index_copy_(2, self._columns, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._prefix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._prefix + query_length, 0


class Pass(SharedRows):
    """The pass of one shape: its inputs and buffers, always the same, and the function that was compiled for them.

    It stands where rows stand in attention; which tokens and columns there are, it reads from tensors.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: Shape,
        stored: Sequence[_Stored],
        suffix: SuffixBuffers,
        axes: Sequence[int],
        compiled: Callable[[Callable[[Pass], Any]], Callable[[Pass], Any]],
    ) -> None:
        self.decoder, self.shape, self.suffix = decoder, shape, suffix
        self.stored = list(stored)
        self.blocks = [
            Block(at * shape.rows, (at + 1) * shape.rows, each)  # type: ignore[arg-type]
            for at, each in enumerate(stored)
        ]
        tap = None if shape.tap is None else slice(*shape.tap)
        self.taps = {} if tap is None else dict.fromkeys(range(shape.places), tap)
        self._tapped: dict[int, list[Tensor]] = {}
        self._masks: dict[Any, Tensor] = {}
        self._over_prefix = [over_prefix(layer) for layer in stored[0].layers]
        like = stored[0].layers[0].keys
        self.embeddings = _buffer((shape.places, shape.length, decoder.width), like, decoder.dtype)
        self.positions = _buffer((*axes, shape.places, shape.length), like, torch.long)
        self.kept = _buffer((shape.kept,), like, torch.long)
        self.columns = _buffer((shape.length,), like, torch.long)
        # Which token after the prefix stands in a column, and which ones are run; -1: none, or padding.
        self.standing = _buffer((shape.places, shape.suffix), like, torch.long)
        self.running = _buffer((shape.places, shape.length), like, torch.long)
        self.cache = DynamicCache()
        self.cache.layers = [_FixedLayer(layer, shape.prefix, self.columns) for layer in suffix.layers]
        # A code object of its own: what is compiled for another shape is not looked through, and not counted here.
        own = FunctionType(_forward.__code__.replace(), _forward.__globals__, _forward.__name__)
        self._function = compiled(own)
        self._kept: tuple[int, ...] = ()
        self.unproven = _COMPARED.get(like.device.type, 1)  # runs that are still to be compared

    def fill(
        self, at: Tensor, embeddings: Tensor, positions: Tensor, kept: Sequence[int], standing: Tensor, length: int
    ) -> None:
        """Write what is run into the inputs.

        Args:
            at: ``(R,)``, where rows stand among the places of the pass.
            embeddings: ``(R, S, d)``, padded.
            positions: position ids ``(..., R, S)``.
            kept: ``K`` positions with logits.
            standing: ``(R, T)``, which tokens stand in the columns in use, those of this pass last.
            length: columns that are new.
        """
        used = standing.shape[1]
        self.embeddings.zero_().index_copy_(0, at, embeddings.to(self.embeddings.dtype))
        self.positions.zero_().index_copy_(self.positions.dim() - 2, at, positions)
        if self._kept != tuple(kept):  # mostly the last one: nothing to bring to the device
            self._kept = tuple(kept)
            self.kept.copy_(torch.tensor(self._kept))
        torch.arange(used - length, used, out=self.columns)
        self.standing.fill_(-1)
        self.standing[:, :used].index_copy_(0, at, standing)
        self.running.copy_(self.standing[:, used - length : used])

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Return logits ``(places, K, vocabulary)``, and the attention ``(places, L, P)`` if it is read."""
        with attending(self):
            logits, attention = self._function(self)
        if logits.shape[:2] != (self.shape.places, self.shape.kept):
            raise RuntimeError("the model computes its logits somewhere else")
        return logits, attention

    # ------------------------------------------------------------------ what attention asks of rows

    def _tap(self, row: int, probabilities: Tensor) -> None:
        self._tapped.setdefault(row, []).append(probabilities.mean(0))

    def _suffix_mask(
        self, length: int, window: int | None, shared: int, queries: int, device: torch.device
    ) -> Tensor | None:
        window = self._within(window)
        key = window, shared, queries
        found = self._masks.get(key)
        if found is None:
            column, row = self.standing[:, None, :], self.running[:, :, None]
            seen = (column <= row) & (column >= 0)
            if window is not None:
                seen = seen & (row - column < window)
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, float("-inf"))
            bias = bias[:, None, None].expand(-1, shared, queries // length, -1, -1)
            found = self._masks[key] = bias.reshape(-1, queries, seen.shape[-1])
        return found

    def _out_of_window(
        self, block: Block, prefix: int, length: int, window: int | None, queries: int, device: torch.device
    ) -> Tensor | None:
        window = self._within(window)
        if window is None:
            return None
        key = block.start, window, queries
        found = self._masks.get(key)
        if found is None:
            place = self._columns_in_use(block) + self.running[block.start : block.stop].clamp_min(0)
            hidden = place[..., None] - torch.arange(prefix, device=place.device) >= window
            groups = queries // (place.shape[0] * place.shape[1])
            found = hidden[:, None].expand(-1, groups, -1, -1).reshape(queries, prefix)
            self._masks[key] = found
        return found

    def _columns_in_use(self, block: Block) -> Tensor:
        return self.stored[block.start // self.shape.rows].count

    def _within(self, window: int | None) -> int | None:
        """A sliding window, if anything can stand outside it."""
        return None if window is None or window >= self.shape.prefix + self.shape.suffix else window


def _forward(fixed: Pass) -> tuple[Tensor, Tensor | None]:
    """The whole of a pass, as it is compiled."""
    decoder = fixed.decoder
    output = decoder.model(
        inputs_embeds=fixed.embeddings,
        **{decoder.cache_name: fixed.cache},
        position_ids=fixed.positions,
        use_cache=True,
        logits_to_keep=fixed.kept,
    )
    attention = None
    if fixed.taps:
        attention = torch.stack([torch.stack(fixed._tapped[row]).mean(0) for row in fixed.taps])
    fixed._masks.clear()
    fixed._tapped.clear()
    return output.logits, attention


class StaticPasses:
    """The compiled passes of one model, and the buffers they run over.

    Args:
        decoder: the model's decoder.
        backend: of ``torch.compile``; by default inductor, with CUDA graphs on a GPU.
        most: shapes at most; with others the plain pass runs.
    """

    def __init__(self, decoder: Decoder, backend: Any = None, most: int = MOST_SHAPES) -> None:
        self.decoder, self.backend, self.most = decoder, backend, most
        self.passes: dict[Shape, Pass] = {}
        self.failure: str | None = None
        self._stored: dict[int, list[_Stored]] = {}
        self._suffixes: dict[tuple[int, int], SuffixBuffers] = {}
        self._full = False
        heads = getattr(decoder.model.config.get_text_config(), "num_attention_heads", None)
        self._heads = max(heads) if isinstance(heads, list | tuple) else heads or 1
        device = decoder.device
        on_gpu = device.type == "cuda" and torch.cuda.is_available()
        self._room = int(torch.cuda.mem_get_info(device)[1] * _SHARE) if on_gpu else _MOST_BYTES
        # CUDA graphs are kept by thread, so all of them run in one.
        self._thread: ThreadPoolExecutor | None = None

    @classmethod
    def wanted(cls, decoder: Decoder, compile: Compile) -> StaticPasses | None:
        """Return a model's passes, or ``None``: ``"auto"`` compiles on CUDA alone, nothing does on several devices."""
        several = len(set((getattr(decoder.model, "hf_device_map", None) or {}).values())) > 1
        if several or not (decoder.device.type == "cuda" if compile == "auto" else compile):
            return None
        return cls(decoder)

    def fits(self, shape: Shape, cache: DynamicCache) -> bool:
        """Tell whether a shape is worth a pass of its own, and the model's layers are where and how it needs them."""
        if self.failure is not None or self._heads * shape.places * shape.length * shape.prefix > _MOST_SCORES:
            return False
        device = self.decoder.device
        if any(each.device != device for layer in cache.layers for each in (layer.keys, layer.values)):
            return False
        if shape in self.passes:
            return True
        if self._bytes_with(shape, cache) > self._room:
            return False
        if len(self.passes) >= self.most:
            if not self._full:
                self._full = True
                _log.warning(
                    "The model has run in %d shapes, which are all that are compiled; others run uncompiled.", self.most
                )
            return False
        return True

    def _bytes_with(self, shape: Shape, cache: DynamicCache) -> int:
        """What all buffers take once there are those of a shape, too."""
        tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        column = sum(each.shape[1] * each.shape[3] * each.element_size() for each in tensors)
        suffixes = {(places, columns) for places, columns in self._suffixes} | {(shape.places, shape.suffix)}
        stored = {prefix: len(each) for prefix, each in self._stored.items()}
        stored[shape.prefix] = max(stored.get(shape.prefix, 0), shape.prefixes)
        columns = sum(places * each for places, each in suffixes) + sum(room * each for room, each in stored.items())
        return int(column * columns)

    def at(self, shape: Shape, grid: Grid, axes: Sequence[int]) -> Pass:
        """Return the pass of a shape, with the prefixes of a grid in its buffers.

        ``axes``: sizes of position ids before ``(R, S)``.
        """
        stored = self._stored.setdefault(shape.prefix, [])
        while len(stored) < shape.prefixes:
            stored.append(_Stored(shape.prefix, grid.caches[0]))
        found = self.passes.get(shape)
        if found is None:
            if not self.passes:
                _log.warning(
                    "Compiling the model's passes: the first questions take longer, by up to minutes. "
                    "compile=False leaves it out."
                )
            _log.info("Compiling %s.", shape)
            suffix = self.suffix(shape.places, shape.suffix, grid.caches[0])
            found = Pass(self.decoder, shape, stored[: shape.prefixes], suffix, axes, self._compiled)
            self.passes[shape] = found
        for each, cache in zip(stored, grid.caches, strict=False):
            each.hold(cache)
        return found

    def suffix(self, places: int, columns: int, like: DynamicCache) -> SuffixBuffers:
        """Return the buffers for so many rows and columns."""
        found = self._suffixes.get((places, columns))
        if found is None:
            found = self._suffixes[places, columns] = SuffixBuffers(places, columns, like)
        return found

    def _compiled(self, function: Callable[[Pass], Any]) -> Callable[[Pass], Any]:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if self.backend is not None:
            options["backend"] = self.backend
        elif self.decoder.device.type == "cuda":
            options["mode"] = "reduce-overhead"
        compiled: Callable[[Pass], Any] = torch.compile(function, **options)
        return compiled

    def run(self, fixed: Pass, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run a pass; logits ``(R, K, vocabulary)`` and attention ``(R, L, P)`` of the rows at some places."""
        device = self.decoder.device

        def run() -> tuple[Tensor, Tensor | None]:
            logits, attention = fixed.run()
            # Copies: the next pass writes over what this one returned.
            return logits[at], None if attention is None else attention[at]

        if device.type != "cuda":
            return run()
        stream = torch.cuda.current_stream(device)

        def run_there() -> tuple[Tensor, Tensor | None]:
            with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(stream):
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                return run()

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "latent-tool-compiled")
        running = self._thread.submit(run_there)
        try:
            return running.result()
        except BaseException:
            wait([running])  # whoever interrupts must not find the buffers in use
            raise

    def give_up(self, why: str) -> None:
        """Compile nothing from now on, let the buffers go, and say so once."""
        if self.failure is None:
            self.failure = why
            _log.warning(
                "The model's passes are not compiled any more, and run as without it (%s). "
                "compile=False leaves the attempt out.",
                why,
            )
        self._let_go()

    def make_room(self, why: str) -> None:
        """Let the buffers go after memory ran out, and take half as much from now on; give up where that is little."""
        self._room //= 2
        if self._room < _MOST_BYTES * _SHARE:
            self.give_up(why)
        self._let_go()

    def _let_go(self) -> None:
        self.passes.clear()
        self._stored.clear()
        self._suffixes.clear()
