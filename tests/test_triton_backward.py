"""The Triton backward pass in Triton's interpreter, on the CPU, against autograd through the oracle.

As in test_triton.py, this file runs itself once more in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.processes import run_in_the_interpreter

pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        run_in_the_interpreter(__file__)

    def test_torch_keeps_the_backward_on_the_cpu():
        from foveate.kernels import dispatch, torch_gather
        from tests.kernel_cases import Maker, dense

        case = dense(Maker(8, d=16))
        for name in ("auto", "torch", "triton", "reference"):
            assert dispatch._backward_module(case.q, case.kv, case.layout, 0.0, name) is torch_gather

    @pytest.mark.parametrize("width", [128, 64])
    def test_compiles_for_hopper_without_vector_spills(width, monkeypatch, tmp_path):
        import re

        import triton

        from foveate.kernels.gluon.shim import compile_sm90
        from foveate.kernels.triton import backward as bw
        from foveate.kernels.triton import inverse
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

        for module in (bw, inverse):
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
        monkeypatch.setattr(bw, "device", lambda index: (227 * 1024, 132))

        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k, lse = meta(1, 8, 4096, 128), meta(1, 2, 4096, 128), meta(1, 8, 4096, dtype=torch.float32)
        tiles, count = meta(1, 8, 32, 20, dtype=torch.int32), meta(1, 8, 32, dtype=torch.int32)
        layout = Layout((1, 8, 4096, 4096), block_q=128, tile_width=width, tiles=tiles, tile_count=count)
        bw.backward(q, lse, q, KV.dense(k, k), layout, q, lse, scale=0.1, softcap=0.0)
        assert len(launches) == 7  # dq; mark, count, plan, fill; dk and dv, join
        for kernel, args, options in launches:
            built = compile_sm90(kernel, list(args), options)
            big = kernel.fn.__name__ in ("dq_kernel", "dkdv_kernel")
            (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
            command = [tool, "-res-usage", tmp_path / "kernel.cubin"]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            stack = int(re.search(r"STACK:(\d+)", usage)[1])
            assert stack <= (128 if big else 0), usage  # a few scalars a thread at most
            assert built.metadata.shared <= 227 * 1024
            assert ("wgmma.mma_async" in built.asm["ptx"]) == big

else:
    import foveate
    from foveate.kernels import dispatch, torch_gather
    from foveate.kernels.triton import backward as bw
    from foveate.kernels.triton import inverse
    from foveate.kv import KV
    from foveate.layout import Layout
    from foveate.lists import repeat_heads
    from tests import kernel_cases as cases
    from tests.kernel_cases import Case, Maker, poison

    def oracle(case: Case, dout, dlse, dtype=torch.float64):
        """out, lse and the gradients of (out * dout).sum() + (lse * dlse).sum(), by autograd through the full scores."""
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        h = q.shape[1]
        mask = case.layout.to_mask(case.kv)
        dead = ~mask.any(-1)
        s = (q @ repeat_heads(k, h).transpose(-1, -2)) * case.scale
        s = s.masked_fill(~mask, float("-inf")).masked_fill(dead[..., None], 0)
        lse = s.logsumexp(-1)
        out = torch.softmax(s, -1).masked_fill(dead[..., None], 0) @ repeat_heads(v, h)
        loss = (out * dout.to(dtype)).sum() + (lse.masked_fill(dead, 0) * dlse.to(dtype)).sum()
        grads = torch.autograd.grad(loss, (q, k, v))
        return out.detach(), lse.detach().masked_fill(dead, float("-inf")), grads

    def check(case: Case, tiles: bw.Config | None = None, tolerance: float = 3e-5, seed: int = 5):
        """The gradients of the kernels; keys that no row sees hold NaN, and so do all results before they are written."""
        assert bw.backward_supports(case.q, case.kv, case.layout, 0.0) is None
        gen = torch.Generator().manual_seed(seed)
        dout = torch.randn(*case.q.shape[:3], case.kv.shape[4], generator=gen).to(case.q.dtype)
        dlse = torch.randn(*case.q.shape[:3], generator=gen)
        out, lse, want = oracle(case, dout, dlse)
        dirty = case.poisoned()
        with poison():
            *got, none = bw.backward(
                dout, dlse, dirty.q, dirty.kv, case.layout, out.to(case.q.dtype), lse.float(), scale=case.scale, softcap=0.0,
                tiles=tiles,
            )  # fmt: skip
        assert none is None
        for name, a, b, t in zip(("dq", "dk", "dv"), got, want, (case.q, case.kv.k, case.kv.v), strict=True):
            assert a.shape == t.shape and a.dtype == t.dtype, name
            assert bool(torch.isfinite(a).all()), f"{name} was not written, or NaN reached it"
            off = float((a.double() - b).abs().max())
            assert off <= tolerance * max(1.0, float(b.abs().max())), f"{name} is off by {off}"
        unseen = dirty.kv.k.isnan()
        assert bool((got[1][unseen] == 0).all()) and bool((got[2][dirty.kv.v.isnan()] == 0).all())
        return got

    def listed(x: Maker, block_q: int = 32, width: int = 32, density: float = 0.5, m: int | None = None, **more) -> Case:
        b = more.get("b", 1)
        m = x.n if m is None else m
        layout = x.blocks(density, block_q, width, m=m, **more)
        unused = torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None]
        layout.tiles.masked_fill_(unused, 1 << 28)  # what an unused slot holds must not matter
        return Case(x.q(b=b), x.dense(m, b=b), layout)

    # ------------------------------------------------------------------ which pairs
    @pytest.mark.parametrize("h,g,heads", [(1, 1, 1), (3, 1, 3), (4, 1, 1), (8, 2, 8), (8, 2, 2), (6, 2, 3), (4, 4, 2)])
    @pytest.mark.parametrize("causal", [True, False])
    def test_groups_and_shared_lists(h, g, heads, causal):
        check(listed(Maker(70, d=16, h=h, g=g), heads=heads, causal=causal))

    @pytest.mark.parametrize("block_q,width", [(16, 16), (64, 16), (16, 64), (128, 64), (64, 128), (32, 256)])
    def test_blocks(block_q, width):
        check(listed(Maker(150, d=16, h=2, g=1), block_q, width))
        check(listed(Maker(150, d=16, h=2, g=1), block_q, width), bw.Config(bw.Steps(16, 32, 4, 1), bw.Steps(16, 32, 4, 1)))

    @pytest.mark.parametrize("n,m", [(1, 1), (33, 33), (64, 64), (40, 100), (100, 40), (1, 70)])
    def test_lengths(n, m):
        for causal in (True, False):
            check(listed(Maker(n, d=16), 32, 16, 0.7, m=m, causal=causal))
            x = Maker(n, d=16)
            check(Case(x.q(), x.dense(m), Layout.dense(*x.shape(m=m), causal=causal)))

    def test_more_than_one_dense_block():
        x = Maker(200, d=16, h=2, g=1)
        check(Case(x.q(), x.dense(), Layout.dense(*x.shape())))

    @pytest.mark.parametrize("offset", [1, 20, 31])
    def test_a_chunk_that_starts_inside_a_block(offset):
        check(listed(Maker(70, d=16), 32, 16, 0.6, m=90, q_offset=offset))

    def test_batch():
        check(listed(Maker(60, d=16), b=2))
        case = listed(Maker(60, d=16), b=2)
        one = replace(case.layout, tiles=case.layout.tiles[:1], tile_count=case.layout.tile_count[:1])
        check(replace(case, layout=one))

    def test_rows_and_keys_that_nobody_names():
        x = Maker(128, d=16, h=2, g=1)
        mask = torch.zeros(1, 2, 4, 8, dtype=torch.bool)
        mask[:, 0, 3] = True  # one row of blocks owns everything; the second head sees nothing
        layout = Layout.from_block_mask(mask, 128, 128, block_q=32, block_k=16)
        got = check(Case(x.q(), x.dense(), layout))
        assert bool((got[0][:, 1] == 0).all()) and bool((got[0][:, :, :96] == 0).all())
        got = check(Case(x.q(), x.dense(), Layout.from_block_mask(mask & False, 128, 128, block_q=32, block_k=16)))
        assert all(bool((t == 0).all()) for t in got)

    def test_keys_of_a_listed_tile_that_no_row_sees():
        """Only the first 16 rows list the first tile: most of its keys lie in their future and hold NaN."""
        x = Maker(100, d=16, h=2, g=1)
        mask = torch.zeros(1, 2, 7, 2, dtype=torch.bool)
        mask[:, :, 0, 0] = True
        case = Case(x.q(), x.dense(), Layout.from_block_mask(mask, 100, 100, block_q=16, block_k=64))
        assert bool(case.poisoned().kv.k[:, :, 16:64].isnan().all())
        check(case)

    def test_unaligned_and_overlapping_tiles():
        tiles = torch.tensor([[[[0, 30, 60, 61, 130], [5, 37, 38, 39, 100], [3, 50, 140, 159, 200]]]])
        count = torch.tensor([[[4, 5, 5]]])
        x = Maker(90, d=16, h=2, g=1)
        for width in (32, 64):
            layout = Layout.lists((1, 2, 90, 210), block_q=32, tile_width=width, tiles=tiles, tile_count=count)
            check(Case(x.q(), x.dense(210), layout))
            check(Case(x.q(), x.dense(210), layout), bw.Config(bw.Steps(32, 16, 4, 1), bw.Steps(32, 16, 4, 1)))

    # ------------------------------------------------------------------ a key block that very many rows name
    @pytest.mark.parametrize("shortest", [1, 3, 32])
    def test_long_key_blocks_are_cut(monkeypatch, shortest):
        monkeypatch.setattr(inverse, "SHORTEST", shortest)
        x = Maker(130, d=16, h=4, g=1)
        mask = x.rand(1, 4, 9, 9) < 0.2
        mask[..., 0] = True
        layout = Layout.from_block_mask(mask, 130, 130, block_q=16, block_k=16)
        case = Case(x.q(), x.dense(), layout)
        check(case)
        lists = inverse.build(layout, 1, 16, 8, torch.device("cpu"))
        made = int(lists.plan[1])
        assert made <= lists.max_items and (made > 1) == (shortest < 32 or made == 2)
        pieces = lists.cuts[:, 1]
        assert int(pieces.sum()) == made
        assert torch.equal(lists.items[:made].long(), torch.arange(len(pieces)).repeat_interleave(pieces))

    def test_inverse_lists_equal_the_layouts_own():
        for causal in (True, False):
            case = listed(Maker(150, d=16, h=6, g=2), 32, 16, 0.4, m=170, causal=causal)
            lists = inverse.build(case.layout, 2, 16, 8, torch.device("cpu"))
            inv = case.layout.inverse()
            nk, nq = lists.key_blocks, case.layout.num_blocks
            assert (lists.lists, lists.share) == (3, 1)
            for g in range(2):
                for k in range(nk):
                    want = set()
                    for i in range(3):
                        at = (g * 3 + i) * nk + k
                        for block in inv.ids[inv.indptr[at] : inv.indptr[at + 1]].tolist():
                            if not causal or k * 16 <= 170 - 150 + min(block * 32 + 31, 149):
                                want.add((i, block))
                    at = int(lists.offset[g * nk + k])
                    free, whole, used = lists.counts[g * nk + k].tolist()
                    got = [(w >> 24, w & (1 << 24) - 1) for w in lists.ids[at : at + used].tolist()]
                    assert set(got) == want and len(got) == len(want)
                    assert got[:free] == sorted(got[:free]) and got[free:] == sorted(got[free:])
                    below = [not causal or k * 16 + 15 <= 170 - 150 + block * 32 for _, block in got]
                    assert below == [True] * free + [False] * (used - free) and whole == used
            assert lists.key_blocks == inv.num_tiles and nq == case.layout.tiles.shape[2]

    def test_a_block_that_one_tile_holds_whole_is_free_whatever_begins_inside():
        tiles = torch.tensor([[[[0, 10], [0, 64]]]])
        layout = Layout.lists((1, 1, 64, 96), block_q=32, tile_width=32, tiles=tiles, causal=False)
        lists = inverse.build(layout, 1, 32, 8, torch.device("cpu"))
        assert lists.counts.tolist() == [[2, 2, 2], [0, 0, 1], [1, 1, 1]]

    def test_inverse_lists_in_pieces(monkeypatch):
        case = listed(Maker(100, d=16, h=4, g=4), b=2)
        whole = inverse.build(case.layout, 4, 32, 8, torch.device("cpu"))
        monkeypatch.setattr(inverse, "SCRATCH", 3 * 4 * 4)  # three kv heads of 4 x 4 blocks at a time
        part = inverse.build(case.layout, 4, 32, 8, torch.device("cpu"))
        used = int(whole.counts[:, 2].sum())
        assert torch.equal(whole.ids[:used], part.ids[:used]) and torch.equal(whole.counts, part.counts)

    # ------------------------------------------------------------------ numbers and memory
    def test_half_precision():
        x = Maker(100, d=16, dtype=torch.float16)
        check(listed(x), tolerance=4e-3)
        check(Case(x.q(), x.dense(), Layout.dense(*x.shape())), tolerance=4e-3)

    @pytest.mark.parametrize("d,dv", [(24, 24), (16, 40), (64, 16), (128, 128)])
    def test_head_dims(d, dv):
        x = Maker(50, d=d, h=2, g=1)
        check(Case(x.q(), x.dense(dv=dv), x.blocks(0.6, 16, 16)))

    def test_large_logits():
        case = listed(Maker(64, d=16), 16, 16, 0.6)
        check(replace(case, q=case.q * 30), tolerance=2e-4)

    def test_strides():
        x = Maker(60, d=16)
        q, k, v = (x.randn(1, 60, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
        odd = x.randn(1, 2, 60, 19)[..., :16]
        check(Case(q, KV.dense(k, v), x.blocks(0.6, 16, 16)))
        check(Case(q, KV.dense(odd, v), x.blocks(0.6, 16, 16)))

    def test_two_runs_give_the_same_bits():
        case = listed(Maker(120, d=16), 16, 16)
        for a, b in zip(check(case), check(case), strict=True):
            assert torch.equal(a, b)

    # ------------------------------------------------------------------ through attend
    def test_attend_takes_this_backward(monkeypatch):
        calls = []
        real = bw.backward
        monkeypatch.setattr(bw, "backward", lambda *a, **k: calls.append(1) or real(*a, **k))
        case = listed(Maker(70, d=16), 32, 16)
        grads = []
        for name in ("triton", "torch"):
            q, k, v = (t.clone().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
            out, lse = foveate.attend(q, (k, v), case.layout, backend=name, return_lse=True)
            (out.square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()).backward()
            grads.append((q.grad, k.grad, v.grad))
            assert len(calls) == 1
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

    REFUSED = {
        "rule": (cases.static, "walks tiles"),
        "entries": (cases.tiles_and_entries, "walks tiles"),
        "columns": (cases.factored, "walks tiles"),
        "lengths": (cases.lengths_without_positions, "lengths"),
        "positions": (cases.positions, "positions"),
        "bias": (cases.bias, "weights"),
        "softcap": (cases.softcap, "softcap"),
        "paged": (cases.prefill_paged, "dense storage"),
        "tokens": (cases.token_lists, "query blocks of 16"),
        "widths": (cases.odd_widths, "16, 32, 64"),
    }

    @pytest.mark.parametrize("what", REFUSED)
    def test_refuses_with_a_reason_and_torch_takes_it(what):
        make, reason = REFUSED[what]
        case = make(Maker(66, d=16))
        assert reason in bw.backward_supports(case.q, case.kv, case.layout, case.softcap)
        assert dispatch._backward_module(case.q, case.kv, case.layout, case.softcap, "triton") is torch_gather

    def test_refuses_head_dims():
        for d, dv in ((144, 16), (18, 18), (16, 20)):
            x = Maker(20, d=d, dtype=torch.float16)
            case = Case(x.q(), x.dense(dv=dv), x.blocks(0.5, 16, 16))
            assert "head dims up to 128" in bw.backward_supports(case.q, case.kv, case.layout, 0.0)
