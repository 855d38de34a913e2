"""Control tokens: their list, and which of them in a rendered prompt come from a user's text.

A chat template is a program, and we do not analyse it. To learn which control tokens of its output
come from a variable, such as a message or a tool's description, we run it a second time with a mark
after each typed token. Only the positions of the marks are used; the text is always that of the
unmarked run, so a mark cannot change it.
"""

from __future__ import annotations

import json
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.generation import ResolvedSettings
from ..errors import PromptError

if TYPE_CHECKING:
    from .tokenizer import AnyTokenizer

# A template removes the thought from an earlier answer, from the first of these to the second.
THOUGHT_BEGIN, THOUGHT_END = "<|channel>", "<channel|>"
_TURN_END = "<turn|>"


def special_tokens(tokenizer: AnyTokenizer) -> dict[str, int]:
    """Return the spelling of every special token of a tokenizer."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def matching(specials: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern that finds the special tokens in a text, the longest first."""
    longest_first = sorted(specials, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass(frozen=True)
class Marks:
    """Two characters that do not occur in a prompt, to mark typed tokens.

    `behind` follows each typed token, and each other character that could end one, since a template
    may join a token from two texts. It must not change how a template sorts or compares: a mark
    that always follows the same character leaves the order of any two texts as it was.

    `before` is for the end of a thought in a message. A template that splits an answer there keeps
    the text after it, and a mark after the token would stay in that text.
    """

    specials: Mapping[str, int]
    behind: str
    before: str

    @classmethod
    def unused(cls, specials: Mapping[str, int], texts: Any) -> Marks:
        """Return marks whose characters occur in none of the texts, however deeply nested.

        Raises:
          PromptError: if there are none.
        """
        spelled = repr(texts)
        # Egyptian hieroglyphs: no template strips them or changes their case, and repr does not
        # spell them as an escape where a template writes a whole list or object.
        for code in range(0x13000, 0x13400, 2):
            pair = chr(code), chr(code + 1)
            if not any(character in spelled for character in pair):
                return cls(specials, *pair)
        raise PromptError("the prompt uses every Egyptian hieroglyph; leave two of them out")

    def text(self, text: str, *, is_cut: bool = False) -> str:
        """Return a text with its marks; `is_cut` where a template may cut thoughts out of it."""
        ends = {token[-1] for token in self.specials}
        if not ends.intersection(text):
            return text
        other_ends = "|".join(map(re.escape, ends))
        pattern = re.compile(f"{matching(self.specials).pattern}|{other_ends}")

        def marked(found: re.Match[str]) -> str:
            if is_cut and found[0] == THOUGHT_END:
                return self.before + found[0]
            return found[0] + self.behind

        return pattern.sub(marked, text)

    def value(self, value: Any, *, is_cut: bool = False) -> Any:
        """Return a template's variable with all of its texts marked.

        Raises:
          PromptError: if it is not made of JSON's types: its text could not be marked.
        """
        if isinstance(value, str):
            return self.text(value, is_cut=is_cut)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item, is_cut=is_cut) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.value(item, is_cut=is_cut) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if value is None or isinstance(value, (bool, numbers.Number)):
            return value
        raise PromptError(
            f"a value of type {type(value).__name__} cannot go into the chat template; "
            "give text, numbers, lists and objects, as in JSON"
        )

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message with all of its texts marked. Templates cut thoughts out of its values;
        keys they only sort and compare."""
        return {self.value(key): self.value(item, is_cut=True) for key, item in message.items()}

    def typed(self, text: str, marked: str) -> list[bool]:
        """Return for each special token of a rendered text, in order, whether it was typed.

        Args:
          text: the template's output for the variables.
          marked: its output for the marked variables.

        Raises:
          PromptError: if the marks changed which tokens the template writes.
        """
        pattern = matching(self.specials)
        # A template may write JSON with escapes.
        behind = re.compile(f"{self.behind}|{re.escape(json.dumps(self.behind)[1:-1])}", re.I)
        names, flags = [], []
        for found in pattern.finditer(marked):
            names.append(found[0])
            flags.append(
                behind.match(marked, found.end()) is not None
                or (found[0] == THOUGHT_END and marked[found.start() - 1] == self.before)
            )
        if names != pattern.findall(text):
            raise PromptError(
                "the chat template treats the control tokens spelled in this prompt in a way that "
                "leaves open which of them are text; leave them out, or let all of them take "
                "effect (allow_special_tokens)"
            )
        return flags


def split_at(specials: Mapping[str, int], text: str, typed: Sequence[bool]) -> list[str | int]:
    """Return a text split at its special tokens that were not typed: texts and ids, in order."""
    parts: list[str | int] = []
    start = 0
    for found, is_typed in zip(matching(specials).finditer(text), typed, strict=True):
        if not is_typed:
            parts += [text[start : found.start()], specials[found[0]]]
            start = found.end()
    return [*parts, text[start:]]


def turn_ends(tokenizer: AnyTokenizer, settings: ResolvedSettings) -> tuple[int, int]:
    """Return the token that ends a turn, and the one that fills a canvas after it, as in
    training."""
    fallback = settings.eos_token_ids[0]
    eos = tokenizer.eos_token_id
    fill = eos if isinstance(eos, int) else fallback
    return special_tokens(tokenizer).get(_TURN_END, fallback), fill
