"""Try hostile images, URLs and paths: case, bytes, expected, observed, seconds, memory.

    python benchmarks/hostile_images.py [--write docs/measured/hostile-inputs.md]

The full table is written to ``out/hostile-inputs.md``; ``--write`` names the page for the summary by kinds.
Each case runs in a process of its own, so that time and memory are its own. The images are those of the tests and of
the source distributions of PyPI packages that test with broken ones, which are downloaded; the URLs lead to a server on
this machine that stalls, drips, lies and serves ten gigabytes. The totals are printed. The exit code is 1 if anything
crashed, hung, was not what was expected or went beyond its limits.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "tests" / "unit")]

PACKAGES = ("pillow==12.0.0", "imagesize==2.0.1", "hachoir==3.4.0", "filetype==1.2.0", "puremagic==1.30")
SUFFIXES = (
    ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .ppm .tga .jp2 .j2k .psd .icns .dds .pcx .sgi .avif .fli .eps"
)
IMAGE_SECONDS, IMAGE_MB = 20.0, 1000.0  # of processor time; beyond what was used before
URL_SECONDS, URL_MB = 10.0, 100.0  # on the clock: 5 s for the download, the rest for a busy machine
PATH_SECONDS, PATH_MB = 5.0, 100.0


class Case(NamedTuple):
    """``expected``: names of errors, or of "image", that are right."""

    name: str
    size: int
    reference: Any
    policy: Any
    expected: tuple[str, ...]


class Tally:
    """Counts of one table, or of one kind in it."""

    def __init__(self) -> None:
        self.cases = self.wrong = self.images = 0
        self.slowest = self.largest = 0.0

    def add(self, *, fine: bool, opened: bool, used: float, more: float) -> None:
        self.cases += 1
        self.wrong += not fine
        self.images += opened
        self.slowest, self.largest = max(self.slowest, used), max(self.largest, more)

    def row(self, name: str) -> str:
        counts = f"{self.cases} | {self.images} | {self.cases - self.images} | {self.wrong}"
        return f"| {name} | {counts} | {self.slowest:.2f} | {self.largest:.0f} |"

    def __str__(self) -> str:
        return (
            f"{self.cases} cases, {self.wrong} wrong; {self.images} opened, {self.cases - self.images} refused; "
            f"slowest {self.slowest:.2f} s, largest {self.largest:.0f} MB more than before"
        )


def attempt(case: Case, answer: Connection) -> None:
    """What becomes of a case, seconds on the clock and of the processor, and MB beyond what was used before."""
    from latent_tool.errors import ImageError
    from latent_tool.images.load import load_image

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    try:
        load_image(case.reference, case.policy)
        seen = "image"
    except ImageError as error:
        seen = type(error).__name__
    after, clock = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - began
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer.send((seen, clock, worked, (after.ru_maxrss - before.ru_maxrss) / 1024))


class Table(NamedTuple):
    """One kind of input: its full rows, and its sums by kinds and altogether."""

    title: str
    limits: str
    rows: list[str]
    kinds: dict[str, Tally]
    total: Tally

    def full(self) -> str:
        head = "| case | bytes | expected | observed | s | MB more |\n|---|---|---|---|---|---|"
        return "\n".join([f"## {self.title}\n\n{self.limits}\n", head, *self.rows, f"\n{self.total}\n"])

    def summary(self) -> str:
        head = "| kind | cases | opened | refused | wrong | slowest, s | MB more |\n" + "|---" * 7 + "|"
        rows = [tally.row(kind) for kind, tally in self.kinds.items()]
        return "\n".join([f"## {self.title}\n\n{self.limits}\n", head, *rows, self.total.row("**all**"), ""])


def kind_of(case: str) -> str:
    """What a case is counted as: what stands before the colon, or a URL."""
    start = re.match(r"([\w= -]+): ", case)
    return start[1] if start else "redirect" if case.startswith("redirect") else "URL"


def run(title: str, cases: Iterator[Case], seconds: float, memory: float, *, clock: bool) -> Table:
    """Try every case of one kind."""
    limits = f"At most {seconds:g} s {'on the clock' if clock else 'of processor time'} and {memory:g} MB."
    fork, table = multiprocessing.get_context("fork"), Table(title, limits, [], {}, Tally())
    for case in cases:
        here, there = fork.Pipe()
        process = fork.Process(target=attempt, args=(case, there))
        process.start()
        there.close()
        try:
            seen, clocked, worked, more = here.recv() if here.poll(120) else ("hang", 0.0, 0.0, 0.0)
        except EOFError:
            seen, clocked, worked, more = "crash", 0.0, 0.0, 0.0
        process.kill()
        process.join()
        used = clocked if clock else worked
        fine = seen in case.expected and used <= seconds and more <= memory
        for tally in (table.total, table.kinds.setdefault(kind_of(case.name), Tally())):
            tally.add(fine=fine, opened=seen == "image", used=used, more=more)
        if not fine:
            print(f"WRONG: {case.name}: {seen}, {used:.2f} s, {more:.0f} MB", file=sys.stderr)
        expected = "image or error" if len(case.expected) > 2 else " or ".join(case.expected)
        name = case.name.encode("unicode_escape").decode("ascii").replace("|", "\\|")
        table.rows.append(f"| {name[:90]} | {case.size} | {expected} | {seen} | {used:.2f} | {more:.0f} |")
    print(f"{title}: {table.total}", flush=True)
    return table


REFUSED_BYTES = ("ImageDecodeError", "ImageTooLargeError")


def own_images() -> Iterator[Case]:
    from hostile_images import cases

    from latent_tool.settings import ImagePolicy

    for name, (data, must_fail) in cases().items():
        expected = REFUSED_BYTES if must_fail else ("image", *REFUSED_BYTES)
        yield Case(name, len(data), data, ImagePolicy.untrusted(), expected)
    for name, text in (
        ("data URI: 20 million percent signs", "data:image/png," + "%" * 20_000_000),
        ("data URI: 20 million single escapes", "data:image/png," + "%41a" * 5_000_000),
        ("data URI: base64 of single escapes", "data:;base64," + "%41A" * 5_000_000),
        ("data URI: base64 with 10 million spaces", "data:;base64," + "A " * 10_000_000),
        ("data URI: longer than any image", "data:;base64," + "A" * 90_000_000),
    ):
        yield Case(name, len(text), text, ImagePolicy.untrusted(), REFUSED_BYTES)


def corpora(folder: Path) -> Iterator[Case]:
    """Every image file in the source distributions of the packages."""
    from latent_tool.settings import ImagePolicy

    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        name = package.replace("==", "-")
        if not (folder / f"{name}.tar.gz").exists():
            command = ["pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder), package]
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            for entry in archive:
                if entry.isfile() and entry.name.lower().endswith(tuple(SUFFIXES.split())):
                    file = archive.extractfile(entry)
                    assert file is not None
                    data = file.read()
                    place = entry.name.partition("/")[2].removeprefix("Tests/").removeprefix("images/")
                    title = f"{package.partition('=')[0]}: {place}"
                    yield Case(title, len(data), data, ImagePolicy.untrusted(), ("image", *REFUSED_BYTES))


def urls() -> Iterator[Case]:
    import pytest
    from image_server import BadServer
    from test_images_remote import DRIP, FAULTS, LEAD_OUT, OPENED, REFUSED, STALL, WELCOME, stand_in

    from latent_tool.settings import ImagePolicy

    with pytest.MonkeyPatch.context() as patch:
        names = stand_in(patch)
        for name in ("127.1", "0", "2130706433", "0x7f000001", "localhost", "evil.test"):
            names.table[name] = ["127.0.0.1"]
        server = BadServer()
        policy = ImagePolicy.untrusted(
            hosts=[server.netloc],
            allow_http=True,
            allow_private_hosts=True,
            stall_s=2,
            download_s=5,
            max_bytes=1_000_000,
        )
        forms = [(url, ("image",)) for url in OPENED] + [(url, ("ImageNotAllowedError",)) for url in REFUSED]
        for url, expected in forms:
            yield Case(url, len(url), url.replace("PORT", str(server.port)), policy, expected)
        base = f"http://{server.netloc}/"
        for location in LEAD_OUT:
            url = base + "redirect/302/" + quote(location, safe="", encoding="latin-1")
            yield Case(f"redirect to {location}", len(url), url, policy, ("ImageNotAllowedError",))
        behaviours: list[tuple[str, tuple[str, ...]]] = [(path, ("image",)) for path in (*WELCOME, "count/5")]
        behaviours += [(path, (error.__name__,)) for path, error, _ in FAULTS]
        behaviours += [(path, ("ImageNotFoundError",)) for path in (*STALL, *DRIP, "count/6", "loop")]
        for path, expected in behaviours:
            yield Case(f"server: {path}", len(base + path), base + path, policy, expected)
        server.stop()


def paths() -> Iterator[Case]:
    from test_images import PATHS, make_tree

    from latent_tool.settings import ImagePolicy

    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as pipe:
        tree, here = Path(name).resolve(), os.getcwd()
        make_tree(tree)
        os.chdir(tree)
        pipe.bind("open/socket.png")
        policies = {
            "any": ImagePolicy.local(),
            "folder": ImagePolicy.untrusted(folders=[tree / "open"]),
            "none": ImagePolicy.untrusted(),
        }
        any_error = ("ImageNotAllowedError", "ImageNotFoundError", *REFUSED_BYTES)
        for path, with_any, with_folder in PATHS:
            for kind, error in (("any", with_any), ("folder", with_folder), ("none", None)):
                if kind == "none":
                    expected: tuple[str, ...] = ("ImageNotAllowedError",)
                else:
                    expected = ("image",) if error is None else (error.__name__,)
                if expected == ("ImageError",):
                    expected = any_error
                reference = path.replace("{}", str(tree))
                yield Case(f"files={kind}: {path}", len(path), reference, policies[kind], expected)
        os.chdir(here)


def cost_of_isolation() -> str:
    """Shortest of many times, for a small and for a large picture."""
    from hostile_images import encode, originals, photo

    from latent_tool.images.load import load_image
    from latent_tool.settings import ImagePolicy

    said = []
    for name, data, times in (
        ("40x30 JPEG", originals()["jpeg"], 100),
        ("4000x3000 JPEG", encode(photo(4000, 3000), "JPEG"), 5),
    ):
        for policy in (ImagePolicy.untrusted(), ImagePolicy.server()):
            spent = [time_of(lambda data=data, policy=policy: load_image(data, policy)) for _ in range(times)]
            kind = "in a process of its own" if policy.isolate else "here"
            first = f" (first {spent[0] * 1000:.0f} ms)" if policy.isolate else ""
            said.append(f"{name} {kind}: {min(spent) * 1000:.1f} ms{first}")
    return "; ".join(said)


def time_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    from hostile_images import originals

    from latent_tool.images.load import load_image
    from latent_tool.settings import ImagePolicy

    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--corpora", type=Path, default=ROOT / "out" / "corpora", help="Where downloads are kept.")
    arguments.add_argument("--no-corpora", action="store_true", help="Only what needs no network.")
    arguments.add_argument("--out", type=Path, default=ROOT / "out" / "hostile-inputs.md", help="The full table.")
    arguments.add_argument("--write", type=Path, help="The page that sums it up.")
    options = arguments.parse_args()
    for data in originals().values():
        load_image(data, ImagePolicy.untrusted())  # what is imported now need not be in every process
    importlib.import_module("httpx")
    tables = [
        run("Paths", paths(), PATH_SECONDS, PATH_MB, clock=True),
        run("URLs", urls(), URL_SECONDS, URL_MB, clock=True),
        run("Images of the tests", own_images(), IMAGE_SECONDS, IMAGE_MB, clock=False),
    ]
    if not options.no_corpora:
        title = f"Images of {', '.join(PACKAGES)}"
        tables.append(run(title, corpora(options.corpora), IMAGE_SECONDS, IMAGE_MB, clock=False))
    cost = cost_of_isolation()
    print(cost)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("# Hostile inputs, case by case\n\n" + "\n".join(table.full() for table in tables))
    if options.write:
        options.write.write_text(page(tables, cost))
    return int(any(table.total.wrong for table in tables))


def page(tables: list[Table], cost: str) -> str:
    """The summary, as it stands in the docs."""
    return f"""# Hostile inputs

Written by `python benchmarks/hostile_images.py --write docs/measured/hostile-inputs.md`, which also writes every
case to `out/hostile-inputs.md`: bytes, what was expected, what came, seconds and memory. What is promised
([SECURITY.md](../../SECURITY.md)): an upright RGB picture or a typed error, within the limits of the policy.

Each case ran in a process of its own. *Wrong* counts what crashed, hung, was opened although it must not be, raised
another error than expected, or took more time or memory than the limits allow.

{chr(10).join(table.summary() for table in tables)}
## Isolation

{cost}.
"""


if __name__ == "__main__":
    sys.exit(main())
