"""The page at `/`: its files, which need no key, under a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .state import State

PREFIX = "/page/"
INDEX = "index.html"
_SHARED = ("trace_view.js", "trace.css")  # of the trace page
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache",  # kept, and asked for again with its tag
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class File(NamedTuple):
    """A file of the page."""

    content: bytes
    type: str
    tag: str


def routes(state: State) -> list[Route]:
    """Return the routes."""

    async def index(request: Request) -> Response:
        return _response(request, INDEX)

    async def part(request: Request) -> Response:
        return _response(request, request.path_params["name"])

    return [
        Route("/", index, methods=["GET"]),
        Route(PREFIX + "{name:path}", part, methods=["GET"]),
    ]


def is_file(path: str) -> bool:
    """Return whether a path is one of the page's, which holds no secret and needs no key."""
    return path == "/" or path.startswith(PREFIX)


@cache
def names() -> dict[str, Traversable]:
    """Return every file of the page by its name, such as `vendor/katex/katex.min.js`."""
    found = dict(_inside(files(__package__) / "page", ""))
    view = files("mlx_diffgemma.view")
    return found | {name: view / name for name in _SHARED}


@cache
def file(name: str) -> File:
    """Return a file of the page by its name."""
    content = names()[name].read_bytes()
    kind = _TYPES.get("." + name.rpartition(".")[2], "text/plain; charset=utf-8")
    return File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _inside(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _inside(each, f"{prefix}{each.name}/")
        elif not each.name.startswith("."):
            yield prefix + each.name, each


def _response(request: Request, name: str) -> Response:
    if name not in names():
        raise HTTPException(404)
    request.state.tally.is_quiet = True
    found = file(name)
    headers = {**_HEADERS, "ETag": found.tag}
    if found.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers={**headers, "Content-Type": found.type})
