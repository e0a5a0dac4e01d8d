"""One decode step of one layer on a GPU by labels and codes: its stages and dense attention, in CUDA graphs.

    python benchmarks/labels_run.py [--cases 131072x1,32768x8] [--choices ROWSxENTRIESxBUDGET,...] [--layers 6] [--rounds 5]
                                    [--out FILE]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, lengths on the device. A graph holds the same call for several layers with
caches of their own, so that no call finds its data in the L2 cache; figures are per layer. All stages of a case take turns.
Stages: score (labels of all keys; the newest key's label is made), select, attend over the chosen entries, and a whole step
of plan and attend. Choices are `best_entries` alone, among normal fp32 scores of rows with lengths on the device.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from decode_run import D, G, H, capture, interleave

import foveate
from foveate.bench import results
from foveate.bench.results import Row
from foveate.kv import KV
from foveate.methods.base import AttnInput, Method, State
from foveate.registry import parse
from foveate.scores.entries import best_entries

RECIPES = (
    "double_sparsity",
    "double_sparsity:share=group",
    "double_sparsity@speed",
    "adamas",
    "adamas:share=group,budget=1024",
)
SPEED = 3.0  # terabytes a second that a floor stands for
Step = Callable[[], Any]


def floor(method: Any, stage: str, b: int, n: int) -> float | None:
    """Microseconds in which a stage's bytes can be read, or None where launches are what it costs."""
    lists = G if method.share == "group" else H
    if method.id == "adamas":
        label = D // 4
    else:
        r = D // method.group_factor
        label = 2 * r if method.bits == 16 else r * method.bits // 8 + 4
    read = {"score": b * G * n * label, "attend": b * lists * method.budget * 4 * D}
    read["step"] = sum(read.values())
    return None if stage not in read else read[stage] / SPEED / 1e6


def stages(method: Method, q: torch.Tensor, kv: KV) -> dict[str, Step]:
    """The calls of one layer, whose labels are there."""
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(D))
    state, group = State(), method.share == "group"
    method.plan(x, state)
    x = replace(x, step=1)
    layout = method.plan(x, state)
    (labels,) = state.layer.values()
    score = labels.rank(q, kv, 1, group=group)
    late = method.id == "adamas"

    def step() -> Any:
        return foveate.attend(q, kv, method.plan(x, state))

    return {
        "score": lambda: labels.rank(q, kv, 1, group=group),
        "select": lambda: best_entries(score, method.budget, length=kv.len, late=late),  # type: ignore[attr-defined]
        "attend": lambda: foveate.attend(q, kv, layout),
        "step": step,
    }


def case(b: int, n: int, layers: int, rounds: int, recipes: list[str]) -> list[Row]:
    draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    length = torch.full((b, G), n, dtype=torch.int32, device="cuda")
    kvs = [KV.dense(draw(b, G, n, D), draw(b, G, n, D), len=length) for _ in range(layers)]
    qs = [draw(b, H, 1, D) for _ in range(layers)]
    rows, name = [], f"{n} tokens, batch {b}"
    for text in ["dense", *recipes]:
        method: Any = parse(text)
        if text == "dense":
            calls = [{"step": lambda q=q, kv=kv: foveate.attend(q, kv)} for q, kv in zip(qs, kvs, strict=True)]
        else:
            calls = [stages(method, q, kv) for q, kv in zip(qs, kvs, strict=True)]
        graphs = {stage: capture([call[stage] for call in calls]) for stage in calls[0]}
        for stage, ms in interleave({stage: (graph, layers) for stage, graph in graphs.items()}, rounds).items():
            spread = results.spread(ms)
            least = None if text == "dense" else floor(method, stage, b, n)
            rows.append(Row(name, f"{text}: {stage}", {"b": b, "n": n, "h": H, "g": G, "d": D, "layers": layers}, spread))
            said = "" if least is None else f"  floor {least:.1f} us"
            print(f"{name:26s} {text:36s} {stage:8s} {1e3 * spread['median']:8.1f} us{said}", flush=True)
        del graphs, calls
    return rows


def choices(text: str, layers: int, rounds: int) -> list[Row]:
    """The choice of single entries alone, for ROWSxENTRIESxBUDGET with commas between."""
    graphs, rows, held = {}, [], []  # graphs read what they were captured over
    for name in text.split(","):
        lists, m, keep = (int(part) for part in name.split("x"))
        length = torch.full((1, lists), m, dtype=torch.int32, device="cuda")
        scores = [torch.randn(1, lists, m, device="cuda") for _ in range(layers)]
        steps: list[Step] = [lambda s=s, n=length, keep=keep: best_entries(s, keep, length=n) for s in scores]
        graphs[name] = (capture(steps), layers)
        held.append((length, scores))
    for name, ms in interleave(graphs, rounds).items():
        lists, m, keep = (int(part) for part in name.split("x"))
        spread, reading = results.spread(ms), 4 * lists * m / SPEED / 1e6
        rows.append(Row("choice", name, {"rows": lists, "m": m, "keep": keep, "layers": layers}, spread))
        print(f"choice, {name:24s} {1e3 * spread['median']:8.1f} us  one reading of the scores {reading:.1f} us", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="131072x1,32768x8", help="TOKENSxBATCH, comma between them")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="semicolon between them")
    parser.add_argument("--choices", default="", help="ROWSxENTRIESxBUDGET, comma between them")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.choices:
        rows += choices(args.choices, args.layers, args.rounds)
    for text in filter(None, args.cases.split(",")):
        n, b = (int(part) for part in text.split("x"))
        rows += case(b, n, args.layers, args.rounds, [r.strip() for r in args.recipes.split(";")])
        torch.cuda.empty_cache()
    if args.out:
        results.write(args.out, results.result("labels", rows, torch.device("cuda")))


if __name__ == "__main__":
    main()
