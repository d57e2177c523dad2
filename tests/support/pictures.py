"""Pictures the embedded model understands."""

from __future__ import annotations

from PIL import Image, ImageDraw


def draw_shapes(left: str = "circle", colour: tuple[int, int, int] = (220, 25, 25)) -> Image.Image:
    """A shape on the left and a blue square on the right, 200 by 150 pixels."""
    image = Image.new("RGB", (200, 150), "white")
    draw = ImageDraw.Draw(image)
    if left == "circle":
        draw.ellipse((20, 50, 70, 100), fill=colour)
    else:
        draw.polygon([(45, 50), (20, 100), (70, 100)], fill=colour)
    draw.rectangle((120, 50, 170, 100), fill=(30, 50, 225))
    return image
