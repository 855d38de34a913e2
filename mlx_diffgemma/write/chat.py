"""A conversation: messages as the chat template wants them, and answers that continue it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..checkpoint.memory import recommended_bytes
from ..config.generation import GenerationSettings
from ..config.images import ImageSettings
from ..constraint.constraint import Constraint
from ..denoise.store import Store
from ..errors import ChatError
from ..events import Event, ToolCall
from ..language.encoded import ImageForm
from ..language.prompt import PromptOptions
from ..language.stops import stop_strings
from ..language.tokenizer import declaration_of
from ..language.tools import declared
from ..model import DiffusionGemma
from .chat_file import SavedChat, read_chat, text_of, write_chat
from .chat_images import ChatImages, is_part
from .generate import Request
from .job import Job, Task, refuse_other, run_jobs
from .said import Said

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer

# For the contexts of a chat: at the shapes of the 26B model, 32K tokens and six snapshots of them.
_STORE_BYTES = 2_000_000_000
_STORE_SHARE = 8  # at most this part of the memory that the device recommends
_SEEDS = 2**63

Message = dict[str, Any]


class Running(Protocol):
    """A task under way in an engine."""

    def __iter__(self) -> Iterator[Any]: ...
    def cancel(self) -> None: ...


@runtime_checkable
class Runner(Protocol):
    """What runs tasks, such as an engine."""

    model: Any
    tokenizer: Any

    def submit(self, task: Task) -> Running: ...


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn as a task; `progress` is told how much of the prompt is read."""

    request: Request
    progress: Callable[[int, int], None] | None

    def job(self, model: DiffusionGemma, tokenizer: Any) -> Job[Event]:
        return self.request.job(model, tokenizer, progress=self.progress)


def chat_store(
    folder: str | os.PathLike[str] | None = None, folder_bytes: int | None = None
) -> Store:
    """Return a store as large as chats need, that keeps contexts in a folder too if one is given.

    Raises:
      ConfigError: if the folder cannot be used.
    """
    max_bytes = max(1, min(_STORE_BYTES, recommended_bytes() // _STORE_SHARE))
    return Store(max_bytes, folder=folder, folder_bytes=folder_bytes)


class Chat:
    """A conversation with a model.

    `send` and its like yield the events of `stream_generate`. If such a stream is closed early, the
    answer so far stays in the conversation; if there is none yet, or an error comes first, the
    conversation is what it was before.
    """

    def __init__(
        self,
        model_or_engine: Any,
        tokenizer: AnyTokenizer | None = None,
        *,
        system_prompt: str | None = None,
        tools: Sequence[Any] = (),
        thinking: bool = False,
        stop: str | Sequence[str] = (),
        settings: GenerationSettings = GenerationSettings(),
        image_settings: ImageSettings = ImageSettings(),
        store: Store | None = None,
        prompt_progress_callback: Callable[[int, int], None] | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
          model_or_engine: a model from `load`, or an `Engine`, which several chats may share.
          tokenizer: from `load`; an engine has its own.
          system_prompt: text that the template puts before the conversation.
          tools: as in `PromptOptions`.
          thinking: let the model think before it answers.
          stop: as in `generate`.
          settings: how to denoise. With a seed, answer n (from 0) is drawn under seed + n.
          image_settings: how images become tokens.
          store: where contexts are kept; an engine has its own. By default of 2 GB, or an eighth
            of the device's memory where that is less.
          prompt_progress_callback: called with (places read, places in all) by the thread that
            runs the model.

        Raises:
          DiffGemmaError: if the arguments contradict each other, or cannot be used.
        """
        self._engine: Runner | None = None
        if isinstance(model_or_engine, Runner):
            if tokenizer is not None or store is not None:
                raise ChatError("an engine has its own tokenizer and store; give neither")
            self._engine = model_or_engine
            model_or_engine, tokenizer = self._engine.model, self._engine.tokenizer
        elif tokenizer is None:
            raise ChatError("a chat needs model and tokenizer, both from load, or an engine")
        elif store is None:
            store = chat_store()
        self.store = store
        self.system_prompt, self.thinking = system_prompt, thinking
        self.tools = tuple(declared(declaration_of(tool)) for tool in tools)
        self.stop = stop_strings(stop)
        self._model, self._tokenizer = model_or_engine, tokenizer
        self._progress = prompt_progress_callback
        self.settings = settings
        made = "ImageSettings(image_tokens=560)"
        refuse_other("image_settings", image_settings, ImageSettings, made)
        self._images = ChatImages(ImageForm.of(model_or_engine.config), image_settings)
        self._messages: list[Message] = []
        self._unsent: list[Message] | None = None  # a conversation that got no answer
        self._answers = 0
        self._is_writing = False

    @property
    def settings(self) -> GenerationSettings:
        """How the next answers are denoised. Settings that cannot be used are refused when they are
        set."""
        return self._settings

    @settings.setter
    def settings(self, settings: GenerationSettings) -> None:
        refuse_other("settings", settings, GenerationSettings, "GenerationSettings(seed=7)")
        settings.resolve(self._model.config)
        self._settings = settings

    @property
    def messages(self) -> list[Message]:
        """A copy of the conversation, without the system prompt."""
        return copy.deepcopy(self._messages)

    @property
    def turns(self) -> list[str]:
        """The texts of the user's messages."""
        return [text_of(m) for m in self._messages if m["role"] == "user"]

    @property
    def unsent(self) -> str | None:
        """The message that got no answer, if it was the last one; `retry` sends it again."""
        return None if self._unsent is None else text_of(self._unsent[-1])

    @property
    def open_calls(self) -> list[ToolCall]:
        """The tool calls that wait for a result."""
        answered = set()
        for message in reversed(self._messages):
            if message["role"] == "tool":
                answered.add(message["tool_call_id"])
                continue
            return [
                ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in message.get("tool_calls", [])
                if call["id"] not in answered
            ]
        return []

    def image(self, source: Any) -> Message:
        """Return an image as a part of a message, for `send`. It is read and checked now; the
        conversation keeps the file's bytes, so that saved chats need no other files.

        Args:
          source: a path, bytes of a file, a Pillow image, an array or a `data:` URL.

        Raises:
          DiffGemmaError: if the model reads no images, or this one cannot be read.
        """
        return self._images.part(source)

    def send(
        self, text: str, *, images: Sequence[Any] = (), constraint: Constraint | None = None
    ) -> Generator[Event, None, None]:
        """Send a message and yield the answer's events.

        Args:
          text: the message.
          images: sources as `image` takes them, or what it returned; they stand before the text.
          constraint: what this answer must be, as in `generate`. `Constraint.tool_call(chat.tools)`
            makes it a call of one of the chat's tools.

        Raises:
          DiffGemmaError: if the message, the settings or the constraint cannot be used, or a tool's
            result is missing.
        """
        self._check_calls()
        self._check_idle()
        parts = [part if is_part(part) else self.image(part) for part in images]
        yield from self._say(self._messages, text, constraint, parts)

    def resume(self, *, constraint: Constraint | None = None) -> Generator[Event, None, None]:
        """Let the model go on behind the results of its tool calls; yield the events.

        Args:
          constraint: as in `send`.

        Raises:
          DiffGemmaError: if a result is missing, or there is none.
        """
        self._check_calls()
        if not self._messages or self._messages[-1]["role"] != "tool":
            raise ChatError("there is no tool's result to go on from; send a message")
        yield from self._answer(self._messages, constraint)

    def answer_tool(self, call: ToolCall | str, result: Any) -> None:
        """Add the result of a tool call to the conversation; `resume` goes on once all are there.

        Args:
          call: the call, or its id.
          result: text, or anything that JSON can hold.

        Raises:
          ChatError: if no such call waits for a result, or the result is not made of JSON's types.
        """
        self._check_idle()
        wanted = call if isinstance(call, str) else call.id
        waiting = {each.id: each for each in self.open_calls}
        if wanted not in waiting:
            those = ", ".join(waiting) or "none does"
            raise ChatError(f"no tool call {wanted!r} waits for a result; those that do: {those}")
        if not isinstance(result, str):
            try:
                result = json.dumps(result, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                problem = f"the result of {wanted} is not made of JSON's types: {error}"
                raise ChatError(problem) from error
        name = waiting[wanted].name
        message = {"role": "tool", "tool_call_id": wanted, "name": name, "content": result}
        self._messages, self._unsent = [*self._messages, message], None

    def undo(self) -> str:
        """Remove the last message and its answer, or the last one that could not be answered;
        return the message.

        Raises:
          ChatError: if there is none.
        """
        self._check_idle()
        if (unsent := self.unsent) is not None:
            self._unsent = None
            return unsent
        start = self._start_of(len(self.turns))
        text = text_of(self._messages[start])
        self._messages = self._messages[:start]
        return text

    def retry(self, *, constraint: Constraint | None = None) -> Generator[Event, None, None]:
        """Answer the last message again; if it could not be answered, send it again.

        Args:
          constraint: as in `send`; that of the first try does not hold.

        Raises:
          DiffGemmaError: as `send`, or if there is no message.
        """
        if self._unsent is not None:
            yield from self._answer(self._unsent, constraint)
        else:
            turns = self.turns
            yield from self.edit(len(turns), turns[-1] if turns else "", constraint=constraint)

    def edit(
        self, number: int, text: str, *, constraint: Constraint | None = None
    ) -> Generator[Event, None, None]:
        """Replace a message's text, drop all that came after it, and yield the events of its
        answer.

        Args:
          number: of the user's messages, from 1.
          text: the new message.
          constraint: as in `send`.

        Raises:
          DiffGemmaError: as `send`, or if there is no such message.
        """
        start = self._start_of(number)
        content = self._messages[start]["content"]
        kept = [] if isinstance(content, str) else [p for p in content if p["type"] != "text"]
        answer = self._messages[start + 1 : start + 2]
        # The same message is sent again for another answer.
        is_warm = self._settings.warm_start and answer and text != text_of(self._messages[start])
        stands = answer[0].get("content") if is_warm else None
        yield from self._say(self._messages[:start], text, constraint, kept, stands)

    def reseed(self, seed: int | None) -> None:
        """Draw answers under another seed from now on, and count them from 0 again.

        Raises:
          ConfigError: if it is no seed.
        """
        self._check_idle()
        self.settings = replace(self.settings, seed=seed)
        self._answers = 0

    def reset(self) -> None:
        """Forget the conversation; system prompt, tools and settings stay."""
        self._check_idle()
        self._messages, self._unsent, self._answers = [], None, 0
        self._images.forget()

    def save(self, file: str | Path) -> None:
        """Write conversation, system prompt, tools and settings to a JSON file.

        Raises:
          DiffGemmaError: if it cannot be written, or would replace a file that is no saved chat.
        """
        self._check_idle()
        saved = SavedChat(
            messages=self._messages,
            settings=self._settings,
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            tools=self.tools,
            stop=self.stop,
            answers=self._answers,
        )
        write_chat(Path(file), saved)

    def load(self, file: str | Path) -> None:
        """Continue the conversation in a file that `save` wrote; it replaces this one.

        Raises:
          DiffGemmaError: if it is no saved chat, or this model cannot use its settings. The
            conversation is then what it was.
        """
        self._check_idle()
        saved = read_chat(Path(file))
        tools, stop = tuple(map(declared, saved.tools)), stop_strings(saved.stop)
        self.settings = saved.settings
        self.system_prompt, self.thinking = saved.system_prompt, saved.thinking
        self.tools, self.stop = tools, stop
        self._messages, self._unsent, self._answers = saved.messages, None, saved.answers

    def _start_of(self, number: int) -> int:
        """Return the place of a user's message."""
        places = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        if not places:
            raise ChatError("the conversation has no message yet")
        if not 1 <= number <= len(places):
            raise ChatError(f"there is no message {number}; they are numbered 1 to {len(places)}")
        return places[number - 1]

    def _say(
        self,
        before: list[Message],
        text: str,
        constraint: Constraint | None,
        images: Sequence[Message],
        standing: str | None = None,
    ) -> Generator[Event, None, None]:
        self._check_idle()
        if not isinstance(text, str) or not text.strip():
            raise ChatError(f"a message is text and not empty, got {text!r}")
        past = [{k: v for k, v in m.items() if k != "reasoning"} for m in before]
        content = [*images, {"type": "text", "text": text}] if images else text
        message: Message = {"role": "user", "content": content}
        yield from self._answer([*past, message], constraint, standing)

    def _answer(
        self, messages: list[Message], constraint: Constraint | None, standing: str | None = None
    ) -> Generator[Event, None, None]:
        """Answer the messages, which become the conversation once something is said to them."""
        self._check_idle()
        said, is_sent = Said(), messages[-1]["role"] == "user"
        self._is_writing = True
        try:
            with closing(self._events(self._turn(messages, constraint, standing))) as events:
                for event in events:
                    said.observe(event)
                    yield event
        finally:
            self._is_writing = False
            if said.counts:
                self._messages, self._unsent = [*messages, *said.messages()], None
                self._answers += 1
            elif is_sent:
                self._unsent = messages

    def _turn(
        self, messages: list[Message], constraint: Constraint | None, standing: str | None
    ) -> _Turn:
        settings = self._settings
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + self._answers) % _SEEDS)
        options = PromptOptions(
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            tools=self.tools,
            images=self._images.settings,
        )
        messages = self._images.in_place(messages)
        request = Request(messages, settings, options, self.stop, constraint, standing)
        return _Turn(request, self._progress)

    def _events(self, turn: _Turn) -> Generator[Event, None, None]:
        if self._engine is None:
            job = turn.job(self._model, self._tokenizer)
            for _, event in run_jobs(self._model, [job], self.store):
                yield event
            return
        run = self._engine.submit(turn)
        try:
            yield from run
        finally:
            run.cancel()

    def _check_idle(self) -> None:
        if self._is_writing:
            raise ChatError("an answer is being written; read its events to the end, or close them")

    def _check_calls(self) -> None:
        if waiting := self.open_calls:
            raise ChatError(
                f"the tool call {waiting[0].id} ({waiting[0].name}) waits for its result; give it "
                "with answer_tool, then resume"
            )
