"""The kernels over per-token lists in Triton's interpreter (a process of its own, see `test_triton.py`) and compiled."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.processes import run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)

    @pytest.mark.parametrize("h,g", [(32, 8), (64, 4), (4, 4)])
    def test_compiles_for_hopper(h, g, monkeypatch, tmp_path):
        """Registers, spills and shared memory of every launch of the benchmark's shapes."""
        import re

        import triton

        from foveate.kernels.gluon.shim import compile_sm90
        from foveate.kernels.triton import (
            tokens,
            tokens_backward,
            tokens_grads,
            tokens_inverse,
            tokens_kernels,
            tokens_lists,
        )
        from foveate.kv import KV
        from foveate.layout import Layout

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("this Triton ships no cuobjdump")
        launches = []

        class Recorder:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                return lambda *args, **options: launches.append((self.kernel, args, options))

        for module in (tokens_kernels, tokens_lists, tokens_grads, tokens_backward, tokens_inverse):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
        for module in (tokens, tokens_backward):
            monkeypatch.setattr(module, "device", lambda index: (227 * 1024, 132))

        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        n = 2048
        q, k = meta(1, h, n, 128), meta(1, g, n, 128)
        tiles, count = meta(1, g, n, 16, dtype=torch.int32), meta(1, g, n, dtype=torch.int32)
        layout = Layout((1, h, n, n), tile_width=64, tiles=tiles, tile_count=count)
        tokens.attend(q, KV.dense(k, k), layout, 0.1, True)
        assert len(launches) == 7  # mark, scan, plan, fill; partial, walk, merge
        lse = meta(1, h, n, dtype=torch.float32)
        tokens_backward.backward(q, lse, q, KV.dense(k, k), layout, q, lse, scale=0.1, softcap=0.0)
        # delta; mark, scan, plan, fill; partial, walk, merge; mark, scan, cuts, entries; dk and dv, join
        assert len(launches) == 21
        kinds = {(k.fn.__module__, k.fn.__name__, o.get("TILE"), o.get("SUM")): (k, a, o) for k, a, o in launches}
        assert len(kinds) == 16
        for kernel, args, options in kinds.values():
            built = compile_sm90(kernel, list(args), options)
            (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
            command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            name = kernel.fn.__name__
            big = name in ("partial_kernel", "walk_kernel", "dq_partial_kernel", "dq_walk_kernel", "dkdv_rows_kernel")
            # Sums of dk and dv are 128 of a thread's 255 registers, and the addresses they go to (26 words; 120 bytes under
            # Triton 3.6) wait on the stack for the end; its steps only read a few scalars there. All others need none.
            last = name == "dkdv_rows_kernel"
            assert int(re.search(r"STACK:(\d+)", usage)[1]) <= (128 if last else 0), usage
            if last or name == "merge_kernel":
                command[1] = "-sass"
                code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            if name == "merge_kernel":  # warps that add do not wait for each other
                assert "BAR" not in code[code.index("LDG.E.EF.128") : code.rindex("LDG.E.EF.128")]
            if last:
                steps = code[code.index("HGMMA") : code.rindex("HGMMA")]
                assert len(re.findall(r"\bLDL\b", steps)) <= 8 and "STL" not in steps
            # programs beside each other on a multiprocessor, of 227 KB and 1 KB for each
            beside = 3 if name == "partial_kernel" else 2 if big else 3
            assert (built.metadata.shared + 1024) * beside <= 228 * 1024, name
            assert int(re.search(r"REG:(\d+)", usage)[1]) * 32 * built.metadata.num_warps * beside <= 65536, usage
            assert ("wgmma.mma_async" in built.asm["ptx"]) == big

    @pytest.mark.parametrize("h,shared,stages", [(4, 227, 3), (64, 227, 2), (4, 163, 2)])
    def test_two_programs_of_dk_and_dv_fit_a_multiprocessor(h, shared, stages, monkeypatch):
        """H100 and A100: 82 KB with three stages of 32 rows, 132 KB with three of 64."""
        from foveate.kernels.triton import tokens, tokens_backward
        from foveate.kv import KV
        from foveate.layout import Layout

        for module in (tokens, tokens_backward):
            monkeypatch.setattr(module, "device", lambda index: (shared * 1024, 132))
        q, k = (torch.empty(1, heads, 64, 128, dtype=torch.bfloat16, device="meta") for heads in (h, 1))
        tiles = torch.empty(1, 1, 64, 4, dtype=torch.int32, device="meta")
        layout = Layout((1, h, 64, 64), tile_width=64, tiles=tiles, tile_count=tiles[..., 0])
        assert tokens_backward.Work(q, KV.dense(k, k), layout, 0.1).steps.stages == stages

else:
    from dataclasses import replace

    import foveate
    from foveate.kernels import triton as backend
    from foveate.kernels.triton import inverse, tokens, tokens_backward, tokens_lists
    from foveate.kv import KV
    from tests import token_cases as cases
    from tests.kernel_cases import Case, Maker
    from tests.token_cases import check, check_backward, listed

    SMALL = tokens.Config(rows=32, stages=1, tile=32, tile_stages=1, piece=64, merge=16)
    NEVER, ALWAYS = replace(SMALL, shared=2.0), replace(SMALL, shared=0.0)

    # ------------------------------------------------------------------ which pairs
    @pytest.mark.parametrize("h,g", [(1, 1), (4, 1), (8, 2), (6, 2), (32, 2)])
    def test_groups(h, g):
        case = listed(Maker(70 if h < 8 else 30, d=16, h=h, g=g), sink=True)
        for knobs in (SMALL, NEVER, ALWAYS) if h == 6 else (SMALL,):
            check(case, knobs)

    @pytest.mark.parametrize("heads", [1, 2, 4, 8])
    def test_lists_that_heads_share_or_do_not(heads):
        check(listed(Maker(50, d=16, h=8, g=4), heads=heads, local=True), SMALL)

    @pytest.mark.parametrize("n,m", [(1, 1), (33, 33), (40, 100), (100, 40), (1, 70)])
    def test_lengths(n, m):
        for causal in (True, False):
            for knobs in (SMALL, NEVER):
                check(listed(Maker(n, d=16), 3, m=m, causal=causal), knobs)

    @pytest.mark.parametrize("width", [16, 32, 64, 128])
    @pytest.mark.parametrize("keep", [1, 5, 20])
    def test_widths_and_lists(width, keep):
        check(listed(Maker(60, d=16, h=2, g=1), keep, width, m=150), SMALL)

    def test_local_lists():
        case = listed(Maker(128, d=16, h=4, g=2), 4, 16, local=True, sink=True)
        check(case, SMALL)

    def test_tiles_at_any_start():
        for seed, knobs in enumerate((SMALL, NEVER, ALWAYS)):
            check(cases.odd(Maker(60, d=16, h=4, g=2, seed=seed)), knobs)

    def test_pieces_of_a_tile_that_no_neighbour_lists():
        case = cases.odd(Maker(90, d=16, h=2, g=1), keep=2, every=40)
        for knobs in (SMALL, NEVER):
            check(case, knobs)
        check_backward(case, SMALL)

    def test_keys_of_a_listed_block_that_no_row_sees():
        for knobs in (NEVER, ALWAYS):
            check(cases.unseen(Maker(60, d=16, h=2, g=1)), knobs)
            check_backward(cases.unseen(Maker(60, d=16, h=2, g=1)), knobs)

    def test_batch_and_lists_shared_by_it():
        case = listed(Maker(60, d=16), b=2)
        check(case, SMALL)
        one = replace(case.layout, tiles=case.layout.tiles[:1], tile_count=case.layout.tile_count[:1])
        check(replace(case, layout=one), SMALL)

    def test_chunks(monkeypatch):
        case = listed(Maker(150, d=16, h=2, g=1), sink=True)
        monkeypatch.setattr(tokens, "ROWS_MOST", 64)
        work = tokens.Work(case.q, case.kv, case.layout, 0.1, SMALL)
        assert work.batches() == [[(0, 64), (64, 64), (128, 22)]]
        check(case, SMALL)
        check(case, replace(SMALL, scratch=1, shared=0.0))  # chunks by themselves

    def test_rows_that_list_nothing():
        case = listed(Maker(64, d=16))
        none = replace(case.layout, tile_count=torch.zeros_like(case.layout.tile_count))
        out, _ = check(replace(case, layout=none), SMALL)
        assert bool((out == 0).all())

    # ------------------------------------------------------------------ lists
    def test_every_pair_is_listed_once():
        case = cases.odd(Maker(90, d=16, h=4, g=2))
        x = case.layout
        for shared in (0.0, 0.4, 2.0):
            work = tokens.Work(case.q, case.kv, x, 0.1, replace(SMALL, shared=shared))
            (batch,) = work.batches()
            made = work.lists(batch)
            assert batch == made.chunks == [(0, 90)]
            named: dict[tuple[int, int], set[int]] = {}
            for lead in range(2):
                for token in range(90):
                    starts = x.tiles[0, lead, token, : int(x.tile_count[0, lead, token])].tolist()
                    blocks = {s // 16 for s in starts} | {(s + 15) // 16 for s in starts}
                    named[lead, token] = {j for j in blocks if j * 16 <= token}
            got = torch.zeros(2, 90, dtype=torch.int32)
            for row in range(2 * made.blocks):
                begin = int(made.offset[0, row])
                words = made.ids[begin : begin + int(made.counts[0, row])].tolist()
                assert words == sorted(words)
                for word in words:
                    token, slot = divmod(word, 256)
                    lead, block = divmod(row, made.blocks)
                    assert int(x.tiles[0, lead, token, slot]) == block * 16
                    named[lead, token].remove(block)
                    got[lead, token] |= 1 << slot
                    assert shared != 0.0
            for lead in range(2):
                for tile in range(made.shared.shape[1]):
                    front, back = made.shared_count[lead, tile].tolist()
                    line = made.shared[lead, tile].tolist()
                    tokens_here = range(tile * made.tile, min(90, (tile + 1) * made.tile))
                    for block in line[:front] + line[len(line) - back :]:
                        for token in tokens_here:
                            if block in named[lead, token]:
                                named[lead, token].remove(block)
                                got[lead, token] |= 1 << 4
            assert not any(named.values())
            assert torch.equal(got, made.present[:, :90, 0])
            end = made.offset[0] + made.counts[0]
            items = made.items[0, : int(made.plan)].tolist()
            assert len(items) <= made.max_items
            for row in range(2 * made.blocks):  # items of a list follow each other from its begin to its end
                cuts = [(b, e) for r, b, e in items if r == row]
                assert [b for b, _ in cuts] + [int(end[row])] == [int(made.offset[0, row])] + [e for _, e in cuts]
                assert all(0 < e - b <= 32 for b, e in cuts)

    def test_inverse_lists(monkeypatch):
        monkeypatch.setattr(inverse, "SHORTEST", 8)
        cases.check_inverse(cases.odd(Maker(45, d=16, h=2, g=2)), 1)  # one kv head after the other
        cases.check_inverse(listed(Maker(35, d=16, h=2, g=1), heads=2, sink=True, b=2, m=50), 1 << 28)

    # ------------------------------------------------------------------ numbers and memory
    def test_half_precision():
        check(listed(Maker(100, d=16, dtype=torch.float16), sink=True), SMALL, tolerance=2e-3)

    @pytest.mark.parametrize("d,dv", [(24, 24), (16, 40), (64, 16)])
    def test_head_dims(d, dv):
        check(listed(Maker(50, d=d, h=2, g=1), dv=dv), SMALL)

    def test_large_logits():
        case = listed(Maker(64, d=16))
        check(replace(case, q=case.q * 30), SMALL, tolerance=1e-4)

    def test_strides():
        x = Maker(60, d=16)
        case = listed(x)
        q, k, v = (x.randn(1, 60, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
        wide = x.randn(1, 2, 60, 19)[..., :16]
        check(Case(q, KV.dense(k, v), case.layout), SMALL)
        check(Case(q, KV.dense(wide, v), case.layout), SMALL)
        t = case.layout.tiles.transpose(2, 3).contiguous().transpose(2, 3)
        check(Case(q, KV.dense(k, v), replace(case.layout, tiles=t)), SMALL)

    def test_two_runs_give_the_same_bits():
        case = listed(Maker(100, d=16), sink=True)
        for a, b in zip(check(case, SMALL), check(case, SMALL), strict=True):
            assert torch.equal(a, b)

    # ------------------------------------------------------------------ gradients
    @pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (8, 2, 2), (6, 2, 2), (8, 4, 8), (4, 2, 1)])
    def test_gradients(h, g, heads):
        for knobs in (SMALL, NEVER, ALWAYS) if h == 6 else (SMALL,):
            check_backward(listed(Maker(35, d=16, h=h, g=g), heads=heads, sink=True), knobs)

    @pytest.mark.parametrize("n,m", [(33, 33), (40, 100), (100, 40)])
    def test_gradients_of_lengths(n, m):
        for causal in (True, False):
            check_backward(listed(Maker(n, d=16), 3, m=m, causal=causal), SMALL)

    def test_gradients_of_tiles_at_any_start():
        for seed, knobs in enumerate((SMALL, NEVER, ALWAYS)):
            check_backward(cases.odd(Maker(50, d=16, h=4, g=2, seed=seed)), knobs)

    @pytest.mark.parametrize("width", [32, 128])
    def test_gradients_of_widths_and_head_dims(width):
        check_backward(listed(Maker(70, d=24, h=2, g=1), 3, width, dv=40), SMALL)

    def test_gradients_where_long_key_blocks_are_cut(monkeypatch):
        monkeypatch.setattr(inverse, "SHORTEST", 8)
        case = listed(Maker(70, d=16, h=4, g=2), sink=True, b=2)
        assert int(tokens_backward.Work(case.q, case.kv, case.layout, 0.1, SMALL).inverse().plan[1]) > 1
        check_backward(case, SMALL)

    def test_gradients_in_chunks_and_half_precision(monkeypatch):
        monkeypatch.setattr(tokens, "ROWS_MOST", 64)
        check_backward(listed(Maker(100, d=16, dtype=torch.float16)), SMALL, tokens_backward.SINGLE, tolerance=4e-3)

    def test_attend_takes_this_backward(monkeypatch):
        calls = []
        real = tokens_backward.backward
        monkeypatch.setattr(tokens_backward, "backward", lambda *a, **k: calls.append(1) or real(*a, knobs=SMALL, **k))
        monkeypatch.setattr(tokens, "ROWS", 50)
        case = listed(Maker(60, d=16))
        q, k, v = (t.detach().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        got = torch.autograd.grad(foveate.attend(q, (k, v), case.layout, backend="triton").square().sum(), (q, k, v))
        assert calls
        want = torch.autograd.grad(foveate.attend(q, (k, v), case.layout, backend="torch").square().sum(), (q, k, v))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)

    # ------------------------------------------------------------------ through attend
    def test_what_it_refuses():
        case = listed(Maker(20, d=16))
        x, kv = case.layout, case.kv
        one = torch.ones(1, 1, dtype=torch.int32)
        refused = [
            (kv, replace(x, block_q=2), 0.0, "single query rows"),
            (kv, replace(x, window=one), 0.0, "not rules"),
            (kv, replace(x, entries=x.tiles, entry_count=x.tile_count), 0.0, "single entries"),
            (kv, replace(x, q_pos=torch.arange(20)[None]), 0.0, "positions"),
            (kv, x, 30.0, "softcap"),
            (kv, replace(x, tile_width=8), 0.0, "not 8"),
            (kv, replace(x, tile_width=48), 0.0, "not 48"),
            (kv, replace(x, tiles=x.tiles[..., :0]), 0.0, "not 0"),
            (replace(kv, len=torch.full((1, 2), 20)), x, 0.0, "lengths"),
            (KV.dense(*(torch.zeros(1, 2, 20, 144),) * 2), x, 0.0, "not 144"),
        ]
        for view, layout, cap, words in refused:
            why = tokens.refused(case.q, view, layout, cap)
            assert why is not None and words in why, (words, why)
        far = torch.empty(1, device="meta").as_strided((1, 4, 20, 16), (0, 1 << 30, 16, 1))
        assert "32 bits" in (tokens.refused(far, kv, x, 0.0) or "")
        assert not tokens.serves(case.q, kv, x, 0.0)  # too few rows
        assert "512" in (tokens_backward.backward_supports(case.q, kv, x, 0.0) or "")

    def test_the_backend_takes_these_kernels(monkeypatch):
        calls = []
        real = tokens.attend
        monkeypatch.setattr(tokens, "attend", lambda *a: calls.append(1) or real(*a, SMALL))
        monkeypatch.setattr(tokens, "ROWS", 50)
        case = listed(Maker(70, d=16))
        out, lse = cases.through_attend(case)
        assert calls
        want, want_lse = case.oracle()
        torch.testing.assert_close(out, want, atol=2e-5, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=0)
        monkeypatch.setattr(backend.tokens, "serves", lambda *_: False)
        torch.testing.assert_close(cases.through_attend(case)[0], out, atol=2e-5, rtol=0)
        assert len(calls) == 1 and tokens_lists.SLOTS == 254
