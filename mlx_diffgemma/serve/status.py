"""Routes that tell of the server: models, health and metrics."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import mlx.core as mx
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .state import Served, State


def routes(state: State) -> list[Route]:
    """Return the routes."""

    async def models(request: Request) -> Response:
        state.check_ready()
        form = _form(request)
        data = [form(each) for each in state.models.values()]
        if form is _model:
            return JSONResponse({"object": "list", "data": data})
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return JSONResponse({"data": data, "has_more": False, **ends})

    async def model(request: Request) -> Response:
        return JSONResponse(_form(request)(state.model(request.path_params["name"])))

    async def health(request: Request) -> Response:
        if state.is_ending:
            return JSONResponse({"status": "ending"}, 503)
        if not state.models:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(
            state.metrics.text(_gauges(state)), media_type="text/plain; version=0.0.4"
        )

    return [
        *(Route(f"{start}/models", models, methods=["GET"]) for start in ("/v1", "")),
        *(Route(f"{start}/models/{{name:path}}", model, methods=["GET"]) for start in ("/v1", "")),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "mlx_diffgemma",
        "context_length": served.context_length,
        "max_model_len": served.context_length,  # vLLM's name, which clients read
        "canvas_length": served.canvas_length,
    }


def _form(request: Request) -> Callable[[Served], dict[str, Any]]:
    """Return what makes the object of a model in the dialect of the client."""
    return _anthropic_model if "anthropic-version" in request.headers else _model


def _anthropic_model(served: Served) -> dict[str, Any]:
    return {
        "type": "model",
        "id": served.name,
        "display_name": served.name,
        "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
        "max_input_tokens": served.context_length - served.canvas_length,
        "max_tokens": served.context_length,
    }


def _gauges(state: State) -> dict[str, float]:
    counts = [served.engine.counts for served in state.models.values()]
    return {
        "queue": sum(each["waiting"] for each in counts),
        "running": sum(each["running"] for each in counts),
        "rows": sum(each["rows"] for each in counts),
        "memory_bytes": mx.get_active_memory(),
    }
