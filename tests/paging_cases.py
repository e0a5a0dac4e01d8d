"""Problems for the decode kernels over pages, on any device; judged by `select`, `Bounds` and the oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

import foveate
from foveate.cache.dense import DenseStore
from foveate.cache.fixed import FixedDense
from foveate.kernels.triton import paging_launch as kernels
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, State
from foveate.methods.quest import Quest
from foveate.scores.bounds import Bounds
from foveate.select import top_indices
from tests.kernel_cases import poison

NAN = float("nan")
SIZES = [(1, 16, 64), (3, 16, 64), (4, 64, 64), (8, 16, 128), (4, 16, 128), (2, 32, 96)]  # query heads a group, page, D


def problem(r=4, d=64, lens=((150, 150), (7, 7)), kind="dense", dtype=torch.float32, device="cpu", seed=0, g=2, spare=37):
    """q `[B, H, 1, D]` and a view of rows with these lengths (None: 150 everywhere), NaN in every unused slot."""
    gen = torch.Generator().manual_seed(seed)
    b = 2 if lens is None else len(lens)
    m = 150 if lens is None else max(max(row) for row in lens) + spare
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(dtype)  # noqa: E731
    q, k, v = draw(b, g * r, 1, d), draw(b, g, m, d), draw(b, g, m, d)
    if lens is None:
        return q.to(device), KV.dense(k.to(device), v.to(device))
    length = torch.tensor(lens, dtype=torch.int32)
    dead = (torch.arange(m) >= length[..., None])[..., None]
    k, v = k.masked_fill(dead, NAN), v.masked_fill(dead, NAN)
    if kind == "dense":
        return q.to(device), KV.dense(k.to(device), v.to(device), len=length.to(device))
    page = 64  # of the pool, whatever the pages of the bounds
    n = -(-m // page)
    table = torch.randperm(b * g * n, generator=gen).view(b, g, n).int()
    pools = []
    for t in (k, v):
        pool = torch.full((b * g * n, page, d), NAN, dtype=dtype)
        whole = torch.nn.functional.pad(t, (0, 0, 0, n * page - m), value=NAN)
        pool[table.flatten().long()] = whole.view(b * g * n, page, d)
        pools.append(pool.to(device))
    return q.to(device), KV.paged(*pools, table.to(device), length.to(device))


def plain(kv: KV, page: int) -> Bounds:
    """Bounds by the plain code of `scores/bounds.py`, kernels aside."""
    out = Bounds(page)
    out._steady = lambda kv: None  # type: ignore[method-assign]
    out.update(kv)
    return out


def live_pages(kv: KV, page: int):
    return torch.arange(-(-kv.capacity // page), device=kv.device) * page < kv.lengths()[..., None]


def check_score(q, kv, page, tolerance):
    bounds, r = plain(kv, page), q.shape[1] // kv.shape[1]
    live = live_pages(kv, page)
    data = bounds.data.clone()
    data[:, :, : live.shape[2]][~live] = NAN  # what unused pages hold must not reach others
    want = bounds.data.float(), q.float()
    exact = Bounds(page)
    exact.data, exact.done = want[0], kv.capacity
    want = exact.score(want[1])
    for group in (True, False):
        got = kernels.score(q, data, live.shape[2], page, kv.len, group=group)
        expect = want.amax(2) if group else want.flatten(1, 2)
        mask = live if group else live.repeat_interleave(r, 1)
        assert got.shape == expect.shape and got.dtype == torch.float32
        torch.testing.assert_close(got[mask], expect[mask], atol=tolerance, rtol=1e-5)


def check_select(score, keep, width, length):
    """The kernel's choice is `top_indices` of the same scores with the newest page forced, index by index."""
    pages = score.shape[-1]
    number = torch.arange(pages, device=score.device)
    if length is None:
        want, count = top_indices(score, keep, forced=number == pages - 1)
    else:
        last = ((length.long() - 1) // width).repeat_interleave(score.shape[1] // length.shape[1], 1)[..., None]
        want, count = top_indices(score, keep, valid=number <= last, forced=number == last)
    tiles, got = kernels.select(score, keep, width, length)
    assert torch.equal(got, count) and torch.equal(tiles, want * width)


def random_tiles(kv: KV, heads: int, width: int, keep: int, seed: int, overlap: bool = False):
    """Ascending tiles within each row's length, counts that differ, junk beyond them."""
    gen = torch.Generator().manual_seed(seed)
    b, g, m, _, _ = kv.shape
    length = kv.lengths().cpu()
    tiles, count = torch.full((b, heads, 1, keep), 2**28, dtype=torch.int32), torch.zeros(b, heads, 1, dtype=torch.int32)
    for i in range(b):
        for h in range(heads):
            n = int(length[i, h * g // heads])
            starts = torch.arange(0, n, width)
            if overlap:
                starts = starts + torch.randint(0, width, (len(starts),), generator=gen)
            pick = torch.randperm(len(starts), generator=gen)[:keep].sort().values
            pick = pick[: int(torch.randint(1, len(pick) + 1, (1,), generator=gen))] if (i + h) % 3 else pick
            tiles[i, h, 0, : len(pick)], count[i, h, 0] = starts[pick].int(), len(pick)
    return tiles.to(kv.device), count.to(kv.device)


def listed(q, kv, tiles, count, width):
    """Tiles of this width, or single entries."""
    shape = (*q.shape[:2], 1, kv.capacity)
    if width == 1:
        return Layout(shape, entries=tiles, entry_count=count)
    return Layout(shape, tile_width=width, tiles=tiles, tile_count=count)


def check_attend(q, kv, tiles, count, width, tolerance):
    """The short way equals the oracle on the same lists, in fp32; returns (out, lse)."""
    d, layout = q.shape[-1], listed(q, kv, tiles, count, width)
    assert kernels.serves(q, kv, layout, 0.0)
    exact = replace(kv, k=kv.k.float(), v=kv.v.float())
    want, want_lse = foveate.attend(q.float(), exact, layout, backend="reference", return_lse=True)
    with poison():  # torch.empty holds NaN
        out, lse = kernels.attend(q, kv, layout, 1 / math.sqrt(d), True)
    dead = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), dead)
    torch.testing.assert_close(lse[~dead], want_lse[~dead], atol=max(2e-5, tolerance), rtol=1e-5)
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=0)
    return out, lse


def random_entries(kv, heads, n, seed, rows=None):
    """n different entries below each row's length, ascending, or all of a shorter row, padded with the last of them;
    `rows` 1 for lists that the rows of the batch share."""
    gen = torch.Generator().manual_seed(seed)
    b, g = kv.shape[:2]
    entries = torch.empty(rows or b, heads, 1, n, dtype=torch.int32)
    count = torch.empty(rows or b, heads, 1, dtype=torch.int32)
    for i in range(rows or b):
        for j in range(heads):
            first = j * g // heads  # a list of several kv heads goes up to the shortest of them
            lengths = (
                kv.lengths().cpu().reshape(b, g)[(slice(None) if rows else i), first : max(first + 1, (j + 1) * g // heads)]
            )
            size = int(lengths.min())
            some = torch.randperm(size, generator=gen)[:n].sort().values
            entries[i, j, 0], entries[i, j, 0, : len(some)], count[i, j, 0] = some[-1], some, len(some)
    return entries.to(kv.k.device), count.to(kv.k.device)


def check_quest(q, kv, page, budget, tolerance, share):
    """A planned step through `Quest` and `attend` equals the oracle on the layout it reports; pages are the plain code's."""
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), q_pos=kv.lengths().amax(1)[:, None] - 1)
    layout = Quest(page=page, budget=budget, share=share).plan(x, State())
    assert layout is not None
    bounds = Bounds(page)
    bounds.data, bounds.done = plain(kv, page).data.float(), kv.capacity
    score = bounds.score(q.float())
    score = score.amax(2) if share == "group" else score.flatten(1, 2)
    number = torch.arange(score.shape[-1], device=q.device)
    last = ((kv.lengths() - 1) // page).repeat_interleave(score.shape[1] // kv.shape[1], 1)[..., None]
    want, count = top_indices(score, budget // page, valid=number <= last, forced=number == last)
    assert torch.equal(layout.tiles[:, :, 0], want * page) and torch.equal(layout.tile_count[:, :, 0], count)
    check_attend(q, kv, layout.tiles, layout.tile_count, page, tolerance)
    return layout


# ---------------------------------------------------------------------- a token into a fixed store
def stores(page, d, dv, dtype, device="cpu", size=200):
    """(a fixed store with bounds beside it, the same without kernels, bounds, a function that makes n keys and values)."""
    gen = torch.Generator().manual_seed(page)
    draw = lambda n: [torch.randn(2, 2, n, w, generator=gen).to(device, dtype) for w in (d, dv)]  # noqa: E731
    k, v = draw(40)
    valid = torch.tensor([[True] * 40, [False] * 23 + [True] * 17], device=device)
    first = DenseStore.empty(k, v).append(k, v, valid, [0, 0])
    ours, other = (FixedDense(first.fork(), [40, 17], size) for _ in range(2))
    other._kernels = lambda n: None  # type: ignore[method-assign]
    ours.k[:, :, 40:], ours.v[:, :, 40:] = NAN, NAN
    bounds = Bounds(page)
    bounds.update(ours.view())
    ours.beside = bounds
    return ours, other, bounds, draw


def same(ours, other, bounds):
    """Equal stores, and bounds that are those of the keys."""
    a, b = ours.view(), other.view()
    assert torch.equal(a.len, b.len) and torch.equal(ours.seen_now, other.seen_now) and ours.count == other.count
    for i, n in enumerate(ours.count):
        assert torch.equal(a.k[i, :, :n], b.k[i, :, :n]) and torch.equal(a.v[i, :, :n], b.v[i, :, :n])
    bounds.update(a)
    live, want = live_pages(a, bounds.page), plain(a, bounds.page).data
    assert torch.equal(bounds.data[:, :, : live.shape[2]][live], want[:, :, : live.shape[2]][live])
    assert torch.equal(bounds.len, a.len)


def step(ours, other, k, v):
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves it
    assert ours.append(strided, v, None, [0, 0]) is ours and other.append(k, v, None, [0, 0]) is other


def check_append(page, d, dv, dtype, steps, device="cpu"):
    ours, other, bounds, draw = stores(page, d, dv, dtype, device)
    launched = []
    bounds._steady = lambda kv: launched.append(kv)  # type: ignore[method-assign]
    for _ in range(steps):
        step(ours, other, *draw(1))
        same(ours, other, bounds)
    assert not launched  # the append had brought them up to date


def check_changes(page, device="cpu"):
    """Forks, rollbacks, reordered rows and steps whose bounds nobody read, between fused appends."""
    ours, other, bounds, draw = stores(page, 32, 32, torch.float32, device)
    for _ in range(5):
        step(ours, other, *draw(1))
    same(ours, other, bounds)
    view, lengths = ours.view(), ours.view().len.clone()
    step(ours, other, *draw(1))
    assert torch.equal(view.len, lengths)  # a view stays what it was
    for store in (ours, other):
        store.truncate(20)  # over the edge of a page
    bounds.truncate(20)
    same(ours, other, bounds)
    step(ours, other, *draw(1))
    same(ours, other, bounds)
    index = torch.tensor([1, 0], device=device)
    for store in (ours, other):
        store.reorder(index.cpu())
    bounds.reorder(index)
    step(ours, other, *draw(1))
    same(ours, other, bounds)
    copy, held = ours.fork(), bounds.fork()
    step(ours, other, *draw(1))  # the copy does not see it
    same(ours, other, bounds)
    assert all(not bool(copy.k[i, :, :n].isnan().any()) for i, n in enumerate(copy.count)) and copy.count != ours.count
    held.update(copy.view())
    live, want = live_pages(copy.view(), page), plain(copy.view(), page).data
    assert torch.equal(held.data[:, :, : live.shape[2]][live], want[:, :, : live.shape[2]][live])
    ours.replayed(), other.replayed()  # a graph wrote a token: what the host held of lengths is old
    for store in (ours, other):
        store.now += 1
        store.seen_now += 1
    k, v = draw(1)
    for store in (ours, other):
        at = (store.now - 1).long()[..., None, None].expand_as(k)
        store.k.scatter_(2, at, k), store.v.scatter_(2, at, v)
    same(ours, other, bounds)
    counted, ours._said = (
        ours.counted(),
        torch.full_like(ours.now, -7),
    )  # a capture that failed: never written
    ours.recount(counted)
    same(ours, other, bounds)
    ours.stays = other.stays = True
    for read in (False, True):  # several tokens in place, over the edge of a page; bounds are read behind them or not
        more, lens = draw(page + 5), ours.lens
        assert ours.append(*more, None, [0, 0]) is ours and other.append(*more, None, [0, 0]) is other
        assert ours.lens == [[n + page + 5 for n in row] for row in lens]
        if read:
            same(ours, other, bounds)
        step(ours, other, *draw(1))
        same(ours, other, bounds)
        for thing in (ours, other, bounds):
            thing.truncate(page + 2)
        step(ours, other, *draw(1))
        step(ours, other, *draw(1))
        same(ours, other, bounds)
