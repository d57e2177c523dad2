"""Keep small copies of the pictures that a report shows, in the folder of its run."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from latent_tool.evaluation.datasets import Item
from latent_tool.files import make_folder, write_whole

__all__ = ["make_thumbnails", "read_thumbnails"]

FOLDER = "thumbnails"
SIDE = 192  # pixels of the longer side
_SHOWN = 4  # pictures of one question, at most


def make_thumbnails(folder: Path, items: Sequence[Item], wanted: Iterable[str]) -> None:
    """Write the pictures of the wanted items; one that cannot be opened has none.

    Raises ``SettingsError`` when a file cannot be written.
    """
    names = set(wanted)
    missing = [item for item in items if item.id in names and not _path(folder, item.id).exists()]
    if missing:
        make_folder(folder / FOLDER)
    for item in missing:
        try:
            data = _small(item)
        except Exception:  # whatever a loader raises, the row of the item says it
            continue
        write_whole(_path(folder, item.id), data)


def read_thumbnails(folder: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Return the thumbnails that a run's folder has, as data URIs, by the id of their item."""
    shown = {}
    for name in wanted:
        try:
            data = _path(folder, name).read_bytes()
        except OSError:
            continue
        shown[name] = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return shown


def _path(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.jpg"


def _small(item: Item) -> bytes:
    """The pictures of an item beside each other, as one JPEG."""
    from PIL import Image

    pictures = [image.convert("RGB") for image in item.load()[:_SHOWN]]
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE))
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    written = io.BytesIO()
    sheet.save(written, "JPEG", quality=85)
    return written.getvalue()
