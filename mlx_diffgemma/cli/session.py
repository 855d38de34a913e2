"""A chat session: the turns and commands of its lines. An error is one line, and the session goes
on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ..config.entry import entries, kinds
from ..config.generation import GenerationSettings
from ..errors import ChatError, ConfigError, DiffGemmaError, counted
from .constraints import ConstraintOptions
from .interrupt import stopping
from .lines import Lines
from .output import Follower
from .usage import as_given

if TYPE_CHECKING:
    from ..constraint.constraint import Constraint
    from ..events import Event
    from ..view.report import Summary
    from ..write.chat import Chat
    from .render_chat import ChatView

# Command -> its arguments and what it does, for /help.
COMMANDS = {
    "/help": ("", "show this list"),
    "/system": ('[TEXT | ""]', 'show the system prompt, set it, or remove it with ""'),
    "/reset": ("", "forget the conversation"),
    "/undo": ("", "take back the last message and its answer"),
    "/retry": ("", "answer the last message again"),
    "/edit": ("N [TEXT]", "change message N and answer it; what came after it is dropped"),
    "/save": ("FILE", "write the conversation to a file"),
    "/load": ("FILE", "continue the conversation in a file"),
    "/seed": ("[N]", "show the seed, or draw from a new one"),
    "/set": (
        "[NAME [VALUE]]",
        "show settings, or change one; the value default undoes changes",
    ),
    "/constraint": (
        "[KIND [VALUE] | off]",
        "show what answers must be, or set it: json-schema FILE, json-object, regex PATTERN, "
        "choices A,B or tool-call",
    ),
    "/image": ("FILE", "show the model a picture with the next message; several times for several"),
    "/stats": ("", "show numbers of the last answer and of the session"),
    "/quit": ("", "leave; /exit and Ctrl-D do too"),
}
_TYPING = (
    "Alt-Enter begins a new line, and so does Enter behind a backslash. Ctrl-C stops an answer and "
    "keeps what is written so far.",
    "A message that begins with / is written with two: //.",
)
_SHOWN = 60  # characters of a message in a note


@dataclass(slots=True)
class _Totals:
    answers: int = 0
    new_tokens: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    last: Summary | None = None


class Session:
    """Carries out the lines of a chat."""

    def __init__(self, chat: Chat, view: ChatView, lines: Lines, model: Any, tokenizer: Any):
        self._chat, self._view, self._lines = chat, view, lines
        self._model, self._tokenizer = model, tokenizer
        self._totals = _Totals()
        self._bound = ConstraintOptions()
        self._held: Constraint | None = None
        self._held_as = ""
        self._started_with = chat.settings
        self._is_stopping = False
        self._images: list[Any] = []  # that go with the next message
        self.has_failed = False

    def hold(self, options: ConstraintOptions, constraint: Constraint | None) -> None:
        """Hold all further answers to a constraint, if there is one.

        Args:
          options: of which it was made; their layout of JSON is that of /constraint too.
          constraint: of the answers.
        """
        self._bound = options
        self._keep(constraint, " ".join(options.given()))

    def run(self, first: str | None = None) -> None:
        """Carry out all lines, after a first one."""
        if first is not None:
            if self._lines.is_terminal:
                self._view.note(f"> {first}")
            self._do(lambda: self._turn(self._chat.send(first, constraint=self._held)))
        while self._do(self._next):
            pass

    def reading(self, done: int, total: int) -> None:
        """Show the progress of a prompt; Ctrl-C may stop it here."""
        self._view.reading(done, total)
        if self._is_stopping:
            raise KeyboardInterrupt

    def _next(self) -> bool | None:
        calls = self._chat.open_calls
        line = self._lines.read(f"result of {calls[0].name}> " if calls else "> ")
        return False if line is None else self._take(line)

    def _do(self, act: Callable[[], bool | None]) -> bool:
        """Do something; return whether the session goes on."""
        try:
            return act() is not False
        except DiffGemmaError as error:
            self._view.error(str(error))
            self.has_failed = True
        except KeyboardInterrupt:
            if not self._lines.is_terminal:
                raise
            self._view.close()
            self._say_stopped()
        return True

    def _take(self, line: str) -> bool | None:
        """Carry out a line; False ends the session."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            return self._command(*_first_word(text))
        if text.startswith("//"):
            line = text[1:]
        if calls := self._chat.open_calls:
            self._chat.answer_tool(calls[0], line)
            if not self._chat.open_calls:
                self._turn(self._chat.resume(constraint=self._held))
        elif text in ("exit", "quit") and self._lines.is_terminal:
            self._view.note("/quit or Ctrl-D leaves; this word alone is not sent")
        elif text:
            images, self._images = self._images, []
            self._turn(self._chat.send(line, images=images, constraint=self._held))
        return True

    def _command(self, name: str, argument: str) -> bool | None:
        if name in ("/quit", "/exit"):
            return False
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "/help lists them"
            raise ChatError(f"there is no command {name}; {hint}")
        takes, _ = COMMANDS[name]
        if argument and not takes:
            raise ChatError(f"{name} takes nothing behind it, got {argument[:_SHOWN]!r}")
        if not argument and takes and not takes.startswith("["):
            raise ChatError(f"{name} needs {takes}")
        act = getattr(self, f"_{name[1:]}")
        return act(argument) if takes else act()

    def _turn(self, events: Generator[Event, None, None]) -> None:
        """Show an answer while it is written. Ctrl-C in a terminal stops it."""
        from ..events import StepDone
        from ..view.report import Stopwatch

        settings = self._chat.settings.resolve(self._model.config)
        follows = Follower(self._view, self._tokenizer, settings)
        stopwatch, summary, self._is_stopping = Stopwatch(), None, False
        may_stop = stopping(self._ask_stop, b"") if self._lines.is_terminal else nullcontext()
        try:
            with may_stop, closing(events):
                for event in events:
                    summary = stopwatch.observe(event)
                    if isinstance(event, StepDone):
                        follows.step(event)
                    else:
                        self._show(event)
                    if self._is_stopping:
                        break
        finally:
            self._view.close()
        if summary is not None:
            self._finished(summary)
        else:
            self._say_stopped()

    def _ask_stop(self) -> None:
        self._is_stopping = True

    def _show(self, event: Event) -> None:
        """Show an event other than a step."""
        from ..events import BrokenToolCall, PrefillDone, Text, ToolCall

        if isinstance(event, Text):
            (self._view.answer if event.channel == "answer" else self._view.thought)(event.piece)
        elif isinstance(event, ToolCall):
            self._view.remark(f"tool call {event.id}: {event.line()}")
        elif isinstance(event, BrokenToolCall):
            self._view.remark(f"the tool call in this answer is {event.problem}")
        elif isinstance(event, PrefillDone):
            self._totals.read_tokens += event.prompt_tokens - event.cached_tokens
            self._totals.cached_tokens += event.cached_tokens

    def _finished(self, summary: Summary) -> None:
        totals, last = self._totals, self._chat.messages[-1]
        totals.last = summary
        totals.answers += 1
        totals.new_tokens += summary.new_tokens
        self._view.summary(
            f"{counted(summary.new_tokens, 'token')}, {counted(summary.steps, 'step')}, "
            f"{summary.tokens_per_second:.1f} tokens/s"
        )
        for call in self._chat.open_calls:
            self._view.note(f"the next line is the result of {call.id} ({call.name})")
        if not last["content"].strip() and "tool_calls" not in last:
            self._view.note("the answer is empty; /retry draws another one")
        elif summary.reason == "length":
            self._view.note("the answer ends at the limit; /set max_new_tokens N raises it")

    def _say_stopped(self) -> None:
        if self._chat.unsent is not None:
            self._view.note("stopped before there was any text; /retry sends the message again")
        else:
            self._view.note("stopped; what is written so far stays, and /undo takes it back")

    def _help(self) -> None:
        rows = [(f"{name} {takes}", does) for name, (takes, does) in COMMANDS.items()]
        self._view.listing(rows)
        for line in _TYPING:
            self._view.note(line)

    def _system(self, text: str) -> None:
        if text:
            self._chat.system_prompt = None if text in ('""', "''") else text
        shown = self._chat.system_prompt
        self._view.note("no system prompt" if shown is None else f"system prompt: {shown}")

    def _reset(self) -> None:
        self._chat.reset()
        self._images = []
        self._view.note("the conversation is empty")

    def _undo(self) -> None:
        self._view.note(f"took back: {_short(self._chat.undo())}")

    def _retry(self) -> None:
        self._turn(self._chat.retry(constraint=self._held))

    def _edit(self, argument: str) -> None:
        number, text = _first_word(argument)
        if not number.isdecimal():
            raise ChatError(f"/edit needs the number of a message, got {number[:_SHOWN]!r}")
        turns, place = self._chat.turns, int(number)
        if not text:
            if not self._lines.is_terminal:
                raise ChatError("/edit needs N TEXT where there is no terminal")
            if not 1 <= place <= len(turns):
                next(self._chat.edit(place, "x"))  # says which there are
            self._view.note("Enter answers the changed message; Ctrl-C leaves it as it was")
            edited = self._lines.change(f"{place}> ", _typed(turns[place - 1]))
            if not (edited or "").strip():
                self._view.note("nothing is changed")
                return
            text = str(edited)
        if (bare := text.strip()).startswith("//"):
            text = bare[1:]
        elif bare.startswith("/"):
            raise ChatError(
                "nothing is changed: a message that begins with / is written with two, as in "
                f"/{_short(bare)}"
            )
        self._turn(self._chat.edit(place, text, constraint=self._held))

    def _save(self, file: str) -> None:
        self._chat.save(file)
        self._view.note(f"wrote {file}")

    def _load(self, file: str) -> None:
        self._chat.load(file)
        if self._held is not None and self._held.kind == "tool_call":
            self._keep(None, "")
            self._view.note("the constraint to tool calls is off: the tools are others")
        turns = self._chat.turns
        self._view.note(f"loaded {counted(len(turns), 'message')}")
        is_shown = self._lines.is_terminal  # stdout gets new answers alone where it is none
        for number, text in enumerate(turns, 1):
            is_last = is_shown and number == len(turns)
            self._view.note(f"{number}> {text if is_last else _short(text)}")
        if is_shown and turns:
            self._show_last_answer()

    def _show_last_answer(self) -> None:
        """Show what the conversation holds behind the last message of the user."""
        messages = self._chat.messages
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        for message in messages[last + 1 :]:
            if message["role"] == "assistant" and message["content"].strip():
                self._view.answer(message["content"])
                self._view.close()
            for call in message.get("tool_calls", ()):
                self._view.remark(f"tool call {call['id']}: {call['function']['name']}")
            if message["role"] == "tool":
                self._view.remark(f"result: {_short(str(message['content']))}")

    def _seed(self, text: str) -> None:
        if text:
            self._change("seed", text)
        self._show_setting("seed")

    def _set(self, argument: str) -> None:
        given, value = _first_word(argument)
        if not given:
            for name in entries(GenerationSettings):
                if self._is_given(name):
                    self._show_setting(name)
            return
        name = setting_named(given)
        if value:
            try:
                self._change(name, value)
            except ConfigError as error:
                raise ConfigError(as_given(str(error), {name: given})) from error
        self._show_setting(name)

    def _change(self, name: str, text: str) -> None:
        is_back = text == "default"
        value = getattr(self._started_with, name) if is_back else value_of(name, text)
        if name == "seed":
            self._chat.reseed(value)
        else:
            self._chat.settings = replace(self._chat.settings, **{name: value})

    def _is_given(self, name: str) -> bool:
        """Whether a setting has another value than it has where nothing is said of it."""
        default = entries(GenerationSettings)[name].command_default
        return getattr(self._chat.settings, name) not in (None, default)

    def _show_setting(self, name: str) -> None:
        resolved = self._chat.settings.resolve(self._model.config)
        is_drawn = name == "seed" and self._chat.settings.seed is None
        value = "fresh" if is_drawn else getattr(resolved, name)
        self._view.note(f"{name} {value}{' (default)' * (not self._is_given(name))}")

    def _constraint(self, argument: str) -> None:
        kind, value = _first_word(argument)
        if kind == "off":
            self._keep(None, "")
        elif kind:
            self._keep(self._made(kind, value), f"{kind} {_short(value)}".strip())
        shown = self._held_as if self._held is not None else "none"
        self._view.note(f"constraint: {shown}")

    def _made(self, kind: str, value: str) -> Constraint:
        """Return the constraint of a kind, named as its option is, or a call of a tool."""
        from ..constraint.constraint import Constraint

        if kind == "tool-call":
            if value:
                raise ChatError(f"/constraint tool-call takes nothing behind it, got {value!r}")
            if not self._chat.tools:
                raise ChatError("this conversation has no tools to call")
            return Constraint.tool_call(self._chat.tools)
        if value == "-":
            raise ChatError("stdin has the messages; give a file, or the schema itself")
        options = self._bound.instead(kind, value)
        if not kind.startswith("json"):
            options = replace(options, json_compact=False, json_indent=None)
        made = options.constraint(dashes="")
        assert made is not None
        return made

    def _keep(self, constraint: Constraint | None, shown: str) -> None:
        self._held, self._held_as = constraint, shown
        for note in constraint.notes if constraint is not None else ():
            self._view.note(f"note: {note}")

    def _image(self, file: str) -> None:
        self._images.append(self._chat.image(file))
        self._view.note(f"{counted(len(self._images), 'image')} for the next message")

    def _stats(self) -> None:
        totals, store = self._totals, self._chat.store
        if totals.last is None:
            self._view.note("no answer yet")
        else:
            self._view.note(f"last answer: {totals.last.line()}")
        self._view.note(
            f"session: {counted(totals.answers, 'answer')}, "
            f"{counted(totals.new_tokens, 'new token')}, "
            f"{counted(totals.read_tokens, 'prompt token')} read, "
            f"{totals.cached_tokens:,} known already"
        )
        if store is not None:
            kept, most = store.nbytes / 1e6, store.max_bytes / 1e6
            self._view.note(f"contexts: {kept:,.1f} of at most {most:,.0f} MB in memory")
            if on_disk := store.on_disk():
                folder, kept, most = on_disk
                self._view.note(
                    f"contexts: {kept / 1e6:,.1f} of at most {most / 1e6:,.0f} MB in {folder}"
                )


def setting_named(given: str) -> str:
    """Return the setting of a name, spelled as in Python or as an option.

    Raises:
      ChatError: if there is none.
    """
    names: dict[str, str] = {}
    for name, entry in entries(GenerationSettings).items():
        names |= {flag.lstrip("-"): name for flag in entry.flags}
        names |= {name: name, name.replace("_", "-"): name}
    names |= {spelled.replace("-", "_"): name for spelled, name in names.items()}
    wanted = given.lstrip("-")
    if wanted not in names:
        close = difflib.get_close_matches(wanted.replace("-", "_"), names, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; docs/settings.md lists them"
        raise ChatError(f"there is no setting {given[:_SHOWN]!r}{hint}")
    return names[wanted]


def value_of(name: str, text: str) -> Any:
    """Return a setting's value from its text. What cannot be read stays text, which the settings
    refuse."""
    kind = kinds(GenerationSettings)[name]
    if get_origin(kind) is Literal:
        return next((value for value in get_args(kind) if str(value) == text), text)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _first_word(text: str) -> tuple[str, str]:
    """Return a text's first word, and what stands behind it."""
    word, *rest = text.split(maxsplit=1) or [""]
    return word, rest[0].strip() if rest else ""


def _typed(message: str) -> str:
    """Return a message as it is typed: with two / where it begins with one."""
    return f"/{message}" if message.startswith("/") else message


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
