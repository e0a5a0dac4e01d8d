"""A stream far beyond a model's positions: loss by position, memory and time, under recipes that may or may not bear it.

    python benchmarks/stream_run.py [--tokens 100000] [--model smollm2] [--recipes 'streaming_llm@stream'] [--out FILE]

Prose is read in pieces of `--piece` tokens through one cache, which the recipe's policy trims after each piece; the loss
of every token given what is still stored makes one row of perplexity for each tenth of the stream. After it `--steps` tokens
are read one by one, as decoding does. `--bound` gives a recipe fewer tokens: "dense=16384" shows what it is that breaks.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.adapters.transformers import use
from foveate.bench import results
from foveate.evals.stream import documents
from foveate.evals.text import Source
from foveate.models import load

RECIPES = "streaming_llm@stream; streaming_llm@8k; dense"
BOUND = "streaming_llm@8k=32768,dense=16384"


def stream(model: Any, recipe: str, ids: Tensor, piece: int, steps: int) -> tuple[list[dict[str, float]], int]:
    """(one entry a piece: first, tokens, loss summed, bytes, seconds; tokens read one by one at the end)."""
    device, cache, last, found = ids.device, None, None, []
    whole = ids.shape[1] - steps
    cuts = [*range(0, whole, piece), *range(whole, ids.shape[1])]
    with torch.no_grad(), use(model, recipe, graphs=device.type == "cuda") as handle:
        for first, end in zip(cuts, [*cuts[1:], ids.shape[1]], strict=True):
            part = ids[:, first:end]
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if end - first > 1 and handle.recipe.evicts:
                cache.compress()
            logits = out.logits[0].float()
            before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
            wanted = part[0, 1:] if last is None else part[0]
            loss = float(cross_entropy(before, wanted, reduction="sum"))
            last = logits[-1:]
            found.append({
                "first": first, "tokens": len(wanted), "loss": loss, "bytes": cache.nbytes,
                "seconds": time.perf_counter() - began, "step": float(end - first == 1),
            })  # fmt: skip
    return found, len([f for f in found if f["step"]])


def rows(recipe: str, found: list[dict[str, float]], tokens: int, positions: int, parts: int = 10) -> list[results.Row]:
    out = []
    for kind in (0.0, 1.0):
        some = [f for f in found if f["step"] == kind]
        groups: dict[int, list[dict[str, float]]] = {}
        for f in some:
            groups.setdefault(int(parts * f["first"] / tokens) if kind == 0 else parts, []).append(f)
        for group in groups.values():
            n = sum(f["tokens"] for f in group)
            about = {
                "tokens": tokens, "positions": positions, "first": int(group[0]["first"]), "n": int(n),
                "way": "step" if kind else "piece",
                "perplexity": round(math.exp(min(50.0, sum(f["loss"] for f in group) / n)), 3),
                "kv_bytes": int(max(f["bytes"] for f in group)),
            }  # fmt: skip
            out.append(results.Row("stream", recipe, about, results.spread([1e3 * f["seconds"] for f in group])))
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--piece", type=int, default=256)
    parser.add_argument("--steps", type=int, default=512, help="tokens at the end that are read one by one")
    parser.add_argument("--recipes", default=RECIPES, help="semicolon between them")
    parser.add_argument("--bound", default=BOUND, help="RECIPE=TOKENS, comma between them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    model, tokenizer = load(args.model, device=args.device, dtype=args.dtype, say=print)
    device = next(model.parameters()).device
    positions = model.get_decoder().config.max_position_embeddings
    ids = documents(tokenizer, Source.of(), args.tokens, 1, 0)[0].to(device)
    bounds = {k: int(v) for k, _, v in (b.rpartition("=") for b in args.bound.split(",") if b)}
    made: list[results.Row] = []
    for recipe in (r.strip() for r in args.recipes.split(";") if r.strip()):
        tokens = min(args.tokens, bounds.get(recipe, args.tokens))
        try:
            found, _ = stream(model, recipe, ids[:, :tokens], args.piece, min(args.steps, tokens // 4))
        except Exception as err:  # one recipe's trouble must not cost the others
            print(f"# {recipe} left out: {type(err).__name__}: {str(err)[:200]}", flush=True)
            continue
        made += rows(recipe, found, tokens, positions)
        for row in made:
            if row.impl == recipe:
                p = row.params
                print(
                    f"{recipe:24s} from {p['first']:7d} by {p['way']:5s} perplexity {p['perplexity']:9.2f}  "
                    f"kv {p['kv_bytes'] / 2**20:7.1f} MiB  {row.ms['median']:7.1f} ms", flush=True
                )  # fmt: skip
        if args.out:
            results.write(args.out, results.result("stream", made, device))


if __name__ == "__main__":
    main()
