"""What every token of a checkpoint adds to a text, as constraints need it: characters in a trie,
bytes, and the tokens that end an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..language.controls import special_tokens

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Placeholders that no text contains; not every tokenizer marks them as special.
_PLACEHOLDER = re.compile(r"<unused\d+>|\[multimodal\]")


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """The prefixes of one length that some tokens' texts have."""

    parents: np.ndarray  # int64 [N]: the prefix without its last character, in the level before
    characters: np.ndarray  # int64 [N]: the last character, an index into `Vocabulary.alphabet`
    tokens: np.ndarray  # int64 [T], the tokens whose text ends here
    nodes: np.ndarray  # int64 [T], their prefixes


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens of a checkpoint. A token in none of the fields below never occurs in an answer
    that a constraint holds: placeholders, and ids that the tokenizer does not have."""

    size: int  # ids of the model, which may be more than those of the tokenizer
    alphabet: np.ndarray  # int32 [A], ascending: the code points of all texts
    levels: tuple[Level, ...]  # of prefixes with 1, 2, ... characters
    bytes: Mapping[int, int]  # token -> byte, from 0x80 on; ASCII bytes are characters
    specials: tuple[int, ...]  # tokens that a `DFA` may name, without those below
    ends: tuple[int, ...]  # tokens that end the answer
    pad: int  # fills a canvas behind the end

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: AnyTokenizer,
        size: int,
        end_token_ids: Iterable[int],
        pad_token_id: int,
    ) -> Vocabulary:
        """Return the vocabulary of a checkpoint.

        Args:
          tokenizer: from `load_tokenizer`.
          size: the model's vocabulary; the tokenizer may know fewer tokens.
          end_token_ids: the tokens that end an answer, see `ResolvedSettings.eos_token_ids`.
          pad_token_id: the token that fills a canvas.
        """
        specials = set(special_tokens(tokenizer).values())
        spelled = {
            token: spelling
            for spelling, token in tokenizer.get_vocab().items()
            if token not in specials and token < size
        }
        return cls.of_spellings(spelled, specials, size, end_token_ids, pad_token_id)

    @classmethod
    def of_spellings(
        cls,
        spellings: Mapping[int, str],
        specials: Iterable[int],
        size: int,
        end_token_ids: Iterable[int],
        pad_token_id: int,
    ) -> Vocabulary:
        """Return the vocabulary of tokens in SentencePiece's spelling: a block for a space,
        `<0x0A>` for a byte. The byte token of an ASCII character counts only where no other token
        is that character: a tokenizer writes the other one, and a text has one spelling less.

        Args:
          spellings: of every token that may write text; placeholders such as `<unused7>` do not.
          specials: the tokens that write none.
          size: the model's vocabulary.
          end_token_ids: the tokens that end an answer.
          pad_token_id: the token that fills a canvas.

        Raises:
          ValueError: if there is no end token, or an end or pad token is outside of the vocabulary.
        """
        ends = tuple(sorted(set(end_token_ids)))
        if not ends or not all(0 <= token < size for token in (*ends, pad_token_id)):
            raise ValueError(
                f"end tokens {ends} and pad token {pad_token_id} must be tokens below {size}"
            )
        outside = {*ends, pad_token_id}
        characters = {
            text.replace("▁", " ")
            for token, text in spellings.items()
            if len(text) == 1 and token not in outside
        }
        texts: list[tuple[str, int]] = []
        beyond: dict[int, int] = {}
        for token, spelling in spellings.items():
            if not spelling or token in outside:
                continue
            if spelling[0] not in "<[":
                texts.append((spelling.replace("▁", " "), token))
            elif byte := _BYTE.fullmatch(spelling):
                value = int(byte[1], 16)
                if value >= 0x80:
                    beyond[token] = value
                elif chr(value) not in characters:
                    texts.append((chr(value), token))
            elif not _PLACEHOLDER.fullmatch(spelling):
                texts.append((spelling.replace("▁", " "), token))
        alphabet, levels = _trie(texts)
        return cls(
            size,
            alphabet,
            levels,
            beyond,
            tuple(sorted(t for t in set(specials) - outside if t < size)),
            ends,
            pad_token_id,
        )


def _trie(texts: list[tuple[str, int]]) -> tuple[np.ndarray, tuple[Level, ...]]:
    """Return the alphabet of tokens' texts and their prefixes, level by level."""
    texts.sort()
    tokens = np.array([token for _, token in texts], np.int64)
    lengths = np.array([len(text) for text, _ in texts], np.int64)
    joined = "".join([text for text, _ in texts])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int32)
    alphabet, place = _alphabet(codes)
    places = place[codes]
    starts = np.cumsum(lengths) - lengths
    levels: list[Level] = []
    here = np.arange(len(texts))  # the texts that are long enough
    nodes = np.zeros(len(texts), np.int64)  # of their prefixes so far
    is_new = np.zeros(len(texts), bool)  # whether a prefix is not that of the text before
    depth = 0
    while len(here):
        last = places[starts[here] + depth]
        is_new[0] = True
        is_new[1:] |= last[1:] != last[:-1]
        parents, nodes = nodes, np.cumsum(is_new) - 1
        depth += 1
        is_end = lengths[here] == depth
        levels.append(Level(parents[is_new], last[is_new], tokens[here[is_end]], nodes[is_end]))
        here, nodes = here[~is_end], nodes[~is_end]
        is_new = np.append(True, nodes[1:] != nodes[:-1])[: len(here)]
    return alphabet, tuple(levels)


def _alphabet(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct code points, ascending, and the place of each one among them."""
    occurs = np.zeros(0x110000, bool)
    occurs[codes] = True
    alphabet = np.flatnonzero(occurs)
    place = np.cumsum(occurs) - 1
    return alphabet.astype(np.int32), place
