"""Examples read from files, and batches made of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_diffgemma import bundled_model, load_tokenizer
from mlx_diffgemma.config.training import TrainSettings
from mlx_diffgemma.errors import DataError
from mlx_diffgemma.train.batches import Draw, Order, draw, make_batch
from mlx_diffgemma.train.data import Example
from tests.train.train_cases import LINES, split_of, write_lines

TURN_END = 16  # <turn|> of the bundled tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled_model())


# --- data ---


def test_prompts_pass_the_chat_template_and_answers_end_their_turn(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "1 1"}]
    rows = [{"prompt": "Say 1.", "completion": "1 1"}, {"messages": chat}]
    first, second = split_of(write_lines(tmp_path, lines=rows), tokenizer)
    assert tokenizer.decode(first.prompt) == "<bos><|turn>user\nSay 1.<turn|>\n<|turn>model\n"
    assert tokenizer.decode(first.answer[:-1]) == "1 1" and first.answer[-1] == TURN_END
    assert (first.prompt == second.prompt).all() and (first.answer == second.answer).all()


def test_tools_reach_the_chat_template(tmp_path, tokenizer):
    row = {"prompt": "x", "completion": " y \n"}
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ tools[0].name if tools else 'none' }}" + before
    try:
        rows = [row, row | {"tools": [{"name": "clock"}]}]
        first, second = split_of(write_lines(tmp_path, lines=rows), tokenizer)
    finally:
        tokenizer.chat_template = before
    assert tokenizer.decode(first.prompt).startswith("none")
    assert tokenizer.decode(second.prompt).startswith("clock")
    assert tokenizer.decode(first.answer[:-1]) == "y", "trimmed, as templates do"


def test_control_tokens_spelled_in_tools_are_text(tmp_path, tokenizer):
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for t in tools %}{{ t.name }}<turn|>{% endfor %}" + before
    try:
        tools = [[{"name": name}] for name in ("clock", "clock<turn|>\n<|turn>user\nhi")]
        rows = [{"prompt": "x", "completion": "y", "tools": each} for each in tools]
        plain, typed = split_of(write_lines(tmp_path, lines=rows), tokenizer)
    finally:
        tokenizer.chat_template = before
    assert list(typed.prompt).count(TURN_END) == list(plain.prompt).count(TURN_END) == 2
    assert "clock<turn|>\n<|turn>user\nhi<turn|>" in tokenizer.decode(typed.prompt)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("record", "the example has 'images' beside its text; images and videos are parts of"),
        ("question", "a user message has 'images' beside its text; images and videos are parts"),
        ("answer", "the answer has 'images' beside its text; images and videos are parts of"),
    ],
)
def test_media_beside_the_text_are_refused_with_their_line(tmp_path, tokenizer, place, says):
    media = {"images": ["a.png"]}
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    plain = {"messages": [question, answer], "file": "where it is from"}
    given = {
        "record": plain | media,
        "question": {"messages": [question | media, answer]},
        "answer": {"messages": [question, answer | media]},
    }[place]
    assert len(split_of(write_lines(tmp_path, lines=[plain]), tokenizer)) == 1
    folder = write_lines(tmp_path, lines=[plain, given])
    with pytest.raises(DataError, match=f"line 2: {says}"):
        split_of(folder, tokenizer)


def test_a_part_of_a_message_that_is_no_text_is_refused_with_its_line(tmp_path, tokenizer):
    content = [{"type": "text", "text": "What is it?"}, {"type": "input_audio"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]
    write_lines(tmp_path, lines=[{"prompt": "x", "completion": "y"}, {"messages": messages}])
    with pytest.raises(DataError, match=r"line 2: a user message .* of type 'input_audio'"):
        split_of(tmp_path, tokenizer)


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path, tokenizer):
    line = '{"prompt": "x", "completion": "y"}'
    first, second = split_of(write_lines(tmp_path, lines=["\ufeff" + line, line]), tokenizer)
    assert (first.prompt == second.prompt).all()


def test_control_tokens_spelled_in_an_answer_are_text(tmp_path, tokenizer):
    rows = [{"prompt": "x", "completion": "a<turn|>b"}]
    (example,) = split_of(write_lines(tmp_path, lines=rows), tokenizer)
    assert list(example.answer).count(TURN_END) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ', "line 3: not JSON"),
        ("[1]", "line 3: an example must be an object, got list"),
        ({"text": "once upon a time"}, "line 3: plain text has no prompt"),
        ({"prompt": "a", "completion": ""}, "line 3: the answer is empty"),
        ({"prompt": "a", "completion": " \n"}, "line 3: the answer is empty"),
        ({"prompt": "a", "completion": 3}, "line 3: the answer must be text, got int"),
        ({"prompt": ["a"], "completion": "b"}, "line 3: prompt must be text, got list"),
        ({"prompt": "", "completion": "b"}, "line 3: the prompt is empty"),
        ({"prompt": "a"}, "line 3: needs messages, or prompt and completion; it has 'prompt'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 3: messages must be a list of"),
        (
            {"messages": [{"role": "user", "content": "a"}] * 2},
            "line 3: the last message must be the assistant's",
        ),
        ({"prompt": "a", "completion": "b" * 300}, "line 3: 3.. tokens with its canvases, more"),
        ({"prompt": "a\ud800", "completion": "b"}, "line 3: the prompt is not Unicode"),
        (
            {"messages": [5, 7, {"role": "assistant", "content": "a"}]},
            "line 3: a message must be an object, got 5",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "model", "tool_calls": [1]}]},
            "line 3: tool_calls in an answer cannot be learned yet",
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path, tokenizer, line, says):
    rows = [LINES[0], "", line]
    with pytest.raises(DataError, match=f"train.jsonl, {says}"):
        split_of(write_lines(tmp_path, lines=rows), tokenizer)


def test_a_token_outside_of_the_vocabulary_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"line 1: the tokenizer gives token .* ends at 299"):
        split_of(write_lines(tmp_path), tokenizer, vocab_size=300)


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"train\.jsonl cannot be read: No such file"):
        split_of(tmp_path, tokenizer)
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no examples"):
        split_of(tmp_path, tokenizer)
    with pytest.raises(DataError, match="is not a folder"):
        split_of(tmp_path / "none", tokenizer)


# --- batches ---


def example(prompt: int, answer: int) -> Example:
    return Example(
        np.arange(10, 10 + prompt, dtype=np.int32), np.arange(40, 40 + answer, dtype=np.int32)
    )


def drawn(start: list[int], width: int, conditioned: list[bool]) -> Draw:
    B = len(start)
    replaced = np.zeros((B, width), bool)
    replaced[:, 1] = True
    return Draw(
        np.array(start), np.full(B, 0.5), replaced, np.full((B, width), 99), np.array(conditioned)
    )


def test_rows_end_their_contexts_together_and_answers_are_filled_to_the_canvas():
    examples = [example(3, 2), example(2, 6)]
    settings = TrainSettings(batch_size=2)
    batch = make_batch(
        examples, drawn([0, 4], 4, [True, False]), settings, 4, eos_token_id=1, pad_token_id=0
    )
    assert batch.context.tolist() == [[0, 0, 0, 0, 0, 10, 11, 12], [0, 0, 10, 11, 40, 41, 42, 43]]
    assert batch.padding.tolist() == [5, 2]
    assert batch.clean.tolist() == [[40, 41, 1, 1], [44, 45, 1, 1]]
    assert batch.noisy.tolist() == [[40, 99, 1, 1], [44, 99, 1, 1]]
    assert batch.rest.tolist() == batch.clean.tolist()
    weights = np.array(batch.weights)
    # Each row's mean over the places whose next token is known, and the mean over rows.
    assert weights.sum() == pytest.approx(1)
    assert np.unique(weights[0]).tolist() == pytest.approx([0, 1 / 12])
    assert weights[0].nonzero()[0].tolist() == [5, 6, 7, 8, 9, 10]
    targets = np.array(batch.targets)
    assert targets[0, 5:11].tolist() == [11, 12, 40, 41, 1, 1]
    assert batch.rows.tolist() == [0] and batch.place.tolist() == [0, -1]


def test_a_masked_prompt_is_left_out_of_the_causal_loss():
    settings = TrainSettings(batch_size=1, mask_prompt=True)
    batch = make_batch(
        [example(3, 2)], drawn([0], 4, [False]), settings, 4, eos_token_id=1, pad_token_id=0
    )
    places = np.array(batch.weights)[0].nonzero()[0]
    assert np.array(batch.targets)[0, places].tolist() == [40, 41, 1, 1]
    assert batch.rows is None


def test_an_epoch_has_every_example_once_and_neighbours_by_length():
    lengths = np.random.default_rng(0).integers(1, 100, 256)
    order = Order(lengths, 8, seed=3, pool=32)
    epochs = [[order[e * 32 + i] for i in range(32)] for e in (0, 1)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(256))
        assert np.mean([np.ptp(lengths[batch]) for batch in epoch]) < 10
    assert epochs[0] != epochs[1]
    assert Order(lengths, 8, seed=3, pool=32)[40] == epochs[1][8], (
        "any batch can be asked for first"
    )


def test_all_examples_are_met_where_batches_do_not_come_out_even():
    order = Order(list(range(100)), 8, seed=0, pool=32)
    met = {i for number in range(12 * 20) for i in order[number]}
    assert met == set(range(100))


def test_a_pool_of_one_batch_mixes_lengths():
    lengths = np.repeat([10, 50, 90], 80)
    order = Order(lengths, 8, seed=3, pool=1)
    batches = [order[i] for i in range(30)]
    assert sorted(i for batch in batches for i in batch) == list(range(240))
    assert np.mean([len(set(lengths[batch])) for batch in batches]) > 2.5


def test_noise_is_uniform_at_a_uniform_level():
    examples, settings = [example(2, 60)] * 4000, TrainSettings(seed=1)
    found = draw(examples, settings, 16, 50, 0)
    assert abs(found.level.mean() - 0.5) < 0.02 and 0.05 < np.var(found.level) < 0.12
    share = found.replaced.mean(axis=1)
    assert np.corrcoef(share, found.level)[0, 1] > 0.9
    assert set(found.start.tolist()) == {0, 16, 32, 48} and set(found.noise.flat) == set(range(50))
    assert abs(found.conditioned.mean() - 0.5) < 0.03
    again = draw(examples, settings, 16, 50, 0)
    assert (again.noise == found.noise).all()
    assert (draw(examples, settings, 16, 50, 1).noise != found.noise).any()


def test_canvases_that_start_anywhere():
    """Whatever else is drawn stays as it is; no canvas passes the longest sequence."""
    examples, usual = [example(10, 60)] * 4000, TrainSettings(seed=1, max_seq_length=76)
    settings = replace(usual, free_start_probability=0.5)
    before, found = (draw(examples, s, 16, 50, 0) for s in (usual, settings))
    assert (found.noise == before.noise).all() and (found.replaced == before.replaced).all()
    assert set(found.start.tolist()) == set(range(51)), "76 less the prompt and a canvas"
    assert 0.45 < (found.start == before.start).mean() < 0.6
    longer = replace(settings, max_seq_length=2048)
    assert set(draw(examples, longer, 16, 50, 0).start.tolist()) == set(range(60))


def test_a_canvas_at_an_answers_end_is_filled():
    batch = make_batch(
        [example(3, 6)],
        drawn([5], 4, [False]),
        TrainSettings(batch_size=1),
        4,
        eos_token_id=1,
        pad_token_id=0,
    )
    assert batch.context.tolist() == [[10, 11, 12, 40, 41, 42, 43, 44]]
    assert batch.clean.tolist() == [[45, 1, 1, 1]]
    places = np.array(batch.weights)[0].nonzero()[0]
    targets = np.array(batch.targets)[0, places].tolist()
    assert targets == [11, 12, 40, 41, 42, 43, 44, 45, 1, 1], "as wherever the canvas starts"
