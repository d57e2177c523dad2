"""Whatever the bytes are: a picture or a typed error, within time and memory, and nothing else."""

from __future__ import annotations

import base64
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hostile_images import as_image, cases, originals
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_samples import data_uri, png

from latent_tool import image_process
from latent_tool.errors import DeadlineError, ImageDecodeError, ImageError, ImageNotAllowedError, ImageTooLargeError
from latent_tool.image_download import _take_apart
from latent_tool.images import LoadedImage, load_image
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


def test_apart_and_together_agree() -> None:
    names = ["gif-animated", "jpeg", "tiff-lzw", "webp-lossless"]
    for data in [ORIGINALS[name] for name in names]:
        one, two = load_image(data, POLICY), load_image(data, APART)
        assert (one.image.tobytes(), one.warnings) == (two.image.tobytes(), two.warnings)
    for name in ("png: as large as a bomb", "jpeg: no scan"):
        errors = [attempt(CASES[name][0], policy) for policy in (POLICY, APART)]
        assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))


def test_time_and_memory_are_limited() -> None:
    large = png(5000, 5000, pixels=zlib.compress(bytes(5001 * 5000), 1))
    assert load_image(large, POLICY).image.size == (5000, 5000)
    with pytest.raises(ImageError) as caught:
        load_image(large, APART.but(decode_memory=200_000_000))
    assert type(caught.value) in (ImageDecodeError, ImageTooLargeError) and caught.value.hint
    with pytest.raises(ImageTooLargeError, match="longer than"):
        load_image(large, APART.but(decode_s=0.01))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.abort()", ImageDecodeError),
        ("import os; os.kill(os.getpid(), 9)", ImageDecodeError),
        ("raise SystemExit(0)", ImageDecodeError),
        ("print('rubbish')", ImageDecodeError),
        ("print('{}')", ImageDecodeError),
        ("print('[]')", ImageDecodeError),
        ('print(\'{"size": [2, 2], "warnings": []}\')', ImageDecodeError),
        ('print(\'{"size": [9999999, 9999999], "warnings": []}\')', ImageTooLargeError),
        ('print(\'{"size": "ab", "warnings": []}\')', ImageDecodeError),
        ('print(\'{"error": "SystemExit", "message": "", "hint": ""}\')', ImageDecodeError),
        ("import sys; sys.stdout.buffer.write(bytes(200_000))", ImageDecodeError),
        ("import time; time.sleep(60)", ImageTooLargeError),
    ],
)
def test_a_process_that_dies_lies_or_hangs(
    monkeypatch: pytest.MonkeyPatch, code: str, expected: type[ImageError]
) -> None:
    monkeypatch.setattr(image_process, "_START", code)
    with pytest.raises(expected) as caught:
        load_image(ORIGINALS["png-rgb"], APART.but(decode_s=5 if "sleep" not in code else 0.3))
    assert caught.value.hint
    if "sleep" in code:
        with pytest.raises(DeadlineError):
            load_image(ORIGINALS["png-rgb"], APART, deadline=time.monotonic() + 0.3)


def test_the_process_gets_no_secrets_and_hard_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    seen = tmp_path / "seen"
    spy = f"""
import json, os, resource, sys
from latent_tool import image_process, image_bytes
def decode(data, limits):
    names = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_CORE")
    found = {{name: resource.getrlimit(getattr(resource, name)) for name in names}}
    with open({str(seen)!r}, "w") as file:
        json.dump([dict(os.environ), found], file)
    return image_bytes.decode(data, limits)
image_process.decode = decode
"""
    start = image_process._START.replace("_child(**task)", spy + "\nimage_process._child(**task)")
    monkeypatch.setattr(image_process, "_START", start)
    load_image(ORIGINALS["png-rgb"], APART)
    told = seen.read_text()
    assert "secret" not in told and '"RLIMIT_AS": [2000000000, 2000000000]' in told
    assert '"RLIMIT_CPU": [21, 21]' in told and '"RLIMIT_CORE": [0, 0]' in told


def test_no_process_and_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(image_process, "_START", "import time; time.sleep(60)")
    with pytest.raises(ImageTooLargeError):
        load_image(ORIGINALS["png-rgb"], APART.but(decode_s=0.2))
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "time.sleep(60)" not in children and threading.active_count() == before


def test_a_machine_that_cannot_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ImageDecodeError, match="cannot be started") as caught:
        load_image(ORIGINALS["png-rgb"], APART)
    assert caught.value.retryable
