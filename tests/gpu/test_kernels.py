"""Every backend that runs on a GPU against the oracle, on the GPU. `python -m pytest tests/gpu -q`; no hypothesis here."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.kernels.base import Want
from foveate.kernels.dispatch import backend
from foveate.layout import Layout
from tests import kernel_cases as cases
from tests.kernel_cases import Case, Maker, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = [torch.bfloat16, torch.float16]
BACKENDS = ["triton", "torch", "gluon", "flex"]
named = dict(ids=lambda c: c.__name__)


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 cases are judged as fp32: no tf32 in the oracle or in the torch backend."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def serve(name: str, case: Case, dtype: torch.dtype) -> None:
    """Check a backend on a case, or skip with the backend's own reason."""
    try:
        module = backend(name)
    except ImportError as err:
        pytest.skip(f"{name} is not installed here ({err})")
    if (why := module.supports(case.q, case.kv, case.layout, Want(lse=True, softcap=case.softcap > 0))) is not None:
        if name == "triton":
            raise AssertionError(why)  # it serves every case of this file
        pytest.skip(why)
    check(module, case, dtype)


def maker(n: int, dtype: torch.dtype, **more) -> Maker:
    return Maker(n, dtype=dtype, device="cuda", **more)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("make", cases.ALL, **named)
def test_equals_the_oracle(make, name):
    case = make(maker(777 if make in cases.PREFILL else 1003, torch.bfloat16))
    serve(name, case.poisoned() if name == "triton" else case, torch.bfloat16)


@pytest.mark.parametrize("make", cases.ALL, **named)
def test_triton_in_fp32(make):
    serve("triton", make(maker(333, torch.float32)).poisoned(), torch.float32)


@pytest.mark.parametrize("name", ["triton", "gluon"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_head_dims(d, dtype, name):
    for make in (cases.block_lists_64, cases.block_lists_128, cases.lists_and_rule, cases.decode("paged", "pages")):
        try:
            serve(name, make(maker(519, dtype, d=d)), dtype)
        except pytest.skip.Exception:
            if name == "triton":
                raise


@pytest.mark.parametrize("name", ["triton", "gluon"])
@pytest.mark.parametrize("h,g", [(1, 1), (8, 4), (6, 2), (12, 3), (8, 1), (16, 1)])
def test_groups(h, g, name):
    for make in (cases.block_lists_128, cases.group_lists, cases.token_lists, cases.decode("dense", "pages")):
        try:
            serve(name, make(maker(300, torch.bfloat16, h=h, g=g, d=128)), torch.bfloat16)
        except pytest.skip.Exception:
            if name == "triton":
                raise


@pytest.mark.parametrize("name", ["triton", "gluon", "flex"])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 1000, 2049])
def test_lengths(n, name):
    x = maker(n, torch.bfloat16, d=128)
    ran = 0
    for layout in (Layout.dense(*x.shape()), x.blocks(0.5, 128, 128), x.blocks(0.5, 128, 64)):
        try:
            serve(name, Case(x.q(), x.dense(), layout), torch.bfloat16)
            ran += 1
        except pytest.skip.Exception as why:
            reason = str(why)
    if not ran:
        pytest.skip(reason)


def test_auto_serves_every_case():
    """Whatever `auto` picks is right; nothing falls off the list of backends."""
    for make in cases.ALL:
        case = make(maker(391, torch.bfloat16))
        out = foveate.attend(case.q, case.kv, case.layout, softcap=case.softcap or None)
        want, _ = case.oracle()
        slack = 2 * float((case.plain().float() - want).abs().max()) + 1e-5
        assert float((out.float() - want).abs().max()) <= slack, make.__name__


@pytest.mark.parametrize("make", [cases.tiles_and_entries, cases.factored, cases.decode("paged", "pages")], **named)
def test_repeated_runs_are_bit_equal(make):
    case = make(maker(777, torch.bfloat16))
    module = backend("triton")
    runs = [
        module.forward(case.q, case.kv, case.layout, scale=case.scale, softcap=0.0, want=Want(lse=True)) for _ in range(3)
    ]
    assert all(torch.equal(r[0], runs[0][0]) and torch.equal(r[1], runs[0][1]) for r in runs)


def test_no_synchronisation():
    """The hot path waits for nothing: a stray .item() or .tolist() raises here."""
    module = backend("triton")
    for make in (cases.lists_and_rule, cases.factored, cases.batch, cases.decode("ragged", "heads")):
        case = make(maker(391, torch.bfloat16))
        run = lambda: module.forward(case.q, case.kv, case.layout, scale=0.1, softcap=0.0, want=Want(lse=True))  # noqa: B023, E731
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decode_in_a_cuda_graph():
    """Lengths live on the device: one captured step serves them as they grow."""
    x = maker(600, torch.bfloat16, h=8, g=2, d=128)
    case = cases.decode("paged", "rule")(x)
    module = backend("triton")

    def run() -> torch.Tensor:
        return module.forward(case.q, case.kv, case.layout, scale=case.scale, softcap=0.0, want=Want())[0]

    run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for shorter in (0, 17, 301):
        case.kv.len.sub_(shorter)
        graph.replay()
        torch.cuda.synchronize()
        want, _ = case.oracle()
        slack = 2 * float((case.plain().float() - want).abs().max()) + 1e-5
        assert float((out.float() - want).abs().max()) <= slack


def test_gradients():
    x = maker(300, torch.float32, d=64)
    case = cases.tiles_and_entries(x)
    grads = []
    for name in ("triton", "reference"):
        q, k, v = (t.detach().double().float().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        if name == "triton":
            out, lse = foveate.attend(q, (k, v), case.layout, return_lse=True, backend="triton")
        else:
            s = (q @ k.repeat_interleave(2, 1).mT) * case.scale
            s = s.masked_fill(~case.layout.to_mask(case.kv), float("-inf"))
            lse = torch.logsumexp(s, -1)
            out = torch.exp(s - lse.clamp(min=-1e30)[..., None]) @ v.repeat_interleave(2, 1)
        live = lse > float("-inf")
        (out.square().sum() + torch.where(live, lse, 0.0).sum()).backward()
        grads.append((q.grad, k.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        assert bool(torch.isfinite(a).all())  # autograd of the plain form gives NaN for rows without keys; ours must not
        torch.testing.assert_close(a, torch.nan_to_num(b), atol=1e-4, rtol=1e-3)


def test_long_factored_layout_in_pieces(monkeypatch):
    """16K tokens, columns beside diagonals, compacted a few blocks at a time; judged on sampled rows."""
    from foveate.bench import kernels as bench
    from foveate.bench import workloads
    from foveate.kernels import triton as kernels

    monkeypatch.setattr(kernels, "SCRATCH", 1 << 20)
    layout = workloads.diagonals_and_columns(4, 16384, diagonals=40, columns=300, device="cuda")
    q, k, v = (torch.randn(1, h, 16384, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))
    out = foveate.attend(q, (k, v), layout, backend="triton")
    assert bench.error(out, q, k, v, layout) < 2e-2
