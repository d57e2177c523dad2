"""Draw the pictures in ``examples/images``: the kind of picture the embedded model knows."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).parent / "images"
SCALE = 4  # drawn larger and reduced, for smooth edges


def canvas(width: int, height: int, colour: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width * SCALE, height * SCALE), colour)
    return image, ImageDraw.Draw(image)


def scaled(*values: float) -> list[float]:
    return [value * SCALE for value in values]


def save(image: Image.Image, name: str) -> None:
    size = (image.width // SCALE, image.height // SCALE)
    image.resize(size, Image.Resampling.LANCZOS).save(FOLDER / name, optimize=True)


def shapes() -> None:
    image, draw = canvas(288, 240)
    draw.ellipse(scaled(30, 84, 92, 146), fill=(220, 25, 25))
    draw.rectangle(scaled(186, 92, 244, 150), fill=(30, 50, 225))
    draw.polygon(scaled(120, 224, 152, 166, 184, 224), fill=(25, 150, 40))
    save(image, "shapes.png")


def chart() -> None:
    image, draw = canvas(288, 240, "#f6f6f6")
    for index, (height, colour) in enumerate(((90, (250, 135, 10)), (180, (30, 50, 225)), (50, (25, 150, 40)))):
        left = 44 + index * 74
        draw.rectangle(scaled(left, 210 - height, left + 52, 210), fill=colour)
    draw.line(scaled(24, 210, 268, 210), fill=(40, 40, 40), width=2 * SCALE)
    save(image, "chart.png")


def number() -> None:
    image, draw = canvas(240, 240, "#f0e4c8")
    font = ImageFont.load_default(110 * SCALE)
    draw.text(scaled(120, 120), "47", fill=(130, 30, 165), font=font, anchor="mm")
    save(image, "number.png")


if __name__ == "__main__":
    for draw_picture in (shapes, chart, number):
        draw_picture()
