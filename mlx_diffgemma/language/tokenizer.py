"""A checkpoint's folder -> its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SourceError


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the advice that transformers logs when it is imported without torch: nothing here
    needs torch. Its log levels and the environment stay as they were."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# Other files import transformers for type checkers only, so that this import is the first.
with _without_advice():
    from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

# A sentencepiece file does not say that these are special; nor do all resaved tokenizer.json files.
_CONTROL_TOKENS = frozenset(
    "<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|image|> <image|> '
    "<|audio> <|audio|> <audio|> <|video|>".split()
)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer from tokenizer.json, or from a sentencepiece tokenizer.model where that is all
    there is."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise SourceError(f"{folder} has no tokenizer.json and no tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises nothing more exact
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    unmarked = sorted(tokenizer.get_vocab().keys() & _CONTROL_TOKENS - special)
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in unmarked],
        special_tokens=True,
    )
    return tokenizer
