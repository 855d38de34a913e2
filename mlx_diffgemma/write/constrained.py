"""Constraints of answers: lifted to a checkpoint's tokens before, and checked after."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from ..config.generation import ResolvedSettings
from ..constraint.build import concatenate, union
from ..constraint.constraint import Constraint
from ..constraint.dfa import DFA, SPECIAL
from ..constraint.line import Part
from ..constraint.net import Net, determinise
from ..constraint.parts import free_text
from ..constraint.ranges import single
from ..constraint.tokens import lift
from ..constraint.tool_calls import CallTokens
from ..constraint.vocabulary import Vocabulary
from ..denoise.constrained import TokenConstraint
from ..language.controls import THOUGHT_BEGIN, THOUGHT_END, special_tokens
from ..language.tools import CALL_BEGIN, CALL_END, QUOTE
from ..model import DiffusionGemma

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

K = TypeVar("K")
_KEPT = 32  # lifted constraints of a tokenizer
_MOST_INSIDE = 512  # states inside of characters that have no token, in a part of an answer


class _Lifted:
    """What was made for one tokenizer."""

    def __init__(self) -> None:
        self.vocabularies: dict[Any, Vocabulary] = {}
        self.constraints: dict[Any, TokenConstraint] = {}
        self.parts: dict[Any, tuple[Part, TokenConstraint]] = {}
        self._lock = Lock()  # of all three; what is kept is made without it, but for vocabularies

    def vocabulary(self, tokenizer: Any, size: int, ends: tuple[int, ...], pad: int) -> Vocabulary:
        """Return the vocabulary with some end tokens, from the cache if it was made before."""
        key = (size, ends, pad)
        with self._lock:
            if key not in self.vocabularies:
                self.vocabularies[key] = Vocabulary.of_tokenizer(tokenizer, *key)
            return self.vocabularies[key]

    def keep(self, kept: dict[Any, K], key: Any, made: K) -> K:
        """Keep what was made, unless another thread was first; return what is kept."""
        with self._lock:
            while len(kept) >= _KEPT:
                kept.pop(next(iter(kept)))
            return kept.setdefault(key, made)


_LIFTED: WeakKeyDictionary[Any, _Lifted] = WeakKeyDictionary()
_finding = Lock()


def _lifted_of(tokenizer: Any) -> _Lifted:
    with _finding:
        return _LIFTED.setdefault(tokenizer, _Lifted())


def over_tokens(
    constraint: Constraint,
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    settings: ResolvedSettings,
    *,
    thinking: bool,
) -> TokenConstraint:
    """Return a constraint over a checkpoint's tokens, from a cache if it was made before.

    Args:
      constraint: of the answer.
      model: whose vocabulary counts.
      tokenizer: of the model.
      settings: whose end tokens end the answer.
      thinking: whether a thought may stand before the answer.

    Raises:
      ConstraintError: if the checkpoint has no tokens for it, or no string of them fits.
    """
    kept = _lifted_of(tokenizer)
    size, pad = model.config.text.vocab_size, settings.pad_token_id
    of_tokens = (size, tuple(settings.eos_token_ids), pad)
    # Schemas are compiled once, so that equal ones share an automaton.
    identity = constraint if constraint.kind == "tool_call" else constraint.dfa()
    key = (identity, thinking, of_tokens)
    if (found := kept.constraints.get(key)) is not None:
        return found
    vocabulary = kept.vocabulary(tokenizer, *of_tokens)
    specials = special_tokens(tokenizer)
    dfa = constraint.dfa(_call_tokens(specials))
    if thinking:
        dfa = _behind_a_thought(dfa, specials)
    return kept.keep(kept.constraints, key, TokenConstraint.of(lift(dfa, vocabulary)))


def _call_tokens(specials: Mapping[str, int]) -> CallTokens | None:
    ids = [specials.get(token) for token in (CALL_BEGIN, CALL_END, QUOTE)]
    begin, end, quote = ids
    if begin is None or end is None or quote is None:
        return None
    return CallTokens(begin, end, quote)


def _behind_a_thought(dfa: DFA, specials: Mapping[str, int]) -> DFA:
    """Return the automaton with a thought before it, or without one."""
    if THOUGHT_BEGIN not in specials or THOUGHT_END not in specials:
        return dfa
    net = Net()
    start, end = net.state(), net.state()
    opened = net.spell(start, [SPECIAL + specials[THOUGHT_BEGIN]])
    net.put(opened, free_text(), closing := net.state())
    net.move(closing, single(SPECIAL + specials[THOUGHT_END]), end)
    return union([dfa, concatenate([determinise(net, start, end), dfa])])


def check_answer(
    constraint: Constraint, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """Check an answer that is handed out.

    Raises:
      ConstraintError: if it does not fit: an error of this program, since every string of tokens
        that a row may write fits.
    """
    if constraint.kind == "tool_call" and (calls or constraint.is_required):
        constraint.check_calls(calls, text)
    else:
        constraint.parse(text)


def over_part(
    identity: Hashable,
    make: Callable[[], DFA],
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    ends: tuple[int, int],
) -> tuple[Part, TokenConstraint]:
    """Return a part of an answer over a checkpoint's tokens, from a cache if it was made before.

    Args:
      identity: tells the part from others.
      make: makes its automaton.
      model: whose vocabulary counts.
      tokenizer: of the model.
      ends: the token that ends the answer, and the one that fills a canvas after it; neither is in
        the part.
    """
    kept = _lifted_of(tokenizer)
    of_tokens = (model.config.text.vocab_size, ends[:1], ends[1])
    key = (identity, of_tokens)
    if (found := kept.parts.get(key)) is not None:
        return found
    automaton = lift(make(), kept.vocabulary(tokenizer, *of_tokens), most_inside=_MOST_INSIDE)
    made = Part.of_lifted(automaton), TokenConstraint.of(automaton)
    return kept.keep(kept.parts, key, made)
