"""Objects of OpenAI's responses dialect, and what they mean as messages of the chat template. The
specification is the `openai` package: `openai/types/responses`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from ..config.serving import Limits
from .body import Fields, Many, Texts, checked, refuse
from .errors import ApiError, refused
from .images import Piece, check_images, image_part, joined
from .limits import check_length
from .openai_types import CalledName, Count, Name, Seed, Temperature
from .structured import Tool

_PARAGRAPH = "\n\n"  # between texts of one turn
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
# Types of content that cannot be read -> why.
_MEDIA = {
    "input_image": "images are read in the user's messages and in outputs",
    "input_file": "files are not read; put their text into the message",
    "input_audio": "this model reads no audio",
}
# Tools that OpenAI's servers or clients offer beside declared ones. Codex sends them with every
# request; the model is not told of them, so that it never calls them.
_UNTOLD = ("web_search", "image_generation", "tool_search")


class Part(Fields):
    """A part of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None  # of an input_image, whose `detail` is ignored
    file_id: str | None = None


Content = str | Many[Part]


class Item(Fields):
    """An item of the input, of any type."""

    type: str | None = None  # a message may leave it out
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    summary: Many[Part] | None = None
    call_id: str | None = None
    name: CalledName | None = None
    namespace: str | None = None
    arguments: str | None = None  # of a function_call
    input: str | None = None  # of a custom_tool_call
    output: Content | None = None


class Grammar(Fields):
    """The form of a custom tool's input."""

    type: str
    syntax: str | None = None
    definition: str | None = None


class ToolField(Fields):
    """A tool of any type."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: Grammar | None = None  # of a custom tool
    tools: Many[ToolField] | None = None  # of a namespace


class NamedTool(Fields):
    """A tool that a choice names."""

    type: str
    name: Name | None = None
    namespace: str | None = None


class ToolChoice(NamedTool):
    """A tool that must be called, or those that may be."""

    mode: Literal["auto", "required"] | None = None
    tools: Many[NamedTool] | None = None


class Format(Fields):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextField(Fields):
    """The form of the text; `verbosity` is ignored."""

    format: Format | None = None


class Reasoning(Fields):
    """How much the model thinks; whether thoughts are told is no choice."""

    effort: str | None = None
    summary: str | None = None


class Counted(Fields):
    """The body of a request for the number of its tokens."""

    model: str | None = None
    input: str | Many[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Many[ToolField] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextField | None = None
    # Known fields that cannot be honoured.
    conversation: Any = None
    truncation: Any = None

    def refuse_unsupported(self) -> None:
        """Refuse fields that cannot be honoured, unless they ask for nothing.

        Raises:
          ApiError: names the field.
        """
        refuse(self.conversation, (), "conversation", "use previous_response_id")
        refuse(self.truncation, ("disabled",), "truncation", "nothing is left out of a prompt")


class ResponsesRequest(Counted):
    """The body of a request for a response."""

    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    metadata: Texts | None = None
    include: Many[str] | None = None
    seed: Seed | None = None  # not OpenAI's
    # Known fields that cannot be honoured.
    top_p: Any = None
    top_logprobs: Any = None
    background: Any = None
    prompt: Any = None
    moderation: Any = None
    context_management: Any = None

    def refuse_unsupported(self) -> None:
        """As `Counted`."""
        super().refuse_unsupported()
        draws = "tokens are not drawn one by one; use temperature"
        refuse(self.top_p, (1, 1.0), "top_p", draws)
        refuse(self.top_logprobs, (0,), "top_logprobs", "a canvas has no true log-probabilities")
        refuse(self.background, (False,), "background", "a response ends with its connection")
        refuse(self.prompt, (), "prompt", "the server keeps no prompts")
        refuse(self.moderation, (), "moderation", "the server moderates nothing")
        refuse(self.context_management, ([],), "context_management", "nothing is compacted")
        if "message.output_text.logprobs" in (self.include or ()):
            raise refused("include", "a canvas has no true log-probabilities")


@dataclass(frozen=True)
class Called:
    """What a client knows a tool by."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass
class Tools:
    """A request's tools.

    Attributes:
      told: as the model is told of them.
      called: name of each there -> what the client knows it by.
      grammars: names of custom tools whose input has a grammar.
    """

    told: list[Tool] = field(default_factory=list)
    called: dict[str, Called] = field(default_factory=dict)
    grammars: set[str] = field(default_factory=set)

    def name_of(self, choice: NamedTool, param: str) -> str:
        """Return the name that the model knows a chosen tool by.

        Raises:
          ApiError: if no declared tool is meant.
        """
        if choice.type not in ("function", "custom") or choice.name is None:
            raise refused(param, "it is none, auto, required, a function, or a custom tool")
        wanted = Called(choice.name, choice.namespace, choice.type == "custom")
        for name, called in self.called.items():
            if called == wanted:
                return name
        raise ApiError(400, f"{param} names {choice.name!r}, which is not in tools", param=param)


def told_name(name: str, namespace: str | None) -> str:
    """Return the name that the model knows a tool by."""
    if not namespace:
        return name
    return f"{namespace}{'' if namespace.endswith('__') else '__'}{name}"


def tools_of(given: Iterable[ToolField] | None) -> Tools:
    """Return a request's tools.

    Raises:
      ApiError: for a tool that clients do not run.
    """
    tools = Tools()
    _add_tools(tools, given or (), "tools", None)
    return tools


def _add_tools(tools: Tools, given: Iterable[ToolField], param: str, namespace: str | None) -> None:
    for number, each in enumerate(given):
        where = f"{param}[{number}]"
        if each.type.startswith(_UNTOLD):
            continue
        if each.type not in ("function", "custom", "namespace"):
            raise refused(where, f"{each.type[:50]}: the server runs no tools; declare a function")
        if each.name is None:
            raise ApiError(400, f"{where}.name is missing", param=f"{where}.name")
        if each.type == "namespace":
            if namespace is not None:
                raise refused(where, "a namespace in a namespace")
            _add_tools(tools, each.tools or (), f"{where}.tools", each.name)
            continue
        name = told_name(each.name, namespace)
        tools.told.append(_custom(each, name) if each.type == "custom" else _function(each, name))
        tools.called[name] = Called(each.name, namespace, each.type == "custom")
        if each.format is not None and each.format.type != "text":
            tools.grammars.add(name)


def _function(given: ToolField, name: str) -> Tool:
    return Tool(
        name=name,
        description=given.description or "",
        parameters=given.parameters,
        strict=bool(given.strict),
    )


def _custom(given: ToolField, name: str) -> Tool:
    """Return a tool whose one argument is a text."""
    texts = [given.description or ""]
    if given.format is not None and given.format.definition:
        syntax = given.format.syntax or "given"
        texts.append(f"The input has this {syntax} grammar:\n{given.format.definition}")
    return Tool(
        name=name,
        description=_PARAGRAPH.join(filter(None, texts)),
        parameters={
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        },
    )


def messages_of(
    body: Counted, before: list[dict[str, Any]], limits: Limits
) -> list[dict[str, Any]]:
    """Return a request's messages as the chat template reads them, without its instructions.

    Args:
      body: the request.
      before: the messages of the response that it follows.
      limits: of their number and parts.

    Raises:
      ApiError: names the item and the field that cannot be used.
    """
    reader = _Reader(before, limits)
    if isinstance(body.input, str):
        reader.add("user", body.input)
    else:
        check_length(body.input, limits.max_messages, "input")
        for number, item in enumerate(body.input or ()):
            reader.read(item, f"input[{number}]")
    reader.end()
    if not reader.messages:
        raise ApiError(400, "input is empty", param="input")
    check_images(reader.messages, limits, "input")
    check_length(reader.messages, limits.max_messages, "input")
    if reader.messages[-1].get("tool_calls"):
        raise ApiError(400, "input: the last call has no output behind it", param="input")
    return reader.messages


def messages_after(
    messages: list[dict[str, Any]], output: list[dict[str, Any]], limits: Limits
) -> list[dict[str, Any]]:
    """Return messages with those of the items of an output behind them."""
    reader = _Reader(messages, limits)
    for number, item in enumerate(output):
        reader.read(checked(Item, item), f"output[{number}]")
    reader.end()
    return reader.messages


def with_instructions(
    messages: list[dict[str, Any]], instructions: str | None
) -> list[dict[str, Any]]:
    """Return messages behind a request's instructions; system messages at the beginning are one."""
    texts, rest = [instructions or ""], list(messages)
    while rest and rest[0]["role"] == "system":
        texts.append(rest.pop(0)["content"])
    text = _PARAGRAPH.join(filter(None, texts))
    return [{"role": "system", "content": text}, *rest] if text else rest


class _Reader:
    """Turns items into messages of the template, one after the other."""

    def __init__(self, before: list[dict[str, Any]], limits: Limits) -> None:
        self.messages = list(before)
        self._limits = limits
        self._thought = ""  # of the calls that follow
        self._seen: list[Piece] = []  # images of outputs, for the user's turn behind these
        self._calls = {call["id"] for each in before for call in each.get("tool_calls", ())}

    def read(self, item: Item, param: str) -> None:
        kind = item.type or ("message" if item.role else "item_reference")
        if not kind.endswith("_output"):
            self.end()
        if kind == "message":
            self._message(item, param)
        elif kind == "reasoning":
            content = item.content or ""
            texts = [self._text(content, f"{param}.content")]
            texts.append(self._text(item.summary or "", f"{param}.summary"))
            self._thought = next(filter(None, texts), "")
        elif kind in ("function_call", "custom_tool_call"):
            self._call(item, kind, param)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._output(item, param)
        else:
            raise refused(param, f"{kind[:50]}: items are messages, reasoning, calls and outputs")

    def end(self) -> None:
        """Add the images of outputs; chat templates write an output as text."""
        if self._seen:
            self.messages.append({"role": "user", "content": joined(self._seen, _PARAGRAPH)})
            self._seen = []

    def add(self, role: str, content: str | list[dict[str, Any]]) -> None:
        self._thought = ""
        self.messages.append({"role": role, "content": content})

    def _message(self, item: Item, param: str) -> None:
        _check_given(item, ("role", "content"), param)
        role = "system" if item.role == "developer" else str(item.role)
        pieces = self._pieces(item.content or "", f"{param}.content", with_images=role == "user")
        thought = self._thought  # text may stand between a thought and its calls
        self.add(role, joined(pieces, _PARAGRAPH))
        if role == "assistant":
            self._thought = thought

    def _call(self, item: Item, kind: str, param: str) -> None:
        value = "arguments" if kind == "function_call" else "input"
        _check_given(item, ("call_id", "name", value), param)
        arguments: Any = {"input": item.input}
        if kind == "function_call":
            try:
                arguments = json.loads(item.arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
            if not isinstance(arguments, dict):
                where = f"{param}.arguments"
                raise ApiError(400, f"{where} is not the text of a JSON object", param=where)
        assert item.name is not None and item.call_id is not None
        function = {"name": told_name(item.name, item.namespace), "arguments": arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        self._calls.add(item.call_id)
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": ""}
        else:
            self.messages.pop()
        calls = [*last.get("tool_calls", ()), call]
        thought = last.get("reasoning") or self._thought
        more = {"reasoning": thought} if thought else {}
        self.messages.append({**last, "tool_calls": calls, **more})
        self._thought = ""

    def _output(self, item: Item, param: str) -> None:
        _check_given(item, ("call_id", "output"), param)
        if item.call_id not in self._calls:
            where = f"{param}.call_id"
            raise ApiError(400, f"{where}: no call before it has this id", param=where)
        pieces = self._pieces(item.output or "", f"{param}.output", with_images=True)
        text = _PARAGRAPH.join(piece for piece in pieces if isinstance(piece, str) and piece)
        self._seen += [piece for piece in pieces if not isinstance(piece, str)]
        self.messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})

    def _text(self, content: Content, param: str) -> str:
        pieces = self._pieces(content, param, with_images=False)
        return _PARAGRAPH.join(filter(None, map(str, pieces)))

    def _pieces(self, content: Content, param: str, *, with_images: bool) -> list[Piece]:
        if isinstance(content, str):
            return [content]
        check_length(content, self._limits.max_parts, param)
        pieces: list[Piece] = []
        for number, part in enumerate(content):
            where = f"{param}[{number}]"
            if part.type == "input_image" and with_images:
                pieces.append(image_part(part.image_url, f"{where}.image_url", self._limits))
                continue
            if part.type in _MEDIA:
                raise refused(where, f"{part.type}: {_MEDIA[part.type]}")
            text = part.refusal if part.type == "refusal" else part.text
            if part.type not in (*_TEXTS, "refusal") or text is None:
                raise ApiError(
                    400,
                    f"{where}: a part is an input_text or output_text with a text, or an "
                    "input_image, got "
                    f"{part.type[:50]!r}",
                    param=where,
                )
            pieces.append(text)
        return pieces


def _check_given(item: Item, names: tuple[str, ...], param: str) -> None:
    for name in names:
        if getattr(item, name) is None:
            raise ApiError(400, f"{param}.{name} is missing", param=f"{param}.{name}")
