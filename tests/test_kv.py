"""KV views: three storages, one meaning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ShapeError
from foveate.kv import KV
from tests.layout_model import views

quick = settings(deadline=None, max_examples=30)
any_view = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 20)).flatmap(lambda s: views(*s))


def rectangle(kv: KV) -> tuple[list, list]:
    """Keys and values [b][g] as lists of rows, read from the storage by its definition."""
    b, g, m, _, _ = kv.shape
    keys, values = [], []
    for i in range(b):
        for j in range(g):
            n = m if kv.len is None else int(kv.len[i, j])
            rows_k, rows_v = [], []
            for e in range(n):
                if kv.kind == "dense":
                    at = (i, j, e)
                elif kv.kind == "ragged":
                    at = (int(kv.offsets[i, j]) + e,)
                else:
                    page = kv.k.shape[1]
                    at = (int(kv.table[i, j, e // page]), e % page)
                rows_k.append(kv.k[at])
                rows_v.append(kv.v[at])
            keys.append(rows_k)
            values.append(rows_v)
    return keys, values


@quick
@given(any_view)
def test_every_way_of_reading_agrees(kv):
    """to_dense, gather, rows over flat: the same rows, and zero beyond the length whatever the storage holds there."""
    b, g, m, d, dv = kv.shape
    keys, values = rectangle(kv)
    flat = kv.to_dense()
    assert flat.kind == "dense" and flat.k.shape == (b, g, m, d) and flat.v.shape == (b, g, m, dv)
    all_k, all_v = kv.flat()
    entries = torch.arange(m).expand(b, g, m)
    at = kv.rows(entries)
    assert kv.k.numel() == 0 or 0 <= int(at.min()) <= int(at.max()) < len(all_k)
    for s, (rows_k, rows_v) in enumerate(zip(keys, values, strict=True)):
        i, j, n = s // g, s % g, len(rows_k)
        assert int(kv.lengths()[i, j]) == n
        assert bool((flat.k[i, j, n:] == 0).all()) and bool((flat.v[i, j, n:] == 0).all())
        if n:
            want = torch.stack(rows_k), torch.stack(rows_v)
            assert torch.equal(flat.k[i, j, :n], want[0]) and torch.equal(flat.v[i, j, :n], want[1])
            assert torch.equal(all_k[at[i, j, :n]], want[0]) and torch.equal(all_v[at[i, j, :n]], want[1])
    if min(map(len, keys)) > 0:
        last = (kv.lengths() - 1)[..., None]
        got_k, got_v = kv.gather(torch.cat([last, last.clamp(max=0)], -1))
        assert torch.equal(got_k, torch.stack([torch.stack([r[-1], r[0]]) for r in keys]).view(b, g, 2, d))
        assert torch.equal(got_v, torch.stack([torch.stack([r[-1], r[0]]) for r in values]).view(b, g, 2, dv))


@quick
@given(any_view)
def test_positions_bias_and_lengths(kv):
    b, g, m, _, _ = kv.shape
    assert kv.lengths().dtype == kv.positions().dtype == torch.int64
    assert torch.equal(kv.positions(), torch.arange(m).expand(b, g, m) if kv.pos is None else kv.pos.long())
    exists = kv.exists()
    for i in range(b):
        for j in range(g):
            for e in range(m):
                hidden = kv.bias is not None and float(kv.bias[i, j, e]) == -math.inf
                assert bool(exists[i, j, e]) == (e < int(kv.lengths()[i, j]) and not hidden)
    flat = kv.to_dense()
    assert torch.equal(flat.exists(), exists) and torch.equal(flat.positions(), kv.positions())
    kv.validate()
    flat.validate()


@quick
@given(any_view)
def test_one_row(kv):
    """`row` is that row, shares the storage, and reads the same."""
    whole = kv.to_dense()
    for i in range(kv.shape[0]):
        one = kv.row(i)
        assert one.shape == (1, *kv.shape[1:])
        assert one.k.untyped_storage().data_ptr() == kv.k.untyped_storage().data_ptr()
        flat = one.to_dense()
        assert torch.equal(flat.k.nan_to_num(), whole.k[i : i + 1].nan_to_num())
        assert torch.equal(flat.v.nan_to_num(), whole.v[i : i + 1].nan_to_num())
        assert torch.equal(one.exists(), kv.exists()[i : i + 1])
        assert torch.equal(one.positions(), kv.positions()[i : i + 1])


def test_shorthand():
    k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3)
    kv = KV.of((k, v))
    assert KV.of(kv) is kv and kv.k is k and kv.v is v and kv.to_dense() is kv
    assert kv.shape == (1, 2, 5, 4, 3)
    assert kv.nbytes == 4 * (k.numel() + v.numel())
    assert KV.dense(k, v, bias=torch.zeros(1, 2, 5)).nbytes == kv.nbytes + 4 * 10


def test_empty_segments_at_the_end_of_a_flat_buffer():
    """An empty segment may begin where the buffer ends; nothing is read outside it."""
    k = torch.randn(3, 4)
    kv = KV.ragged(k, k, offsets=torch.tensor([[0, 3]]), len=torch.tensor([[3, 0]]), capacity=3)
    kv.validate()
    flat = kv.to_dense()
    assert torch.equal(flat.k[0, 0], k) and bool((flat.k[0, 1] == 0).all())
    nothing = KV.ragged(k[:0], k[:0], offsets=torch.zeros(1, 1).long(), len=torch.zeros(1, 1).int(), capacity=2)
    assert bool((nothing.to_dense().k == 0).all()) and not bool(nothing.exists().any())


def test_gradients_pass_through_every_storage():
    base = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    table, length = torch.tensor([[[2, 0]]]), torch.tensor([[3]])
    for kv in (
        KV.dense(base.view(1, 1, 6, 4), base.view(1, 1, 6, 4), len=length),
        KV.paged(base.view(3, 2, 4), base.view(3, 2, 4), table, length),
        KV.ragged(base, base, torch.tensor([[1]]), length, capacity=4),
    ):
        grad = torch.autograd.grad(kv.to_dense().k.sum(), base)[0]
        read = {"dense": [0, 1, 2], "paged": [4, 5, 0], "ragged": [1, 2, 3]}[kv.kind]
        assert grad.sum(-1).nonzero()[:, 0].tolist() == sorted(read)


# ---------------------------------------------------------------------- bad input
def _k(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


K = _k(2, 3, 10, 4)
LEN, POS = torch.full((2, 3), 10), torch.arange(10).expand(2, 3, 10)
POOL, TABLE = _k(5, 4, 8), torch.zeros(2, 3, 2, dtype=torch.int32)
WRONG = {
    "k dims": (lambda: KV.dense(_k(3, 10, 4), K), r"k and v: expected 4 dimensions .* got \[3, 10, 4\]"),
    "v rows": (lambda: KV.dense(K, _k(2, 3, 9, 4)), r"v: expected .* \[2, 3, 10\], got \[2, 3, 9\]"),
    "v dtype": (lambda: KV.dense(K, K.half()), "v: expected dtype torch.float32 .* got torch.float16"),
    "v device": (lambda: KV.dense(K, K.to("meta")), "v: expected .* on cpu like k, got .* on meta"),
    "len shape": (lambda: KV.dense(K, K, len=LEN[:1]), r"len: expected \[B, G\] = \[2, 3\], got \[1, 3\]"),
    "len dtype": (lambda: KV.dense(K, K, len=LEN.float()), "len: expected integers, got torch.float32"),
    "len device": (lambda: KV.dense(K, K, len=LEN.to("meta")), "len: expected a tensor on cpu like k, got meta"),
    "pos shape": (lambda: KV.dense(K, K, pos=POS[..., 1:]), r"pos: expected \[B, G, M\] = \[2, 3, 10\], got \[2, 3, 9\]"),
    "pos dtype": (lambda: KV.dense(K, K, pos=POS.float()), "pos: expected integers"),
    "bias shape": (lambda: KV.dense(K, K, bias=_k(2, 3)), r"bias: expected \[B, G, M\]"),
    "bias dtype": (lambda: KV.dense(K, K, bias=POS), "bias: expected floats, got torch.int64"),
    "bias is a mask": (lambda: KV.dense(K, K, bias=POS > 3), "bias: expected floats, got torch.bool"),
    "pool dims": (lambda: KV.paged(K, K, TABLE, LEN), "paged k and v: expected .pages, page, D."),
    "pools differ": (lambda: KV.paged(POOL, POOL[:4], TABLE, LEN), "paged k and v"),
    "table dims": (lambda: KV.paged(POOL, POOL, TABLE[0], LEN), r"table: expected \[B, G, n\], got \[3, 2\]"),
    "table dtype": (lambda: KV.paged(POOL, POOL, TABLE.float(), LEN), "table: expected integers"),
    "paged len": (lambda: KV.paged(POOL, POOL, TABLE, LEN[:, :2]), r"len: expected \[B, G\] = \[2, 3\], got \[2, 2\]"),
    "flat dims": (lambda: KV.ragged(POOL, POOL, LEN, LEN, 10), r"ragged k and v: expected \[T, D\], got \[5, 4, 8\]"),
    "ragged len": (lambda: KV.ragged(POOL[0], POOL[0], LEN, LEN[:1], 10), "len: expected"),
    "shorthand": (lambda: KV.of((K, 3)), "kv: expected a KV or a pair .* got tuple"),
    "text": (lambda: KV.of("kv"), "got str"),
    "three": (lambda: KV.of((K, K, K)), "got tuple"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    build, message = WRONG[case]
    with pytest.raises(ShapeError, match=message):
        build()


def test_validate_looks_at_the_numbers():
    """One synchronisation finds what shapes cannot say: reads outside the storage."""
    flat, three = _k(20, 4), torch.full((2, 3), 3)
    table = TABLE.clone()
    table[1, 2, 1] = 5
    KV.paged(POOL, POOL, table, three).validate()  # the wrong page holds no entry
    offsets = torch.arange(6).view(2, 3) * 3
    KV.ragged(flat, flat, offsets, three, capacity=3).validate()
    for kv, message in (
        (KV.dense(K, K, len=LEN + 1), r"len: expected 0 to 10, got 11 \(batch row 0, kv head 0\)"),
        (KV.dense(K, K, len=LEN - 11), "len: expected 0 to 10, got -1"),
        (KV.paged(POOL, POOL, table, three + 2), r"table: expected 0 to 4, got 5 \(batch row 1, kv head 2, page 1\)"),
        (KV.ragged(flat, flat, offsets + 3, three, 3), r"offsets \+ len: expected 0 to 20, got 21 .*row 1, kv head 2"),
        (KV.ragged(flat, flat, offsets - 1, three, 3), "offsets: expected 0 to 20, got -1"),
    ):
        with pytest.raises(ShapeError, match=message):
            kv.validate()
