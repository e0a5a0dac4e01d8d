"""The kernels of anchors and stripes in Triton's interpreter, and compiled for Hopper without a GPU."""

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
        """Planning on the CPU never imports Triton."""
        code = (
            "import torch; from foveate.registry import parse; from tests.prompts import call, prompt;"
            "from foveate.methods.base import State; x = call(*prompt('random', m=200));"
            "assert parse('anchor_attention:block=16,step=3').plan(x, State()) is not None"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("dtype,d", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)])
    def test_compiles_for_hopper(dtype, d, monkeypatch, tmp_path):
        """Registers, spills and shared memory of every launch at 128K tokens."""
        from foveate.kernels.triton import estimate_stripes
        from foveate.kernels.triton import estimate_stripes_launch as launch

        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)

        def meta(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = meta(1, 32, 1 << 17, d, dtype=dtype), meta(1, 8, 1 << 17, d, dtype=dtype)
        grid = dict(block=128, step=16, init=1, local=1, softcap=None)
        with hopper(monkeypatch, tmp_path, estimate_stripes, "anchor_peaks", "stripe_bits") as built:
            launch.anchors(q, k, start=0, scale=0.1, **grid)
            launch.stripe_bits(meta(1, 32, 1024, d, dtype=dtype), meta(1, 32, 1024), k, 64, first=0, **grid)
        assert len(built) == 2
        for name, kernel, usage in built:
            assert usage["STACK"] == 0, (name, usage)
            beside = 2 if dtype != torch.float32 else 1
            assert (kernel.metadata.shared + 1024) * beside <= 228 * 1024, name
            assert usage["REG"] * 32 * kernel.metadata.num_warps * beside <= 65536, (name, usage)
            assert "wgmma.mma_async" in kernel.asm["ptx"], name

else:
    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores import fused
    from tests import estimate_lowbit_cases as cases
    from tests.estimate_cases import differing, draw, peaked, plain

    SMALL = dict(block=16, step=3, init=1, local=1)

    @pytest.mark.parametrize("shape,grid", [
        ((1, 4, 1, 200, 0, 16), {}),
        ((2, 2, 2, 133, 37, 24), {"local": 2, "init": 4}),  # a chunk, partial blocks, regions that meet
        ((1, 2, 1, 150, 103, 16), {"local": 0, "step": 1}),
        ((1, 3, 1, 150, 90, 32), {"block": 32, "step": 2, "softcap": 2.0}),
        ((1, 2, 1, 70, 69, 16), {"step": 2}),  # one row
        ((1, 2, 1, 70, 20, 16), {"scale": -0.25}),
    ])  # fmt: skip
    def test_anchors(shape, grid):
        cases.check_anchors(*shape, tolerance=1e-5, **SMALL | grid)

    @pytest.mark.parametrize("shape,grid", [
        ((1, 4, 1, 200, 0, 16), {}),
        ((2, 2, 2, 233, 100, 24), {"local": 2, "init": 3}),
        ((1, 3, 1, 150, 90, 32), {"block": 32, "step": 1, "softcap": 2.0}),  # heads that are no power of two
        ((1, 2, 1, 150, 149, 16), {"local": 0, "step": 5}),
    ])  # fmt: skip
    def test_stripes(shape, grid):
        """Index by index."""
        assert cases.check_stripes(*shape, **SMALL | grid) > 20

    def test_halves():
        """Products of half precision are exact in fp32; mean queries are rounded to it, so one row may differ."""
        cases.check_anchors(1, 2, 1, 130, 20, 16, tolerance=1e-5, dtype=torch.float16, **SMALL)
        assert cases.check_stripes(1, 2, 1, 200, 20, 16, dtype=torch.float16, slack=1, **SMALL) > 20

    def test_spans_and_parts_of_heads(monkeypatch):
        """Long rows are cut, and groups of many blocks leave a product room for some of the heads."""
        monkeypatch.setattr(cases.far, "SPAN", 64)
        monkeypatch.setattr(cases.far, "ROWS", 16)
        assert cases.check_stripes(1, 6, 2, 250, 10, 16, **SMALL | {"step": 5}) > 20

    def test_nothing_far():
        """A call that ends inside its first group lists nothing."""
        q, k = draw(1, 2, 40, 16), draw(1, 1, 40, 16, seed=1)
        from foveate.kv import KV

        args = dict(start=0, scale=1.0, **SMALL)
        index, count = cases.stripes.stripes(q, KV.dense(k, k), torch.full((1, 2, 3), -1e9), **args)
        assert index.shape[:3] == (1, 2, 1) and int(count.sum()) == 0

    def test_keys_of_pages(monkeypatch):
        """Storage that has to be gathered, a kv head at a time."""
        from foveate.kv import KV

        k = draw(1, 2, 192, 16, seed=1)
        table = torch.randperm(24, generator=torch.Generator().manual_seed(2)).view(1, 2, 12).int()
        pool = torch.empty(24, 16, 16)
        pool[table.flatten().long()] = k.reshape(24, 16, 16)
        pages, q = KV.paged(pool, pool, table, len=torch.full((1, 2), 192)), draw(1, 4, 192, 16)
        monkeypatch.setattr("foveate.scores.keys.BUDGET", 1)
        args = dict(start=0, scale=1.0, **SMALL)
        limit = torch.full((1, 4, 12), 1.0)
        for kv in (pages, KV.dense(k, k)):
            got = cases.stripes.anchors(q, kv, **args), *cases.stripes.stripes(q, kv, limit, **args)
            with plain():
                want = cases.stripes.anchors(q, KV.dense(k, k), **args)
                index, count = cases.stripes.stripes(q, KV.dense(k, k), limit, **args)
            torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
            cases.same(got[1], got[2], index, count)

    def test_what_is_left_to_torch():
        q = draw(1, 2, 60, 16)
        finds = cases.far.finds
        assert finds(64, 16, q) and not finds(48, 16, q) and not finds(64, 256, q) and not finds(256, 1, q)
        assert fused.stripes(q) is cases.far and fused.stripes(q.double()) is None
        with plain():
            assert fused.stripes(q) is None

    @pytest.mark.parametrize("h,g,start", [(2, 2, 0), (4, 1, 53)])
    @pytest.mark.parametrize("name", [
        "anchor_attention:block=16,step=3,theta=0.5",
        "anchor_attention:block=16,step=2,theta=1.0,local=2,share=group",
        "anchor_attention:block=16,step=2,theta=inf",
        "anchor_attention:block=16,step=2,theta=-inf",
    ])  # fmt: skip
    def test_plans(name, h, g, start):
        x = peaked(h, g, 170, 16, start)
        parse(name).plan(x, State()).validate()
        assert differing(parse(name), x) == 0
