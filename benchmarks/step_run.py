"""A whole decode step of a model of Llama-3-8B's shape: recipes as CUDA graphs and without, dense on the same path.

    python benchmarks/step_run.py [--cases 131072x1,32768x8] [--recipes 'dense; quest:share=group'] [--ways graphs,compiled]
        [--out FILE] [--launches] [--tiny]

Random weights in bf16 and caches filled with random keys and values, no prefill: a step's time depends on how much a
recipe reads, not on what. All recipes of a case share the cache's memory, rewound between them. "no attention" stores new
keys and hands the queries back: what a step takes beside attention; `attention_ms` is the rest, each way of running against
its own floor. Ways: graphs; compiled and tuned (graphs of layers compiled by torch.compile); plain. A failing recipe is said
and left out. `--launches` lists what a replayed step launches, with times and the gaps between. `--tiny` is a dry run on the
CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import foveate
from foveate.adapters.context import ContextCache, ContextLayer
from foveate.adapters.transformers import Handle
from foveate.bench import results
from foveate.cache import DenseStore, LayerCache
from foveate.layout import Layout, Parts
from foveate.methods.base import AttnInput, LayerState, Method, State
from foveate.recipe import Recipe

RECIPES = "dense; quest:share=group; quest:page=64,share=group; decode=lserve:assign=even,share=group"
NOTHING = "no attention"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (what its rows say, options of `apply`)
    "graphs": ("", {"graphs": True}),
    "compiled": (", compiled", {"graphs": True, "compiled": True}),
    "tuned": (", compiled and tuned", {"graphs": True, "compiled": "tuned"}),
    "plain": (", without graphs", {"graphs": False}),
}
ROOM = 512  # tokens that fit behind a context
WARM = 24  # steps before the clock: every phase has run once and is captured
SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
             num_key_value_heads=8, vocab_size=128256)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=101)  # fmt: skip


@dataclass(frozen=True)
class Nothing(Method):
    """Hands the queries back. A benchmark's floor, not a method."""

    id: ClassVar[str] = "nothing"
    roles: ClassVar[tuple[str, ...]] = ("decode",)

    def phase(self, step: int) -> str | None:
        return "step"

    def attend(self, x: AttnInput, plan: Layout | Parts, state: State) -> tuple[Tensor, None, None]:
        return x.q, None, None


@dataclass
class Kept:
    """A meter: the mean density of a step's layers, None where a plan is no layout."""

    density: list[float | None] = field(default_factory=list)

    def planned(self, x: AttnInput, plan: Layout | Parts, seconds: float) -> None:
        self.density.append(plan.density(x.kv) if isinstance(plan, Layout) else None)

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        pass

    @property
    def mean(self) -> float | None:
        known = [d for d in self.density if d is not None]
        return statistics.fmean(known) if known and len(known) == len(self.density) else None


def model(shape: dict[str, int], tokens: int, device: torch.device) -> Any:
    """Random weights, made on the device they stay on."""
    config = LlamaConfig(
        **shape, max_position_embeddings=tokens + ROOM, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=0.02, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def memory(net: Any, b: int, m: int) -> list[tuple[Tensor, Tensor]]:
    """Random keys and values `[B, G, M + ROOM, D]` for every layer."""
    c, like = net.config, next(net.parameters())
    shape = (b, c.num_key_value_heads, m + ROOM, c.hidden_size // c.num_attention_heads)
    gen = torch.Generator(like.device).manual_seed(0)
    make = lambda: torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=gen)  # noqa: E731
    return [(make(), make()) for _ in range(c.num_hidden_layers)]


def context(entries: list[tuple[Tensor, Tensor]], m: int, handle: Handle) -> ContextCache:
    """A cache under `handle` whose m entries a row are the first of `entries`, as if a prompt had just been read."""
    layers = []
    for k, v in entries:
        cache, b = LayerCache(), k.shape[0]
        if (asked := handle.recipe.stored)["kind"] == "quantised":  # which has memory of its own
            cache.append(k[:, :, :m], v[:, :, :m], storage=asked)
            cache.store.settle()  # type: ignore[union-attr]
        else:
            cache.store = DenseStore(k, v, [m] * b)
            cache.seen, cache.rows, cache.tails = [m] * b, [LayerState() for _ in range(b)], [None] * b
        layer = ContextLayer(cache, m)
        layer.is_initialized = True
        layers.append(layer)
    return ContextCache(layers, handle)


def release() -> None:
    """Give graphs and caches that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- clocks
def timed(step: Callable[[], Any], times: int, device: torch.device) -> tuple[list[float], float]:
    """(milliseconds of every step on the device, median milliseconds of the host to ask for one)."""
    host = []
    if device.type != "cuda":
        for _ in range(times):
            began = time.perf_counter()
            step()
            host.append(1e3 * (time.perf_counter() - began))
        return host, statistics.median(host)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    for event in events[:-1]:
        event.record()
        began = time.perf_counter()
        step()
        host.append(1e3 * (time.perf_counter() - began))
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(z) for a, z in zip(events, events[1:], strict=False)], statistics.median(host)


def launches(step: Callable[[], Any], layers: int) -> list[str]:
    """What one step launches on the device, in words; see `told`."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watch:
        step()
        torch.cuda.synchronize()
    ran = [e for e in watch.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return told(sorted((e.time_range.start, e.time_range.end, e.name) for e in ran), layers)


def told(ran: list[tuple[float, float, str]], layers: int) -> list[str]:
    """Lines about launches (begin, end, name), in microseconds: by name, the gaps between them, one layer in its order."""
    total: dict[str, list[float]] = {}
    for begin, end, name in ran:
        total.setdefault(name, []).append(end - begin)
    lines = []
    for name, us in sorted(total.items(), key=lambda item: -sum(item[1])):
        often = f"{len(us):5d} launches ({len(us) / layers:5.2f} a layer)"
        lines.append(f"{sum(us) / 1e3:8.3f} ms {often} of {statistics.median(us):7.1f} us  {name[:90]}")
    if not ran:
        return ["the profiler saw no launch"]
    busy, whole = sum(map(sum, total.values())) / 1e3, (max(end for _, end, _ in ran) - ran[0][0]) / 1e3
    lines.append(
        f"{whole - busy:8.3f} ms between {len(ran)} launches; {busy:.3f} of {whole:.3f} ms busy, under the profiler"
    )
    names, half = [name for _, _, name in ran], len(ran) // 2
    again = (i for i in range(half + 1, len(names)) if names[i : i + 4] == names[half : half + 4])
    return [*lines, "a layer in its order: " + " | ".join(name[:40] for name in names[half : next(again, half + 1)])]


def measure(
    net: Any,
    entries: list[tuple[Tensor, Tensor]],
    m: int,
    recipe: Recipe,
    way: dict[str, Any],
    steps: int,
    look: bool = False,
) -> tuple[dict[str, float], dict[str, Any], float | None]:
    """(spread of a step's milliseconds, facts of the run, density) of one recipe."""
    device, b = entries[0][0].device, entries[0][0].shape[0]
    graphs, compiled = way["graphs"], way.get("compiled", False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    token = torch.full((b, 1), 5, device=device)
    with torch.no_grad(), foveate.use(net, recipe, **way) as handle:
        cache = context(entries, m, handle)

        def step() -> Tensor:
            out = net(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits  # type: ignore[no-any-return]

        handle.meter = kept = Kept()
        step()
        handle.meter = None
        began = time.perf_counter()
        for _ in range(WARM):
            logits = step()
        warm = time.perf_counter() - began
        if compiled and (handle.graphs is None or handle.graphs.layers is None):
            raise RuntimeError("; ".join(handle.notes) or "the layers are not compiled")
        if not bool(torch.isfinite(logits).all()):
            raise ArithmeticError("logits are not finite")
        before = handle.graphs.replays if handle.graphs is not None else 0
        ms, host = timed(step, steps, device)
        replays = handle.graphs.replays - before if handle.graphs is not None else 0
        if graphs and replays < steps:
            raise RuntimeError(
                f"only {replays} of {steps} steps were replayed: {'; '.join(handle.notes) or 'no reason given'}"
            )
        if look:
            print("\n".join(launches(step, len(entries))), flush=True)
        facts: dict[str, Any] = {"graphs": int(graphs), "host_ms": round(host, 3)}
        if compiled:  # the first of a process compiles
            facts |= {"compiled": compiled if isinstance(compiled, str) else "default", "warm_s": round(warm, 1)}
        if device.type == "cuda":
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        return results.spread(ms), facts, kept.mean


# ---------------------------------------------------------------------- the run
def case(
    net: Any, b: int, m: int, recipes: list[str], ways: list[str], steps: int, until: float, look: bool = False
) -> list[results.Row]:
    entries = memory(net, b, m)
    c, rows, floor = net.config, [], {}  # floor: way -> milliseconds without attention
    name = f"{m} tokens, batch {b}"
    about = {"b": b, "n": m, "layers": c.num_hidden_layers, "h": c.num_attention_heads, "g": c.num_key_value_heads}
    for way in ways:
        for text in [NOTHING, *recipes]:
            label, options = text + WAYS[way][0], WAYS[way][1]  # a compiled step is a row of its own in tables
            if time.monotonic() > until:
                print(f"# {name}: {label} left out, the time is over", flush=True)
                continue
            try:
                recipe = Recipe(decode=Nothing()) if text == NOTHING else Recipe.of(text)
                ms, facts, density = measure(net, entries, m, recipe, options, steps, look)
            except Exception as err:
                said = str(err).splitlines()
                print(f"# {name}: {label} left out: {type(err).__name__}: {said[0][:200] if said else ''}", flush=True)
                continue
            finally:
                release()
            if text == NOTHING:
                floor[way], density = ms["median"], None
            elif way in floor:
                facts["attention_ms"] = round(ms["median"] - floor[way], 3)
            params = about | {"recipe": label if "compiled" in options else text} | facts
            rows.append(results.Row(name, label, params, ms, density=density))
            seen = " ".join(f"{k} {v}" for k, v in facts.items() if k != "graphs")
            print(f"{name:26s} {label:60s} {ms['median']:8.3f} ms [{ms['min']:.3f}, {ms['max']:.3f}] {seen}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="131072x1,32768x8", help="TOKENSxBATCH, comma between them")
    parser.add_argument("--recipes", default=RECIPES, help="semicolon between them")
    parser.add_argument("--ways", default="graphs,compiled,plain", help=f"comma between them: {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=400, help="no further recipe begins after these")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--launches", action="store_true", help="list what a step launches (a GPU's profiler)")
    parser.add_argument("--tiny", action="store_true", help="a small model and short contexts on the CPU, without graphs")
    args = parser.parse_args(argv)
    until = time.monotonic() + args.seconds
    device = torch.device("cpu" if args.tiny else "cuda")
    asked = "300x1,200x2" if args.tiny and args.cases == parser.get_default("cases") else args.cases
    cases = [tuple(int(n) for n in text.split("x")) for text in asked.split(",")]
    recipes = [text.strip() for text in args.recipes.split(";") if text.strip()]
    shape = TINY if args.tiny else SHAPE | {"num_hidden_layers": args.layers}
    net = model(shape, max(m for m, _ in cases), device)
    ways = ["plain"] if args.tiny else [way.strip() for way in args.ways.split(",")]
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--ways: expected some of {', '.join(WAYS)}, got {', '.join(unknown)}")
    if (most := ROOM - WARM - 2) < args.steps:  # one step warms, one is looked at
        parser.error(f"--steps: expected at most {most}, for which a context leaves room, got {args.steps}")
    rows: list[results.Row] = []
    for m, b in cases:
        steps = min(args.steps, 5) if args.tiny else args.steps
        rows += case(net, b, m, recipes, ways, steps, until, args.launches and not args.tiny)
        release()
        if args.out and rows:
            results.write(args.out, results.result("step", rows, device))


if __name__ == "__main__":
    main()
