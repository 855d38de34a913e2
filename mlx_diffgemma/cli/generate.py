"""mlx_diffgemma.generate: answer one prompt."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import GenerationSettings, ResolvedSettings
from ..errors import ConfigError
from .options import (
    ModelOptions,
    SystemPromptOption,
    VerboseOption,
    boolean,
    command,
    prompt_text,
    run,
    seeded,
    trace_page,
)


@dataclass(frozen=True)
class ChatOptions:
    """How the prompt becomes tokens, and what ends an answer."""

    system_prompt: SystemPromptOption = None
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Let the model think first, on stderr.")
    ] = False
    prefill_response: Annotated[
        str | None, typer.Option(help="Text that the answer is to begin with.")
    ] = None
    ignore_chat_template: Annotated[
        bool,
        typer.Option("--ignore-chat-template", help="Use the prompt raw, control tokens and all."),
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

    def variables(self) -> dict[str, Any]:
        """The value of --chat-template-config."""
        text = self.chat_template_config
        try:
            value = json.loads(text) if text is not None else {}
        except json.JSONDecodeError as error:
            raise ConfigError(f"--chat-template-config is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"--chat-template-config must be a JSON object, got {text}")
        return value

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
class OutputOptions:
    """What is shown of a run, and what is kept of it."""

    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False
    verbose: VerboseOption = "True"
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show the canvas in colour by certainty while it settles."),
    ] = False
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page to step through the run, and the same as FILE.json.",
        ),
    ] = None

    def view(self) -> Any:
        """What shows the run.

        Raises:
          ConfigError: if options contradict each other.
        """
        from .render import View
        from .render_watch import WatchView

        is_verbose = boolean(self.verbose)
        if not self.watch:
            return View(verbose=is_verbose)
        if self.as_json or not is_verbose:
            other = "--json" if self.as_json else "--verbose False"
            raise ConfigError(f"--watch shows what {other} is to leave out; drop one of them")
        return WatchView()


@command
def generate(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPT]",
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
    model: ModelOptions,
    chat: ChatOptions,
    settings: GenerationSettings,
    output: OutputOptions,
) -> None:
    """Answer one prompt: the answer on stdout, everything else on stderr."""
    view = output.view()
    try:
        page, message = trace_page(output.trace), prompt_text(text, prompt)
        chat.variables()  # what is quick to check comes before the model is loaded
        notes = ["no --model given: this is the bundled model, trained on small puzzles only"]
        notes = notes * (model.model is None)
        if settings.seed is None:
            settings = seeded(settings)
            notes.append(f"seed {settings.seed}")
        loaded, tokenizer = model.load()
        from ..language.prompt import single_tokens

        extra = single_tokens(tokenizer, chat.extra_eos_token or [])
        settings = replace(settings, extra_eos_token_ids=extra)
        start = {"event": "start", "model": str(model.source), "seed": settings.seed}
        listener = None
        if page is not None:
            from ..view.trace import CANDIDATES, Trace

            name = str(model.source)
            listener = Trace(tokenizer, model=name, prompt=message, settings=settings)
            top = min(CANDIDATES, loaded.config.vocab_size)
            settings = replace(settings, top_candidates=top)
        with _kept(listener, page, view):
            _answer(
                loaded,
                tokenizer,
                message,
                settings,
                chat.prompt_options(),
                view,
                notes,
                start if output.as_json else None,
                listener,
            )
    finally:
        view.close()


@contextmanager
def _kept(trace: Any, page: Path | None, view: Any) -> Iterator[None]:
    """Whatever ends the run, what was seen of it is written."""
    try:
        yield
    finally:
        try:
            view.close()
        finally:
            if trace is not None and page is not None and not trace.is_empty:
                view.note(f"wrote {page} and {trace.write(page)}")


def _answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    settings: GenerationSettings,
    options: Any,
    view: Any,
    notes: list[str],
    start: dict[str, Any] | None,
    trace: Any,
) -> None:
    """Runs one prompt and shows its events; what was shown stays, whatever ends the run."""
    from ..events import StepDone, Text
    from ..language.text import Spellings
    from ..view.report import Stopwatch, as_object
    from ..write.generate import stream_generate

    stopwatch, resolved = Stopwatch(), settings.resolve(model.config)
    spellings = Spellings(tokenizer)
    events = stream_generate(
        model,
        tokenizer,
        prompt,
        settings=settings,
        prompt_options=options,
        prompt_progress_callback=view.reading,
    )
    with closing(events):
        for number, event in enumerate(events):
            summary = stopwatch.observe(event)
            if trace is not None:
                trace.observe(event)
            if number == 0:  # nothing is said about a run before it is sure that there is one
                for line in notes:
                    view.note(line)
                if start is not None:
                    view.object(start)
            if start is not None:
                view.object(as_object(event, summary))
            elif isinstance(event, Text):
                (view.answer if event.channel == "answer" else view.thought)(event.piece)
            elif isinstance(event, StepDone):
                _show_step(view, tokenizer, spellings, event, resolved)
            if summary is not None:
                view.close()
                view.summary(summary.line())


def _show_step(
    view: Any, tokenizer: Any, spellings: Any, event: Any, settings: ResolvedSettings
) -> None:
    from ..language.text import canvas_tokens, draft_pieces
    from ..view.report import as_object
    from .render_watch import StepNumbers, WatchView

    ends = settings.eos_token_ids
    if isinstance(view, WatchView):
        tokens, facts = (
            canvas_tokens(spellings, event, ends, settings.pad_token_id),
            as_object(event),
        )
        accepted, mean = facts["accepted"], facts["mean_entropy"]
        numbers = StepNumbers(event.canvas_index, event.step, accepted, len(tokens), mean)
        view.watch(tokens, numbers)
    elif view.is_live:
        caption = f"canvas {event.canvas_index + 1}, step {event.step + 1}"
        view.draft(draft_pieces(tokenizer, event, ends), caption)


def main() -> None:
    run(generate)
