"""The distribution of the strings that a constraint allows: of each position, and of whole strings.

The model's positions are independent. Under the condition that the string fits, the distribution q
of a position is that of the model, p, times one factor per class of tokens:

    q_i(x) = p_i(x) w_i[class of x]

Everything is computed from sums over classes, in float64. Sums over strings are kept as logarithms:
they lie hundreds of nats apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .decode import LEAST, check_shapes
from .tokens import TokenAutomaton

_NEGLIGIBLE = 1e-20  # a state that is less likely is left out; all of them weigh below rounding


@dataclass(frozen=True, slots=True, eq=False)
class Marginals:
    """The distributions q of the positions."""

    factors: np.ndarray  # float64 [L, K]: w, zero for classes that are impossible
    masses: np.ndarray  # float64 [L, K]: the probability under q that a token of the class occurs
    entropy: np.ndarray  # float64 [L], nats

    def draw(self, uniforms: np.ndarray) -> np.ndarray:
        """Return a class for each position, drawn independently of the others: int64 [L].

        Args:
          uniforms: float [L], uniform in [0, 1).
        """
        sums = np.cumsum(self.masses, axis=1)
        return np.array([_drawn(*pair) for pair in zip(sums, uniforms, strict=True)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Strings:
    """The distribution of strings with one token per position that lead from one state to allowed
    ones: that of the model under this condition."""

    automaton: TokenAutomaton
    start: int
    masses: np.ndarray  # float64 [L, K], of the model
    is_lost: np.ndarray  # bool [L, K]: the class has less than its least mass, and gets that
    of_sets: np.ndarray  # float64 [L, G], of the model
    later: np.ndarray  # float64 [L + 1, S]: log probability to get from a state to an allowed one

    @classmethod
    def of(
        cls, automaton: TokenAutomaton, masses: np.ndarray, endings: np.ndarray, start: int = 0
    ) -> Strings:
        """Return the distribution.

        Args:
          automaton: of the constraint.
          masses: float [L, K]: the sums of the probabilities of each class's tokens, of independent
            positions. Each token counts exp(LEAST) where its class would have less.
          endings: bool [S], the states that a string may lead to.
          start: the state before it.

        Raises:
          NumbersError: if a mass is NaN.
          ValueError: if shapes disagree, or there is no such string.

        Source: the backward pass of Baum-Welch, over sets of classes.
        """
        check_shapes(automaton, masses, endings)
        least = automaton.sizes * np.exp(LEAST)
        is_lost = masses < least
        masses = np.where(is_lost, least, masses)
        sums = automaton.classes_by_set.reduce(np.add, np.ascontiguousarray(masses.T))
        of_sets = np.ascontiguousarray(sums.T)
        later = _later(automaton, np.log(of_sets), endings)
        if later[0, start] == -np.inf:
            raise ValueError(
                f"no string of {len(masses)} tokens leads from state {start} to an allowed one"
            )
        return cls(automaton, start, masses, is_lost, of_sets, later)

    @property
    def log_total(self) -> float:
        """The log probability, under the model, that the string fits."""
        return float(self.later[0, self.start])

    def marginals(self, products: np.ndarray) -> Marginals:
        """Return the distributions of the positions.

        Args:
          products: float [L, K]: the sums of p log p over each class's tokens, in nats.

        Raises:
          NumbersError: if a product is NaN.
          ValueError: if shapes disagree.

        Source: the forward pass of Baum-Welch; the entropy is -sum_c (w N_c + P_c w log w), with
          the sums P of p and N of p log p.
        """
        check_shapes(self.automaton, products, self.automaton.distance == 0)
        factors = np.zeros_like(self.masses)
        of_sets = np.ascontiguousarray(self._factors_of_sets().T)
        factors[:, 1:] = self.automaton.sets_by_class.reduce(np.add, of_sets).T
        products = np.where(self.is_lost, LEAST * self.masses, products)
        logs = np.log(factors, out=np.zeros_like(factors), where=factors > 0)
        masses = self.masses * factors
        entropy = -(factors * products + masses * logs).sum(axis=1)
        return Marginals(factors, masses, np.maximum(entropy, 0.0))

    def _factors_of_sets(self) -> np.ndarray:
        """Return for each position and set, over all edges that take it, the sum of the probability
        to be at an edge's source times the probability of what follows its target: [L, G]. It is
        relative to the source's, so that no sum is out of range."""
        found = np.zeros_like(self.of_sets)
        here: np.ndarray = np.zeros(len(self.automaton.distance))  # the probability of each state
        here[self.start] = 1.0
        for i in range(len(self.masses)):
            found[i], here = self._onward(i, here)
        return found

    def passages(self, at: int, state: int, target: int) -> np.ndarray:
        """Return the probability that a string which is in one state behind `at` tokens comes to
        another, for the first time, behind each number of tokens: float64 [L + 1].

        Raises:
          ValueError: if no string that fits is in that state there.
        """
        if self.later[at, state] == -np.inf:
            raise ValueError(f"no string that fits is in state {state} behind {at} tokens")
        found = np.zeros(len(self.later))
        here: np.ndarray = np.zeros(len(self.automaton.distance))
        here[state] = 1.0
        for i in range(at, len(self.masses)):
            _, here = self._onward(i, here)
            found[i + 1], here[target] = here[target], 0.0
        return found

    def _onward(self, i: int, here: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of sets at a position, [G], and the probabilities of states behind it,
        from those before it, [S] both."""
        automaton, degrees = self.automaton, np.diff(self.automaton.first_edges)
        active = np.flatnonzero(here > _NEGLIGIBLE)
        counts = degrees[active]
        edges = np.repeat(automaton.first_edges[active] - np.cumsum(counts) + counts, counts)
        edges += np.arange(len(edges))
        targets, sets = automaton.targets.take(edges), automaton.sets.take(edges)
        ways = self.later[i + 1].take(targets)
        ways -= np.repeat(self.later[i].take(active), counts)
        np.exp(ways, out=ways)
        ways *= np.repeat(here.take(active), counts)
        factors = np.bincount(sets, ways, minlength=self.of_sets.shape[1])
        return factors, np.bincount(targets, ways * self.of_sets[i].take(sets), minlength=len(here))


def _later(automaton: TokenAutomaton, of_sets: np.ndarray, endings: np.ndarray) -> np.ndarray:
    """Return the log probability of all ways from each state to an allowed one, [L + 1, S], from
    the log probabilities of sets, [L, G]."""
    L, S = len(of_sets), len(automaton.distance)
    later = np.full((L + 1, S), -np.inf)
    later[L, endings] = 0.0
    degrees = np.diff(automaton.first_edges)
    live = np.flatnonzero(degrees)
    firsts, degrees = automaton.first_edges[live], degrees[live]
    along, further = np.empty(len(automaton.sources)), np.empty(len(automaton.sources))
    with np.errstate(divide="ignore"):  # log 0: there is no way
        for i in reversed(range(L)):
            of_sets[i].take(automaton.sets, out=along, mode="clip")
            later[i + 1].take(automaton.targets, out=further, mode="clip")
            along += further
            top = np.maximum.reduceat(along, firsts)
            top[top == -np.inf] = 0.0
            along -= np.repeat(top, degrees)
            np.exp(along, out=along)
            later[i, live] = top + np.log(np.add.reduceat(along, firsts))
    return later


def _drawn(sums: np.ndarray, uniform: float) -> int:
    """Return which of the numbers with these running sums a uniform one falls on, never one that is
    0."""
    at = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return min(at, int(np.searchsorted(sums, sums[-1])))
