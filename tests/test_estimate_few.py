"""The mean mass of a few tokens: in Triton's interpreter (a process of its own, see `test_triton.py`) and compiled."""

from __future__ import annotations

import os

import pytest
import torch

from tests.compiling import hopper
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """Two programs share a multiprocessor at up to 64 queries."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import estimate_few
        from foveate.kernels.triton import estimate_few_launch as kernels
        from foveate.kv import KV

        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        monkeypatch.setattr(kernels, "device", lambda index: (232448, 132))
        kernels._plan.cache_clear()
        kv = KV.dense(*(meta(1, 8, 131584, 128) for _ in range(2)), len=meta(1, 8, dtype=torch.int32))
        with hopper(monkeypatch, tmp_path, estimate_few, "mean_mass") as built:
            for n in (9, 17):
                q, lse = meta(1, 32, n, 128), meta(1, 32, n, dtype=torch.float32)
                kernels.mean_mass(q, kv, meta(1, n, dtype=torch.int64), lse, scale=0.1)
        kernels._plan.cache_clear()
        for _, done, usage in built:
            assert usage["STACK"] == 0 and usage["REG"] * 32 * done.metadata.num_warps * 2 <= 2 * 65536
            assert "cp.async.cg.shared.global" in done.asm["ptx"]
        assert (built[0][1].metadata.shared + 1024) * 2 <= 228 * 1024 and built[0][2]["REG"] <= 255

else:
    from foveate.kernels import reference
    from foveate.kernels.base import Want
    from foveate.kernels.triton import estimate_few_launch as kernels
    from foveate.kv import KV
    from foveate.layout import Layout
    from foveate.methods.pillar_attn import mean_mass

    @pytest.mark.parametrize("lens,n,r,d,softcap", [
        ((90, 90), 5, 4, 32, None), ((61, 200), 9, 2, 16, None), ((3, 150), 6, 1, 64, None), ((130, 129), 4, 3, 24, 5.0),
    ])  # fmt: skip
    def test_the_plain_one(lens, n, r, d, softcap, monkeypatch):
        """Rows of different length, one shorter than the call, garbage behind them, several steps a program."""
        monkeypatch.setattr(kernels, "KEYS", 32)
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, 1))
        kernels._plan.cache_clear()
        gen = torch.Generator().manual_seed(n)
        m, g = max(lens) + 19, 2
        q, k, v = (torch.randn(2, h, w, d, generator=gen) for h, w in ((g * r, n), (g, m), (g, m)))
        for i, length in enumerate(lens):
            k[i, :, length:] = float("nan")
        kv = KV.dense(k, v, len=torch.tensor([[x] * g for x in lens], dtype=torch.int32))
        at = torch.tensor(lens)[:, None] - n + torch.arange(n)
        _, lse, _ = reference.forward(
            q, kv, Layout.dense(2, g * r, n, m), scale=0.2, softcap=softcap or 0.0, want=Want(lse=True)
        )
        assert kernels.reads(q, kv)
        got = kernels.mean_mass(q, kv, at, lse, scale=0.2, softcap=softcap)
        want = mean_mass(q, KV.dense(k.nan_to_num(), v, len=kv.len), at, scale=0.2, softcap=softcap)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)
        kernels._plan.cache_clear()

    def test_what_is_left_to_the_plain_one():
        q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 40, 16)
        assert kernels.reads(q, KV.dense(k, k)) and not kernels.reads(q.double(), KV.dense(k.double(), k.double()))
        assert not kernels.reads(q.repeat(1, 8, 1, 1), KV.dense(k, k))  # 16 * 9 queries
        assert not kernels.reads(q, KV.dense(k, k, bias=torch.zeros(1, 2, 40)))
