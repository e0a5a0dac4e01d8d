"""Rules of one query a row over codes, and pruned keys in lists: the law, the kernels in the interpreter and compiled."""

from __future__ import annotations

import os
import re

import pytest
import torch

from tests import quantised_cases as cases
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    from dataclasses import replace

    from foveate.kernels import packed, packed_rules
    from foveate.kernels.dispatch import explain
    from foveate.kv import KV
    from foveate.layout import Layout
    from tests.compiling import hopper

    @pytest.mark.parametrize("rule", [
        {"sink": torch.tensor([2, 4]), "window": torch.tensor([8, 16, 8, 16])},
        {"sink": 3, "window": 9, "stride": torch.tensor([2, 3]), "phase": torch.tensor([0, 1, 2, 1])},
    ])  # fmt: skip
    def test_fields_of_different_counts_of_lists(rule):
        kv = KV.dense(torch.zeros(1, 4, 60, 8), torch.zeros(1, 4, 60, 8))
        layout = Layout.static((1, 8, 1, 60), **rule)
        (part,) = packed_rules.listed(layout, kv)
        got = torch.zeros(8, 60, dtype=torch.int32)
        for head in range(8):
            row = head * part.tiles.shape[1] // 8
            first = part.tiles[0, row, 0, : int(part.tile_count[0, row, 0])].tolist()
            for at, after in zip(first, [*first[1:], 60], strict=True):
                got[head, max(at, 0) : min(at + part.tile_width, after)] += 1
        assert torch.equal(got, layout.to_mask(kv)[0, :, 0].int())

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    @pytest.mark.parametrize("i", range(len(cases.RULES)))
    def test_the_law(i, monkeypatch):
        """Over codes and pruned keys, in one piece and in many, with the query at the end and before it."""
        monkeypatch.setattr(packed, "BUDGET", (1 << 22) if i % 2 else 4000)
        monkeypatch.setattr(packed_rules, "MOST", float("inf"))
        rule, case = cases.RULES[i], [cases.CASES[0], cases.ODD, cases.CASES[2]][i % 3]
        for n, (rows, back) in enumerate(zip(cases.ROWS, (None, 5), strict=True)):
            store, _ = cases.stepped(case, rows, torch.float64, "cpu", n + i % 2 > 0, False)
            cases.check_rule(store, case[3], rule, 1e-6, i, back)
            store, _ = cases.pruned(rows, 24, 40, 9, torch.float64, "cpu", n + i % 2 > 0)
            cases.check_rule(store, 4, rule, 1e-6, i, back)

    def test_reasons():
        store, _ = cases.pruned((150, 150), 64, 64, 20, torch.float32, "cpu")
        kv, q = store.view(), torch.randn(2, 8, 1, 64)
        plan = cases.ruled(kv, 4, (4, 20, ((30, 20), 16), None))
        listed = cases.listed(kv, 4, 16, "group", True)
        pos = torch.arange(kv.capacity, dtype=torch.int32).expand(2, 2, -1)
        at = torch.tensor([[151], [151]])
        for view, change, said in (
            (kv, {"causal": False}, "causal"),
            (kv, {"window": torch.full((1, 8), 80, dtype=torch.int32)}, "up to 25%"),
            (kv, {"tiles": listed.tiles, "tile_count": listed.tile_count}, "stride without lists"),
            (replace_packed(kv, pos), {"q_pos": at}, "in text order"),
        ):
            assert said in packed.supports(q, view, replace(plan, **change), packed.Want())
        assert packed.supports(q, kv, plan, packed.Want()) is None
        assert next(c.reason for c in explain(q, kv, plan) if c.backend == "packed") is None and not kv.made

    def replace_packed(kv, pos):
        d = kv.shape
        return type(kv).over(kv.packed, kv._make, kv.packed.tail, d[4], d[2], len=kv.len, pos=pos)

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """Llama-3-8B's heads, 64 of 128 channels left: nothing spills, and keys are asked for ahead of their use."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import rule_lists, thinned, thinned_launch

        monkeypatch.setattr(thinned_launch, "device", lambda index: (227 * 1024, 132))
        store, _ = cases.pruned((600, 600), 128, 128, 64, torch.bfloat16, "cpu")
        kv = store.view()
        q = torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16)
        with hopper(monkeypatch, tmp_path, thinned, "attend_thinned", "bounds_of_thinned") as built:
            for width in (64, 1):
                plan = cases.listed(kv, 4, width, "group", True)
                thinned_launch.attend(q, kv, kv.packed, plan, None, 0.1, False)
            thinned_launch.update(kv, torch.zeros(2, 2, 50, 256, dtype=torch.bfloat16), 16, kv.len.clone())
        with hopper(monkeypatch, tmp_path, rule_lists, "rule_tiles") as listed:
            for i in (4, 5):
                rule_lists.listed(cases.ruled(kv, 4, cases.RULES[i]), kv)
        for name, kernel, usage in built + listed:
            assert usage["STACK"] == 0, (name, usage)
            if name == "attend_thinned":
                beside = 2  # programs beside each other on a multiprocessor, at least
                assert usage["REG"] * 32 * kernel.metadata.num_warps * beside <= 65536, usage
                assert (kernel.metadata.shared + 1024) * beside <= 228 * 1024, kernel.metadata.shared
                assert re.search(r"cp\.async\.c[ag]\.shared\.global", kernel.asm["ptx"])

else:
    from foveate.kernels import packed_rules
    from foveate.kernels.triton import quantised_lists_launch, rule_lists, thinned_launch
    from foveate.packed import PackedKV
    from foveate.scores import bounds as page_bounds

    @pytest.fixture(autouse=True)
    def few(monkeypatch):
        """Few programs a list: the interpreter takes as long for a small one as for a large one."""
        for module in (quantised_lists_launch, thinned_launch):
            monkeypatch.setattr(module, "device", lambda index: (99 * 1024, 2))

    @pytest.mark.parametrize("i", range(len(cases.RULES)))
    def test_lists(i):
        """The kernel's are those of the law, with the query at the end of even rows and before that of uneven ones, or the
        other way round. tests/gpu/test_packed_steps.py has all four for each rule."""
        for j, rows in enumerate(cases.ROWS):
            store, _ = cases.pruned(rows, 16, 16, 5, torch.float32, "cpu", rows[0] != rows[1])
            kv = store.view()
            plan = cases.ruled(kv, 4, cases.RULES[i], kv.lengths()[:, :1] - 30 if (i + j) % 2 else None, i)
            got, want = rule_lists.listed(plan, kv), packed_rules.listed(plan, kv)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert a.tile_width == b.tile_width
                a, b = ((x.entries, x.entry_count) if x.tiles is None else (x.tiles, x.tile_count) for x in (a, b))
                assert torch.equal(*torch.broadcast_tensors(a[1], b[1]))
                n = min(a[0].shape[-1], b[0].shape[-1])
                x, y, count = torch.broadcast_tensors(a[0][..., :n], b[0][..., :n], a[1][..., None])
                used = torch.arange(n) < count
                assert torch.equal(x[used], y[used])

    @pytest.mark.parametrize("i", [3, 9])
    def test_attention_under_a_rule(i, monkeypatch):
        ran = []
        for module in (quantised_lists_launch, thinned_launch):
            real = module.attend
            monkeypatch.setattr(module, "attend", lambda *a, real=real: ran.append(1) or real(*a))
        case = [cases.CASES[4], cases.ODD, cases.CASES[2]][i % 3]
        store, _ = cases.stepped(case, (61, 90), torch.float32, "cpu", True, False)
        cases.check_rule(store, case[3], cases.RULES[i], 3e-5, i, 5 if i == 3 else None)
        store, _ = cases.pruned((61, 90), 24, 40, 9, torch.float32, "cpu")
        cases.check_rule(store, 4, cases.RULES[i], 3e-5, i, 5 if i == 3 else None)
        assert len(ran) == (4 if i == 9 else 2)

    @pytest.mark.parametrize("i", [0, 2, 4])
    def test_lists_of_pruned_keys(i):
        store, _ = cases.pruned((61, 90), 40, 24, 9, torch.float32, "cpu", i > 0)
        cases.check_lists(store, 3, cases.LISTS[i], 3e-5, None, i)

    @pytest.mark.parametrize("coded", [True, False])
    @pytest.mark.parametrize("kind", [2, "codes"])
    def test_labels_of_packed_keys(kind, coded, monkeypatch):
        """The newest key is all a step reads. Two of the four see the fault: each kind of labels, each kind of keys."""
        real = PackedKV.newest
        cases.check_labels(kind, coded, (45, 61), torch.float32, "cpu", 1e-4)
        if coded == (kind == "codes"):
            return
        monkeypatch.setattr(PackedKV, "newest", lambda kv: real(kv).flip(0))  # a fault: the other row's
        with pytest.raises(AssertionError):
            cases.check_labels(kind, coded, (45, 61), torch.float32, "cpu", 1e-4)

    @pytest.mark.parametrize("page", [16, 12])
    def test_bounds_of_pruned_keys(page, monkeypatch):
        ran, real = [], thinned_launch.update
        monkeypatch.setattr(thinned_launch, "update", lambda *a: ran.append(1) or real(*a))
        assert page_bounds.fused.thinned(torch.zeros(1)) is thinned_launch
        cases.check_pruned_bounds((61, 90), torch.float32, "cpu", page)
        assert len(ran) == 4
