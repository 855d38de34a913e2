"""The forms of a prompt: text, messages or token ids, with the checks of each."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import PromptError
from .encoded import EncodedPrompt

Message = Mapping[str, Any]


class Array(Protocol):
    """Any array: of numpy, MLX or torch."""

    def tolist(self) -> Any: ...


# Token ids as a list, an array, or what a tokenizer returns: a mapping with `input_ids`.
TokenIds = Sequence[int] | Array | Mapping[str, Any]
Prompt = str | Sequence[Message] | TokenIds | EncodedPrompt

_KINDS = "a prompt is a string, a list of messages or a list of token ids"
# Types of content parts, in the spellings of the common chat formats.
IMAGE_TYPES = ("image", "image_url", "input_image")
VIDEO_TYPES = ("video", "video_url", "input_video")
_REFUSED = {
    "audio is not supported": ("audio", "audio_url", "input_audio"),
    "files are not supported": ("file", "input_file", "document"),
}
_AS_PARTS = 'images and videos are parts of the content, as {"type": "image", "image": "a.png"}'
# Keys beside the content that hold media, in messages and in examples of training data.
_MEDIA_KEYS = {
    key: said
    for said, kinds in ((_AS_PARTS, IMAGE_TYPES + VIDEO_TYPES), *_REFUSED.items())
    if not said.startswith("files")
    for kind in kinds
    for key in (kind, f"{kind}s")
}
_FILE_KEYS = dict.fromkeys(("files", "attachments"), "files are not supported")


def given_ids(prompt: object) -> list[int] | None:
    """Return the token ids of a prompt that consists of ids, or None for text and messages.

    Raises:
      PromptError: if it is none of the three, has several rows, or is empty.
    """
    if isinstance(prompt, str):
        return None
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise PromptError(f"{_KINDS}, got {type(prompt).__name__}; decode it first")
    prompt = _listed(_input_ids(prompt) if isinstance(prompt, Mapping) else prompt)
    if not isinstance(prompt, Sequence):
        raise PromptError(f"{_KINDS}, got {type(prompt)}")
    rows = [_listed(item) for item in prompt]
    if rows and all(isinstance(row, (list, tuple)) for row in rows):
        if len(rows) > 1:
            raise PromptError(
                f"one prompt was expected, got {len(rows)} rows of token ids; "
                "batch_generate takes several prompts"
            )
        rows = list(rows[0])
    if not rows:
        raise PromptError("the prompt is empty")
    if not isinstance(rows[0], numbers.Real):
        return None
    for token in rows:
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise PromptError(f"a token id is a whole number, got {token!r}")
    return [int(token) for token in rows]


def _input_ids(encoding: Mapping[str, Any]) -> Any:
    if "input_ids" not in encoding:
        hint = "; put the message into a list" if "role" in encoding else ""
        keys = ", ".join(map(repr, encoding)) or "nothing"
        raise PromptError(f"{_KINDS}, got an object with {keys}{hint}")
    mask = _listed(encoding.get("attention_mask")) or []
    rows = mask if mask and isinstance(mask[0], (list, tuple)) else [mask]
    if not all(flag for row in rows for flag in row):
        raise PromptError("the token ids are padded; give them without padding")
    return encoding["input_ids"]


def _listed(value: Any) -> Any:
    """Return an array as lists, and anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def given_messages(prompt: Any) -> list[Message]:
    """Return the checked messages of a prompt that is text or messages.

    Raises:
      PromptError: if it is empty, or a message has no role or holds something other than text,
        images and videos.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        return [{"role": "user", "content": prompt}]
    messages = list(prompt)
    if len(messages) > 1 and all(isinstance(message, str) for message in messages):
        raise PromptError(
            f"one prompt was expected, got {len(messages)} strings; "
            "batch_generate takes several prompts"
        )
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"a message must be an object with role and content, got {message!r}")
        refuse_media(message, f"a {message['role']} message", _MEDIA_KEYS | _FILE_KEYS)
        _check_content(message)
    if not any(_says_something(message) for message in messages):
        raise PromptError("the prompt is empty: no message has any content")
    return messages


def refuse_media(
    holder: Mapping[str, Any], what: str, keys: Mapping[str, str] = _MEDIA_KEYS
) -> None:
    """Refuse images, audio and video beside the content, which templates drop.

    Raises:
      PromptError: names the key and `what` has it.
    """
    for key, value in holder.items():
        is_empty = value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)
        if key in keys and not is_empty:
            raise PromptError(f"{what} has {key!r} beside its text; {keys[key]}")


def _says_something(message: Message) -> bool:
    """Return whether a message has anything beside its role, such as content or a tool call."""
    values = [value for key, value in message.items() if key != "role"]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _check_content(message: Message) -> None:
    """Refuse content that a template would drop, or would replace by a single token."""
    content, role = message.get("content"), message["role"]
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        if role == "tool":  # a result may be any JSON
            return
        raise PromptError(
            f"the content of a {role} message must be text or a list of parts, "
            f"got {type(content).__name__}"
        )
    for part in content:
        if not isinstance(part, Mapping) or "type" not in part:
            raise PromptError(
                f"a part of a {role} message must be an object with type and text, got {part!r}"
            )
        kind = part["type"]
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise PromptError(f"a text part of a {role} message has no text: {part!r}")
        elif not isinstance(kind, str) or kind not in IMAGE_TYPES + VIDEO_TYPES:
            said = [said for said, kinds in _REFUSED.items() if kind in kinds]
            raise PromptError(
                f"a {role} message holds a part of type {kind!r}; "
                f"{said[0] if said else 'this type is not known'}, only parts of type 'text', "
                "'image' and 'video' are"
            )
