"""The Gluon kernel of private 64-row lists without a GPU: its plan, its source under the emulator, its compilation."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.kernels import gluon, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests import gluon_emulator as emulator

try:
    from foveate.kernels.gluon import private
    from foveate.kernels.gluon.shim import TensorDescriptor
except (ImportError, AttributeError):  # no Triton, or one whose Gluon the shim does not know
    private = None

KERNEL = emulator.load_kernel(Path(gluon.__file__).parent / "private_kernel.py")
SHARED = 232_448  # bytes of shared memory a CTA may have on Hopper


@pytest.fixture(autouse=True)
def needs_gluon():
    if private is None:
        pytest.skip(gluon._missing() or "no Gluon")


def listed(seed, b, hl, h, n, m, *, causal=True, share=0.4, columns=0, skew=0, holes=True, width=64):
    """Random aligned tiles of `width` keys per block of 64 rows, and about `columns` single keys, drawn where tiles lie too.

    Unused slots hold junk; some lists are empty, some have tiles or columns alone (`holes`).
    """
    gen = torch.Generator().manual_seed(seed)
    nq, grid = -(-(n + skew) // 64), dict(block_q=64, heads=h, causal=causal, q_offset=skew)
    mask = torch.rand(b, hl, nq, -(-m // width), generator=gen) < share
    picked = torch.rand(b, hl, nq, m, generator=gen) < columns / m
    if holes:
        mask[:, ::2, 0], picked[:, ::2, 0], mask[-1, -1, -1], picked[-1, 0, -1] = False, False, False, False
    layout = Layout.from_block_mask(mask, n, m, block_k=width, **grid)
    if columns:
        keys = Layout.from_block_mask(picked, n, m, block_k=1, **grid)
        layout = Layout.lists(
            (b, h, n, m), block_q=64, tile_width=64, tiles=layout.tiles, tile_count=layout.tile_count, entries=keys.tiles,
            entry_count=keys.tile_count, causal=causal, q_offset=skew,
        )  # fmt: skip
        layout.entries.masked_fill_(torch.arange(layout.entries.shape[-1]) >= layout.entry_count[..., None], 1 << 28)
    layout.tiles.masked_fill_(torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None], 1 << 28)
    return layout


def plan_of(layout):
    """What `plan_kernel` computes, key by key and row by row."""
    (b, hl, nq), (_, _, n, m) = layout.tile_count.shape, layout.shape
    plan, width = torch.zeros(b, hl, nq, 2 if layout.entries is None else 4, dtype=torch.int32), layout.tile_width
    for i, head, block in ((i, x, y) for i in range(b) for x in range(hl) for y in range(nq)):
        row = layout.tiles[i, head, block, : layout.tile_count[i, head, block]].tolist()
        rows = [r for r in range(block * 64 - layout.q_offset, (block + 1) * 64 - layout.q_offset) if 0 <= r < n]
        ends = [min(m, m - n + r + 1) if layout.causal else m for r in rows]  # keys before it are seen
        used = [s for s in row if s < max(ends)]
        bad = [j for j, s in enumerate(used) if s + width > min(ends) or (j + 1 < len(row) and s + width > row[j + 1])]
        fill = 64 // width  # steps from the end; the tile that does not fill one comes first, and is masked
        odd, masked = len(used) % fill, len(used) - bad[0] if bad else 0
        steps = odd + sum(masked > odd + fill * step for step in range(len(used)))
        plan[i, head, block, :2] = torch.tensor([len(used), steps])
        if layout.entries is not None:
            keys = layout.entries[i, head, block, : layout.entry_count[i, head, block]]
            plan[i, head, block, 2:] = torch.tensor([int((keys < max(ends)).sum()), int((keys < min(ends)).sum()) // 64])
    return plan


def emulate(q, k, v, layout, scale, ctas):
    """`private_kernel` with the arguments of its launch, tensors replaced by what the emulator takes for them."""
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    tiles, counts, columns, _ = private.lists(layout)
    width = 64 if layout.tiles is None else layout.tile_width
    plan = plan_of(replace(layout, tiles=tiles, tile_count=counts, tile_width=width))
    work = private.Private(torch.zeros(1, dtype=torch.int32), tiles, plan, columns, width)
    args, options = private.arguments(q, k, v, out, lse, layout, work, scale)
    given = [
        emulator.Descriptor(a.base, a.block_shape) if isinstance(a, TensorDescriptor)
        else emulator.Pointer(memory(a)) if isinstance(a, torch.Tensor) else a for a in args
    ]  # fmt: skip
    options = {k: v for k, v in options.items() if k not in ("num_warps", "maxnreg", "enable_fp_fusion")}
    emulator.launch(KERNEL.private_kernel, min(ctas, private.grid(q, layout)), *given, **{**options, "FLAT": None})
    return out, lse


def memory(t):
    """The elements behind a tensor, from its first one on."""
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((size,), (1,))


def check(layout, g, d, dtype=torch.bfloat16, ctas=2, scale=None, rows_first=False):
    b, h, n, m = layout.shape
    gen = torch.Generator().manual_seed(n + m)
    q, k, v = (torch.randn(b, x, y, d, generator=gen).to(dtype) for x, y in ((h, n), (g, m), (g, m)))
    if rows_first:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    scale = scale or 1 / math.sqrt(d)
    out, lse = emulate(q, k, v, layout, scale, ctas)
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert bool(torch.isfinite(out).all())
    dead = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead) and bool((out[dead] == 0).all())
    torch.testing.assert_close(lse[~dead].double(), want_lse[~dead], atol=1e-5, rtol=1e-5)
    assert float((out.double() - want).norm()) <= 4e-3 * float(want.norm())
    return out


# ---------------------------------------------------------------------- the kernel's source on the CPU
@pytest.mark.parametrize("b,h,g,hl,n,m,d,causal,skew", [
    (1, 4, 1, 4, 330, 330, 128, True, 0), (2, 2, 2, 2, 150, 420, 64, True, 37), (1, 2, 1, 2, 200, 130, 64, True, 0),
    (1, 4, 2, 2, 130, 260, 64, False, 0),
])  # fmt: skip
def test_lists_under_the_emulator(b, h, g, hl, n, m, d, causal, skew):
    check(listed(n, b, hl, h, n, m, causal=causal, skew=skew), g, d, rows_first=skew > 0)


@pytest.mark.parametrize("b,h,g,hl,n,m,d,causal,skew,columns", [
    (1, 4, 1, 4, 250, 330, 128, True, 0, 90), (2, 2, 2, 2, 150, 420, 64, True, 37, 200),
    (1, 2, 1, 2, 200, 130, 64, True, 0, 70), (1, 4, 2, 2, 130, 260, 64, False, 0, 30),
])  # fmt: skip
def test_columns_under_the_emulator(b, h, g, hl, n, m, d, causal, skew, columns):
    check(listed(n, b, hl, h, n, m, causal=causal, skew=skew, columns=columns), g, d)


def test_columns_alone_under_the_emulator():
    layout = listed(3, 1, 2, 2, 200, 600, share=0.0, columns=200)
    check(layout, 1, 128)
    check(replace(layout, tiles=None, tile_count=None, tile_width=1), 1, 64)


def test_unaligned_and_overlapping_tiles_under_the_emulator():
    tiles = torch.tensor([[[[0, 20, 64, 90, 300], [3, 64, 128, 250, 310], [7, 8, 1 << 20, 1, 1]]]])
    layout = Layout.lists((1, 1, 150, 350), block_q=64, tile_width=64, tiles=tiles, tile_count=torch.tensor([[[5, 5, 2]]]))
    check(layout, 1, 64, ctas=3)


def test_one_tile_and_long_lists_under_the_emulator():
    check(listed(1, 1, 1, 1, 60, 900, share=1.0, holes=False), 1, 128, dtype=torch.float16, scale=3.0)  # ring goes round
    out = check(listed(2, 1, 2, 2, 130, 130, share=0.0), 1, 64)
    assert bool((out == 0).all())


# ---------------------------------------------------------------------- tiles of 32 keys
@pytest.mark.parametrize("b,h,g,hl,n,m,d,causal,skew", [
    (1, 4, 1, 4, 330, 330, 128, True, 0), (2, 2, 2, 2, 150, 420, 64, True, 37), (1, 2, 1, 2, 130, 100, 64, False, 0),
])  # fmt: skip
def test_tiles_of_32_under_the_emulator(b, h, g, hl, n, m, d, causal, skew):
    layout = listed(n, b, hl, h, n, m, causal=causal, skew=skew, share=0.5, width=32)
    assert bool((layout.tile_count % 2 == 1).any()) and bool((layout.tile_count > 1).any())
    check(layout, g, d)


def test_any_number_of_tiles_of_32_wherever_they_begin():
    """Lists of 0 to 7 tiles that overlap or are named twice: the half of a step that holds none is hidden."""
    gaps = torch.randint(0, 60, (1, 8, 1, 7), generator=torch.Generator().manual_seed(0))
    gaps[..., 3] = 20  # where two full steps meet, and where a lone tile and a full step of lists of 4 do
    tiles = gaps.cumsum(-1).int()
    tiles[:, 3, :, 1], tiles[:, 6, :, 5] = tiles[:, 3, :, 0], tiles[:, 6, :, 4]
    count = torch.arange(8, dtype=torch.int32).view(1, 8, 1)
    layout = Layout.lists((1, 8, 60, 400), block_q=64, tile_width=32, tiles=tiles, tile_count=count, validate=False)
    out = check(layout, 2, 64, ctas=3)
    assert bool((out[:, 0] == 0).all())


def test_keys_of_unlisted_tiles_of_32_do_not_matter():
    layout = listed(9, 1, 2, 2, 150, 600, share=0.2, holes=False, width=32)
    named = torch.zeros(1, 2, 600, dtype=torch.bool)
    for start in range(0, 600, 32):
        named[:, :, start : start + 32] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((~named).any()) and bool((layout.tile_count % 2 == 1).any())
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, x, 64, generator=gen).bfloat16() for x in (150, 600, 600))
    clean = emulate(q, k, v, layout, 0.1, 2)
    dirty = emulate(q, *(t.masked_fill(~named[..., None], float("nan")) for t in (k, v)), layout, 0.1, 2)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


# ---------------------------------------------------------------------- the plan
PLAN_SCRIPT = """
import torch
from foveate.kernels.gluon.private import prepare
from foveate.layout import Layout
from tests.test_gluon_private import listed, plan_of
cpu = torch.device("cpu")
for seed, (n, m, skew) in enumerate(((64, 64, 0), (200, 500, 13), (130, 64, 0), (65, 900, 63))):
    for causal in (True, False):
        for width, columns in ((64, 0), (64, m // 3), (32, 0)):
            layout = listed(seed, 1 + seed % 2, 2, 4, n, m, causal=causal, skew=skew, columns=columns, width=width)
            work = prepare(layout, cpu)
            assert work.width == width
            assert torch.equal(work.plan, plan_of(layout)), (n, m, causal, work.plan, plan_of(layout))
            assert int(work.counter) == 0
tiles = torch.tensor([[[[0, 96, 200, 230, 500]]]])  # unaligned, overlapping, past what the rows see
for width in (64, 32):
    layout = Layout.lists((1, 1, 60, 600), block_q=64, tile_width=width, tiles=tiles)
    assert torch.equal(prepare(layout, cpu).plan, plan_of(layout))
empty = Layout.lists((1, 1, 60, 600), block_q=64, tile_width=64, tiles=tiles[..., :0])
assert prepare(empty, cpu).plan.eq(0).all()
print("same")
"""


def test_plan_kernel_under_the_interpreter():
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PLAN_SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


# ---------------------------------------------------------------------- compilation
def test_compiles_for_hopper(tmp_path):
    """With columns, which need more registers; `tests/gpu` looks at the spills of the others."""
    triton = pytest.importorskip("triton")
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        pytest.skip("this Triton ships no nvdisasm")
    from foveate.kernels.gluon.shim import compile_sm90

    def meta(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = meta(1, 4, 4096, 128, dtype=torch.bfloat16), meta(1, 2, 4096, 128, dtype=torch.bfloat16)
    work = private.Private(meta(1), meta(1, 4, 64, 64), meta(1, 4, 64, 4), meta(1, 4, 64, 900))
    layout = listed(0, 1, 4, 4, 256, 256)
    lse = meta(1, 4, 4096, dtype=torch.float32)
    built = compile_sm90(private.private_kernel, *private.arguments(q, k, k, q, lse, layout, work, 0.1))
    assert built.metadata.shared <= SHARED
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    sass = subprocess.run([nvdisasm, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"\bHGMMA\.(\S+) R\d+, (\S+),", sass)
    assert len(products) == 2 * (3 * 8 + 2 * 4)  # 3 Q K^T and 2 P V a warpgroup
    assert all(left.startswith("R") for _, left in products)  # Q and P are registers
    assert not re.search(r"\b(LDL|STL)\b", sass), "spills"
    between = [len(re.findall("FMNMX", s)) for s in re.findall(r"gsb0, 0x1(.*?)gsb0, 0x0", sass, re.DOTALL)]
    assert sum(n >= 60 for n in between) == 2, "the wait for P V moved in front of the row maximum of the inner loop"
