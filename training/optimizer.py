"""Muon for the matrices of the transformer layers, AdamW for everything else, shared by the processes of a run.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum ``M`` of a matrix by the
nearest orthogonal matrix: with ``M = U S V^T`` the step is ``U V^T``, found by a quintic Newton-Schulz iteration.

``torch.optim.Muon`` takes the same step (a test compares the two), one matrix at a time and in bfloat16. Here matrices
of one shape go together, in float32, and the processes share them: on processors without matrix units for bfloat16 the
step of the embedded model takes a seventh of the time.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """``(n, rows, columns)`` -> matrices with the same singular vectors and singular values near one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Optimizer:
    """One step from gradients that are already averaged over the processes.

    Args:
        model, heads: what is trained; unused parameters are left out.
        rank, world: this process and the number of processes; they share the orthogonalising.
        without: parameters with this in their name stay as they are.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        heads: nn.Module,
        rank: int = 0,
        world: int = 1,
        without: str = "post_layernorm",
    ) -> None:
        self.rank, self.world = rank, world
        named = [(n, p) for n, p in model.named_parameters() if "post_layernorm" not in n and without not in n]
        matrices = [p for n, p in named if p.ndim == 2 and "layers." in n]
        chosen = {id(p) for p in matrices}
        others = [(n, p) for n, p in named if id(p) not in chosen]
        self.parameters: list[nn.Parameter] = [*heads.parameters(), *(p for _, p in named)]
        groups = [{"params": list(heads.parameters()), "rate": 4e-3}]
        groups += [{"params": [p], "rate": _rate(n)} for n, p in others]
        self.adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.97), weight_decay=0.0)
        self.by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in matrices:
            self.by_shape[tuple(p.shape)].append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.by_shape.items()}

    @torch.no_grad()
    def step(self, matrix_rate: float, rate: float, decay: float = 0.05, momentum: float = 0.95) -> None:
        """``matrix_rate`` is Muon's learning rate, ``rate`` scales the rates of AdamW."""
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * rate
        self.adam.step()
        updates = {}
        for shape, ps in self.by_shape.items():
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in ps])
            self.momentum[shape].lerp_(gradient, 1 - momentum)
            update = torch.zeros_like(gradient)
            mine = slice(self.rank, None, self.world)
            nesterov = gradient[mine].lerp(self.momentum[shape][mine], momentum)
            if len(nesterov):
                update[mine] = orthogonalise(nesterov) * max(1.0, shape[0] / shape[1]) ** 0.5
            updates[shape] = update
        if self.world > 1:
            flat = torch.cat([update.reshape(-1) for update in updates.values()])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [update.numel() for update in updates.values()])
            updates = {shape: piece.view_as(updates[shape]) for shape, piece in zip(updates, pieces, strict=True)}
        for shape, ps in self.by_shape.items():
            for p, update in zip(ps, updates[shape], strict=True):
                p.mul_(1 - matrix_rate * decay).sub_(update, alpha=matrix_rate)

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average the gradients over the processes; a parameter that got none counts as zero."""
        if self.world == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters])
        dist.all_reduce(flat)
        flat /= self.world
        for p, piece in zip(self.parameters, torch.split(flat, [p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p)

    def zero(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, object]:
        return {"adam": self.adam.state_dict(), "momentum": self.momentum}

    def load(self, state: dict[str, object]) -> None:
        self.adam.load_state_dict(state["adam"])  # type: ignore[arg-type]
        self.momentum = state["momentum"]  # type: ignore[assignment]


def _rate(name: str) -> float:
    """Learning rate of AdamW: image features reach the decoder un-normalised, so what makes them moves slowly."""
    if "patch_embedding.weight" in name:
        return 4e-4
    if "projector" in name:
        return 5e-4
    return 2e-3 if "embed_tokens" in name else 1e-3
