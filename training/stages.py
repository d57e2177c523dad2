"""Vision warm-up, language and looking on several processes, with checkpoints and resume.

Each step of each process takes its own numbers of the training stream, so a run that was killed and resumed sees
the same data as one that was not.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from latent_tool.errors import SettingsError
from latent_tool.scenes import Scene, generate
from training.checkpoint import build_model, build_processor, save_state
from training.forward import DenseHeads, decode, embed, image_features, pixels_to_input, with_own_tokens
from training.labels import COLOR_NAMES, IGNORE, NAME_INDEX, NAMES, dense_labels
from training.optimizer import Optimizer
from training.packing import Batch, Packer
from training.settings import CELLS, CELLS_PER_SIDE, Recipe
from training.world import assets, from_scene, tiny_scene

STAGES = ("vision", "language", "looking")
_VISION_NUMBERS = 500_000_000  # numbers of the training stream from which the warm-up draws
NUMBERS_PER_SEED = 10_000_000  # more than all stages of a run draw, so that runs of other seeds share no picture
LOOKING_NUMBERS = 1_000_000  # from here on, of the numbers of its seed, the third stage draws

# glibc returns large tensors to the system after every operation unless told otherwise; this is a third of the time
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def train(recipe: Recipe, run: Path, resume: bool, start: Path | None = None) -> LlavaForConditionalGeneration:
    """Train from scratch, from the last saved state of the same recipe, or from the weights of a checkpoint.

    Args:
        recipe: what to do.
        run: folder for the state and the log.
        resume: continue from ``run/state.pt`` when it is there.
        start: folder of a checkpoint whose weights are those of the end of the second stage: the third alone is run.

    Raises ``SettingsError`` for the state of another recipe, and rather than begin anew over that of an unfinished run;
    ``ChildProcessError``, with what it printed, when a process of the training ends early.
    """
    run.mkdir(parents=True, exist_ok=True)
    state = run / "state.pt"
    if state.exists():
        saved = _saved(state)
        if resume:
            _require_same(saved, recipe, _vocabulary(build_processor(recipe).tokenizer), state)
        elif not _finished(saved):
            raise SettingsError(
                f"{state} is a run that was stopped ({STAGES[saved['stage']]}, step {saved['step']}).",
                "Continue it with --resume, or remove it to begin anew.",
            )
        else:
            state.unlink()
    if start is not None and not state.exists():
        begin_from(start, recipe, run)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)  # the processes started below read it, this one is not touched
    try:
        spawn(_work, args=(recipe, run, port), nprocs=recipe.processes)  # type: ignore[no-untyped-call]
    except ProcessException as error:
        raise ChildProcessError(str(error)) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return load_model(recipe, run)


def _saved(state: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(state, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise SettingsError(f"{state} cannot be read ({error}).", "Remove it to begin anew.") from error


def _require_same(saved: dict[str, Any], recipe: Recipe, vocabulary: str, state: Path) -> None:
    if saved["recipe"] != asdict(recipe):
        raise SettingsError(f"{state} belongs to another recipe.", "Remove it, or use another folder (--run).")
    if saved.get("vocabulary") != vocabulary:  # which is learnt from the questions that the generator asks
        raise SettingsError(
            f"{state} was trained with another vocabulary: the questions of latent_tool/scenes have changed since.",
            "Remove it, or use another folder (--run).",
        )


def _finished(saved: dict[str, Any]) -> bool:
    steps = [saved["recipe"].get(f"{stage}_steps", 0) for stage in STAGES]
    return bool(saved["step"] >= steps[saved["stage"]]) and not any(steps[saved["stage"] + 1 :])


def begin_from(start: Path, recipe: Recipe, run: Path) -> None:
    """Save the weights of a checkpoint as a state at the end of the second stage."""
    try:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{start} holds no checkpoint ({error}).", "Name the folder of one.") from error
    trainer = Trainer(recipe, run, 0, 1)
    if _vocabulary(tokenizer) != trainer.vocabulary:
        raise SettingsError(f"{start} has another vocabulary.", "Name a checkpoint of this recipe.")
    try:
        trainer.model.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise SettingsError(f"{start} has another shape ({error}).", "Name a checkpoint of this recipe.") from error
    trainer.stage, trainer.step = STAGES.index("language"), recipe.language_steps
    trainer.save()


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> str:
    """A digest of the tokens and their numbers."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def load_model(recipe: Recipe, run: Path) -> LlavaForConditionalGeneration:
    """The model of the last saved state."""
    saved = _saved(run / "state.pt")
    model = build_model(recipe, len(build_processor(recipe).tokenizer))
    model.load_state_dict(saved["model"])
    model.tie_weights()
    return model.eval()


def _work(rank: int, recipe: Recipe, run: Path, port: int) -> None:
    torch.set_num_threads(1)
    world = recipe.processes
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    Trainer(recipe, run, rank, world).run()
    dist.barrier()
    dist.destroy_process_group()


class Trainer:
    """The state of one process of a run."""

    def __init__(self, recipe: Recipe, run: Path, rank: int, world: int) -> None:
        self.recipe, self.folder, self.rank, self.world = recipe, run, rank, world
        self.processor = build_processor(recipe)
        self.vocabulary = _vocabulary(self.processor.tokenizer)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, len(self.processor.tokenizer)).train()
        self.heads = DenseHeads(recipe.hidden, len(NAMES), len(COLOR_NAMES), CELLS_PER_SIDE)
        self.optimizer = Optimizer(self.model, self.heads, rank, world)
        # forward and backward run on a bfloat16 copy where the processor multiplies such matrices faster
        self.copy = copy.deepcopy(self.model).to(torch.bfloat16) if fast_bfloat16() else None
        self.stage, self.step = 0, 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.started = time.time()
        path = run / "state.pt"
        if path.exists():
            saved = _saved(path)
            _require_same(saved, recipe, self.vocabulary, path)
            self.model.load_state_dict(saved["model"])
            self.model.tie_weights()
            self.refresh_copy()
            self.heads.load_state_dict(saved["heads"])
            self.stage, self.step = saved["stage"], saved["step"]
            if STAGES[self.stage] == "looking":
                self.begin(self.stage)
            self.optimizer.load(saved["optimizer"])

    def begin(self, stage: int) -> None:
        """The optimizer of a stage; the third leaves the vision tower as it is."""
        looking = STAGES[stage] == "looking"
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not (looking and "vision_tower" in name))
        for name, parameter in self.copy.named_parameters() if self.copy is not None else ():
            parameter.requires_grad_(not (looking and "vision_tower" in name))
        without = "vision_tower" if looking else "post_layernorm"
        self.optimizer = Optimizer(self.model, self.heads, self.rank, self.world, without)

    def run(self) -> None:
        """All stages, from wherever the state says, for as long as the command lives that started this process."""
        parent = multiprocessing.parent_process()
        for stage in range(self.stage, len(STAGES)):
            first = self.step if stage == self.stage else 0
            self.stage = stage
            lessons = _Lessons(self.recipe, self.processor.tokenizer, stage, first, self.rank, self.world)
            total = lessons.steps
            if first >= total:
                continue
            if stage > 0 and first == 0:
                self.begin(stage)
            loader = DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=4)
            for step, batch in enumerate(loader, start=first):
                if parent is not None and not parent.is_alive():
                    raise SystemExit(f"Stopped at step {step}: the command that started this is gone.")
                if stage == 0:
                    self.vision_step(step, batch)
                elif stage == 1:
                    self.language_step(step, batch)
                else:
                    self.looking_step(step, batch)
                self.step = step + 1
                if self.rank == 0:
                    if self.step % self.recipe.log_every == 0:
                        self.log(total)
                    if self.step % self.recipe.save_every == 0 or self.step == total:
                        self.save()
                    if stage > 0 and self.step % (4 * self.recipe.save_every) == 0:
                        self.write({"held_out_direct": self.check()})

    def vision_step(self, step: int, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Dense labels alone."""
        pixels, classes, offsets = batch
        progress = step / self.recipe.vision_steps
        features = image_features(self.working, pixels_to_input(pixels))
        loss = self.dense_loss(features, classes, offsets)
        torch.autograd.backward(loss)
        rate = min(1.0, (step + 1) / 40) * min(1.0, (1 - progress) / 0.6 + 0.05)
        self.update(self.recipe.vision_matrix_rate * rate, rate)

    def language_step(self, step: int, batch: Batch) -> None:
        """Answers and reasoning, the dense labels, and where the words look."""
        recipe = self.recipe
        features = image_features(self.working, pixels_to_input(batch.pixels))
        weight = recipe.late_character_weight if step >= recipe.late_from else 1.0
        dense = self.dense_loss(features, batch.classes, batch.offsets, weight)
        torch.autograd.backward(self.words_loss(step, features, batch, recipe.row_length) + 0.5 * dense)
        left = (recipe.language_steps - step) / recipe.language_decay
        rate = min(1.0, (step + 1) / 30, 0.98 * left + 0.02)
        self.update(recipe.language_matrix_rate * rate, recipe.language_rate * rate)

    def looking_step(self, step: int, batch: Batch) -> None:
        """Answers and reasoning about pictures with and without windows; the vision tower stays as it is."""
        recipe = self.recipe
        features = image_features(self.working, pixels_to_input(batch.pixels), batch.views)
        torch.autograd.backward(self.words_loss(step, features, batch, recipe.looking_row_length))
        left = (recipe.looking_steps - step) / recipe.looking_decay
        rate = min(1.0, (step + 1) / 30, 0.98 * left + 0.02)
        self.update(recipe.looking_matrix_rate * rate, recipe.looking_rate * rate)

    def words_loss(self, step: int, features: Tensor, batch: Batch, row_length: int) -> Tensor:
        """Cross entropy of answers and reasoning, and a little of where they look."""
        model = self.working
        embeddings = embed(model, features, batch)
        generator = torch.Generator().manual_seed(step * self.world + self.rank)
        embeddings = with_own_tokens(model, features, embeddings, batch, row_length, generator)
        chosen = batch.labels != IGNORE
        decoded = decode(model, features, embeddings, batch, chosen, row_length, with_attention=True)
        logits = F.linear(decoded.hidden, model.model.language_model.embed_tokens.weight).float()
        labels, weights = batch.labels[chosen], batch.weights[chosen]
        each = F.cross_entropy(logits, labels, reduction="none")
        words = (each * weights).sum() / weights.sum()
        assert decoded.attention is not None
        looks = looking_loss(decoded.attention.float(), batch, chosen)
        right = (logits.argmax(-1) == labels).float().mean()
        self.count(words=words, looks=looks, tokens_right=right)
        self.sums["questions"] += batch.questions * self.world
        return words + 0.1 * looks

    def dense_loss(self, features: Tensor, classes: Tensor, offsets: Tensor, character_weight: float = 1.0) -> Tensor:
        """Cross entropies of name, colour, centre, row and column of the cells ``(B, C, d)``, and their offset."""
        name, color, center, row, column, offset = (head.flatten(0, 1) for head in self.heads(features.float()))
        names, colors, centers = (classes[:, k].flatten() for k in range(3))
        rare = torch.ones(len(NAMES))
        rare[NAME_INDEX["0"] :] = character_weight
        rare[-1] = 0.15
        rare_color = torch.ones(len(COLOR_NAMES))
        rare_color[-1] = 0.15
        index = torch.arange(CELLS).repeat(len(features))
        known = (names >= 0) & (names < len(NAMES) - 1)
        if not (names >= 0).any():
            return F.cross_entropy(row, index // CELLS_PER_SIDE)
        loss = F.cross_entropy(name, names, rare, ignore_index=IGNORE)
        loss = loss + 0.6 * F.cross_entropy(color, colors, rare_color, ignore_index=IGNORE)
        loss = loss + 0.6 * F.cross_entropy(center, centers, ignore_index=IGNORE)
        loss = loss + 0.2 * F.cross_entropy(row, index // CELLS_PER_SIDE)
        loss = loss + 0.2 * F.cross_entropy(column, index % CELLS_PER_SIDE)
        loss = loss + F.smooth_l1_loss(offset[known], offsets.flatten(0, 1)[known]) if known.any() else loss
        if known.any():
            self.count(
                dense=loss,
                names=(name[known].argmax(-1) == names[known]).float().mean(),
                colors=(color[known].argmax(-1) == colors[known]).float().mean(),
            )
        return loss

    @property
    def working(self) -> LlavaForConditionalGeneration:
        """The model that is run forward and backward."""
        return self.model if self.copy is None else self.copy

    @torch.no_grad()
    def refresh_copy(self) -> None:
        if self.copy is not None:
            for ours, theirs in zip(self.copy.parameters(), self.model.parameters(), strict=True):
                ours.copy_(theirs)

    def update(self, matrix_rate: float, rate: float) -> None:
        if self.copy is not None:
            for ours, theirs in zip(self.copy.parameters(), self.model.parameters(), strict=True):
                theirs.grad = None if ours.grad is None else ours.grad.float()
                ours.grad = None
        self.optimizer.average_gradients()
        self.optimizer.step(matrix_rate, rate)
        self.optimizer.zero()
        self.refresh_copy()

    def count(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value.detach())
            self.sums[f"n {name}"] += 1

    def log(self, total: int) -> None:
        questions = self.sums.pop("questions", 0)
        seconds = time.time() - self.started
        means = {n: round(v / self.sums[f"n {n}"], 4) for n, v in self.sums.items() if not n.startswith("n ")}
        self.write(
            {"stage": STAGES[self.stage], "step": self.step, "of": total, "per_s": round(questions / seconds, 1)}
            | {"seconds_per_step": round(seconds / self.recipe.log_every, 3)}
            | means
        )
        self.sums.clear()
        self.started = time.time()

    def write(self, row: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        save_state(
            {
                "recipe": asdict(self.recipe),
                "vocabulary": self.vocabulary,
                "stage": self.stage,
                "step": self.step,
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state(),
            },
            self.folder / "state.pt",
        )

    @torch.no_grad()
    def check(self, pictures: int = 96) -> dict[str, float]:
        """Share of direct answers to held-out scenes whose every token is the most probable one, by type."""
        plain = replace(self.recipe, reasoning_share=0.0, copies_share=0.0, reword_share=0.0)
        packer = Packer(self.processor.tokenizer, plain)
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for first in range(0, pictures, 32):
            numbers = range(first, min(first + 32, pictures))
            samples = [from_scene(generate(n, "held_out")) for n in numbers]
            batch = packer.pack(samples, list(numbers))
            features = image_features(self.model, pixels_to_input(batch.pixels))
            chosen = batch.labels != IGNORE
            hidden = decode(
                self.model, features, embed(self.model, features, batch), batch, chosen, plain.row_length
            ).hidden
            wrong = F.linear(hidden, self.model.model.language_model.embed_tokens.weight).argmax(-1)
            wrong = wrong != batch.labels[chosen]
            picture, place = chosen.nonzero(as_tuple=True)
            owners = batch.question[picture, place]
            failed = {(int(p), int(o)) for p, o in zip(picture[wrong], owners[wrong], strict=True)}
            for p, o in {(int(p), int(o)) for p, o in zip(picture, owners, strict=True)}:
                kind = samples[p].questions[o].type
                asked[kind] += 1
                right[kind] += (p, o) not in failed
        result = {kind: round(right[kind] / asked[kind], 3) for kind in sorted(asked)}
        return {"all": round(sum(right.values()) / sum(asked.values()), 4)} | result


def fast_bfloat16() -> bool:
    """Whether this processor has matrix units for bfloat16; without them it is many times slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def looking_loss(attention: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
    """``-log`` of the share of attention on the cells that a question rests on, at its reasoning and answer.

    Args:
        attention: ``(N, C)`` at the chosen positions.
        chosen: ``(B, T)`` bool with ``N`` true entries.
    """
    picture = chosen.nonzero(as_tuple=True)[0]
    relevant = batch.relevant[picture, batch.question[chosen]].float()
    share = (attention * relevant).sum(-1) / (attention.sum(-1) + 1e-6)
    size = relevant.mean(-1)
    some = (size > 0) & (size <= 0.5)
    if not some.any():
        return attention.sum() * 0.0
    return -(share[some] + 1e-4).log().mean()


class _Lessons(IterableDataset[Any]):
    """Batches of one stage for one process, from step ``first`` on."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: int, first: int, rank: int, world: int
    ) -> None:
        self.recipe, self.tokenizer, self.stage = recipe, tokenizer, stage
        self.first, self.rank, self.world = first, rank, world
        self.steps = int(getattr(recipe, f"{STAGES[stage]}_steps"))

    def __iter__(self) -> Iterator[Any]:
        torch.set_num_threads(1)
        recipe = self.recipe
        rows = replace(recipe, rows=recipe.looking_rows, row_length=recipe.looking_row_length)
        packer = Packer(self.tokenizer, rows if STAGES[self.stage] == "looking" else recipe)
        size = (recipe.vision_batch, recipe.language_batch, recipe.looking_batch // self.world)[self.stage]
        for step in range(self.first, self.steps):
            start = recipe.seed * NUMBERS_PER_SEED + (step * self.world + self.rank) * size
            if self.stage == 0:
                yield _dense_batch([_VISION_NUMBERS + start + k for k in range(size)], recipe)
            elif self.stage == 1:
                own = step >= self.steps - recipe.language_decay and step % recipe.own_tokens_every == 0
                yield packer.batch([start + k for k in range(size)], own, step >= recipe.late_from)
            else:
                views = recipe.looking_windows[step % len(recipe.looking_windows)]
                own = step // len(recipe.looking_windows) % recipe.own_tokens_every == 0
                yield packer.looking_batch([LOOKING_NUMBERS + start + k for k in range(size)], views, own)


def _dense_batch(numbers: list[int], recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    def scene(number: int) -> Scene:
        if recipe.tiny:
            return tiny_scene(number, "train")
        return generate(number, "train", max_questions=0, assets=assets())

    samples = [from_scene(scene(number)) for number in numbers]
    dense = [dense_labels(one.objects) for one in samples]
    pixels = np.stack([np.asarray(one.image) for one in samples])
    classes = np.stack([classes for classes, _ in dense])
    return torch.from_numpy(pixels), torch.from_numpy(classes), torch.from_numpy(np.stack([o for _, o in dense]))
