"""Where the lines of a chat come from: a terminal, in which they can be edited, or a stream."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import PromptError


class Lines(Protocol):
    """A source of messages and commands."""

    is_terminal: bool

    def read(self, prompt: str) -> str | None:
        """Return the next one, or None at the end.

        Raises:
          PromptError: if it cannot be read; the next one may be.
        """

    def change(self, prompt: str, text: str) -> str | None:
        """Return a text after a person has changed it; None if the change is given up. Only where
        `is_terminal`."""


def lines_of(commands: Sequence[str]) -> Lines:
    """Return the lines of the terminal, or of stdin where stdin or stdout is none."""
    streams = sys.stdin, sys.stdout
    if all(stream is not None and stream.isatty() for stream in streams):
        return EditedLines(commands)
    return StreamLines()


class StreamLines:
    """Lines of stdin. A backslash at the end of a line joins it with the next one."""

    is_terminal = False

    def __init__(self) -> None:
        self._is_first = True

    def read(self, prompt: str) -> str | None:
        parts: list[bytes] = []
        while raw := sys.stdin.buffer.readline() if sys.stdin is not None else b"":
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if not line.endswith(b"\\"):
                return self._text([*parts, line])
            parts.append(line[:-1])
        return self._text(parts) if parts else None

    def change(self, prompt: str, text: str) -> str | None:
        raise NotImplementedError("a stream has nobody who could change a text")

    def _text(self, parts: Sequence[bytes]) -> str:
        try:
            text = b"\n".join(parts).decode("utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"a line of stdin is not UTF-8: {error}") from error
        if self._is_first:  # a byte order mark is not part of it
            text, self._is_first = text.removeprefix("\ufeff"), False
        return text


class EditedLines:
    """Lines that are typed, with editing, a history and completion of commands. Alt-Enter begins a
    new line, and so does Enter behind a backslash."""

    is_terminal = True

    def __init__(self, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter

        self._session: Any = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            prompt_continuation=lambda width, *_: " " * width,
            enable_suspend=True,
        )

    def read(self, prompt: str) -> str | None:
        while True:
            try:
                line = str(self._session.prompt(prompt))
            except KeyboardInterrupt:  # drops what was typed
                print("(Ctrl-D or /quit leaves)", file=sys.stderr)
                continue
            except EOFError:
                return None
            if not self._was_stopped():
                return line
            print("(stopped before it was sent; it is in the history)", file=sys.stderr)

    def _was_stopped(self) -> bool:
        """Return whether Ctrl-C was typed just behind Enter, before it could be a signal; what else
        was typed stays for the next line."""
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.keys import Keys

        typed = get_typeahead(self._session.input)
        was_stopped = bool(typed) and typed[0].key == Keys.ControlC
        store_typeahead(self._session.input, typed[was_stopped:])
        return was_stopped

    def change(self, prompt: str, text: str) -> str | None:
        try:
            return str(self._session.prompt(prompt, default=text))
        except (KeyboardInterrupt, EOFError):  # Ctrl-C, or Ctrl-D on an empty line
            return None


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # as a terminal gives it when it was pressed before the prompt
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
