"""The overlay marks the object that the model's cells saw: on photos with an orientation, cropped and in tiles."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_checkpoints import loaded, picture

from families.test_models_cells import features, without_mixing
from latent_tool.engine.engine import Engine
from latent_tool.engine.job import Job
from latent_tool.images.load import load_image
from latent_tool.schema import CellAttention, Patch, ReasoningResult
from latent_tool.settings import Budget, ImagePolicy
from latent_tool.views.heat import HEAT_OPACITY, HEAT_STOPS
from latent_tool.views.layout import layout_of
from latent_tool.views.overlay import FRAME, overlay

SIZE = (170, 260)
OBJECT = (60, 150, 100, 190)  # left, top, right, bottom in the upright photo; inside the central square
KINDS = {
    "llava": "the middle is cut out",
    "llava_next": "overview and tiles",
    "llava_onevision": "overview and tiles",
    "smolvlm": "tiles",
    "internvl": "tiles",
    "qwen2_5_vl": "the size the picture has",
}


def photo(with_object: bool) -> Image.Image:
    """A photo that was stored on its side, with an orientation that says so."""
    upright = picture(*SIZE)
    if with_object:
        drawn = np.asarray(upright).copy()
        left, top, right, bottom = OBJECT
        drawn[top:bottom, left:right] = 255 - drawn[top:bottom, left:right]
        upright = Image.fromarray(drawn)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(stream, "PNG", exif=exif)
    return Image.open(stream)


@pytest.mark.parametrize("kind", KINDS)
def test_the_object_that_changes_the_cells_is_marked(kind: str) -> None:
    """Which cells the object changes says the model; where they lie says the overlay, by pixels."""
    vlm = loaded(kind)
    stored = photo(True)
    assert stored.size == SIZE[::-1]
    images = [load_image(each, ImagePolicy.local()).image for each in (stored, photo(False))]
    assert images[0].size == SIZE
    cells = vlm.prepare(images[:1], "?").cells
    with without_mixing(vlm):
        change = (features(vlm, images[:1]) - features(vlm, images[1:])).norm(dim=-1)
    chosen = [i for i in range(len(cells)) if cells[i].box is not None and change[i] > 0.3 * change.max()]
    result = ReasoningResult(
        answer="?",
        raw_text="?",
        confidence=0.5,
        confidence_source="answer_probability",
        image_sizes=[SIZE],
        patches=[
            Patch(rank=rank, image=0, cell=i, box=cells[i].box, attention=0.1, gain=0.1, latent=0)
            for rank, i in enumerate(chosen)
        ],
    )
    shown = overlay(result, stored, caption=False)

    # Where the drawn picture is as bright as the photo there is no veil: that is what is marked.
    layout = layout_of(SIZE)
    area = (layout.left, layout.top, layout.left + layout.width, layout.top + layout.height)
    plain = overlay(result.model_copy(update={"patches": []}), stored, caption=False).crop(area)
    marked = (np.asarray(shown.crop(area)) == np.asarray(plain)).all(axis=-1)
    scale = layout.width / SIZE[0]
    left, top, right, bottom = (round(edge * scale) for edge in OBJECT)
    assert marked[top:bottom, left:right].mean() > 0.9
    widest = max(max(cells[i].box[2] - cells[i].box[0], cells[i].box[3] - cells[i].box[1]) for i in chosen)  # type: ignore[index]
    reach = round(widest * scale) + 2
    far = Image.new("1", plain.size, 1)
    ImageDraw.Draw(far).rectangle((left - reach, top - reach, right + reach, bottom + reach), fill=0)
    assert marked[np.asarray(far)].mean() < 0.02  # some pixels of the photo are as grey as the veil


@pytest.mark.parametrize("kind", KINDS)
def test_the_cells_that_see_the_object_are_hot_where_it_is(kind: str) -> None:
    """Weights say which cells the object changes; the largest colour lies on it, none outside of the picture."""
    vlm = loaded(kind)
    stored = photo(True)
    images = [load_image(each, ImagePolicy.local()).image for each in (stored, photo(False))]
    cells = vlm.prepare(images[:1], "?").cells
    with without_mixing(vlm):
        change = (features(vlm, images[:1]) - features(vlm, images[1:])).norm(dim=-1)
    weights = (change > 0.3 * change.max()).double().tolist()
    places = enumerate(zip(cells, weights, strict=True))
    result = ReasoningResult(
        answer="?",
        raw_text="?",
        confidence=0.5,
        confidence_source="answer_probability",
        image_sizes=[SIZE],
        attention=[CellAttention(image=0, cell=i, box=place.box, weight=weight) for i, (place, weight) in places],
    )
    shown = np.asarray(overlay(result, stored, heatmap=True, caption=False)).astype(float)
    layout = layout_of(SIZE)
    area = slice(layout.top, layout.top + layout.height), slice(layout.left, layout.left + layout.width)
    plain = overlay(result.model_copy(update={"attention": None}), stored, caption=False)
    ground = np.asarray(plain).astype(float)[area]
    top = ground + HEAT_OPACITY[1] * (np.array(HEAT_STOPS[-1]) - ground)
    hot = np.abs(shown[area] - top).max(axis=-1) <= 2
    scale = layout.width / SIZE[0]
    left, upper, right, lower = (round(edge * scale) for edge in OBJECT)
    assert hot[upper:lower, left:right].mean() > 0.9
    boxes = [cells[i].box for i, weight in enumerate(weights) if weight]
    widest = max(max(box[2] - box[0], box[3] - box[1]) for box in boxes if box is not None)
    reach = round(widest * scale) + 2
    far = np.ones(hot.shape, dtype=bool)
    far[max(0, upper - reach) : lower + reach, max(0, left - reach) : right + reach] = False
    assert hot[far].mean() < 0.02
    shown[area] = FRAME
    assert (shown == FRAME).all()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "gemma3"])
def test_an_answers_attention_covers_every_cell_of_its_prompt(kind: str) -> None:
    """Of one image and of two, in tiles and cut out; where boxes are not known there is still a weight."""
    engine = Engine(loaded(kind))
    images = tuple(load_image(photo(with_object), ImagePolicy.local()).image for with_object in (True, False))
    found = engine.answer(
        Job(
            images,
            "?",
            budget=Budget(iterations=1, max_new_tokens=2, target_confidence=None, max_views=0),
            attention=True,
        )
    )
    result = engine.result(found)
    assert result.attention is not None
    assert [(each.image, each.box) for each in result.attention] == [(c.image, c.box) for c in found.inputs.cells]
    assert {each.image for each in result.attention} == {0, 1}
    assert 0 < sum(each.weight for each in result.attention) < 1
    for index, image in enumerate(images):
        overlay(result, image, index=index, heatmap=True)


def test_what_was_cut_away_cannot_be_marked() -> None:
    """The middle square of a photo of 170 x 260 begins 45 pixels below its top."""
    upright = load_image(photo(True), ImagePolicy.local()).image
    known = [cell.box for cell in loaded("llava").prepare([upright], "?").cells if cell.box is not None]
    assert (min(box[1] for box in known), max(box[3] for box in known)) == pytest.approx((45, 215), abs=3)
    assert (min(box[0] for box in known), max(box[2] for box in known)) == pytest.approx((0, 170), abs=3)
