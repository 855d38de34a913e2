"""What every request passes first: the checks of its host, origin and key, and the log."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import FAILED, ApiError
from .log import Tally, Write, printable
from .metrics import Metrics
from .page import is_file
from .sse import ClientGoneError, error_response

_OPEN = ("/health",)  # paths that need no key, beside the page's files
_SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
_SCHEMES = ("http", "https")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_CLOSED = 499  # nginx's status in its log for a client that went away; never sent


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
      key: of the server; None for no key.
      hosts: names that a Host header may have, beside localhost and addresses.
      origins: of pages that may ask, beside the server's own.
    """

    key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self, path: str, headers: Headers) -> None:
        """Refuse a request that may not be made.

        Raises:
          ApiError: 400 or 403 for its host or origin, 401 for its key.
        """
        self._check_host(headers)
        self._check_origin(headers)
        if self.key is not None and path not in _OPEN and not is_file(path):
            self._check_key(headers)

    def _check_host(self, headers: Headers) -> None:
        """Refuse names of others: a page whose name an attacker points at this machine (DNS
        rebinding) sends its own."""
        given = headers.getlist("host")
        if len(given) != 1:
            raise ApiError(400, "the request must have one Host header", code="invalid_host")
        name = _hostname(given[0])
        if name is None or not (
            name == "localhost" or _is_address(name) or name in map(str.lower, self.hosts)
        ):
            raise ApiError(
                403,
                f"the host {given[0][:200]!r} is not one of this server's; start it with "
                "--allow-host NAME if it is",
                code="invalid_host",
            )

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites. Programs send no Origin."""
        origin = headers.get("origin")
        if origin is None or origin in self.origins:
            return
        if origin.lower() not in (f"{kind}://{headers['host'].lower()}" for kind in _SCHEMES):
            raise ApiError(
                403,
                f"pages of {origin[:200]!r} may not use this server; start it with "
                "--allow-origin ORIGIN if they may",
                code="invalid_origin",
            )

    def _check_key(self, headers: Headers) -> None:
        kind, _, given = headers.get("authorization", "").partition(" ")
        keys = [given.strip()] if kind.lower() == "bearer" else []
        keys += [headers["x-api-key"]] if "x-api-key" in headers else []
        assert self.key is not None
        # The digests are of one length, so that the time tells nothing of the key.
        if not any(hmac.compare_digest(_digest(key), _digest(self.key)) for key in keys):
            raise ApiError(
                401,
                "the API key is wrong"
                if keys
                else "an API key is missing: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Guard:
    """An application behind its checks. Whatever happens inside is answered in the dialect's form,
    counted, and logged as one line."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        metrics: Metrics,
        *,
        log: Write | None = None,
        on_bug: Callable[[Exception], None] | None = None,
    ) -> None:
        """Guard an application.

        Args:
          app: the routes.
          access: who may ask.
          metrics: counts requests.
          log: takes a line for each request.
          on_bug: told of errors of this program.
        """
        self._app, self._access, self._metrics = app, access, metrics
        self._log, self._on_bug = log, on_bug

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets; the server's start and end
            await self._app(scope, receive, send)
            return
        tally = Tally(scope["method"], printable(scope["path"]))
        scope.setdefault("state", {})["tally"] = tally
        headers = Headers(scope=scope)
        try:
            await self._answer(scope, receive, self._sender(tally, send), headers)
        except ClientGoneError:
            tally.status, tally.note = _CLOSED, "the client went away"
        finally:
            self._metrics.answered(_route(scope), tally.status or _CLOSED)
            if self._log is not None and not tally.is_quiet:
                self._log(tally.line())

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        tally = scope["state"]["tally"]
        try:
            self._access.check(scope["path"], headers)
            await self._app(scope, receive, send)
            return
        except ApiError as error:
            reason = error
        except ClientGoneError:
            raise
        except Exception as error:  # a bug: the client learns nothing of it
            if self._on_bug is not None:
                self._on_bug(error)
            reason = ApiError(500, FAILED, code="internal_error")
        if tally.status:
            tally.note = "broke off"
            raise ClientGoneError  # what is sent cannot be taken back
        await error_response(scope["path"], reason)(scope, receive, send)

    def _sender(self, tally: Tally, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                tally.status = message["status"]
                given = {name for name, _ in message["headers"]}
                more = [each for each in _SECURITY_HEADERS if each[0] not in given]
                if message["status"] >= 400:
                    # A body that was not read would be taken for the next request.
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        return sending


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _hostname(given: str) -> str | None:
    """Return the name of a Host header without its port, or None for what is none."""
    found = _HOST.fullmatch(given)
    return found[1].strip("[]").rstrip(".").lower() if found else None


def _is_address(name: str) -> bool:
    """Return whether a host is an address: no name, so that nobody can point it here."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _route(scope: Scope) -> str:
    """Return the route's pattern: paths of clients would fill the metrics."""
    route = scope.get("route")
    return str(getattr(route, "path", "none"))
