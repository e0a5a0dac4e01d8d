"""Problems every kernel is judged on: seeded, small on the CPU, larger on a GPU. Nothing here needs hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.kernels import reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from foveate.lists import repeat_heads

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    q: Tensor
    kv: KV
    layout: Layout
    softcap: float = 0.0

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[-1])

    def oracle(self) -> tuple[Tensor, Tensor]:
        """(out, lse) in fp32 from the very inputs the kernel gets."""
        kv = replace(self.kv, k=self.kv.k.float(), v=self.kv.v.float())
        out, lse, _ = reference.forward(self.q.float(), kv, self.layout, scale=self.scale, softcap=self.softcap, want=Want())
        assert lse is not None
        return out, lse

    def plain(self) -> Tensor:
        """The same attention in the inputs' own precision, as PyTorch would do it: the yardstick of rounding."""
        dtype, h = self.q.dtype, self.q.shape[1]
        flat = self.kv.to_dense()
        s = (self.q @ repeat_heads(flat.k, h).transpose(-1, -2)).float() * self.scale
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        if self.kv.bias is not None:
            s = s + repeat_heads(self.kv.bias.float(), h)[..., None, :]
        mask = self.layout.to_mask(self.kv)
        p = torch.nan_to_num(torch.softmax(s.masked_fill(~mask, float("-inf")), -1)).to(dtype)
        return p @ repeat_heads(flat.v, h).masked_fill(~mask.any(-2)[..., None], 0)

    def poisoned(self) -> Case:
        """NaN in every dense slot that no row of the kv head's queries sees."""
        if self.kv.kind != "dense":
            return self
        b, g, m, _, _ = self.kv.shape
        unseen = ~self.layout.to_mask(self.kv).any(-2).view(b, g, -1, m).any(2)[..., None]
        return replace(self, kv=replace(self.kv, k=self.kv.k.masked_fill(unseen, NAN), v=self.kv.v.masked_fill(unseen, NAN)))


class Maker:
    """Random problems of one size, dtype and device. Every draw is made on the CPU, so devices see the same numbers."""

    def __init__(self, n: int, d: int = 64, h: int = 4, g: int = 2, dtype=torch.float32, device="cpu", seed: int = 0):
        self.n, self.d, self.h, self.g, self.dtype, self.device = n, d, h, g, dtype, device
        self.gen = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.gen).to(self.device, self.dtype)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.gen).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.gen).to(self.device)

    def tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def q(self, n: int | None = None, b: int = 1) -> Tensor:
        return self.randn(b, self.h, self.n if n is None else n, self.d)

    def dense(self, m: int | None = None, b: int = 1, dv: int | None = None, **extra) -> KV:
        m = self.n if m is None else m
        return KV.dense(self.randn(b, self.g, m, self.d), self.randn(b, self.g, m, dv or self.d), **extra)

    def shape(self, n: int | None = None, m: int | None = None, b: int = 1) -> tuple[int, int, int, int]:
        n = self.n if n is None else n
        return b, self.h, n, n if m is None else m

    def blocks(
        self, density: float, block_q: int, block_k: int, *, heads: int | None = None, m=None, b=1, **extra
    ) -> Layout:
        """Random blocks; the diagonal is not forced, so rows may be empty."""
        m = self.n if m is None else m
        offset = extra.get("q_offset", 0)
        nq, nk = -(-(self.n + offset) // block_q), -(-m // block_k)
        mask = self.rand(b, heads or self.h, nq, nk) < density
        return Layout.from_block_mask(mask, self.n, m, block_q=block_q, block_k=block_k, heads=self.h, **extra)

    def sparse_rows(self, high: int, width: int, *lead: int) -> tuple[Tensor, Tensor]:
        """Ascending rows of distinct numbers below `high`, with random counts and random padding."""
        width = min(width, high)
        order = torch.stack(
            [torch.randperm(high, generator=self.gen)[:width].sort().values for _ in range(math.prod(lead))]
        ).view(*lead, width)
        count = torch.randint(0, width + 1, lead, generator=self.gen)
        # unused slots may hold anything in range
        order = torch.where(
            torch.arange(width) < count[..., None], order, torch.randint(0, high, order.shape, generator=self.gen)
        )
        return order.to(self.device, torch.int32), count.to(self.device, torch.int32)


# ---------------------------------------------------------------------- prefill
def dense(x: Maker) -> Case:
    return Case(x.q(), x.dense(), Layout.dense(*x.shape()))


def not_causal(x: Maker) -> Case:
    return Case(x.q(), x.dense(x.n + 21), Layout.dense(*x.shape(m=x.n + 21), causal=False))


def more_keys(x: Maker) -> Case:
    m = 2 * x.n + 5
    return Case(x.q(), x.dense(m), x.blocks(0.4, 32, 16, m=m))


def more_rows(x: Maker) -> Case:
    """The first rows come before the first key: empty."""
    m = x.n - 40
    return Case(x.q(), x.dense(m), Layout.static(x.shape(m=m), sink=4, window=30, device=x.device))


def static(x: Maker) -> Case:
    window = x.tensor([[30, 0, x.n, 7][: x.h]]) if x.h == 4 else 30
    return Case(x.q(), x.dense(), Layout.static(x.shape(), sink=5, window=window, device=x.device))


def static_not_causal(x: Maker) -> Case:
    return Case(x.q(), x.dense(), Layout.static(x.shape(), sink=5, window=20, causal=False, device=x.device))


def strided(x: Maker) -> Case:
    rule = Layout.static(x.shape(), sink=3, window=20, stride=3, phase=1, stride_block=16, device=x.device)
    return Case(x.q(), x.dense(), rule)


def block_lists(x: Maker) -> Case:
    return Case(x.q(), x.dense(), x.blocks(0.4, 32, 16))


def block_lists_64(x: Maker) -> Case:
    return Case(x.q(), x.dense(), x.blocks(0.5, 64, 64))


def block_lists_128(x: Maker) -> Case:
    return Case(x.q(), x.dense(), x.blocks(0.6, 128, 128))


def group_lists(x: Maker) -> Case:
    """Lists per kv head: the query heads of a group share a tile."""
    return Case(x.q(), x.dense(), x.blocks(0.4, 32, 32, heads=x.g))


def shared_list(x: Maker) -> Case:
    return Case(x.q(), x.dense(), x.blocks(0.4, 64, 32, heads=1))


def chunk(x: Maker) -> Case:
    """A chunk of a prompt that starts inside a query block."""
    m = x.n + 3 * 32 + 11
    return Case(x.q(), x.dense(m), x.blocks(0.4, 32, 16, m=m, q_offset=11))


def token_lists(x: Maker) -> Case:
    """One list per token and kv head, as trained selection emits."""
    return Case(x.q(), x.dense(), x.blocks(0.3, 1, 16, heads=x.g))


def odd_widths(x: Maker) -> Case:
    """Tiles of a width that divides nothing, at any start, some of which overlap."""
    nq = -(-x.n // 24)
    tiles, count = x.sparse_rows(x.n - 8, 6, 1, x.h, nq)
    return Case(x.q(), x.dense(), Layout.lists(x.shape(), block_q=24, tile_width=13, tiles=tiles, tile_count=count))


def tiles_and_entries(x: Maker) -> Case:
    nq = -(-x.n // 32)
    tiles, count = x.sparse_rows(x.n - 8, 4, 1, x.h, nq)
    entries, used = x.sparse_rows(x.n, 50, 1, x.g, nq)
    layout = Layout.lists(
        x.shape(), block_q=32, tile_width=16, tiles=tiles, tile_count=count, entries=entries, entry_count=used
    )
    return Case(x.q(), x.dense(), layout)


def lists_and_rule(x: Maker) -> Case:
    """Lists that name keys of the sink and of the window too: those count once."""
    case = tiles_and_entries(x)
    return replace(case, layout=replace(case.layout, sink=x.tensor([[6]]), window=x.tensor([[21]])))


def factored(x: Maker) -> Case:
    layout = Layout.factored(
        x.shape(), diagonals=x.randint(x.n, 1, x.h, 5), columns=x.randint(x.n, 1, x.g, 40), block_q=32, tile_width=16
    )
    return Case(x.q(), x.dense(), layout)


def factored_overlapping(x: Maker) -> Case:
    """Tiles wider than a block: those of a run overshoot into the next."""
    layout = Layout.factored(
        x.shape(), diagonals=x.randint(x.n, 1, x.h, 5), columns=x.randint(x.n, 1, 1, 40), block_q=16, tile_width=64
    )
    return Case(x.q(), x.dense(), replace(layout, sink=x.tensor([[6]]), window=x.tensor([[9]])))


def by_head(x: Maker) -> Case:
    """Heads of different kinds in one layout, one of them dense."""
    mask = torch.arange(x.h, device=x.device) % 2 == 0
    fact = Layout.factored(
        x.shape(), diagonals=x.randint(x.n, 1, 1, 4), columns=x.randint(x.n, 1, 1, 20), block_q=32, tile_width=16
    )
    dense_too = torch.arange(x.h, device=x.device) == 1
    return Case(
        x.q(),
        x.dense(),
        Layout.by_head(dense_too, Layout.dense(*x.shape()), Layout.by_head(mask, x.blocks(0.4, 32, 16), fact)),
    )


def empty_rows(x: Maker) -> Case:
    layout = x.blocks(0.3, 32, 16)
    count = layout.tile_count.clone()
    count[:, :, ::2] = 0
    return Case(x.q(), x.dense(), replace(layout, tile_count=count))


def one_row_owns_all(x: Maker) -> Case:
    layout = x.blocks(1.0, 32, 16)
    count = torch.zeros_like(layout.tile_count)
    count[:, :, -1] = layout.tile_count[:, :, -1]
    return Case(x.q(), x.dense(), replace(layout, tile_count=count))


def popular_block(x: Maker) -> Case:
    """One key block that every row lists, and nothing else."""
    nq = -(-x.n // 32)
    tiles = torch.full((1, 1, nq, 1), 16, dtype=torch.int32, device=x.device)
    return Case(x.q(), x.dense(), Layout.lists(x.shape(), block_q=32, tile_width=16, tiles=tiles))


def batch(x: Maker) -> Case:
    """Rows of different length, NaN beyond them, lists shared by the batch, positions of queries given."""
    m = x.n + 9
    length = x.tensor([[m] * x.g, [x.n - 20] * x.g])
    kv = x.dense(m, b=2)
    dead = (torch.arange(m, device=x.device) >= length[..., None])[..., None]
    kv = KV.dense(kv.k.masked_fill(dead, NAN), kv.v.masked_fill(dead, NAN), len=length)
    q_pos = torch.arange(x.n, device=x.device) + x.tensor([[m - x.n], [-20]])
    layout = replace(x.blocks(0.5, 32, 16, m=m), shape=x.shape(m=m, b=2), q_pos=q_pos, sink=x.tensor([[2]]))
    return Case(x.q(b=2), kv, layout)


def lengths_without_positions(x: Maker) -> Case:
    """Without q_pos the queries are the last rows before each kv head's own length."""
    length = x.tensor([[x.n - 7 * i for i in range(x.g)]])
    kv = x.dense()
    return Case(x.q(), KV.dense(kv.k, kv.v, len=length), Layout.static(x.shape(), sink=3, window=40, device=x.device))


def positions(x: Maker) -> Case:
    """An evicted cache: entries stand for scattered positions, in no order; a rule and lists over them."""
    m = x.n
    pos = torch.stack([torch.randperm(2 * m, generator=x.gen)[:m] for _ in range(x.g)])[None].to(x.device)
    kv = x.dense(pos=pos)
    q_pos = torch.arange(x.n, device=x.device)[None] + m
    layout = replace(x.blocks(0.4, 32, 16), q_pos=q_pos, sink=x.tensor([[40]]), window=x.tensor([[50]]))
    return Case(x.q(), kv, layout)


def bias(x: Maker) -> Case:
    weight = x.rand(1, x.g, x.n) * 4 - 2
    weight[..., ::5] = float("-inf")
    kv = x.dense()
    kv = KV.dense(kv.k, kv.v.masked_fill((weight == float("-inf"))[..., None], NAN), bias=weight)
    return Case(x.q(), kv, x.blocks(0.6, 32, 16))


def softcap(x: Maker) -> Case:
    return replace(block_lists(x), softcap=2.0)


def other_value_dim(x: Maker) -> Case:
    return Case(x.q(), x.dense(dv=48), x.blocks(0.5, 32, 16))


def strides(x: Maker) -> Case:
    """Storage as models hand it over: heads inside rows, a view into a larger buffer."""
    q = x.randn(1, x.n, x.h, x.d).transpose(1, 2)
    kv = KV.dense(x.randn(1, x.n, x.g, x.d).transpose(1, 2), x.randn(1, x.g, x.n + 30, x.d)[:, :, : x.n])
    return Case(q, kv, x.blocks(0.5, 32, 16))


# ---------------------------------------------------------------------- storages and decode
def storage(x: Maker, kind: str, m: int, length: Tensor) -> KV:
    """Random entries in one storage; slots that belong to nobody or lie beyond a length hold NaN."""
    b = length.shape[0]
    if kind == "dense":
        kv = x.dense(m, b=b)
        dead = (torch.arange(m, device=x.device) >= length[..., None])[..., None]
        return KV.dense(kv.k.masked_fill(dead, NAN), kv.v.masked_fill(dead, NAN), len=length)
    live = length.flatten().tolist()
    if kind == "ragged":
        gap = 5
        starts = [sum(live[:i]) + gap * (i + 1) for i in range(len(live))]
        flat = torch.full((sum(live) + gap * (len(live) + 1), x.d), NAN, dtype=x.dtype, device=x.device)
        k, v = flat.clone(), flat
        for at, n in zip(starts, live, strict=True):
            k[at : at + n], v[at : at + n] = x.randn(n, x.d), x.randn(n, x.d)
        return KV.ragged(k, v, torch.tensor(starts, device=x.device).view(b, x.g), length, m)
    page = 16
    per = -(-m // page)
    pool = torch.full((len(live) * per + 3, page, x.d), NAN, dtype=x.dtype, device=x.device)
    k, v = pool.clone(), pool
    table = torch.randperm(len(pool), generator=x.gen)[: len(live) * per].to(x.device, torch.int32).view(b, x.g, per)
    for row, n in zip(table.view(-1, per).tolist(), live, strict=True):
        for i in range(-(-n // page)):
            c = min(page, n - i * page)
            k[row[i], :c], v[row[i], :c] = x.randn(c, x.d), x.randn(c, x.d)
    return KV.paged(k, v, table, length)


def _decode_lengths(x: Maker) -> Tensor:
    return x.tensor([[x.n - 3 * i - 11 * j for j in range(x.g)] for i in range(2)])


def decode(kind: str, what: str) -> Callable[[Maker], Case]:
    def make(x: Maker) -> Case:
        length = _decode_lengths(x)
        kv = storage(x, kind, x.n, length)
        m = kv.capacity
        shape = (2, x.h, 1, m)
        if what == "full":
            layout = Layout.dense(*shape)
        elif what == "rule":
            layout = Layout.static(shape, sink=4, window=30, device=x.device)
        else:
            heads = x.g if what == "pages" else x.h
            tiles, count = x.sparse_rows(-(-m // 16) - 1, 4, 2, heads, 1)
            layout = Layout(
                shape, block_q=1, tile_width=16, tiles=tiles * 16, tile_count=count,
                sink=x.tensor([[4]]), window=x.tensor([[21]]),
            )  # fmt: skip
            if what == "heads":  # single entries per query head, between the tiles
                entries, used = x.sparse_rows(m, 9, 2, heads, 1)
                layout = Layout.lists(
                    shape, block_q=1, tile_width=16, tiles=tiles * 16, tile_count=count, entries=entries, entry_count=used
                )
        return Case(x.q(1, b=2), kv, layout)

    make.__name__ = f"decode_{kind}_{what}"
    return make


def prefill_paged(x: Maker) -> Case:
    length = x.tensor([[x.n] * x.g])
    kv = storage(x, "paged", x.n, length)
    return Case(x.q(20), kv, Layout.static((1, x.h, 20, kv.capacity), sink=4, window=40, device=x.device))


PREFILL = [
    dense, not_causal, more_keys, more_rows, static, static_not_causal, strided, block_lists, block_lists_64,
    block_lists_128, group_lists, shared_list, chunk, token_lists, odd_widths, tiles_and_entries, lists_and_rule, factored,
    factored_overlapping, by_head, empty_rows, one_row_owns_all, popular_block, batch, lengths_without_positions,
    positions, bias, softcap, other_value_dim, strides, prefill_paged,
]  # fmt: skip
DECODE = [decode(k, w) for k in ("dense", "paged", "ragged") for w in ("full", "rule", "pages", "heads")]
ALL = [*PREFILL, *DECODE]


def check(module, case: Case, dtype: torch.dtype) -> None:
    """Run `module` on a case with poisoned results and hold it to the oracle.

    fp32 is held to 2e-5; half precisions to twice the error of PyTorch's own computation in that precision.
    """
    want, want_lse = case.oracle()
    with poison():
        out, lse, _ = module.forward(
            case.q, case.kv, case.layout, scale=case.scale, softcap=case.softcap, want=Want(lse=True)
        )
    assert out.dtype == dtype and out.shape == want.shape and lse.shape == want_lse.shape
    assert bool(torch.isfinite(out).all()), "an output was not written, or NaN reached it"
    dead = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), dead) and bool((out[dead] == 0).all())
    slack = 2e-5 if dtype == torch.float32 else 2 * float((case.plain().float() - want).abs().max()) + 1e-5
    assert float((out.float() - want).abs().max()) <= slack
    torch.testing.assert_close(lse[~dead], want_lse[~dead], atol=2e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


class poison:
    """Fill what torch.empty returns with NaN, on any device."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]
