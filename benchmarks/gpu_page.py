"""docs/benchmarks.md and its plot from what `encoder.py`, `kernel_speed.py`, `decode.py` and `serving.py` measured on a GPU; needs no GPU itself.

    python benchmarks/gpu_page.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import generation_page

HERE = Path(__file__).parent
PEERS = {"tensorrt": "TensorRT alone", "torch": "PyTorch eager, CUDA graph", "compile": "torch.compile, max-autotune"}


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())  # type: ignore[no-any-return]


def source(name: str, data: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in data["versions"].items())
    note = f" ({data['note']})" if "note" in data else ""
    return f"[`benchmarks/results/{name}.json`](../benchmarks/results/{name}.json): {data['device']}, {data['date'][:10]}, `{data['command']}`{note}; {versions}."


def ratio(row: dict[str, Any], peer: str) -> str:
    return f"{row[f'{peer}_us'] / row['ours_us']:.2f}" if f"{peer}_us" in row else ""


def encoders(data: dict[str, Any]) -> list[str]:
    rows = data["results"]
    lines = ["| against | geometric mean | least | most | shapes |", "| --- | ---: | ---: | ---: | ---: |"]
    for peer, label in PEERS.items():
        found = [r[f"{peer}_us"] / r["ours_us"] for r in rows if f"{peer}_us" in r]
        if found:
            lines.append(f"| {label} | {statistics.geometric_mean(found):.2f} | {min(found):.2f} | {max(found):.2f} | {len(found)} |")
    lines += ["", "| model | batch x length | ours, µs | TFLOP/s | launches | TensorRT, µs | ours is faster by | PyTorch, µs | by | torch.compile, µs | by | difference from PyTorch |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        cells = [cell for peer in PEERS for cell in (f"{r[f'{peer}_us']:.1f}" if f"{peer}_us" in r else "", ratio(r, peer))]
        difference = f"{r['torch_difference']:.1e}" if "torch_difference" in r else ""
        lines.append(f"| {r['model']} | {r['batch']} x {r['length']} | {r['ours_us']:.1f} | {r['tflops']:.0f} | {r['launches']} | {' | '.join(cells)} | {difference} |")
    return lines


def products(data: dict[str, Any]) -> list[str]:
    limits = data["results"]["ceilings"]
    head = "| model | product | tokens x features x inner | library, µs | ours, µs | layout | TFLOP/s | of the ceiling | GB/s |"
    lines = [f"Ceilings, measured in the same run: {limits['tflops']:.0f} TFLOP/s in a product of 8192 x 8192 x 8192, {limits['gbs']:.0f} GB/s copying.", "", head]
    lines.append("| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for r in data["results"]["products"]:
        sizes = f"{r['tokens']} x {r['features']} x {r['inner']}"
        share = r["tflops"] / limits["tflops"]
        lines.append(f"| {r['model']} | {r['what']} | {sizes} | {r['library_us']:.1f} | {r['best_us']:.1f} | {r['best']} | {r['tflops']:.0f} | {share:.0%} | {r['gbs']:.0f} |")
    return lines


def attentions(data: dict[str, Any]) -> list[str]:
    limits = data["results"]["ceilings"]
    lines = ["| batch x heads x length x size | mask | cuDNN, µs | ours, µs | kernel | TFLOP/s | of the ceiling |", "| --- | --- | ---: | ---: | --- | ---: | ---: |"]
    for r in data["results"]["attention"]:
        share = r["tflops"] / limits["tflops"]
        sizes = f"{r['batch']} x {r['heads']} x {r['length']} x {r['size']}"
        lines.append(f"| {sizes} | {r['mask']} | {r['cudnn_us']:.1f} | {r['best_us']:.1f} | {r['best']} | {r['tflops']:.0f} | {share:.0%} |")
    return lines


def row_masks(data: dict[str, Any]) -> list[str]:
    lines = ["| batch x heads x length x size | before, µs | as now, µs | no mask, µs |", "| --- | ---: | ---: | ---: |"]
    return lines + [f"| {' x '.join(map(str, r['sizes']))} | {r['before']['us']:.1f} | {r['in a row']['us']:.1f} | {r['open_us']:.1f} |" for r in data["results"]["masks"]]


def prefills(data: dict[str, Any]) -> list[str]:
    limits = data["results"]["ceilings"]
    lines = ["| heads | new tokens | cuDNN, µs | ours, µs | TFLOP/s | of the ceiling | other cuts, µs |", "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for r in data["results"]["rows"]:
        heads, theirs = "{} / {} x {}".format(*r["heads"]), f"{r['cudnn_us']:.1f}" if "cudnn_us" in r else ""
        others = ", ".join(f"{cut}: {us:.1f}" for cut, us in list(r["cuts_us"].items())[1:])
        lines.append(f"| {heads} | {r['work']} | {theirs} | {r['us']:.1f} | {r['tflops']:.0f} | {r['tflops'] / limits['tflops']:.0%} | {others} |")
    return lines


def decoding(products: dict[str, Any], chains: dict[str, Any], divisions: dict[str, Any], sampling: dict[str, Any]) -> list[str]:
    """The kernels of a step that decodes, one by one."""
    lines = ["## Decoding, kernel by kernel", "", source("decoding", products), ""]
    lines += ["bfloat16, weights from memory each time; cuBLASLt does queries, keys and values, and gate and up, in calls of their own.", ""]
    lines += ["| product | tokens | cuBLASLt, µs | ours, µs | layout | GB/s |", "| --- | ---: | ---: | ---: | --- | ---: |"]
    for r in products["results"]["decoding"]:
        lines.append(f"| {r['model']} {r['what']}, {r['features']} x {r['inner']} | {r['tokens']} | {r['library_us']:.1f} | {r['best_us']:.1f} | {r['best']} | {r['gbs']:.0f} |")
    lines += ["", source("chains", chains), "", "All products and norms of the layers: a launch each, and one launch a layer.", ""]
    lines += ["| model | layers | tokens | each, µs | a layer, µs | GB/s |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for r in chains["results"]["chains"]:
        single, layer = r["single_us"], r["layer_us"]
        lines.append(f"| {r['model']} | {r['layers']} | {r['tokens']} | {single:.0f} | {layer:.0f} | {r['bytes'] / single / 1e3:.0f}, {r['bytes'] / layer / 1e3:.0f} |")
    lines += ["", source("paged_divisions", divisions), ""]
    lines += ["Attention of one new token a text over the paged cache, rotary embedding and store included; the best of the divisions tried,"]
    lines += ["and the same where positions read earlier may be fetched before the preceding kernel ends. Keys and values alone in GB/s.", ""]
    lines += ["| texts x positions | key heads x size | µs | fetched early, µs | GB/s | division |", "| --- | --- | ---: | ---: | ---: | --- |"]
    shapes = {tuple(r["shape"]): [q for q in divisions["results"]["variants"] if q["shape"] == r["shape"]] for r in divisions["results"]["variants"]}
    for (texts, positions, heads, size), tried in shapes.items():
        best = min(tried, key=lambda r: r["us"])
        lines.append(f"| {texts} x {positions} | {heads} x {size} | {best['us']:.1f} | {best['early_us']:.1f} | {4 * texts * positions * heads * size / best['us'] / 1e3:.0f} | {best['division']} |")
    lines += ["", source("sampling_speed", sampling), "", "Sampling from 128,256 logits in float32.", "", "| rows | how | µs |", "| ---: | --- | ---: |"]
    lines += [f"| {r['batch']} | {r['kind']} | {r['us']:.1f} |" for r in sampling["results"]]
    return [*lines, ""]


def plot(data: dict[str, Any]) -> bool:
    """How much faster ours is, over the tokens of a batch; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, peer in zip(axes, ("tensorrt", "torch"), strict=True):
        for model in dict.fromkeys(r["model"] for r in data["results"]):
            rows = sorted((r["batch"] * r["length"], r[f"{peer}_us"] / r["ours_us"]) for r in data["results"] if r["model"] == model and f"{peer}_us" in r)
            axis.plot(*zip(*rows, strict=True), "o", label=model)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xscale="log", xlabel="tokens in a batch", title=f"faster than {PEERS[peer]}, times")
        axis.legend()
    figure.tight_layout()
    figure.savefig(HERE / "results" / "encoder.png", dpi=110)
    return True


def generation() -> list[str]:
    """What there is of text generation."""
    names = [n for m in generation_page.MODELS for n in (f"decode_{m}", f"decode_ways_{m}", f"decode_prompt_{m}") if (HERE / "results" / f"{n}.json").exists()]
    decoded = [(source(name, data), data["results"]) for name in names for data in [read(name)]]
    served = read("serving") if (HERE / "results" / "serving.json").exists() else None
    return generation_page.section(decoded, None if served is None else (source("serving", served), served["results"]))


def main() -> None:
    encoder, kernels, attention, masks, prefill = (read(name) for name in ("encoder", "kernel_speed", "attention_speed", "attention_masks", "prefill_speed"))
    page = [
        "# Speed on a GPU", "", "Generated by `python benchmarks/gpu_page.py`.", "",
        "## Encoders", "", source("encoder", encoder), "",
        "Models of `transformers` with random weights, exported at opset 20, float16; an eighth of the tokens is padding. Ours: the plan with its",
        "kernels timed for the shape (`--tune`), one CUDA graph. TensorRT alone compiles the un-rewritten export for that shape, its weights constant,",
        "and runs in a CUDA graph. PyTorch runs the same module with scaled_dot_product_attention and a mask made beforehand. Times are medians of the",
        "GPU time of one inference. torch.compile takes a minute a shape and ran where figures stand.", "", *encoders(encoder), "",
        "![times faster](../benchmarks/results/encoder.png)", "",
        "## Products", "", source("kernel_speed", kernels), "",
        "Medians in a CUDA graph; weights in turn where a model's would not stay in the cache. The library is cuBLASLt with bias and residual in its epilogue,",
        "three calls for queries, keys and values, and a pass of its own for GELU; ours is the best layout. `wide N / 2` is a layout that was tried and given up.", "",
        *products(kernels), "",
        "## Attention", "", source("attention_speed", attention), "",
        "Masks: none; *row*, added, the same for all queries (padding, an eighth of the keys); *full*, added, one for each query.", "", *attentions(attention), "",
        source("attention_masks", masks), "",
        "After that table the kernel with wgmma became faster where a mask is the same for all queries: its keys are now read without a branch between them.", "", *row_masks(masks), "",
        "## New tokens over a paged cache", "", source("prefill_speed", prefill), "",
        "Causal, bfloat16, blocks of 16 positions in random order; a cut is queries by heads x keys of a step. cuDNN has the same numbers in contiguous arrays,",
        "the 32 texts (32 to 1023 tokens) padded to the longest; the work counted is what is seen, not the padding. The last row is one chunk among single tokens.", "", *prefills(prefill), "",
        *decoding(*(read(name) for name in ("decoding", "chains", "paged_divisions", "sampling_speed"))),
        *generation(),
    ]  # fmt: skip
    target = HERE.parent / "docs" / "benchmarks.md"
    target.write_text("\n".join(page))
    print(f"written to {target}" + ("" if plot(encoder) else "; no plot: matplotlib is not installed"))


if __name__ == "__main__":
    main()
