"""Bounds on what the clients of a server may ask for. Imports no mlx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .entry import Entry, check, setting
from .images import MOST_PIXELS

_SERVE = ("serve",)  # the command that has them as options


def _count(default: int, help: str, at_most: int | None = None) -> Any:
    return setting(Entry(help=help, default=default, at_least=1, at_most=at_most, commands=_SERVE))


def _amount(default: float, help: str) -> Any:
    return setting(Entry(help=help, default=default, above=0, commands=_SERVE))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may take."""

    max_body_mb: float = _amount(16.0, "MB of a request's body.")
    max_connections: int = _count(256, "Connections at a time; further ones are closed at once.")
    header_seconds: float = _amount(10.0, "Seconds in which a request's head must arrive.")
    body_seconds: float = _amount(30.0, "Seconds in which a request's body must arrive.")
    send_seconds: float = _amount(
        300.0, "Seconds for which a client may read nothing before its connection is closed."
    )
    max_answer_tokens: int = _count(
        4096, "New tokens of an answer where the request sets no limit."
    )
    max_fill_tokens: int = _count(
        2048, "Tokens of the text around a gap that the model is shown; editors send more."
    )
    max_messages: int = _count(4096, "Messages in a request.")
    max_parts: int = _count(1024, "Parts of a message, and tool calls in it.")
    max_images: int = _count(64, "Images in a request.")
    max_image_pixels: int = _count(
        25_000_000,
        "Pixels of an image in a request; larger ones are refused before they are decoded.",
        at_most=MOST_PIXELS,
    )
    allow_image_urls: bool = field(
        default=False,
        metadata={"help": "Fetch images that requests name by an address of the public internet."},
    )
    max_tools: int = _count(256, "Tools in a request.")
    max_choices: int = _count(8, "Answers to one request, as `n` asks for.")
    max_stops: int = _count(16, "Stop strings in a request.")
    max_stop_characters: int = _count(256, "Characters of a stop string.")
    max_schema_kb: float = _amount(
        64.0, "kB of a JSON Schema, of a tool's parameters, or of an expression."
    )
    max_schema_depth: int = _count(32, "Objects and lists within each other in a JSON Schema.")
    max_schema_states: int = _count(2000, "States of a constraint's automaton.", at_most=10_000)
    schema_seconds: float = _amount(5.0, "Processor seconds in which a constraint must compile.")
    max_waiting: int = _count(
        64, "Requests that wait for their constraint to be compiled, or their prompt encoded."
    )
    max_kept_responses: int = _count(
        256, "Responses kept for requests that follow them with previous_response_id."
    )
    max_kept_mb: float = _amount(64.0, "MB of all these responses with their conversations.")

    def __post_init__(self) -> None:
        check(self)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_kept_bytes(self) -> int:
        return int(self.max_kept_mb * 1e6)

    @property
    def max_schema_bytes(self) -> int:
        return int(self.max_schema_kb * 1e3)
