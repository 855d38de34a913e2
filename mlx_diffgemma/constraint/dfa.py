"""A deterministic finite automaton over symbols: which strings an answer may be.

A symbol is a code point, 0 to 0x10FFFF, or a special token: `SPECIAL` + its id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SPECIAL = 0x110000  # the first symbol that is no code point
NOWHERE = -1  # in a table: no string that goes on this way is accepted


@dataclass(frozen=True, slots=True, eq=False)
class DFA:
    """States are numbers; state 0 is the initial one. Every state is reachable, and from every
    state an accepting one is; only the automaton of no string at all has one state that accepts
    nothing."""

    bounds: np.ndarray  # int32 [R], ascending, from 0: the first symbol of each range
    table: np.ndarray  # int32 [S, R]: the next state for symbols of a range, or NOWHERE
    accepting: np.ndarray  # bool [S]

    def __len__(self) -> int:
        """The number of states."""
        return len(self.accepting)

    def step(self, state: int, symbol: int) -> int:
        """Return the state behind a symbol, or NOWHERE."""
        if state == NOWHERE:
            return NOWHERE
        at = int(np.searchsorted(self.bounds, symbol, side="right")) - 1
        return int(self.table[state, at])

    def accepts(self, symbols: str | Iterable[int]) -> bool:
        """Return whether a whole text, or string of symbols, belongs."""
        state = 0
        for symbol in map(ord, symbols) if isinstance(symbols, str) else symbols:
            if (state := self.step(state, symbol)) == NOWHERE:
                return False
        return bool(self.accepting[state])
