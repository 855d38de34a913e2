"""The settings of a run: every default, every check. Imports no mlx."""

from __future__ import annotations

import math
import secrets
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ConfigError

if TYPE_CHECKING:
    from .model import ModelConfig

Raw = Mapping[str, Any]
Policy = Literal["reference", "fast"]
Acceptance = Literal["entropy", "confidence"]
StopOn = Literal["canvas", "answer"]
CanvasWidth = Literal["fixed", "answer"]
SelfConditioning = Literal["dense", "sparse"]
_CHOICES: dict[str, Any] = {
    "policy": Policy,
    "acceptance": Acceptance,
    "stop_on": StopOn,
    "canvas_width": CanvasWidth,
    "self_conditioning": SelfConditioning,
}
# What a policy fills in where the user says nothing; the checkpoint's own numbers come after it.
POLICIES: dict[Policy, dict[str, Any]] = {
    "reference": {},
    "fast": {
        "acceptance": "confidence",
        "temperature": 0.0,
        "stop_on": "answer",
        "canvas_width": "answer",
    },
}

_COLDEST = 1e-4  # below, logits over temperature leave float32
COMMAND_MAX_TOKENS = 1024  # `generate` as a command; the checkpoint's 256 surprise people

# Keys of generation_config.json that are settings; the entropy bound stands in its sampler_config.
_CHECKPOINT_KEYS = frozenset(
    "max_new_tokens max_denoising_steps t_min t_max stability_threshold "
    "confidence_threshold".split()
)
_INERT_GENERATION = frozenset(
    "max_length pad_token_id bos_token_id eos_token_id transformers_version sampler_config "
    "_from_model_config return_dict_in_generate cache_implementation cache_config "
    "disable_compile _commit_hash".split()
)


def _setting(help: str, default: float | str | None = None) -> Any:
    """A field that may stay open: what it is for, and its value where the checkpoint says nothing.

    Source of the model's own values: transformers 5.23, generation_diffusion_gemma.py,
    _get_default_generation_params.
    """
    return field(default=None, metadata={"help": help, "default": default})


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to denoise. Names follow the checkpoint's generation_config.json.

    None means: what the checkpoint says, and where it is silent, the default in this file.
    `resolve` fills them in.
    """

    max_new_tokens: int | None = _setting("Most new tokens, cut exactly.", 256)
    max_denoising_steps: int | None = _setting("Most denoise steps per canvas.", 48)
    entropy_bound: float | None = _setting(
        "Nats of entropy that one step may accept; more is faster and less sure.", 0.1
    )
    t_min: float | None = _setting("Temperature that the schedule falls to.", 0.4)
    t_max: float | None = _setting("Temperature of the first step.", 0.8)
    stability_threshold: int | None = _setting(
        "Steps for which the draft must not change before a canvas may settle.", 1
    )
    confidence_threshold: float | None = _setting(
        "Mean entropy in nats below which a stable canvas has settled.", 0.005
    )
    temperature: float | None = _setting(
        "Multiplies the schedule; 0 proposes the likeliest tokens instead of drawing.", 1.0
    )
    canvas_length: int | None = _setting(
        "Tokens per canvas; fewer than the checkpoint's own is outside its training."
    )
    empty_rerolls: int | None = _setting(
        "How often a first canvas that begins with an end token is drawn again.", 0
    )
    top_candidates: int | None = _setting(
        "Likeliest tokens per position that each step event carries.", 0
    )
    prefill_step_size: int | None = _setting("Prompt tokens encoded at a time.", 2048)
    policy: Policy | None = _setting(
        "How to save work: 'reference' saves none and follows transformers step by step; 'fast' is "
        "the best set of the settings below.",
        "reference",
    )
    acceptance: Acceptance | None = _setting(
        "What a step keeps: proposals up to 'entropy_bound', or, with 'confidence', every one of "
        "that probability for as long as it stays the likeliest. Nothing is frozen either way.",
        "entropy",
    )
    acceptance_confidence: float | None = _setting(
        "Probability from which acceptance by confidence keeps a proposal.", 0.9
    )
    acceptance_share: float | None = _setting(
        "Of the positions still open, how many a step of acceptance by confidence keeps at least.",
        0.0,
    )
    stop_on: StopOn | None = _setting(
        "Which positions a canvas waits for: all of the 'canvas', or those of the 'answer', up to "
        "the draft's first end token.",
        "canvas",
    )
    canvas_width: CanvasWidth | None = _setting(
        "'fixed', or 'answer': columns well behind the draft's first end token are dropped once "
        "it has been accepted, and come back if it is lost. Rows of a batch share one width.",
        "fixed",
    )
    self_conditioning: SelfConditioning | None = _setting(
        "What comes back into the next step: 'dense', the mean over the whole vocabulary, or "
        "'sparse', over the likeliest tokens and the mean of the rest.",
        "dense",
    )
    sparse_tokens: int | None = _setting("Likeliest tokens of sparse self-conditioning.", 64)
    sparse_entropy: float | None = _setting(
        "Nats from which a position's self-conditioning is dense all the same.", 2.0
    )
    schedule_steps: int | None = _setting(
        "Steps over which the temperature falls, whatever max_denoising_steps cuts it to; by "
        "default those.",
    )
    seed: int | None = _setting("Seed of all draws; by default a fresh one.")
    extra_eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.extra_eos_token_ids, tuple):
            raise ConfigError(
                f"extra_eos_token_ids must be a tuple of ids, got {self.extra_eos_token_ids!r}"
            )

        def check(
            name: str, low: float, *, whole: bool, strict: bool = False, high: float = math.inf
        ) -> None:
            value = getattr(self, name)
            if value is None:
                return
            number = isinstance(value, int if whole else (int, float)) and not isinstance(
                value, bool
            )
            if (
                not number
                or not abs(value) <= sys.float_info.max  # a whole number may be beyond any float
                or value < low
                or value > high
                or (strict and value == low)
            ):
                bound = f"{'above' if strict else 'at least'} {low}" + (
                    f" and at most {high}" if high < math.inf else ""
                )
                raise ConfigError(
                    f"{name} must be a {'whole ' if whole else ''}number {bound}, got {value!r}"
                )

        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                known = " or ".join(map(repr, get_args(choices)))
                raise ConfigError(f"{name} must be {known}, got {value!r}")
        for name in (
            "max_new_tokens max_denoising_steps canvas_length prefill_step_size "
            "sparse_tokens schedule_steps"
        ).split():
            check(name, 1, whole=True)
        for name in ("stability_threshold", "empty_rerolls", "top_candidates"):
            check(name, 0, whole=True)
        check("seed", 0, whole=True, high=2**63 - 1)
        for name in ("entropy_bound", "confidence_threshold", "temperature", "sparse_entropy"):
            check(name, 0, whole=False)
        for name in ("acceptance_confidence", "acceptance_share"):
            check(name, 0, whole=False, high=1)
        for name in ("t_min", "t_max"):
            check(name, 0, whole=False, strict=True)

    def resolve(self, config: ModelConfig) -> ResolvedSettings:
        """The user's values over the checkpoint's, over the defaults of this file; a missing seed
        is drawn.

        Raises:
          ConfigError: if the values contradict each other or the checkpoint.
        """

        policy = self.policy or default_of("policy")

        def pick(name: str) -> Any:
            if (value := getattr(self, name)) is not None:
                return value
            if name in POLICIES[policy]:
                return POLICIES[policy][name]
            value = getattr(config.generation, name)
            return default_of(name) if value is None else value

        self._refuse_idle(pick("acceptance"), pick("self_conditioning"))
        vocab_size = config.text.vocab_size
        canvas_length = pick("canvas_length") or config.canvas_length
        if canvas_length > config.canvas_length:
            raise ConfigError(
                f"canvas_length {canvas_length} is longer than "
                f"the checkpoint's {config.canvas_length}"
            )
        t_min, t_max = pick("t_min"), pick("t_max")
        if t_min > t_max:
            raise ConfigError(
                f"t_min {t_min} is above t_max {t_max}; the temperature falls from t_max to t_min"
            )
        temperature = pick("temperature")
        if temperature and temperature * t_min < _COLDEST:
            raise ConfigError(
                f"temperature {temperature} times t_min {t_min} is below {_COLDEST}; "
                "0 is the greedy limit"
            )
        if (top := pick("top_candidates")) > vocab_size:
            raise ConfigError(
                f"top_candidates {top} is more than the {vocab_size} tokens there are"
            )
        sparse_tokens = pick("sparse_tokens")
        if self.sparse_tokens is None:
            sparse_tokens = min(sparse_tokens, vocab_size)
        elif sparse_tokens > vocab_size:
            raise ConfigError(
                f"sparse_tokens {sparse_tokens} is more than the {vocab_size} tokens there are"
            )
        if (pick("canvas_width"), pick("stop_on")) == ("answer", "canvas"):
            raise ConfigError(
                "canvas_width 'answer' drops what stop_on 'canvas' waits for; "
                "stop_on must be 'answer' too"
            )
        extra = self.extra_eos_token_ids
        if bad := [t for t in extra if not isinstance(t, int) or not 0 <= t < vocab_size]:
            raise ConfigError(f"extra end tokens {bad} are outside the vocabulary of {vocab_size}")
        return ResolvedSettings(
            max_new_tokens=pick("max_new_tokens"),
            max_denoising_steps=pick("max_denoising_steps"),
            entropy_bound=float(pick("entropy_bound")),
            t_min=float(t_min),
            t_max=float(t_max),
            stability_threshold=pick("stability_threshold"),
            confidence_threshold=float(pick("confidence_threshold")),
            temperature=float(temperature),
            canvas_length=canvas_length,
            empty_rerolls=pick("empty_rerolls"),
            top_candidates=top,
            prefill_step_size=pick("prefill_step_size"),
            policy=policy,
            acceptance=pick("acceptance"),
            acceptance_confidence=float(pick("acceptance_confidence")),
            acceptance_share=float(pick("acceptance_share")),
            stop_on=pick("stop_on"),
            canvas_width=pick("canvas_width"),
            self_conditioning=pick("self_conditioning"),
            sparse_tokens=sparse_tokens,
            sparse_entropy=float(pick("sparse_entropy")),
            schedule_steps=pick("schedule_steps") or pick("max_denoising_steps"),
            eos_token_ids=tuple(sorted({*config.eos_token_ids, *extra})),
            pad_token_id=config.pad_token_id,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )

    def _refuse_idle(self, acceptance: Acceptance, self_conditioning: SelfConditioning) -> None:
        """A setting that has no effect is a mistake."""
        idle = {
            "entropy": ("acceptance_confidence", "acceptance_share"),
            "confidence": ("entropy_bound", "stability_threshold", "confidence_threshold"),
        }[acceptance]
        for name in idle:
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect with acceptance by {acceptance}")
        for name in ("sparse_tokens", "sparse_entropy"):
            if self_conditioning == "dense" and getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect with dense self-conditioning")

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> GenerationSettings:
        """Reads generation_config.json. A sampler other than the entropy-bound one is refused."""
        sampler = raw.get("sampler_config") or {}
        if not isinstance(sampler, Mapping):
            raise ConfigError(f"{where}: sampler_config must be an object, got {sampler!r}")
        name = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
        if name != "EntropyBoundSamplerConfig":
            raise ConfigError(
                f"{where}: sampler {name!r} is not supported, only EntropyBoundSamplerConfig is"
            )
        warn_unknown(raw, _INERT_GENERATION | _CHECKPOINT_KEYS, where)
        values = {key: raw[key] for key in sorted(_CHECKPOINT_KEYS) if raw.get(key) is not None}
        if sampler.get("entropy_bound") is not None:
            values["entropy_bound"] = sampler["entropy_bound"]
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """Settings with every value filled in: what the loop runs on."""

    max_new_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float
    temperature: float
    canvas_length: int
    empty_rerolls: int
    top_candidates: int
    prefill_step_size: int
    policy: Policy
    acceptance: Acceptance
    acceptance_confidence: float
    acceptance_share: float
    stop_on: StopOn
    canvas_width: CanvasWidth
    self_conditioning: SelfConditioning
    sparse_tokens: int
    sparse_entropy: float
    schedule_steps: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    seed: int

    @property
    def looks_for_end(self) -> bool:
        """Whether anything depends on where the draft's first end token stands."""
        return "answer" in (self.stop_on, self.canvas_width)


def default_of(name: str) -> Any:
    """What a setting is where neither the user nor the checkpoint says anything."""
    return _DEFAULTS[name]


def help_of(name: str) -> str:
    """What a setting is for, in one sentence."""
    return _HELP[name]


def source_of(name: str) -> str:
    """Who decides a setting that the user leaves open, before its default does: "policy",
    "checkpoint", or nobody."""
    if any(name in fills for fills in POLICIES.values()):
        return "policy"
    return "checkpoint" if name in _CHECKPOINT_KEYS or name == "entropy_bound" else ""


_DEFAULTS = {f.name: f.metadata.get("default") for f in fields(GenerationSettings)}
_HELP = {f.name: f.metadata.get("help", "") for f in fields(GenerationSettings)}


def warn_unknown(raw: Raw, known: set[str] | frozenset[str], where: str) -> None:
    if unknown := sorted(set(raw) - known):
        warnings.warn(f"{where}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)
