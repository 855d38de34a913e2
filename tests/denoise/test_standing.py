"""Standing text along a canvas: what is kept, and where it has moved to."""

from __future__ import annotations

import math
from itertools import combinations

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.denoise.standing import NONE, Kept, Standing, StandingAnswer, keep, lay

AGREEMENT = 0.1
END, FILL = 5, 6


def likely(wanted: str, text: str) -> np.ndarray:
    """Ratios of a model that wants a text, "?" where it does not care."""
    columns, tokens = np.array(list(wanted))[:, None], np.array(list(text))[None]
    return np.where((columns == tokens) | (columns == "?"), 1.0, 1e-3)


@pytest.mark.parametrize(
    ("wanted", "text", "is_whole", "kept"),
    [
        ("abcdefgh", "abcdefgh", True, "abcdefgh"),
        ("abXdefgh", "abcdefgh", True, "ab.defgh"),
        ("abXYcdefgh", "abcdefgh", True, "ab..cdefgh"),  # two put in: what follows moves
        ("abfgh", "abcdefgh", True, "abfgh"),  # three left out
        ("cdefgh__", "abcdefgh__", False, "cdefgh__"),  # two left out in front
        ("Xabcdefgh", "abcdefgh__", False, ".abcdefgh"),
        ("abXYefgZh", "abcdefgh", True, "ab..efg.h"),
        ("????????", "abcdefgh", True, "abcdefgh"),
        ("????fgh", "abcdefgh", True, "bcdefgh"),
        ("qqqqqqqq", "abcdefgh", True, "........"),
        ("abXc", "abc__", False, "ab.."),  # one token alone is not worth a move
    ],
)
def test_what_is_kept_of_a_text(wanted, text, is_whole, kept):
    places = lay(likely(wanted, text), AGREEMENT, is_whole=is_whole).places
    assert "".join("." if place == NONE else text[place] for place in places) == kept


def score(ratios: np.ndarray, kept: list[tuple[int, int]], begins: int, is_whole: bool) -> float:
    """What keeping tokens, as pairs of column and place, gains."""
    W, n = ratios.shape
    loss = -math.log(AGREEMENT)

    def moved(columns: int, tokens: int) -> float:
        return 2 * (columns != tokens) + 0.01 * max(0, tokens - columns)

    gain = sum(math.log(ratios[pair]) for pair in kept) - loss * (W - len(kept))
    behind = [(column + 1, place + 1) for column, place in kept]
    for (c, p), (column, place) in zip(behind, kept[1:], strict=False):
        gain -= loss * moved(column - c, place - p)
    ends = [n] if is_whole else range(n + 1)
    ways = []  # where the text begins and ends in the canvas
    for first in range(n + 1):
        for last in ends:
            (column, place), (c, p) = (kept[0], behind[-1]) if kept else ((W, last), (W, last))
            if first <= place and p <= last:
                moves = 2 * (first != begins) + moved(column, place - first)
                ways.append(moves + moved(W - c, last - p))
    return gain - loss * min(ways)


@pytest.mark.parametrize("seed", range(60))
def test_no_other_way_of_keeping_is_better(seed):
    rng = np.random.default_rng(seed)
    W, n = rng.integers(1, 6, 2)
    begins, is_whole = int(rng.integers(0, n)), bool(rng.integers(2))
    ratios = 10 ** -rng.uniform(0, 1.4, (W, n))
    best = -math.inf
    for count in range(min(W, n) + 1):
        for columns in combinations(range(W), count):
            for places in combinations(range(n), count):
                pairs = list(zip(columns, places, strict=True))
                if all(ratios[pair] >= AGREEMENT for pair in pairs):
                    best = max(best, score(ratios, pairs, begins, is_whole))
    places = lay(ratios, AGREEMENT, begins=begins, is_whole=is_whole).places
    found = [(column, int(place)) for column, place in enumerate(places) if place != NONE]
    assert score(ratios, found, begins, is_whole) == pytest.approx(best)


def test_texts_in_some_columns_of_a_canvas():
    ratios = np.full((1, 8, 32), 0.01, np.float32)
    for column, token in ((2, 11), (3, 12), (6, 21), (7, 22)):
        ratios[0, column, token] = 1
    texts = [
        Standing(np.array([11, 12, 13], np.int32), 2, 5, is_whole=True),
        Standing(np.array([21, 22, 23], np.int32), 6, 9),
    ]
    kept = keep(texts, mx.array(ratios), AGREEMENT)
    assert kept.tokens.tolist() == [[NONE, NONE, 11, 12, NONE, NONE, 21, 22]]
    assert kept.reached == [2, 2]


def test_the_first_end_that_is_kept():
    kept = Kept(np.array([[7, NONE, END, FILL, END]]), [5])
    assert kept.length([END]) == 3 and kept.length([9]) is None


def shown(answer: StandingAnswer, width: int) -> list[int]:
    (text,) = answer.texts(0, width)
    return text.tokens[text.begins : text.begins + width].tolist()


def test_each_canvas_has_the_next_part_of_an_answer():
    answer = StandingAnswer(np.arange(10, 30), (END, FILL))
    assert shown(answer, 8) == [*range(10, 18)] and answer.columns(8) == 8
    answer.committed(np.array([10, 11, 12, 90, 14, 15, 16, 17]))  # another token in one place
    assert shown(answer, 8) == [*range(18, 26)]
    answer.committed(np.array([18, 19, 91, 92, 93, 20, 21, 22]))  # three more
    assert shown(answer, 8) == [*range(23, 30), END] and answer.columns(8) == 8
    answer.committed(np.array([23, 26, 27, 28, 29]))  # two less
    assert shown(answer, 4) == [END, FILL, FILL, FILL] and answer.columns(8) == 1


def test_what_has_nothing_of_an_answer_does_not_use_it_up():
    answer = StandingAnswer(np.arange(10, 30), (END, FILL))
    answer.committed(np.arange(50, 58))
    assert shown(answer, 8) == [*range(10, 18)]


def test_an_answer_goes_on_behind_the_part_that_is_looked_at():
    answer = StandingAnswer(np.arange(10, 50), (END, FILL))
    (text,) = answer.texts(0, 8)
    assert END not in text.tokens and len(text.tokens) == 16
