"""What the model says in a turn of a conversation, as messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..events import Event, Finished, Text, ToolCall

Message = dict[str, Any]


@dataclass(slots=True)
class Said:
    """What the model has said in a turn so far."""

    answer: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    is_finished: bool = False

    def observe(self, event: Event) -> None:
        if isinstance(event, Text) and event.channel == "answer":
            self.answer += event.piece
        elif isinstance(event, Text):
            self.thought += event.piece
        elif isinstance(event, ToolCall):
            self.calls.append(event)
        elif isinstance(event, Finished):
            self.is_finished = True

    @property
    def counts(self) -> bool:
        """Whether there is something to keep: a whole answer, though empty, or a part of one."""
        return self.is_finished or bool(self.answer.strip() or self.calls)

    def messages(self) -> list[Message]:
        """Return it as messages. Templates write a message's text behind the results of its calls,
        so text beside calls gets a message of its own. Templates show the thought before a call
        until the next user's message."""
        if not self.calls:
            return [{"role": "assistant", "content": self.answer}]
        calling: Message = {"role": "assistant", "content": ""}
        calling["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls
        ]
        before: list[Message] = []
        if self.answer.strip():
            before = [{"role": "assistant", "content": self.answer}]
        if self.thought.strip():
            (before or [calling])[0]["reasoning"] = self.thought.strip()
        return [*before, calling]
