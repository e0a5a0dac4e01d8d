"""Tiles with single keys, rules and 64-row blocks in the Gluon forward, without a GPU: source under the emulator, plan."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate import lists
from foveate.kernels import gluon
from foveate.layout import Layout
from tests import test_gluon_compile as base
from tests.test_gluon_compile import check


def listed(seed, b, h, hl, n, m, *, rows=128, width=64, causal=True, share=0.3, columns=200, holes=True, offset=0):
    """Random tiles and single keys per query block, keys drawn where tiles lie too; unused slots hold junk.

    Rows of lists: some empty, some without tiles, some without columns (`holes`).
    """
    gen = torch.Generator().manual_seed(seed)
    nq = -(-(n + offset) // rows)
    mask = torch.rand(b, hl, nq, -(-m // width), generator=gen) < share
    picked = torch.rand(b, hl, nq, m, generator=gen) < columns / m
    if holes:
        mask[:, ::2, 0], picked[:, ::2, 0] = False, False
        mask[..., -1, :] &= torch.rand(b, hl, 1, generator=gen) < 0.5
        picked[:, -1, -1] = False
    grid = dict(block_q=rows, heads=h, causal=causal, q_offset=offset)
    tiles = Layout.from_block_mask(mask, n, m, block_k=width, **grid)
    keys = Layout.from_block_mask(picked, n, m, block_k=1, **grid)
    layout = Layout.lists(
        (b, h, n, m), block_q=rows, tile_width=width, tiles=tiles.tiles, tile_count=tiles.tile_count, entries=keys.tiles,
        entry_count=keys.tile_count, causal=causal, q_offset=offset,
    )  # fmt: skip
    for index, count in ((layout.tiles, layout.tile_count), (layout.entries, layout.entry_count)):
        index.masked_fill_(torch.arange(index.shape[-1]) >= count[..., None], 1 << 28)
    return layout


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b,h,g,hl,n,m,d,width", [
    (2, 4, 2, 4, 300, 300, 64, 64), (1, 4, 1, 1, 257, 520, 128, 64), (1, 2, 2, 2, 100, 713, 64, 128),
    (1, 2, 1, 2, 300, 100, 64, 64),
])  # fmt: skip
def test_tiles_and_columns(causal, b, h, g, hl, n, m, d, width):
    for columns in (30, 300):
        check(listed(n + columns, b, h, hl, n, m, width=width, causal=causal, columns=columns), g, d)


@pytest.mark.parametrize("width", [64, 128])
def test_neighbouring_tiles(width):
    check(listed(7, 1, 2, 2, 300, 500, width=width, columns=60, share=0.8), 1, 64)


def test_columns_alone():
    layout = listed(1, 2, 2, 2, 300, 700, columns=400)
    check(replace(layout, tiles=None, tile_count=None, tile_width=1), 1, 64)


def test_whole_steps_of_columns_run_bare_and_the_last_is_masked():
    keys = torch.arange(0, 1024, 2, dtype=torch.int32).expand(1, 1, 2, -1).contiguous()  # 512: four whole steps
    count = torch.tensor([[[512, 384]]], dtype=torch.int32)
    layout = Layout.lists((1, 2, 200, 1100), block_q=128, tile_width=64, entries=keys, entry_count=count)
    plan = base.work_of(layout).plan
    assert plan[0, 0].tolist() == [[0, 1, 512, 3], [0, 1, 384, 3]]
    check(layout, 1, 64)


def test_lists_of_different_lead():
    layout = listed(5, 1, 4, 2, 300, 300)
    shared = replace(layout, tiles=layout.tiles[:, :1], tile_count=layout.tile_count[:, :1], tile_width=64)
    entries, count = lists.drop_covered(shared)
    check(replace(shared, entries=entries, entry_count=count), 2, 64)


@pytest.mark.parametrize("columns", [0, 150])
def test_rows_of_64_take_two_heads_a_tile(columns):
    for h, g, hl, n, m, d in ((4, 2, 2, 330, 330, 64), (4, 1, 1, 100, 300, 128), (8, 1, 4, 70, 70, 64)):
        layout = listed(n, 2, h, hl, n, m, rows=64, columns=max(columns, 1))
        if not columns:
            layout = replace(layout, entries=None, entry_count=None)
        check(layout, g, d)


@pytest.mark.parametrize("n,m", [(700, 700), (200, 513), (300, 170)])
@pytest.mark.parametrize("sink,window", [(4, 64), (0, 200), (130, 1), (300, 128), (5, 0), (0, 0), (1, 1 << 30), (2000, 7)])
def test_rules(n, m, sink, window):
    check(Layout.static((1, 2, n, m), sink=sink, window=window), 1, 64)


def test_rules_per_head_and_row():
    sink = torch.tensor([[0, 200], [3, 1]])
    check(Layout.static((2, 4, 300, 640), sink=sink, window=torch.tensor([[300, 20, 0, 128]])), 2, 128)
    check(Layout.static((1, 2, 300, 300), window=torch.tensor([[5, 2**31 - 1]])), 2, 64)


def test_values_of_unlisted_keys_are_not_read():
    layout = listed(9, 1, 2, 2, 200, 600, columns=40, share=0.2)
    named = layout.to_mask().any(2)  # keys that some row of a head sees; the last columns of a list may be seen by a few
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, x, y, 64, generator=gen).bfloat16() for x, y in ((2, 200), (2, 600), (2, 600)))
    clean = base.emulate(q, k, v, layout, 0.1, 2)
    touched = named.clone()
    for start in range(0, 600, 64):  # tiles are read whole
        touched[:, :, start : start + 64] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((layout.tile_count == 0).any())  # a list without tiles, which reads no key before its columns
    k, v = (t.masked_fill(~touched[..., None], float("nan")) for t in (k, v))
    assert bool((~touched).any())
    dirty = base.emulate(q, k, v, layout, 0.1, 2)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_strided_keys():
    layout = listed(3, 2, 4, 4, 200, 300)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, x, y, 64, generator=gen).bfloat16() for x, y in ((4, 200), (2, 300), (2, 300)))
    want = base.emulate(q, k, v, layout, 0.1, 3)
    wide = [torch.randn(2, 300, 2, 72, generator=gen).bfloat16()[..., :64].transpose(1, 2).copy_(t) for t in (k, v)]
    assert wide[0].stride() == (300 * 144, 72, 144, 1)
    got = base.emulate(q, *wide, layout, 0.1, 3)
    assert torch.equal(want[0], got[0])


SCRIPT = """
import torch
from foveate.kernels.gluon.prepare import prepare
from tests.test_gluon_columns import listed
from tests.test_gluon_compile import work_of
for seed, (n, m, rows, width, causal, b, hl) in enumerate((
    (300, 300, 128, 64, True, 1, 4), (200, 700, 128, 128, True, 2, 2), (200, 700, 64, 64, False, 1, 2),
    (300, 100, 64, 64, True, 1, 1), (513, 3000, 128, 64, True, 1, 1),
)):
    layout = listed(seed, b, 4, hl, n, m, rows=rows, width=width, causal=causal, columns=m // 4)
    work, want = prepare(layout, torch.device("cpu")), work_of(layout)
    assert torch.equal(work.plan, want.plan), (seed, work.plan, want.plan)
    assert int(work.counter) == 0 and work.strides() == want.strides() and work.share == want.share
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
