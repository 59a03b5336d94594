"""Symbolic shapes: dimensions as integers or expressions of named ones, and the values of small integer tensors.

ONNX's shape inference gives up where a target shape is computed (`Reshape` by a `Concat` of `Shape`s), which is what
TorchScript exports are made of. This pass follows the integers: it knows the value of `Shape(x)[1]` as "seq", of
`seq // 1` as "seq", of `16 / 2` as 8, and from them the shapes that ONNX leaves open.

One assumption is made, and checked only by running the model: a slice of a constant up to a dynamic size (a buffer of
positions, a causal mask) lies within the constant.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from rewrite.graph import Dim, Graph, canonical

Values = list[Dim]
LONGEST = 1000  # characters of an expression
LARGEST = 64  # elements: longer vectors are data, not shapes


@lru_cache(4096)
def times(a: Dim, b: Dim) -> Dim:
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 1 or b == 1:
        return b if a == 1 else a
    factors = sorted([*_factors(a), *_factors(b)], key=lambda f: (not f.isdigit(), f))
    number = math.prod(int(f) for f in factors if f.isdigit())
    names = [f for f in factors if not f.isdigit()]
    if number == 0:
        return 0
    return "*".join(([str(number)] if number != 1 else []) + names)


def _factors(d: Dim) -> list[str]:
    text = str(d)
    return text.split("*") if not set(text) & set("+-/() ") else [f"({text})" if not text.startswith("(") else text]


@lru_cache(4096)
def divide(a: Dim, b: Dim) -> Dim:
    """a // b where it comes out even, or is known; else an expression."""
    if a is None or b is None or b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    if b == 1:
        return a
    above, below = _factors(a), _factors(b)
    rest = list(above)
    open_below = []
    for factor in below:
        if factor in rest:
            rest.remove(factor)
        else:
            open_below.append(factor)
    number = math.prod(int(f) for f in rest if f.isdigit())
    divisor = math.prod(int(f) for f in open_below if f.isdigit())
    if any(not f.isdigit() for f in open_below) or number % divisor:
        return f"({a})//({b})"
    names = [f for f in rest if not f.isdigit()]
    result: Dim = number // divisor
    for name in names:
        result = times(result, name)
    return result


def _terms(d: Dim) -> tuple[list[str], int] | None:
    """The names and the number in a sum without brackets: "seq + past + 1" is (["past", "seq"], 1); None for others."""
    parts = str(d).replace(" - ", " + -").split(" + ")
    numbers = [p for p in parts if p.lstrip("-").isdigit()]
    names = sorted(p for p in parts if p not in numbers)
    return None if set("".join(names)) & set("()-/ ") else (names, sum(map(int, numbers)))


def _sum(names: list[str], number: int) -> Dim:
    if not names:
        return number
    text = " + ".join(sorted(names))
    return f"{text} + {number}" if number > 0 else f"{text} - {-number}" if number < 0 else text


def ordered(d: Dim) -> Dim:
    """A sum with its terms in our order: exporters write "seq + past" and "past + seq" in one model."""
    terms = _terms(d) if isinstance(d, str) and " + " in d else None
    return d if terms is None else _sum(*terms)


def plus(a: Dim, b: Dim) -> Dim:
    if a is None or b is None:
        return None
    if (isinstance(b, str) and str(a) == f"-({b})") or (isinstance(a, str) and str(b) == f"-({a})"):
        return 0
    left, right = _terms(a), _terms(b)
    if left is not None and right is not None:
        return _sum(left[0] + right[0], left[1] + right[1])
    if a == 0 or b == 0:
        return b if a == 0 else a
    return f"{a} + {b}" if not isinstance(b, int) or b >= 0 else f"{a} - {-b}"


def plus_all(dims: Sequence[Dim]) -> Dim:
    """The sum of any number, each of which is read once."""
    terms = [t for d in dims if d is not None and (t := _terms(d)) is not None]
    if len(terms) == len(dims):
        return _sum([name for names, _ in terms for name in names], sum(number for _, number in terms))
    total: Dim = 0
    for d in dims:
        total = plus(total, d)
    return total


def minus(a: Dim, b: Dim) -> Dim:
    if a is None or b is None:
        return None
    if a == b:
        return 0
    if isinstance(b, int):
        return plus(a, -b)
    left, right = _terms(a), _terms(b)
    if left is not None and right is not None and all(left[0].count(n) >= right[0].count(n) for n in right[0]):
        names = list(left[0])
        for name in right[0]:
            names.remove(name)
        return _sum(names, left[1] - right[1])
    return f"{a} - ({b})"


def settle(dim: Dim) -> Dim:
    """A quotient that comes out even, as PyTorch writes it: `((4*batch)//batch)` is 4; anything else as it is."""
    if not isinstance(dim, str) or "//" not in dim:
        return dim
    try:
        found = _evaluate(ast.parse(dim, mode="eval").body)
    except SyntaxError:
        return dim
    return dim if found is None or "//" in str(found) else found


def substitute(dim: Dim, names: Mapping[str, Dim]) -> Dim:
    """A dimension with other names or numbers in the place of some names; None if it is no expression we know."""
    if not isinstance(dim, str):
        return dim
    try:
        return _evaluate(ast.parse(dim, mode="eval").body, names)
    except SyntaxError:
        return names.get(dim, dim)


def _evaluate(tree: ast.expr, names: Mapping[str, Dim] | None = None) -> Dim:
    if isinstance(tree, ast.Name):
        return (names or {}).get(tree.id, tree.id)
    if isinstance(tree, ast.Constant):
        return tree.value if isinstance(tree.value, int) else None
    if not isinstance(tree, ast.BinOp):
        return None
    left, right = _evaluate(tree.left, names), _evaluate(tree.right, names)
    if isinstance(tree.op, ast.Pow):
        return product([left] * right) if isinstance(right, int) and 0 <= right <= 4 else None
    steps: dict[type[ast.operator], Callable[[Dim, Dim], Dim]] = {ast.Mult: times, ast.FloorDiv: divide, ast.Add: plus, ast.Sub: minus}
    return steps[type(tree.op)](left, right) if type(tree.op) in steps else None


def product(dims: list[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = times(result, dim)
    return result


def broadcast(a: Dim, b: Dim) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and a > 1:
        return a
    if isinstance(b, int) and b > 1:
        return b
    return a if a is not None and is_named(a) and not (b is not None and is_named(b)) else b if b is not None and is_named(b) and not is_named(a) else None


def broadcast_all(a: Values, b: Values) -> Values:
    rank = max(len(a), len(b))
    ones: Values = [1]
    pairs = zip(ones * (rank - len(a)) + a, ones * (rank - len(b)) + b, strict=True)
    return [broadcast(x, y) for x, y in pairs]


def is_named(d: Dim) -> bool:
    """A dimension we can speak of: a number or an expression of real names, not ONNX's invented `unk__7`."""
    return d is not None and not (isinstance(d, str) and "unk__" in d)


def is_absurd(d: Dim) -> bool:
    """A number past 64 bits, or an expression so long that a file must have been made to grow it: doubled with each node."""
    return len(d) > LONGEST if isinstance(d, str) else d is not None and abs(d) >= 1 << 63


def _is_open(tensor: gs.Tensor) -> bool:
    """Whether something about its shape is not known."""
    return bool(tensor.name) and (tensor.shape is None or not all(map(is_named, tensor.shape)))


class SymbolicShapes:
    """Refines the shapes of a graph's tensors in place and collects the values of small integer tensors."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.values: dict[int, Values] = {}
        self.rank0: set[int] = set()  # tensors in `values` without dimensions
        self.floats: dict[int, np.ndarray] = {}

    def run(self) -> None:
        for tensor in (*self.graph.gs.inputs, *(t for n in self.graph.nodes for t in n.outputs)):
            if tensor.shape is not None and any(isinstance(d, str) and " + " in d for d in tensor.shape):
                tensor.shape = [ordered(d) for d in tensor.shape]
        declared = self._forget_output_names()
        for tensor in (t for n in self.graph.nodes for t in n.outputs if t.shape is not None and id(t) not in self.graph.outputs):
            if any(isinstance(d, str) and "//" in d for d in tensor.shape):
                tensor.shape = [settle(d) for d in tensor.shape]
        for node in self.graph:
            handler = HANDLERS.get(canonical(node))
            if handler is not None:
                handler(self, node)
            if canonical(node) in FLOATING:
                self._float(node)
            if any(map(_is_open, node.outputs)):
                self._complete(node)
        for tensor, dims in declared:
            if tensor.shape is None or len(tensor.shape) != len(dims):
                tensor.shape = dims
            tensor.shape = [old if new is None else new for old, new in zip(dims, tensor.shape, strict=True)]
        self.graph.known = {i: np.array(v, np.int64) for i, v in self.values.items() if all(isinstance(d, int) for d in v)}
        self.graph.symbolic = dict(self.values)
        self.graph.scalars = set(self.rank0)
        self.graph.known.update(self.floats)

    def _forget_output_names(self) -> list[tuple[gs.Tensor, Values]]:
        """TorchScript invents names for the dimensions of the graph's outputs: what the inputs' names tell is better."""
        names = {d for t in self.graph.gs.inputs for d in t.shape or () if isinstance(d, str)}
        declared = []
        for tensor in self.graph.gs.outputs:
            if names and tensor.shape is not None and self.graph.producer(tensor) is not None:
                declared.append((tensor, list(tensor.shape)))
                tensor.shape = [None if isinstance(d, str) and d not in names else d for d in tensor.shape]
        invented = {d for _, dims in declared for d in dims if isinstance(d, str) and d not in names and re.fullmatch(r".*_dim_\d+", d)}
        if invented:  # ONNX's inference carried them on to the readers of outputs (of cached keys, say)
            for tensor in (t for n in self.graph.nodes for t in n.outputs if t.shape is not None):
                tensor.shape = [None if d in invented else d for d in tensor.shape]
        return declared

    # --- values ------------------------------------------------------------------------------------------------
    def value(self, tensor: gs.Tensor) -> Values | None:
        if id(tensor) in self.values:
            return self.values[id(tensor)]
        array = self.graph.constant(tensor, LARGEST)
        if array is None or array.dtype.kind not in "iub" or array.ndim > 1 or array.size > LARGEST:
            return None
        if array.ndim == 0:
            self.rank0.add(id(tensor))
        return [int(i) for i in array.reshape(-1)]

    def _set(self, tensor: gs.Tensor, values: Values | None, scalar: bool = False) -> None:
        if values is not None and len(values) <= LARGEST and all(is_named(v) and not is_absurd(v) for v in values):
            self.values[id(tensor)] = values
            if scalar:
                self.rank0.add(id(tensor))

    def _is_scalar(self, tensor: gs.Tensor) -> bool:
        self.value(tensor)
        return id(tensor) in self.rank0

    def _shape_of(self, tensor: gs.Tensor) -> Values | None:
        return None if tensor.shape is None else list(tensor.shape)

    def _dims(self, node: gs.Node, dims: Values | None) -> None:
        """Give the node's output a shape, where that says more than what is known."""
        tensor = node.outputs[0]
        if dims is None:
            return
        if tensor.shape is None or len(tensor.shape) != len(dims):
            tensor.shape = dims
        else:
            tensor.shape = [new if not is_named(old) and is_named(new) else old for old, new in zip(tensor.shape, dims, strict=True)]

    # --- operators that make or move integers ------------------------------------------------------------------
    def _shape(self, node: gs.Node) -> None:
        dims = self._shape_of(node.inputs[0])
        if dims is not None:
            start, end = node.attrs.get("start", 0), node.attrs.get("end", len(dims))
            self._set(node.outputs[0], dims[start:end])

    def _identity(self, node: gs.Node) -> None:
        self._set(node.outputs[0], self.value(node.inputs[0]), self._is_scalar(node.inputs[0]))

    def _cast(self, node: gs.Node) -> None:
        dtype = node.outputs[0].dtype
        if dtype is not None and not isinstance(dtype, int) and np.dtype(dtype).kind in "iub":
            self._identity(node)

    def _gather(self, node: gs.Node) -> None:
        data, index = self.value(node.inputs[0]), self.value(node.inputs[1])
        if data is None or index is None or self._is_scalar(node.inputs[0]) or not all(isinstance(i, int) and -len(data) <= i < len(data) for i in index):
            return
        self._set(node.outputs[0], [data[i] for i in index if isinstance(i, int)], self._is_scalar(node.inputs[1]))

    def _concat(self, node: gs.Node) -> None:
        parts = [self.value(t) for t in node.inputs]
        if all(p is not None for p in parts):
            self._set(node.outputs[0], [d for p in parts if p is not None for d in p])
        shapes = [s for t in node.inputs if (s := self._shape_of(t)) is not None]
        axis = node.attrs.get("axis", 0)
        if len(shapes) != len(node.inputs) or len({len(s) for s in shapes}) != 1:
            return
        # Cached keys and new ones: "past + seq", where ONNX's inference gives up. Other axes have the first known name.
        dims = [next((d for d in column if is_named(d)), None) for column in zip(*shapes, strict=True)]
        dims[axis] = plus_all([shape[axis] for shape in shapes])
        self._dims(node, dims)

    def _unsqueeze(self, node: gs.Node) -> None:
        if self._is_scalar(node.inputs[0]):
            self._set(node.outputs[0], self.value(node.inputs[0]))

    def _squeeze(self, node: gs.Node) -> None:
        values = self.value(node.inputs[0])
        if values is not None and len(values) == 1:
            self._set(node.outputs[0], values, scalar=True)

    def _binary(self, node: gs.Node, compute: Callable[[Dim, Dim], Dim]) -> None:
        a, b = self.value(node.inputs[0]), self.value(node.inputs[1])
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return
        length = max(len(a), len(b))
        a, b = a * (length // len(a)) if a else a, b * (length // len(b)) if b else b
        scalar = self._is_scalar(node.inputs[0]) and self._is_scalar(node.inputs[1])
        self._set(node.outputs[0], [compute(x, y) for x, y in zip(a, b, strict=True)], scalar)

    def _add(self, node: gs.Node) -> None:
        self._binary(node, plus)

    def _sub(self, node: gs.Node) -> None:
        self._binary(node, minus)

    def _mul(self, node: gs.Node) -> None:
        self._binary(node, times)

    def _div(self, node: gs.Node) -> None:
        self._binary(node, divide)

    def _mod(self, node: gs.Node) -> None:
        self._binary(node, lambda a, b: a % b if isinstance(a, int) and isinstance(b, int) and b > 0 and a >= 0 else None)

    def _equal(self, node: gs.Node) -> None:
        # Names stand for sizes, which are never negative: `Equal(size, -1)` is false.
        def equal(x: Dim, y: Dim) -> Dim:
            if (isinstance(x, int) and isinstance(y, int)) or x == y:
                return int(x == y)
            return 0 if (isinstance(x, int) and x < 0) or (isinstance(y, int) and y < 0) else None

        self._binary(node, equal)

    def _where(self, node: gs.Node) -> None:
        choice, a, b = (self.value(t) for t in node.inputs)
        if choice is None or a is None or b is None or not all(isinstance(c, int) for c in choice):
            return
        length = max(len(choice), len(a), len(b))
        if all(len(v) in (1, length) for v in (choice, a, b)):
            choice, a, b = (v * (length // len(v)) for v in (choice, a, b))
            self._set(node.outputs[0], [x if c else y for c, x, y in zip(choice, a, b, strict=True)], all(self._is_scalar(t) for t in node.inputs))

    def _constantofshape(self, node: gs.Node) -> None:
        dims = self.value(node.inputs[0])
        self._dims(node, dims)
        value = node.attrs.get("value")
        if dims is None or len(dims) > 1 or not all(isinstance(d, int) for d in dims):
            return
        array = np.zeros(1, np.float32) if value is None else np.asarray(value.values)
        if array.dtype.kind in "iub" and math.prod(d for d in dims if isinstance(d, int)) <= LARGEST:
            self._set(node.outputs[0], [int(array.reshape(-1)[0])] * int(np.prod([d for d in dims if isinstance(d, int)])), scalar=not dims)

    def _slice(self, node: gs.Node) -> None:
        bounds = [self.value(t) for t in node.inputs[1:] if not t.is_empty()]
        data = self.value(node.inputs[0])
        if any(b is None for b in bounds) or len(bounds) < 2 or len(node.inputs) != 1 + len(bounds):
            return
        starts, ends = bounds[0] or [], bounds[1] or []
        steps = bounds[3] if len(bounds) > 3 and bounds[3] is not None else [1] * len(starts)
        if data is not None and len(starts) == 1 and all(isinstance(x, int) for x in (starts[0], ends[0], steps[0])):
            self._set(node.outputs[0], data[slice(starts[0], ends[0], steps[0])])  # type: ignore[arg-type]
        source = self._shape_of(node.inputs[0])
        axes = bounds[2] if len(bounds) > 2 else list(range(len(starts)))
        if source is None or axes is None or not all(isinstance(a, int) for a in axes):
            return
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            assert isinstance(axis, int)
            source[axis] = _sliced(source[axis], start, end, step)
        self._dims(node, source)

    def _range(self, node: gs.Node) -> None:
        bounds = [self.value(t) for t in node.inputs]
        if all(b is not None and len(b) == 1 for b in bounds):
            start, limit, step = (b[0] for b in bounds if b is not None)
            if step == 1:
                self._dims(node, [minus(limit, start)])

    def _reshape(self, node: gs.Node) -> None:
        target, source = self.value(node.inputs[1]), self._shape_of(node.inputs[0])
        data = self.value(node.inputs[0])
        if target is None:
            return
        if data is not None and len(target) <= 1:
            self._set(node.outputs[0], data, scalar=not target)
        dims: Values = []
        for i, dim in enumerate(target):
            copied = dim == 0 and not node.attrs.get("allowzero")
            dims.append((source[i] if source is not None and i < len(source) else None) if copied else dim)
        if -1 in dims and source is not None:
            total = product(source)
            rest = divide(total, product([d for d in dims if d != -1]))
            dims = [rest if d == -1 else d for d in dims]
        self._dims(node, [None if d == -1 else d for d in dims])

    def _expand(self, node: gs.Node) -> None:
        target, source = self.value(node.inputs[1]), self._shape_of(node.inputs[0])
        if target is None or source is None:
            return
        self._dims(node, broadcast_all(source, target))

    def _tile(self, node: gs.Node) -> None:
        repeats, source = self.value(node.inputs[1]), self._shape_of(node.inputs[0])
        if repeats is not None and source is not None and len(repeats) == len(source):
            self._dims(node, [times(n, r) for n, r in zip(source, repeats, strict=True)])

    def _float(self, node: gs.Node) -> None:
        """A float computed from one known number each: `Sqrt(Cast(8))`."""
        output = node.outputs[0]
        if output.dtype is None or isinstance(output.dtype, int) or np.dtype(output.dtype).kind != "f":
            return
        numbers = [self._number(t) for t in node.inputs]
        known = [n for n in numbers if n is not None]
        if len(known) != len(numbers) or all(self.graph.constant(t) is not None for t in node.inputs):
            return
        with np.errstate(all="ignore"):
            result = np.asarray(FLOATING[canonical(node)](*known)).astype(output.dtype)
        if np.isfinite(result).all():
            self.floats[id(output)] = result

    def _number(self, tensor: gs.Tensor) -> np.ndarray | None:
        if id(tensor) in self.floats:
            return self.floats[id(tensor)]
        values = self.values.get(id(tensor))
        if values is not None and len(values) == 1 and isinstance(values[0], int):
            return np.array(values[0] if id(tensor) in self.rank0 else values, np.int64)
        array = self.graph.constant(tensor, 1)
        return array if array is not None and array.size == 1 else None

    # --- any other operator: ONNX's own inference, with the shapes we know ----------------------------------------
    def _complete(self, node: gs.Node) -> None:
        if canonical(node) in BROADCASTING:
            shapes = [self._shape_of(t) for t in node.inputs if not t.is_empty()]
            known = [s for s in shapes if s is not None]
            if len(known) == len(shapes):
                dims: Values = []
                for shape in known:
                    dims = broadcast_all(dims, shape)
                self._dims(node, dims)
            return
        infer(node, self.graph)


HANDLERS: dict[str, Callable[[SymbolicShapes, gs.Node], None]] = {
    "Shape": SymbolicShapes._shape, "Identity": SymbolicShapes._identity, "Cast": SymbolicShapes._cast, "Gather": SymbolicShapes._gather,
    "Concat": SymbolicShapes._concat, "Unsqueeze": SymbolicShapes._unsqueeze, "Squeeze": SymbolicShapes._squeeze, "Add": SymbolicShapes._add,
    "Sub": SymbolicShapes._sub, "Mul": SymbolicShapes._mul, "Div": SymbolicShapes._div, "Equal": SymbolicShapes._equal,
    "Where": SymbolicShapes._where, "ConstantOfShape": SymbolicShapes._constantofshape, "Slice": SymbolicShapes._slice,
    "Range": SymbolicShapes._range, "Reshape": SymbolicShapes._reshape, "Expand": SymbolicShapes._expand,
    "Tile": SymbolicShapes._tile, "Mod": SymbolicShapes._mod,
}  # fmt: skip
FLOATING: dict[str, Callable[..., np.ndarray]] = {"Cast": np.asarray, "Sqrt": np.sqrt, "Div": np.divide, "Mul": np.multiply, "Pow": np.power, "Reciprocal": np.reciprocal}
BROADCASTING = {"Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "Max", "Min", "Mod"}


def _sliced(size: Dim, start: Dim, end: Dim, step: Dim) -> Dim:
    if step != 1:
        if isinstance(size, int) and all(isinstance(x, int) for x in (start, end, step)):
            return len(range(*slice(start, end, step).indices(size)))  # type: ignore[misc]
        return None
    if isinstance(end, int) and end > 2**31:
        end = size
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end).indices(size)))
    if isinstance(end, int) and end < 0:
        end = plus(size, end)
    if isinstance(start, int) and start < 0:
        start = plus(size, start)
    if isinstance(end, int) and isinstance(start, int) and isinstance(size, str):
        return None  # the slice may pass the end
    return minus(end, start)


def infer(node: gs.Node, graph: Graph) -> None:
    """ONNX's inference of one node from the shapes its inputs have now; what it cannot tell stays unknown."""
    if (node.domain or "") not in ("", "ai.onnx") or node.holds_graphs:
        return
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, "")
        types, data = {}, {}
        for tensor in node.inputs:
            if tensor.is_empty() or tensor.dtype is None:
                continue
            element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)) if not isinstance(tensor.dtype, int) else tensor.dtype
            shape = None if tensor.shape is None else [d if is_named(d) else None for d in tensor.shape]
            types[tensor.name] = onnx.helper.make_tensor_type_proto(element, shape)
            array = graph.constant(tensor, LARGEST)
            if array is not None:
                data[tensor.name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), tensor.name)
        opsets = [onnx.helper.make_opsetid("", graph.opset)]
        found = onnx.shape_inference.infer_node_outputs(schema, OnnxExporter.export_node(node), types, data, opset_imports=opsets)
    except Exception:  # inference is a convenience: a type it cannot tell stays unknown
        return
    for tensor in node.outputs:
        if tensor.name not in found or not found[tensor.name].HasField("tensor_type"):
            continue
        proto = found[tensor.name].tensor_type
        if tensor.dtype is None:
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.elem_type)
        if proto.HasField("shape"):
            dims: Values = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in proto.shape.dim]
            if tensor.shape is None or len(tensor.shape) != len(dims):
                tensor.shape = dims
            else:
                tensor.shape = [new if not is_named(old) and is_named(new) else old for old, new in zip(tensor.shape, dims, strict=True)]
