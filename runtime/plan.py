"""A plan on disk: a directory with a manifest, the segments, their engines and the weights.

    plan/manifest.json         steps, values, profile, versions, and size and SHA-256 of every file below
    plan/manifest.sha256       the seal on it (`seal.py`), beside manifest.hmac if the plan is signed
    plan/weights.safetensors   by the names they have in the model
    plan/segments/KEY.onnx     what lies between plugins, once for each distinct structure
    plan/engines/KEY.engine    the same, compiled by TensorRT
    plan/tokenizer/            of a text generator whose tokenizer was known: files as transformers writes them

Nothing is parsed, deserialized or used before its content was compared with its SHA-256; segments and engines are read
once, and what is used are the bytes that were compared.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime import schema, seal, weights
from rewrite.runtime.partition import Step, ValueType
from rewrite.runtime.profile import Profile
from rewrite.verify import names_in, resolve

if TYPE_CHECKING:
    from rewrite.runtime.executor import Executor

Array = np.ndarray[Any, Any]
FORMAT = 2
MANIFEST, WEIGHTS = seal.MANIFEST, "weights.safetensors"


@dataclass
class Manifest:
    """What a plan consists of. `files` gives the size and the SHA-256 (of each 64 MiB) of each file, `versions` what built
    it, `plugins` the fingerprint of each plugin it calls, `tuning` the microseconds of each kernel that was tried for a call."""

    model: str
    opset: int
    inputs: dict[str, ValueType]
    outputs: dict[str, str]
    values: dict[str, ValueType]
    steps: list[Step]
    profile: Profile
    versions: dict[str, str]
    created: str
    plugins: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    world: int = 1  # ranks that run it together, each with weights of its own, called `rank 0/...`, beside those of all
    stages: int = 1  # that follow one another, each of as many ranks with numbers that follow one another; weights `stage 0/...` are those of one
    generator: dict[str, Any] | None = None  # of a text generator: block size, vocabulary, layers with their caches, eos, tokenizer

    @property
    def ranks_of_stage(self) -> int:
        return self.world // self.stages

    def to_json(self) -> str:
        steps = [{k: v for k, v in vars(s).items() if v or k in ("inputs", "outputs")} for s in self.steps]
        data = {"format": FORMAT, **vars(self), "profile": self.profile.ranges, "steps": steps}
        return json.dumps(_plain(data), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Raises ValueError with the reason if `text` is not what `to_json` writes."""
        data = _infinite(schema.parse(text))
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError("it is of another format")
        made: Manifest = schema.typed({**data, "profile": {"ranges": data.get("profile")}}, Manifest)
        made._check()
        return made

    def _check(self) -> None:
        """What the types do not say. Raises ValueError."""
        for name, (size, digests) in self.files.items():
            if not seal.NAME.fullmatch(name) or name in (MANIFEST, seal.SEAL, seal.SIGNATURE):
                raise ValueError(f"files: {name[:100]!r} is not the name of a file inside a plan")
            if size < 0 or not digests:
                raise ValueError(f"files: {name} has no size or no SHA-256")
        for name, kind in {**self.inputs, **self.values}.items():
            if any(isinstance(d, int) and d < 0 for d in kind.shape):
                raise ValueError(f"the shape of '{name[:100]}' has a negative size")
        for name, (low, best, high) in self.profile.ranges.items():
            if not 0 < low <= best <= high:
                raise ValueError(f"profile: {name[:100]} is not in order")
        if not 1 <= self.world <= 4096:
            raise ValueError(f"there are {self.world} ranks")
        if self.stages < 1 or self.world % self.stages:
            raise ValueError(f"there are {self.stages} stages of {self.world} ranks")
        if WEIGHTS not in self.files:
            raise ValueError(f"files: there is no {WEIGHTS}")
        known = [{*self.inputs} for _ in range(self.stages)]
        for index, step in enumerate(self.steps):
            if step.kind not in ("segment", "plugin"):
                raise ValueError(f"steps[{index}] is a {step.kind[:30]!r}; there are segments and plugins")
            if not 0 <= step.stage < self.stages:
                raise ValueError(f"steps[{index}] is of stage {step.stage}; there are {self.stages}")
            if step.kind == "segment" and f"segments/{step.name}.onnx" not in self.files:
                raise ValueError(f"steps[{index}]: there is no segment {step.name[:60]!r}")
            if step.kind == "plugin" and step.name in ("Send", "Recv"):
                self._check_message(index, step)
            mine = known[step.stage]
            for name in step.inputs:
                if name in self.values and name not in mine:
                    raise ValueError(f"steps[{index}] reads {name[:100]!r} before it is made")
            for name in filter(None, step.outputs):
                if name in mine or name not in self.values:
                    raise ValueError(f"steps[{index}] makes {name[:100]!r}, which is made twice or has no type")
            mine.update(step.outputs)
        for name in self.values:
            if not any(name in mine for mine in known):
                raise ValueError(f"'{name[:100]}' is never made")

    def _check_message(self, index: int, step: Step) -> None:
        """Raises ValueError unless a Send is of the stage that it goes from, and a Recv of that which it goes to, a later one."""
        ends: tuple[Any, Any] = step.attributes.get("source"), step.attributes.get("target")
        if any(type(end) is not int for end in ends) or not 0 <= ends[0] < ends[1] < self.stages or step.stage != ends[step.name == "Recv"]:
            raise ValueError(f"steps[{index}]: {step.name} from stage {ends[0]} to {ends[1]}, in stage {step.stage} of {self.stages}")
        if len(step.inputs) != (step.name == "Send") or len(step.outputs) != (step.name == "Recv"):
            raise ValueError(f"steps[{index}]: {step.name} with {len(step.inputs)} inputs and {len(step.outputs)} outputs")


def _plain(value: Any) -> Any:
    """What JSON has: no types, and no infinities, which are written as {"float": "-inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, ValueType):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _infinite(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} and isinstance(value["float"], str) else {k: _infinite(v) for k, v in value.items()}
    return [_infinite(v) for v in value] if isinstance(value, list) else value


class Plan:
    """A plan that `rewrite.build` wrote, ready to run.

    Sizes and digests of all files but the weights are checked at once, the weights when they are first wanted. With
    `key`, the name of a key file (or that of the environment variable REWRITE_PLAN_KEY), the plan must be signed with it.

    Raises RewriteError, in one line, if the directory is no plan, a file is missing, was changed, is a link or lies
    outside, the signature is missing or wrong, or `device` is not there.
    """

    def __init__(self, directory: str | os.PathLike[str], *, device: str = "cpu", key: str | os.PathLike[str] | None = None):
        self.directory, self.device = Path(directory), device
        if device not in ("cpu", "cuda"):
            raise RewriteError(f"device {device!r} is unknown; use cpu or cuda")
        if not os.path.isdir(self.directory):
            raise RewriteError(f"{self.directory}: not a plan: {'a file' if os.path.exists(self.directory) else 'there is no such directory'}; make one with `rewrite build`")
        text = seal.read_manifest(self.directory, seal.read_key(key))
        try:
            self.manifest = Manifest.from_json(text)
        except (ValueError, RecursionError) as error:
            raise RewriteError(f"{self.directory / MANIFEST}: not a manifest of this version ({error}); build the plan again") from error
        files = self.manifest.files
        self._contents = {n: seal.read_checked(self.directory, n, *files[n]) for n in files if n != WEIGHTS}
        with seal.open_inside(self.directory, WEIGHTS) as file:
            seal.check_size(self.directory / WEIGHTS, file, files[WEIGHTS][0])

    @property
    def inputs(self) -> dict[str, ValueType]:
        """Dtype and shape of each input, named dimensions by name."""
        return self.manifest.inputs

    @property
    def has_engines(self) -> bool:
        return any(name.startswith("engines/") for name in self.manifest.files)

    @cached_property
    def compiled(self) -> set[str]:
        """The named dimensions that engines know: those of what segments read."""
        types = {**self.inputs, **self.manifest.values}
        dims = " ".join(str(d) for s in self.manifest.steps if s.kind == "segment" for n in s.inputs if n in types for d in types[n].shape)
        return {name for name in self.manifest.profile.ranges if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", dims)}

    def bytes_of(self, folder: str) -> int:
        """Bytes of the files whose name begins with `folder`: engines, segments, weights."""
        return sum(size for name, (size, _) in self.manifest.files.items() if name.startswith(folder))

    @property
    def signed(self) -> bool:
        return (self.directory / seal.SIGNATURE).exists()

    @cached_property
    def weights(self) -> dict[str, Array]:
        """The weights by name, mapped from their file. Raises RewriteError if it is not what was built."""
        found = weights.parse(seal.map_checked(self.directory, WEIGHTS, *self.manifest.files[WEIGHTS]), self.directory / WEIGHTS)
        for rank in range(self.manifest.world):
            self._check_weights(self._of_rank(found, rank), rank)
        return found

    def weights_of(self, rank: int) -> dict[str, Array]:
        """The weights of a rank by name; nothing is read of the file but what holds these. Raises RewriteError as `weights` does."""
        if self.manifest.world == 1 or "weights" in self.__dict__:
            return self._of_rank(self.weights, rank)
        path, (size, digests) = self.directory / WEIGHTS, self.manifest.files[WEIGHTS]
        data = seal.map_unchecked(self.directory, WEIGHTS, size)
        seal.check_pieces(path, data, digests, [(0, weights.header_size(data, path))])
        places = weights.places(data, path)
        seal.check_pieces(path, data, digests, list(self._of_rank(places, rank).values()))
        found = self._of_rank(weights.parse(data, path), rank)
        self._check_weights(found, rank)
        return found

    def _of_rank(self, found: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """What of the weights, or of something else by their names, is a rank's, by the names that steps read."""
        if self.manifest.world == 1:
            return dict(found)
        prefixes = (f"rank {rank}/", f"stage {rank // self.manifest.ranks_of_stage}/")
        mine = {n: n for n in found if not n.startswith(("rank ", "stage "))} | {n.split("/", 1)[1]: n for n in found if n.startswith(prefixes)}
        return {name: found[n] for name, n in mine.items()}

    def types_of(self, rank: int) -> dict[str, ValueType]:
        """The types of a rank's weights, by name; nothing of the file is read but its header, and nothing compared."""
        path, (size, _) = self.directory / WEIGHTS, self.manifest.files[WEIGHTS]
        found = weights.parse(seal.map_unchecked(self.directory, WEIGHTS, size), path)
        return {n: ValueType(a.dtype.name, a.shape) for n, a in self._of_rank(found, rank).items()}

    def steps_of(self, rank: int) -> list[Step]:
        """What a rank computes."""
        stage = rank // self.manifest.ranks_of_stage
        return [s for s in self.manifest.steps if s.stage == stage]

    def inputs_of(self, rank: int) -> dict[str, ValueType]:
        """The inputs that a rank takes: all but the caches of other stages."""
        stage, generator = rank // self.manifest.ranks_of_stage, self.manifest.generator
        layers = [] if generator is None else generator["layers"]
        others = {layer[k] for layer in layers for k in ("key_cache", "value_cache") if layer.get("stage", 0) != stage}
        return {n: kind for n, kind in self.inputs.items() if n not in others}

    def outputs_of(self, rank: int) -> dict[str, str]:
        """The outputs that a rank makes, as `manifest.outputs`; what no step makes is the first stage's."""
        makers: dict[str, int] = {}
        for step in self.manifest.steps:
            makers.update(dict.fromkeys(step.outputs, step.stage))
        return {n: value for n, value in self.manifest.outputs.items() if makers.get(value, 0) == rank // self.manifest.ranks_of_stage}

    def _check_weights(self, found: dict[str, Array], rank: int) -> None:
        made = {*self.inputs, *self.manifest.values}
        for name in [n for s in self.steps_of(rank) for n in s.inputs] + list(self.outputs_of(rank).values()):
            if name and name not in made and name not in found:
                raise RewriteError(f"{self.directory / MANIFEST}: a step reads {name[:100]!r}, which is neither made nor among the weights; build the plan again")

    @cached_property
    def executor(self) -> Executor:
        """The plan, loaded on its device. Raises RewriteError if it does not fit this machine."""
        from rewrite.runtime.executor import make_executor

        return make_executor(self)

    def tune(self, inputs: Mapping[str, Array]) -> dict[str, dict[str, float]]:
        """Time the kernels that could do each step on these inputs, on the GPU, and use the fastest from now on in this process.

        Returns microseconds by call and kernel. `rewrite.build(..., tune=True)` does it when the plan is built and keeps them in it.
        Raises RewriteError for a plan on the CPU, which has no kernels to choose from.
        """
        if self.manifest.generator is not None:
            raise RewriteError(f"{self.directory}: a text generator is tuned when it is built (--tune), or by PlanModel.tune()")
        if self.device != "cuda":
            raise RewriteError(f"{self.directory}: there is nothing to tune on the CPU; load the plan with device='cuda'")
        return self.executor.tune(inputs)  # type: ignore[attr-defined, no-any-return]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs, by name, from arrays of the declared dtypes and shapes.

        Raises RewriteError for an input that is missing, unknown, or of another dtype or shape than declared.
        """
        return self.executor.run(inputs)

    def check(self, inputs: Mapping[str, Array], rank: int | None = None) -> dict[str, int]:
        """The size of each named dimension in `inputs`, those of all ranks or of one. Raises RewriteError as `run` does."""
        wanted = self.inputs if rank is None else self.inputs_of(rank)
        for name in inputs:
            if name not in wanted:
                raise RewriteError(f"input '{name}' is unknown; the plan takes {', '.join(self.inputs)}")
        sizes: dict[str, int] = {}
        derived: list[tuple[str, int, str]] = []
        for name, kind in wanted.items():
            if name not in inputs:
                raise RewriteError(f"input '{name}' is missing; the plan takes {', '.join(self.inputs)}")
            array = inputs[name]
            dtype: Any = getattr(array, "dtype", None)
            if not hasattr(dtype, "name") or not hasattr(array, "shape"):
                raise RewriteError(f"input '{name}' is a {type(array).__name__}, expected an array of {kind.dtype}; give NumPy's")
            if dtype.name != kind.dtype or not dtype.isnative:
                raise RewriteError(f"input '{name}' is {dtype if dtype.name != kind.dtype else 'of the other byte order'}, expected {kind.dtype}; cast it")
            if array.ndim != len(kind.shape):
                raise RewriteError(f"input '{name}' has shape {list(array.shape)}, expected {len(kind.shape)} dimensions: {list(kind.shape)}")
            for size, dim in zip(array.shape, kind.shape, strict=True):
                if isinstance(dim, str) and names_in(dim) != (dim,):
                    derived.append((name, size, dim))
                else:
                    self._check_size(name, size, dim, sizes)
        for name, size, dim in derived:  # `past + 1`, when all sizes by name are known
            if any(n not in sizes for n in names_in(dim)):
                self._check_size(name, size, dim, sizes)
            elif size != (expected := resolve(dim, dict(sizes), int)):
                raise RewriteError(f"input '{name}' has size {size} where {dim} = {expected} is expected, as {', '.join(f'{n} = {sizes[n]}' for n in names_in(dim))}")
        return sizes

    def _check_size(self, name: str, size: int, dim: int | str | None, sizes: dict[str, int]) -> None:
        if isinstance(dim, int) and size != dim:
            raise RewriteError(f"input '{name}' has size {size} where {dim} is expected; its shape is {list(self.inputs[name].shape)}")
        if not isinstance(dim, str):
            return
        if sizes.setdefault(dim, size) != size:
            raise RewriteError(f"input '{name}' has {dim} = {size}, another input has {sizes[dim]}")
        low, _, high = self.manifest.profile.ranges.get(dim, (0, 0, size))
        free = self.manifest.generator is not None and (self.device == "cpu" or dim not in self.compiled)  # its scheduler and pool choose the sizes
        if self.has_engines and not free and not low <= size <= high:
            built = f"{low} to {high}" if low < high else f"{low} alone"
            raise RewriteError(f"input '{name}' has {dim} = {size}; the plan was built for {built}. Build it with --profile {dim}=MIN:BEST:MAX")

    def segment(self, key: str) -> bytes:
        """The ONNX model of a segment, as it was compared with its SHA-256."""
        return self._contents[f"segments/{key}.onnx"]

    def engine(self, key: str) -> bytes:
        """The engine of a segment, as it was compared with its SHA-256."""
        return self._contents[f"engines/{key}.engine"]
