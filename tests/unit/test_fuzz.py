"""Whatever settings, requests, hosts, URLs and data URIs hold: something valid or a typed error, and nothing else.

What was found this way stands as an example at its test. Images are fuzzed in ``test_images_hostile``.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import random
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from latent_tool.errors import ImageDecodeError, ImageNotAllowedError, ImageTooLargeError, InputError, SettingsError
from latent_tool.images.download import _take_apart, is_public
from latent_tool.images.references import _unquote, from_base64, from_data_uri
from latent_tool.langchain.messages import as_request, shown_input
from latent_tool.langchain.reasoner import OPTIONS_KEY, CallOptions, LatentReasoner
from latent_tool.schema import ReasoningRequest
from latent_tool.settings import Budget, GenerationSettings, ImagePolicy, NoiseSettings, SearchSettings
from latent_tool.validation import Settings
from latent_tool.words import redact, shown_image

fuzz = settings(max_examples=100, deadline=None, derandomize=True, database=None)
KINDS: list[type[Settings]] = [Budget, SearchSettings, GenerationSettings, NoiseSettings, ImagePolicy, CallOptions]
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from(
        ["auto", "token", "entropy", "none", "PNG", "any", "quick", "1", "1e9", "nan", "inf", "-0", "\ud800"]
    ),
)
anything = st.recursive(
    odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


# Settings ---------------------------------------------------------------------------------------------------------


@fuzz
@given(st.sampled_from(KINDS), st.data())
def test_any_settings(kind: type[Settings], data: st.DataObject) -> None:
    names = st.sampled_from([*kind.model_fields, "surprise"])
    values = data.draw(st.dictionaries(names, anything, max_size=4))
    try:
        made = kind(**values)
    except SettingsError as error:
        assert (error.message and str(error).isprintable()) or "\n" not in str(error)
        return
    plain = made.model_dump(mode="json", exclude={"cancelled"} if kind is CallOptions else None)
    assert kind(**json.loads(json.dumps(plain, allow_nan=False))) == made  # what is valid survives being written down
    assert made.but() == made


@fuzz
@given(anything)
@example([])  # as the name of a level
def test_any_budget_and_any_options(value: Any) -> None:
    for make in (
        lambda: Budget.coerce(value),
        lambda: Budget.level(value),
        lambda: CallOptions.of({"configurable": {OPTIONS_KEY: value}}),
        lambda: LatentReasoner(budget=value, settings=value),
        lambda: LatentReasoner(image_policy=value),
        lambda: LatentReasoner(**value) if isinstance(value, dict) else None,
    ):
        try:
            make()
        except SettingsError as error:
            assert error.hint


# Requests ---------------------------------------------------------------------------------------------------------

FIELDS = [*ReasoningRequest.model_fields, "surprise"]


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), anything, max_size=6) | anything)
@example({"image": b"", "question": "\ud800"})
@example({"images": [None], "question": ""})
def test_any_request(value: Any) -> None:
    shown_input(value)
    try:
        request = as_request(value)
    except InputError as error:
        assert error.hint
        return
    assert isinstance(request, ReasoningRequest) and repr(request) and request.image_references is not None
    json.dumps(request.shown())


blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "media", "input_image", "file", "x"])},
    optional={name: anything for name in ("text", "url", "base64", "data", "image_url", "source", "mime_type")},
)


@fuzz
@given(
    st.lists(
        st.builds(
            lambda kind, content: (kind, content),
            st.sampled_from([HumanMessage, AIMessage, SystemMessage]),
            st.text(max_size=10) | st.lists(blocks, max_size=3),
        ),
        max_size=3,
    )
)
def test_any_messages(parts: list[tuple[Any, Any]]) -> None:
    messages = []
    for kind, content in parts:
        try:
            message = kind(content=content)
            _ = message.content_blocks, message.text
        except Exception:  # LangChain itself cannot make or read it
            return
        messages.append(message)
    shown_input(messages)
    try:
        assert isinstance(as_request(messages), ReasoningRequest)
    except InputError as error:
        assert error.hint


# Data URIs --------------------------------------------------------------------------------------------------------


@fuzz
@given(st.binary(max_size=300), st.integers(0, 3), st.randoms(use_true_random=False))
def test_base64_in_every_dress(data: bytes, wrap: int, luck: random.Random) -> None:
    text = base64.b64encode(data).decode()
    if wrap & 1:
        text = text.translate(str.maketrans("+/", "-_")).rstrip("=")
    if wrap & 2:
        text = "".join(f"%{ord(c):02X}" if luck.random() < 0.3 else c + luck.choice(["", " ", "\r\n"]) for c in text)
    policy = ImagePolicy.untrusted()
    assert from_base64(text, policy) == data
    assert from_data_uri("data:image/png;charset=x;base64," + text, policy) == data
    assert from_data_uri("data:," + "".join(f"%{byte:02x}" for byte in data), policy) == data


@fuzz
@given(
    st.lists(st.sampled_from(["%", "%4", "%41", "4", "a", "g", "%%", "%zz", "%41%42"]), max_size=30), st.integers(0, 4)
)
def test_percent_escapes_across_slices(parts: list[str], shift: int) -> None:
    text = b"x" * (65_536 - shift) + "".join(parts).encode()
    assert _unquote(text) == unquote_to_bytes(text)


@fuzz
@given(st.text(max_size=60), st.text(max_size=60))
@example("", ";base64")
@example("\u212a" * 20, ";base64")  # letters that are not base64, although they have four characters
def test_any_data_uri_gives_bytes_or_a_typed_error(payload: str, head: str) -> None:
    policy = ImagePolicy.untrusted(max_bytes=40)
    for uri in (f"data:{head},{payload}", f"data:{head};base64,{payload}"):
        try:
            assert len(from_data_uri(uri, policy)) <= 40
        except (ImageDecodeError, ImageTooLargeError) as error:
            assert error.hint


# Hosts, URLs and addresses ----------------------------------------------------------------------------------------

PIECES = ["img", "test", "evil", ".", "..", "@", ":", "80", "443", "0", "/", "//", "\\", "?", "#", "%2e", "%40", "%00"]
PIECES += ["127.0.0.1", "0x7f.1", "0177.0.0.1", "2130706433", "[::1]", "[::ffff:7f00:1]", "[fe80::1%25eth0]", "[", "]"]
PIECES += ["\t", "\n", "\r", " ", "\0", "\u3002", "\uff0e", "\u2024", "\u00ad", "\u200b", "\u202e", "\u0660", "\u0967"]
PIECES += ["\u017f", "\u212a", "\uff49", "\u0131", "xn--", "user:pw@", "localhost", "img.test", "https", "http", "://"]
STARTS = ["", "http://", "https://", "HTTPS://", "https:\\\\", "http\u017f://"]
ALLOWED = ("img.test", "k.test:8443", "192.0.2.7", "[2001:db8::7]:99")


@fuzz
@given(
    st.sampled_from(["", "http://", "https://", "HTTPS://", "https:\\\\", "http\u017f://"]),
    st.lists(st.sampled_from(PIECES)),
)
@example("https://", ["img.test", "@", "evil"])
@example("https://", ["evil", "\\", "@", "img.test"])
@example("https://", ["\u212a", ".", "test", ":", "8443"])  # the Kelvin sign is k in lower case
@example("http\u017f://", ["img.test"])  # was taken for a scheme, and http is not allowed
def test_any_url_is_refused_or_read_in_one_way(start: str, parts: list[str]) -> None:
    """What is accepted names an allowed host for every other reader of URLs, too."""
    url = start + "".join(parts)
    try:
        place = _take_apart(url, ImagePolicy.untrusted(hosts=ALLOWED))
    except ImageNotAllowedError as error:
        assert error.hint
        return
    assert (
        place.scheme == "https" and url.isascii() and (place.host in ALLOWED or f"{place.host}:{place.port}" in ALLOWED)
    )
    for host, port in ((httpx.URL(url).host, httpx.URL(url).port), (urlsplit(url).hostname, urlsplit(url).port)):
        assert host == place.host.strip("[]") and (port or 443) == place.port
    assert urlsplit(url).username is None


@fuzz
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join) | st.text(max_size=20))
@example("k.test:\u0663\u0663")  # was read as port 33
@example("\u212a.test")  # was read as k.test
def test_any_entry_of_hosts(text: str) -> None:
    """A list of hosts holds only plain names and addresses, which are what a URL has to spell."""
    try:
        (host,) = ImagePolicy(hosts=(text,)).hosts
    except SettingsError as error:
        assert error.hint
        return
    assert host.isascii() and text.isascii() and not set(host) & set("@/\\?#% \t\r\n\0")
    place = _take_apart(f"https://{host}/", ImagePolicy(hosts=(host,)))
    assert ImagePolicy(hosts=(host,)).hosts == (host,) and place.host in host


@fuzz
@given(st.integers(0, 2**32 - 1))
@example(0x7F000001)
@example(0xA9FEA9FE)
@example(0x08080808)
def test_addresses_inside_addresses(number: int) -> None:
    """An IPv4 address is never reached through an IPv6 address that carries it."""
    four = ipaddress.IPv4Address(number)
    high, low = number >> 16, number & 0xFFFF
    forms = [f"::ffff:{four}", f"::{four}", f"64:ff9b::{four}", f"64:ff9b:1::{four}", f"2002:{high:x}:{low:x}::1"]
    forms += [f"2001:0:{high:x}:{low:x}::1", f"::ffff:0:{high:x}:{low:x}"]
    for form in forms:
        assert not is_public(ipaddress.ip_address(form)), form
    if four.is_private or four.is_loopback or four.is_link_local or four.is_multicast or four.is_reserved:
        assert not is_public(four)


@fuzz
@given(anything | st.lists(st.sampled_from([*PIECES, "data:", "base64,", "s3://"])).map("".join))
def test_what_is_shown_never_holds_a_password(value: Any) -> None:
    json.dumps(redact(value), default=repr)
    text = shown_image(value)
    assert (isinstance(text, str) and len(text) < 300 and "user:pw@" not in text) or "://" not in str(value)


@pytest.mark.parametrize("start", ["https://", "http://", "ftp://", "HTTPS:\\\\", "s3://", " https://"])
def test_credentials_are_not_shown(start: str) -> None:
    for rest in ("user:pw@h/x", "pw@h", "h/?pw", "h#pw", "user:pw@[::1]:5/x", "user:p@pw@h/x"):
        assert "pw" not in shown_image(start + rest)
