"""The training loop. Yields events and writes checkpoints; knows no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from ..checkpoint.adapters import add_adapters
from ..checkpoint.memory import generation_limits
from ..config.training import TrainSettings
from ..errors import ConfigError, DataError, LossError, SourceError
from ..model import DiffusionGemma
from ..model.backend import is_cpu
from ..model.products import unpacked
from .batches import Batch, Draw, Order, draw, make_batch
from .checkpoint import STATE, State, restore, save, trained_weights
from .data import Example
from .objective import layers_twice, losses
from .optimizer import is_matrix, make_optimizer


@dataclass(frozen=True, slots=True)
class Trained:
    """Means over the batches since the last report."""

    iteration: int
    loss: float  # nats: canvas + weight * causal
    canvas_loss: float
    causal_loss: float
    learning_rate: float
    iterations_per_second: float
    tokens_per_second: float  # read, without padding
    trained_tokens: int  # since the run began, also before a --resume
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Validated:
    """The losses on held-out examples, under the same noise every time."""

    iteration: int
    loss: float
    canvas_loss: float
    causal_loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on disk."""

    iteration: int
    path: Path


Event = Trained | Validated | Saved


def prepare(model: DiffusionGemma, settings: TrainSettings) -> None:
    """Prepare a model for training: add adapters or unfreeze weights, and freeze all else.

    On the CPU backend, whose packed products are slow and have no practical gradients, packed
    weights are unpacked to float32 for the run, as they are for generating.

    Args:
      model: as loaded, not fused.
      settings: what to train.

    Raises:
      ConfigError: if the model cannot be trained with these settings.
    """
    count = len(model.layers)
    if settings.train_vision and not model.has_vision:
        raise ConfigError("train_vision needs a model with its vision tower loaded")
    if settings.num_layers > count:
        raise ConfigError(f"num_layers is {settings.num_layers}, but the model has {count} layers")
    packed = [name for name in _flat(model.parameters()) if name.endswith(".scales")]
    if settings.fine_tune_type == "full":
        if packed:
            raise ConfigError(
                "packed weights cannot be trained, only adapters on them; "
                "give the model unpacked (mlx_diffgemma.convert --dequantize)"
            )
        model.freeze()
        if settings.num_layers == -1:
            model.unfreeze()
        else:
            causal = model.model.encoder.language_model.layers
            for layer in (*model.layers[-settings.num_layers :], *causal[-settings.num_layers :]):
                layer.unfreeze()
        if model.has_vision:
            for part in model.vision_parts:
                (part.unfreeze if settings.train_vision else part.freeze)()
    else:
        if packed and is_cpu():
            _unpack_all(model)
        # Adapters' first values are drawn here; later draws have their own seeds.
        mx.random.seed(settings.seed)
        add_adapters(
            model,
            num_layers=settings.num_layers,
            lora=settings.lora_parameters,
            vision=settings.train_vision,
        )
    model.train()


def _unpack_all(model: DiffusionGemma) -> None:
    """Replace packed modules, one by one, except the embeddings, whose rows are read rounded."""
    for path, module in model.named_modules():
        if "scales" in module and not isinstance(module, nn.QuantizedEmbedding):
            plain = unpacked(module)
            mx.eval(plain.parameters())
            model.update_modules(tree_unflatten([(path, plain)]))


class Trainer:
    """A run: a prepared model, its data, and its state."""

    def __init__(
        self,
        model: DiffusionGemma,
        train: Sequence[Example],
        valid: Sequence[Example],
        settings: TrainSettings,
        folder: Path,
        *,
        eos_token_id: int,
        facts: dict[str, Any] | None = None,
    ):
        """Begin a run at iteration 0.

        Args:
          model: from `prepare`.
          train: at least one batch of examples; none if nothing is trained.
          valid: held-out examples; may be none.
          settings: of the run.
          folder: where checkpoints go.
          eos_token_id: fills a canvas after an answer.
          facts: of model and data; they must be the same on resume.

        Raises:
          DataError: if there are fewer examples than a batch has.
        """
        if 0 < len(train) < settings.batch_size:
            raise DataError(
                f"{len(train)} training examples are fewer than batch_size of {settings.batch_size}"
            )
        self.model, self.settings, self.folder = model, settings, folder
        self.train_set, self.valid_set, self.eos_token_id = train, valid, eos_token_id
        self.facts = facts or {}
        self.canvas_length = settings.canvas_length or model.config.canvas_length
        lengths = [example.tokens(self.canvas_length) for example in train]
        self._order = Order(lengths, settings.batch_size, settings.seed, pool=settings.pool_batches)
        # The processes of a distributed run (`mlx.launch`), each with its share of every batch;
        # otherwise one.
        self._world = mx.distributed.init()
        if settings.batch_size % self._world.size():
            raise ConfigError(
                f"batch_size of {settings.batch_size} cannot be shared by {self._world.size()} "
                "processes"
            )
        self.iteration = self.trained_tokens = 0
        self._saved_at: int | None = None  # iteration of the last checkpoint
        if settings.optimizer == "muon":
            trained = trained_weights(model).items()
            if not any(is_matrix(name, weight) for name, weight in trained):
                raise ConfigError("muon has no matrices to train here; choose adamw")
        self.optimizer = make_optimizer(settings)
        self.optimizer.init(model.trainable_parameters())
        self._accumulated: dict[str, mx.array] = {}  # by name, of an update that is not complete
        self._is_asked_to_stop = self._is_changing = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self._world.rank() == 0

    def resume(self) -> None:
        """Continue exactly from the folder's last checkpoint.

        Raises:
          SourceError: if there is none that fits.
        """
        state = restore(self.folder, self.settings, self.facts)
        own = trained_weights(self.model)
        if {n: a.shape for n, a in own.items()} != {n: a.shape for n, a in state.weights.items()}:
            raise SourceError(f"{self.folder}: the checkpoint has other weights than this model")
        self.model.load_weights(list(state.weights.items()), strict=False)
        self.optimizer.state = state.optimizer
        self._accumulated = state.accumulated
        self.iteration = self._saved_at = state.iteration
        self.trained_tokens = state.trained_tokens
        if self.iteration >= self.settings.iters:
            raise ConfigError(
                f"the run in {self.folder} is at iteration {self.iteration} already; "
                f"iters of {self.settings.iters} leaves nothing to do"
            )
        mx.eval(self.model.parameters(), self.optimizer.state, self._accumulated)

    def stop(self) -> None:
        """Make `run` end before the next batch, as by an interrupt; for signal handlers."""
        self._is_asked_to_stop = True

    @property
    def is_whole(self) -> bool:
        """Whether weights, optimizer and the count of batches belong together, so that they can
        be saved; they do not in the middle of an update."""
        return not self._is_changing

    def save(self, *, numbered: bool = False) -> Saved:
        """Write a checkpoint of the run's state."""
        state = State(
            self.iteration,
            trained_weights(self.model),
            self.optimizer.state,
            self._accumulated,
            self.trained_tokens,
        )
        if self.is_first:
            save(self.folder, state, self.settings, self.facts, numbered=numbered)
        self._saved_at = self.iteration
        return Saved(self.iteration, self.folder / STATE)

    @property
    def last_checkpoint(self) -> str:
        """The last checkpoint, as the subject of a sentence."""
        if self._saved_at is None:
            return "no checkpoint was written yet"
        return f"the last checkpoint in {self.folder} is of iteration {self._saved_at:,}"

    def run(self) -> Iterator[Event]:
        """Train to `settings.iters`, and save at the end.

        A due checkpoint is written once the next batch's loss and gradients are finite, so never
        after an update that broke the model.

        Raises:
          LossError: if loss or gradients are not finite; the last checkpoint is kept.
          KeyboardInterrupt: after `stop`; the last batch is complete.
        """
        settings, s, is_due = self.settings, _Sums(), False
        # One copy of all weights is enough.
        is_numbered = settings.fine_tune_type == "lora"
        with generation_limits():
            if self.valid_set and self.iteration == 0:
                yield self._validated()
            while self.iteration < settings.iters:
                self._heed()
                started = time.perf_counter()
                values, grads, tokens = self._look()
                if is_due:
                    yield self.save(numbered=is_numbered)
                self._apply(grads, tokens)
                s.add(values, tokens, time.perf_counter() - started)
                is_last = self.iteration == settings.iters
                if self.iteration % settings.steps_per_report == 0 or is_last:
                    yield s.report(self)
                if self.valid_set and (self.iteration % settings.steps_per_eval == 0 or is_last):
                    yield self._validated()
                is_due = self.iteration % settings.save_every == 0
            self._check_finite(trained_weights(self.model), "weights are")
            yield self.save(numbered=is_numbered)

    def validate(self) -> Validated:
        """Return the losses on the held-out examples."""
        started = time.perf_counter()
        found = self.losses_on(self.valid_set, self.settings.val_batches)
        return Validated(self.iteration, *found, time.perf_counter() - started)

    def _validated(self) -> Validated:
        event = self.validate()
        if not math.isfinite(event.loss):
            raise self._broken(f"the validation loss is {event.loss}")
        return event

    def losses_on(self, examples: Sequence[Example], batches: int) -> tuple[float, float, float]:
        """Return mean losses over the first batches of examples, -1 for all: sum, canvas,
        causal."""
        settings, size = self.settings, self.settings.batch_size
        starts = range(0, len(examples), size)
        if batches != -1:
            starts = starts[:batches]
        self.model.eval()
        total = mx.zeros((4,))
        numbered = list(enumerate(starts))
        for number, start in numbered[self._world.rank() :: self._world.size()]:
            self._heed()
            part = examples[start : start + size]
            batch = self._batch(part, self._draw(part, number, validation=True))
            found = losses(self.model, batch.arrays(), settings, batch.sight)
            total = total + mx.stack([*found, mx.array(1.0)]) * len(part)
            mx.eval(total)
        self.model.train()
        loss, canvas, causal, count = cast(list[float], mx.distributed.all_sum(total).tolist())
        return loss / count, canvas / count, causal / count

    def _draw(self, examples: Sequence[Example], number: int, *, validation: bool = False) -> Draw:
        return draw(
            examples,
            self.settings,
            self.canvas_length,
            self.model.config.text.vocab_size,
            number,
            validation=validation,
        )

    def _batch(self, examples: Sequence[Example], drawn: Draw) -> Batch:
        return make_batch(
            examples,
            drawn,
            self.settings,
            self.canvas_length,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.model.config.pad_token_id,
            image_token_id=self.model.config.image_token_id,
            vision=self.model.config.vision,
        )

    def _heed(self) -> None:
        if self._is_asked_to_stop:
            raise KeyboardInterrupt

    def _look(self) -> tuple[list[float], Any, int]:
        """Return losses and gradients of the next batch, and the tokens read; change nothing.

        Not compiled: every new length would need a trace, which takes minutes on the CPU backend
        and saves nothing.
        """
        settings, model, processes = self.settings, self.model, self._world.size()
        examples = [self.train_set[i] for i in self._order[self.iteration]]
        drawn = self._draw(examples, self.iteration)
        share = settings.batch_size // processes
        first = share * self._world.rank()
        batch = self._batch(examples[first : first + share], drawn.rows(first, first + share))
        seed = ((settings.seed + 1) * 1_000_003 + self.iteration) * 1_009  # of dropout
        mx.random.seed(seed)
        value_and_grad = nn.value_and_grad(
            model, lambda arrays: losses(model, arrays, settings, batch.sight)
        )
        with layers_twice(model, seed=seed) if settings.grad_checkpoint else nullcontext():
            values, grads = value_and_grad(batch.arrays())
        # The tokens too: rows of each process have other lengths.
        sums = mx.distributed.all_sum(mx.stack([*values, mx.array(float(batch.tokens))]))
        # In the memory order of a checkpoint, which decides the rounding of sums.
        grads = average_gradients(tree_map(mx.contiguous, grads))
        mx.eval(sums, grads)
        *totals, tokens = cast(list[float], sums.tolist())
        found = [total / processes for total in totals]
        if not math.isfinite(found[0]):
            raise self._broken(f"the loss is {found[0]}")
        self._check_finite(_flat(grads), "gradients are")
        return found, grads, int(tokens)

    def _apply(self, grads: Any, tokens: int) -> None:
        """Count the batch and its tokens, and update the weights if it completes an update."""
        settings = self.settings
        is_update = (self.iteration + 1) % settings.grad_accumulation_steps == 0
        self._is_changing = True
        if self._accumulated:
            grads = tree_map_with_path(lambda name, g: g + self._accumulated[name], grads)
        if is_update:
            if settings.grad_accumulation_steps > 1:
                grads = tree_map(lambda g: g / settings.grad_accumulation_steps, grads)
            if settings.max_grad_norm:
                grads, _ = optim.clip_grad_norm(grads, settings.max_grad_norm)
            self.optimizer.update(self.model, grads)
        self._accumulated = {} if is_update else _flat(grads)
        mx.eval(self._accumulated, self.model.trainable_parameters(), self.optimizer.state)
        self.iteration += 1
        self.trained_tokens += tokens
        self._is_changing = False

    def _check_finite(self, arrays: dict[str, mx.array], what: str) -> None:
        if not mx.stack([mx.isfinite(array).all() for array in arrays.values()]).all().item():
            raise self._broken(f"{what} not finite")

    def _broken(self, what: str) -> LossError:
        return LossError(
            f"{what} at iteration {self.iteration + 1:,}; {self.last_checkpoint}; "
            "a smaller learning rate may help"
        )


def _flat(tree: Any) -> dict[str, mx.array]:
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


class _Sums:
    """Sums for a report since the last one."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.values, self.count, self.tokens, self.seconds = [0.0, 0.0, 0.0], 0, 0, 0.0

    def add(self, values: Sequence[float], tokens: int, seconds: float) -> None:
        self.values = [a + b for a, b in zip(self.values, values, strict=True)]
        self.count, self.tokens = self.count + 1, self.tokens + tokens
        self.seconds += seconds

    def report(self, trainer: Trainer) -> Trained:
        means = [value / self.count for value in self.values]
        event = Trained(
            trainer.iteration,
            means[0],
            means[1],
            means[2],
            float(trainer.optimizer.learning_rate),
            self.count / self.seconds,
            self.tokens / self.seconds,
            trainer.trained_tokens,
            mx.get_peak_memory(),
        )
        self._clear()
        return event
