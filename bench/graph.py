"""Un-evaluated MLX arrays -> the nodes that evaluating them runs, as GPUs get them. What to count
in those is the business of `counts.py`.

No tool shows it all. `mx.export_to_dot` has every node and no shapes; `mx.export_function` has
shapes, merges equal nodes, which MLX does only when it compiles, and knows no compiled kernels. So
both lists are walked in step. Compiled functions, and those of `mx.fast`, which a machine without a
GPU takes apart as it builds, leave one marked node each. The kernels of a compiled function are
worked out by MLX's rule and compared with those that `mx.compile` makes.

Import this before anything that imports `mlx.nn`: what was compiled earlier cannot be looked into.
"""

from __future__ import annotations

import functools
import io
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# What mx.compile may put into one kernel. Source: mlx 0.32, mlx/compile.cpp, is_fusable.
UNARY = frozenset(
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType BitwiseInvert Ceil Conjugate Cos Cosh "
    "Erf ErfInv Exp Expm1 Floor Imag Log Log2 Log10 Log1p LogicalNot Negative Real Round Rsqrt "
    "Sigmoid Sign Sin Sinh Sqrt Square Tan Tanh".split()
)
ELEMENTWISE = UNARY | frozenset(
    "Add ArcTan2 BitwiseAnd BitwiseOr BitwiseXor Divide Equal FloorDivide Greater GreaterEqual "
    "LeftShift Less LessEqual LogAddExp LogicalAnd LogicalOr Maximum Minimum Multiply NaNEqual "
    "NotEqual Power Remainder RightShift Select Subtract".split()
)
_FUSABLE = ELEMENTWISE | {"Broadcast"}
_DEEPEST = 11  # mlx/compile.cpp, max_compile_depth

_SAME = frozenset("Copy StopGradient".split())  # the same memory under another node
_RESHAPES = frozenset("ExpandDims Flatten Reshape Squeeze Unflatten".split())  # if strides allow
_VIEWS = _SAME | _RESHAPES | frozenset("AsStrided Broadcast Slice Split Transpose".split())

_TAG = 1 << 40  # and up: constants that mark nodes

# One name in `mx.export_function`, several in MLX, told apart by the first argument.
_KINDS = {
    "BitwiseBinary": "BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift".split(),
    "Equal": ["Equal", "NaNEqual"],
    "Log": ["Log2", "Log10", "Log"],
    "Reduce": "And Or Sum Prod Min Max".split(),
    "Scan": "CumMax CumMin CumSum CumProd".split(),
    "Sqrt": ["Sqrt", "Rsqrt"],
}


@dataclass(frozen=True, slots=True)
class Array:
    """One array of a graph."""

    id: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Node:
    """One primitive, under MLX's own name; that of a fused kernel begins with "Compiled"."""

    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: tuple[Any, ...] = ()

    @property
    def is_elementwise(self) -> bool:
        return self.name in ELEMENTWISE or self.name.startswith("Compiled")


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in an order in which they could run. What none of them writes was there before."""

    nodes: tuple[Node, ...]
    outputs: tuple[Array, ...]
    inputs: tuple[Array, ...] = ()  # of a compiled function


def trace(
    build: Callable[[], Iterable[mx.array]], *, names: Mapping[str, mx.array] | None = None
) -> Graph:
    """The graph behind the arrays that `build` returns, down to what was evaluated before. What
    `build` evaluates on the way is not in it.

    `names` are ids for arrays that are there before, so that they can be found again.
    """
    regions: list[_Region] = []
    with _building(regions):
        return _expand(*_list(list(build()), names or {}), regions)


def leaf(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of any size that takes no memory: one zero, seen again and again."""
    array = mx.broadcast_to(mx.zeros((), dtype), tuple(shape))
    mx.eval(array)
    return array


def layouts(graph: Graph) -> dict[str, np.ndarray]:
    """Array id -> a numpy array of its shape and strides, which are counted in elements.

    Views share memory: a broadcast has strides of 0, a transpose has them in another order. All
    else is taken to be written row by row, except that a unary operation keeps the order it reads.
    """
    found: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        for array in node.inputs:
            if array.id not in found:
                found[array.id] = _rows(array.shape)
        source = found[node.inputs[0].id] if node.inputs else None
        seen = view(node, source) if source is not None else None
        if seen is None and node.name in UNARY and source is not None and _is_dense(source):
            seen = [source]
        for i, array in enumerate(node.outputs):
            found[array.id] = seen[i] if seen is not None else _rows(array.shape)
            assert found[array.id].shape == array.shape, f"{node.name} gives {array.shape}"
    return found


def view(node: Node, source: np.ndarray) -> list[np.ndarray] | None:
    """Layouts of the outputs where the node only looks at its first input in another way; None
    where it writes something."""
    shape = node.outputs[0].shape
    match node.name:
        case name if name in _SAME:
            return [source]
        case name if name in _RESHAPES:
            try:
                return [np.reshape(source, shape, copy=False)]
            except ValueError:  # strides that only a copy gets rid of
                return None
        case "Contiguous":
            return [source] if source.flags.c_contiguous else None
        case "Broadcast":
            return [np.broadcast_to(source, shape)]
        case "Transpose":
            return [source.transpose(node.arguments[0])]
        case "Slice":
            edges = zip(*node.arguments, strict=True)  # starts, stops, steps
            return [source[tuple(slice(*edge) for edge in edges)]]
        case "Split":
            return np.split(source, list(node.arguments[0]), node.arguments[1])
        case "AsStrided":
            return [np.lib.stride_tricks.as_strided(source, shape, node.arguments[1])]
    return None


def _rows(shape: Sequence[int]) -> np.ndarray:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, strides)


def _is_dense(layout: np.ndarray) -> bool:
    return layout.transpose(np.argsort(layout.strides)[::-1]).flags.c_contiguous


def fuse(graph: Graph) -> Graph:
    """Kernels as `mx.compile` makes them: from the last node back, elementwise nodes join the one
    that uses them, unless one outside of its kernel uses them too.

    Source: mlx 0.32, mlx/compile.cpp, compile_fuse; its limit on the arrays of a kernel is left
    out.
    """
    nodes = graph.nodes
    producer = {array.id: i for i, node in enumerate(nodes) for array in node.outputs}
    users: dict[str, set[int]] = defaultdict(set)
    for i, node in enumerate(nodes):
        for array in node.inputs:
            users[array.id].add(i)
    given = {array.id for array in graph.outputs}
    taken: set[int] = set()

    def join(i: int, shape: tuple[int, ...], depth: int, members: set[int]) -> None:
        node, array = nodes[i], nodes[i].outputs[0]
        if i in members or i in taken or depth >= _DEEPEST or node.name not in _FUSABLE:
            return
        if (array.id in given and array.shape != shape) or (depth and users[array.id] - members):
            return
        members.add(i)
        for source in node.inputs:
            if source.id in producer:
                join(producer[source.id], array.shape, depth + 1, members)

    kernels: list[Node] = []
    for i in reversed(range(len(nodes))):
        if i not in taken:
            members: set[int] = set()
            join(i, nodes[i].outputs[0].shape, 0, members)
            taken |= members
            kernels.append(_kernel(graph, members) if len(members) > 1 else nodes[i])
    return replace(graph, nodes=tuple(kernels[::-1]))


def _kernel(graph: Graph, members: set[int]) -> Node:
    parts = [graph.nodes[i] for i in sorted(members)]
    made = {array.id for part in parts for array in part.outputs}
    used = {a.id for i, n in enumerate(graph.nodes) if i not in members for a in n.inputs}
    used |= {array.id for array in graph.outputs}
    reads = {array.id: array for part in parts for array in part.inputs if array.id not in made}
    writes = (array for part in parts for array in part.outputs if array.id in used)
    name = "Compiled" + "".join(part.name for part in parts)
    return Node(name, tuple(reads.values()), tuple(writes))


# --- regions: what GPUs run as it is and a CPU machine would take apart ---


class _Region(NamedTuple):
    name: str
    body: Graph | None = None  # the kernels of a compiled function


_regions: list[_Region] | None = None  # of the graph being built
_in_compiled = False  # another compiled function that is called there is part of its body
_compile = mx.compile
_PLACES = [(mx.fast, name) for name in dir(mx.fast) if not name.startswith("_")]
_PLACES += [(mx, "dequantize"), (mx, "contiguous")]
_GENUINE = [getattr(owner, name) for owner, name in _PLACES]


@contextmanager
def _building(regions: list[_Region] | None, *, in_compiled: bool = False) -> Iterator[None]:
    """Regions are put down there until the end of the block; with None, MLX is as always."""
    global _regions, _in_compiled
    before = _regions, _in_compiled
    _regions, _in_compiled = regions, in_compiled
    _switch()
    try:
        yield
    finally:
        _regions, _in_compiled = before
        _switch()


def _switch() -> None:
    for (owner, name), function in zip(_PLACES, _GENUINE, strict=True):
        setattr(owner, name, function if _regions is None else _STAND_INS.get(name, _refuse))


def _mark(
    region: _Region, inputs: Sequence[mx.array], outputs: Iterable[tuple[Sequence[int], mx.Dtype]]
) -> list[mx.array]:
    """Arrays behind which stands one node with the region's number among its inputs."""
    assert _regions is not None
    _regions.append(region)
    tag = mx.array(_TAG + len(_regions) - 1, mx.int64)
    return list(mx.depends([leaf(*output) for output in outputs], [tag, *inputs]))


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    inputs = [x] if weight is None else [x, weight]
    return _mark(_Region("RMSNorm"), inputs, [(x.shape, _common(inputs))])[0]


def _rope(
    a: mx.array, dims: int, *, offset: Any, freqs: mx.array | None = None, **_: Any
) -> mx.array:
    inputs = [a, *(x for x in (offset, freqs) if isinstance(x, mx.array))]
    return _mark(_Region("RoPE"), inputs, [(a.shape, a.dtype)])[0]


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any
) -> mx.array:
    inputs = [q, k, v, *([mask] if isinstance(mask, mx.array) else [])]
    output = ((*q.shape[:-1], v.shape[-1]), _common([q, k, v]))
    return _mark(_Region("ScaledDotProductAttention"), inputs, [output])[0]


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    dtype: mx.Dtype | None = None,
    **_: Any,
) -> mx.array:
    inputs = [w, scales] if biases is None else [w, scales, biases]
    if dtype is None:
        dtype = scales.dtype if mode == "affine" else mx.bfloat16
    shape = (*w.shape[:-1], w.shape[-1] * 32 // (bits or 4))
    return _mark(_Region("Dequantize"), inputs, [(shape, dtype)])[0]


def _contiguous(a: mx.array, *_: Any, **__: Any) -> mx.array:
    # One node anyway, but one that `mx.export_function` cannot show.
    return _mark(_Region("Contiguous"), [a], [(a.shape, a.dtype)])[0]


def _common(arrays: Sequence[mx.array]) -> mx.Dtype:
    return mx.result_type(*arrays) if len(arrays) > 1 else arrays[0].dtype


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("an mx.fast function without a stand-in in bench/graph.py")


_STAND_INS = {
    "contiguous": _contiguous,
    "dequantize": _dequantize,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "scaled_dot_product_attention": _attention,
}


def _compile_that_can_be_seen(
    fun: Callable[..., Any], inputs: Any = None, outputs: Any = None, shapeless: bool = False
) -> Any:
    """`mx.compile`, but a call of the function is one region while a graph is being built."""
    compiled = _compile(fun, inputs, outputs, shapeless)

    @functools.wraps(fun)
    def call(*given: Any, **named: Any) -> Any:
        if _regions is None or _in_compiled:
            return compiled(*given, **named)
        return _compiled_region(fun, compiled, (given, named), shapeless=shapeless)

    return call


if "mlx.nn" in sys.modules:
    raise ImportError("import graph before mlx.nn, and before whatever imports that")
mx.compile = _compile_that_can_be_seen


def _compiled_region(
    fun: Callable[..., Any], compiled: Callable[..., Any], call: Any, *, shapeless: bool
) -> Any:
    """One call of a compiled function: a marked node whose body is its kernels."""
    inputs = [value for _, value in tree_flatten(call) if isinstance(value, mx.array)]
    result = None

    def flat(function: Callable[..., Any], values: Sequence[mx.array]) -> list[mx.array]:
        nonlocal result
        rest = iter(values)
        given, named = tree_map(lambda x: next(rest) if isinstance(x, mx.array) else x, call)
        result = function(*given, **named)
        return [array for _, array in tree_flatten(result)]

    stand_ins = [leaf(array.shape, array.dtype) for array in inputs]
    with _building(None):  # mx.compile keeps what it traces, so it must see the true mx.fast
        made = [node.name for node in _dot(flat(compiled, stand_ins), {})[0]]
    inner: list[_Region] = []
    with _building(inner, in_compiled=True):
        traced = _exported(lambda *values: flat(fun, values), stand_ins, shapeless=shapeless)
        body = fuse(_expand(*traced, inner))
    modelled = [node.name for node in body.nodes]
    if not inner and _kernels(made) != _kernels(modelled):
        raise NotImplementedError(f"{fun.__name__}: mx.compile makes {made}, we say {modelled}")
    kinds = [(array.shape, getattr(mx, array.dtype)) for array in body.outputs]
    outputs = iter(_mark(_Region(fun.__name__, body), inputs, kinds))
    return tree_map(lambda _: next(outputs), result)


def _kernels(names: Iterable[str]) -> Counter[str]:
    """Names without broadcasts, of which a function that may be called with other shapes has more,
    and without the order of what is in a kernel."""
    bare = (re.sub("^Compiled|Broadcast(Axes)?", "", name) for name in names if name not in _VIEWS)
    return Counter("".join(sorted(name)) for name in bare if name)


def _expand(graph: Graph, constants: dict[str, int], regions: list[_Region]) -> Graph:
    """Marked nodes replaced by what they stand for."""
    same: dict[str, Array] = {}  # array id -> the array that it really is
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(same.get(array.id, array) for array in node.inputs)
        if node.name != "Depends":
            nodes.append(replace(node, inputs=inputs))
            continue
        tag, *inputs = inputs[len(node.outputs) :]
        number = constants.get(tag.id, 0) - _TAG
        if number < 0:
            raise NotImplementedError("mx.depends in the graph itself")
        region = regions[number]
        if region.body is None:
            nodes.append(Node(region.name, tuple(inputs), node.outputs))
            continue
        known = {a.id: b for a, b in zip(region.body.inputs, inputs, strict=True)}
        for inner, outer in zip(region.body.outputs, node.outputs, strict=True):
            if inner.id in known:  # an input, or an output before it, given back
                same[outer.id] = known[inner.id]
            known.setdefault(inner.id, outer)
        for part in region.body.nodes:
            ins, outs = (
                tuple(known.get(a.id) or replace(a, id=f"{number}:{a.id}") for a in side)
                for side in (part.inputs, part.outputs)
            )
            nodes.append(replace(part, inputs=ins, outputs=outs))
    outputs = tuple(same.get(array.id, array) for array in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs)


# --- what MLX shows of a graph ---


class _Name(NamedTuple):
    """A node without shapes."""

    name: str
    inputs: list[str]
    outputs: list[str]


def _list(arrays: list[mx.array], known: Mapping[str, mx.array]) -> tuple[Graph, dict[str, int]]:
    """Every node behind the arrays, and the values of whole-number constants."""
    # First, since exporting merges equal nodes in the graph itself.
    names, outputs = _dot(arrays, known)
    shown, values = _exported(lambda: arrays, [])
    constants: dict[str, int] = {}
    by_name: dict[str, Array] = {}
    arguments: dict[int, tuple[Any, ...]] = {}
    here = {output: i for i, node in enumerate(names) for output in node.outputs}
    there = {array.id: node for node in shown.nodes for array in node.outputs}
    asked = [(a, b) for a, b in zip(outputs, shown.outputs, strict=True) if a is not None]
    pairs = list(asked)
    while pairs:
        name, array = pairs.pop()
        if name in by_name:
            continue
        by_name[name] = replace(array, id=name)
        i, twin = here.get(name), there.get(array.id)
        if i is None and twin is None:
            if array.id in values:
                constants[name] = values[array.id]
            continue
        assert i is not None and twin is not None, f"{array} is made in one of the lists only"
        assert names[i].name == twin.name, f"{names[i].name} is {twin.name} in the other list"
        arguments[i] = twin.arguments
        pairs += zip(names[i].inputs, twin.inputs, strict=True)
        pairs += zip(names[i].outputs, twin.outputs, strict=True)
    nodes = []
    for i, node in enumerate(names):
        ins, outs = (tuple(by_name[a] for a in side) for side in (node.inputs, node.outputs))
        nodes.append(Node(node.name, ins, outs, arguments[i]))
    return Graph(tuple(nodes), tuple(by_name[name] for name, _ in asked)), constants


def _dot(
    arrays: list[mx.array], known: Mapping[str, mx.array]
) -> tuple[list[_Name], list[str | None]]:
    """Nodes and the names of the arrays asked for, from `mx.export_to_dot`; None for an array that
    was asked for before."""
    file = io.StringIO()
    asked = {f"asked_{i}": array for i, array in enumerate(arrays)}
    mx.export_to_dot(file, *arrays, **known, **asked)
    nodes: dict[str, _Name] = {}
    seen = set()
    for line in file.getvalue().splitlines():
        if match := re.fullmatch(r'\{ (\d+) \[label ="(.*)", shape=rectangle\]; \}', line):
            assert match[1] not in nodes, f"two nodes share {match[2]}"
            nodes[match[1]] = _Name(match[2].split()[0], [], [])  # "View int32", "Scatter Sum"
        elif match := re.fullmatch(r'"(\w+)" -> (\d+)', line):
            nodes[match[2]].inputs.append(match[1])
        elif match := re.fullmatch(r'(\d+) -> "(\w+)"', line):
            nodes[match[1]].outputs.append(match[2])
        elif match := re.fullmatch(r'\{ (?:rank=\w+; )?"(\w+)"; \}', line):
            seen.add(match[1])
        else:
            assert line in ("digraph {", "}"), line
    # An array asked for twice goes by one of its names.
    return list(nodes.values()), [name if name in seen else None for name in asked]


def _exported(
    function: Callable[..., list[mx.array]], inputs: list[mx.array], *, shapeless: bool = False
) -> tuple[Graph, dict[str, int]]:
    """A function's nodes, of which equal ones are merged and compiled ones inlined, and the values
    of its whole-number constants."""
    nodes: list[Node] = []
    arrays: dict[str, tuple[Array, ...]] = {}
    constants: dict[str, int] = {}

    def kinds(rows: Iterable[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[Array, ...]:
        return tuple(
            Array(name, tuple(shape), str(dtype).rpartition(".")[2], dtype.size)
            for name, shape, dtype in rows
        )

    def take(event: dict[str, Any]) -> None:
        match event["type"]:
            case "inputs" | "outputs" as side:
                arrays[side] = kinds(event[side])
            case "constants":
                for name, value in event["constants"]:
                    if value.ndim == 0 and value.dtype == mx.int64:
                        constants[name] = value.item()
            case "primitive":
                ins, outs = kinds(event["inputs"]), kinds(event["outputs"])
                name, arguments = event["name"], tuple(event["arguments"])
                name = _KINDS[name][arguments[0]] if name in _KINDS else name
                nodes.append(Node(name, ins, outs, arguments))

    mx.export_function(take, function, *inputs, shapeless=shapeless)
    return Graph(tuple(nodes), arrays["outputs"], arrays["inputs"]), constants
