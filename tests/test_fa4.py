"""FlashAttention-4 as a backend, without it: the lists it gets, what reaches its two functions, and every reason.

The stand-in for `flash_attn.cute.interface` walks its lists block by block as the Hopper kernels do, and like them looks
at the number of keys in the last block of each list alone (forward).
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from foveate import attend
from foveate.errors import UnsupportedError
from foveate.kernels import dispatch, fa4, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from foveate.lists import repeat_heads
from tests.kernel_cases import Maker

JUNK = 1 << 28


class Blocks(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


class Length(NamedTuple):
    seqlen_q: int
    seqlen_k: int


def listed(blocks, row_of_lists):
    """(block number, is it masked, is it the last of its list) in the order of a tile's walk."""
    for idx, cnt, masked in (
        (blocks.mask_block_idx, blocks.mask_block_cnt, True), (blocks.full_block_idx, blocks.full_block_cnt, False)
    ):  # fmt: skip
        b, h, i = row_of_lists
        at = (b if cnt.shape[0] > 1 else 0, h if cnt.shape[1] > 1 else 0, i)
        n = int(cnt[at])
        for slot in reversed(range(n)):
            yield int(idx[at][slot]), masked, slot == n - 1


class FlashAttention4:
    """The two functions, on `[B, N, H, D]`, in fp64; `calls` keeps the arguments."""

    def __init__(self):
        self.calls: list[dict] = []

    def scores(self, q, k, b, h, g, rows, keys, scale, mask_mod, masked, ends):
        length = Length(q.shape[1], k.shape[1])
        s = torch.full((len(rows), len(keys)), -math.inf, dtype=torch.float64)
        there = [x for x in keys if x < length.seqlen_k]
        s[:, : len(there)] = q[b, rows, h].double() @ k[b, there, g].double().T * scale
        if not ends and len(there) < len(keys):
            s[:, len(there) :] = 0.0  # zeros that the hardware reads beyond the last key, and nobody masks
        if masked and mask_mod is not None:
            seen = mask_mod(b, h, torch.tensor(rows)[:, None], torch.tensor(keys), length, None)
            s = s.masked_fill(~seen, -math.inf)
        return s

    def _flash_attn_fwd(self, q, k, v, softmax_scale=None, causal=False, pack_gqa=None, mask_mod=None,
                        block_sparse_tensors=None, return_lse=False, out=None):  # fmt: skip
        self.calls.append(dict(locals()))
        softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out = torch.empty_like(q) if out is None else out
        assert softmax_scale > 0 and not any(t.requires_grad for t in (q, k, v))
        bn, n, h, _ = q.shape
        lse = torch.empty(bn, h, n, dtype=torch.float32)
        bq, bk = block_sparse_tensors.block_size
        for b in range(bn):
            for head in range(h):
                g = head * k.shape[2] // h
                for i in range(-(-n // bq)):
                    rows = list(range(i * bq, min(n, i * bq + bq)))
                    parts, values = [], []
                    for block, masked, ends in listed(block_sparse_tensors, (b, head, i)):
                        keys = list(range(block * bk, block * bk + bk))
                        parts.append(self.scores(q, k, b, head, g, rows, keys, softmax_scale, mask_mod, masked, ends))
                        pad = torch.zeros(bk, v.shape[-1], dtype=torch.float64)
                        pad[: len(v[b, block * bk : block * bk + bk])] = v[b, block * bk : block * bk + bk, g].double()
                        values.append(pad)
                    s = torch.cat(parts, 1) if parts else torch.full((len(rows), 1), -math.inf, dtype=torch.float64)
                    w = torch.cat(values) if values else torch.zeros(1, v.shape[-1], dtype=torch.float64)
                    lse[b, head, rows] = s.logsumexp(-1).float()
                    out[b, rows, head] = (torch.nan_to_num(s.softmax(-1)) @ w).to(out.dtype)
        return out, lse, None, None, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, deterministic=False, dq=None,
                        dk=None, dv=None, mask_mod=None, block_sparse_tensors=None, dlse=None):  # fmt: skip
        self.calls.append(dict(locals()))
        softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        bn, n, h, _ = q.shape
        bq, bk = block_sparse_tensors.block_size
        grads = [torch.zeros_like(t, dtype=torch.float64) for t in (q, k, v)]
        for b in range(bn):
            for head in range(h):
                g = head * k.shape[2] // h
                for j in range(-(-k.shape[1] // bk)):
                    keys = list(range(j * bk, min(k.shape[1], j * bk + bk)))
                    for i, masked, _ in listed(block_sparse_tensors, (b, head, j)):
                        rows = list(range(i * bq, min(n, i * bq + bq)))
                        s = self.scores(q, k, b, head, g, rows, keys, softmax_scale, mask_mod, masked, True)
                        p = (s - torch.nan_to_num(lse[b, head, rows].double(), neginf=0.0)[:, None]).exp()
                        do, o = dout[b, rows, head].double(), out[b, rows, head].double()
                        delta = (do * o).sum(-1) - dlse[b, head, rows].double()
                        ds = p * (do @ v[b, keys, g].double().T - delta[:, None]) * softmax_scale
                        grads[0][b, rows, head] += ds @ k[b, keys, g].double()
                        grads[1][b, keys, g] += ds.T @ q[b, rows, head].double()
                        grads[2][b, keys, g] += p.T @ do
        for t, x in zip((dq, dk, dv), grads, strict=True):
            if t is not None:
                t.copy_(x.to(t.dtype))
        return tuple(x.to(q.dtype) for x in grads)


@pytest.fixture
def installed(monkeypatch):
    """A stand-in for the package, its libraries and a CUDA device."""
    made = FlashAttention4()
    modules = {name: types.ModuleType(name) for name in (
        "cutlass", "cutlass.cute", "flash_attn", "flash_attn.cute", "flash_attn.cute.utils", "flash_attn.cute.interface",
        "flash_attn.cute.block_sparsity",
    )}  # fmt: skip
    modules["cutlass"].cute, modules["cutlass"].Int32 = modules["cutlass.cute"], int
    modules["cutlass.cute"].jit = lambda f: f
    modules["flash_attn.cute"].utils = modules["flash_attn.cute.utils"]
    modules["flash_attn.cute.utils"].scalar_to_ssa = lambda x, kind: kind(x)
    interface = modules["flash_attn.cute.interface"]
    interface._flash_attn_fwd, interface._flash_attn_bwd = made._flash_attn_fwd, made._flash_attn_bwd
    modules["flash_attn.cute.block_sparsity"].BlockSparseTensorsTorch = Blocks
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "foveate.kernels.fa4_masks", raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    fa4.missing.cache_clear()
    yield made
    fa4.missing.cache_clear()
    sys.modules.pop("foveate.kernels.fa4_masks", None)


def problem(n=300, m=300, h=4, heads=4, b=1, block_q=128, width=128, density=0.5, causal=True, d=8, seed=0):
    """Random aligned blocks, unused slots full of junk; some rows of blocks are empty."""
    x = Maker(n, d=d, h=h, g=2, seed=seed)
    mask = x.rand(b, heads, -(-n // block_q), -(-m // width)) < density
    mask[:, :, 1:2] = False
    layout = Layout.from_block_mask(mask, n, m, block_q=block_q, block_k=width, heads=h, causal=causal)
    unused = torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, JUNK)
    return x.q(b=b), KV.dense(x.randn(b, 2, m, d), x.randn(b, 2, m, d)), layout, mask


SHAPES = [
    dict(), dict(m=427), dict(m=426), dict(width=64), dict(width=64, n=290, m=700), dict(block_q=256, n=600, m=600),
    dict(heads=2), dict(heads=1, b=2), dict(causal=False, m=333), dict(causal=False, width=64, m=200), dict(n=129, m=129),
    dict(n=200, m=961),
]  # fmt: skip
ids = dict(ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) or "plain")


def slow_lists(layout, mask):
    """(full, masked) key blocks per (b, h, query block) and their transposes per (b, h, key block), pair by pair."""
    b, h, n, m = layout.shape
    lead = mask.shape[:2]
    full, cut, full_t, cut_t = {}, {}, {}, {}
    for bi in range(lead[0]):
        for hi in range(lead[1]):
            for i in range(mask.shape[2]):
                for j in range(mask.shape[3]):
                    if not mask[bi, hi, i, j]:
                        continue
                    rows = [m - n + r for r in range(i * layout.block_q, min(n, (i + 1) * layout.block_q))]
                    keys = range(j * layout.tile_width, (j + 1) * layout.tile_width)
                    if not layout.causal or keys[-1] <= rows[0]:
                        full.setdefault((bi, hi, i), []).append(j)
                        full_t.setdefault((bi, hi, j), []).append(i)
                    elif keys[0] <= rows[-1]:
                        cut.setdefault((bi, hi, i), []).append(j)
                        cut_t.setdefault((bi, hi, j), []).append(i)
    return full, cut, full_t, cut_t


@pytest.mark.parametrize("shape", SHAPES, **ids)
def test_lists_are_those_of_a_slow_transcription(shape):
    _, _, layout, mask = problem(**shape)
    full, cut, full_t, cut_t = slow_lists(layout, mask)
    h = layout.shape[1]
    nk = -(-layout.shape[3] // layout.tile_width)
    for made, wanted, rows in (
        (fa4.forward_lists(layout), (full, cut), layout.num_blocks), (fa4.backward_lists(layout), (full_t, cut_t), nk)
    ):  # fmt: skip
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in made.values())
        for kind, want in zip(("full", "mask"), wanted, strict=True):
            cnt, idx = made[f"{kind}_block_cnt"], made[f"{kind}_block_idx"]
            heads = 1 if mask.shape[1] == 1 else h
            assert cnt.shape == (mask.shape[0], heads, rows) and idx.shape[:3] == cnt.shape
            for b in range(cnt.shape[0]):
                for i in range(heads):
                    for row in range(rows):
                        got = idx[b, i, row, : int(cnt[b, i, row])].tolist()
                        assert got == want.get((b, i * mask.shape[1] // heads, row), []), (kind, b, i, row)


def test_list_heads_are_taken_in_pieces(monkeypatch):
    _, _, layout, _ = problem(b=2)
    whole = fa4.backward_lists(layout)
    monkeypatch.setattr(fa4, "SCRATCH", 1)
    assert all(torch.equal(t, whole[name]) for name, t in fa4.backward_lists(layout).items())


@pytest.mark.parametrize("shape,scale", [*((s, 0.3) for s in SHAPES), (dict(), -0.3), (dict(), 0.0)])
def test_forward_equals_the_oracle(installed, shape, scale):
    q, kv, layout, _ = problem(**shape)
    out, lse, _ = fa4.forward(q, kv, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    want, want_lse, _ = reference.forward(q, kv, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    assert out.is_contiguous() and fa4.forward(q, kv, layout, scale=1.0, softcap=0.0, want=Want())[1] is None
    assert installed.calls[0]["pack_gqa"] is False and installed.calls[0]["causal"] is False


@pytest.mark.parametrize("shape,scale", [*((s, 0.3) for s in SHAPES if "width" not in s), (dict(), -0.3), (dict(), 0.0)])
def test_backward_equals_autograd(installed, shape, scale):
    q, kv, layout, _ = problem(**shape)
    x = Maker(q.shape[2], seed=5)
    dout, dlse = x.randn(*q.shape), x.randn(*q.shape[:3])
    leaves = [t.double().requires_grad_() for t in (q, kv.k, kv.v)]
    mask = layout.to_mask()
    dead = ~mask.any(-1)
    s = leaves[0] @ repeat_heads(leaves[1], q.shape[1]).mT * scale
    s = s.masked_fill(~mask, -math.inf).masked_fill(dead[..., None], 0)
    p = s.softmax(-1).masked_fill(dead[..., None], 0)
    out, lse = p @ repeat_heads(leaves[2], q.shape[1]), s.logsumexp(-1).masked_fill(dead, 0)
    want = torch.autograd.grad([out, lse], leaves, [dout.double(), dlse.double().masked_fill(dead, 0)])
    assert bool(dead.any()) or not layout.causal or layout.shape[2] < 200
    lse = lse.detach().masked_fill(dead, -math.inf).float()
    got = fa4.backward(dout, dlse, q, kv, layout, out.detach().float(), lse, scale=scale, softcap=0.0)
    for a, b in zip(got[:3], want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)
        assert a.is_contiguous()
    assert got[3] is None


def test_attend_runs_both_by_name(installed, monkeypatch):
    monkeypatch.setattr(fa4, "_unserved", lambda *_: None)
    q, kv, layout, _ = problem()
    grads = []
    for name in ("fa4", "torch"):
        leaves = [t.clone().requires_grad_() for t in (q, kv.k, kv.v)]
        out, lse = attend(leaves[0], tuple(leaves[1:]), layout, return_lse=True, backend=name)
        (out.square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()).backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    assert len(installed.calls) == 2


def test_dense_layouts_pass_no_lists(installed):
    q, kv, _, _ = problem()
    seen = {}

    def interface(*tensors, **named):
        seen.update(named, shapes=[tuple(t.shape) for t in tensors])
        return named.get("out"), torch.zeros(1, 4, 300), None, None, None

    module = sys.modules["flash_attn.cute.interface"]
    module._flash_attn_fwd = module._flash_attn_bwd = interface
    for causal in (True, False):
        layout = Layout.dense(1, 4, 300, 300, causal=causal)
        fa4.forward(q, kv, layout, scale=0.5, softcap=0.0, want=Want())
        assert seen["causal"] is causal and seen["softmax_scale"] == 0.5 and "block_sparse_tensors" not in seen
        assert seen["shapes"] == [(1, 300, 4, 8), (1, 300, 2, 8), (1, 300, 2, 8)] and "mask_mod" not in seen
        fa4.backward(q, q[..., 0], q, kv, layout, q, q[..., 0], scale=0.5, softcap=0.0)
        assert seen["causal"] is causal and seen["deterministic"] is False and "block_sparse_tensors" not in seen
        assert seen["dk"].shape == (1, 300, 2, 8) and seen["dlse"].shape == (1, 4, 300)


# ---------------------------------------------------------------------- reasons and choices
def served(**shape):
    """A problem whose shapes this backend serves, in bf16."""
    q, kv, layout, _ = problem(d=64, **shape)
    return q.bfloat16(), KV.dense(kv.k.bfloat16(), kv.v.bfloat16()), layout


def changed(**parts):
    q, kv, layout = served()
    return q, kv, replace(layout, **parts)


def wide():
    q, kv, layout, _ = problem(d=96)
    return q.half(), KV.dense(kv.k.half(), kv.v.half()), layout


def static():
    q, kv, layout = served()
    return q, kv, Layout.static(layout.shape, sink=4, window=16)


REASONS = {
    "rule": (static, "not rules"),
    "entries": (lambda: changed(entries=torch.zeros(1, 4, 3, 1), entry_count=torch.ones(1, 4, 3)), "single entries"),
    "query blocks": (lambda: served(block_q=64), "query blocks of whole 128 rows from row 0, not 64"),
    "offset": (lambda: changed(q_offset=5), "not 128 from -5"),
    "narrow": (lambda: served(width=32), "key blocks of 64 and 128, not 32"),
    "positions": (lambda: changed(q_pos=torch.arange(300)[None]), "positions are not entry numbers"),
    "short": (lambda: served(n=100, m=300), "not for 100 rows and 300 keys"),
    "more rows": (lambda: served(n=300, m=200), "no more rows than keys"),
    "fp32": (lambda: problem(d=64)[:3], "bf16 and fp16, not float32"),
    "head dim": (wide, "not 96 and 96"),
    "device": (served, "needs a Hopper GPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    make, why = REASONS[name]
    q, kv, layout = make()
    assert why in fa4.supports(q, kv, layout, Want())
    assert why in fa4.backward_supports(q, kv, layout, 0.0)


def test_reasons_of_one_direction(monkeypatch):
    q, kv, layout = served()
    with pytest.raises(UnsupportedError, match="backend 'fa4' cannot serve this call: it needs a Hopper"):
        attend(q, kv, layout, backend="fa4")
    assert "no mass" in fa4.supports(q, kv, layout, Want(mass=True))
    assert "softcap" in fa4.backward_supports(q, kv, layout, 2.0)
    monkeypatch.setattr(fa4, "_unserved", lambda *_: None)
    assert "blocks of 128 keys, not 64" in fa4.backward_supports(*served(width=64), 0.0)
    try:
        torch.use_deterministic_algorithms(True)
        assert "adds in any order" in fa4.backward_supports(q, kv, layout, 0.0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_tiles_off_the_grid_are_refused(monkeypatch):
    monkeypatch.setattr(fa4, "_unserved", lambda *_: None)
    q, kv, layout = served()  # its unused slots hold numbers off the grid
    layout.tiles.masked_fill_(layout.tiles == JUNK, JUNK + 3)
    assert fa4.supports(q, kv, layout, Want()) is None is fa4.backward_supports(q, kv, layout, 0.0)
    layout.tiles[0, 2, 2, 0] += 64
    assert "grid of 128 keys" in fa4.supports(q, kv, layout, Want())
    assert "grid of 128 keys" in fa4.backward_supports(q, kv, layout, 0.0)


def test_what_is_missing_is_said(installed, monkeypatch):
    assert fa4.missing() is None
    fa4.missing.cache_clear()
    monkeypatch.setattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_bwd", lambda q, k, v, dlse: None)
    assert "no _flash_attn_bwd with softmax_scale" in fa4.missing()
    fa4.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    assert "not installed" in fa4.missing()


def test_auto_takes_the_backward_pass_of_long_dense_layouts_alone(monkeypatch):
    q, kv, layout = served()
    long, short = (Layout.dense(1, 4, n, n) for n in (fa4.PAYS, fa4.PAYS - 1))
    assert fa4.backward_pays(q, kv, long) and not fa4.backward_pays(q, kv, short) and not fa4.backward_pays(q, kv, layout)
    monkeypatch.setattr(fa4, "backward_supports", lambda *_: None)
    cuda = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    pick = lambda plan, name: dispatch._backward_module(cuda, kv, plan, 0.0, name)  # noqa: E731
    from foveate.kernels.triton import backward

    monkeypatch.setattr(backward, "backward_supports", lambda *_: None)
    assert pick(long, "auto") is fa4 and pick(short, "auto") is backward and pick(layout, "auto") is backward
    assert pick(layout, "fa4") is fa4 and pick(long, "triton") is backward and pick(long, "gluon") is fa4
    monkeypatch.setattr(fa4, "backward_supports", lambda *_: "no")
    assert pick(layout, "fa4") is backward and pick(long, "torch") is dispatch.torch_gather


def test_auto_takes_the_backward_pass_of_lists_that_are_known_to_be_dense(monkeypatch):
    """Only a validation tells the host how much lists hold; it then also saves the look at the grid."""
    q, kv, _ = served()
    n = fa4.PAYS
    blocks = n // 128
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]

    def of(mask):
        return Layout.from_block_mask(mask[None, None], n, n, block_q=128, block_k=128, heads=4)

    many, few = of((column <= row) & ((row + column) % 3 < 1)), of(column == row)
    assert many.share == few.share == -1 and not fa4.backward_pays(q, kv, many)
    known = many.validated()
    assert known.share == pytest.approx(1000 * many.density(), abs=1.0) and known.share > fa4.FULL
    assert fa4.backward_pays(q, kv, known) and not fa4.backward_pays(q, kv, few.validated())
    assert Layout.from_tensors(known.tensors(), known.meta()).share == known.share
    monkeypatch.setattr(fa4, "used_slots", None)  # not asked again
    assert fa4._off_grid(known) is None
    with pytest.raises(TypeError):
        fa4._off_grid(many)


def test_shares_are_of_whole_tiles_on_the_grid():
    mask = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    open_ = Layout.from_block_mask(mask, 320, 320, block_q=64, block_k=64, causal=False).validated()
    assert open_.share == int(1000 * mask.float().mean())
    tiles = torch.tensor([[[[0], [64]]]], dtype=torch.int32)
    on = Layout.lists((1, 1, 128, 128), block_q=64, tile_width=64, tiles=tiles)
    assert on.share == int(1000 * on.density())
    assert Layout.lists((1, 1, 128, 128), block_q=64, tile_width=64, tiles=tiles + 3).share == -1
    assert Layout.dense(1, 1, 64, 64).validated().share == -1


def test_dense_training_without_it_prefers_cudnn_on_hopper(monkeypatch):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    q = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=torch.bfloat16, shape=(1, 4, 1, 64))
    for n, m, card, first in ((8192, 8192, 9, True), (8192, 8193, 9, False), (4096, 4096, 9, False), (8192, 8192, 8, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=card: (c, 0))
        with dispatch._cudnn_first(q, Layout.dense(1, 4, n, m)):
            order = _cur_sdpa_kernel_backends(with_priority=True)
        assert (order[0] is SDPBackend.CUDNN_ATTENTION) is first, (n, m, card)
    monkeypatch.setattr(fa4, "backward_supports", lambda *_: None)
    long, short = (Layout.dense(1, 4, n, n) for n in (fa4.PAYS, 300))
    assert dispatch._fa4_trains(q, None, long) and not dispatch._fa4_trains(q, None, short)
    q.device.type = "cpu"
    assert not dispatch._fa4_trains(q, None, long)
