"""Routes that tell of the server: models, health and metrics."""

from __future__ import annotations

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
        data = [_model(each) for each in state.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        return JSONResponse(_model(state.model(request.path_params["name"])))

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


def _gauges(state: State) -> dict[str, float]:
    counts = [served.engine.counts for served in state.models.values()]
    return {
        "queue": sum(each["waiting"] for each in counts),
        "running": sum(each["running"] for each in counts),
        "rows": sum(each["rows"] for each in counts),
        "memory_bytes": mx.get_active_memory(),
    }
