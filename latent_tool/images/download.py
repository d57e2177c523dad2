"""The bytes behind an ``https:`` URL, from hosts that an ``ImagePolicy`` names.

Every hop of a redirect goes through the same door: the URL is taken apart strictly, its host must be on the list, all
its addresses must be public, and the connection is made to one of the addresses that were checked, so that a name
cannot be resolved to something else in between. TLS still names and verifies the host. Nothing is sent but the request
itself: no cookies, no credentials. The server's word on length and type is not believed.

This module knows nothing of images. httpx is imported when something is downloaded.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin

from latent_tool.errors import (
    ImageDecodeError,
    ImageError,
    ImageNotAllowedError,
    ImageNotFoundError,
    ImageTooLargeError,
)

if TYPE_CHECKING:
    import httpx

    from latent_tool.settings import ImagePolicy

__all__ = ["download"]

MAX_REDIRECTS = 5
MAX_URL = 8192  # characters
MAX_ADDRESSES = 4  # of one host that are tried

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def download(url: str, policy: ImagePolicy, seconds: float) -> tuple[bytes, str]:
    """Return the body behind ``url``, and the host it came from, within ``seconds`` for everything.

    Raises:
        ImageNotAllowedError: the URL, its host, its address or a redirect is not allowed.
        ImageNotFoundError: the server cannot be reached, is too slow or does not deliver; ``retryable`` says whether
            trying again can help.
        ImageTooLargeError: more than ``policy.max_bytes``, encoded or decoded.
        ImageDecodeError: the body is encoded in a way that is not understood.
    """
    import httpx

    end = time.monotonic() + seconds
    host = "the server"
    with _cut_after(seconds) as cut:
        try:
            for _ in range(MAX_REDIRECTS + 1):
                place = _take_apart(url, policy)
                host = place.host
                with _request(place, policy, end, cut) as response:
                    if response.status_code not in (301, 302, 303, 307, 308):
                        data = _body(response, policy, host)
                        if cut.expired:  # where the length is not told, cutting looks like the end
                            raise httpx.ReadTimeout("")
                        return data, host
                    location = response.headers.get("location", "")
                try:
                    url = urljoin(url, location)
                except ValueError:
                    raise _not_a_url() from None
            raise ImageNotFoundError(f"More than {MAX_REDIRECTS} redirects.", "Give the address they lead to.")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if cut.expired or isinstance(error, httpx.TimeoutException):
                raise _unreachable(f"{host} did not deliver in time.") from None
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise ImageNotFoundError(
                    f"The certificate of {host} is not valid.", "Download the image yourself, if you trust it."
                ) from None
            raise _unreachable(f"{host} cannot be reached, or broke off.") from None


# URLs -------------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A URL whose host is on the list: ``rest`` is its path and query."""

    scheme: str
    host: str
    port: int
    rest: str


_URL = re.compile(r"(https?)://([^/?#\\]+)([^#\\]*)(?:#.*)?", re.IGNORECASE | re.DOTALL | re.ASCII)
_AUTHORITY = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII)
_CONTROL = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]")


def _not_a_url() -> ImageNotAllowedError:
    return ImageNotAllowedError(
        "This URL is not opened: it is malformed or ambiguous.",
        "Write https://host/path, percent-encoded, without user name, and international hosts in their xn-- form.",
    )


def _take_apart(url: str, policy: ImagePolicy) -> _Place:
    """Scheme, host, port and rest of a URL, if it can be read in one way only and its host is allowed."""
    whole = _URL.fullmatch(url)
    if whole is None or len(url) > MAX_URL or _CONTROL.search(url):
        raise _not_a_url()
    authority = _AUTHORITY.fullmatch(whole[2])
    if authority is None:
        raise _not_a_url()
    scheme, host = whole[1].lower(), authority[1].lower()
    if scheme == "http" and not policy.allow_http:
        raise ImageNotAllowedError("Only https is allowed.", "Use https, or set allow_http of the image policy.")
    if host.startswith("["):
        try:
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        except ValueError:
            raise _not_a_url() from None
    default = 443 if scheme == "https" else 80
    port = int(authority[2]) if authority[2] else default
    if f"{host}:{port}" not in policy.hosts and (port != default or host not in policy.hosts):
        raise ImageNotAllowedError(
            "Downloads from this host and port are not allowed.",
            "Add it to hosts of the image policy, or download the image and pass its bytes.",
        )
    return _Place(scheme, host, port, whole[3] or "/")


# Addresses --------------------------------------------------------------------------------------------------------

# Not public whatever the library's tables say, among them forms that carry an IPv4 address inside.
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",
        "168.63.129.16/32",  # Azure's platform, from inside its machines
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "240.0.0.0/4",
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",  # Teredo and others
        "2002::/16",  # 6to4
        "3fff::/20",
        "5f00::/16",
        "fec0::/10",
    )
)


def is_public(address: Address) -> bool:
    """Tell whether a server on the open internet may have this address."""
    if any(address.version == network.version and address in network for network in _REFUSED):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_link_local)


def _addresses(place: _Place, policy: ImagePolicy, seconds: float) -> list[str]:
    """The addresses of a host as a URL writes them; refused altogether if one of them is not public."""
    try:
        found = [ipaddress.ip_address(place.host.strip("[]"))]
    except ValueError:
        found = _resolve(place.host, place.port, seconds)
    if not policy.allow_private_hosts and not all(is_public(address) for address in found):
        raise ImageNotAllowedError(
            f"{place.host} has an address that is not public.",
            "Set allow_private_hosts of the image policy, if it is meant to be reached.",
        )
    return [f"[{address}]" if address.version == 6 else str(address) for address in found[:MAX_ADDRESSES]]


def _resolve(host: str, port: int, seconds: float) -> list[Address]:
    """Ask the system's resolver, which has no time limit of its own, in a thread that may be left behind."""
    answers: list[Address] = []

    def ask() -> None:
        with suppress(OSError, ValueError):  # ValueError: a label that is too long
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.extend(dict.fromkeys(ipaddress.ip_address(str(row[4][0])) for row in rows))

    thread = threading.Thread(target=ask, name="latent-tool-resolve", daemon=True)
    thread.start()
    thread.join(seconds)
    found = list(answers)
    if not found:
        raise _unreachable(f"{host} has no known address.")
    return found


# Requests ---------------------------------------------------------------------------------------------------------


class _Cut:
    """Ends connections when the time is up: a server that drips single header bytes never trips a read time-out."""

    def __init__(self) -> None:
        self.expired = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def watch(self, event: str, info: dict[str, Any]) -> None:
        """httpx's trace hook: remember every connection that is made."""
        if event == "connection.connect_tcp.complete":
            connection: socket.socket = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.append(connection.dup())
            if self.expired:
                self.now()

    def now(self) -> None:
        with self._lock:
            self.expired = True
            for connection in self._sockets:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            while self._sockets:
                self._sockets.pop().close()


@contextmanager
def _cut_after(seconds: float) -> Iterator[_Cut]:
    cut = _Cut()
    timer = threading.Timer(seconds, cut.now)
    timer.daemon = True
    timer.start()
    try:
        yield cut
    finally:
        timer.cancel()
        timer.join()
        cut.close()


@contextmanager
def _request(place: _Place, policy: ImagePolicy, end: float, cut: _Cut) -> Iterator[httpx.Response]:
    """One GET without redirects, to an address that was checked; the first that can be connected to is taken.

    httpx's transport is used without its client, which would keep cookies, read the environment and log the URL.
    """
    import httpx

    left = end - time.monotonic()
    if left <= 0:
        raise httpx.ReadTimeout("")
    proxy = _proxy(place) if policy.trust_environment else None
    targets = [place.host] if proxy else _addresses(place, policy, min(left, policy.stall_s))
    tls = place.scheme == "https"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
    if tls:
        context = httpx.create_ssl_context(trust_env=policy.trust_environment)
    with httpx.HTTPTransport(verify=context, trust_env=False, proxy=proxy) as transport:
        for number, target in enumerate(targets, 1):
            limit = max(0.001, min(policy.stall_s, end - time.monotonic()))
            extensions: dict[str, Any] = {"timeout": httpx.Timeout(limit).as_dict(), "trace": cut.watch}
            if not place.host.startswith("["):
                extensions["sni_hostname"] = place.host
            request = httpx.Request(
                "GET",
                f"{place.scheme}://{target}:{place.port}{place.rest}",
                headers={
                    "Host": place.host if place.port == (443 if tls else 80) else f"{place.host}:{place.port}",
                    "User-Agent": "latent-tool",
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                },
                extensions=extensions,
            )
            try:
                response = transport.handle_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(targets):
                    raise
                continue
            try:
                yield response
            finally:
                response.close()
            return


def _proxy(place: _Place) -> httpx.Proxy | None:
    """The proxy that the environment names for this place."""
    import httpx

    proxies = urllib.request.getproxies_environment()
    url = proxies.get(place.scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(f"{place.host.strip('[]')}:{place.port}"):
        return None
    try:
        return httpx.Proxy(url if "://" in url else f"http://{url}")
    except (ValueError, httpx.InvalidURL):
        raise ImageNotFoundError(
            "The proxy in the environment is not valid.", "Set HTTPS_PROXY to a valid URL, or unset it."
        ) from None


def _body(response: httpx.Response, policy: ImagePolicy, host: str) -> bytes:
    """The body, read piece by piece and unpacked piece by piece, never more than the limit of each."""
    if response.status_code != 200:
        error = ImageNotFoundError(
            f"{host} answered {response.status_code}.", "Check the URL; credentials are never sent."
        )
        error.retryable = response.status_code in (408, 425, 429) or response.status_code >= 500
        raise error
    declared = response.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > policy.max_bytes:
        raise _too_large(policy)
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ImageDecodeError("The server compressed the image in an unknown way.", "Download it yourself.")
    unpack = zlib.decompressobj(47) if encoding not in ("", "identity") else None  # 47: gzip or zlib
    received, data = 0, bytearray()
    try:
        for piece in response.iter_raw():
            received += len(piece)
            data += unpack.decompress(piece, policy.max_bytes + 1 - len(data)) if unpack else piece
            if max(received, len(data)) > policy.max_bytes:
                raise _too_large(policy)
    except zlib.error:
        raise ImageDecodeError("The body that the server compressed is damaged.", "Download it yourself.") from None
    if unpack and not unpack.eof:
        raise ImageDecodeError("The body that the server compressed is cut short.", "Try again.")
    return bytes(data)


def _too_large(policy: ImagePolicy) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"The image has more than {policy.max_bytes} bytes.",
        "Use a smaller one, or raise max_bytes of the image policy.",
    )


def _unreachable(message: str) -> ImageError:
    error = ImageNotFoundError(message, "Check the URL and the network, or try again later.")
    error.retryable = True
    return error
