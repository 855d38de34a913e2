"""A checkpoint's tokenizer and chat template.

The tokenizers library reads the known files; transformers, which takes seconds to import, is asked
for what is rare.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from ..errors import SourceError
from .chat_template import is_plain, render
from .known_tokenizer import NAMES, KnownTokenizer, add_special, read_known

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A sentencepiece file does not say that these are special; nor do all resaved tokenizer.json files.
_CONTROL_TOKENS = frozenset(
    "<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> "
    '<|"|> <|think|> <|channel> <channel|> <|turn> <turn|> <|image> <|image|> <image|> '
    "<|audio> <|audio|> <audio|> <|video|>".split()
)
_PROCESSOR_TEMPLATE = "chat_template.json"
# Arguments of `apply_chat_template` that transformers sees to.
_OF_TRANSFORMERS = frozenset(
    "sanitize_control_tokens padding truncation max_length return_tensors "
    "return_assistant_tokens_mask tokenizer_kwargs messages conversations conversation".split()
)

_OWN = frozenset({"_folder", "_known", "_template", "_whole"})  # attributes of a Tokenizer

_LOCKS: WeakKeyDictionary[Any, Lock] = WeakKeyDictionary()
_making_locks = Lock()
_loading = RLock()


def lock_of(tokenizer: Any) -> Lock:
    """Return the lock under which a tokenizer encodes. Whether special tokens are read as text is a
    state of the tokenizer, so that another thread's text would be read in the wrong way."""
    with _making_locks:
        return _LOCKS.setdefault(tokenizer, Lock())


class Tokenizer:
    """The tokenizer of a checkpoint, with the methods and attributes of transformers' own.

    What is not done here, such as tensors, padding or more tokens, is done by transformers'
    tokenizer of the same files, which is loaded when it is first needed. From then on it answers
    everything, so that changes to it take effect. Where a function wants an object of transformers'
    class, give it `tokenizer.transformers`.
    """

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    mask_token: str | None
    mask_token_id: int | None

    _whole: Any
    _known: KnownTokenizer | None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Load the tokenizer of a folder; see `load_tokenizer`."""
        self._folder = Path(folder)
        self._whole, self._known = None, read_known(self._folder)
        if self._known is None:
            self._whole = _of_transformers(self._folder)
            self._template = self._whole.chat_template
        else:
            self._template = self._known.template
            backend = self._known.backend
            unmarked = _unmarked(backend.get_added_tokens_decoder())
            add_special(backend, [t for t in unmarked if backend.token_to_id(t) is not None])
        if not self._template and (self._folder / _PROCESSOR_TEMPLATE).is_file():
            self.chat_template = _processor_template(self._folder / _PROCESSOR_TEMPLATE)

    @property
    def transformers(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers, of the same files.

        Raises:
          SourceError: if the files cannot be read any more.
        """
        if self._whole is None:
            with _loading:
                if self._whole is None:
                    whole = _of_transformers(self._folder)
                    whole.chat_template = self._template
                    self._whole = whole
        return self._whole

    @property
    def _lean(self) -> KnownTokenizer | None:
        """What the files hold, unless transformers' tokenizer is loaded, which may be changed."""
        return self._known if self._whole is None else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if (lean := self._lean) is not None:
            key = name.removesuffix("_id")
            if key in NAMES or key in lean.named:
                token = lean.named.get(key)
                if token is None or key == name:
                    return token
                return self.convert_tokens_to_ids(token)
        return getattr(self.transformers, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.transformers, name, value)

    def __repr__(self) -> str:
        return f"Tokenizer({str(self._folder)!r})"

    def __bool__(self) -> bool:
        return True

    @property
    def chat_template(self) -> Any:
        """The chat template, or several by name, or None."""
        return self._template if self._whole is None else self._whole.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self._template = template
        if self._whole is not None:
            self._whole.chat_template = template

    def __len__(self) -> int:
        """The number of tokens, with added ones."""
        if (lean := self._lean) is None:
            return len(self.transformers)
        return lean.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without added ones."""
        if (lean := self._lean) is None:
            return self.transformers.vocab_size
        return lean.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token."""
        if (lean := self._lean) is None:
            return self.transformers.get_vocab()
        return lean.backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are found in a text before it is split, by id."""
        if (lean := self._lean) is None:
            return self.transformers.added_tokens_decoder
        return lean.backend.get_added_tokens_decoder()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, which chat templates see."""
        if (lean := self._lean) is None:
            return self.transformers.special_tokens_map
        return dict(lean.named)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens that tokenizer_config.json names."""
        if (lean := self._lean) is None:
            return self.transformers.all_special_tokens
        return lean.specials

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or the ids of several."""
        if (lean := self._lean) is None:
            return self.transformers.convert_tokens_to_ids(tokens)
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = lean.backend.token_to_id(tokens)
        if token_id is None and (unknown := lean.named.get("unk_token")) is not None:
            return lean.backend.token_to_id(unknown)
        return token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of an id, or the tokens of several."""
        if (lean := self._lean) is None:
            return self.transformers.convert_ids_to_tokens(ids, skip_special_tokens)
        if isinstance(ids, int):
            return lean.backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [lean.backend.id_to_token(i) for i in map(int, ids) if i not in skipped]

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        *more: Any,
        split_special_tokens: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the ids of a text.

        Args:
          text: a string; anything else is for transformers.
          text_pair: for transformers, as all that follows is.
          add_special_tokens: also add those that the tokenizer puts around a text.
          more: as in transformers.
          split_special_tokens: read special tokens that are spelled in the text as text.
          options: as in transformers.
        """
        lean = None if type(text) is not str or text_pair or more or options else self._lean
        if lean is not None:
            try:
                lean.backend.encode_special_tokens = bool(split_special_tokens)
                ids = lean.backend.encode(text, add_special_tokens=add_special_tokens).ids
            except (TypeError, ValueError):  # transformers says it in its own words
                ids = None
            if ids is not None and len(ids) <= lean.longest:
                return ids
        options["split_special_tokens"] = split_special_tokens
        return self.transformers.encode(text, text_pair, add_special_tokens, *more, **options)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> Any:
        """Return the text of ids.

        Args:
          token_ids: one, or a list; anything else is for transformers.
          skip_special_tokens: leave special tokens out.
          clean_up_tokenization_spaces: has no effect on such a tokenizer.
          options: as in transformers.
        """
        lean = None if clean_up_tokenization_spaces or options else self._lean
        ids = [token_ids] if type(token_ids) is int else token_ids
        if lean is not None and type(ids) is list and all(type(i) is int for i in ids):
            return lean.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        options["clean_up_tokenization_spaces"] = clean_up_tokenization_spaces
        return self.transformers.decode(token_ids, skip_special_tokens, **options)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *more: Any,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Return a chat as the template writes it.

        Args:
          conversation: the messages.
          tools: declarations of functions, or functions.
          documents: objects that the template shows the model.
          chat_template: in place of the checkpoint's own.
          add_generation_prompt: begin an answer.
          continue_final_message: leave the last message open.
          tokenize: return ids.
          more: as in transformers.
          return_dict: return the ids within an object.
          variables: arguments as in transformers, and more variables of the template.
        """
        template = self._template if chat_template is None else chat_template
        lean = self._lean if isinstance(self._template, str | None) else None
        if (
            lean is None
            or not isinstance(template, str)
            or more
            or continue_final_message
            or (tokenize and return_dict)
            or not variables.keys().isdisjoint(_OF_TRANSFORMERS)
            or not _are_objects(conversation)
            or not conversation
            or not all(given is None or _are_objects(given) for given in (tools, documents))
            or not is_plain([conversation, tools, documents, variables])
        ):
            return self.transformers.apply_chat_template(
                conversation,
                tools,
                documents,
                chat_template,
                add_generation_prompt,
                continue_final_message,
                tokenize,
                *more,
                return_dict=return_dict,
                **variables,
            )
        given = {"tools": tools, "documents": documents}
        given |= {"add_generation_prompt": add_generation_prompt}
        text = render(template, conversation, **given, **{**lean.named, **variables})
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Return the encoding of texts, as transformers does."""
        return self.transformers(*texts, **options)


# What functions take: transformers' own tokenizers too.
AnyTokenizer: TypeAlias = "Tokenizer | PreTrainedTokenizerBase"


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
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
    return Tokenizer(folder)


def _of_transformers(folder: Path) -> Any:
    """Load transformers' tokenizer, in which control tokens are special."""
    from .of_transformers import tokenizer_of

    tokenizer = tokenizer_of(folder)
    unmarked = _unmarked(tokenizer.added_tokens_decoder)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in unmarked
            if _is_known(tokenizer, token)
        ],
        special_tokens=True,
    )
    return tokenizer


def _unmarked(added: dict[int, AddedToken]) -> list[str]:
    """Return the control tokens that are not among the special ones."""
    return sorted(_CONTROL_TOKENS - {str(token) for token in added.values() if token.special})


def _is_known(tokenizer: Any, token: str) -> bool:
    """Return whether a token is in the vocabulary, which is not copied for that."""
    number = tokenizer.convert_tokens_to_ids(token)
    return isinstance(number, int) and tokenizer.convert_ids_to_tokens(number) == token


def _are_objects(values: Any) -> bool:
    return type(values) is list and all(type(value) is dict for value in values)


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
    from .of_transformers import function_declaration

    return function_declaration(tool)
