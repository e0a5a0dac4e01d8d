"""The kernels of attention mass by key in Triton's interpreter, and compiled for Hopper without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.processes import run_in_the_interpreter, runs_without_triton

if os.environ.get("TRITON_INTERPRET") != "1":
    from tests.compiling import hopper

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_no_triton_without_a_device():
        """Votes on the CPU never import Triton."""
        code = (
            "import torch; from foveate.kv import KV; from foveate.scores.votes import window_votes;"
            "k = torch.randn(1, 1, 50, 16); how = dict(kernel=3, pooling='avg', reduce='mean', scale=1.0);"
            "window_votes(k[:, :, -8:], KV.dense(k, k), torch.arange(42, 50)[None], 8, **how)"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("dtype,d,w,lengths", [
        (torch.bfloat16, 128, 64, True), (torch.float16, 64, 32, False), (torch.bfloat16, 128, 100, False),
    ])  # fmt: skip
    def test_compiles_for_hopper(dtype, d, w, lengths, monkeypatch, tmp_path):
        """Registers, spills and shared memory of every launch at 128K tokens."""
        from foveate.kernels.triton import estimate_window
        from foveate.kernels.triton import estimate_window_launch as launch
        from foveate.kv import KV

        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)
        launch._stages.cache_clear()
        meta = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        with hopper(monkeypatch, tmp_path, estimate_window, "row_logsums", "key_mass") as built:
            q, k = meta(1, 32, w, d), meta(1, 8, 1 << 17, d)
            how = dict(reduce="sum", weight=None, scale=0.1, softcap=None, lse=None)
            length = meta(1, 8, dtype=torch.int32) if lengths else None
            launch.row_mass(q, KV.dense(k, k, len=length), meta(1, w, dtype=torch.int64), **how)
        launch._stages.cache_clear()
        assert len(built) == 1 + -(-w // 64)
        for name, kernel, usage in built:
            assert usage["STACK"] == 0, (name, usage)
            assert (kernel.metadata.shared + 1024) * 2 <= 228 * 1024, name
            assert usage["REG"] * 32 * kernel.metadata.num_warps * 2 <= 65536, (name, usage)
            assert "wgmma.mma_async" in kernel.asm["ptx"]

else:
    from foveate.kv import KV
    from foveate.scores import fused, votes
    from tests import estimate_window_cases as cases
    from tests.estimate_cases import plain

    kernels = cases.kernels

    @pytest.mark.parametrize("shape", [
        (1, 4, 1, 200, 16, 16),
        (2, 2, 2, 75, 5, 24),  # few rows, channels that are no power of two
        (1, 6, 2, 250, 1, 32),
        (1, 2, 1, 130, 64, 16),
    ])  # fmt: skip
    def test_mass(shape):
        cases.check(*shape, tolerance=2e-5)

    @pytest.mark.parametrize("options", [
        dict(reduce="max"),
        dict(weighted=True),
        dict(reduce="max", weighted=True, softcap=5.0),
        dict(known=True),
        dict(lengths=(100, 61, 37, 9), shift=3),
        dict(shift=90),  # some rows see a few keys, the first one none
        dict(dtype=torch.float16),
    ], ids=str)  # fmt: skip
    def test_options(options):
        cases.check(2, 4, 2, 100, 12, 16, tolerance=2e-5, **options)

    @pytest.mark.parametrize("reduce", ["sum", "max"])
    def test_more_rows_than_a_tile(reduce, monkeypatch):
        monkeypatch.setattr(kernels, "ROWS", 16)
        cases.check(1, 4, 2, 90, 40, 16, reduce=reduce, weighted=True, tolerance=2e-5)

    def test_split_keys(monkeypatch):
        monkeypatch.setattr(kernels, "SHARE", 1)
        cases.check(1, 2, 1, 256, 8, 16, tolerance=2e-5)
        monkeypatch.setattr(kernels, "SPLITS", 1)
        cases.check(1, 2, 1, 256, 8, 16, tolerance=2e-5)

    def test_what_is_left_to_torch():
        q, kv, _ = cases.problem(1, 2, 1, 60, 8, 16)
        assert kernels.masses(q, kv) and fused.windows(q) is kernels
        at = torch.arange(60).expand(1, 1, 60)
        for other in (KV.dense(kv.k, kv.v, pos=at), KV.dense(kv.k, kv.v, bias=at * 0.1), KV.dense(kv.k.half(), kv.v.half())):
            assert not kernels.masses(q, other)
        assert not kernels.masses(q[:, :, :0], kv)
        with plain():
            assert fused.windows(q) is None

    @pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
    @pytest.mark.parametrize("pooling", ["avg", "max"])
    def test_votes(reduce, pooling):
        q, kv, q_pos = cases.problem(2, 4, 2, 90, 10, 16, lengths=(90, 90, 57, 57))
        how = dict(kernel=5, pooling=pooling, reduce=reduce, scale=0.25)
        got, recent = votes.window_votes(q, kv, q_pos, 10, **how)
        with plain():
            want, same = votes.window_votes(q, kv, q_pos, 10, **how)
        assert torch.equal(recent, same)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
