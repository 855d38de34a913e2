"""`POST /x/events`: a run of any task as a stream of its steps, for the page."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from ..config.generation import GenerationSettings
from ..errors import DiffGemmaError
from ..language.template import Template
from ..write.edit import EditTask, Selection
from ..write.fill import FillTask
from ..write.generate import Request
from .body import Fields, read
from .errors import ApiError, from_error
from .forms import form_of
from .limits import check_choices, check_length, check_schema
from .openai_chat import ChatRequest
from .openai_chat import asked_of as asked_of_chat
from .page_settings import settings_from
from .runs import SEEDS, beside, settings_of, start
from .sse import Stream, attended
from .state import State
from .steps import AskedSteps, StepWire
from .structured import ConstraintField, extension, json_schema

# What the model is told of a place without an instruction.
FILL_IN = "Write what is missing there, so that it fits the text on both sides."
# What it is told of a form.
FORM_PROMPT = "{text}\n\nAnswer with JSON that fits this schema:\n\n{schema}"

Count = Annotated[int, Field(ge=1, le=2**31)]


class FillRequest(Fields):
    """A template to fill."""

    template: str
    prompt: str | None = None


class EditRequest(Fields):
    """A part of a text to rewrite, or a place in it to write at. Places count characters (code
    points)."""

    document: str
    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=0)]
    instruction: str | None = None


class FormRequest(Fields):
    """A JSON object to fill from a text."""

    text: str
    schema_: dict[str, Any] = Field(alias="schema")


class EventsRequest(Fields):
    """The body of a request; one of its tasks is given."""

    chat: ChatRequest | None = None
    fill: FillRequest | None = None
    edit: EditRequest | None = None
    form: FormRequest | None = None
    model: str | None = None
    n: Count = 1
    settings: dict[str, Any] = Field(default={})


Made = Callable[[State, EventsRequest], Awaitable[AskedSteps]]


def routes(state: State) -> list[Route]:
    """Return the route."""

    async def create(request: HttpRequest) -> Response:
        body = await read(request, state.limits, EventsRequest)
        asked = await attended(request.receive, asked_of(state, body))
        return Stream(request, start(state, asked), lambda answers: StepWire(answers, asked))

    return [Route("/x/events", create, methods=["POST"])]


async def asked_of(state: State, body: EventsRequest) -> AskedSteps:
    """Return a checked request; its constraints are compiled.

    Raises:
      ApiError: names what is wrong with it.
    """
    state.model(body.model)
    check_choices(state.limits, body.n)
    tasks: dict[str, Made] = {"chat": _chat, "fill": _fill, "edit": _edit, "form": _form}
    given = [name for name in tasks if getattr(body, name) is not None]
    if len(given) != 1:
        raise ApiError(400, f"there must be one task: {', '.join(tasks)}; got {len(given)}")
    return await tasks[given[0]](state, body)


async def _chat(state: State, body: EventsRequest) -> AskedSteps:
    assert body.chat is not None
    asked = await asked_of_chat(state, body.chat.model_copy(update={"model": body.model}))
    prompt, options, stop, constraint = asked.prompt, asked.options, asked.stop, asked.constraint
    return AskedSteps(
        make=lambda settings: Request(prompt, settings, options, stop, constraint),
        settings=_settings(state, body, asked.settings),
        model=body.model,
        count=body.n,
        one_call=asked.one_call,
        compiles=asked.compiles,
        param="messages",
    )


async def _fill(state: State, body: EventsRequest) -> AskedSteps:
    assert body.fill is not None
    given = body.fill
    template = await beside(state, lambda: Template.parse(given.template), "fill.template")
    await _check_slots(state, template, "fill.template")
    prompt = given.prompt if given.prompt and given.prompt.strip() else None
    return AskedSteps(
        make=lambda settings: FillTask(template=template, prompt=prompt, settings=settings),
        settings=_settings(state, body),
        model=body.model,
        count=body.n,
        param="fill.template",
    )


async def _edit(state: State, body: EventsRequest) -> AskedSteps:
    assert body.edit is not None
    given = body.edit
    if not given.start <= given.stop <= len(given.document):
        length = len(given.document)
        raise ApiError(
            400,
            f"edit: the part from {given.start} to {given.stop} lies outside of the document's "
            f"{length} characters",
            param="edit",
        )
    settings = _settings(state, body)
    told = given.instruction if given.instruction and given.instruction.strip() else None
    canvas = settings.canvas_length or state.model(body.model).canvas_length
    return AskedSteps(
        make=lambda settings: EditTask(
            document=given.document,
            selection=Selection(given.start, given.stop),
            instruction=told or FILL_IN,
            gap_tokens=(1, canvas) if given.start == given.stop else None,
            window_tokens=state.limits.max_fill_tokens,
            settings=settings,
        ),
        settings=settings,
        model=body.model,
        count=body.n,
        compiles=False,
        param="edit",
    )


async def _form(state: State, body: EventsRequest) -> AskedSteps:
    assert body.form is not None
    schema, text = body.form.schema_, body.form.text
    constraint = await json_schema(state, schema, "form.schema")
    shown = json.dumps(schema, ensure_ascii=False)
    told = FORM_PROMPT.replace("{schema}", shown).replace("{text}", text)
    settings = _settings(state, body)
    template = form_of(schema)
    more: dict[str, Any] = {
        "settings": settings,
        "model": body.model,
        "count": body.n,
        "param": "form",
    }
    if template is None:  # the structure is the constraint's alone
        return AskedSteps(
            make=lambda settings: Request(told, settings, constraint=constraint),
            **more,
        )
    await _check_slots(state, template, "form.schema")
    return AskedSteps(
        make=lambda settings: FillTask(template=template, prompt=told, settings=settings),
        check=constraint.accepts,
        **more,
    )


async def _check_slots(state: State, template: Template, param: str) -> None:
    """Refuse too many slots, and those whose expressions or schemas pass the server's bounds."""
    check_length(template.slots, state.limits.max_parts, param)
    for slot in template.slots:
        if slot.kind == "json":
            await json_schema(state, json.loads(slot.schema), param)
        elif slot.kind == "match":
            await extension(state, ConstraintField(regex=slot.pattern), param)
        elif slot.kind == "one of":
            check_schema(state.limits, list(slot.options), param)


def _settings(
    state: State, body: EventsRequest, base: GenerationSettings | None = None
) -> GenerationSettings:
    """Return the settings of a run, with a seed: the page shows it."""
    base = base or settings_of(state, max_tokens=None)
    try:
        own = settings_from(body.settings, state.model(body.model))
        settings = replace(base, **own)
        if settings.seed is None:
            settings = replace(settings, seed=secrets.randbits(32) % SEEDS)
        return settings
    except DiffGemmaError as error:
        raise from_error(error, "settings") from error
