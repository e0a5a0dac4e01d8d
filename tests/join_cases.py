"""Parts put together by one kernel against `combine.merge`; run in the interpreter and on a device."""

from __future__ import annotations

import torch

from foveate.combine import merge
from foveate.kernels.join import _twin


def check(parts, heads, n, d, dtype, device, transposed=False):
    """Rows without any key in one part or in all, log-sum-exps far apart, NaN in no place that counts."""
    gen = torch.Generator(device).manual_seed(n + d + parts)
    given = []
    for i in range(parts):
        shape = (2, n, heads, d) if transposed else (2, heads, n, d)
        out = torch.randn(shape, generator=gen, device=device).to(dtype)
        out = out.transpose(1, 2) if transposed else out
        lse = torch.randn(2, heads, n, generator=gen, device=device) * 30
        empty = torch.rand(2, heads, n, generator=gen, device=device) < 0.3
        empty[:, :, 0] = True  # in all parts
        empty[:, :, 1:2] = i > 0  # in all but the first
        lse[empty] = float("-inf")
        out[empty] = 0
        given.append((out, lse))
    twin = _twin()
    assert twin is not None and twin.why_not(given) is None
    out, lse = twin.merge(given)
    want, whole = merge([(o.float(), p) for o, p in given])
    assert out.dtype == dtype and out.stride() == given[0][0].stride()
    tol = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out.float(), want, atol=tol, rtol=tol)
    torch.testing.assert_close(lse, whole, atol=2e-5, rtol=2e-6)
    assert (out[:, :, 0] == 0).all() and torch.isneginf(lse[:, :, 0]).all()
