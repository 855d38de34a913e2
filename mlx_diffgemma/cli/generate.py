"""mlx_diffgemma.generate: answer one prompt."""

import json
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings
from ..config.images import ImageSettings
from ..errors import ConfigError, PromptError
from .constraints import ConstraintOptions
from .options import (
    SeeingModelOptions,
    SystemPromptOption,
    command,
    prompt_text,
    refuse_idle_limit,
    run,
    seeded,
    unescape,
)
from .output import Follower, OutputOptions, follower, kept


@dataclass(frozen=True)
class ChatOptions:
    """The options on how the prompt becomes tokens, and on what ends an answer."""

    system_prompt: SystemPromptOption = None
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Let the model think first, on stderr.")
    ] = False
    prefill_response: Annotated[
        str | None, typer.Option(help="Text that the answer begins with.")
    ] = None
    ignore_chat_template: Annotated[
        bool,
        typer.Option(
            "--ignore-chat-template",
            help="Use the prompt as raw text, in which control tokens take effect.",
        ),
    ] = False
    chat_template_config: Annotated[
        str | None, typer.Option(help="More variables for the chat template, a JSON object.")
    ] = None
    allow_special_tokens: Annotated[
        bool,
        typer.Option(
            "--allow-special-tokens",
            help="Control tokens spelled in messages take effect, as in transformers.",
        ),
    ] = False
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="One more end token; may be given several times.")
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text before which the answer ends; \\n and \\t are read as line break and tab. "
            "May be given several times."
        ),
    ] = None

    def variables(self) -> dict[str, Any]:
        """Return the value of --chat-template-config."""
        text = self.chat_template_config
        try:
            value = json.loads(text) if text is not None else {}
        except json.JSONDecodeError as error:
            raise ConfigError(f"--chat-template-config is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"--chat-template-config must be a JSON object, got {text}")
        return value

    def check(self, settings: GenerationSettings) -> None:
        """Refuse options that have no effect.

        Raises:
          ConfigError: if there is one.
        """
        variables = self.variables()
        if self.ignore_chat_template:
            of_the_template = {
                "--system-prompt": self.system_prompt is not None,
                "--thinking": self.thinking,
                "--chat-template-config": bool(variables),
                "--allow-special-tokens": self.allow_special_tokens,
            }
            for flag in (flag for flag, is_given in of_the_template.items() if is_given):
                raise ConfigError(f"{flag} has no effect with --ignore-chat-template")
        elif not (self.thinking or "enable_thinking" in variables):
            refuse_idle_limit(settings)

    def stop_strings(self) -> tuple[str, ...]:
        """Return the values of --stop."""
        from ..language.stops import stop_strings

        return stop_strings([unescape(text) for text in self.stop or []])

    def prompt_options(self) -> Any:
        from ..language.prompt import PromptOptions

        return PromptOptions(
            system_prompt=self.system_prompt,
            thinking=self.thinking,
            response_prefix=self.prefill_response,
            use_chat_template=not self.ignore_chat_template,
            chat_template_config=self.variables(),
            allow_special_tokens=self.allow_special_tokens,
        )


@dataclass(frozen=True)
class MediaOptions:
    """The options for pictures and videos beside the prompt."""

    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Picture that stands before the prompt (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or "
            "PPM); may be given several times.",
        ),
    ] = None
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Video that stands before the prompt, behind the pictures; needs the extra "
            "[video]. May be given several times.",
        ),
    ] = None

    def messages(self, prompt: str, chat: ChatOptions) -> Any:
        """Return the prompt, as a message with its pictures and videos where there are any.

        Raises:
          ConfigError: if they are given with --ignore-chat-template.
        """
        media = [{"type": "image", "image": file} for file in self.image or []]
        media += [{"type": "video", "video": file} for file in self.video or []]
        if not media:
            return prompt
        if chat.ignore_chat_template:
            flag = "--image" if self.image else "--video"
            raise ConfigError(
                f"{flag} has no effect with --ignore-chat-template, whose prompt is text alone"
            )
        text = [{"type": "text", "text": prompt}] if prompt.strip() else []
        return [{"role": "user", "content": [*media, *text]}]


@command
def generate(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Message to the model. '-' reads it from stdin, and so does no prompt where "
            "stdin is not a terminal.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The same as an option; here \\n and \\t are read as line break and tab.",
        ),
    ] = None,
    *,
    model: SeeingModelOptions,
    chat: ChatOptions,
    bound: ConstraintOptions,
    settings: GenerationSettings,
    media: MediaOptions,
    images: ImageSettings,
    output: OutputOptions,
) -> None:
    """Answer one prompt: the answer on stdout, everything else on stderr."""
    view = output.view()
    try:
        page = output.page()
        if bound.reads_stdin and (text or prompt or "-") == "-":
            raise PromptError("stdin is the schema of --json-schema; give the prompt in quotes")
        message, constraint = prompt_text(text, prompt), bound.constraint()
        stop = chat.stop_strings()
        chat.check(settings)  # quick checks come before the model is loaded
        asked = media.messages(message, chat)
        notes = model.notes()
        if text and "\\n" in text and "\n" not in text:
            notes.append(
                r"note: \n in this prompt is two characters; --prompt reads it as a line break"
            )
        if settings.seed is None:
            settings = seeded(settings)
            notes.append(f"seed {settings.seed}")
        with view.loading():
            loaded, tokenizer = model.load()
        from ..language.prompt import single_tokens, special_tokens
        from ..view.pages import model_name

        if chat.extra_eos_token and text in special_tokens(tokenizer):
            raise PromptError(
                f"the prompt is {text!r}, an end token: --extra-eos-token takes one token; "
                "repeat it for each, as in --extra-eos-token A --extra-eos-token B"
            )
        extra = single_tokens(tokenizer, chat.extra_eos_token or [])
        settings = replace(settings, extra_eos_token_ids=extra)
        start = {"event": "start", "model": model_name(model.source), "seed": settings.seed}
        follows, settings = follower(
            output, view, loaded, tokenizer, settings, name=model.source, prompt=message
        )
        with kept(follows.trace, page, view):
            _answer(
                loaded,
                asked,
                settings,
                stop,
                replace(chat.prompt_options(), images=images),
                constraint,
                follows,
                notes,
                start if output.is_json else None,
            )
    finally:
        view.close()


def _answer(
    model: Any,
    prompt: Any,
    settings: GenerationSettings,
    stop: tuple[str, ...],
    options: Any,
    constraint: Any,
    run: Follower,
    notes: list[str],
    start: dict[str, Any] | None,
) -> None:
    """Run one prompt and show its events. The output stays, however the run ends."""
    from ..events import BrokenToolCall, StepDone, Text, ToolCall
    from ..view.report import Stopwatch
    from ..write.generate import stream_generate

    stopwatch, view, is_empty = Stopwatch(), run.view, True
    if constraint is not None:
        notes = [*notes, *(f"note: {note}" for note in constraint.notes)]
    events = stream_generate(
        model,
        run.tokenizer,
        prompt,
        stop=stop,
        constraint=constraint,
        settings=settings,
        prompt_options=options,
        prompt_progress_callback=view.reading,
    )
    with closing(events):
        for number, event in enumerate(events):
            summary = stopwatch.observe(event)
            run.observe(event)
            if number == 0:  # no output about a run before it is certain to start
                for line in notes:
                    view.note(line)
                if start is not None:
                    view.object(start)
            if start is not None:
                run.object(event, summary)
            elif isinstance(event, Text):
                is_empty &= event.channel != "answer" or not event.piece.strip()
                (view.answer if event.channel == "answer" else view.thought)(event.piece)
            elif isinstance(event, ToolCall):
                is_empty = False
                view.remark(f"tool call {event.id}: {event.line()}")
            elif isinstance(event, BrokenToolCall):
                view.remark(f"the tool call in this answer is {event.problem}")
            elif isinstance(event, StepDone):
                run.step(event)
            if summary is not None:
                view.close()
                view.summary(summary.line())
                if is_empty and start is None:
                    view.note("the answer is empty; another --seed or --empty-rerolls 2 may help")


def main() -> None:
    run(generate)


if __name__ == "__main__":
    main()
