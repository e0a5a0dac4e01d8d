"""Prefill attention of one layer under many recipes: what each keeps of the attention mass, and how long it takes.

    python benchmarks/prefill_run.py [--lengths 32768,131072] [--recipes "minference;flexprefill:gamma=0.85"]
        [--calibrate mass=0.95] [--out FILE]

Llama-3-8B's heads (B 1, H 32, G 8, D 128) in bf16, the whole prompt in one call. Queries and keys are made (`made`), so
masses compare recipes with each other; they say nothing about a model. Every recipe takes turns with dense attention,
cuDNN's and ours, in one process: `speedup` is cuDNN's median beside it over the median of plan and attention together. A
recipe that fails costs itself only. With `--out`, recipes that the file has are skipped; after `--seconds` no further one
begins. `mass` is exp(lse - dense lse), mean over sampled rows and heads; of a method that weighs keys it can exceed 1.
`kinds` says where it comes from: mass and named pairs by kind of head.

With `--calibrate TARGET` each recipe gets the settings that keep the target first (`foveate.bench.calibrated`): its own
search by head where it has one, else its knob for all heads, on other draws of the same heads. Its row is called "RECIPE at
TARGET" and says on which seeds, for how long, and what the draw of the check kept; profiles lie beside the result.
`floors` of the result are what an oracle needs for 0.95 in each unit of rows x keys (`foveate.bench.floors`).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from foveate.bench import results
from foveate.bench.calibrated import Draws, calibrate, label, reason
from foveate.bench.floors import floors
from foveate.bench.prefill import Problem, attended, by_kind, clock, executed, facts, made, named, planned, title, whole
from foveate.bench.results import Row
from foveate.bench.tables import prefill_table
from foveate.methods.base import Method
from foveate.methods.search import Target
from foveate.pieces import ranges
from foveate.recipe import Recipe

__all__ = ["made", "run"]

RECIPES = (
    "streaming_llm:window=4096",
    *(f"minference:columns={c},diagonals={d}" for c, d in ((1000, 6096), (500, 700), (2000, 2000))),
    *(f"flexprefill:gamma={g}" for g in (0.8, 0.9, 0.95)),
    *(f"xattention:threshold={t}" for t in (0.8, 0.9, 0.95)),
    *(f"spargeattn:theta=-0.1,cdf={c}" for c in (0.8, 0.9, 0.95)),
    *(f"anchor_attention:theta={t}" for t in (8.0, 12.0)),
    "sale",
    "hip",
    "hyperattention",
    # One chunk (the published model of 1M tokens); models of 32K and of 8K positions, and what the latter costs unpruned.
    *("qwen1m@1m", "qwen1m:chunk=32768,local=4096", "qwen1m", "qwen1m@dca"),
    "moa",
)
SLOW = 30.0  # seconds after which a recipe gets no further round


# ---------------------------------------------------------------------- one recipe
def peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call allocates beyond what was there; None without a device that counts."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def of(text: str) -> Method:
    """The prefill method of a recipe."""
    method = Recipe.of(text).prefill
    assert isinstance(method, Method), f"{text}: no method serves prefill"
    return method


def measure(text: str, method: Method, problem: Problem, rounds: int, samples: dict[str, list[float]]) -> Row:
    """The row of one recipe, called `text`; dense times measured beside it are added to `samples`."""
    x, dev = problem.x, problem.x.device
    plan, state = planned(method, x)  # also compiles
    out, lse = attended(method, x, plan, state, lse=True)
    kept = (lse[0][:, problem.rows] - problem.lse).exp()
    error = (out[0][:, problem.rows].float() - problem.out).abs().sum() / problem.out.abs().sum()
    if not bool(torch.isfinite(kept).all() & torch.isfinite(error)):
        raise ArithmeticError("its output or its log-sum-exp is not finite")
    (computed, backends), pairs = executed(x, plan), named(x, plan)
    kinds = by_kind(x, pairs, kept.mean(-1))
    density = float(pairs.sum()) / float(x.dense().visible(x.kv).sum())
    del out, lse, plan, state
    memory, several = peak(lambda: whole(method, x), dev), len(ranges(x, method)) > 1
    own: dict[str, list[float]] = {"plan": [], "attend": [], "pieces": [], **{name: [] for name in problem.dense}}
    began = time.monotonic()
    for turn in range(rounds):
        if turn and time.monotonic() - began > SLOW:
            break
        for name, call in list(problem.dense.items())[:: 1 if turn % 2 == 0 else -1]:
            own[name].append(clock(call, dev)[0])
        ms, got = clock(lambda: planned(method, x), dev)
        own["plan"].append(ms)
        own["attend"].append(clock(partial(attended, method, x, *got), dev)[0])
        del got
        if several:
            own["pieces"].append(clock(lambda: whole(method, x), dev)[0])
    for name in problem.dense:
        samples.setdefault(name, []).extend(own[name])
    middle = {name: statistics.median(ms) for name, ms in own.items() if ms}
    total = own["pieces"] or [a + b for a, b in zip(own["plan"], own["attend"], strict=True)]
    params: dict[str, Any] = facts(x) | dict(
        plan_ms=round(middle["plan"], 3), attend_ms=round(middle["attend"], 3), mass=round(float(kept.mean()), 4),
        mass_least_head=round(float(kept.mean(-1).min()), 4), error=round(float(error), 4),
        density_computed=round(computed, 4), backend=backends, kinds=kinds,
        speedup=round(middle[next(iter(problem.dense))] / statistics.median(total), 3),
    )  # fmt: skip
    if several:
        params["pieces"] = len(ranges(x, method))  # the total is theirs; plan and attend are of all heads at once
    if memory is not None:
        params["peak_mib"] = round(memory)
    return Row(title(x), text, params, results.spread(total), None, density)


# ---------------------------------------------------------------------- all of them
def run(
    lengths: list[int], recipes: list[str], *, shape: tuple[int, int, int] = (32, 8, 128), rounds: int = 5,
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, seconds: float = math.inf,
    out: str | Path | None = None, target: Target | None = None, profiles: str | Path = "profiles",
) -> dict[str, Any]:  # fmt: skip
    """Every recipe at every length, as a result of kind "prefill attention"; written to `out` after each recipe.

    With a `target` those that can be are calibrated first, profiles go to folders in `profiles`; the others are noted.
    """
    began, device = time.monotonic(), torch.device(device)
    old = results.load(out) if out is not None and Path(out).exists() else {"rows": [], "concentration": {}}
    rows = {(r["case"], r["impl"]): Row(**r) for r in old["rows"]}
    notes: list[str] = []  # of this run: what failed before is tried again
    spread, floor = dict(old["concentration"]), dict(old.get("floors", {}))
    data: dict[str, Any] = {}

    def save() -> None:
        data.update(
            results.result("prefill attention", list(rows.values()), device, notes=notes, concentration=spread, floors=floor)
        )
        if out is not None:
            results.write(out, data)

    names = {label(text, target) if target is not None else text: text for text in recipes}
    for n in lengths:
        todo = [name for name in names if (f"{n} tokens", name) not in rows]
        if not todo or time.monotonic() - began > seconds:
            continue
        draws = None if target is None else Draws.make(n, *shape, dtype, device)
        problem = Problem.make(n, *shape, dtype, device)
        spread[str(n)] = problem.concentration()
        if str(n) not in floor and n >= 256:
            floor[str(n)] = floors(problem.x)
        samples: dict[str, list[float]] = {}
        for name in todo:
            if time.monotonic() - began > seconds:
                notes.append(f"{n} tokens: the time was over before {name}")
                break
            try:
                method, more = of(names[name]), {}
                if draws is not None and target is not None:
                    if (why := reason(method)) is not None:
                        raise ValueError(why)
                    got = calibrate(names[name], target, draws, Path(profiles))
                    method, more = got.method, {"recipe": names[name], "calibration": got.facts}
                    print(f"{n:7d} {name:45s} {got.facts}", flush=True)
                row = measure(name, method, problem, rounds, samples)
                row.params.update(more)
                rows[title(problem.x), name] = row
                print(f"{n:7d} {line(row)}", flush=True)
            except Exception as err:
                notes.append(f"{n} tokens, {name}: {type(err).__name__}: {' '.join(str(err).split())[:200]}")
                print(f"# {notes[-1]}", flush=True)
            for dense, ms in samples.items():
                h, d = problem.x.q.shape[1], problem.x.q.shape[-1]
                work = 4 * d * h * n * (n + 1) / 2 / statistics.median(ms) / 1e9
                rows[title(problem.x), dense] = Row(title(problem.x), dense, facts(problem.x), results.spread(ms), work, 1.0)
            save()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del problem, draws
    save()
    return data


def line(row: Row) -> str:
    p = row.params
    return (
        f"{row.impl:45s} mass {p['mass']:.3f} (least {p['mass_least_head']:.3f}) error {p['error']:.3f} density "
        f"{row.density:.3f} / {p['density_computed']:.3f} plan {p['plan_ms']:8.2f} attend {p['attend_ms']:8.2f} ms "
        f"x{p['speedup']:.2f} {p['backend']} {p.get('peak_mib', '-')} MiB; "
        + ", ".join(f"{kind} {f['mass']:.2f} of {f['density']:.3f}" for kind, f in p["kinds"].items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="32768,131072", help="tokens, joined by commas")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="texts of recipes, joined by semicolons")
    parser.add_argument("--calibrate", metavar="TARGET", help='"mass=0.95": settings that keep it, found on other draws')
    parser.add_argument("--profiles", metavar="FOLDER", default="profiles", help="where --calibrate writes what it found")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further recipe begins after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write, and to go on with")
    args = parser.parse_args()
    device = torch.device(args.device)
    small = device.type == "cpu"  # a dry run
    with torch.inference_mode():
        data = run(
            [int(n) for n in args.lengths.split(",")],
            [text.strip() for text in args.recipes.split(";") if text.strip()],
            shape=(4, 2, 64) if small else (32, 8, 128),
            dtype=torch.float32 if small else torch.bfloat16,
            rounds=args.rounds, device=device, seconds=args.seconds, out=args.out,
            target=Target.parse(args.calibrate) if args.calibrate else None, profiles=args.profiles,
        )  # fmt: skip
    print(prefill_table(data))


if __name__ == "__main__":
    main()
