"""The Gluon backend without a GPU: it compiles for Hopper without spills, its source runs right under the emulator."""

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
    from foveate.kernels.gluon import factored, launch, prepare
    from foveate.kernels.gluon.prepare import Work
    from foveate.kernels.gluon.shim import TensorDescriptor
except (ImportError, AttributeError):  # no Triton, or one whose Gluon the shim does not know
    launch = None

SOURCE = Path(gluon.__file__).parent / "kernel.py"
SHARED = 232_448  # bytes of shared memory a CTA may have on Hopper


# ---------------------------------------------------------------------- what it refuses
def _call(n=256, d=64, dtype=torch.bfloat16, dv=None, layout=None, g=2, **kv):
    q = torch.zeros(1, 4, n, d, dtype=dtype)
    view = KV.dense(torch.zeros(1, g, n, d, dtype=dtype), torch.zeros(1, g, n, dv or d, dtype=dtype), **kv)
    return q, view, layout or Layout.dense(1, 4, n, n)


def _tiles(n=256, width=128, block_q=128, **more):
    mask = torch.ones(1, 4, -(-(n + more.get("q_offset", 0)) // block_q), -(-n // width), dtype=torch.bool)
    return Layout.from_block_mask(mask, n, n, block_q=block_q, block_k=width, **more)


COLUMN = torch.zeros(1, 4, 2, 1, dtype=torch.int32)


def _later(n, offset=128):
    """A chunk that begins at a later row of a query block of 256."""
    return _tiles(n, block_q=256, q_offset=offset)


def _with_rule():
    return Layout.lists((1, 4, 256, 256), block_q=128, entries=COLUMN, sink=4)


def _narrow_and_keys():
    return replace(_tiles(width=32), entries=COLUMN, entry_count=COLUMN[..., 0])


def _factored(n=256, **more):
    return Layout.factored((1, 4, n, n), diagonals=COLUMN[..., 0], columns=COLUMN[..., 0], **more)


REFUSED = {
    "mass": (_call(), Want(mass=True), "mass"),
    "softcap": (_call(), Want(softcap=True), "softcap"),
    "stride": (_call(layout=Layout.static((1, 4, 256, 256), sink=4, stride=3)), Want(), "not strides"),
    "two-sided rule": (_call(layout=Layout.static((1, 4, 256, 256), window=64, causal=False)), Want(), "causal"),
    "rule and lists": (_call(layout=_with_rule()), Want(), "not both"),
    "few rows of a rule": (_call(n=100, layout=Layout.static((1, 4, 100, 100), window=64)), Want(), "100 query rows"),
    "factored, width": (_call(layout=_factored(tile_width=32)), Want(), "tiles of 64 keys, not 32"),
    "factored, block_q": (_call(layout=_factored(block_q=32)), Want(), "128 rows (or 64) from row 0, not 32"),
    "factored, offset": (_call(layout=_factored(q_offset=7)), Want(), "not 64 from -7"),
    "factored, not causal": (_call(layout=replace(_factored(), causal=False)), Want(), "factored parts are causal"),
    "factored, few rows": (_call(n=100, layout=_factored(100)), Want(), "100 query rows"),
    "factored, cpu": (_call(layout=_factored()), Want(), "Hopper"),
    "block_q": (_call(layout=_tiles(block_q=32)), Want(), "rows, not 32"),
    "64 rows, own lists": (_call(layout=_tiles(block_q=64)), Want(), "heads of a group share"),
    "width": (_call(layout=_tiles(width=16)), Want(), "tiles of 32, 64 and 128 keys, not 16"),
    "groups of 192 rows": (_call(layout=_tiles(block_q=192)), Want(), "64, 128, 256, 384 ... rows, not 192"),
    "few rows of a chunk": (_call(n=20, layout=_later(20)), Want(), "20 query rows that begin inside"),
    "cut tile": (_call(n=70, layout=_tiles(70, q_offset=7)), Want(), "q_offset must be a multiple of 128, not 7"),
    "cut tile of a group": (_call(n=70, layout=_later(70, 200)), Want(), "q_offset must be a multiple of 128, not 200"),
    "cut block, 128 wide": (_call(n=70, layout=_tiles(70, block_q=64, q_offset=7)), Want(), "32 or 64 keys, or q_offset 0"),
    "32 wide and keys": (_call(layout=_narrow_and_keys()), Want(), "tiles of 32 keys or single keys, not both"),
    "chunk, cpu": (_call(n=70, layout=_later(70)), Want(), "Hopper"),
    "cut block of 64 rows, cpu": (_call(n=70, layout=_tiles(70, 64, 64, q_offset=7)), Want(), "Hopper"),
    "64 rows, own narrow lists, cpu": (_call(layout=_tiles(width=32, block_q=64)), Want(), "Hopper"),
    "groups, cpu": (_call(layout=_tiles(block_q=256, width=32)), Want(), "Hopper"),
    "len": (_call(len=torch.full((1, 2), 200)), Want(), "different length"),
    "bias": (_call(bias=torch.zeros(1, 2, 256)), Want(), "entry weights"),
    "pos": (_call(pos=torch.arange(256).expand(1, 2, 256)), Want(), "positions"),
    "fp32": (_call(dtype=torch.float32), Want(), "bf16 and fp16, not float32"),
    "head dim": (_call(d=96), Want(), "not 96"),
    "value dim": (_call(d=64, dv=128), Want(), "not 64 and 128"),
    "cpu": (_call(layout=_tiles(width=64)), Want(lse=True), "Hopper"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason(name):
    call, want, reason = REFUSED[name]
    assert reason in gluon.supports(*call, want)


# ---------------------------------------------------------------------- compilation
def _tool(*names):
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = [folder / n for n in names if (folder / n).exists()]
    if not found:
        pytest.skip(f"this Triton ships none of {', '.join(names)}")
    return found


@pytest.mark.parametrize("dtype,d,kind", [
    (torch.bfloat16, 128, "fours"), (torch.float16, 64, "dense"), (torch.bfloat16, 128, "pairs and columns"),
    (torch.bfloat16, 64, "rule"), (torch.bfloat16, 128, "factored"), (torch.bfloat16, 64, "factored"),
])  # fmt: skip
def test_compiles_for_hopper_without_spills(dtype, d, kind, tmp_path):
    nvdisasm = _tool("nvdisasm")[0]
    ptxas = _tool("ptxas", "ptxas-blackwell")
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    from foveate.kernels.gluon.kernel import attend_kernel
    from foveate.kernels.gluon.launch import arguments
    from foveate.kernels.gluon.prepare import Work
    from foveate.kernels.gluon.shim import compile_sm90

    def meta(*shape, dtype=torch.int32):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = meta(1, 4, 4096, d, dtype=dtype), meta(1, 2, 4096, d, dtype=dtype)
    tiles = meta(1, 4, 32, 64)
    work = {
        "fours": Work(meta(1), tiles, meta(1, 4, 32, 2), 1, width=32),
        "pairs": Work(meta(1), tiles, meta(1, 4, 32, 2), 1, width=64),
        "pairs and columns": Work(meta(1), tiles, meta(1, 4, 32, 4), 1, meta(1, 4, 32, 900), 64),
        "factored": Work(
            meta(1), tiles, meta(1, 4, 32, 4), 1, meta(1, 4, 32, 900), 64, cover=meta(1, 4, 4225, dtype=torch.uint8)
        ),
        "rule": Work(meta(1), tiles, meta(1, 4, 1, 2), 1, rule=True),
        "dense": Work(meta(1), tiles, tiles, 1),
    }[kind]
    layout = Layout.dense(1, 4, 256, 256, causal=False) if kind == "dense" else _tiles(width=64)
    built = compile_sm90(attend_kernel, *arguments(q, k, k, q, meta(1, 4, 4096, dtype=torch.float32), layout, work, 0.1))
    assert built.metadata.shared <= SHARED
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
    sass = subprocess.run([nvdisasm, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bHGMMA", sass)) == 2 * (3 * 8 * d // 128 + 2 * 8)  # 3 Q K^T and 2 P V a warpgroup
    assert re.search(r"\bUTMALDG\.4D", sass) and re.search(r"\bUTMASTG\.4D", sass)
    gathers = len(re.findall(r"\bLDGSTS\.E\.BYPASS\.128", sass))  # K, V, the last V: 8 rows of D / 64 pieces a thread
    assert gathers == (3 * 8 * d // 64 if work.columns is not None else 0)
    words = 12 if work.columns is not None else 0  # spilled outside the inner loops (3.9; one of a tile on 3.6)
    if not words:
        assert not re.search(r"\b(LDL|STL)\b", sass), "spills"
    for tool in ptxas:  # one of them knows the PTX version
        command = [tool, "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "again.cubin"]
        log = subprocess.run(command, capture_output=True, text=True)
        if log.returncode == 0:
            assert int(re.search(r"(\d+) bytes spill stores", log.stderr)[1]) <= 4 * words
            assert not re.search(r"C75\d\d|serializ", log.stderr), log.stderr
            return
    pytest.skip("no ptxas here reads this PTX")


# ---------------------------------------------------------------------- the lists
def tiles_of_rows(layout):
    """(rows of a tile in one head, tiles of a head, row of lists of each tile)."""
    rows = 64 if layout.block_q == 64 else 128
    assert layout.q_offset % rows == 0
    tiles = -(-layout.shape[2] // rows)
    return rows, tiles, [(layout.q_offset + i * rows) // layout.block_q for i in range(tiles)]


def plan_of(layout):
    """What `plan_kernel` computes of lists of tiles, entry by entry."""
    width, (b, hl, _) = layout.tile_width, layout.tile_count.shape
    _, tiles, lines = tiles_of_rows(layout)
    plan = torch.zeros(b, hl, tiles, 2, dtype=torch.int32)
    for i in range(b):
        for h in range(hl):
            for block, line in enumerate(lines):
                row = layout.tiles[i, h, line, : layout.tile_count[i, h, line]].tolist()
                first, last = seen_by(layout, block)
                used = [s for s in row if s <= last]
                masked = 0  # entries from the end that hold a key some row must not see, or that a later one owns
                for j, s in enumerate(used):
                    if s + width - 1 > first or (j + 1 < len(row) and s + width > row[j + 1]):
                        masked = max(masked, len(used) - j)
                fill = 128 // width  # steps from the end; the entries that do not fill one come first, and are masked
                odd = len(used) % fill
                steps = (odd > 0) + sum(masked > odd + fill * step for step in range(len(used)))
                plan[i, h, block] = torch.tensor([len(used), max(steps, 1)])
    return plan


def seen_by(layout, block):
    """The last keys that the first and the last row of a tile see."""
    _, _, n, m = layout.shape
    if not layout.causal:
        return m - 1, m - 1
    rows = tiles_of_rows(layout)[0]
    return min(m - n + block * rows, m - 1), m - n + min((block + 1) * rows, n) - 1


def column_plan(layout, columns, counts):
    """What `plan_kernel` computes of single keys: those that some row sees, whole steps that every row sees."""
    b, hl, _ = counts.shape
    _, tiles, lines = tiles_of_rows(layout)
    plan = torch.zeros(b, hl, tiles, 2, dtype=torch.int32)
    for i in range(b):
        for h in range(hl):
            for block, line in enumerate(lines):
                row = columns[i, h, line, : counts[i, h, line]].tolist()
                first, last = seen_by(layout, block)
                plan[i, h, block, 0] = sum(x <= last for x in row)
                plan[i, h, block, 1] = sum(x <= first for x in row) // 128
    return plan


def random_lists(seed, b, hl, h, n, m, width, causal, density):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, hl, -(-n // 128), -(-m // width), generator=gen) < density
    layout = Layout.from_block_mask(mask, n, m, block_q=128, block_k=width, heads=h, causal=causal)
    unused = torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, 1 << 28)  # whatever an unused slot holds must not matter
    return layout


PLAN_SCRIPT = """
import torch
from foveate.kernels.gluon.prepare import prepare
from foveate.layout import Layout
from tests.test_gluon_compile import plan_of, random_lists
seed = 0
for n, m in ((128, 128), (300, 300), (200, 700), (130, 64), (513, 20000)):
    for width in (64, 128):
        for causal in (True, False):
            seed += 1
            b, hl = ((1, 4), (2, 2))[seed // 2 % 2]
            layout = random_lists(seed, b, hl, 4, n, m, width, causal, 0.5)
            work = prepare(layout, torch.device("cpu"))
            assert torch.equal(work.plan, plan_of(layout)), (n, m, width, causal, work.plan, plan_of(layout))
            assert int(work.counter) == 0 and work.share == 4 // hl
tiles = torch.tensor([[[[0, 96, 200, 264, 500]]]])  # unaligned, overlapping
for width in (64, 128):
    layout = Layout.lists((1, 1, 100, 600), block_q=128, tile_width=width, tiles=tiles)
    assert torch.equal(prepare(layout, torch.device("cpu")).plan, plan_of(layout))
print("same")
"""


def test_plan_kernel_under_the_interpreter():
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PLAN_SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


# ---------------------------------------------------------------------- the kernel's source on the CPU
KERNEL = emulator.load_kernel(SOURCE)


NOTHING = torch.zeros(1, 1, 1, 1, dtype=torch.int32)


def work_of(layout):
    """What `prepare` makes of a layout, without its kernel."""
    if layout.full:
        return Work(NOTHING, NOTHING, NOTHING, 1)
    if layout.has_rule:
        return prepare.rule(layout, NOTHING)
    if layout.diagonals is not None or layout.columns is not None:
        return factored_work(layout)
    tiles, counts, columns, column_counts = prepare.lists(layout)
    width = 128 if layout.tiles is None else layout.tile_width
    plan = plan_of(replace(layout, tiles=tiles, tile_count=counts, tile_width=width))
    if columns is not None:
        plan = torch.cat([plan, column_plan(layout, columns, column_counts)], -1)
    rows = tiles_of_rows(layout)[0]
    return Work(
        NOTHING, tiles, plan, layout.shape[1] // counts.shape[1], columns, width, block=rows, group=layout.block_q // rows,
        ahead=layout.q_offset // rows,
    )  # fmt: skip


def factored_work(layout):
    """What `factored` makes of diagonals and columns, key by key."""
    diagonals, counts, columns, column_counts = factored.parts(layout)
    b, hl = counts.shape
    _, h, n, m = layout.shape
    lag, nq = 128 - layout.block_q, -(-n // 128)
    cover = torch.zeros(b, hl, m + 129, dtype=torch.uint8)
    tiles = torch.full((b, hl, 2 * diagonals.shape[-1] + 1), 1 << 28, dtype=torch.int32)
    plan = torch.zeros(b, hl, nq, 4, dtype=torch.int32)
    for i in range(b):
        for head in range(hl):
            own = diagonals[i, head, : counts[i, head]].tolist()
            reached = {x for d in own for x in range(d + 1, d + 65)}
            cover[i, head, [x for x in reached if x < m + 129]] = 1
            all_ = own + [d + 64 for j, d in enumerate(own) if lag and (j + 1 == len(own) or own[j + 1] > d + 64)]
            words = []
            for j, d in enumerate(sorted(all_)):
                x = range(d + 1, d + 65)
                whole = {*x, *(y - lag for y in x)} <= {y for y in reached if y < m + 129} and x[-1] < m + 129
                words.append(2 * d - (not whole or (j > 0 and d < (words[-1] + 1) // 2 + 64)))
            tiles[i, head, : len(words)] = torch.tensor(words, dtype=torch.int32)
            single = columns[i, head, : column_counts[i, head]].tolist()
            for block in range(nq):
                end, close = m - n + block * 128 + 128, m - n + min(block * 128 + 128, n)
                starts = [end - d - 64 for d in sorted(all_)]
                skip = sum(s >= close for s in starts)
                live = sum(s + 64 > 0 for s in starts)
                plan[i, head, block, :3] = torch.tensor([max(live - skip, 0), skip, sum(c < close for c in single)])
    lists = (factored.shared(t, nq) for t in (tiles, columns))
    return Work(NOTHING, next(lists), plan, h // hl, next(lists), 64, cover=cover, lag=lag)


def emulate(q, k, v, layout, scale, ctas):
    """`attend_kernel` with the arguments of `launch`, tensors replaced by what the emulator takes for them."""
    if launch is None:
        pytest.skip(gluon._missing() or "no Gluon")
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    work = work_of(layout)
    work = replace(work, counter=torch.zeros(1, dtype=torch.int32))
    args, options = launch.arguments(q, k, v, out, lse, layout, work, scale)
    given = [
        emulator.Descriptor(a.base, a.block_shape) if isinstance(a, TensorDescriptor)
        else emulator.Pointer(memory(a)) if isinstance(a, torch.Tensor) else a for a in args
    ]  # fmt: skip
    options = {k: v for k, v in options.items() if k not in ("num_warps", "maxnreg", "enable_fp_fusion")}
    emulator.launch(KERNEL.attend_kernel, min(ctas, launch.grid(q, work)), *given, **{**options, "FLAT": None})
    return out, lse


def memory(t):
    """The elements behind a tensor, from its first one on."""
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((size,), (1,))


def check(layout, g, d, dtype=torch.bfloat16, ctas=3, scale=None):
    b, h, n, m = layout.shape
    gen = torch.Generator().manual_seed(n + m)
    q, k, v = (torch.randn(b, x, y, d, generator=gen).to(dtype) for x, y in ((h, n), (g, m), (g, m)))
    scale = scale or 1 / math.sqrt(d)
    out, lse = emulate(q, k, v, layout, scale, ctas)
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert bool(torch.isfinite(out).all())
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    dead = want_lse.isneginf()
    assert bool((out[dead] == 0).all())
    torch.testing.assert_close(lse[~dead].double(), want_lse[~dead], atol=1e-5, rtol=1e-5)
    assert float((out.double() - want).norm()) <= 4e-3 * float(want.norm())
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("b,h,g,hl,n,m,d", [
    (2, 4, 2, 4, 300, 300, 64), (1, 4, 1, 1, 257, 520, 128), (1, 2, 2, 2, 100, 513, 64), (1, 2, 1, 2, 300, 100, 64),
])  # fmt: skip
def test_lists_under_the_emulator(causal, width, b, h, g, hl, n, m, d):
    check(random_lists(n + width, b, hl, h, n, m, width, causal, 0.6), g, d)


@pytest.mark.parametrize(
    "n,m,causal,d", [(130, 130, True, 128), (200, 333, True, 64), (200, 100, True, 64), (90, 200, False, 64)]
)
def test_dense_under_the_emulator(n, m, causal, d):
    check(Layout.dense(1, 2, n, m, causal=causal), 1, d, dtype=torch.float16)


def test_unaligned_and_overlapping_tiles_under_the_emulator():
    tiles = torch.tensor([[[[0, 70, 100, 200, 330], [10, 100, 164, 300, 480]]]])
    count = torch.tensor([[[4, 5]]])
    for width in (64, 128):
        layout = Layout.lists((1, 1, 200, 500), block_q=128, tile_width=width, tiles=tiles, tile_count=count)
        check(layout, 1, 64)


def test_empty_and_extreme_lists_under_the_emulator():
    mask = torch.zeros(1, 2, 3, 6, dtype=torch.bool)
    mask[:, 1, 2] = True  # one row of blocks owns everything
    out = check(Layout.from_block_mask(mask, 300, 380, block_q=128, block_k=64), 1, 64, ctas=5)
    assert bool((out[:, 0] == 0).all())
    check(Layout.from_block_mask(~mask, 300, 380, block_q=128, block_k=64), 2, 64, scale=3.0)
