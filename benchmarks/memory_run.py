"""The allocator's peak of a prompt and of the steps after it, beside dense: is the memory that a cache policy saves real?

    python benchmarks/memory_run.py [--tokens 8192] [--batch 4] [--layers 32] [--out FILE] [--tiny]

A model of Llama-3-8B's shape with random weights reads a prompt and generates a few tokens. Policies compress each layer
right after its own attention (`Recipe.compress_at = "chunk"`), so that full caches never add up, and again, beside it, after
the whole prompt (the default, which lets a prompt come in pieces). Head scores of DuoAttention and RazorAttention are
random; half of the kv heads stream. `saved` is the peak of dense minus that of the recipe, in units of the dense KV bytes.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.bench import results
from foveate.profile import Profile
from foveate.recipe import Recipe

STEPS = 8


def model(layers: int, tokens: int, device: torch.device, tiny: bool) -> Any:
    shape = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)
    if tiny:
        shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=101)
    config = LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=tokens + 64, pad_token_id=0)
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def run(net: Any, recipe: Recipe, ids: torch.Tensor) -> dict[str, float]:
    """Bytes at the peak of prompt and steps above what was there before, bytes of the cache, milliseconds."""
    device = ids.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    base, began = (torch.cuda.memory_allocated() if device.type == "cuda" else 0), time.perf_counter()
    with torch.no_grad(), foveate.use(net, recipe):
        out = net(input_ids=ids, use_cache=True, logits_to_keep=1)
        prompt = peak(device)
        for _ in range(STEPS):
            out = net(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        held = out.past_key_values.nbytes
    if device.type == "cuda":
        torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - began)
    return {"prompt": prompt - base, "all": peak(device) - base, "cache": held, "ms": ms}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, where nothing is measured")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.tiny else "cuda")
    layers, tokens = (3, 256) if args.tiny else (args.layers, args.tokens)
    net = model(layers, tokens, device, args.tiny)
    c = net.config
    groups, dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
    kv = 2 * layers * groups * dim * tokens * args.batch * next(net.parameters()).element_size()
    ids = torch.randint(3, 100, (args.batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    score = torch.rand(layers, groups, generator=torch.Generator().manual_seed(1))
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        duo, razor = Path(folder, "duo"), Path(folder, "razor")
        Profile("duo_attention", tensors={"gates": score}).save(duo)
        Profile("razor_attention", tensors={"induction": score, "echo": score.flip(1)}).save(razor)
        half = tokens // 2
        texts = {
            "dense": "dense",
            "adakv, half": f"adakv:capacity={half}",
            "snapkv, half": f"snapkv:capacity={half}",
            "duo_attention, half the heads": f"duo_attention:sparsity=0.5,profile={duo}",
            "razor_attention, half the heads": f"razor_attention:window=512,fraction=0,induction=0.5,echo=0,profile={razor}",
            "streaming_llm": "dense+cache=streaming_llm:window=2044",
        }
        dense: dict[str, float] = {}
        run(net, Recipe.of("dense"), ids[:, :128])
        for name, text in texts.items():
            for at in ("chunk", "end") if name != "dense" else ("end",):
                label = name if name == "dense" else f"{name}, {'layer by layer' if at == 'chunk' else 'after the prompt'}"
                try:
                    got = run(net, replace(Recipe.of(text), compress_at=at), ids)
                except Exception as err:  # one recipe's trouble must not cost the others
                    print(f"# {label} left out: {type(err).__name__}: {str(err)[:200]}", flush=True)
                    continue
                dense = dense or got
                about: dict[str, Any] = {
                    "b": args.batch, "n": tokens, "layers": layers, "g": groups, "d": dim, "kv_mib": round(kv / 2**20, 1),
                    "peak_prompt_mib": round(got["prompt"] / 2**20, 1), "peak_mib": round(got["all"] / 2**20, 1),
                    "cache_mib": round(got["cache"] / 2**20, 1), "saved": round((dense["all"] - got["all"]) / kv, 3),
                    "saved_prompt": round((dense["prompt"] - got["prompt"]) / kv, 3),
                }  # fmt: skip
                rows.append(results.Row(f"{tokens} tokens, batch {args.batch}", label, about, results.spread([got["ms"]])))
                print(f"{label:56s} " + " ".join(f"{k} {v}" for k, v in about.items() if k[0] in "pcs"), flush=True)
    if args.out and rows:
        results.write(args.out, results.result("memory", rows, device))


if __name__ == "__main__":
    main()
