"""attend: the torch backend against the oracle, gradients, torch.compile, memory, and what bad input gets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from foveate import KV, Layout, Part, Parts, attend, explain
from foveate.errors import ConfigError, ShapeError, UnsupportedError
from foveate.kernels import chunks, dispatch, reference, torch_gather
from foveate.kernels.base import Want
from tests.drive import qkv
from tests.quantised_cases import store_of
from tests.strategies import GROUPS, Case, cases

EVERYTHING = Want(lse=True, mass=True)
quick = settings(max_examples=40, deadline=None)


def oracle(case: Case, want: Want = EVERYTHING):
    """(out, lse, mass) in fp64."""
    x = case.double()
    return reference.forward(x.q, x.kv, x.layout, scale=0.4, softcap=case.softcap or 0.0, want=want)


def close(got, want, tol=2e-5):
    torch.testing.assert_close(got.double(), want.double(), atol=tol, rtol=tol)


@pytest.fixture(params=["whole", "split"])
def bounds(request, monkeypatch):
    """Chunks as they are, and so small that items are cut into segments and bands into pieces."""
    if request.param == "split":
        monkeypatch.setattr(chunks, "SCORES", 64)
        monkeypatch.setattr(chunks, "GATHERED", 256)
        monkeypatch.setattr(chunks, "ROWS", 3)
        monkeypatch.setattr(chunks, "LEAST", 4)
        monkeypatch.setattr(torch_gather, "BAND", 2)
    return request.param


# ---------------------------------------------------------------------- forward against the oracle
def test_any_layout_over_any_storage(bounds):
    @quick
    @given(cases())
    def check(case):
        out, lse, mass = oracle(case)
        opts = dict(scale=0.4, softcap=case.softcap, backend="torch")
        got = attend(case.q, case.kv, case.layout, return_lse=True, **opts)
        close(got[0], out)
        close(got[1], lse)
        blind = torch.isneginf(lse)
        assert (got[0][blind] == 0).all()
        got = attend(case.q, case.kv, case.layout, return_lse=True, return_mass=True, **opts)
        for a, b in zip(got, (out, lse, mass), strict=True):
            close(a, b)

    check()


@quick
@given(cases())
def test_auto_serves_every_call(case):
    out, _, mass = oracle(case)
    close(attend(case.q, case.kv, case.layout, scale=0.4, softcap=case.softcap), out)
    close(attend(case.q, case.kv, case.layout, scale=0.4, softcap=case.softcap, return_mass=True)[1], mass)


@quick
@given(cases(storages=("dense",)))
def test_untouched_entries_never_matter(case):
    """NaN in every entry that no query of the kv head sees, and already beyond `len`."""
    hole = case.untouched[..., None]
    kv = replace(case.kv, k=case.kv.k.masked_fill(hole, float("nan")), v=case.kv.v.masked_fill(hole, float("nan")))
    if not case.layout.full:  # dense attention reads every entry that exists
        for backend in ("torch", None):
            got = attend(case.q, kv, case.layout, scale=0.4, softcap=case.softcap, return_lse=True, backend=backend)
            want = attend(case.q, case.kv, case.layout, scale=0.4, softcap=case.softcap, return_lse=True, backend="torch")
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("dv", [16, 24])
@pytest.mark.parametrize("r", GROUPS)
def test_dtypes_groups_and_value_widths(dtype, tol, dv, r):
    q, k, v = qkv(2, 2 * r, 2, 45, dv=dv, dtype=torch.float64)
    q = q[:, :, 7:]
    shape = (2, 2 * r, 38, 45)
    block_mask = torch.rand(2, 2 * r, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    layouts = (
        Layout.dense(*shape),
        Layout.static(shape, sink=2, window=9),
        Layout.from_block_mask(block_mask, 38, 45, block_q=10, block_k=8),
    )
    low = [t.to(dtype) for t in (q, k, v)]
    for layout in layouts:
        for n in (38, 1):
            part = layout if n == 38 else replace(layout, shape=(2, 2 * r, 1, 45), block_q=10, q_offset=0)
            if n == 1 and layout.tiles is not None:
                part = replace(part, tiles=layout.tiles[:, :, :1], tile_count=layout.tile_count[:, :, :1])
            case = Case(low[0][:, :, -n:].double(), KV.dense(low[1].double(), low[2].double()), part, None)
            out, lse, _ = oracle(case)
            for ask in ({}, {"return_mass": True}):
                got = attend(low[0][:, :, -n:], (low[1], low[2]), part, scale=0.4, return_lse=True, backend="torch", **ask)
                assert got[0].dtype == dtype and got[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
                close(got[0], out, tol)
                close(got[1], lse, min(tol, 1e-4))


@pytest.mark.parametrize("layout_of", ["tile", "static", "full"])
def test_bands_and_slices(layout_of, monkeypatch):
    """Static rules over long enough prompts to use every kind of slice."""
    monkeypatch.setattr(torch_gather, "BAND", 8)
    q, k, v = qkv(1, 6, 3, 190)
    q = q[:, :, 90:]
    shape = (1, 6, 100, 190)
    for sink, window in ((0, 5), (3, 5), (3, 60), (70, 10), (60, 130), (5, 0), (0, 500), (0, 0)):
        layout = Layout.dense(*shape) if layout_of == "full" else Layout.static(shape, sink=sink, window=window)
        if layout_of == "tile":  # a rule of its own per head cannot be sliced
            layout = Layout.static(shape, sink=sink, window=torch.tensor([window, 7, window]))
        case = Case(q, KV.dense(k, v), layout, None)
        out, lse, _ = oracle(case)
        got = attend(q, (k, v), layout, scale=0.4, return_lse=True, backend="torch")
        close(got[0], out)
        close(got[1], lse)


def test_more_rows_than_entries():
    q, k, v = qkv(1, 4, 2, 30)
    case = Case(q, KV.dense(k[:, :, :11], v[:, :, :11]), Layout.dense(1, 4, 30, 11), None)
    out, lse, _ = oracle(case)
    for backend in ("torch", None):
        got = attend(q, case.kv, case.layout, scale=0.4, return_lse=True, backend=backend)
        close(got[0], out)
        close(got[1], lse)
    close(attend(q, case.kv, case.layout, scale=0.4), out)


def test_decode_rows_of_different_length():
    """Pages for each query head, for each kv head and all entries; no row disturbs another."""
    b, h, g, m, page = 3, 6, 2, 96, 16
    q, k, v = qkv(b, h, g, m)
    q = q[:, :, :1]
    lens = torch.tensor([[96, 96], [40, 40], [17, 17]], dtype=torch.int32)
    beyond = (torch.arange(m) >= lens[..., None])[..., None]
    kv = KV.dense(k.masked_fill(beyond, float("nan")), v.masked_fill(beyond, float("nan")), len=lens)
    shape = (b, h, 1, m)
    gen = torch.Generator().manual_seed(2)
    for heads in (h, g):
        pages = torch.rand(b, heads, 1, m // page, generator=gen).topk(3, -1).indices.sort(-1).values * page
        layout = Layout.lists(shape, block_q=1, tile_width=page, tiles=pages)
        case = Case(q, kv, layout, None)
        close(attend(q, kv, layout, scale=0.4), oracle(case)[0])
    case = Case(q, kv, Layout.dense(*shape), None)
    whole = attend(q, kv, scale=0.4)
    close(whole, oracle(case)[0])
    for i in range(b):
        alone = attend(q[i : i + 1], (k[i : i + 1, :, : lens[i, 0]], v[i : i + 1, :, : lens[i, 0]]), scale=0.4)
        close(whole[i : i + 1], alone)


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged"])
def test_decode_takes_the_short_way(kind, monkeypatch):
    """Lists over pages and entries and dense prefixes need no chunks, in any storage; a rule beside lists does."""
    b, h, g, m = 2, 6, 3, 40
    q, k, v = qkv(b, h, g, m)
    q = q[:, :, :1]
    lens = torch.tensor([[40] * 3, [23] * 3], dtype=torch.int32)
    if kind == "dense":
        kv = KV.dense(k, v, len=lens)
    elif kind == "paged":
        order = torch.arange(b * g * 5).flip(0)
        pools = [torch.empty(b * g * 5, 8, 16).index_copy_(0, order, t.reshape(-1, 8, 16)) for t in (k, v)]
        kv = KV.paged(*pools, order.view(b, g, 5).int(), lens)
    else:
        kv = KV.ragged(k.reshape(-1, 16), v.reshape(-1, 16), torch.arange(b * g).view(b, g) * m, lens, m)
    shape = (b, h, 1, m)
    tiles = torch.tensor([0, 8, 16]).expand(1, 3, 1, 3)
    count = torch.tensor([[3], [2], [1]]).view(1, 3, 1)
    entries = torch.tensor([1, 20, 22, 39]).expand(b, h, 1, 4)
    layouts = [
        Layout.lists(shape, block_q=1, tile_width=8, tiles=tiles, tile_count=count),
        Layout.lists(shape, block_q=1, entries=entries),
        Layout.lists(shape, block_q=1, tile_width=8, tiles=tiles[:, :1, :, :1].expand(1, h, 1, 1), entries=entries[:1]),
    ]
    layouts += [Layout.dense(*shape)] if kind == "dense" else []
    want = [oracle(Case(q, kv, layout, None)) for layout in layouts]
    ruled = Layout.lists(shape, block_q=1, tile_width=8, tiles=tiles, window=5)
    beside = oracle(Case(q, kv, ruled, None))
    close(attend(q, kv, ruled, scale=0.4), beside[0])
    monkeypatch.setattr(torch_gather, "Work", None)
    for layout, (out, lse, _) in zip(layouts, want, strict=True):
        got = attend(q, kv, layout, scale=0.4, return_lse=True, backend="torch")
        close(got[0], out)
        close(got[1], lse)


def test_causality_is_bit_exact():
    """What comes after a row changes no bit of it."""
    q, k, v = qkv(1, 4, 2, 150)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 97:] += 3
    v2[:, :, 97:] += 3
    mask = torch.rand(1, 4, 10, 10, generator=torch.Generator().manual_seed(3)) < 0.5
    tiles = Layout.from_block_mask(mask, 150, 150, block_q=16, block_k=16)
    for layout in (Layout.static((1, 4, 150, 150), sink=4, window=30), tiles):
        a, b = (attend(q, kv, layout, backend="torch") for kv in ((k, v), (k2, v2)))
        assert torch.equal(a[:, :, :97], b[:, :, :97])
        assert not torch.equal(a, b)


# ---------------------------------------------------------------------- gradients
def dense_gradients(case: Case, dout, dlse, scale=0.4):
    """Autograd through the oracle's masked softmax in fp64: (dq, dk, dv, dbias | None)."""
    x = case.double()
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.kv.k, x.kv.v)]
    bias = None if x.kv.bias is None else x.kv.bias.detach().clone().requires_grad_()
    kv = replace(x.kv, k=leaves[1], v=leaves[2], bias=bias)
    s, mask, _, v = reference.scores(leaves[0], kv, x.layout, scale, case.softcap or 0.0)
    s = s.masked_fill(~mask, float("-inf"))
    alive = mask.any(-1)
    lse = torch.logsumexp(torch.where(alive[..., None], s, 0.0), -1)
    out = torch.where(mask, torch.exp(s - lse[..., None]), 0.0) @ v.masked_fill(~mask.any(-2)[..., None], 0)
    loss = (out * dout.double()).sum() + (torch.where(alive, lse, 0.0) * dlse.double()).sum()
    given_ = [*leaves, *([bias] if bias is not None else [])]
    grads = torch.autograd.grad(loss, given_, allow_unused=True) if loss.requires_grad else [None] * len(given_)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(given_, grads, strict=True)]
    return grads if bias is not None else [*grads, None]


def test_gradients(bounds):
    @quick
    @given(cases())
    def check(case):
        # NaN of unused slots may not meet autograd's zeros in the reference; the backend gets them as they are.
        clean = replace(case, kv=replace(case.kv, k=case.kv.k.nan_to_num(0.0), v=case.kv.v.nan_to_num(0.0)))
        gen = torch.Generator().manual_seed(0)
        b, h, n, _ = case.q.shape
        dout, dlse = torch.randn(b, h, n, case.kv.v.shape[-1], generator=gen), torch.randn(b, h, n, generator=gen)
        want = dense_gradients(clean, dout, dlse)
        bias = None if case.kv.bias is None else case.kv.bias.clone().requires_grad_()
        q, k, v = (t.clone().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        kv = replace(case.kv, k=k, v=v, bias=bias)
        out, lse = attend(q, kv, case.layout, scale=0.4, softcap=case.softcap, return_lse=True, backend="torch")
        close(out, oracle(case)[0])
        loss = (out * dout).sum() + (torch.where(torch.isfinite(lse), lse, 0.0) * dlse).sum()
        loss.backward()
        for got, exact in zip((q.grad, k.grad, v.grad, None if bias is None else bias.grad), want, strict=True):
            assert (got is None) == (exact is None)
            if exact is not None:
                close(got, exact, 1e-4)

    check()


def test_gradcheck():
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 6, d=3, dtype=torch.float64))
    bias = torch.randn(1, 1, 6, dtype=torch.float64, requires_grad=True)
    layout = Layout.static((1, 2, 6, 6), sink=1, window=3)

    def run(q, k, v, bias):
        return attend(q, KV.dense(k, v, bias=bias), layout, return_lse=True, softcap=2.0)

    assert torch.autograd.gradcheck(run, (q, k, v, bias), fast_mode=True)


def test_gradient_of_one_output_alone():
    """out without lse, and lse without out; dense training runs on PyTorch's own kernel and agrees."""
    q, k, v = qkv(1, 4, 2, 20)
    layout = Layout.dense(1, 4, 20, 20)
    for backend in ("torch", None):
        for which in (0, 1):
            x = [t.clone().requires_grad_() for t in (q, k, v)]
            y = attend(x[0], (x[1], x[2]), layout, return_lse=which == 1, backend=backend)
            (y if which == 0 else y[1]).sum().backward()
            case = Case(q, KV.dense(k, v), layout, None)
            ones, zeros = torch.ones(1, 4, 20, 16), torch.zeros(1, 4, 20)
            want = dense_gradients(case, ones * (1 - which), zeros + which, scale=0.25)
            for a, b in zip(x, want, strict=False):
                close(torch.zeros_like(a) if a.grad is None else a.grad, b)


def test_mass_carries_no_gradient():
    q, k, v = qkv(1, 4, 2, 12)
    q.requires_grad_()
    out, mass = attend(q, (k, v), Layout.static((1, 4, 12, 12), window=4), return_mass=True)
    assert out.requires_grad and not mass.requires_grad
    close(mass.sum(-1), torch.full((1, 4), 12.0))


# ---------------------------------------------------------------------- the operator
def test_operator_passes_opcheck():
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 2, 8))
    bias = torch.randn(1, 2, 8, requires_grad=True)
    layout = Layout.static((1, 4, 8, 8), sink=1, window=5)
    for lse in (True, False):
        kv = KV.dense(k, v, bias=bias) if lse else KV.dense(k.detach(), v.detach())
        pack, meta = dispatch._pack(kv, layout), dispatch._meta(kv, layout)
        args = (q if lse else q.detach(), kv.k, kv.v, kv.bias, pack, meta, 0.25, 0.0, "torch", lse, False)
        torch.library.opcheck(torch.ops.foveate.attend, args)


@pytest.mark.parametrize("kind", ["full", "static", "tiles", "decode", "lse"])
def test_compile_has_no_graph_break(kind):
    torch._dynamo.reset()
    q, k, v = qkv(1, 4, 2, 64)

    def layout_for(n, m):
        if kind in ("full", "lse"):
            return Layout.dense(1, 4, n, m)
        if kind == "tiles":
            mask = torch.ones(1, 4, -(-n // 16), -(-m // 16), dtype=torch.bool)
            return Layout.from_block_mask(mask, n, m, block_q=16, block_k=16)
        return Layout.static((1, 4, n, m), sink=2, window=9)

    def run(q, k, v):
        got = attend(q, (k, v), layout_for(q.shape[2], k.shape[2]), return_lse=kind == "lse")
        return (got if kind == "lse" else (got,))[0] * 2

    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    n = 1 if kind == "decode" else 64
    close(fast(q[:, :, -n:], k, v), run(q[:, :, -n:], k, v))
    x, y = ([t.clone().requires_grad_() for t in (q[:, :, -n:], k, v)] for _ in range(2))
    fast(*x).square().sum().backward()
    run(*y).square().sum().backward()
    for a, b in zip(x, y, strict=True):
        close(a.grad, b.grad)


def test_forward_mode_is_refused():
    import torch.autograd.forward_ad as forward_ad

    q, k, v = qkv(1, 2, 1, 8)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        attend(forward_ad.make_dual(q, q), (k, v), Layout.static((1, 2, 8, 8), window=3))


# ---------------------------------------------------------------------- memory
MEMORY = """
import resource, torch
from foveate import Layout, attend
torch.manual_seed(0)
torch.set_num_threads(1)
n, h, g, block = 16384, 2, 1, 128
q, k, v = torch.randn(1, h, n, 64), torch.randn(1, g, n, 64), torch.randn(1, g, n, 64)
mask = torch.rand(1, h, n // block, n // block) < 0.1
mask |= torch.eye(n // block, dtype=torch.bool)
layout = Layout.from_block_mask(mask, n, n, block_q=block, block_k=block)
small = Layout.static((1, h, 256, n), sink=4, window=64)
attend(q[:, :, -256:], (k, v), small, backend="torch")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attend(q, (k, v), layout, backend="torch")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - out.numel() * 4)
"""


def test_memory_follows_the_layout():
    """16K tokens at about 10 %: what attend adds to q, k, v, out and the layout fits in its chunk buffers."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=True)
    scores = 16384 * 16384 * 2 * 4
    extra = int(done.stdout)
    assert extra < 48 << 20, f"{extra / 2**20:.0f} MiB beyond inputs and outputs"
    assert extra < scores / 40


def test_chunks_stay_within_their_bounds():
    """Whatever the layout, no chunk holds more scores or gathered elements than the constants say."""
    n, h = 1500, 4
    full = Layout.dense(1, h, n, n)
    lists = Layout.from_block_mask(torch.rand(1, h, 24, 24) < 0.3, n, n, block_q=64, block_k=64)
    mixed = Layout.by_head(torch.tensor([True, False, False, True]), full, lists)
    q, k, v = qkv(1, h, 1, n, d=8)
    for fused in (True, False):
        work = chunks.Work(KV.dense(k, v), mixed, fused)
        seen = 0
        for chunk in work.chunks():
            for s in chunk.segments():
                heads = 1 if fused else work.per
                assert s.seen.numel() * heads <= chunks.SCORES
                assert s.k.numel() + s.v.numel() <= chunks.GATHERED
                seen += int((s.seen & chunk.fresh[..., None]).sum()) * work.per
        assert seen == int(mixed.to_mask().sum())


# ---------------------------------------------------------------------- parts
def test_gated_parts():
    q, k, v = qkv(1, 4, 2, 30)
    a, b = Layout.static((1, 4, 30, 30), window=5), Layout.static((1, 4, 30, 30), sink=3)
    gates = [torch.rand(1, 4, 30, requires_grad=True) for _ in range(2)]
    x = q.clone().requires_grad_()
    parts = Parts((Part(a, gate=gates[0]), Part(b, gate=gates[1])), combine="gated")
    out, lse = attend(x, (k, v), parts, return_lse=True)
    pieces = [attend(q, (k, v), p, return_lse=True) for p in (a, b)]
    close(out, sum(o * g[..., None] for (o, _), g in zip(pieces, gates, strict=True)))
    close(lse, torch.logaddexp(pieces[0][1], pieces[1][1]))
    out.sum().backward()
    close(gates[0].grad, pieces[0][0].sum(-1))
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    with pytest.raises(UnsupportedError, match="return_mass: gated"):
        attend(q, (k, v), parts, return_mass=True)


def test_packed_entries_stay_packed():
    """Asking whether gradients are wanted, and what widths parts have, unpacks nothing."""
    store, new = store_of((4, None, 32, 64), 64, 32, (150, 150), torch.float32, "cpu")
    store, q = store.append(*new(1), None, [150, 150]), torch.randn(2, 4, 1, 64)
    for plan in (None, Parts((Part(Layout.dense(2, 4, 1, 151)),))):
        kv = store.view()
        out = attend(q, kv, plan)
        assert not kv.made and not out.requires_grad
        close(out, attend(q, kv.to_dense(), backend="reference"))
    kv, x = store.view(), q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="'packed' cannot serve this call: it returns no mass, has no gradient"):
        attend(x, kv, backend="packed")
    attend(x, kv).sum().backward()  # by another backend, over a copy
    assert kv.made and bool(torch.isfinite(x.grad).all())
    store.values.tail = store.values.tail.clone().requires_grad_()
    assert attend(q, store.view()).requires_grad


def test_mass_of_disjoint_parts_is_that_of_the_whole():
    q, k, v = qkv(1, 4, 2, 30)
    left = (torch.arange(30) < 11).view(1, 1, 1, 30).expand(1, 1, 30, 30).contiguous()
    a = Layout.from_block_mask(left, 30, 30, block_q=1, block_k=1, heads=4)
    b = Layout.from_block_mask(~left, 30, 30, block_q=1, block_k=1, heads=4)
    whole = attend(q, (k, v), return_lse=True, return_mass=True, backend="torch")
    parts = attend(q, (k, v), Parts((Part(a), Part(b))), return_lse=True, return_mass=True)
    for x, y in zip(whole, parts, strict=True):
        close(x, y)


# ---------------------------------------------------------------------- choosing
def test_explain_gives_every_reason():
    q, k, v = qkv(1, 4, 2, 40)
    lines = {c.backend: c.reason for c in explain(q, (k, v), Layout.static((1, 4, 40, 40), window=5))}
    assert list(lines) == list(dispatch.AUTO["cpu"])
    assert lines["torch"] is None and "dense layouts only" in lines["sdpa"]
    assert explain(q, (k, v))[0] == dispatch.Choice("sdpa", None)
    assert "lse" in explain(q, (k, v), want=Want(lse=True))[0].reason


def test_sdpa_asks_positions_of_the_data():
    """Explicit positions that are the default ones are dense attention; others are not."""
    q, k, v = qkv(2, 4, 2, 20)
    usual = Layout.dense(2, 4, 5, 20, q_pos=torch.arange(15, 20).expand(2, 5))
    earlier = Layout.dense(2, 4, 5, 20, q_pos=torch.arange(5).expand(2, 5))
    assert explain(q[:, :, :5], (k, v), usual)[0].reason is None
    assert "positions" in explain(q[:, :, :5], (k, v), earlier)[0].reason
    one = Layout.dense(2, 4, 1, 20, q_pos=torch.tensor([[6], [19]]))
    close(attend(q[:, :, :1], (k, v), one, scale=0.4), oracle(Case(q[:, :, :1], KV.dense(k, v), one, None))[0])
    held = KV.dense(k, v, pos=torch.arange(0, 40, 2).expand(2, 2, 20).int())
    later = replace(one, q_pos=torch.tensor([[38], [50]]))
    assert explain(q[:, :, :1], held, later)[0].reason is None
    assert explain(q[:, :, :1], held, one)[0].reason is not None
    close(attend(q[:, :, :1], held, one, scale=0.4), oracle(Case(q[:, :, :1], held, one, None))[0])


# ---------------------------------------------------------------------- bad input
def call(**change):
    q, k, v = qkv(2, 4, 2, 10)
    given_ = dict(q=q, k=k, v=v, plan=None, options={})
    given_.update(change)
    return attend(given_["q"], (given_["k"], given_["v"]), given_["plan"], **given_["options"])


BAD = [
    ("q of 3 dimensions", dict(q=torch.randn(4, 10, 16)), "q: expected 4 dimensions"),
    ("k of 3 dimensions", dict(k=torch.randn(2, 10, 16)), "k and v: expected 4 dimensions"),
    ("batch sizes differ", dict(q=torch.randn(1, 4, 10, 16)), "q: expected the batch size of kv, 2, got 1"),
    ("H not a multiple of G", dict(q=torch.randn(2, 3, 10, 16)), "multiple of the 2 kv heads, got H = 3"),
    ("no kv heads", dict(k=torch.randn(2, 0, 10, 16), v=torch.randn(2, 0, 10, 16)), "kv heads"),
    ("head dims differ", dict(q=torch.randn(2, 4, 10, 8)), "q: expected the head dim of k, 16, got 8"),
    ("lengths of k and v differ", dict(v=torch.randn(2, 2, 9, 16)), "v: expected"),
    ("no queries", dict(q=torch.randn(2, 4, 0, 16)), "at least one query and one key"),
    ("no keys", dict(k=torch.randn(2, 2, 0, 16), v=torch.randn(2, 2, 0, 16)), "at least one query and one key"),
    ("empty batch", dict(q=torch.randn(0, 4, 3, 16), k=torch.randn(0, 2, 3, 16), v=torch.randn(0, 2, 3, 16)), "at least"),
    ("dtypes of q and k differ", dict(q=torch.randn(2, 4, 10, 16).half()), "q: expected the dtype of k"),
    ("dtypes of k and v differ", dict(v=torch.randn(2, 2, 10, 16).half()), "v: expected dtype"),
    ("integers", {n: torch.ones(2, h, 10, 16, dtype=torch.int32) for n, h in (("q", 4), ("k", 2), ("v", 2))}, "floating"),
    ("q elsewhere", dict(q=torch.randn(2, 4, 10, 16, device="meta")), "q: expected the device of k, cpu, got meta"),
    ("v elsewhere", dict(v=torch.randn(2, 2, 10, 16, device="meta")), "v: expected .* on cpu .* got .* on meta"),
    ("plan elsewhere", dict(plan=Layout.static((2, 4, 10, 10), window=2, device="meta")), "plan: expected a layout on"),
    ("plan of another shape", dict(plan=Layout.dense(2, 4, 10, 11)), "plan: expected a layout of shape"),
    ("plan of another type", dict(plan="dense"), "plan: expected a Layout, Parts or None, got str"),
    ("NaN in q", dict(q=torch.full((2, 4, 10, 16), float("nan")), options=dict(strict=True)), "q: expected finite"),
    ("infinity in v", dict(v=torch.full((2, 2, 10, 16), float("inf")), options=dict(strict=True)), "v: expected finite"),
    (
        "gate of another shape",
        dict(plan=Parts((Part(Layout.dense(2, 4, 10, 10), gate=torch.ones(2, 4, 9)),), "gated")),
        "gate: ",
    ),
    (
        "parts of different width",
        dict(plan=Parts((Part(Layout.dense(2, 4, 10, 5), kv=KV.dense(torch.ones(2, 2, 5, 16), torch.ones(2, 2, 5, 8))),))),
        "parts: expected outputs",
    ),
]  # fmt: skip


@pytest.mark.parametrize("change,message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change, message):
    with pytest.raises(ShapeError, match=message):
        call(**change)


def test_unknown_and_unable_backends():
    with pytest.raises(ConfigError, match="unknown name 'torhc'; did you mean 'torch'"):
        call(options=dict(backend="torhc"))
    with pytest.raises(UnsupportedError, match="backend 'sdpa' cannot serve this call: it computes dense layouts only"):
        call(plan=Layout.static((2, 4, 10, 10), window=3), options=dict(backend="sdpa"))
    q, k, v = (t.requires_grad_() for t in qkv(2, 4, 2, 10))
    with pytest.raises(UnsupportedError, match="backend 'sdpa' cannot serve this call: it returns neither lse"):
        attend(q, (k, v), backend="sdpa", return_lse=True)


def test_strict_looks_at_entries_that_exist_only():
    q, k, v = qkv(1, 4, 2, 10)
    k[:, :, 7:] = float("nan")
    lens = torch.full((1, 2), 7, dtype=torch.int32)
    assert bool(torch.isfinite(attend(q, KV.dense(k, v, len=lens), strict=True)).all())
    with pytest.raises(ShapeError, match=r"k: expected finite values, got nan at \[0, 0, 7, 0\]"):
        attend(q, (k, v), strict=True)


def test_infinite_scores_reach_the_rows_of_their_tile_only():
    q, k, v = qkv(1, 4, 2, 64)
    mask = torch.eye(4, dtype=torch.bool).expand(1, 4, 4, 4).contiguous()
    layout = Layout.from_block_mask(mask, 64, 64, block_q=16, block_k=16)
    want = attend(q, (k, v), layout, backend="torch")
    k[:, :, 20] = float("nan")
    got = attend(q, (k, v), layout, backend="torch")
    keep = [*range(16), *range(32, 64)]
    assert torch.equal(got[:, :, keep], want[:, :, keep])


def test_free_slots_of_shorter_rows_do_not_matter():
    """A rule over a cache in no order of position, one row shorter: what memory held behind it may be NaN."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16, generator=gen) for h, n in ((4, 1), (2, 12), (2, 12)))
    pos = torch.stack([torch.arange(12) * 3, torch.arange(12) * 2]).int()[:, None].expand(2, 2, 12).contiguous()
    lens = torch.tensor([[12, 12], [9, 9]], dtype=torch.int32)
    for t in (k, v):
        t[1, :, 9:] = float("nan")
    plan = Layout.static((2, 4, 1, 12), sink=2, window=14, q_pos=torch.tensor([[34], [17]]))
    got = attend(q, KV.dense(k, v, len=lens, pos=pos), plan, backend="torch")
    clean = [t.nan_to_num(0.0) for t in (k, v)]
    want = attend(q, KV.dense(*clean, len=lens, pos=pos), plan, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
