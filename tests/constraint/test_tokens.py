"""The lift of automata to tokens, held against reading the characters of each token."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from mlx_diffgemma import bundled_model, load_tokenizer
from mlx_diffgemma.constraint.dfa import DFA, NOWHERE, SPECIAL
from mlx_diffgemma.constraint.tokens import DEAD, FAR, TokenAutomaton, lift
from mlx_diffgemma.constraint.vocabulary import Vocabulary
from mlx_diffgemma.language.prompt import token_bytes
from tests.constraint.automata import (
    BOOLEAN,
    NUMBER,
    STRING,
    Part,
    array,
    but,
    dfa,
    drawn,
    either,
    json_object,
    limited,
    many,
    of,
    one_of,
    row,
    special,
    symbols,
    times,
)
from tests.constraint.cases import CALL, END, MASK, OTHER_END, PAD, vocabulary
from tests.sampled import one_in

FIRST = MASK + 1
FREE = many(but(""))
BYTE = range(FIRST, FIRST + 256)  # the tokens of `vocabulary([], with_bytes=True)`


def pieces(rng: random.Random, count: int) -> list[str]:
    """Texts like those of a tokenizer for JSON."""
    known = ['"', '":', '": "', '","', "{", "}", "[]", "true", "false", "name", "vip", "é", "日本"]
    letters = 'abcdefnulltruesavip"{}[]:,. 0123456789\\\n'
    drawn_texts = ("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(count))
    return list(dict.fromkeys([*known, *letters, *drawn_texts]))


RECORD = json_object({"name": STRING, "vip": BOOLEAN, "n": array(NUMBER), "note": limited(12)})


@pytest.mark.parametrize("seed", one_in(3, range(8)))
def test_a_token_leads_where_its_characters_lead(seed):
    rng = random.Random(seed)
    texts = pieces(rng, 400)
    automata = [dfa(RECORD), drawn(rng, rng.choice([10, 300]), "abcdef tru é日", 0.7)]
    for made in automata:
        lifted = lift(made, vocabulary(texts))
        hopeless = lifted.distance == FAR
        for _ in range(3000):
            token, state = rng.randrange(len(texts)), rng.randrange(len(made))
            there = state
            for character in texts[token]:
                there = made.step(there, ord(character))
            expected = NOWHERE if there != NOWHERE and hopeless[there] else there
            assert lifted.after([FIRST + token], state) == expected


def test_only_an_end_token_leads_to_the_end_and_only_pad_and_end_tokens_go_on_there():
    lifted = lift(dfa("ab"), vocabulary(["a", "b", "ab"]))
    a, b, ab = range(FIRST, FIRST + 3)
    for end in (END, OTHER_END):
        assert lifted.after([a, b, end]) == lifted.end
        assert lifted.after([ab, end, PAD, PAD]) == lifted.end
        assert lifted.after([a, end]) == NOWHERE
    assert lifted.after([ab, PAD]) == NOWHERE
    assert lifted.after([ab]) != lifted.end
    for token in range(len(lifted.classes)):
        behind = lifted.after([ab, END, token])
        assert behind == (lifted.end if token in (PAD, END, OTHER_END) else NOWHERE)
    assert lifted.distance[[0, lifted.end]].tolist() == [2, 0]


def test_an_end_token_may_be_the_pad_token():
    made = Vocabulary.of_spellings({2: "a"}, [0, 1], 3, (1,), 1)
    lifted = lift(dfa("a"), made)
    assert lifted.after([2, 1, 1, 1]) == lifted.end
    assert lifted.after([1]) == NOWHERE


def test_special_tokens_lead_only_where_the_automaton_names_them():
    lifted = lift(dfa(special(CALL) + many(one_of("ab"))), vocabulary(["a", "b"]))
    a = FIRST
    assert lifted.after([CALL, a, a, END]) == lifted.end
    assert lifted.after([a, END]) == lifted.after([CALL, CALL]) == NOWHERE
    assert lifted.classes[MASK] == DEAD
    assert lifted.classes[len(lifted.classes) - 1] == DEAD  # an id that only the model has


def test_free_text_holds_no_special_token_and_no_placeholder():
    spellings = {5: "a", 6: "<unused7>", 7: "<unused>"}
    made = Vocabulary.of_spellings(spellings, range(5), 9, (END,), PAD)
    lifted = lift(dfa(FREE), made)
    assert lifted.after([5, 7, END]) == lifted.end
    for token in (PAD, CALL, MASK, 6, 8):
        assert lifted.after([token]) == NOWHERE


def test_states_from_which_no_token_leads_on_are_out_of_reach():
    lifted = lift(dfa(either("aax", "ab")), vocabulary(["a", "b", "aa"]))  # nothing spells an x
    a, b, aa = range(FIRST, FIRST + 3)
    assert lifted.after([a, b, END]) == lifted.end
    assert lifted.after([a, a]) == NOWHERE
    assert lifted.classes[aa] == DEAD
    assert (lifted.distance == FAR).sum() == 1
    nothing = lift(dfa("ax"), vocabulary(["a", "b"]))
    assert nothing.distance[0] == FAR
    assert lifted.after([a, b, END], 0) != nothing.after([a], 0) == NOWHERE


@pytest.mark.parametrize("seed", one_in(3, range(20)))
def test_edges_say_what_maps_say_and_distances_are_shortest(seed):
    rng = random.Random(seed)
    made = drawn(rng, rng.randint(1, 40), "abc é", 0.4)
    lifted = lift(made, vocabulary(["a", "b", "c", "ab", "bca", " a", "é", "cé", "ccc"]))
    from_edges = np.full_like(lifted.maps, NOWHERE)
    for source, target, number in zip(lifted.sources, lifted.targets, lifted.sets, strict=True):
        from_edges[lifted.classes_of(number), source] = target
    np.testing.assert_array_equal(from_edges, lifted.maps)
    assert lifted.sizes.sum() == len(lifted.classes)
    sets = [tuple(lifted.classes_of(g)) for g in range(len(lifted.set_starts) - 1)]
    assert len(set(sets)) == len(sets)
    assert len(np.unique(lifted.maps, axis=0)) == len(lifted.maps)
    for state in range(lifted.maps.shape[1] - 1):
        ways = lifted.distance[lifted.maps[:, state][lifted.maps[:, state] != NOWHERE]]
        assert lifted.distance[state] == (1 + ways.min() if ways.size else FAR)


@pytest.mark.parametrize("text", ["free", "a text and what follows", "most of a text"])
def test_byte_tokens_spell_every_character_of_free_text(text):
    expression = {
        "free": FREE,
        "a text and what follows": '"' + many(but('"\\', low=0x20)) + '"',
        "most of a text": many(but("\n\x85\u2028\u2029é𝄞")),
    }[text]
    lifted = lift(dfa(expression), vocabulary([], with_bytes=True))
    start = lifted.after([BYTE[ord('"')]]) if text.startswith("a") else 0
    codes = np.array([c for c in range(0x20, 0x110000) if not 0xD800 <= c < 0xE000])
    states = np.full(len(codes), start)
    for first, last, size in (
        (0, 0x80, 1),
        (0x80, 0x800, 2),
        (0x800, 0x10000, 3),
        (0x10000, 0x110000, 4),
    ):
        few = np.flatnonzero((codes >= first) & (codes < last))
        spelled = "".join(map(chr, codes[few])).encode()
        for byte in np.frombuffer(spelled, np.uint8).reshape(-1, size).T:
            tokens = byte.astype(np.int64) + FIRST
            states[few] = np.where(
                states[few] < 0, NOWHERE, lifted.maps[lifted.classes[tokens], states[few]]
            )
    made = dfa(expression)
    begin = made.step(0, ord('"')) if text.startswith("a") else 0
    expected = made.table[begin, np.searchsorted(made.bounds, codes, side="right") - 1]
    np.testing.assert_array_equal(states, expected)


def test_byte_tokens_spell_nothing_but_utf_8():
    lifted = lift(dfa(FREE), vocabulary([], with_bytes=True))
    rng = random.Random(0)
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF]
    edges += [0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xF8, 0xFF]
    strings = [bytes(pair) for pair in product(range(256), repeat=2)]
    strings += [bytes(three) for three in product(edges, repeat=3)]
    strings += [bytes(rng.choices(edges, k=rng.randint(4, 8))) for _ in range(20_000)]
    for string in strings:
        try:
            string.decode()
            expected = lifted.end
        except UnicodeDecodeError:
            expected = NOWHERE
        assert lifted.after([*(BYTE[byte] for byte in string), END]) == expected, string


def test_text_of_counted_length_takes_no_bytes_and_what_leads_to_free_text_does():
    é = [BYTE[byte] for byte in "é".encode()]
    for expression, fits in [
        (times(but(""), 0, 3), False),
        (times(but(""), 1, 1) + FREE, True),
        (many(symbols((0xE9, 0xE9))), False),
        ("a" + FREE, False),
        (either(FREE, "<end>"), True),
    ]:
        lifted = lift(dfa(expression), vocabulary([], with_bytes=True))
        assert (lifted.after([*é, END]) == lifted.end) is fits, expression
        if len(lifted.distance) > 2:
            assert lifted.after([BYTE[ord("a")]]) != NOWHERE


def test_no_text_continues_a_character_that_is_cut():
    lifted = lift(dfa(FREE), vocabulary(["a", "é"], with_bytes=True))
    cut = lifted.after([FIRST + 2 + 0xC3])
    assert cut not in (NOWHERE, 0)
    assert lifted.after([FIRST], cut) == lifted.after([FIRST + 1], cut) == NOWHERE
    assert lifted.after([END], cut) == lifted.after([FIRST + 2 + 0x41], cut) == NOWHERE
    assert lifted.after([FIRST + 2 + 0xA9, END], cut) == lifted.end


def test_the_tokens_of_a_checkpoint_have_the_text_that_they_decode_to():
    tokenizer = load_tokenizer(bundled_model())
    made = Vocabulary.of_tokenizer(tokenizer, 400, (1, 16, 9), 0)
    lifted = lift(dfa(FREE), made)
    vocab = tokenizer.get_vocab()
    texts = {
        t: text for t, text in token_bytes(tokenizer).items() if not text.startswith(b"<unused")
    }
    # A byte token of an ASCII character counts where no other token is that character.
    second = {
        vocab[f"<0x{byte:02X}>"]
        for byte in range(0x80)
        if chr(byte).replace(" ", "▁") in vocab and f"<0x{byte:02X}>" in vocab
    }
    assert len(second) > 90
    for token, spelled in texts.items():
        where = lifted.after([token])
        if token in second:
            assert where == NOWHERE
        else:
            assert where == 0 if spelled[0] < 0x80 else where != 0, (token, spelled)
    others = set(range(400)) - set(texts)
    assert all(lifted.after([token]) == NOWHERE for token in others - {1, 16, 9})
    a, z = tokenizer.convert_tokens_to_ids(["a", "z"])
    one_by_one = lift(dfa(row("a", but(""), "z")), made)
    for token, spelled in texts.items():
        decoded = tokenizer.decode([a, token, z])
        if spelled[0] < 0x80:
            assert decoded == f"a{spelled.decode()}z"
        assert (one_by_one.after([a, token, z, 1]) == one_by_one.end) is (
            len(decoded) == 3 and spelled[0] < 0x80 and token not in second
        )


def test_a_space_before_a_boolean_may_be_part_of_its_token():
    lifted = lift(
        dfa(row('{"vip":', maybe_space(), BOOLEAN, "}")),
        vocabulary(['{"vip":', " true", "}", " ", "true"]),
    )
    first, true, close, space, bare = range(FIRST, FIRST + 5)
    assert lifted.after([first, true, close, END]) == lifted.end
    assert lifted.after([first, space, bare, close, END]) == lifted.end
    assert lifted.after([first, space, true, close, END]) == NOWHERE
    assert lifted.distance[0] == 4


def maybe_space() -> Part:
    return either("", of(" "))


def test_symbols_behind_the_last_range_count_as_the_automaton_says():
    everything = DFA(np.zeros(1, np.int32), np.zeros((1, 1), np.int32), np.ones(1, bool))
    assert everything.accepts([SPECIAL + CALL])
    lifted = lift(everything, vocabulary(["a"]))
    assert lifted.after([CALL, FIRST, END]) == lifted.end


def test_end_and_pad_must_be_tokens():
    for ends, pad in (((), 0), ((9,), 0), ((1,), 9), ((-1,), 0)):
        with pytest.raises(ValueError, match="below 9"):
            Vocabulary.of_spellings({5: "a"}, range(5), 9, ends, pad)


def test_the_state_behind_nothing_is_that_before_it():
    lifted: TokenAutomaton = lift(dfa("ab"), vocabulary(["a", "b"]))
    assert lifted.after(np.zeros(0, np.int32), 1) == 1
    assert lifted.after([FIRST], NOWHERE) == NOWHERE
