"""The tokenizers of transformers, and its declarations of functions. Importing it takes seconds, so
nothing imports this file before it is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PromptError, SourceError
from .known_tokenizer import CONFIG, KNOWN_CLASSES, keep_no_texts


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence the advice that transformers logs when it is imported without torch, which nothing
    here needs. Restore its log levels and the environment."""
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
    from transformers import GemmaTokenizer, PreTrainedTokenizerFast
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
    )


def tokenizer_of(folder: Path) -> Any:
    """Load the tokenizer of a folder.

    Raises:
      SourceError: if it cannot be read.
    """
    try:
        whole = _class_of(folder).from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if whole.is_fast:
        keep_no_texts(whole.backend_tokenizer)
    return whole


def _class_of(folder: Path) -> Any:
    """Return the class of a checkpoint's tokenizer; AutoTokenizer where its files name another one
    or none. It reads the model's configuration first, which imports torch where it is installed:
    seconds, for a name."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None  # AutoTokenizer says what is wrong
    name = config.get("tokenizer_class") if isinstance(config, dict) else None
    if isinstance(name, str) and name in KNOWN_CLASSES and "auto_map" not in config:
        return GemmaTokenizer if name.startswith("Gemma") else PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def function_declaration(tool: Any) -> Any:
    """Return the declaration of a Python function, from its docstring and types.

    Raises:
      PromptError: if the function's docstring or types say too little.
    """
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise PromptError(f"the tool {tool.__name__} cannot be declared: {error}") from error
