"""The settings of a run: every default, every check. Imports no mlx."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import ModelConfig

Raw = Mapping[str, Any]

# What the checkpoint and the user leave open. The model's own values come from transformers 5.23,
# generation_diffusion_gemma.py, _get_default_generation_params.
MAX_NEW_TOKENS = 256
MAX_DENOISING_STEPS = 48
ENTROPY_BOUND = 0.1
T_MIN = 0.4
T_MAX = 0.8
STABILITY_THRESHOLD = 1
CONFIDENCE_THRESHOLD = 0.005
TEMPERATURE = 1.0
PREFILL_STEP_SIZE = 2048
EMPTY_REROLLS = 0
TOP_CANDIDATES = 0
COMMAND_MAX_TOKENS = 1024  # `generate` as a command; 256 surprises people

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


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to denoise. Names follow the checkpoint's generation_config.json.

    None means: what the checkpoint says, and where it is silent, the default in this file.
    `resolve` fills them in.
    """

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most new tokens, cut exactly."}
    )
    max_denoising_steps: int | None = field(
        default=None, metadata={"help": "Most denoise steps per canvas."}
    )
    entropy_bound: float | None = field(
        default=None,
        metadata={
            "help": "Nats of entropy that one step may accept; more is faster and less sure."
        },
    )
    t_min: float | None = field(
        default=None, metadata={"help": "Temperature that the schedule falls to."}
    )
    t_max: float | None = field(default=None, metadata={"help": "Temperature of the first step."})
    stability_threshold: int | None = field(
        default=None,
        metadata={"help": "Steps for which the draft must not change before a canvas may settle."},
    )
    confidence_threshold: float | None = field(
        default=None,
        metadata={"help": "Mean entropy in nats below which a stable canvas has settled."},
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Multiplies the schedule; 0 proposes the likeliest token instead of drawing."
        },
    )
    canvas_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens per canvas; less than the checkpoint's own is outside its training."
        },
    )
    empty_rerolls: int | None = field(
        default=None,
        metadata={"help": "How often a first canvas that begins with an end token is drawn again."},
    )
    top_candidates: int | None = field(
        default=None,
        metadata={"help": "Likeliest tokens per position that each step event carries."},
    )
    prefill_step_size: int | None = field(
        default=None, metadata={"help": "Prompt tokens encoded at a time."}
    )
    extra_eos_token_ids: tuple[int, ...] = ()
    seed: int | None = field(
        default=None, metadata={"help": "Seed of all draws; by default a fresh one."}
    )

    def __post_init__(self) -> None:
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
                or not math.isfinite(value)
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

        for name in ("max_new_tokens", "max_denoising_steps", "canvas_length", "prefill_step_size"):
            check(name, 1, whole=True)
        for name in ("stability_threshold", "empty_rerolls", "top_candidates"):
            check(name, 0, whole=True)
        check("seed", 0, whole=True, high=2**63 - 1)
        for name in ("entropy_bound", "confidence_threshold", "temperature"):
            check(name, 0, whole=False)
        for name in ("t_min", "t_max"):
            check(name, 0, whole=False, strict=True)

    def resolve(self, config: ModelConfig) -> ResolvedSettings:
        """The user's values over the checkpoint's, over the defaults of this file; a missing seed
        is drawn.

        Raises:
          ConfigError: if the values contradict each other or the checkpoint.
        """

        def pick(name: str, default: Any) -> Any:
            for source in (self, config.generation):
                if (value := getattr(source, name)) is not None:
                    return value
            return default

        canvas_length = self.canvas_length or config.canvas_length
        if canvas_length > config.canvas_length:
            raise ConfigError(
                f"canvas_length {canvas_length} is longer than "
                f"the checkpoint's {config.canvas_length}"
            )
        t_min, t_max = pick("t_min", T_MIN), pick("t_max", T_MAX)
        if t_min > t_max:
            raise ConfigError(
                f"t_min {t_min} is above t_max {t_max}; the temperature falls from t_max to t_min"
            )
        if (top := self.top_candidates or TOP_CANDIDATES) > config.text.vocab_size:
            raise ConfigError(
                f"top_candidates {top} is more than the {config.text.vocab_size} tokens there are"
            )
        extra = tuple(self.extra_eos_token_ids)
        if bad := [token for token in extra if not 0 <= token < config.text.vocab_size]:
            raise ConfigError(
                f"extra end tokens {bad} are outside the vocabulary of {config.text.vocab_size}"
            )
        return ResolvedSettings(
            max_new_tokens=pick("max_new_tokens", MAX_NEW_TOKENS),
            max_denoising_steps=pick("max_denoising_steps", MAX_DENOISING_STEPS),
            entropy_bound=float(pick("entropy_bound", ENTROPY_BOUND)),
            t_min=float(t_min),
            t_max=float(t_max),
            stability_threshold=pick("stability_threshold", STABILITY_THRESHOLD),
            confidence_threshold=float(pick("confidence_threshold", CONFIDENCE_THRESHOLD)),
            temperature=float(TEMPERATURE if self.temperature is None else self.temperature),
            canvas_length=canvas_length,
            empty_rerolls=EMPTY_REROLLS if self.empty_rerolls is None else self.empty_rerolls,
            top_candidates=top,
            prefill_step_size=self.prefill_step_size or PREFILL_STEP_SIZE,
            eos_token_ids=tuple(sorted({*config.eos_token_ids, *extra})),
            pad_token_id=config.pad_token_id,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )

    @classmethod
    def from_dict(cls, raw: Raw, *, where: str) -> GenerationSettings:
        """Reads generation_config.json. A sampler other than the entropy-bound one is refused."""
        sampler = raw.get("sampler_config") or {}
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
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    seed: int


def warn_unknown(raw: Raw, known: set[str] | frozenset[str], where: str) -> None:
    if unknown := sorted(set(raw) - known):
        warnings.warn(f"{where}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)
