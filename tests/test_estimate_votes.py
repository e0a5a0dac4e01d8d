"""The kernels of one query a row against all keys in Triton's interpreter, and compiled for Hopper without a GPU."""

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

    @pytest.mark.parametrize("h,exact", [(32, False), (32, True), (64, True)])
    def test_compiles_for_hopper(h, exact, monkeypatch, tmp_path):
        """Registers, spills and shared memory of the launches of a step at 128K tokens."""
        from foveate.kernels.triton import estimate_votes
        from foveate.kernels.triton import estimate_votes_launch as launch

        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)
        launch._plan.cache_clear()
        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        q, k = meta(1, h, 1, 128, dtype=torch.float32 if exact else torch.bfloat16), meta(1, 8, 1 << 17, 128)
        with hopper(monkeypatch, tmp_path, estimate_votes, "row_scores", "row_votes") as built:
            launch.votes(q, k, meta(1, 8, dtype=torch.int32), lists=1, first=128, tail=512, scale=0.1)
        launch._plan.cache_clear()
        assert [name for name, *_ in built] == ["row_scores", "row_votes"]
        for name, kernel, usage in built:
            assert usage["STACK"] == 0, (name, usage)
            assert (kernel.metadata.shared + 1024) * 2 <= 228 * 1024, name
            assert usage["REG"] * 32 * kernel.metadata.num_warps * 2 <= 65536, (name, usage)

    def test_steps_compile_for_hopper(monkeypatch, tmp_path):
        """What methods launch beside scores: no spills, and room for the programs of the one that attends."""
        from foveate.kernels.triton import arrivals, chunk_steps, kept_lists, ranked_steps, ranked_steps_held
        from foveate.kernels.triton import chunk_steps_launch as chunks
        from foveate.kernels.triton import ranked_steps_launch as ranked
        from foveate.kv import KV

        monkeypatch.setattr(ranked, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(ranked, "_plan", ranked._plan.__wrapped__)  # remembers nothing of this device
        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        whole = lambda *shape: meta(*shape, dtype=torch.int32)  # noqa: E731
        long = lambda *shape: meta(*shape, dtype=torch.int64)  # noqa: E731
        table = lambda *shape: (meta(*shape, 128, dtype=torch.float32),) * 2  # noqa: E731
        monkeypatch.setattr(arrivals, "counters", lambda n, part: whole(n))
        q, k = meta(1, 32, 1, 128), meta(1, 8, 1 << 17, 128)
        kv = KV.dense(k, k, len=whole(1, 8))
        with hopper(monkeypatch, tmp_path, ranked_steps, "turn_step", "attend_ranked") as first:
            ranked.turn_step(q, kv, long(1, 1), k, table(2689), whole(128), near=512, last=2687)
            for halves in (False, True):
                how = dict(scale=0.1, softcap=None, halves=halves)
                ranked.attend(q, k, k, whole(1, 2688), whole(1), table(2689), whole(128), **how)
        with hopper(monkeypatch, tmp_path, ranked_steps_held, "decide", "keep") as held:
            voter, rows = meta(1, 32, 1, 128, dtype=torch.float32), (long(1), whole(1))
            how = dict(near=512, total=2688, theta=0.9, refresh=64)
            for begins in (True, False):
                ranked.decide(q, kv, long(1, 1), k, table(2753), whole(128), (voter, *rows), first=begins, **how)
            ranked.keep(whole(1, 2688), whole(1, 8), whole(1), whole(1, 2752), *rows)
        with hopper(monkeypatch, tmp_path, chunk_steps, "turn_queries", "place_queries", "join_chunks") as second:
            recent = meta(1, 32, 512, 128), long(1, 512)
            chunks.turn_queries(q, long(1, 1), table(1, 1), table(1, 513), whole(128), *recent)
            chunks.place_queries(q, whole(1, 32, 16), whole(1, 32), 256, table(1, 513), whole(128))
            chunks.join_chunks(meta(1, 512, 1, 128), meta(1, 512, 1, dtype=torch.float32), 16, 4)
        with hopper(monkeypatch, tmp_path, kept_lists, "extend_lists", "strongest_of_lists") as third:
            kept, score = whole(1, 8, 6567), meta(1, 8, 1 << 17, dtype=torch.float32)
            how = dict(ago=0, ratio=0.05, least=128, capacity=1 << 17)
            kept_lists.strongest(kept, whole(1, 8), score, long(1), whole(1, 8), long(1, 1), **how)
            entries, ends = whole(1, 8, 16384), (long(1), long(1, 1))
            kept_lists.extend(entries, *ends, 1, rank=entries, limit=long(1, 8))
            kept_lists.extend(entries, *ends, 17, used=whole(1, 8))
        built = first + held + second + third
        assert len(built) == 12
        for name, kernel, usage in built:
            assert usage["STACK"] == 0, (name, usage)
            if name == "attend_ranked":
                assert (kernel.metadata.shared + 1024) * ranked.SHARE <= 228 * 1024, kernel.metadata.shared
                assert usage["REG"] * 32 * kernel.metadata.num_warps * ranked.SHARE <= 65536, usage

else:
    from foveate.kernels.triton import estimate_votes_launch as kernels
    from foveate.kernels.triton import kept_lists
    from foveate.kernels.triton import ranked_steps_launch as ranked
    from tests import estimate_votes_cases as cases

    @pytest.mark.parametrize("options", [
        dict(lists=1, first=5, tail=9),
        dict(lists=2, most=True, lengths=(150, 61), softcap=3.0),
        dict(lists=4, lengths=(40, 150), shift=3),
        dict(lists=1, exact=True, dtype=torch.float16, lengths=(150, 6), first=4, tail=8),  # a row without candidates
    ], ids=str)  # fmt: skip
    def test_votes(options):
        cases.check(2, 4, 2, 150, 16, tolerance=2e-4 if "dtype" in options else 2e-5, **options)

    @pytest.mark.parametrize("most", [False, True])
    def test_votes_of_heads_in_several_steps(most, monkeypatch):
        monkeypatch.setattr(kernels, "LINES", 2)
        cases.check(2, 6, 2, 150, 16, lists=1, most=most, first=5, tail=9, tolerance=2e-5)

    @pytest.mark.parametrize("positions", ["rank", "text"])
    def test_steps_of_token_select(positions):
        text = f"token_select:sink=4,local=16,budget=12,chunk=16,pool=3,positions={positions}"
        cases.same_steps(text, 2, 4, 2, 100, 16, lengths=(90, 25), tolerance=2e-5)

    @pytest.mark.parametrize("text,heads,width", [
        ("positions=rank", 6, 24), ("positions=text,pool=2", 4, 16),
    ])  # fmt: skip
    def test_steps_with_lists_that_are_used_again(text, heads, width, monkeypatch):
        """Rows choose anew when their own queries turn, and when a list is three tokens old; one is shorter than a list.
        With text positions heads are compared two at a time, and lists kept in several programs."""
        if "text" in text:
            monkeypatch.setattr(ranked, "COMPARED", 2 * width)
            monkeypatch.setattr(ranked, "KEPT", 16)
        text = f"token_select:sink=4,local=16,budget=12,chunk=16,theta=0.9,refresh=3,{text}"
        how = dict(lengths=(80, 25), steps=7, turns=((2,), (3, 4)), tolerance=2e-5)
        seen = cases.same_held(text, 2, heads, 2, 100, width, **how)
        assert [row for row, _ in seen] == [True, False, True, False, False, False, True]
        assert [row for _, row in seen] == [True, False, False, True, True, False, False]

    @pytest.mark.parametrize("share", ["head", "group"])
    def test_steps_of_longheads(share):
        """The fifth step renews a key from queries that the kernel has kept."""
        text = f"longheads:chunk=4,attention=16,block=4,share={share}"
        both = cases.same_steps(text, 2, 4, 2, 60, 16, lengths=(50, 23), grows=range(5), tolerance=2e-5)
        mine, theirs = (one.state.layer["longheads.keys"] for one in both)
        assert torch.equal(mine.at, theirs.at)
        torch.testing.assert_close((mine.recent, mine.data), (theirs.recent, theirs.data), atol=2e-5, rtol=2e-5)

    @pytest.mark.parametrize(
        "n,m,options",
        [
            (40, 100, dict(ratio=0.2, least=3)),
            (100, 150, dict(ratio=0.3, least=1, ago=2, ties=True)),
            (33, 80, dict(ratio=0.05, least=1)),
            (20, 60, dict(ratio=0.9, least=30)),
        ],
    )
    def test_strongest(n, m, options):
        cases.check_strongest(n, m, **options)

    @pytest.mark.parametrize("text,steps,turns", [
        ("recycled_attention:budget=9,stride=4,tau=0.5", 6, (4,)),  # a check that one turned query makes a full step
        ("pillar_attn:draft=3,ratio=0.2,least=12", 5, ()),
    ])  # fmt: skip
    def test_kept_lists(text, steps, turns, monkeypatch):
        """Lists in more than one program: the sets of plain code, step by step."""
        calls, extend = [], kept_lists.extend
        monkeypatch.setattr(kept_lists, "CHUNK", 4)
        monkeypatch.setattr(kept_lists, "extend", lambda *a, **k: calls.append(1) or extend(*a, **k))
        seen = cases.same_sets(text, 2, 4, 2, 60, 16, lengths=(50, 22), steps=steps, turns=turns, tolerance=2e-5)
        assert len(calls) >= 3 and seen[0] == 1 and max(seen[1:4]) < 0.4 and (not turns or seen[4] > 0.5)

    @pytest.mark.parametrize("d,mixed", [(24, False), (32, False), (32, True)])  # halves that are no power of two; are one
    def test_lists_that_count_their_own_positions(d, mixed, monkeypatch):
        cases.check_ranked(2, 6, 2, 90, d, 70, (70, 33), softcap=2.0, tolerance=2e-5, mixed=mixed)
        monkeypatch.setattr(ranked, "KEYS", 16)  # five steps in two programs
        ranked._plan.cache_clear()
        cases.check_ranked(2, 6, 2, 90, d, 70, (70, 33), softcap=2.0, tolerance=2e-5, mixed=mixed)
        ranked._plan.cache_clear()

    def test_scores_of_methods():
        """What recycled_attention, pillar_attn, h2o, tidal_decode and topk_exact rank by: the choices of plain code."""
        cases.same_scores(2, 4, 2, 120, 16, lengths=(120, 33))
