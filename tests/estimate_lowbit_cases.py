"""Problems for the kernels of 4-bit logits, anchors and stripes, on any device; the plain code of `scores/` judges."""

from __future__ import annotations

import torch

from foveate import lists
from foveate.kernels.triton import estimate_lowbit_launch as low
from foveate.kernels.triton import estimate_stripes_launch as far
from foveate.kv import KV
from foveate.scores import lowbit, stripes
from foveate.scores.lowbit import Grid, anchor_lse, key_peaks, low_bit, relative_blocks
from tests.estimate_cases import draw, plain


def keys_of(b, g, m, d, **kw):
    """Keys `[B, G, m, D]` with outliers, inside a longer tensor with the strides of a model."""
    k = draw(b, m + 3, g, d, seed=1, **kw).transpose(1, 2)[:, :, :m]
    k[:, :, m // 2] *= 5
    k[..., d // 3] += 3
    return k


def same(got, count, want, many, slack=0):
    """Equal lists `[..., width]` of any two widths, but for `slack` rows that differ."""
    assert got.dtype == want.dtype == torch.int32 and count.dtype == many.dtype == torch.int32
    wide = max(got.shape[-1], want.shape[-1])
    used = torch.arange(wide, device=got.device) < many[..., None]
    got, want = (torch.nn.functional.pad(t, (0, wide - t.shape[-1])) for t in (got, want))
    rows = (count != many) | ((got != want) & used).any(-1)
    assert int(rows.sum()) <= slack, (int(rows.sum()), rows.nonzero()[:5])
    assert bool((got >= 0).all())


# ---------------------------------------------------------------------- 4-bit logits
def check_keys(g, r, m, d, share, bits, dtype=torch.float32, device="cpu"):
    """Integer keys are those of `low_bit`, number by number, for the same centre; zeros beyond."""
    k, mean = keys_of(1, g, m, d, dtype=dtype, device=device)[0], draw(g * r, d, device=device)
    centre = k.float().mean(1)
    k[0, 5] = centre[0].to(dtype)  # a key without length, or nearly
    x = k.float() - centre[:, None]
    peak = key_peaks(x, share)
    got = low.quantised(k, centre, mean, scale=0.3, share=share, bits=bits)
    step = got.steps[:, :m]
    torch.testing.assert_close((got.ints[:, :m, :d] * step[..., None]), low_bit(x, peak, bits), atol=0, rtol=1e-6)
    extra = got.extra.unflatten(0, (g, r))[..., :m] * step[:, None]
    want = 0.3 * mean.double().unflatten(0, (g, r)) @ x.double().transpose(-1, -2)
    torch.testing.assert_close(extra.double(), want, atol=1e-4, rtol=1e-4)
    assert int(got.ints[:, m:].abs().sum() + got.ints[..., d:].abs().sum()) == 0 and float(got.extra[:, m:].abs().sum()) == 0
    if bits <= 4:  # numbers that e4m3 holds
        other = low.quantised(k, centre, mean, scale=0.3, share=share, bits=bits, dtype=torch.float8_e4m3fn)
        assert torch.equal(other.ints.float(), got.ints.float()) and torch.equal(other.extra, got.extra)


def check_sums(h, g, m, start, d, grid, *, softcap=None, tolerance, dtype=torch.float32, device="cpu"):
    """The mass of sink and local keys against fp64."""
    q, k = draw(h, m - start, d, dtype=dtype, device=device), keys_of(1, g, m, d, dtype=dtype, device=device)[0]
    first, bq, scale = start // grid.block_q, grid.block_q, d**-0.5
    centre = k.float().mean(1)
    sizes = (bq, grid.sink, grid.window, grid.segment)
    got = low.local_sums(q, k, None if softcap else centre, sizes, start=start, scale=scale, softcap=softcap)
    nq = (m - 1) // bq - first + 1
    rows = torch.zeros(h, nq * bq, d, dtype=torch.float64, device=device)
    rows[:, start - first * bq :][:, : m - start] = q.double()
    keys = k.double() if softcap else k.double() - centre[:, None].double()
    block = torch.arange(first, first + nq, device=device)
    want = anchor_lse(rows.unflatten(0, (g, -1)), keys, block, grid, scale, softcap).flatten(-2).flatten(0, 1)
    there = slice(start - first * bq, m - first * bq)
    torch.testing.assert_close(got[:, there].double(), want[:, there], atol=tolerance, rtol=tolerance)
    assert bool(torch.isfinite(got).all())


def check_blocks(h, g, m, start, d, grid, tau, *, slack=0, softcap=None, dtype=torch.float32, device="cpu", **kw):
    """Lists of `relative_blocks` against the plain code on the same numbers in fp32. Returns the share of free ones kept."""
    q, k = draw(1, h, m, d, dtype=dtype, device=device), keys_of(1, g, m, d, dtype=dtype, device=device)
    q = q + 0.7 * k[:, :, m // 3].repeat_interleave(h // g, 1)[:, :, None]
    log_tau = torch.linspace(0.5, 1.5, h, device=device).mul(tau).log()
    args = dict(start=start, scale=d**-0.5, softcap=softcap) | kw
    assert low.selects(q, k, grid.block_q, grid.block_k, kw.get("share", "fragment"))
    got = relative_blocks(q[:, :, start:], KV.dense(k, k), log_tau, grid, **args)
    with plain():
        q, k = q.float(), k.float()
        want = relative_blocks(q[:, :, start:], KV.dense(k, k), log_tau, grid, **args)
        least = relative_blocks(q[:, :, start:], KV.dense(k, k), log_tau + 60, grid, **args)[1].sum()
        most = relative_blocks(q[:, :, start:], KV.dense(k, k), log_tau - 60, grid, **args)[1].sum()
    same(*got, *want, slack)
    return float((want[1].sum() - least) / (most - least))


def check_limit(block_bits, m, device="cpu"):
    """Sums of 128 products of levels up to 7, all of one sign or nearly: as large as they get, and bars half-way between two
    of them that follow each other. Each block has one row that asks. Returns the share of bits."""
    gen = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (128,), generator=gen) * 2 - 1
    q, k = (sign * (7 - (torch.rand(2, m, 128, generator=gen) < 0.08).int())).float()
    q[:, 0], k[:, 0] = 7 * sign[0], 7 * sign[0]  # the peak: a step is 1
    k[::3] *= -1
    sums = (q.double() @ k.double().T)[::16]  # of the rows that ask
    bar = torch.full((1, m), lowbit.BIG)
    place = torch.arange(0, m, 16) // 32 * 32  # where the local region of a block of 16 rows begins
    most = [row[: max(int(end), 1)].max() for row, end in zip(sums, place, strict=True)]
    bar[0, ::16] = torch.stack(most) - torch.randint(-1, 3, (len(most),), generator=gen) - 0.5
    words = torch.zeros(1, m // 16, -(-m // 1024), dtype=torch.int32, device=device)
    some, mean = (t[None].to(device) for t in (q, torch.zeros(128)))
    how = dict(start=0, scale=1.0, share="fragment", bits=4)
    block_bits(some, k[None].to(device), None, mean, bar.to(device), words, (16, 0, 0, 32), 32, **how)
    got = (words[0, ..., None].cpu().long() >> torch.arange(32) & 1).flatten(-2)[:, : m // 32]
    want = (sums > bar[0, ::16, None]).unflatten(-1, (-1, 32)).any(-1)
    free = torch.arange(0, m, 32) < place[:, None]
    assert torch.equal(got[free] != 0, want[free])
    assert float(sums.abs().max()) > 6100
    return float(want[free].double().mean())


def check_lists(b, h, groups, rows, places, unit, device="cpu", seed=0):
    """Words to lists against masks."""
    gen = torch.Generator().manual_seed(seed)
    hit = (torch.rand(b, h, rows, -(-places // 32) * 32, generator=gen) < 0.3).to(device)
    hit[:, :, 0] = False
    bit = torch.ones(32, dtype=torch.int64, device=device) << torch.arange(32, device=device)
    words = (hit.unflatten(-1, (-1, 32)) * bit).sum(-1)
    words = (words - (words >= 2**31) * 2**32).int()
    spans = torch.randint(0, places + 1, (rows, 3), generator=gen).sort(-1).values.int().to(device)
    spans[0] = torch.tensor([0, places // 2, places // 2])  # nothing at all
    spans[-1] = torch.tensor([0, 0, places])  # everything
    j, (sure, free, end) = torch.arange(places, device=device), spans[..., None].unbind(1)
    keep = ((j < sure) | (hit[..., :places] & (j < free)) | (j >= free)) & (j < end)
    for hl in (h, groups):
        want, many = lists.compact(keep.unflatten(1, (hl, -1)).any(2))
        got, count = low.bit_lists(words, spans, hl, places, unit)
        same(got, count, want * unit, many)
        last = got.gather(-1, (count[..., None].long() - 1).clamp(min=0))
        rest = torch.arange(got.shape[-1], device=device) >= count[..., None]
        assert bool((~rest | (got == torch.where(count[..., None] > 0, last, 0))).all())  # padded with the row's last
    return got.shape[-1]


# ---------------------------------------------------------------------- anchors and stripes
def stripe_problem(b, h, g, m, start, d, dtype, device):
    q, k = draw(b, m, h, d, dtype=dtype, device=device).transpose(1, 2), keys_of(b, g, m, d, dtype=dtype, device=device)
    for i in range(2, 6):
        q = q + (1.2 - 0.1 * i) * k[:, :, m // i].repeat_interleave(h // g, 1)[:, :, None]
    return q[:, :, start:], k


def check_anchors(b, h, g, m, start, d, *, tolerance, dtype=torch.float32, device="cpu", **grid):
    q, k = stripe_problem(b, h, g, m, start, d, dtype, device)
    grid = dict(start=start, scale=d**-0.5) | grid
    assert far.finds(grid["block"], grid["step"], k)
    got = stripes.anchors(q, KV.dense(k, k), **grid)
    with plain():
        want = stripes.anchors(q.double(), KV.dense(k.double(), k.double()), **grid)
    assert got.dtype == torch.float32 and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def check_stripes(b, h, g, m, start, d, *, slack=0, dtype=torch.float32, device="cpu", **grid):
    """Lists of stripes against the plain code in fp32; limits at which a part of the keys is in. Returns how many are.

    Half-precision means are rounded before their product, as the plain code rounds them in that precision.
    """
    q, k = stripe_problem(b, h, g, m, start, d, dtype, device)
    grid = dict(start=start, scale=d**-0.5) | grid
    nq = (m - 1) // grid["block"] - start // grid["block"] + 1
    limit = 1 + 0.5 * draw(b, h, nq, seed=5, device=device)
    limit[0, 0, 0], limit[0, -1, -1] = float("inf"), float("-inf")
    total = 0
    for group in (False, True):
        got = stripes.stripes(q, KV.dense(k, k), limit, group=group, **grid)
        with plain():
            want = stripes.stripes(q.float(), KV.dense(k.float(), k.float()), limit, group=group, **grid)
        same(*got, *want, slack)
        total += int(want[1].sum())
    return total


__all__ = ["Grid", "far", "low", "lowbit"]
