"""Puts deliberate faults into a copy of the package, one at a time, and shows which test notices.

usage: python tests/faults.py [WORD ...]     only faults whose name holds one of the words

Exits 1 if a fault goes unnoticed. Needs torch, for the parity tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
MODEL, LOGITS = "tests/model/test_model.py", "tests/parity/test_logits.py"
LOOP, TRAJECTORY = "tests/denoise/test_loop.py", "tests/parity/test_trajectory.py"
SAMPLER, PARITY_SAMPLER = "tests/denoise/test_sampler.py", "tests/parity/test_sampler.py"
SCHEDULE, STOPPING = "tests/denoise/test_schedule.py", "tests/denoise/test_stopping.py"
ROWS = "tests/denoise/test_rows.py"
STORE, STORE_FILES = "tests/denoise/test_store.py", "tests/denoise/test_store_files.py"
ENGINE, RUN = "tests/engine/test_engine.py", "tests/engine/test_run.py"
LIFT, DECODE = "tests/constraint/test_tokens.py", "tests/constraint/test_decode.py"
CLASSES = "tests/denoise/test_classes.py"
LINE = "tests/constraint/test_line.py"
NOISE, FILL = "tests/denoise/test_noise.py", "tests/write/test_fill.py"
TIED, LAYOUTS = "tests/checkpoint/test_tied.py", "tests/checkpoint/test_layouts.py"
OBJECTIVE = "tests/parity/test_objective.py"
SHARED, CONVERT = "tests/convert/test_shared.py", "tests/convert/test_write.py"
CONVERT_CLI = "tests/convert/test_cli.py"
CONTROLS, GIVEN = "tests/language/test_controls.py", "tests/language/test_given.py"
TOOLS, TOOL_CALLS = "tests/language/test_tools.py", "tests/write/test_tool_calls.py"
TEXT, TOKENIZER = "tests/language/test_text.py", "tests/language/test_tokenizer.py"
GENERATE, AS_ON_GPU = "tests/write/test_generate.py", "tests/write/test_as_on_gpu.py"
TRAIN, TRAIN_DATA = "tests/train/test_train.py", "tests/train/test_train_data.py"
ADAPTERS, PEFT = "tests/checkpoint/test_adapters.py", "tests/checkpoint/test_peft.py"

INSTALL, CACHE = "tests/test_install.py", "tests/checkpoint/test_cache.py"
CHOICE, BLAS = "tests/checkpoint/test_choice.py", "tests/checkpoint/test_blas.py"
MODELS, PROGRAM = "tests/cli/test_models.py", "tests/cli/test_program.py"
CHECKS, OUTCOME = "tests/doctor/test_checks.py", "tests/doctor/test_outcome.py"
DEVICE = "tests/doctor/test_device.py"
FLOORS, MACHINE = "tests/doctor/test_floors.py", "tests/doctor/test_machine.py"
SPEED, ANSWERS = "tests/doctor/test_speed.py", "tests/doctor/test_answers.py"
CHAT, CHAT_CLI = "tests/write/test_chat.py", "tests/cli/test_chat.py"
REGEX, BUILD = "tests/constraint/test_regex.py", "tests/constraint/test_build.py"
SCHEMA, CALLS = "tests/constraint/test_schema.py", "tests/constraint/test_tool_calls.py"
REPORT, DOCTOR = "tests/doctor/test_report.py", "tests/doctor/test_command.py"


@dataclass(frozen=True)
class Fault:
    """`before`, which stands in `file` exactly once, becomes `after`."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "router input: routes on the normed residual",
        "model/diffusion_gemma.py",
        "*self.router(flat)",
        "*self.router(self.pre_feedforward_layernorm_2(flat))",
        (LOGITS,),
    ),
    Fault(
        "value norm: left out",
        "model/attention.py",
        "values = normed[:, :, -K:]",
        "values = self._project(x).reshape(B, L, -1, H)[:, :, -K:]",
        (LOGITS,),
    ),
    Fault(
        "value norm: full layers take the normed key",
        "model/attention.py",
        "values = normed[:, :, -K:]",
        "values = (normed if normed.shape[2] > N + K else normed * scale)[:, :, -K:]",
        (LOGITS,),
    ),
    Fault(
        "proportional rope: exponents over the rotating part",
        "model/rope.py",
        "/ np.float32(head_dim)",
        "/ np.float32(2 * rotating)",
        (MODEL,),
    ),
    Fault(
        "window edge: a query sees one place more",
        "model/masks.py",
        "(key > query - window)",
        "(key >= query - window)",
        (MODEL,),
    ),
    Fault(
        "window edge: the canvas sees one place more",
        "model/diffusion_gemma.py",
        "text.sliding_window - 1 if is_sliding",
        "text.sliding_window if is_sliding",
        (LOGITS,),
    ),
    Fault(
        "self-conditioning norm: left out in the first step",
        "model/self_conditioning.py",
        "return unit_rms(embeddings, self.eps)",
        "return embeddings if soft is None else unit_rms(embeddings, self.eps)",
        (MODEL,),
    ),
    Fault(
        "self-conditioning norm: in the encoder too",
        "model/diffusion_gemma.py",
        "scalars = self.model.encoder.language_model.layers\n",
        "scalars = self.model.encoder.language_model.layers\n"
        "        x = self.model.decoder.self_conditioning(x, None)\n",
        (LOGITS,),
    ),
    Fault(
        "self-conditioning: the soft embedding is not scaled",
        "model/diffusion_gemma.py",
        "return self._scale_embedding(soft)",
        "return soft",
        (MODEL,),
    ),
    Fault(
        "self-conditioning: never comes back",
        "denoise/step.py",
        "soft = _self_conditioning(model, canvases, mean_row)",
        "soft = None",
        (LOOP,),
    ),
    Fault(
        "acceptance rule: counts a position's own entropy",
        "denoise/sampler.py",
        "mx.cumsum(ascending, axis=-1) - ascending",
        "mx.cumsum(ascending, axis=-1)",
        (SAMPLER,),
    ),
    Fault(
        "acceptance rule: ranks by order instead of its inverse",
        "denoise/sampler.py",
        "rank, axis=-1)\n    return Decision",
        "order, axis=-1)\n    return Decision",
        (SAMPLER,),
    ),
    Fault(
        "acceptance rule: accepted positions are frozen",
        "denoise/step.py",
        "        tokens = pinned.over(tokens)\n    return _Judgement(",
        "        tokens = pinned.over(tokens)\n"
        "    tokens = mx.where(seen.entropy < 0.1, draft, tokens)\n    return _Judgement(",
        (TRAJECTORY,),
    ),
    Fault(
        "commit: forgotten",
        "denoise/row.py",
        "self.context, self.unread = self.opened.pop().closed(), tokens",
        "self.context, self.unread = self.opened.pop().closed(), None",
        (LOOP,),
    ),
    Fault(
        "commit: encoded with the decoder's layer scalars",
        "model/diffusion_gemma.py",
        "scalars[depth].layer_scalar",
        "layer.layer_scalar",
        (LOGITS,),
    ),
    Fault(
        "commit: other tokens than the draft",
        "denoise/row.py",
        "return self._commit(last.draft)",
        "return self._commit(mx.zeros_like(last.draft))",
        (LOOP,),
    ),
    Fault(
        "canvas position: one too late",
        "model/diffusion_gemma.py",
        "return Segment(width, past, place, mask, text.position)",
        "return Segment(width, past, place, mask, text.position + 1)",
        (LOGITS,),
    ),
    Fault(
        "padding: visible to the canvas",
        "model/masks.py",
        "return (key >= padding[:, None])[:, None, None]",
        "return (key >= 0 * padding[:, None])[:, None, None]",
        (MODEL,),
    ),
    Fault(
        "padding: counts as positions",
        "model/context.py",
        "return self.length if self.padding is None else self.length - self.padding",
        "return self.length",
        (MODEL,),
    ),
    Fault(
        "experts: gate and up change places",
        "model/experts.py",
        "out = self.down_proj(geglu(gate, up)",
        "out = self.down_proj(geglu(up, gate)",
        (MODEL,),
    ),
    Fault(
        "experts: sorted rows are not put back",
        "model/experts.py",
        "out = out[back]",
        "out = out[order]",
        (MODEL,),
    ),
    Fault(
        "router: weights without the expert's own scale",
        "model/experts.py",
        "weights * self.per_expert_scale[chosen]",
        "weights",
        (MODEL,),
    ),
    Fault(
        "softcap: left out",
        "model/layers.py",
        "return mx.tanh(outputs.astype(mx.float32) / cap) * cap",
        "return outputs.astype(mx.float32)",
        (LOGITS,),
    ),
    Fault(
        "temperature: one step too cold",
        "denoise/schedule.py",
        "return (steps - step) / steps",
        "return (steps - step - 1) / steps",
        (SCHEDULE,),
    ),
    Fault(
        "stop rule: stable is enough",
        "denoise/stopping.py",
        "settled = entropy.mean(axis=-1) < confidence_threshold",
        "settled = entropy.mean(axis=-1) < 1e9",
        (STOPPING,),
    ),
    Fault(
        "stop rule: most positions are enough",
        "denoise/stopping.py",
        "(holds if matters is None else holds | ~matters).all(axis=-1)",
        "(holds if matters is None else holds | ~matters).any(axis=-1)",
        (STOPPING,),
    ),
    Fault(
        "rows: one that is done is computed on",
        "denoise/loop.py",
        "self.rows = [row for row in self.rows if not row.is_done]",
        "pass",
        (LOOP,),
    ),
    Fault(
        "rows: a step built ahead is taken though a row left",
        "denoise/loop.py",
        "return len(canvases) == len(self._seen) and all(",
        "return all(",
        (LOOP, ROWS),
    ),
    Fault(
        "rows: a step built ahead is taken for the next canvas",
        "denoise/loop.py",
        "canvas.tokens is tokens and canvas.plan == plan",
        "canvas.plan == plan",
        (LOOP,),
    ),
    Fault(
        "rows: a step built ahead is taken though a width changed",
        "denoise/loop.py",
        "canvas.tokens is tokens and canvas.plan == plan",
        "canvas.tokens is tokens",
        (LOOP,),
    ),
    Fault(
        "engine: a cancelled request runs on",
        "engine/run.py",
        'iteration ends."""\n        self._cancel(self._channel)',
        'iteration ends."""',
        (ENGINE,),
    ),
    Fault(
        "engine: a dropped run is not cancelled",
        "engine/run.py",
        "def __del__(self) -> None:\n        self._cancel(self._channel)",
        "def __del__(self) -> None:\n        pass",
        (RUN,),
    ),
    Fault(
        "engine: requests that wait are forgotten when the thread ends",
        "engine/engine.py",
        "self._entries.extend(self._queue)",
        "pass",
        (ENGINE,),
    ),
    Fault(
        "engine: an error of the model ends the thread",
        "engine/engine.py",
        "self._fail_all(error)\n        finally",
        "raise\n        finally",
        (ENGINE,),
    ),
    Fault(
        "engine: errors keep the rows' arrays",
        "engine/engine.py",
        "traceback.clear_frames(error.__traceback__)",
        "pass",
        (ENGINE,),
    ),
    Fault(
        "engine: a job's error while it is closed is everybody's",
        "engine/engine.py",
        "except Exception as error:  # of the job's own tidying up",
        "except MemoryError as error:",
        (ENGINE,),
    ),
    Fault(
        "engine: a job without rows waits for ever",
        "engine/engine.py",
        "if not (entry.rows or entry.waiting or entry.channel.is_cancelled):",
        "if False:",
        (ENGINE,),
    ),
    Fault(
        "engine: rows join without room for their memory",
        "engine/engine.py",
        "if needed + self._used() > self.memory_bytes:",
        "if False:",
        (ENGINE,),
    ),
    Fault(
        "engine: more rows than allowed",
        "engine/engine.py",
        "while entry.waiting and len(self._rows.rows) < self.max_rows:",
        "while entry.waiting:",
        (ENGINE,),
    ),
    Fault(
        "engine: the queue has no end",
        "engine/engine.py",
        "if len(self._queue) + len(self._entries) >= self.max_rows + self.max_queue:",
        "if False:",
        (ENGINE,),
    ),
    Fault(
        "engine: the process ends without closing it",
        "engine/engine.py",
        "atexit.register(self.close, cancel=True)",
        "pass",
        (RUN,),
    ),
    Fault(
        "engine: close drops what runs",
        "engine/engine.py",
        "            self._is_closed = True\n            if cancel:",
        "            self._is_closed = True\n            if True:",
        (ENGINE,),
    ),
    Fault(
        "rows: one that is removed stays in the step built ahead",
        "denoise/loop.py",
        "self._ahead = None  # it may hold the row's context",
        "pass",
        (ENGINE,),
    ),
    Fault(
        "rows: those that have read stay first in line",
        "denoise/loop.py",
        "self.rows = [row for row in self.rows if row not in reading] + reading",
        "pass",
        (ENGINE,),
    ),
    Fault(
        "stream: read in any thread",
        "denoise/loop.py",
        "if threading.get_ident() != began_in:",
        "if False:",
        (RUN,),
    ),
    Fault(
        "store: the shortest beginning is found",
        "denoise/store.py",
        "node = max(nodes, key=lambda n: n.length)\n            self._use(node)",
        "node = min(nodes, key=lambda n: n.length)\n            self._use(node)",
        (STORE,),
    ),
    Fault(
        "store: the first parts of full layers are kept whole",
        "denoise/store.py",
        "_alone(LayerContext(layer.keys[:, :, start:], layer.values[:, :, start:]))",
        "_alone(layer)",
        (STORE,),
    ),
    Fault(
        "store: views keep the whole in memory",
        "denoise/store.py",
        "copied = layer.join(none.keys, none.values)",
        "copied = layer",
        (STORE,),
    ),
    Fault(
        "store: no budget",
        "denoise/store.py",
        "while self._bytes > self.max_bytes:",
        "while False:",
        (STORE,),
    ),
    Fault(
        "store: a text that does not fit empties it",
        "denoise/store.py",
        "if context.nbytes > self.max_bytes:",
        "if False:",
        (STORE,),
    ),
    Fault(
        "store: the newest goes first",
        "denoise/store.py",
        "key=lambda n: n.read)\n            if oldest",
        "key=lambda n: -n.read)\n            if oldest",
        (STORE,),
    ),
    Fault(
        "store: any model's contexts",
        "denoise/store.py",
        "if self._model() is not model:",
        "if False:",
        (
            STORE,
            ENGINE,
        ),
    ),
    Fault(
        "store: the whole text is found, and nothing left to read",
        "denoise/store.py",
        "self._beginnings(tokens[:-1])",
        "self._beginnings(tokens)",
        (STORE,),
    ),
    Fault(
        "store: snapshots at the end of a text only",
        "denoise/store.py",
        "{*range(every, len(text), every), len(text), *turns[:1], *turns[-1:]}",
        "{len(text), *turns[:1], *turns[-1:]}",
        (STORE,),
    ),
    Fault(
        "store: a damaged file is used",
        "denoise/store_files.py",
        "if content_hash(raw) != file.content:",
        "if False:",
        (STORE_FILES,),
    ),
    Fault(
        "store: a file of another model or version is used",
        "denoise/store_files.py",
        "if metadata != self._metadata:",
        "if False:",
        (STORE_FILES,),
    ),
    Fault(
        "store: a file of another text is used",
        "denoise/store_files.py",
        "if not np.array_equal(text, tokens[: file.key.length]):",
        "if False:",
        (STORE_FILES,),
    ),
    Fault(
        "store: a file of another type or shape is used",
        "denoise/store_files.py",
        "bits) in arrays.items()} != expected:",
        "bits) in arrays.items()} is None:",
        (STORE_FILES,),
    ),
    Fault(
        "store: a file with NaN is used",
        "denoise/store_files.py",
        "        if not are_finite(arrays):",
        "        if False:",
        (STORE_FILES,),
    ),
    Fault(
        "store: NaN is written",
        "denoise/store_files.py",
        " or not all(map(are_finite, copies.values())):",
        ":",
        (STORE_FILES,),
    ),
    Fault(
        "store: the fingerprint has no values",
        "denoise/store_files.py",
        "        digest.update(bits_of(array).tobytes())",
        "        pass",
        (STORE_FILES,),
    ),
    Fault(
        "store: parts are joined the other way round",
        "denoise/store_files.py",
        "[*chains[key.start], file]",
        "[file, *chains[key.start]]",
        (STORE_FILES,),
    ),
    Fault(
        "store: a folder has no budget",
        "denoise/store_files.py",
        "            if total <= self._max_bytes:\n                break\n",
        "            if True:\n                return True\n",
        (STORE_FILES,),
    ),
    Fault(
        "store: the newest file goes first",
        "denoise/store_files.py",
        "key=lambda f: (f.used,",
        "key=lambda f: (-f.used,",
        (STORE_FILES,),
    ),
    Fault(
        "store: a file that is read does not count as used",
        "denoise/store_files.py",
        "os.utime(self._folder / file.name, ns=(now, now))",
        "pass",
        (STORE_FILES,),
    ),
    Fault(
        "store: parts that a new file needs are removed for it",
        "denoise/store_files.py",
        "            if file.name not in kept:",
        "            if True:",
        (STORE_FILES,),
    ),
    Fault(
        "store: files that others are writing do not count",
        "denoise/store_files.py",
        "                    total += int(found[1])",
        "                    pass",
        (STORE_FILES,),
    ),
    Fault(
        "store: what a killed writer left stays",
        "denoise/store_files.py",
        "                    path.unlink()",
        "                    pass",
        (STORE_FILES,),
    ),
    Fault(
        "store: a full disk ends the run",
        "denoise/store_files.py",
        "        except OSError as error:\n            if not self._has_warned:",
        "        except ValueError as error:\n            if not self._has_warned:",
        (STORE_FILES,),
    ),
    Fault(
        "store: a text that waits is written again",
        "denoise/store_files.py",
        "            waiting = dict(self._waiting)",
        "            waiting = {}",
        (STORE_FILES,),
    ),
    Fault(
        "store: the chat's folder is not used",
        "cli/chat.py",
        "        store=store,\n",
        "",
        (CHAT_CLI,),
    ),
    Fault(
        "rows: the first one's position for all",
        "model/diffusion_gemma.py",
        "mask, text.position)",
        "mask, texts[0].position)",
        (MODEL,),
    ),
    Fault(
        "rows: the first one's mask for all texts",
        "model/diffusion_gemma.py",
        "_joined, masks[row, is_sliding], context.position",
        "_joined, masks[0, is_sliding], context.position",
        (MODEL,),
    ),
    Fault(
        "rows: one writes its keys at another's place",
        "model/diffusion_gemma.py",
        "else partial(_behind, places)",
        "else partial(_behind, kept[0][depth])",
        (MODEL,),
    ),
    Fault(
        "rows: each attends to the first one's columns",
        "model/attention.py",
        "values if segment.count == T else values[:, :, start:stop]",
        "values if segment.count == T else values[:, :, : segment.count]",
        (MODEL,),
    ),
    Fault(
        "rows: the first one's heat for all of a piece",
        "denoise/step.py",
        "mx.broadcast_to(h, (1, widths[r], 1)) for h, r in zip(heats",
        "mx.broadcast_to(heats[0], (1, widths[r], 1)) for h, r in zip(heats",
        (ROWS,),
    ),
    Fault(
        "rows: soft embeddings in the wrong order",
        "denoise/step.py",
        "own = _columns(soft, at, at + widths[row])\n                parts.append(",
        "own = _columns(soft, at, at + widths[row])\n                parts.insert(0, ",
        (LOOP,),
    ),
    Fault(
        "rows: one without a belief shifts the others",
        "denoise/step.py",
        "parts.append(mx.zeros((1, first.plan.width, hidden), model.dtype))",
        "parts.insert(0, mx.zeros((1, first.plan.width, hidden), model.dtype))",
        (LOOP,),
    ),
    Fault(
        "rows: a shared context is written in place",
        "model/diffusion_gemma.py",
        "place = _beside if shared[row] else partial(_behind, places)",
        "place = partial(_behind, places)",
        (MODEL,),
    ),
    Fault(
        "rows: a shared context is opened with a copy",
        "denoise/row.py",
        "if self.is_shared\n",
        "if False\n",
        (ROWS,),
    ),
    Fault(
        "rows: a long text delays the others",
        "denoise/loop.py",
        "self.rows = [row for row in self.rows if row not in reading] + reading",
        "pass",
        (LOOP,),
    ),
    Fault(
        "rows: one that joins moves the others' numbers",
        "denoise/loop.py",
        "check, numbers = numbers[: len(each.check)], numbers[len(each.check) :]",
        "check = numbers[: len(each.check)]",
        (LOOP,),
    ),
    Fault(
        "rows: an empty answer is drawn again from the same noise",
        "denoise/row.py",
        "noise = noise.reroll(self._attempt)",
        "noise = noise.reroll(0)",
        (LOOP,),
    ),
    Fault(
        "rows: all draw from one key",
        "denoise/loop.py",
        "replace(settings, seed=settings.seed + number)",
        "settings",
        (LOOP,),
    ),
    Fault(
        "softcap: left out of the statistics",
        "denoise/sampler.py",
        "(outputs.astype(mx.float32) if cap == NO_CAP else softcap(outputs, cap)) / heat",
        "outputs.astype(mx.float32) / heat",
        (SAMPLER,),
    ),
    Fault(
        "packed: GPUs get another soft embedding",
        "model/products.py",
        "        weights,\n        table.weight,",
        "        weights * weights,\n        table.weight,",
        (f"{AS_ON_GPU}::test_in_float32_every_policy_writes_what_the_cpu_graph_writes",),
    ),
    Fault(
        "unpacking: biases left out",
        "model/products.py",
        "biases[rows].astype(mx.float32)",
        "mx.zeros_like(biases[rows]).astype(mx.float32)",
        (MODEL,),
    ),
    Fault(
        "canvas keys: behind what the last step wrote",
        "model/diffusion_gemma.py",
        "return (written.first(kept + keys.shape[2]),), written",
        "return (written,), written",
        (MODEL,),
    ),
    Fault(
        "held tokens: frozen",
        "denoise/sampler.py",
        "held = mx.where(held == draft, held, -1)",
        "held = held",
        (SAMPLER,),
    ),
    Fault(
        "narrow canvas: the answer's end is cut off",
        "denoise/stopping.py",
        "first, draft.shape[1]).astype(mx.int32) + 1",
        "first, draft.shape[1]).astype(mx.int32)",
        (STOPPING,),
    ),
    Fault(
        "narrow canvas: a lost end keeps it narrow",
        "denoise/step.py",
        "has_end = (length <= W) & mx.take",
        "has_end = mx.take",
        (LOOP,),
    ),
    Fault(
        "end token: what follows it stays",
        "denoise/row.py",
        "tokens = np.where(keep, tokens, settings.pad_token_id).astype(np.int32)",
        "tokens = tokens.astype(np.int32)",
        (LOOP,),
    ),
    Fault(
        "pinned: conditioned on what the model thought there",
        "denoise/step.py",
        "mx.where(canvas.pinned.free[:, :W, None], soft, given)",
        "soft",
        (FILL,),
    ),
    Fault(
        "pinned: noised with the rest",
        "denoise/step.py",
        "        accepted = accepted | ~pinned.free[:, :W]\n        tokens = pinned.over(tokens)\n",
        "        accepted = accepted | ~pinned.free[:, :W]\n",
        (FILL,),
    ),
    Fault(
        "pinned: counted in the entropy",
        "denoise/step.py",
        "entropy=mx.where(free, thought.entropy, 0.0)",
        "entropy=thought.entropy",
        (FILL,),
    ),
    Fault(
        "sets: left out of the noise",
        "denoise/pinned.py",
        "tokens = members[scaled].astype(mx.int32)",
        "tokens = tokens.astype(mx.int32)",
        (FILL,),
    ),
    Fault(
        "sets: excluded tokens keep their mass",
        "denoise/sampler.py",
        "ratios, products = _only(allowed, ratios), _only(allowed, products)",
        "ratios, products = ratios, products",
        (FILL,),
    ),
    Fault(
        "lift: pad ends an answer",
        "constraint/tokens.py",
        "    maps[-1, end] = end\n",
        "    maps[-1, end] = end\n    maps[-1, :S][dfa.accepting] = end\n",
        (LIFT,),
    ),
    Fault(
        "lift: states without a way to the end stay",
        "constraint/tokens.py",
        "hopeless = np.append(distance == FAR, False)",
        "hopeless = np.zeros(len(distance) + 1, bool)",
        (LIFT,),
    ),
    Fault(
        "lift: distance without the last token",
        "constraint/tokens.py",
        "is_here = distance == steps\n    while",
        "is_here = distance == steps\n    steps = -1\n    while",
        (LIFT,),
    ),
    Fault(
        "lift: placeholders are text",
        "constraint/vocabulary.py",
        "elif not _PLACEHOLDER.fullmatch(spelling):",
        "else:",
        (LIFT,),
    ),
    Fault(
        "lift: two texts with the same last character are one prefix",
        "constraint/vocabulary.py",
        "is_new = np.append(True, nodes[1:] != nodes[:-1])[: len(here)]",
        "is_new = np.zeros(len(here), bool)",
        (LIFT,),
    ),
    Fault(
        "bytes: surrogates",
        "constraint/utf8.py",
        "_SURROGATES = 0xD800, 0xE000",
        "_SURROGATES = 0xD800, 0xD800",
        (LIFT,),
    ),
    Fault(
        "bytes: overlong",
        "constraint/utf8.py",
        "_LEAST = 0x80, 0x800, 0x10000",
        "_LEAST = 0x80, 0x80, 0x10000",
        (LIFT,),
    ),
    Fault(
        "bytes: exceptions in free text lead where most characters lead",
        "constraint/utf8.py",
        "if first == last or len(set(targets[first : last + 1])) == 1:",
        "if len(set(targets[first : last + 1])) <= 2:",
        (LIFT,),
    ),
    Fault(
        "draft: a canvas may end one token too far from the end",
        "constraint/decode.py",
        "automaton.distance <= remaining",
        "automaton.distance <= remaining + 1",
        (DECODE,),
    ),
    Fault(
        "draft: impossible tokens forbid paths",
        "constraint/decode.py",
        "np.maximum(maxima, np.float32(LEAST))",
        "np.maximum(maxima, np.float32(-np.inf))",
        (DECODE,),
    ),
    Fault(
        "draft: the first class of a set, not the likeliest",
        "constraint/decode.py",
        "members[maxima[i].take(members).argmax()]",
        "members[0]",
        (DECODE,),
    ),
    Fault(
        "marginals: entropy without the factors",
        "constraint/marginals.py",
        "(factors * products + masses * logs)",
        "(factors * products)",
        (DECODE,),
    ),
    Fault(
        "marginals: classes without any probability are lost",
        "constraint/marginals.py",
        "is_lost = masses < least",
        "is_lost = masses < 0",
        (DECODE,),
    ),
    Fault(
        "marginals: a draw may fall on what is impossible",
        "constraint/marginals.py",
        'uniform * sums[-1], side="right"',
        'uniform * sums[-1], side="left"',
        (DECODE,),
    ),
    Fault(
        "strings: drawn edges without what follows",
        "constraint/marginals.py",
        "ways = np.exp(ways - self.later[i, states[-1]])",
        "ways = np.exp(0 * ways)",
        (DECODE,),
    ),
    Fault(
        "classes: the first block of a class",
        "denoise/classes.py",
        "blocks[maxima[i, blocks].argmax()]",
        "blocks[0]",
        (CLASSES,),
    ),
    Fault(
        "classes: p log p without the scale's logarithm",
        "denoise/classes.py",
        " + masses * np.log(scale)",
        "",
        (CLASSES,),
    ),
    Fault(
        "classes: blocks drawn by their number",
        "denoise/classes.py",
        "masses = np.cumsum(sums[i, blocks], dtype=np.float64)",
        "masses = np.cumsum(np.ones(len(blocks)))",
        (CLASSES,),
    ),
    Fault(
        "spans: the best token of each place, whatever the string",
        "denoise/row.py",
        "return () if given is None else given.spans",
        "return ()",
        (FILL,),
    ),
    Fault(
        "line: a part ends at the first state at which it may",
        "constraint/line.py",
        "                edges.append((start, base + other, number))\n",
        "                if not part.ends[other]:\n"
        "                    edges.append((start, base + other, number))\n",
        (LINE,),
    ),
    Fault(
        "line: two parts share the classes of the first",
        "constraint/line.py",
        "            found = _both(found, part.automaton.classes.astype(np.int64))\n",
        "            found = found\n",
        (LINE,),
    ),
    Fault(
        "certain: tokens of strings that lead nowhere count",
        "constraint/decode.py",
        "ways = here[sources] & later[i + 1, targets]",
        "ways = here[sources]",
        (LINE,),
    ),
    Fault(
        "regions: what stands beside a slot is spelled apart",
        "write/regions.py",
        "before, behind = (self._border(left, -1), self._border(right, 0))",
        'before, behind = "", ""',
        ("tests/write/test_regions.py",),
    ),
    Fault(
        "regions: a gap's border tokens hold nothing of it",
        "write/regions.py",
        "if len(text) > least and",
        "if len(text) < least and",
        ("tests/write/test_regions.py",),
    ),
    Fault(
        "fill: lengths are those of the first step that is taken",
        "write/writer.py",
        "length = int(chances.argmax())",
        "length = int(np.flatnonzero(chances)[0])",
        (FILL,),
    ),
    Fault(
        "edit: a byte order mark has a column",
        "write/edit.py",
        "    mark, text = split_mark(text)\n",
        '    mark = ""\n',
        ("tests/write/test_edit.py",),
    ),
    Fault(
        "trace: replaces any file",
        "view/pages.py",
        "return bool(head) and mark not in head",
        "return False",
        ("tests/view/test_trace.py",),
    ),
    Fault(
        "draft: as tall as the terminal",
        "cli/render.py",
        "room = max(0, options.max_height - 1)",
        "room = options.max_height",
        ("tests/cli/test_render.py",),
    ),
    Fault(
        "drafts: go on behind the end token",
        "view/report.py",
        "stop = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))",
        "stop = len(ids)",
        ("tests/view/test_report.py",),
    ),
    Fault(
        "fill: nothing ends the turn behind the template",
        "write/writer.py",
        "tokens[at : at + 1], tokens[at + 1 :] = self.ends",
        "tokens[at:] = FREE",
        (FILL,),
    ),
    Fault(
        "convert: the record holds the path of its source",
        "convert/origin.py",
        '"name": folder_name(checkpoint.folder),',
        '"name": str(checkpoint.folder),',
        (SHARED,),
    ),
    Fault(
        "convert: config.json keeps a path that another tool wrote",
        "convert/plan.py",
        "without_packing(without_paths(checkpoint.config))",
        "without_packing(checkpoint.config)",
        (SHARED,),
    ),
    Fault(
        "convert: every card claims one base model",
        "convert/card.py",
        'named = said.get("base_model")',
        'named = "google/diffusiongemma-26B-A4B-it"',
        (SHARED,),
    ),
    Fault(
        "convert: another source of the same name counts as the same",
        "convert/origin.py",
        "hashlib.sha256(files).hexdigest(),",
        '"",',
        (SHARED,),
    ),
    Fault(
        "convert: promises work where there is none",
        "convert/write.py",
        "goes_on = has_work(partial)",
        "goes_on = True",
        (CONVERT,),
    ),
    Fault(
        "convert: an upload that is stopped converts again",
        "cli/convert.py",
        "_command(without='--force')",
        "_command()",
        (CONVERT_CLI,),
    ),
    Fault(
        "training: the first look has gradients",
        "train/objective.py",
        "return model.soft_embedding(mx.stop_gradient(_logits(model, piece)))",
        "return model.soft_embedding(_logits(model, piece))",
        (OBJECTIVE,),
    ),
    Fault(
        "training: the table has no gradient through the soft embedding",
        "train/objective.py",
        "return model.soft_embedding(mx.stop_gradient(_logits(model, piece)))",
        "return mx.stop_gradient(model.soft_embedding(_logits(model, piece)))",
        (OBJECTIVE,),
    ),
    Fault(
        "training: rows that are not conditioned see a thought too",
        "train/objective.py",
        "(place >= 0)[:, None, None]",
        "(place >= -1)[:, None, None]",
        (OBJECTIVE,),
    ),
    Fault(
        "training: weights are no arguments of checkpointed layers",
        "train/objective.py",
        "return again(weights, *arrays)",
        "return again([{} for _ in modules], *arrays)",
        (OBJECTIVE,),
    ),
    Fault(
        "training: the gated activation's slope without the inner one",
        "model/layers.py",
        "0.5 * x * (1 - curve * curve) * inner",
        "0.5 * x * (1 - curve * curve) * root",
        (OBJECTIVE,),
    ),
    Fault(
        "training: a canvas is filled with padding",
        "train/batches.py",
        "np.full(fill, eos_token_id, np.int32)",
        "np.full(fill, pad_token_id, np.int32)",
        (TRAIN_DATA,),
    ),
    Fault(
        "training: the causal loss is a mean over tokens, not over examples",
        "train/batches.py",
        "weights /= B * weights.sum(axis=1, keepdims=True)",
        "weights /= weights.sum()",
        (TRAIN_DATA,),
    ),
    Fault(
        "adapters: PEFT's alpha is taken for the scale",
        "checkpoint/peft.py",
        'return float(alpha / r**0.5 if config.get("use_rslora") else alpha / r)',
        "return float(alpha)",
        (PEFT,),
    ),
    Fault(
        "adapters: PEFT's B counts ranks within experts",
        "checkpoint/peft.py",
        "b = b.reshape(-1, rank, count).transpose(2, 0, 1)",
        "b = b.reshape(-1, count, rank).transpose(1, 0, 2)",
        (PEFT,),
    ),
    Fault(
        "adapters: the encoder's factors are dropped in silence",
        "checkpoint/peft.py",
        "if not found[path].equals(decoder[twin]):",
        "if False:",
        (PEFT,),
    ),
    Fault(
        "adapters: an adapter on one of gate and up alone",
        "model/fused.py",
        "are_plain = all(type(part) in (nn.Linear, nn.QuantizedLinear) for part in parts)",
        "are_plain = type(first) in (nn.Linear, nn.QuantizedLinear)",
        (ADAPTERS,),
    ),
    Fault(
        "training: tokens are counted from the process's beginning",
        "train/trainer.py",
        "self.trained_tokens = state.trained_tokens",
        "self.trained_tokens = 0",
        (TRAIN,),
    ),
    Fault(
        "training: a stop names a checkpoint that was never written",
        "train/trainer.py",
        "self._saved_at: int | None = None",
        "self._saved_at: int | None = 0",
        (TRAIN,),
    ),
    Fault(
        "training: adapters say where the model lay",
        "train/session.py",
        "Path(model).resolve().name if Path(model).exists() else model",
        "str(source)",
        (TRAIN,),
    ),
    Fault(
        "training: a run that is taken up forgets a half-made update",
        "train/trainer.py",
        "self._accumulated = state.accumulated",
        "self._accumulated = {}",
        (TRAIN,),
    ),
    Fault(
        "training: every batch has the same noise",
        "train/batches.py",
        "_VALIDATION if validation else _NOISE, iteration]",
        "_VALIDATION if validation else _NOISE, 0]",
        (TRAIN_DATA,),
    ),
    Fault(
        "tied: copies are not compared",
        "checkpoint/weights.py",
        "check_copies(stored, assigned.copies)",
        "pass",
        (TIED,),
    ),
    Fault(
        "tied: only the first piece is compared",
        "checkpoint/tied.py",
        "range(0, one.elements, _PIECE)",
        "range(0, min(1, one.elements), _PIECE)",
        (TIED,),
    ),
    Fault(
        "tied: leaves of a packed module are matched one by one",
        "checkpoint/tied.py",
        "whole = module if leaf in _PACK else target",
        "whole = target",
        (TIED,),
    ),
    Fault(
        "tied: the encoder's layer scalars are the decoder's",
        "checkpoint/names.py",
        r'Rule(r"(model\.encoder\.language_model\.layers\.\d+\.layer_scalar)", r"\1")',
        r'Rule(rf"{_STACK}({_LAYER}layer_scalar)", r"model.decoder.\1")',
        (TIED,),
    ),
    Fault(
        "layouts: packed vision is taken for packed text",
        "checkpoint/layouts.py",
        'if part_of(n) != "vision"',
        "if n",
        (LAYOUTS,),
    ),
    Fault(
        "formats: GPTQ's block is read as MLX's",
        "config/formats.py",
        '_method(block) not in ("", "mlx")',
        '"bits" not in block',
        ("tests/config/test_formats.py",),
    ),
    Fault(
        "load: the config is read again",
        "checkpoint/load.py",
        "return build_model(folder, config, adapter_path=adapter_path, fused=fused), tokenizer",
        "return load_model(folder, adapter_path=adapter_path, fused=fused), tokenizer",
        ("tests/checkpoint/test_load.py",),
    ),
    Fault(
        "info: all of a repository is fetched",
        "cli/info.py",
        "revision, headers_only=True",
        "revision",
        ("tests/checkpoint/test_files.py",),
    ),
    Fault(
        "training: Muon decays weights through their gradient",
        "train/optimizer.py",
        'arguments.setdefault("weight_decay", 0.0)',
        "pass",
        (TRAIN,),
    ),
    Fault(
        "training: Muon takes tables and routers",
        "train/optimizer.py",
        'weight.ndim == 2 and "embed_tokens" not in name and "router" not in name',
        "weight.ndim == 2",
        (TRAIN,),
    ),
    Fault(
        "training: what Muon leaves moves at Muon's rate",
        "train/optimizer.py",
        '_made(settings, "adamw", rate, _REST_SCALE)',
        '_made(settings, "adamw", rate)',
        (TRAIN,),
    ),
    Fault(
        "training: batches are cut from one pool of all",
        "train/batches.py",
        "self._pool = pool * batch_size",
        "self._pool = len(lengths)",
        (TRAIN_DATA,),
    ),
    Fault(
        "backend: MLX without its library keeps the traceback",
        "errors.py",
        ', Path(error.path or "").parent.name):',
        ",):",
        (INSTALL,),
    ),
    Fault(
        "quiet: transformers tells that there is no torch",
        "language/tokenizer.py",
        'os.environ[name] = "1"',
        "pass",
        (INSTALL,),
    ),
    Fault(
        "quiet: advice stays off in the environment",
        "language/tokenizer.py",
        "os.environ.pop(name, None)",
        "pass",
        (INSTALL,),
    ),
    Fault(
        "models: a short name wins over a folder",
        "checkpoint/choice.py",
        'if "/" in name or os.path.exists(name):',
        'if "/" in name:',
        (CHOICE,),
    ),
    Fault(
        "models: the environment is not read",
        "cli/options.py",
        "help=MODEL_HELP, envvar=MODEL_VARIABLE",
        "help=MODEL_HELP",
        (CHOICE, MODELS),
    ),
    Fault(
        "models: other kinds of checkpoints are listed",
        "checkpoint/cache.py",
        '.get("model_type") != _MODEL_TYPE',
        '.get("model_type") is None',
        (CACHE, MODELS),
    ),
    Fault(
        "models: rm does not ask",
        "cli/models.py",
        "if not yes:",
        "if False:",
        (MODELS,),
    ),
    Fault(
        "OpenBLAS: numpy's own copy counts",
        "checkpoint/blas.py",
        'r"lib(openblas',
        'r"lib(scipy_openblas|openblas',
        (BLAS,),
    ),
    Fault(
        "doctor: a relative of a chip gets its rates",
        "doctor/floors.py",
        " and _SAME_CHIP.fullmatch(name[len(own) :])",
        "",
        (FLOORS,),
    ),
    Fault(
        "doctor: full layers have a projection of values",
        "doctor/floors.py",
        "(2 if layer.is_sliding else 1)",
        "2",
        (FLOORS,),
    ),
    Fault(
        "doctor: a commit takes no time",
        "doctor/speed.py",
        "commit_ms = sum(t.total_ms for t in step if t.in_commit)",
        "commit_ms = 0.0",
        (SPEED,),
    ),
    Fault(
        "doctor: half of the made-up bits are zero",
        "doctor/made_up.py",
        "(high << 16) | low",
        "high << 16",
        (SPEED,),
    ),
    Fault(
        "doctor: missing kernels of an M5 are not told",
        "doctor/machine.py",
        "if not _holds(library, _ACCELERATED_KERNELS):",
        "if False:",
        (MACHINE,),
    ),
    Fault(
        "doctor: every answer is as expected",
        "doctor/answers.py",
        "prompt.expected in text",
        "True",
        (ANSWERS,),
    ),
    Fault(
        "doctor: a user's repository is named",
        "doctor/answers.py",
        'repo if repo.partition("/")[0] in _PUBLISHERS else "another repository"',
        "repo",
        (ANSWERS,),
    ),
    Fault(
        "doctor: paths stay in messages",
        "doctor/report.py",
        '_PATH.sub("(path)", text)',
        "text",
        (REPORT,),
    ),
    Fault(
        "doctor: wrong results end with exit code 0",
        "cli/doctor.py",
        "if not report.is_all_right:",
        "if False:",
        (DOCTOR,),
    ),
    Fault(
        "doctor: Ctrl-C prints nothing",
        "cli/doctor.py",
        "finally:  # after",
        "except ValueError:\n            raise\n        else:  # after",
        (DOCTOR,),
    ),
    Fault(
        "prompts: marks before what is typed, which changes how names are sorted",
        "language/controls.py",
        "return found[0] + self.behind",
        "return self.behind + found[0] + self.behind",
        (CONTROLS,),
    ),
    Fault(
        "prompts: keys of tools are not marked",
        "language/controls.py",
        "self.value(key): self.value(item, is_cut=is_cut) for key",
        "key: self.value(item, is_cut=is_cut) for key",
        (CONTROLS,),
    ),
    Fault(
        "prompts: variables other than messages are not marked",
        "language/prompt.py",
        "marks.value(texts) | program",
        "texts | program",
        (CONTROLS, TRAIN_DATA),
    ),
    Fault(
        "prompts: a template that the marks change is not refused",
        "language/controls.py",
        "if names != pattern.findall(text):",
        "if False:",
        (CONTROLS,),
    ),
    Fault(
        "prompts: parts of tools' messages are not looked at",
        "language/given.py",
        "if content is None or isinstance(content, str):",
        'if content is None or isinstance(content, str) or role == "tool":',
        (GIVEN,),
    ),
    Fault(
        "media: keys beside the content are dropped",
        "language/given.py",
        "if key in keys and not is_empty:",
        "if False:",
        (GIVEN,),
    ),
    Fault(
        "media: the answer of an example is not looked at",
        "train/data.py",
        'refuse_media(last, "the answer")',
        "pass",
        (TRAIN_DATA,),
    ),
    Fault(
        "program: the variable of completion keeps the dot",
        "cli/program.py",
        "[^A-Z0-9]",
        "[^A-Z0-9.]",
        (PROGRAM,),
    ),
    Fault(
        "program: a script of zsh only defines at the first Tab",
        "cli/program.py",
        '_FIRST_TAB.format(name) if shell == "zsh" else ""',
        '""',
        (PROGRAM,),
    ),
    Fault(
        "prompts: a padded encoding is read, padding and all",
        "language/given.py",
        "if not all(flag for row in rows for flag in row):",
        "if False:",
        (GIVEN,),
    ),
    Fault(
        "prompts: a raw prompt gets a second <bos>",
        "language/prompt.py",
        "add_special_tokens=not has_bos",
        "add_special_tokens=True",
        (GIVEN,),
    ),
    Fault(
        "templates: chat_template.json goes before tokenizer_config.json",
        "language/tokenizer.py",
        "if not tokenizer.chat_template and (folder",
        "if (folder",
        (TOKENIZER,),
    ),
    Fault(
        "thoughts: any name that begins like it is a thought",
        "language/text.py",
        "if text.startswith(_THOUGHT) or",
        "if text.startswith(_THOUGHT.strip()) or",
        (TEXT,),
    ),
    Fault(
        "thoughts: a name is decided before its line has ended",
        "language/text.py",
        "elif final or not _THOUGHT.startswith(text):",
        "elif final or text:",
        (TEXT,),
    ),
    Fault(
        "tool calls: a marker in a string breaks the call off",
        "language/tools.py",
        "self._ids.count(self._quote or -1) % 2 == 0",
        "True",
        (TOOLS,),
    ),
    Fault(
        "tool calls: quotes do not mark a string",
        "language/tools.py",
        "parts.append([])",
        "parts[-1].append(token)",
        (TOOLS,),
    ),
    Fault(
        "tool calls: whole numbers become floats",
        "language/tools.py",
        "float(word) if fraction or exponent else int(word)",
        "float(word)",
        (TOOLS,),
    ),
    Fault(
        "tool calls: what follows the arguments is dropped",
        "language/tools.py",
        "if self._at != len(self._text):",
        "if self._at > len(self._text):",
        (TOOLS,),
    ),
    Fault(
        "tool calls: a call of the next turn is numbered from 0 again",
        "language/tools.py",
        "sum(prompt[i] == self.begin for i in borders) - self.is_open",
        "0",
        (TOOLS,),
    ),
    Fault(
        "tool calls: one that is cut off is dropped",
        "language/text.py",
        "[*self._calls.break_off(), *self._flush(final=True)]",
        "[*self._flush(final=True)]",
        (TOOLS,),
    ),
    Fault(
        "tool calls: one in a thought is carried out",
        "language/text.py",
        'if self._channel == "thought":\n            return False',
        'if self._channel == "nothing":\n            return False',
        (TOOLS,),
    ),
    Fault(
        "tool calls: text that a stop string held back comes behind the call",
        "language/text.py",
        "if isinstance(event, ToolCall):  #",
        "if event is None:  #",
        (TOOLS,),
    ),
    Fault(
        "tool calls: arguments as JSON go into the template as text",
        "language/tools.py",
        "_decoded(given) if isinstance(given, str) else {} if",
        "{'text': given} if isinstance(given, str) else {} if",
        (TOOLS,),
    ),
    Fault(
        "thoughts: the budget counts the last thought only",
        "language/text.py",
        "return self._past_thoughts + (",
        "return (",
        (TOOL_CALLS,),
    ),
    Fault(
        "thoughts: the budget closes an answer too",
        "write/generate.py",
        "is_over = stream.is_thinking and stream.thought_tokens",
        "is_over = stream.thought_tokens",
        (TOOL_CALLS,),
    ),
    Fault(
        "stop strings: one character too few is held back",
        "language/stops.py",
        "default=1) - 1)",
        "default=2) - 2)",
        (TEXT,),
    ),
    Fault(
        "stop strings: the first in the list wins, not the first that is complete",
        "language/stops.py",
        "stop, start = min(places)",
        "stop, start = places[0]",
        (TEXT,),
    ),
    Fault(
        "stop strings: the run goes on behind one",
        "denoise/row.py",
        "has_ended |= self.stop(tokens)",
        "self.stop(tokens)",
        (GENERATE,),
    ),
    Fault(
        "batches: one row gets the text of another",
        "write/generate.py",
        "texts[number][event.channel] += event.piece",
        "texts[0][event.channel] += event.piece",
        (GENERATE,),
    ),
    Fault(
        "doctor: NaN is within every tolerance",
        "doctor/outcome.py",
        "self.difference <= self.check.tolerance",
        "not self.difference > self.check.tolerance",
        (OUTCOME,),
    ),
    Fault(
        "doctor: an error shows a path",
        "doctor/outcome.py",
        "_PATH.sub('(a path)', message)",
        "message",
        (OUTCOME,),
    ),
    Fault(
        "doctor: the device computes by the CPU's graph",
        "doctor/device.py",
        "with as_on_gpu():",
        "if as_on_gpu:",
        (DEVICE,),
    ),
    Fault(
        "doctor checks: every packed difference is allowed",
        "doctor/device.py",
        "return 1.5 * _EPSILON[dtype] * packed_terms**0.5",
        "return 2.0",
        (CHECKS,),
    ),
    Fault(
        "doctor: the reference is what the device computes",
        "doctor/device.py",
        "with reference():\n        return _to_host(build())",
        "with under_test():\n        return _to_host(build())",
        (DEVICE,),
    ),
    Fault(
        "chat: thoughts before a call stay in the history",
        "write/chat.py",
        'for k, v in m.items() if k != "reasoning"}',
        "for k, v in m.items()}",
        (CHAT,),
    ),
    Fault(
        "chat: text before a call goes into the calling message",
        "write/chat.py",
        """        if self.answer.strip():
            before =""",
        """        calling["content"] = self.answer
        if not self.answer.strip():
            before =""",
        (CHAT,),
    ),
    Fault(
        "chat: an answer cut off without text counts",
        "write/chat.py",
        "return self.is_finished or bool(self.answer.strip() or self.calls)",
        "return True",
        (CHAT,),
    ),
    Fault(
        "chat: an interrupted answer is dropped",
        "write/chat.py",
        "return self.is_finished or bool(self.answer.strip() or self.calls)",
        "return self.is_finished",
        (CHAT,),
    ),
    Fault(
        "chat: every answer has the same seed",
        "write/chat.py",
        "seed=(settings.seed + self._answers) % _SEEDS",
        "seed=settings.seed",
        (CHAT,),
    ),
    Fault(
        "chat: the store is not used",
        "write/chat.py",
        "run_jobs(self._model, [job], self.store)",
        "run_jobs(self._model, [job])",
        (CHAT,),
    ),
    Fault(
        "chat: an engine's run is not cancelled",
        "write/chat.py",
        "            run.cancel()",
        "            pass",
        (CHAT,),
    ),
    Fault(
        "chat: saving replaces any file",
        "write/chat_file.py",
        "    if file.exists():\n        try:",
        "    if False:\n        try:",
        (CHAT,),
    ),
    Fault(
        "chat: a message before the results of calls is read from a file",
        "write/chat_file.py",
        "        elif open_calls:",
        "        elif False:",
        (CHAT,),
    ),
    Fault(
        "chat command: an error ends it",
        "cli/session.py",
        """            self.has_failed = True
        except""",
        """            return False
        except""",
        (CHAT_CLI,),
    ),
    Fault(
        "chat command: Ctrl-C does not stop an answer",
        "cli/session.py",
        "    def _ask_stop(self) -> None:\n        self._is_stopping = True",
        "    def _ask_stop(self) -> None:\n        self._is_stopping = False",
        (CHAT_CLI,),
    ),
    Fault(
        "chat command: Markdown joins lines",
        "cli/render_chat.py",
        'child.type = "hardbreak"',
        "pass",
        (CHAT_CLI,),
    ),
    Fault(
        "chat command: Markdown drops HTML",
        "cli/render_chat.py",
        '{"html": False}',
        '{"html": True}',
        (CHAT_CLI,),
    ),
    Fault(
        "constraint: repeats up to a count must all be there",
        "constraint/regex.py",
        "    for _ in range(high - low):\n        net.skip(at, end)",
        "    for _ in range(high - low):\n        pass",
        (REGEX,),
    ),
    Fault(
        "constraint: a negated class is read as widely as others",
        "constraint/regex.py",
        "if is_negated and self._is_schema:",
        "if False:",
        (REGEX,),
    ),
    Fault(
        "constraint: a pattern may end before a line feed",
        "constraint/regex.py",
        'if self._reading != "wide":',
        'if self._reading == "unicode":',
        (REGEX,),
    ),
    Fault(
        "constraint: dead states stay",
        "constraint/minimise.py",
        "    table, accepting = _without_dead(table, accepting)\n",
        "",
        (BUILD,),
    ),
    Fault(
        "constraint: escapes let a key come twice",
        "constraint/json_text.py",
        "return encoded(texts, limits, with_unicode=False)",
        "return encoded(texts, limits)",
        (SCHEMA,),
    ),
    Fault(
        "constraint: numbers round across an open bound",
        "constraint/json_text.py",
        "_DIGITS = 15",
        "_DIGITS = 40",
        (SCHEMA,),
    ),
    Fault(
        "constraint: oneOf as anyOf",
        "constraint/alternatives.py",
        "if self._exclude_each_other(facts, other):",
        "if True:",
        (SCHEMA,),
    ),
    Fault(
        "constraint: an enum is not held against what stands beside it",
        "constraint/alternatives.py",
        "if not set(place.schema) <= _SAY_NO_MORE",
        "if not place",
        (SCHEMA,),
    ),
    Fault(
        "constraint: undeclared keys all count",
        "constraint/values.py",
        "if self._low and count + 1 < self._low:",
        "if False:",
        (SCHEMA,),
    ),
    Fault(
        "constraint: a call has keys that its tool does not declare",
        "constraint/tool_calls.py",
        "compiled(schema, layout, limits, closed=True)",
        "compiled(schema, layout, limits, closed=False)",
        (CALLS,),
    ),
)


def run(copy: Path, tests: tuple[str, ...], most_seconds: float | None) -> tuple[bool, str]:
    """Whether the tests pass, and otherwise the first that fails. With a fault they may not end."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-rfE", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            # No bytecode: its time stamps are too coarse for files that change within a second.
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=most_seconds,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end of {', '.join(tests)} within {most_seconds:.0f} s"
    if done.returncode == 0:
        return True, ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not found:  # 1: tests ran and some failed
        raise SystemExit(f"pytest could not run {tests}:\n{done.stdout}\n{done.stderr}")
    return False, found[1]


def main() -> int:
    words = sys.argv[1:]
    faults = [f for f in FAULTS if not words or any(word in f.name for word in words)]
    survivors = 0
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache")
        for name in ("mlx_diffgemma", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        used = tuple(sorted({test for fault in faults for test in fault.tests}))
        started = time.perf_counter()
        passes, failing = run(copy, used, None)
        most_seconds = 60 + 3 * (time.perf_counter() - started)
        if not passes:
            raise SystemExit(f"{failing} fails without any fault; nothing can be learned")
        print("| fault | noticed by | seconds |\n|---|---|---|", flush=True)
        for fault in faults:
            path = copy / "mlx_diffgemma" / fault.file
            source = path.read_text()
            if (count := source.count(fault.before)) != 1:
                raise SystemExit(
                    f"{fault.name}: {fault.before!r} stands {count} times in {fault.file}"
                )
            started = time.perf_counter()
            path.write_text(source.replace(fault.before, fault.after))
            passes, failing = run(copy, fault.tests, most_seconds)
            path.write_text(source)
            survivors += passes
            seconds = time.perf_counter() - started
            print(f"| {fault.name} | {failing or 'NOTHING'} | {seconds:.0f} |", flush=True)
    print(f"\n{len(faults) - survivors} of {len(faults)} faults noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
