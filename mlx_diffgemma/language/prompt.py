"""Messages -> token ids, through the checkpoint's own chat template.

Text in message contents stays text: a user who types `<turn|>` gets those characters, not the end
of a turn. This is the one default in which we differ from transformers on purpose;
`allow_special_tokens` gives the reference's reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jinja2

from ..errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

# Message keys whose values the template compares with its own words, such as "user" and "text".
_KEYWORDS = frozenset({"role", "type"})
# What a template strips from old answers, with all that is between.
THOUGHT_BEGIN, THOUGHT_END = "<|channel>", "<channel|>"
# A template is a program: given messages it was not made for, it may fail in any of these ways.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


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
    if not isinstance(prompt, Sequence):
        raise PromptError(
            f"a prompt is a string, a list of messages or a list of token ids, got {type(prompt)}"
        )
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
        raw = prompt + (options.response_prefix or "")
        return _encode(tokenizer, raw, add_special_tokens=True)
    messages: list[Message] = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else list(cast(Sequence[Message], prompt))
    )
    if not messages:
        raise PromptError("the prompt is empty: it has no messages")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise PromptError(f"a message must be an object with role and content, got {message!r}")
    if not any(_says_something(message) for message in messages):
        raise PromptError("the prompt is empty: no message has any content")
    if options.system_prompt is not None:
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    prefix = options.response_prefix or ""
    if options.allow_special_tokens:
        return _encode(tokenizer, _render(tokenizer, messages, options) + prefix)
    return _encode_with_literals(tokenizer, messages, prefix, options)


def _says_something(message: Message) -> bool:
    """Whether a message has anything in it, such as content or a tool call, but its role."""
    values = [value for key, value in message.items() if key != "role"]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every special token of a tokenizer, as it is spelled."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """What every token that is text adds to it, in UTF-8; a byte token may be part of a
    character. Special tokens are not text."""
    special = set(special_tokens(tokenizer).values())
    return {
        token: _spelled(spelling)
        for spelling, token in tokenizer.get_vocab().items()
        if token not in special
    }


def _spelled(spelling: str) -> bytes:
    """As SentencePiece spells: a block for a space, <0x0A> for a byte."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", spelling):
        return bytes.fromhex(byte[1])
    return spelling.replace("▁", " ").encode("utf-8", "replace")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Text alone as token ids; what looks like a special token is text too.

    Raises:
      PromptError: if it is not Unicode.
    """
    return _encode(tokenizer, text, split_special_tokens=True) if text else []


def single_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids of texts that are one token each, such as further end tokens.

    Raises:
      PromptError: if a text is more than one token, or none.
    """
    ids = []
    for text in texts:
        if len(encoded := _encode(tokenizer, text)) != 1:
            raise PromptError(f"{text!r} is not one token of this checkpoint but {len(encoded)}")
        ids.append(encoded[0])
    return tuple(ids)


def _encode_with_literals(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prefix: str, options: PromptOptions
) -> list[int]:
    """Marks, in all contents, what could begin or end a special token; one between two marks is
    text.

    The marks stand outside of the token, so that a template that strips old thoughts still finds
    them, and a token that a template joins from two contents has both marks. The two tokens around
    a thought have one mark each, on the side of the thought, so that it goes with it: one that
    stayed would make a message that is only a thought look like one that is not empty.
    """
    specials = special_tokens(tokenizer)
    starts, ends = {token[0] for token in specials}, {token[-1] for token in specials}
    template = getattr(tokenizer, "chat_template", "")
    begin, end = _unused_characters(
        [messages, prefix, options.chat_template_config, template, specials]
    )

    def literal(value: Any) -> Any:
        if isinstance(value, str):
            marked = "".join(begin * (c in starts) + c + end * (c in ends) for c in value)
            return marked.replace(begin + THOUGHT_BEGIN, THOUGHT_BEGIN).replace(
                THOUGHT_END + end, THOUGHT_END
            )
        if isinstance(value, Mapping):
            return {
                word(key): word(item) if key in _KEYWORDS else literal(item)
                for key, item in value.items()
            }
        return [literal(item) for item in value] if isinstance(value, (list, tuple)) else value

    def word(value: Any) -> Any:
        return value if isinstance(value, str) and value.isidentifier() else literal(value)

    rendered = _render(tokenizer, [literal(message) for message in messages], options)
    longest_first = "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True))
    pieces = re.split(f"({longest_first})" if specials else "(?!)", rendered + literal(prefix))
    ids: list[int] = []
    text = ""  # between two special tokens

    def encode_text() -> list[int]:
        unmarked = text.replace(begin, "").replace(end, "")
        return _encode(tokenizer, unmarked, split_special_tokens=True) if unmarked else []

    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            text += piece
            continue
        has_begin = piece == THOUGHT_BEGIN or pieces[i - 1].endswith(begin)
        has_end = piece == THOUGHT_END or pieces[i + 1].startswith(end)
        if has_begin and has_end:
            text += piece
        else:
            ids += [*encode_text(), specials[piece]]
            text = ""
    return ids + encode_text()


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool = False,
) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt is not Unicode text: {error}; was it typed or piped in something else "
            "than UTF-8?"
        ) from error
    ids = list(
        tokenizer.encode(
            text, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens
        )
    )
    return _spelled_out(tokenizer, ids) if split_special_tokens else ids


def _spelled_out(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Replace special tokens by the tokens that spell them.

    From a sentencepiece file, transformers 5.24 makes a tokenizer that cuts user-defined pieces out
    of any text, `split_special_tokens` or not, and Gemma's control tokens are such pieces.
    """
    specials = {i: name for name, i in special_tokens(tokenizer).items()}
    specials.pop(tokenizer.unk_token_id, None)  # stands for characters that have no token
    out: list[int] = []
    for token in ids:
        if token in specials and len(name := specials[token]) > 1:
            for part in (name[:1], name[1:]):
                out += _encode(tokenizer, part, split_special_tokens=True)
        else:
            out.append(token)
    return out


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: PromptOptions
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "this checkpoint has no chat template; "
            "give the prompt as raw text (--ignore-chat-template)"
        )
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
    except _TEMPLATE_ERRORS as error:
        raise PromptError(
            f"the checkpoint's chat template refuses these messages: {error}"
        ) from error


def _unused_characters(values: Any) -> tuple[str, str]:
    text = repr(values)
    # Egyptian hieroglyphs: no template strips them or changes their case, and repr does not spell
    # them as an escape where a template writes a whole list or object.
    for code in range(0x13000, 0x13400, 2):
        pair = chr(code), chr(code + 1)
        if not any(c in text for c in pair):
            return pair
    raise PromptError("the prompt uses every Egyptian hieroglyph; one has to be left for us")
