"""Prefill attention of one layer under many recipes: what each keeps of the attention mass, and how long it takes.

    python benchmarks/prefill_run.py [--lengths 32768,131072] [--recipes "minference;flexprefill:gamma=0.85"] [--out FILE]

Llama-3-8B's heads (B 1, H 32, G 8, D 128) in bf16, the whole prompt in one call. Queries and keys are made (see `made`), so
masses compare recipes with each other; they say nothing about a model. Every recipe takes turns with dense attention,
cuDNN's and ours, in one process: `speedup` is cuDNN's median beside it over the median of plan and attention together. A
recipe that fails costs itself only. With `--out`, recipes that the file has are skipped; after `--seconds` no further one
begins. `mass` is exp(lse - dense lse), mean over sampled rows and heads; of a method that weighs keys it can exceed 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveate import attend
from foveate.bench import results
from foveate.bench.results import Row
from foveate.bench.tables import prefill_table
from foveate.kernels.base import Want
from foveate.kernels.dispatch import choose
from foveate.kv import KV
from foveate.layout import Layout, Part, Parts
from foveate.methods.base import AttnInput, Method, State
from foveate.recipe import Recipe

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
    "qwen1m",
    "moa",
)
KINDS = ("peaked",) * 4 + ("diagonal",) * 2 + ("clusters", "flat")
SLOW = 30.0  # seconds after which a recipe gets no further round
ROWS = 512  # query rows on which masses and errors are looked at
LAYER, LAYERS = 16, 32  # of the model that the call claims to come from: beyond the layers that methods leave dense


# ---------------------------------------------------------------------- what is attended
def made(n: int, h: int, g: int, d: int, *, seed: int = 0, device: torch.device | str = "cuda") -> tuple[Tensor, ...]:
    """q `[1, h, n, d]`, k and v `[1, g, n, d]` in fp32, whose attention is as concentrated as that of trained heads.

    Of eight kv heads four are "peaked", two "diagonal", one "clusters" and one "flat" (`KINDS`). Each is a sum of
    directions of its own, and of noise:
        sink: all queries and the first four keys share a direction.
        columns (peaked): so do all queries and one key in 200.
        band and diagonals: queries and keys turn with their positions, at random frequencies; a query turned back by a
            distance meets the keys there, distance 0 (the band, all but flat heads) or three far ones (diagonal).
        clusters: runs of n / 64 rows belong to one of d / 8 topics, and meet the runs of their topic.
    The query heads of a kv head weigh these differently. Strengths are logits, so they hold for every length.
    """
    gen = torch.Generator(device=device).manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=gen, device=device)  # noqa: E731
    q, k, v = (torch.empty(1, heads, n, d, device=device) for heads in (h, g, g))
    r, t, grow = h // g, torch.arange(n, device=device, dtype=torch.float32), 0.5 * math.log(max(n, 64) / 64)
    for i in range(g):
        kind = KINDS[i * len(KINDS) // g]
        base = torch.linalg.qr(draw(d, d)).Q  # directions that do not disturb each other
        waves, rest = d // 4, d - 2 * (d // 4) - d // 8 - 2
        freq = math.pi / 24 * torch.rand(waves, generator=gen, device=device)
        turned = lambda far, f=freq: torch.cat([((t - far)[:, None] * f).cos(), ((t - far)[:, None] * f).sin()], -1)  # noqa: E731
        topics = torch.randint(d // 8, (64,), generator=gen, device=device)[(t * 64 / n).long()]
        heavy = torch.rand(n, generator=gen, device=device) < 1 / 200
        key = {"sink": (t < 4).float()[:, None], "columns": heavy.float()[:, None] * (1 + 0.2 * draw(n, 1)).abs()}
        key["waves"], key["topics"] = turned(0.0) / waves**0.5, torch.nn.functional.one_hot(topics, d // 8).float()
        place = dict(zip(key, base.split([1, 1, 2 * waves, d // 8, rest])[:4], strict=True))
        root = d**0.25  # on both sides: their product is a logit after the scale of 1 / sqrt(d)
        noise = (1.0 if kind == "flat" else 0.7) ** 0.5 * root / rest**0.25  # logits of this spread, in the directions left
        k[0, i] = root * sum(x @ place[name] for name, x in key.items()) + noise * draw(n, rest) @ base[-rest:]
        v[0, i] = draw(n, d)
        for j in range(i * r, (i + 1) * r):
            weigh = lambda x: x * float(0.8 + 0.4 * torch.rand((), generator=gen, device=device))  # noqa: E731
            far = [0.0] if kind != "diagonal" else (torch.rand(3, generator=gen, device=device) * n / 2).round().tolist()
            size = {
                "sink": weigh(4.5 + 2 * grow) if kind != "flat" else 2.0,
                "columns": weigh(4 + grow) if kind == "peaked" else 0.0,
                "waves": weigh(
                    {"diagonal": 6 + 1.5 * grow, "clusters": 1 + 1.8 * grow, "flat": 0.0}.get(kind, 3 + 1.8 * grow)
                ),
                "topics": weigh(6.0) if kind == "clusters" else 0.0,
            }
            query = {"sink": torch.ones(n, 1, device=device), "columns": torch.ones(n, 1, device=device)}
            query["waves"] = sum(turned(x) for x in far) / waves**0.5
            query["topics"] = key["topics"]
            named = sum(size[name] * (x @ place[name]) for name, x in query.items())
            q[0, j] = root * named + noise * draw(n, rest) @ base[-rest:]
    return q, k, v


class Turn:
    """A rotation for methods that look at queries and keys before the model's: they are as good as any, turned back."""

    def _turn(self, x: Tensor, pos: Tensor, sign: float) -> Tensor:
        freq = 5e5 ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
        a = pos[:, None, :, None].float() * freq
        c, s = a.cos(), sign * a.sin()
        x1, x2 = x.float().chunk(2, -1)
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).to(x.dtype)

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return self._turn(x, pos, 1.0)

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return self._turn(x, pos, -1.0)


@dataclass
class Problem:
    """One prompt, what dense attention gives on sampled rows, and the calls it is compared with."""

    x: AttnInput
    rows: Tensor  # int64 [R]
    out: Tensor  # fp32 [H, R, D]
    lse: Tensor  # fp32 [H, R]
    dense: dict[str, Callable[[], Any]]

    @staticmethod
    def make(n: int, h: int, g: int, d: int, dtype: torch.dtype, device: torch.device) -> Problem:
        q, k, v = (t.to(dtype) for t in made(n, h, g, d, device=device))
        pos = torch.arange(n, device=device)[None]
        x = AttnInput(q, KV.dense(k, v), "prefill", LAYER, LAYERS, d**-0.5, q_pos=pos, rope=Turn())
        out, lse = attend(q, x.kv, None, return_lse=True)
        rows = torch.linspace(n // 16, n - 1, min(ROWS, n - n // 16), device=device).long()
        cuda = device.type == "cuda"
        k2, v2 = (t.repeat_interleave(h // g, 1) for t in (k, v)) if cuda else (k, v)  # cuDNN: outside of the clock

        def library() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cuda else nullcontext():
                return scaled_dot_product_attention(q, k2, v2, is_causal=True, enable_gqa=k2.shape[1] != h)

        calls = {"dense, cuDNN" if cuda else "dense, SDPA": library, "dense, ours": lambda: attend(q, x.kv, None)}
        for call in calls.values():
            call()  # compiles
        return Problem(x, rows, out[0][:, rows].float(), lse[0][:, rows], calls)

    def concentration(self, share: float = 0.95) -> dict[str, float]:
        """Of each kind of head, the share of a row's keys that hold `share` of its mass; mean over 16 rows."""
        found: dict[str, list[float]] = {}
        h, g = self.x.q.shape[1], self.x.groups
        for i in range(h):
            k, rows = self.x.kv.k[0, i * g // h].float(), self.rows[:: max(1, len(self.rows) // 16)]
            s = (self.x.q[0, i, rows].float() @ k.T) * self.x.scale
            s = s.masked_fill(torch.arange(k.shape[0], device=k.device) > rows[:, None], -math.inf)
            mass = s.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
            part = ((mass < share).sum(-1) + 1) / (rows + 1)
            found.setdefault(KINDS[i * g // h * len(KINDS) // g], []).append(float(part.mean()))
        return {kind: round(statistics.mean(parts), 4) for kind, parts in found.items()}


# ---------------------------------------------------------------------- one recipe
def clock(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(milliseconds, result) of one call, by events of the device where it has them."""
    if device.type != "cuda":
        began = time.perf_counter()
        got = call()
        return 1000 * (time.perf_counter() - began), got
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    got = call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), got


def planned(method: Method, x: AttnInput) -> tuple[Layout | Parts, State]:
    state = State()
    plan = method.plan(x, state)
    return x.dense() if plan is None else plan, state


def attended(method: Method, x: AttnInput, plan: Layout | Parts, state: State, lse: bool = False) -> Any:
    if (own := getattr(method, "attend", None)) is not None:
        return own(x, plan, state)[: 2 if lse else 1]
    return attend(x.q, x.kv, plan, scale=x.scale, return_lse=lse)


def densities(x: AttnInput, plan: Layout | Parts) -> tuple[float, float, str]:
    """(pairs named, pairs computed) / visible pairs, and the backends that compute them."""
    visible = float(x.dense().visible(x.kv).sum())
    named, computed, names = 0.0, 0.0, []
    for part in plan.parts if isinstance(plan, Parts) else (Part(plan),):
        q, kv = x.q if part.q is None else part.q, x.kv if part.kv is None else part.kv
        module = choose(q, kv, part.layout, Want(lse=isinstance(plan, Parts)))
        named += float(part.layout.pairs(kv).sum())
        computed += part.layout.computed(module.tiling(part.layout), kv)
        names.append(module.NAME)
    return named / visible, computed / visible, " + ".join(dict.fromkeys(names))


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


def measure(text: str, problem: Problem, rounds: int, samples: dict[str, list[float]]) -> Row:
    """The row of one recipe; dense times measured beside it are added to `samples`."""
    x, dev = problem.x, problem.x.device
    method = Recipe.of(text).prefill
    assert isinstance(method, Method), f"{text}: no method serves prefill"
    plan, state = planned(method, x)  # also compiles
    out, lse = attended(method, x, plan, state, lse=True)
    kept = (lse[0][:, problem.rows] - problem.lse).exp()
    error = (out[0][:, problem.rows].float() - problem.out).abs().sum() / problem.out.abs().sum()
    if not bool(torch.isfinite(kept).all() & torch.isfinite(error)):
        raise ArithmeticError("its output or its log-sum-exp is not finite")
    named, computed, backends = densities(x, plan)
    del out, lse, plan, state
    memory = peak(lambda: attended(method, x, *planned(method, x)), dev)
    own: dict[str, list[float]] = {"plan": [], "attend": [], **{name: [] for name in problem.dense}}
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
    for name in problem.dense:
        samples.setdefault(name, []).extend(own[name])
    middle = {name: statistics.median(ms) for name, ms in own.items()}
    total = [a + b for a, b in zip(own["plan"], own["attend"], strict=True)]
    params: dict[str, Any] = facts(x) | dict(
        plan_ms=round(middle["plan"], 3), attend_ms=round(middle["attend"], 3), mass=round(float(kept.mean()), 4),
        mass_least_head=round(float(kept.mean(-1).min()), 4), error=round(float(error), 4),
        density_computed=round(computed, 4), backend=backends,
        speedup=round(middle[next(iter(problem.dense))] / statistics.median(total), 3),
    )  # fmt: skip
    if memory is not None:
        params["peak_mib"] = round(memory)
    return Row(title(x), text, params, results.spread(total), None, named)


def facts(x: AttnInput) -> dict[str, Any]:
    b, h, n, _ = x.shape
    return dict(b=b, h=h, g=x.groups, n=n, d=x.q.shape[-1], dtype=str(x.q.dtype).removeprefix("torch."))


def title(x: AttnInput) -> str:
    return f"{x.q.shape[2]} tokens"


# ---------------------------------------------------------------------- all of them
def run(
    lengths: list[int], recipes: list[str], *, shape: tuple[int, int, int] = (32, 8, 128), rounds: int = 5,
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, seconds: float = math.inf,
    out: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every recipe at every length, as a result of kind "prefill attention"; written to `out` after each recipe."""
    began, device = time.monotonic(), torch.device(device)
    old = results.load(out) if out is not None and Path(out).exists() else {"rows": [], "concentration": {}}
    rows = {(r["case"], r["impl"]): Row(**r) for r in old["rows"]}
    notes: list[str] = []  # of this run: what failed before is tried again
    spread = dict(old["concentration"])
    data: dict[str, Any] = {}

    def save() -> None:
        data.update(results.result("prefill attention", list(rows.values()), device, notes=notes, concentration=spread))
        if out is not None:
            results.write(out, data)

    for n in lengths:
        todo = [text for text in recipes if (f"{n} tokens", text) not in rows]
        if not todo or time.monotonic() - began > seconds:
            continue
        problem = Problem.make(n, *shape, dtype, device)
        spread[str(n)] = problem.concentration()
        samples: dict[str, list[float]] = {}
        for text in todo:
            if time.monotonic() - began > seconds:
                notes.append(f"{n} tokens: the time was over before {text}")
                break
            try:
                row = rows[title(problem.x), text] = measure(text, problem, rounds, samples)
                print(f"{n:7d} {line(row)}", flush=True)
            except Exception as err:
                notes.append(f"{n} tokens, {text}: {type(err).__name__}: {' '.join(str(err).split())[:200]}")
                print(f"# {notes[-1]}", flush=True)
            for name, ms in samples.items():
                h, d = problem.x.q.shape[1], problem.x.q.shape[-1]
                work = 4 * d * h * n * (n + 1) / 2 / statistics.median(ms) / 1e9
                rows[title(problem.x), name] = Row(title(problem.x), name, facts(problem.x), results.spread(ms), work, 1.0)
            save()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del problem
    save()
    return data


def line(row: Row) -> str:
    p = row.params
    return (
        f"{row.impl:45s} mass {p['mass']:.3f} (least {p['mass_least_head']:.3f}) error {p['error']:.3f} density "
        f"{row.density:.3f} / {p['density_computed']:.3f} plan {p['plan_ms']:8.2f} attend {p['attend_ms']:8.2f} ms "
        f"x{p['speedup']:.2f} {p['backend']} {p.get('peak_mib', '-')} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="32768,131072", help="tokens, joined by commas")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="texts of recipes, joined by semicolons")
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
        )  # fmt: skip
    print(prefill_table(data))


if __name__ == "__main__":
    main()
