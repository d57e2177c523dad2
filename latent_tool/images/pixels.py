"""Turn decoded pixels of any mode, or an array, into an upright RGB picture.

Transparent parts are laid on white. Values wider than eight bits are reduced to eight; where that means stretching
them, a warning says so. This module knows nothing of containers or of policies. Pillow and NumPy are imported when they
are needed.
"""

from __future__ import annotations

import math
import threading
from array import array
from typing import TYPE_CHECKING, Any

from latent_tool.errors import ImageDecodeError, ImageError, ImageTooLargeError
from latent_tool.images.limits import Limits, check_size
from latent_tool.images.orientation import exif_orientation

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["convert", "convert_copy", "from_array", "is_array"]

_loading = threading.Lock()  # Pillow's lazy loading is not safe in two threads at once
_MAX_EXIF = 1_000_000  # bytes: Pillow's parser copies the data of every tag, and tags may overlap
_BITS_IN_USE = 14  # values in more bits than this fill 16 bits well enough to be taken as they are


def convert_copy(image: Image) -> tuple[Image, tuple[str, ...]]:
    """``convert`` for an image of the caller's, which is loaded if it was not, but not changed.

    Of an animation the current frame is taken, with a warning. Its present EXIF says whether it is upright.

    Raises:
        ImageDecodeError: the image cannot be loaded, its mode has no RGB form, or a float pixel is not finite.
        ImageTooLargeError: there is not enough memory.
    """
    try:
        with _loading:
            copy = image.copy()
            frame = image.tell() if getattr(image, "is_animated", False) else None
            orientation = _present_orientation(image)
        picture, warnings = convert(copy, orientation)
    except ImageError:
        raise
    except MemoryError:
        raise ImageTooLargeError("There is not enough memory to convert the image.", "Scale it down.") from None
    except Exception:  # a lazily opened file may hold anything
        raise ImageDecodeError("The Pillow image cannot be loaded or converted.", "Load it first.") from None
    if frame is not None:
        warnings = (f"The image is animated; only the current frame, {frame}, is used.", *warnings)
    return picture, warnings


def _present_orientation(image: Image) -> int:
    """What the image's EXIF says now, its owner's changes included; 1 where it cannot be read."""
    block = image.info.get("exif")
    if isinstance(block, bytes) and len(block) > _MAX_EXIF:
        return exif_orientation(block) or 1
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF does not damage the pixels
        return 1
    return value if isinstance(value, int) else 1


def convert(
    image: Image, orientation: int, *, low: Image | None = None, clear: tuple[int, ...] = ()
) -> tuple[Image, tuple[str, ...]]:
    """Make an upright RGB picture, without metadata, of a Pillow image of any mode; and warnings.

    Args:
        image: may be changed.
        orientation: the EXIF value, 1 to 8; any other counts as 1.
        low: the lower bytes, where ``image`` is RGB or RGBA and holds the upper bytes of 16-bit values.
        clear: the grey value, or red, green and blue, that is transparent, as stored: compared before values are
            reduced to eight bits.

    Raises:
        ImageDecodeError: a float pixel is not finite.
    """
    from PIL import Image as pillow

    warnings: tuple[str, ...] = ()
    if not clear and image.mode.startswith("I") and isinstance(stored := image.info.get("transparency"), int):
        clear = (stored,)
    opaque = _opaque(image, low, clear) if clear else None
    if opaque is not None:
        image.info.pop("transparency", None)
    if image.mode.startswith(("I", "F")):
        image, warnings = _to_grey(image)
    elif low is not None:
        image, warnings = _to_eight_bits(image, low)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    if opaque is None and (image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info):
        if image.mode == "La":  # premultiplied grey converts by way of LA only
            image = image.convert("LA")
        image = image.convert("RGBA")
        opaque = image.getchannel("A")
    image = image.convert("RGB")  # a copy, if it is already
    if opaque is not None:
        page = pillow.new("RGB", image.size, "white")
        page.paste(image, mask=opaque)
        image = page
    turn = pillow.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    if orientation in turns:
        image = image.transpose(turns[orientation])
    image.info = {}
    return image, warnings


def _opaque(image: Image, low: Image | None, clear: tuple[int, ...]) -> Image:
    """A mask, mode L: 0 where a pixel has the colour ``clear``, 255 elsewhere."""
    from PIL import ImageChops

    if image.mode.startswith("I"):
        value = clear[0]
        table = [0 if stored == value else 255 for stored in range(65_536)]
        return image.convert("I").point(table, "L")
    bands = [*image.convert("L" if len(clear) == 1 else "RGB").split()]
    values = list(clear)
    if low is not None:
        bands += low.split()[: len(clear)]
        values = [value >> 8 for value in clear] + [value & 255 for value in clear]
    mask: Image | None = None
    for band, value in zip(bands, values, strict=True):
        differs = band.point([0 if stored == value else 255 for stored in range(256)])
        mask = differs if mask is None else ImageChops.lighter(mask, differs)
    assert mask is not None
    return mask


def _stretched(bits: int) -> tuple[str, ...]:
    return (f"Only {bits} of 16 bits are in use: the pixel values were stretched to 0 to 255.",)


def _to_grey(image: Image) -> tuple[Image, tuple[str, ...]]:
    """Integers and floats of any range as 8-bit grey."""
    wide = image.mode.startswith("I;16")
    if wide:
        image = image.convert("I")
    if image.mode == "F" and not math.isfinite(sum(array("f", image.tobytes()))):
        raise ImageDecodeError("The image has values that are not finite.", "Replace NaN and infinity by numbers.")
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if low >= 0 and high <= 1 and image.mode == "F":
        return image.point(lambda value: value * 255).convert("L"), ()
    if low >= 0 and high <= 255:
        return image.convert("L"), _stretched(8) if wide and high > 0 else ()
    if low >= 0 and high <= 65535 and image.mode == "I":
        bits = int(high).bit_length()
        if bits > _BITS_IN_USE:
            return image.point(lambda value: value * (1 / 256)).convert("L"), ()
        scale = 255 / ((1 << bits) - 1)  # all bits, not the largest value: black and the relations stay what they are
        return image.convert("F").point(lambda value: value * scale + 0.0).convert("L"), _stretched(bits)
    scale = 255 / (high - low) if high > low else 0
    grey = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
    return grey, (f"The pixel values {low:g} to {high:g} were stretched to 0 to 255.",)


def _to_eight_bits(high: Image, low: Image) -> tuple[Image, tuple[str, ...]]:
    """Colours from their upper and lower bytes; alpha keeps its upper byte."""
    from PIL import Image as pillow
    from PIL import ImageChops

    colours, below = high.split()[:3], low.split()[:3]
    bits = 8 + max(band.getextrema()[1] for band in colours).bit_length()  # type: ignore[union-attr]
    if bits > _BITS_IN_USE or (bits == 8 and not any(band.getextrema()[1] for band in below)):
        return high, ()
    up, down = 16 - bits, bits - 8
    upper = [min(value << up, 255) & 255 for value in range(256)]
    lower = [value >> down for value in range(256)]
    joined = [ImageChops.add(a.point(upper), b.point(lower)) for a, b in zip(colours, below, strict=True)]
    return pillow.merge(high.mode, [*joined, *high.split()[3:]]), _stretched(bits)


# Arrays -----------------------------------------------------------------------------------------------------------


def is_array(value: object) -> bool:
    """Tell whether this is an array or a tensor, of whatever library, without importing one."""
    return all(hasattr(value, name) for name in ("shape", "dtype", "__array__"))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in value.shape)


def _is_tensor(value: object) -> bool:
    return hasattr(value, "detach")


def _layout(shape: tuple[int, ...], *, tensor: bool) -> str:
    """HW, HWC or CHW; empty if the shape is none of these or could be two."""
    if len(shape) == 2:
        return "HW"
    last = len(shape) == 3 and shape[2] in (1, 3, 4)
    first = tensor and len(shape) == 3 and shape[0] in (1, 3, 4)
    return "" if last and first else "HWC" if last else "CHW" if first else ""


def from_array(value: Any, limits: Limits) -> Image:
    """Make a Pillow image of an array: (H, W) grey, (H, W, C) with C = 1, 3 (RGB) or 4 (RGBA); a tensor also (C, H, W).

    Values are uint8, bool, or floats in [0, 1]. The array is not changed, and may be on any device.

    Raises:
        ImageDecodeError: another shape, type or range; the hint is a line that makes a right one.
        ImageTooLargeError: more pixels or a longer side than ``limits`` allow.
    """
    import numpy as np
    from PIL import Image as pillow

    shape, tensor = _shape(value), _is_tensor(value)
    layout = _layout(shape, tensor=tensor)
    if not layout:
        raise _wrong_shape(shape, tensor=tensor)
    check_size((shape[layout.index("W")], shape[layout.index("H")]), limits)
    try:
        if tensor:
            value = value.detach().cpu()
            if "bfloat16" in str(value.dtype):  # which NumPy does not have
                value = value.float()
        pixels = np.asarray(value)
    except Exception:  # sparse, quantised, without data
        raise ImageDecodeError("The array cannot be read.", "Pass a NumPy array, or a dense tensor.") from None
    if layout == "CHW":
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    elif "float" in pixels.dtype.name:
        pixels = _unit_range(pixels.astype(np.float32, copy=False), tensor=tensor)
    elif pixels.dtype != np.uint8:
        raise _wrong_type(pixels, tensor=tensor)
    mode = "L" if pixels.ndim == 2 else {3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    return pillow.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())


def _unit_range(pixels: Any, *, tensor: bool) -> Any:
    """Floats in [0, 1] as uint8."""
    import numpy as np

    low, high = float(pixels.min()), float(pixels.max())
    if not math.isfinite(low) or not math.isfinite(high):
        line = "array.nan_to_num()" if tensor else "numpy.nan_to_num(array)"
        raise ImageDecodeError("The array has values that are not finite.", f"Pass {line}.clip(0, 1).")
    if low < 0 or high > 1:
        if (low > -0.2 and high < 1.2) or low == high:
            hint = "Pass array.clip(0, 1)."
        elif low >= 0 and high <= 255:
            hint = "Pass array / 255, if 255 is white."
        else:
            hint = "Undo its normalisation, or pass (array - array.min()) / (array.max() - array.min())."
        raise ImageDecodeError(f"The array's values are {low:g} to {high:g}; floats must be in [0, 1].", hint)
    return np.rint(pixels * np.float32(255)).astype(np.uint8)


def _wrong_type(pixels: Any, *, tensor: bool) -> ImageDecodeError:
    kind = pixels.dtype.name
    if pixels.dtype.kind not in "iu":
        return ImageDecodeError(f"The array holds {kind}.", "Pass uint8, or floats in [0, 1].")
    low, high = int(pixels.min()), int(pixels.max())
    if low >= 0 and high <= 255:
        hint = "Pass array.byte()." if tensor else "Pass array.astype('uint8')."
    else:
        floats = "array.double()" if tensor else "array.astype(float)"
        white = 65_535 if low >= 0 and high <= 65_535 else max(abs(low), abs(high))
        hint = f"Divide by what is white: pass ({floats} / {white}).clip(0, 1)."
    return ImageDecodeError(f"The array holds {kind}, {low} to {high}; uint8 or floats in [0, 1] are read.", hint)


def _wrong_shape(shape: tuple[int, ...], *, tensor: bool) -> ImageDecodeError:
    what, turn = ("tensor", "permute") if tensor else ("array", "transpose")
    if len(shape) == 4:
        hint = "Pass one of the batch, array[0], or all as a list: images=list(array)."
    elif len(shape) == 3 and tensor and shape[0] in (1, 3, 4) and shape[2] in (1, 3, 4):
        hint = "It may be (C, H, W) or (H, W, C): pass array.permute(1, 2, 0).numpy() or array.numpy()."
    elif len(shape) == 3 and shape[0] in (1, 3, 4):
        hint = f"Its channels come first: pass array.{turn}(1, 2, 0)."
    elif len(shape) == 3 and shape[2] == 2:
        hint = "Pass its grey values, array[:, :, 0]."
    elif len(shape) == 3 and shape[2] > 4:
        hint = "Choose red, green and blue among the channels: array[:, :, [0, 1, 2]]."
    else:
        hint = "Pass (H, W), or (H, W, C) with 1, 3 or 4 channels."
    return ImageDecodeError(f"The {what} has the shape {shape[:8]}, which is not that of one image.", hint)
