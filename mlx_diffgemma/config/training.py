"""The settings of a training run: every default, every check, YAML files. Imports no mlx.

Names are mlx-lm's where it has the same setting, so that its YAML files can be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import ConfigError

FineTuneType = Literal["lora", "full"]
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]

ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
DENSE = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
SELF_CONDITIONING = tuple(
    f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Within a layer, or from the root of the model. The router is left as it is, experts too.
DEFAULT_KEYS = (*ATTENTION, *DENSE, *SELF_CONDITIONING)
# mlx-lm's keys that mean nothing here, and what they may say then.
_INERT: dict[str, tuple[Any, ...]] = {
    "report_to": (None,),
    "project_name": (None,),
    "trust_remote_code": (None, False),
}
# And one that is right whatever it says: the cache of freed memory is bounded anyway.
_IGNORED = frozenset({"clear_cache_threshold"})


def _setting(
    help: str,
    default: Any = None,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    all_is: int | None = None,
) -> Any:
    """All of a setting but its name and type: what it is for, its default, and its bounds, those of
    `low` and `high` included, those of `above` and `below` not; `all_is` is a value beside them
    that means all there are."""
    bounds = {"low": low, "high": high, "above": above, "below": below, "all_is": all_is}
    return field(default=default, metadata={"help": help, **bounds})


def _range_of(bounds: Mapping[str, Any]) -> str:
    low, high, above, below, all_is = (
        bounds[key] for key in ("low", "high", "above", "below", "all_is")
    )
    if all_is is not None:
        return f"at least {low}, or {all_is} for all of them"
    if above is not None:
        return f"> {above}"
    if high is not None:
        return f"from {low:g} to {high}"
    return f">= {low:g}" if below is None else f"from {low:g} to below {below}"


def _is_within(value: float, bounds: Mapping[str, Any]) -> bool:
    low, high, above, below, all_is = (
        bounds[key] for key in ("low", "high", "above", "below", "all_is")
    )
    return (all_is is not None and value == all_is) or (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check(settings: Any, prefix: str = "") -> None:
    """Check every field of a dataclass of settings against its own type and bounds."""
    for name, kind in get_type_hints(type(settings)).items():
        value, bounds = getattr(settings, name), type(settings).__dataclass_fields__[name].metadata
        kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
        if value is None and NoneType in kinds:
            continue
        expected = _expected(value, kinds[0], bounds)
        if expected:
            raise ConfigError(f"{prefix}{name} must be {expected}, got {value!r}")


def _expected(value: Any, kind: Any, bounds: Mapping[str, Any]) -> str:
    """What a setting of a type must be, where its value is not; else nothing."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(choices)}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        is_kind = _is_whole(value) if kind is int else _is_number(value)
        return "" if is_kind and _is_within(value, bounds) else _range_of(bounds)
    if get_origin(kind) is Mapping:
        return "" if isinstance(value, Mapping) else "an object"
    return ""


@dataclass(frozen=True, kw_only=True)
class LoraParameters:
    """What adapters look like; the keys of mlx-lm's `lora_parameters`."""

    rank: int = _setting("Columns of each factor.", 8, low=1)
    scale: float = _setting("What the factors' product is multiplied with.", 20.0, above=0)
    dropout: float = _setting("Share of the inputs that training leaves out.", 0.0, low=0, below=1)
    keys: tuple[str, ...] = _setting("Modules that get an adapter.", DEFAULT_KEYS)

    def __post_init__(self) -> None:
        _check(self, "lora_parameters: ")
        if not self.keys or not all(isinstance(key, str) for key in self.keys):
            raise ConfigError(f"lora_parameters: keys must name modules, got {self.keys!r}")

    @classmethod
    def from_dict(cls, raw: Any) -> LoraParameters:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"lora_parameters must be an object, got {raw!r}")
        if "alpha" in raw:
            raise ConfigError("lora_parameters: alpha is not a key; scale is alpha / rank")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(map(str, set(raw) - known)):
            raise ConfigError(
                f"lora_parameters: unknown keys {', '.join(unknown)}; "
                f"there are {', '.join(sorted(known))}"
            )
        values = {key: value for key, value in raw.items() if value is not None}
        if "keys" in values:
            if not isinstance(values["keys"], (list, tuple)):
                raise ConfigError(f"lora_parameters: keys must be a list, got {values['keys']!r}")
            values["keys"] = tuple(values["keys"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Counts of iterations are of batches, as in mlx-lm."""

    fine_tune_type: FineTuneType = _setting("Train adapters, or all weights.", "lora")
    num_layers: int = _setting(
        "Train only the last N layers, and nothing outside of layers; -1 for everything.",
        -1,
        low=1,
        all_is=-1,
    )
    lora_parameters: LoraParameters = _setting(
        "Rank, scale, dropout and keys of adapters.", LoraParameters()
    )
    batch_size: int = _setting("Examples per batch.", 4, low=1)
    pool_batches: int = _setting(
        "Batches cut from one pool of examples, sorted by length; 1: any lengths together.",
        32,
        low=1,
    )
    iters: int = _setting("Batches to train on.", 1000, low=1)
    grad_accumulation_steps: int = _setting("Batches per update of the weights.", 1, low=1)
    learning_rate: float = _setting("Learning rate, where no schedule is given.", 1e-5, above=0)
    lr_schedule: Mapping[str, Any] | None = _setting(
        "name, arguments, warmup and warmup_init, as in mlx-lm."
    )
    optimizer: Optimizer = _setting("adam, adamw, muon, sgd or adafactor.", "adam")
    optimizer_config: Mapping[str, Any] | None = _setting("More arguments, by optimizer.")
    max_grad_norm: float = _setting(
        "Longest gradient; a longer one is shortened. 0: any.", 1.0, low=0
    )
    max_seq_length: int = _setting("Most tokens of an example, its canvases included.", 2048, low=2)
    canvas_length: int | None = _setting("Tokens per canvas; by default the checkpoint's.", low=1)
    mask_prompt: bool = _setting("Leave the prompt out of the causal loss.", False)
    noise_min: float = _setting(
        "Smallest share of a canvas that is replaced by noise.", 1e-4, low=0, high=1
    )
    noise_max: float = _setting(
        "Largest share of a canvas that is replaced by noise.", 1 - 1e-4, low=0, high=1
    )
    causal_weight: float = _setting(
        "Weight of the causal loss on the clean text; 0: none.", 1.0, low=0
    )
    self_conditioning_probability: float = _setting(
        "Share of examples that see what the model thought of them first.", 0.5, low=0, high=1
    )
    gradients_through_context: bool = _setting(
        "Whether the canvas loss also trains what the text's keys and values say.", True
    )
    val_batches: int = _setting("Batches of a validation; -1: all of them.", 25, low=1, all_is=-1)
    test_batches: int = _setting("Batches of a test; -1: all of them.", 500, low=1, all_is=-1)
    steps_per_report: int = _setting("Batches between reports.", 10, low=1)
    steps_per_eval: int = _setting("Batches between validations.", 200, low=1)
    save_every: int = _setting("Batches between checkpoints.", 100, low=1)
    grad_checkpoint: bool = _setting("Compute layers twice, and keep less of them.", False)
    seed: int = _setting(
        "Of the order of the data and of all that is drawn.", 0, low=0, high=2**31 - 1
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.noise_min > self.noise_max:
            raise ConfigError(
                f"noise_min of {self.noise_min} is above noise_max of {self.noise_max}"
            )
        if self.mask_prompt and not self.causal_weight:
            raise ConfigError("mask_prompt has no effect without a causal loss")
        if self.lr_schedule is not None:
            _check_schedule(self.lr_schedule)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainSettings:
        """From a YAML file's keys or a command's flags; what is None stays at its default."""
        values = {key: value for key, value in raw.items() if value is not None}
        if "lora_parameters" in values:
            values["lora_parameters"] = LoraParameters.from_dict(values["lora_parameters"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """As adapter_config.json and checkpoints have it."""
        raw = asdict(self)
        raw["lora_parameters"]["keys"] = list(raw["lora_parameters"]["keys"])
        if self.fine_tune_type == "full":
            raw["lora_parameters"] = None
        return raw


# What a file may set beside the settings: where things are and what to do.
COMMAND_KEYS = (
    "model train test data adapter_path resume_adapter_file resume revision config".split()
)


_PATHS = frozenset("model data adapter_path resume_adapter_file revision".split())


def read_recipe(path: str) -> dict[str, Any]:
    """The keys of a YAML file.

    Raises:
      ConfigError: if it cannot be read, or has a key that is not a setting.
    """
    import yaml

    try:
        raw = yaml.load(Path(path).read_text("utf-8"), Loader=_loader())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} must hold keys and values, got {type(raw).__name__}")
    known = {f.name for f in fields(TrainSettings)} | set(COMMAND_KEYS)
    for key, value in raw.items():
        if key in _IGNORED or (key in _INERT and value in _INERT[key]):
            continue
        if key in _INERT:
            raise ConfigError(f"{path}: {key} is not supported, got {value!r}")
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r}; known keys are {', '.join(sorted(known))}"
            )
        if key in _PATHS and not isinstance(value, str | None):
            raise ConfigError(f"{path}: {key} must be text, got {value!r}")
    return {k: v for k, v in raw.items() if k not in _INERT and k not in _IGNORED}


def help_of(name: str) -> str:
    """What a setting is for, in one sentence."""
    return _FIELDS[name].metadata["help"]


def default_of(name: str) -> Any:
    return _FIELDS[name].default


_FIELDS = {f.name: f for f in fields(TrainSettings)}


def _loader() -> Any:
    """YAML 1.1 reads 1e-5 as a string; people do not."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{number})$"), list("-+0123456789.")
    )
    return Loader


def _check_schedule(schedule: Mapping[str, Any]) -> None:
    if unknown := sorted(set(schedule) - {"name", "arguments", "warmup", "warmup_init"}):
        raise ConfigError(f"lr_schedule: unknown keys {', '.join(map(str, unknown))}")
    if schedule.get("name") not in SCHEDULES:
        raise ConfigError(
            f"lr_schedule: name must be one of {', '.join(SCHEDULES)}, got {schedule.get('name')!r}"
        )
    arguments = schedule.get("arguments")
    if not isinstance(arguments, (list, tuple)) or not all(map(_is_number, arguments)):
        raise ConfigError(f"lr_schedule: arguments must be a list of numbers, got {arguments!r}")
    least, most = SCHEDULES[schedule["name"]]
    if not least <= len(arguments) <= most:
        raise ConfigError(
            f"lr_schedule: {schedule['name']} takes {least} to {most} arguments, "
            f"got {len(arguments)}"
        )
    for key in ("warmup", "warmup_init"):
        if key in schedule and not (_is_number(schedule[key]) and schedule[key] >= 0):
            raise ConfigError(f"lr_schedule: {key} must be >= 0, got {schedule[key]!r}")
    if not _is_whole(schedule.get("warmup", 0)):
        raise ConfigError(f"lr_schedule: warmup must be a whole number, got {schedule['warmup']!r}")


# Of `mlx.optimizers.schedulers`: fewest and most arguments.
SCHEDULES = {
    "cosine_decay": (2, 3),
    "exponential_decay": (2, 2),
    "linear_schedule": (3, 3),
    "step_decay": (3, 3),
}
