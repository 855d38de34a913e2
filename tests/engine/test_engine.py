"""The engine: requests together write what they write alone, and end alone. `make long` runs
`tests.engine.soak`."""

from __future__ import annotations

import gc
import threading
from contextlib import ExitStack

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    Constraint,
    DecisionTask,
    Engine,
    GenerationSettings,
    Question,
    Request,
    Store,
    encode_prompt,
)
from mlx_diffgemma.checkpoint.memory import context_bytes, row_bytes
from mlx_diffgemma.denoise import loop
from mlx_diffgemma.denoise.loop import Rows
from mlx_diffgemma.denoise.row import Row
from mlx_diffgemma.errors import ConfigError, EngineError, NumbersError, PromptError
from mlx_diffgemma.events import Finished, StepDone
from mlx_diffgemma.model import Context, DiffusionGemma
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.model.context import LayerContext
from mlx_diffgemma.write import constrained
from mlx_diffgemma.write.fill import FillTask
from mlx_diffgemma.write.job import Ask
from tests.checkpoints import load_drawn
from tests.engine.cases import (
    LONG,
    PATIENCE,
    REQUESTS,
    Made,
    alone,
    eventually,
    held,
    in_thread,
    is_idle,
    loaded,
    plain,
)

FILL = FillTask(
    template="Monday {{gap}} Wednesday",
    gap_tokens=(6, 8),
    settings=GenerationSettings(seed=8, max_denoising_steps=4),
)


@pytest.fixture(scope="module")
def engine():
    with Engine(*loaded()) as engine:
        yield engine


@pytest.fixture
def passes(monkeypatch) -> list[tuple[str, int]]:
    """The model's passes: what they do and over how many rows, or tokens of text."""
    seen: list[tuple[str, int]] = []
    step, read = loop.take_step, DiffusionGemma.encode

    def steps(model, canvases, opened, mean_row):
        seen.append(("step", len(canvases)))
        return step(model, canvases, opened, mean_row)

    def reads(model, pieces, contexts, images, **more):
        seen.append(("read", sum(piece.shape[1] for piece in pieces)))
        return read(model, pieces, contexts, images, **more)

    monkeypatch.setattr(loop, "take_step", steps)
    monkeypatch.setattr(DiffusionGemma, "encode", reads)
    return seen


def widest(passes) -> int:
    return max(count for what, count in passes if what == "step")


def test_requests_together_have_the_events_that_each_has_alone(engine, passes):
    expected, filled = [alone(request) for request in REQUESTS], alone(FILL)
    passes.clear()
    with held(engine):
        runs, fills = [engine.submit(request) for request in REQUESTS], engine.submit(FILL)
    assert [list(map(plain, run)) for run in runs] == expected
    assert list(map(plain, fills)) == filled
    assert widest(passes) > 4, "they were not together"


def test_requests_of_several_threads_have_the_events_that_each_has_alone(engine):
    with held(engine):
        results: list[list] = [[] for _ in REQUESTS]
        threads = [
            threading.Thread(
                target=lambda i=i: results[i].extend(map(plain, engine.submit(REQUESTS[i])))
            )
            for i in range(len(REQUESTS))
        ]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [alone(request) for request in REQUESTS]


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_rows_are_stepped_than_allowed(passes, most):
    tasks = [*REQUESTS[:4], FILL]
    expected = [alone(task)[-1:] for task in tasks]
    passes.clear()
    with Engine(*loaded(), max_rows=most) as engine:
        with held(engine):
            runs = [engine.submit(task) for task in tasks]
        assert [list(map(plain, run))[-1:] for run in runs] == expected
    assert widest(passes) == most


def need(request: Request) -> int:
    model, tokenizer = loaded()
    (ask,) = [next(request.job(model, tokenizer))]
    (row,) = ask.rows
    return row_bytes(
        model.config.text, row.most_tokens, row.settings.canvas_length, element_bytes=4
    )


def test_rows_are_admitted_while_their_memory_fits(passes):
    asked = [Request(r.prompt, GenerationSettings(seed=1)) for r in REQUESTS]
    with Engine(*loaded(), memory_bytes=int(2.5 * max(map(need, asked)))) as engine:
        with held(engine):
            runs = [engine.submit(request) for request in asked]
        assert all(isinstance(list(run)[-1], Finished) for run in runs)
    assert widest(passes) == 2


def test_a_shared_context_counts_once(passes):
    """Each question alone needs it, and all of them are together beside it."""
    text, questions = "7 " * 600, [Question.predicate(f"Is it {n}?") for n in range(8)]
    task = DecisionTask(prompt=text, questions=tuple(questions))
    model = loaded()[0]
    shared = context_bytes(model.config.text, 1200, 4)
    assert shared > 1 << 20
    with Engine(*loaded(), memory_bytes=4 * shared) as engine:
        answers = list(engine.submit(task))[-1].answers
    assert len(answers) == 8 and widest(passes) == 8


def test_lifting_a_constraint_holds_up_nobody(monkeypatch):
    begun, go_on, lift = threading.Event(), threading.Event(), constrained.lift

    def slow(*arguments, **more):
        begun.set()
        assert go_on.wait(PATIENCE)
        return lift(*arguments, **more)

    monkeypatch.setattr(constrained, "lift", slow)
    request = Request("x", GenerationSettings(seed=1), constraint=Constraint.regex("[q-z]{3}"))
    with Engine(*loaded()) as engine:
        results: list = []
        thread = threading.Thread(target=lambda: results.extend(engine.submit(request)))
        thread.start()
        assert begun.wait(PATIENCE)
        assert in_thread(lambda: engine.encode("Sort: 1")) == encode_prompt(loaded()[1], "Sort: 1")
        assert isinstance(in_thread(lambda: list(engine.submit(REQUESTS[0])))[-1], Finished)
        go_on.set()
        thread.join(PATIENCE)
    assert results[-1].constraint == "kept"


def test_a_request_larger_than_the_budget_says_what_it_needs_and_leaves_the_others():
    small = Request("Sort: 9 8 7", GenerationSettings(max_new_tokens=10))
    large = Request("Sort: 9 8 7", GenerationSettings(max_new_tokens=600))
    assert need(small) < need(large)
    with Engine(*loaded(), memory_bytes=need(small)) as engine:
        with held(engine):
            runs = [engine.submit(request) for request in (small, large, small)]
        assert isinstance(list(runs[0])[-1], Finished)
        needed, has = f"{need(large) / 1e9:.3g} GB", f"{need(small) / 1e9:.3g} GB"
        with pytest.raises(
            EngineError,
            match=rf"^the request needs {needed} for \d+ tokens, and the engine has {has} for all "
            "rows; ask for fewer tokens$",
        ):
            list(runs[1])
        assert isinstance(list(runs[2])[-1], Finished)


@pytest.mark.parametrize("limit", ["max_rows", "max_queue", "memory_bytes"])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(EngineError, match=f"^{limit} must be at least 1, got 0"):
        Engine(*loaded(), **{limit: 0})


def test_a_store_of_another_model_is_refused():
    store = Store(1 << 20)
    store.serve(load_drawn(1))
    with pytest.raises(ConfigError, match=r"make a store for each model"):
        Engine(*loaded(), store=store)


def test_a_request_that_cannot_be_used_is_refused_where_it_is_submitted(engine):
    with pytest.raises(PromptError):
        engine.submit(Request([]))
    with pytest.raises(EngineError, match="takes a Request or another task, got str"):
        engine.submit("Sort: 2 1")
    assert is_idle(engine)


def test_a_full_queue_says_so_and_takes_requests_again_later():
    with Engine(*loaded(), max_rows=2, max_queue=1) as engine:
        with held(engine):  # takes one place
            runs = [engine.submit(REQUESTS[0]) for _ in range(2)]
            with pytest.raises(
                EngineError,
                match=r"^the queue is full: 1 requests are under way and 2 wait \(max_rows=2, "
                r"max_queue=1\); try again later$",
            ):
                engine.submit(REQUESTS[0])
        assert [len(list(run)) for run in runs] == [len(alone(REQUESTS[0]))] * 2
        assert eventually(lambda: is_idle(engine))
        assert len(list(engine.submit(REQUESTS[0]))) > 3


def memory_after_first_requests(engine: Engine) -> int:
    """Return MLX's bytes once that is there which is made once for each shape."""
    alone(REQUESTS[0])
    for requests in ([REQUESTS[0]], [LONG], [LONG, LONG]):
        with held(engine):
            runs = [engine.submit(request) for request in requests]
        for run in runs:
            assert [next(run) for _ in range(4)]
            run.cancel()
    assert eventually(lambda: is_idle(engine))
    gc.collect()
    return mx.get_active_memory()


def test_a_cancelled_run_ends_within_the_step_and_frees_its_memory(engine, monkeypatch):
    step, steps, runs = DiffusionGemma.canvas_states, [], []

    def cancels(model, canvases, opened, **more):
        steps.append(len(canvases))
        if len(steps) == 3:
            runs[0].cancel()
        return step(model, canvases, opened, **more)

    before = memory_after_first_requests(engine)
    monkeypatch.setattr(DiffusionGemma, "canvas_states", cancels)
    with held(engine):
        runs.append(engine.submit(LONG))
    assert [type(event) for event in runs[0]].count(StepDone) == 2
    assert eventually(lambda: is_idle(engine))
    assert len(steps) == 3
    gc.collect()
    assert eventually(lambda: mx.get_active_memory() <= before + 1000)


def test_a_run_cancelled_while_it_waits_ends(engine):
    with held(engine):
        first, second = engine.submit(REQUESTS[0]), engine.submit(REQUESTS[1])
        second.cancel()
    assert list(second) == []
    assert len(list(first)) == len(alone(REQUESTS[0]))


def row_of(model, **more) -> Row:
    settings = GenerationSettings(seed=1).resolve(model.config)
    return Row(model, settings, np.arange(3, 9, dtype=np.int32), **more)


def fails_at_once(model, tokenizer):
    raise ValueError("at once")
    yield


def fails_later(model, tokenizer):
    yield Ask([row_of(model)])
    yield (yield None)
    raise ValueError("later")


def fails_in_its_listener(model, tokenizer):
    def stop(tokens):
        raise ValueError("in a listener")

    yield Ask([row_of(model, stop=stop)])
    while True:
        yield (yield None)


def fails_when_it_is_closed(model, tokenizer):
    try:
        yield Ask([row_of(model)])
        yield (yield None)
        raise KeyError("first")
    finally:
        raise ValueError("tidying up")


def waits_for_nothing(model, tokenizer):
    yield "so"
    yield None


def computes_no_numbers(model, tokenizer):
    def broken(layer: LayerContext) -> LayerContext:
        return LayerContext(layer.keys * float("nan"), layer.values * float("nan"))

    settings = GenerationSettings(seed=1, max_denoising_steps=3).resolve(model.config)
    context = model.prefill(mx.array([[3, 4, 5]]))
    context = Context(tuple(map(broken, context.layers)), context.length, 1)
    yield Ask([Row(model, settings, context=context)])
    while True:
        yield (yield None)


FAILURES = (
    (fails_at_once, ValueError, "at once"),
    (fails_later, ValueError, "later"),
    (fails_in_its_listener, ValueError, "in a listener"),
    (fails_when_it_is_closed, ValueError, "tidying up"),
    (waits_for_nothing, EngineError, "none of its rows is left"),
    (computes_no_numbers, NumbersError, "not finite"),
)


def test_an_error_of_one_request_ends_that_one_alone(engine):
    expected = alone(REQUESTS[1])
    with held(engine):
        good = [engine.submit(REQUESTS[1])]
        bad = [engine.submit(Made(job)) for job, _, _ in FAILURES]
        good.append(engine.submit(REQUESTS[1]))
    for run, (job, kind, message) in zip(bad, FAILURES, strict=True):
        with pytest.raises(kind, match=message):
            list(run)
        assert list(run) == [], job.__name__
    assert [[plain(event) for event in run] for run in good] == [expected] * 2
    assert eventually(lambda: is_idle(engine))


def test_a_job_that_fails_while_it_is_cancelled_harms_nobody(engine):
    def make(model, tokenizer):
        try:
            yield from LONG.job(model, tokenizer)
        finally:
            raise ValueError("tidying up")

    with held(engine):
        bad, good = engine.submit(Made(make)), engine.submit(REQUESTS[1])
    next(bad)
    bad.cancel()
    with pytest.raises(ValueError, match=r"tidying up"):
        list(bad)
    assert list(map(plain, good)) == alone(REQUESTS[1])


@pytest.mark.parametrize(("place", "call"), [("canvas_states", 2), ("encode", 1)])
def test_an_error_of_the_model_ends_all_with_the_reason_and_the_engine_goes_on(
    engine, monkeypatch, place, call
):
    real, calls = getattr(DiffusionGemma, place), []

    def fails_once(model, given, *rest, **more):
        calls.append(len(given))
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return real(model, given, *rest, **more)

    before = memory_after_first_requests(engine)
    monkeypatch.setattr(DiffusionGemma, place, fails_once)
    with held(engine):
        runs = [engine.submit(LONG) for _ in range(2)]
    errors = []
    for run in runs:
        with pytest.raises(
            EngineError, match=r"^the engine failed: RuntimeError: out of memory$"
        ) as caught:
            list(run)
        assert str(caught.value.__cause__) == "out of memory"
        errors.append(caught.value)
    assert list(map(plain, engine.submit(REQUESTS[0]))) == alone(REQUESTS[0])
    gc.collect()
    # Whoever keeps the errors does not keep the contexts.
    assert eventually(lambda: mx.get_active_memory() <= before + 1000)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_ends_all_runs_and_closes_the_engine():
    def leaves(model, tokenizer):
        raise SystemExit
        yield

    engine = Engine(*loaded())
    with ExitStack() as hold:
        hold.enter_context(held(engine))
        runs = [engine.submit(task) for task in (LONG, Made(leaves), LONG)]
    for run in runs:
        with pytest.raises(EngineError, match=r"^the engine failed: .*its thread has ended$"):
            list(run)
    with pytest.raises(EngineError, match=r"^the engine is closed$"):
        engine.submit(LONG)
    engine.close()


def test_close_runs_what_there_is_to_its_end():
    engine = Engine(*loaded(), max_rows=1)
    with held(engine):
        runs = [engine.submit(request) for request in REQUESTS[:3]]
    engine.close()
    assert not engine._thread.is_alive()
    assert [list(map(plain, run)) for run in runs] == [alone(r) for r in REQUESTS[:3]]
    with pytest.raises(EngineError, match=r"^the engine is closed$"):
        engine.submit(REQUESTS[0])
    engine.close(cancel=True)  # again


def test_close_may_cancel_what_there_is():
    engine = Engine(*loaded(), max_rows=1)
    runs = [engine.submit(LONG) for _ in range(3)]
    next(runs[0])
    in_thread(lambda: engine.close(cancel=True))
    assert not engine._thread.is_alive()
    assert not any(isinstance(event, Finished) for run in runs for event in run)


def test_threads_are_given_back():
    before = threading.active_count()
    for _ in range(3):
        with Engine(*loaded()) as engine:
            assert threading.active_count() == before + 1
        assert threading.active_count() == before
    assert is_idle(engine)


def test_a_long_prompt_delays_others_by_no_more_than_a_piece(engine, passes):
    short = Request(
        "Count from 12 to 40.",
        GenerationSettings(seed=1, max_denoising_steps=20, stability_threshold=20),
    )
    words = " ".join(["Sort: 6 3 1"] * 20)
    long = Request(
        words,
        GenerationSettings(seed=2, prefill_step_size=8, max_new_tokens=1, max_denoising_steps=9),
    )
    expected = [alone(long), alone(short)]
    passes.clear()
    with held(engine):
        runs = [engine.submit(long), engine.submit(short)]
    assert [list(map(plain, run)) for run in runs] == expected
    kinds = "".join(what[0] for what, _ in passes)  # r and s
    assert kinds.count("r") > 20
    steps = [event[0] for event in expected[1]].count("StepDone")
    beside = kinds[kinds.index("s") :][: 2 * steps]  # while both are there
    assert "rr" not in beside
    assert beside.count("r") > steps - 5


def test_rows_on_the_graph_of_gpus_come_and_go():
    """There a step is built ahead, and may hold the rows that leave."""
    tasks = [REQUESTS[0], REQUESTS[2]]
    with as_on_gpu():
        expected = [alone(task) for task in tasks]
        with Engine(*loaded()) as engine:
            gc.collect()
            with held(engine):
                runs = [engine.submit(task) for task in (LONG, *tasks)]
            next(runs[0])
            next(runs[0])
            runs[0].cancel()
            assert [list(map(plain, run)) for run in runs[1:]] == expected
            assert eventually(lambda: is_idle(engine))


def test_a_row_that_leaves_is_not_held_by_a_step_built_ahead():
    model, _ = loaded()
    with as_on_gpu():
        rows = Rows(model)
        list(rows.advance())
        gc.collect()
        before = mx.get_active_memory()
        settings = GenerationSettings(seed=1, max_denoising_steps=9, stability_threshold=9)
        row = Row(model, settings.resolve(model.config), np.arange(3, 9, dtype=np.int32))
        rows.add(row)
        for _ in range(3):
            list(rows.advance())
        rows.remove(row)
        gc.collect()
        assert not rows.rows
        assert mx.get_active_memory() <= before + 1000
