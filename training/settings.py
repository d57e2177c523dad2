"""Every number of the recipe. Steps are counted, never seconds, so that a second run repeats the first."""

from __future__ import annotations

from dataclasses import dataclass, replace

IMAGE_SIZE = 96  # pixels per side after stretching
PATCH_SIZE = 12  # pixels per side of an image cell
CELLS_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
CELLS = CELLS_PER_SIDE**2


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and lengths of the three stages."""

    hidden: int = 192
    heads: int = 6
    vision_layers: int = 4
    vision_mlp: int = 576
    text_layers: int = 4
    text_mlp: int = 512
    vocabulary: int = 800

    processes: int = 2
    seed: int = 0  # of the initial weights, and which part of the training stream is seen

    vision_steps: int = 700
    vision_batch: int = 32  # images per process and step
    vision_matrix_rate: float = 0.012

    language_steps: int = 3200
    language_decay: int = 1300  # the last so many steps, in which the rates fall to zero
    language_batch: int = 24
    language_matrix_rate: float = 0.0068
    language_rate: float = 0.55  # scales the AdamW rates

    looking_steps: int = 800  # decoder and projector alone: the vision tower stays as it is
    looking_decay: int = 600  # the last so many steps, in which the rates fall to zero
    looking_batch: int = 24  # pictures per step, of all processes together
    looking_matrix_rate: float = 0.002
    looking_rate: float = 0.2  # scales the AdamW rates
    looking_rows: int = 2  # longer rows waste less on padding
    looking_row_length: int = 80
    looking_windows: tuple[int, ...] = (0, 1, 0, 1, 0, 0, 1, 0, 2, 0)  # beside the pictures of a step, in turn
    looking_ordinary_share: float = 0.76  # of the pictures without a window: as in the second stage
    looking_ordinary_beside_share: float = 0.38  # of those with windows: scenes at their own size
    looking_stranger_share: float = 0.12  # pictures that no question of this world fits; the rest are canvases
    looking_unanswerable_share: float = 0.35  # other pictures with one or two questions that have no answer
    looking_slow_share: float = 0.7  # how many of up to three further questions of slow types are asked

    late_from: int = 500  # language step from which printed characters, the slowest to learn, weigh more
    late_text_share: float = 0.15  # further pictures of text
    late_character_weight: float = 4.0  # of their cells in the dense loss

    rows: int = 4  # packed rows per image
    row_length: int = 40  # tokens per row
    reasoning_share: float = 0.62
    copies_share: float = 0.25  # questions that carry copies of image cells
    own_tokens_every: int = 2  # while the rates fall, every so many batches carry the model's own reasoning
    easy_vqa_share: float = 0.08
    reword_share: float = 0.3  # questions with noise on their wording
    photograph_share: float = 0.03
    matplotlib_share: float = 0.025
    crowded_share: float = 0.15  # pictures with at least six shapes, four digits or six bars
    drop_easy: float = 0.3  # of the questions that are soon learnt
    unanswerable_share: float = 0.25  # pictures with one or two questions that have no answer
    tiny: bool = False  # colour, shape and existence in simple pictures only

    save_every: int = 25  # steps between checkpoints
    log_every: int = 10


FULL = Recipe()
# After the third stage, with ``--from`` and ``--settle``: the same lessons at half the rate, mostly ordinary scenes and
# crowded ones, for what the canvases took from them.
SETTLING = replace(
    FULL,
    looking_steps=320,
    looking_decay=320,
    looking_matrix_rate=0.0012,
    looking_rate=0.12,
    looking_ordinary_share=0.8,
    looking_ordinary_beside_share=0.48,
    looking_stranger_share=0.1,
    looking_unanswerable_share=0.25,
    looking_slow_share=0.85,
    crowded_share=0.35,
)
QUICK = Recipe(
    vision_layers=2,
    text_layers=2,
    vision_mlp=288,
    hidden=96,
    heads=4,
    text_mlp=192,
    rows=2,
    processes=1,
    vision_steps=150,
    language_steps=400,
    language_decay=200,
    looking_steps=0,
    vision_batch=16,
    language_batch=12,
    easy_vqa_share=0.0,
    reword_share=0.0,
    photograph_share=0.0,
    matplotlib_share=0.0,
    crowded_share=0.0,
    drop_easy=0.0,
    unanswerable_share=0.0,
    tiny=True,
    save_every=100,
    log_every=20,
)
