"""The kernels of a probe's blocks in Triton's interpreter, and compiled for Hopper without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    from tests.compiling import hopper

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        from foveate.kernels.triton import estimate_heads
        from foveate.kernels.triton import estimate_heads_launch as launch

        meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        how = dict(tau=0.1, least=8, most=1024, block=128, scale=0.1, softcap=None)
        with hopper(monkeypatch, tmp_path, estimate_heads, "pool_probe", "choose_heads") as built:
            mass, many = meta(1, 32, 1 << 17), meta(2, 1, 32, dtype=torch.int32)
            launch.head_blocks(mass, mass, 128, 1 << 17, many, meta(1, 32, 128), meta(1, 8, 1024, 128), **how)
        assert [name for name, _, _ in built] == ["pool_probe", "choose_heads"]
        assert all(usage["STACK"] == 0 for _, _, usage in built), built

else:
    from foveate.kernels.triton import estimate_heads_launch as kernels
    from foveate.registry import parse
    from foveate.scores import fused, heads
    from foveate.scores.probes import Probe
    from tests.estimate_cases import differing, draw, peaked, plain, rounded

    def check(h, g, m, block, tau, *, most=None, least=2, rows=16, share=0.8, ties=False, softcap=None, b=2, seed=0):
        """Returns how many heads are aware."""
        nk, wide = -(-m // block), m + 5  # the last entries do not count
        mass = (draw(2, b, h, wide, seed=seed) * 3).exp()
        for i in range(h):  # heads that differ
            mass[0, :, i, : block * (i + 1)] *= 10.0
        mass = mass / mass[..., :m].sum(-1, keepdim=True) * rows
        mass[..., m:] = 100.0
        if ties:
            mass = rounded(mass, 2)
        kbar = draw(b, g, nk, 24, seed=seed + 1)
        mean = draw(b, h, 24, seed=seed + 2)
        mean[:, 0] = 0.0  # predicts equal mass
        if not ties:  # nearly the same mass for every block, however long
            for at in range(0, m, block):
                mass[0, :, 0, at : min(at + block, m)] = (1 + 0.001 * (at % 7)) / min(block, m - at)
            mass[0, :, 0, :m] *= rows / mass[0, :, 0, :m].sum(-1, keepdim=True)
        probe = Probe(mass[0], mass[1], rows)
        how = dict(tau=tau, least=least, most=most or nk, block=block, scale=0.3, softcap=softcap)
        assert fused.heads(probe.columns) is kernels
        got = heads.head_blocks(probe, mean, kbar, m, share, **how)
        with plain():
            want = heads.head_blocks(probe, mean, kbar, m, share, **how)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == torch.bool and torch.equal(mine, theirs), (mine, theirs)
        assert bool(got[0][..., 0].all()) and bool(got[1][..., 0].all())
        return int(got[2].sum())

    @pytest.mark.parametrize("h,g,m,block", [(2, 1, 130, 16), (3, 1, 100, 48), (2, 2, 33, 16)])
    def test_blocks(h, g, m, block):
        assert 0 < check(h, g, m, block, 0.2) < 2 * h
        assert check(h, g, m, block, 0.0, ties=True, b=1) == 0
        assert check(h, g, m, block, 10.0, softcap=2.0, b=1) == h
        check(h, g, m, block, 0.2, least=1, most=2, rows=11, share=0.99, b=1)

    def test_one_block():
        check(2, 1, 10, 16, 0.1, least=1)

    def test_plans():
        """Plans of the method are compared in `test_estimate.py` too, with other distances."""
        assert differing(parse("flexprefill:block=16,min_budget=32"), peaked(2, 1, 100, 16, 50)) == 0
