"""Greedy generation with a plan's model, as plain as can be: blocks are never given back, chunks have a fixed size."""

from __future__ import annotations

import numpy as np

from rewrite.runtime.batch import Batch


def greedy(model, prompts, steps, chunk=5, seen=None):
    """The next `steps` tokens of each prompt, all in flight together; a prompt is read `chunk` tokens a step.

    `seen`, a dictionary, gets the logits of each text at each length.
    """
    block, longest = model.block_size, max(map(len, prompts)) + steps
    needed = -(-longest // block)
    assert needed * len(prompts) <= model.blocks
    order = np.random.default_rng(0).permutation(model.blocks)[: needed * len(prompts)]
    tables = order.reshape(len(prompts), needed).astype(np.int32)
    texts, done = [list(p) for p in prompts], [0] * len(prompts)
    while True:
        chunks = []
        for i, text in enumerate(texts):
            if len(text) < len(prompts[i]) + steps or done[i] < len(text) - 1:
                chunks.append((i, done[i], min(done[i] + chunk, len(text))))
        chunks = [c for c in chunks if len(texts[c[0]]) < len(prompts[c[0]]) + steps]
        if not chunks:
            return [t[len(p) :] for t, p in zip(texts, prompts, strict=True)]
        starts = np.cumsum([0] + [end - begin for _, begin, end in chunks])
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in chunks])
        owner = np.repeat([i for i, _, _ in chunks], np.diff(starts))
        asking = [(i, starts[n + 1] - 1) for n, (i, _, end) in enumerate(chunks) if end == len(texts[i])]
        batch = Batch(
            tokens=np.concatenate([np.array(texts[i][begin:end], np.int64) for i, begin, end in chunks]),
            positions=positions.astype(np.int64),
            slots=(tables[owner, positions // block] * block + positions % block).astype(np.int32),
            block_tables=tables[[i for i, _, _ in chunks]],
            query_starts=starts.astype(np.int32),
            context_lengths=np.array([end for _, _, end in chunks], np.int32),
            logit_rows=np.array([row for _, row in asking], np.int64),
        )
        logits = model.step(batch)
        for i, _, end in chunks:
            done[i] = end
        for (i, _), row in zip(asking, logits, strict=True):
            if seen is not None:
                seen[i, len(texts[i])] = row
            texts[i].append(int(row.argmax()))
