"""Plan and attention of a whole prompt, some kv heads at a time: what the size of the pieces costs and saves, on a GPU.

    python benchmarks/pieces_run.py [--tokens 131072] [--recipes TEXT;TEXT] [--rows 19,20,21,62] [--out FILE]

One layer with Llama-3-8B's heads, bf16, made queries and keys. A row is a recipe at a size, 2 to the power of --rows query
rows counted for each head (`foveate.pieces.ROWS`; 62: all heads at once): milliseconds, sizes taking turns, and the memory
beside the output in MiB and as a share of the keys and values of 32 such layers ("of_kv"). cuDNN's dense attention beside.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from prefill_run import of, peak

from foveate import pieces
from foveate.bench import results
from foveate.bench.prefill import Problem, clock, whole
from foveate.bench.results import Row

RECIPES = "qwen1m;qwen1m@1m;qwen1m:chunk=32768;anchor_attention;anchor_attention:step=4"
LAYERS, ROUNDS = 32, 4


def measure(text: str, sizes: list[int], problem: Problem) -> list[Row]:
    method, x = of(text), problem.x
    b, h, n, _ = x.shape
    ms: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:  # compiles
        pieces.ROWS = 1 << size
        whole(method, x)
    for _ in range(ROUNDS):
        for size in sizes:
            pieces.ROWS = 1 << size
            ms[size].append(clock(lambda: whole(method, x), x.device)[0])
    rows = []
    for size in sizes:
        pieces.ROWS = 1 << size
        most = peak(lambda: whole(method, x), x.device)
        params = dict(b=b, h=h, g=x.groups, n=n, d=x.q.shape[-1], pieces=len(pieces.ranges(x, method)))
        if most is not None:
            beside = most - x.q.numel() * x.q.element_size() / 2**20
            params |= {"beside_mib": round(beside), "of_kv": round(beside * 2**20 / (LAYERS * x.kv.nbytes), 4)}
        rows.append(Row(f"{n} tokens, {text}", f"2^{size} rows", params, results.spread(ms[size])))
        print(rows[-1].case, rows[-1].impl, rows[-1].ms, params, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--recipes", default=RECIPES, help="semicolon between them")
    parser.add_argument("--rows", default="19,20,21,62", help="powers of two, comma between them")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (32, 8, 128) if device.type == "cuda" else (4, 2, 64)  # a dry run
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode():
        problem = Problem.make(args.tokens, *shape, dtype, device)
        rows = []
        for text in args.recipes.split(";"):
            rows += measure(text.strip(), [int(n) for n in args.rows.split(",")], problem)
        call = next(iter(problem.dense.values()))
        dense = [clock(call, device)[0] for _ in range(1 + ROUNDS)][1:]
        rows.append(Row(f"{args.tokens} tokens", "dense, cuDNN", {}, results.spread(dense)))
    if args.out:
        results.write(args.out, results.result("pieces", rows, device))


if __name__ == "__main__":
    main()
