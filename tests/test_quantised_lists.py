"""Listed tiles and entries over codes: the law, what a step may not unpack, the kernels in the interpreter and compiled."""

from __future__ import annotations

import os
import re

import pytest
import torch

from tests import quantised_cases as cases
from tests.processes import run_in_the_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    import foveate
    from foveate.kernels import packed, packed_rules
    from foveate.kernels.dispatch import attend, explain
    from foveate.packed import PackedKV
    from tests.compiling import hopper
    from tests.models import generate, tiny, tokens

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    @pytest.mark.parametrize("case", range(len(cases.CASES)))
    def test_the_law(case, monkeypatch):
        """In one piece and in many."""
        for i, which in enumerate(cases.LISTS):
            monkeypatch.setattr(packed, "BUDGET", (1 << 22) if i % 2 else 4000)
            evicted = i == 4
            store, at = cases.stepped(cases.CASES[case], cases.ROWS[i % 2], torch.float64, "cpu", i > 2, evicted)
            cases.check_lists(store, cases.CASES[case][3], which, 1e-6, at, i)

    @pytest.mark.parametrize("case", [0, 2, 4])
    @pytest.mark.parametrize("page", [16, 12])
    def test_bounds(case, page):
        cases.check_bounds(cases.CASES[case], cases.FOLDS, torch.float32, "cpu", page)

    def test_reasons(monkeypatch):
        """What it does not take it says, and another backend computes it on a dense copy."""
        store, _ = cases.stepped(cases.CASES[0], (150, 150), torch.float32, "cpu", True, False)
        kv = store.view()
        q = torch.randn(2, 8, 1, 64)
        plan = cases.listed(kv, 4, 32, "group", True)
        one = torch.ones(1, 1, dtype=torch.int32)
        both = torch.zeros(2, 2, 1, 1, dtype=torch.int32), torch.zeros(2, 2, 1, dtype=torch.int32)
        for change, said in (
            ({"window": one, "causal": False}, "a rule of causal attention"),
            ({"entries": both[0], "entry_count": both[1]}, "either tiles or single entries"),
            ({"tiles": plan.tiles[:, :, :, :0]}, "with a place"),
        ):
            other = foveate.layout.replace(plan, **change)
            assert said in next(c.reason for c in explain(q, kv, other) if c.backend == "packed")
        assert next(c.reason for c in explain(q, kv, plan) if c.backend == "packed") is None
        assert not kv.made
        with monkeypatch.context() as patch:
            patch.setattr(packed_rules, "MOST", 1.0)
            attend(q, kv, foveate.layout.replace(plan, window=one))
        assert not kv.made
        attend(q, kv, foveate.layout.replace(plan, window=one, causal=False))
        assert kv.made

    @pytest.mark.parametrize(
        "recipe",
        [
            "decode=quest:page=16,budget=64,dense_layers=0,share=group",
            "decode=lserve:page=16,logical=8,budget=64,sink=16,window=32,sparsity=0.5,assign=even,refresh=2",
        ],
    )
    @pytest.mark.parametrize("store", ["kivi:bits=4,group=16,residual=32", "think:window=16,tail_size=16"])
    def test_no_step_unpacks_a_layer(recipe, store, monkeypatch):
        """Recipes whose plan lists pages by bounds: neither plan nor attention reads `PackedKV.k`, and tokens are those of
        the dense copy."""
        model, ids = tiny(num_hidden_layers=2), tokens(2, 150)
        mask = torch.ones_like(ids)
        mask[1, :37] = 0
        seen = []
        make = PackedKV.__getattr__

        def touched(self, name):
            if name in ("k", "v"):
                seen.append(name)
            return make(self, name)

        run = lambda: generate(model, ids, mask, max_new_tokens=8, min_new_tokens=8)  # noqa: E731
        with foveate.use(model, f"{recipe}+cache={store}"):
            with monkeypatch.context() as patch:
                patch.setattr(PackedKV, "__getattr__", touched)
                got = run()
            assert not seen
            monkeypatch.setattr(packed, "supports", lambda *a: "not now")
            want = run()
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(("rule", "width"), [((4, 4, 32, 128), 64)])  # others, and single entries: tests/gpu
    def test_compiles_for_hopper(rule, width, monkeypatch, tmp_path):
        """Llama-3-8B's heads: registers, shared memory, and no spill."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import quantised_append, quantised_lists, quantised_lists_launch

        monkeypatch.setattr(quantised_lists_launch, "device", lambda index: (227 * 1024, 132))
        store, _ = cases.store_of(rule, 128, 128, (600, 600), torch.bfloat16, "cpu")
        store = cases.fix(store, [600, 600])
        kv = store.view()
        plan = cases.listed(kv, 4, width, "group", True)
        q = torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16)
        with hopper(monkeypatch, tmp_path, quantised_lists, "attend_listed") as built:
            quantised_lists_launch.attend(q, kv, kv.packed, plan, None, 0.1, False)
        ((_, kernel, usage),) = built
        assert usage["STACK"] <= 16, usage
        beside = 2  # programs beside each other on a multiprocessor at least; 3 with Triton 3.6, which tests/gpu asks for
        assert usage["REG"] * 32 * kernel.metadata.num_warps * beside <= 65536, usage
        assert (kernel.metadata.shared + 1024) * beside <= 228 * 1024
        assert re.search(r"cp\.async\.c[ag]\.shared\.global", kernel.asm["ptx"])  # ahead of their use
        with hopper(monkeypatch, tmp_path, quantised_append, "bounds_of_codes") as built:
            for page in (16, 64):
                quantised_append.update(
                    kv, torch.zeros(2, 2, 50, 256, dtype=torch.bfloat16), page, kv.len.clone(), kv.len.clone()
                )
        for _, _, usage in built:
            assert usage["STACK"] == 0, usage

else:
    from foveate.kernels import packed
    from foveate.kernels.triton import quantised_append, quantised_lists_launch
    from foveate.kernels.triton import quantised_lists_launch as kernels

    @pytest.mark.parametrize("i", range(len(cases.LISTS)))
    def test_attention(i, monkeypatch):
        """One program a list and many; widths, bits and groups of all kinds."""
        ran, real = [], kernels.attend
        monkeypatch.setattr(kernels, "attend", lambda *a: ran.append(1) or real(*a))
        case = [*cases.CASES[:5], cases.ODD][i]
        monkeypatch.setattr(quantised_lists_launch, "device", lambda index: (99 * 1024, (1, 8)[i % 2]))
        store, at = cases.stepped(case, cases.ROWS[i % 2], torch.float32, "cpu", i % 3 > 0, i == 4, i)
        cases.check_lists(store, case[3], cases.LISTS[i], 2e-5, at, i)
        assert len(ran) == 1

    @pytest.mark.parametrize(("case", "page"), [(0, 16), (1, 64), (2, 12), (4, 40)])
    def test_bounds(case, page, monkeypatch):
        ran, real = [], quantised_append.update
        monkeypatch.setattr(quantised_append, "update", lambda *a: ran.append(1) or real(*a))
        cases.check_bounds(cases.CASES[case], cases.FOLDS, torch.float32, "cpu", page)
        assert len(ran) == 4
