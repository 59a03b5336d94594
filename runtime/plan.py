"""A plan on disk: a directory with a manifest, the segments, their engines and the weights.

    plan/manifest.json         steps, values, profile, versions, and size and SHA-256 of every other file
    plan/weights.safetensors   by the names they have in the model
    plan/segments/KEY.onnx     what lies between plugins, once for each distinct structure
    plan/engines/KEY.engine    the same, compiled by TensorRT
    plan/tokenizer/            of a text generator whose tokenizer was known: files as transformers writes them
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime import weights
from rewrite.runtime.partition import Step, ValueType
from rewrite.runtime.profile import Profile

if TYPE_CHECKING:
    from rewrite.runtime.executor import Executor

Array = np.ndarray[Any, Any]
FORMAT = 1
MANIFEST = "manifest.json"


@dataclass
class Manifest:
    """What a plan consists of. `files` gives size and SHA-256 of each file; `versions` what built it."""

    model: str
    opset: int
    inputs: dict[str, ValueType]
    outputs: dict[str, str]
    values: dict[str, ValueType]
    steps: list[Step]
    profile: Profile
    versions: dict[str, str]
    created: str
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    generator: dict[str, Any] | None = None  # of a text generator: block size, vocabulary, layers with their caches, eos, tokenizer

    def to_json(self) -> str:
        data = {"format": FORMAT, **dataclasses.asdict(self), "profile": dict(self.profile.ranges)}
        data["steps"] = [{k: v for k, v in dataclasses.asdict(s).items() if v or k in ("inputs", "outputs")} for s in self.steps]
        return json.dumps(_finite(data), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        data = _infinite(json.loads(text))
        if data.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        for key in ("inputs", "values"):
            data[key] = {n: ValueType(v["dtype"], tuple(v["shape"])) for n, v in data[key].items()}
        data["steps"] = [Step(**s) for s in data["steps"]]
        data["profile"] = Profile({n: tuple(r) for n, r in data["profile"].items()})
        data["files"] = {n: (size, digest) for n, (size, digest) in data["files"].items()}
        return Manifest(**data)


def _finite(value: Any) -> Any:
    """JSON has no infinities: they are written as {"float": "-inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: _infinite(v) for k, v in value.items()}
    return [_infinite(v) for v in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Plan:
    """A plan that `rewrite.build` wrote, ready to run.

    Raises RewriteError if the directory is no plan, a file is missing or was changed (sizes of all files and the SHA-256
    of what is executed are checked; `check_weights` adds the weights), or `device` is not there.
    """

    def __init__(self, directory: str | os.PathLike[str], *, device: str = "cpu", check_weights: bool = False):
        self.directory, self.device = Path(directory), device
        path = self.directory / MANIFEST
        if not path.is_file():
            raise RewriteError(f"{self.directory}: not a plan: it has no {MANIFEST}; make one with `rewrite build`")
        try:
            self.manifest = Manifest.from_json(path.read_text())
        except (ValueError, KeyError, TypeError) as error:
            raise RewriteError(f"{path}: not a manifest of this version ({error}); build the plan again") from error
        for name, (size, expected) in self.manifest.files.items():
            file = self.directory / name
            if not file.is_file() or file.stat().st_size != size:
                raise RewriteError(f"{file}: {'has another size than the manifest says' if file.is_file() else 'is missing'}; build the plan again")
            if (check_weights or not name.startswith("weights")) and digest(file) != expected:
                raise RewriteError(f"{file}: its content is not what was built (SHA-256 differs); build the plan again")
        if device not in ("cpu", "cuda"):
            raise RewriteError(f"device {device!r} is unknown; use cpu or cuda")

    @property
    def inputs(self) -> dict[str, ValueType]:
        """Dtype and shape of each input, named dimensions by name."""
        return self.manifest.inputs

    @property
    def has_engines(self) -> bool:
        return any(name.startswith("engines/") for name in self.manifest.files)

    @cached_property
    def weights(self) -> dict[str, Array]:
        return weights.read(self.directory / "weights.safetensors")

    @cached_property
    def executor(self) -> Executor:
        from rewrite.runtime.executor import make_executor

        return make_executor(self)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs, by name, from arrays of the declared dtypes and shapes.

        Raises RewriteError for an input that is missing, unknown, or of another dtype or shape than declared.
        """
        return self.executor.run(inputs)

    def check(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """The size of each named dimension in `inputs`. Raises RewriteError as `run` does."""
        for name in inputs:
            if name not in self.inputs:
                raise RewriteError(f"input '{name}' is unknown; the plan takes {', '.join(self.inputs)}")
        sizes: dict[str, int] = {}
        for name, kind in self.inputs.items():
            if name not in inputs:
                raise RewriteError(f"input '{name}' is missing; the plan takes {', '.join(self.inputs)}")
            array = inputs[name]
            if array.dtype.name != kind.dtype:
                raise RewriteError(f"input '{name}' is {array.dtype}, expected {kind.dtype}; cast it")
            if array.ndim != len(kind.shape):
                raise RewriteError(f"input '{name}' has shape {list(array.shape)}, expected {len(kind.shape)} dimensions: {list(kind.shape)}")
            for size, dim in zip(array.shape, kind.shape, strict=True):
                self._check_size(name, size, dim, sizes)
        return sizes

    def _check_size(self, name: str, size: int, dim: int | str | None, sizes: dict[str, int]) -> None:
        if isinstance(dim, int) and size != dim:
            raise RewriteError(f"input '{name}' has size {size} where {dim} is expected; its shape is {list(self.inputs[name].shape)}")
        if not isinstance(dim, str):
            return
        if sizes.setdefault(dim, size) != size:
            raise RewriteError(f"input '{name}' has {dim} = {size}, another input has {sizes[dim]}")
        low, _, high = self.manifest.profile.ranges.get(dim, (0, 0, size))
        if self.has_engines and not low <= size <= high:
            raise RewriteError(f"input '{name}' has {dim} = {size}; the plan was built for {low} to {high}. Build it with --profile {dim}=MIN:BEST:MAX")

    def segment_file(self, key: str) -> Path:
        return self.directory / "segments" / f"{key}.onnx"

    def engine_file(self, key: str) -> Path:
        return self.directory / "engines" / f"{key}.engine"
