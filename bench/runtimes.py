"""One checkpoint in three runtimes: ours, mlx-vlm and transformers, each run by its own loop.

Weights are shared where the runtimes hold the same values, or three copies of the real width would
not fit into a small machine. Everything is float32 on the CPU backend, whose gathered product knows
nothing else, and as the checkpoint has it (bfloat16) elsewhere. Every runtime draws at temperature
1, accepts by entropy, and cannot stop early. Benchmarks decide what is timed.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, Self

os.environ["HF_HUB_OFFLINE"] = "1"

# Before anybody else imports torch, and out of reach of a BLAS preloaded for MLX: with that one's
# threads beside its own, torch took up to twice as long here.
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | getattr(os, "RTLD_DEEPBIND", 0))
with suppress(ImportError):
    import torch
sys.setdlopenflags(_flags)

import mlx.core as mx
import numpy as np
from make_checkpoint import write_checkpoint
from mlx.utils import tree_flatten

from mlx_diffgemma import GenerationSettings, bundled_model, denoise_tokens, load_model
from mlx_diffgemma.checkpoint.memory import generation_limits
from mlx_diffgemma.checkpoint.names import Ignored, translate
from mlx_diffgemma.doctor.published import config_26b
from mlx_diffgemma.events import CanvasCommitted, PrefillDone, StepDone
from mlx_diffgemma.model import DiffusionGemma

Weights = Literal["dense", "mixed"]

# What differs from the published config. "bundled" is the trained model that comes along instead.
_SLIDING, _FULL = "sliding_attention", "full_attention"
SHAPES: dict[str, dict[str, Any]] = {
    "bundled": {},
    "scaled": {
        "num_hidden_layers": 6,
        "layer_types": [_SLIDING] * 5 + [_FULL],
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_experts": 32,
        "top_k_experts": 4,
        "moe_intermediate_size": 192,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "vocab_size": 32768,
        "sliding_window": 512,
    },
    # The layers have the published model's share of a step's products, some three quarters; in the
    # shape above the head and the soft embedding have more than half of them.
    "deep": {"num_hidden_layers": 24, "layer_types": ([_SLIDING] * 5 + [_FULL]) * 4},
    "real": {"num_hidden_layers": 2, "layer_types": [_SLIDING, _FULL]},
}
SHAPES["deep"] = SHAPES["scaled"] | SHAPES["deep"]
PREFILL_STEP = 2048  # ours by default; mlx-vlm is told the same
SETTLING_STEPS = 2
_NEVER = 1e-30  # a mean entropy below this: transformers refuses 0
TINY_TOWER = {  # transformers builds a vision tower whatever the files hold
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "use_clipped_linears": False,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One canvas from prompt to last token; what only MLX's runtimes tell stays empty for torch."""

    seconds: float
    prefill_seconds: float  # part of `seconds`
    steps: int
    marks: tuple[float, ...] = ()  # on the clock: one per step, each at the same point of it
    peak_bytes: int = 0  # MLX's, behind the prefill, weights included

    @property
    def step_seconds(self) -> list[float]:
        """Of the steps between the marks, but not of the first ones, which are no steady state:
        mlx-vlm computes its first step together with its second."""
        return [end - start for start, end in pairwise(self.marks[SETTLING_STEPS:])]


class Runtime(Protocol):
    """A model under its own loop. The canvas is as wide as the checkpoint says."""

    name: str

    def run(self, ids: Sequence[int], steps: int) -> Run:
        """One canvas of exactly `steps` denoise steps."""

    def first_logits(self, ids: Sequence[int], canvas: np.ndarray) -> np.ndarray:
        """Softcapped logits [L, V] of the first step on a canvas [L]."""


@dataclass(frozen=True, slots=True)
class Arrays:
    """A checkpoint's text tensors under our names."""

    tensors: dict[str, mx.array]
    shared_bytes: int  # of these, what the model that they were shared with holds anyway
    nbytes: int


def checkpoint(
    folder: Path, shape: str, weights: Weights, *, canvas: int | None = None, **text: Any
) -> Path:
    """Writes a text-only checkpoint into a folder that may be there; returns where it lies.

    Args:
      folder: where to write.
      shape: a key of `SHAPES`.
      weights: "dense" is bfloat16 on disk, "mixed" the published 4-bit packing.
      canvas: its length; by default 64 for the bundled model and 256 for the others.
      text: keys of text_config that differ from the shape's; not for the bundled model.
    """
    if shape == "bundled":
        return _bundled(folder, weights, canvas)
    config = config_26b()
    config["canvas_length"] = canvas or config["canvas_length"]
    config["text_config"] |= SHAPES[shape] | text
    # Images have no place in a smaller vocabulary, and no runtime is to build the tower.
    for key in ("vision_config", "boi_token_id", "image_token_id", "eoi_token_id"):
        del config[key]
    layout: Literal["official", "4bit"] = "official" if weights == "dense" else "4bit"
    return write_checkpoint(folder, layout=layout, config=config).folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def text_tokens(folder: Path, count: int, seed: int = 0) -> list[int]:
    """Random ids that stand for no image, whatever the vocabulary."""
    vocab_size = read_config(folder)["text_config"]["vocab_size"]
    return np.random.default_rng(seed).integers(20, min(vocab_size, 250_000), count).tolist()


def compute_dtype(folder: Path) -> mx.Dtype:
    """What all runtimes compute in."""
    on_cpu = mx.default_device() == mx.cpu
    return mx.float32 if on_cpu else getattr(mx, read_config(folder)["dtype"])


def read_arrays(folder: Path, sharing: DiffusionGemma | None = None) -> Arrays:
    """The tensors of a folder; those that `sharing` holds too, value by value, are taken from it.

    It may have fused or rescaled others after loading: these are read anew.
    """
    held = {} if sharing is None else dict(tree_flatten(sharing.parameters()))
    tensors: dict[str, mx.array] = {}
    shared = 0
    for file in sorted(folder.glob("*.safetensors")):
        lazy: dict[str, mx.array] = mx.load(str(file))
        for source in sorted(lazy):
            array = lazy.pop(source)  # or the file's own copy would stay
            if isinstance(name := translate(source), Ignored):
                continue
            if mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(compute_dtype(folder))
            ours = held.get(name)
            if (
                ours is not None
                and (ours.shape, ours.dtype) == (array.shape, array.dtype)
                and mx.array_equal(ours, array).item()
            ):
                array = ours
                shared += array.nbytes
            mx.eval(array)
            tensors[name] = array
    mx.clear_cache()
    return Arrays(tensors, shared, sum(array.nbytes for array in tensors.values()))


class Ours:
    """This package, with the settings it has by default."""

    name = "ours"

    def __init__(self, model: DiffusionGemma):
        self.model = model

    @classmethod
    def load(cls, folder: Path) -> Self:
        model = load_model(folder)
        if compute_dtype(folder) == mx.float32:  # scales too, or looked-up rows would be bfloat16
            model.set_dtype(mx.float32)
        return cls(model)

    def run(self, ids: Sequence[int], steps: int, canvas: int | None = None) -> Run:
        canvas = canvas or self.model.config.canvas_length
        settings = GenerationSettings(
            canvas_length=canvas,
            max_new_tokens=canvas,
            max_denoising_steps=steps,
            confidence_threshold=0,
            prefill_step_size=PREFILL_STEP,
            seed=0,
        )
        prefill, ran, marks = 0.0, 0, []
        started = time.perf_counter()
        with generation_limits():
            for event in denoise_tokens(self.model, _row(ids), settings):
                if isinstance(event, PrefillDone):
                    prefill = event.seconds
                    mx.reset_peak_memory()
                elif isinstance(event, StepDone):
                    marks.append(time.perf_counter())
                elif isinstance(event, CanvasCommitted):
                    ran = event.steps
        seconds = time.perf_counter() - started
        return Run(seconds, prefill, ran, tuple(marks), mx.get_peak_memory())

    def first_logits(self, ids: Sequence[int], canvas: np.ndarray) -> np.ndarray:
        with _widened(self.model.model.decoder.embed_tokens, self.model.dtype):
            context = self.model.prefill(_row(ids))
            return np.array(self.model.denoise(_row(canvas), context)[0])


class Mute:
    """What mlx-vlm's loop asks of a processor, a tokenizer and their parts, without any text."""

    last_segment = ""

    @property
    def detokenizer(self) -> Mute:
        return self

    @property
    def stopping_criteria(self) -> Mute:
        return self

    def __call__(self, token: int) -> bool:
        return False

    def add_eos_token_ids(self, ids: Any) -> None:
        pass

    def reset(self) -> None:
        pass

    def finalize(self) -> None:
        pass

    def add_token(self, token: int, skip_special_token_ids: Any = ()) -> None:
        pass

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return ""


class MlxVlm:
    """mlx-vlm in entropy-bound mode on the full canvas, as its own `generate` runs it."""

    name = "mlx-vlm"

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def load(cls, folder: Path, arrays: Arrays) -> Self:
        """Its own classes and its own packing of modules; the arrays are the caller's."""
        from mlx_vlm.models.diffusion_gemma.config import ModelConfig
        from mlx_vlm.models.diffusion_gemma.diffusion_gemma import Model
        from mlx_vlm.utils import load_config, load_model_weights

        config = load_config(folder) | {"vision_config": None}
        config["generation_config"] |= {"confidence_threshold": 0.0}
        model = Model(ModelConfig.from_dict(config))
        load_model_weights(model, config, model.sanitize(arrays.tensors), folder)
        if compute_dtype(folder) == mx.float32:  # scales too, or looked-up rows would be bfloat16
            model.set_dtype(mx.float32)
        return cls(model)

    def run(self, ids: Sequence[int], steps: int, canvas: int | None = None) -> Run:
        from mlx_vlm.generate.diffusion import stream_diffusion_generate

        marks: list[float] = []
        started = time.perf_counter()
        with self._listening(canvas or self.model.config.canvas_length, marks):
            *_, last = stream_diffusion_generate(
                self.model,
                Mute(),
                Mute(),
                _row(ids),
                None,
                None,
                max_tokens=self.model.config.canvas_length,
                skip_special_token_ids=[],
                temperature=1.0,
                max_denoising_steps=steps,
                diffusion_full_canvas=True,
                diffusion_sampler="entropy-bound",
                prefill_step_size=PREFILL_STEP,
            )
        seconds = time.perf_counter() - started
        prefill, ran = last.prompt_tokens / last.prompt_tps, last.diffusion_denoising_steps
        return Run(seconds, prefill, ran, tuple(marks), mx.get_peak_memory())

    def first_logits(self, ids: Sequence[int], canvas: np.ndarray) -> np.ndarray:
        model, tokens = self.model, _row(canvas)
        state = model.diffusion_prefill_cache(_row(ids), cache=model.make_cache())
        masks = model.diffusion_decoder_masks(tokens, state, None)
        logits = model.diffusion_decoder_logits(tokens, cache=state, decoder_attention_mask=masks)
        return np.array(logits[0].astype(mx.float32))

    @contextmanager
    def _listening(self, canvas: int, marks: list[float]) -> Iterator[None]:
        """Another canvas, and an ear at two calls of its loop: once behind the prefill, and once
        in each step."""
        model, widest = self.model, self.model.config.canvas_length
        masks, logits = model.diffusion_decoder_masks, model.diffusion_decoder_logits

        def prefilled(*args: Any, **options: Any) -> Any:
            mx.reset_peak_memory()
            return masks(*args, **options)

        def step(*args: Any, **options: Any) -> Any:
            marks.append(time.perf_counter())
            return logits(*args, **options)

        model.config.canvas_length = canvas
        model.diffusion_decoder_masks, model.diffusion_decoder_logits = prefilled, step
        try:
            yield
        finally:
            model.config.canvas_length = widest
            del model.diffusion_decoder_masks, model.diffusion_decoder_logits


class Transformers:
    """transformers on torch, as `generate` runs it; dense weights only."""

    name = "transformers"

    def __init__(self, model: Any):
        self.model = model
        self.encoded: list[float] = []  # seconds of each pass over the prompt
        self.decoded = 0
        encoder, started = model.model.encoder, [0.0]

        def begin(*_: Any) -> None:
            self._wait()
            started[0] = time.perf_counter()

        def end(*_: Any) -> None:
            self._wait()
            self.encoded.append(time.perf_counter() - started[0])

        def count(*_: Any) -> None:
            self.decoded += 1

        encoder.register_forward_pre_hook(begin)
        encoder.register_forward_hook(end)
        model.model.decoder.register_forward_hook(count)

    @classmethod
    def load(cls, folder: Path, arrays: Arrays) -> Self:
        """On the CPU, parameters are views of the MLX arrays; on a GPU, torch has its own copy."""
        from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
            DiffusionGemmaConfig,
        )
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
        )
        from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
            DiffusionGemmaForBlockDiffusion,
        )
        from transformers.utils import logging

        logging.set_verbosity_error()  # of the vision tower that is not there
        logging.disable_progress_bar()
        config = DiffusionGemmaConfig.from_dict(read_config(folder) | {"vision_config": TINY_TOWER})
        # numpy has no bfloat16: through uint16, which torch then reads as what it is.
        state = {
            name.removesuffix(".weight") if ".experts." in name else name: (
                torch.from_numpy(np.array(array, copy=False))
                if array.dtype == mx.float32
                else torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
            )
            for name, array in arrays.tensors.items()
        }
        model, report = DiffusionGemmaForBlockDiffusion.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=next(iter(state.values())).dtype,
            output_loading_info=True,
        )
        missing = [key for key in report["missing_keys"] if "vision" not in key]
        if missing or report["unexpected_keys"]:
            raise SystemExit(f"transformers: {missing=}, unexpected={report['unexpected_keys']}")
        held = model.state_dict()
        if copied := [key for key in state if held[key].data_ptr() != state[key].data_ptr()]:
            raise SystemExit(f"transformers copied {len(copied)} tensors, such as {copied[0]}")
        model.generation_config = DiffusionGemmaGenerationConfig.from_pretrained(folder)
        on_gpu = mx.default_device() != mx.cpu and torch.cuda.is_available()
        return cls(model.to("cuda" if on_gpu else "cpu").eval())

    def choose_threads(self, ids: Sequence[int]) -> int:
        """One thread, or as many as torch takes by itself: what it is faster with from now on. Its
        threads wait for one another by spinning, which is long where others want the cores."""
        seconds = {}
        for threads in sorted({torch.get_num_threads(), 1}):
            torch.set_num_threads(threads)
            self.run(ids, 1)
            seconds[threads] = self.run(ids, 2).seconds
        fastest = min(seconds, key=seconds.__getitem__)
        torch.set_num_threads(fastest)
        return fastest

    def run(self, ids: Sequence[int], steps: int) -> Run:
        self.encoded.clear()
        self.decoded = 0
        canvas = self.model.config.canvas_length
        prompt = self._row(ids)
        self._wait()
        started = time.perf_counter()
        output = self.model.generate(
            prompt,
            max_new_tokens=canvas,
            max_denoising_steps=steps,
            confidence_threshold=_NEVER,
        )
        self._wait()
        seconds = time.perf_counter() - started
        assert output.sequences.shape[1] == len(ids) + canvas
        return Run(seconds, self.encoded[0], self.decoded)

    def first_logits(self, ids: Sequence[int], canvas: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = self.model(
                input_ids=self._row(ids),
                decoder_input_ids=self._row(canvas),
                decoder_position_ids=self._row(range(len(ids), len(ids) + len(canvas))),
            ).logits
        return logits[0].float().cpu().numpy()

    def _row(self, ids: Any) -> Any:
        return torch.tensor([[int(i) for i in ids]], device=self.model.device)

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def _widened(table: Any, dtype: mx.Dtype) -> Iterator[None]:
    """A packed embedding with its scales in the type that the others hold them in here: rows read
    with bfloat16 scales are rounded, which moves logits by up to 3."""
    kept = {name: table[name] for name in ("scales", "biases") if name in table}
    table.update({name: array.astype(dtype) for name, array in kept.items()})
    yield
    table.update(kept)


def _row(ids: Any) -> mx.array:
    """int32 [1, N]."""
    return mx.array(np.array(ids, np.int32))[None]


def _bundled(folder: Path, weights: Weights, canvas: int | None) -> Path:
    """The bundled model, packed or with another canvas where that is asked for."""
    if weights == "mixed":
        from mlx_diffgemma.convert import convert

        convert(bundled_model(), folder, quantize=True)
    elif canvas is None:
        return bundled_model()
    else:
        shutil.copytree(bundled_model(), folder, dirs_exist_ok=True)
    config = read_config(folder)
    config["canvas_length"] = canvas or config["canvas_length"]
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder
