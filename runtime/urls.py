"""Images from URLs: fetched only from hosts that a policy allows, and never from inside its own network."""

from __future__ import annotations

import ipaddress
import socket
import time
import zlib
from dataclasses import dataclass
from typing import TypeGuard
from urllib.parse import quote, urljoin, urlsplit

from ..errors import InputError, TooLargeError
from ..inputs.sources import kind_of, not_readable, shown

_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16


@dataclass(frozen=True)
class UrlPolicy:
    """Limits on fetching URLs.

    Args:
        hosts: names that may be fetched from, ``example.org`` or ``.example.org`` for all below it;
            empty: any.
        schemes: ``https``, and ``http`` if you add it.
        max_bytes: of one image file.
        timeout: seconds for one image, from the look-up of its host to its last byte.
        redirects: how many are followed; each is held to this policy.
        private: also ask addresses that are not public (loopback, 10.x, link-local): a URL from a stranger
            could then reach services that only you should.
    """

    hosts: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("https",)
    max_bytes: int = 32 << 20
    timeout: float = 10.0
    redirects: int = 3
    private: bool = False


def is_url(image: object) -> TypeGuard[str]:
    """Whether ``image`` is text that begins like a URL."""
    return kind_of(image) == "url"


def fetch(url: str, policy: UrlPolicy | None) -> bytes:
    """The bytes at ``url``.

    Raises:
        InputError: ``policy`` is None or does not allow it, the server does not answer as it should, or in
            time, or the file is too large.
    """
    if policy is None:
        raise not_readable(url, shown(url))
    from http.client import HTTPException  # slow to import, and few callers fetch images

    deadline = time.monotonic() + policy.timeout
    for _ in range(policy.redirects + 1):
        try:
            status, location, packed, body = _get(url, policy, deadline)
        except (OSError, HTTPException, ValueError) as error:
            raise _failed(url, str(error) or type(error).__name__) from error
        if status == 200:
            return _unpacked(url, body, policy) if packed else body
        if status not in _REDIRECTS or not location:
            raise _failed(url, f"The server answered with status {status}.")
        url = urljoin(url, location)
    raise _failed(url, f"It was redirected more than {policy.redirects} times.")


def _get(url: str, policy: UrlPolicy, deadline: float) -> tuple[int, str, bool, bytes]:
    """(status, where it says to go instead, whether the body is packed by gzip, body)."""
    import http.client
    import ssl

    parts = urlsplit(url)
    host = _ascii_host((parts.hostname or "").rstrip(".").lower())
    allowed = not policy.hosts or any(
        host == name or (name.startswith(".") and host.endswith(name)) for name in policy.hosts
    )
    if parts.scheme not in policy.schemes or not host or not allowed or parts.username is not None:
        raise InputError(
            f"The image {shown(url)} is not fetched.",
            f"Allowed: {' and '.join(policy.schemes)} from {', '.join(policy.hosts) or 'public hosts'}.",
            "Fetch it yourself and give its bytes.",
        )
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port)
    plain = _connected(url, host, port, policy, deadline)
    try:
        tls = ssl.create_default_context() if secure else None
        stream = tls.wrap_socket(plain, server_hostname=host) if tls else plain
        connection.sock = stream
        path = _quoted(parts.path or "/") + (f"?{_quoted(parts.query)}" if parts.query else "")
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "ivl-export"}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        length = answer.getheader("Content-Length", "")
        if length.isdecimal() and int(length) > policy.max_bytes:
            raise _too_large(url, policy)
        body = bytearray()
        while answer.status == 200 and (piece := answer.read1(_PIECE)):
            body += piece
            if len(body) > policy.max_bytes:
                raise _too_large(url, policy)
            stream.settimeout(_left(deadline))
        packed = answer.getheader("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")
        return answer.status, answer.getheader("Location", ""), packed, bytes(body)
    finally:
        connection.close()
        plain.close()  # TLS has closed it by then


def _connected(url: str, host: str, port: int, policy: UrlPolicy, deadline: float) -> socket.socket:
    """A connection to an address that was looked at: a second look-up could give another one."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not policy.private and not ipaddress.ip_address(address[0]).is_global:
            # Without the address: who sent the URL may be a stranger.
            raise InputError(f"The image {shown(url)} is not fetched.", f"{host} is no public address.")
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline))
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


def _quoted(text: str) -> str:
    """Percent-encoded as browsers do: characters not allowed in a URL; existing escapes stay."""
    return quote(text, safe="/%:@!$&'()*+,;=?~-._[]")


def _ascii_host(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode("ascii")


def _unpacked(url: str, body: bytes, policy: UrlPolicy) -> bytes:
    """Decompressed content of a server that used gzip without Accept-Encoding, up to the same limit."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        data = unpacker.decompress(body, policy.max_bytes + 1)
    except zlib.error as error:
        raise _failed(url, f"Its gzip is damaged: {error}.") from error
    if len(data) > policy.max_bytes:
        raise _too_large(url, policy)
    return data


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it took too long")
    return seconds


def _failed(url: str, why: str) -> InputError:
    what = f"The image {shown(url)} cannot be fetched."
    return InputError(what, why, "Fetch it yourself and give its bytes.")


def _too_large(url: str, policy: UrlPolicy) -> TooLargeError:
    why = f"The limit is {policy.max_bytes} bytes."
    return TooLargeError(f"The image {shown(url)} is too large.", why, "Make it smaller first.")
