"""Installed as `rewrite.export`."""

if __name__ != "rewrite.export":
    raise ImportError("import 'rewrite.export', not 'export': the folder is installed as a part of the package rewrite")

from rewrite.errors import RewriteError

try:
    import torch as torch
except ImportError as error:
    raise RewriteError("exporting needs PyTorch; install the extra: pip install 'rewrite-onnx[export]'") from error
