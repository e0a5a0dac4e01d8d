"""Problems for the kernels of lightning indexers, on any device; judged by `scores/indexer.py`."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import torch

import foveate
from foveate.kernels.triton import indexer_launch as kernels
from foveate.kernels.triton import paging_launch
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.dsa import DSA, KEYS
from foveate.scores import entries, fused
from foveate.scores import indexer as law
from tests.drive import Rotary
from tests.indexers import Pairs, random_profile
from tests.label_cases import earlier
from tests.paging_cases import problem

# query heads of a kv head, D, heads of the indexer, its width, dims it rotates, features: mean of all heads or all of them
SHAPES = [(4, 64, 3, 32, 16, False), (2, 48, 5, 16, 0, True), (1, 32, 20, 64, 64, False)]


def rope_of(d, device, kind=Rotary):
    rope = kind(d)
    rope.freq = rope.freq.to(device)
    return rope


def indexer(h, g, d, heads, width, rope, mean, device="cpu", fp8=True, seed=0):
    gen = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=gen).to(device)  # noqa: E731
    fq, fk = (d, d) if mean else (h * d, g * d)
    norm = torch.stack([1 + 0.3 * make(width), 0.3 * make(width)])
    weights = make(heads, width, fq) / fq**0.5, make(width, fk) / fk**0.5, make(heads, fq)
    out = law.Indexer(*weights, norm, rope, 500.0, fp8)
    out.check(h, g, d)
    return out


def view(q, kv, step, rope):
    """One decode step as a method sees it."""
    last = kv.lengths()[:, :1] - 1
    return AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), step=step, q_pos=last, rope=rope)


def pair(which, q, kv, rope):
    """(keys by the kernels, by the plain code), both having seen all but the newest token."""
    out = law.IndexKeys(), law.IndexKeys()
    for keys in out:
        keys.update(view(q, earlier(kv), 0, rope), which)
    return out


# ---------------------------------------------------------------------- parts
def check_rounding(device="cpu"):
    """Queries whose projections are those of the plain code: the same bits, whatever the numbers."""
    b, heads, di, half = 3, 5, 64, 12
    gen = torch.Generator().manual_seed(0)
    flat = torch.randn(b, heads * di + heads + di, generator=gen)
    x = flat[:, : heads * di].view(b, heads, di)
    far = torch.randn(3, di, generator=gen) * torch.exp2(torch.randint(-20, 1, (3, di), generator=gen))
    x[0, :3] = law.hadamard(far)  # at position 0: codes of far apart numbers, half of them subnormal or zero
    x[1, 0], x[1, 1], x[1, 2, 1:] = 0.0, 448.0 * 3, 0.0
    x[1, 3] = 1e-6 * x[1, 3]  # below the floor
    x[0, 4] = law.hadamard(torch.arange(17.0, 145.0, 2))  # at position 0, and exact: half-way between two codes
    assert torch.equal(law.hadamard(x[0, 4]), torch.arange(17.0, 145.0, 2))
    flat, which = flat.to(device), indexer(2, 1, 16, heads, di, 2 * half, True, device)
    pos = torch.tensor([[0], [77], [131071]], device=device)
    own = torch.stack([t[:, 0] for t in which.turn(pos)], 1)
    want, scale = law.round8(law.hadamard(which._turn(flat[:, : heads * di].view(b, heads, di), pos)))
    weight = flat[:, heads * di : heads * di + heads] * (heads * di) ** -0.5 * scale
    kv = KV.dense(*(torch.zeros(b, 1, 7, 16, device=device),) * 2)
    none = torch.zeros(b, 8, di, dtype=torch.uint8, device=device), torch.zeros(b, 8, device=device)
    got, factors = kernels.rounded(flat, heads, di, kv, which.norm, own, *none, law.EPS, law.FLOOR, False)
    assert bool(((want != 0) & (want.abs() < 2.0**-6)).any()) and bool((want == 0).any())
    assert torch.equal(got.float(), want) and torch.equal(factors, weight)
    assert not none[0].any() and not none[1].any()
    return got, factors


def check_codes(device="cpu"):
    """Every number of e4m3 comes out of its code, by a query of one and its opposite: ReLU shows one sign at a time."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    code = torch.arange(256, dtype=torch.uint8)[every == every].to(device)  # two are no numbers
    m, di = len(code), 16
    data, mine = code.new_zeros(1, m, di), torch.zeros(1, 1, di, dtype=torch.float16, device=device)
    data[0, :, 3] = code
    kv, one = KV.dense(*(torch.zeros(1, 1, m, 16, device=device),) * 2), torch.ones(1, m, device=device)
    got = []
    for sign in (1.0, -1.0):
        mine[0, 0, 3] = sign
        got.append(kernels.score(mine, one[:, :1], data, one, kv)[0, 0])
    assert torch.equal(got[0] - got[1], code.view(torch.float8_e4m3fn).float())


def check_score(heads, width, lens, m, device="cpu", seed=0):
    """Given codes: within the bound of sums in fp32 of the sum in fp64. Returns the largest part of the bound reached.

    A dot product of DI exact products is off by at most DI 2^-22 times the sum of their magnitudes (products are added as
    the tensor cores do it, which cut rather than round), a sum over HI heads by HI 2^-23 of the magnitudes it adds.
    """
    gen = torch.Generator().manual_seed(seed)
    b, room = 2, m + 5
    codes = lambda *s: (40 * torch.randn(*s, generator=gen)).clamp(-448, 448).to(torch.float8_e4m3fn)  # noqa: E731
    q, k = codes(b, heads, width).float(), codes(b, room, width)
    w, scale = torch.randn(b, heads, generator=gen), torch.exp2(torch.randint(-9, 2, (b, room), generator=gen).float())
    length = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)[:, None].repeat(1, 2)
    zeros = torch.zeros(b, 2, m, 16, device=device)
    kv = KV.dense(zeros, zeros, len=length)
    data = k.view(torch.uint8).to(device)
    got = kernels.score(q.half().to(device), w.to(device), data, scale.to(device), kv)[:, 0].double().cpu()
    products = q.double() @ k.double().mT
    want = (products.clamp(min=0) * w.double()[..., None]).sum(1) * scale.double()
    size = ((q.abs().double() @ k.double().abs().mT) * w.double().abs()[..., None]).sum(1) * scale.double()
    bound = (width * 2.0**-22 + heads * 2.0**-23) * size
    off = (got - want[:, :m]).abs() / bound[:, :m]
    live = torch.arange(m) < kv.lengths()[:, :1].cpu()
    assert bool((off[live] <= 1).all()), float(off[live].max())
    return float(off[live].max())


def check_prompt(heads, width, n, start, device="cpu", seed=0):
    """Queries n from `start` on: within the bound of `check_score` where a query may look."""
    gen = torch.Generator().manual_seed(seed)
    b, m = 2, start + n
    codes = lambda *s: (40 * torch.randn(*s, generator=gen)).clamp(-448, 448).to(torch.float8_e4m3fn)  # noqa: E731
    q, k = codes(b, n, heads, width).float(), codes(b, m + 3, width)
    w, scale = torch.randn(b, n, heads, generator=gen), torch.exp2(torch.randint(-9, 2, (b, m + 3), generator=gen).float())
    pos = torch.arange(start, m).expand(b, -1)
    data = k.view(torch.uint8).to(device)
    got = kernels.score_prompt(q.to(device), w.to(device), data, scale.to(device), pos.to(device), m).double().cpu()
    want, size = torch.zeros(b, n, m, dtype=torch.float64), torch.zeros(b, n, m, dtype=torch.float64)
    keys = (k.double() * scale[..., None])[:, :m].mT
    for j in range(heads):
        want += (q[:, :, j].double() @ keys).clamp(min=0) * w[:, :, j, None]
        size += (q[:, :, j].abs().double() @ keys.abs()) * w[:, :, j, None].abs()
    off = (got - want).abs() / ((width * 2.0**-22 + heads * 2.0**-23) * size)
    live = torch.arange(m) <= pos[..., None]
    assert got.shape == want.shape and bool((off[live] <= 1).all()), float(off[live].max())
    return float(off[live].max())


def same_codes(a, b, share):
    """e4m3 codes, uint8: equal, but for a share of neighbours, where what was rounded lay between them."""
    a, b = (t.view(torch.float8_e4m3fn).float() for t in (a, b))
    apart = a != b
    step = torch.exp2(torch.floor(torch.log2(torch.maximum(a.abs(), b.abs()).clamp(min=2.0**-6))) - 3)
    assert bool(((a - b).abs()[apart] <= step[apart]).all()) and float(apart.float().mean()) <= share


def check_rank(shape, lens, kind, dtype=torch.float32, device="cpu", seed=0, share=0.02, rope=Rotary):
    """The newest key and all scores against the plain code; what differs is what lay between two codes.

    A code that falls the other way moves a number by an eighth of its size at most; a few of them in a query of `width`
    numbers move a score by far less than 3 % of the scores' spread.
    """
    r, d, heads, width, turned, mean = shape
    q, kv = problem(r, d, lens, kind, dtype, device, seed)
    which, turn = indexer(q.shape[1], 2, d, heads, width, turned, mean, device), rope_of(d, device, rope)
    ours, other = pair(which, q, kv, turn)
    x = view(q, kv, 1, turn)
    assert ours._kernels(x, which) is kernels
    with patch.object(law.IndexKeys, "_compute", side_effect=AssertionError("a key was made by the plain code")):
        got = ours.rank(x, which, {})
    with plain():
        want = other.rank(x, which, {})
    assert (ours.done, ours.step) == (other.done, other.step) and got.shape == want.shape == (q.shape[0], 1, kv.capacity)
    n = kv.lengths()[:, 0]
    rows = torch.arange(q.shape[0], device=device)
    same_codes(ours.data[rows, n - 1], other.data[rows, n - 1], max(share, 1.01 / width))
    torch.testing.assert_close(ours.scale[rows, n - 1], other.scale[rows, n - 1], atol=0, rtol=0)
    old = torch.arange(kv.capacity, device=device) < n[:, None] - 1
    assert torch.equal(ours.data[:, : kv.capacity][old], other.data[:, : kv.capacity][old])
    assert bool((ours.data[:, kv.capacity :] == 0).all())
    a, b = got[:, 0][old], want[:, 0][old]
    off = (a - b).abs()
    assert float(off.max()) <= 0.03 * float(b.std())
    if torch.device(device).type == "cpu":  # elsewhere products differ more, and a code of a query now and then
        assert float(off.max()) <= 1e-5 * float(b.std())
    return float(off.max() / b.std())


# ---------------------------------------------------------------------- steps
def plain():
    """Everything in this block runs without the kernels of indexers."""
    return patch.object(fused, "indexers", lambda t: None)


def method(q, kv, heads=4, width=32, **options):
    h, g, d = q.shape[1], kv.shape[1], q.shape[-1]
    return DSA(profile=random_profile(h, g, d, heads, width, rope=8), **options)


def step(dsa, q, kv, state, number, rope):
    state.step.clear()
    return dsa.plan(view(q, kv, number, rope), state)


def check_step(dsa, q, kv, tolerance):
    """Lists hold the best of the kernels' own scores, and attention over them is the oracle's."""
    state, rope = State(), rope_of(q.shape[-1], q.device)
    step(dsa, q, earlier(kv), state, 0, rope)
    kept, before = [], entries.best_entries
    with patch("foveate.methods.dsa.best_entries", lambda s, *a, **k: kept.append((s, a, k)) or before(s, *a, **k)):
        layout = step(dsa, q, kv, state, 1, rope)
    score, args, options = kept[0]
    with patch.object(fused, "entries", lambda t: None):
        want = entries.best_entries(score, *args, **options)
    assert torch.equal(layout.entries[:, :, 0], want[0]) and torch.equal(layout.entry_count[:, :, 0], want[1])
    assert layout.entries.shape[1] == 1 and paging_launch.serves(q, kv, layout, 0.0)
    exact = replace(kv, k=kv.k.float(), v=kv.v.float())
    out = foveate.attend(q.float(), exact, layout, backend="reference")
    got, _ = paging_launch.attend(q, kv, layout, 1 / math.sqrt(q.shape[-1]), True)
    torch.testing.assert_close(got.float(), out, atol=tolerance, rtol=0)
    return layout, state


def chosen(layout):
    return [set(e[0, 0, : c[0, 0]].tolist()) for e, c in zip(layout.entries, layout.entry_count, strict=True)]


def check_ties(kernels_best, device="cpu"):
    """ReLU makes exact zeros, whatever the order of sums: the lists are those of the plain code index by index."""
    b, heads, di, m = 2, 5, 32, 300
    gen = torch.Generator().manual_seed(3)
    sign = torch.where(torch.rand(b, m, generator=gen) < 0.2, 1.0, -1.0)  # most tokens have a score of zero
    k = sign[..., None] * torch.randint(1, 3, (b, m, 1), generator=gen) * torch.ones(di)
    q, w = torch.ones(b, heads, di), torch.tensor([1.0, 2.0, -0.5, 4.0, 8.0]).expand(b, heads).contiguous()
    length = torch.tensor([[m, m], [200, 200]], dtype=torch.int32)
    want = law.scores(q[:, None], w[:, None], k)
    kv = KV.dense(*(torch.zeros(b, 2, m, 16, device=device),) * 2, len=length.to(device))
    data = k.to(torch.float8_e4m3fn).view(torch.uint8).to(device)
    got = kernels.score(q.half().to(device), w.to(device), data, torch.ones(b, m, device=device), kv)
    live = torch.arange(m) < length[:, :1, None]
    assert torch.equal(got.cpu()[live], want[live])  # small whole numbers: exact in any order
    lists = kernels_best(got, 150, length=kv.len)
    with patch.object(fused, "entries", lambda t: None):
        plain = entries.best_entries(want, 150, length=length)
    assert torch.equal(lists[0].cpu(), plain[0]) and torch.equal(lists[1].cpu(), plain[1])
    zeros = [e for e in lists[0][0, 0].tolist() if sign[0, e] < 0 and e != m - 1]
    assert zeros == [e for e in range(m) if sign[0, e] < 0][: len(zeros)] and len(zeros) > 50


def check_replays(dsa, q, kv, k_new, apart, times):
    """A step captured once and replayed: the host's part is that of the capture each time, tensors go on.

    Every third token is rolled back, and another comes in its place. Each list is that of a plan from all keys anew, but
    for `apart` of its tokens where roundings differ.
    """
    assert kv.kind == "dense" and kv.len is not None
    state, rope = State(), rope_of(q.shape[-1], q.device)
    step(dsa, q, kv, state, 0, rope)
    keys, held = state.layer[KEYS], None
    for i in range(times):
        at = kv.len[:, 0].long()
        for b in range(q.shape[0]):
            kv.k[b, :, at[b]] = k_new[i][b]
        kv.len.add_(1)
        if held is not None:
            keys.done, keys.step = held
        before = keys.done, keys.step
        data = keys.data.data_ptr()
        layout = step(dsa, q, kv, state, 1, rope)
        held = held or before
        assert keys.data.data_ptr() == data
        fresh = step(dsa, q, kv, State(), 0, rope)
        assert torch.equal(layout.entry_count, fresh.entry_count)
        assert all(len(a - b) <= apart for a, b in zip(chosen(layout), chosen(fresh), strict=True))
        assert all(int(n) - 1 in a for n, a in zip(kv.len[:, 0], chosen(layout), strict=True))
        if i % 3 == 2:
            kv.len.sub_(1)


__all__ = ["KEYS", "SHAPES", "Pairs", "earlier", "problem"]
