"""Images behind URLs: which URLs are opened, which addresses are connected to, and servers that misbehave."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from image_server import PEM, PNG, BadServer

from latent_tool.errors import (
    DeadlineError,
    ImageDecodeError,
    ImageError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
)
from latent_tool.images import download as image_download
from latent_tool.images.download import is_public
from latent_tool.images.load import load_image
from latent_tool.settings import ImagePolicy


class Names:
    """Stands in for the system's resolver: ``table`` says what names mean, ``asked`` which were looked up."""

    def __init__(self) -> None:
        self.table: dict[str, list[str]] = {"img.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
        self.asked: list[str] = []
        self.connected: list[str] = []

    def getaddrinfo(self, host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
        self.asked.append(host)
        if host not in self.table:
            raise socket.gaierror(-2, "Name or service not known")
        family = {4: socket.AF_INET, 6: socket.AF_INET6}
        rows = [(family[ipaddress.ip_address(address).version], address) for address in self.table[host]]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in rows]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return stand_in(monkeypatch)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Names:
    """No name leaves the machine, and only loopback is ever connected to."""
    table = Names()
    connect = socket.create_connection

    def only_loopback(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        table.connected.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:  # raises for a name: nothing is left to resolve
            raise ConnectionRefusedError
        with monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", real)
            return connect(address, *arguments, **options)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", table.getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", only_loopback)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    return table


@pytest.fixture
def server(names: Names) -> Iterator[BadServer]:
    server = BadServer()
    yield server
    server.stop()


@pytest.fixture
def policy(server: BadServer) -> ImagePolicy:
    return ImagePolicy.untrusted(
        hosts=[server.netloc], allow_http=True, allow_private_hosts=True, stall_s=5, download_s=20, max_bytes=1_000_000
    )


# URLs -------------------------------------------------------------------------------------------------------------

OPENED = [
    "http://img.test:PORT/ok.png",
    "HTTP://img.test:PORT/ok.png",
    "http://IMG.Test:PORT/ok.png",
    "  http://img.test:PORT/ok.png\n",
    "http://img.test:PORT/ok.png?size=1&token=secret",
    "http://img.test:PORT/ok.png#fragment",
    "http://img.test:PORT/ok.png#@evil.test/",
    "http://img.test:PORT/ok.png?next=http://user:secret@evil.test/",
    "http://img.test:PORT//ok.png/..//../ok.png",
    "http://img.test:PORT/ok.png?ü=é",
]
REFUSED = [
    # another host, however it is dressed up
    "http://evil.test:PORT/ok.png",
    "http://img.test.evil.test:PORT/ok.png",
    "http://evilimg.test:PORT/ok.png",
    "http://sub.img.test:PORT/ok.png",
    "http://img.test.:PORT/ok.png",
    "http://img.test..:PORT/ok.png",
    "http://.img.test:PORT/ok.png",
    "http://img:PORT/ok.png",
    "http://img.test/ok.png",  # another port
    "http://img.test:22/ok.png",
    "http://img.test:/ok.png",
    "http://img.test:PORT0/ok.png",
    "http://img.test:-1/ok.png",
    "http://img.test:PORT:PORT/ok.png",
    "http://img.test:port/ok.png",
    "https://img.test:1PORT/ok.png",
    # user names
    "http://user:secret@img.test:PORT/ok.png",
    "http://user@img.test:PORT/ok.png",
    "http://@img.test:PORT/ok.png",
    "http://img.test:PORT@evil.test/ok.png",
    "http://img.test%40evil.test:PORT/ok.png",
    "http://img.test:PORT%40evil.test/ok.png",
    "http://evil.test\\@img.test:PORT/ok.png",
    "http://evil.test#@img.test:PORT/ok.png",
    "http://evil.test?@img.test:PORT/ok.png",
    "http://img.test:PORT\\@evil.test/ok.png",
    # loopback and others, written in every way
    "http://127.0.0.1:PORT/ok.png",
    "http://localhost:PORT/ok.png",
    "http://127.1:PORT/ok.png",
    "http://2130706433:PORT/ok.png",
    "http://0x7f000001:PORT/ok.png",
    "http://0x7f.0.0.1:PORT/ok.png",
    "http://0177.0.0.1:PORT/ok.png",
    "http://017700000001:PORT/ok.png",
    "http://127.0.0.1.:PORT/ok.png",
    "http://0:PORT/ok.png",
    "http://0.0.0.0:PORT/ok.png",
    "http://[::1]:PORT/ok.png",
    "http://[::]:PORT/ok.png",
    "http://[::ffff:127.0.0.1]:PORT/ok.png",
    "http://[::ffff:7f00:1]:PORT/ok.png",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:PORT/ok.png",
    "http://[::127.0.0.1]:PORT/ok.png",
    "http://[64:ff9b::7f00:1]:PORT/ok.png",
    "http://[2002:7f00:1::]:PORT/ok.png",
    "http://[fe80::1%25eth0]:PORT/ok.png",
    "http://[::1:PORT/ok.png",
    "http://[img.test]:PORT/ok.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://metadata.google.internal/",
    # letters that turn into others
    "http://\uff49\uff4d\uff47.test:PORT/ok.png",  # full-width letters
    "http://img\u3002test:PORT/ok.png",  # an ideographic full stop
    "http://im\u0261.test:PORT/ok.png",  # a phonetic g
    "http\u017f://img.test:PORT/ok.png",  # a long s in the scheme
    "http://img.test:PORT\u0660/ok.png",  # an Arabic digit
    "http://\u212aelvin.test:PORT/ok.png",  # the sign of the unit, which is k in lower case
    "http://img.te\u00adst:PORT/ok.png",  # a soft hyphen
    "http://img.te\u017ft:PORT/ok.png",  # a long s
    "http://①②⑦.⓪.⓪.①:PORT/ok.png",
    "http://xn--img-test.test:PORT/ok.png",
    "http://img%2etest:PORT/ok.png",
    "http://img.test%00.evil.test:PORT/ok.png",
    "http://img.test\0:PORT/ok.png",
    "http://img.test\t:PORT/ok.png",
    "http://img.te\nst:PORT/ok.png",
    "http://img.test :PORT/ok.png",
    "http://img.test:PORT/ok.png\r\nX-Injected: 1",
    "http://img.test:PORT/a b.png",
    "http://img.test:PORT/\u2028.png",
    "http://img.test:PORT/\ud800.png",
    # not quite URLs
    "http:/img.test:PORT/ok.png",
    "http:img.test:PORT/ok.png",
    "http:///img.test:PORT/ok.png",
    "http:\\\\img.test:PORT\\ok.png",
    "http://",
    "http://:PORT/ok.png",
    "http:",
    "https://",
    "http://img.test:PORT/" + "a" * 10_000,
    # other schemes
    "https+http://img.test:PORT/ok.png",
    "ftp://img.test:PORT/ok.png",
    "gopher://img.test:PORT/ok.png",
    "ws://img.test:PORT/ok.png",
    "dict://img.test:PORT/ok.png",
    "unix:///var/run/docker.sock",
    "jar:http://img.test:PORT!/ok.png",
    "url://http://img.test:PORT/ok.png",
]


@pytest.mark.parametrize("url", OPENED)
def test_urls_that_are_opened(server: BadServer, policy: ImagePolicy, url: str) -> None:
    url = url.replace("PORT", str(server.port))
    for reference in (url, {"type": "image_url", "image_url": {"url": url}}, {"type": "image", "url": url}):
        loaded = load_image(reference, policy)
        assert loaded.image.size == (48, 32) and loaded.source == "img.test"
    assert len(server.requests) == 3


@pytest.mark.parametrize("url", REFUSED)
def test_urls_that_are_refused(server: BadServer, policy: ImagePolicy, names: Names, url: str) -> None:
    url = url.replace("PORT", str(server.port))
    for name in ("127.1", "0", "2130706433", "0x7f000001", "localhost", "evil.test"):
        names.table[name] = ["127.0.0.1"]
    with pytest.raises(ImageNotAllowedError) as caught:
        load_image(url, policy)
    assert caught.value.hint and not caught.value.retryable
    assert "secret" not in str(caught.value)
    assert not server.requests and not names.asked and not names.connected


def test_no_url_is_opened_unless_allowed(server: BadServer, policy: ImagePolicy) -> None:
    url = f"http://{server.netloc}/ok.png"
    for refusing in (
        ImagePolicy.local(),
        ImagePolicy.untrusted(),
        policy.but(hosts=()),
        policy.but(allow_http=False),
        policy.but(allow_private_hosts=False),
        policy.but(hosts=("img.test",)),
    ):
        with pytest.raises(ImageNotAllowedError) as caught:
            load_image(url, refusing)
        assert caught.value.hint
    assert not server.requests


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_addresses_can_be_allowed_as_hosts(server: BadServer, policy: ImagePolicy, names: Names, host: str) -> None:
    allowed = policy.but(hosts=[f"{host}:{server.port}"])
    if host == "127.0.0.1":
        assert load_image(f"http://{host}:{server.port}/ok.png", allowed).image.size == (48, 32)
    with pytest.raises(ImageNotAllowedError):
        load_image(f"http://{host}:{server.port}/ok.png", allowed.but(allow_private_hosts=False))
    assert not names.asked


# Addresses --------------------------------------------------------------------------------------------------------

NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 168.63.129.16 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.1 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1
255.255.255.255 :: ::1 ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
64:ff9b::808:808 64:ff9b:1::1 100::1 2001::1 2001:0:7f00:1::1 2001:db8::1 2002:7f00:1::1 2002:808:808::1 3fff::1
5f00::1 fc00::1
fd00::1 fe80::1 fe80::1%2 febf::1 fec0::1 ff02::1 ff0e::1
"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 172.32.0.1 2606:4700::1111 2a00:1450:4001::1"


def test_which_addresses_are_public() -> None:
    assert [address for address in NOT_PUBLIC.split() if is_public(ipaddress.ip_address(address))] == []
    assert [address for address in PUBLIC.split() if not is_public(ipaddress.ip_address(address))] == []


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_a_name_that_leads_inside_is_refused(names: Names, address: str) -> None:
    policy = ImagePolicy.untrusted(hosts=["img.test"])
    names.table["img.test"] = ["8.8.8.8", address, "1.1.1.1"]  # one is enough
    with pytest.raises(ImageNotAllowedError, match="not public"):
        load_image("https://img.test/a.png", policy)
    assert not names.connected


def test_a_name_is_resolved_once_and_the_connection_pinned(
    server: BadServer, policy: ImagePolicy, names: Names
) -> None:
    addresses = iter(["127.0.0.1", "127.0.0.99", "127.0.0.99"])

    class Rebinding(dict[str, list[str]]):
        def __getitem__(self, name: str) -> list[str]:
            return [next(addresses)]

    names.table = Rebinding(names.table)
    load_image(f"http://{server.netloc}/ok.png", policy)
    assert names.asked == ["img.test"] and names.connected == ["127.0.0.1"]
    assert f"Host: {server.netloc}\r\n" in server.requests[0]


def test_the_next_address_is_tried_and_only_a_few(server: BadServer, policy: ImagePolicy, names: Names) -> None:
    names.table["img.test"] = ["192.0.2.1", "192.0.2.2", "127.0.0.1", "192.0.2.3"]
    assert load_image(f"http://{server.netloc}/ok.png", policy).image.size == (48, 32)
    names.table["img.test"] = [f"192.0.2.{number}" for number in range(1, 100)]
    names.connected.clear()
    with pytest.raises(ImageNotFoundError) as caught:
        load_image(f"http://{server.netloc}/ok.png", policy)
    assert caught.value.retryable and len(names.connected) == 4


def test_names_that_mean_nothing_and_resolvers_that_hang(
    server: BadServer, policy: ImagePolicy, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nowhere.test", "a" * 64 + ".test"):
        with pytest.raises(ImageNotFoundError, match="no known address") as caught:
            load_image(f"http://{name}/a.png", policy.but(hosts=[name]))
        assert caught.value.retryable

    def hang(*arguments: Any, **options: Any) -> list[Any]:
        server.over.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(ImageNotFoundError, match="no known address"):
        load_image(f"http://{server.netloc}/ok.png", policy.but(stall_s=0.1))


# Redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "location", ["/ok.png", "http://img.test:PORT/ok.png", "//img.test:PORT/ok.png", "../../ok.png", "/ok.png#@x/"]
)
def test_redirects_inside_the_list_are_followed(
    server: BadServer, policy: ImagePolicy, status: int, location: str
) -> None:
    location = quote(location, safe="")
    assert load_image(f"http://{server.netloc}/redirect/{status}/{location}", policy).image.size == (48, 32)
    assert len(server.requests) == 2
    for request in server.requests:
        lines = {line.partition(":")[0].lower() for line in request.split("\r\n")[1:] if line}
        assert lines == {"host", "user-agent", "accept", "accept-encoding"}  # no cookie, no credentials, no referrer


LEAD_OUT = [
    "http://evil.test:PORT/ok.png",
    "//evil.test:PORT/ok.png",
    "http://127.0.0.1:PORT/ok.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::ffff:127.0.0.1]:PORT/ok.png",
    "http://user:secret@img.test:PORT/ok.png",
    "http://img.test:PORT\\@evil.test/",
    "http://img.test/ok.png",
    "http://img.test:22/",
    "https://img.test/ok.png",
    "ftp://img.test:PORT/ok.png",
    "file:///etc/passwd",
    "data:image/png;base64,iVBORw0KGgo=",
    "javascript:alert(1)",
    "http://[",
    "//[::1",
    "http://\xff\xfe/",
    "\\\\evil.test\\ok.png",
]


@pytest.mark.parametrize("location", LEAD_OUT)
def test_redirects_out_of_the_list_are_refused(server: BadServer, policy: ImagePolicy, location: str) -> None:
    with pytest.raises(ImageNotAllowedError) as caught:
        load_image(f"http://{server.netloc}/redirect/302/{quote(location, safe='', encoding='latin-1')}", policy)
    assert "secret" not in str(caught.value) and len(server.requests) == 1


def test_a_redirect_to_a_name_that_leads_inside_is_refused(
    names: Names, server: BadServer, policy: ImagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.table["other.test"] = ["10.0.0.1"]
    strict = policy.but(hosts=[server.netloc, "other.test"], allow_private_hosts=False)
    first = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(image_download, "is_public", lambda address: address == first or is_public(address))
    with pytest.raises(ImageNotAllowedError, match=r"other\.test has an address that is not public"):
        load_image(f"http://{server.netloc}/redirect/302/{quote('http://other.test/a.png', safe='')}", strict)
    assert len(server.requests) == 1 and names.connected == ["127.0.0.1"]


def test_number_of_redirects(server: BadServer, policy: ImagePolicy) -> None:
    assert load_image(f"http://{server.netloc}/count/5", policy).image.size == (48, 32)
    for path in ("count/6", "loop", "no-location.png"):
        server.requests.clear()
        with pytest.raises(ImageNotFoundError, match="redirects"):
            load_image(f"http://{server.netloc}/{path}", policy)
        assert len(server.requests) == 6


# Servers that misbehave -------------------------------------------------------------------------------------------


WELCOME = ["ok.png", "as-text.png", "as-nonsense.png", "no-type.png", "chunked.png"]
WELCOME += ["gzip.png", "deflate.png", "identity.png", "longer-than-told.png"]


@pytest.mark.parametrize("path", WELCOME)
def test_odd_answers_that_hold_an_image(server: BadServer, policy: ImagePolicy, path: str) -> None:
    assert load_image(f"http://{server.netloc}/{path}", policy).image.size == (48, 32)


FAULTS: list[tuple[str, type[ImageError], bool]] = [
    ("html.png", ImageDecodeError, False),
    ("empty.png", ImageDecodeError, False),
    ("half.png", ImageDecodeError, False),
    ("shorter-than-sent.png", ImageDecodeError, False),
    ("less-than-told.png", ImageNotFoundError, True),
    ("huge-length.png", ImageTooLargeError, False),
    ("absurd-length.png", ImageNotFoundError, True),
    ("negative-length.png", ImageNotFoundError, True),
    ("two-lengths.png", ImageNotFoundError, True),
    ("bomb.png", ImageTooLargeError, False),
    ("brotli.png", ImageDecodeError, False),
    ("twice.png", ImageDecodeError, False),
    ("not-gzip.png", ImageDecodeError, False),
    ("half-gzip.png", ImageDecodeError, False),
    ("bad-chunks.png", ImageNotFoundError, True),
    ("part.png", ImageNotFoundError, False),
    ("nothing.png", ImageNotFoundError, False),
    ("same.png", ImageNotFoundError, False),
    ("private.png", ImageNotFoundError, False),
    ("missing.png", ImageNotFoundError, False),
    ("broken.png", ImageNotFoundError, True),
    ("busy.png", ImageNotFoundError, True),
    ("not-http.png", ImageNotFoundError, True),
    ("binary.png", ImageNotFoundError, True),
    ("many-headers.png", ImageNotFoundError, True),
    ("switch.png", ImageNotFoundError, True),
    ("reset", ImageNotFoundError, True),
    ("hang-up", ImageNotFoundError, True),
    ("endless", ImageTooLargeError, False),
    ("endless-chunks", ImageTooLargeError, False),
    ("endless-head", ImageNotFoundError, True),
    ("ten-gigabytes", ImageTooLargeError, False),
    ("ten-gigabytes-as-chunks", ImageTooLargeError, False),
    ("ten-gigabytes-packed", ImageTooLargeError, False),
    ("ten-gigabytes-told-as-100", ImageDecodeError, False),
]


@pytest.mark.parametrize(("path", "expected", "retryable"), FAULTS, ids=[path for path, *_ in FAULTS])
def test_faulty_answers(
    server: BadServer, policy: ImagePolicy, path: str, expected: type[ImageError], retryable: bool
) -> None:
    with pytest.raises(expected) as caught:
        load_image(f"http://{server.netloc}/{path}?token=secret", policy)
    assert caught.value.retryable == retryable
    assert caught.value.hint and "secret" not in str(caught.value)
    assert server.sent < 20_000_000  # of what is offered without end: the limit and what lay in buffers


STALL = ["stall-before-head", "stall-in-head", "stall-in-body"]
DRIP = ["drip-head", "drip-body", "drip-body-without-length", "drip-chunks", "continue-for-ever", "stall-in-body"]


@pytest.mark.parametrize("path", STALL)
def test_servers_that_stall(server: BadServer, policy: ImagePolicy, path: str) -> None:
    with pytest.raises(ImageNotFoundError, match="in time") as caught:
        load_image(f"http://{server.netloc}/{path}", policy.but(stall_s=0.2, download_s=600))
    assert caught.value.retryable


@pytest.mark.parametrize("path", DRIP)
def test_servers_that_never_stall_and_never_end(server: BadServer, policy: ImagePolicy, path: str) -> None:
    slow = policy.but(stall_s=600, download_s=0.5)
    with pytest.raises(ImageNotFoundError, match="in time") as caught:
        load_image(f"http://{server.netloc}/{path}", slow)
    assert caught.value.retryable
    with pytest.raises(DeadlineError):
        load_image(f"http://{server.netloc}/{path}", policy.but(stall_s=600), deadline=time.monotonic() + 0.3)


def test_a_port_where_nobody_listens(server: BadServer, policy: ImagePolicy) -> None:
    server.stop()
    with pytest.raises(ImageNotFoundError, match="cannot be reached") as caught:
        load_image(f"http://{server.netloc}/ok.png", policy)
    assert caught.value.retryable


def test_nothing_is_left_behind(server: BadServer, policy: ImagePolicy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = threading.active_count()
    for path in ("ok.png", "half.png", "loop", "reset", "endless"):
        try:
            load_image(f"http://{server.netloc}/{path}?token=secret", policy)
        except ImageError as error:
            assert error.__suppress_context__ or error.__context__ is None
    server.over.set()
    ours = [thread for thread in threading.enumerate() if "process_request" not in thread.name]
    assert len(ours) <= before
    assert "secret" not in caplog.text


# TLS and the environment ------------------------------------------------------------------------------------------


@pytest.fixture
def tls_server(names: Names) -> Iterator[BadServer]:
    server = BadServer(tls=True)
    yield server
    server.stop()


def test_tls_names_and_verifies_the_host(tls_server: BadServer, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"other.test:{tls_server.port}"
    policy = ImagePolicy.untrusted(hosts=[tls_server.netloc, other], allow_private_hosts=True)
    with pytest.raises(ImageNotFoundError, match="certificate"):  # nobody vouches for it
        load_image(f"https://{tls_server.netloc}/ok.png", policy)
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with pytest.raises(ImageNotFoundError, match="certificate"):  # the environment is not asked
        load_image(f"https://{tls_server.netloc}/ok.png", policy)
    trusting = policy.but(trust_environment=True)
    assert load_image(f"https://{tls_server.netloc}/ok.png", trusting).image.size == (48, 32)
    assert names.connected[-1] == "127.0.0.1" and tls_server.names[-1] == "img.test"
    assert f"Host: {tls_server.netloc}\r\n" in tls_server.requests[-1]
    with pytest.raises(ImageNotFoundError, match="certificate"):  # the certificate is another host's
        load_image(f"https://{other}/ok.png", trusting)
    with pytest.raises(ImageNotFoundError, match="in time"):
        load_image(f"https://{tls_server.netloc}/drip-head", trusting.but(download_s=0.5))
    with pytest.raises(ImageNotAllowedError, match="https"):  # no way down to http
        location = quote(f"http://{tls_server.netloc}/ok.png", safe="")
        load_image(f"https://{tls_server.netloc}/redirect/302/{location}", trusting)


def test_a_server_that_stalls_in_the_tls_handshake(server: BadServer, policy: ImagePolicy) -> None:
    for change in ({"stall_s": 0.2}, {"stall_s": 600, "download_s": 0.3}):
        with pytest.raises(ImageNotFoundError) as caught:
            load_image(f"https://{server.netloc}/ok.png", policy.but(**change))
        assert caught.value.retryable


def test_proxies_of_the_environment_are_used_only_when_asked(
    server: BadServer, policy: ImagePolicy, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = BadServer()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    url = f"http://{server.netloc}/ok.png"
    try:
        load_image(url, policy)
        assert (len(server.requests), len(proxy.requests)) == (1, 0)
        names.asked.clear()
        load_image(url, policy.but(trust_environment=True, allow_private_hosts=False))
        assert (len(server.requests), len(proxy.requests)) == (1, 1)
        assert proxy.requests[0].startswith(f"GET {url} HTTP/1.1\r\n") and not names.asked
        with pytest.raises(ImageNotAllowedError):  # the list of hosts holds behind a proxy too
            load_image("http://evil.test/ok.png", policy.but(trust_environment=True))
        monkeypatch.setenv("no_proxy", "img.test")
        load_image(url, policy.but(trust_environment=True))
        assert (len(server.requests), len(proxy.requests)) == (2, 1)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("http_proxy", "nonsense://x")
        with pytest.raises(ImageNotFoundError, match="proxy"):
            load_image(url, policy.but(trust_environment=True))
    finally:
        proxy.stop()
    assert PNG  # the same picture came from both
