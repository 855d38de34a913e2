"""A chat as a JSON file: its format, and the checks of a file that may be anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.files import write_whole
from ..config.generation import GenerationSettings
from ..errors import ChatError, ConfigError
from ..language.pictures import is_data_url

FORMAT, VERSION = "mlx_diffgemma chat", 1

# Role -> keys that its messages must have, and those that they may have.
_KEYS = {
    "user": ({"content"}, set()),
    "assistant": ({"content"}, {"tool_calls", "reasoning"}),
    "tool": ({"content", "tool_call_id"}, {"name"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChat:
    """What a file keeps of a chat."""

    messages: list[dict[str, Any]]
    settings: GenerationSettings = GenerationSettings()
    system_prompt: str | None = None
    thinking: bool = False
    tools: tuple[Any, ...] = ()  # declarations
    stop: tuple[str, ...] = ()
    answers: int = 0  # drawn so far: the next seed depends on it


def write_chat(file: Path, chat: SavedChat) -> None:
    """Write a chat.

    Raises:
      DiffGemmaError: if the file cannot be written, or would replace one that is no saved chat.
    """
    if file.exists():
        try:
            _object_of(file)
        except ChatError as error:
            raise ChatError(f"{error}; it is not replaced, choose another name") from error
    content = {
        "format": FORMAT,
        "version": VERSION,
        "system_prompt": chat.system_prompt,
        "thinking": chat.thinking,
        "tools": list(chat.tools),
        "stop": list(chat.stop),
        "settings": _given(chat.settings),
        "answers": chat.answers,
        "messages": chat.messages,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_whole(file, text.encode("utf-8"))


def read_chat(file: Path) -> SavedChat:
    """Read and check a chat.

    Raises:
      ChatError: if the file cannot be read, is no saved chat, or is damaged.
    """
    content = _object_of(file)
    version = content.get("version")
    if version != VERSION:
        raise ChatError(
            f"{file} is a chat of version {version!r}, and this program reads version {VERSION}"
        )
    try:
        return SavedChat(
            messages=_messages(_typed(content, "messages", list, [])),
            settings=_settings(_typed(content, "settings", dict, {})),
            system_prompt=_typed(content, "system_prompt", str, None),
            thinking=_typed(content, "thinking", bool, False),
            tools=tuple(_typed(content, "tools", list, [])),
            stop=tuple(_typed(content, "stop", list, [])),
            answers=_typed(content, "answers", int, 0),
        )
    except _DamageError as damage:
        raise ChatError(f"{file} is a damaged chat: {damage}") from damage


class _DamageError(Exception):
    """What is wrong with a chat's file."""


def _object_of(file: Path) -> dict[str, Any]:
    """Return the object in a chat's file."""
    what = f"{file} is no saved chat"
    try:
        if file.exists() and not file.is_file():  # reading a pipe would wait
            raise ChatError(f"{what}: it is no ordinary file")
        with file.open("rb") as stream:
            first = stream.read(64)
            if not first.lstrip().startswith(b"{"):  # do not read gigabytes of another format
                raise ChatError(f"{what}: it is not a JSON object")
            content = json.loads((first + stream.read()).decode("utf-8"))
    except OSError as error:
        raise ChatError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{what}: it is not valid JSON ({error})") from error
    if content.get("format") != FORMAT:
        raise ChatError(f'{what}: its "format" is not "{FORMAT}"')
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError(f"{file} is a damaged chat: it holds half a character") from error
    return content


def _typed(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """Return a value of the file, or the default where it has none."""
    value = content.get(key)
    if value is None:
        return default
    if type(value) is not kind:
        raise _DamageError(f'"{key}" is {value!r:.80}')
    return value


def _given(settings: GenerationSettings) -> dict[str, Any]:
    """Return the settings that are not left open."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {name: value for name, value in values.items() if value not in (None, ())}


def _settings(values: Mapping[str, Any]) -> GenerationSettings:
    names = {f.name for f in fields(GenerationSettings)}
    if unknown := sorted(set(values) - names):
        raise _DamageError(f"there is no setting {unknown[0]!r}")
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    try:
        return GenerationSettings(**{**values, **lists})
    except ConfigError as error:
        raise _DamageError(f"its settings: {error}") from error


def _messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the messages of a file, if a chat can have them in this order."""
    open_calls: set[str] = set()
    before = None
    for number, message in enumerate(messages, 1):
        role = _role(number, message)
        if role == "tool":
            if message["tool_call_id"] not in open_calls:
                raise _DamageError(f"message {number} answers no tool call")
            open_calls.remove(message["tool_call_id"])
        elif open_calls:
            raise _DamageError(f"message {number} comes before the results of tool calls")
        if role == before == "user" or (before is None and role != "user"):
            raise _DamageError(f"message {number} is out of order")
        open_calls |= _call_ids(number, message)
        before = role
    if before == "user":
        raise _DamageError("its last message has no answer")
    return list(messages)


def _role(number: int, message: Any) -> str:
    """Return the role of a message whose keys and texts are those of its role."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _KEYS:
        raise _DamageError(f"message {number} has no role that a chat has")
    must, may = _KEYS[role]
    given = set(message) - {"role"}
    if not must <= given <= must | may:
        raise _DamageError(f"message {number} has the keys {', '.join(sorted(given)) or 'none'}")
    has_parts = role == "user" and _are_parts(message["content"])
    for key in given - {"tool_calls"}:
        if not isinstance(message[key], str) and not (has_parts and key == "content"):
            raise _DamageError(f'"{key}" of message {number} is not text')
    if role == "user" and not text_of(message).strip():
        raise _DamageError(f"message {number} is empty")
    return role


def _are_parts(content: Any) -> bool:
    """Return whether a content is a list of images, as data: URLs, and texts."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and part.get("type") in ("image", "text")
        and set(part) == {"type", part["type"]}
        and isinstance(part[part["type"]], str)
        and (part["type"] == "text" or is_data_url(part["image"]))
        for part in content
    )


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a user's message, without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _call_ids(number: int, message: Mapping[str, Any]) -> set[str]:
    """Return the ids of a message's tool calls."""
    given = message.get("tool_calls", [])
    calls: list[Any] = given if isinstance(given, list) else [given]
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not (
            isinstance(function, dict)
            and isinstance(call.get("id"), str)
            and isinstance(function.get("name"), str)
            and isinstance(function.get("arguments"), dict)
        ):
            raise _DamageError(f"a tool call of message {number} has no id, name and arguments")
    return {call["id"] for call in calls}
