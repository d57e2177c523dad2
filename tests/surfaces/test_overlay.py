"""Overlays, by pixels: what is marked, what stays as it was, and what size comes out."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from latent_tool import words
from latent_tool.errors import ImageNotAllowedError, InputError
from latent_tool.images.picture import Picture
from latent_tool.schema import CellAttention, Patch, ReasoningResult
from latent_tool.views import heat as colours
from latent_tool.views import layout as places
from latent_tool.views import overlay as module
from latent_tool.views.overlay import overlay, overlay_data_uri, overlay_png, overlays, show

BLUE, RED, PAPER = (30, 90, 200), (200, 30, 30), (245, 245, 240)
Box = tuple[float, float, float, float]


def scene() -> Image.Image:
    """60 x 60 pixels, 5 x 5 cells of 12: a blue square in the cells (1, 1) to (2, 2), a red one in cell (4, 4)."""
    image = Image.new("RGB", (60, 60), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((12, 12, 35, 35), fill=BLUE)
    draw.rectangle((48, 48, 59, 59), fill=RED)
    return image


def cell(column: int, row: int) -> Box:
    return 12.0 * column, 12.0 * row, 12.0 * column + 12, 12.0 * row + 12


def result_with(
    boxes: Sequence[Box | None],
    *,
    size: tuple[int, int] = (60, 60),
    attention: list[float] | None = None,
    images: list[int] | None = None,
    sizes: list[tuple[int, int]] | None = None,
    answer: str = "blue",
) -> ReasoningResult:
    attention = attention or [0.02] * len(boxes)
    images = images or [0] * len(boxes)
    return ReasoningResult(
        answer=answer,
        raw_text=answer,
        confidence=0.93,
        confidence_source="answer_probability",
        image_sizes=sizes or [size],
        patches=[
            Patch(rank=i, image=images[i], cell=i, box=box, attention=attention[i], gain=0.01, latent=0)
            for i, box in enumerate(boxes)
        ],
    )


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def part(picture: Image.Image, box: Box, size: tuple[int, int] = (60, 60)) -> np.ndarray:
    """The pixels of the overlay that show ``box`` of the original image."""
    cells = places.layout_of(size).cells(box)
    assert cells is not None
    left, top, right, bottom = cells
    return pixels(picture)[top:bottom, left:right]


def near(values: np.ndarray, colour: tuple[float, ...]) -> bool:
    return bool(np.abs(values - np.array(colour)).max() <= 2)


def veiled(colour: tuple[int, int, int], share: float = module.VEIL) -> tuple[float, ...]:
    return tuple(c + share * (grey - c) for c, grey in zip(colour, module.GREY, strict=True))


def around(picture: Image.Image, box: Box, distance: int, size: tuple[int, int] = (60, 60)) -> list[np.ndarray]:
    """Pixels right outside a box: left, right, below (a label may stand above), half way along each edge."""
    cells = places.layout_of(size).cells(box)
    assert cells is not None
    left, top, right, bottom = cells
    grid, x, y = pixels(picture), (left + right) // 2, (top + bottom) // 2
    return [grid[y, left - distance], grid[y, right - 1 + distance], grid[bottom - 1 + distance, x]]


# --- what is marked ---------------------------------------------------------------------------------------------------


def test_the_box_of_a_known_object_is_marked_and_its_inside_is_as_it_was() -> None:
    picture = overlay(result_with([cell(1, 1)]), scene())
    inside = part(picture, cell(1, 1))
    assert (inside == BLUE).all()
    assert all(near(pixel, module.AMBER) for pixel in around(picture, cell(1, 1), 1))
    assert all(near(pixel, module.BLACK) for pixel in around(picture, cell(1, 1), 1 + places.layout_of((60, 60)).line))


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), module.AMBER])
def test_the_outline_is_seen_on_any_ground(ground: tuple[int, int, int]) -> None:
    picture = overlay(result_with([cell(2, 2)]), Image.new("RGB", (60, 60), ground))
    line = places.layout_of((60, 60)).line
    tones: list[Any] = [around(picture, cell(2, 2), 1)[0], around(picture, cell(2, 2), 1 + line)[0], veiled(ground)]
    luminance = [np.dot(tone, (0.299, 0.587, 0.114)) for tone in tones]
    assert max(luminance) - min(luminance) > 100


def test_far_from_the_evidence_there_is_only_the_veil() -> None:
    picture = overlay(result_with([cell(1, 1)]), scene())
    assert near(part(picture, cell(4, 4)), veiled(RED))
    assert near(part(picture, cell(0, 4)), veiled(PAPER))


def test_without_patches_the_picture_is_the_image() -> None:
    picture = overlay(result_with([]), scene(), caption=False)
    expected = scene().resize((480, 480), Image.Resampling.NEAREST)
    assert (part(picture, (0, 0, 60, 60)) == pixels(expected)).all()
    assert (part(overlay(result_with([None]), scene()), (0, 0, 60, 60)) == pixels(expected)).all()


def test_more_attention_means_less_veil() -> None:
    boxes = [cell(0, 0), cell(2, 0), cell(4, 0)]
    picture = overlay(result_with(boxes, attention=[0.04, 0.02, 0.0]), scene())
    shares = [0.0, module.THIN_VEIL / 2, module.THIN_VEIL]
    for box, share in zip(boxes, shares, strict=True):
        assert near(part(picture, box), veiled(PAPER, share))


def test_where_patches_overlap_the_most_attended_is_seen() -> None:
    boxes = [(0.0, 0.0, 36.0, 36.0), cell(1, 1)]
    for order in (1, -1):
        picture = overlay(result_with(boxes[::order], attention=[0.01, 0.04][::order]), scene())
        assert near(part(picture, cell(1, 1)), BLUE)
        assert near(part(picture, cell(2, 2)), veiled(BLUE, 0.75 * module.THIN_VEIL))


def test_patches_without_attention_are_not_veiled() -> None:
    picture = overlay(result_with([cell(1, 1), cell(2, 1)], attention=[0.0, 0.0]), scene())
    assert near(part(picture, cell(1, 1)), BLUE)


def test_neighbours_have_one_outline_without_an_inner_border() -> None:
    picture = overlay(result_with([cell(1, 1), cell(2, 1), cell(1, 2), cell(2, 2)]), scene())
    assert (part(picture, (12, 12, 36, 36)) == BLUE).all()
    assert all(near(pixel, module.AMBER) for pixel in around(picture, (12, 12, 36, 36), 1))


def test_cells_whose_edges_were_computed_apart_still_meet() -> None:
    boxes = [(0.0, 0.0, 20.000000001, 60.0), (19.999999999, 0.0, 40.0, 60.0), (40.1, 0.0, 60.0, 60.0)]
    picture = overlay(result_with(boxes), Image.new("RGB", (60, 60), PAPER))
    assert near(part(picture, (0, 0, 60, 60)), PAPER)  # 40.1 is rounded outwards, to 40 times 8


def test_corners_that_touch_do_not_merge() -> None:
    layout = places.layout_of((60, 60))
    placed = [(i + 1, layout.cells(box)) for i, box in enumerate([cell(0, 0), cell(1, 1), cell(2, 1)])]
    assert [[rank for rank, _ in region] for region in places._regions(placed)] == [[1], [2, 3]]  # type: ignore[arg-type]


def test_a_region_joined_only_by_its_last_patch_is_one() -> None:
    layout = places.layout_of((60, 60))
    order = [cell(0, 0), cell(4, 0), cell(1, 0), cell(3, 0), cell(2, 0)]
    placed = [(i + 1, layout.cells(box)) for i, box in enumerate(order)]
    assert [[rank for rank, _ in region] for region in places._regions(placed)] == [[1, 2, 3, 4, 5]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([1], "1"),
        ([1, 2], "1, 2"),
        ([1, 2, 3, 7], "1-3, 7"),
        ([1, 3, 5, 7], "1, 3, 5, 7"),
        ([1, 3, 5, 7, 9, 10], "1, 3, 5, +3"),
    ],
)
def test_ranks_are_written_short(ranks: list[int], text: str) -> None:
    assert places._rank_text(ranks) == text


def amber_on(grid: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(grid - np.array(module.AMBER)).max(axis=-1) <= 2)


@pytest.mark.parametrize("cells", [[(0, 0)], [(4, 4)], [(2, 2)], [(c, r) for c in range(5) for r in range(5)]])
def test_labels_stand_outside_of_the_evidence(cells: list[tuple[int, int]]) -> None:
    """More amber than the outline alone has, and none inside the boxes."""
    result = result_with([cell(*at) for at in cells])
    picture = overlay(result, scene(), caption=False)
    assert not any(amber_on(part(picture, cell(*at))).any() for at in cells)
    layout = places.layout_of((60, 60))
    region = cells[0] if len(cells) == 1 else None
    side = (12 if region else 60) * layout.width // 60 + 2 * layout.line
    outline = side**2 - (side - 2 * layout.line) ** 2
    assert amber_on(pixels(picture)).sum() > outline + layout.font**2 // 2


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("cells", [3, 8, 20])
def test_labels_cover_neither_patches_nor_each_other(cells: int, share: float) -> None:
    size = 12 * cells, 12 * cells
    layout = places.layout_of(size)
    chosen = np.argwhere(np.random.default_rng(0).random((cells, cells)) < share)
    placed = [(i + 1, layout.cells(cell(int(c), int(r)))) for i, (r, c) in enumerate(chosen)]
    kept = [(rank, at) for rank, at in placed if at is not None]
    labels = places.labels_of(layout, kept)
    assert labels
    taken = [at for _, at in kept]
    for label in labels:
        left, top, right, bottom = label.box
        assert left >= 0 and top >= 0 and right <= layout.canvas[0] and bottom <= layout.canvas[1]
        assert not any(left < r and x < right and top < b and t < bottom for x, t, r, b in taken)
        taken.append(label.box)


def test_a_checkerboard_of_patches_keeps_its_insides() -> None:
    cells = [(c, r) for c in range(5) for r in range(5) if (c + r) % 2 == 0]
    picture = overlay(result_with([cell(*at) for at in cells]), Image.new("RGB", (60, 60), PAPER))
    clean = [(part(picture, cell(*at)) == PAPER).all(axis=-1).mean() for at in cells]
    assert min(clean) > 0.9  # a thin line may lead to a label that found no place beside its patch


# --- heat map ---------------------------------------------------------------------------------------------------------


def test_heat_map_of_the_attention_leaves_the_rest_alone() -> None:
    picture = overlay(result_with([cell(0, 0), cell(2, 0)], attention=[0.05, 0.01]), scene(), heatmap=True)
    assert (part(picture, cell(4, 4)) == RED).all()
    top = [c + colours.HEAT_OPACITY[1] * (h - c) for c, h in zip(PAPER, colours.HEAT_STOPS[-1], strict=True)]
    assert near(part(picture, cell(0, 0)), tuple(top))
    assert not near(part(picture, cell(2, 0)), PAPER)
    assert all(near(pixel, module.AMBER) for pixel in around(picture, cell(0, 0), 1))


def heated(colour: tuple[int, int, int], weight: float) -> tuple[float, ...]:
    """What is seen of a colour under a share of the largest weight that is one of the heat map's own colours."""
    low, high = colours.HEAT_OPACITY
    heat = colours.HEAT_STOPS[round(weight * (len(colours.HEAT_STOPS) - 1))]
    return tuple(c + (low + (high - low) * weight) * (h - c) for c, h in zip(colour, heat, strict=True))


def attended(
    boxes: Sequence[Box | None], weights: Sequence[float], images: Sequence[int] | None = None
) -> list[CellAttention]:
    places = zip(images or [0] * len(boxes), boxes, weights, strict=True)
    return [CellAttention(image=image, cell=i, box=box, weight=w) for i, (image, box, w) in enumerate(places)]


def measured(
    cells: list[CellAttention], boxes: Sequence[Box | None] = (), sizes: Sequence[tuple[int, int]] = ((60, 60),)
) -> ReasoningResult:
    return result_with(boxes, sizes=list(sizes)).model_copy(update={"attention": cells})


def test_the_heat_map_shows_every_cell_that_was_measured() -> None:
    boxes = [cell(c, r) for r in range(5) for c in range(5)]
    weights = [0.25 * (i % 5) for i in range(25)]
    picture = overlay(measured(attended(boxes, weights), [cell(1, 1)]), scene(), heatmap=True)
    for box, weight in zip(boxes, weights, strict=True):
        ground = {(1, 1): BLUE, (2, 1): BLUE, (1, 2): BLUE, (2, 2): BLUE, (4, 4): RED}
        colour = ground.get((int(box[0] // 12), int(box[1] // 12)), PAPER)
        # The outline of the patch reaches into its neighbours.
        middle = part(picture, box)[24:72, 24:72]
        assert near(middle, heated(colour, weight)), box
    assert all(near(pixel, module.AMBER) for pixel in around(picture, cell(1, 1), 1))


def test_colours_mean_the_same_in_every_image_of_a_request() -> None:
    other = Image.new("RGB", (24, 36), RED)
    cells = attended([cell(0, 0), cell(1, 0), cell(1, 2)], [0.2, 0.1, 0.4], [0, 0, 1])
    first, second = overlays(measured(cells, sizes=[(60, 60), (24, 36)]), [scene(), other], heatmap=True)
    assert near(part(first, cell(0, 0)), heated(PAPER, 0.5)) and near(part(first, cell(1, 0)), heated(PAPER, 0.25))
    assert near(part(second, cell(1, 2), (24, 36)), heated(RED, 1.0))
    assert (part(second, cell(0, 0), (24, 36)) == RED).all()


@pytest.mark.parametrize("size", [(16, 16), (16, 8000), (8000, 5000)])
def test_heat_maps_of_small_and_huge_images(size: tuple[int, int]) -> None:
    """Tiles over an overview, of which one reaches out of the picture and one is not a box."""
    wide, high = size[0] / 2, size[1] / 2
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    tiles = [(wide, high, 4.0 * wide, 4.0 * high), (-wide, -high, wide, high), (float("nan"), 0.0, 1.0, 1.0)]
    image = Image.new("RGB", size, PAPER)
    result = measured(attended([whole, *tiles, None], [0.1, 0.4, 0.2, 0.3, 0.0]), sizes=[size])
    picture = overlay(result, image, heatmap=True, caption=False)
    layout = places.layout_of(size)
    assert near(part(picture, (wide, high, *whole[2:]), size)[1:, 1:], heated(PAPER, 1.0))
    assert near(part(picture, (0.0, 0.0, wide, high), size)[:-1, :-1], heated(PAPER, 0.5))
    assert near(part(picture, (wide, 0.0, whole[2], high), size)[:-1, 1:], heated(PAPER, 0.25))
    frame = pixels(picture)
    frame[layout.top : layout.top + layout.height, layout.left : layout.left + layout.width] = module.FRAME
    assert (frame == module.FRAME).all()


def test_the_layer_of_thousands_of_cells_is_a_small_png() -> None:
    grid = [(27.0 * c, 27.0 * r, 27.0 * c + 27, 27.0 * r + 27) for r in range(54) for c in range(54)]
    weights = np.random.default_rng(0).random(len(grid)).tolist()
    stream = io.BytesIO()
    module.heat_layer(places.layout_of((1458, 1458), 900), list(zip(grid, weights, strict=True)), 1.0).save(
        stream, "PNG"
    )
    assert stream.tell() < 60_000


def test_the_caption_says_what_the_colours_are_and_what_was_not_measured() -> None:
    every = measured(attended([cell(0, 0), cell(1, 0)], [0.1, 0.2]))
    some = measured(attended([cell(0, 0), None], [0.1, 0.2]))
    none = measured(attended([None, None], [0.1, 0.2]))
    left = "the attention to all image cells was not measured"
    assert module.heat_text(every, 0) == "colours: attention of the latents to 2 image cells"
    assert module.heat_text(some, 0).endswith("to 1 image cell; the places of 1 more are not known")
    assert module.heat_text(none, 0) == "no heat map: the places of the 2 image cells are not known"
    assert module.heat_text(result_with([cell(0, 0)]), 0) == f"colours: the patches alone, {left}"
    assert module.heat_text(result_with([]), 0) == f"no heat map: {left}"
    # Said in the picture too: a line more than without a heat map.
    assert overlay(result_with([]), scene(), heatmap=True).height > overlay(result_with([]), scene()).height


def test_heat_map_of_given_cells_shows_the_largest_weight_where_they_overlap() -> None:
    cells = [(cell(0, 4), 2.0), ((0.0, 0.0, 60.0, 60.0), 1.0)]
    picture = overlay(result_with([]), scene(), heatmap=cells)
    assert not near(part(picture, cell(0, 4)), tuple(part(picture, cell(0, 3))[0, 0]))
    grey = (Image.new("RGB", (60, 60), (128, 128, 128)), [(cell(i, 0), float(i)) for i in range(5)])
    shades = overlay(result_with([]), grey[0], heatmap=grey[1])
    luminance = [np.dot(part(shades, cell(i, 0)).mean(axis=(0, 1)), (0.299, 0.587, 0.114)) for i in range(5)]
    assert luminance == sorted(luminance)


def test_a_heat_map_without_weight_is_drawn() -> None:
    picture = overlay(result_with([]), scene(), heatmap=[(cell(0, 0), 0.0), ((90.0, 0.0, 99.0, 9.0), 0.0)])
    assert (part(picture, cell(4, 4)) == RED).all()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_checked(weight: float) -> None:
    with pytest.raises(InputError, match="weight"):
        overlay(result_with([]), scene(), heatmap=[(cell(0, 0), weight)])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((1, 1), (480, 480)),
        ((16, 16), (480, 480)),
        ((60, 60), (480, 480)),
        ((300, 200), (900, 600)),
        ((500, 700), (500, 700)),
        ((2048, 600), (2048, 600)),
        ((4096, 2048), (2048, 1024)),
        ((8000, 16), (2048, 4)),
        ((16, 8000), (4, 2048)),
        ((1, 20000), (1, 2048)),
        ((100, 1000), (200, 2000)),
    ],
)
def test_small_is_scaled_up_by_a_whole_factor_and_huge_down(size: tuple[int, int], shown: tuple[int, int]) -> None:
    box = size[0] * 0.25, size[1] * 0.25, size[0] * 0.75, size[1] * 0.75
    image = Image.new("RGB", size, PAPER)
    picture = overlay(result_with([box], size=size), image, caption=False)
    layout = places.layout_of(size)
    assert (layout.width, layout.height) == shown
    assert picture.size == layout.canvas
    assert near(part(picture, box, size), PAPER)
    assert picture.height - shown[1] == 2 * layout.top
    assert overlay(result_with([box], size=size), image).width == picture.width


def test_scaling_up_keeps_every_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    picture = overlay(result_with([(0.0, 0.0, 16.0, 16.0)], size=(16, 16)), Image.fromarray(noise), caption=False)
    shown = part(picture, (0, 0, 16, 16), (16, 16))
    assert (shown[15::30, 15::30] == noise).all()


numbers = st.floats(-400, 700) | st.sampled_from([1e308, -1e308, 1e-320])
anything = st.tuples(*[numbers | st.sampled_from([float("nan"), float("inf")])] * 4)
crossing = st.tuples(st.floats(-400, 0), st.floats(-400, 0), st.floats(0.5, 700), st.floats(0.5, 700))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 120), st.integers(1, 120)),
    st.lists(crossing | st.tuples(*[numbers] * 4) | anything, min_size=1, max_size=6),
)
def test_any_box_is_cut_at_the_picture(size: tuple[int, int], boxes: list[Box]) -> None:
    """Outside of the picture there is nothing but the frame's own colours, however wrong the boxes are."""
    layout = places.layout_of(size)
    for box in boxes:
        cells = layout.cells(box)
        if cells is not None:
            assert layout.left <= cells[0] < cells[2] <= layout.left + layout.width
            assert layout.top <= cells[1] < cells[3] <= layout.top + layout.height
    picture = overlay(result_with(boxes, size=size), Image.new("RGB", size, (9, 200, 9)), caption=False)
    assert picture.size == layout.canvas
    frame = pixels(picture)
    frame[layout.top : layout.top + layout.height, layout.left : layout.left + layout.width] = module.FRAME
    assert not (frame[..., 1] - frame[..., 0] > 50).any()  # the image's green never leaves its place


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_callers_image_is_not_changed_and_the_overlay_is_the_same_every_time() -> None:
    image, result = scene(), result_with([cell(1, 1), cell(4, 4), None])
    before = image.tobytes()
    first, second = overlay(result, image), overlay(result, image)
    assert image.tobytes() == before and image.size == (60, 60)
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"


def test_an_exif_orientation_is_applied() -> None:
    """A photo stored on its side: the box counts in the upright picture."""
    upright = Image.new("RGB", (60, 40), PAPER)
    ImageDraw.Draw(upright).rectangle((48, 0, 59, 11), fill=BLUE)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)
    photo = Image.open(stream)
    assert photo.size == (40, 60)
    picture = overlay(result_with([cell(4, 0)], size=(60, 40)), photo)
    assert (part(picture, cell(4, 0), (60, 40)) == BLUE).all()
    assert photo.size == (40, 60)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_is_drawn(mode: str) -> None:
    image = Image.new("I;16", (60, 60)) if mode == "I;16" else scene().convert("L").convert(mode)
    assert overlay(result_with([cell(1, 1)]), image).mode == "RGB"


def test_transparency_becomes_white() -> None:
    picture = overlay(result_with([cell(1, 1)]), Image.new("RGBA", (60, 60), (10, 20, 30, 0)))
    assert (part(picture, cell(1, 1)) == 255).all()


def test_another_image_is_refused() -> None:
    with pytest.raises(InputError, match="50 x 60") as caught:
        overlay(result_with([cell(1, 1)]), scene().resize((50, 60)))
    assert "not resized" in caught.value.hint
    for nothing in ("no-such-picture.png", None, 7, ["a"]):
        with pytest.raises(InputError):
            overlay(result_with([]), nothing)
    for index in (-1, 1):
        with pytest.raises(InputError, match="no image"):
            overlay(result_with([]), scene(), index=index)


def test_an_image_is_what_a_question_takes(tmp_path: Path) -> None:
    """Everything that ``invoke`` takes; a URL is refused as it is there."""
    path = tmp_path / "scene.png"
    scene().save(path)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    block = {"type": "image_url", "image_url": {"url": uri}}
    result = result_with([cell(1, 1)])
    expected = overlay(result, scene()).tobytes()
    for reference in (path, str(path), data, uri, block, Picture(path)):
        assert overlay(result, reference).tobytes() == expected
        assert overlay_data_uri(result, reference) == overlay_data_uri(result, scene())
        assert [each.tobytes() for each in overlays(result, [reference])] == [expected]
    with pytest.raises(ImageNotAllowedError):
        overlay(result, "http://127.0.0.1:9/scene.png")


def test_several_images_each_show_their_own_patches() -> None:
    other = Image.new("RGB", (24, 36), RED)
    result = result_with([cell(1, 1), cell(0, 0), cell(0, 2)], images=[0, 1, 1], sizes=[(60, 60), (24, 36)])
    first, second = overlays(result, [scene(), other])
    assert (part(first, cell(1, 1)) == BLUE).all()
    assert near(part(first, cell(0, 3)), veiled(PAPER))
    assert (part(second, cell(0, 2), (24, 36)) == RED).all()
    assert near(part(second, cell(1, 1), (24, 36))[2 * 8 : -2 * 8, 2 * 8 : -2 * 8], veiled(RED))
    assert second.tobytes() == overlay(result, other, index=1).tobytes()
    with pytest.raises(InputError, match="2 images, not 1"):
        overlays(result, [scene()])


def test_a_result_that_names_no_sizes_takes_any_image() -> None:
    result = ReasoningResult(answer="a cat", raw_text="a cat", confidence=None, confidence_source="unscored")
    assert overlay(result, scene()).width > 480


# --- caption and other forms ------------------------------------------------------------------------------------------


def test_the_caption_is_below_and_changes_nothing_above() -> None:
    with_caption = overlay(result_with([cell(1, 1)]), scene())
    without = overlay(result_with([cell(1, 1)]), scene(), caption=False)
    assert with_caption.height > without.height + 20
    assert with_caption.crop((0, 0, *without.size)).tobytes() == without.tobytes()
    below = pixels(with_caption)[without.height :]
    assert (below.max(axis=-1) > 200).any()
    assert (below[-4:] == module.FRAME).all() and (below[:, -4:] == module.FRAME).all()


def test_the_caption_says_what_is_not_drawn() -> None:
    result = result_with([cell(1, 1), None, None]).model_copy(update={"min_confidence": 0.5, "accepted": True})
    lines = module._caption_lines(result, 0, 2)
    assert lines == [
        "blue",
        "confidence 0.93 (answer probability), accepted at 0.50",
        "2 more patches without a known place",
    ]
    unscored = ReasoningResult(answer=" ", raw_text="", confidence=None, confidence_source="unscored")
    assert module._caption_lines(unscored, 0, 0) == ["(empty answer)", "confidence: not scored"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.29, "0.29"),
        (0.8996, "0.899"),
        (0.93, "0.93"),
        (0.9999, "0.999"),
        (1.0, "1.00"),
        (float("nan"), "not finite"),
        (1e308, "not finite"),
    ],
)
def test_a_confidence_is_never_rounded_up(value: float, text: str) -> None:
    assert words.confidence_text(value) == text


def test_text_from_outside_loses_its_control_characters() -> None:
    assert words.plain_text("a\x1b[31m\x00b\n\tc\u202ed\u200be\ud800") == "a[31mb cde"
    assert words.plain_text("x" * 5000) == "x" * 999 + "…"


@pytest.mark.parametrize(
    "answer", ["", "x" * 3000, "long words " * 300, "\x1b[2J\u202e\x00", "你好", "<b>bold</b>", "\n"]
)
def test_any_answer_has_a_caption_of_bounded_size(answer: str) -> None:
    picture = overlay(result_with([cell(1, 1)], answer=answer), scene())
    assert picture.width == overlay(result_with([]), scene()).width
    assert picture.height < 800


def test_png_and_data_uri_hold_the_same_picture() -> None:
    result = result_with([cell(1, 1)])
    png = overlay_png(result, scene())
    assert Image.open(io.BytesIO(png)).tobytes() == overlay(result, scene()).tobytes()
    head, body = overlay_data_uri(result, scene()).split(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == png


def test_show_opens_the_viewer_or_draws_in_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Image.Image]] = []
    monkeypatch.setattr(Image.Image, "show", lambda picture: seen.append(("viewer", picture)))
    monkeypatch.setattr(module, "_notebook_display", lambda: None)
    show(result_with([cell(1, 1)]), scene())
    monkeypatch.setattr(module, "_notebook_display", lambda: lambda picture: seen.append(("notebook", picture)))
    show(result_with([cell(1, 1)]), scene(), caption=False)
    assert [where for where, _ in seen] == ["viewer", "notebook"]
    assert seen[0][1].tobytes() == overlay(result_with([cell(1, 1)]), scene()).tobytes()


def test_importing_the_module_loads_no_picture_library() -> None:
    code = "import sys, latent_tool.views.overlay; print([m for m in ('PIL', 'numpy', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
