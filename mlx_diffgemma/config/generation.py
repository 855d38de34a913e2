"""The settings of a run: defaults, checks, and the order in which values win. Imports no mlx."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Never, Protocol, TypeVar

from ..errors import ConfigError
from .entry import Entry, check, entries, kinds, setting
from .policies import NEED_FREE_TEXT, POLICIES, Policy
from .refusals import refuse_contradictions, refuse_idle

Acceptance = Literal["entropy", "confidence"]
StopOn = Literal["canvas", "answer"]
CanvasWidth = Literal["fixed", "answer"]
PrefixCommit = Literal["off", "shrink"]
CommitPass = Literal["own", "joint"]
SelfConditioning = Literal["dense", "sparse"]

_ALL = ("generate", "fill", "edit", "chat", "serve", "batch")  # every command that runs the model
_GENERATE = ("generate", "chat", "serve", "batch")
_BY_ENTROPY, _BY_CONFIDENCE = ("acceptance", "entropy"), ("acceptance", "confidence")
_SPARSE, _BY_PARTS = ("self_conditioning", "sparse"), ("prefix_commit", "shrink")

# The type of a setting without a value: None while it is open, Never once it is resolved.
Open = TypeVar("Open")


class Checkpoint(Protocol):
    """The facts about a checkpoint that settings need; `ModelConfig` has them."""

    @property
    def canvas_length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_token_id(self) -> int: ...
    @property
    def generation(self) -> GenerationSettings: ...


def _setting(entry: Entry) -> Any:
    return setting(entry, is_open=True)


@dataclass(frozen=True, kw_only=True)
class _Settings(Generic[Open]):
    """All settings of a run. Each is written once, here: name, type, default, bounds, help, whether
    policy or checkpoint sets it, and its commands.

    Source of the model's own defaults: transformers 5.23, generation_diffusion_gemma.py,
    _get_default_generation_params.
    """

    max_new_tokens: int | Open = _setting(
        Entry(
            help="Most new tokens, cut exactly.",
            default=256,
            at_least=1,
            checkpoint="max_new_tokens",
            commands=("generate", "chat", "batch"),  # requests to a server have their own limit
            flags=("--max-tokens", "-m"),
            command_default=1024,  # the checkpoint's 256 are too few for most answers
        )
    )
    temperature: float | Open = _setting(
        Entry(
            help="Multiplies the schedule; 0 proposes the likeliest tokens instead of drawing.",
            default=1.0,
            at_least=0,
            commands=_ALL,
            flags=("--temp",),
        )
    )
    seed: int | Open = _setting(
        Entry(
            help="Seed of all draws; by default a fresh one.",
            at_least=0,
            at_most=2**63 - 1,
            commands=_ALL,
            shown_default="fresh, and printed",
        )
    )
    max_denoising_steps: int | Open = _setting(
        Entry(
            help="Most denoise steps per canvas.",
            default=48,
            at_least=1,
            checkpoint="max_denoising_steps",
            commands=_ALL,
        )
    )
    entropy_bound: float | Open = _setting(
        Entry(
            help="Nats of entropy that one step may accept; more is faster and less sure.",
            default=0.1,
            at_least=0,
            checkpoint="sampler_config.entropy_bound",
            only_with=_BY_ENTROPY,
            commands=_GENERATE,
        )
    )
    confidence_threshold: float | Open = _setting(
        Entry(
            help="Mean entropy in nats below which a stable canvas has settled.",
            default=0.005,
            at_least=0,
            checkpoint="confidence_threshold",
            only_with=_BY_ENTROPY,
            commands=_GENERATE,
        )
    )
    stability_threshold: int | Open = _setting(
        Entry(
            help="Steps for which the draft must not change before a canvas may settle.",
            default=1,
            at_least=0,
            checkpoint="stability_threshold",
            only_with=_BY_ENTROPY,
            commands=_GENERATE,
        )
    )
    t_min: float | Open = _setting(
        Entry(
            help="Temperature that the schedule falls to.",
            default=0.4,
            above=0,
            checkpoint="t_min",
            commands=_GENERATE,
        )
    )
    t_max: float | Open = _setting(
        Entry(
            help="Temperature of the first step.",
            default=0.8,
            above=0,
            checkpoint="t_max",
            commands=_GENERATE,
        )
    )
    canvas_length: int | Open = _setting(
        Entry(
            help="Tokens per canvas; fewer than the checkpoint's own is outside its training.",
            at_least=1,
            commands=_ALL,
            shown_default="the checkpoint's",
        )
    )
    empty_rerolls: int | Open = _setting(
        Entry(
            help="How often a first canvas that begins with an end token is drawn again.",
            default=0,
            at_least=0,
            commands=_GENERATE,
        )
    )
    top_candidates: int | Open = _setting(
        Entry(help="Likeliest tokens per position that step events carry.", default=0, at_least=0)
    )
    prefill_step_size: int | Open = _setting(
        Entry(help="Prompt tokens encoded at a time.", default=2048, at_least=1, commands=_GENERATE)
    )
    policy: Policy | Open = _setting(
        Entry(
            help="How to save work: 'reference' saves none and follows transformers step by step; "
            "'fast' sets those that save most steps.",
            default="reference",
            commands=_ALL,
        )
    )
    acceptance: Acceptance | Open = _setting(
        Entry(
            help="How a step accepts proposals: up to 'entropy_bound', or, with 'confidence', all "
            "of at least that probability, for as long as they stay the likeliest. No token is "
            "frozen.",
            default="entropy",
            commands=_GENERATE,
        )
    )
    acceptance_confidence: float | Open = _setting(
        Entry(
            help="Least probability of a proposal for acceptance by confidence.",
            default=0.9,
            at_least=0,
            at_most=1,
            checkpoint="acceptance_confidence",
            only_with=_BY_CONFIDENCE,
            commands=_GENERATE,
        )
    )
    acceptance_share: float | Open = _setting(
        Entry(
            help="Least share of the open positions that a step accepts by confidence.",
            default=0.0,
            at_least=0,
            at_most=1,
            only_with=_BY_CONFIDENCE,
            commands=_GENERATE,
        )
    )
    stop_on: StopOn | Open = _setting(
        Entry(
            help="Which positions a canvas waits for: all of the 'canvas', or those of the "
            "'answer', up to the draft's first end token.",
            default="canvas",
            commands=_GENERATE,
        )
    )
    canvas_width: CanvasWidth | Open = _setting(
        Entry(
            help="'fixed', or 'answer': columns well after the draft's first end token are "
            "dropped once it has been accepted, and come back if it is lost.",
            default="fixed",
            commands=_GENERATE,
        )
    )
    width_mass: float | Open = _setting(
        Entry(
            help="Probability that the answer has ended, from which columns are dropped before an "
            "end token is accepted; 0: only then.",
            default=0.0,
            at_least=0,
            at_most=1,
            only_with=("canvas_width", "answer"),
            commands=_GENERATE,
        )
    )
    prefix_commit: PrefixCommit | Open = _setting(
        Entry(
            help="Whether the left part of a canvas is committed once it has settled: 'off', or "
            "'shrink', the canvas goes on without it.",
            default="off",
            commands=_GENERATE,
        )
    )
    prefix_steps: int | Open = _setting(
        Entry(
            help="Steps for which such a part must not change.",
            default=2,
            at_least=1,
            checkpoint="prefix_steps",
            only_with=_BY_PARTS,
            commands=_GENERATE,
        )
    )
    prefix_entropy: float | Open = _setting(
        Entry(
            help="Nats of entropy that each position of such a part may have.",
            default=0.01,
            at_least=0,
            checkpoint="prefix_entropy",
            only_with=_BY_PARTS,
            commands=_GENERATE,
        )
    )
    lookahead: float | Open = _setting(
        Entry(
            help="Share of the canvas that a step computes behind what is accepted on its left; "
            "1: all of it.",
            default=1.0,
            above=0,
            at_most=1,
            only_with=("canvas_width", "answer"),
            commands=_GENERATE,
        )
    )
    commit_pass: CommitPass | Open = _setting(
        Entry(
            help="What reads committed text: 'own', a forward pass of its own, or 'joint', that of "
            "the next canvas's first step, the same up to rounding.",
            default="own",
            commands=_GENERATE,
        )
    )
    self_conditioning: SelfConditioning | Open = _setting(
        Entry(
            help="How predictions go into the next step: 'dense', the mean over the whole "
            "vocabulary, or 'sparse', over the likeliest tokens and the mean of the rest.",
            default="dense",
            commands=_GENERATE,
        )
    )
    sparse_tokens: int | Open = _setting(
        Entry(
            help="Likeliest tokens of sparse self-conditioning.",
            default=64,
            at_least=1,
            only_with=_SPARSE,
            commands=_GENERATE,
        )
    )
    sparse_entropy: float | Open = _setting(
        Entry(
            help="Nats of entropy from which a position's self-conditioning stays dense.",
            default=2.0,
            at_least=0,
            only_with=_SPARSE,
            commands=_GENERATE,
        )
    )
    schedule_steps: int | Open = _setting(
        Entry(
            help="Steps over which the temperature falls, also where max_denoising_steps is less.",
            at_least=1,
            commands=_GENERATE,
            shown_default="max_denoising_steps",
        )
    )
    warm_start: float | Open = _setting(
        Entry(
            help="Where a text stands already: keep, behind a first step that does not see it, its "
            "tokens of at least this probability over that of the likeliest; 0 starts from noise.",
            default=0.0,
            at_least=0,
            below=1,
            commands=("edit", "chat", "serve"),
        )
    )
    warm_read: float | Open = _setting(
        Entry(
            help="Where a whole text stands already: commit its tokens as the model reads them, "
            "while each has this probability over that of the likeliest; 0 reads none.",
            default=0.0,
            at_least=0,
            at_most=1,
            commands=("chat", "serve"),
        )
    )
    max_thinking_tokens: int | Open = _setting(
        Entry(
            help="Tokens of thoughts after which the next canvas begins with the thought's end.",
            default=-1,
            at_least=0,
            all_is=-1,
            commands=_GENERATE,
            shown_default="no limit",
        )
    )
    extra_eos_token_ids: tuple[int, ...] = ()  # ids of one tokenizer, so no option of a command

    def __post_init__(self) -> None:
        if not isinstance(self.extra_eos_token_ids, tuple):
            raise ConfigError(
                f"extra_eos_token_ids must be a tuple of ids, got {self.extra_eos_token_ids!r}"
            )
        check(self)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(_Settings[None]):
    """How to denoise. Names follow the checkpoint's generation_config.json.

    None means the policy's value, else the checkpoint's, else the default; `resolve` fills it in.
    """

    def resolve(self, checkpoint: Checkpoint, *, is_free: bool = True) -> ResolvedSettings:
        """Return the settings with every open one filled in: by the policy, else the checkpoint,
        else the default. A missing seed is drawn.

        Args:
          checkpoint: whose facts and own settings count.
          is_free: whether no text is pinned.

        Raises:
          ConfigError: if values contradict each other or the checkpoint, or have no effect.
        """
        whole = POLICIES[self.policy or default_of("policy")]
        policys = {k: v for k, v in whole.items() if is_free or k not in NEED_FREE_TEXT}
        values = self._filled(policys, checkpoint.generation)
        if values["canvas_length"] is None:
            values["canvas_length"] = checkpoint.canvas_length
        if values["schedule_steps"] is None:
            values["schedule_steps"] = values["max_denoising_steps"]
        if values["seed"] is None:
            values["seed"] = secrets.randbits(32)
        if self.sparse_tokens is None:  # the default may exceed a small vocabulary
            values["sparse_tokens"] = min(values["sparse_tokens"], checkpoint.vocab_size)
        refuse_idle(self, values, policys, whole.keys() - policys.keys())
        refuse_contradictions(values, self.extra_eos_token_ids, checkpoint)
        return ResolvedSettings(
            **values,
            extra_eos_token_ids=self.extra_eos_token_ids,
            eos_token_ids=tuple(sorted({*checkpoint.eos_token_ids, *self.extra_eos_token_ids})),
            pad_token_id=checkpoint.pad_token_id,
        )

    def _filled(self, policys: Mapping[str, Any], own: GenerationSettings) -> dict[str, Any]:
        """Return each setting's value, None if it has none. `own` holds the checkpoint's."""
        cls: Any = type(self)
        values: dict[str, Any] = {}
        for name, entry in entries(cls).items():
            ladder = (
                getattr(self, name),
                policys.get(name),
                getattr(own, name),
                entry.default,
            )
            value = next((v for v in ladder if v is not None), None)
            if isinstance(value, int) and kinds(cls)[name] is float:
                value = float(value)
            values[name] = value
        return values


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(_Settings[Never]):
    """Settings with every value filled in, as the loop needs them."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def looks_for_end(self) -> bool:
        """Whether any setting depends on the draft's first end token."""
        return "answer" in (self.stop_on, self.canvas_width) or self.prefix_commit != "off"

    @property
    def steps_looked_back(self) -> int:
        """How many drafts of steps before a step's stop rules compare with its own."""
        return max(1, self.stability_threshold, self.prefix_steps * (self.prefix_commit != "off"))


def default_of(name: str) -> Any:
    """Return a setting's value if neither user nor checkpoint gives one."""
    return entries(GenerationSettings)[name].default


def decider_of(name: str, entry: Entry) -> str:
    """Return what sets an open setting before its default: "policy", "checkpoint" or ""."""
    is_policys = any(name in fills for fills in POLICIES.values())
    return "policy" if is_policys else "checkpoint" if entry.checkpoint else ""
