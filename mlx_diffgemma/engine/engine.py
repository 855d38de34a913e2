"""The engine: a thread that runs the rows of many jobs together over one model."""

from __future__ import annotations

import atexit
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx

from ..checkpoint.memory import (
    WARN_ABOVE,
    array_bytes,
    context_bytes,
    generation_limits,
    image_bytes,
    recommended_bytes,
    row_bytes,
)
from ..denoise.images import FEATURE_BYTES
from ..denoise.loop import Rows
from ..denoise.row import Row
from ..denoise.store import Store
from ..errors import EngineClosedError, EngineError, EngineFailedError, QueueFullError
from ..language.encoded import ImageForm
from ..language.prompt import Prompt, PromptOptions, encode_prompt
from ..model import DiffusionGemma
from ..write.job import Running, Task
from .run import END, Channel, Failure, Run

if TYPE_CHECKING:
    from ..language.tokenizer import AnyTokenizer


@dataclass(eq=False)
class _Entry:
    """A request in the engine."""

    running: Running
    channel: Channel
    rows: list[Row] = field(default_factory=list)  # under way
    waiting: deque[Row] = field(default_factory=deque)  # asked for, until there is room


class Engine:
    """Runs requests of any thread together. Each writes what it would write alone.

    Requests begin in the order in which they came. A row joins while there is room for it, and the
    memory of all rows together stays within the budget. An error of one request ends that one
    alone; an error of the model ends all that are under way, and the engine takes further ones.
    The engine runs until it is closed, or the process ends.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: AnyTokenizer,
        *,
        max_rows: int = 8,
        max_queue: int = 64,
        store: Store | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Start the engine's thread.

        Args:
          model: from `load`; no other thread may run it while the engine does.
          tokenizer: from `load`.
          max_rows: rows that are stepped together.
          max_queue: requests that may wait, beyond `max_rows` others.
          store: where contexts are kept across requests.
          memory_bytes: for the contexts, images and logits of all rows; by default what the device
            recommends, less the weights, the store and a tenth.

        Raises:
          EngineError: if a limit is below 1, or the model leaves no memory.
          ConfigError: if the store keeps another model's contexts.
        """
        for name, value in (("max_rows", max_rows), ("max_queue", max_queue)):
            if value < 1:
                raise EngineError(f"{name} must be at least 1, got {value}")
        if memory_bytes is None:
            kept = store.max_bytes if store is not None else 0
            if not model.has_vision and (vision := model.vision_source.nbytes):
                kept += vision + FEATURE_BYTES  # the first image loads it
            memory_bytes = int(recommended_bytes() * WARN_ABOVE) - array_bytes(model) - kept
        if memory_bytes < 1:
            raise EngineError(
                f"memory_bytes must be at least 1, got {memory_bytes:,}: the model and the store "
                "leave no memory for requests"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_queue, self.memory_bytes = max_rows, max_queue, memory_bytes
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._is_closed = False
        self._entries: list[_Entry] = []  # begun; the engine's thread alone uses them
        self._owners: dict[Row, _Entry] = {}
        self._store = store
        self._rows = Rows(model, store, are_events_computed=True)
        self._thread = threading.Thread(
            target=copy_context().run,  # such as the choice of the graph
            args=(self._work,),
            name="mlx_diffgemma engine",
            daemon=True,
        )
        self._thread.start()
        # MLX aborts the process if a thread is still using it at the end.
        atexit.register(self.close, cancel=True)

    def encode(self, prompt: Prompt, options: PromptOptions = PromptOptions()) -> list[int]:
        """Return the token ids of a prompt, as a request with it would have them.

        Raises:
          PromptError: as `encode_prompt`.
        """
        return encode_prompt(self.tokenizer, prompt, options, ImageForm.of(self.model.config))

    def submit(self, task: Task) -> Run:
        """Queue a request and return its run.

        Raises:
          EngineError: if the queue is full, the engine is closed, or the task is none.
          DiffGemmaError: if the request cannot be used.
        """
        if not callable(getattr(task, "job", None)):
            raise EngineError(
                f"an engine takes a Request or another task, got {type(task).__name__}"
            )
        job = task.job(self.model, self.tokenizer)
        channel = Channel()
        with self._changed:
            if self._is_closed:
                raise EngineClosedError("the engine is closed")
            if len(self._queue) + len(self._entries) >= self.max_rows + self.max_queue:
                raise QueueFullError(
                    f"the queue is full: {len(self._entries)} requests are under way and "
                    f"{len(self._queue)} wait (max_rows={self.max_rows}, "
                    f"max_queue={self.max_queue}); try again later"
                )
            self._queue.append(_Entry(Running(job), channel))
            self._changed.notify_all()
        return Run(channel, self._cancel)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, run those under way and waiting to their ends (or cancel them),
        and end the thread."""
        with self._changed:
            self._is_closed = True
            if cancel:
                for entry in (*self._queue, *self._entries):
                    entry.channel.is_cancelled = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(cancel=True)

    @property
    def counts(self) -> dict[str, int]:
        """How many requests wait and run, and how many rows are stepped."""
        with self._changed:
            return {
                "waiting": len(self._queue),
                "running": len(self._entries),
                "rows": len(self._rows.rows),
            }

    def _cancel(self, channel: Channel) -> None:
        # Also called when a run is collected, in any thread: no lock may be taken here.
        channel.is_cancelled = True

    def _work(self) -> None:
        """Run requests until the engine is closed and nothing is left."""
        try:
            with generation_limits():
                while self._wait():
                    try:
                        self._drop_cancelled()
                        self._begin()
                        self._join()
                        self._advance()
                    except Exception as error:  # such as a lack of memory: it may be any row's
                        self._fail_all(error)
        finally:
            with self._changed:
                self._is_closed = True
                self._entries.extend(self._queue)
                self._queue.clear()
            self._fail_all(EngineClosedError("its thread has ended"))
            mx.clear_streams()  # or the process aborts when it ends
            mx.clear_cache()

    def _wait(self) -> bool:
        """Wait until there is something to do; return False once the engine is closed and has
        nothing left."""
        with self._changed:
            while not (self._queue or self._entries or self._is_closed):
                self._changed.wait()
            return bool(self._queue or self._entries)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [e for e in (*self._queue, *self._entries) if e.channel.is_cancelled]
            self._queue = deque(e for e in self._queue if e not in dropped)
        for entry in dropped:
            self._end(entry, END)

    def _begin(self) -> None:
        """Begin requests while no row of an earlier one waits for room."""
        while not any(entry.waiting for entry in self._entries):
            if len(self._rows.rows) >= self.max_rows:
                return
            with self._changed:
                if not self._queue:
                    return
                entry = self._queue.popleft()
                self._entries.append(entry)
            self._hear(entry, entry.running.begin())
            self._join()

    def _join(self) -> None:
        """Let waiting rows join, in order, while there is room for them."""
        for entry in list(self._entries):
            while entry.waiting and len(self._rows.rows) < self.max_rows:
                row = entry.waiting[0]
                needed = self._bytes_of([row])
                if needed > self.memory_bytes:
                    error = EngineError(
                        f"the request needs {_gigabytes(needed)} for {row.most_tokens} tokens, "
                        f"and the engine has {_gigabytes(self.memory_bytes)} for all rows; ask "
                        "for fewer tokens"
                    )
                    self._end(entry, Failure(error))
                    break
                if self._bytes_of([*self._rows.rows, row]) > self.memory_bytes:
                    return
                entry.waiting.popleft()
                entry.rows.append(row)
                self._owners[row] = entry
                self._rows.add(row)

    def _bytes_of(self, rows: Sequence[Row]) -> int:
        """Return the most bytes that rows will need. A context that several share counts once."""
        config, size = self.model.config, self.model.dtype.size
        shared = {id(row.shared): row.shared.length for row in rows if row.shared is not None}
        contexts = sum(context_bytes(config.text, length, size) for length in shared.values())
        return contexts + sum(
            row_bytes(config.text, row.most_tokens, row.settings.canvas_length, element_bytes=size)
            + image_bytes(config, row.image_tokens, element_bytes=size)
            for row in rows
        )

    def _advance(self) -> None:
        """Step all rows once, and pass their events to their jobs."""
        for row, event in self._rows.advance():
            entry = self._owners.get(row)  # None if its request has ended
            if entry is not None and not entry.channel.is_cancelled:
                self._hear(entry, entry.running.take(event))
        for row in [row for row in self._owners if row.is_done]:
            self._owners.pop(row).rows.remove(row)
        for entry in list(self._entries):
            if not (entry.rows or entry.waiting or entry.channel.is_cancelled):
                error = EngineError("the request waits for events, but none of its rows is left")
                self._end(entry, Failure(error))

    def _hear(self, entry: _Entry, words: Iterator[Any]) -> None:
        """Pass on what a job says, and take the rows that it asks for."""
        try:
            for said in words:
                mx.eval(_arrays(said))  # another thread cannot compute them
                entry.channel.put(said)
        except Exception as error:  # whatever it is, it is the job's alone
            self._end(entry, Failure(error))
            return
        entry.waiting.extend(entry.running.asked)
        entry.running.asked = []
        if entry.running.is_done:
            self._end(entry, END)

    def _end(self, entry: _Entry, word: Any) -> None:
        """End a request with a last word."""
        for row in entry.rows:
            self._rows.remove(row)
            self._owners.pop(row, None)
        entry.rows.clear()
        entry.waiting.clear()
        with self._changed:
            if entry in self._entries:
                self._entries.remove(entry)
        try:
            entry.running.close()
        except Exception as error:  # of the job's own tidying up
            word = Failure(error) if word is END else word
        entry.channel.put(word)
        if word is not END:
            entry.channel.put(END)

    def _fail_all(self, error: Exception) -> None:
        """End all requests under way with an error; the engine goes on with the next ones."""
        traceback.clear_frames(error.__traceback__)  # askers keep the error, not the rows' arrays
        self._rows = Rows(self.model, self._store, are_events_computed=True)
        self._owners.clear()
        for entry in list(self._entries):
            reason = EngineFailedError(f"the engine failed: {type(error).__name__}: {error}")
            reason.__cause__ = error
            self._end(entry, Failure(reason))


def _arrays(said: Any) -> list[mx.array]:
    """Return the arrays of an event."""
    values = [getattr(said, f.name) for f in fields(said)] if is_dataclass(said) else []
    values += [x for value in values if isinstance(value, tuple) for x in value]
    return [value for value in values if isinstance(value, mx.array)]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
