"""A fusion written in PyTorch: no ONNX is read. The installed exporters say how the function looks, whichever wrote the model.

Also a rules file: `rewrite optimize model.onnx --rules examples/torch_rule.py`.
"""

import numpy as np
import torch

import rewrite


@rewrite.plugin
class GatedSquaredRelu:
    """y = relu(x @ gate)^2 * (x @ up)."""

    inputs = ("x", "gate", "up")
    tolerance = {"float32": (1e-5, 1e-5)}

    def reference(x, gate, up):
        return np.maximum(x @ gate, 0) ** 2 * (x @ up)


def gated_squared_relu(x, gate, up):
    """relu(x @ gate)^2 * (x @ up)."""
    return torch.relu(x @ gate) ** 2 * (x @ up)


weight = torch.nn.Parameter(torch.ones(8, 16))  # a parameter: must be a weight of the model; sizes do not matter
gated = rewrite.rule_from_torch(gated_squared_relu, (torch.ones(2, 3, 8), weight, torch.nn.Parameter(torch.zeros(8, 16))), "GatedSquaredRelu")


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 64)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)).pow(2) * self.up(x))


def main():
    import tempfile

    from rewrite.export.torch_export import as_source, export

    for form in gated.forms:
        print(form)
    torch.manual_seed(0)
    source = as_source(Mlp(), torch.randn(4, 7, 64), {"x": {0: "batch", 1: "seq"}})
    with tempfile.TemporaryDirectory() as folder:
        for exporter, opset in (("dynamo", 18), ("dynamo", 20), ("dynamo", 23), ("torchscript", 17)):
            export(source, f"{folder}/m.onnx", opset=opset, exporter=exporter)
            report = rewrite.optimize(f"{folder}/m.onnx").report  # each site is checked against what it replaces
            print(f"{exporter} {opset}: fused {report.plugins}; largest difference {report.model_error:.1e}")


if __name__ == "__main__":
    main()
