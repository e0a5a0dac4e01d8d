"""The fused estimators in Triton's interpreter (a process of its own, see `test_triton.py`); on a GPU see `tests/gpu`."""

from __future__ import annotations

import os

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
            "[parse(m).plan(x, State()) for m in ('minference', 'minference:pattern=block_sparse', 'flexprefill:block=16')]"
        )
        runs_without_triton(code)

else:
    from foveate.kernels.triton import estimate_launch as kernels
    from foveate.kv import KV
    from foveate.methods.base import State
    from foveate.methods.flexprefill import FlexPrefill
    from foveate.methods.minference import MInference
    from foveate.scores.pooled import block_pool
    from tests import estimate_cases as cases

    @pytest.fixture(autouse=True)
    def small_pieces(monkeypatch):
        monkeypatch.setattr(kernels, "ENTRIES", 256)

    # ------------------------------------------------------------------ the probe
    @pytest.mark.parametrize("shape,softcap,dtype", [
        ((1, 4, 2, 200, 200, 32, 16), None, torch.float32),
        ((2, 6, 2, 40, 257, 24, 64), 5.0, torch.float32),  # a chunk shorter than the probe, odd sizes
        ((1, 2, 1, 130, 130, 32, 128), None, torch.float16),
        ((1, 3, 3, 5, 300, 16, 5), None, torch.float32),
        ((1, 2, 1, 1, 1, 16, 64), None, torch.float32),
    ])  # fmt: skip
    def test_probe(shape, softcap, dtype):
        cases.check_probe(*shape, softcap=softcap, dtype=dtype, tolerance=1e-5)

    def test_probe_over_many_programs(monkeypatch):
        """Splits of the first pass, and programs of the second that hand the sheared part on."""
        monkeypatch.setattr(kernels, "PROBE_ROWS", 16)
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, 2))
        cases.check_probe(1, 4, 2, 100, 250, 16, 11, tolerance=1e-5)

    @pytest.mark.parametrize("end", [64, 128, 192])
    def test_probe_over_keys_of_two_kinds(monkeypatch, end):
        """The edge inside the first program, between programs, and at the last tile."""
        monkeypatch.setattr(kernels, "PROBE_ROWS", 64)
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, 2))
        ran = []
        last = kernels.last_queries
        monkeypatch.setattr(kernels, "last_queries", lambda *args: ran.append(args) or last(*args))
        cases.check_probe(1, 4, 2, 100, 250, 16, 11, tolerance=1e-5, end=end)
        cases.check_probe(1, 4, 2, 100, 250, 16, 11, tolerance=1e-5, end=end + 1)  # between no two tiles: not by kernels
        assert len(ran) == 1

    def test_what_the_probe_leaves_to_others():
        q, k = cases.draw(1, 4, 50, 16), cases.draw(1, 2, 50, 16)
        plain = KV.dense(k, k)
        assert kernels.probes(q, plain, 50) and not kernels.probes(q, plain, 129)
        assert not kernels.probes(q, KV.dense(k, k, bias=torch.zeros(1, 2, 50)), 8)
        assert not kernels.probes(q, KV.dense(k, k, len=torch.tensor([[50, 50]])), 8)
        assert not kernels.probes(q.half(), plain, 8)

    # ------------------------------------------------------------------ long rows
    @pytest.mark.parametrize("n", [1, 70, 600])
    def test_entries(n):
        x = cases.draw(2, 1, 2, n)
        x[1] = cases.rounded(x[1], 2)
        x[0, 0, 0, ::3], x[0, 0, 1, 1::4] = float("nan"), -0.0
        cases.check_entries(x, (5, 40, 9, 3), (3, 0, 7, 5))

    def test_entries_of_equal_scores():
        x = torch.zeros(2, 1, 1, 300)
        x[1, 0, 0, 100:] = 1.0
        cases.check_entries(x, (10, 250), (0, 2))
        x[0] = 1.9999998807907104  # all digits of its bits are the last ones: what lies above was settled before
        x[0, 0, 0, 7:20], x[1] = 2.5, x[0]
        cases.check_entries(x, (30, 4), (0, 1))
        cases.check_mass(x[0], 0.5)

    @pytest.mark.parametrize("n", [1, 300])
    def test_mass(n):
        x = torch.rand(4, n, generator=torch.Generator().manual_seed(n)) ** 8
        x[1], x[2], x[3] = cases.rounded(x[1], 4), 0.0, 1 / 3
        for p in (0.0, 0.4, 0.9, 1.0):
            cases.check_mass(x, p)
        cases.check_mass(x, torch.tensor([0.4, 1.0, 1.0, 0.9]))
        cases.check_mass(torch.stack((x, x)), torch.tensor([0.0, 0.9, 0.4, 1.0], dtype=torch.float64))

    @pytest.mark.parametrize("many", [1, 5, 250])
    def test_merged_diagonals(many, monkeypatch):
        monkeypatch.setattr(kernels, "MERGE", 64)  # several pieces
        for step in (1, 3, 40):
            cases.check_merge(900, step, many, seed=step)

    # ------------------------------------------------------------------ blocks
    def test_means():
        x = cases.draw(2, 3, 100, 24)
        for block, offset in ((16, 0), (16, 5), (48, 40), (128, 3)):
            got = kernels.block_means(x, block, offset)
            with cases.plain():
                want = block_pool(x, block, offset=offset)
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("nq,nk,first,softcap", [(5, 5, 0, None), (3, 8, 5, 3.0)])
    def test_blocks(nq, nk, first, softcap):
        prob = cases.check_scores(nq, nk, first, 4, 2, 24, softcap, tolerance=1e-5, b=1)
        for score, p in ((prob, 0.9), (cases.rounded(prob, 64), 0.6)):
            cases.check_choice(score, first, keep=(1, 2, 3, 4))
            cases.check_choice(score, first, p=p)
            cases.check_pairs(score, first, p, 2)

    def test_pairs_that_tie_go_to_the_first_rows():
        cases.check_pairs(torch.full((1, 4, 6, 6), 0.125).tril(), 0, 0.6, 2)

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_nothing_and_everything(p):
        prob = cases.check_scores(3, 4, 1, 2, 1, 16, tolerance=1e-5, b=1)
        cases.check_choice(prob, 1, p=p)
        cases.check_pairs(prob, 1, p, 1)

    def test_a_share_per_head():
        prob = cases.check_scores(5, 7, 2, 4, 2, 24, tolerance=1e-5, b=1)
        for lists in (4, 2):
            cases.check_pairs(prob, 2, torch.tensor([[0.5, 1.0, 0.0, 0.9]]), lists)

    # ------------------------------------------------------------------ whole plans
    PLANS = [
        MInference(columns=12, diagonals=50, sink=5, local=20, last_q=16),
        MInference(columns=12, diagonals=50, sink=5, local=20, last_q=16, share="group"),
        MInference(pattern="block_sparse", blocks=2),
        MInference(pattern="block_sparse", blocks=2, share="group"),
        FlexPrefill(block=16, min_budget=32, tau=0.0),
        FlexPrefill(block=16, min_budget=32, gamma=0.7, tau=10.0),  # every head trusts pooled blocks
        FlexPrefill(block=16, min_budget=32, gamma=0.7, tau=10.0, share="group"),
    ]

    @pytest.mark.parametrize("method", PLANS, ids=str)
    def test_plans(method):
        """Of a later chunk: its first block of queries is partial."""
        x = cases.peaked(4, 2, 150, 16, 40)
        method.plan(x, State()).validate()
        assert cases.differing(method, x) == 0

    def test_a_profile_mixes_patterns():
        kinds = (("vertical_slash", 12, 60), ("a_shape", 7, 33), ("block_sparse", 2, 0), ("vertical_slash", 40, 50))
        assert cases.differing(MInference(sink=5, local=20, profile=(kinds,)), cases.peaked(4, 2, 200, 16)) == 0
