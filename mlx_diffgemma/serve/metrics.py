"""Numbers of the server since its start, in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

_HELP = {
    "requests_total": "Requests answered, by route and status.",
    "prompt_tokens_total": "Prompt tokens of the requests.",
    "cached_tokens_total": "Of them, those that a kept context held already.",
    "completion_tokens_total": "Tokens written.",
    "steps_total": "Denoise steps of rows; rows that are stepped together count one each.",
    "step_seconds_total": "Seconds that rows spent in denoise steps; divide by steps_total.",
    "canvases_total": "Canvases committed.",
    "cancelled_total": "Answers whose client went away.",
    "queue": "Requests that wait.",
    "running": "Requests under way.",
    "rows": "Rows that are stepped together.",
    "memory_bytes": "Bytes of MLX's arrays in use.",
}
_PREFIX = "mlx_diffgemma"
Count = Literal[
    "prompt_tokens_total",
    "cached_tokens_total",
    "completion_tokens_total",
    "steps_total",
    "step_seconds_total",
    "canvases_total",
    "cancelled_total",
]


class Metrics:
    """Counters that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._counts: dict[str, float] = {
            name: 0 for name in _HELP if name.endswith("_total") and name != "requests_total"
        }

    def answered(self, route: str, status: int) -> None:
        """Count an answered request."""
        with self._lock:
            self._requests[route, status] += 1

    def add(self, name: Count, count: float) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += count

    def count(self, name: Count) -> float:
        """Return a counter's value."""
        with self._lock:
            return self._counts[name]

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all numbers, with those of the moment.

        Args:
          gauges: name -> value now.
        """
        with self._lock:
            requests = [
                (f'{{route="{_quoted(route)}",status="{status}"}}', count)
                for (route, status), count in sorted(self._requests.items())
            ]
            counts = {name: [("", value)] for name, value in self._counts.items()}
        blocks = [_block("requests_total", "counter", requests)]
        blocks += [_block(name, "counter", values) for name, values in counts.items()]
        blocks += [_block(name, "gauge", [("", value)]) for name, value in gauges.items()]
        return "".join(blocks)


def _block(name: str, kind: str, values: Iterable[tuple[str, float]]) -> str:
    full = f"{_PREFIX}_{name}"
    lines = [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}"]
    lines += [f"{full}{labels} {value:.10g}" for labels, value in values]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
