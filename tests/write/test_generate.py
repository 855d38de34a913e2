"""The functions most programs need, on the bundled model."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_diffgemma
from mlx_diffgemma import GenerationSettings, PromptOptions
from mlx_diffgemma.errors import ConfigError, PromptError
from mlx_diffgemma.events import CanvasCommitted, Finished, PrefillDone, StepDone, Text
from mlx_diffgemma.view.report import Stopwatch, as_object

TABLE = "Squares from 2 to 3."
SUDOKU = "Sudoku:\n..13\n.3.4\n413.\n3241"


@pytest.fixture(scope="module")
def loaded():
    return mlx_diffgemma.load(mlx_diffgemma.bundled_model())


def test_the_same_seed_gives_the_same_answer_and_the_answer_is_right(loaded):
    answers = {
        mlx_diffgemma.generate(*loaded, TABLE, settings=GenerationSettings(seed=1))
        for _ in range(2)
    }
    assert answers == {"|n|n*n|\n|-|-|\n|2|4|\n|3|9|"}


def test_a_string_messages_and_ids_are_three_spellings_of_one_prompt(loaded):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": SUDOKU}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    settings = GenerationSettings(seed=3)
    answers = {
        mlx_diffgemma.generate(*loaded, prompt, settings=settings)
        for prompt in (SUDOKU, messages, ids)
    }
    assert len(answers) == 1


def test_text_follows_its_canvas_and_the_end_comes_last(loaded):
    events = list(
        mlx_diffgemma.stream_generate(
            *loaded, "Count from 12 to 36.", settings=GenerationSettings(seed=2)
        )
    )
    kinds = [type(event) for event in events]
    assert kinds[0] is PrefillDone and kinds[-1] is Finished
    assert kinds[1] is StepDone
    assert kinds.count(CanvasCommitted) > 1
    assert all(
        kinds[i + 1] in (StepDone, Text, Finished)
        for i, kind in enumerate(kinds)
        if kind is CanvasCommitted
    )
    for canvas in (event for event in events if isinstance(event, CanvasCommitted)):
        index = canvas.canvas_index
        steps = [e.step for e in events if isinstance(e, StepDone) and e.canvas_index == index]
        assert steps == list(range(canvas.steps))


def test_the_answer_to_a_chat_with_a_system_prompt_is_text(loaded):
    text = mlx_diffgemma.generate(
        *loaded,
        TABLE,
        settings=GenerationSettings(seed=1, max_new_tokens=16),
        prompt_options=PromptOptions(system_prompt="Be brief.", thinking=True),
    )
    assert isinstance(text, str) and "<|" not in text


@pytest.mark.parametrize("bad", [384, -1, 2**40])
def test_an_id_outside_the_vocabulary_is_refused_by_name(loaded, bad):
    with pytest.raises(PromptError, match=f"token {bad} is outside the vocabulary of 384"):
        mlx_diffgemma.generate(*loaded, [2, bad])


def test_an_image_token_is_refused(loaded):
    options = PromptOptions(allow_special_tokens=True)
    with pytest.raises(PromptError, match="give each image as a part of a message"):
        mlx_diffgemma.generate(*loaded, "What is <|image|>?", prompt_options=options)


def test_a_prompt_longer_than_the_positions_allow_is_refused_with_the_room_there_is(loaded):
    with pytest.raises(PromptError, match="at most 1984 of the 2048 positions"):
        mlx_diffgemma.generate(*loaded, [65] * 1985)


def test_a_batch_answers_every_prompt_as_if_it_were_alone(loaded):
    prompts = [TABLE, "Count from 12 to 20.", SUDOKU]
    response = mlx_diffgemma.batch_generate(*loaded, prompts, settings=GenerationSettings(seed=5))
    alone = [
        mlx_diffgemma.generate(*loaded, prompt, settings=GenerationSettings(seed=5 + i))
        for i, prompt in enumerate(prompts)
    ]
    assert response.texts == alone
    assert [done.reason for done in response.finished] == ["stop"] * 3


COUNT = "Count from 12 to 36."
NUMBERS = " ".join(map(str, range(12, 37)))
SEEDED = GenerationSettings(seed=2)


def texts_of(events) -> list[str]:
    return [event.piece for event in events if isinstance(event, Text)]


def test_an_answer_ends_before_a_stop_string_and_the_run_with_its_canvas(loaded):
    assert mlx_diffgemma.generate(*loaded, COUNT, settings=SEEDED) == NUMBERS
    whole = list(mlx_diffgemma.stream_generate(*loaded, COUNT, settings=SEEDED))
    assert sum(isinstance(event, CanvasCommitted) for event in whole) == 2
    # Several tokens, and one of two strings; the first canvas ends within "32".
    for stop in ("15 16", ["36", "15 16"], ("15 16", "16 17")):
        assert mlx_diffgemma.generate(*loaded, COUNT, stop=stop, settings=SEEDED) == "12 13 14 "
    events = list(mlx_diffgemma.stream_generate(*loaded, COUNT, stop=["15 16"], settings=SEEDED))
    assert "".join(texts_of(events)) == "12 13 14 "
    assert sum(isinstance(event, CanvasCommitted) for event in events) == 1
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop"
    assert events[-1].canvases == 1


def test_a_stop_string_over_two_canvases_is_never_shown_in_part(loaded):
    events = list(mlx_diffgemma.stream_generate(*loaded, COUNT, settings=SEEDED))
    first = texts_of(events)[0]
    assert NUMBERS.startswith(first) and first != NUMBERS
    stop = NUMBERS[len(first) - 3 : len(first) + 3]
    events = list(mlx_diffgemma.stream_generate(*loaded, COUNT, stop=[stop], settings=SEEDED))
    assert texts_of(events) == [first[:-3]]
    assert events[-1].reason == "stop"
    other = stop[:3] + "nothing like it"
    events = list(mlx_diffgemma.stream_generate(*loaded, COUNT, stop=[other], settings=SEEDED))
    assert texts_of(events)[0] == first[:-3] and "".join(texts_of(events)) == NUMBERS


def test_a_stop_string_ends_its_own_row_of_a_batch(loaded):
    other = "Count from 40 to 64."
    response = mlx_diffgemma.batch_generate(
        *loaded, [COUNT, COUNT, other], stop=["15 16", "36"], settings=SEEDED
    )
    assert response.texts[:2] == ["12 13 14 "] * 2
    alone = mlx_diffgemma.generate(*loaded, other, settings=GenerationSettings(seed=4))
    assert response.texts[2] == alone and len(alone) > 64
    assert [done.canvases for done in response.finished] == [1, 1, 2]
    assert [done.reason for done in response.finished] == ["stop"] * 3


@pytest.mark.parametrize("stop", [[""], [5], 5, b"x", {"a"}])
def test_what_is_no_stop_string_is_refused(loaded, stop):
    for call, prompt in (
        (mlx_diffgemma.generate, TABLE),
        (mlx_diffgemma.batch_generate, [TABLE]),
    ):
        with pytest.raises(PromptError, match="stop"):
            call(*loaded, prompt, stop=stop)


def test_max_tokens_is_the_same_limit_under_mlx_lms_name(loaded):
    long = GenerationSettings(seed=1, max_new_tokens=10)
    expected = mlx_diffgemma.generate(*loaded, TABLE, settings=long)
    short = GenerationSettings(seed=1)
    assert mlx_diffgemma.generate(*loaded, prompt=TABLE, max_tokens=10, settings=short) == expected
    response = mlx_diffgemma.batch_generate(*loaded, [TABLE], max_tokens=10, settings=short)
    assert response.texts == [expected] and response.finished[0].reason == "length"
    *_, last = mlx_diffgemma.stream_generate(*loaded, TABLE, max_tokens=10, settings=short)
    assert last.new_tokens == 10


def test_an_answer_from_the_text_that_stands_is_right_in_a_few_steps(loaded):
    # One number less in front, one more behind: all of the text moves.
    events = list(
        mlx_diffgemma.stream_generate(
            *loaded,
            "Count from 13 to 22.",
            standing="12 13 14 15 16 17 18 19 20 21",
            settings=GenerationSettings(seed=1, warm_start=0.1),
        )
    )
    text = "".join(event.piece for event in events if isinstance(event, Text))
    assert text == "13 14 15 16 17 18 19 20 21 22" and events[-1].steps <= 3


@pytest.mark.parametrize(("standing", "share"), [("12", None), ("12", 0.0), (None, 0.1)])
def test_a_standing_text_and_its_setting_go_together(loaded, standing, share):
    settings = GenerationSettings(warm_start=share)
    with pytest.raises(ConfigError, match="go together"):
        mlx_diffgemma.generate(*loaded, TABLE, standing=standing, settings=settings)


def test_a_batch_has_no_standing_texts(loaded):
    with pytest.raises(ConfigError, match="no effect in a batch"):
        mlx_diffgemma.batch_generate(*loaded, [TABLE], settings=GenerationSettings(warm_start=0.1))


def test_max_tokens_given_twice_or_impossible_is_refused(loaded):
    twice = GenerationSettings(max_new_tokens=10)
    with pytest.raises(ConfigError, match="max_tokens=10 and the settings' max_new_tokens=10"):
        mlx_diffgemma.generate(*loaded, TABLE, max_tokens=10, settings=twice)
    with pytest.raises(ConfigError, match="max_new_tokens=10 are the same limit"):
        mlx_diffgemma.batch_generate(*loaded, [TABLE], max_tokens=5, settings=twice)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        mlx_diffgemma.generate(*loaded, TABLE, max_tokens=0)


def test_verbose_prints_as_mlx_lm_does_and_nothing_is_printed_without_it(loaded, capsys):
    settings = GenerationSettings(seed=1)
    answer = mlx_diffgemma.generate(*loaded, prompt=TABLE, verbose=True, settings=settings)
    out, err = capsys.readouterr()
    rule, rest = "=" * 10, out.removeprefix("=" * 10 + "\n" + answer)
    assert rest != out and err == ""
    numbers = r"Prompt: 36 tokens, [\d.]+ tokens-per-sec\nGeneration: 26 tokens, [\d.]+ "
    numbers += r"tokens-per-sec\nPeak memory: \d+\.\d{3} GB\n"
    assert re.fullmatch(rf"\n{rule}\n{numbers}", rest), rest
    prompts = [TABLE, COUNT]
    response = mlx_diffgemma.batch_generate(*loaded, prompts, verbose=True, settings=settings)
    lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
    said = [line.removeprefix("[batch_generate] ") for line in lines]
    assert said[0] == "Finished processing 0/2 ..." and "Finished processing 1/2 ..." in said
    assert said[-4] == "Finished processing 2/2" and said[-1].endswith(" GB")
    assert said[-2].startswith(
        f"Generation: {sum(done.new_tokens for done in response.finished)} tokens, "
    )
    mlx_diffgemma.generate(*loaded, TABLE, settings=settings)
    mlx_diffgemma.batch_generate(*loaded, [TABLE], settings=settings)
    assert capsys.readouterr() == ("", "")


def test_an_answer_without_text_is_said_as_mlx_lm_says_it(loaded, capsys):
    settings = GenerationSettings(seed=1)
    assert mlx_diffgemma.generate(*loaded, TABLE, verbose=True, stop="|", settings=settings) == ""
    assert capsys.readouterr().out.endswith("\nNo text generated for this prompt\n")


def test_what_apply_chat_template_returns_is_a_prompt(loaded):
    _, tokenizer = loaded
    messages = [{"role": "user", "content": TABLE}]
    settings = GenerationSettings(seed=1)
    expected = mlx_diffgemma.generate(*loaded, TABLE, settings=settings)
    for returned in (None, "np", "mlx"):
        encoding = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors=returned
        )
        prompts = [encoding, encoding["input_ids"]]
        response = mlx_diffgemma.batch_generate(*loaded, prompts, settings=settings)
        assert response.texts[0] == expected
        for prompt in prompts:
            assert mlx_diffgemma.generate(*loaded, prompt, settings=settings) == expected


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("abc", "got str; put a single prompt into a list, or use generate"),
        (b"abc", "got bytes"),
        ({"role": "user", "content": "x"}, "got dict"),
        ({"input_ids": [[2, 30]]}, "got dict"),
        ({"a", "b"}, "got set"),
        (5, "got int"),
        (None, "got NoneType"),
        ([2, 30], "got a list of token ids, which is one prompt"),
        (np.array([2, 30]), "got a list of token ids, which is one prompt"),
        ([{"role": "user", "content": "x"}], "got a list of messages, which is one prompt"),
        (["x", b"abc"], "prompt 2: a prompt is a string"),
        (["x", ""], "prompt 2: the prompt is empty"),
        ([[2, 400]], "prompt 1: token 400 is outside"),
        (np.array([[]], np.int32), "prompt 1: the prompt is empty"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(loaded, prompts, said):
    with pytest.raises(PromptError, match=re.escape(said)):
        mlx_diffgemma.batch_generate(*loaded, prompts)


def test_settings_and_prompt_options_of_another_type_are_refused(loaded):
    said = r"settings must be a GenerationSettings, such as GenerationSettings\(seed=7\), got dict"
    wrong: Any = {"seed": 7}
    for run in (
        lambda: mlx_diffgemma.generate(*loaded, TABLE, settings=wrong),
        lambda: mlx_diffgemma.batch_generate(*loaded, [TABLE], settings=wrong),
        lambda: mlx_diffgemma.fill(*loaded, "a {{gap}}", settings=wrong),
        lambda: mlx_diffgemma.Chat(*loaded, settings=wrong),
    ):
        with pytest.raises(ConfigError, match=said):
            run()
    with pytest.raises(ConfigError, match=r"prompt_options must be a PromptOptions, .* got dict"):
        mlx_diffgemma.generate(*loaded, TABLE, prompt_options=wrong)


def test_a_batch_may_be_a_tuple_or_an_array_of_ids(loaded):
    ids = mlx_diffgemma.encode_prompt(loaded[1], TABLE)
    answers = [
        mlx_diffgemma.batch_generate(*loaded, prompts, settings=GenerationSettings(seed=1)).texts
        for prompts in ((TABLE, ids), np.array([ids, ids]), mx.array([ids, ids]))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_an_empty_batch_is_refused(loaded):
    with pytest.raises(PromptError, match="batch is empty"):
        mlx_diffgemma.batch_generate(*loaded, [])


def test_the_summary_holds_together(loaded):
    stopwatch, summary, objects = Stopwatch(), None, []
    for event in mlx_diffgemma.stream_generate(*loaded, TABLE, settings=GenerationSettings(seed=1)):
        summary = stopwatch.observe(event)
        objects.append(as_object(event, summary))
    assert summary is not None
    canvas = next(o for o in objects if o["event"] == "canvas")
    assert summary.steps == canvas["steps"] == sum(o["event"] == "step" for o in objects)
    assert summary.tokens_per_forward == summary.new_tokens / summary.steps
    assert summary.peak_bytes > 1_000_000
    assert objects[-1]["reason"] == "stop" and "end of answer" in summary.line()
