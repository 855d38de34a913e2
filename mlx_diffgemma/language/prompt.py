"""Conversion of messages to token ids, with the checkpoint's chat template.

Text in messages and in every other variable of the template stays text: a user who types `<turn|>`
gets those characters, not the end of a turn. This is the one default in which we differ from
transformers on purpose; `allow_special_tokens` gives the reference's reading.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jinja2

from ..config.images import ImageSettings
from ..errors import PromptError
from .controls import Marks, matching, split_at
from .controls import special_tokens as special_tokens
from .encoded import EncodedPrompt, ImageForm
from .given import Message, given_ids, given_messages
from .given import Prompt as Prompt
from .images import ImagePatches
from .media import IMAGE, VIDEO, placed, read_media, without_media
from .tokenizer import declaration_of, lock_of
from .tools import calls_as_objects, declared

if TYPE_CHECKING:
    from .tokenizer import AnyTokenizer

# A template is a program. On messages that it does not expect it may raise any of these.
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
    # Tools that the model may call: Python functions with types and a docstring, or declarations in
    # OpenAI's form.
    tools: Sequence[Any] = ()
    # More variables for the template, such as `documents`.
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)
    # Control tokens spelled in messages and variables take effect, as in transformers.
    allow_special_tokens: bool = False
    images: ImageSettings = ImageSettings()  # how pictures and videos become tokens


def encode_prompt(
    tokenizer: AnyTokenizer,
    prompt: Prompt,
    options: PromptOptions = PromptOptions(),
    form: ImageForm | None = None,
) -> list[int]:
    """Return the token ids of a prompt.

    Args:
      tokenizer: as for `encode`.
      prompt: as for `encode`.
      options: as for `encode`.
      form: as for `encode`.

    Raises:
      PromptError: as `encode`.
    """
    return encode(tokenizer, prompt, options, form).ids


def encode(
    tokenizer: AnyTokenizer,
    prompt: Prompt,
    options: PromptOptions = PromptOptions(),
    form: ImageForm | None = None,
) -> EncodedPrompt:
    """Return the token ids of a prompt, and its images.

    Args:
      tokenizer: from `load` or `load_tokenizer`.
      prompt: a string is one user turn, a list of messages a chat, whose contents may hold images
        and videos. Token ids are used as they are: a list or an array of one row, or the result of
        the tokenizer or its `apply_chat_template`. What `encode` returned is returned again.
      options: how messages become tokens; without effect on token ids.
      form: how the model takes images, from `ImageForm.of(model.config)`; None if it does not.

    Raises:
      PromptError: if the prompt is empty or of another kind, holds audio, or an image or video that
        cannot be read or has no place, or the template refuses it or is missing.
    """
    if isinstance(prompt, EncodedPrompt):
        return prompt
    if (ids := given_ids(prompt)) is not None:
        encoded = EncodedPrompt(ids)
    elif options.use_chat_template:
        parts, images = _parts(tokenizer, prompt, options, form)
        encoded = EncodedPrompt(_encode_parts(tokenizer, parts), tuple(images))
    else:
        encoded = EncodedPrompt(_encode_raw(tokenizer, prompt, options))
    return _with_its_media(tokenizer, encoded)


def encode_endings(
    tokenizer: AnyTokenizer,
    told: Callable[[str], Prompt],
    endings: Sequence[str],
    options: PromptOptions = PromptOptions(),
    form: ImageForm | None = None,
) -> tuple[EncodedPrompt, list[EncodedPrompt]]:
    """Return the tokens of prompts that differ in one text near their end: those of all that
    stands before it, which is rendered and encoded once, and for each text those of itself and of
    what stands behind it. The text begins with a token of its own.

    Args:
      tokenizer: as in `encode`.
      told: makes a prompt of the text: a string, or messages.
      endings: the texts, at least one, each without white space around it.
      options: as in `encode`.
      form: as in `encode`.

    Raises:
      PromptError: as `encode`.
    """
    first, images = _parts(tokenizer, told(endings[0]), options, form)
    last, _ = _parts(tokenizer, told(endings[-1]), options, form)
    found = None if isinstance(first, str) else _around(first, endings[0])
    if found is not None:
        before, (lead, behind), after = found
    if found is None or last != [*before, f"{lead}{endings[-1]}{behind}", *after]:
        # The template does more with a text than to write it.
        whole = [encode(tokenizer, told(text), options, form) for text in endings]
        return EncodedPrompt([]), whole
    head, tail = _encode_parts(tokenizer, [*before, lead]), _encode_parts(tokenizer, after)
    _with_its_media(tokenizer, EncodedPrompt(head + tail, tuple(images)))
    return EncodedPrompt(head, tuple(images)), [
        EncodedPrompt(encode_text(tokenizer, f"{text}{behind}") + tail) for text in endings
    ]


def _around(
    parts: list[str | int], text: str
) -> tuple[list[str | int], tuple[str, str], list[str | int]] | None:
    """Return what stands around the last place of a text: the parts before its own, what is before
    and behind it there, and the parts behind; None if it is nowhere."""
    for i, part in reversed(list(enumerate(parts))):
        if isinstance(part, str) and text in part:
            lead, _, behind = part.rpartition(text)
            return parts[:i], (lead, behind), parts[i + 1 :]
    return None


def _with_its_media(tokenizer: AnyTokenizer, encoded: EncodedPrompt) -> EncodedPrompt:
    """Return a prompt unless it asks for images that it does not have."""
    specials = special_tokens(tokenizer)
    if specials.get("<|audio|>") in encoded.ids:
        raise PromptError("the prompt holds <|audio|>; audio is not supported")
    for name, what in ((IMAGE, "image"), (VIDEO, "video")):
        if specials.get(name) in encoded.ids and not encoded.images:
            raise PromptError(
                f"the prompt holds {name} and no {what}; give each {what} as a part of a message"
            )
    return encoded


def _encode_raw(tokenizer: AnyTokenizer, prompt: Prompt, options: PromptOptions) -> list[int]:
    if not isinstance(prompt, str):
        raise PromptError(
            "messages need the chat template; without it, the prompt must be a string"
        )
    if not prompt.strip():
        raise PromptError("the prompt is empty")
    raw = prompt + (options.response_prefix or "")
    # A rendered prompt has its own <bos>; a second one would be part of the text.
    has_bos = bool(tokenizer.bos_token) and raw.startswith(str(tokenizer.bos_token))
    return _encode(tokenizer, raw, add_special_tokens=not has_bos)


def _encode_parts(tokenizer: AnyTokenizer, parts: str | Sequence[str | int]) -> list[int]:
    if isinstance(parts, str):
        return _encode(tokenizer, parts)
    ids: list[int] = []
    for part in parts:
        ids += encode_text(tokenizer, part) if isinstance(part, str) else [part]
    return ids


def _parts(
    tokenizer: AnyTokenizer,
    prompt: Prompt,
    options: PromptOptions,
    form: ImageForm | None,
) -> tuple[str | list[str | int], list[ImagePatches]]:
    """Return a rendered prompt: texts, in which spelled special tokens are text too, and the
    special tokens between them, with those of its images. It is one string if all that it spells
    take effect, and there are no images."""
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "this checkpoint has no chat template; "
            "give the prompt as raw text (--ignore-chat-template)"
        )
    if isinstance(prompt, str):
        _warn_if_rendered(tokenizer, prompt)
    messages = given_messages(prompt)
    if options.system_prompt is not None:
        messages = [{"role": "system", "content": options.system_prompt}, *messages]
    media = read_media(messages, form, options.images)
    messages = [calls_as_objects(message) for message in without_media(messages)]
    variables = _variables(options)
    prefix = options.response_prefix or ""
    specials = special_tokens(tokenizer)
    text = _render(tokenizer, messages, variables) + prefix
    if not media and (options.allow_special_tokens or not matching(specials).search(text)):
        return text, []
    if options.allow_special_tokens:
        typed = [False] * len(matching(specials).findall(text))
    else:
        typed = _typed(tokenizer, messages, variables, prefix, specials, text)
    return placed(split_at(specials, text, typed), specials, media, form)


def _typed(
    tokenizer: AnyTokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    prefix: str,
    specials: Mapping[str, int],
    text: str,
) -> list[bool]:
    """Return which special tokens of a rendered prompt were typed, in order."""
    # A template that the caller chose is a program, not text.
    program = {key: value for key, value in variables.items() if key == "chat_template"}
    texts = {key: value for key, value in variables.items() if key != "chat_template"}
    template = getattr(tokenizer, "chat_template", "")
    marks = Marks.unused(specials, [messages, prefix, texts, program, template])
    marked = _render(
        tokenizer,
        [marks.message(message) for message in messages],
        marks.value(texts) | program,
    ) + marks.text(prefix)
    return marks.typed(text, marked)


def _variables(options: PromptOptions) -> dict[str, Any]:
    """Return the template's variables beside the messages."""
    variables = {"enable_thinking": options.thinking, **options.chat_template_config}
    if given := variables.get("tools"):
        if options.tools:
            raise PromptError("tools are given twice, in `tools` and in the template's variables")
        variables["tools"] = [declaration_of(tool) for tool in given]
    elif options.tools:
        if not isinstance(options.tools, (list, tuple)):
            raise PromptError(f"tools must be a list, got {type(options.tools).__name__}")
        variables["tools"] = [declared(declaration_of(tool)) for tool in options.tools]
    return variables


def _warn_if_rendered(tokenizer: AnyTokenizer, prompt: str) -> None:
    """Warn if a string looks like the output of the chat template."""
    found = matching(special_tokens(tokenizer))
    if not found.match(prompt.lstrip()):
        return
    rendered = _render(tokenizer, [{"role": "user", "content": "x"}], {})
    opening: list[str] = []
    while token := found.match(rendered, len("".join(opening))):
        opening.append(token[0])
    if any(prompt.lstrip().startswith("".join(opening[i:])) for i in range(len(opening))):
        warnings.warn(
            f"the prompt begins with {opening[-1]} as if the chat template had been applied; it is "
            "now read as the text of one user turn; give the messages instead, or token ids from "
            "apply_chat_template(..., add_generation_prompt=True), or set "
            "PromptOptions(use_chat_template=False) (--ignore-chat-template)",
            UserWarning,
            stacklevel=4,
        )


def token_bytes(tokenizer: AnyTokenizer) -> dict[int, bytes]:
    """Return the UTF-8 bytes of every text token; a byte token may be part of a character. Special
    tokens are not text."""
    special = set(special_tokens(tokenizer).values())
    return {
        token: _spelled(spelling)
        for spelling, token in tokenizer.get_vocab().items()
        if token not in special
    }


def _spelled(spelling: str) -> bytes:
    """Return the bytes of SentencePiece's spelling: a block for a space, <0x0A> for a byte."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", spelling):
        return bytes.fromhex(byte[1])
    return spelling.replace("▁", " ").encode("utf-8", "replace")


def encode_text(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Return the token ids of a text, in which spelled special tokens are text too.

    Raises:
      PromptError: if it is not Unicode.
    """
    return _encode(tokenizer, text, split_special_tokens=True) if text else []


def single_tokens(tokenizer: AnyTokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of texts that are one token each, such as extra end tokens.

    Raises:
      PromptError: if a text is not exactly one token, or `texts` is a single string.
    """
    if isinstance(texts, str):
        raise PromptError(f"give a list of tokens, such as [{texts!r}], not a single string")
    ids = []
    for text in texts:
        if len(encoded := _encode(tokenizer, text)) != 1:
            raise PromptError(f"{text!r} is not one token of this checkpoint but {len(encoded)}")
        ids.append(encoded[0])
    return tuple(ids)


def _encode(
    tokenizer: AnyTokenizer,
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
    options = {
        "add_special_tokens": add_special_tokens,
        "split_special_tokens": split_special_tokens,
    }
    with lock_of(tokenizer):
        ids = list(tokenizer.encode(text, **options))
    return _spelled_out(tokenizer, ids) if split_special_tokens else ids


def _spelled_out(tokenizer: AnyTokenizer, ids: list[int]) -> list[int]:
    """Replace special tokens by the tokens that spell them.

    From a sentencepiece file, transformers 5.24 makes a tokenizer that cuts user-defined pieces out
    of any text, `split_special_tokens` or not, and Gemma's control tokens are such pieces.
    """
    specials = {i: name for name, i in special_tokens(tokenizer).items()}
    if (unknown := tokenizer.unk_token_id) is not None:
        specials.pop(unknown, None)  # replaces characters that have no token
    out: list[int] = []
    for token in ids:
        if token in specials and len(name := specials[token]) > 1:
            for part in (name[:1], name[1:]):
                out += _encode(tokenizer, part, split_special_tokens=True)
        else:
            out.append(token)
    return out


def _render(
    tokenizer: AnyTokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], [dict(message) for message in messages]),
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        )
    except _TEMPLATE_ERRORS as error:
        raise PromptError(
            f"the checkpoint's chat template refuses these messages: {error}"
        ) from error
