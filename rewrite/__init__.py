"""Rewrite ONNX graphs for TensorRT: fuse by pattern, prove each fusion, compile, run.

The public names are loaded on first use, so that importing this package is quick and pulls in no rule, no torch and no
TensorRT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "rewrite.model",
    "Model": "rewrite.model",
    "optimize": "rewrite.optimizer",
    "Result": "rewrite.optimizer",
    "unfuse": "rewrite.functions",
    "build": "rewrite.runtime.build",
    "Plan": "rewrite.runtime.plan",
    "Generator": "rewrite.runtime.generator",
    "Sampling": "rewrite.runtime.sampling",
    "rule": "rewrite.registry",
    "plugin": "rewrite.registry",
    "rule_from_torch": "rewrite.export.torch_rules",
    "any_of": "rewrite.pattern",
    "maybe": "rewrite.pattern",
    "scalar": "rewrite.pattern",
    "ints": "rewrite.pattern",
    "attr": "rewrite.pattern",
    "rest": "rewrite.pattern",
    "tag": "rewrite.pattern",
    "typed": "rewrite.pattern",
    "unless_nan": "rewrite.pattern",
    "RewriteError": "rewrite.errors",
    "CheckFailed": "rewrite.errors",
}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from rewrite.errors import CheckFailed as CheckFailed
    from rewrite.errors import RewriteError as RewriteError
    from rewrite.export.torch_rules import rule_from_torch as rule_from_torch
    from rewrite.functions import unfuse as unfuse
    from rewrite.model import Model as Model
    from rewrite.model import load as load
    from rewrite.optimizer import Result as Result
    from rewrite.optimizer import optimize as optimize
    from rewrite.pattern import any_of as any_of
    from rewrite.pattern import attr as attr
    from rewrite.pattern import ints as ints
    from rewrite.pattern import maybe as maybe
    from rewrite.pattern import rest as rest
    from rewrite.pattern import scalar as scalar
    from rewrite.pattern import tag as tag
    from rewrite.pattern import typed as typed
    from rewrite.pattern import unless_nan as unless_nan
    from rewrite.registry import plugin as plugin
    from rewrite.registry import rule as rule
    from rewrite.runtime.build import build as build
    from rewrite.runtime.generator import Generator as Generator
    from rewrite.runtime.plan import Plan as Plan
    from rewrite.runtime.sampling import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rewrite' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
