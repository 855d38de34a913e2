"""The display of a training run in a terminal: a line per report, on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..errors import SourceError, counted
from ..train.fuse import Fused
from ..train.trainer import Event, Saved, Trained, Validated

if TYPE_CHECKING:
    from ..train.session import Session


class TrainView:
    """Prints a line per event; of several processes only the first prints."""

    def __init__(self) -> None:
        self._is_silent = False

    def start(self, session: Session) -> None:
        self._is_silent = not session.trainer.is_first
        trainer, settings = session.trainer, session.trainer.settings
        total, trainable = session.parameters, session.trainable
        self._say(
            f"{settings.fine_tune_type}: {trainable:,} of {total:,} weights trained "
            f"({trainable / total:.2%}); {counted(len(trainer.train_set), 'example')}, "
            f"{len(trainer.valid_set):,} for validation"
        )
        if trainer.iteration:
            self._say(f"resuming at iteration {trainer.iteration:,} of {settings.iters:,}")

    def show(self, event: Event) -> None:
        match event:
            case Trained():
                self._say(
                    f"iteration {event.iteration:,}: loss {event.loss:.4f} "
                    f"(canvas {event.canvas_loss:.4f}, causal {event.causal_loss:.4f}), "
                    f"rate {event.learning_rate:.3g}, {event.iterations_per_second:.2f} it/s, "
                    f"{event.tokens_per_second:,.0f} tokens/s, {event.trained_tokens:,} tokens, "
                    f"peak {event.peak_bytes / 1e9:.2f} GB"
                )
            case Validated():
                self._say(
                    f"iteration {event.iteration:,}: validation loss {event.loss:.4f} "
                    f"(canvas {event.canvas_loss:.4f}, causal {event.causal_loss:.4f}), "
                    f"{event.seconds:.1f} s"
                )
            case Saved():
                self._say(f"iteration {event.iteration:,}: saved {event.path}")

    def interrupted(self, session: Session) -> None:
        """Save the state if possible, and print from where the run can resume."""
        saved = session.interrupted()
        if saved is None:
            self._say(f"stopped in the middle of an update; {session.trainer.last_checkpoint}")
            return
        self._say(
            f"interrupted at iteration {saved.iteration:,}: saved {saved.path}; --resume continues"
        )

    def picture(self, session: Session) -> None:
        """Draw the curves, and print their path or why there are none."""
        try:
            path = session.draw()
        except SourceError as error:
            self._say(f"no curves drawn: {error}")
            return
        if path is not None:
            self._say(f"curves in {path}")

    def tested(self, losses: tuple[float, float, float]) -> None:
        total, canvas, causal = losses
        self._say(f"test loss {total:.4f} (canvas {canvas:.4f}, causal {causal:.4f})")

    def _say(self, text: str) -> None:
        if not self._is_silent:
            print(text, file=sys.stderr, flush=True)


def show_fused(fused: Fused) -> None:
    """Print the result of a fusion, and the error of packing again."""
    print(f"{fused.folder}: {fused.nbytes:,} bytes, {counted(fused.changed, 'module')} changed")
    if fused.errors:
        worst = max(fused.errors, key=lambda path: fused.errors[path])
        mean = sum(fused.errors.values()) / len(fused.errors)
        print(
            f"{len(fused.errors)} of them packed again, which lost {mean:.2%} of their weights' "
            f"size on average, {fused.errors[worst]:.2%} of {worst}'s at most; "
            "--dequantize loses none"
        )
