"""Images behind addresses, fetched only where the command line allows it. This machine and private
networks are never asked: whoever asks the server cannot reach those through it."""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import ssl
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import h11

from ..config.serving import Limits
from ..language.pictures import is_data_url
from .errors import ApiError

_PORTS = {"http": 80, "https": 443}
_PIECE = 1 << 16
_HEAD_BYTES = 1 << 16
# Addresses with another one inside, to which a gateway may pass a connection on.
_GATEWAYS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))


class _RefusedError(Exception):
    """An address from which nothing is fetched, or an answer that cannot be used."""


class _Target(NamedTuple):
    """An address, in parts."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def header(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


async def fetch_images(messages: Sequence[Mapping[str, Any]], limits: Limits, param: str) -> None:
    """Put the bytes of images that messages name by their address in place of these. All of them
    together have the bounds of a request's body, in bytes and in seconds.

    Args:
      messages: as `image_part` makes the images in them; they are changed.
      limits: of the server.
      param: the field of the messages, for errors.

    Raises:
      ApiError: if one cannot be had; nothing else is fetched then.
    """
    parts = [
        part
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part["type"] == "image_url" and not is_data_url(part["image_url"]["url"])
    ]
    left, known = limits.max_body_bytes, dict[str, str]()
    url = ""
    try:
        async with asyncio.timeout(limits.body_seconds):
            for part in parts:
                url = part["image_url"]["url"]
                if url not in known:
                    data = await _fetched(_target(url), left)
                    left -= len(data)
                    encoded = binascii.b2a_base64(data, newline=False).decode()
                    known[url] = f"data:;base64,{encoded}"
                part["image_url"] = {"url": known[url]}
    except TimeoutError:
        raise _error(param, url, f"it did not arrive within {limits.body_seconds:g} s") from None
    except _RefusedError as error:
        raise _error(param, url, str(error)) from None
    except (OSError, h11.RemoteProtocolError, h11.LocalProtocolError):
        raise _error(param, url, "the connection failed") from None


def _error(param: str, url: str, why: str) -> ApiError:
    return ApiError(400, f"{param}: the image {url[:200]!r} cannot be fetched: {why}", param=param)


def _target(url: str) -> _Target:
    try:
        parts = urlsplit(url)
        usual = _PORTS[parts.scheme]
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port or usual
    except (ValueError, KeyError):  # UnicodeError is a ValueError
        raise _RefusedError("it is no http or https address") from None
    if not host or parts.username is not None or parts.password is not None:
        raise _RefusedError("an address has a host, and no user and password")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return _Target(parts.scheme, host, port, f"{path}?{query}" if query else path)


async def _fetched(target: _Target, most: int) -> bytes:
    """Return the body of an address."""
    for number, address in enumerate(addresses := await _addresses(target)):
        try:
            reader, writer = await asyncio.open_connection(
                address,  # and not the name, which may lead elsewhere by now
                target.port,
                ssl=_tls() if target.scheme == "https" else None,
                server_hostname=target.host if target.scheme == "https" else None,
            )
            break
        except OSError:
            if number == len(addresses) - 1:
                raise
    try:
        return await _asked(reader, writer, target, most)
    finally:
        writer.transport.abort()


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _addresses(target: _Target) -> list[str]:
    """Return the numbers of a host, all of which must be public."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(target.host, target.port, type=1)  # SOCK_STREAM
    except OSError:
        raise _RefusedError("there is no such host") from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    if not all(map(is_public, addresses)):
        raise _RefusedError("its host is not on the public internet")
    return addresses


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet: none of this machine, of a private
    network, of a group, or of a gateway to any of these."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and (
        found.ipv4_mapped is not None
        or found.sixtofour is not None
        or found.teredo is not None
        or found.is_site_local
        or found.scope_id is not None
        or any(found in network for network in _GATEWAYS)
    ):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


async def _asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: _Target, most: int
) -> bytes:
    """Ask for a path and return the answer's body."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
    headers = [
        ("Host", target.header),
        ("User-Agent", "mlx_diffgemma"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=target.path, headers=headers)
    for event in (request, h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    content = bytearray()
    while True:
        said = connection.next_event()
        if said is h11.NEED_DATA:
            connection.receive_data(await reader.read(_PIECE))
        elif isinstance(said, h11.Response):
            if said.status_code != 200:
                more = "; redirects are not followed" if 300 <= said.status_code < 400 else ""
                raise _RefusedError(f"its host answers with status {said.status_code}{more}")
            told = dict(said.headers).get(b"content-length", b"0")
            if int(told) > most:
                raise _RefusedError(f"it is larger than the {most:,} bytes that are left")
        elif isinstance(said, h11.Data):
            content += said.data
            if len(content) > most:
                raise _RefusedError(f"it is larger than the {most:,} bytes that are left")
        elif isinstance(said, h11.EndOfMessage):
            return bytes(content)
        elif isinstance(said, h11.ConnectionClosed):
            raise _RefusedError("its host says nothing")
