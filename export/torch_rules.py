"""Rules whose patterns PyTorch's exporters write: a fusion as a PyTorch function.

Every exporter and opset gives a form of its own: as exported, after the lift rules and after the fuse rules, so that
the rule fits whatever the graph has become. What could not be derived is kept beside it, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch

from rewrite import pattern as P
from rewrite.errors import RewriteError
from rewrite.export.source import first_line, quiet
from rewrite.export.torch_export import _simplify
from rewrite.from_graph import Derived, baked, derive
from rewrite.model import Model, load
from rewrite.optimizer import apply_rules
from rewrite.registry import Library, Rule, declare, library

EXPORTERS = (("dynamo", 18), ("dynamo", 20), ("dynamo", 23), ("dynamo", 24), ("torchscript", 17))
STATES = ("exported", "lifted", "fused")


@dataclass(frozen=True)
class Form:
    """What one exporter at one opset makes of the function, in one state, as text; or why that is no pattern."""

    exporter: str
    opset: int
    state: str
    text: str = ""
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.exporter} {self.opset}, {self.state}: {self.text or '- ' + self.failure}"


class _Module(torch.nn.Module):  # type: ignore[misc]
    """The function as a module: inputs given as parameters become its weights."""

    def __init__(self, function: Callable[..., Any], inputs: dict[str, torch.Tensor]):
        super().__init__()
        self.function, self.order = function, list(inputs)
        for name, tensor in inputs.items():
            if isinstance(tensor, torch.nn.Parameter):
                self.register_parameter(f"weight_{name}", tensor)

    def forward(self, *free: torch.Tensor) -> Any:
        given = iter(free)
        return self.function(*(getattr(self, f"weight_{n}", None) if hasattr(self, f"weight_{n}") else next(given) for n in self.order))


def rule_from_torch(
    function: Callable[..., Any], example_inputs: Any, replace: Callable[..., Any] | str, *, name: str | None = None, tier: str = "lift", priority: int = 100, exact: bool = False
) -> Rule:
    """Declare a rule whose pattern is what the installed exporters make of a PyTorch function or module.

    Args:
        function: of tensors. Its parameters name the variables; numbers in it are compared by value.
        example_inputs: a tensor or a tuple of them, for ranks and dtypes; sizes do not matter, but where weights of a module fix them. One that is a
            `torch.nn.Parameter`, and each parameter of a module (`up.weight` is called `up_weight`), must be a weight of
            the model; it is handed on as ONNX stores it (that of nn.Linear as [in, out]).
        replace: as for `rewrite.rule`, or the name of a plugin, which takes all variables in order.
        name: of the rule; the function's if None.
        tier, priority, exact: as for `rewrite.rule`. By default the rule is tried before every built-in one.

    Returns:
        The rule; `rule.forms` tells what each exporter and opset gave. It takes some seconds: every exporter runs.

    Raises RewriteError if no exporter gives a pattern, or the function's result does not depend on an input.
    """
    called = name or getattr(function, "__name__", type(function).__name__)
    where = f"rule {called} ({getattr(function, '__module__', '?')})"
    inputs = _inputs(function, example_inputs, where)
    module = _with_telling_weights(function if isinstance(function, torch.nn.Module) else _Module(function, inputs))
    free = {n: t for n, t in inputs.items() if not isinstance(t, torch.nn.Parameter)}
    forms, derived = _forms(module, free, where)
    if not derived:
        raise RewriteError(f"{where}: no exporter gives a pattern: {forms[0].failure}")
    weights = [_called(n) for n, _ in module.named_parameters()]
    variables = tuple(inputs) if not isinstance(function, torch.nn.Module) else (*inputs, *weights)
    return declare(
        name=str(called),
        tier=tier,
        doc=inspect.getdoc(function) or f"`{called}` as PyTorch's exporters write it.",
        pattern=_pattern(derived),
        variables=variables,
        replace=replace if callable(replace) else _calling(replace, variables, len(derived[0].outputs)),
        check=_check(tuple(weights)),
        priority=priority,
        module=getattr(function, "__module__", "") or "",
        exact=exact,
        forms=tuple(forms),
    )


def _with_telling_weights(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy whose weights differ from each other and from every constant: by its values an exported weight is known."""
    module = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return module


def _inputs(function: Callable[..., Any], example: Any, where: str) -> dict[str, torch.Tensor]:
    example = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    target = function.forward if isinstance(function, torch.nn.Module) else function
    names = [p.name for p in inspect.signature(target).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(example) != len(names) or not all(isinstance(t, torch.Tensor) for t in example):
        raise RewriteError(f"{where}: it takes {', '.join(names) or 'nothing'}; give one example tensor for each, not {len(example)}")
    return {n: copy.deepcopy(t) if isinstance(t, torch.nn.Parameter) else t.detach().clone() for n, t in zip(names, example, strict=True)}  # the same may be given for two


def _called(parameter: str) -> str:
    return parameter.removeprefix("weight_").replace(".", "_")


def _forms(module: torch.nn.Module, free: dict[str, torch.Tensor], where: str) -> tuple[list[Form], list[Derived]]:
    """Every form, as text or with the reason why it is none, and the patterns, each once."""
    builtin = library([])
    varied = _varied(module, free)
    forms: list[Form] = []
    found: dict[str, Derived] = {}
    stored: dict[str, str] = {}
    for exporter in dict.fromkeys(e for e, _ in EXPORTERS):
        opsets = [o for e, o in EXPORTERS if e == exporter]
        given = _export(module, free, exporter, opsets)
        other = _export(*varied, exporter, opsets) if varied is not None else {}
        for opset in opsets:
            for state in STATES:
                try:
                    made = _derive(given[opset], module, state, builtin)
                    again = other.get(opset)
                    reason = "" if varied is None or isinstance(again, str | None) else baked(made, _derive(again, varied[0], state, builtin))
                    if not reason and any(stored.setdefault(n, how) != how for n, how in made.stored.items()):
                        reason = "a weight is stored transposed here, and not in an earlier form"
                except RewriteError as error:
                    if "does not depend on" in str(error) and state == "exported":
                        raise RewriteError(f"{where}: {error}") from error
                    reason = str(error)
                forms.append(Form(exporter, opset, state, failure=reason) if reason else Form(exporter, opset, state, made.text))
                if not reason:
                    found.setdefault(_key(made), made)
    return forms, list(found.values())


def _key(made: Derived) -> str:
    return made.text


def _derive(model: Model | str, module: torch.nn.Module, state: str, builtin: Library) -> Derived:
    if isinstance(model, str):
        raise RewriteError(model)
    if state != "exported":
        tiers = ("lift",) if state == "lifted" else ("lift", "fuse")
        model = apply_rules(model, Library([r for r in builtin.rules if r.tier in tiers], builtin.plugins), verify=False, explain=False).model
    weights = {_called(n): np.asarray(p.detach().numpy()) for n, p in module.named_parameters()}
    return derive(model, weights, builtin.plugins)


def _varied(module: torch.nn.Module, free: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]] | None:
    """The same with other values and, as far as it runs so, twice the sizes: of all dimensions, else of all but the last of each input, else of none."""

    def doubled(t: torch.Tensor, kept: int = 0) -> torch.Tensor:
        return t.detach().repeat(*(2 if n > 1 and i < t.dim() - kept else 1 for i, n in enumerate(t.shape)))

    wide = module
    if isinstance(module, _Module):
        weights = {n: getattr(module, f"weight_{n}", None) for n in module.order}
        wide = _Module(module.function, {n: free[n] if w is None else torch.nn.Parameter(doubled(w)) for n, w in weights.items()})
    for candidate, resized in ((wide, doubled), (module, partial(doubled, kept=1)), (module, torch.clone)):
        made, inputs = _with_telling_weights(candidate, 1), {n: resized(t) for n, t in free.items()}
        inputs = {n: t * 1.5 + 0.25 if t.is_floating_point() else t for n, t in inputs.items()}
        try:
            with torch.no_grad():
                made(*inputs.values())
        except Exception:  # it has sizes of its own
            continue
        return made, inputs
    return None


def _export(module: torch.nn.Module, free: dict[str, torch.Tensor], exporter: str, opsets: list[int]) -> dict[int, Model | str]:
    """The model at each opset, or why there is none. All dimensions but the last are dynamic."""
    module = copy.deepcopy(module)
    axes = {n: {i: f"{n}_{i}" for i in range(max(t.dim() - 1, 0)) if t.shape[i] > 1} for n, t in free.items()}
    try:
        with quiet(), torch.no_grad():
            if exporter == "torchscript":
                return {o: _with_torchscript(module, free, axes, o) for o in opsets}
            dimensions = tuple(dict.fromkeys(a, torch.export.Dim.AUTO) or None for a in axes.values())
            shapes: Any = (dimensions,) if isinstance(module, _Module) else dimensions
            program = torch.export.export(module, tuple(free.values()), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        return dict.fromkeys(opsets, f"the {exporter} exporter fails: {first_line(error)}")
    return {o: _with_dynamo(program, list(free), o) for o in opsets}


def _with_dynamo(program: Any, names: list[str], opset: int) -> Model | str:
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(copy.deepcopy(program), dynamo=True, opset_version=opset, input_names=names, optimize=False, verbose=False)
            assert made is not None
            _simplify(made)
            return _loaded(made.model_proto, opset)
    except Exception as error:
        return f"the dynamo exporter fails: {first_line(error)}"


def _with_torchscript(module: torch.nn.Module, free: dict[str, torch.Tensor], axes: dict[str, dict[int, str]], opset: int) -> Model | str:
    stream = io.BytesIO()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.onnx.export(module, tuple(free.values()), stream, dynamo=False, opset_version=opset, input_names=list(free), dynamic_axes={n: a for n, a in axes.items() if a})
    branch = next((w for w in told if issubclass(w.category, torch.jit.TracerWarning) and "Python boolean" in str(w.message)), None)
    if branch is not None:
        return "the function branches on a value: TorchScript would record one branch only; write it with torch.where"
    return _loaded(onnx.load_model_from_string(stream.getvalue()), opset)


def _loaded(proto: onnx.ModelProto, opset: int) -> Model | str:
    model = load(proto)
    return model if model.opset == opset else f"the exporter wrote opset {model.opset} instead of {opset}"


def _pattern(derived: list[Derived]) -> tuple[P.Value, ...]:
    """One pattern of all forms; the tag keeps several outputs in one form."""
    if len(derived) == 1:
        return derived[0].outputs
    return tuple(P.AnyOf(tuple(P.Tag("form", i, d.outputs[k]) for i, d in enumerate(derived))) for k in range(len(derived[0].outputs)))


def _check(weights: tuple[str, ...]) -> Callable[..., str | None] | None:
    """Weights must be weights."""
    if not weights:
        return None

    def check(*values: Any) -> str | None:
        wrong = next((v for v in values if v is not None and not v.is_weight), None)
        return None if wrong is None else f"'{wrong.name}' is computed from the inputs; the pattern has a weight there"

    check.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in weights])  # type: ignore[attr-defined]
    return check


def _calling(plugin: str, variables: tuple[str, ...], outputs: int) -> Callable[..., Any]:
    """A replacement that calls a plugin with every variable."""

    def replace(op: Any, *values: Any) -> Any:
        return getattr(op, plugin)(*values, outputs=outputs)

    replace.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in ("op", *variables)])  # type: ignore[attr-defined]
    return replace
