"""Estimators against naive dense softmax and python loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.scores.divergence import jensen_shannon
from foveate.scores.keys import pieces
from foveate.scores.pooled import block_logits, block_pool, block_softmax, causal_blocks, pool_keys
from foveate.scores.probes import Far, last_queries
from tests.drive import qkv

CASES = settings(deadline=None, max_examples=25)


def dense_probs(q, k, scale, softcap=None, bias=None):
    """fp64 softmax `[B, H, N, M]`, queries last."""
    r = q.shape[1] // k.shape[1]
    s = q.double() @ k.double().repeat_interleave(r, 1).transpose(-1, -2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.double().repeat_interleave(r, 1)[:, :, None]
    n, m = s.shape[-2:]
    seen = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    return s.masked_fill(~seen, -math.inf).softmax(-1)


def sums(p, rows):
    """(columns, diagonals) of the last rows of p, entry by entry."""
    b, h, n, m = p.shape
    columns, diagonals = torch.zeros(b, h, m).double(), torch.zeros(b, h, m).double()
    for i in range(n - rows, n):
        for j in range(m - n + i + 1):
            columns[:, :, j] += p[:, :, i, j]
            diagonals[:, :, m - n + i - j] += p[:, :, i, j]
    return columns, diagonals


@CASES
@given(
    st.integers(1, 2), st.sampled_from([(2, 2), (3, 1), (4, 2), (8, 1)]), st.integers(1, 24), st.integers(0, 20),
    st.integers(1, 30), st.sampled_from([1, 50, 300, 1 << 24]), st.integers(0, 5),
)  # fmt: skip
def test_probe_is_the_dense_softmax_summed(b, heads, n, before, rows, budget, seed):
    """Any batch, group, chunk offset (M > N), probe longer than the chunk, and any cut into pieces."""
    h, g = heads
    q, _, _ = qkv(b, h, g, n, d=8, seed=seed)
    _, k, v = qkv(b, h, g, n + before, d=8, seed=seed + 1)
    got = last_queries(q, KV.dense(k, v), rows, scale=0.7, budget=budget)
    columns, diagonals = sums(dense_probs(q, k, 0.7), min(rows, n))
    torch.testing.assert_close(got.columns.double(), columns, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got.diagonals.double(), diagonals, atol=2e-6, rtol=1e-5)
    assert got.rows == min(rows, n)


def test_probe_of_a_chunk_is_the_probe_of_the_whole():
    q, k, v = qkv(1, 4, 2, 90)
    whole = last_queries(q, KV.dense(k, v), 16, scale=0.25)
    chunk = last_queries(q[:, :, 70:], KV.dense(k, v), 16, scale=0.25)
    torch.testing.assert_close(chunk.columns, whole.columns)
    torch.testing.assert_close(chunk.diagonals, whole.diagonals)


def test_probe_softcap_and_bias():
    q, k, v = qkv(2, 4, 2, 20)
    bias = torch.randn(2, 2, 20)
    got = last_queries(q, KV.dense(k, v, bias=bias), 5, scale=0.9, softcap=2.0)
    columns, _ = sums(dense_probs(q, k, 0.9, 2.0, bias), 5)
    torch.testing.assert_close(got.columns.double(), columns, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 300, 1 << 24])
def test_probe_over_keys_of_two_kinds(budget):
    """The first 12 entries are other keys, which meet other queries: one softmax over both."""
    (q, k, v), (q2, k2, _) = qkv(2, 4, 2, 40, d=8), qkv(2, 4, 2, 40, d=8, seed=3)
    got = last_queries(q, KV.dense(k, v), 7, scale=0.7, softcap=3.0, budget=budget, far=Far(q2, k2, 12))
    here, there = (
        3.0 * torch.tanh(0.7 * a.double() @ b.double().repeat_interleave(2, 1).mT / 3) for a, b in ((q, k), (q2, k2))
    )
    s = torch.cat((there[..., :12], here[..., 12:]), -1)
    p = s.masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    for mine, theirs in zip((got.columns, got.diagonals), sums(p, 7), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["max", "sum"])
def test_probe_reduced_over_the_group(how):
    q, k, v = qkv(2, 6, 2, 20)
    each = last_queries(q, KV.dense(k, v), 5, scale=0.3)
    got = last_queries(q, KV.dense(k, v), 5, scale=0.3, reduce=how)
    for name in ("columns", "diagonals"):
        heads = getattr(each, name).view(2, 2, 3, 20)
        want = heads.max(2).values if how == "max" else heads[:, :, 0] + heads[:, :, 1] + heads[:, :, 2]
        torch.testing.assert_close(getattr(got, name), want)
    with pytest.raises(ConfigError, match="reduce"):
        last_queries(q, KV.dense(k, v), 5, scale=0.3, reduce="vote")


def stores(k, v, lens):
    """The same entries as a padded rectangle, pages and flat buffers; NaN wherever nothing is stored."""
    b, g, m, d = k.shape
    page, n = 4, -(-m // 4)
    nan = float("nan")
    rect, pools, flats = [], [], []
    gen = torch.Generator().manual_seed(0)
    table = torch.randperm(b * g * n, generator=gen).view(b, g, n).int()
    offsets = (torch.arange(b * g).view(b, g) * (m + 2)).long()
    for t in (k, v):
        padded, pool, flat = (
            torch.full_like(t, nan),
            torch.full((b * g * n, page, d), nan),
            torch.full((b * g * (m + 2), d), nan),
        )
        for i in range(b):
            for j in range(g):
                for e in range(int(lens[i, j])):
                    padded[i, j, e] = pool[table[i, j, e // page], e % page] = flat[offsets[i, j] + e] = t[i, j, e]
        rect.append(padded), pools.append(pool), flats.append(flat)
    lens = lens.int()
    return KV.dense(*rect, len=lens), KV.paged(*pools, table, lens), KV.ragged(*flats, offsets, lens, m)


def test_probe_and_pool_read_every_storage():
    """Ragged lengths, pages and flat buffers give what each row gives alone; unused slots may hold NaN."""
    q, k, v = qkv(2, 4, 2, 12)
    _, k, v = qkv(2, 4, 2, 23, seed=3)
    lens = torch.tensor([[23, 20], [12, 17]])
    for kv in stores(k, v, lens):
        for budget in (1 << 24, 100):
            got = last_queries(q, kv, 7, scale=0.5, budget=budget)
            pooled = pool_keys(kv, 5)
            for b in range(2):
                for g in range(2):
                    m = int(lens[b, g])
                    one = q[b : b + 1, 2 * g : 2 * g + 2], KV.dense(k[b : b + 1, g : g + 1, :m], v[b : b + 1, g : g + 1, :m])
                    want = last_queries(*one, 7, scale=0.5)
                    for name in ("columns", "diagonals"):
                        part = getattr(got, name)[b, 2 * g : 2 * g + 2]
                        torch.testing.assert_close(part[:, :m], getattr(want, name)[0], atol=1e-6, rtol=1e-5)
                        assert (part[:, m:] == 0).all()
                    blocks = -(-m // 5)
                    torch.testing.assert_close(pooled[b, g, :blocks], block_pool(k[b, g, :m], 5))
                    assert (pooled[b, g, blocks:] == 0).all()


# ---------------------------------------------------------------------- pooling
@CASES
@given(st.integers(1, 30), st.integers(1, 9), st.data(), st.sampled_from(["mean", "sum", "max", "min"]))
def test_block_pool(n, block, data, kind):
    offset = data.draw(st.integers(0, block - 1))
    valid = data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    gen = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, 3, generator=gen, dtype=torch.float64)
    poisoned = x.clone()
    if valid is not None:
        poisoned[:, ~torch.tensor(valid)] = float("nan")
    got = block_pool(poisoned, block, kind, offset=offset, valid=None if valid is None else torch.tensor(valid))
    blocks = -(-(n + offset) // block)
    assert got.shape == (2, blocks, 3)
    for i in range(blocks):
        rows = [t for t in range(n) if (t + offset) // block == i and (valid is None or valid[t])]
        if rows:
            part = x[:, rows]
            want = {"mean": part.mean(1), "sum": part.sum(1), "max": part.max(1).values, "min": part.min(1).values}[kind]
        else:
            want = torch.full((2, 3), {"mean": 0.0, "sum": 0.0, "max": -math.inf, "min": math.inf}[kind]).double()
        torch.testing.assert_close(got[:, i], want)


def test_block_pool_is_fp32_and_refuses():
    x = torch.full((1, 5000, 1), 1.001, dtype=torch.bfloat16)
    assert block_pool(x, 5000).dtype == torch.float32
    torch.testing.assert_close(block_pool(x, 5000, "sum"), x.float().sum(1, keepdim=True))
    with pytest.raises(ConfigError, match="median"):
        block_pool(x, 4, "median")
    with pytest.raises(ConfigError, match="offset"):
        block_pool(x, 4, offset=4)


def test_block_scores():
    """Groups without repeating keys, causal by absolute block number, rows that sum to one."""
    gen = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 6, 3, 8, generator=gen), torch.randn(2, 2, 5, 8, generator=gen)
    s = block_logits(q, k, 0.4)
    torch.testing.assert_close(s, 0.4 * torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(3, 1)))
    p = block_softmax(s, first=2)
    for i in range(3):
        want = torch.zeros(2, 6, 5)
        want[..., : 3 + i] = s[:, :, i, : 3 + i].softmax(-1)
        torch.testing.assert_close(p[:, :, i], want)
    assert causal_blocks(3, 5, 2).sum(-1).tolist() == [3, 4, 5]
    torch.testing.assert_close(block_logits(q, k, 0.4, softcap=1.5), 1.5 * torch.tanh(s / 1.5))


def test_pieces():
    assert list(pieces(7, 3, 9)) == [(0, 3), (3, 6), (6, 7)]
    assert list(pieces(2, 100, 9)) == [(0, 1), (1, 2)] and list(pieces(0, 1)) == []


# ---------------------------------------------------------------------- divergence
def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)


@CASES
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 9), min_size=n, max_size=n)] * 2)))
def test_jensen_shannon(pair):
    rows = [[(x + (sum(r) == 0)) / max(1, sum(r) or len(r)) for x in r] for r in pair]
    p, q = (torch.tensor(r, dtype=torch.float64) for r in rows)
    mix = [(a + b) / 2 for a, b in zip(*rows)]
    want = math.sqrt(max(0.0, (kl(rows[0], mix) + kl(rows[1], mix)) / 2))
    got = float(jensen_shannon(p, q))
    assert got == pytest.approx(want, abs=1e-7)
    assert got == float(jensen_shannon(q, p)) and 0 <= got <= math.sqrt(math.log(2)) + 1e-9


def test_jensen_shannon_edges():
    one, other = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5])
    assert float(jensen_shannon(one, one)) == 0.0
    assert float(jensen_shannon(one, other)) == pytest.approx(math.sqrt(math.log(2)))
    tiny = torch.tensor([1.0, 1e-45])
    assert bool(torch.isfinite(jensen_shannon(tiny, torch.tensor([1.0, 0]))))
    assert jensen_shannon(torch.rand(2, 3, 7).softmax(-1), torch.rand(2, 3, 7).softmax(-1)).shape == (2, 3)
