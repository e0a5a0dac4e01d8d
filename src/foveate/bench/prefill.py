"""Prefill attention of one layer under a method, beside dense attention: the prompt, the calls, the clock.

What `benchmarks/prefill_run.py` and `breakeven` share. Queries and keys are made (see `made`), the heads of a trained model
in shape and concentration only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.base import Want
from ..kernels.dispatch import attend, choose
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..methods.base import AttnInput, Method, State
from ..pieces import by_pieces

# cuDNN where it can: not in fp32, nor before Ampere
FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

KINDS = ("peaked",) * 4 + ("diagonal",) * 2 + ("clusters", "flat")
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


def kind_of(i: int, h: int, g: int) -> str:
    """Which of `KINDS` query head i of h is, with g kv heads: the same in every draw."""
    return KINDS[i * g // h * len(KINDS) // g]


def prompt(n: int, h: int, g: int, d: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> AttnInput:
    """The prefill of a prompt of n made tokens (see `made`), as a method sees it."""
    q, k, v = (t.to(dtype) for t in made(n, h, g, d, seed=seed, device=device))
    pos = torch.arange(n, device=device)[None]
    return AttnInput(q, KV.dense(k, v), "prefill", LAYER, LAYERS, d**-0.5, q_pos=pos, rope=Turn())


def sampled(n: int, device: torch.device | str) -> Tensor:
    """int64: numbers of the rows on which masses and errors are looked at."""
    return torch.linspace(n // 16, n - 1, min(ROWS, n - n // 16), device=device).long()


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
        x = prompt(n, h, g, d, dtype, device)
        q, k, v = x.q, x.kv.k, x.kv.v
        out, lse = attend(q, x.kv, None, return_lse=True)
        rows = sampled(n, device)
        cuda = device.type == "cuda"
        k2, v2 = (t.repeat_interleave(h // g, 1) for t in (k, v)) if cuda else (k, v)  # cuDNN: outside of the clock

        def library() -> Tensor:
            with sdpa_kernel(FIRST, set_priority=True) if cuda else nullcontext():
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
            found.setdefault(kind_of(i, h, g), []).append(float(part.mean()))
        return {kind: round(statistics.mean(parts), 4) for kind, parts in found.items()}


# ---------------------------------------------------------------------- one method
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


def whole(method: Method, x: AttnInput) -> Any:
    """Plan and attend as the library does it: some kv heads at a time where the method allows that."""
    return by_pieces(x, method, lambda piece: attended(method, piece, *planned(method, piece)))


def densities(x: AttnInput, plan: Layout | Parts) -> tuple[float, float, str]:
    """(pairs named, pairs computed) / visible pairs, and the backends that compute them."""
    return (float(named(x, plan).sum()) / float(x.dense().visible(x.kv).sum()), *executed(x, plan))


def executed(x: AttnInput, plan: Layout | Parts) -> tuple[float, str]:
    """(pairs computed / visible pairs, the backends that compute them)."""
    visible, computed, names = float(x.dense().visible(x.kv).sum()), 0.0, []
    for part, q, kv in _parts(x, plan):
        module = choose(q, kv, part.layout, Want(lse=isinstance(plan, Parts)))
        computed += part.layout.computed(module.tiling(part.layout), kv)
        names.append(module.NAME)
    return computed / visible, " + ".join(dict.fromkeys(names))


def named(x: AttnInput, plan: Layout | Parts) -> Tensor:
    """int64 `[H]`: pairs that a plan names for each head of a call with B = 1."""
    return torch.stack([part.layout.pairs(kv)[0] for part, _, kv in _parts(x, plan)]).sum(0)


def _parts(x: AttnInput, plan: Layout | Parts) -> list[tuple[Part, Tensor, KV]]:
    parts = plan.parts if isinstance(plan, Parts) else (Part(plan),)
    return [(p, x.q if p.q is None else p.q, x.kv if p.kv is None else p.kv) for p in parts]


def by_kind(x: AttnInput, pairs: Tensor, mass: Tensor) -> dict[str, dict[str, float]]:
    """Of each kind of head, means of the mass kept and of the share of visible pairs: from `[H]` of each."""
    h = x.q.shape[1]
    visible = float(x.dense().visible(x.kv).sum()) / h
    found: dict[str, list[tuple[float, float]]] = {}
    for i, figures in enumerate(zip(mass.tolist(), pairs.tolist(), strict=True)):
        found.setdefault(kind_of(i, h, x.groups), []).append(figures)
    return {
        kind: {"mass": round(statistics.mean(m), 4), "density": round(statistics.mean(p) / visible, 4)}
        for kind, some in found.items()
        for m, p in [zip(*some, strict=True)]
    }


def facts(x: AttnInput) -> dict[str, Any]:
    b, h, n, _ = x.shape
    return dict(b=b, h=h, g=x.groups, n=n, d=x.q.shape[-1], dtype=str(x.q.dtype).removeprefix("torch."))


def title(x: AttnInput) -> str:
    return f"{x.q.shape[2]} tokens"
