"""``kill -9`` while a file is written: the old file stays whole, or none is there; half a file is never read as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import draw_shapes
from PIL import Image

# The command, killed at its n-th write to disk: half of the bytes are in the file by then.
KILLED = """
import os, signal, sys
from latent_tool.cli import main
left = [{number}]
def killed(descriptor):
    left[0] -= 1
    if left[0] == 0:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = killed
sys.argv = ["latent-tool", "ask", "shapes.png", "what color is the circle?", "--iterations", "0",
            "--overlay", "seen.png", "--report", "page.html"]
main()
"""


def ask(folder: Path, killed_at: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLED.format(number=killed_at)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_command_leaves_no_half_file(tmp_path: Path) -> None:
    draw_shapes().save(tmp_path / "shapes.png")
    picture, page = tmp_path / "seen.png", tmp_path / "page.html"
    page.write_text("<html>old</html>")
    picture.write_bytes(b"old")

    assert ask(tmp_path, killed_at=1).returncode == -signal.SIGKILL
    assert picture.read_bytes() == b"old" and page.read_text() == "<html>old</html>"

    assert ask(tmp_path, killed_at=2).returncode == -signal.SIGKILL  # the overlay is written, the report is not
    with Image.open(picture) as seen:
        seen.load()
    assert page.read_text() == "<html>old</html>"

    # What a killed command leaves behind is hidden and has no name that anybody reads.
    left = {path.name for path in tmp_path.iterdir()} - {"shapes.png", "seen.png", "page.html"}
    assert len(left) == 2 and all(name.startswith(".") and name.endswith(".tmp") for name in left)
