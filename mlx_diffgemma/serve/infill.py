"""llama.cpp's `POST /infill`, which llama.vim and llama.vscode ask."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .body import Fields, Many, read, refuse
from .fills import AskedFill
from .limits import check_choices, check_length, check_stops
from .openai_types import Seed, Temperature
from .runs import Answers, Written, settings_of, start
from .sse import answer
from .state import State

Milliseconds = Annotated[float, Field(ge=0, le=1e9)]


class Extra(Fields):
    """A piece of another file."""

    text: str = ""
    filename: str = ""


class InfillRequest(Fields):
    """The body of a request; llama.cpp's further fields for sampling are ignored."""

    model: str | None = None
    input_prefix: str = ""
    input_suffix: str = ""
    prompt: str = ""  # the line up to the cursor
    input_extra: Many[Extra] = Field(default=[])
    n_predict: Annotated[int, Field(ge=-1, le=2**31)] = -1
    n_indent: Annotated[int, Field(ge=0, le=10_000)] = 0
    n_cmpl: Annotated[int, Field(ge=1)] = 1
    t_max_prompt_ms: Milliseconds = 0  # 0: as long as it takes
    t_max_predict_ms: Milliseconds = 0
    temperature: Temperature | None = None
    seed: Seed | None = None
    stop: Many[str] = Field(default=[])
    stream: bool = False


def routes(state: State) -> list[Route]:
    """Return the dialect's routes."""

    async def infill(request: Request) -> Response:
        body = await read(request, state.limits, InfillRequest)
        served = state.model(body.model)
        refuse(body.stream, (False,), "stream", "the answer comes at once")
        if body.n_predict == 0:  # an editor warms a cache; the prompt will differ from this one
            return JSONResponse(_object(Written(), None, served.name))
        asked = asked_of(state, body)
        return await answer(
            request,
            start(state, asked),
            completion,
            read_seconds=body.t_max_prompt_ms / 1e3 or None,
            write_seconds=body.t_max_predict_ms / 1e3 or None,
        )

    return [Route("/infill", infill, methods=["POST"])]


def asked_of(state: State, body: InfillRequest) -> AskedFill:
    """Return a checked request.

    Raises:
      ApiError: names what is wrong with it.
    """
    limits = state.limits
    check_choices(limits, body.n_cmpl, "n_cmpl")
    check_length(body.input_extra, limits.max_parts, "input_extra")
    seed = None if body.seed == -1 else body.seed  # llama.cpp's -1 is a fresh one
    return AskedFill(
        before=body.input_prefix + body.prompt,
        after=body.input_suffix,
        files=[(each.filename, each.text) for each in body.input_extra],
        prompt=state.fill_prompt,
        settings=settings_of(state, max_tokens=None, temperature=body.temperature, seed=seed),
        window=limits.max_fill_tokens,
        most=None if body.n_predict < 0 else body.n_predict,
        indent=body.n_indent,
        stop=check_stops(limits, body.stop),
        model=body.model,
        count=body.n_cmpl,
        drafts=bool(body.t_max_predict_ms or body.t_max_prompt_ms),
        param="input_prefix",
    )


def completion(written: list[Written], answers: Answers) -> Any:
    """Return the object of an answer, or the list of several."""
    made = [_object(each, answers, answers.served.name) for each in written]
    return made[0] if len(made) == 1 else made


def _object(written: Written, answers: Answers | None, model: str) -> dict[str, Any]:
    finished = written.finished
    usage = answers.usage if answers is not None else None
    tokens = finished.new_tokens if finished is not None else 0
    seconds = usage.seconds - usage.prefill_seconds if usage is not None else 0.0
    return {
        "content": written.text,
        "model": model,
        "stop": True,
        "tokens_predicted": tokens,
        "tokens_cached": usage.cached_tokens if usage is not None else 0,
        "tokens_evaluated": usage.prompt_tokens if usage is not None else 0,
        "truncated": written.is_shortened,
        "timings": {
            "prompt_n": usage.prompt_tokens - usage.cached_tokens if usage is not None else 0,
            "prompt_ms": round(1e3 * usage.prefill_seconds, 1) if usage is not None else 0.0,
            "predicted_n": tokens,
            "predicted_ms": round(1e3 * seconds, 1),
            "predicted_per_second": round(tokens / seconds, 1) if seconds > 0 else 0.0,
        },
    }
