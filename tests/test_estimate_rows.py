"""The kernels of antidiagonals and lists of rows in Triton's interpreter, and compiled for Hopper without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.processes import run_in_the_interpreter, runs_without_triton

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_no_triton_without_a_device():
        """Planning on the CPU never imports Triton."""
        code = (
            "import torch; from foveate.registry import parse; from tests.prompts import call, prompt;"
            "from foveate.methods.base import State; x = call(*prompt('random', m=200));"
            "[parse(m).plan(x, State()) for m in ('xattention:block=16,stride=4', 'spargeattn:block_q=32,block_k=16')]"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("dtype,d", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)])
    def test_compiles_for_hopper(dtype, d, monkeypatch, tmp_path):
        """Registers, spills and shared memory of every launch at 128K tokens: the product fills a multiprocessor."""
        triton = pytest.importorskip("triton")
        from foveate.kernels.gluon.shim import compile_sm90
        from foveate.kernels.triton import estimate_rows, estimate_rows_lists, estimate_rows_pooled
        from foveate.kernels.triton import estimate_rows_launch as launch

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("this Triton ships no cuobjdump")
        launches = []

        class Recorder:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *args, **options: launches.append((self.kernel, args, options))

        for module, names in (
            (estimate_rows, ("antidiagonals", "block_sums")),
            (estimate_rows_pooled, ("similarity", "visible_logits")),
            (estimate_rows_lists, ("choose_rows",)),
        ):
            for name in names:
                monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
        monkeypatch.setattr(launch, "tile", launch.tile.__wrapped__)  # nothing of this is remembered
        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)

        def meta(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k = meta(1, 32, 1 << 17, d, dtype=dtype), meta(1, 8, 1 << 17, d, dtype=dtype)
        launch.block_mass(q, k, 16, 128, 0, 1024, start=0, scale=0.1, softcap=None)
        launch.self_similarity(q, 128, 0, False)
        launch.visible_logits(meta(1, 32, 1024, d), meta(1, 8, 2048, d), 0.1, None, 0, 128, 64)
        launch.row_lists(meta(1, 32, 1024, 1024), 0.9, 0, 128, 128, lists=8)
        gates = dict(alike=meta(1, 32, 2048, dtype=torch.bool), trusted=meta(1, 32, 1024, dtype=torch.bool))
        launch.row_lists(meta(1, 32, 1024, 2048), meta(32), 0, 128, 64, lists=32, logits=True, **gates)
        assert len(launches) == 6
        for kernel, args, options in launches:
            built, name = compile_sm90(kernel, list(args), options), kernel.fn.__name__
            (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
            command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert int(re.search(r"STACK:(\d+)", usage)[1]) == 0, (name, usage)
            beside = 1 if name == "antidiagonals" else 2
            assert (built.metadata.shared + 1024) * beside <= 228 * 1024, name
            assert int(re.search(r"REG:(\d+)", usage)[1]) * 32 * built.metadata.num_warps * beside <= 65536, usage
            assert ("wgmma.mma_async" in built.asm["ptx"]) == (name in ("antidiagonals", "visible_logits"))

else:
    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores import antidiagonal, fused
    from tests import estimate_rows_cases as cases
    from tests.estimate_cases import differing, draw, peaked, plain, rounded

    kernels = cases.kernels

    # ------------------------------------------------------------------ antidiagonals
    @pytest.mark.parametrize("shape,softcap", [
        ((1, 4, 1, 200, 0, 16, 4, 16), None),
        ((2, 2, 2, 75, 37, 24, 8, 16), None),  # a chunk, partial blocks, channels that are no power of two
        ((1, 6, 2, 150, 101, 16, 4, 32), 5.0),
        ((1, 1, 1, 100, 99, 32, 16, 16), None),  # one row, one cell a block
        ((1, 2, 1, 70, 20, 16, 1, 16), None),  # exact attention
        ((1, 2, 1, 90, 0, 16, 5, 20), None),
    ])  # fmt: skip
    def test_mass(shape, softcap):
        cases.check_mass(*shape, softcap=softcap, tolerance=2e-5)

    def test_mass_of_halves():
        cases.check_mass(1, 4, 2, 130, 33, 16, 4, 16, dtype=torch.float16, tolerance=2e-5)

    def test_mass_in_pieces():
        assert cases.check_mass(1, 4, 2, 150, 20, 16, 4, 16, budget=200, tolerance=2e-5) > 4

    def test_rows_of_many_blocks(monkeypatch):
        """`block_sums` holds some of the rows of a block at a time."""
        monkeypatch.setattr(kernels, "AT", 32)
        cases.check_mass(1, 2, 1, 200, 0, 16, 4, 16, tolerance=2e-5)

    def test_what_is_left_to_torch():
        q = draw(1, 2, 60, 16)
        assert kernels.masses(q, 4, 16, 10) and not kernels.masses(q, 4, 12, 10) and not kernels.masses(q, 4, 16, 9000)
        assert fused.rows(q) is kernels and fused.rows(q.double()) is None
        with plain():
            assert fused.rows(q) is None
        cases.collect(q, draw(1, 1, 60, 16), 5, 15, 0, scale=1.0)

    # ------------------------------------------------------------------ similarity and pooled scores
    @pytest.mark.parametrize("n,d,block,offset", [(100, 16, 16, 0), (75, 24, 16, 5), (40, 32, 48, 40), (3, 16, 64, 0)])
    def test_similarity(n, d, block, offset, monkeypatch):
        monkeypatch.setattr(kernels, "CENTRE", 32)
        cases.check_similarity(2, 2, n, d, block, offset)

    @pytest.mark.parametrize("sizes", [(16, 16), (32, 16), (16, 48)])
    def test_logits(sizes):
        cases.check_logits(4, 2, 5, 20, 24, 3, *sizes, tolerance=1e-5)
        cases.check_logits(2, 2, 20, 40, 16, 0, *sizes, softcap=3.0, tolerance=1e-5)

    # ------------------------------------------------------------------ lists
    @pytest.mark.parametrize("first,nq,groups", [(0, 4, 1), (5, 2, 2)])
    def test_lists(first, nq, groups):
        mass = torch.rand(1, 4, nq, first + nq, generator=torch.Generator().manual_seed(1)) ** 6
        mass[0, 2], mass[0, 3] = rounded(mass[0, 2], 8), 0.25  # ties, also of zeros
        mass[0, 1, -1] = 0.35 - 0.01 * torch.arange(first + nq)  # whether the forced ones count decides
        mass[0, 1, -1, 0], mass[0, 1, -1, -1] = 0.3, 0.1
        each = torch.tensor([0.0, 0.5, 0.9, 1.0]).view(groups, -1, 1)
        for share in (0.6, each):
            cases.check_lists(mass, share, first, groups)

    def test_lists_of_rows_without_mass():
        cases.check_lists(torch.zeros(1, 2, 4, 4), 0.9, 0, 1)

    @pytest.mark.parametrize("sizes,first", [((32, 16), 1), ((16, 16), 2), ((16, 48), 10)])
    def test_trust(sizes, first):
        nk = -(-(first + 3) * sizes[0] // sizes[1])
        score = cases.spread(1, 4, 3, nk)
        each = torch.tensor([0.2, 0.0, 0.6, 1.0], dtype=torch.float64)
        for share, topk in ((each, None), (0.0, 0.4)):
            assert 0 < cases.check_trust(score, share, topk, first, *sizes, 2) < 1
        cases.check_trust(torch.zeros(1, 4, 3, nk), 0.5, None, first, *sizes, 1)  # all tie

    # ------------------------------------------------------------------ whole plans
    PLANS = [
        "xattention:block=16,stride=4,threshold=0.6",
        "xattention:block=16,stride=8,threshold=0.6,share=group",
        "xattention:block=32,stride=4,threshold=1.0",
        "spargeattn:block_q=32,block_k=16,cdf=0.7,theta=0.07",
        "spargeattn:block_q=32,block_k=16,cdf=0.7,theta=-0.1,share=group",
        "spargeattn:block_q=32,block_k=16,topk=0.4,theta=0.07",
    ]

    @pytest.mark.parametrize("h,g,start", [(2, 2, 0), (4, 1, 53)])
    @pytest.mark.parametrize("name", PLANS)
    def test_plans(name, h, g, start):
        assert differing(parse(name), peaked(h, g, 110, 16, start)) == 0

    @pytest.mark.parametrize("name", PLANS[:1] + PLANS[3:4])
    def test_plans_in_pieces(name, monkeypatch):
        x, method = peaked(4, 2, 110, 16, 37), parse(name)
        whole = method.plan(x, State()).to_mask()
        monkeypatch.setattr(kernels, "HELD", 100)
        monkeypatch.setattr("foveate.methods.xattention.WHOLE", 1)
        monkeypatch.setattr("foveate.methods.spargeattn.list_cost", lambda q, nk: 1 << 23)
        assert torch.equal(method.plan(x, State()).to_mask(), whole)

    def test_a_share_for_each_head(monkeypatch):
        """As a profile gives it: `[G, r, 1]`, cut to the kv heads of a piece."""
        monkeypatch.setattr(kernels, "HELD", 500)
        x, method = peaked(4, 2, 110, 16), parse("xattention:block=16,stride=4")
        tau = torch.tensor([0.1, 0.5, 0.8, 1.0]).view(2, 2, 1)
        monkeypatch.setattr(type(method), "_thresholds", lambda self, x, state: tau)
        assert len(list(antidiagonal.block_mass(x.q, x.kv, 4, 16, start=0, scale=x.scale))) > 1
        assert differing(method, x) == 0
