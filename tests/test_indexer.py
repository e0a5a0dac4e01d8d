"""Kernels of lightning indexers: in Triton's interpreter (a process of its own) and compiled."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests.compiling import hopper
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """At 128K: nothing spills, codes come asynchronously, are converted by the machine and stay in registers."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import indexer, indexer_launch, labels_launch
        from foveate.kv import KV

        monkeypatch.setattr(labels_launch, "device", lambda index: (1 << 17, 132))
        monkeypatch.setattr(indexer_launch, "_native", lambda device: True)
        meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        heads, q, k = 64, meta(1, 32, 1, 128, dtype=torch.bfloat16), meta(1, 8, 1 << 17, 128, dtype=torch.bfloat16)
        kv = KV.dense(k, k, len=meta(1, 8, dtype=torch.int32))
        weights = meta(heads, 128, 4096), meta(128, 128), meta(heads, 4096), meta(2, 128)
        back, turn = (meta(1, 1, 128), meta(1, 1, 128), meta(128, dtype=torch.int32)), meta(1, 2, 32)
        data, scale = meta(1, 1 << 17, 128, dtype=torch.uint8), meta(1, 1 << 17)
        names = ("project", "round_rows", "score_tokens", "score_rows")
        with hopper(monkeypatch, tmp_path, indexer, *names) as built:
            indexer_launch.rank(q, kv, weights, back, turn, data, scale, eps=1e-6, floor=1e-4, append=True)
            pos = meta(1, 1024, dtype=torch.int64)
            indexer_launch.score_prompt(meta(1, 1024, heads, 128), meta(1, 1024, heads), data, scale, pos, 1 << 17)
            pool = meta(4096, 64, 128, dtype=torch.bfloat16)
            pages = KV.paged(pool, pool, meta(1, 8, 2048, dtype=torch.int32), kv.len)
            indexer_launch.products(q, pages, weights, back, True)
        assert [name for name, _, _ in built] == [*names, "project"]
        assert all(usage["STACK"] == 0 for _, _, usage in built)
        ptx = built[2][1].asm["ptx"]
        assert "wgmma.mma_async" in ptx and "cp.async" in ptx and built[2][2]["REG"] <= 128  # four programs a multiprocessor
        assert ptx.count("cvt.rn.f16x2.e4m3x2") == 64 * 128 // 128 // 2  # two codes at a time, each once
        assert built[3][2]["REG"] <= 255 and built[3][1].asm["ptx"].count("cvt.rn.f16x2.e4m3x2") == 128 * 128 // 128 // 2

else:
    from foveate.kernels.triton import indexer_launch, labels_launch
    from foveate.scores import indexer as law
    from foveate.scores.entries import best_entries
    from tests import indexer_cases as cases
    from tests.drive import Drive, qkv
    from tests.indexers import random_profile

    @pytest.fixture(autouse=True)
    def few(monkeypatch):
        """Few programs a row: the interpreter takes as long for a small one as for a large one."""
        monkeypatch.setattr(labels_launch, "device", lambda index: (1 << 17, 2))
        monkeypatch.setattr(indexer_launch, "PART", 1 << 14)

    @pytest.fixture
    def choice(monkeypatch):
        """The choice by plain code: its own kernels, slow here, have tests of their own."""
        monkeypatch.setattr(law.fused, "entries", lambda t: None)

    def test_rounding():
        cases.check_rounding()

    def test_codes():
        cases.check_codes()

    @pytest.mark.parametrize("heads,width,lens,m", [(3, 32, (300, 7), 300), (40, 128, None, 200)])
    def test_score(monkeypatch, heads, width, lens, m):
        monkeypatch.setattr(indexer_launch, "SHARE", 1)  # a program takes several steps
        cases.check_score(heads, width, lens, m)

    def test_prompt():
        """Two tiles of rows and of tokens; of the second one the last row of the first sees one token."""
        cases.check_prompt(3, 32, 100, 65)

    def test_a_prompt_in_chunks(choice):
        """The lists of plain code: scores are apart by far more than roundings."""
        q, k, v = qkv(1, 4, 2, 50, 32)
        recipe = f"prefill=dsa:budget=20,profile={random_profile(4, 2, 32, 3, 16)}"

        def told():
            drive = Drive(recipe, d=32)
            for lo, hi in ((0, 30), (30, 50)):
                drive(*(t[:, :, lo:hi] for t in (q, k, v)))
            return [layout for _, layout, _ in drive.watch.calls]

        got = told()
        with cases.plain():
            want = told()
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.entries, b.entries) and torch.equal(a.entry_count, b.entry_count)

    @pytest.mark.parametrize("i", range(3))
    def test_rank(i):
        kind, rope = (("dense", cases.Rotary), ("paged", cases.Pairs), ("dense", cases.Rotary))[i]
        lens = None if i == 2 else ((150, 150), (7, 7))
        cases.check_rank(cases.SHAPES[i], lens, kind, rope=rope)

    def test_ties():
        cases.check_ties(best_entries)

    def test_a_step():
        q, kv = cases.problem(4, 64, ((150, 150), (27, 27)), "paged", torch.float16)
        layout, _ = cases.check_step(cases.method(q, kv, budget=20), q, kv, 3e-3)
        assert layout.entry_count.flatten().tolist() == [20, 20]

    def test_replays(choice):
        q, kv = cases.problem(4, 64, ((90, 90), (9, 9)))
        new = 2 * torch.randn(5, 2, 2, 64, generator=torch.Generator().manual_seed(9))
        cases.check_replays(cases.method(q, kv, budget=12), q, kv, new, 0, 5)

    def test_caches_go_their_ways(choice):
        """Roll-backs, forks and reorders between steps, rows of different length: what plain code chooses and attends."""
        q, k, v = qkv(2, 4, 2, 60, 32)
        recipe = f"dsa:budget=12,profile={random_profile(4, 2, 32, 3, 16)}"
        valid = torch.arange(30) >= torch.tensor([[0], [13]])

        def told():
            drive, layouts = Drive(recipe, d=32), []

            def walk(drive, steps):
                for i in steps:
                    drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
                    layouts.append(cases.chosen(drive.last[1]))

            drive(*(t[:, :, :30] for t in (q, k, v)), valid=valid)
            walk(drive, range(30, 33))
            drive.cache.truncate(2)
            walk(drive, range(40, 42))
            fork = Drive(recipe, d=32)
            fork.cache = drive.cache.fork()
            fork.cache.reorder(torch.tensor([1, 0]))
            walk(fork, range(42, 44))
            walk(drive, range(50, 51))
            return layouts

        calls, rank = [], indexer_launch.rank
        with patch.object(indexer_launch, "rank", lambda *a, **o: calls.append(o["append"]) or rank(*a, **o)):
            got = told()
        with cases.plain():
            assert got == told()
        assert len(calls) == 8 and sum(calls) >= 5  # the first step, and those after the cache was changed, see all keys

    def test_what_the_plain_code_serves():
        q, kv = cases.problem(2, 32, ((40, 40), (9, 9)))
        rope = cases.rope_of(32, "cpu")
        good = lambda **o: cases.indexer(4, 2, 32, **{"heads": 3, "width": 16, "rope": 8, "mean": False} | o)  # noqa: E731
        x = cases.view(q, kv, 0, rope)
        served = lambda which, kv=kv: law.IndexKeys()._kernels(replace(x, kv=kv), which)  # noqa: E731
        assert served(good()) is indexer_launch
        assert served(good(fp8=False)) is served(good(width=8, rope=4)) is served(good(heads=129)) is None
        pos = torch.zeros(2, 2, kv.capacity, dtype=torch.int32)
        for other in (replace(kv, pos=pos), replace(kv, bias=pos.float()), replace(kv, kind="ragged")):
            assert served(good(), other) is None
