"""The settings that the page shows, with the help of their entries: `GET /x/settings`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..config.entry import choices, entries, kinds
from ..config.generation import GenerationSettings
from ..errors import ConfigError, DiffGemmaError
from ..language.encoded import ImageForm
from .state import Served, State

# Settings of a run that a page may set, in the order in which it shows them, with the most that
# this server takes where the entry has no bound: None for the checkpoint's canvas.
SHOWN: dict[str, int | None] = {
    "policy": 0,
    "temperature": 4,
    "seed": 0,
    "canvas_width": 0,
    "canvas_length": None,
    "max_new_tokens": 65_536,
    "max_denoising_steps": 256,
    "top_candidates": 16,
}


def routes(state: State) -> list[Route]:
    """Return the route."""

    async def settings(request: Request) -> Response:
        state.check_ready()
        served = next(iter(state.models.values()))
        return JSONResponse(
            {
                "settings": [_object(state, name, served) for name in SHOWN],
                "thinking": state.thinking,
                "images": images(state, served),
            }
        )

    return [Route("/x/settings", settings, methods=["GET"])]


def images(state: State, served: Served) -> dict[str, int] | None:
    """Return the limits of images in a request; None if the model reads none."""
    model = served.engine.model
    try:
        model.check_vision()
    except DiffGemmaError:  # it has no tower, or was loaded without it
        return None
    if ImageForm.of(model.config) is None:
        return None
    return {
        "max_images": state.limits.max_images,
        "max_image_pixels": state.limits.max_image_pixels,
        "max_body_bytes": state.limits.max_body_bytes,
    }


def settings_from(given: dict[str, Any], served: Served) -> dict[str, Any]:
    """Return the fields of `GenerationSettings` that a page gives; None leaves one open.

    Raises:
      ConfigError: for another field, or a value above this server's bound.
    """
    if unknown := sorted(set(given) - set(SHOWN)):
        raise ConfigError(f"{unknown[0]!r} is none of {', '.join(SHOWN)}")
    own = {name: value for name, value in given.items() if value is not None}
    GenerationSettings(**own)  # checks types and the entries' bounds
    for name, value in own.items():
        most = _most(name, served)
        if most and value > most:
            raise ConfigError(f"{name} is {value}; this server takes at most {most}")
    return own


def _most(name: str, served: Served) -> int:
    most = SHOWN[name]
    return served.canvas_length if most is None else most


def _object(state: State, name: str, served: Served) -> dict[str, Any]:
    """Return a setting as the page reads it."""
    entry = entries(GenerationSettings)[name]
    kind = kinds(GenerationSettings)[name]
    options = choices(kind)
    resolved = state.settings.resolve(served.engine.model.config)
    default = getattr(resolved, name)
    if name == "max_new_tokens":
        default = state.limits.max_answer_tokens
    return {
        "name": name,
        "help": entry.help,
        "kind": "choice" if options else kind.__name__,
        "choices": list(options),
        "default": None if name == "seed" else default,
        "at_least": entry.at_least,
        "at_most": _most(name, served) or entry.at_most,
    }
