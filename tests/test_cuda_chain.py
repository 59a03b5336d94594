"""Chains of products for few tokens: which steps make one, how its work is dealt, where its blocks leave what others read."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

import rewrite
from rewrite.plugins import cuda_chain, cuda_gemm
from rewrite.plugins.cuda_chain import Link, Norm, compose, deal
from rewrite.plugins.cuda_gemm import Product
from rewrite.registry import library
from rewrite.runtime import chains
from rewrite.runtime.cuda import CudaExecutor, Frame
from rewrite.verify import model_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import graphs

gpu = pytest.mark.gpu
BLOCKS = 132
SOURCE = (Path(cuda_chain.__file__).parent / "chain.cu").read_text()


class Array:
    """What the host code asks of an array on a device."""

    addresses = itertools.count(1 << 20, 1 << 20)

    def __init__(self, *shape, dtype="bfloat16", address=None):
        self.shape, self.dtype = shape, SimpleNamespace(name=dtype)
        self.data = SimpleNamespace(ptr=address or next(self.addresses))
        self.flags = SimpleNamespace(c_contiguous=True)
        self.nbytes = int(np.prod(shape)) * 2

    def __len__(self):
        return self.shape[0]

    def reshape(self, *shape):
        rows = int(np.prod(self.shape)) // shape[-1]
        return Array(rows, shape[-1], dtype=self.dtype.name, address=self.data.ptr)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "capability", lambda: 90)
    monkeypatch.setattr(cuda_chain, "_blocks", lambda: BLOCKS)


def product(x, features, residual=None, activation="none"):
    return Link(x, [Product(Array(x.shape[0], features), Array(features, x.shape[1]), None, residual)], activation)


def layer(tokens=3, width=256, hidden=512):
    """Items as the steps of a decoder's layer give them, from the attention on."""
    x, stream = Array(tokens, width), Array(tokens, width)
    out = product(x, width, stream)
    first = Norm(out.products[0].y, Array(width), Array(tokens, width), 1e-6)
    gate = replace(product(first.y, hidden, activation="swish"), gated=True)
    gate.products.append(Product(gate.products[0].y, Array(hidden, width)))
    down = product(gate.products[0].y, width, out.products[0].y)
    second = Norm(down.products[0].y, Array(width), Array(tokens, width), 1e-5)
    return [out, first, gate, down, second, product(second.y, 256), product(second.y, 64), product(second.y, 64)]


# --- which steps -----------------------------------------------------------------------------------------------------
def test_a_layer_from_attention_to_attention_is_one_chain(hopper):
    items = layer()
    links, ends = compose(items)
    assert ends == [1, 3, 4, 8]
    assert [len(link.products) for link in links] == [1, 2, 1, 3]
    assert [link.norm for link in links] == [items[1], None, items[4], None]
    assert cuda_chain.refusal(links) is None


def test_a_chain_ends_where_something_else_is_read(hopper):
    items = layer()
    assert compose(items[:5])[1] == [1, 3, 4]  # a norm that nothing follows
    assert compose([*items[:4], product(Array(3, 256), 64)])[1] == [1, 3, 4]
    assert compose([items[0], items[1], product(items[1].x, 64)])[1] == [1]  # what the norm read, not what it made
    joined = [product(items[0].x, 64) for _ in range(4)]
    assert [len(link.products) for link in compose(joined)[0]] == [3]  # as many products as a launch takes
    assert [len(link.products) for link in compose([joined[0], replace(joined[1], activation="relu")])[0]] == [1]


def test_what_the_kernel_cannot_do_is_refused(hopper, monkeypatch):
    links, _ = compose(layer())
    assert cuda_chain.refusal(compose(layer(9))[0]) == "9 tokens, at most 8"
    assert cuda_chain.refusal(links[:3]) == "a norm behind the last product"
    row = [product(Array(3, 256), 256)]
    while len(row) < 8:
        row.append(product(row[-1].products[0].y, 256))
    assert cuda_chain.refusal(row) == "8 links, at most 7"
    assert cuda_chain.refusal(row[:7]) is None
    assert "two activations" in cuda_chain.refusal([links[0], links[1], replace(links[2], activation="gelu"), links[3]])
    assert "does not read" in cuda_chain.refusal([links[0], links[2]])
    normed = layer()
    normed[3].products[0].residual = normed[1].y
    assert cuda_chain.refusal(compose(normed)[0]) == "the result of a norm as a residual"
    reused = layer()
    reused[0].products[0].residual = reused[1].y  # read before the norm is there: another value that lay where the norm goes
    assert cuda_chain.refusal(compose(reused)[0]) is None
    half = layer()
    for item in half:
        for array in [item.x, *([item.scale, item.y] if isinstance(item, Norm) else [a for p in item.products for a in (p.y, p.w, p.residual) if a])]:
            array.dtype = SimpleNamespace(name="float16")
    assert "float16" in cuda_chain.refusal(compose(half)[0])
    monkeypatch.setattr(cuda_gemm, "capability", lambda: 80)
    assert cuda_chain.refusal(links) == "types, sizes or the GPU"


def frame_of(plan, tokens):
    """A frame that has arrays without memory."""
    executor = CudaExecutor.__new__(CudaExecutor)
    executor.plugins, executor.plan, executor.steps, executor.chain_memory = library().plugins, plan, plan.manifest.steps, None
    executor.turned = {i for i, s in enumerate(plan.manifest.steps) if 'MatMul' in s.name}
    frame = Frame.__new__(Frame)
    frame.executor, frame.root = executor, lambda name: name
    steps, arrays, types = plan.manifest.steps, {}, {**plan.manifest.inputs, **plan.manifest.values}

    def array(name):
        if name and name not in arrays:
            weight = plan.weights.get(name)
            shape = weight.shape[::-1] if weight is not None else tuple(tokens if n == "seq" else 1 if isinstance(n, str) else n for n in types[name].shape)
            arrays[name] = Array(*shape)
        return arrays.get(name)

    frame.readers = {}
    for index, step in enumerate(steps):
        for name in step.inputs:
            frame.readers.setdefault(name, set()).add(index)
    frame.arguments = lambda step, plugin: ([array(n) for n in step.inputs] + [None] * (len(plugin.inputs) - len(step.inputs)), [array(n) for n in step.outputs])
    return frame


def test_the_chains_of_a_plan(tmp_path, hopper, monkeypatch):
    """Each layer is a chain; it writes what the attention and the next chain read, and nothing else."""
    plan = rewrite.build(rewrite.optimize(graphs.half(graphs.model(3, "llama"), onnx.TensorProto.BFLOAT16)).model, tmp_path / "p", engines=False, verify=False)
    monkeypatch.setattr(chains, "_pick", lambda frame, steps, links: links)
    frame, names = frame_of(plan, 5), [s.name for s in plan.manifest.steps]
    found, place = [], 0
    indices = list(range(len(names)))
    while place < len(indices):
        made = chains.at(frame, indices, place)
        found += [(place, *made)] if made else []
        place += made[0] if made else 1
    assert [[len(link.products) for link in links] for _, _, links in found] == [[1, 2, 1, 3], [1, 2, 1, 3], [1, 2, 1]]
    assert [[link.kept for link in links] for _, _, links in found] == [[False, False, True, True]] * 2 + [[False, False, True]]
    for place, count, _ in found:
        assert names[place : place + count].count("GatedMatMulAct") == 1
        assert "FusedAttention" not in names[place : place + count]
    assert not any(chains.at(frame_of(plan, 9), indices, p) for p in indices)


def test_results_that_share_memory_are_told_apart(tmp_path, hopper, monkeypatch):
    """What a chain need not write may have lain where later a result goes that others read."""
    plan = rewrite.build(rewrite.optimize(graphs.half(graphs.model(2, "llama"), onnx.TensorProto.BFLOAT16)).model, tmp_path / "p", engines=False, verify=False)
    monkeypatch.setattr(chains, "_pick", lambda frame, steps, links: links)
    frame, steps = frame_of(plan, 5), plan.manifest.steps
    first = next(i for i, s in enumerate(steps) if s.name == "MatMulAct" and len(s.inputs) == 4)
    gate = next(i for i in range(first, len(steps)) if steps[i].name == "GatedMatMulAct")
    (held,), (down,) = (frame.arguments(steps[i], frame.of(i)[0])[1] for i in (gate, gate + 1))
    down.data.ptr = held.data.ptr
    assert [link.kept for link in chains.at(frame, list(range(len(steps))), first)[1]] == [False, False, True, True]


def test_a_chain_is_left_where_it_was_measured_to_be_slower(tmp_path, hopper, monkeypatch):
    plan = rewrite.build(rewrite.optimize(graphs.half(graphs.model(1, "llama"), onnx.TensorProto.BFLOAT16)).model, tmp_path / "p", engines=False, verify=False)
    frame, steps = frame_of(plan, 5), plan.manifest.steps
    monkeypatch.setattr(frame, "launches_of", lambda indices: ["one by one"], raising=False)
    monkeypatch.setattr(cuda_chain, "chain", lambda links, memory: "chain")
    monkeypatch.setattr(cuda_chain, "new_memory", lambda size: SimpleNamespace(nbytes=512 + 2 * size))
    first = next(i for i, s in enumerate(steps) if s.name == "MatMulAct" and len(s.inputs) == 4)
    (links,) = [cuda_chain.compose([chains._item(frame, i) for i in range(first, len(steps)) if chains._item(frame, i)])[0]]
    named = cuda_chain.key([*links[:-1], replace(links[-1], norm=None)])
    count, launch = chains.at(frame, list(range(len(steps))), first)
    assert launch == "chain"
    with chains.tuning.using({named: {"chain": 1.0, "one by one": 2.0}}):
        assert chains.at(frame, list(range(len(steps))), first) == (count, "chain")
    with chains.tuning.using({named: {"chain": 2.0, "one by one": 1.0}}):
        assert chains.at(frame, list(range(len(steps))), first)[1] != "chain"


def test_a_norm_that_others_read_is_computed(tmp_path, hopper, monkeypatch):
    plan = rewrite.build(rewrite.optimize(graphs.half(graphs.model(1, "llama"), onnx.TensorProto.BFLOAT16)).model, tmp_path / "p", engines=False, verify=False)
    monkeypatch.setattr(chains, "_pick", lambda frame, steps, links: links)
    frame, steps = frame_of(plan, 5), plan.manifest.steps
    first = next(i for i, s in enumerate(steps) if s.name == "MatMulAct" and len(s.inputs) == 4)
    indices = list(range(len(steps)))
    assert len(chains.at(frame, indices, first)[1]) == 3
    norm = next(i for i in indices[first:] if steps[i].name == "RMSNormalization")
    frame.readers[steps[norm].outputs[0]].add(len(steps))  # it is an output of the model, say
    assert chains.at(frame, indices, first) is None


# --- dealing ---------------------------------------------------------------------------------------------------------
class Share:
    """`Share` of chain.cu for one block."""

    def __init__(self, tiles, steps, grain, blocks, block):
        self.steps, self.grains, self.grain = steps, -(-steps // grain), grain
        self.units = tiles * self.grains
        self.blocks = min(blocks, self.units)
        self.first, self.end = self.begin(block), self.begin(block + 1)

    def begin(self, block):
        unit = self.units * min(block, self.blocks) // self.blocks
        return unit // self.grains * self.steps + min(unit % self.grains * self.grain, self.steps)

    def owner(self, unit):
        return ((unit + 1) * self.blocks + self.units - 1) // self.units - 1


def test_every_step_is_done_once_and_every_tile_has_one_who_adds_up():
    rng = np.random.default_rng(0)
    cases = [(48, 32, 132), (32, 128, 132), (448, 64, 132), (1, 1, 132), (3, 2, 132), (256, 32, 114)] + [tuple(int(n) for n in rng.integers(1, (60, 70, 140))) for _ in range(60)]
    for tiles, steps, blocks in cases:
        for grain in {1, max(1, steps // 3), steps, cuda_chain.best_grain(tiles, steps, blocks)}:
            shares = [Share(tiles, steps, grain, blocks, b) for b in range(blocks)]
            assert [s for share in shares for s in range(share.first, share.end)] == list(range(tiles * steps))
            longest, pieces, shared = deal(tiles, steps, grain, blocks)
            assert longest == max(s.end - s.first for s in shares)
            workers: dict[int, list[int]] = {}
            for block, share in enumerate(shares):
                for tile in dict.fromkeys(s // steps for s in range(share.first, share.end)):
                    workers.setdefault(tile, []).append(block)
            assert max(len(b) for b in workers.values()) == shared
            assert max(sum(block in b for b in workers.values()) for block in range(blocks)) == pieces
            for tile, found in workers.items():  # as the kernel works it out: the first of them adds up, they are neighbours
                opening, last = (shares[0].owner(u) for u in (tile * shares[0].grains, (tile + 1) * shares[0].grains - 1))
                assert found == list(range(opening, last + 1))


@pytest.mark.parametrize(("tiles", "steps"), [(48, 32), (32, 32), (256, 32), (32, 128), (96, 64), (64, 64), (448, 64), (64, 224)])
def test_no_block_has_much_more_to_do_than_others(tiles, steps):
    longest, _, shared = deal(tiles, steps, cuda_chain.best_grain(tiles, steps, BLOCKS), BLOCKS)
    assert longest <= 1.07 * max(1, tiles * steps / BLOCKS) + 5  # a step more costs less than a piece more
    assert shared <= 5


class Loaders:
    """The warps of chain.cu that bring tokens: for each, in order, the steps of this block that it brings, counted through all links."""

    count, group = (int(re.search(p, SOURCE)[1]) for p in (r"LOADERS = (\d+)", r"group = min\((\d+), "))

    def __init__(self, counts):
        self.steps = [[] for _ in range(self.count)]
        done, turns = 0, list(range(self.count))
        for n in counts:
            groups = -(-n // self.group)
            for warp in range(self.count):
                while turns[warp] < groups:
                    first = turns[warp] * self.group
                    self.steps[warp] += range(done + first, done + min(first + self.group, n))
                    turns[warp] += self.count
                turns[warp] -= groups
            done += n


def test_no_warp_that_brings_tokens_gets_two_rounds_ahead():
    """It puts step i where step i - stages was, after waiting until that was multiplied. The barrier tells the parity of a phase only: whoever comes when even
    step i - 2 stages has not been multiplied is let through. What a warp knows is that of its step before, minus `stages`, all has been."""
    stages, rng = cuda_chain.RING // cuda_chain.STAGE, np.random.default_rng(0)
    for counts in [(31, 218, 109, 47), (31, 217, 109, 46), *rng.integers(0, 40, (300, 5)).tolist()]:
        warps = Loaders(counts).steps
        assert sorted(itertools.chain(*warps)) == list(range(sum(counts)))
        for steps in warps:
            assert all(b - 2 * stages <= a - stages for a, b in itertools.pairwise(steps)), counts


def test_places_in_the_memory_between_blocks_do_not_overlap(hopper):
    links, _ = compose([*layer(), *layer()[:1]])
    places, size = cuda_chain._layout(links, BLOCKS)
    used = []
    for link, place in zip(links, places, strict=True):
        parts = link.tiles * place["room"] * 3 * 256
        for name, count in (("sent", link.products[0].y.nbytes), ("scaled", link.products[0].y.nbytes), ("squares", link.tiles * 8 * 4), ("parts", parts)):
            if place[name] >= 0 and count:
                used.append((place[name], place[name] + count))
    used.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
    assert used[-1][1] <= size
    out, gate, down, qkv = places
    assert gate["source"] == out["scaled"] >= 0
    assert down["source"] == gate["sent"] >= 0
    assert down["residual"] == out["sent"] >= 0
    assert qkv["normed"] == down["squares"] >= 0
    assert (out["residual"], qkv["sent"], gate["scaled"]) == (-1, -1, -1)


def test_structures_are_as_long_as_in_the_source():
    assert ctypes.sizeof(cuda_chain._Link) == 576
    assert ctypes.sizeof(cuda_chain._Chain) == 4096  # what the arguments of any kernel may have
    assert (cuda_chain._Chain.state.offset, cuda_chain._Chain.memory.offset) == (4048, 4056)
    assert cuda_chain._Link.job.offset == 3 * 128


# --- with a GPU ------------------------------------------------------------------------------------------------------
@gpu
def test_chains_are_right_against_float64():
    import kernel_speed

    assert all(row["right"] for row in kernel_speed.check_chains())


@gpu
def test_a_plan_of_few_tokens_runs_in_chains(tmp_path, monkeypatch):
    """And gives what its steps give one by one, and the CPU, launch after launch."""
    model, pick = graphs.half(graphs.model(3, "llama"), onnx.TensorProto.BFLOAT16), chains.tuning.pick
    rewrite.build(rewrite.optimize(model).model, tmp_path / "p", profile="batch=1:2:8,seq=1:16:64", verify=False)
    on_cpu, chained, single = rewrite.Plan(tmp_path / "p"), rewrite.Plan(tmp_path / "p", device="cuda"), rewrite.Plan(tmp_path / "p", device="cuda")
    for seed, (batch, seq) in enumerate([(1, 1), (1, 8), (2, 3), (1, 5), (8, 1), (1, 9)]):
        feeds = model_inputs(model, seed, {"batch": batch, "seq": seq})
        want = on_cpu.run(feeds)["y"].astype(np.float64)
        with monkeypatch.context() as patch:
            patch.setattr(chains.tuning, "pick", lambda key, found, default: pick(key, found, "chain" if "chain" in found else default))  # as if it had been the fastest
            got = [chained.run(feeds)["y"].astype(np.float64) for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(chains, "at", lambda *_: None)
            plain = single.run(feeds)["y"].astype(np.float64)
        launches = [len(p.executor.frames[next(reversed(p.executor.frames))].launches) for p in (chained, single)]
        assert launches[0] < launches[1] if batch * seq <= 8 else launches[0] == launches[1]
        assert (got[0] == got[1]).all()
        assert (got[0] == got[2]).all()
        for other in (want, plain):
            assert np.abs(got[0] - other).max() <= 3e-2 * np.abs(want).max(), (batch, seq)
