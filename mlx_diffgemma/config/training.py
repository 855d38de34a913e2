"""The settings of a training run: every default, every check, YAML files. Imports no mlx.

Names are mlx-lm's where it has the same setting, so that its YAML files can be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

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


def _require(holds: bool, name: str, value: Any, range_: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {range_}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _setting(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class LoraParameters:
    """What adapters look like; the keys of mlx-lm's `lora_parameters`."""

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] = DEFAULT_KEYS

    def __post_init__(self) -> None:
        _require(
            _is_whole(self.rank) and self.rank >= 1, "lora_parameters: rank", self.rank, ">= 1"
        )
        _require(
            _is_number(self.scale) and self.scale > 0, "lora_parameters: scale", self.scale, "> 0"
        )
        _require(
            _is_number(self.dropout) and 0 <= self.dropout < 1,
            "lora_parameters: dropout",
            self.dropout,
            "from 0 to below 1",
        )
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
        "Train only the last N layers, and nothing outside of layers; -1 for everything.", -1
    )
    lora_parameters: LoraParameters = _setting(
        "Rank, scale, dropout and keys of adapters.", LoraParameters()
    )
    batch_size: int = _setting("Examples per batch.", 4)
    pool_batches: int = _setting(
        "Batches cut from one pool of examples, sorted by length; 1: any lengths together.",
        32,
    )
    iters: int = _setting("Batches to train on.", 1000)
    grad_accumulation_steps: int = _setting("Batches per update of the weights.", 1)
    learning_rate: float = _setting("Learning rate, where no schedule is given.", 1e-5)
    lr_schedule: Mapping[str, Any] | None = _setting(
        "name, arguments, warmup and warmup_init, as in mlx-lm."
    )
    optimizer: Optimizer = _setting("adam, adamw, muon, sgd or adafactor.", "adam")
    optimizer_config: Mapping[str, Any] | None = _setting("More arguments, by optimizer.")
    max_grad_norm: float = _setting("Longest gradient; a longer one is shortened. 0: any.", 1.0)
    max_seq_length: int = _setting("Most tokens of an example, its canvases included.", 2048)
    canvas_length: int | None = _setting("Tokens per canvas; by default the checkpoint's.")
    mask_prompt: bool = _setting("Leave the prompt out of the causal loss.", False)
    noise_min: float = _setting("Smallest share of a canvas that is replaced by noise.", 1e-4)
    noise_max: float = _setting("Largest share of a canvas that is replaced by noise.", 1 - 1e-4)
    causal_weight: float = _setting("Weight of the causal loss on the clean text; 0: none.", 1.0)
    self_conditioning_probability: float = _setting(
        "Share of examples that see what the model thought of them first.", 0.5
    )
    gradients_through_context: bool = _setting(
        "Whether the canvas loss also trains what the text's keys and values say.", True
    )
    val_batches: int = _setting("Batches of a validation; -1: all of them.", 25)
    test_batches: int = _setting("Batches of a test; -1: all of them.", 500)
    steps_per_report: int = _setting("Batches between reports.", 10)
    steps_per_eval: int = _setting("Batches between validations.", 200)
    save_every: int = _setting("Batches between checkpoints.", 100)
    grad_checkpoint: bool = _setting("Compute layers twice, and keep less of them.", False)
    seed: int = _setting("Of the order of the data and of all that is drawn.", 0)

    def __post_init__(self) -> None:
        for name, choices in (("fine_tune_type", FineTuneType), ("optimizer", Optimizer)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name, least in _LEAST_WHOLE.items():
            value = getattr(self, name)
            if name == "canvas_length" and value is None:
                continue
            _require(_is_whole(value) and value >= least, name, value, f">= {least}")
        for name in ("num_layers", "val_batches", "test_batches"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} must be at least 1, or -1 for all of them, got 0")
        if self.seed > _LARGEST_SEED:
            raise ConfigError(f"seed must be at most {_LARGEST_SEED}, got {self.seed}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            text = f"from {low:g} to {high:g}" if high < float("inf") else f">= {low:g}"
            _require(_is_number(value) and low <= value <= high, name, value, text)
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "> 0")
        if self.noise_min > self.noise_max:
            raise ConfigError(
                f"noise_min of {self.noise_min} is above noise_max of {self.noise_max}"
            )
        for name in ("mask_prompt", "gradients_through_context", "grad_checkpoint"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.mask_prompt and not self.causal_weight:
            raise ConfigError("mask_prompt has no effect without a causal loss")
        _check_schedule(self.lr_schedule)
        if not isinstance(self.optimizer_config, Mapping | None):
            raise ConfigError(f"optimizer_config must be an object, got {self.optimizer_config!r}")

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


_LEAST_WHOLE = {
    "num_layers": -1,
    "batch_size": 1,
    "pool_batches": 1,
    "iters": 1,
    "grad_accumulation_steps": 1,
    "max_seq_length": 2,
    "canvas_length": 1,
    "val_batches": -1,
    "test_batches": -1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "seed": 0,
}
_LARGEST_SEED = 2**31 - 1
_INFINITE = float("inf")
_RANGES = {
    "learning_rate": (0.0, _INFINITE),
    "max_grad_norm": (0.0, _INFINITE),
    "noise_min": (0.0, 1.0),
    "noise_max": (0.0, 1.0),
    "causal_weight": (0.0, _INFINITE),
    "self_conditioning_probability": (0.0, 1.0),
}
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


def _check_schedule(schedule: Any) -> None:
    if schedule is None:
        return
    if not isinstance(schedule, Mapping):
        raise ConfigError(f"lr_schedule must be an object, got {schedule!r}")
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
