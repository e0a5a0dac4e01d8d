"""Quantised stores and what attention over their codes must give, for the interpreter and for a GPU."""

from __future__ import annotations

import torch

from foveate.cache.fixed import fix
from foveate.cache.quantised import QuantisedStore
from foveate.kernels.dispatch import attend
from foveate.layout import Layout
from foveate.methods.base import Selection
from foveate.packed import PackedKV

# (bits, value bits, group, residual), head dims of keys and values, query heads of a kv head
CASES = [
    ((4, None, 32, 64), 64, 64, 4),
    ((4, None, 64, 64), 128, 128, 8),
    ((2, None, 32, 32), 64, 32, 1),
    ((8, 4, 64, 64), 32, 64, 3),
    ((4, 8, 8, 16), 24, 40, 2),  # groups smaller than a step, widths that are no powers of two
    ((2, 2, 4, 8), 16, 96, 2),  # more groups of a token's channels than the kernel serves: plain code
]
ROWS = [(150, 150), (130, 70)]


def store_of(rule, d, dv, rows, dtype, device, evicted=False, seed=0):
    """A store of 2 rows and 2 kv heads that has quantised, and a function that draws n more entries."""
    gen = torch.Generator().manual_seed(seed)

    def new(n):
        return tuple(torch.randn(2, 2, n, w, generator=gen).to(device, dtype) for w in (d, dv))

    n = max(rows)
    valid = (torch.arange(n) >= torch.tensor([[n - r] for r in rows])).to(device)
    store = QuantisedStore.empty(*new(0), *rule).append(*new(n), None if min(rows) == n else valid, [0, 0])
    if evicted:
        index = torch.arange(0, n, 2).expand(2, 2, -1).to(device)
        bias = torch.randn(2, 2, (n + 1) // 2, generator=gen).to(device)
        bias[:, :, 5:9] = float("-inf")
        store = store.select(Selection(index, torch.tensor([[r // 2] * 2 for r in rows], device=device), bias))
    return store, new


@torch.no_grad()
def check(store, heads, tolerance, q_pos=None, seed=0):
    """Attention over the codes equals the oracle's over the dense copy, and makes no copy."""
    kv = store.view()
    assert isinstance(kv, PackedKV)
    d = kv.shape[3]
    q = torch.randn(2, 2 * heads, 1, d, generator=torch.Generator().manual_seed(seed)).to(kv.device, kv.dtype)
    plan = Layout.dense(2, 2 * heads, 1, kv.capacity, q_pos=q_pos)
    got = attend(q, kv, plan, return_lse=True, backend="packed")
    assert not kv.made
    dense = kv.to_dense()
    want = attend(q, dense, plan, return_lse=True, backend="reference")
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], want[1], atol=tolerance, rtol=tolerance)
    return got[0]


def check_steps(case, rows, dtype, device, fixed, evicted, tolerance, steps=2):
    rule, d, dv, heads = case
    store, new = store_of(rule, d, dv, rows, dtype, device, evicted)
    seen = list(rows)
    if fixed:
        store = fix(store, seen)
    for i in range(steps):
        store = store.append(*new(1), None, seen)
        seen = [s + 1 for s in seen]
        at = torch.tensor([[s - 1] for s in seen], device=device) if evicted else None
        check(store, heads, tolerance, at, i)
