"""mlx_diffgemma.decide as a user types it."""

from __future__ import annotations

import json

import pytest

from mlx_diffgemma import Question, bundled_model, decide, load
from mlx_diffgemma.cli.decide import decide as command
from tests.cli.test_cli import assert_one_line, invoke

TEXT = "Sort: 6 3 1 7\n"


def expected(*questions: Question, text: str = TEXT):
    return decide(*load(bundled_model()), text, questions).answers


def test_the_answer_alone_is_on_stdout_and_probabilities_are_on_stderr():
    asked = ("--question", "Which is the least?", "--choices", "6, 3,a\\,b")
    result = invoke(command, *asked, stdin=TEXT)
    (answer,) = expected(Question.choice("Which is the least?", ["6", "3", "a,b"]))
    assert (result.exit_code, result.stdout) == (0, f"{answer.value}\n")
    note, line = result.stderr.splitlines()
    assert note.startswith("no --model given")
    assert line.startswith("Which is the least?  ") and f"{answer.value} " in line
    assert line.endswith(f"confidence {answer.confidence:.1%}")
    quiet = invoke(command, *asked, "--verbose", "False", stdin=TEXT)
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")
    given = invoke(command, TEXT, *asked, "--verbose", "False")
    assert given.stdout == result.stdout


def test_several_questions_have_a_line_each_with_their_own_or_one_list_of_answers():
    result = invoke(command, "-q", "Sorted?", "-q", "Long?", stdin=TEXT)
    answers = expected(Question.predicate("Sorted?"), Question.predicate("Long?"))
    assert result.stdout.split() == [str(a.value).lower() for a in answers]
    result = invoke(command, "-q", "a", "-q", "b", "--levels", "low,mid,high", stdin=TEXT)
    answers = expected(*(Question.score(t, ["low", "mid", "high"]) for t in "ab"))
    assert result.stdout.split() == [f"{a.score:.2f}" for a in answers]
    both = ("--choices", "x,y", "--choices", "v,w")
    result = invoke(command, "-q", "a", "-q", "b", *both, stdin=TEXT)
    answers = expected(Question.choice("a", ["x", "y"]), Question.choice("b", ["v", "w"]))
    assert result.stdout.split() == [a.value for a in answers]


def test_json_has_every_probability_and_questions_of_all_kinds_come_from_a_file(tmp_path):
    file = tmp_path / "questions.json"
    raw = [
        {"type": "predicate", "instructions": "Sorted?", "name": "s"},
        {"type": "score", "instructions": "Long?", "levels": [{"label": "x"}, {"label": "y"}]},
    ]
    file.write_text(json.dumps(raw))
    result = invoke(command, "--questions", str(file), "--json", stdin=TEXT)
    found = json.loads(result.stdout)
    predicate, score = expected(Question.predicate("Sorted?"), Question.score("Long?", ["x", "y"]))
    assert found["answers"][0]["probability"] == pytest.approx(predicate.probability, abs=1e-5)
    assert found["answers"][0]["name"] == "s"
    assert found["answers"][0]["share"] == pytest.approx(predicate.share, rel=1e-3)
    assert found["answers"][1]["score"] == pytest.approx(score.score, abs=1e-5)
    assert found["steps"] == 2 and found["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "a question is missing"),
        (("-q", ""), "a question must be a text"),
        (("-q", "a", "--choices", "x"), "2 to 255 in number, there are 1"),
        (("-q", "a", "--choices", "x,x"), "is there twice"),
        (("-q", "a", "--choices", "x,y", "--levels", "x,y"), "are of different questions"),
        (("-q", "a", "--choices", "x,y", "--choices", "x,y"), "2 lists of answers for 1 questions"),
        (("-q", "a", "--canvas-length", "20"), "multiple of 16, got 20"),
        (("-q", "a", "--output", "x"), "--output needs --batch"),
        (("x", "--batch", "y"), "--batch has its own inputs"),
        (("--questions", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_a_mistake_is_one_line(arguments, said):
    assert_one_line(invoke(command, *arguments, "--verbose", "False", stdin=TEXT), said)


def test_lines_of_a_file_have_an_answer_each_in_their_order(tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [f"Sort: {n} 1" for n in range(9)]
    source.write_text("".join(json.dumps({"input": t, "id": t}) + "\n" for t in texts))
    asked = ("--batch", str(source), "-q", "Which?", "--choices", "x,y")
    printed = invoke(command, *asked)
    assert printed.exit_code == 0 and "9 answers" in printed.stderr
    found = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [each["id"] for each in found] == texts
    (alone,) = expected(Question.choice("Which?", ["x", "y"]), text=texts[4])
    assert found[4]["answers"][0]["choice"] == alone.value
    written = invoke(command, *asked, "--output", str(output), "--max-rows", "2")
    assert (written.exit_code, written.stdout) == (0, "")
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [e["answers"][0]["choice"] for e in again] == [e["answers"][0]["choice"] for e in found]
    with source.open("a") as file:
        file.write("oops\n")
    failed = invoke(command, *asked)
    assert failed.exit_code == 1 and "1 of them failed" in failed.stderr
    assert len(failed.stdout.splitlines()) == 10
