"""dk and dv in Gluon without a GPU: the kernel compiles for Hopper without spills, its source runs right when emulated."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.kernels import gluon
from foveate.kv import KV
from foveate.layout import Layout
from foveate.lists import repeat_heads
from tests import gluon_emulator as emulator

SOURCES = [Path(gluon.__file__).parent / name for name in ("backward_kernel.py", "backward_queries.py")]
SHARED = 232_448  # bytes of shared memory a CTA may have on Hopper
KERNEL, QUERIES = emulator.load_backward(*SOURCES)
BITS = 24


# ---------------------------------------------------------------------- the kernel's source on the CPU
class Lists:
    """Inverse lists as `triton/inverse.py` describes them, entry by entry. size: entries of an item."""

    def __init__(self, layout: Layout, g: int, keys: int, size: int):
        b, h, n, m = layout.shape
        given = h if layout.full else layout.tiles.shape[1]
        self.lists = given // g if given % g == 0 else 1
        self.share = h // (g * self.lists)
        self.key_blocks = -(-m // keys)
        ids, self.offset, self.counts, cuts, items = [], [], [], [], []
        for key in range(b * g * self.key_blocks):
            lead, block = divmod(key, self.key_blocks)
            classes = ([], [], [])
            for i in range(self.lists):
                for row in range(layout.num_blocks):
                    kind = self.kind(layout, lead // g, (lead % g * self.lists + i) * self.share, row, block * keys, keys)
                    if kind is not None:
                        classes[kind].append(i << BITS | row)
            self.offset.append(len(ids))
            self.counts.append([len(classes[0]), len(classes[0]) + len(classes[1]), sum(map(len, classes))])
            ids += [*classes[0], *classes[1], *classes[2]]
            pieces = -(-self.counts[-1][2] // size) if self.counts[-1][2] > size else 0
            cuts.append([len(items), pieces])
            items += [key] * pieces
        as_int = lambda x: torch.tensor(x, dtype=torch.int32)  # noqa: E731
        self.ids, self.cuts, self.items = as_int([*ids, 1 << 28]), as_int(cuts), as_int([*items, 1 << 28])
        self.plan, self.counts, self.offset = as_int([size, len(items)]), as_int(self.counts), torch.tensor(self.offset)

    def kind(self, layout, b, head, row, key0, keys):
        """0: free, 1: cut by causality alone, 2: named in part, None: no row sees any key."""
        _, h, n, m = layout.shape
        first, last = m - n + row * layout.block_q, m - n + min(row * layout.block_q + layout.block_q, n) - 1
        if layout.causal and key0 > last:
            return None
        below = not layout.causal or key0 + keys - 1 <= first
        if layout.full:
            return 0 if below else 1
        at = (b if layout.tiles.shape[0] > 1 else 0, head * layout.tiles.shape[1] // h, row)
        starts = layout.tiles[at][: int(layout.tile_count[at])].tolist()
        if any(s <= key0 and s + layout.tile_width >= key0 + keys for s in starts):
            return 0 if below else 1
        return 2 if any(s < key0 + keys and s + layout.tile_width > key0 for s in starts) else None


def sums(q, k, v, dout, dlse, layout, scale):
    """(lse2 and delta on the padded grid, dk, dv, out, lse, dq); the gradients in fp64."""
    h = q.shape[1]
    q, k, v, dout = (t.double() for t in (q, k, v, dout))
    mask = layout.to_mask(KV.dense(k, v))
    s = (q @ repeat_heads(k, h).transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))
    lse = s.logsumexp(-1)
    dead = lse.isinf()
    p = torch.exp(s - lse.masked_fill(dead, 0)[..., None])
    dp = dout @ repeat_heads(v, h).transpose(-1, -2)
    delta = (p * dp).sum(-1) - dlse
    ds = p * (dp - delta[..., None]) * scale
    pad = layout.num_blocks * layout.block_q
    lse2 = torch.full((*q.shape[:2], pad), float("inf"))
    grid = torch.zeros_like(lse2)
    at = slice(layout.q_offset, layout.q_offset + q.shape[2])
    lse2[..., at] = (lse / math.log(2)).float().masked_fill(dead, float("inf"))
    grid[..., at] = delta.float()
    fold = lambda t: t.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
    dk, dv = fold(ds.transpose(-1, -2) @ q), fold(p.transpose(-1, -2) @ dout)
    return torch.stack([lse2, grid]), dk, dv, p @ repeat_heads(v, h), lse.float(), ds @ repeat_heads(k, h)


def emulate(layout: Layout, g: int, d: int, dtype=torch.bfloat16, ctas=3, size=1 << 20, seed=0):
    """Relative errors of dk and dv, items of cut blocks added, keys that no row sees NaN."""
    b, h, n, m = layout.shape
    if layout.full:
        layout = replace(layout, block_q=128, q_offset=0, tile_width=128)
    keys = min(layout.tile_width, 128)
    gen = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(b, x, y, d, generator=gen).to(dtype) for x, y in ((h, n), (g, m), (g, m), (h, n)))
    dlse = torch.randn(b, h, n, generator=gen)
    scale = 1 / math.sqrt(d)
    stats, want_k, want_v, out, lse, want_q = sums(q, k, v, dout, dlse, layout, scale)
    unseen = ~layout.to_mask(KV.dense(k, v)).any(2).unflatten(1, (g, -1)).any(2)
    k[unseen], v[unseen] = float("nan"), float("nan")
    if layout.block_q == 128:
        queries(layout, q, k, v, dout, out.to(dtype), lse, dlse, scale, ctas, stats, want_q)
    lists = Lists(layout, g, keys, size)
    dk, dv = (torch.full((b, g, m, d), float("nan"), dtype=dtype) for _ in range(2))
    part = torch.full((max(1, int(lists.plan[1])) * keys * 2 * d,), float("nan"))
    tiles, count, width, per = lists.plan, lists.plan, 0, 1
    if not layout.full:
        tiles, count, width = layout.tiles.contiguous(), layout.tile_count.contiguous(), layout.tiles.shape[-1]
        per = h // tiles.shape[1]
    pointer = lambda t: emulator.Pointer(t.reshape(-1))  # noqa: E731
    emulator.launch(
        KERNEL.keys_kernel, ctas,
        *(emulator.Descriptor(t, [1, 1, 64, d]) for t in (q, dout, k, v)), Output(dk), Output(dv), pointer(part),
        pointer(torch.zeros(1, dtype=torch.int32)), pointer(tiles), pointer(count), layout.num_blocks, width,
        *(pointer(t) for t in (lists.ids, lists.offset, lists.counts, lists.cuts, lists.items, lists.plan, stats)),
        scale, g, n, m, lists.key_blocks, lists.key_blocks * b * g, layout.q_offset, FLAT=None, KEYS=keys,
        WIDTH=layout.tile_width, INNER=layout.block_q // 64 * lists.share, GROUP=h // g, SHARE=lists.share,
        MANY=int(tiles.shape[0] > 1), PER=per, BITS=BITS, CAUSAL=layout.causal, FULL=layout.full,
        D=d, STAGES=3 if keys == 128 else 5,
    )  # fmt: skip
    part = part.view(-1, keys, 2, d)
    for key, (first, pieces) in enumerate(lists.cuts.tolist()):
        if pieces:
            lead, block = divmod(key, lists.key_blocks)
            rows = min(keys, m - block * keys)
            total = part[first : first + pieces, :rows].sum(0).to(dtype)
            for i, grad in enumerate((dk, dv)):
                grad[lead // g, lead % g, block * keys : block * keys + rows] = total[:, i]
    for name, got, want in (("dk", dk, want_k), ("dv", dv, want_v)):
        assert bool(torch.isfinite(got).all()), f"{name} was not written, or NaN reached it"
        assert bool((got[unseen] == 0).all())
        limit = 6e-3 if dtype == torch.bfloat16 else 1.5e-3
        off = float((got.double() - want).norm() / want.norm().clamp(min=1e-9))
        assert off <= limit, f"{name} is off by {off}"
    return lists


def queries(layout, q, k, v, dout, out, lse, dlse, scale, ctas, stats, want):
    """Checks dq, and the stats that its pass leaves for the other."""
    b, h, n, d = q.shape
    g, m = k.shape[1:3]
    dq, left = torch.full_like(q, float("nan")), torch.full_like(stats, float("nan"))
    tiles, count, width, per = *[torch.zeros(1, dtype=torch.int32)] * 2, 0, 1
    if not layout.full:
        tiles, count, width = layout.tiles.contiguous(), layout.tile_count.contiguous(), layout.tiles.shape[-1]
        per = h // tiles.shape[1]
    pointer = lambda t: emulator.Pointer(t.reshape(-1))  # noqa: E731
    emulator.launch(
        QUERIES.queries_kernel, ctas, *(emulator.Descriptor(t, [1, 1, 64, d]) for t in (q, dout, out, k, v)),
        pointer(lse), pointer(dlse), Output(dq), pointer(left), pointer(torch.zeros(1, dtype=torch.int32)),
        pointer(tiles), pointer(count), scale, g, n, m, layout.num_blocks, b * h, layout.q_offset, width, FLAT=None,
        WIDTH=layout.tile_width, GROUP=h // g, MANY=int(tiles.shape[0] > 1), PER=per, CAUSAL=layout.causal,
        FULL=layout.full, D=d, STAGES=4,
    )  # fmt: skip
    assert bool(torch.isfinite(dq).all()), "dq was not written, or NaN reached it"
    limit = 6e-3 if q.dtype == torch.bfloat16 else 1.5e-3
    off = float((dq.double() - want).norm() / want.norm().clamp(min=1e-9))
    assert off <= limit, f"dq is off by {off}"
    torch.testing.assert_close(left[0], stats[0])
    torch.testing.assert_close(left[1], stats[1], atol=2e-2, rtol=2e-2)  # out is rounded to the dtype of q


class Output(emulator.Pointer):
    """A pointer whose element type can be asked for."""

    def __init__(self, tensor, offset=0):
        super().__init__(tensor.view(-1), offset)
        self.dtype = type("Element", (), {"element_ty": tensor.dtype})


def random_lists(seed, b, hl, h, n, m, width, causal=True, density=0.5, block_q=128, offset=0):
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, hl, -(-(n + offset) // block_q), -(-m // width), generator=gen) < density
    layout = Layout.from_block_mask(mask, n, m, block_q=block_q, block_k=width, heads=h, causal=causal, q_offset=offset)
    unused = torch.arange(layout.tiles.shape[-1]) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, 1 << 28)  # whatever an unused slot holds must not matter
    return layout


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("causal,b,h,g,hl,n,m,d", [
    (True, 2, 4, 2, 4, 300, 300, 64), (False, 1, 4, 1, 1, 257, 520, 128), (True, 1, 2, 1, 2, 300, 100, 64),
    (True, 1, 6, 2, 2, 128, 513, 64),
])  # fmt: skip
def test_lists_under_the_emulator(width, causal, b, h, g, hl, n, m, d):
    emulate(random_lists(n + width, b, hl, h, n, m, width, causal), g, d)


@pytest.mark.parametrize("width", [128, 64])
def test_cut_key_blocks_under_the_emulator(width):
    layout = random_lists(3, 1, 4, 4, 600, 600, width, density=0.3)
    lists = emulate(layout, 1, 64, size=3)
    assert int(lists.plan[1]) > 4


@pytest.mark.parametrize("n,m,causal", [(130, 130, True), (200, 333, True), (200, 100, True), (90, 200, False)])
def test_dense_under_the_emulator(n, m, causal):
    emulate(Layout.dense(1, 2, n, m, causal=causal), 1, 64, dtype=torch.float16)


def test_blocks_of_other_sizes_under_the_emulator():
    emulate(random_lists(1, 1, 2, 2, 200, 300, 128, block_q=64), 1, 64)
    emulate(random_lists(2, 1, 2, 2, 400, 400, 256, block_q=256), 2, 64)
    emulate(random_lists(2, 1, 2, 2, 400, 400, 64, block_q=256), 1, 64)


@pytest.mark.parametrize("width", [128, 64])
def test_a_chunk_that_starts_inside_a_block_under_the_emulator(width):
    emulate(random_lists(5, 1, 2, 2, 300, 400, width, density=0.7, offset=20), 1, 64)


def test_unaligned_and_overlapping_tiles_under_the_emulator():
    tiles = torch.tensor([[[[0, 70, 100, 200, 330], [10, 100, 164, 300, 480]]]], dtype=torch.int32)
    count = torch.tensor([[[4, 5]]], dtype=torch.int32)
    for width in (64, 128):
        layout = Layout.lists((1, 2, 200, 500), block_q=128, tile_width=width, tiles=tiles, tile_count=count)
        lists = emulate(layout, 1, 64)
        assert bool((lists.counts[:, 2] > lists.counts[:, 1]).any())


@pytest.mark.parametrize("width", [128, 64])
def test_units_shorter_than_the_ring_under_the_emulator(width):
    """The producer could be several units ahead: what it waits for is that K and V of the unit before last are free."""
    emulate(random_lists(7, 1, 1, 1, 128, 1500, width, causal=False, density=0.4), 1, 64, ctas=1)


def test_empty_and_extreme_lists_under_the_emulator():
    mask = torch.zeros(1, 2, 3, 6, dtype=torch.bool)
    mask[:, 1, 2] = True  # one row of blocks owns everything
    for width in (64, 128):
        layout = Layout.from_block_mask(mask[..., : 384 // width], 300, 380, block_q=128, block_k=width)
        emulate(layout, 2, 64, ctas=5)
    emulate(Layout.from_block_mask(~mask, 300, 380, block_q=128, block_k=64), 2, 64)


# ---------------------------------------------------------------------- compilation and refusals
def _compiled(kernel, args, options, tmp_path):
    """(SASS, bytes of stack a thread)."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "nvdisasm").exists() or not (tools / "cuobjdump").exists():
        pytest.skip("this Triton ships no nvdisasm or cuobjdump")
    from foveate.kernels.gluon.shim import compile_sm90

    built = compile_sm90(kernel, args, options)
    assert built.metadata.shared <= SHARED
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    run = lambda *a: subprocess.run([*a, tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)  # noqa: E731
    sass = run(tools / "nvdisasm", "-c").stdout
    assert re.search(r"\bUTMALDG\.4D", sass)
    return sass, int(re.search(r"STACK:(\d+)", run(tools / "cuobjdump", "-res-usage").stdout)[1])


def _between_products(sass, first, last):
    """Moves to and from local memory between two of the products."""
    at = [found.start() for found in re.finditer(r"\bHGMMA", sass)]
    return len(re.findall(r"\b(LDL|STL)\b", sass[at[first] : at[last]]))


def _meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _meta_call(width):
    q, k = (_meta(1, h, 4096, 128, dtype=torch.bfloat16) for h in (8, 2))
    layout = Layout((1, 8, 4096, 4096), block_q=128, tile_width=width, tiles=_meta(1, 8, 32, 20), tile_count=_meta(1, 8, 32))
    return q, k, _meta(9, dtype=torch.float32), layout


@pytest.mark.parametrize("width", [128, 64])
def test_the_pass_over_keys_compiles_for_hopper(width, tmp_path):
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    from foveate.kernels.gluon import backward
    from foveate.kernels.gluon.backward_kernel import keys_kernel
    from foveate.kernels.triton.inverse import InverseLists

    q, k, sums, layout = _meta_call(width)
    words = _meta(64)
    lists = InverseLists(words, _meta(64, dtype=torch.int64), words, words, words, words, width, 4096 // width, 4, 1, 10)
    args, options = backward.arguments_keys(q, k, k, q, sums, k, k, sums, layout, lists, 0.1)
    sass, stack = _compiled(keys_kernel, args, options, tmp_path)
    # Of each warpgroup: S and dP (8 each) in the first step and two loops, dv and dk (4 each) in two loops and the end.
    assert len(re.findall(r"\bHGMMA", sass)) == 2 * (3 * 16 + 3 * 8)
    assert stack <= 160  # scalars, not sums
    assert _between_products(sass, 16, 39) <= 2  # the loop without masks


def test_the_pass_over_queries_compiles_for_hopper(tmp_path):
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    from foveate.kernels.gluon import backward
    from foveate.kernels.gluon.backward_queries import queries_kernel

    q, k, sums, layout = _meta_call(64)
    args, options = backward.arguments_queries(q, k, k, q, q, sums, sums, q, sums, layout, 0.1)
    sass, stack = _compiled(queries_kernel, args, options, tmp_path)
    # Of each warpgroup: S and dP (8 each) in the first step and two loops, dq (4) in two loops and the end.
    assert len(re.findall(r"\bHGMMA", sass)) == 2 * (3 * 16 + 3 * 4)
    assert stack <= 160 and _between_products(sass, 16, 35) <= 2


REFUSED = {
    "fp32": (dict(dtype=torch.float32), 128, 128, "bf16 and fp16, not float32"),
    "head dim": (dict(d=96), 128, 128, "not 96"),
    "value dim": (dict(dv=128), 128, 128, "not 64 and 128"),
    "width": (dict(), 128, 32, "tiles of 64, 128, 256 ... keys, not 32"),
    "block_q": (dict(), 32, 128, "query blocks of 64, 128, 256 ... rows"),
    "one step a block": (dict(), 64, 64, "query blocks of 128, 256, 512 ... rows"),
    "device": (dict(), 128, 64, "Hopper"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason(name):
    pytest.importorskip("triton")
    from foveate.kernels.gluon.backward import why_not

    more, block_q, width, reason = REFUSED[name]
    d, dtype = more.get("d", 64), more.get("dtype", torch.bfloat16)
    q, k, v = (torch.zeros(1, 2, 256, x, dtype=dtype) for x in (d, d, more.get("dv", d)))
    layout = random_lists(0, 1, 2, 2, 256, 256, width, block_q=block_q)
    assert reason in why_not(q, KV.dense(k, v), layout)


def test_two_numbers_a_row_stay_within_31_bits():
    pytest.importorskip("triton")
    from foveate.kernels.gluon.backward import why_not

    for h, reason in ((63, "Hopper"), (64, "2\\^30 rows of all heads")):
        q = torch.empty(1, h, 1 << 24, 64, dtype=torch.bfloat16, device="meta")
        assert re.search(reason, why_not(q, KV.dense(q, q), Layout.dense(1, h, 1 << 24, 1 << 24)))


def test_the_pass_over_queries_refuses_other_blocks():
    pytest.importorskip("triton")
    from foveate.kernels.gluon.backward import why_not_queries

    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    for block_q, reason in ((64, "128 rows, not 64"), (256, "128 rows, not 256"), (128, "Hopper")):
        assert reason in why_not_queries(q, KV.dense(q, q), random_lists(0, 1, 2, 2, 256, 256, 128, block_q=block_q))
