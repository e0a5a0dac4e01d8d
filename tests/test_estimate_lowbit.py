"""The kernels of 4-bit logits in Triton's interpreter, and compiled for Hopper without a GPU."""

from __future__ import annotations

import inspect
import os
import re

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
            "from foveate.methods.base import State; x = call(*prompt('random', m=300));"
            "assert parse('sale:window=32,segment=64').plan(x, State()) is not None"
        )
        runs_without_triton(code)

    @pytest.mark.parametrize("dtype,d", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)])
    def test_compiles_for_hopper(dtype, d, monkeypatch, tmp_path):
        """Registers, spills and shared memory of every launch at 128K tokens: two programs share a multiprocessor."""
        from foveate.kernels.triton import estimate_lowbit, estimate_lowbit_lists
        from foveate.kernels.triton import estimate_lowbit_launch as launch

        monkeypatch.setattr(launch, "tile", launch.tile.__wrapped__)  # nothing of this is remembered
        monkeypatch.setattr(launch, "device", lambda index: (227 * 1024, 132))
        monkeypatch.setattr(launch, "_index", lambda t: 0)
        monkeypatch.setattr(launch, "WHOLE", 1 << 40)

        def meta(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        q, k, words = (
            meta(4, 1 << 17, d, dtype=dtype),
            meta(1, 1 << 17, d, dtype=dtype),
            meta(4, 2048, 128, dtype=torch.int32),
        )
        sizes, how = (64, 32, 256, 128), dict(start=0, scale=0.1)
        scores = hopper(monkeypatch, tmp_path, estimate_lowbit, "quantise_keys", "local_sums", "low_bits")
        with scores as built, hopper(monkeypatch, tmp_path, estimate_lowbit_lists, "bit_lists") as listed:
            bar = launch.local_sums(q, k, meta(1, d), sizes, softcap=None, **how)
            for share in ("fragment", "token"):
                launch.block_bits(q, k, meta(1, d), meta(4, d), bar, words, sizes, 32, share=share, bits=4, **how)
            launch.bit_lists(meta(1, 32, 2048, 128, dtype=torch.int32), meta(2048, 3, dtype=torch.int32), 8, 4096, 32)
        assert len(built) == 5 and len(listed) == 1
        for name, kernel, usage in (*built, *listed):
            assert usage["STACK"] == 0, (name, usage)
            assert (kernel.metadata.shared + 1024) * 2 <= 228 * 1024, name
            assert usage["REG"] * 32 * kernel.metadata.num_warps * 2 <= 65536, (name, usage)
            if name == "low_bits":
                assert re.search(r"wgmma.mma_async\S*\.s32\.s8\.s8", kernel.asm["ptx"])
            else:
                assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (name == "local_sums")

else:
    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores import fused
    from tests import estimate_lowbit_cases as cases
    from tests.estimate_cases import differing, draw, peaked, plain
    from tests.estimate_lowbit_cases import Grid

    SMALL = Grid(64, 32, 32, 32, 64)
    WANTED = (64, 16, 32, "fragment")

    @pytest.mark.parametrize("share,bits", [("fragment", 4), ("token", 4), ("fragment", 8)])
    def test_integer_keys(share, bits):
        cases.check_keys(2, 2, 75, 24, share, bits)
        cases.check_keys(1, 1, 33, 16, share, bits, dtype=torch.float16)

    @pytest.mark.parametrize("grid,softcap", [
        (SMALL, None), (Grid(32, 16, 0, 0, 48), None), (Grid(16, 8, 16, 40, 8), 3.0),
    ])  # fmt: skip
    def test_sums(grid, softcap):
        cases.check_sums(2, 1, 150, 0, 16, grid, softcap=softcap, tolerance=1e-5)
        cases.check_sums(2, 2, 131, 75, 24, grid, softcap=softcap, tolerance=1e-5, dtype=torch.float16)

    @pytest.mark.parametrize("shape,grid,tau,options", [
        ((2, 1, 256, 0, 16), SMALL, 1.5, {}),
        ((4, 2, 250, 90, 24), SMALL, 1.0, {"group": True}),  # a chunk, partial blocks, channels that are no power of two
        ((2, 2, 200, 0, 16), Grid(32, 8, 16, 24, 40), 0.2, {"share": "token"}),
        ((2, 1, 230, 30, 16), Grid(16, 64, 64, 20, 64), 0.5, {"bits": 8}),  # key blocks of two fragments
        ((2, 1, 200, 0, 32), Grid(64, 16, 0, 0, 16), 20.0, {"softcap": 20.0, "bits": 3}),
        ((2, 2, 160, 157, 16), SMALL, 0.2, {}),  # a few rows
    ])  # fmt: skip
    def test_blocks(shape, grid, tau, options):
        """Index by index."""
        assert 0.05 < cases.check_blocks(*shape, grid, tau, **options) < 0.95

    def test_blocks_of_halves():
        assert 0.05 < cases.check_blocks(2, 1, 200, 20, 16, SMALL, 1.0, dtype=torch.float16) < 0.95

    def test_blocks_in_pieces(monkeypatch):
        monkeypatch.setattr(cases.low, "HELD", 1)
        cases.check_blocks(4, 2, 200, 0, 16, SMALL, 1.0)

    def test_the_largest_sums():
        assert 0.01 < cases.check_limit(cases.low.block_bits, 256) < 0.9

    @pytest.mark.parametrize("bits,dtype", [(4, torch.float8_e4m3fn), (5, torch.int8)])
    def test_hopper_takes_the_logits(bits, dtype, monkeypatch):
        """Gluon's kernel gets keys of the dtype whose products are exact, where it has no reason against the call."""
        taken, hopper = [], cases.low.hopper
        monkeypatch.setattr(hopper, "why_not", lambda q, width, *blocks: None if (width, *blocks) == WANTED else "other")
        bind = inspect.signature(hopper.arguments).bind
        monkeypatch.setattr(hopper, "run", lambda *args, **how: taken.append(bind(*args, **how)))
        cases.check_blocks(2, 1, 100, 0, 64, Grid(16, 32, 0, 0, 32), 1.0, slack=14, bits=bits)
        (call,) = taken
        ints, steps, extra = call.arguments["keys"]
        assert ints.dtype == dtype and ints.shape == (1, 256, 64) and steps.shape == (1, 256) and extra.shape == (2, 256)
        assert not call.arguments["words"].any() and call.arguments["sizes"] == (16, 0, 0, 32)
        monkeypatch.setattr(cases.low, "HOPPER", False)
        cases.check_blocks(2, 1, 100, 0, 64, Grid(16, 32, 0, 0, 32), 1.0, bits=bits)
        assert len(taken) == 1

    def test_rows_without_a_threshold():
        """-inf keeps every block of a head, whatever the others do."""
        from foveate.kv import KV

        q, k = draw(1, 2, 200, 16), draw(1, 1, 200, 16, seed=1)
        log_tau = torch.tensor([float("-inf"), 50.0])
        _, count = cases.lowbit.relative_blocks(q, KV.dense(k, k), log_tau, SMALL, start=0, scale=0.2)
        assert count[0, 0].tolist() == [2, 4, 6, 7] and int(count[0, 1, 3]) < 7

    @pytest.mark.parametrize("shape", [(1, 4, 2, 5, 100, 32), (2, 2, 1, 3, 33, 1), (1, 1, 1, 2, 7, 8)])
    def test_lists(shape, monkeypatch):
        monkeypatch.setattr(cases.low, "CHUNK", 32)  # several steps a row
        assert cases.check_lists(*shape) == shape[4]
        monkeypatch.setattr(cases.low, "WHOLE", 0)
        cases.check_lists(*shape)

    def test_long_lists_are_cut(monkeypatch):
        from foveate.kernels.triton.estimate_lowbit_launch import bit_lists

        monkeypatch.setattr(cases.low, "WHOLE", 0)
        words, spans = torch.full((1, 1, 1, 2), 5, dtype=torch.int32), torch.tensor([[1, 40, 40]], dtype=torch.int32)
        index, count = bit_lists(words, spans, 1, 64, 2)
        assert index.tolist() == [[[[0, 4, 64, 68]]]] and count.tolist() == [[[4]]]

    def test_what_is_left_to_torch():
        q = draw(1, 2, 60, 16)
        selects = cases.low.selects
        assert selects(q, q, 64, 32, "token") and not selects(q, q, 64, 32, "exact") and not selects(q, q, 48, 32, "token")
        assert not selects(q, q, 64, 24, "token") and not selects(q, q.half(), 64, 32, "token")
        assert fused.lowbit(q) is cases.low and fused.lowbit(q.double()) is None
        with plain():
            assert fused.lowbit(q) is None

    @pytest.mark.parametrize("name", [
        "sale:tau=1.5,window=32,segment=64", "sale:tau=1.5,window=32,segment=64,share=group,quant=token",
    ])  # fmt: skip
    def test_plans(name):
        x = peaked(4, 1, 240, 16, 53)
        parse(name).plan(x, State()).validate()
        assert differing(parse(name), x) == 0
