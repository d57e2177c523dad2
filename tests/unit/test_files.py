"""A file is written whole or not at all: through ``kill -9`` at every step, full disks and bad places."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_tool.errors import SettingsError
from latent_tool.files import require_writable, write_whole

OLD, NEW = b"old" * 1000, b"new" * 100_000

# Kills itself at the step of writing that its argument counts; prints "done" if it gets to the end.
KILL = """
import os, pathlib, signal, sys
from latent_tool import files

left = int(sys.argv[2])

def step():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Slow:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        step()
        self.file.close()
    def write(self, data):
        for place in range(0, len(data), 1 + len(data) // 5):
            self.file.write(data[place : place + 1 + len(data) // 5])
            self.file.flush()
            step()
    def flush(self):
        self.file.flush()
        step()
    def fileno(self):
        return self.file.fileno()

open_, fsync, replace = pathlib.Path.open, os.fsync, pathlib.Path.replace

def slow_open(path, *arguments, **options):
    if not path.name.endswith(".tmp"):
        return open_(path, *arguments, **options)
    step()
    return Slow(open_(path, *arguments, **options))

def slow_fsync(number):
    step()
    fsync(number)
    step()

def slow_replace(path, target):
    step()
    result = replace(path, target)
    step()
    return result

pathlib.Path.open, os.fsync, pathlib.Path.replace = slow_open, slow_fsync, slow_replace
"""
WRITE = KILL + "files.write_whole(pathlib.Path(sys.argv[1]), b'new' * 100_000)\nprint('done')"


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_killed_at_every_step(tmp_path: Path, there: bool) -> None:
    seen = set()
    for step in range(0, 40):
        folder = tmp_path / str(step)
        folder.mkdir()
        target = folder / "out.bin"
        if there:
            target.write_bytes(OLD)
        done = subprocess.run([sys.executable, "-c", WRITE, str(target), str(step)], capture_output=True)
        found = target.read_bytes() if target.exists() else None
        assert found in (OLD if there else None, NEW)
        seen.add(found)
        left = [path.name for path in folder.iterdir() if path != target]
        assert all(name.startswith(".") and name.endswith(".tmp") for name in left)  # never taken for a result
        if done.returncode == 0:
            assert done.stdout == b"done\n" and found == NEW and not left
            break
        assert done.returncode == -9
    assert step > 8 and len(seen) == 2


@pytest.mark.slow
def test_killed_while_it_writes_again_and_again(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    code = """
import pathlib, sys
from latent_tool.files import write_whole
for number in range(10**9):
    write_whole(pathlib.Path(sys.argv[1]), bytes([number % 256]) * 300_000)
"""
    luck = random.Random(0)
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code, str(target)]) as process:
            while not target.exists():
                time.sleep(0.01)
            time.sleep(luck.random() * 0.1)
            for _ in range(20):
                data = target.read_bytes()  # also while it is being exchanged
                assert len(data) == 300_000 and len(set(data)) == 1
            process.kill()
        data = target.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1


@pytest.mark.parametrize("room", [0, 1, 5_000, 299_999])
def test_a_disk_that_is_full(tmp_path: Path, room: int) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(OLD)
    code = f"""
import pathlib, resource, sys
from latent_tool.errors import SettingsError
from latent_tool.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
try:
    write_whole(pathlib.Path(sys.argv[1]), b"new" * 100_000)
except SettingsError as error:
    print(error.hint != "", "too large" in error.message)
"""
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True True\n", "")
    assert target.read_bytes() == OLD and list(tmp_path.iterdir()) == [target]


def test_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ENOSPC`` from the system itself."""
    target = tmp_path / "out.bin"
    target.write_bytes(OLD)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: real(Path("/dev/full"), "wb", **more))
    with pytest.raises(SettingsError, match="No space left"):
        write_whole(target, NEW)
    monkeypatch.undo()
    assert target.read_bytes() == OLD and list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for target in (tmp_path / "no" / "out.bin", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(SettingsError) as caught:
            write_whole(target, NEW)
        assert caught.value.hint
    assert list(tmp_path.iterdir()) == []
    for target in (tmp_path / "no" / "out.png", tmp_path / "out.gif", tmp_path):
        with pytest.raises(SettingsError):
            require_writable(target, ".png")


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    write_whole(tmp_path / "link", NEW)
    assert (tmp_path / "other").read_bytes() == OLD and (tmp_path / "link").read_bytes() == NEW
