"""Messages -> token ids, through the checkpoint's own chat template.

Text in message contents stays text: a user who types `<turn|>` gets those characters, not the end
of a turn. This is
the one default in which we differ from transformers on purpose; `allow_special_tokens` gives the
reference's reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from .errors import PromptError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

# Message keys whose strings the template compares with its own words.
_KEYWORDS = frozenset({"role", "type"})


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How a prompt becomes tokens."""

    system_prompt: str | None = None
    thinking: bool = False
    response_prefix: str | None = None  # the answer begins with this text
    use_chat_template: bool = True  # False: the prompt is raw text, control tokens and all
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)
    allow_special_tokens: bool = (
        False  # special tokens spelled in contents count, as in transformers
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, options: PromptOptions = PromptOptions()
) -> list[int]:
    """Token ids of a prompt: a string is one user turn, messages are a chat, ids are used as they
    are.

    Raises:
      PromptError: if the prompt is empty, the template refuses it, or there is no template.
    """
    if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
        if not prompt:
            raise PromptError("the prompt is empty")
        return list(prompt)  # type: ignore[arg-type]
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError("the prompt is empty")
    if not options.use_chat_template:
        if not isinstance(prompt, str):
            raise PromptError(
                "messages need the chat template; without it, the prompt must be a string"
            )
        return tokenizer.encode(prompt + (options.response_prefix or ""))
    messages: list[Message] = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else list(cast(Sequence[Message], prompt))
    )
    if options.system_prompt is not None:
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    prefix = options.response_prefix or ""
    if options.allow_special_tokens:
        return tokenizer.encode(
            _render(tokenizer, messages, options) + prefix, add_special_tokens=False
        )
    return _encode_with_literals(tokenizer, messages, prefix, options)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token of a tokenizer, as it is spelled."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def single_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids of texts that are one token each, such as further end tokens.

    Raises:
      PromptError: if a text is more than one token, or none.
    """
    ids = []
    for text in texts:
        if len(encoded := tokenizer.encode(text, add_special_tokens=False)) != 1:
            raise PromptError(f"{text!r} is not one token of this checkpoint but {len(encoded)}")
        ids.append(encoded[0])
    return tuple(ids)


def _encode_with_literals(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prefix: str, options: PromptOptions
) -> list[int]:
    """Marks, in all contents, what could begin a special token; marked, it begins none.

    The mark stands before the character, so that a template that strips old thoughts still finds
    the markers of them, and a token that a template joins from two contents still begins with one.
    """
    specials = special_tokens(tokenizer)
    starts = "".join(sorted({token[0] for token in specials}))
    mark = _unused_character(
        [messages, prefix, options.chat_template_config, getattr(tokenizer, "chat_template", "")]
    )
    begin = re.compile(f"[{re.escape(starts)}]") if starts else None

    def literal(value: Any) -> Any:
        if isinstance(value, str):
            return begin.sub(lambda match: mark + match[0], value) if begin else value
        if isinstance(value, Mapping):
            return {
                key if key in _KEYWORDS else literal(key): item
                if key in _KEYWORDS
                else literal(item)
                for key, item in value.items()
            }
        return [literal(item) for item in value] if isinstance(value, (list, tuple)) else value

    safe = [
        {key: item if key == "role" else literal(item) for key, item in message.items()}
        for message in messages
    ]
    rendered = _render(tokenizer, safe, options) + literal(prefix)
    longest_first = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
    ids: list[int] = []
    for piece in (
        re.split(f"((?<!{mark})(?:{longest_first}))", rendered) if specials else [rendered]
    ):
        if piece in specials:
            ids.append(specials[piece])
        elif text := piece.replace(mark, ""):
            ids.extend(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    return ids


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: PromptOptions
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "this checkpoint has no chat template; "
            "give the prompt as raw text (--ignore-chat-template)"
        )
    if not messages:
        raise PromptError("the prompt is empty: it has no messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"a message must be an object with role and content, got {message!r}")
    variables = {"enable_thinking": options.thinking, **options.chat_template_config}
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise PromptError(
            f"the checkpoint's chat template refuses these messages: {error}"
        ) from error


def _unused_character(values: Any) -> str:
    text = repr(values)
    # Private use characters: no template strips them, and repr may spell them as an escape.
    for code in range(0xE000, 0xF8FF):
        if chr(code) not in text and f"\\u{code:04x}" not in text:
            return chr(code)
    raise PromptError("the prompt uses every private character of Unicode")
