"""Windows beside the picture: from the picture's prefix in the cache, against naive passes, in every family."""

from __future__ import annotations

from dataclasses import replace

import naive_model
import pytest
import torch
from naive_model import CLOSE, QUESTION, draw_latents
from PIL import Image
from tiny_checkpoints import picture

from latent_tool.models.families import family
from latent_tool.models.prefix_cache import PrefixCache
from latent_tool.models.prompts import Rendered
from latent_tool.models.vlm import VisionLanguageModel
from latent_tool.models.windows import Window

WINDOWS = (Window(0, (30, 20, 118, 90)), Window(0, (50, 40, 90, 70)))
# Families whose prompts are computed whole, each for a reason of its own: layers with states of other kinds, a prompt
# or a picture read in both directions, or one that is shown in another way where there are several.
WHOLE = {"qwen3_5", "lfm2_vl", "gemma4", "ovis2", "paligemma", "gemma3", "llava_onevision"}
AS_CELLS = {"paligemma"}


@pytest.fixture
def fresh(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    """The model as if it had answered nothing yet."""
    monkeypatch.setattr(vlm, "prefix_cache", PrefixCache(2**26))
    monkeypatch.setattr(vlm, "_splits", None)
    monkeypatch.setattr(vlm, "_goes_on", None)
    return vlm


def test_a_window_beside_the_picture_equals_the_naive_forward_pass(fresh: VisionLanguageModel) -> None:
    """Features, logits, attention and scores; the first window decides how it is computed, the others rely on it."""
    image = picture(240, 180)
    alone = fresh.prepare([image], QUESTION)
    fresh.prefill(alone)
    for windows in (WINDOWS[:1], WINDOWS[1:], WINDOWS):
        inputs = fresh.prepare([image], QUESTION, windows=windows)
        prefix = fresh.prefill(inputs, attend=True, begins=alone)
        assert len(prefix.features) == len(inputs.cells) == len(prefix.columns)
        if fresh.model.config.model_type in AS_CELLS:
            assert len(inputs.injected) == len(windows)
            continue
        naive = naive_model.run(fresh, inputs, None, (), attention=True)
        torch.testing.assert_close(prefix.last_logits, naive.at_answer[0], **CLOSE)
        torch.testing.assert_close(prefix.features, naive.merged[prefix.columns], **CLOSE)
        assert naive.attention is not None
        read = naive.attention.mean((0, 1))[-1, prefix.columns]
        torch.testing.assert_close(prefix.attention, read, **CLOSE)
        last = len(inputs.cells) - 1
        latents = draw_latents(fresh, 2)
        scored = fresh.score(prefix, latents, [(last,), (0, last)])
        for row, cells in enumerate([(last,), (0, last)]):
            naive = naive_model.run(fresh, inputs, latents[row], cells)
            torch.testing.assert_close(scored.answer[row], naive.at_answer[0], **CLOSE)


def test_cells_of_a_window_that_are_injected_equal_the_naive_forward_pass(
    fresh: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a family for one picture takes them: after the prompt, in the order of the windows."""
    row = family(fresh.model.config.model_type)
    assert row is not None
    monkeypatch.setattr("latent_tool.models.vlm.family", lambda _kind: replace(row, views="cells"))
    image = picture(240, 180)
    inputs = fresh.prepare([image], QUESTION, windows=WINDOWS)
    assert len(inputs.injected) == 2
    prefix = fresh.prefill(inputs, attend=True)
    alone = fresh.prepare([image], QUESTION)
    assert inputs.cells[: len(alone.cells)] == alone.cells
    features = [naive_model.run(fresh, alone, None, ()).merged[fresh.prefill(alone).columns]]
    for window in WINDOWS:
        part = fresh.prepare([image.crop(window.box)], QUESTION)
        features.append(naive_model.run(fresh, part, None, ()).merged[fresh.prefill(part).columns])
    torch.testing.assert_close(prefix.features, torch.cat(features), **CLOSE)
    # Latents are the one thing that the naive pass puts anywhere: here they are the windows' cells.
    naive = naive_model.run(fresh, alone, torch.cat(features[1:]), ())
    torch.testing.assert_close(prefix.last_logits, naive.at_answer[0], **CLOSE)
    latents = draw_latents(fresh, 1)
    scored = fresh.score(prefix, latents, [()])
    both = naive_model.run(fresh, alone, torch.cat([*features[1:], latents[0]]), ())
    torch.testing.assert_close(scored.answer[0], both.at_answer[0], **CLOSE)
    assert prefix.attention is not None and len(prefix.attention) == len(inputs.cells)


def test_the_pictures_prefix_is_used_where_it_is_exact(fresh: VisionLanguageModel) -> None:
    image = picture(240, 180)
    kind = fresh.model.config.model_type
    alone = fresh.prepare([image], QUESTION)
    fresh.prefill(alone)
    passes = [fresh.prefill(fresh.prepare([image], QUESTION, windows=[w]), begins=alone).encoded for w in WINDOWS]
    again = fresh.prefill(fresh.prepare([image], QUESTION, windows=WINDOWS[:1]), begins=alone).encoded
    assert (passes[1], again) == ((2, 0 if fresh._splits else 2) if kind in WHOLE else (1, 0))


def test_boxes_of_a_windows_cells_lie_in_the_window(fresh: VisionLanguageModel) -> None:
    """In pixels of the picture, together covering what the window shows, and named by the picture."""
    images = [picture(240, 180), picture(170, 260, seed=1)]
    window = Window(1, (40, 60, 150, 200))
    inputs = fresh.prepare(images, QUESTION, windows=[window])
    part = images[1].crop(window.box)
    shown = fresh.prepare([*images, part], QUESTION).cells
    if fresh.model.config.model_type in AS_CELLS:
        of_part = fresh.prepare([part], QUESTION).cells
        shown = (*fresh.prepare(images, QUESTION).cells, *(replace(cell, image=2) for cell in of_part))
    found = [cell for cell, twin in zip(inputs.cells, shown, strict=True) if twin.image == 2]
    assert [cell for cell, twin in zip(inputs.cells, shown, strict=True) if twin.image != 2] == [
        cell for cell in shown if cell.image != 2
    ]
    boxes = []
    for cell, twin in zip(found, (cell for cell in shown if cell.image == 2), strict=True):
        assert cell.image == 1
        assert (cell.box is None) == (twin.box is None)
        if cell.box is not None and twin.box is not None:
            assert cell.box == pytest.approx([a + b for a, b in zip(twin.box, (40, 60, 40, 60), strict=True)])
            boxes.append(cell.box)
    assert min(box[0] for box in boxes) >= 40 and min(box[1] for box in boxes) >= 60
    assert max(box[2] for box in boxes) <= 150 and max(box[3] for box in boxes) <= 200
    assert inputs.warnings == ()


def test_a_window_shows_the_pixels_of_the_picture(fresh: VisionLanguageModel) -> None:
    """What changes inside a window changes its cells; what changes elsewhere does not."""
    image = picture(240, 180)
    window = Window(0, (60, 40, 160, 140))

    def features(shown: Image.Image):
        inputs = fresh.prepare([shown], QUESTION, windows=[window])
        count = len(inputs.cells) - len(fresh.prepare([shown], QUESTION).cells)
        return fresh.prefill(inputs).features, count

    before, count = features(image)
    inside, outside = image.copy(), image.copy()
    inside.paste((0, 0, 0), (70, 50, 150, 130))
    outside.paste((0, 0, 0), (0, 0, 60, 180))
    part = slice(-min(abs(count), len(before) // 3) or None, None)
    assert (features(inside)[0][part] - before[part]).abs().max() > 1e-3
    torch.testing.assert_close(features(outside)[0][part], before[part], **CLOSE)


@pytest.mark.parametrize("position", ["generation_start", "user_turn"])
def test_what_was_rendered_for_other_windows_gives_the_same_prompt(vlm: VisionLanguageModel, position: str) -> None:
    image = picture(240, 180)
    rendered: dict[tuple[str, int], Rendered] = {}
    texts = (QUESTION, "Describe the picture.")
    for windows in ((), WINDOWS[:1], WINDOWS[1:], WINDOWS, ()):
        for text in texts:
            fresh, again = (
                vlm.prepare([image], text, position=position, windows=windows, rendered=known)
                for known in (None, rendered)
            )
            for one, other in zip((fresh, *fresh.injected), (again, *again.injected), strict=True):
                assert one.tensors.keys() == other.tensors.keys()
                assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
                assert (one.tail, one.markers, one.cells) == (other.tail, other.markers, other.cells)
                assert (one.warnings, one.pictures) == (other.warnings, other.pictures)
    pictures = {1} if vlm.model.config.model_type in AS_CELLS else {1, 2, 3}
    assert rendered.keys() == {(text, count) for text in texts for count in pictures}
