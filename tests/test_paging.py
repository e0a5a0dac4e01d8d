"""The decode kernels over pages: in Triton's interpreter (a process of its own, see `test_triton.py`) and compiled."""

from __future__ import annotations

import os

import pytest
import torch

from tests.compiling import hopper
from tests.processes import run_in_the_interpreter, runs_without_triton

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_no_triton_without_a_device():
        """Planning on the CPU never imports Triton."""
        code = (
            "import torch; from foveate.kv import KV; from foveate.scores.bounds import Bounds; b = Bounds(16);"
            "k = torch.randn(1, 2, 100, 8); kv = KV.dense(k, k); b.update(kv); b.top(k[:, :, :1], kv, 3, group=True)"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("pages", [8192, 16384, 65536])
    def test_compiles_for_hopper(monkeypatch, tmp_path, pages):
        """The kernels of a step that have a row or a page in registers. Rows of over 8,192 pages put a few words aside."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import append, paging
        from foveate.kernels.triton import paging_launch as kernels

        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        ints = lambda *shape: meta(*shape, dtype=torch.int32)  # noqa: E731
        with hopper(monkeypatch, tmp_path, paging, "select_pages") as selected:
            for length in (None, ints(1, 8)):
                kernels.select(meta(1, 8, pages, dtype=torch.float32), 128, 16, length)
        new, cache, seen = meta(1, 8, 1, 128), meta(1, 8, pages * 16, 128), meta(1, dtype=torch.int64)
        with hopper(monkeypatch, tmp_path, append, "append_token") as appended:
            for found in (None, (meta(1, 8, pages, 256), ints(1, 8), 16), (meta(1, 8, pages, 256), ints(1, 8), 64)):
                kernels.append(new, new, cache, cache, ints(1, 8), seen, found)
        assert len(selected) == 2 and len(appended) == 3
        for name, _, usage in selected + appended:
            assert usage["STACK"] <= (128 if name == "select_pages" and pages > 8192 else 0), name

    def test_entries_compile_for_hopper(monkeypatch, tmp_path):
        """Attention over single entries: no spills, room for its programs, and keys and values copied past the registers."""
        from types import SimpleNamespace

        from foveate.kernels.triton import arrivals, paging
        from foveate.kernels.triton import paging_launch as kernels
        from foveate.kv import KV

        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        ints = lambda *shape: meta(*shape, dtype=torch.int32)  # noqa: E731
        monkeypatch.setattr(kernels, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(kernels, "_entries_plan", kernels._entries_plan.__wrapped__)  # remembers nothing of this device
        monkeypatch.setattr(arrivals, "counters", lambda n, part: ints(n))
        q, k = meta(1, 32, 1, 128), meta(1, 8, 1 << 17, 128)
        with hopper(monkeypatch, tmp_path, paging, "attend_entries") as built:
            for lists, n in ((1, 2048), (32, 128)):
                layout = SimpleNamespace(tiles=None, entries=ints(1, lists, 1, n), entry_count=ints(1, lists, 1))
                kernels.attend(q, KV.dense(k, k, len=ints(1, 8)), layout, 0.1, False)
        assert len(built) == 2
        for _, kernel, usage in built:
            assert usage["STACK"] == 0
            assert (kernel.metadata.shared + 1024) * kernels.ENTRY_SHARE <= 228 * 1024, kernel.metadata.shared
            assert usage["REG"] * 32 * kernel.metadata.num_warps * kernels.ENTRY_SHARE <= 65536, usage
            # In front of the loop K and V of two steps: each 8 copies of 16 bytes a thread, and once more inside.
            assert kernel.asm["ptx"].count("cp.async.cg.shared.global") >= 48

else:
    from foveate.kernels import triton as backend
    from foveate.kernels.triton import paging_launch as kernels
    from foveate.kv import KV
    from foveate.layout import Layout
    from tests import paging_cases as cases
    from tests.paging_cases import NAN, SIZES, problem

    LENGTHS = [None, ((150, 150), (7, 7)), ((64, 31), (1, 128))]

    # ------------------------------------------------------------------ scores
    @pytest.mark.parametrize("r,page,d", SIZES)
    def test_scores(r, page, d):
        for lens in LENGTHS:
            q, kv = problem(r, d, lens)
            cases.check_score(q, kv, page, 2e-5)

    def test_scores_in_half_precision():
        """Products of fp16 numbers are exact in fp32: the only error is that of the sum."""
        cases.check_score(*problem(4, 64, LENGTHS[1], dtype=torch.float16), 16, 1e-4)

    def test_scores_over_many_steps(monkeypatch):
        monkeypatch.setattr(kernels, "PAGES", 16)
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, 1))
        kernels._score_plan.cache_clear()
        for steps in (1, 3, 8):
            monkeypatch.setattr(kernels, "STEPS", steps)
            cases.check_score(*problem(2, 32, ((700, 900),)), 16, 2e-5)
        kernels._score_plan.cache_clear()

    # ------------------------------------------------------------------ selection
    def scores(pages, seed=0, ties=True, rows=4):
        x = torch.randn(2, rows, pages, generator=torch.Generator().manual_seed(seed))
        return (x * 2).round() / 2 if ties else x

    @pytest.mark.parametrize("pages", [1, 40, 300])
    def test_selection(pages):
        for keep in (1, 7, 32, pages + 3):
            for seed, ties in ((0, True), (1, False)):
                score = scores(pages, seed, ties, rows=2)
                cases.check_select(score, keep, 16, None)
                high = pages * 16
                for g in (1, 2) if keep == 7 else (1,):  # scores a head or a group
                    gen = torch.Generator().manual_seed(seed)
                    length = torch.randint(1, high + 1, (2, g), generator=gen, dtype=torch.int32)
                    length[0, 0] = 0
                    broken = score.masked_fill(
                        torch.arange(pages) * 16 >= length.repeat_interleave(2 // g, 1)[..., None], NAN
                    )
                    cases.check_select(broken, keep, 16, length)

    def test_selection_of_odd_numbers():
        score = scores(40, ties=False)
        score[0, 0] = 0.0
        score[0, 1] = 0.0
        score[0, 1, ::2] = -0.0  # no less than 0
        score[0, 2, 3:20] = NAN  # ranks with -inf
        score[0, 3] = float("-inf")
        score[1, 0, 5], score[1, 0, 8] = float("inf"), float("inf")
        score[1, 1] = torch.arange(40) * 1e-45  # denormal numbers
        score[1, 2] = -torch.arange(40).float()
        score[1, 3] = -1e38 * torch.arange(40)
        for keep in (2, 5):
            cases.check_select(score, keep, 16, None)

    def test_selection_in_pieces(monkeypatch):
        """Rows longer than a program holds are read again for each bit."""
        monkeypatch.setattr(kernels, "CHUNK", 256)
        for seed, ties, keep in ((0, True, 300), (1, False, 1)):
            score = scores(700, seed, ties, rows=2)
            cases.check_select(score, keep, 64, None)
            cases.check_select(score, keep, 64, torch.tensor([[44800, 20000], [16384, 100]]))

    def test_selection_takes_the_exits():
        """All pages, one page, two values, the lowest and the highest number there are."""
        score = torch.zeros(1, 6, 50)
        score[0, 1] = float("-inf")
        score[0, 2, 7:] = float("inf")
        score[0, 3, :25] = 1e-45
        score[0, 4] = torch.arange(50) // 10
        score[0, 5] = -torch.arange(50) // 25 * 3e38
        for keep in (1, 2, 10, 11, 49, 50, 60):
            cases.check_select(score, keep, 16, None)
            cases.check_select(score, keep, 16, torch.tensor([[800, 17, 16, 1, 0, 333]]))

    # ------------------------------------------------------------------ a token, in one launch
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("page,d,dv", [(16, 24, 40), (6, 64, 64), (64, 32, 32)])
    def test_append(page, d, dv, dtype):
        """Rows of different length, into and out of pages: the store and the bounds of the plain code, one launch a step."""
        cases.check_append(page, d, dv, dtype, steps=40)

    def test_append_after_the_cache_changed():
        cases.check_changes(16)

    # ------------------------------------------------------------------ bounds kept up to date
    @pytest.mark.parametrize("kind", ["dense", "paged"])
    @pytest.mark.parametrize("page", [1, 6, 16, 64])
    def test_update(kind, page):
        """From any entry on, with lengths that differ: what the plain code computes, and older pages untouched."""
        q, kv = problem(1, 24, ((150, 70), (33, 1)), kind)
        want, live = cases.plain(kv, page).data, cases.live_pages(kv, page)
        pages = live.shape[2]
        data = want.clone()
        covered = torch.tensor([[130, 70], [0, 0]])
        first = covered // page
        stale = (torch.arange(pages) >= first[..., None]) & live & (covered < kv.len)[..., None]
        data[:, :, :pages][stale] = NAN
        keep = data[:, :, pages:].clone()
        kernels.update(kv, data, page, covered)
        assert torch.equal(data[:, :, :pages][live], want[:, :, :pages][live])
        assert torch.equal(covered, kv.len.long()) and torch.equal(data[:, :, pages:], keep)

    def test_update_by_numbers():
        q, kv = problem(1, 32, None)
        want = cases.plain(kv, 16).data
        data = want.clone()
        data[:, :, 8:] = NAN
        data[:, :, 3] = 7.0
        kernels.update(kv, data, 16, 128)
        assert torch.equal(data[:, :, 8:10], want[:, :, 8:10]) and bool((data[:, :, 3] == 7).all())

    # ------------------------------------------------------------------ attention
    @pytest.mark.parametrize("r,page,d", SIZES)
    @pytest.mark.parametrize("kind", ["dense", "paged"])
    def test_attention(r, page, d, kind):
        for lens in LENGTHS[1:]:
            q, kv = problem(r, d, lens, kind)
            for heads in {2, 2 * r}:
                cases.check_attend(q, kv, *cases.random_tiles(kv, heads, page, 5, seed=r), page, 2e-5)

    def test_attention_over_overlapping_and_unaligned_tiles():
        for kind in ("dense", "paged"):
            q, kv = problem(4, 64, LENGTHS[1], kind)
            cases.check_attend(q, kv, *cases.random_tiles(kv, 2, 16, 6, seed=2, overlap=True), 16, 2e-5)

    def test_attention_with_shared_and_empty_lists():
        q, kv = problem(4, 64, ((150, 150), (140, 140)))
        tiles = torch.tensor([[[[0, 48, 96]]]], dtype=torch.int32)  # one list for all rows and heads
        cases.check_attend(q, kv, tiles, torch.tensor([[[3]]], dtype=torch.int32), 16, 2e-5)
        tiles, count = cases.random_tiles(kv, 2, 16, 5, seed=1)
        count[0, 1] = 0
        out, lse = cases.check_attend(q, kv, tiles, count, 16, 2e-5)
        assert bool((out[0, 4:] == 0).all()) and bool((lse[0, 4:] == float("-inf")).all())

    def test_attention_in_half_precision():
        q, kv = problem(4, 128, LENGTHS[1], dtype=torch.float16)
        cases.check_attend(q, kv, *cases.random_tiles(kv, 2, 16, 5, seed=3), 16, 2e-3)

    def test_attention_in_any_number_of_programs(monkeypatch):
        q, kv = problem(4, 64, ((600, 600), (600, 40)))
        tiles = cases.random_tiles(kv, 2, 16, 30, seed=4)
        results = []
        for cores in (1, 4, 1000):
            monkeypatch.setattr(kernels, "device", lambda index, cores=cores: (99 * 1024, cores))
            kernels._plan.cache_clear()
            results.append(cases.check_attend(q, kv, *tiles, 16, 2e-5)[0])
        kernels._plan.cache_clear()
        torch.testing.assert_close(results[0], results[2], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["dense", "paged"])
    @pytest.mark.parametrize("heads,rows", [(1, 1), (1, None), (2, None), (8, None)])
    def test_attention_over_entries(kind, heads, rows, monkeypatch):
        """Lists that all share, of a kv head and of a query head; programs with one step, with several and with none."""
        q, kv = problem(4, 64, ((210, 210), (70, 9)), kind)
        entries, count = cases.random_entries(kv, heads, 140, seed=heads, rows=rows)
        for cores, most, chunk in ((1, 64, 8), (100, 64, 8), (100, 16, 8), (100, 16, 1)):
            monkeypatch.setattr(kernels, "device", lambda index, cores=cores: (99 * 1024, cores))
            monkeypatch.setattr(kernels, "ENTRIES", most)
            monkeypatch.setattr(kernels.arrivals, "chunk", lambda *_, chunk=chunk: chunk)
            kernels._entries_plan.cache_clear()
            cases.check_attend(q, kv, entries, count, 1, 2e-5)
        count[0, 0] = 0
        out, lse = cases.check_attend(q, kv, entries, count, 1, 2e-5)
        assert bool((lse[0, :1] == float("-inf")).all()) and bool((out[0, :1] == 0).all())
        kernels._entries_plan.cache_clear()

    @pytest.mark.parametrize("n,d,dtype", [(1, 16, torch.float32), (5, 96, torch.float32), (40, 128, torch.float16)])
    def test_attention_over_few_entries(n, d, dtype):
        q, kv = problem(3, d, LENGTHS[1], dtype=dtype)
        cases.check_attend(q, kv, *cases.random_entries(kv, 2, n, seed=n), 1, 2e-5 if dtype == torch.float32 else 2e-3)

    # ------------------------------------------------------------------ together
    @pytest.mark.parametrize("share", ["group", "head"])
    @pytest.mark.parametrize("kind", ["dense", "paged"])
    def test_a_step_of_quest(share, kind):
        q, kv = problem(4, 64, ((150, 150), (7, 7)), kind)
        layout = cases.check_quest(q, kv, 16, 64, 2e-5, share)
        assert bool((layout.tiles[1, :, 0, 0] == 0).all()) and bool((layout.tile_count[1] == 1).all())

    def test_bounds_follow_the_lengths_without_waiting():
        """Steps, a pause, a rollback and more steps at a fixed capacity; the kernel path from the second call on."""
        gen = torch.Generator().manual_seed(5)
        k = torch.randn(2, 2, 100, 16, generator=gen)
        length = torch.tensor([[40, 40], [17, 17]], dtype=torch.int32)
        bounds = cases.Bounds(16)
        kv = KV.dense(k, k, len=length)
        bounds.update(kv)
        ran = []
        before = bounds._steady
        bounds._steady = lambda kv: ran.append(before(kv)) or ran[-1]
        for back, more in [(0, 1), (0, 1), (0, 0), (5, 1), (0, 20), (1, 1)]:
            if back:
                bounds.truncate(back)
            for i in range(2):
                n = int(length[i, 0]) - back
                k[i, :, n : n + more] = 3 * torch.randn(2, more, 16, generator=gen)
            length += more - back  # in place: the bounds keep a copy of their own
            bounds.update(kv)
            live, want = cases.live_pages(kv, 16), cases.plain(kv, 16).data
            assert torch.equal(bounds.data[:, :, : live.shape[2]][live], want[:, :, : live.shape[2]][live])
        assert all(ran)

    def uneven(tiles):
        q, kv = problem(3, 64, ((150,) * 4, (7,) * 4), g=4)
        return q, kv, Layout((2, 12, 1, kv.capacity), tile_width=16, tiles=tiles, tile_count=tiles[..., 0] + 2)

    def test_what_goes_the_long_way():
        q, kv = problem(4, 64, LENGTHS[1])
        tiles, count = cases.random_tiles(kv, 2, 16, 5, seed=1)
        layout = Layout((2, 8, 1, kv.capacity), tile_width=16, tiles=tiles, tile_count=count)
        assert kernels.serves(q, kv, layout, 0.0)
        other = cases.replace
        one = torch.ones(1, 1, dtype=torch.int32)
        refused = [
            (kv, layout, 30.0),
            (kv, other(layout, window=one), 0.0),
            (kv, other(layout, q_pos=torch.tensor([[9], [9]])), 0.0),
            (kv, other(layout, tile_width=8), 0.0),
            (kv, other(layout, tile_width=48), 0.0),
            (kv, other(layout, entries=tiles, entry_count=count), 0.0),
            (other(kv, bias=torch.zeros(2, 2, kv.capacity)), layout, 0.0),
            (other(kv, pos=torch.zeros(2, 2, kv.capacity, dtype=torch.int32)), layout, 0.0),
            (other(kv, kind="ragged"), layout, 0.0),
        ]
        six = torch.zeros(1, 6, 1, 2, dtype=torch.int32)  # lists that two kv heads share half
        assert not kernels.serves(*uneven(six), 0.0)
        for view, plan, cap in refused:
            assert not kernels.serves(q, view, plan, cap)

    def test_the_backend_takes_the_short_way(monkeypatch):
        q, kv = problem(4, 64, LENGTHS[1])
        tiles, count = cases.random_tiles(kv, 2, 16, 5, seed=1)
        layout = Layout((2, 8, 1, kv.capacity), tile_width=16, tiles=tiles, tile_count=count)
        short = cases.foveate.attend(q, kv, layout, backend="triton", scale=-0.2)
        monkeypatch.setattr(backend.paging_launch, "serves", lambda *_: False)
        long = cases.foveate.attend(q, kv, layout, backend="triton", scale=-0.2)
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
