"""Does a plan fit the machine that shall run it? Asked before anything is loaded; each answer is one line."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
import threading
from collections.abc import Mapping

from rewrite.errors import RewriteError
from rewrite.registry import Plugin
from rewrite.runtime.plan import Manifest

# Among the manifest's versions: of the GPU that engines were built on, absent if they run on others; the GPU on which kernels were timed.
CAPABILITY, TUNED_ON = "compute capability", "tuned on"

_parsing = threading.Lock()  # Python before 3.12 raises SystemError where two threads parse at a time


def fingerprint(plugin: Plugin) -> str:
    """What a plan relies on, as 16 digits: the plugin's inputs, outputs and attributes with their defaults, and its reference as
    written (comments and layout aside), where Python knows the source. Kernels are free to change."""
    try:
        with _parsing:
            source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(plugin.reference))))
    except (OSError, TypeError, SyntaxError):
        source = ""
    told = json.dumps([plugin.inputs, plugin.outputs, dict(plugin.attributes), source], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def check_plugins(manifest: Manifest, plugins: Mapping[str, Plugin], where: str) -> None:
    """Raises RewriteError if a step calls a plugin that is not there, that is another than at the build, or in a way it does not take."""
    known: dict[str, str] = {}
    for step in manifest.steps:
        if step.kind != "plugin":
            continue
        if step.name not in plugins:
            raise RewriteError(f"{where}: the plan calls plugin {step.name[:60]}, which no loaded rules file declares; give it with --rules")
        plugin = plugins[step.name]
        found = known.setdefault(step.name, fingerprint(plugin))
        if manifest.plugins.get(step.name) != found:
            raise RewriteError(f"{where}: plugin {step.name} of {plugin.source} is not the one that the plan was built and verified with; build it again, or give its rules file with --rules")
        strange = sorted(set(step.attributes) - set(plugin.attributes))
        made = 0 if step.name == "Send" else len(plugin.outputs)  # what is sent is another rank's
        if strange or len(step.inputs) > len(plugin.inputs) or len(step.outputs) != made:
            what = f"with the attribute {strange[0][:60]!r}" if strange else f"with {len(step.inputs)} inputs for {len(step.outputs)} outputs"
            raise RewriteError(f"{where}: the plan calls plugin {step.name} {what}, which it does not take; build the plan again")


def check_engines(manifest: Manifest, where: str, tensorrt: str, capability: str) -> None:
    """Raises RewriteError if there are no engines, or they are of another TensorRT, or for another GPU, than what is here.

    `tensorrt` is `engine.version()` of this machine, `capability` its GPU's, "9.0".
    """
    for step in manifest.steps:
        if step.kind == "segment" and f"engines/{step.name}.engine" not in manifest.files:
            raise RewriteError(f"{where}: the plan was built without engines; build it again without --no-engines")
    built = manifest.versions.get("tensorrt", tensorrt)
    if built != tensorrt:
        raise RewriteError(f"{where}: the plan was built with {built}, this machine has {tensorrt}; build it again")
    if manifest.versions.get(CAPABILITY, capability) != capability:
        raise RewriteError(f"{where}: the plan was built for GPUs of compute capability {manifest.versions[CAPABILITY]}, this one has {capability}; build it again on this machine")
