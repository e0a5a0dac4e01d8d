"""One decode step of one layer on a GPU by labels and codes: its stages and dense attention, in CUDA graphs.

    python benchmarks/labels_run.py [--cases 131072x1,32768x8] [--choices [ROWSxENTRIESxBUDGET[xDTYPE],...]] [--tune]
                                    [--layers 6] [--rounds 5] [--out FILE]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, lengths on the device. A graph holds the same call for several layers with
caches of their own, so that no call finds its data in the L2 cache; figures are per layer. All stages of a case take turns.
Stages: score (labels of all keys; the newest key's label is made), select, attend over the chosen entries, and a whole step
of plan and attend. Choices are `best_entries` alone, among normal scores of rows with lengths on the device; `--choices
--cases ""` runs nothing else.
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
from foveate.kernels.triton import select_entries_launch as launch
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


CHOICES = "32x131072x1024,8x131072x1024,1x131072x2048,1x131072x6500,8x131072x128xint16,32x131072x128xint16,1x1048576x2048"


def choices(text: str, layers: int, rounds: int) -> list[Row]:
    """The choice of single entries alone, for ROWSxENTRIESxBUDGET[xDTYPE] with commas between, beside torch.topk.

    In a step the kernel before has just written the scores, so that most are in the L2 cache; here those of many long rows
    are not, which makes figures a little worse. Kernels: by the profiler, one layer, without what lies between launches.
    """
    graphs, rows, held = {}, [], []  # graphs read what they were captured over
    for name in text.split(","):
        lists, m, keep, dtype = shape(name)
        length = torch.full((1, lists), m, dtype=torch.int32, device="cuda")
        scores = [(40 * torch.randn(1, lists, m, device="cuda")).to(dtype) for _ in range(layers)]
        steps: list[Step] = [lambda s=s, n=length, keep=keep: best_entries(s, keep, length=n) for s in scores]
        other: list[Step] = [lambda s=s, keep=keep: torch.topk(s, keep, sorted=False) for s in scores]
        graphs[f"{name}: best_entries"] = capture(steps), layers
        graphs[f"{name}: torch.topk"] = capture(other), layers
        held.append((length, scores, steps))
    for label, ms in interleave(graphs, rounds).items():
        name, what = label.split(": ")
        lists, m, keep, dtype = shape(name)
        spread, reading = results.spread(ms), dtype.itemsize * lists * m / SPEED / 1e6
        rows.append(Row("choice", label, {"rows": lists, "m": m, "keep": keep, "layers": layers}, spread))
        said = f"  one reading of the scores {reading:.1f} us" if what == "best_entries" else ""
        print(f"choice, {name:26s} {what:12s} {1e3 * spread['median']:8.1f} us{said}", flush=True)
    for name, (_, _, steps) in zip(text.split(","), held, strict=True):
        print(
            f"kernels, {name:25s} {', '.join(f'{kernel} {us:.1f}' for kernel, us in kernels(steps).items())} us", flush=True
        )
    return rows


TRIES: tuple[dict[str, Any], ...] = (
    {"WARPS": 8}, {"WARPS": 8, "STEP": 4096}, {"STEP": 4096}, {"WARPS": 32}, {"PARTS": (4096, 16384)},
    {"PARTS": (8192, 32768)}, {"SAMPLES": (1024, 2048)}, {"SAMPLES": (4096, 4096)}, {"KEYS": 256}, {"KEYS": 1024},
    {"ONE": 4096}, {"ONE": 16384}, {"FEW": 512}, {"SAMPLES": (2048, 8192)}, {"EARLY": True},
)  # fmt: skip


def tune(text: str, layers: int, rounds: int) -> None:
    """`choices` under other launch constants than those of `select_entries_launch.py`."""
    before = {name: getattr(launch, name) for option in TRIES for name in option}
    for option in ({}, *TRIES):
        print(f"-- {option}", flush=True)
        try:
            for name, value in option.items():
                setattr(launch, name, value)
            choices(text, layers, rounds)
        except Exception as err:
            print(f"   {type(err).__name__} {str(err).splitlines()[0][:80]}", flush=True)
        finally:
            for name, value in before.items():
                setattr(launch, name, value)


def shape(name: str) -> tuple[int, int, int, torch.dtype]:
    parts = name.split("x")
    lists, m, keep = (int(part) for part in parts[:3])
    return lists, m, keep, getattr(torch, parts[3]) if len(parts) > 3 else torch.float32


def kernels(steps: list[Step]) -> dict[str, float]:
    """Microseconds of each kernel of a step, the mean over all steps, called one after the other."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in steps:
            step()
        torch.cuda.synchronize()
    took = {event.key[:40]: event.self_device_time_total / len(steps) for event in profile.key_averages()}
    return {name: us for name, us in took.items() if us > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="131072x1,32768x8", help="TOKENSxBATCH, comma between them")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="semicolon between them")
    parser.add_argument(
        "--choices", default="", nargs="?", const=CHOICES, help="ROWSxENTRIESxBUDGET[xDTYPE], comma between them"
    )
    parser.add_argument("--tune", action="store_true", help="choices also under other launch constants")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.choices:
        rows += choices(args.choices, args.layers, args.rounds)
        if args.tune:
            tune(args.choices, args.layers, max(2, args.rounds // 2))
    for text in filter(None, args.cases.split(",")):
        n, b = (int(part) for part in text.split("x"))
        rows += case(b, n, args.layers, args.rounds, [r.strip() for r in args.recipes.split(";")])
        torch.cuda.empty_cache()
    if args.out:
        results.write(args.out, results.result("labels", rows, torch.device("cuda")))


if __name__ == "__main__":
    main()
