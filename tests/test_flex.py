"""The flex backend: what it plans, what it computes, what it refuses, and that it neither recompiles nor runs eager.

Compilations cost seconds, so the compiled cases are few and each serves many layouts and lengths. What a kernel is told
to walk is checked against `Layout.to_mask` without compiling anything.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import KV, Layout, attend, explain
from foveate.errors import UnsupportedError
from foveate.kernels import flex
from foveate.kernels.base import Want
from tests.drive import oracle, qkv

WHY_NOT = flex._cannot_compile(os.environ.get("CXX", "g++"), os.environ.get("PATH", ""))
needs_compiler = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(autouse=True)
def small_problems(monkeypatch):
    monkeypatch.setattr(flex, "MIN_PAIRS", 0)


def random_blocks(shape, seed, *, block_q=32, block_k=32, density=0.35, heads=None, q_offset=0, causal=True):
    b, h, n, m = shape
    nq, nk = -(-(n + q_offset) // block_q), -(-m // block_k)
    mask = torch.rand(b, heads or h, nq, nk, generator=torch.Generator().manual_seed(seed)) < density
    return Layout.from_block_mask(mask, n, m, block_q=block_q, block_k=block_k, heads=h, q_offset=q_offset, causal=causal)


def with_rule(layout, sink, window):
    return replace(
        layout, sink=torch.tensor([[sink]], dtype=torch.int32), window=torch.tensor([[window]], dtype=torch.int32)
    )


def cornered(shape, seed, q_offset=0):
    """Random blocks of 32 with all those that the diagonal cuts, as methods that never lose the current token."""
    _, _, n, m = shape
    nq, nk = -(-(n + q_offset) // 32), -(-m // 32)
    mask = torch.rand(1, 4, nq, nk, generator=torch.Generator().manual_seed(seed)) < 0.3
    row = torch.arange(nq)[:, None] * 32 + m - n - q_offset
    key = torch.arange(nk) * 32
    mask |= (key <= row + 31) & (key + 31 > row)
    return Layout.from_block_mask(mask, n, m, block_q=32, block_k=32, q_offset=q_offset)


def run(layout, g=None, d=16, dv=None, dtype=torch.float32, softcap=None, seed=0):
    """(output of the compiled kernel, fp64 oracle) on random tensors."""
    b, h, n, m = layout.shape
    q, k, v = qkv(b, h, g or h, max(n, m), d, dv, seed)
    q, k, v = q[:, :, :n].to(dtype), k[:, :, :m].to(dtype), v[:, :, :m].to(dtype)
    view, scale = KV.of((k, v)), 1 / math.sqrt(d)
    out, lse, mass = flex.forward(q, view, layout, scale=scale, softcap=softcap or 0.0, want=Want())
    assert lse is None and mass is None and out.dtype == dtype
    if softcap:
        want = attend(q.double(), (k.double(), v.double()), layout, softcap=softcap, backend="reference").float()
    else:
        want = oracle(q, view, layout)
    return out.float(), want


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------- the plan, without compiling
def executed(layout):
    """The pairs a kernel computes from `plan_blocks`, and those it computes without asking the mask."""
    _, _, n, m = layout.shape
    bq, bk = flex._grid(layout)
    x = flex.plan_blocks(layout, (bq, bk))
    i, j = torch.arange(n) + flex._front(layout), torch.arange(m)
    ahead = j - i[:, None] - x.edge[0]
    sink, window, corner = (r[..., None, None] for r in x.rule)
    cut = (j // bk * bk + bk - 1).clamp(max=x.edge[3]) > (i // bq * bq + x.edge[0]).clamp(min=x.edge[2])[:, None]
    seen = ((j < sink) | (ahead.abs() < window) | (cut & (corner > 0))) & (ahead <= x.edge[1])

    def spread(index, count):
        used = torch.arange(index.shape[-1]) < count[..., None]
        block = torch.zeros(*index.shape[:3], index.shape[-1] + 1, dtype=torch.bool)
        block.scatter_(-1, torch.where(used, index, index.shape[-1]).long(), True)
        return block[:, :, i // bq][..., j // bk]

    part, full = spread(x.part, x.part_count), spread(x.full, x.full_count)
    assert not (part & full).any()
    return (part & seen) | full, full


@st.composite
def layouts(draw):
    h = draw(st.sampled_from([1, 2, 6]))
    b, n, m = draw(st.integers(1, 2)), draw(st.integers(2, 150)), draw(st.integers(2, 150))
    shape, causal, seed = (b, h, n, m), draw(st.booleans()), draw(st.integers(0, 99))
    rule = {"sink": draw(st.integers(0, 40)), "window": draw(st.integers(0, 120))}
    kind = draw(st.sampled_from(["tiles", "tiles and rule", "rule", "stride", "by head", "dense"]))
    if kind == "dense":
        return Layout.dense(*shape, causal=causal)
    if kind == "rule":
        return Layout.static(shape, **rule, causal=causal)
    if kind == "stride":
        stride = torch.randint(0, 4, (h,), generator=torch.Generator().manual_seed(seed))
        return Layout.static(shape, **rule, stride=stride, phase=draw(st.integers(0, 3)), stride_block=32, causal=causal)
    block_q, block_k = draw(st.sampled_from([16, 32, 48])), draw(st.sampled_from([16, 32, 96]))
    q_offset = draw(st.integers(0, block_q - 1))
    heads = draw(st.sampled_from([1, h]))
    tiles = random_blocks(shape, seed, block_q=block_q, block_k=block_k, heads=heads, q_offset=q_offset, causal=causal)
    if kind == "tiles":
        return tiles
    if kind == "tiles and rule":
        return with_rule(tiles, rule["sink"], rule["window"])
    pick = torch.rand(h, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Layout.by_head(pick, tiles, Layout.static(shape, **rule, causal=causal))


@settings(deadline=None, max_examples=50)
@given(layouts())
def test_plan_names_exactly_the_layout(layout):
    if not flex._corners(layout, flex._grid(layout))[1].all():
        return  # refused
    mask, full = executed(layout)
    assert torch.equal(mask, layout.to_mask())
    assert not (full & ~layout.to_mask()).any()


def test_whole_blocks_run_unmasked():
    """Strictly below the diagonal no block asks the mask; on it, every one does."""
    layout = random_blocks((1, 2, 160, 160), 0, density=1.0)
    x = flex.plan_blocks(layout, (32, 32))
    assert x.full_count[0, 0].tolist() == [0, 1, 2, 3, 4] and x.part_count[0, 0].tolist() == [1] * 5
    assert bool((x.rule[2] == 1).all())
    x = flex.plan_blocks(Layout.static((1, 2, 512, 512), sink=128, window=256), (128, 128))
    assert x.full_count[0, 0].tolist() == [0, 1, 2, 2] and x.part_count[0, 0].tolist() == [1, 1, 1, 2]


# ---------------------------------------------------------------------- compiled cases
@needs_compiler
def test_tiles_at_every_length_with_one_compilation():
    """Groups of 3; square, later chunks, chunks inside a block, more rows than keys; no length compiles anew."""
    before = graphs()
    for n, m, offset in (
        (200, 200, 0), (257, 257, 0), (512, 512, 0), (100, 333, 0), (101, 330, 19), (65, 500, 31), (300, 200, 0), (33, 64, 0)
    ):  # fmt: skip
        layout = random_blocks((1, 6, n, m), n, heads=(6, 2, 1)[n % 3], q_offset=offset)
        torch.testing.assert_close(*run(layout, g=2, seed=m), atol=1e-5, rtol=1e-5)
        assert graphs() == before + 1, (n, m, offset)
    for causal in (True, False):
        layout = random_blocks((1, 6, 130, 130), 7, density=0.2, causal=causal)
        out, want = run(layout, g=2)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        empty = ~layout.to_mask().any(-1)
        assert bool(empty.any()) and (out[empty] == 0).all()
    assert graphs() == before + 1
    q, k, v = qkv(1, 6, 2, 200)
    view = torch.randn(1, 200, 6, 16).transpose(1, 2)  # strides as models have them
    layout = random_blocks((1, 6, 200, 200), 3, heads=2)
    torch.testing.assert_close(
        attend(view, (k, v), layout, backend="flex"), oracle(view, (k, v), layout), atol=1e-5, rtol=1e-5
    )
    buffer = torch.randn(2, 1, 2, 300, 16)
    k, v = buffer[0][:, :, :200], buffer[1][:, :, :200]  # a cache with room to grow
    torch.testing.assert_close(attend(q, (k, v), layout, backend="flex"), oracle(q, (k, v), layout), atol=1e-5, rtol=1e-5)
    assert graphs() == before + 1


@needs_compiler
def test_what_no_block_touches_does_not_matter():
    """NaN in the keys of untouched blocks; the kernel is the one above."""
    mask = torch.rand(1, 2, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., [2, 5]] = False
    layout = Layout.from_block_mask(mask, 200, 200, block_q=32, block_k=32, heads=6)
    q, k, v = qkv(1, 6, 2, 200)
    bad = [t.clone() for t in (k, v)]
    for t in bad:
        t[:, :, 64:96] = t[:, :, 160:192] = float("nan")
    assert torch.equal(attend(q, tuple(bad), layout, backend="flex"), attend(q, (k, v), layout, backend="flex"))


@needs_compiler
def test_tiles_beside_a_rule():
    """Group 1; sinks and windows beside tiles, strides, heads of different kinds."""
    before = graphs()
    for n, m, offset in ((300, 300, 0), (90, 333, 17)):
        shape = (1, 4, n, m)
        tiles = random_blocks(shape, n, q_offset=offset)
        rule = Layout.static(shape, sink=3, window=torch.tensor([0, 9, 70, 400]), block_q=32, q_offset=offset)
        strided = Layout.static(shape, sink=3, window=64, block_q=32, q_offset=offset, stride=3, phase=1, stride_block=32)
        for layout in (
            with_rule(cornered(shape, n, offset), 4, 50),
            with_rule(tiles, 37, 64),
            Layout.by_head(torch.tensor([True, False, False, True]), tiles, rule),
            Layout.by_head(torch.tensor([True, False, True, False]), tiles, strided),
            Layout.by_head(torch.tensor([True, False, True, False]), tiles, Layout.dense(*shape)),
        ):
            assert ask(layout, n=n, m=m, d=16) is None
            torch.testing.assert_close(*run(layout), atol=1e-5, rtol=1e-5)
    assert graphs() == before + 1


@needs_compiler
def test_bf16():
    """Groups of 4. The kernel rounds probabilities to bf16, so the bound is that of bf16 inputs."""
    for n, m in ((200, 200), (70, 333)):
        out, want = run(random_blocks((1, 4, n, m), n), g=1, dtype=torch.bfloat16)
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)


@needs_compiler
def test_rule_with_softcap_batch_and_wide_values():
    """Dense and static layouts under a softcap, two batch rows, Dv != D; at most the batch of one compiles again."""
    before = graphs()
    for n, m in ((300, 300), (150, 411)):
        for layout in (
            Layout.static((2, 4, n, m), sink=4, window=torch.tensor([[20, 300], [0, 129]])),
            Layout.static((2, 4, n, m), sink=1, window=33, causal=False),
            Layout.dense(2, 4, n, m),
        ):
            torch.testing.assert_close(*run(layout, g=2, dv=24, softcap=1.5), atol=1e-5, rtol=1e-5)
    assert graphs() == before + 1


# ---------------------------------------------------------------------- refusals
def ask(layout=None, want=None, dtype=torch.float32, h=4, n=200, m=200, d=16, **kv):
    """The reason flex gives against a call."""
    q, k, v = (t.to(dtype) for t in qkv(1, h, h, m, d))
    q = q[:, :, :n]
    layout = layout or random_blocks((1, h, n, m), 0)
    return flex.supports(q, replace(KV.of((k, v)), **kv), layout, want or Want())


def shape(n=200, m=200):
    return (1, 4, n, m)


index = torch.tensor([[[0, 40]]], dtype=torch.int32)
REFUSED = {
    "gradient": (dict(want=Want(grad=True)), "no backward"),
    "mass": (dict(want=Want(mass=True)), "mass"),
    "lse": (dict(want=Want(lse=True)), "no lse on the CPU"),
    "fp64": (dict(dtype=torch.float64), "no kernel for float64"),
    "fp16": (dict(dtype=torch.float16), "float16 on"),
    "storage": (dict(kind="paged"), "not paged"),
    "len": (dict(len=torch.full((1, 4), 150)), "different length"),
    "bias": (dict(bias=torch.zeros(1, 4, 200)), "entry weights"),
    "pos": (dict(pos=torch.zeros(1, 4, 200)), "positions"),
    "q_pos": (dict(layout=replace(random_blocks(shape(), 0), q_pos=torch.zeros(1, 200))), "positions"),
    "decode": (dict(n=1, layout=random_blocks(shape(1), 0)), "decode"),
    "entries": (dict(layout=Layout.lists(shape(), block_q=256, entries=index[:, :, None])), "single keys"),
    "factored": (dict(layout=Layout.factored(shape(), diagonals=index, columns=index)), "single keys"),
    "diagonals": (
        dict(layout=replace(Layout.factored(shape(), diagonals=index, columns=index), columns=None, column_count=None)),
        "off the grid",
    ),
    "unaligned": (
        dict(layout=Layout.lists(shape(), block_q=256, tile_width=32, tiles=index[:, :, None])),
        "off the grid of 32",
    ),
    "fine queries": (dict(layout=random_blocks(shape(), 0, block_q=8)), "query blocks of 8 rows"),
    "fine keys": (dict(layout=random_blocks(shape(), 0, block_k=8)), "key blocks of 8"),
    "one block": (dict(n=32, layout=random_blocks(shape(32), 0)), "too short"),
    "corners": (dict(layout=with_rule(random_blocks(shape(), 0), 4, 50)), "blocks at the diagonal"),
    "rule": (dict(layout=Layout.static(shape(), sink=4, window=20)), "a rule alone"),
    "dense": (dict(layout=Layout.dense(*shape())), "dense layouts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    given_, reason = REFUSED[case]
    why = ask(**given_)
    assert why is not None and reason in why


@needs_compiler
def test_accepts_blocks_and_softcaps():
    assert ask() is None
    assert ask(Layout.static(shape(), sink=4, window=20), Want(softcap=True)) is None


def test_short_prompts_are_refused(monkeypatch):
    monkeypatch.undo()
    assert "too short" in (ask() or "")
    big = random_blocks((1, 1, 1024, 1024), 0)
    assert "too short" not in (ask(big, h=1, n=1024, m=1024) or "")


@pytest.mark.parametrize("capability,refused", [("AVX2", True), ("AVX512", False)])
@needs_compiler
def test_bf16_needs_avx512(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    why = ask(dtype=torch.bfloat16)
    assert ("bfloat16 on AVX2" in why) if refused else why is None


def test_no_compiler(monkeypatch):
    """Without a C++ compiler the reason says so, and the dispatcher goes on to the next backend."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler: 'no-such-compiler'" in (ask() or "")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler: 'g++'" in (ask() or "")
    q, k, v = qkv(1, 4, 2, 200)
    choices = {c.backend: c.reason for c in explain(q, (k, v), random_blocks(shape(), 0))}
    assert "no C++ compiler" in (choices["flex"] or "") and choices["torch"] is None
    with pytest.raises(UnsupportedError, match="no C\\+\\+ compiler"):
        attend(q, (k, v), random_blocks(shape(), 0), backend="flex")


def test_old_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    flex._cannot_compile.cache_clear()
    try:
        assert "needs a CPU with AVX2" in (ask() or "") or WHY_NOT is not None
    finally:
        flex._cannot_compile.cache_clear()


# ---------------------------------------------------------------------- never eager
@pytest.fixture
def own_kernels(monkeypatch):
    monkeypatch.setattr(flex, "_kernels", {})
    monkeypatch.setattr(flex, "_failed", {})


@needs_compiler
def test_a_broken_compiler_is_an_error_and_remembered(own_kernels):
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/bin/false"), "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
        pytest.raises(UnsupportedError, match="could not be built here"),
    ):
        run(random_blocks(shape(), 0))
    assert "could not be built here" in (ask() or "")
    assert ask(random_blocks((1, 3, 200, 200), 0), h=3) is None  # another kernel may fare better


@needs_compiler
def test_the_recompile_limit_is_an_error_and_remembered(own_kernels):
    """Beyond torch's limit flex would silently run eager over N x M."""
    with torch._dynamo.config.patch(recompile_limit=0), pytest.raises(UnsupportedError, match="RecompileLimit"):
        run(random_blocks(shape(), 0))
    assert "RecompileLimit" in (ask() or "")


def test_eager_execution_is_an_error(own_kernels):
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnsupportedError, match="switched off"):
        run(random_blocks(shape(), 0))


def test_the_number_of_kernels_is_bounded(own_kernels, monkeypatch):
    monkeypatch.setattr(flex, "MAX_KERNELS", 0)
    assert "compiled 0 kernels already" in (ask() or "") or WHY_NOT is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_with_lse(own_kernels):
    """Blocks of 128, groups of 4, empty rows, a rule, a later chunk; here the lse is returned too."""
    for n, m in ((640, 640), (300, 900)):
        tiles = random_blocks((1, 8, n, m), n, block_q=128, block_k=128).to("cuda")
        for layout in (tiles, Layout.static((1, 8, n, m), sink=4, window=200, device="cuda")):
            q, k, v = (t.cuda().to(torch.bfloat16) for t in qkv(1, 8, 2, m, 64))
            q = q[:, :, :n]
            out, lse = attend(q, (k, v), layout, return_lse=True, backend="flex")
            want, want_lse = attend(q.float(), (k.float(), v.float()), layout, return_lse=True, backend="reference")
            torch.testing.assert_close(out.float(), want, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=1e-2)
