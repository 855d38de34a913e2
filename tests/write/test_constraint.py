"""Answers under constraints, from the prompt to the text."""

import json
import re
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mlx_diffgemma import (
    Constraint,
    DiffGemmaError,
    Engine,
    GenerationSettings,
    PromptOptions,
    Request,
    batch_generate,
    bundled_model,
    generate,
    load,
    stream_generate,
)
from mlx_diffgemma.cli.generate import generate as generate_command
from mlx_diffgemma.denoise import constrained, step
from mlx_diffgemma.errors import ConfigError, ConstraintError, NumbersError
from mlx_diffgemma.events import CanvasCommitted, Finished, Text
from mlx_diffgemma.write.constrained import check_answer
from tests.write.constrained_runs import Told, compare

SHORT = GenerationSettings(seed=3, max_new_tokens=70, max_denoising_steps=4)
PERSON = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded():
    return load(bundled_model())


def test_every_answer_of_drawn_constraints_fits():
    told = Told()
    for seed in range(40):
        compare(seed, told)
    assert told.findings == []
    assert len(told.kinds) == 5 and told.canvases > told.rows > 80


def test_an_answer_that_is_right_anyway_stays(loaded):
    prompt, settings = "Sort: 5 2 4 1", GenerationSettings(seed=7)
    free = generate(*loaded, prompt, settings=settings)
    for policy in ("reference", "fast"):
        own = replace(settings, policy=policy)
        bound = generate(
            *loaded, prompt, settings=own, constraint=Constraint.regex(r"[0-9]( [0-9])*")
        )
        assert bound == free == "1 2 4 5"


def test_a_wrong_answer_becomes_one_that_fits(loaded):
    constraint = Constraint.json_schema(PERSON, compact=True)
    text = generate(*loaded, "Sort: 5 2 4 1", settings=SHORT, constraint=constraint)
    value = constraint.parse(text)
    assert value == json.loads(text) and set(value) == {"n", "ok"} and " " not in text


def test_a_dataclass_comes_back(loaded):
    @dataclass
    class Pair:
        n: int
        ok: bool

    constraint = Constraint.json_schema(Pair, closed=True)
    text = generate(*loaded, "Sort: 5 2 4 1", settings=SHORT, constraint=constraint)
    assert isinstance(constraint.parse(text), Pair)


def test_rows_of_a_batch_have_their_own(loaded):
    constraints = [Constraint.choices(["yes", "no"]), None, Constraint.regex("[a-c]{3}")]
    settings = GenerationSettings(seed=7, max_new_tokens=40)
    texts = batch_generate(
        *loaded, ["Is it?", "Sort: 3 1 2", "Reverse: abc"], settings=settings,
        constraints=constraints,
    ).texts  # fmt: skip
    assert texts[0] in ("yes", "no") and len(texts[2]) == 3
    alone = generate(*loaded, "Sort: 3 1 2", settings=replace(settings, seed=8))
    assert texts[1] == alone == "1 2 3"
    with pytest.raises(ConfigError, match="2 constraints for 3 prompts"):
        batch_generate(*loaded, ["a", "b", "c"], constraints=constraints[:2])


def test_an_engine_keeps_it_too(loaded):
    constraint = Constraint.choices(["left", "right"])
    request = Request("Which?", SHORT, constraint=constraint)
    with Engine(*loaded) as engine:
        *_, last = events = list(engine.submit(request))
    assert isinstance(last, Finished) and last.constraint == "kept"
    assert "".join(e.piece for e in events if isinstance(e, Text)) in ("left", "right")


def test_a_run_without_a_constraint_says_so(loaded):
    *_, last = stream_generate(*loaded, "Sort: 3 1 2", settings=SHORT)
    assert last.constraint is None


def test_a_draft_is_the_likeliest_of_all_choices(loaded, monkeypatch):
    """Against every choice's own score, from the probabilities of the same step."""
    model, tokenizer = loaded
    texts, found = ["yes", "no", "1 2", "12", "abc"], []
    real = step.constrained.choose

    def watched(looks):
        choices = real(looks)
        for look, choice in zip(looks, choices, strict=True):
            ratios = np.array(look.free.seen.ratios[0], np.float64)
            confidence = np.array(look.free.seen.confidence[0], np.float64)
            found.append((ratios * confidence[:, None], np.array(choice.seen.draft[0])))
        return choices

    monkeypatch.setattr(step.constrained, "choose", watched)
    constraint = Constraint.choices(texts)
    list(stream_generate(model, tokenizer, "Sort: 2 1", settings=SHORT, constraint=constraint))
    settings = SHORT.resolve(model.config)
    for probabilities, draft in found:
        logs = np.log(np.maximum(probabilities, np.exp(constrained.LEAST)))

        def score(ids, logs=logs):
            end = max(settings.eos_token_ids, key=lambda e: logs[len(ids), e])
            row = [*ids, end] + [settings.pad_token_id] * (len(logs) - len(ids) - 1)
            return logs[np.arange(len(row)), row].sum()

        text = tokenizer.decode(draft[: np.argmax(np.isin(draft, settings.eos_token_ids))])
        scores = {t: score(tokenizer.encode(t, add_special_tokens=False)) for t in texts}
        assert score(draft[: np.argmax(np.isin(draft, settings.eos_token_ids))].tolist()) == (
            pytest.approx(max(scores.values()))
        ), (text, scores)
    assert len(found) >= 1


def test_several_canvases_go_on_from_the_state_that_is_reached(loaded):
    constraint = Constraint.regex("[0-9]{30}")
    settings = replace(SHORT, canvas_length=16, max_new_tokens=31)
    events = list(stream_generate(*loaded, "Count.", settings=settings, constraint=constraint))
    assert sum(isinstance(e, CanvasCommitted) for e in events) == 2
    text = "".join(e.piece for e in events if isinstance(e, Text))
    assert len(text) == 30 and text.isdigit()


def test_a_budget_below_the_shortest_answer_is_refused_before_anything_is_computed(loaded):
    constraint = Constraint.regex("[0-9]{30}")
    with pytest.raises(ConstraintError, match=r"has 31 tokens with its end, and at most 30 .* 31"):
        Request("Count.", replace(SHORT, max_new_tokens=30), constraint=constraint).job(*loaded)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"stop": "x"}, {}, "stop strings and a constraint exclude each other"),
        ({"prompt_options": PromptOptions(response_prefix="a")}, {}, "response_prefix is not"),
        ({}, {"noise": True}, "a constraint needs seeded noise"),
    ],
)
def test_what_would_cut_or_replay_is_refused(loaded, changes, more, message):

    class Foreign:
        start = sample = renoise = None

    request = Request("x", SHORT, constraint=Constraint.choices(["a"]), **changes)
    with pytest.raises(ConfigError, match=message):
        request.job(*loaded, **({"noise": Foreign()} if more else {}))


@pytest.mark.parametrize(
    ("make", "keyword", "pointer", "position"),
    [
        (lambda: Constraint.regex("(a"), None, None, 0),
        (lambda: Constraint.json_schema({"unevaluatedItems": 3}), None, None, None),
        (
            lambda: Constraint.json_schema(
                {"properties": {"a": {"$ref": "http://x.y"}}, "type": "object"}
            ),
            "$ref", "/properties/a", None,
        ),
        (lambda: Constraint.json_schema("{"), None, None, None),
        (lambda: Constraint.json_schema("3"), None, None, None),
        (lambda: Constraint.json_schema({"type": "integer", "enum": ["x"]}), None, None, None),
        (lambda: Constraint.choices([]), None, None, None),
        (lambda: Constraint.choices(5), None, None, None),
        (lambda: Constraint.regex(re.compile("a")), None, None, None),
        (lambda: Constraint.regex(""), None, None, None),
        (lambda: Constraint.regex("()(?:)?"), None, None, None),
        (lambda: Constraint.template(5), None, None, None),
        (lambda: Constraint.choices([""]), None, None, None),
        (lambda: Constraint.template("{{gap:3}}"), None, None, None),
        (lambda: Constraint.tool_call([]), None, None, None),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_in_one_line(make, keyword, pointer, position):
    with pytest.raises(DiffGemmaError) as caught:
        make()
    assert "\n" not in str(caught.value)
    if keyword is not None:
        assert (caught.value.keyword, caught.value.pointer) == (keyword, pointer)
    if position is not None:
        assert caught.value.position == position


@pytest.mark.parametrize("digits", [1, 499, 500, 501, 1000, 4300, 4301, 12_345])
def test_whole_numbers_of_any_length_are_read(digits):
    number = 10**digits - 7
    text = "9" * (digits - 1) + "3"
    constraint = Constraint.json_schema({"type": "array", "items": {"type": "integer"}})
    assert constraint.parse(f"[{text}, -{text}, 0]") == [number, -number, 0]


def test_an_expression_may_match_the_empty_text_beside_others():
    assert Constraint.regex("a?").accepts("") and Constraint.regex("a?").accepts("a")


@pytest.mark.parametrize("wrong", ["[0-9]+", re.compile("a"), {"type": "object"}, 5])
def test_what_is_no_constraint_is_refused_by_its_type(loaded, wrong):
    kind = type(wrong).__name__
    said = re.escape(f'must be a Constraint, such as Constraint.regex("[0-9]+"), got {kind}')
    with pytest.raises(ConfigError, match=said):
        generate(*loaded, "Count.", constraint=wrong)
    with pytest.raises(ConfigError, match=said):
        batch_generate(*loaded, ["Count."], constraints=[wrong])
    with pytest.raises(ConfigError, match=said):
        Request("Count.", constraint=wrong).job(*loaded)


@pytest.mark.parametrize("wrong", ["a", Constraint.regex("a"), 5])
def test_constraints_of_a_batch_are_a_list(loaded, wrong):
    with pytest.raises(ConfigError, match="a list with one for each prompt, got"):
        batch_generate(*loaded, ["Count."], constraints=wrong)


def test_parse_refuses_what_does_not_fit():
    constraint = Constraint.json_schema(PERSON)
    assert constraint.parse('{"n": 1, "ok": true}') == {"n": 1, "ok": True}
    for wrong in ('{"n": 1}', "{", '{"ok": true, "n": "1"}'):
        assert not constraint.accepts(wrong)
        with pytest.raises(ConstraintError, match="does not fit its constraint"):
            constraint.parse(wrong)
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    calls = Constraint.tool_call([tool])
    calls.check_calls([("f", {"a": "x"})])
    for wrong_calls in ([], [("g", {})], [("f", {"a": 1})]):
        with pytest.raises(ConstraintError):
            calls.check_calls(wrong_calls)


def test_an_answer_or_calls():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    person = Constraint.json_schema(PERSON)
    either = Constraint.tool_call([tool], required=False, answer=person)
    assert either.parse('{"n": 1, "ok": true}') == {"n": 1, "ok": True}
    check_answer(either, '{"n": 1, "ok": true}', [])
    check_answer(either, "", [("f", {"a": "x"})])
    for text, called in (("", []), ("so", []), ("", [("f", {"a": 1})]), ("so", [("f", {})])):
        with pytest.raises(ConstraintError, match="does not fit its constraint"):
            check_answer(either, text, called)
    check_answer(Constraint.tool_call([tool], required=False), "so", [("f", {})])
    for required, answer in ((True, person), (False, Constraint.tool_call([tool]))):
        with pytest.raises(ConstraintError, match="instead of calls"):
            Constraint.tool_call([tool], required=required, answer=answer)


def test_an_answer_that_does_not_fit_is_an_error_and_no_silent_half(loaded, monkeypatch):
    monkeypatch.setattr(Constraint, "accepts", lambda self, text: False)
    with pytest.raises(ConstraintError, match="does not fit its constraint"):
        generate(*loaded, "x", settings=SHORT, constraint=Constraint.choices(["a", "b"]))


def test_numbers_that_are_not_finite_end_that_row_alone(loaded, monkeypatch):
    model, tokenizer = loaded
    real = type(model).outputs
    settings = replace(SHORT, max_denoising_steps=2)

    def spoilt(self, states):
        out = real(self, states)
        half = out.shape[1] // 2
        return mx.concatenate([out[:, :half], mx.full(out[:, half:].shape, mx.nan)], axis=1)

    monkeypatch.setattr(type(model), "outputs", spoilt)
    with pytest.raises(NumbersError, match="not finite"):
        generate(
            model, tokenizer, "x", settings=settings, constraint=Constraint.choices(["a", "b"])
        )


def test_the_host_waits_for_the_choices_of_all_rows_together(loaded, monkeypatch):
    asked, reads = [], []
    real = step.constrained.choose

    class Numpy:
        """NumPy, which counts the arrays of the device that it reads."""

        def __getattr__(self, name):
            return getattr(np, name)

        def array(self, value, *more, **named):
            reads.append(isinstance(value, mx.array))
            return np.array(value, *more, **named)

    def counted(looks):
        before = sum(reads)
        choices = real(looks)
        asked.append(len(looks))
        assert sum(reads) == before + 1
        return choices

    monkeypatch.setattr(step.constrained, "choose", counted)
    monkeypatch.setattr(constrained, "np", Numpy())
    constraints = [Constraint.choices(["yes", "no"]), Constraint.regex("[a-c]{9}"), None]
    response = batch_generate(
        *loaded, ["a", "b", "c"], settings=replace(SHORT, stability_threshold=2),
        constraints=constraints,
    )  # fmt: skip
    assert max(asked) == 2 and len(asked) <= max(f.steps for f in response.finished)


# --- the command ---


def command(*arguments, stdin=""):
    app = typer.Typer()
    app.command()(generate_command)
    return CliRunner().invoke(app, [*arguments], input=stdin)


def test_the_command_reads_schemas_from_a_file_and_from_stdin(tmp_path):
    file = tmp_path / "person.json"
    file.write_text("\ufeff" + json.dumps(PERSON))
    more = ("--seed", "1", "--max-denoising-steps", "2", "--max-tokens", "60", "--json-compact")
    for given, stdin in ((str(file), ""), ("-", json.dumps(PERSON))):
        done = command("Sort: 2 1", "--json-schema", given, *more, stdin=stdin)
        assert done.exit_code == 0, done.stderr
        assert set(json.loads(done.stdout)) == {"n", "ok"}
    done = command("Sort: 2 1", "--choices", "a\\,b,c", "--seed", "1", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["constraint"] == "kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--regex", "a", "--choices", "b"], "--regex and --choices exclude each other"),
        (["x", "--json-schema", "none.json"], "there is no file none.json"),
        (["x", "--json-schema", "{"], "--json-schema: the JSON Schema is not JSON"),
        (["x", "--json-schema", '{"$ref": "http://x"}'], "$ref"),
        (["x", "--regex", "("], "--regex: "),
        (["x", "--regex", ""], "--regex: only the empty text fits this expression"),
        (["x", "--choices", "a,,b"], "--choices: choice 2"),
        (["x", "--json-indent", "2"], "need --json-schema or --json-object"),
        (["--json-schema", "-"], "stdin is the schema"),
        (["x", "--regex", "[0-9]{9}", "--max-tokens", "3"], "allow at least 10"),
        (["x", "--regex", "a", "--stop", "b"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = command(*arguments, stdin="{}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.exit_code == 2 and done.stdout == ""
    assert last.startswith("error: ") and message in last
