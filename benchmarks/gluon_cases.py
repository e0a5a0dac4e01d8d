"""The cases of `gluon_run.py`, and small layouts that run the same variants of the kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from foveate import lists
from foveate.bench import workloads
from foveate.layout import Layout

B, H, G = 1, 32, 8
DEVICE = "cuda"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Random causal blocks of 128 x width, own list per head, the diagonal and the first block forced."""

    n: int
    width: int
    keep: float  # chance of a block; 1.0 lists every block
    d: int = 128

    @property
    def name(self) -> str:
        return f"{self.n // 1024}K w{self.width} d{self.d} keep {self.keep:g}"

    @property
    def full(self) -> bool:
        return self.keep == 1.0

    def params(self) -> dict[str, object]:
        return {"width": self.width}


@dataclass(frozen=True)
class Named:
    """A layout of `bench.workloads`, a rule, a factored layout or groups: tiles with columns, blocks of 64 rows, tiles of 32
    keys, sink + window, distances with columns, lists that serve 2,048 rows (`_groups`)."""

    n: int
    kind: str  # "columns", "blocks", "narrow", "rule", "factored", "groups"
    rows: int = 128
    lists: int = H  # H: own lists per head; G: one per kv head
    a: int = 96  # tiles; sink; distances
    c: int = 900  # columns; window
    density: float = 0.1
    d: int = 128
    full = False

    @property
    def name(self) -> str:
        what = {
            "columns": f"{self.a} tiles + {self.c} columns, {self.rows} rows",
            "blocks": f"{self.rows} x 64 {self.density:g}",
            "narrow": f"narrow, {self.rows} x 32 {self.density:g}",
            "groups": f"groups of {self.rows} rows, near tiles + {self.density:g} of the far keys",
            "rule": f"sink {self.a} window {self.c}",
            "factored": f"diagonals and columns, {self.a} + {self.c}, {self.rows} rows",
        }[self.kind]
        owner = "" if self.kind == "rule" else " per head" if self.lists == H else " per kv head"
        return f"{self.n // 1024}K {what}{owner} d{self.d}"

    def params(self) -> dict[str, object]:
        if self.kind == "rule":
            return {"sink": self.a, "window": self.c}
        if self.kind == "factored":
            return {"block_q": self.rows, "width": 64, "lists": self.lists, "distances": self.a, "columns": self.c}
        more = {"tiles": self.a, "columns": self.c} if self.kind == "columns" else {"keep": self.density}
        width = {"narrow": 32, "groups": 128}.get(self.kind, 64)
        return {"block_q": self.rows, "width": width, "lists": self.lists, **more}

    def layout(self) -> Layout:
        if self.kind == "rule":
            return Layout.static((B, H, self.n, self.n), sink=self.a, window=self.c, device=DEVICE)
        if self.kind == "factored":
            return self._factored()
        if self.kind == "groups":
            return self._groups()
        if self.kind == "columns":
            made = workloads.tiles_and_columns(
                self.lists, self.n, tiles=self.a, columns=self.c, block=self.rows, device=DEVICE
            )
        else:
            width = 32 if self.kind == "narrow" else 64
            made = workloads.random_blocks(
                self.lists, self.n, density=self.density, block_q=self.rows, block_k=width, device=DEVICE
            )
        return replace(made, shape=(B, H, self.n, self.n))

    def _groups(self) -> Layout:
        """As anchor_attention plans: the first block of 128 keys, those of a group's rows and the one before them, and of
        the keys between a share of `density`, drawn anew for every list."""
        gen = torch.Generator(DEVICE).manual_seed(0)
        groups, step = self.n // self.rows, self.rows // 128
        start = torch.arange(groups, device=DEVICE)[:, None]
        block = torch.arange(self.n // 128, device=DEVICE)
        near = (block < 1) | ((block >= start * step - 1) & (block < (start + 1) * step))
        tiles, count = lists.compact(near[None, None])
        key = torch.arange(self.n, device=DEVICE)
        far = (key >= 128) & (key < start * self.rows - 128)
        rows = []
        for _ in range(self.lists):
            drawn = far & (torch.rand(groups, self.n, device=DEVICE, generator=gen) < self.density)
            index, used = lists.compact(drawn[None, None])
            rows.append((lists.trim(index, used), used))
        wide = max(index.shape[-1] for index, _ in rows)
        entries = torch.cat([torch.nn.functional.pad(index, (0, wide - index.shape[-1])) for index, _ in rows], 1)
        return Layout(
            (B, H, self.n, self.n), block_q=self.rows, tile_width=128, tiles=(tiles * 128)[..., : step + 2].contiguous(),
            tile_count=count, entries=entries, entry_count=torch.cat([used for _, used in rows], 1),
        )  # fmt: skip

    def _factored(self) -> Layout:
        """The nearest 100 distances and clusters of further ones, some dense, some thin; columns anywhere."""
        gen = torch.Generator(DEVICE).manual_seed(0)
        runs, rest = 48, self.a - 100
        centre = torch.rand(1, self.lists, runs, 1, device=DEVICE, generator=gen) * self.n
        size = torch.rand(1, self.lists, runs, 1, device=DEVICE, generator=gen) * 16 * rest / runs
        step = torch.rand(1, self.lists, runs, 2 * rest // runs, device=DEVICE, generator=gen)
        far = (centre + size * step).flatten(2).clamp(max=self.n - 1)
        order = torch.rand(far.shape, device=DEVICE, generator=gen).argsort(-1)[..., :rest]
        near = torch.arange(100, device=DEVICE).expand(1, self.lists, -1)
        columns = torch.rand(1, self.lists, self.n, device=DEVICE, generator=gen).topk(self.c, -1).indices
        diagonals = torch.cat((near, far.gather(-1, order).long()), -1)
        shape = (B, H, self.n, self.n)
        return Layout.factored(shape, diagonals=diagonals, columns=columns, block_q=self.rows, validate=False)


CASES: list[Case | Named] = [
    *(Case(32768, 128, p) for p in (1.0, 0.25, 0.1, 0.05, 0.02)),
    *(Case(131072, 128, p) for p in (0.1, 0.03, 0.01)),
    *(Case(32768, 64, p) for p in (0.25, 0.1, 0.05)),
    *(Case(32768, 128, p, 64) for p in (1.0, 0.25, 0.1, 0.02)),
    Case(8192, 128, 1.0),
    Case(8192, 128, 0.25),
    *(Named(n, "columns", rows, lists) for n in (32768, 131072) for rows, lists in ((128, H), (128, G), (64, G), (64, H))),
    Named(32768, "columns", d=64),
    *(Named(32768, "blocks", rows, lists) for rows, lists in ((128, G), (64, G), (64, H))),
    *(Named(32768, "rule", a=a, c=c) for a, c in ((4, 1024), (128, 4096), (1024, 8192))),
    Named(131072, "rule", a=128, c=4096),
    *(
        Named(n, "factored", rows, a=a, c=c)
        for n in (32768, 131072)
        for a, c in ((6096, 1000), (500, 2000))
        for rows in (64, 128)
    ),
    Named(32768, "factored", 64, a=500, c=2000, d=64),
    *(Named(n, "groups", 2048, lists, density=p) for n, p in ((32768, 0.3), (131072, 0.2)) for lists in (H, G)),
    *(
        Named(n, "narrow", rows, lists, density=p)
        for n, p in ((32768, 0.2), (131072, 0.1))
        for rows, lists in ((128, H), (128, G), (64, G))
    ),
]


def small() -> list[tuple[str, int, Layout]]:
    """(kind of a case, D, a layout of a few hundred rows that runs the same variant of the kernel)."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    single = torch.rand(1, 2, 3, 333, device=DEVICE, generator=gen).topk(200, -1).indices.sort(-1).values
    made: list[tuple[str, int, Layout]] = [
        ("lists", d, Layout.dense(1, 1, n, n)) for n, d in ((128, 128), (128, 64), (300, 128))
    ]

    def blocks(rows: int, width: int, heads: int = 2) -> Layout:
        mask = torch.rand(1, 2, -(-333 // rows), -(-333 // width), device=DEVICE, generator=gen) < 0.6
        return Layout.from_block_mask(mask, 333, 333, block_q=rows, block_k=width, heads=heads)

    def both(rows: int, width: int, keys: torch.Tensor) -> Layout:
        of = blocks(rows, width)
        given = dict(block_q=rows, tile_width=width, tiles=of.tiles, tile_count=of.tile_count, entries=keys)
        return Layout.lists((1, 2, 333, 333), **given)

    for d in (128, 64):
        made += [("lists", d, blocks(128, 128)), ("lists", d, blocks(128, 64)), ("blocks", d, blocks(128, 64))]
        made += [
            ("narrow", d, blocks(128, 32)),
            ("narrow", d, blocks(64, 32, heads=4)),
            ("blocks", d, blocks(64, 64, heads=4)),
        ]
        made += [("columns", d, both(128, 64, single)), ("groups", d, both(256, 128, single[:, :, :2]))]
        made += [("rule", d, Layout.static((1, 2, 333, 333), sink=3, window=150, device=DEVICE))]
        near, far = single[:, :, 0, 190:], single[:, :, 1, ::5]
        made += [
            ("factored", d, Layout.factored((1, 2, 333, 333), diagonals=near, columns=far, block_q=rows))
            for rows in (128, 64)
        ]
    return made
