"""Prints what becomes of every hostile image of the tests: case, bytes, expected, observed, seconds, peak memory.

    python benchmarks/hostile_images.py > table.md

Each case is decoded in a fresh process, so that the peak is its own. The summary goes to the standard error output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ONE = """
import json, resource, sys, time
sys.path[:0] = json.loads(sys.argv[1])
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from latent_tool.errors import ImageError
from latent_tool.images import load_image
from latent_tool.settings import ImagePolicy
data, policy = sys.stdin.buffer.read(), ImagePolicy.untrusted()
before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
try:
    picture = load_image(data, policy).image
    seen = "image {}x{}".format(*picture.size)
except ImageError as error:
    seen = type(error).__name__
after = resource.getrusage(resource.RUSAGE_SELF)
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps([seen, seconds, (after.ru_maxrss - before.ru_maxrss) / 1024]))
"""


def main() -> int:
    from hostile_images import cases

    print("| case | bytes | expected | observed | CPU seconds | MB more |\n|---|---|---|---|---|---|")
    slowest, largest, wrong, table = 0.0, 0.0, 0, cases()
    for name, (data, must_fail) in table.items():
        command = [sys.executable, "-c", ONE, json.dumps(sys.path[:2])]
        result = subprocess.run(command, input=data, capture_output=True, timeout=120)
        seen, seconds, more = json.loads(result.stdout) if result.returncode == 0 else ["crash", 0.0, 0.0]
        expected = "error" if must_fail else "image or error"
        wrong += seen == "crash" or (must_fail and not seen.endswith("Error"))
        slowest, largest = max(slowest, seconds), max(largest, more)
        print(f"| {name} | {len(data)} | {expected} | {seen} | {seconds:.2f} | {more:.0f} |")
    print(
        f"{len(table)} cases, {wrong} wrong; slowest {slowest:.2f} s, largest {largest:.0f} MB more than before",
        file=sys.stderr,
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
