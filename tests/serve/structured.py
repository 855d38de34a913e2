"""Structured answers over HTTP: many requests under many JSON Schemas, in all dialects that hold
one, streamed or not. Each answer is read and validated by `jsonschema`, or ends with `length`.

    python -m tests.serve.structured [--schemas 200] [--requests 2000] [--cases FILE]
        [--tokenizer FOLDER]

Cases are JSON lines, {"name", "schema"}; without a file, schemas are drawn. The bundled model
answers, or with a tokenizer a random model of its vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

from mlx_diffgemma import GenerationSettings, bundled_model, load_tokenizer
from tests.checkpoints import load_drawn
from tests.serve.cases import Answered, Running, ask, post, serving
from tests.write.merged_tokens import END, schemas_of

PROMPT = "Write a record."
STEPS = 2  # of a canvas, at most
BUDGETS = (24, 120, 400, 1200)  # tokens
MOST_SECONDS = 600.0  # of an answer, on a machine that others use too
USER = [{"role": "user", "content": PROMPT}]


@dataclass(frozen=True)
class Dialect:
    """How a dialect asks for a schema, and where its answer is. Each reader returns the text, and
    whether it ended before its limit."""

    path: str
    body: Callable[[Any, int], dict[str, Any]]
    whole: Callable[[Any], tuple[str, bool]]
    streamed: Callable[[Answered], tuple[str, bool]]


def _chat(schema: Any, most: int) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}
    return {"messages": USER, "max_tokens": most, "response_format": form}


def _call(schema: Any, most: int) -> dict[str, Any]:
    function = {"name": "record", "parameters": schema}
    tools = [{"type": "function", "function": function}]
    return {"messages": USER, "max_tokens": most, "tools": tools, "tool_choice": "required"}


def _responses(schema: Any, most: int) -> dict[str, Any]:
    form = {"type": "json_schema", "name": "record", "schema": schema}
    return {"input": PROMPT, "max_output_tokens": most, "text": {"format": form}, "store": False}


def _messages(schema: Any, most: int) -> dict[str, Any]:
    form = {"type": "json_schema", "schema": schema}
    told = {"model": "bundled", "messages": USER, "max_tokens": most}
    return {**told, "output_config": {"format": form}}


def _of_chat(answer: Any) -> tuple[str, bool]:
    (choice,) = answer["choices"]
    return choice["message"]["content"], choice["finish_reason"] == "stop"


def _of_call(answer: Any) -> tuple[str, bool]:
    (choice,) = answer["choices"]
    calls = choice["message"].get("tool_calls") or []
    return "".join(c["function"]["arguments"] for c in calls[:1]), bool(calls)


def _of_responses(answer: Any) -> tuple[str, bool]:
    texts = [p["text"] for item in answer["output"] for p in item.get("content") or ()]
    return "".join(texts), answer["status"] == "completed"


def _of_messages(answer: Any) -> tuple[str, bool]:
    return "".join(b["text"] for b in answer["content"]), answer["stop_reason"] == "end_turn"


def _chunks(answer: Answered) -> tuple[str, bool]:
    choices = [event["choices"][0] for event in answer.events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"] == "stop"


def _call_chunks(answer: Answered) -> tuple[str, bool]:
    choices = [event["choices"][0] for event in answer.events[:-1]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    first = "".join(c["function"]["arguments"] for c in calls if c["index"] == 0)
    return first, bool(calls)


def _named(answer: Answered) -> list[Any]:
    lines = answer.body.decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def _response_events(answer: Answered) -> tuple[str, bool]:
    events = _named(answer)
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    return text, events[-1]["type"] == "response.completed"


def _message_events(answer: Answered) -> tuple[str, bool]:
    events = _named(answer)
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    ends = [e["delta"]["stop_reason"] for e in events if e["type"] == "message_delta"]
    return "".join(d["text"] for d in deltas), ends == ["end_turn"]


DIALECTS = {
    "chat": Dialect("/v1/chat/completions", _chat, _of_chat, _chunks),
    "call": Dialect("/v1/chat/completions", _call, _of_call, _call_chunks),
    "responses": Dialect("/v1/responses", _responses, _of_responses, _response_events),
    "messages": Dialect("/v1/messages", _messages, _of_messages, _message_events),
}


@dataclass
class Seen:
    """What came of the requests."""

    answers: Counter[str] = field(default_factory=Counter)  # whole ones, by dialect
    cut: int = 0  # by their limit
    refused: Counter[str] = field(default_factory=Counter)  # schemas, by why
    too_small: int = 0  # limits that no answer fits
    schemas: set[int] = field(default_factory=set)  # that had a whole answer
    findings: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        return self.answers.total() + self.cut


def one(
    running: Running, number: int, schema: Any, most: int, draw: random.Random, seen: Seen
) -> str:
    """Ask once for so many tokens at most; return `answered`, or why not: the schema is `refused`,
    or the limit too `small` for any answer."""
    names = [name for name in DIALECTS if name != "call" or schema.get("type") == "object"]
    name = draw.choice(names)
    dialect, is_stream = DIALECTS[name], draw.random() < 0.4
    body = dialect.body(schema, most) | {"stream": is_stream, "seed": draw.randrange(1 << 30)}
    try:
        answer = ask(running, post(dialect.path, body), MOST_SECONDS)
    except (OSError, IndexError) as error:
        seen.findings.append(f"{name}: {error!r}")
        return "answered"
    told = answer.body.decode()
    with seen.lock:
        if answer.status == 400 and "tokens" in answer.json["error"]["message"]:
            seen.too_small += 1
            return "small"
        if answer.status == 400:
            seen.refused[answer.json["error"]["message"][:80]] += 1
            return "refused"
        if answer.status != 200:
            seen.findings.append(f"{name} {answer.status}: {told[:300]}")
            return "answered"
        text, is_whole = dialect.streamed(answer) if is_stream else dialect.whole(json.loads(told))
        if not is_whole:
            seen.cut += 1
            return "answered"
        seen.answers[name] += 1
        seen.schemas.add(number)
        if not is_valid(schema, text):
            seen.findings.append(f"{name} {json.dumps(schema)[:300]}: {text[:300]!r}")
    return "answered"


def is_valid(schema: Any, text: str) -> bool:
    """Whether a text is JSON that fits, by other means than ours."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema).is_valid(value)


def run(
    running: Running,
    schemas: Sequence[Any],
    wanted: int,
    requests: int,
    clients: int,
    budgets: Sequence[int] = BUDGETS,
) -> Seen:
    """Ask so many times under so many schemas that can be held, the same number under each."""
    seen, waiting, lock = Seen(), list(enumerate(schemas)), threading.Lock()
    held, each = [0], -(-requests // wanted)

    def client() -> None:
        while True:
            with lock:
                if not waiting or held[0] >= wanted:
                    return
                number, schema = waiting.pop(0)
                held[0] += 1
            if held[0] % 20 == 0:
                said = f"{held[0]} schemas, {seen.count} answers, {len(seen.findings)} findings"
                print(said, file=sys.stderr, flush=True)
            draw, left, answered = random.Random(number), list(budgets), 0
            while left and answered < each:
                most = draw.choice(left)
                outcome = one(running, number, schema, most, draw, seen)
                answered += outcome == "answered"
                if outcome == "refused":
                    left = []
                elif outcome == "small":
                    left = [budget for budget in left if budget > most]
            if not left:
                with lock:
                    held[0] -= 1  # another schema takes its place

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def random_model(folder: Path) -> tuple[Any, Any]:
    """A random model of a tokenizer's vocabulary, with the bundled model's chat template."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(bundled_model()).chat_template
    model = load_drawn(
        3,
        vocab_size=len(tokenizer),
        canvas_length=16,  # each step chooses among all of the vocabulary
        hidden_size=16,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        eos_token_id=[1, tokenizer.convert_tokens_to_ids(END)],
    )
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json")
    parser.add_argument("--cases", type=Path, help="JSON lines, may be gzipped")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a canvas, at most")
    parser.add_argument("--longest", type=int, default=max(BUDGETS), help="tokens of an answer")
    options = parser.parse_args()
    model = random_model(options.tokenizer) if options.tokenizer else None
    started, used = time.perf_counter(), time.process_time()
    schemas = schemas_of(options.cases, 10_000 if options.cases else 2 * options.schemas)
    budgets = [each for each in BUDGETS if each <= options.longest]
    counts = options.schemas, options.requests, options.clients
    settings = GenerationSettings(max_denoising_steps=options.steps)
    with serving(model=model, settings=settings) as running:
        seen = run(running, schemas, *counts, budgets)
        bugs = running.bugs
    print(
        f"{'bundled model' if model is None else f'{len(model[1]):,} tokens'}: {seen.count} "
        f"answers under {len(seen.schemas)} schemas: whole {dict(seen.answers)}, cut {seen.cut}; "
        f"{seen.too_small} limits below the shortest answer; refused {dict(seen.refused)}; "
        f"{time.perf_counter() - started:.0f} s, {time.process_time() - used:.0f} processor s"
    )
    print(*seen.findings[:20], *map(repr, bugs), f"{len(seen.findings)} findings", sep="\n")
    sys.exit(bool(seen.findings or bugs or seen.count < options.requests))


if __name__ == "__main__":
    main()
