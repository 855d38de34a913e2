"""Filling the slots of a template. Literals are pinned, unknown lengths are found in a canvas under
the whole template, and a template longer than one canvas is written canvas by canvas."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..config.generation import GenerationSettings
from ..denoise.checked import checked_tokens
from ..denoise.pinned import TokenSet
from ..errors import TemplateError
from ..events import Event
from ..language.controls import turn_ends
from ..language.encoded import ImageForm
from ..language.images import ImagePatches
from ..language.prompt import Prompt, PromptOptions, encode, encode_text
from ..language.template import Template
from ..model import DiffusionGemma
from .job import Job, refuse_other, run_jobs
from .regions import Region, Regions
from .writer import Writer, least_lead, may_be_cut

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass(frozen=True, slots=True)
class FilledSlot:
    """The text of one slot, with its tokens and scores."""

    name: str
    text: str
    tokens: tuple[int, ...]  # those that it has a part in; one may hold text beside it too
    certainty: float  # geometric mean of its tokens' probabilities in the last step
    # Likely lengths in tokens, of those beside it only what they hold of it -> probability; empty
    # if only one was possible.
    lengths: dict[int, float]


@dataclass(frozen=True, slots=True)
class Filled:
    """A template with its slots filled."""

    text: str
    slots: dict[str, FilledSlot]
    notes: tuple[str, ...]  # notes for the user, a line each
    prompt_tokens: int
    canvases: int
    steps: int  # denoise steps, of all batches
    positions: int  # canvas columns computed, summed over rows and steps: the work done


def fill(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    template: Template | str,
    *,
    prompt: Prompt | None = None,
    gap_tokens: tuple[int, int] | None = None,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    listener: Callable[[Event], None] | None = None,
    is_shown: bool = False,
) -> Filled:
    """Fill a template. Its literal text stays byte for byte.

    Args:
      model: from `load`.
      tokenizer: from `load`.
      template: a string with slots, such as "a {{gap}}", or the result of `Template.parse`; it is
        the model's turn, and ends it.
      prompt: the user's turn; by default a request that shows the template with blanks.
      gap_tokens: least and most tokens of gaps without their own; by default from 1 to what one
        canvas holds.
      settings: how to denoise; `max_new_tokens` has no effect, since the template sets the length.
      prompt_options: how the prompt becomes tokens.
      listener: called with the loop's events, see `stream_fill`.
      is_shown: whether the prompt shows the template already; otherwise it is put after a prompt
        that is a string, where the template may be longer than a canvas.

    Raises:
      DiffGemmaError: if the prompt, the settings or the template cannot be used.
    """
    filled = None
    for event in stream_fill(
        model,
        tokenizer,
        template,
        prompt=prompt,
        gap_tokens=gap_tokens,
        settings=settings,
        prompt_options=prompt_options,
        is_shown=is_shown,
    ):
        if isinstance(event, Filled):
            filled = event
        elif listener is not None:
            listener(event)
    assert filled is not None
    return filled


def stream_fill(
    model: DiffusionGemma,
    tokenizer: AnyTokenizer,
    template: Template | str,
    *,
    prompt: Prompt | None = None,
    gap_tokens: tuple[int, int] | None = None,
    settings: GenerationSettings = GenerationSettings(),
    prompt_options: PromptOptions = PromptOptions(),
    is_shown: bool = False,
) -> Generator[Event | Filled, None, None]:
    """Yield the loop's events during `fill`: PrefillDone, then TrialStarted and its steps, once for
    the lengths of slots where they are open and once for the text; and at last Filled."""
    task = FillTask(
        template=template,
        prompt=prompt,
        gap_tokens=gap_tokens,
        settings=settings,
        prompt_options=prompt_options,
        is_shown=is_shown,
    )
    for _, event in run_jobs(model, [task.job(model, tokenizer)]):
        yield event


@dataclass(frozen=True, slots=True, kw_only=True)
class FillTask:
    """A template to fill, as a task for an engine; the fields are `fill`'s arguments."""

    template: Template | str
    prompt: Prompt | None = None
    gap_tokens: tuple[int, int] | None = None
    settings: GenerationSettings = GenerationSettings()
    prompt_options: PromptOptions = PromptOptions()
    is_shown: bool = False
    standing: Mapping[str, str] = field(default_factory=dict)

    def job(self, model: DiffusionGemma, tokenizer: AnyTokenizer) -> Job[Event | Filled]:
        """Return the job that fills it.

        Raises:
          DiffGemmaError: if the template cannot be filled, or the prompt or settings be used.
        """
        template = self.template
        if isinstance(template, str):
            template = Template.parse(template)
        if not isinstance(template, Template):
            raise TemplateError(
                "a template is a string or comes from Template.parse, got "
                f"{type(template).__name__}"
            )
        refuse_other("settings", self.settings, GenerationSettings, "GenerationSettings(seed=7)")
        resolved = self.settings.resolve(model.config, is_free=False)
        L, ends = resolved.canvas_length, turn_ends(tokenizer, resolved)
        regions = Regions(model, tokenizer, resolved, ends)
        pieces = regions.pieces(template, self.gap_tokens)
        is_long = may_be_cut(pieces, L)
        prompt, notes = _told(self.prompt, template, is_long, self.is_shown)
        form = ImageForm.of(model.config)
        encoded = encode(tokenizer, prompt, self.prompt_options, form)
        ids = encoded.ids
        limit = model.config.text.max_position_embeddings
        if len(ids) + (lead := least_lead(pieces, L)) + L > limit:
            raise TemplateError(
                f"the prompt has {len(ids)} tokens and the template {lead} or more before its last "
                f"canvas; with that canvas of {L} they do not fit into {limit} positions"
            )
        tokens = checked_tokens(ids, model.config, encoded.images)
        standing = {
            piece.name: np.array(
                encode_text(tokenizer, piece.around(self.standing[piece.name])), np.int32
            )
            for piece in pieces
            if isinstance(piece, Region) and self.standing.get(piece.name)
        }
        writer = Writer(model, resolved, ends, TokenSet(regions.text_tokens), pieces, standing)
        told = tokens, encoded.images
        return _filled(writer, told, template, regions.spellings, notes)


def _filled(
    writer: Writer,
    told: tuple[np.ndarray, Sequence[ImagePatches]],
    template: Template,
    spellings: Mapping[int, bytes],
    notes: tuple[str, ...],
) -> Job[Event | Filled]:
    """Read the prompt, tokens with their images, write the slots, and yield the result last."""
    tokens, images = told
    yield from writer.read(tokens, images)
    yield from writer.write()
    slots = {}
    for done in writer.done:
        text, inside = done.region.inside([spellings[t] for t in done.tokens])
        slots[done.region.name] = FilledSlot(
            done.region.name,
            text.decode("utf-8", "replace"),
            done.tokens[inside],
            done.certainty(inside),
            done.lengths,
        )
    yield Filled(
        template.filled({name: slot.text for name, slot in slots.items()}),
        slots,
        (*notes, *writer.notes),
        len(tokens),
        writer.canvases,
        writer.steps,
        writer.positions,
    )


def _told(
    prompt: Prompt | None, template: Template, is_long: bool, is_shown: bool
) -> tuple[Prompt, tuple[str, ...]]:
    """Return the user's turn, and the notes about it."""
    if prompt is None:
        prompt = f"Fill in the blanks:\n\n{template.shown()}"
    elif is_long and isinstance(prompt, str) and not is_shown:
        prompt = f"{prompt}\n\n{template.shown()}"
    if not is_long:
        return prompt, ()
    where = (
        "the model knows only from the prompt, which shows the template"
        if isinstance(prompt, str)
        else "the model sees only if the messages contain it"
    )
    return prompt, (
        f"the template may be longer than a canvas: text too far after a slot, {where}",
    )
