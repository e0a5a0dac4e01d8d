"""Lists that serve several tiles of rows, chunks that begin at a later one, and key tiles of 32, in the Gluon forward."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.kernels import gluon
from foveate.layout import Layout
from tests import test_gluon_compile as base
from tests.test_gluon_columns import listed
from tests.test_gluon_compile import check


def alone(layout, *, tiles):
    """The tiles or the single keys of a layout without the other."""
    if tiles:
        return replace(layout, entries=None, entry_count=None)
    return replace(layout, tiles=None, tile_count=None, tile_width=1)


# ---------------------------------------------------------------------- groups of rows
@pytest.mark.parametrize("b,h,g,hl,n,m,d,rows,width,offset", [
    (1, 2, 1, 2, 600, 600, 64, 256, 64, 0), (2, 2, 2, 1, 300, 640, 64, 384, 128, 0),
    (1, 2, 2, 2, 200, 700, 128, 512, 64, 128), (1, 2, 1, 1, 300, 420, 64, 384, 64, 256),
])  # fmt: skip
def test_one_list_for_several_tiles(b, h, g, hl, n, m, d, rows, width, offset):
    layout = listed(n, b, h, hl, n, m, rows=rows, width=width, columns=150, offset=offset)
    check(layout, g, d)
    check(alone(layout, tiles=True), g, d)


def test_groups_of_a_call_that_is_not_causal():
    check(listed(3, 1, 2, 2, 300, 300, rows=256, causal=False), 1, 64)


def test_single_keys_of_a_group_alone():
    check(alone(listed(1, 1, 2, 2, 400, 700, rows=256, columns=400), tiles=False), 1, 64)


def test_a_tile_walks_what_its_own_rows_see():
    """All keys in one list: 4 tiles of rows use 1, 2, 3 and 4 of its tiles, and the single keys before their last rows."""
    tiles = torch.arange(0, 512, 128, dtype=torch.int32).view(1, 1, 1, 4)
    layout = Layout.lists((1, 1, 512, 512), block_q=512, tile_width=128, tiles=tiles)
    assert base.work_of(layout).plan[0, 0].tolist() == [[1, 1], [2, 1], [3, 1], [4, 1]]
    check(layout, 1, 64)
    entries = torch.arange(0, 512, 2, dtype=torch.int32).view(1, 1, 1, -1)
    keys = Layout.lists((1, 1, 512, 512), block_q=512, entries=entries)
    assert base.work_of(keys).plan[0, 0].tolist() == [[0, 1, 64, 0], [0, 1, 128, 0], [0, 1, 192, 1], [0, 1, 256, 1]]


# ---------------------------------------------------------------------- chunks that begin at a later tile
@pytest.mark.parametrize("rows,offset,width", [(256, 128, 64), (384, 256, 32)])
def test_chunks_equal_the_whole(rows, offset, width):
    """The rows of a chunk see what they see in the whole call, and get the same result up to rounding."""
    n = m = 500
    whole = listed(rows + offset, 1, 2, 1, n, m, rows=rows, width=width, columns=60, holes=False)
    whole = whole if width > 32 else alone(whole, tiles=True)
    start = next(p for p in range(offset, n, rows) if p >= 100)
    block = start // rows
    cut = {
        name: getattr(whole, name)[:, :, block:].contiguous()
        for name in ("tiles", "tile_count", "entries", "entry_count") if getattr(whole, name) is not None
    }  # fmt: skip
    chunk = replace(whole, shape=(1, 2, n - start, m), q_offset=start % rows, **cut)
    assert chunk.q_offset == offset and torch.equal(chunk.to_mask(), whole.to_mask()[:, :, start:])
    check(chunk, 1, 64)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, x, n, 64, generator=gen).bfloat16() for x in (2, 1, 1))
    all_ = base.emulate(q, k, v, whole, 0.1, 2)
    part = base.emulate(q[:, :, start:], k, v, chunk, 0.1, 3)
    torch.testing.assert_close(part[0], all_[0][:, :, start:], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(part[1], all_[1][:, :, start:], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- tiles of 32 keys
@pytest.mark.parametrize("b,h,g,hl,n,m,d,rows", [
    (2, 2, 1, 2, 300, 300, 64, 128), (1, 4, 2, 2, 200, 513, 128, 64), (1, 2, 2, 1, 300, 170, 64, 256),
])  # fmt: skip
def test_tiles_of_32(b, h, g, hl, n, m, d, rows):
    for causal in (True, False) if rows == 128 else (True,):
        check(alone(listed(n, b, h, hl, n, m, rows=rows, width=32, causal=causal, share=0.5), tiles=True), g, d)


def test_any_number_of_tiles_of_32_wherever_they_begin():
    """Lists of 0 to 9 tiles that overlap or are named twice: the parts of a step that hold none are hidden."""
    gen = torch.Generator().manual_seed(0)
    gaps = torch.randint(0, 60, (1, 10, 1, 9), generator=gen)
    gaps[..., 4] = 20  # where two full steps of lists of 8 and 9 meet
    tiles = gaps.cumsum(-1).int()
    tiles[:, 3, :, 1], tiles[:, 7, :, 5] = tiles[:, 3, :, 0], tiles[:, 7, :, 4]
    count = torch.arange(10, dtype=torch.int32).view(1, 10, 1)
    layout = Layout.lists((1, 10, 100, 500), block_q=128, tile_width=32, tiles=tiles, tile_count=count, validate=False)
    out = check(layout, 1, 64)
    assert bool((out[:, 0] == 0).all())


def test_keys_of_unlisted_tiles_do_not_matter():
    layout = alone(listed(9, 1, 2, 2, 256, 600, rows=256, width=32, share=0.2, holes=False), tiles=True)
    named = torch.zeros(1, 2, 600, dtype=torch.bool)
    for start in range(0, 600, 32):
        named[:, :, start : start + 32] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((~named).any()) and bool((layout.tile_count % 4 != 0).any())
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, x, 64, generator=gen).bfloat16() for x in (256, 600, 600))
    clean = base.emulate(q, k, v, layout, 0.1, 2)
    dirty = base.emulate(q, *(t.masked_fill(~named[..., None], float("nan")) for t in (k, v)), layout, 0.1, 2)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


# ---------------------------------------------------------------------- the plan
SCRIPT = """
import torch
from foveate.kernels.gluon.prepare import prepare
from foveate.layout import Layout
from tests.test_gluon_columns import listed
from tests.test_gluon_compile import work_of
from tests.test_gluon_groups import alone
for seed, (n, m, rows, width, causal, offset) in enumerate((
    (300, 420, 384, 64, True, 256), (200, 300, 64, 64, True, 0), (300, 300, 256, 128, False, 128),
    (200, 500, 256, 32, True, 128), (300, 1500, 256, 1, True, 0),
)):
    more = dict(width=max(width, 32), causal=causal, columns=m // 3, offset=offset, holes=False)
    layout = listed(seed, 1, 2, 1, n, m, rows=rows, share=0.9 if width == 32 else 0.6, **more)
    layout = layout if width > 32 else alone(layout, tiles=width == 32)
    work, want = prepare(layout, torch.device("cpu")), work_of(layout)
    assert torch.equal(work.plan, want.plan), (seed, work.plan, want.plan)
    for name in ("share", "width", "block", "group", "ahead"):
        assert getattr(work, name) == getattr(want, name), (seed, name)
    assert int(work.counter) == 0 and work.strides() == want.strides()
keys = torch.cat([torch.tensor([10]), torch.arange(500, 1011)]).view(1, 1, 1, 512)  # the first tile sees one of 2 ** 9 keys
layout = Layout.lists((1, 1, 1011, 1011), block_q=1024, entries=keys)
assert torch.equal(prepare(layout, torch.device("cpu")).plan, work_of(layout).plan)
print("same")
"""


def test_plan_kernel_under_the_interpreter():
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
