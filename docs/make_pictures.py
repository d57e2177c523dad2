"""Make the pictures of the README from the embedded model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from latent_tool import LatentReasoner
from latent_tool.overlay import overlay

ROOT = Path(__file__).parents[1]


def main() -> None:
    path = ROOT / "examples" / "images" / "shapes.png"
    result = LatentReasoner().invoke({"image": path, "question": "What is right of the red circle?"})
    with Image.open(path) as picture:
        overlay(result, picture).save(ROOT / "docs" / "images" / "overlay.png", optimize=True)


if __name__ == "__main__":
    main()
