"""The decode kernel over codes: in Triton's interpreter (a process of its own, see `test_triton.py`) and compiled."""

from __future__ import annotations

import os
import re

import pytest
import torch

from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    from tests.compiling import hopper

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    @pytest.mark.parametrize("rule", [(4, 4, 32, 128), (8, 8, 64, 128)])  # more in tests/gpu
    def test_compiles_for_hopper(rule, monkeypatch, tmp_path):
        """Llama-3-8B's heads: registers, shared memory, whole words read, and no spill."""
        from foveate.cache.fixed import fix
        from foveate.kernels.triton import quantised_append, quantised_decode, quantised_launch
        from tests.quantised_cases import store_of

        store, new = store_of(rule, 128, 128, (600, 600), torch.bfloat16, "cpu")
        kv = store.append(*new(1), None, [600, 600]).view()
        merged = hopper(monkeypatch, tmp_path, quantised_launch.walk, "reduce_splits")
        with merged, hopper(monkeypatch, tmp_path, quantised_decode, "attend_codes") as built:
            quantised_launch.attend(torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16), kv, kv.packed, None, 0.1, True)
        ((_, kernel, usage),) = built
        assert usage["STACK"] <= 16, usage  # a few scalars a thread at most
        beside = 3  # programs beside each other on a multiprocessor at least
        assert usage["REG"] * 32 * kernel.metadata.num_warps * beside <= 65536, usage
        assert (kernel.metadata.shared + 1024) * beside <= 228 * 1024
        assert re.search(r"cp\.async\.c[ag]\.shared\.global", kernel.asm["ptx"])  # words, ahead of their use
        for t in (store.keys, store.values):
            assert t.packed.codes.is_contiguous() and t.tail.is_contiguous()  # nothing is copied for the kernel
        fixed = fix(store, [601, 601])
        with hopper(monkeypatch, tmp_path, quantised_append, "append_codes") as built:
            quantised_append.append(*new(1), *fixed.near, fixed.each, fixed.now, fixed.settled, fixed.seen_now)
        assert len(built) == 1

else:
    from foveate.kernels import packed
    from foveate.kernels.triton import quantised_launch as kernels
    from foveate.packed import PackedKV
    from tests import quantised_cases as cases

    @pytest.mark.parametrize("case", range(len(cases.CASES)))
    @pytest.mark.parametrize("rows", cases.ROWS)
    def test_attention(case, rows):
        for fixed in (False, True):
            cases.check_steps(cases.CASES[case], rows, torch.float32, "cpu", fixed, False, 2e-5)

    @pytest.mark.parametrize("case", [0, 4])
    def test_weights_and_hidden_entries(case):
        for fixed in (False, True):
            cases.check_steps(cases.CASES[case], (170, 140), torch.float32, "cpu", fixed, True, 2e-5)

    @pytest.mark.parametrize("rule", [(4, None, 4, 8), (2, 2, 8, 8), (8, 8, 4, 4), (16, 4, 4, 8)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_an_appended_entry(rule, dtype, monkeypatch):
        """Rings and codes after steps over several folds, byte by byte those that the plain tensor operations leave."""
        from foveate.kernels.triton import quantised_append
        from foveate.scores import fused

        stores, ran = [], []
        real = quantised_append.append
        monkeypatch.setattr(quantised_append, "append", lambda *a: ran.append(1) or real(*a))
        for kernel in (True, False):
            if not kernel:
                monkeypatch.setattr(fused, "codes", lambda t: None)
            store, new = cases.store_of(rule, 16, 24, (20, 13), dtype, "cpu")
            store = cases.fix(store, [20, 13])
            for i in range(19):
                store = store.append(*new(1), None, [20 + i, 13 + i])
                views = store.view(), store.view()  # what the launch left, and what the counts of the store say
                assert (store.fresh is None) and torch.equal(store.settled + 1, store.now)
                for parts in zip(*map(counts_of, views), strict=True):
                    assert torch.equal(*parts), i
            assert store.now.tolist() == [39, 32] == store.seen_now.tolist() and store.each.tolist() == [[39] * 2, [32] * 2]
            stores.append(store)
        assert len(ran) == 19
        for ring, other in zip(stores[0].near, stores[1].near, strict=True):
            for name, t in ring.tensors().items():
                n = t.shape[2] if name == "tail" else ring.size // (1 if name == "codes" else ring.unit)
                assert torch.equal(t[:, :, :n], other.tensors()[name][:, :, :n]), name

    def counts_of(kv):
        both = () if not isinstance(kv, PackedKV) else (kv.packed.keys.done, kv.packed.values.done)
        return kv.len, *both

    def test_half_precision():
        cases.check_steps(cases.CASES[1], (150, 130), torch.float16, "cpu", True, False, 3e-3)

    def test_the_kernel_is_what_runs(monkeypatch):
        """One program and many give the same; without them the law runs."""
        ran = []
        for cores in (1, 64):
            monkeypatch.setattr(kernels, "device", lambda index, n=cores: (99 * 1024, n))
            store, new = cases.store_of((4, 4, 32, 32), 32, 32, (100, 70), torch.float32, "cpu")
            store = store.append(*new(1), None, [100, 70])
            real = kernels.attend
            monkeypatch.setattr(packed._kernel(new(1)[0]), "attend", lambda *a, real=real: ran.append(1) or real(*a))
            got = cases.check(store, 4, 2e-5)
            monkeypatch.setattr(kernels, "attend", real)
            want = packed._coded(*_args(store))[0]
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert len(ran) == 2

    def _args(store):
        kv = store.view()
        q = torch.randn(2, 8, 1, 32, generator=torch.Generator().manual_seed(0))
        return q, kv, kv.packed, None, 32**-0.5
