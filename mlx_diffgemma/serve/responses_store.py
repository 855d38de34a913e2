"""Responses that are kept in memory, within bounds, so that further requests can follow them."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..config.serving import Limits
from .errors import ApiError


@dataclass(frozen=True)
class Kept:
    """A response.

    Attributes:
      response: its object.
      messages: the conversation up to it and with it, as the chat template reads it, without
        instructions.
      items: of the input of its request.
    """

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    items: list[dict[str, Any]]


class ResponseStore:
    """The responses that were used last."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._most_bytes = limits.max_kept_responses, limits.max_kept_bytes
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
        self._bytes = 0

    def put(self, kept: Kept) -> None:
        """Keep a response; the ones that were not used for the longest time go. One that is larger
        than the store is not kept."""
        size = len(json.dumps([kept.response, kept.messages, kept.items]))
        if size > self._most_bytes:
            return
        self._kept[kept.response["id"]] = (kept, size)
        self._bytes += size
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            _, (_, old) = self._kept.popitem(last=False)
            self._bytes -= old

    def get(self, name: str, *, previous: bool = False) -> Kept:
        """Return a response.

        Args:
          name: its id.
          previous: whether a request follows it, and the error is one of that request.

        Raises:
          ApiError: if it is not kept.
        """
        if name not in self._kept:
            raise ApiError(
                400 if previous else 404,
                f"there is no response {name[:100]!r}: responses are kept in memory, unless their "
                "request has store: false, and those that were not used for the longest time go",
                param="previous_response_id" if previous else "response_id",
                code="previous_response_not_found" if previous else "response_not_found",
            )
        self._kept.move_to_end(name)
        return self._kept[name][0]

    def drop(self, name: str) -> None:
        """Forget a response.

        Raises:
          ApiError: as `get`.
        """
        self.get(name)
        self._bytes -= self._kept.pop(name)[1]

    def __len__(self) -> int:
        return len(self._kept)
