"""What is asked of every kernel family and of every way that `attend` takes: shapes, edges, NaN, equal bits, bad input.

The files beside this one go deep into one family; this one holds what must be true of all. With TRITON_INTERPRET=1 and
no GPU it runs on small problems in the interpreter (minutes): a check of the tests themselves.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

CUDA, INTERPRETER = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and not INTERPRETER, reason="needs a CUDA device")]
if CUDA or INTERPRETER:
    import foveate
    from foveate.errors import FoveateError, LayoutError, ShapeError
    from foveate.kernels import dispatch
    from foveate.kernels.base import Want
    from foveate.kernels.triton import backward as bw
    from foveate.kernels.triton import paging_launch, tokens, tokens_backward
    from foveate.kv import KV
    from foveate.layout import Layout
    from foveate.methods.base import State
    from foveate.registry import parse
    from tests import (
        estimate_cases,
        estimate_lowbit_cases,
        estimate_rows_cases,
        estimate_window_cases,
        paging_cases,
        token_cases,
    )
    from tests import kernel_cases as cases
    from tests.gpu import test_backward
    from tests.kernel_cases import Case, Maker, poison

DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter computes bf16 wrongly
N = 600 if CUDA else 70
ON = dict(device=DEVICE)
# (D, H, G): groups of 1 to 16, every head dim
SHAPES = [(64, 1, 1), (96, 6, 2), (128, 8, 1), (256, 16, 1)]
shapes = pytest.mark.parametrize("d,h,g", SHAPES)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def maker(d: int, h: int, g: int, dtype=None, n: int = N, seed: int = 0) -> Maker:
    return Maker(n, d=d, h=h, g=g, dtype=dtype or HALF, device=DEVICE, seed=seed)


def blocks(mask, n: int, block_q: int, block_k: int, h: int) -> Layout:
    return Layout.from_block_mask(mask, n, n, block_q=block_q, block_k=block_k, heads=h)


def edge(x: Maker, what: str, block_q: int = 128, block_k: int = 64) -> Case:
    """Lists at the limits: every second row empty, all rows empty, one row with every block, one block in every row."""
    mask = torch.zeros(1, x.h, -(-x.n // block_q), -(-x.n // block_k), dtype=torch.bool, device=x.device)
    if what == "some empty":
        mask = x.rand(*mask.shape) < 0.5
        mask[:, :, ::2] = False
    elif what == "one owns all":
        mask[:, :, -1] = True
    elif what == "one block":
        mask[..., 0] = True
    return Case(x.q(), x.dense(), blocks(mask, x.n, block_q, block_k, x.h))


EDGES = ["some empty", "all empty", "one owns all", "one block"]
edges = pytest.mark.parametrize("what", EDGES)


# ---------------------------------------------------------------------- forward
@shapes
@pytest.mark.parametrize("make", [
    cases.empty_rows, cases.one_row_owns_all, cases.popular_block, cases.batch, cases.factored, cases.static, cases.bias,
    cases.decode("ragged", "heads"), cases.decode("paged", "rule"),
] if CUDA or INTERPRETER else [], ids=lambda c: c.__name__)  # fmt: skip
def test_triton(make, d, h, g):
    """Every part of a layout on every head dim and group, NaN in what no row sees."""
    case = make(maker(d, h, g)).poisoned()
    cases.check(dispatch.backend("triton"), case, HALF)


@edges
@shapes
def test_what_auto_takes_for_lists(d, h, g, what):
    """Gluon on Hopper, Triton elsewhere and for its other head dims."""
    case = edge(maker(d, h, g), what)
    name = None if CUDA else "triton"
    module = dispatch.choose(case.q, case.kv, case.layout, Want(lse=True), name)
    cases.check(module, case, HALF)


# ---------------------------------------------------------------------- backward
@edges
@pytest.mark.parametrize("d,h,g", [(64, 16, 1), (96, 6, 2), (128, 3, 3), (128, 8, 1)])
def test_the_backward_pass_in_triton(d, h, g, what):
    """Named tiles keep Gluon away, which takes most of these on Hopper. NaN, equal runs: in `check`."""
    for block_q, block_k in ((128, 64), (128, 128)) if CUDA else ((32, 16),):
        case = edge(maker(d, h, g, None if CUDA else torch.float32), what, block_q, block_k)
        test_backward.check(case, bw.config(case.q, d, block_k))


def token_edge(x: Maker, what: str, b: int = 1) -> Case:
    """The same limits in lists of single tokens."""
    case = token_cases.listed(x, 4, 64 if CUDA else 16, sink=True, b=b)
    tiles, count = case.layout.tiles.clone(), case.layout.tile_count.clone()
    if what == "all empty":
        count.zero_()
    elif what == "one owns all":
        count[:, :, :-1] = 0
        count[:, :, -1] = 4
        tiles[:, :, -1] = tiles.new_tensor(range(4)) * case.layout.tile_width
    elif what == "one block":
        tiles[..., 0], count[:] = 0, 1
    return replace(case, layout=replace(case.layout, tiles=tiles, tile_count=count))


@edges
@pytest.mark.parametrize("d,h,g", [(64, 16, 1), (96, 6, 2), (128, 4, 4)])
def test_lists_of_tokens(d, h, g, what):
    """Forward and backward, each block walked by tiles of tokens, by key block, or as configured."""
    dtype = HALF if CUDA else torch.float32
    case = token_edge(maker(d, h, g, dtype), what, b=2)
    base = tokens.config(case.q, case.kv, case.layout.tile_width)
    for share in (base.shared, 0.0, 2.0) if CUDA else (base.shared,):
        knobs = replace(base, shared=share)
        token_cases.check(case, knobs, 2e-2 if CUDA else 2e-5)
        token_cases.check_backward(case, knobs, tolerance=2e-2 if CUDA else 3e-5)
    if CUDA:
        assert tokens.serves(case.q, case.kv, case.layout, 0.0)
        assert tokens_backward.backward_supports(case.q, case.kv, case.layout, 0.0) is None


# ---------------------------------------------------------------------- through attend: forward, gradients, equal bits
ROUTES = {
    "dense": lambda x: cases.dense(x),
    "blocks of 128": lambda x: cases.block_lists_128(x),
    "blocks of 64": lambda x: cases.block_lists_64(x),
    "small blocks": lambda x: cases.block_lists(x),
    "tokens": lambda x: token_cases.listed(x, 4, 64 if CUDA else 16, sink=True),
    "rule": lambda x: cases.static(x),
    "factored": lambda x: cases.factored(x),
    "tiles and entries": lambda x: cases.tiles_and_entries(x),
    "chunk": lambda x: cases.chunk(x),
    "batch": lambda x: cases.batch(x),  # rows of different length
    "empty rows": lambda x: edge(x, "some empty"),
    "one owns all": lambda x: edge(x, "one owns all"),
    "one block": lambda x: edge(x, "one block"),
}
routes = pytest.mark.parametrize("route", ROUTES)


def trained(case: Case, dout, dlse):
    """out, lse and the gradients of q, k and v that a user of `attend` gets."""
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
    name = None if CUDA else "torch"
    out, lse = foveate.attend(q, replace(case.kv, k=k, v=v), case.layout, return_lse=True, backend=name)
    live = lse.masked_fill(lse.isneginf(), 0)
    return out.detach(), lse.detach(), torch.autograd.grad([out, live], (q, k, v), [dout, dlse])


def cotangents(case: Case):
    gen = torch.Generator().manual_seed(1)
    dout = torch.randn(*case.q.shape[:3], case.kv.shape[4], generator=gen).to(DEVICE, case.q.dtype)
    return dout, torch.randn(*case.q.shape[:3], generator=gen).to(DEVICE)


@routes
@pytest.mark.parametrize("d,h,g", [(64, 16, 1), (96, 6, 2), (128, 4, 4), (256, 8, 2)])
def test_training(route, d, h, g):
    """Whatever serves a layout: errors of at most twice those of PyTorch in the same precision."""
    case = ROUTES[route](maker(d, h, g, torch.bfloat16))
    dout, dlse = cotangents(case)
    got, got_lse, grads = trained(case, dout, dlse)
    clean = replace(case, kv=replace(case.kv, k=case.kv.k.nan_to_num(0.0), v=case.kv.v.nan_to_num(0.0)))
    out, lse, want = test_backward.gradients(clean, dout, dlse, torch.float64)
    plain_out, _, plain = test_backward.gradients(clean, dout, dlse, case.q.dtype)
    dead = lse.isneginf()
    assert torch.equal(got_lse.isneginf(), dead) and bool((got[dead] == 0).all())
    torch.testing.assert_close(got_lse[~dead].double(), lse[~dead].double(), atol=2e-3, rtol=1e-4)
    every = zip(("out", "dq", "dk", "dv"), (got, *grads), (out, *want), (plain_out, *plain), strict=True)
    for name, a, b, p in every:
        assert bool(torch.isfinite(a).all()), f"{name} was not written, or NaN reached it"
        off, slack = float((a.double() - b).abs().max()), float((p.double() - b).abs().max())
        assert off <= 2 * slack + 1e-5, f"{name} is off by {off}, PyTorch by {slack}"


@routes
def test_deterministic_mode(route):
    """Equal bits of results and gradients, whatever serves the call."""
    case = ROUTES[route](maker(128, 8, 2, torch.bfloat16))
    dout, dlse = cotangents(case)
    with poison():  # turns deterministic mode on
        first, *rest = ([out, lse, *grads] for out, lse, grads in (trained(case, dout, dlse) for _ in range(4)))
    for again in rest:
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), first, again, strict=True):
            assert torch.equal(a, b), f"{name} differs from run to run"


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged"])
def test_decode_repeats(kind):
    for what in ("full", "rule", "pages", "heads"):
        case = cases.decode(kind, what)(maker(128, 8, 2, n=3000 if CUDA else 70))
        name = None if CUDA else "triton"
        runs = [foveate.attend(case.q, case.kv, case.layout, return_lse=True, backend=name) for _ in range(4)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True)), what


# ---------------------------------------------------------------------- decode over pages
@pytest.mark.parametrize("r,d", [(1, 256), (16, 96), (16, 256), (4, 128)])
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_pages(kind, r, d):
    """Rows without entries, rows that list nothing, a page that every row lists; scores of wide heads."""
    lens = ((0, 700), (333, 1)) if CUDA else ((0, 70), (33, 1))
    q, kv = paging_cases.problem(r, d, lens, kind, HALF, **ON)
    page, heads = 16, 2 * r
    assert paging_launch.usable(q)
    tiles, count = paging_cases.random_tiles(replace(kv, len=kv.len.clamp(min=1)), heads, page, 20, seed=r)
    count[1, 0] = 0
    tolerance = 2e-2 if CUDA else 3e-3
    paging_cases.check_attend(q, kv, tiles, count, page, tolerance)
    paging_cases.check_attend(q, kv, torch.zeros_like(tiles), torch.ones_like(count), page, tolerance)
    paging_cases.check_score(*paging_cases.problem(r, d, lens, "dense", HALF, **ON), page, 1e-4)


@pytest.mark.parametrize("page,d,dv", [(16, 256, 256), (64, 256, 64), (1, 96, 128)])
def test_append(page, d, dv):
    paging_cases.check_append(page, d, dv, HALF, steps=20 if CUDA else 3, **ON)


# ---------------------------------------------------------------------- estimators
PLANS = [
    "minference:columns=40,diagonals=100",
    "minference:pattern=block_sparse,blocks=4",
    "flexprefill:min_budget=256,tau=0.0",
    "flexprefill:min_budget=256,tau=10.0,share=group",
    "xattention:threshold=0.8",
    "spargeattn@8k",
    "sale:tau=0.05",
    "anchor_attention:theta=3,step=4",
    "hip:k=256,sink=64,window=128,dense_layers=0",
]
plans = pytest.mark.parametrize("name", PLANS)


def problem(d: int, h: int, g: int, start: int = 0, dtype=None):
    n, d = (2111, d) if CUDA else (600, 16)
    h, g = (h, g) if CUDA else (2, 1)
    return estimate_cases.peaked(h, g, n, d, start, dtype=dtype or HALF, **ON)


def exact(x):
    """The same call in fp32, of the same numbers."""
    return replace(x, q=x.q.float(), kv=KV.dense(x.kv.k.float(), x.kv.v.float()))


def differing(a: Layout, b: Layout) -> float:
    mine, theirs = a.to_mask(), b.to_mask()
    return float((mine ^ theirs).sum()) / float((mine | theirs).sum())


@plans
@pytest.mark.parametrize("d,h,g", [(64, 4, 4), (96, 6, 2), (128, 16, 1), (256, 8, 2)])
def test_plans(name, d, h, g):
    """The plans of the plain code in fp32 on every head dim and group; scores that tie to within rounding may swap."""
    method = parse(name)
    for start in (0, 777) if CUDA else (130,):
        x = problem(d, h, g, start)
        with poison():
            mine = method.plan(x, State())
        mine.validate()
        with estimate_cases.plain():
            theirs = method.plan(exact(x), State())
        assert differing(mine, theirs) < 1e-2


@plans
def test_plans_repeat(name):
    """Equal lists in every run, with or without NaN in fresh memory."""
    method, x = parse(name), problem(128, 8, 2)
    first = method.plan(x, State()).to_mask()
    for _ in range(3):
        assert torch.equal(method.plan(x, State()).to_mask(), first)
        with poison():
            assert torch.equal(method.plan(x, State()).to_mask(), first)


def estimates() -> dict:
    kind = dict(dtype=HALF, **ON)
    m, tolerance = (1500, 3e-4) if CUDA else (150, 3e-4)
    grid = estimate_lowbit_cases.Grid(64, 32, 32, 32, 64)
    anchors = dict(block=128 if CUDA else 16, step=16 if CUDA else 2, init=1, local=1)
    rows, low, window = estimate_rows_cases, estimate_lowbit_cases, estimate_window_cases
    return {
        "probe": lambda d, h, g: estimate_cases.check_probe(2, h, g, m, m, d, 64, tolerance=tolerance, **kind),
        "antidiagonals": lambda d, h, g: rows.check_mass(1, h, g, m, 33, d, 16, 128, tolerance=tolerance, **kind),
        "similarity": lambda d, h, g: rows.check_similarity(2, g, m, d, 64, 5, **kind),
        "integer keys": lambda d, h, g: low.check_keys(g, h // g, m, d, "fragment", 4, **kind),
        "sums": lambda d, h, g: low.check_sums(h, g, m, 33, d, grid, tolerance=tolerance, **kind),
        "anchors": lambda d, h, g: low.check_anchors(1, h, g, m, 33, d, tolerance=tolerance, **anchors, **kind),
        "window": lambda d, h, g: window.check(2, h, g, m, 32, d, tolerance=tolerance, **kind),
    }


@pytest.mark.parametrize("d,h,g", [(64, 16, 1), (256, 4, 2)])
@pytest.mark.parametrize("what", estimates() if CUDA or INTERPRETER else [])
def test_estimates_on_memory_full_of_nan(what, d, h, g):
    d = d if CUDA else 16
    with poison():
        estimates()[what](d, h, g)


# ---------------------------------------------------------------------- bad input never reaches a kernel
@pytest.fixture
def no_kernel(monkeypatch):
    """A kernel of any backend that starts is a failure."""
    for name in ("triton", "torch", "sdpa", "gluon"):
        try:
            module = dispatch.backend(name)
        except ImportError:
            continue
        monkeypatch.setattr(module, "forward", lambda *a, name=name, **k: pytest.fail(f"{name} ran"))


def lists(**change) -> Layout:
    """Four blocks of 16 rows for 2 heads, 64 keys; `change` spoils it."""
    tiles = torch.tensor([0, 16, 32]).expand(1, 2, 4, 3).contiguous()
    args = dict(block_q=16, tile_width=16, tiles=tiles, tile_count=torch.full((1, 2, 4), 3)) | change
    args = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    return Layout.lists((1, 2, 64, 64), **args)


def spoiled(value: int, slot: int = 2) -> torch.Tensor:
    tiles = torch.tensor([0, 16, 32]).expand(1, 2, 4, 3).contiguous()
    tiles[0, 1, 2, slot] = value
    return tiles


WHERE = r"\(batch row 0, head 1, query block 2, slot {}\)"
BAD = {
    "beyond the keys": (dict(tiles=spoiled(64)), r"tiles: index 64 is outside 0 to 63 " + WHERE.format(2)),
    "far beyond": (dict(tiles=spoiled(2**31 - 1)), "tiles: index 2147483647 is outside"),
    "negative": (dict(tiles=spoiled(-16, 0)), "tiles: index -16 is outside 0 to 63 " + WHERE.format(0)),
    "twice": (dict(tiles=spoiled(16)), "tiles: index 16 is duplicated " + WHERE.format(2)),
    "not ascending": (dict(tiles=spoiled(8)), "tiles: index 8 is not ascending " + WHERE.format(2)),
    "count": (dict(tile_count=torch.full((1, 2, 4), 4)), "tiles: expected counts of 0 to the width 3, got 4"),
    "negative count": (dict(tile_count=torch.full((1, 2, 4), -1)), "tiles: expected counts of 0 to the width 3, got -1"),
    "entry": (dict(entries=torch.full((1, 2, 4, 1), 99), entry_count=torch.ones(1, 2, 4).int()), "entries: index 99"),
    "window": (dict(window=torch.tensor([[3, -2]])), r"window: .* >= 0, got -2 \(batch row 0, head 1\)"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_lists(no_kernel, bad):
    """Found on the device when the layout is built, with row, head and index; the device works on."""
    change, message = BAD[bad]
    with pytest.raises(LayoutError, match=message):
        layout = lists(**change)
        foveate.attend(*inputs(), layout)
    assert float(torch.ones(3, **ON).sum()) == 3


def inputs(n: int = 64, m: int = 64, d: int = 32, h: int = 2, dtype=None, device=DEVICE):
    q = torch.zeros(1, h, n, d, device=device, dtype=dtype or HALF)
    k = torch.zeros(1, 2, m, 32, device=DEVICE, dtype=HALF)
    return q, (k, k)


@pytest.mark.parametrize("change", [
    dict(n=65), dict(m=48), dict(d=16), dict(h=3), dict(h=4), dict(dtype=torch.float32), dict(device="cpu"),
], ids=str)  # fmt: skip
def test_bad_calls(no_kernel, change):
    if change == dict(device="cpu") and not CUDA:
        pytest.skip("one device")
    for name in (None, "triton"):
        with pytest.raises(ShapeError):
            foveate.attend(*inputs(**change), lists(), backend=name)


def test_a_layout_of_another_device(no_kernel):
    elsewhere = Layout.static((1, 2, 64, 64), sink=torch.tensor([3]), device="cpu" if CUDA else "meta", validate=False)
    with pytest.raises(FoveateError, match="expected a layout on the device of q"):
        foveate.attend(*inputs(), elsewhere)
