"""Listed tiles and entries over codes on a GPU: against the oracle, whole recipes in CUDA graphs, memory, and time."""

from __future__ import annotations

import pytest
import torch

from tests import quantised_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.cache.fixed import fix
    from foveate.kernels import packed
    from foveate.kernels.triton import (
        quantised_append,
        quantised_decode,
        quantised_launch,
        quantised_lists,
        quantised_lists_launch,
    )
    from foveate.layout import Layout
    from foveate.scores.bounds import Bounds
    from tests.compiling import hopper

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
RECIPES = (
    "quest:page=16,budget=128,dense_layers=0,share=group",
    "quest:page=64,budget=256,dense_layers=1",
    "decode=lserve:page=16,logical=8,budget=128,sink=16,window=32,sparsity=0.5,assign=even,share=group",
)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("which", cases.LISTS, ids=str)
@pytest.mark.parametrize("rows", [(1500, 1500), (1301, 190)])
def test_attention(which, rows, dtype, monkeypatch):
    ran, real = [], quantised_lists_launch.attend
    monkeypatch.setattr(quantised_lists_launch, "attend", lambda *a: ran.append(1) or real(*a))
    for case in [*cases.CASES, cases.ODD]:
        for fixed, evicted in ((False, False), (True, False), (True, True)):
            store, at = cases.stepped(case, rows, dtype, "cuda", fixed, evicted)
            cases.check_lists(store, case[3], which, TOLERANCE[dtype], at)
    assert len(ran) == 18  # all but the case with more groups of values than the kernel serves


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("page", [16, 64, 12])
def test_bounds(page, dtype):
    for case in [*cases.CASES, cases.ODD]:
        cases.check_bounds(case, (1301, 190), dtype, "cuda", page)


def long(m, bits=4):
    store, new = cases.store_of((bits, None, 64, 128), 128, 128, (m, m), torch.bfloat16, "cuda")
    return fix(store.append(*new(1), None, [m, m]), [m + 1] * 2), new


def plan_of(bounds, q, kv, keep):
    bounds.update(kv)
    tiles, count = bounds.top(q, kv, keep, group=True)
    return Layout((*q.shape[:3], kv.capacity), tile_width=bounds.page, tiles=tiles[:, :, None], tile_count=count[:, :, None])


@torch.no_grad()
def test_a_step_waits_for_nothing_and_unpacks_no_layer():
    """Plan and attention of pages over 64K entries: equal runs, nothing synchronises, memory is a small part of a layer."""
    store, new = long(65536)
    news = [new(1) for _ in range(4)]
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    bounds = Bounds(64)
    for _ in range(2):  # makes the bounds; compiles what a later step launches
        store = store.append(*new(1), None, [0, 0])
        kv = store.view()
        plan = plan_of(bounds, q, kv, 32)
        first = foveate.attend(q, kv, plan)
    for _ in range(10):
        assert torch.equal(first, foveate.attend(q, kv, plan))
    layer = 2 * kv.shape[0] * kv.shape[1] * kv.capacity * 128 * 2  # bytes of dense keys and values
    del kv, plan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k, v in news:
            store = store.append(k, v, None, [0, 0])
            kv = store.view()
            out = foveate.attend(q, kv, plan_of(bounds, q, kv, 32))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.cuda.max_memory_allocated() - base < layer / 32 and not kv.made
    plan = plan_of(bounds, q, kv, 32)
    law, _ = packed._listed(q, kv, plan, None, 128**-0.5)
    torch.testing.assert_close(out, law, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("store", ["kivi:bits=4,group=32,residual=64", "kivi:bits=8,group=32,residual=32"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_steps_are_the_steps(recipe, store, rows, monkeypatch):
    """Over several folds, no step reads a dense copy."""
    cases.check_replays(f"{recipe}+cache={store}", rows, monkeypatch)


@torch.no_grad()
@pytest.mark.slow
def test_faster_than_unpacking():
    """2,048 listed of 64K entries, 2 x 2 kv heads of 128, 4 bits: against all codes, and a dense copy made first."""
    store, _ = long(65536)
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    bounds, kv = Bounds(64), store.view()
    plan = plan_of(bounds, q, kv, 32)
    whole, spent = Layout.dense(2, 8, 1, kv.capacity), {}
    for name, work in (
        ("listed codes", lambda: foveate.attend(q, kv, plan)),
        ("all codes", lambda: foveate.attend(q, kv, whole)),
        ("listed, unpacked first", lambda: foveate.attend(q, store.view().to_dense(), plan)),
    ):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(25):
            if i == 5:
                begin.record()
            work()
        end.record()
        torch.cuda.synchronize()
        spent[name] = begin.elapsed_time(end) / 20
    print("; ".join(f"{name} {ms:.3f} ms" for name, ms in spent.items()))
    assert spent["listed codes"] < spent["listed, unpacked first"]


@pytest.mark.parametrize("rule", [(4, 4, 32, 128), (4, 4, 64, 128), (8, 8, 64, 128), (2, 2, 32, 128)])
@pytest.mark.parametrize("width", [64, 16, 1])
def test_what_a_program_takes(rule, width, monkeypatch, tmp_path):
    """Llama-3-8B's heads: registers and shared memory for three programs on a multiprocessor, and no spill."""
    store, _ = cases.store_of(rule, 128, 128, (600, 600), torch.bfloat16, "cpu")
    kv = fix(store, [600, 600]).view()
    monkeypatch.setattr(quantised_lists_launch, "device", lambda index: (227 * 1024, 132))
    with hopper(monkeypatch, tmp_path, quantised_lists, "attend_listed") as built:
        plan = cases.listed(kv, 4, width, "group", True)
        quantised_lists_launch.attend(torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16), kv, kv.packed, plan, None, 0.1, False)
    merged = hopper(monkeypatch, tmp_path, quantised_launch.walk, "reduce_splits")
    with merged, hopper(monkeypatch, tmp_path, quantised_decode, "attend_codes") as dense:
        quantised_launch.attend(torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16), kv, kv.packed, None, 0.1, True)
    with hopper(monkeypatch, tmp_path, quantised_append, "bounds_of_codes") as more:
        quantised_append.update(kv, torch.zeros(2, 2, 50, 256, dtype=torch.bfloat16), max(16, width), kv.len.clone())
    for name, kernel, usage in built + dense + more:
        assert usage["STACK"] <= 16, (name, usage)
        if name == "bounds_of_codes":  # a program or two a multiprocessor
            continue
        assert usage["REG"] * 32 * kernel.metadata.num_warps * 3 <= 65536, (name, usage)
        assert (kernel.metadata.shared + 1024) * 3 <= 228 * 1024
