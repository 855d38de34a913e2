"""mlx_diffgemma.generate: answer one prompt."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config.generation import (
    COMMAND_MAX_TOKENS,
    Acceptance,
    CanvasWidth,
    GenerationSettings,
    ResolvedSettings,
    SelfConditioning,
    StopOn,
)
from ..errors import ConfigError
from .options import (
    AdapterOption,
    CanvasLengthOption,
    MaxDenoisingStepsOption,
    ModelOption,
    PolicyOption,
    RevisionOption,
    SeedOption,
    SystemPromptOption,
    TempOption,
    boolean,
    fresh_seed,
    friendly_errors,
    read_stdin,
    run,
    setting,
    trace_page,
    unescape,
)


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Message to the model; '-' reads it from stdin.")
    ],
    model: ModelOption = None,
    adapter_path: AdapterOption = None,
    revision: RevisionOption = None,
    system_prompt: SystemPromptOption = None,
    thinking: Annotated[
        bool, typer.Option("--thinking/--no-thinking", help="Let the model think first, on stderr.")
    ] = False,
    prefill_response: Annotated[
        str | None, typer.Option(help="Text that the answer is to begin with.")
    ] = None,
    ignore_chat_template: Annotated[
        bool,
        typer.Option("--ignore-chat-template", help="Use the prompt raw, control tokens and all."),
    ] = False,
    chat_template_config: Annotated[
        str | None, typer.Option(help="More variables for the chat template, a JSON object.")
    ] = None,
    allow_special_tokens: Annotated[
        bool,
        typer.Option(
            "--allow-special-tokens",
            help="Control tokens spelled in messages take effect, as in transformers.",
        ),
    ] = False,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="One more end token; may be given several times.")
    ] = None,
    max_tokens: Annotated[
        int, setting("max_new_tokens", "--max-tokens", "-m", default=str(COMMAND_MAX_TOKENS))
    ] = COMMAND_MAX_TOKENS,
    temp: TempOption = None,
    seed: SeedOption = None,
    max_denoising_steps: MaxDenoisingStepsOption = None,
    entropy_bound: Annotated[float | None, setting("entropy_bound")] = None,
    confidence_threshold: Annotated[float | None, setting("confidence_threshold")] = None,
    stability_threshold: Annotated[int | None, setting("stability_threshold")] = None,
    t_min: Annotated[float | None, setting("t_min")] = None,
    t_max: Annotated[float | None, setting("t_max")] = None,
    canvas_length: CanvasLengthOption = None,
    empty_rerolls: Annotated[int | None, setting("empty_rerolls")] = None,
    prefill_step_size: Annotated[int | None, setting("prefill_step_size")] = None,
    policy: PolicyOption = None,
    acceptance: Annotated[Acceptance | None, setting("acceptance")] = None,
    acceptance_confidence: Annotated[float | None, setting("acceptance_confidence")] = None,
    acceptance_share: Annotated[float | None, setting("acceptance_share")] = None,
    stop_on: Annotated[StopOn | None, setting("stop_on")] = None,
    canvas_width: Annotated[CanvasWidth | None, setting("canvas_width")] = None,
    self_conditioning: Annotated[SelfConditioning | None, setting("self_conditioning")] = None,
    sparse_tokens: Annotated[int | None, setting("sparse_tokens")] = None,
    sparse_entropy: Annotated[float | None, setting("sparse_entropy")] = None,
    schedule_steps: Annotated[
        int | None, setting("schedule_steps", default="max_denoising_steps")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False,
    verbose: Annotated[
        str, typer.Option(metavar="BOOLEAN", help="False prints nothing but the answer and errors.")
    ] = "True",
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Show the canvas in colour by certainty while it settles."),
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Write a page to step through the run, and the same as FILE.json.",
        ),
    ] = None,
) -> None:
    """Answer one prompt: the answer on stdout, everything else on stderr."""
    from .render import View
    from .render_watch import WatchView

    is_verbose = boolean(verbose)
    view = WatchView() if watch and is_verbose else View(verbose=is_verbose)
    with friendly_errors():
        try:
            if watch and (as_json or not is_verbose):
                other = "--json" if as_json else "--verbose False"
                raise ConfigError(f"--watch shows what {other} is to leave out; drop one of them")
            page = trace_page(trace)
            settings = GenerationSettings(
                max_new_tokens=max_tokens,
                max_denoising_steps=max_denoising_steps,
                entropy_bound=entropy_bound,
                t_min=t_min,
                t_max=t_max,
                stability_threshold=stability_threshold,
                confidence_threshold=confidence_threshold,
                temperature=temp,
                canvas_length=canvas_length,
                empty_rerolls=empty_rerolls,
                prefill_step_size=prefill_step_size,
                policy=policy,
                acceptance=acceptance,
                acceptance_confidence=acceptance_confidence,
                acceptance_share=acceptance_share,
                stop_on=stop_on,
                canvas_width=canvas_width,
                self_conditioning=self_conditioning,
                sparse_tokens=sparse_tokens,
                sparse_entropy=sparse_entropy,
                schedule_steps=schedule_steps,
                seed=fresh_seed(seed),
            )
            variables = _json_object(chat_template_config)
            text = read_stdin() if prompt == "-" else unescape(prompt)
            from ..checkpoint.files import (
                bundled_model,  # heavy imports wait until the arguments are valid
            )
            from ..checkpoint.load import load
            from ..language.prompt import PromptOptions, single_tokens

            source = bundled_model() if model is None else model
            loaded, tokenizer = load(source, revision=revision, adapter_path=adapter_path)
            extra = single_tokens(tokenizer, extra_eos_token or [])
            start = {"event": "start", "model": str(source), "seed": settings.seed}
            notes = ["no --model given: this is the bundled model, trained on small puzzles only"]
            notes = notes * (model is None) + [f"seed {settings.seed}"] * (seed is None)
            settings = replace(settings, extra_eos_token_ids=extra)
            listener = None
            if page is not None:
                from ..view.trace import CANDIDATES, Trace

                listener = Trace(tokenizer, model=str(source), prompt=text, settings=settings)
                top = min(CANDIDATES, loaded.config.text.vocab_size)
                settings = replace(settings, top_candidates=top)
            with _kept(listener, page, view):
                _answer(
                    loaded,
                    tokenizer,
                    text,
                    settings,
                    PromptOptions(
                        system_prompt=system_prompt,
                        thinking=thinking,
                        response_prefix=prefill_response,
                        use_chat_template=not ignore_chat_template,
                        chat_template_config=variables,
                        allow_special_tokens=allow_special_tokens,
                    ),
                    view,
                    notes,
                    start if as_json else None,
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


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"--chat-template-config is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--chat-template-config must be a JSON object, got {text}")
    return value


def main() -> None:
    run(generate)
