"""Objects of Anthropic's dialect, and what they mean as messages of the chat template. The
specification is the `anthropic` package: `anthropic/types`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from ..config.serving import Limits
from .body import Fields, Many, refuse
from .errors import ApiError, refused
from .images import Piece, check_images, image_part, joined
from .limits import check_length
from .openai_types import CalledName, Count, Name, Seed
from .structured import Tool

Temperature = Annotated[float, Field(ge=0, le=1)]
# Claude Code begins its system prompt with this line, which differs in every request, so that no
# context could be used again.
_BILLING = "x-anthropic-billing-header:"
_PARAGRAPH = "\n\n"  # between blocks of text
# Types of blocks that cannot be read -> why.
_REFUSED = {
    "image": "images are read in the user's messages and in the results of tools",
    "document": "documents are not read; put their text into the message",
    "container_upload": "the server keeps no files",
    "server_tool_use": "the server runs no tools",
}


class Source(Fields):
    """Where an image is."""

    type: str | None = None
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Block(Fields):
    """A block of content, of any type."""

    type: str
    source: Source | None = None  # of an image
    text: str | None = None
    thinking: str | None = None
    id: str | None = None  # of a tool_use
    name: CalledName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None  # of a tool_result
    content: str | Many[Block] | None = None
    is_error: bool | None = None


Content = str | Many[Block]


class Message(Fields):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ToolField(Fields):
    """A tool that the client runs."""

    name: Name
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Fields):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Fields):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None
    display: str | None = None


class OutputFormat(Fields):
    """What the answer must be."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    """The form of the answer; `effort` is ignored."""

    format: OutputFormat | None = None


class Counted(Fields):
    """The body of a request for the number of its tokens."""

    model: str
    messages: Many[Message]
    system: Content | None = None
    tools: Many[ToolField] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its name before output_config
    # Known fields that cannot be honoured.
    mcp_servers: Any = None
    container: Any = None

    def refuse_unsupported(self) -> None:
        """Refuse fields that cannot be honoured, unless they ask for nothing.

        Raises:
          ApiError: names the field.
        """
        refuse(self.mcp_servers, ([],), "mcp_servers", "the server runs no tools")
        refuse(self.container, (), "container", "the server runs no code")
        if self.thinking and self.thinking.type == "between_tools":
            raise refused("thinking.type", "it is enabled, adaptive or disabled")


class MessagesRequest(Counted):
    """The body of a request for a message."""

    max_tokens: Count
    stop_sequences: Many[str] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    seed: Seed | None = None  # not Anthropic's
    # Known fields that cannot be honoured.
    top_p: Any = None
    top_k: Any = None

    def refuse_unsupported(self) -> None:
        """As `Counted`."""
        super().refuse_unsupported()
        draws = "tokens are not drawn one by one; use temperature"
        refuse(self.top_p, (1, 1.0), "top_p", draws)
        refuse(self.top_k, (), "top_k", draws)


@dataclass(frozen=True)
class Conversation:
    """A request's messages.

    Attributes:
      messages: as the chat template reads them.
      prefix: text with which the answer begins, from a last message of the assistant.
    """

    messages: list[dict[str, Any]]
    prefix: str | None = None


def conversation_of(body: Counted, limits: Limits) -> Conversation:
    """Return a request's messages.

    Raises:
      ApiError: names the message and the field that cannot be used.
    """
    check_length(body.messages, limits.max_messages, "messages")
    if not body.messages:
        raise ApiError(400, "messages is empty", param="messages")
    reader = _Reader(limits)
    if body.system is not None:
        reader.add("system", reader.text(body.system, "system"))
    for number, message in enumerate(body.messages):
        reader.read(message, f"messages[{number}]")
    reader.end_turn()
    check_images(reader.messages, limits, "messages")
    messages, last = reader.messages, reader.messages[-1] if reader.messages else {}
    if last.get("tool_calls"):
        raise ApiError(
            400, "messages: the last tool_use has no tool_result behind it", param="messages"
        )
    if last.get("role") == "assistant":
        return Conversation(messages[:-1], last["content"])
    return Conversation(messages)


class _Reader:
    """Turns blocks into messages of the template, one after the other."""

    def __init__(self, limits: Limits) -> None:
        self.messages: list[dict[str, Any]] = []
        self._limits = limits
        self._calls: set[str] = set()  # ids of all tool_use blocks so far
        self._role = ""  # of the turn that goes on
        self._pieces: list[Piece] = []  # of it

    def read(self, message: Message, param: str) -> None:
        if message.role == "assistant":
            self._assistant(message.content, param)
        elif message.role == "system":
            self.add("system", self.text(message.content, f"{param}.content"))
        else:
            self._user(message.content, param)

    def add(self, role: str, *pieces: Piece) -> None:
        """Add texts and images; messages of one role that follow each other are one turn."""
        if not any(pieces):
            return
        if role != self._role:
            self.end_turn()
        self._role = role
        self._pieces += pieces

    def end_turn(self) -> None:
        """Add the message of the turn that goes on."""
        if self._pieces:
            content = joined(self._pieces, _PARAGRAPH)
            self.messages.append({"role": self._role, "content": content})
        self._role, self._pieces = "", []

    def text(self, content: Content, param: str) -> str:
        """Return the text of content that must be text."""
        return self._texts(self._blocks(content, param, ("text",)))

    def _assistant(self, content: Content, param: str) -> None:
        texts, thoughts, calls = [], [], []
        known = ("text", "thinking", "redacted_thinking", "tool_use")
        for block, where in self._blocks(content, f"{param}.content", known):
            if block.type == "text":
                texts.append(block.text or "")
            elif block.type == "thinking":
                thoughts.append(block.thinking or "")
            elif block.type == "tool_use":
                calls.append(self._call(block, where))
        text = _PARAGRAPH.join(filter(None, texts))
        if not calls:
            return self.add("assistant", text)
        made = {"role": "assistant", "content": text, "tool_calls": calls}
        thought = "\n".join(filter(None, thoughts))
        self.end_turn()
        self.messages.append(made | ({"reasoning": thought} if thought else {}))

    def _user(self, content: Content, param: str) -> None:
        pieces: list[Piece] = []
        known = ("text", "image", "tool_result")
        for block, where in self._blocks(content, f"{param}.content", known):
            if block.type == "text":
                pieces.append(block.text or "")
            elif block.type == "image":
                pieces.append(self._image(block, where))
            else:
                message, images = self._result(block, where)
                self.end_turn()
                self.messages.append(message)
                pieces += images
        self.add("user", *pieces)

    def _call(self, block: Block, param: str) -> dict[str, Any]:
        for name, value in (("id", block.id), ("name", block.name), ("input", block.input)):
            if value is None:
                raise ApiError(400, f"{param}.{name} is missing", param=f"{param}.{name}")
        assert block.id is not None
        self._calls.add(block.id)
        function = {"name": block.name, "arguments": block.input}
        return {"id": block.id, "type": "function", "function": function}

    def _result(self, block: Block, param: str) -> tuple[dict[str, Any], list[Piece]]:
        """Return the message of a tool's result, and its images: these stand in the user's turn
        behind it, since chat templates write a result as text."""
        if block.tool_use_id not in self._calls:
            where = f"{param}.tool_use_id"
            raise ApiError(400, f"{where}: no tool_use before it has this id", param=where)
        blocks = self._blocks(block.content or "", f"{param}.content", ("text", "image"))
        images: list[Piece] = [self._image(each, at) for each, at in blocks if each.type == "image"]
        text = self._texts([(each, at) for each, at in blocks if each.type == "text"])
        if block.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}, images

    def _image(self, block: Block, param: str) -> dict[str, Any]:
        source = block.source
        if source is not None and source.type == "url" and self._limits.allow_image_urls:
            return image_part(source.url, f"{param}.source.url", self._limits)
        if source is None or source.type != "base64" or source.data is None:
            where = f"{param}.source"
            kind = "missing" if source is None else f"of type {str(source.type)[:50]!r}"
            raise ApiError(
                400,
                f"{where} is {kind}; an image comes as base64, with media_type and data: this "
                "server fetches no address without --allow-image-urls and keeps no files",
                param=where,
            )
        url = f"data:{source.media_type or ''};base64,{source.data}"
        return image_part(url, param, self._limits)

    def _texts(self, blocks: list[tuple[Block, str]]) -> str:
        texts = (_without_billing(block.text or "") for block, _ in blocks)
        return _PARAGRAPH.join(filter(None, texts))

    def _blocks(
        self, content: Content, param: str, known: tuple[str, ...]
    ) -> list[tuple[Block, str]]:
        """Return blocks with their places; refuse those of other types."""
        if isinstance(content, str):
            return [(Block(type="text", text=content), param)]
        check_length(content, self._limits.max_parts, param)
        placed = [(block, f"{param}[{i}]") for i, block in enumerate(content)]
        for block, where in placed:
            if block.type in known:
                value = {"text": block.text, "thinking": block.thinking}.get(block.type, "")
                if value is None:
                    raise ApiError(
                        400, f"{where}.{block.type} is missing", param=f"{where}.{block.type}"
                    )
                continue
            why = _REFUSED.get(block.type, f"here a block is of type {' or '.join(known)}")
            raise refused(where, f"{block.type[:50]}: {why}")
        return placed


def _without_billing(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING) else text


def tools_of(given: list[ToolField] | None) -> list[Tool]:
    """Return a request's tools.

    Raises:
      ApiError: for one that a client does not run, or that has no schema.
    """
    tools = []
    for number, each in enumerate(given or []):
        where = f"tools[{number}]"
        if each.type not in (None, "custom"):
            raise refused(
                where,
                f"{each.type[:50]}: the server runs no tools, and the model knows none without a "
                "declaration; give name, description and input_schema",
            )
        if each.input_schema is None:
            raise ApiError(400, f"{where}.input_schema is missing", param=f"{where}.input_schema")
        tools.append(
            Tool(
                name=each.name,
                description=each.description or "",
                parameters=each.input_schema,
                strict=bool(each.strict),
            )
        )
    return tools
