"""Steps over packed entries on a GPU: rules and lists by the kernels, whole recipes in CUDA graphs, memory, and time.

tests/test_packed_steps.py has the table of what unpacks where plans are made by plain code. Kernels of a plan that read raw
keys unpack a layer too, as in hip's searches.
"""

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
    from foveate.kernels import packed_rules
    from foveate.kernels.triton import quantised_lists_launch, rule_lists, thinned, thinned_launch
    from foveate.layout import Layout
    from foveate.scores.bounds import Bounds
    from tests.compiling import hopper

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ROWS = [(1500, 1500), (1301, 190)]
STORES = ("kivi:bits=4,group=32,residual=64", "think:window=16,tail_size=16")
RECIPES = (
    "streaming_llm:sink=4,window=200",
    "streaming_llm:sink=4,window=200,positions=cache",
    "decode=duo_attention:sparsity=1,sink=4,window=200",
    "decode=s2_strided:block=16,local=2,stride=3,sink=4",
    "decode=moa:density=0.3,sink=4,block=16",
    "decode=lserve:page=16,logical=8,budget=128,sink=8,window=40,sparsity=0.5,assign=even",
    "quest:page=16,budget=128,dense_layers=0,share=group",
    "double_sparsity:budget=64,dense_layers=0,profile=none",
    "adamas:budget=64,dense_layers=0",
    "adamas:budget=64,dense_layers=0,unit=std,theta=0.5,share=group",
    "decode=longheads:attention=192,chunk=64,block=64",
)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def counted(monkeypatch, module, name):
    ran, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: ran.append(1) or real(*a))
    return ran


# ---------------------------------------------------------------------- kernels
@pytest.mark.parametrize("rule", cases.RULES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_lists_of_a_rule(rule, rows):
    """Number for number those of the law, which has as many slots here."""
    store, _ = cases.pruned(rows, 16, 16, 5, torch.float32, "cuda")
    kv = store.view()
    for q_pos in (None, kv.lengths()[:, :1] - 30):
        plan = cases.ruled(kv, 4, rule, q_pos)
        for a, b in zip(rule_lists.listed(plan, kv), packed_rules.listed(plan, kv), strict=True):
            assert a.tile_width == b.tile_width
            a, b = ((x.entries, x.entry_count) if x.tiles is None else (x.tiles, x.tile_count) for x in (a, b))
            assert torch.equal(*torch.broadcast_tensors(a[1], b[1])) and a[0].shape[-1] == b[0].shape[-1]
            used = torch.arange(a[0].shape[-1], device="cuda") < a[1][..., None]
            x, y, used = torch.broadcast_tensors(a[0], b[0], used)
            assert torch.equal(x[used], y[used])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rule", cases.RULES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_attention_under_a_rule(rule, rows, dtype, monkeypatch):
    coded = counted(monkeypatch, quantised_lists_launch, "attend")
    pruned = counted(monkeypatch, thinned_launch, "attend")
    for i, case in enumerate([cases.CASES[0], cases.CASES[1], cases.CASES[4], cases.ODD]):
        for fixed, back in ((False, None), (True, None), (True, 5)):
            store, _ = cases.stepped(case, rows, dtype, "cuda", fixed, False)
            cases.check_rule(store, case[3], rule, TOLERANCE[dtype], i, back)
    for d, dv, few in ((128, 128, 77), (128, 128, 64), (24, 40, 9)):
        for fixed, back in ((False, None), (True, None), (True, 5)):
            store, _ = cases.pruned(rows, d, dv, few, dtype, "cuda", fixed)
            cases.check_rule(store, 4, rule, TOLERANCE[dtype], few, back)
    parts = 2 if rule[3] is not None and rule[3][0] == 1 else 1
    assert len(coded) == 12 * parts and len(pruned) == 9 * parts


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("which", cases.LISTS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_lists_of_pruned_keys(which, rows, dtype, monkeypatch):
    ran = counted(monkeypatch, thinned_launch, "attend")
    for d, dv, few in ((128, 128, 77), (128, 64, 64), (64, 128, 13), (24, 40, 9)):
        for fixed in (False, True):
            store, _ = cases.pruned(rows, d, dv, few, dtype, "cuda", fixed)
            cases.check_lists(store, 4, which, TOLERANCE[dtype], None, few)
    assert len(ran) == 8


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("page", [16, 64, 12])
def test_bounds_of_pruned_keys(page, dtype, monkeypatch):
    ran = counted(monkeypatch, thinned_launch, "update")
    for rows in ROWS:
        cases.check_pruned_bounds(rows, dtype, "cuda", page)
    assert len(ran) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [2, 4, 16, "codes"])
@pytest.mark.parametrize("coded", [True, False])
def test_labels_of_packed_keys(kind, coded, dtype):
    for rows in ROWS:
        cases.check_labels(kind, coded, rows, dtype, "cuda", 1e-3)


# ---------------------------------------------------------------------- steps
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_steps_are_the_steps(recipe, store, rows, monkeypatch):
    """No step puts a dense copy together, captured or not."""
    cases.check_replays(f"{recipe}+cache={store}", rows, monkeypatch)


def long(store, m, dtype=torch.bfloat16):
    """A fixed store of m entries, 2 x 2 kv heads of 128, and what draws new ones."""
    if store == "pruned":
        return cases.pruned((m, m), 128, 128, 64, dtype, "cuda")
    out, new = cases.store_of((4, None, 64, 128), 128, 128, (m, m), dtype, "cuda")
    return fix(out.append(*new(1), None, [m, m]), [m + 1] * 2), new


def planned(kind, q, kv, bounds):
    if kind == "rule":
        return Layout.static((*q.shape[:3], kv.capacity), sink=4, window=2044, block_q=1, device="cuda", validate=False)
    bounds.update(kv)
    tiles, count = bounds.top(q, kv, 32, group=True)
    return Layout((*q.shape[:3], kv.capacity), tile_width=64, tiles=tiles[:, :, None], tile_count=count[:, :, None])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rule", "pages"])
@pytest.mark.parametrize("which", ["coded", "pruned"])
def test_a_step_waits_for_nothing_and_unpacks_no_layer(which, kind):
    """Plan and attention over 64K entries: equal runs, nothing synchronises, memory is a small part of a layer."""
    store, new = long(which, 65536)
    news = [new(1) for _ in range(4)]
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    bounds = Bounds(64)
    for _ in range(2):  # makes the bounds; compiles what a later step launches
        store = store.append(*new(1), None, [0, 0])
        kv = store.view()
        plan = planned(kind, q, kv, bounds)
        first = foveate.attend(q, kv, plan)
    for _ in range(10):
        assert torch.equal(first, foveate.attend(q, kv, plan))
    layer = 2 * kv.shape[0] * kv.shape[1] * kv.capacity * 128 * 2  # bytes of dense keys and values
    del kv, plan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base, before = torch.cuda.memory_allocated(), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k, v in news:
            store = store.append(k, v, None, [0, 0])
            kv = store.view()
            foveate.attend(q, kv, planned(kind, q, kv, bounds))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.cuda.max_memory_allocated() - base < layer / 32 and not kv.made


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", "pages"])
@pytest.mark.parametrize("which", ["coded", "pruned"])
def test_faster_than_unpacking(which, kind):
    """2,048 of 64K entries, 2 x 2 kv heads of 128: against a dense copy made first."""
    store, _ = long(which, 65536)
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    kv = store.view()
    plan, spent = planned(kind, q, kv, Bounds(64)), {}
    for name, work in (
        ("as they are", lambda: foveate.attend(q, kv, plan)),
        ("unpacked first", lambda: foveate.attend(q, store.view().to_dense(), plan)),
    ):
        graph = torch.cuda.CUDAGraph()
        work()
        with torch.cuda.graph(graph):
            work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(25):
            if i == 5:
                begin.record()
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        spent[name] = begin.elapsed_time(end) / 20
    print(which, kind, "; ".join(f"{name} {ms * 1e3:.1f} us" for name, ms in spent.items()))
    assert spent["as they are"] < spent["unpacked first"]


@pytest.mark.parametrize("few", [77, 64])
def test_what_a_program_takes(few, monkeypatch, tmp_path):
    """Llama-3-8B's heads: no spill; three programs on a multiprocessor, or four of pages."""
    monkeypatch.setattr(thinned_launch, "device", lambda index: (227 * 1024, 132))
    store, _ = cases.pruned((600, 600), 128, 128, few, torch.bfloat16, "cpu")
    kv, q = store.view(), torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16)
    with hopper(monkeypatch, tmp_path, thinned, "attend_thinned", "bounds_of_thinned") as built:
        for width in (64, 16, 1):
            plan = cases.listed(kv, 4, width, "group", True)
            thinned_launch.attend(q, kv, kv.packed, plan, None, 0.1, False)
        for page in (16, 64):
            thinned_launch.update(kv, torch.zeros(2, 2, 50, 256, dtype=torch.bfloat16), page, kv.len.clone())
    for name, kernel, usage in built:
        assert usage["STACK"] == 0, (name, usage)
        if name == "attend_thinned":
            assert usage["REG"] * 32 * kernel.metadata.num_warps * 3 <= 65536, (name, usage)
            assert (kernel.metadata.shared + 1024) * 3 <= 228 * 1024
