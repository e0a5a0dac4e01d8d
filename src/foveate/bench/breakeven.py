"""Break-even lengths: how many tokens a text needs before a method is faster than dense attention on this device.

Prefill: estimate, select and attend of one layer on made prompts (see `prefill`), beside the faster of PyTorch's and the
library's dense attention. Decode: steps of all attention layers over random caches (see `decode`), beside the library's
dense steps; figures are per layer. A method that its recipe also names as cache policy decodes over caches that it has cut,
and what it drops between steps is counted with them. Method and dense take turns at every length. The break-even is where
the speed-up crosses 1 for the last time, interpolated in the logarithms of length and speed-up.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..doctor import device_name
from ..errors import ConfigError
from ..methods.base import Method
from ..payoff import Table
from ..profile import Profile
from ..recipe import Recipe
from . import results
from .decode import Stage
from .prefill import Problem, clock, densities, planned, whole
from .results import Row

BENCH = "breakeven"
PHASES = ("prefill", "decode")
LENGTHS = {"cuda": tuple(2**i for i in range(11, 18)), "cpu": (512, 1024, 2048, 4096)}
# Every decode method that works on the device and needs no profile, or one that `MADE` draws: in 128K tokens none may be
# slower than dense but those that read all keys by their nature (topk_exact; qwen1m, dense over moved positions;
# token_select at best 1.6 times faster, see benchmarks/NOTES.md). retrieval_attention is left out: its search runs on the
# host by design, for keys that do not fit the device; beside keys that do, there is nothing to break even with.
DECODE = (
    "quest", "quest:share=group", "quest:page=64,share=group", "decode=lserve:assign=even", "tidal_decode", "adamas",
    "double_sparsity", "decode=token_select", "decode=token_select@cached", "decode=longheads", "recycled_attention",
    "pillar_attn", "decode=streaming_llm", "decode=s2_strided", "decode=topk_exact", "decode=dsa", "decode=hip",
    "decode=qwen1m", "decode=duo_attention+cache=duo_attention", "decode=moa+cache=moa",
    "decode=razor_attention+cache=razor_attention",
)  # fmt: skip
RECIPES = ("minference", "flexprefill", "xattention", "spargeattn", "anchor_attention", *DECODE)
LEAST, MOST, SLOW = 0.2, 30, 20.0  # seconds a method is measured at least; rounds at most; seconds before it is cut short
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Shape:
    """Query heads, kv heads, head dim, dtype; `layers` of a decode step. The batch is 1."""

    h: int = 32
    g: int = 8
    d: int = 128
    dtype: torch.dtype = torch.bfloat16
    layers: int = 32

    def __post_init__(self) -> None:
        if min(self.h, self.g, self.d, self.layers) < 1 or self.h % self.g:
            raise ConfigError(
                f"heads: expected query heads that are a multiple of the kv heads, and sizes of at least 1, got "
                f"heads {self.h},{self.g}, dim {self.d}, layers {self.layers}"
            )

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"b": 1, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class BreakEven:
    """What the rows of one method in one phase say.

    Attributes:
        recipe: its text as it was asked for. method: with every hyperparameter.
        speedups: tokens -> time of dense / its time, ascending. length: the break-even, or None.
    """

    recipe: str
    method: str
    phase: str
    speedups: dict[int, float]

    @property
    def length(self) -> int | None:
        return crossing(list(self.speedups.items()))

    def __str__(self) -> str:
        shortest, longest = min(self.speedups), max(self.speedups)
        if self.length is None:
            return f"never faster up to {longest:,}"
        return f"faster from {shortest:,} on, the shortest" if self.length <= shortest else f"faster from {self.length:,} on"


def crossing(points: Sequence[tuple[int, float]]) -> int | None:
    """Of (tokens, speed-up) in rising order, the length from which on the speed-up stays above 1; None if the last is not.

    A speed-up above 1 everywhere gives the shortest length.
    """
    if not points or points[-1][1] <= 1:
        return None
    last = max((i for i, (_, s) in enumerate(points) if s <= 1), default=None)
    if last is None:
        return points[0][0]
    (n0, s0), (n1, s1) = points[last], points[last + 1]
    share = -math.log(s0) / (math.log(s1) - math.log(s0))
    return math.ceil(math.exp(math.log(n0) + share * (math.log(n1) - math.log(n0))) - 1e-6)


# ---------------------------------------------------------------------- one method at one length
def alternate(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int, most: int = MOST
) -> dict[str, list[float]]:
    """Milliseconds of calls in rounds, every second one backwards: `rounds`, up to `most` while all of it is short."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for turn in range(most):
        spent = time.monotonic() - began
        if (turn >= rounds and spent > LEAST) or (turn and spent > SLOW):
            break
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            samples[name].append(clock(calls[name], device)[0])
    return samples


def prefill_row(text: str, method: Method, problem: Problem, shape: Shape, rounds: int) -> Row:
    """One layer's prompt: planning ("plan_ms": estimate and select) and attention together, beside dense."""
    x = problem.x
    density = densities(x, planned(method, x)[0])[0]
    whole(method, x)  # compiles
    calls: dict[str, Callable[[], Any]] = {
        **problem.dense,
        "whole": lambda: whole(method, x),
        "plan": lambda: planned(method, x),
    }
    ms = alternate(calls, x.device, rounds, max(rounds, MOST))
    return _row("prefill", text, method, x.shape[2], shape, ms, list(problem.dense), density, ms["plan"])


def decode_row(text: str, method: Method, stage: Stage, shape: Shape, rounds: int, cuts: bool = False) -> Row:
    """A step of every layer, per layer. cuts: over caches that the method as their policy has cut, what it drops between
    steps included ("drop_ms": a layer of a step that drops, "drop_every" so many steps)."""
    dense, mine = stage.dense(), stage.subject(Recipe(decode=method, cache=method if cuts else None))
    calls: dict[str, Callable[[], Any]] = {"dense, ours": dense.cycle, "whole": mine.cycle}
    if mine.attends is not None:
        calls["attend"] = mine.attends
    room = min(mine.left, dense.left)  # both store a token a step
    ms = alternate(calls, stage.device, rounds, min(max(rounds, MOST), room))
    per = {name: [t / (shape.layers * (1 if name == "attend" else stage.CYCLE)) for t in ts] for name, ts in ms.items()}
    every, drop = mine.dropping()
    drop /= shape.layers
    if every:
        per["whole"] = [t + max(0.0, drop - t) / every for t in per["whole"]]
    plan = None
    if "attend" in per:
        plan = [max(0.0, statistics.median(per["whole"]) - statistics.median(per["attend"]))]
    row = _row("decode", text, method, stage.n, shape, per, ["dense, ours"], mine.density, plan)
    row.params["graph"] = int(mine.captured)
    if every:
        row.params.update(drop_ms=round(drop, 5), drop_every=every)
    return row


def _row(
    phase: str, text: str, method: Method, n: int, shape: Shape, ms: dict[str, list[float]], dense: Iterable[str],
    density: float | None, plan: list[float] | None,
) -> Row:  # fmt: skip
    best = min(dense, key=lambda name: statistics.median(ms[name]))
    base, took = results.spread(ms[best]), results.spread(ms["whole"])
    params: dict[str, Any] = dict(phase=phase, n=n, method=method.describe(), dense=best, rounds=len(ms["whole"]))
    params |= {f"dense_{key}": round(t, 5) for key, t in base.items()}
    params["speedup"] = round(base["median"] / took["median"], 4)
    if plan is not None:
        params["plan_ms"] = round(min(statistics.median(plan), took["median"]), 5)
        params["attend_ms"] = round(took["median"] - params["plan_ms"], 5)
    return Row(f"{phase}, {n} tokens", text, shape.facts() | params, took, None, density)


# ---------------------------------------------------------------------- profiles of methods that have to be trained
def indexers(shape: Shape) -> Profile:
    """Random weights for dsa: the published 64 heads of width 128 in every layer, on the mean query and key of all heads."""
    gen = torch.Generator().manual_seed(0)
    heads, width = 64, 128
    tensors: dict[str, torch.Tensor] = {}
    for i in range(shape.layers):
        sizes = {"q": (heads, width, shape.d), "k": (width, shape.d), "w": (heads, shape.d)}
        tensors |= {f"layer.{i}.{name}": torch.randn(*size, generator=gen) / shape.d**0.5 for name, size in sizes.items()}
    return Profile("dsa", {"rope_dims": 64}, tensors)


def by_head(method: str, *names: str) -> Callable[[Shape], Profile]:
    """Random scores of kv heads: which heads a share of them is, and so how many of a layer, is chance."""

    def made(shape: Shape) -> Profile:
        gen = torch.Generator().manual_seed(0)
        return Profile(method, {}, {name: torch.rand(shape.layers, shape.g, generator=gen) for name in names})

    return made


def spans(shape: Shape) -> Profile:
    """Two rules a layer for moa, as its search gives them, half of the heads having each, by chance: windows of a tenth and
    of 29 % of the text, a third of the pairs of a prompt."""
    gen = torch.Generator().manual_seed(0)
    wide = torch.rand(shape.layers, shape.h, generator=gen).argsort(-1) < shape.h // 2
    return Profile("moa", {}, {"alpha": torch.zeros(wide.shape), "beta": torch.where(wide, 0.29, 0.1)})


MADE: dict[str, Callable[[Shape], Profile]] = {
    "dsa": indexers,
    "duo_attention": by_head("duo_attention", "gates"),
    "moa": spans,
    "razor_attention": by_head("razor_attention", "induction", "echo"),
}


def equipped(method: Method, shape: Shape, folder: Path) -> Method:
    """The method with a random profile, written below `folder`, if it needs one and names none: time does not go by it."""
    if method.id not in MADE or getattr(method, "profile", None) is not None:
        return method
    where = folder / method.id
    if not where.exists():
        MADE[method.id](shape).save(where)
    return replace(method, profile=str(where))  # type: ignore[call-arg]


# ---------------------------------------------------------------------- all of them
def run(
    recipes: Sequence[str] = RECIPES, *, lengths: Sequence[int] | None = None, shape: Shape | None = None,
    phases: Sequence[str] = PHASES, rounds: int = 3, device: torch.device | str | None = None, seconds: float = math.inf,
    json: str | Path | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every recipe at every length, as a result of kind "breakeven" with `notes` of what failed and why.

    Args:
        recipes: texts. What serves prefill is measured in prefill, what serves decode in decode; caches stay dense but
            where the cache policy is the decode method itself.
        lengths: tokens, by default `LENGTHS`. shape: Llama-3-8B's heads in bf16 by default, fp32 on a CPU.
        rounds: at least, alternating with dense. seconds: after these nothing further begins.
        json: a file that is rewritten after every row; what it has is not measured again.
        progress: called with a sentence and the share that is done.

    Raises:
        ConfigError: a recipe with nothing to measure, lengths below 2, or a `json` of another device or shape.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = shape or Shape(dtype=torch.bfloat16 if where.type == "cuda" else torch.float32)
    lengths = sorted(set(lengths or LENGTHS[where.type]))
    if lengths[0] < 2:
        raise ConfigError(f"lengths: expected at least 2 tokens, got {lengths[0]}")
    subjects = _subjects(recipes, phases)
    rows, began = _old(json, where, shape), time.monotonic()
    notes: list[str] = []  # of this run: what failed before is tried again
    # The longest first: what a run that is cut short leaves out is where dense wins anyway.
    todo = [(n, p, text, m) for n in lengths[::-1] for p, text, m in subjects if (p, m.describe(), n) not in rows]
    data = results.result(BENCH, [], where, notes=notes, shape=shape.facts())

    def save() -> None:
        data["rows"] = [asdict(row) for row in rows.values()]
        if json is not None:
            results.write(json, data)

    made: Problem | Stage | None = None
    built: tuple[int, str] | None = None
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for i, (n, phase, text, method) in enumerate(todo):
            if time.monotonic() - began > seconds:
                notes.append(f"{len(todo) - i} measurements were not made: the {seconds:g} s were over")
                break
            if progress:
                progress(f"{phase}, {n:,} tokens, {text}", i / len(todo))
            try:
                if built != (n, phase):
                    made, built = None, (n, phase)
                    _release(where)
                    if phase == "prefill":
                        made = Problem.make(n, shape.h, shape.g, shape.d, shape.dtype, where)
                    else:
                        made = Stage(n, shape.h, shape.g, shape.d, shape.dtype, shape.layers, where)
                elif where.type == "cuda" and torch.cuda.memory_reserved(where) > 0.6 * torch.cuda.mem_get_info(where)[1]:
                    _release(where)  # graphs of earlier methods hold memory
                able = equipped(method, shape, Path(folder))
                if isinstance(made, Problem):
                    row = prefill_row(text, able, made, shape, rounds)
                elif made is not None:
                    row = decode_row(text, able, made, shape, rounds, Recipe.of(text).cache == method)
                else:
                    continue  # there was no memory for this length, which a note says
                row.params["method"] = method.describe()  # as it was asked for: made weights are nobody's
            except Exception as err:  # out of memory, say: the others still count
                notes.append(f"{phase}, {n} tokens, {text}: {type(err).__name__}: {' '.join(str(err).split())[:200]}")
                continue
            rows[phase, method.describe(), n] = row
            save()
    save()
    return data


def _subjects(recipes: Sequence[str], phases: Sequence[str]) -> list[tuple[str, str, Method]]:
    """(phase, text, method) of everything to measure, prefill first, each once."""
    for phase in phases:
        if phase not in PHASES:
            raise ConfigError(f"phases: expected {' or '.join(PHASES)}, got {phase!r}")
    found: dict[tuple[str, str], tuple[str, str, Method]] = {}
    for text in recipes:
        recipe = Recipe.of(text)
        some = [(p, m) for p in PHASES if isinstance(m := getattr(recipe, p), Method) and m.id != "dense"]
        if not some:
            raise ConfigError(f"recipes: {text!r} has no method for prefill or decode to measure")
        for phase, method in some:
            if phase in phases:
                found.setdefault((phase, method.describe()), (phase, text, method))
    return sorted(found.values(), key=lambda s: PHASES.index(s[0]))


def _old(json: str | Path | None, device: torch.device, shape: Shape) -> dict[tuple[str, str, int], Row]:
    """Rows of the file to go on with, by phase, method and length."""
    if json is None or not Path(json).exists():
        return {}
    data = results.load(json)
    have = {"benchmark": data["bench"], "device": data["device"], "shape": data.get("shape")}
    for name, want in {"benchmark": BENCH, "device": device_name(device), "shape": shape.facts()}.items():
        if have[name] != want:
            raise ConfigError(f"json: {json} has {name} {have[name]}, expected {want} as of this run; give another file")
    return {(r["params"]["phase"], r["params"]["method"], r["params"]["n"]): Row(**r) for r in data["rows"]}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------- what a result says
def breakevens(data: dict[str, Any]) -> list[BreakEven]:
    """One for each method and phase of a result, prefill first."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in data["rows"]:
        rows.setdefault((r["params"]["phase"], r["params"]["method"]), []).append(r)
    out = []
    for phase, method in sorted(rows, key=lambda key: PHASES.index(key[0])):
        mine = {r["params"]["n"]: r["params"]["speedup"] for r in rows[phase, method]}
        out.append(BreakEven(rows[phase, method][0]["impl"], method, phase, dict(sorted(mine.items()))))
    return out


def entries(data: dict[str, Any]) -> Table:
    """A result as a table of `payoff`, methods named as they describe themselves today: the file may know fewer options.

    Without recipes that cut their cache: a gate would run dense over the cut cache, which is not what they were beside.
    """
    s = data["shape"]
    about = dict(shape=f"{s['h']}/{s['g']} heads of {s['d']}, batch {s['b']}, {s['dtype']}", commit=data["commit"])
    methods: dict[str, dict[str, dict[str, Any]]] = {}
    for b in breakevens(data):
        if Recipe.of(b.recipe).cache is not None:
            continue
        entry = dict(length=b.length, shortest=min(b.speedups), longest=max(b.speedups), date=data["date"][:10])
        methods.setdefault(registry.parse(b.method).describe(), {})[b.phase] = entry | about
    return {data["device"]: methods}


def markdown(data: dict[str, Any]) -> str:
    """Speed-ups over dense by length, and the break-even, a table a phase."""
    parts, found = [], breakevens(data)
    for phase in PHASES:
        mine = [b for b in found if b.phase == phase]
        lengths = sorted({n for b in mine for n in b.speedups})
        if not mine:
            continue
        head = [f"| {phase}, speed-up over dense | break-even | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
        head.append("| --- " * (2 + len(lengths)) + "|")
        for b in mine:
            rows = (r["params"] for r in data["rows"])
            plain = any(p.get("graph") == 0 for p in rows if (p["phase"], p["method"]) == (phase, b.method))
            name = f"`{b.recipe}`" + (", not captured" if plain and data["device"].partition(" ")[0] != "CPU" else "")
            cells = " | ".join(f"{b.speedups[n]:.2f}" if n in b.speedups else "-" for n in lengths)
            head.append(f"| {name} | {b} | {cells} |")
        parts.append("\n".join(head))
    return "\n\n".join(parts)


def table(data: dict[str, Any]) -> str:
    """A result as text: a line a method, the notes below."""
    lines = [f"{data['device']}, {data['date']}"]
    for b in breakevens(data):
        speeds = "  ".join(f"{n:,}: {s:.2f}" for n, s in b.speedups.items())
        lines.append(f"{b.phase:8s} {b.recipe:44s} {b!s:36s} {speeds}")
    return "\n".join([*lines, *data["notes"]])
