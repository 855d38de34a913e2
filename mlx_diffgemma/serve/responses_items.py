"""The output of a response: items, and the events that tell of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..events import Text, ToolCall
from .openai_types import new_id
from .responses_types import Called

Event = dict[str, Any]


class Output:
    """The items that pieces make. Events lack their `sequence_number`. White space alone makes no
    item."""

    def __init__(self, called: Mapping[str, Called]) -> None:
        """Begin.

        Args:
          called: the model's name of each tool -> what the client knows it by.
        """
        self.items: list[dict[str, Any]] = []
        self._called = called
        self._open: str | None = None  # channel of the last item, until it ends
        self._held: tuple[str, str] = ("", "")  # channel and white space that may begin an item

    def add(self, piece: Text | ToolCall) -> Iterator[Event]:
        """Add a piece; yield its events."""
        if isinstance(piece, ToolCall):
            yield from self.end()
            yield from self._call(piece)
            return
        text = piece.piece
        if self._open != piece.channel:
            text = (self._held[1] if self._held[0] == piece.channel else "") + text
            self._held = (piece.channel, text)
            if not text.strip():
                return
            self._held = ("", "")
            yield from self.end()
            yield from self._begin(piece.channel)
        if text:
            self._part["text"] += text
            yield self._of_part(f"{self._kind}.delta", delta=text, **self._logprobs)

    def end(self, status: str = "completed") -> Iterator[Event]:
        """End the open item."""
        if self._open is None:
            return
        part, item = self._part, self.items[-1]
        yield self._of_part(f"{self._kind}.done", text=part["text"], **self._logprobs)
        yield self._of_part("response.content_part.done", part=dict(part))
        self._open = None
        item["status"] = status
        yield self._of_item("response.output_item.done")

    @property
    def _part(self) -> dict[str, Any]:
        part = self.items[-1]["content"][0]
        assert isinstance(part, dict)
        return part

    @property
    def _kind(self) -> str:
        return f"response.{self._part['type']}"

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self._open == "answer" else {}

    def _begin(self, channel: str) -> Iterator[Event]:
        item: dict[str, Any]
        if channel == "answer":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": []}
            part["logprobs"] = []
            item = {"type": "message", "id": new_id("msg_"), "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"type": "reasoning", "id": new_id("rs_"), "summary": []}
        self._open = channel
        self.items.append({**item, "status": "in_progress", "content": []})
        yield self._of_item("response.output_item.added")
        self.items[-1]["content"] = [part]
        yield self._of_part("response.content_part.added", part=dict(part))

    def _call(self, call: ToolCall) -> Iterator[Event]:
        called = self._called.get(call.name, Called(call.name))
        names = {"call_id": new_id("call_"), "name": called.name}
        if called.namespace is not None:
            names["namespace"] = called.namespace
        if called.is_custom:
            kind, key, written = "custom_tool_call", "input", _input(call)
            event = "response.custom_tool_call_input"
            item = {"type": kind, "id": new_id("ctc_"), **names, key: ""}
        else:
            kind, key = "function_call", "arguments"
            written = json.dumps(call.arguments, ensure_ascii=False)
            event = "response.function_call_arguments"
            item = {"type": kind, "id": new_id("fc_"), **names, key: ""}
        self.items.append({**item, "status": "in_progress"})
        yield self._of_item("response.output_item.added")
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        if written:
            yield {"type": f"{event}.delta", **place, "delta": written}
        yield {"type": f"{event}.done", **place, key: written}
        self.items[-1] |= {key: written, "status": "completed"}
        yield self._of_item("response.output_item.done")

    def _of_item(self, kind: str) -> Event:
        item = self.items[-1]
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(item)}

    def _of_part(self, kind: str, **more: Any) -> Event:
        place = {"output_index": len(self.items) - 1, "content_index": 0}
        return {"type": kind, "item_id": self.items[-1]["id"], **place, **more}


def _input(call: ToolCall) -> str:
    """Return the text that a custom tool gets."""
    given = call.arguments.get("input")
    if len(call.arguments) == 1 and isinstance(given, str):
        return given
    return json.dumps(call.arguments, ensure_ascii=False)
