"""Whatever the bytes are: a picture or a typed error, within time and memory, and nothing else."""

from __future__ import annotations

import base64
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hostile_images import as_image, bmp, cases, originals
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_samples import data_uri, png

from latent_tool.errors import DeadlineError, ImageDecodeError, ImageError, ImageNotAllowedError, ImageTooLargeError
from latent_tool.images import apart as image_process
from latent_tool.images.download import _take_apart
from latent_tool.images.load import LoadedImage, load_image, load_images
from latent_tool.settings import ImagePolicy

POLICY = ImagePolicy.untrusted()
APART = ImagePolicy.untrusted(isolate=True)
CASES = cases()
ORIGINALS = originals()
KEYS = ["type", "url", "image_url", "source", "data", "base64", "image", "value", "path", "x"]
fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class _TooSlow(BaseException):
    """Not an Exception, so that nothing on the way takes it for damaged data."""


@contextmanager
def guarded(seconds: int = 20, memory: int = 1_000_000_000) -> Iterator[None]:
    """Ends what takes longer, and refuses to give more than so many bytes of memory."""

    def stop(*_: object) -> None:
        raise _TooSlow

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(reference: object, policy: ImagePolicy = POLICY) -> LoadedImage | ImageError:
    try:
        loaded = load_image(reference, policy)
    except ImageError as error:
        assert type(error) in (ImageDecodeError, ImageTooLargeError)
        assert error.message and error.hint and len(str(error)) < 400
        assert "memory" not in error.message, "a limit of the policy should have refused it before"
        assert str(error).isprintable()
        return error
    width, height = loaded.image.size
    assert loaded.image.mode == "RGB" and 0 < width * height <= policy.max_pixels
    assert len(loaded.image.tobytes()) == 3 * width * height and loaded.image.info == {}
    return loaded


def test_the_table_is_large_and_its_originals_are_good() -> None:
    assert len(CASES) >= 400
    for data in ORIGINALS.values():
        assert isinstance(attempt(data), LoadedImage)


@pytest.mark.parametrize("name", CASES)
def test_hostile_image(name: str, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]) -> None:
    data, must_fail = CASES[name]
    with guarded():
        outcome = attempt(data)
    if must_fail:
        assert isinstance(outcome, ImageError), outcome
    out, err = capfd.readouterr()
    assert not recwarn.list and not out
    assert not err or "tiff" in name  # libtiff complains to the standard error output, and cannot be told not to


def test_run_lengths_of_ordinary_size_are_read() -> None:
    """Two rows of five pixels, from the bottom: a run each, of a white and of a black palette entry."""
    black = bmp(5, 2, b"\5\1\0\0\5\0\0\1", bits=8, packing=1, colours=2)
    loaded = attempt(black[:58] + b"\xff\xff\xff\0" + black[62:])
    assert isinstance(loaded, LoadedImage) and loaded.image.size == (5, 2)
    assert [loaded.image.getpixel((4, y)) for y in range(2)] == [(0, 0, 0), (255, 255, 255)]


def test_pillow_images_opened_from_hostile_bytes() -> None:
    for data in [data for name, (data, _) in CASES.items() if "flipped" in name or "cut" in name]:
        with suppress(Exception), as_image(data) as lazy:
            attempt(lazy)


@fuzz
@given(
    st.sampled_from(sorted(ORIGINALS)),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12),
    st.integers(0, 10_000),
    st.binary(max_size=8),
)
def test_mutated_bytes(name: str, edits: list[tuple[int, int]], place: int, inserted: bytes) -> None:
    data = bytearray(ORIGINALS[name])
    for where, value in edits:
        data[where % len(data)] = value
    place %= len(data)
    attempt(bytes(data[:place] + inserted + data[place:]))


@fuzz
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0+"]),
)
def test_any_bytes(data: bytes, magic: bytes) -> None:
    attempt(magic + data)
    attempt(b"RIFF" + data[:4].ljust(4) + b"WEBP" + data)


@fuzz
@given(st.text(max_size=200), st.text(max_size=40))
@example("", ";base64")
@example("%", "")
@example("=" * 50, ";base64")
@example("data:;base64," * 20, ";base64")
@example("\ud800", "")
@example("A" * 5, ";base64")
@example("%zz%", "image/png;base64")
def test_any_data_uri(payload: str, head: str) -> None:
    for reference in (
        f"data:{head},{payload}",
        f"data:{head};base64,{payload}",
        {"base64": payload},
        {"url": "data:" + head},
    ):
        assert isinstance(attempt(reference), ImageError)


@fuzz
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
        lambda inner: st.dictionaries(st.sampled_from(KEYS), inner) | st.lists(inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_reference(reference: Any) -> None:
    with pytest.raises(ImageError):
        load_image(reference, POLICY)


@fuzz
@given(st.text(alphabet=st.sampled_from("htps:/.@[]%#?\\ \t-_0x7fimg1tesevl\u3002\uff0e"), max_size=40))
@example("http://img.test")
@example("https://img.test:443/")
def test_any_url_is_refused_or_leads_to_an_allowed_host(text: str) -> None:
    policy = ImagePolicy.untrusted(hosts=["img.test"], allow_http=True)
    for url in (text, "http://" + text, "http://img.test" + text, "https://" + text + "img.test/"):
        try:
            place = _take_apart(url, policy)
        except ImageNotAllowedError:
            continue
        assert place.host == "img.test" and place.port == {"http": 80, "https": 443}[place.scheme]
        assert "@" not in url.split("/")[2] and place.rest[0] in "/?"


@pytest.mark.parametrize("name", ["bytes", "base64", "path"])
def test_errors_never_repeat_what_was_given(name: str) -> None:
    secret = b"SECRETSECRETSECRET" * 20
    data = b"\x89PNG\r\n\x1a\n" + secret
    text = base64.b64encode(secret).decode()
    references: dict[str, list[object]] = {
        "bytes": [data, data_uri(data), b"BM" + secret, secret],
        "base64": [{"base64": text + "!"}, "data:image/png;base64," + text + "!", {"url": text}, {text: text}],
        "path": [text, secret.decode(), "https://user:SECRETSECRET@example.org/", "ftp://SECRETSECRET@example.org"],
    }
    for reference in references[name]:
        for policy in (ImagePolicy.local(), ImagePolicy.local(isolate=True)):
            with pytest.raises(ImageError) as caught:
                load_image(reference, policy)
            for told in (str(caught.value), repr(caught.value)):
                assert "SECRETSECRET" not in told and text[:20] not in told


# Several threads --------------------------------------------------------------------------------------------------


def test_many_threads_at_once() -> None:
    expected = {name: load_image(data, POLICY).image.tobytes() for name, data in ORIGINALS.items()}
    lazy = as_image(ORIGINALS["png-rgb"])

    def work(number: int) -> None:
        for name, data in ORIGINALS.items():
            assert load_image(data, POLICY).image.tobytes() == expected[name]
            with pytest.raises(ImageError):
                load_image(data[:20], POLICY)
        assert load_image(lazy, POLICY).image.tobytes() == expected["png-rgb"]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))


# A process of its own ---------------------------------------------------------------------------------------------


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets the helper run some code before it serves: what it replaces is replaced in every process it forks."""
    start = image_process._START

    def prepare(code: str) -> None:
        image_process._close()
        code = "import json, os, signal, socket, sys, time\n" + code + "\nimage_process._serve()"
        monkeypatch.setattr(image_process, "_START", start.replace("image_process._serve()", code))

    yield prepare
    image_process._close()


def answers(code: str) -> str:
    """The forked process does ``code``, which returns what it answers, instead of decoding."""
    return "def answer(data, limits):\n" + textwrap.indent(code, "    ") + "\nimage_process._answer = answer"


def below(*parents: int) -> list[tuple[int, str]]:
    """Number and state of every child of these processes."""
    found = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{number}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if int(parent) in parents:
                found.append((int(number), state))
    return found


def left_over() -> list[tuple[int, str]]:
    """Processes that were forked for a picture, and dead ones that nobody has asked about."""
    helper = image_process._helper
    own = [] if helper is None else below(helper._process.pid)
    return [*own, *(each for each in below(os.getpid()) if each[1] == "Z")]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_apart_and_together_agree(part: int) -> None:
    for data in [*ORIGINALS.values(), *[CASES[name][0] for name in list(CASES)[part::6]]]:
        one, two = attempt(data), attempt(data, APART)
        if isinstance(one, LoadedImage) and isinstance(two, LoadedImage):
            assert (one.image.tobytes(), one.warnings) == (two.image.tobytes(), two.warnings)
        else:
            assert (type(one), str(one)) == (type(two), str(two))


@pytest.mark.slow
def test_one_helper_serves_all_and_keeps_nothing(helper: Callable[[str], None]) -> None:
    helper(
        "seen = []\n"
        + answers(
            "seen.append(data)\nreturn json.dumps({'size': [1, len(seen)], 'warnings': "
            "[str(os.getppid())]}).encode() + b'\\n', bytes(3 * len(seen))"
        )
    )
    loaded = [load_image(ORIGINALS["jpeg"], APART) for _ in range(5)]
    assert len({each.warnings for each in loaded}) == 1  # the same helper
    assert {each.image.size for each in loaded} == {(1, 1)}  # but what one process has seen, no other one has
    assert below(image_process._current()._process.pid) == []


def test_time_and_memory_are_limited() -> None:
    large = png(5000, 5000, pixels=zlib.compress(bytes(5001 * 5000), 1))
    assert load_image(large, POLICY).image.size == (5000, 5000)
    with pytest.raises(ImageTooLargeError, match="memory"):
        load_image(large, APART.but(decode_memory=200_000_000, max_pixels=10**9))
    with pytest.raises(ImageTooLargeError, match="longer than"):
        load_image(large, APART.but(decode_s=0.01))
    assert load_image(large, APART).image.size == (5000, 5000)


@pytest.mark.slow
def test_a_memory_hog_gets_no_more_than_it_may(helper: Callable[[str], None]) -> None:
    code = """
hoard = []
try:
    while True:
        hoard.append(b"x" * 1_000_000)
except MemoryError:
    got = len(hoard)
    del hoard
return json.dumps({"size": [1, 1], "warnings": [str(got)]}).encode() + b"\\n", bytes(3)
"""
    helper(answers(code))
    assert 50 < int(load_image(ORIGINALS["jpeg"], APART.but(decode_memory=300_000_000)).warnings[0]) < 300


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.abort()", ImageDecodeError),
        ("os.kill(os.getpid(), 9)", ImageDecodeError),
        ("os.kill(os.getpid(), 11)", ImageDecodeError),
        ("raise SystemExit(0)", ImageDecodeError),
        ("raise MemoryError", ImageDecodeError),
        ("return b'rubbish', b''", ImageDecodeError),
        ("return b'rubbish\\n', b''", ImageDecodeError),
        ("return b'{}\\n', b''", ImageDecodeError),
        ("return b'[]\\n', b''", ImageDecodeError),
        ("return b'[' * 90_000 + b'\\n', b''", ImageDecodeError),
        ("return b'9' * 90_000 + b'\\n', b''", ImageDecodeError),
        ("return b'x' * 200_000 + b'\\n', b''", ImageDecodeError),
        ("return b'\\xff\\n', b''", ImageDecodeError),
        ('return b\'{"size": [2, 2], "warnings": []}\\n\', b""', ImageDecodeError),
        ('return b\'{"size": [2, 2], "warnings": []}\\n\', bytes(13)', ImageDecodeError),
        ('return b\'{"size": [2, 2], "warnings": 5}\\n\', bytes(12)', ImageDecodeError),
        ('return b\'{"size": [2.5, 2], "warnings": []}\\n\', bytes(15)', ImageDecodeError),
        ('return b\'{"size": [-2, -2], "warnings": []}\\n\', bytes(12)', ImageDecodeError),
        ('return b\'{"size": [9999999, 9999999], "warnings": []}\\n\', b""', ImageTooLargeError),
        ('return b\'{"size": "ab", "warnings": []}\\n\', b""', ImageDecodeError),
        ('return b\'{"size": null, "warnings": []}\\n\', b""', ImageDecodeError),
        ('return b\'{"error": "SystemExit", "message": "", "hint": ""}\\n\', b""', ImageDecodeError),
        ("return iter(lambda: bytes(1_000_000), None)", ImageDecodeError),  # for ever
        ("while True: pass", ImageTooLargeError),
        ("time.sleep(600)", ImageTooLargeError),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); time.sleep(600)", ImageTooLargeError),
    ],
)
def test_a_process_that_dies_lies_or_hangs(
    helper: Callable[[str], None], code: str, expected: type[ImageError]
) -> None:
    helper(answers(code))
    slow = expected is ImageTooLargeError and "size" not in code
    with pytest.raises(expected) as caught:
        load_image(ORIGINALS["png-rgb"], APART.but(decode_s=0.3 if slow else 20, max_pixels=1_000_000))
    assert type(caught.value) is expected and caught.value.hint and len(str(caught.value)) < 400
    assert left_over() == []
    if "sleep" in code:
        with pytest.raises(DeadlineError):
            load_image(ORIGINALS["png-rgb"], APART, deadline=time.monotonic() + 0.3)


def test_the_process_gets_no_secrets_and_can_do_nothing_else(
    helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    code = """
import resource
told = [json.dumps(dict(os.environ)), str(os.geteuid())]
for name in ("AS", "CPU", "FSIZE", "CORE", "NOFILE", "NPROC"):
    told.append(f"{name} {resource.getrlimit(getattr(resource, 'RLIMIT_' + name))}")
for name, attempt in (
    ("open", lambda: open("/etc/passwd")),
    ("list", lambda: os.listdir("/")),
    ("pipe", os.pipe),
    ("socket", socket.socket),
    ("fork", lambda: os.fork() or os._exit(0)),
    ("raise", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))),
):
    try:
        attempt()
        told.append(name + " succeeded")
    except (OSError, ValueError) as error:
        told.append(name + " failed")
return json.dumps({"size": [1, 1], "warnings": told}).encode() + b"\\n", bytes(3)
"""
    helper(answers(code))
    told = load_image(ORIGINALS["png-rgb"], APART).warnings
    assert "secret" not in str(told)
    assert {"AS (2000000000, 2000000000)", "CPU (21, 21)", "FSIZE (0, 0)", "CORE (0, 0)", "NOFILE (0, 0)"} < set(told)
    assert [line for line in told if line.endswith("succeeded")] == []
    assert told[1] != "0"  # root becomes nobody


def test_a_helper_that_was_killed_is_started_again(helper: Callable[[str], None]) -> None:
    good = load_image(ORIGINALS["jpeg"], APART).image.tobytes()
    for _ in range(3):
        process = image_process._current()._process
        process.kill()
        process.wait()
        assert load_image(ORIGINALS["jpeg"], APART).image.tobytes() == good
    helper(
        "answer = image_process._answer\n" + "def kill(data, limits):\n    try: os.kill(os.getppid(), 9)\n"
        "    except PermissionError: pass\n    return answer(data, limits)\nimage_process._answer = kill"
    )
    for _ in range(3):
        assert load_image(ORIGINALS["jpeg"], APART).image.tobytes() == good


def test_a_helper_that_hangs_is_replaced(helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    load_image(ORIGINALS["jpeg"], APART)
    monkeypatch.setattr(image_process, "_HELPER_S", 5.0)
    stopped = image_process._current()
    stopped._orders.settimeout(0.3)
    stopped._process.send_signal(signal.SIGSTOP)
    assert load_image(ORIGINALS["jpeg"], APART).image.size == (30, 40)
    assert stopped._process.returncode == -signal.SIGKILL and image_process._current() is not stopped


@pytest.mark.slow
def test_many_threads_and_a_killer(helper: Callable[[str], None]) -> None:
    expected = {name: load_image(data, POLICY).image.tobytes() for name, data in ORIGINALS.items()}

    def work(name: str) -> None:
        if name == "bmp":
            image_process._current()._process.kill()
        try:
            assert load_image(ORIGINALS[name], APART).image.tobytes() == expected[name]
        except ImageDecodeError as error:  # its helper was killed twice
            assert error.retryable

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, list(ORIGINALS) * 4))
    assert load_image(ORIGINALS["gif"], APART).image.tobytes() == expected["gif"]
    assert left_over() == []


@pytest.mark.slow
def test_no_process_and_no_thread_is_left() -> None:
    script = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from latent_tool.images import apart as image_process
from latent_tool.images.load import load_image
from latent_tool.settings import ImagePolicy
data, policy = sys.stdin.buffer.read(), ImagePolicy.server()
load_image(data, policy)
print(image_process._current()._process.pid, flush=True)
if sys.argv[1] == "fork":  # a server that forks its workers after it was warmed up
    child = os.fork()
    loaded = load_image(data, policy)
    if not child:
        print(image_process._current()._process.pid, flush=True)
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""
    for way, count in (("plain", 1), ("fork", 2), ("killed", 1)):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, way], input=ORIGINALS["jpeg"], capture_output=True
        )
        helpers = done.stdout.split()
        assert len(set(helpers)) == count and (done.returncode, done.stderr) == (-9 if way == "killed" else 0, b"")
        for _ in range(100):
            if not any(os.path.exists(f"/proc/{int(number)}/cwd") for number in helpers):  # a dead one has none
                break
            time.sleep(0.05)
        else:
            pytest.fail("the helper is still there")


def test_a_machine_that_cannot_start_processes(helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    image_process._close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ImageDecodeError, match="cannot be started") as caught:
        load_image(ORIGINALS["png-rgb"], APART)
    assert caught.value.retryable
    helper("os.fork = lambda: 1 / 0")
    monkeypatch.undo()
    assert load_image(ORIGINALS["png-rgb"], APART).image.size == (40, 30)


def test_where_processes_cannot_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_process, "_CAN_FORK", False)
    one, two = load_image(ORIGINALS["tiff-lzw"], POLICY), load_image(ORIGINALS["tiff-lzw"], APART)
    assert (one.image.tobytes(), one.warnings) == (two.image.tobytes(), two.warnings)
    with pytest.raises(ImageTooLargeError, match="longer than"):
        load_image(ORIGINALS["jpeg"], APART.but(decode_s=0.001))
    with pytest.raises(ImageDecodeError, match="cut short"):
        load_image(ORIGINALS["jpeg"][:50], APART)


def test_what_servers_do() -> None:
    assert ImagePolicy.server() == ImagePolicy.untrusted(isolate=True)
    assert ImagePolicy.server(folders=["x"], max_side=9).files == "folders"
    assert not ImagePolicy.server(isolate=False).isolate


# Requests with many images ----------------------------------------------------------------------------------------


def test_the_images_of_a_request_are_limited_together() -> None:
    policy = POLICY.but(max_images=3, max_total_pixels=2 * 40 * 30)
    data = ORIGINALS["png-rgb"]
    assert [each.image.size for each in load_images([data, data], policy)] == [(40, 30), (40, 30)]
    assert load_images([], policy) == []
    with pytest.raises(ImageTooLargeError, match="2400 pixels together") as caught:
        load_images([data, data, png(1, 1, pixels=zlib.compress(bytes(2)))], policy)
    assert caught.value.hint
    with pytest.raises(ImageTooLargeError, match="4 images"):
        load_images([b""] * 4, policy)
    with pytest.raises(DeadlineError):
        load_images([data], policy, deadline=time.monotonic())
