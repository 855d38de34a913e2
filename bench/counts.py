"""What does a denoise step cost where no clock is right: in passes over the logits, bytes copied,
launches and host reads?

Counted for one step of the 26B model after the first of a canvas, from its embedding to its stop
rule, with the self-conditioning that it makes or uses counted once; in the graph that GPUs get,
built and never run. Beside it mlx-vlm's entropy-bound loop, in the order of its calls. Nothing here
depends on the machine.

Bounds: at most 7 passes over the logits greedy and 9 sampling; 1 host read; at every length of
context, fewer bytes copied than mlx-vlm. Floor: 2 passes. The head writes its outputs in bfloat16,
one kernel reads them once and writes weights, and the product with the embedding table reads those;
that kernel would have to be written for each kind of GPU.

- A pass reads or writes as many bytes as float32 logits [L, V] have, so one over bfloat16 counts
  half. A fused kernel reads each input once; softmax reads twice and writes; sorting is a merge
  sort; random bits are written like anything else.
- Copied is what concatenation, slice updates, `contiguous` and reshapes of strided arrays write. A
  slice update of memory that nothing else uses writes the slice alone; that our keys and values are
  such memory is checked in real runs, by their addresses.
- Launches are nodes that do more than look at memory in another way. Attention counts as one, as
  asked for, although at head sizes of 256 and 512 GPUs mostly take it apart.
- Not seen: copies that a kernel makes of strided inputs on its own.

    python bench/counts.py
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from common import finish, record
from graph import Array, Graph, Node, layouts, leaf, trace, view
from mlx.utils import tree_map
from mlx_vlm.generate import diffusion
from mlx_vlm.models.diffusion_gemma import Model as TheirModel
from mlx_vlm.models.diffusion_gemma import ModelConfig as TheirConfig
from mlx_vlm.models.diffusion_gemma.language import LanguageModel
from mlx_vlm.utils import load_model as load_theirs

from mlx_diffgemma import (
    GenerationSettings,
    SeededNoise,
    bundled_model,
    denoise_tokens,
    encode_prompt,
    load,
)
from mlx_diffgemma.config.generation import POLICIES
from mlx_diffgemma.config.model import ModelConfig
from mlx_diffgemma.denoise import loop as our_loop
from mlx_diffgemma.denoise import step as our_step
from mlx_diffgemma.denoise.canvas import Belief, Canvas, Plan
from mlx_diffgemma.doctor.published import config_26b
from mlx_diffgemma.events import StepDone
from mlx_diffgemma.model import DiffusionGemma, OpenContext
from mlx_diffgemma.model.backend import as_on_gpu
from mlx_diffgemma.model.context import Context, LayerContext
from mlx_diffgemma.model.fused import fuse

HOST_READS = 1
# What a step is asked for: the settings, and the most passes over the logits.
OURS: dict[str, dict[str, Any]] = {
    "greedy": {"policy": "reference", "temperature": 0.0},
    "sampling": {"policy": "reference", "temperature": 1.0},
    "fast": {"policy": "fast"},
}
MLX_VLM = {"greedy": 0.0, "sampling": 1.0}  # temperatures
PASSES = {"greedy": 7.0, "sampling": 9.0, "fast": 7.0}
# Tokens before the canvas: there is always one. mlx-vlm reads prompts in pieces of 2048.
CONTEXTS = (1, 1024, 4096, 16384, 32768)
PIECE = 2048
LAYERS = 30
PERIOD = 6  # five sliding layers and a full one

Build = Callable[[], list[mx.array]]
Run = Callable[[str, Callable[[], None]], None]  # a prompt, and what to call once per step


@dataclass(frozen=True, slots=True)
class Step:
    """A step that can be built again and again; `owned` is memory that nothing else refers to once
    the step runs."""

    build: Build
    owned: tuple[mx.array, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2, help="per task, for rows x steps")
    parser.add_argument("--save", action="store_true", help="append to bench/results/")
    options = parser.parse_args()
    check_counting()
    for mode, bound in PASSES.items():
        print(f"bound: at most {bound:g} passes over the logits, {mode}")
    print(f"bound: at most {HOST_READS} host read per step")
    print("bound: fewer bytes copied per step than mlx-vlm, at every length of context")

    counts = {
        packing: {side: count(*how, packed) for side, how in SIDES.items()}
        for packing, packed in {"packed": True, "bfloat16": False}.items()
    }
    reads = {}
    for policy in POLICIES:
        reads[f"ours, {policy}"] = read_hosts(our_run(policy, gpu=True))
        reads[f"ours, {policy}, CPU path"] = read_hosts(our_run(policy, gpu=False))
    reads["mlx-vlm"] = read_hosts(their_run())
    in_place = {policy: written_in_place(policy) for policy in POLICIES}
    positions = rows_times_steps(options.prompts)
    report(counts, reads, positions)
    bounds = check_bounds(counts, reads, in_place)
    passed = all(bound["passed"] for bound in bounds)
    for bound in bounds:
        print(f"{bound['what']}: {bound['value']}; bound {bound['bound']}: {bound['passed']}")
    line = record(
        "counts",
        what="one denoise step after the first, counted in the graph that GPUs get",
        shape={"model": "26B", "batch": 1, "canvas": 256, "vocabulary": 262144, "layers": LAYERS},
        dtype="bfloat16, softcapped logits float32; packed as published, 4 and 8-bit affine",
        units={
            "passes": "bytes of float32 logits, 268 MB",
            "copied_bytes": "bytes per step, by tokens of context",
            "launches": "nodes that write something; attention and a fused kernel are one each",
            "host_reads": "values fetched, bundled model, per step and beyond the steps per canvas",
            "rows_times_steps": "canvas positions denoised, bundled model, all prompts together",
        },
        counts=counts,
        host_reads=reads,
        rows_times_steps=positions,
        bounds=bounds,
        passed=passed,
    )
    finish(line, save=options.save)
    sys.exit(0 if passed else 1)


# --- the steps ---


def hollow(model: Any, packed: bool, *, retyped: bool = True) -> Any:
    """A model without memory: each parameter is one zero, in bfloat16 where it is not packed, or
    in its own type where nothing is to be retyped. Both sides pack what mlx-vlm packs in the
    published checkpoint."""
    import mlx.nn as nn

    if packed:
        predicate = LanguageModel.quant_predicate.fget(None)
        nn.quantize(model, group_size=64, bits=4, class_predicate=predicate)

    def hollowed(array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return leaf(array.shape, mx.bfloat16 if floating and retyped else array.dtype)

    model.update(tree_map(hollowed, model.parameters()))
    for module in model.modules():  # what is left are small tables, such as those of RoPE
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    model.eval()
    return model


def config_of(layers: int) -> dict[str, Any]:
    config = config_26b()
    text = config["text_config"]
    text["num_hidden_layers"], text["layer_types"] = layers, text["layer_types"][:layers]
    del config["vision_config"]
    return config


def our_steps(packed: bool, layers: int) -> Callable[[int, str], Step]:
    """All that counting in graphs knows of our insides: a model, and one step over fake arrays."""
    config = ModelConfig.from_dict(config_of(layers))
    text, L = config.text, config.canvas_length
    model = hollow(DiffusionGemma(config), packed)
    with nothing_evaluated():
        fuse(model)
    hollow(model, packed=False, retyped=False)
    tokens_of_canvas, per_position = leaf((1, L), mx.int32), leaf((1, L), mx.float32)
    weights = leaf((1, L, text.vocab_size), mx.bfloat16)

    def step(tokens: int, mode: str) -> Step:
        settings = GenerationSettings(seed=0, **OURS[mode]).resolve(config)
        kept = tuple(
            min(tokens, text.sliding_window - 1) if layer.is_sliding else tokens
            for layer in text.layers
        )

        def buffers(layer: Any, places: int) -> LayerContext:
            shape = (1, layer.num_key_value_heads, places + L, layer.head_dim)
            return LayerContext(leaf(shape, mx.bfloat16), leaf(shape, mx.bfloat16))

        layers = tuple(map(buffers, text.layers, kept))
        canvas = Canvas(
            row=0,
            settings=settings,
            noise=SeededNoise(settings.seed),
            pinned=None,
            index=0,
            plan=Plan(L, L, L),
            tokens=tokens_of_canvas,
            step=1,
            drafts=(tokens_of_canvas,),
            belief=Belief(weights, per_position, per_position),
            held=tokens_of_canvas if settings.acceptance == "confidence" else None,
        )

        def build() -> list[mx.array]:
            opened = [OpenContext(layers, kept, Context((), tokens, 1))]
            with as_on_gpu():
                (now,), opened = our_step.take_step(model, [canvas], opened)
            event, after = now.event, now.after
            parts = [after.tokens, event.draft, event.accepted, event.entropy, event.certainty]
            parts += [*now.check, after.belief.weights, after.belief.total]
            parts += [] if after.held is None else [after.held]
            return parts + [array for x in opened[0].layers for array in (x.keys, x.values)]

        owned = tuple(array for layer in layers for array in (layer.keys, layer.values))
        return Step(build, owned)

    return step


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    evaluate, mx.eval = mx.eval, lambda *_: None
    try:
        yield
    finally:
        mx.eval = evaluate


def written_in_place(policy: str) -> float:
    """Of the keys and values of real runs' steps, the share that lie where the step before had
    them: whether what a step is said to own is its own."""
    run, build = our_run(policy, gpu=True), our_loop.take_step
    addresses: dict[int, list[int]] = {}

    def watched(model: Any, canvases: Any, opened: Any, *rest: Any) -> Any:
        if step := canvases[0].step:  # so the one before is evaluated, or about to be
            layers = opened[0].layers
            arrays = [array for layer in layers for array in (layer.keys, layer.values)]
            addresses[step] = [np.asarray(array).ctypes.data for array in arrays]
            del layers, arrays  # or we would be the ones who hold them
        return build(model, canvases, opened, *rest)

    stayed: list[bool] = []
    our_loop.take_step = watched
    try:
        for prompt in prompts_of(1):
            addresses.clear()
            run(prompt, lambda: None)
            for here, there in pairwise(addresses.values()):
                stayed += [a == b for a, b in zip(here, there, strict=True)]
    finally:
        our_loop.take_step = build
    return round(sum(stayed) / len(stayed), 4)


def their_steps(packed: bool, layers: int) -> Callable[[int, str], Step]:
    """mlx-vlm's `stream_diffusion_generate`, entropy-bound, from one step's logits to the next
    step's input; its draft still changes, or it would take the entropy a second time."""
    config = TheirConfig.from_dict(config_of(layers))
    text, L = config.text_config, config.canvas_length
    model = hollow(TheirModel(config), packed)
    table = model.diffusion_prepare_self_conditioning()
    canvas, previous = leaf((1, L), mx.int32), leaf((1, L), mx.int32)
    if table is None:
        signal = leaf((1, L, text.vocab_size), mx.float32)
    else:
        signal = leaf((1, L, text.hidden_size), mx.bfloat16)

    def step(tokens: int, mode: str) -> Step:
        temperature = MLX_VLM[mode]
        cache = their_cache(model, text, tokens)
        masks = model.diffusion_decoder_masks(canvas, cache, None)  # once per canvas
        mx.eval(masks)
        mx.random.seed(0)

        def build() -> list[mx.array]:
            logits = model.diffusion_decoder_logits(
                canvas, cache=cache, self_conditioning=signal, decoder_attention_mask=masks
            )
            logits = logits / diffusion._diffusion_linear_temperature(47, 48, {})
            draft = mx.argmax(logits, axis=-1).astype(mx.int32)
            proposal = draft
            if temperature > 0:
                proposal = diffusion._diffusion_sample_canvas(logits, mx.int32, temperature)
            entropy = diffusion._diffusion_token_entropy(logits)
            following = model.diffusion_self_conditioning(logits, table)
            accepted = diffusion._diffusion_entropy_transfer_mask(entropy, 0.1)
            kept = mx.where(accepted, proposal, canvas)
            noise = diffusion._diffusion_initialize_canvas(1, L, text.vocab_size, mx.int32)
            stable = mx.all(draft == previous)
            return [mx.where(accepted, kept, noise), draft, stable, following]

        return Step(build)

    return step


def their_cache(model: Any, text: Any, tokens: int) -> list[Any]:
    """As its prefill leaves it, with hollow keys and values."""
    caches = model.make_cache()
    for cache, kind in zip(caches, text.layer_types, strict=True):
        is_sliding = kind == "sliding_attention"
        heads = text.num_key_value_heads if is_sliding else text.num_global_key_value_heads
        size = text.head_dim if is_sliding else text.global_head_dim
        for start in range(0, tokens, PIECE):
            piece = leaf((1, heads, min(PIECE, tokens - start), size), mx.bfloat16)
            cache.update_and_fetch(piece, piece)
        cache.keys = leaf(cache.keys.shape, mx.bfloat16)
        cache.values = leaf(cache.values.shape, mx.bfloat16)
    return caches


SIDES = {"ours": (our_steps, list(OURS)), "mlx-vlm": (their_steps, list(MLX_VLM))}


# --- counting in graphs ---

PRODUCTS = frozenset("AddMM GatherMM GatherQMM Matmul QuantizedMatmul".split())
COPIES = {
    "Concatenate": "concatenate",
    "SliceUpdate": "slice_update",
    "DynamicSliceUpdate": "slice_update",
    "Contiguous": "contiguous",
    "Reshape": "reshape",
    "Flatten": "reshape",
}
ONE_READ = frozenset("ArgReduce LogSumExp Max Min Prod Sum And Or".split())
READ_AND_WRITE = frozenset(
    "CumLogAddExp CumMax CumMin CumProd CumSum Full ScatterAxis Scatter".split()
).union(COPIES)
SORTS = frozenset("ArgPartition ArgSort Partition Sort".split())
GATHERS = frozenset("Gather GatherAxis".split())
SORT_BLOCK = 2048  # rows longer than that are sorted in blocks, then merged


def count(
    make: Callable[[bool, int], Callable[[int, str], Step]], modes: list[str], packed: bool
) -> dict[str, Any]:
    """Everything that is counted of one side's steps."""
    steps, fewer = make(packed, LAYERS), make(packed, LAYERS - PERIOD)
    graphs = {mode: draw(steps(1024, mode)) for mode in modes}
    text = config_26b()["text_config"]
    canvas, vocabulary = config_26b()["canvas_length"], text["vocab_size"]
    found: dict[str, Any] = {"passes": {}, "launches": {}, "copied_bytes": {}}
    for mode, graph in graphs.items():
        check_step(graph, canvas, vocabulary)
        passes = logits_passes(graph, canvas, vocabulary)
        found["passes"][mode] = {**passes, "all": sum(passes.values())}
        less = draw(fewer(1024, mode))
        per_layer = (len(launches(graph)) - len(launches(less))) / PERIOD
        found["launches"][mode] = {
            "all": len(launches(graph)),
            "per_layer": round(per_layer, 2),
            "outside_layers": round(len(launches(graph)) - LAYERS * per_layer),
        }
    names = Counter(launches(graphs["sampling"]))
    found["launches"]["by_name"] = dict(names.most_common())
    for tokens in CONTEXTS:
        graph = draw(steps(tokens, "greedy"))
        found["copied_bytes"][str(tokens)] = copied_bytes(graph)
    found["written_bytes"] = written_bytes(graphs["greedy"])
    if found["written_bytes"] < found["copied_bytes"]["1024"]["all"] + 4 * canvas * vocabulary:
        raise SystemExit(f"{found['written_bytes']:,} bytes written in all: less than its parts")
    return found


def draw(step: Step) -> Graph:
    return trace(step.build, names={f"owned_{i}": array for i, array in enumerate(step.owned)})


def check_step(graph: Graph, canvas: int, vocabulary: int) -> None:
    """A graph that is not one whole step must not be counted as one."""
    names = Counter(node.name for node in graph.nodes)
    if names["ScaledDotProductAttention"] != LAYERS:
        raise SystemExit(f"{names['ScaledDotProductAttention']} attentions, {LAYERS} layers")
    products = [node for node in graph.nodes if node.name in PRODUCTS]
    heads = [n for n in products if _is_logits(n.outputs[0].shape, canvas, vocabulary)]
    softs = [n for n in products if _is_soft(n, canvas, vocabulary)]
    if (len(heads), len(softs)) != (1, 1):
        raise SystemExit(f"{len(heads)} products give logits, {len(softs)} take probabilities")


def logits_passes(graph: Graph, canvas: int, vocabulary: int) -> dict[str, float]:
    """Reads and writes of arrays as large as the logits, in bytes of float32 logits.

    "soft_embedding" is what serves nothing but the product with the embedding table; "head" what
    the head's product writes; "sampler" the rest.
    """
    layout = layouts(graph)
    base = bases(graph, layout)
    unit = 4 * canvas * vocabulary

    def share(array: Array) -> float:
        """Of the memory behind an array, what it looks at; 0 where that holds no logits."""
        if not _is_logits(base[array.id].shape, canvas, vocabulary):
            return 0.0
        seen = layout[array.id]
        sides = zip(seen.shape, seen.strides, strict=True)
        return math.prod(side for side, stride in sides if stride) * array.itemsize / unit

    soft = only_for(graph, lambda node: _is_soft(node, canvas, vocabulary))
    passes = {"head": 0.0, "sampler": 0.0, "soft_embedding": 0.0}
    for i, node in enumerate(graph.nodes):
        if is_view(node, layout):
            continue
        for array in node.outputs:
            rows = math.prod(array.shape[:-1])
            if array.shape[-1:] == (vocabulary,) and 1 < rows != canvas:
                raise SystemExit(f"{node.name} writes logits in pieces, {array.shape}")
        reads = {array.id: share(array) for array in node.inputs}
        writes = sum(map(share, node.outputs))
        spent = traffic(node, reads, writes, vocabulary)
        if node.name in PRODUCTS and writes:
            passes["head"] += writes
            spent -= writes
        passes["soft_embedding" if i in soft else "sampler"] += spent
    return {part: round(value, 3) for part, value in passes.items()}


def _is_logits(shape: tuple[int, ...], canvas: int, vocabulary: int) -> bool:
    """[B, L, V], or with the columns in pieces, or with the rows' axes in one."""
    fits = any(math.prod(shape[-axes:]) == vocabulary for axes in (1, 2) if len(shape) > axes)
    return fits and math.prod(shape) == canvas * vocabulary


def _is_soft(node: Node, canvas: int, vocabulary: int) -> bool:
    """Probabilities times the embedding table; times a column of ones they are only added up."""
    takes = any(_is_logits(array.shape, canvas, vocabulary) for array in node.inputs)
    return node.name in PRODUCTS and takes and node.outputs[0].shape[-1] > 1


def traffic(node: Node, reads: dict[str, float], writes: float, vocabulary: int) -> float:
    """Passes of one node that writes.

    Source: mlx, backend/metal/kernels: softmax.h and logsumexp.h loop over rows this long, twice
    and once; sort.h sorts blocks, then merges, carrying indices, and copies the result out.
    """
    read = sum(reads.values())
    if not read and not writes:
        return 0.0
    if node.is_elementwise or node.name in PRODUCTS | READ_AND_WRITE | {"RandomBits"}:
        return read + writes
    if node.name == "Softmax":
        return 2 * read + writes
    if node.name in ONE_READ:
        return read
    if node.name in GATHERS:
        return 2 * writes  # it reads what it writes; single elements are not counted
    if node.name in SORTS:
        index = 4 / node.inputs[0].itemsize * read  # of indices, in the same unit
        merges = math.ceil(math.log2(vocabulary / SORT_BLOCK))
        block, merge = read + (read + index), 2 * (read + index)
        return block + merges * merge + 2 * writes
    raise NotImplementedError(f"{node.name} of {[array.shape for array in node.inputs]}")


def only_for(graph: Graph, is_end: Callable[[Node], bool]) -> set[int]:
    """Indices of the nodes that are an end, or whose every output goes into nothing but ends."""
    users: dict[str, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        for array in node.inputs:
            users.setdefault(array.id, []).append(i)
    asked = {array.id for array in graph.outputs}
    found: set[int] = set()
    for i, node in reversed(list(enumerate(graph.nodes))):
        if is_end(node) or all(
            array.id not in asked and users.get(array.id) and found.issuperset(users[array.id])
            for array in node.outputs
        ):
            found.add(i)
    return found


def copied_bytes(graph: Graph) -> dict[str, int]:
    """Bytes written by copies, by kind and in all."""
    layout = layouts(graph)
    users = Counter(a.id for node in graph.nodes for a in {a.id: a for a in node.inputs}.values())
    made = {array.id for node in graph.nodes for array in node.outputs}
    copied = dict.fromkeys(COPIES.values(), 0)
    for node in graph.nodes:
        if node.name not in COPIES or is_view(node, layout):
            continue
        written = node.outputs[0].nbytes
        if COPIES[node.name] == "slice_update":
            source, update = node.inputs[:2]
            in_place = users[source.id] == 1 and (
                source.id in made or source.id.startswith("owned_")
            )
            written = update.nbytes if in_place else written + update.nbytes
        copied[COPIES[node.name]] += written
    return copied | {"all": sum(copied.values())}


def launches(graph: Graph) -> list[str]:
    """Names of the nodes that do more than look at memory; a fused kernel is "Compiled"."""
    layout = layouts(graph)
    work = [node.name for node in graph.nodes if not is_view(node, layout)]
    return ["Compiled" if name.startswith("Compiled") else name for name in work]


def written_bytes(graph: Graph) -> int:
    layout = layouts(graph)
    return sum(a.nbytes for n in graph.nodes if not is_view(n, layout) for a in n.outputs)


def is_view(node: Node, layout: dict[str, np.ndarray]) -> bool:
    return bool(node.inputs) and view(node, layout[node.inputs[0].id]) is not None


def bases(graph: Graph, layout: dict[str, np.ndarray]) -> dict[str, Array]:
    """Array id -> the array whose memory it is."""
    base: dict[str, Array] = {}
    for node in graph.nodes:
        for array in node.inputs:
            base.setdefault(array.id, array)
        viewed = is_view(node, layout)
        for array in node.outputs:
            base[array.id] = base[node.inputs[0].id] if viewed else array
    return base


def check_counting() -> None:
    """A graph small enough to be counted by hand."""
    L, V, M = 4, 4096, 8  # one merge: two blocks of 2048

    @mx.compile
    def kernel(x: mx.array) -> tuple[mx.array, mx.array]:
        weights = mx.exp(x.astype(mx.float32))
        return weights, weights * x

    hidden, table = leaf((1, L, M), mx.bfloat16), leaf((V, M), mx.bfloat16)
    owned, borrowed = leaf((1, 2, 32, M), mx.bfloat16), leaf((1, 2, 32, M), mx.bfloat16)

    def build() -> list[mx.array]:
        logits = hidden @ table.T  # head: writes 0.5
        weights, products = kernel(logits)  # sampler: reads 0.5, writes 2
        total = weights.sum(axis=-1)  # 1
        twice = mx.exp(products).max(axis=-1) + mx.exp(products).max(axis=-1)  # 2 x 3
        split = weights.reshape(1, L, 2, V // 2).max(axis=-1)  # 1
        drawn = mx.random.uniform(shape=(1, L, V), key=mx.random.key(0)).max(axis=-1)  # 12
        some = mx.argpartition(products, 7, axis=-1)[..., :7]  # 1 + 2 + 1 x 4 + 2
        chances = mx.softmax(weights, axis=-1)  # soft embedding: 3
        soft = chances.astype(mx.bfloat16) @ table  # 1.5 + 0.5
        heads = mx.fast.rms_norm(hidden, None, 1e-6).reshape(1, L, 2, 4).swapaxes(1, 2)
        outputs = [total, twice, split, drawn, some, soft]
        outputs.append(heads.reshape(1, L * M))  # strided: 64 bytes
        outputs.append(mx.concatenate([hidden, hidden], axis=1))  # 128 bytes
        for buffer in (owned, borrowed + 0, borrowed):  # 128 bytes each, and 1024 for the last
            new = copy.copy(buffer)
            new[:, :, 2 : 2 + L] = leaf((1, 2, L, M), mx.bfloat16)
            outputs.append(new)
        return outputs

    graph = trace(build, names={"owned_0": owned})
    found = {**logits_passes(graph, L, V), **copied_bytes(graph)}
    wanted = {"head": 0.5, "sampler": 2.5 + 1 + 6 + 1 + 12 + 9, "soft_embedding": 5.0}
    wanted |= {"concatenate": 128, "reshape": 64, "contiguous": 0}
    wanted |= {"slice_update": 3 * 128 + 1024, "all": 128 + 64 + 3 * 128 + 1024}
    if found != wanted:
        raise SystemExit(f"counting is wrong: {found}, by hand {wanted}")
    # 9 up to `split`, 10 for `drawn` (3 of them on its limits), 4 for the rest of the logits.
    if len(launches(graph)) != 9 + 10 + 4 + 2 + 1 + 4:
        raise SystemExit(f"counting is wrong: {len(launches(graph))} launches: {launches(graph)}")


# --- counting in runs ---


def read_hosts(run: Run) -> dict[str, float]:
    """Values fetched ("reads") and evaluations waited for without one ("waits"), per step and
    beyond the steps per run. From one step to the next: what comes after the last step of a run is
    counted as beyond."""
    total, inside, pairs = Counter(), Counter(), 0
    prompts = prompts_of(1)
    for prompt in prompts:
        with watched_hosts() as counts:
            marks: list[Counter[str]] = []
            run(prompt, lambda marks=marks, counts=counts: marks.append(counts.copy()))
        total += counts
        inside += marks[-1] - marks[0]
        pairs += len(marks) - 1
    if not pairs:
        raise SystemExit("every prompt took one step: nothing to compare")
    steps = pairs + len(prompts)
    found: dict[str, float] = {"steps": steps}
    for what in ("reads", "waits"):
        per_step = inside[what] / pairs
        found[f"{what}_per_step"] = round(per_step, 3)
        found[f"{what}_beyond"] = round((total[what] - steps * per_step) / len(prompts), 3)
    return found


@contextmanager
def watched_hosts() -> Iterator[Counter[str]]:
    """Counts values fetched from arrays ("reads") and evaluations waited for ("waits")."""
    counts: Counter[str] = Counter()

    def counted(kind: str, function: Callable[..., Any], only_arrays: bool) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not only_arrays or (args and isinstance(args[0], mx.array)):
                counts[kind] += 1
            return function(*args, **kwargs)

        return call

    fetches = "item tolist __bool__ __int__ __float__ __index__ __array__ __bytes__".split()
    places = [(mx.array, name, "reads", False) for name in fetches]
    places += [(np, name, "reads", True) for name in ("array", "asarray")]
    places += [(mx, name, "waits", False) for name in ("eval", "synchronize")]
    before = [(owner, name, getattr(owner, name)) for owner, name, *_ in places]
    for owner, name, kind, only_arrays in places:
        setattr(owner, name, counted(kind, getattr(owner, name), only_arrays))
    try:
        yield counts
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def prompts_of(per_task: int) -> list[str]:
    """The first bundled prompts of each task."""
    tasks: dict[str, list[str]] = {}
    for entry in json.loads((bundled_model() / "prompts.json").read_text(encoding="utf-8")):
        tasks.setdefault(entry["task"], []).append(entry["prompt"])
    return [prompt for prompts in tasks.values() for prompt in prompts[:per_task]]


def our_run(policy: str, *, gpu: bool) -> Run:
    """Nobody looks at the events but to see that a step is done."""
    model, tokenizer = load(bundled_model())
    settings = GenerationSettings(seed=0, max_new_tokens=model.config.canvas_length, policy=policy)

    def run(prompt: str, mark: Callable[[], None]) -> None:
        tokens = mx.array([encode_prompt(tokenizer, prompt)], dtype=mx.int32)
        with as_on_gpu() if gpu else nullcontext():
            for event in denoise_tokens(model, tokens, settings):
                if isinstance(event, StepDone):
                    mark()

    return run


def their_run() -> Run:
    """Its loop asks for the temperature once per step."""
    model = load_theirs(bundled_model())
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    _, tokenizer = load(bundled_model())
    no_text = SimpleNamespace(last_segment="", add_token=lambda *_, **__: None, finalize=int)
    diffusion.make_streaming_detokenizer = lambda processor: no_text
    heat_of = diffusion._diffusion_linear_temperature
    no_end = SimpleNamespace(stopping_criteria=_NoEnd())

    def run(prompt: str, mark: Callable[[], None]) -> None:
        def marked(*args: Any) -> float:
            mark()
            return heat_of(*args)

        mx.random.seed(0)
        tokens = mx.array([encode_prompt(tokenizer, prompt)], dtype=mx.int32)
        diffusion._diffusion_linear_temperature = marked
        try:
            for _ in diffusion.stream_diffusion_generate(
                model,
                None,
                no_end,
                tokens,
                None,
                None,
                max_tokens=model.config.canvas_length,
                temperature=1.0,
                diffusion_sampler="entropy-bound",
                diffusion_full_canvas=True,
                skip_special_token_ids=[],
            ):
                pass
        finally:
            diffusion._diffusion_linear_temperature = heat_of

    return run


class _NoEnd:
    """All that mlx-vlm's loop asks of a tokenizer: whether a token ends the answer."""

    def add_eos_token_ids(self, ids: list[int]) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


def rows_times_steps(per_task: int) -> dict[str, int]:
    """Canvas positions denoised for the same prompts, by policy."""
    model, tokenizer = load(bundled_model())
    found = {}
    for policy in POLICIES:
        settings = GenerationSettings(seed=0, max_new_tokens=256, policy=policy)
        found[policy] = sum(
            event.draft.size
            for prompt in prompts_of(per_task)
            for event in denoise_tokens(
                model, mx.array([encode_prompt(tokenizer, prompt)], dtype=mx.int32), settings
            )
            if isinstance(event, StepDone)
        )
    return found


# --- what is said about it ---


def report(
    counts: dict[str, Any], reads: dict[str, dict[str, float]], positions: dict[str, int]
) -> None:
    for packing, sides in counts.items():
        for side, found in sides.items():
            for mode, passes in found["passes"].items():
                parts = ", ".join(f"{k} {v:g}" for k, v in passes.items() if k != "all")
                print(f"{packing}, {side}, {mode}: {passes['all']:g} passes ({parts})")
            for mode in found["passes"]:
                n = found["launches"][mode]
                print(
                    f"{packing}, {side}, {mode}: {n['all']:,} launches, {n['per_layer']:g} per "
                    f"layer and {n['outside_layers']:,} outside of layers"
                )
            copied = (f"{int(k):,} {v['all'] / 1e6:,.1f}" for k, v in found["copied_bytes"].items())
            print(f"{packing}, {side}: MB copied by tokens of context: {', '.join(copied)}")
    for side, found in reads.items():
        print(
            f"{side}: {found['reads_per_step']:g} host reads and {found['waits_per_step']:g} other "
            f"waits per step; beyond the steps {found['reads_beyond']:g} and "
            f"{found['waits_beyond']:g} per run"
        )
    for policy, denoised in positions.items():
        print(f"{policy}: {denoised:,} rows x steps")


def check_growth(copied: dict[str, dict[str, int]]) -> None:
    """Beyond its window, mlx-vlm copies the keys and values of the full layers alone, as they are
    concatenated with the canvas's."""
    text = config_26b()["text_config"]
    width = text["num_global_key_value_heads"] * text["global_head_dim"]
    per_token = LAYERS // PERIOD * 2 * 2 * width  # layers, keys and values, bytes
    grown = copied["32768"]["all"] - copied["4096"]["all"]
    if grown != (32768 - 4096) * per_token:
        raise SystemExit(f"mlx-vlm copies {grown:,} bytes more at 32,768 tokens than at 4,096")


def check_bounds(
    counts: dict[str, Any], reads: dict[str, Any], in_place: dict[str, float]
) -> list[dict[str, Any]]:
    bounds = []

    def add(what: str, value: float, bound: float, passed: bool) -> None:
        bounds.append({"what": what, "value": value, "bound": bound, "passed": passed})

    for packing, sides in counts.items():
        check_growth(sides["mlx-vlm"]["copied_bytes"])
        ours, theirs = sides["ours"], sides["mlx-vlm"]
        for mode, most in PASSES.items():
            value = ours["passes"][mode]["all"]
            add(f"{packing}, passes over the logits, {mode}", value, most, value <= most)
        for tokens in map(str, CONTEXTS):
            a, b = ours["copied_bytes"][tokens]["all"], theirs["copied_bytes"][tokens]["all"]
            add(f"{packing}, bytes copied at {tokens} tokens", a, b, a < b)
    for side, found in reads.items():
        if side.startswith("ours") and "CPU" not in side:
            value = found["reads_per_step"]
            add(f"{side}, host reads per step", value, HOST_READS, value <= HOST_READS)
    for policy, share in in_place.items():
        add(f"{policy}, share of keys and values written in place", share, 1, share == 1)
    return bounds


if __name__ == "__main__":
    main()
