"""Slots and the tokens on their borders, with a small tokenizer that joins words with spaces."""

from __future__ import annotations

import functools
import json

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma import Constraint, GenerationSettings, PromptOptions, Template, fill
from mlx_diffgemma.events import StepDone, TrialStarted
from mlx_diffgemma.language.prompt import encode_text
from mlx_diffgemma.write.fill import Filled, stream_fill
from mlx_diffgemma.write.regions import Regions
from tests.write.test_fill import Dice, L, V

JOINED = ["▁true", "▁a", "▁12", '":', '",', '."', '▁"', "12", "ab"]
PLAIN = PromptOptions(use_chat_template=False)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and the merges that lead to the joined tokens."""
    names = ["<eos>", "<pad>", "<bos>", "<unk>", "<turn|>"]
    names += [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    merges: list[tuple[str, str]] = []
    for joined in JOINED:
        # A word is made from its end on, so that the space joins last.
        for at in reversed(range(len(joined) - 1)):
            pair = joined[at], joined[at + 1 :]
            if "".join(pair) not in names:
                names.append("".join(pair))
                merges.append(pair)
    ids = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<eos>",
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<turn|>"],
    )


class Sure(Dice):
    """A model that is sure of one answer."""

    def __init__(self, text: str):
        super().__init__()
        ids = [*encode_text(tokenizer(), text), tokenizer().convert_tokens_to_ids("<turn|>")]
        self.ids = ids
        self.logits = np.zeros((1, L, V), np.float32)
        self.logits[0, np.arange(len(ids)), ids] = 20
        self.logits[0, np.arange(len(ids), L), 0] = 20  # <eos> fills a canvas

    def canvas_states(self, canvases, opened, *, self_conditioning=None):
        later = list(opened)
        opened.clear()
        return mx.array(self.logits[:, : canvases[0].shape[1]]), later


def filled(template: str, answer: str) -> tuple[Filled, list[int], list[int]]:
    """What is filled in, the tokens that were written, and those of the answer."""
    model = Sure(answer)
    events = list(
        stream_fill(
            model,
            tokenizer(),
            template,
            prompt="Go.",
            settings=GenerationSettings(seed=0),
            prompt_options=PLAIN,
        )
    )
    (*_, last) = [event for event in events if isinstance(event, StepDone)]
    found = events[-1]
    assert isinstance(found, Filled)
    return found, np.array(last.draft)[0, : len(model.ids)].tolist(), model.ids


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ('{"vip": {{one of: true | false}}}', '{"vip": true}'),
        ('{"x": {{match: [0-9]{1,3}}}, "y"', '{"x": 12, "y"'),
        ('{"x": {{json: {"type": ["integer", "string"]}}}}', '{"x": "a."}'),
        ('{"x": "{{gap}}"}', '{"x": "ab."}'),
        ("b {{gap}} b", "b a b"),
        ("b {{gap:1..3}} b", "b 12 b"),
        ("b {{match: [a-z]}} {{match: [0-9]+}}\nb", "b a 12\nb"),
        ("{{gap}} {{gap}}", "b a"),
    ],
)
def test_what_is_written_is_spelled_as_the_whole_text_is(template, answer):
    """Against the tokenizer on the whole text: slots alone would be `▁`, `true`."""
    found, tokens, ids = filled(template, answer)
    assert found.text == answer and tokens == ids
    apart = [
        part if isinstance(part, str) else found.slots[part.name].text
        for part in Template.parse(template).parts
    ]
    assert "".join(apart) == answer
    for slot in found.slots.values():
        spelled = "".join(tokenizer().convert_ids_to_tokens(list(slot.tokens)))
        assert slot.text in spelled.replace("▁", " ") and slot.certainty > 0.99


def test_a_fixed_number_of_tokens_keeps_its_borders():
    found, tokens, ids = filled("b {{gap:1}} b", "b a b")
    assert len(found.slots["1"].tokens) == 1 and tokens != ids
    assert found.slots["1"].lengths == {} and found.text.startswith("b ")


def test_text_before_an_open_slot_is_given_from_the_first_step():
    template = "b12b {{one of: true | ab}} b"
    model = Sure("b12b true b")
    events = stream_fill(
        model, tokenizer(), template, prompt="Go.", prompt_options=PLAIN,
        settings=GenerationSettings(seed=0),
    )  # fmt: skip
    first, last = [event for event in events if isinstance(event, TrialStarted)]
    given = np.array(first.pinned)[0]
    assert first.lengths == (None,) and given[:3].all()  # b, 12, b; the space may be in ▁true
    assert not given[3]
    given = np.array(last.pinned)[0]
    assert given[:3].all() and given[5:].all()


def test_the_text_of_a_schema_is_checked_by_json():
    schema = {"type": "object", "properties": {"a": {"enum": ["}}", "{{"]}}, "required": ["a"]}
    template = Template.parse(f"{{{{n = json: {json.dumps(schema)}}}}}!")
    assert template.slots[0].kind == "json" and template.parts[1] == "!"
    found = fill(
        Dice(), tokenizer(), template, prompt="Go.", prompt_options=PLAIN,
        settings=GenerationSettings(seed=0, canvas_length=L, max_denoising_steps=2),
    )  # fmt: skip
    assert json.loads(found.slots["n"].text)["a"] in ("}}", "{{")
    constraint = Constraint.template(template)
    assert constraint.accepts('{"a": "}}"}!') and not constraint.accepts('{"a": "a"}!')


def test_borders_are_taken_once():
    model, settings = Sure("a"), GenerationSettings()
    resolved = settings.resolve(model.config)
    regions = Regions(model, tokenizer(), resolved, (4, 0))
    pieces = regions.pieces(Template.parse("b {{match: a}} {{match: b}}, {{one of: a | b}}"), None)
    spelled = [
        (piece.left, piece.right)
        if not isinstance(piece, list)
        else "".join(tokenizer().convert_ids_to_tokens(piece))
        for piece in pieces
    ]
    assert spelled == ["b", (b" ", b""), (b" ", b","), (b" ", b"")]
