"""Problems for the fused estimators, on any device; judged by the plain code of `scores/`, `select.py` and `lists.py`."""

from __future__ import annotations

import contextlib
import math

import torch

from foveate import lists
from foveate.kernels.triton import estimate_launch as kernels
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.scores import fused, pooled, probes
from foveate.select import top_k, top_p


@contextlib.contextmanager
def plain():
    """Everything in this block runs without the kernels."""
    before = fused.estimates
    fused.estimates = lambda t: None
    try:
        yield
    finally:
        fused.estimates = before


def draw(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rounded(x, step):
    """Scores with many ties."""
    return (x * step).round() / step


# ---------------------------------------------------------------------- the probe
def check_probe(b, h, g, n, m, d, rows, *, tolerance, scale=0.3, softcap=None, dtype=torch.float32, device="cpu", end=None):
    """Mass by key and distance against fp64, every sum over all rows. end: entries before it are other keys."""
    q, k = draw(b, h, n, d, dtype=dtype, device=device), draw(b, g, m, d, seed=1, dtype=dtype, device=device)
    rows = min(rows, n)
    assert kernels.probes(q, KV.dense(k, k), rows)
    how, far = dict(scale=scale, softcap=softcap), None
    if end is not None:  # keys and queries with strides of their own, more keys than are read
        k2, q2 = (draw(b, s, heads, d, seed=i, dtype=dtype, device=device) for i, s, heads in ((2, end + 9, g), (3, n, h)))
        far = probes.Far(q2.transpose(1, 2), k2.transpose(1, 2), end)
    seen = probes.last_queries(q, KV.dense(k, k), rows, far=far, **how)
    got = seen.columns, seen.diagonals
    if far is not None:
        far = probes.Far(far.q.double(), far.k.double(), end)
    want = probes.last_queries(q.double(), KV.dense(k.double(), k.double()), rows, far=far, **how)
    for mine, theirs in ((got[0], want.columns), (got[1], want.diagonals)):
        assert bool(torch.isfinite(mine).all())
        torch.testing.assert_close(mine.double(), theirs, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(mine.sum(-1).double(), torch.full_like(theirs[..., 0], rows), atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------- long rows
def check_entries(score, keep, forced):
    """`top_entries` of score `[2, B, Hl, n]` against `top_k` and `compact`."""
    _, b, heads, n = score.shape
    got = kernels.top_entries(score, keep, forced)
    at = torch.arange(n, device=score.device)
    for half in range(2):
        index, count = got[2 * half : 2 * half + 2]
        width = min(n, max(max(k, f) for k, f in zip(keep[half * heads :][:heads], forced[half * heads :][:heads])))
        assert index.shape == (b, heads, width)
        for h in range(heads):
            k, f = keep[half * heads + h], forced[half * heads + h]
            want, many = lists.compact(top_k(score[half, :, h], k, forced=at < f))
            assert torch.equal(count[:, h], many) and torch.equal(index[:, h], want[:, :width]), (half, h, k, f)


def check_mass(score, p):
    """A count may differ by rounding of fp64 only; scores here are far from that unless they tie exactly."""
    assert torch.equal(kernels.mass_counts(score, p).long(), top_p(score, p).sum(-1)), p


def check_merge(m, step, many, reach=64, seed=0, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(-(-m // step), generator=gen)[:many].sort().values * step for _ in range(3)]
    d = torch.stack(rows)[None].int().to(device)
    count = torch.tensor([[d.shape[-1], 1, max(1, d.shape[-1] - 2)]], dtype=torch.int32, device=device)
    got, n = kernels.merge_diagonals(d, count, reach, reach)
    want, same = lists.merge_diagonals(d, count, m, reach, reach)
    assert torch.equal(n, same)
    assert torch.equal(got[..., : want.shape[-1]], want) and bool((got[..., want.shape[-1] :] == got[..., -1:]).all())


# ---------------------------------------------------------------------- blocks
def check_scores(nq, nk, first, h, g, d, softcap=None, *, tolerance, b=2, device="cpu"):
    q, k = draw(b, h, nq, d, device=device), draw(b, g, nk, d, seed=1, device=device)
    want = pooled.block_logits(q.double(), k.double(), 0.7, softcap)
    seen = pooled.causal_blocks(nq, nk, first, device)
    prob = kernels.block_scores(q, k, 0.7, softcap, first, softmax=True)
    torch.testing.assert_close(prob.double(), pooled.block_softmax(want, first), atol=tolerance, rtol=tolerance)
    assert bool((prob[:, :, ~seen] == 0).all())
    for group in (False, True):
        got = kernels.block_scores(q, k, 0.7, softcap, first, softmax=False, group=group)
        best = want.unflatten(1, (g, -1)).amax(2) if group else want
        # raw logits here reach 20 in size, the probabilities above 1: the same relative precision
        torch.testing.assert_close(got[:, :, seen].double(), best[:, :, seen], atol=20 * tolerance, rtol=tolerance)
    return prob


def check_choice(score, first, *, keep=(), p=None, block=16):
    """`top_blocks` against `top_k` or `top_p` with the first and the diagonal block forced."""
    nq, nk = score.shape[2:]
    number, row = torch.arange(nk, device=score.device), torch.arange(first, first + nq, device=score.device)[:, None]
    valid, forced = number <= row, (number == 0) | (number == row)
    got, count = kernels.top_blocks(score, first, block, keep=keep, p=p)
    if p is None:
        mask = top_k(
            score, torch.tensor(keep, device=score.device).view(-1, 1).expand(score.shape[:3]), valid=valid, forced=forced
        )
    else:
        mask = top_p(score, p, valid=valid, forced=forced)
    want, many = lists.compact(mask)
    assert torch.equal(count, many) and torch.equal(got, want[..., : got.shape[-1]] * block), (keep, p)


def check_pairs(prob, first, p, groups, seed=0, block=16):
    """`pair_lists` against the union of masks and a `top_p` over all pairs of a head."""
    b, h, nq, nk = prob.shape
    col, diag = (draw(b, h, nk, seed=seed + i, device=prob.device) > 0.9 for i in range(2))
    live = draw(b, h, seed=seed + 2, device=prob.device) > -0.4
    row = torch.arange(first, first + nq, device=prob.device)[:, None]
    gap = (row - torch.arange(nk, device=prob.device)).clamp(min=0)
    seen = pooled.causal_blocks(nq, nk, first, prob.device)
    best = top_p(prob.flatten(-2), p, valid=seen.flatten()).view(prob.shape)
    want = ((col[:, :, None] | diag[:, :, gap]) & seen) | (best & live[..., None, None])
    for hl in (h, groups):
        index, count = lists.compact(want.unflatten(1, (hl, -1)).any(2))
        got, many = kernels.pair_lists(col, diag, live, prob, p, first, block, nq, lists=hl)
        assert torch.equal(many, count) and torch.equal(got, index * block), (p, hl)


# ---------------------------------------------------------------------- whole plans
def peaked(h, g, m, d, start=0, dtype=torch.float32, device="cpu", seed=0):
    """A prefill call whose queries look at single keys and at fixed distances with well separated strengths."""
    q, k = draw(1, h, m, d, seed=seed), draw(1, g, m, d, seed=seed + 1)
    wide = k.repeat_interleave(h // g, 1)
    for i in range(4):
        q = q + (1.5 - 0.2 * i) * wide[:, :, m // (i + 2)][:, :, None]
    far = m // 3
    q[:, :, far:] += 1.1 * wide[:, :, :-far]
    q, k = q.to(device, dtype), k.to(device, dtype)
    pos = torch.arange(start, m, device=device)[None]
    return AttnInput(q[:, :, start:], KV.dense(k, k), "prefill", 0, 1, 1 / math.sqrt(d), start=start, q_pos=pos)


def differing(method, x):
    """Share of the pairs named by either path of `plan` that only one of them names."""
    assert fused.estimates(x.q) is kernels
    mine = method.plan(x, State()).to_mask()
    with plain():
        theirs = method.plan(x, State()).to_mask()
    return float((mine ^ theirs).sum()) / float((mine | theirs).sum())


def planned_in_a_graph(method, x):
    """(plan, the same plan out of a replayed CUDA graph); a plan that waits for the device is an error."""
    want = method.plan(x, State())
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # torch reports every synchronisation
    try:
        method.plan(x, State())
    finally:
        torch.cuda.set_sync_debug_mode(before)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        method.plan(x, State())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = method.plan(x, State())
    graph.replay()
    torch.cuda.synchronize()
    return want, got
