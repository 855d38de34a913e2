"""The settings of a training run: their defaults, their checks, and YAML files. Imports no mlx.

Names are mlx-lm's where it has the same setting, so that its YAML files can be used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .entry import Entry, check, entries, setting

FineTuneType = Literal["lora", "full"]
Optimizer = Literal["adam", "adamw", "muon", "sgd", "adafactor"]

ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
DENSE = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
SELF_CONDITIONING = tuple(
    f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")
)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# Paths within a layer, or from the root of the model. By default router and experts get none.
DEFAULT_KEYS = (*ATTENTION, *DENSE, *SELF_CONDITIONING)
# mlx-lm's keys without a meaning here, and the values that they may have.
_INERT: dict[str, tuple[Any, ...]] = {
    "report_to": (None,),
    "project_name": (None,),
    "trust_remote_code": (None, False),
}
# This one may have any value: the cache of freed memory is bounded anyway.
_IGNORED = frozenset({"clear_cache_threshold"})


_TRAIN = ("train",)  # the command that has the settings as options


def _setting(help: str, default: Any = None, **known: Any) -> Any:
    return setting(Entry(help=help, default=default, **known))


def _option(help: str, default: Any = None, **known: Any) -> Any:
    """Return a setting's field; the command has an option for it."""
    return _setting(help, default, commands=_TRAIN, **known)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


@dataclass(frozen=True, kw_only=True)
class LoraParameters:
    """The form of adapters; the keys are those of mlx-lm's `lora_parameters`."""

    rank: int = _setting("Columns of each factor.", 8, at_least=1)
    scale: float = _setting("Factor on the product of the two factors.", 20.0, above=0)
    dropout: float = _setting(
        "Share of the inputs that training leaves out.", 0.0, at_least=0, below=1
    )
    keys: tuple[str, ...] = _setting("Modules that get an adapter.", DEFAULT_KEYS)

    def __post_init__(self) -> None:
        try:
            check(self)
        except ConfigError as error:
            raise ConfigError(f"lora_parameters: {error}") from error
        if not self.keys or not all(isinstance(key, str) for key in self.keys):
            raise ConfigError(f"lora_parameters: keys must name modules, got {self.keys!r}")

    @classmethod
    def from_dict(cls, raw: Any) -> LoraParameters:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"lora_parameters must be an object, got {raw!r}")
        if "alpha" in raw:
            raise ConfigError("lora_parameters: alpha is not a key; scale is alpha / rank")
        known = set(entries(cls))
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
    """How to train. An iteration is a batch, as in mlx-lm."""

    fine_tune_type: FineTuneType = _option("Train adapters, or all weights.", "lora")
    num_layers: int = _option(
        "Train only the last N layers, and nothing outside of layers; -1 for everything.",
        -1,
        at_least=1,
        all_is=-1,
    )
    lora_parameters: LoraParameters = _setting(
        "Rank, scale, dropout and keys of adapters.", LoraParameters()
    )
    batch_size: int = _option("Examples per batch.", 4, at_least=1)
    pool_batches: int = _setting(
        "Batches cut from one pool of examples, sorted by length; 1: any lengths together.",
        32,
        at_least=1,
    )
    iters: int = _option("Batches to train on.", 1000, at_least=1)
    grad_accumulation_steps: int = _option("Batches per update of the weights.", 1, at_least=1)
    learning_rate: float = _option("Learning rate, where no schedule is given.", 1e-5, above=0)
    lr_schedule: Mapping[str, Any] | None = _setting(
        "name, arguments, warmup and warmup_init, as in mlx-lm."
    )
    optimizer: Optimizer = _option("adam, adamw, muon, sgd or adafactor.", "adam")
    optimizer_config: Mapping[str, Any] | None = _setting("More arguments, by optimizer.")
    max_grad_norm: float = _option(
        "Largest norm of the gradient; a larger one is scaled down. 0: no limit.", 1.0, at_least=0
    )
    max_seq_length: int = _option(
        "Most tokens of an example, its canvases included.", 2048, at_least=2
    )
    canvas_length: int | None = _option(
        "Tokens per canvas.", at_least=1, shown_default="the checkpoint's"
    )
    mask_prompt: bool = _option(
        "Leave the prompt out of the causal loss.", False, flags=("--mask-prompt",)
    )
    noise_min: float = _option(
        "Smallest share of a canvas that is replaced by noise.", 1e-4, at_least=0, at_most=1
    )
    noise_max: float = _option(
        "Largest share of a canvas that is replaced by noise.", 1 - 1e-4, at_least=0, at_most=1
    )
    causal_weight: float = _option(
        "Weight of the causal loss on the clean text; 0: none.", 1.0, at_least=0
    )
    self_conditioning_probability: float = _option(
        "Share of examples with self-conditioning from a first forward pass.",
        0.5,
        at_least=0,
        at_most=1,
    )
    gradients_through_context: bool = _option(
        "Whether the canvas loss also trains through the text's keys and values.",
        True,
    )
    val_batches: int = _option(
        "Batches of a validation; -1: all of them.", 25, at_least=1, all_is=-1
    )
    test_batches: int = _option("Batches of a test; -1: all of them.", 500, at_least=1, all_is=-1)
    steps_per_report: int = _option("Batches between reports.", 10, at_least=1)
    steps_per_eval: int = _option("Batches between validations.", 200, at_least=1)
    save_every: int = _option("Batches between checkpoints.", 100, at_least=1)
    grad_checkpoint: bool = _option(
        "Compute layers twice to save memory.", False, flags=("--grad-checkpoint",)
    )
    seed: int = _option(
        "Seed of the data's order and of all draws.", 0, at_least=0, at_most=2**31 - 1
    )

    def __post_init__(self) -> None:
        check(self)
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
        """Return settings from a YAML file's keys or a command's flags; None means the default."""
        values = {key: value for key, value in raw.items() if value is not None}
        if "lora_parameters" in values:
            values["lora_parameters"] = LoraParameters.from_dict(values["lora_parameters"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as adapter_config.json and checkpoints hold them."""
        raw = asdict(self)
        raw["lora_parameters"]["keys"] = list(raw["lora_parameters"]["keys"])
        if self.fine_tune_type == "full":
            raw["lora_parameters"] = None
        return raw


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a run does, with which model, data and folder: the part of a recipe beside the
    settings."""

    model: str | None = _option("Local folder or Hub repo id.", shown_default="")
    train: bool = _option("Train.", False, flags=("--train",), shown_default="")
    test: bool = _option(
        "Measure the loss on test.jsonl.", False, flags=("--test",), shown_default=""
    )
    data: str | None = _option(
        "Folder with train.jsonl, and valid.jsonl and test.jsonl if there are.", shown_default=""
    )
    adapter_path: str = _option("Folder of the run.", "adapters")
    resume: bool = _option(
        "Continue the run in --adapter-path.",
        False,
        flags=("--resume",),
        shown_default="",
    )
    resume_adapter_file: str | None = _option(
        "Start from these weights, with a fresh optimizer.", shown_default=""
    )
    revision: str | None = _option("Branch, tag or commit of a Hub repository.", shown_default="")

    def __post_init__(self) -> None:
        check(self)
        if not (self.train or self.test):
            raise ConfigError("nothing to do: give --train, --test, or both")
        for name in ("model", "data"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} is missing")
        if self.resume and self.resume_adapter_file is not None:
            raise ConfigError("--resume has its own weights; drop --resume-adapter-file")


def job_and_settings(given: Mapping[str, Any]) -> tuple[TrainJob, TrainSettings]:
    """Split the keys of a recipe and a command's options into job and settings; None means the
    default.

    Raises:
      ConfigError: if a value is impossible, or something is missing.
    """
    settings, job = (
        {name: given[name] for name in entries(cls) if given.get(name) is not None}
        for cls in (TrainSettings, TrainJob)
    )
    made = TrainSettings.from_dict(settings)
    return TrainJob(**job), made


def read_recipe(path: str) -> dict[str, Any]:
    """Return the keys of a YAML file.

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
    known = {*entries(TrainSettings), *entries(TrainJob), "config"}
    for key, value in raw.items():
        if key in _IGNORED or (key in _INERT and value in _INERT[key]):
            continue
        if key in _INERT:
            raise ConfigError(f"{path}: {key} is not supported, got {value!r}")
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r}; known keys are {', '.join(sorted(known))}"
            )
    return {k: v for k, v in raw.items() if k not in _INERT and k not in _IGNORED}


def _loader() -> Any:
    """Return a YAML loader that reads 1e-5 as a number; YAML 1.1 reads a string."""
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
    if not isinstance(schedule.get("warmup", 0), int):
        raise ConfigError(f"lr_schedule: warmup must be a whole number, got {schedule['warmup']!r}")


# Of `mlx.optimizers.schedulers`: fewest and most arguments.
SCHEDULES = {
    "cosine_decay": (2, 3),
    "exponential_decay": (2, 2),
    "linear_schedule": (3, 3),
    "step_decay": (3, 3),
}
