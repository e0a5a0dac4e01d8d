"""The dense decode kernel: in Triton's interpreter (a process of its own, see `test_triton.py`) and compiled."""

from __future__ import annotations

import os

import pytest
import torch

from tests.compiling import hopper
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """A multiprocessor has room for two programs of the dense kernel and, with its merge, four of that over pages."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import arrivals, dense_decode, paging, paging_launch
        from foveate.kernels.triton import dense_decode_launch as kernels
        from foveate.kv import KV
        from foveate.layout import Layout

        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        ints = lambda *shape: meta(*shape, dtype=torch.int32)  # noqa: E731
        for module in (kernels, paging_launch):
            monkeypatch.setattr(module, "device", lambda index: (232448, 132))
            module._plan.cache_clear()
        monkeypatch.setattr(arrivals, "counters", lambda n, part: ints(n))
        q, m = meta(1, 32, 1, 128), 131584
        kv = KV.dense(meta(1, 8, m, 128), meta(1, 8, m, 128), len=ints(1, 8))
        with hopper(monkeypatch, tmp_path, dense_decode, "attend_dense") as dense:
            kernels.attend(q, kv, Layout.dense(1, 32, 1, m), 0.1, 0.0, False)
        with hopper(monkeypatch, tmp_path, dense_decode, "attend_dense", "merge_dense") as several:
            for n in (9, 17):  # tiles of 64 and of 128 queries
                kernels.attend(meta(1, 32, n, 128), kv, Layout.dense(1, 32, n, m), 0.1, 0.0, False)
        tiles = Layout((1, 32, 1, m), tile_width=16, tiles=ints(1, 8, 1, 128), tile_count=ints(1, 8, 1))
        with hopper(monkeypatch, tmp_path, paging, "attend_tiles") as paged:
            paging_launch.attend(q, kv, tiles, 0.1, False)
        for module in (kernels, paging_launch):
            module._plan.cache_clear()
        (_, few, few_uses), (_, joined, joined_uses), (_, more, more_uses), _ = several
        for done, uses, threads, room in ((few, few_uses, 128, 2), (more, more_uses, 256, 1)):
            assert uses["STACK"] <= 16 and uses["REG"] * threads * room <= 65536
            assert (done.metadata.shared + 1024) * room <= 228 * 1024
            assert "cp.async.cg.shared.global" in done.asm["ptx"] and "wgmma" in done.asm["ptx"]
        assert joined_uses["STACK"] <= 16 and joined_uses["REG"] <= 128
        for built, room in ((dense, 2), (paged, 4)):
            ((_, done, usage),) = built
            assert usage["STACK"] <= 16 and usage["REG"] * 128 * room <= 65536
            assert (done.metadata.shared + 1024) * room <= 228 * 1024
            assert "cp.async.cg.shared.global" in done.asm["ptx"] and "atom.global.gpu.acq_rel" in done.asm["ptx"]

else:
    from foveate.kernels import dispatch
    from foveate.kernels import triton as backend
    from foveate.kernels.base import Want
    from foveate.kernels.triton import arrivals
    from foveate.kernels.triton import dense_decode_launch as kernels
    from tests.dense_decode_cases import at_rest, check, oracle, problem

    MIXED = ((50, 32), (7, 0), (1, 33))  # whole steps, parts of one, one entry, none

    @pytest.fixture(autouse=True)
    def few_programs(monkeypatch):
        """Steps of 16 keys on four programs: stretches end within rows and go over several. Served however short."""
        cores(monkeypatch, 2)
        monkeypatch.setattr(kernels, "STEP", 0)
        for name in ("ROOM", "ROOM_FEW"):
            monkeypatch.setattr(kernels, name, 0)
        yield
        kernels._plan.cache_clear()

    def cores(monkeypatch, n):
        monkeypatch.setattr(kernels, "device", lambda index: (99 * 1024, n))
        kernels._plan.cache_clear()

    @pytest.mark.parametrize("r,d,dv", [(4, 64, 64), (1, 24, 40), (3, 128, 128), (16, 16, 16)])
    def test_rows_of_any_length(r, d, dv):
        check(*problem(MIXED, r, d, dv), 2e-5)

    @pytest.mark.parametrize(
        "more", [{"bias": True}, {"pos": True}, {"bias": True, "pos": True}, {"kind": "ragged"}], ids=str
    )
    def test_weights_positions_segments(more):
        check(*problem(MIXED, **more), 2e-5, softcap=3.0 if len(more) > 1 else 0.0)

    def test_without_lengths_and_with_a_query_further_back():
        q, kv, layout = problem(((77, 77),), room=0)
        check(q, cut := kv.row(0), layout, 2e-5)
        plain = dispatch.KV.dense(cut.k, cut.v)
        check(q, plain, layout, 2e-5)
        back = dispatch.Layout.dense(*layout.shape, q_pos=torch.tensor([[40]]))
        check(q, plain, back, 2e-5)
        open_ = dispatch.Layout.dense(*layout.shape, causal=False, q_pos=torch.tensor([[40]]))
        check(q, plain, open_, 2e-5)

    def test_half_precision_and_softcap():
        check(*problem(MIXED, dtype=torch.float16), 2e-3)
        check(*problem(MIXED), 2e-5, softcap=2.0)

    def test_strided_storage():
        q, kv, layout = problem(MIXED)
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (kv.k, kv.v))
        check(q, dispatch.KV.dense(k, v, len=kv.len), layout, 2e-5)

    def test_any_number_of_programs(monkeypatch):
        """The result is the same but for rounding, and equal from run to run, whoever merges."""
        q, kv, layout = problem(MIXED, r=2, d=32)
        want, results = oracle(q, kv, layout), []
        for share, n, least in ((1, 1, 1), (2, 1, 1), (2, 3, 2), (2, 40, 1)):
            cores(monkeypatch, n)
            monkeypatch.setattr(kernels, "SHARE", share)
            monkeypatch.setattr(kernels, "LEAST", least)
            results.append(check(q, kv, layout, 2e-5, want=want))
        again = check(q, kv, layout, 2e-5, want=want)
        assert torch.equal(again[0], results[-1][0]) and torch.equal(again[1], results[-1][1])

    def test_merges_in_pieces(monkeypatch):
        monkeypatch.setattr(arrivals, "chunk", lambda *_: 2)
        cores(monkeypatch, 20)
        check(*problem(((110,),), r=3, d=32), 2e-5)

    def test_every_program_counts(monkeypatch):
        """A counter that is not 0 before a launch spoils it: someone merges too early. So the tests above see who merges."""
        cores(monkeypatch, 20)
        q, kv, layout = problem(((110,),), r=2, d=32)
        want, _ = oracle(q, kv, layout)
        arrivals.counters(1, q)[0] = 1
        out, _ = kernels.attend(q, kv, layout, 32**-0.5, 0.0, False)
        assert float((out - want).abs().max()) > 1e-2 or bool(out.isnan().any())
        arrivals.counters(1, q).zero_()

    @pytest.mark.parametrize("n,r,d,dv", [(2, 4, 32, 32), (9, 4, 32, 24), (17, 2, 16, 16), (5, 1, 64, 64), (9, 8, 16, 16)])
    def test_a_few_tokens(n, r, d, dv):
        """Rows shorter than the call among them: their first tokens see nothing."""
        check(*problem(MIXED, r, d, dv, n=n), 2e-5)

    @pytest.mark.parametrize("more", [{"bias": True}, {"pos": True}, {"bias": True, "pos": True, "kind": "ragged"}], ids=str)
    def test_a_few_tokens_with_weights_positions_segments(more):
        check(*problem(MIXED, 2, 32, n=6, **more), 2e-5, softcap=3.0 if len(more) > 1 else 0.0)

    def test_a_few_tokens_without_lengths_and_further_back():
        q, kv, layout = problem(((77, 77),), r=2, d=32, room=0, n=4)
        plain = dispatch.KV.dense(kv.k, kv.v)
        check(q, plain, layout, 2e-5)
        at = torch.tensor([[31, 32, 33, 34]])
        check(q, plain, dispatch.Layout.dense(*layout.shape, q_pos=at), 2e-5)
        check(q, plain, dispatch.Layout.dense(*layout.shape, causal=False), 2e-5)
        strided = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a model has it
        check(strided, plain, layout, 2e-5)

    def test_a_few_tokens_on_any_number_of_programs(monkeypatch):
        q, kv, layout = problem(MIXED, r=2, d=32, n=5)
        want = oracle(q, kv, layout)
        for share, n, least in ((1, 1, 1), (2, 1, 1), (2, 3, 2), (2, 40, 1)):
            cores(monkeypatch, n)
            monkeypatch.setattr(kernels, "SHARE", share)
            monkeypatch.setattr(kernels, "LEAST", least)
            check(q, kv, layout, 2e-5, want=want)

    def test_a_few_tokens_see_nothing_of_each_other_from_behind():
        """The values of the last token reach it alone, however far they are from the others."""
        q, kv, layout = problem(((60, 60),), r=2, d=32, n=4)
        kv.v[:, :, 59] = 1e4
        out, _ = check(q, kv, layout, 2e-2)
        assert float(out[:, :, :3].abs().max()) < 10 < float(out[:, :, 3].abs().min())

    def test_what_goes_the_long_way(monkeypatch):
        q, kv, layout = problem(MIXED, r=4)
        taken = []
        inner = kernels.attend
        monkeypatch.setattr(kernels, "attend", lambda *a: taken.append(a) or inner(*a))
        out, lse, _ = backend.forward(q, kv, layout, scale=-0.2, softcap=0.0, want=Want(lse=True))
        assert len(taken) == 1
        monkeypatch.setattr(kernels, "why_not", lambda *_: "not today")
        long, long_lse, _ = backend.forward(q, kv, layout, scale=-0.2, softcap=0.0, want=Want(lse=True))
        assert len(taken) == 1
        torch.testing.assert_close(out, long, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, long_lse, atol=1e-5, rtol=1e-5)
        at_rest()

    def test_reasons(monkeypatch):
        q, kv, layout = problem(MIXED, r=4)
        wide, kv1, layout1 = problem(((20,),), r=17, d=16)
        far = torch.empty_strided(kv.k.shape, (0, 0, 1 << 25, 1), device="meta")  # nobody reads it
        refused = {
            "16 query heads": (wide, kv1, layout1),
            "over all entries": (q, kv, dispatch.Layout.static(layout.shape, window=9, device="cpu")),
            "head dim": (q.double(), kv, layout),
            "pages": (q, dispatch.KV(kv.k[0], kv.v[0], "paged", 71, table=kv.len[..., None]), layout),
            "31 bits": (q, dispatch.KV(far, far, "dense", 71), layout),
        }
        for said, call in refused.items():
            assert said in kernels.why_not(*call)
        assert "up to 32 queries" in kernels.why_not(*problem(((50,),), n=33))
        assert "do not fit a program's memory" in kernels.why_not(*problem(((50,),), n=32))  # of 99 KB, in fp32
        monkeypatch.setattr(kernels, "device", lambda index: (232448, 132))
        assert kernels.why_not(*problem(((50,),), n=32)) is None
        assert "128 queries of a kv head in several tokens, not 136" in kernels.why_not(*problem(((50,),), r=8, d=16, n=17))
        assert kernels.why_not(q, kv, layout) is None

    def test_where_little_is_to_be_read_the_general_kernel_serves(monkeypatch):
        """Batch times room decides, whatever the lengths and heads."""
        monkeypatch.undo()
        assert kernels.ROOM == 65536
        for b, g, room, served in ((1, 2, 65535, False), (1, 1, 65536, True), (8, 2, 8191, False), (8, 2, 8192, True)):
            q, k = torch.empty(b, 4, 1, 16), torch.empty(16).expand(b, g, room, 16)
            kv = dispatch.KV.dense(k, k, len=torch.full((b, g), 100, dtype=torch.int32))
            why = kernels.why_not(q, kv, dispatch.Layout.dense(b, 4, 1, room))
            assert why is None if served else f"65,536 entries of room in all rows together, not {b * room:,}" in why
            few = kernels.why_not(q.expand(b, 4, 3, 16), kv, dispatch.Layout.dense(b, 4, 3, room))
            assert few is None and kernels.ROOM_FEW == 16384
        q, kv, layout = problem(MIXED)
        monkeypatch.setattr(kernels, "attend", None)  # the general kernel computes this one
        out, _, _ = backend.forward(q, kv, layout, scale=0.125, softcap=0.0, want=Want())
        torch.testing.assert_close(out, oracle(q, kv, layout)[0], atol=2e-5, rtol=0)
