"""Loading of a checkpoint's tokenizer and chat template."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from ..errors import PromptError, SourceError


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
    from transformers import (
        AddedToken,
        GemmaTokenizer,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
    )

# A sentencepiece file does not say that these are special; nor do all resaved tokenizer.json files.
_CONTROL_TOKENS = frozenset(
    "<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|image|> <image|> '
    "<|audio> <|audio|> <audio|> <|video|>".split()
)


_PROCESSOR_TEMPLATE = "chat_template.json"

# What transformers' AutoTokenizer makes of the names in a tokenizer_config.json. It reads the
# model's configuration first, which imports torch where it is installed: seconds, for a name.
_CLASSES: dict[str, type[PreTrainedTokenizerBase]] = {
    "GemmaTokenizer": GemmaTokenizer,
    "GemmaTokenizerFast": GemmaTokenizer,
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    "TokenizersBackend": PreTrainedTokenizerFast,
}


_LOCKS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
_making_locks = Lock()


def lock_of(tokenizer: Any) -> Lock:
    """Return the lock under which a tokenizer encodes. Whether special tokens are read as text is a
    state of the tokenizer, so that another thread's text would be read in the wrong way."""
    with _making_locks:
        return _LOCKS.setdefault(tokenizer, Lock())


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, with its chat template.

    The template is that of chat_template.jinja, else of tokenizer_config.json, as in transformers;
    else that of chat_template.json, which older processors were saved with.

    Args:
      folder: has tokenizer.json, or else a sentencepiece tokenizer.model.

    Raises:
      SourceError: if there is no tokenizer, or it or its template cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise SourceError(f"{folder} has no tokenizer.json and no tokenizer.model")
    try:
        tokenizer = _class_of(folder).from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises nothing more specific
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if not tokenizer.chat_template and (folder / _PROCESSOR_TEMPLATE).is_file():
        tokenizer.chat_template = _processor_template(folder / _PROCESSOR_TEMPLATE)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    unmarked = sorted(t for t in _CONTROL_TOKENS - special if _is_known(tokenizer, t))
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in unmarked],
        special_tokens=True,
    )
    return tokenizer


def _is_known(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Return whether a token is in the vocabulary, which is not copied for that."""
    number = tokenizer.convert_tokens_to_ids(token)
    return isinstance(number, int) and tokenizer.convert_ids_to_tokens(number) == token


def _class_of(folder: Path) -> Any:
    """Return the class of a checkpoint's tokenizer; AutoTokenizer where its files name another one
    or none."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None  # AutoTokenizer says what is wrong
    name = config.get("tokenizer_class") if isinstance(config, dict) else None
    if isinstance(name, str) and name in _CLASSES and "auto_map" not in config:
        return _CLASSES[name]
    from transformers import AutoTokenizer

    return AutoTokenizer


def _processor_template(path: Path) -> str | dict[str, str]:
    """Return the template of a chat_template.json, or its templates by name."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(template, str):
        return template
    if isinstance(template, list):
        pairs = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in pairs}
    if (
        isinstance(template, dict)
        and template
        and all(isinstance(text, str) for pair in template.items() for text in pair)
    ):
        return template
    raise SourceError(
        f"{path} must be an object whose chat_template is a template, an object of templates by "
        "name, or a list of objects with name and template"
    )


def declaration_of(tool: Any) -> Any:
    """Return the declaration of a tool: transformers makes a Python function's from its docstring
    and types; anything else is returned unchanged.

    Raises:
      PromptError: if the function's docstring or types say too little.
    """
    if not inspect.isroutine(tool):
        return tool
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise PromptError(f"the tool {tool.__name__} cannot be declared: {error}") from error
