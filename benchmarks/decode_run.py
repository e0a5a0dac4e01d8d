"""One decode step of one layer on a GPU: Quest through the library, its parts, and dense attention, in CUDA graphs.

    python benchmarks/decode_run.py [--out FILE] [--rounds 5] [--sweep]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16. A graph holds the same call for several layers with caches of their own, so
that no call finds its data in the L2 cache, as in a model; figures are per layer. All implementations of a case take turns
in one process. `--sweep` also times other launch constants of the kernels, to be put into `paging_launch.py`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import foveate
from foveate.bench import results
from foveate.bench.results import Row
from foveate.kernels.triton import paging_launch as kernels
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.quest import Quest
from foveate.scores.bounds import Bounds

H, G, D, BUDGET = 32, 8, 128, 2048
COLD = 160 << 20  # bytes that the layers of one graph read at least: several times the L2 cache
REPLAYS = 6  # of a graph in each round
Step = Callable[[], Any]


@dataclass
class Layer:
    """One layer's cache at its capacity, its query, and what the parts of a step need."""

    q: Tensor
    kv: KV  # with lengths on the device: the form whose step a graph can replay while the cache grows
    x: AttnInput
    state: State
    bounds: Bounds
    score: Tensor
    layout: Any
    new: Tensor  # [B, G, 1, D]
    counts: Tensor  # int32 [2, B, G]: entries stored, entries that the bounds cover
    seen: Tensor


def layers(b: int, n: int, page: int, count: int, k: Tensor, v: Tensor) -> list[Layer]:
    """`count` layers over slices of k, v `[layers, B, G, N, D]`, bounds built, one step planned."""
    out = []
    for i in range(count):
        q = torch.randn(b, H, 1, D, device="cuda", dtype=k.dtype)
        length = torch.full((b, G), n, dtype=torch.int32, device="cuda")
        kv = KV.dense(k[i], v[i], len=length)
        x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(D))
        state = State()
        layout = method(page).plan(x, state)
        bounds = state.layer["quest.bounds"]
        score = kernels.score(q, bounds.data, -(-n // page), page, length, group=True)
        new, counts = torch.randn(b, G, 1, D, device="cuda", dtype=k.dtype), torch.stack([length, length])
        seen = torch.full((b,), n, device="cuda")
        out.append(Layer(q, kv, x, state, bounds, score, layout, new, counts, seen))
    return out


def method(page: int) -> Quest:
    return Quest(page=page, budget=BUDGET, dense_layers=0, share="group")


def calls(x: Layer, page: int) -> dict[str, Step]:
    """The step as the library runs it, and its parts."""
    quest = method(page)

    def step() -> Tensor:
        x.bounds.len.sub_(1)  # type: ignore[union-attr]  # one entry is new in every replay: a launch more than a model has
        return foveate.attend(x.q, x.kv, quest.plan(x.x, x.state))

    def append() -> None:  # writes over the last entry: one launch more than a model has
        x.counts.sub_(1)
        kernels.append(x.new, x.new, x.kv.k, x.kv.v, x.counts[0], x.seen, (x.bounds.data, x.counts[1], page))

    def whole() -> Tensor:
        append()
        x.bounds.joined(x.kv.len)
        out = foveate.attend(x.q, x.kv, quest.plan(x.x, x.state))
        x.bounds._fresh = None
        return out

    def scatter() -> None:  # what a fixed store does without the kernel, update aside
        at = x.counts[0][..., None].sub(1).long()
        x.kv.k.scatter_(2, at[..., None].expand_as(x.new), x.new)
        x.kv.v.scatter_(2, at[..., None].expand_as(x.new), x.new)
        x.counts.add_(0)
        x.seen.add_(0)
        x.counts[0].clone()

    def update() -> None:
        x.bounds.len.sub_(1)  # type: ignore[union-attr]
        x.bounds.update(x.kv)

    n = x.kv.capacity
    return {
        "quest": step,
        "quest with append": whole,
        "quest: append": append,
        "quest: scatter": scatter,
        "quest: update": update,
        "quest: score": lambda: kernels.score(x.q, x.bounds.data, -(-n // page), page, x.kv.len, group=True),
        "quest: select": lambda: kernels.select(x.score, BUDGET // page, page, x.kv.len),
        "quest: attend": lambda: foveate.attend(x.q, x.kv, x.layout),
    }


def dense_calls(x: Layer) -> dict[str, Step]:
    k, v = x.kv.k, x.kv.v

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(x.q, k, v, enable_gqa=True)

    return {"dense": lambda: foveate.attend(x.q, (k, v), backend="sdpa"), "torch flash": flash}


def moved(name: str, b: int, n: int, page: int) -> int:
    """Bytes a call has to read and write, at least."""
    pages, lists, size = -(-n // page), b * G, 2
    score = lists * pages * (2 * D * size + 4)
    select = lists * pages * 4 + lists * BUDGET // page * 4
    attend = lists * BUDGET * 2 * D * size
    update = lists * (page * D + 2 * D) * size
    parts = {"score": score, "select": select, "attend": attend, "update": update}
    if name == "quest":
        return sum(parts.values())
    parts |= {"scatter": lists * 4 * D * size, "append": update + lists * 4 * D * size}
    if name == "quest with append":
        return score + select + attend + parts["append"]
    return parts[name.removeprefix("quest: ")] if name.startswith("quest") else 2 * lists * n * D * size


# ---------------------------------------------------------------------- clocks
def capture(steps: list[Step]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def interleave(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a layer of every replay; every second round goes backwards. The first replay of a turn is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in list(graphs)[:: 1 if turn % 2 == 0 else -1]:
            graph, count = graphs[name]
            events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
            for event in events:
                event.record()
                graph.replay()
            torch.cuda.synchronize()
            took = [a.elapsed_time(b) / count for a, b in zip(events[1:], events[2:], strict=False)]
            samples[name] += took
    return samples


def host_time(step: Step, times: int = 200) -> float:
    """Milliseconds of host time of a call: `times` launches without waiting."""
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        step()
    took = (time.perf_counter() - began) / times * 1e3
    torch.cuda.synchronize()
    return took


def copy_bandwidth() -> float:
    """Terabytes a second of a large copy, read and written."""
    a = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    c = torch.empty_like(a)
    best = math.inf
    for _ in range(10):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        c.copy_(a)
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop))
    return 2 * a.numel() / best / 1e9


def error(out: Tensor, x: Layer, page: int) -> float:
    """Largest difference from fp32 attention over the pages of `x.layout`."""
    entries = (x.layout.tiles[:, :, 0, :, None] + torch.arange(page, device="cuda")).flatten(2).long()
    k, v = (t.float() for t in x.kv.gather(entries))
    q = x.q.float().view(*k.shape[:2], H // G, D)
    want = torch.softmax(q @ k.mT / math.sqrt(D), -1) @ v
    return float((out.float().view_as(want) - want).abs().max())


# ---------------------------------------------------------------------- the run
def case(b: int, n: int, rounds: int, speed: float, sweep: bool) -> list[Row]:
    count = max(4, min(16, math.ceil(COLD / moved("quest", b, n, 64))))
    k, v = (torch.randn(count, b, G, n, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    about: dict[str, dict[str, Any]] = {}
    errors: dict[str, float] = {}
    keep: list[Any] = []  # a graph reads tensors that nothing else may hold
    for page in (16, 64):
        these = layers(b, n, page, count, k, v)
        keep.append(these)
        plans = [calls(x, page) for x in these]
        errors[f"quest, pages of {page}"] = error(plans[0]["quest"](), these[0], page)
        for name in plans[0]:
            label = f"{name}, pages of {page}"
            graphs[label] = capture([p[name] for p in plans]), count
            about[label] = {"page": page, "bytes": moved(name, b, n, page), "host_ms": host_time(plans[0][name])}
        if sweep:
            variants(these, page, b, n, rounds)
    few = keep[0][: 2 if b > 1 else 4]  # dense attention reads a whole cache: two are colder than L2 already
    plans = [dense_calls(x) for x in few]
    for name in plans[0]:
        graphs[name] = capture([p[name] for p in plans]), len(few)
        about[name] = {"bytes": moved(name, b, n, 1), "host_ms": host_time(plans[0][name])}
    out = []
    for label, ms in interleave(graphs, rounds).items():
        took, extra = results.spread(ms), about[label]
        rate = extra["bytes"] / took["median"] / 1e9
        density = BUDGET / n if label.startswith("quest") else 1.0
        work = 4 * D * H * b * n * density if ":" not in label or "attend" in label else 0.0
        params = dict(b=b, h=H, g=G, n=n, d=D, dtype="bfloat16", budget=BUDGET, layers=graphs[label][1], **extra)
        params |= {"TB/s": round(rate, 3), "share_of_copy": round(rate / speed, 3)}
        out.append(Row("decode step", label, params, took, work / took["median"] / 1e9, density, errors.get(label)))
        print(
            f"B {b} {n:7d} {label:30s} {took['median'] * 1e3:8.1f} us [{took['min'] * 1e3:.1f}, {took['max'] * 1e3:.1f}] "
            f"{extra['bytes'] / 1e6:8.2f} MB {rate:6.2f} TB/s ({rate / speed:4.0%} of copy) "
            f"host {extra['host_ms'] * 1e3:6.1f} us" + (f" error {errors[label]:.1e}" if label in errors else ""),
            flush=True,
        )
    return out


def variants(these: list[Layer], page: int, b: int, n: int, rounds: int) -> None:
    """Other launch constants than those of `paging_launch.py`."""
    tries: dict[str, list[dict[str, int]]] = {
        "quest: score": [
            dict(PAGES=p, STEPS=s, STAGES=st, WARPS=w)
            for p, s, st, w in (
                (64, 8, 3, 4), (64, 4, 3, 4), (64, 16, 3, 4), (64, 8, 2, 4), (64, 8, 4, 4), (64, 1, 1, 4), (32, 8, 4, 4),
                (32, 8, 6, 4), (128, 4, 2, 4), (128, 4, 2, 8), (64, 32, 4, 4),
            )
        ],
        "quest: select": [dict(PER_WARP=p) for p in (256, 512, 1024, 2048)],
        "quest: attend": [dict(SHARE=s, MORE=m) for s, m in ((2, 0), (4, 0), (8, 0), (2, 1), (3, 1), (4, 1), (2, 3))],
    }  # fmt: skip
    knobs = ("PAGES", "STEPS", "STAGES", "WARPS", "SHARE", "MORE", "PER_WARP")
    graphs, before = {}, {name: getattr(kernels, name) for name in knobs}
    for name, options in tries.items():
        for option in options:
            try:
                for key, value in option.items():
                    setattr(kernels, key, value)
                forget()
                label = f"{name} {' '.join(f'{a.lower()} {c}' for a, c in option.items())}"
                graphs[label] = capture([calls(x, page)[name] for x in these]), len(these)
            except Exception as err:
                print(f"  {name} {option}: {type(err).__name__} {str(err).splitlines()[0][:80]}")
            finally:
                for key, value in before.items():
                    setattr(kernels, key, value)
                forget()
    for label, ms in interleave(graphs, max(2, rounds // 2)).items():
        print(f"  sweep B {b} {n} page {page} {label:60s} {results.spread(ms)['median'] * 1e3:8.1f} us", flush=True)


def forget() -> None:
    kernels._plan.cache_clear()
    kernels._score_plan.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also time other launch constants")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        speed = copy_bandwidth()
        print(f"copy {speed:.2f} TB/s")
        rows = []
        for b in (1, 8):
            for n in (32768, 131072):
                rows += case(b, n, args.rounds, speed, args.sweep and n == 131072)
                torch.cuda.empty_cache()
                if args.out:
                    results.write(args.out, results.result("decode", rows, torch.device("cuda"), copy_tbps=round(speed, 3)))


if __name__ == "__main__":
    main()
