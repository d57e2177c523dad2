"""The model as plain functions over packed rows: the same numbers as ``LlavaForConditionalGeneration``, faster.

A test compares the two. Shapes: ``B`` pictures, ``C`` cells (those of windows included), ``P`` prefix positions,
``T = R * L`` text positions in ``R`` rows of ``L``, ``d`` hidden size, ``h`` heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from training.checkpoint import USER
from training.packing import Batch

_MASKED = -1e4


def pixels_to_input(pixels: Tensor) -> Tensor:
    """``(B, s, s, 3)`` bytes -> ``(B, 3, s, s)`` floats from -1 to 1, as the image processor does."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def image_features(model: LlavaForConditionalGeneration, pixels: Tensor, views: Tensor | None = None) -> Tensor:
    """Projected cells ``(B, C, d)`` of pictures ``(B, 3, s, s)``, and of their windows ``(B, V, s, s, 3)`` in bytes."""
    if views is not None and views.shape[1]:
        every = torch.cat([pixels, pixels_to_input(views.flatten(0, 1))])
        first, others = image_features(model, every).tensor_split((len(pixels),))
        return torch.cat([first, others.view(len(pixels), -1, others.shape[-1])], dim=1)
    tower = model.model.vision_tower
    patch, heads = tower.config.patch_size, tower.config.num_attention_heads
    batch, _, side, _ = pixels.shape
    count = side // patch
    weight = tower.embeddings.patch_embedding.weight
    pixels = pixels.to(weight.dtype)
    cells = pixels.view(batch, 3, count, patch, count, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, count**2, -1)
    hidden = F.linear(cells, weight.view(weight.shape[0], -1), tower.embeddings.patch_embedding.bias)
    hidden = hidden + tower.embeddings.position_embedding.weight
    for layer in tower.encoder.layers:
        x, attention = layer.layer_norm1(hidden), layer.self_attn
        q, k, v = (_split(p(x), heads) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(hidden.shape)
        hidden = hidden + attention.out_proj(mixed)
        x = layer.layer_norm2(hidden)
        hidden = hidden + layer.mlp.fc2(F.gelu(layer.mlp.fc1(x), approximate="tanh"))
    projector = model.model.multi_modal_projector
    projected: Tensor = projector.linear_2(F.gelu(projector.linear_1(hidden)))
    return projected


@dataclass
class Decoded:
    """What the decoder returns.

    Args:
        hidden: ``(N, d)`` at the chosen text positions, in row-major order.
        attention: ``(N, C)`` on the image cells there, averaged over heads and layers, or ``None``.
    """

    hidden: Tensor
    attention: Tensor | None


def decode(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    embeddings: Tensor,
    batch: Batch,
    chosen: Tensor,
    row_length: int,
    with_attention: bool = False,
) -> Decoded:
    """Run the decoder over ``[system] <|user|> image`` and the packed text.

    Args:
        features: ``(B, C, d)`` from ``image_features``.
        embeddings: ``(B, T, d)`` of the text positions.
        chosen: ``(B, T)`` bool: where hidden states are wanted; the last layer computes nothing else.
        row_length: ``L``.
        with_attention: also return the attention on the cells.
    """
    decoder = model.model.language_model
    heads, eps = decoder.config.num_attention_heads, decoder.config.rms_norm_eps
    table = decoder.embed_tokens.weight
    size, width = features.shape[0], features.shape[2]
    head = width // heads
    start = torch.cat([batch.system, batch.system.new_tensor([USER])])
    prefix = torch.cat([F.embedding(start, table).expand(size, -1, -1), features], dim=1)  # (B, P, d)
    first_cell, length = len(start), prefix.shape[1]
    text = embeddings.shape[1]
    rows = text // row_length
    hidden = torch.cat([prefix, embeddings], dim=1)  # (B, P + T, d)
    positions = torch.cat([torch.arange(length).expand(size, -1), length + batch.positions], dim=1)
    cos, sin = (part.to(hidden.dtype) for part in _rotary(positions, head))
    owner = batch.question.view(size, rows, row_length)
    step = torch.arange(row_length)
    visible = (owner[..., :, None] == owner[..., None, :]) & (step[:, None] >= step[None, :])
    row_mask = hidden.new_zeros(visible.shape).masked_fill_(~visible, _MASKED)[:, None]  # (B, 1, R, L, L)
    causal = hidden.new_zeros(length, length).masked_fill_(
        torch.ones(length, length, dtype=torch.bool).triu(1), _MASKED
    )
    seen: list[Tensor] = []
    last = len(decoder.layers) - 1
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        x = F.rms_norm(hidden, (width,), layer.input_layernorm.weight, eps)
        q = _turn(_split(attention.q_proj(x), heads), cos, sin) * head**-0.5  # (B, h, P + T, head)
        k, v = _turn(_split(attention.k_proj(x), heads), cos, sin), _split(attention.v_proj(x), heads)
        q_text, k_text, v_text = (_rows(t[:, :, length:], row_length) for t in (q, k, v))
        k_image, v_image = k[:, :, :length], v[:, :, :length]
        to_image = q[:, :, length:] @ k_image.transpose(-1, -2)  # (B, h, T, P)
        to_row = (q_text @ k_text.transpose(-1, -2) + row_mask).flatten(2, 3)  # (B, h, T, L)
        weights = torch.cat([to_image, to_row], dim=-1).softmax(-1)
        on_image, on_row = weights.tensor_split((length,), dim=-1)
        if with_attention:
            seen.append(on_image[..., first_cell:].mean(1)[chosen])
        out_text = on_image @ v_image + (_rows(on_row, row_length) @ v_text).flatten(2, 3)
        if index == last:
            hidden = hidden[:, length:][chosen] + attention.o_proj(_join(out_text)[chosen])
        else:
            out_image = (q[:, :, :length] @ k_image.transpose(-1, -2) + causal).softmax(-1) @ v_image
            hidden = hidden + attention.o_proj(_join(torch.cat([out_image, out_text], dim=2)))
        x = F.rms_norm(hidden, (width,), layer.post_attention_layernorm.weight, eps)
        mlp = layer.mlp
        hidden = hidden + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    hidden = F.rms_norm(hidden, (width,), decoder.norm.weight, eps)
    return Decoded(hidden, torch.stack(seen).mean(0) if seen else None)


def embed(model: LlavaForConditionalGeneration, features: Tensor, batch: Batch) -> Tensor:
    """Embeddings ``(B, T, d)``: tokens, soft mixtures of tokens, and copies of image cells."""
    table = model.model.language_model.embed_tokens.weight
    text = F.embedding(batch.ids, table)
    soft = batch.mixture[..., 0] < 1
    if soft.any():
        shares, others = batch.mixture[soft].to(table.dtype), F.embedding(batch.mixed[soft], table)  # (M, 3), (M, 2, d)
        text = text.index_put((soft,), shares[:, :1] * text[soft] + (shares[:, 1:, None] * others).sum(1))
    copied = batch.cells >= 0
    if copied.any():
        picture, place = copied.nonzero(as_tuple=True)
        text = text.index_put((picture, place), features[picture, batch.cells[picture, place]])
    return text


def with_own_tokens(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    embeddings: Tensor,
    batch: Batch,
    row_length: int,
    generator: torch.Generator,
) -> Tensor:
    """Replace reasoning where ``batch.own`` says so by what the model itself expects or samples there."""
    places = batch.own > 0
    if not places.any():
        return embeddings
    table = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        before = torch.zeros_like(places)
        before[:, :-1] = places[:, 1:]
        hidden = decode(model, features, embeddings, batch, before, row_length).hidden
        chances = F.linear(hidden, table).float().softmax(-1)
        best = chances.topk(10, dim=-1)
        shares = best.values / best.values.sum(-1, keepdim=True)
        expected = (shares[..., None] * table[best.indices].float()).sum(1).to(table.dtype)
        sampled = table[torch.multinomial(chances, 1, generator=generator)[:, 0]]
        chosen = torch.where((batch.own[places] == 1)[:, None], expected, sampled)
    return embeddings.index_put((places,), chosen)


def _split(x: Tensor, heads: int) -> Tensor:
    """``(B, N, d)`` -> ``(B, h, N, d / h)``."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _rows(x: Tensor, length: int) -> Tensor:
    """``(B, h, R * L, n)`` -> ``(B, h, R, L, n)``."""
    return x.reshape(*x.shape[:2], -1, length, x.shape[-1])


def _join(x: Tensor) -> Tensor:
    """``(B, h, N, d / h)`` -> ``(B, N, d)``."""
    return x.transpose(1, 2).flatten(2)


def _rotary(positions: Tensor, head: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(B, 1, N, head)`` of rotary positions."""
    rates = base ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    angles = positions[:, None, :, None].float() * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


class DenseHeads(nn.Module):
    """Reads name, colour, centre, row, column and offset off every projected cell; used in training alone."""

    def __init__(self, hidden: int, names: int, colors: int, side: int) -> None:
        super().__init__()
        self.sizes = [names, colors, 2, side, side, 2]
        self.linear = nn.Linear(hidden, sum(self.sizes))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """``(B, C, d)`` -> six tensors ``(B, C, size)``."""
        return torch.split(self.linear(F.layer_norm(features, features.shape[-1:])), self.sizes, dim=-1)
