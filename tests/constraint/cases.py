"""Small vocabularies and constraints, and every string they allow, for tests by brute force. Run as
`python -m tests.constraint.cases` it tries many more of them."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_diffgemma.constraint.decode import LEAST, best, endings
from mlx_diffgemma.constraint.dfa import DFA, NOWHERE
from mlx_diffgemma.constraint.marginals import Strings
from mlx_diffgemma.constraint.tokens import FAR, TokenAutomaton, lift
from mlx_diffgemma.constraint.vocabulary import Vocabulary
from tests.constraint.automata import Part, dfa, drawn, either, many, maybe, one_of, special

PAD, END, OTHER_END, CALL, MASK = 0, 1, 2, 3, 4  # tokens of all small vocabularies
LETTERS = "abcé"


def vocabulary(texts: list[str], *, with_bytes: bool = False) -> Vocabulary:
    """Return a vocabulary of a few special tokens and these texts, in order from id 5."""
    spellings = [*texts, *([f"<0x{byte:02X}>" for byte in range(256)] if with_bytes else [])]
    names = dict(enumerate([text.replace(" ", "▁") for text in spellings], MASK + 1))
    size = len(names) + MASK + 2  # the last one is only the model's
    return Vocabulary.of_spellings(names, range(MASK + 1), size, (END, OTHER_END), PAD)


@dataclass(frozen=True, eq=False)
class Case:
    """A constraint, and the probabilities of tokens at some positions."""

    texts: list[str]
    dfa: DFA
    automaton: TokenAutomaton
    start: int  # a state
    remaining: int  # tokens behind the positions
    log_p: np.ndarray  # float64 [L, V]

    @property
    def endings(self) -> np.ndarray:
        return endings(self.automaton, self.remaining)

    def strings(self) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yield the strings of tokens that fit, with their log probabilities: every one is read
        character by character."""
        L, V = self.log_p.shape
        end = self.automaton.end
        open_states = [
            NOWHERE if d > self.remaining else s for s, d in enumerate(self.automaton.distance)
        ]

        def after(state: int, token: int) -> int:
            if token == PAD or (state == end and token in (END, OTHER_END)):
                return end if state == end else NOWHERE
            if state == end or token in (MASK, V - 1):
                return NOWHERE
            if token in (END, OTHER_END):
                return end if self.dfa.accepting[state] else NOWHERE
            for symbol in [0x110000 + CALL] if token == CALL else map(ord, self.texts[token - 5]):
                state = self.dfa.step(state, symbol)
            return state

        def walk(string: tuple[int, ...], state: int, score: float) -> Iterator:
            if len(string) == L:
                if state in open_states:
                    yield string, score
                return
            for token in range(V):
                if (target := after(state, token)) != NOWHERE:
                    p = self.log_p[len(string), token]
                    yield from walk((*string, token), target, score + p)

        yield from walk((), self.start, 0.0)


def case(seed: int) -> Case | None:
    """Return a drawn case with at least one string; None where the seed gives none."""
    rng = random.Random(seed)
    pool = [*LETTERS] + [a + b for a in LETTERS for b in LETTERS] + ["abc", "ca a", " "]
    texts = rng.sample(pool, rng.randint(3, 7))
    if seed % 3:
        made = drawn(rng, rng.randint(1, 5), LETTERS + " ", rng.choice([0.3, 0.6, 0.9]))
    else:
        made = dfa(_expression(rng, 3))
    automaton = lift(made, vocabulary(texts))
    noise = np.random.default_rng(seed)
    length = rng.randint(1, 4)
    logits = noise.normal(0, rng.choice([0.5, 3, 12]), (length, len(automaton.classes)))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    log_p = log_p.astype(np.float32).astype(np.float64)  # the device's numbers
    starts = [s for s, d in enumerate(automaton.distance[:-1]) if d != FAR]
    if not starts:
        return None
    start = rng.choice([0, rng.choice(starts)])
    remaining = rng.choice([0, 0, 1, 2, 5])
    found = Case(texts, made, automaton, start, remaining, log_p)
    return found if next(found.strings(), None) else None


def cases(count: int, first: int = 0) -> Iterator[Case]:
    """Yield so many drawn cases."""
    seed = first
    while count:
        if (drawn_case := case(seed)) is not None:
            yield drawn_case
            count -= 1
        seed += 1


def _expression(rng: random.Random, depth: int) -> Part:
    kind = rng.randrange(6) if depth else 0
    if kind < 2:
        return (
            one_of("".join(rng.sample(LETTERS, rng.randint(1, 3))))
            if rng.random() < 0.9
            else special(CALL)
        )
    inner = [_expression(rng, depth - 1) for _ in range(2)]
    return (inner[0] + inner[1], either(*inner), many(inner[0]), maybe(inner[0]) + inner[1])[
        kind - 2
    ]


def maxima(automaton: TokenAutomaton, log_p: np.ndarray) -> np.ndarray:
    """Return the largest log p of each class, float32 [L, K]; -inf where it has no token."""
    found = np.full((len(automaton.sizes), len(log_p)), -np.inf, np.float32)
    np.maximum.at(found, automaton.classes.astype(np.int64), log_p.T.astype(np.float32))
    return found.T


def sums(automaton: TokenAutomaton, numbers: np.ndarray) -> np.ndarray:
    """Return the sum of each class's numbers, float64 [L, K]."""
    found = np.zeros((len(automaton.sizes), len(numbers)))
    np.add.at(found, automaton.classes.astype(np.int64), numbers.T)
    return found.T


def check(one: Case) -> None:
    """Compare the likeliest string, the marginals and their entropy with those over all strings."""
    automaton, (L, V) = one.automaton, one.log_p.shape
    scores = dict(one.strings())
    path = best(automaton, maxima(automaton, one.log_p), one.endings, one.start)
    tokens = chosen(one, path.classes)
    assert abs(path.score - max(scores.values())) < 1e-9
    assert abs(scores[tokens] - path.score) < 1e-9
    assert automaton.after(np.array(tokens), one.start) == path.states[-1]
    p = np.exp(one.log_p)
    strings = Strings.of(automaton, sums(automaton, p), one.endings, one.start)
    weights = np.exp(np.array([*scores.values()]) - strings.log_total)
    assert abs(weights.sum() - 1) < 1e-9
    q = np.zeros((L, V))
    for string, weight in zip(scores, weights, strict=True):
        q[np.arange(L), string] += weight
    found = strings.marginals(sums(automaton, p * one.log_p))
    ours = p * found.factors[:, automaton.classes]
    np.testing.assert_allclose(ours, q, atol=1e-12)
    np.testing.assert_allclose(ours.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(sums(automaton, ours), found.masses, atol=1e-12)
    plogp = np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0)
    np.testing.assert_allclose(found.entropy, -plogp.sum(axis=1), atol=1e-10)


def chosen(one: Case, classes: np.ndarray) -> tuple[int, ...]:
    """Return the likeliest token of each class, as the device chooses it."""
    inside = one.automaton.classes[None] == classes[:, None]
    return tuple(np.where(inside, np.maximum(one.log_p, LEAST), -np.inf).argmax(axis=1).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    for one in cases(options.count):
        check(one)
    print(f"{options.count} cases: no difference")


if __name__ == "__main__":
    main()
