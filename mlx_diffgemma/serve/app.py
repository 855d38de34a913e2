"""The application: all dialects behind one guard."""

from __future__ import annotations

from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from . import (
    anthropic,
    completions,
    decisions,
    edits,
    events,
    infill,
    openai_chat,
    page,
    page_settings,
    responses,
    status,
)
from .errors import ApiError
from .log import Write
from .security import Access, Guard
from .state import State

# Each has `routes(state)`.
DIALECTS: tuple[Callable[[State], list[Route]], ...] = (
    status.routes,
    openai_chat.routes,
    decisions.routes,
    completions.routes,
    infill.routes,
    edits.routes,
    responses.routes,
    anthropic.routes,
    events.routes,
    page_settings.routes,
    page.routes,
)


def application(
    state: State,
    access: Access,
    *,
    log: Write | None = None,
    on_bug: Callable[[Exception], None] | None = None,
) -> ASGIApp:
    """Return the ASGI application.

    Args:
      state: the models and bounds.
      access: who may ask.
      log: takes a line for each request.
      on_bug: told of errors of this program, whose clients get status 500.
    """
    router = Router(
        [route for routes in DIALECTS for route in routes(state)],
        redirect_slashes=False,
        default=_not_found,
    )

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # or wrong methods are answered in plain text
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            raise _refusal(scope, error) from None

    guarded: ASGIApp = Guard(routed, access, state.metrics, log=log, on_bug=on_bug)
    if access.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"]
        )
    return guarded


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404)


def _refusal(scope: Scope, error: HTTPException) -> ApiError:
    shown = scope["path"][:200]
    if error.status_code == 405:
        message = f"{scope['method'][:20]} is not a method of {shown!r}"
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    if error.status_code == 404:
        return ApiError(404, f"there is no route {shown!r}", code="route_not_found")
    return ApiError(error.status_code, error.detail, headers=error.headers)
