"""Problems for the kernels of attention mass by key, on any device; the plain code of `scores/window.py` judges in fp64."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.kernels.triton import estimate_window_launch as kernels
from foveate.kv import KV
from foveate.scores import window
from tests.estimate_cases import draw, plain


def problem(b, h, g, m, w, d, *, lengths=None, dtype=torch.float32, device="cpu"):
    """(q, kv, q_pos): w rows that end at the last entry of their batch row and look at a few keys; nothing past the end."""
    q, k = draw(b, h, w, d, dtype=dtype), draw(b, g, m, d, seed=1, dtype=dtype)
    for i in range(3):
        q = q + (1.2 - 0.2 * i) * k[:, :, m // (i + 3)].repeat_interleave(h // g, 1)[:, :, None]
    ends = torch.full((b, g), m) if lengths is None else torch.tensor(lengths).view(b, g)
    for row in range(b):
        for head in range(g):
            k[row, head, int(ends[row, head]) :] = float("nan")
    q = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # strides of a model
    kv = KV.dense(k, k, len=None if lengths is None else ends.int())
    q_pos = ends.amax(1, keepdim=True) - w + torch.arange(w)
    return (
        q.to(device),
        replace(kv, k=k.to(device), v=k.to(device), len=None if kv.len is None else kv.len.to(device)),
        q_pos.to(device),
    )


def check(b, h, g, m, w, d, *, tolerance, lengths=None, reduce="sum", weighted=False, known=False, softcap=None,
          shift=0, dtype=torch.float32, device="cpu"):  # fmt: skip
    """Mass against fp64. shift: how far the rows stand before the end; known: attention has returned the log-sum-exp."""
    q, kv, q_pos = problem(b, h, g, m, w, d, lengths=lengths, dtype=dtype, device=device)
    q_pos = q_pos - shift
    weight = draw(w, seed=3, device=device) if weighted else None
    how = dict(reduce=reduce, weight=weight, scale=d**-0.5, softcap=softcap)
    lse = logsumexp(q, kv, q_pos, d**-0.5, softcap).float() if known else None
    assert kernels.masses(q, kv)
    got = window.row_mass(q, kv, q_pos, lse=lse, **how)
    want = truth(q, kv, q_pos, **how)
    assert got.dtype == torch.float32 and bool(torch.isfinite(got).all())
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    with plain():
        torch.testing.assert_close(window.row_mass(q, kv, q_pos, lse=lse, **how).double(), want, atol=1e-4, rtol=1e-4)
    if reduce == "sum" and not weighted and shift < m:
        assert float(want.amax()) > 2 * float(want.mean())  # not flat


def logits(q, kv, q_pos, scale, softcap):
    """fp64 `[B, H, w, M]`, -inf where a row does not see an entry."""
    r, m = q.shape[1] // kv.shape[1], kv.capacity
    k = kv.k.double().nan_to_num(0.0).repeat_interleave(r, 1)
    s = q.double() @ k.transpose(-1, -2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    at = torch.arange(m, device=q.device)
    seen = (at < kv.lengths().repeat_interleave(r, 1)[..., None])[:, :, None] & (at <= q_pos[:, None, :, None])
    return s.masked_fill(~seen, float("-inf"))


def logsumexp(q, kv, q_pos, scale, softcap):
    return logits(q, kv, q_pos, scale, softcap).logsumexp(-1)


def truth(q, kv, q_pos, *, reduce, weight, scale, softcap):
    p = logits(q, kv, q_pos, scale, softcap).softmax(-1).nan_to_num(0.0)  # rows that see nothing give nothing
    if weight is not None:
        p = p * weight.double()[:, None]
    return p.amax(2) if reduce == "max" else p.sum(2)
