"""Examples as token ids, from train.jsonl, valid.jsonl and test.jsonl. Every error names file and
line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, PromptError
from ..language.encoded import ImageForm
from ..language.given import refuse_media
from ..language.prompt import PromptOptions, encode, encode_text, special_tokens
from .pictures import Picture, Pictures

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

SPLITS = ("train", "valid", "test")
_END_OF_TURN = "<turn|>"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A prompt and its answer, up to the end of the turn."""

    prompt: np.ndarray  # int32 [P], P >= 1; images have a token for each of their soft tokens
    answer: np.ndarray  # int32 [A], A >= 2: at least one token of text, then the end of the turn
    pictures: tuple[Picture, ...] = ()  # of the prompt, in the order of their tokens

    def canvases(self, canvas_length: int) -> int:
        return -(-len(self.answer) // canvas_length)

    def tokens(self, canvas_length: int) -> int:
        """The length in training, where the last canvas counts in full."""
        return len(self.prompt) + self.canvases(canvas_length) * canvas_length


def read_split(
    folder: str | Path,
    split: str,
    tokenizer: AnyTokenizer,
    *,
    vocab_size: int,
    canvas_length: int,
    max_seq_length: int,
    form: ImageForm | None = None,
) -> list[Example]:
    """Return the examples of `folder/split.jsonl`, in the file's order.

    A line is an object with `messages`, the last of them the assistant's, or with `prompt` and
    `completion`, and may have `tools` for the chat template. Only the last answer is learned, as
    text, without spaces and line breaks around it; messages before it are its prompt. Messages of
    the prompt may have images in their content, by paths relative to the folder.

    Args:
      folder: of the data.
      split: name of the file.
      tokenizer: of the model.
      vocab_size: of the model.
      canvas_length: tokens of a canvas.
      max_seq_length: most tokens of an example, those of images and canvases included.
      form: how the model takes images, of the size that training gives them; None if it does not.

    Raises:
      DataError: one line that names the file and the line.
    """
    path = Path(folder) / f"{split}.jsonl"
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder; --data names one with train.jsonl in it")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    end = _end_of_turn(tokenizer, path)
    examples = []
    # Data with pictures ask few questions about many of them, and each takes milliseconds.
    known: dict[str, tuple[list[int], list[int]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            pictures = Pictures(Path(folder), where, form)
            example = _example(_record(line, where), tokenizer, end, where, pictures, form, known)
        except PromptError as error:
            raise DataError(f"{where}: {error}") from error
        _check(example, where, vocab_size, canvas_length, max_seq_length)
        examples.append(example)
    if not examples:
        raise DataError(f"{path} has no examples")
    return examples


def _record(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: an example must be an object, got {type(record).__name__}")
    return record


def _example(
    record: Mapping[str, Any],
    tokenizer: AnyTokenizer,
    end: int,
    where: str,
    pictures: Pictures,
    form: ImageForm | None,
    known: dict[str, tuple[list[int], list[int]]],
) -> Example:
    refuse_media(record, "the example")
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise DataError(f"{where}: messages must be a list of a question and its answer")
        for message in messages:
            if not isinstance(message, Mapping):
                raise DataError(f"{where}: a message must be an object, got {message!r}")
        *before, last = messages
        if last.get("role") not in ("assistant", "model"):
            raise DataError(f"{where}: the last message must be the assistant's")
        refuse_media(last, "the answer")
        for field in ("tool_calls", "reasoning", "reasoning_content", "thinking"):
            if last.get(field):
                raise DataError(
                    f"{where}: {field} in an answer cannot be learned yet, only content"
                )
        prompt, answer = [pictures.stand_ins(each) for each in before], last.get("content")
    elif "prompt" in record and "completion" in record:
        prompt, answer = record["prompt"], record["completion"]
        if not isinstance(prompt, str):
            raise DataError(f"{where}: prompt must be text, got {type(prompt).__name__}")
    elif "text" in record:
        raise DataError(
            f"{where}: plain text has no prompt and no answer, which training needs; "
            "give messages, or prompt and completion"
        )
    else:
        raise DataError(
            f"{where}: needs messages, or prompt and completion; it has "
            f"{', '.join(map(repr, record)) or 'nothing'}"
        )
    if not isinstance(answer, str):
        raise DataError(f"{where}: the answer must be text, got {type(answer).__name__}")
    if not answer.strip():
        raise DataError(f"{where}: the answer is empty")
    # Trimmed, as chat templates do with answers of earlier turns.
    ids = [*encode_text(tokenizer, answer.strip()), end]
    options = PromptOptions()
    if record.get("tools") is not None:
        options = PromptOptions(chat_template_config={"tools": record["tools"]})
    question = pictures.question(prompt, record.get("tools"))
    if question not in known:
        asked = encode(tokenizer, prompt, options, form)
        known[question] = asked.ids, pictures.order(asked)
    tokens, order = known[question]
    if not order:
        del known[question]
    named = tuple(pictures.named[i] for i in order)
    return Example(np.array(tokens, np.int32), np.array(ids, np.int32), named)


def _check(
    example: Example, where: str, vocab_size: int, canvas_length: int, max_seq_length: int
) -> None:
    highest = int(max(example.prompt.max(), example.answer.max()))
    if highest >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {highest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; do they belong together?"
        )
    if (tokens := example.tokens(canvas_length)) > max_seq_length:
        raise DataError(
            f"{where}: {tokens} tokens with its canvases{_and_images(example)}, more than "
            f"max_seq_length of {max_seq_length}"
        )


def _and_images(example: Example) -> str:
    tokens = sum(picture.soft_tokens for picture in example.pictures)
    return f", {tokens} of them of images" if tokens else ""


def fill_token(tokenizer: AnyTokenizer) -> int:
    """Return the token that fills a canvas after the end of the turn: `<eos>`."""
    specials = special_tokens(tokenizer)
    if "<eos>" not in specials:
        raise DataError("this tokenizer has no <eos>, which fills a canvas after an answer")
    return specials["<eos>"]


def _end_of_turn(tokenizer: AnyTokenizer, path: Path) -> int:
    specials = special_tokens(tokenizer)
    if _END_OF_TURN not in specials:
        raise DataError(f"{path}: this tokenizer has no {_END_OF_TURN}, which ends an answer")
    return specials[_END_OF_TURN]
