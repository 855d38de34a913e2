"""The functions most programs need, on the bundled model."""

from __future__ import annotations

import pytest

import mlx_diffgemma
from mlx_diffgemma import GenerationSettings, PromptOptions
from mlx_diffgemma.errors import PromptError
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
    with pytest.raises(PromptError, match="images are not supported yet"):
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
    assert response.finished.reason == ("stop",) * 3


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
    assert objects[-1]["reason"] == "stop" and "end of turn" in summary.line()
