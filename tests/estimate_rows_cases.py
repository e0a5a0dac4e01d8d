"""Problems for the kernels of antidiagonals and lists of rows, on any device; the plain code of `scores/` judges."""

from __future__ import annotations

import torch

from foveate import lists
from foveate.kernels.triton import estimate_rows_launch as kernels
from foveate.kv import KV
from foveate.scores import antidiagonal, pooled, similarity
from foveate.select import top_k, top_p
from tests.estimate_cases import draw, plain


def collect(q, k, stride, block, start, **kw):
    """All pieces of `block_mass` put together: `[B, H, nq, nk]`."""
    (b, h), g, nk = q.shape[:2], k.shape[1], -(-(start + q.shape[2]) // block)
    out = torch.full((b, g, h // g, nk - start // block, nk), float("nan"), device=q.device, dtype=torch.float64)
    count = 0
    for g0, g1, lo, hi, mass in antidiagonal.block_mass(q, KV.dense(k, k), stride, block, start=start, **kw):
        out[:, g0:g1, :, lo:hi] = 0
        out[:, g0:g1, :, lo:hi, : mass.shape[-1]] = mass.double()
        count += 1
    return out.flatten(1, 2), count


def check_mass(
    b, h, g, m, start, d, stride, block, *, tolerance, softcap=None, dtype=torch.float32, device="cpu", budget=None
):
    """Antidiagonal mass against fp64; `m` keys, and one that lies beyond the last row. Returns the number of pieces."""
    q, k = draw(b, h, m, d, dtype=dtype, device=device), draw(b, g, m + 1, d, seed=1, dtype=dtype, device=device)
    for i in range(3):  # columns and lines, so that blocks differ
        q = q + (1.0 - 0.2 * i) * k[:, :, m // (i + 2)].repeat_interleave(h // g, 1)[:, :, None]
    q = q.transpose(1, 2).contiguous().transpose(1, 2)[:, :, start:]  # strides of a model
    kw = dict(scale=4 * d**-0.5, softcap=softcap)
    got, pieces = collect(q, k, stride, block, start, budget=budget, **kw)
    with plain():
        want, _ = collect(q.double(), k.double(), stride, block, start, **kw)
    row = want[0, :, -1]
    assert bool((row.amax(-1) > 1.2 * row.mean(-1)).all())  # not flat
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    return pieces


def check_similarity(b, h, n, d, block, offset, *, dtype=torch.float32, device="cpu"):
    x = draw(b, h, n, d, dtype=dtype, device=device)
    x[0, 0, n // 3 : n // 2] = x[0, 0, n // 3].clone()
    x[0, -1, n // 2] = 0
    for centre in (False, True):
        got = similarity.self_similarity(x + (3 if centre else 0), block, offset=offset, centre=centre)
        with plain():
            want = similarity.self_similarity((x + (3 if centre else 0)).double(), block, offset=offset, centre=centre)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


def check_logits(h, g, nq, nk, d, first, bq, bk, *, tolerance, softcap=None, device="cpu"):
    """Where rows see a block; `kbar` is part of a longer tensor."""
    q, k = draw(2, h, nq, d, device=device), draw(2, g, nk + 1, d, seed=1, device=device)[:, :, :nk]
    got = kernels.visible_logits(q, k, 0.7, softcap, first, bq, bk)
    want = pooled.block_logits(q.double(), k.double(), 0.7, softcap)
    at = torch.arange(first, first + nq, device=device)[:, None]
    seen = torch.arange(nk, device=device) * bk < (at + 1) * bq
    torch.testing.assert_close(got.double()[:, :, seen], want[:, :, seen], atol=tolerance, rtol=tolerance)


def check_lists(mass, share, first, groups):
    """`share_lists` against masks of `top_p`; mass `[B, H, nq, nk]`."""
    grouped = mass.unflatten(1, (groups, -1))
    for group in (False, True):
        got, count = antidiagonal.share_lists(grouped, share, first, 16, group=group)
        with plain():
            want, many = antidiagonal.share_lists(grouped, share, first, 16, group=group)
        same(got, count, want, many)


def same(got, count, want, many, slack=0):
    """Equal lists, but for `slack` rows."""
    assert got.dtype == want.dtype and count.dtype == many.dtype
    used = lists.used_slots(want, many)
    rows = (count != many) | ((got != want) & used).any(-1)
    assert int(rows.sum()) <= slack, (int(rows.sum()), rows.nonzero()[:5])
    assert bool((got >= 0).all()) and bool((got <= got.amax(-1, keepdim=True)).all())


def check_trust(score, share, topk, first, bq, bk, groups, seed=0, slack=0):
    """`row_lists` with rules against masks of `select`; `score` `[B, H, nq, nk]` logits with a wide spread.

    slack: rows in which the last block may differ, where a softmax rounds differently.
    """
    (b, h, nq, nk), device = score.shape, score.device
    keys, rows = draw(b, h, nk, seed=seed, device=device) > -0.5, draw(b, h, nq, seed=seed + 1, device=device) > -0.8
    keys[0, 0] = False  # nothing competes
    keys[0, 1] = torch.arange(nk, device=device) < first * bq // bk  # what is forced is not trusted: the best one is in
    keys[0, 1, 0], rows[0, 1] = False, True
    at = torch.arange(first, first + nq, device=device)[:, None]
    begin = torch.arange(nk, device=device) * bk
    seen = begin < (at + 1) * bq
    forced = (begin == 0) | (seen & (begin + bk > at * bq))
    valid = seen & keys[:, :, None]
    room = None
    if topk is None:
        prob = score.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)
        p = share[:, None].expand(b, h, nq) if isinstance(share, torch.Tensor) else share
        best = top_p(prob, p, valid=valid, forced=forced, least=1)
    else:
        room = (topk * seen.sum(-1)).long().clamp(min=1)
        best = top_k(score, room.expand(b, h, nq), valid=valid, forced=forced)
    keep = (best | ~keys[:, :, None] | ~rows[..., None] | forced) & seen
    for hl in (h, groups):
        want, many = lists.compact(keep.unflatten(1, (hl, -1)).any(2))
        got, count = kernels.row_lists(
            score, share, first, bq, bk, lists=hl, logits=topk is None, alike=keys, trusted=rows,
            keep=None if room is None else room.int(),
        )  # fmt: skip
        same(got, count, want * bk, many, slack)
    return float((keep & ~forced).sum()) / float((seen & ~forced).expand_as(keep).sum())


def spread(b, h, nq, nk, device="cpu"):
    """Logits whose probabilities are far apart and whose order no rounding changes, different in every row."""
    gen = torch.Generator().manual_seed(nq * nk)
    order = torch.rand(b, h, nq, nk, generator=gen).argsort(-1)
    return (order.float() * (4.0 / nk)).to(device)
