"""The kernel of tree searches in Triton's interpreter, and compiled for Hopper without a GPU."""

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
            "assert parse('hip:k=32,window=20,dense_layers=0').plan(x, State()) is not None"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("dtype,d,lists,size", [
        (torch.bfloat16, 128, 32, 64), (torch.bfloat16, 128, 8, 64), (torch.float16, 64, 32, 64),
        (torch.bfloat16, 128, 32, 1),
    ])  # fmt: skip
    def test_compiles_for_hopper(dtype, d, lists, size, monkeypatch, tmp_path):
        """Registers, spills and shared memory at 128K tokens: as many programs share a multiprocessor as are started."""
        from foveate.kernels.triton import estimate_tree
        from foveate.kernels.triton import estimate_tree_launch as launch
        from foveate.kv import KV

        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)
        monkeypatch.setattr(launch, "_shape", launch._shape.__wrapped__)  # nothing of this is remembered
        meta = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        many = 1 << 17 if size > 1 else 1
        q, k = meta(1, 32, many, d), meta(1, 8, 1 << 17, d)
        length, q_pos = (None, None) if size > 1 else (meta(1, 8, dtype=torch.int32), meta(1, 1, dtype=torch.int64))
        grid = dict(start=0, q_pos=q_pos, size=size, step=min(2, size), first=8, keep=256, block=2, tile=2, lists=lists)
        with hopper(monkeypatch, tmp_path, estimate_tree, "descend") as built:
            ends = meta(1, 1, many // size, dtype=torch.int64)
            how = dict(representative="center", scale=0.1, softcap=None)
            launch.descend(q, KV.dense(k, k, len=length), ends, **grid, **how)
        rows = max(16, -(-size // 2) * 32 // lists)
        _, programs, _ = launch._shape(0, rows, 256, d, 2)
        ((name, kernel, usage),) = built
        assert usage["STACK"] == 0, usage
        assert programs >= 2 and (kernel.metadata.shared + 1024) * programs <= 228 * 1024, name
        assert usage["REG"] * 32 * kernel.metadata.num_warps * programs <= 65536, usage
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async" in kernel.asm["ptx"]

else:
    from foveate.kv import KV
    from foveate.methods.base import State
    from foveate.methods.hip import HiP
    from foveate.scores import fused
    from tests import estimate_tree_cases as cases
    from tests.estimate_cases import plain

    SMALL, kernels = cases.SMALL, cases.kernels

    @pytest.mark.parametrize("options", [
        {},
        dict(k=24, block_k=8, tile=16, share="group"),
        dict(k=10, block_k=1, stride=4, representative="last"),  # ranges of a number that is no power of two
        dict(k=96, representative="first"),  # early rows have fewer blocks than they may keep
        dict(k=16, block_k=4, stride=5, window=3, sink=0),  # rows do not see every key they search; odd stride
        dict(k=8, tile=64, sink=17),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("h,g,m,start", [(1, 1, 190, 0), (4, 1, 141, 85)])
    def test_plans(options, h, g, m, start):
        method = HiP(**SMALL | options)
        x = cases.peaked(h, g, m, 16, start)
        assert 0 < cases.check(method, x) < 1
        if start:
            cases.check(method, cases.tied(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_softcap_and_head_dims(dtype):
        x = cases.replace(cases.peaked(2, 1, 130, 24, dtype=dtype), softcap=3.0)
        cases.check(HiP(**SMALL), x)

    def test_other_orders_of_work(monkeypatch):
        """One program, and one a search, do the same."""
        x, method = cases.peaked(4, 2, 90, 16, 30), HiP(**SMALL | dict(k=16))
        for programs in (1, 1000):
            monkeypatch.setattr(kernels, "_shape", lambda *a, n=programs: (2, n, None))
            monkeypatch.setattr(kernels, "device", lambda index: (1 << 17, 1))
            cases.check(method, x)

    @pytest.mark.parametrize("share", ["head", "group"])
    def test_decode(share):
        cases.check(HiP(**SMALL | dict(share=share)), cases.decode(3, 4, 2, 256, 16, (256, 111, 30)))

    def test_what_is_left_to_torch():
        q = torch.randn(1, 2, 60, 16)
        kv, at = KV.dense(q, q), torch.arange(60).expand(1, 2, 60)
        assert kernels.descents(q, kv, 32, 64, 2) and fused.trees(q) is kernels
        for rows, keep, block in ((200, 64, 2), (32, 9000, 2), (32, 64, 3), (32, 64, 64)):
            assert not kernels.descents(q, kv, rows, keep, block)
        for other in (KV.dense(q, q, pos=at), KV.dense(q, q, bias=at * 0.1), KV.dense(q.half(), q.half())):
            assert not kernels.descents(q, other, 32, 64, 2)
        assert fused.trees(q.double()) is None
        with plain():
            assert fused.trees(q) is None
        x = cases.peaked(2, 2, 150, 16)
        assert HiP(**SMALL | dict(k=36, block_k=3)).plan(x, State()) is not None
        assert HiP(**SMALL | dict(k=64, block_k=8, stages="32x4/16x4x96/8x1x64")).plan(x, State()) is not None
