"""The output of a run for generate, fill and edit: display, JSON and trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config.generation import GenerationSettings, ResolvedSettings
from ..errors import ConfigError
from .options import VerboseOption, boolean

if TYPE_CHECKING:
    from ..events import Event, StepDone, TrialStarted
    from .render import View


@dataclass(frozen=True)
class OutputOptions:
    """The options for a run's display, JSON and trace."""

    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="JSON on stdout: generate prints one object per event, fill and edit one for the "
            "result.",
        ),
    ] = False
    json_drafts: Annotated[
        bool,
        typer.Option(
            "--json-drafts",
            help="As --json, one object per event, and those of denoising steps hold the draft.",
        ),
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

    @property
    def is_json(self) -> bool:
        return self.as_json or self.json_drafts

    def view(self) -> View:
        """Return the view that shows the run.

        Raises:
          ConfigError: if options contradict each other.
        """
        from .render import View
        from .render_watch import WatchView

        is_verbose = boolean(self.verbose)
        if not self.watch:
            return View(verbose=is_verbose)
        if self.is_json or not is_verbose:
            other = "--json" if self.as_json else "--json-drafts" if self.json_drafts else ""
            raise ConfigError(
                f"--watch shows what {other or '--verbose False'} is to leave out; drop one of them"
            )
        return WatchView()

    def page(self) -> Path | None:
        """Return the value of --trace, if files can be written there.

        Raises:
          DiffGemmaError: if they cannot, or would replace other files.
        """
        if self.trace is None:
            return None
        from ..view.pages import check_page

        page = Path(self.trace)
        check_page(page)
        return page


@dataclass
class Follower:
    """Follows one run: shows its steps, prints them as JSON, keeps them in a trace."""

    view: View
    tokenizer: Any
    settings: ResolvedSettings
    trace: Any = None
    drafts: Any = None  # of --json-drafts
    _spellings: Any = None
    _trial: str = ""
    _is_final: bool = True  # the trial's text is the result
    _pinned: list[bool] = field(default_factory=list)

    def observe(self, event: Event) -> None:
        """Record an event, and use it for the display of later ones."""
        from ..events import TrialStarted

        if self.trace is not None:
            self.trace.observe(event)
        if isinstance(event, TrialStarted):
            self._pinned = event.pinned[0].tolist()  # type: ignore[assignment]
            self._trial, self._is_final = _about_trial(event), event.is_final
            if not event.is_final:
                self._looking(event)

    def trial(self, event: Event) -> None:
        """Handle an event of fill or edit, whose text is shown when it is complete."""
        from ..events import StepDone
        from .render_watch import WatchView

        self.observe(event)
        if self.drafts is not None:
            self.object(event)
        elif isinstance(event, StepDone) and isinstance(self.view, WatchView):
            if self.view.is_live or self._is_final:
                self.step(event)
        else:
            self.view.trial(event)

    def _looking(self, event: TrialStarted) -> None:
        """Say, where --watch writes a log, that lengths are looked for: the steps of that are of no
        use in one."""
        from .render_watch import WatchView

        if isinstance(self.view, WatchView) and not self.view.is_live:
            slots = ", ".join(event.slots)
            self.view.note(f"canvas {event.window + 1}: looking for the length of slot {slots}")

    def conclude(self, filled: Any) -> None:
        """Record the result of fill or edit, and restore the screen."""
        if self.trace is not None:
            self.trace.conclude(filled.text)
        self.view.close()

    def object(self, event: Event, summary: Any = None) -> None:
        """Print an event as one line of JSON."""
        from ..view.report import as_object

        self.view.object(as_object(event, summary, drafts=self.drafts))

    def step(self, event: StepDone) -> None:
        """Show the draft if there is a display."""
        from ..language.text import Spellings, canvas_tokens, draft_pieces
        from .render_watch import StepNumbers, WatchView

        ends = self.settings.eos_token_ids
        if isinstance(self.view, WatchView):
            self._spellings = self._spellings or Spellings(self.tokenizer)
            tokens = canvas_tokens(
                self._spellings, event, ends, self.settings.pad_token_id, self._pinned
            )
            free = [i for i, token in enumerate(tokens) if not token.pinned]
            entropy = event.entropy[0].tolist()
            numbers = StepNumbers(
                event.canvas_index,
                event.step,
                sum(tokens[i].accepted for i in free),
                len(free),
                sum(entropy[i] for i in free) / max(1, len(free)),  # type: ignore[index, misc]
                self._trial,
            )
            self.view.watch(tokens, numbers)
        elif self.view.is_live:
            where = ", ".join(filter(None, [f"canvas {event.canvas_index + 1}", self._trial]))
            caption = f"{where}, step {event.step + 1}"
            self.view.draft(draft_pieces(self.tokenizer, event, ends), caption)


def follower(
    output: OutputOptions,
    view: View,
    model: Any,
    tokenizer: Any,
    settings: GenerationSettings,
    *,
    name: str | Path,
    prompt: str,
) -> tuple[Follower, GenerationSettings]:
    """Return the follower of a run for the options, and the settings that it needs. The trace holds
    `name`, the model's source, and `prompt`."""
    follows = Follower(view, tokenizer, settings.resolve(model.config))
    if output.json_drafts:
        from ..view.report import Drafts

        follows.drafts = Drafts(tokenizer, follows.settings.eos_token_ids)
    if output.trace is not None:
        from ..view.trace import CANDIDATES, Trace

        follows.trace = Trace(tokenizer, model=str(name), prompt=prompt, settings=settings)
        top = min(CANDIDATES, model.config.text.vocab_size)
        settings = replace(settings, top_candidates=top)
    return follows, settings


def result_fields(output: OutputOptions, settings: GenerationSettings) -> dict[str, Any]:
    """Return what the JSON object of a result holds beside the result."""
    return {"seed": settings.seed} | ({"event": "result"} if output.json_drafts else {})


@contextmanager
def kept(trace: Any, page: Path | None, view: View) -> Iterator[None]:
    """Write the trace, however the run ends."""
    try:
        yield
    finally:
        try:
            view.close()
        finally:
            if trace is not None and page is not None and not trace.is_empty:
                view.note(f"wrote {page} and {trace.write(page)}")


def _about_trial(event: Any) -> str:
    if not event.is_final:
        return "looking for lengths"
    lengths = ", ".join(
        f"slot {name} with {n} token{'s' * (n != 1)}"
        for name, n in zip(event.slots, event.lengths, strict=True)
    )
    return f"final text ({lengths})"
