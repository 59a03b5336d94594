"""A fusion of your own: relu(x @ w)^2, the activation of Primer and Nemotron, as one plugin node, from rule to result."""

import numpy as np

import rewrite


@rewrite.plugin
class MatMulSquaredRelu:
    """y = relu(x @ w)^2."""

    inputs = ("x", "w")
    tolerance = {"float32": (1e-5, 1e-5), "float16": (4e-3, 4e-3)}

    def reference(x, w):
        return np.maximum(x @ w, 0) ** 2


@rewrite.rule(priority=10)  # before the built-in rule that takes relu(x @ w)
class FuseSquaredRelu:
    """relu(x @ w)^2, the square written as a power or as a product."""

    def pattern(op, x, w):
        r = op.Relu(x @ w)
        return rewrite.any_of(op.Pow(r, 2.0), r * r)

    def check(w):
        return None if w.rank == 2 else f"w has shape {w.shape}, expected a matrix"

    def replace(op, x, w):
        return op.MatMulSquaredRelu(x, w)


def main():
    import tempfile

    import torch

    from rewrite.export.torch_export import as_source, export

    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 256, bias=False), torch.nn.Linear(256, 64)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)) ** 2)

    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(4, 7, 64)
    with tempfile.TemporaryDirectory() as folder:
        export(as_source(model, x, {"x": {0: "batch", 1: "seq"}}), f"{folder}/m.onnx")
        result = rewrite.optimize(f"{folder}/m.onnx")  # each fused site is checked against what it replaces
        plan = rewrite.build(result.model, f"{folder}/plan", profile="batch=1:8:64,seq=1:16:128")  # compiled by TensorRT
        y = plan.run({"x": x.numpy()})["output"]  # on the CPU
    print(f"fused: {result.report.plugins}; largest difference from PyTorch: {np.abs(y - model(x).detach().numpy()).max():.1e}")


if __name__ == "__main__":
    main()
