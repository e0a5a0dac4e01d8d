"""What a recipe computed and what it missed, from a pass of its own that is never timed.

A `Diagnosis` is a meter (`runtime.Meter`). On every call it counts the pairs of the layout, and on one sampled query
row per picture row it compares the softmax mass of the pairs the layout names with that of all visible pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kernels.base import Want
from .kernels.dispatch import choose
from .kv import KV
from .layout import Layout, Part, Parts
from .methods.base import AttnInput
from .recipe import Recipe

GRID = 48  # cells along a side of a picture; as many query rows are sampled in prefill


@dataclass(frozen=True)
class Picture:
    """One head of one layer in prefill, on sampled rows (top: first) and key cells (left: first).

    Attributes:
        computed: per cell, computed pairs / visible pairs. mass: per cell, the dense attention probability there
        (a row sums to 1). kept: mass on named pairs, mean over the rows.
    """

    layer: int
    head: int
    computed: list[list[float]]
    mass: list[list[float]]
    kept: float


@dataclass
class Share:
    """A running quotient of pairs."""

    part: float = 0.0
    whole: float = 0.0

    def add(self, part: float, whole: float) -> None:
        self.part, self.whole = self.part + part, self.whole + whole

    @property
    def value(self) -> float | None:
        return self.part / self.whole if self.whole else None


@dataclass
class Diagnosis:
    """A meter for one prefill and the decode steps after it, batch 1.

    Attributes:
        recipe: what runs. backend: the backend asked for, or None. heads: (layer, head) pairs to draw.
        named, computed: per phase, pairs named by layouts and pairs the kernel computes, over all visible pairs. In
            decode the whole is every token seen, so evicted entries count as not computed.
        mass: per phase and layer, lists of `[H]` mass kept. backends: names of the kernels that ran.
    """

    recipe: Recipe
    backend: str | None = None
    heads: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    named: dict[str, Share] = field(default_factory=lambda: {"prefill": Share(), "decode": Share()})
    computed: dict[str, Share] = field(default_factory=lambda: {"prefill": Share(), "decode": Share()})
    mass: dict[str, dict[int, list[Tensor]]] = field(default_factory=lambda: {"prefill": {}, "decode": {}})
    head_density: dict[int, Tensor] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    backends: dict[str, None] = field(default_factory=dict)
    _keys: dict[int, Tensor] = field(default_factory=dict)
    _values: dict[int, Tensor] = field(default_factory=dict)

    keeps_values: ClassVar[bool] = False  # a subclass that looks at outputs needs evicted values as well as keys

    # ------------------------------------------------------------------ the meter
    def planned(self, x: AttnInput, plan: Layout | Parts, seconds: float) -> None:
        pass

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        assert x.q_pos is not None
        rows = sample_rows(x.q.shape[2], self.seed + x.layer) if x.phase == "prefill" else torch.zeros(1, dtype=torch.int64)
        rows = rows.to(x.device)
        visible = _visible(x, rows)
        named = self._count(x, plan, rows)
        full = self._all_keys(x)
        if named is None:
            return
        keys = x.kv.to_dense().k[0]
        q = x.q[0][:, rows]
        some = _lse(q, keys, named, x)
        if full is None:
            every = _lse(q, keys, visible.expand_as(named), x)
        else:
            every = _lse(q, full, torch.ones(1, 1, 1, dtype=torch.bool, device=x.device), x)
        kept = torch.exp(some - every).clamp(max=1.0)
        self.mass[x.phase].setdefault(x.layer, []).append(kept.mean(-1).cpu())
        self.compared(x, rows, visible, kept, out)
        if x.phase == "prefill":
            self._draw(x, q, keys, rows, visible, plan, kept)

    def compared(self, x: AttnInput, rows: Tensor, visible: Tensor, kept: Tensor, out: Tensor) -> None:
        """For subclasses: called with the sampled rows `[R]`, what dense attention sees of the cache on them
        (`_visible`), their mass kept `[H, R]`, and the layer's output `[1, H, N, Dv]`."""

    # ------------------------------------------------------------------ results
    def mass_kept(self, phase: str) -> float | None:
        """Mean over layers, heads and rows; None if nothing could be compared."""
        got = [t for layer in self.mass[phase].values() for t in layer]
        return float(torch.stack(got).mean()) if got else None

    def head_maps(self) -> tuple[list[list[float]], list[list[float]]]:
        """(pairs computed / visible, mass kept), each `[layers][heads]`, of prefill."""
        layers = sorted(self.head_density)
        density = [_rounded(self.head_density[i]) for i in layers]
        mass = [_rounded(torch.stack(self.mass["prefill"][i]).mean(0)) for i in layers if i in self.mass["prefill"]]
        return density, mass

    # ------------------------------------------------------------------ pairs
    def _count(self, x: AttnInput, plan: Layout | Parts, rows: Tensor) -> Tensor | None:
        """Add up pairs; the named ones on the sampled rows as bool `[H, R, M]`, None for parts with their own keys."""
        layouts = of_entries(x, plan)
        whole = isinstance(plan, Layout) or len(layouts) == len(plan.parts)
        visible_pairs = int(Layout.dense(*x.shape, q_pos=x.layout_pos()).pairs(x.kv).sum())
        seen = visible_pairs
        if x.phase == "decode":  # evicted entries count as well
            assert x.q_pos is not None
            seen = x.q.shape[1] * int((x.q_pos + 1).sum())
        for i, (layout, kv) in enumerate(layouts):
            computed = layout.density_computed(self._tiling(x, layout, kv), kv) * visible_pairs
            self.named[x.phase].add(float(layout.pairs(kv).sum()), 0 if i else seen)
            self.computed[x.phase].add(computed, 0 if i else seen)
        if not whole:
            return None
        named = layouts[0][0].to_mask(layouts[0][1], rows=rows)[0]
        for layout, kv in layouts[1:]:
            named = named | layout.to_mask(kv, rows=rows)[0]
        return named

    def _tiling(self, x: AttnInput, layout: Layout, kv: KV) -> tuple[int, int] | None:
        sees = {s for m in self.recipe.methods if x.phase in m.observes for s in m.sees}
        want = Want(lse="lse" in sees, mass="mass" in sees, softcap=bool(x.softcap))
        module = choose(x.q, kv, layout, want, self.backend)
        self.backends[module.NAME] = None
        return module.tiling(layout)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------ mass
    def _all_keys(self, x: AttnInput) -> Tensor | None:
        """All keys this layer ever saw `[G, seen, D]` where the recipe evicts some, else None (they are all in x.kv)."""
        if not self.recipe.evicts or x.window is not None:
            return None
        if x.phase == "prefill":
            everything = x.kv.to_dense()
            self._keys[x.layer] = everything.k[0].clone()
            if self.keeps_values:
                self._values[x.layer] = everything.v[0].clone()
            return None
        assert x.q_pos is not None
        at = (x.kv.exists() & (x.kv.positions() == x.q_pos[:, :, None])).int().argmax(-1)
        new, values = x.kv.gather(at[..., None])
        self._keys[x.layer] = torch.cat([self._keys[x.layer], new[0]], 1)
        if self.keeps_values:
            self._values[x.layer] = torch.cat([self._values[x.layer], values[0]], 1)
        return self._keys[x.layer]

    def _draw(
        self, x: AttnInput, q: Tensor, keys: Tensor, rows: Tensor, visible: Tensor, plan: Layout | Parts, kept: Tensor
    ) -> None:
        done = self._computed_rows(x, plan, rows) & visible
        self.head_density[x.layer] = (done.sum((-1, -2)) / visible.sum()).cpu()
        for head in [h for layer, h in self.heads if layer == x.layer]:
            group = head // (x.q.shape[1] // keys.shape[0])
            p = _logits(q[head : head + 1], keys[group : group + 1], x).masked_fill(~visible, float("-inf")).softmax(-1)
            cells = _pool(visible[0].float())
            share = torch.where(cells > 0, _pool(done[head].float()) / cells.clamp(min=1), 0.0)
            mean = round(float(kept[head].mean()), 4)
            self.pictures.append(Picture(x.layer, head, _rounded(share), _rounded(_pool(p[0])), mean))

    def _computed_rows(self, x: AttnInput, plan: Layout | Parts, rows: Tensor) -> Tensor:
        """bool `[H, R, M]`: pairs the kernel computes, its tiling included."""
        out = torch.zeros(x.q.shape[1], len(rows), x.kv.capacity, dtype=torch.bool, device=x.device)
        for layout, kv in of_entries(x, plan):
            tiling = None if layout.full else self._tiling(x, layout, kv)
            if tiling is None:
                out |= layout.to_mask(kv, rows=rows)[0]
            else:
                blocks = layout.to_block_mask(*tiling)[0]
                out |= blocks[:, rows // tiling[0]].repeat_interleave(tiling[1], -1)[..., : x.kv.capacity]
        return out


def of_entries(x: AttnInput, plan: Layout | Parts) -> list[tuple[Layout, KV]]:
    """The layouts of a plan over the entries and queries of the call, each with the view it counts in: parts with keys or
    queries of their own are left out, but for a view of the same storage by entry number."""
    parts = (Part(plan),) if isinstance(plan, Layout) else plan.parts
    same = (p for p in parts if p.q is None and (p.kv is None or (p.kv.k is x.kv.k and p.kv.capacity == x.kv.capacity)))
    return [(p.layout, p.kv or x.kv) for p in same]


def sample_rows(n: int, seed: int) -> Tensor:
    """int64 `[min(n, GRID)]`: one random row of each stretch of n rows, the last row always."""
    count = min(n, GRID)
    edge = torch.arange(count + 1) * n // count
    where = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    rows = edge[:-1] + (where * (edge[1:] - edge[:-1])).long()
    rows[-1] = n - 1
    return rows


def _visible(x: AttnInput, rows: Tensor) -> Tensor:
    """bool `[1, R, M]`: what dense attention (in the model's own window) sees."""
    kv: KV = x.kv
    at = kv.positions()[0, 0]
    assert x.q_pos is not None
    gap = x.q_pos[0, rows][:, None] - at
    seen = (gap >= 0) if x.window is None else (gap >= 0) & (gap < x.window)
    return (seen & kv.exists()[0, 0])[None]


def _logits(q: Tensor, keys: Tensor, x: Any) -> Tensor:
    s = q.float() @ keys.float().transpose(-1, -2) * x.scale
    return x.softcap * torch.tanh(s / x.softcap) if x.softcap else s


def _lse(q: Tensor, keys: Tensor, mask: Tensor, x: AttnInput) -> Tensor:
    """Log of the summed exponentials over mask, `[H, R]`; one kv head at a time keeps the scores small."""
    g = keys.shape[0]
    out = []
    for i, (qi, mi) in enumerate(zip(q.chunk(g), mask.expand(q.shape[0], -1, -1).chunk(g), strict=True)):
        out.append(torch.logsumexp(_logits(qi, keys[i : i + 1], x).masked_fill(~mi, float("-inf")), -1))
    return torch.cat(out)


def _pool(rows: Tensor) -> Tensor:
    """Sum over key cells: `[R, M]` -> `[R, min(M, GRID)]`."""
    m = rows.shape[-1]
    cell = torch.arange(m, device=rows.device) * min(m, GRID) // m
    return torch.zeros(rows.shape[0], min(m, GRID), device=rows.device).index_add_(1, cell, rows)


def _rounded(t: Tensor) -> list[Any]:
    """Nested lists with 4 decimals: what a JSON file can bear."""
    return t.double().cpu().mul(1e4).round().div(1e4).tolist()  # type: ignore[no-any-return]
