"""What the server serves: models by name, each with its engine; loading and ending."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from ..config.generation import GenerationSettings
from ..config.images import ImageSettings
from ..config.serving import Limits
from ..engine.engine import Engine
from .errors import ApiError, busy
from .metrics import Metrics
from .threads import Threads

# What the model is told of code with a gap. {code} is the code, with ____ for the gap; {files} are
# other files that the editor sends, or nothing.
FILL_PROMPT = (
    "{files}Fill in the blank ____ in this code. Write the whole code again, with the blank "
    "replaced and all else unchanged:\n\n{code}"
)
_ENCODERS, _COMPILERS = 4, 2  # threads


@dataclass(frozen=True)
class Served:
    """A model that requests may name."""

    name: str
    engine: Engine
    created: int = field(default_factory=lambda: int(time.time()))  # unix seconds

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return int(self.engine.model.config.text.max_position_embeddings)

    @cached_property
    def canvas_length(self) -> int:
        return int(self.engine.model.config.canvas_length)


@dataclass
class State:
    """All that handlers share.

    Attributes:
      limits: bounds on requests.
      settings: how to denoise where a request says nothing.
      thinking: whether the model thinks where a request says nothing.
      fill_prompt: what the model is told of code with a gap; see FILL_PROMPT.
      models: name -> model, the default one first; empty while they are loaded.
      aliases: further names of the default model; `*` in one stands for any characters.
      is_ending: whether new requests are refused, and those under way end.
    """

    limits: Limits = Limits()
    settings: GenerationSettings = GenerationSettings()
    thinking: bool = False
    fill_prompt: str = FILL_PROMPT
    models: Mapping[str, Served] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    is_ending: bool = False
    _on_end: set[Callable[[], Any]] = field(default_factory=set)

    @cached_property
    def images(self) -> ImageSettings:
        """How images become tokens."""
        return ImageSettings(max_image_pixels=self.limits.max_image_pixels)

    @cached_property
    def encoders(self) -> Threads:
        """The threads that encode prompts."""
        return Threads(_ENCODERS, self.limits.max_waiting, "their prompts to be encoded")

    @cached_property
    def compilers(self) -> Threads:
        """The threads that compile constraints."""
        return Threads(_COMPILERS, self.limits.max_waiting, "their constraints to be compiled")

    def check_ready(self) -> None:
        """Refuse requests while models are loaded and once the server ends.

        Raises:
          ApiError: with status 503.
        """
        if self.is_ending:
            raise busy("the server ends")
        if not self.models:
            raise busy("the model is being loaded; try again in a moment")

    def model(self, name: str | None) -> Served:
        """Return the model of a name, or the default one for None and "", which llama.vim sends.

        Raises:
          ApiError: 404 if there is none, 503 as `check_ready`.
        """
        self.check_ready()
        default = next(iter(self.models.values()))
        if not name or name in self.aliases:
            return default
        if name not in self.models:
            if any("*" in alias and fnmatchcase(name, alias) for alias in self.aliases):
                return default
            known = ", ".join([*self.models, *self.aliases])
            raise ApiError(
                404,
                f"there is no model {name[:200]!r}; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def when_ending(self, act: Callable[[], Any]) -> Callable[[], None]:
        """Call something once the server ends; return what takes that back."""
        self._on_end.add(act)
        return lambda: self._on_end.discard(act)

    def end(self) -> None:
        """Refuse new requests, and tell those under way to end."""
        self.is_ending = True
        for act in list(self._on_end):
            act()
