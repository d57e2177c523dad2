"""The checks, in the order in which they are made: each looks at one thing and says in a line what it found.

A check is ``ok``, ``off`` (something is not available here, and what is said holds without it) or ``failed`` (an answer
cannot be relied on). Its remedy says what to do about it. This module knows models and the engine; it prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_tool.checkup.naive import naive_logits, on_device
from latent_tool.checkup.pixels import features, hit_rate
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job
from latent_tool.errors import LatentToolError
from latent_tool.models.prefix import Inputs, Prefix
from latent_tool.models.prefix_attention import PrefixAttention
from latent_tool.models.quantization import stored_bytes
from latent_tool.models.shared_prefix import over_prefix
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.settings import Budget

__all__ = ["CHECKS", "Found", "Patient"]

QUESTION = "What is in this picture?"
_LATENTS, _TOKENS, _STATES = 3, 8, 8
_ENOUGH_HITS = 0.9


@dataclass(frozen=True)
class Found:
    """What a check found: its verdict, a line for people, what to do, and the figures it rests on."""

    status: Literal["ok", "off", "failed"]
    said: str
    remedy: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


class Patient:
    """A loaded model, and what several checks need of it, made when it is first asked for.

    Args:
        vlm: the model, which is left as it was.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self.vlm = vlm

    @cached_property
    def picture(self) -> Image.Image:
        """A picture of smooth colours, wider than high."""
        coarse = np.random.default_rng(0).integers(0, 256, (10, 15, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)

    @cached_property
    def other(self) -> Image.Image:
        """Another picture of the same size."""
        return Image.fromarray(255 - np.asarray(self.picture))

    @cached_property
    def inputs(self) -> Inputs:
        """A question about the picture."""
        return self.vlm.prepare([self.picture], QUESTION)

    @cached_property
    def prefix(self) -> Prefix:
        """Its prefix, computed whole."""
        return self.vlm.prefill(self.inputs, cached=False)

    @cached_property
    def latents(self) -> Tensor:
        """Drawn latents ``(2, L, d)`` of the size of the model's embeddings."""
        width = self.vlm.embed([0]).shape[1]
        noise = torch.randn(2, _LATENTS, width, generator=torch.Generator().manual_seed(1))
        return (noise * self.vlm.embedding_rms()).to(self.vlm.device)

    @property
    def cells(self) -> tuple[int, ...]:
        """Two cells to inject."""
        last = len(self.inputs.cells) - 1
        return (last, min(1, last))

    def tolerance(self, logits: Tensor) -> float:
        """Tell how far logits may be apart that were computed in another order."""
        return (1e-3 if self.vlm.dtype == torch.float32 else 5e-2) * max(1.0, float(logits.abs().max()))

    def finish(self) -> None:
        """Wait until the device has done what it was asked."""
        if self.vlm.device.type == "cuda":
            torch.cuda.synchronize(self.vlm.device)

    def milliseconds(self, work: Callable[[], object], times: int = 3) -> float:
        """Return the median time of some work, after a first time that does not count."""
        work()
        taken = []
        for _ in range(times):
            self.finish()
            began = time.perf_counter()
            work()
            self.finish()
            taken.append(time.perf_counter() - began)
        return 1000 * median(taken)


def check_device(patient: Patient) -> Found:
    """Tell where the model is, and in which type."""
    vlm = patient.vlm
    quantization = getattr(vlm.model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None) if quantization is not None else None
    said = f"{vlm.device}, {str(vlm.dtype).removeprefix('torch.')}, "
    said += "not quantized" if method is None else f"quantized ({getattr(method, 'value', method)})"
    if vlm.device.type == "cpu" and torch.cuda.is_available():
        return Found("off", f"{said}; torch sees a GPU", "Load it with --device cuda.")
    if vlm.device.type == "cpu" and vlm.dtype != torch.float32 and method is None:
        return Found("off", said, "On most CPUs --dtype float32 is faster, at twice the memory.")
    return Found("ok", said)


def check_template(patient: Patient) -> Found:
    """Check whether the prompt keeps the picture, and the model sees it."""
    vlm, inputs = patient.vlm, patient.inputs
    other = vlm.prepare([patient.other], QUESTION)
    seen = features(vlm, inputs)
    if len(other.cells) != len(inputs.cells):
        return Found("failed", "two pictures of one size get different numbers of cells", _CHECKPOINT)
    change = float((features(vlm, other) - seen).norm(dim=-1).max())
    said = f"{len(inputs.cells)} image cells of {inputs.length} prompt tokens"
    if not change > 1e-4:
        return Found("failed", f"{said}, but another picture looks the same", _CHECKPOINT)
    moved = float((vlm.prefill(other, cached=False).last_logits - patient.prefix.last_logits).abs().max())
    if not moved > 0:
        return Found("failed", f"{said}, but another picture changes no logits", _CHECKPOINT)
    return Found("ok", said, figures={"cells": len(inputs.cells), "prompt_tokens": inputs.length})


def check_prefix(patient: Patient) -> Found:
    """Check whether continuing from the cache equals one forward pass over everything."""
    vlm, most, allowed = patient.vlm, 0.0, 0.0
    states: list[tuple[int, ...]] = [(), patient.cells]
    for latents, cells in zip(patient.latents, states, strict=True):
        expected = naive_logits(vlm, patient.inputs, latents, cells)
        found = vlm.score(patient.prefix, latents[None], [cells]).answer[0].float()
        most = max(most, float((found - expected).abs().max()))
        allowed = max(allowed, patient.tolerance(expected))
    said = f"off by {most:.1e} at most (allowed {allowed:.1e})"
    if not most <= allowed:
        return Found("failed", said, "Use another --dtype, or report the model: its answers would be wrong.")
    return Found("ok", said, figures={"difference": most, "allowed": allowed})


def check_sharing(patient: Patient) -> Found:
    """Check whether candidates share the prefix without copying it, exactly."""
    vlm = patient.vlm
    if not vlm.shares_prefixes(patient.prefix):
        return Found(
            "off", "every candidate has a copy of the prefix", "Nothing is wrong; take fewer samples for memory."
        )
    cells: list[tuple[int, ...]] = [(), patient.cells]
    shared = vlm.score(patient.prefix, patient.latents, cells).answer.float()
    alone = torch.cat(
        [vlm.score(patient.prefix, patient.latents[row : row + 1], cells[row : row + 1]).answer for row in (0, 1)]
    ).float()
    most = float((shared - alone).abs().max())
    said = f"two candidates together and alone are off by {most:.1e}"
    if not most <= patient.tolerance(alone):
        return Found("failed", said, "Report the model: its answers would depend on the batch.")
    return Found("ok", said, figures={"difference": most})


def check_prefix_attention(patient: Patient) -> Found:
    """Tell how attention over the shared prefix is computed, and compare it with the formula written out."""
    says = "attention over the shared prefix: "
    if not patient.vlm.shares_prefixes(patient.prefix):
        return Found("off", f"{says}none is shared, every candidate uses the model's own", "Nothing to do.")
    layer = patient.prefix.cache.layers[0]
    attention, keys = over_prefix(layer), layer.keys[0]
    config = patient.vlm.model.config.get_text_config()
    if attention.kernel is not None and getattr(config, "attn_logit_softcapping", None) is not None:
        return Found("off", f"{says}written out (the model caps its scores softly)", "Nothing to do.")
    said = f"{says}{attention.way} in {str(keys.dtype).removeprefix('torch.')} ({attention.reason})"
    if attention.kernel is None:
        return Found("off", said, "On a GPU, --dtype bfloat16 may have a faster one; a newer torch, too.")
    queries = _STATES * _LATENTS * max(1, config.num_attention_heads // keys.shape[0])
    difference, ratio = _against_written_out(patient, attention, keys, layer.values[0], queries)
    figures = {"difference": difference, "ratio": ratio, "queries": queries, "prefix_tokens": keys.shape[1]}
    if not difference <= (1e-4 if keys.dtype == torch.float32 else 2e-2):
        return Found("failed", f"{said}, but off by {difference:.1e}", "Use another --dtype, or report it.", figures)
    if not attention.hides and getattr(config, "sliding_window", None) is not None:
        said += ", written out in layers with a window"
    return Found("ok", f"{said}; here {ratio:.2g} times as fast as written out", figures=figures)


@torch.inference_mode()
def _against_written_out(
    patient: Patient, attention: PrefixAttention, keys: Tensor, values: Tensor, queries: int
) -> tuple[float, float]:
    """How far a kernel is off, as a share of the largest number, and how many times as fast it is.

    Keys play the queries: they are as wide, and of the model.
    """
    query = keys.repeat(1, -(-queries // keys.shape[1]), 1)[:, :queries]
    given = query, keys, values, keys.shape[-1] ** -0.5
    (out, lse), (expected, expected_lse) = attention(*given), attention.written_out(*given)
    difference = max(
        float((out.float() - expected).abs().max() / values.abs().max().float()),
        float((lse - expected_lse).abs().max() / expected_lse.abs().max().clamp_min(1.0)),
    )
    fused = patient.milliseconds(lambda: attention(*given), 5)
    return difference, patient.milliseconds(lambda: attention.written_out(*given), 5) / fused


def check_compiled(patient: Patient) -> Found:
    """Check whether passes run compiled, where that was asked for, and equal those that are not."""
    vlm = patient.vlm
    if vlm.static is None:
        why = "not compiled (compile is off, or auto and not on CUDA)"
        return Found("off", why, "Nothing is wrong; --compile on where many questions are asked of one model.")
    if not vlm.shares_prefixes(patient.prefix):
        return Found("off", "not compiled: every candidate has a copy of the prefix", "Nothing is wrong.")
    began = time.perf_counter()
    vlm.score(patient.prefix, patient.latents, [(), patient.cells])
    taken = time.perf_counter() - began
    if vlm.static.failure is not None:
        return Found("off", f"not compiled: {vlm.static.failure}", "Use --compile off, or install what is missing.")
    # Each is compared with the plain pass when it first runs.
    shapes = len(vlm.static.passes)
    said = f"compiled, {shapes} of at most {vlm.static.most} shapes; the first step took {taken:.1f} s"
    return Found("ok", said, figures={"shapes": shapes, "seconds": taken})


def check_decoding(patient: Patient) -> Found:
    """Check whether greedy decoding gives what the model's own ``generate`` gives."""
    vlm, inputs = patient.vlm, patient.inputs
    with torch.inference_mode():
        written = vlm.model.generate(**on_device(vlm, inputs), do_sample=False, num_beams=1, max_new_tokens=_TOKENS)
    expected = tuple(written[0, inputs.length :].tolist())
    found = vlm.decode(patient.prefix, None, (), _TOKENS).tokens
    if found == expected:
        return Found("ok", f"{len(found)} tokens, the same as generate()")
    place = next((at for at, (one, two) in enumerate(zip(found, expected, strict=False)) if one != two), None)
    if place is not None:
        chances = [
            float(vlm.token_log_probabilities(patient.prefix, None, (), [*found[:place], token])[-1])
            for token in (found[place], expected[place])
        ]
        if abs(chances[0] - chances[1]) <= 2 * patient.tolerance(patient.prefix.last_logits.float()):
            return Found("ok", f"the same as generate() up to token {place + 1}, where two are equally probable")
    return Found("failed", "other tokens than generate() gives", "Check generation_config.json, or report the model.")


def check_boxes(patient: Patient) -> Found:
    """Check whether a cell's box is where its pixels are, found by changing them."""
    hits, looked = hit_rate(patient.vlm, patient.picture)
    if not looked:
        return Found(
            "off", "the geometry of this family is not known: patches have no boxes", "Answers are not affected."
        )
    said = f"{hits} of {looked} cells found by changing the pixels in their box"
    figures = {"hits": hits, "cells": looked}
    if hits < _ENOUGH_HITS * looked:
        return Found("failed", said, "Do not rely on boxes; check preprocessor_config.json, or report it.", figures)
    return Found("ok", said, figures=figures)


def check_latents(patient: Patient) -> Found:
    """Check whether latents and injected cells reach the logits."""
    vlm, cells = patient.vlm, [patient.cells] * 2
    logits = vlm.score(patient.prefix, patient.latents, cells).answer.float()
    without = vlm.score(patient.prefix, patient.latents[:1], [()]).answer[0].float()
    moved, injected = float((logits[0] - logits[1]).abs().max()), float((logits[0] - without).abs().max())
    said = f"other latents move the logits by {moved:.2g}, injected cells by {injected:.2g}"
    if not min(moved, injected) > 10 * torch.finfo(vlm.dtype).eps:
        return Found("failed", said, "The method has no effect on this model; use --latents 0.")
    return Found("ok", said, figures={"latents": moved, "cells": injected})


def check_attention(patient: Patient) -> Found:
    """Check whether the attention of the latents to the picture can be read."""
    try:
        read = patient.vlm.attend(patient.prefix, patient.latents[0], ())
    except LatentToolError as error:
        return Found("off", error.message, error.hint)
    share = float(read.sum(-1).mean())
    if not (bool(read.isfinite().all()) and 0 < share <= 1.001):
        return Found(
            "failed", f"attention to the picture sums to {share:.3g}", "Load it with attn_implementation='eager'."
        )
    return Found("ok", f"{share:.0%} of the latents' attention is on the picture", figures={"share": share})


def check_pictures(patient: Patient) -> Found:
    """Check whether one question may be about two pictures."""
    vlm = patient.vlm
    try:
        inputs = vlm.prepare([patient.picture, patient.other], "Which one is brighter?")
        vlm.prefill(inputs, cached=False)
    except LatentToolError as error:
        return Found("off", error.message, "Ask about one picture at a time.")
    shown = [sum(cell.image == index for cell in inputs.cells) for index in (0, 1)]
    if not min(shown):
        return Found("failed", "one of two pictures has no cells", "Ask about one picture at a time.")
    return Found("ok", f"two pictures: {shown[0]} and {shown[1]} cells")


def check_markers(patient: Patient) -> Found:
    """Check whether the model has marks around its thinking."""
    markers = patient.inputs.markers
    if not markers.closing:
        return Found("off", "no <think> marks: latents stand where the answer begins", "Nothing to do.")
    begun = "" if markers.opening else "; the template itself opens them"
    return Found("ok", f"latents stand between the model's thinking marks{begun}")


def check_reward(patient: Patient) -> Found:
    """Check whether the reward of a search can be had again from its state."""
    engine = Engine(patient.vlm)
    # Neither a sure plain answer nor a window may end the question before the search.
    search_alone = {"target_confidence": None, "max_views": 0}
    budget = Budget.level("quick").but(iterations=2, max_candidates=40, max_new_tokens=4, **search_alone)
    outcome = engine.answer(Job(images=(patient.picture,), question=QUESTION, budget=budget))
    if outcome.search is None:
        return Found("failed", "the search scored nothing", "Report it.")
    reported, again = outcome.search.best.reward, engine.rescore(outcome)
    difference = abs(reported - again)
    said = f"{reported:.4f}, scored again {again:.4f} ({outcome.usage.candidates} candidates)"
    if not difference <= (1e-4 if patient.vlm.dtype == torch.float32 else 5e-2):
        return Found("failed", said, "Use --dtype float32, or report the model.", {"difference": difference})
    return Found("ok", said, figures={"reward": reported, "difference": difference})


def check_memory(patient: Patient) -> Found:
    """Return what the model takes at rest, a prefix, and every candidate."""
    vlm = patient.vlm
    tensors = [*vlm.model.parameters(), *vlm.model.buffers()]
    rest = sum(map(stored_bytes, tensors))
    prefix = sum(
        each.numel() * each.element_size()
        for layer in patient.prefix.cache.layers
        for each in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(each, Tensor)
    )
    length = _LATENTS + len(patient.cells) + len(patient.inputs.markers.opening) + len(patient.inputs.markers.closing)
    length += len(patient.inputs.tail)
    candidate = prefix * length / patient.inputs.length
    if not vlm.shares_prefixes(patient.prefix):
        candidate += prefix
    how = "keys and values"
    if vlm.device.type == "cuda":
        candidate, how = _peak_of_candidate(patient), "at its peak"
    figures = {"model_bytes": rest, "prefix_bytes": prefix, "candidate_bytes": candidate}
    said = f"{_size(rest)} at rest, {_size(prefix)} for a question's prefix, {_size(candidate)} a candidate ({how})"
    return Found("ok", said, figures=figures)


def _peak_of_candidate(patient: Patient) -> float:
    """How much further each of several candidates drives the device's memory."""
    peaks = []
    for count in (1, 1 + _STATES):
        torch.cuda.reset_peak_memory_stats(patient.vlm.device)
        patient.vlm.score(patient.prefix, patient.latents[:1].expand(count, -1, -1), [patient.cells] * count)
        peaks.append(torch.cuda.max_memory_allocated(patient.vlm.device))
    return max(0.0, (peaks[1] - peaks[0]) / _STATES)


def check_speed(patient: Patient) -> Found:
    """Return what a step, a token and a look at a picture take."""
    vlm = patient.vlm
    rows = patient.latents[:1].expand(_STATES, -1, -1)
    step = patient.milliseconds(lambda: vlm.score(patient.prefix, rows, [()] * _STATES))
    written = 0

    def write() -> None:
        nonlocal written
        written = len(vlm.decode(patient.prefix, None, (), _TOKENS).tokens)

    token = patient.milliseconds(write) / max(written, 1)
    view = patient.milliseconds(lambda: vlm.prefill(vlm.prepare([patient.picture], "?"), cached=False), 2)
    said = f"{step:.3g} ms a step of {_STATES} candidates, {token:.3g} ms a token, {view:.3g} ms a view"
    return Found("ok", said, figures={"step_ms": step, "token_ms": token, "view_ms": view})


def _size(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


_CHECKPOINT = "Download the checkpoint again; its chat template or preprocessor_config.json is broken."

CHECKS: dict[str, Callable[[Patient], Found]] = {
    "device": check_device,
    "picture": check_template,
    "prefix cache": check_prefix,
    "shared prefix": check_sharing,
    "prefix attention": check_prefix_attention,
    "compiled passes": check_compiled,
    "decoding": check_decoding,
    "boxes": check_boxes,
    "latents": check_latents,
    "attention": check_attention,
    "several pictures": check_pictures,
    "thinking marks": check_markers,
    "reward": check_reward,
    "memory": check_memory,
    "speed": check_speed,
}
