"""Diagonals + columns in the Gluon forward, without a GPU: the kernel's source under the emulator, the plan, refusals."""

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
from tests.test_gluon_compile import check


def factored(seed, b, h, hl, n, m, *, rows=64, distances=6, columns=40, holes=True):
    """Random distances, the nearest among them in one list of two, and columns drawn anywhere. Unused slots hold junk.

    `holes`: the last list has no columns, the first of the last batch row no distances.
    """
    gen = torch.Generator().manual_seed(seed)
    d = torch.rand(b, hl, m, generator=gen).topk(distances, -1).indices
    d[:, ::2, 0] = 0
    c = torch.rand(b, hl, m, generator=gen).topk(columns, -1).indices
    many, few = (torch.full((b, hl), x, dtype=torch.int32) for x in (distances, columns))
    if holes and hl > 1:
        many[-1, 0], few[:, -1] = 0, 0
    layout = Layout.factored((b, h, n, m), diagonals=d, diagonal_count=many, columns=c, column_count=few, block_q=rows)
    for index, count in ((layout.diagonals, layout.diagonal_count), (layout.columns, layout.column_count)):
        index.masked_fill_(torch.arange(index.shape[-1]) >= count[..., None], 1 << 28)
    return layout


def raw(diagonals, columns, n, m, rows=64, h=1):
    """A layout with these distances as they are, not merged."""
    one = [torch.tensor([[x]], dtype=torch.int32) for x in (diagonals, columns)]
    counts = [torch.tensor([[len(x)]], dtype=torch.int32) for x in (diagonals, columns)]
    return Layout(
        (1, h, n, m), block_q=rows, tile_width=64, diagonals=one[0], diagonal_count=counts[0], columns=one[1],
        column_count=counts[1],
    )  # fmt: skip


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("b,h,g,hl,n,m,d", [
    (2, 4, 2, 4, 300, 300, 64), (1, 4, 1, 1, 257, 520, 128), (1, 2, 2, 2, 130, 713, 64), (1, 2, 1, 2, 300, 170, 64),
    (1, 2, 2, 2, 700, 700, 64),
])  # fmt: skip
def test_diagonals_and_columns(rows, b, h, g, hl, n, m, d):
    for distances, columns in ((3, 140), (12, 20)):
        check(factored(n + columns, b, h, hl, n, m, rows=rows, distances=distances, columns=columns), g, d)


@pytest.mark.parametrize("rows", [64, 128])
def test_runs_of_distances(rows):
    """A local band, a run further off that ends where another begins, tiles that overlap, and one beyond the first key."""
    for diagonals in (
        [0, 64, 128], [62, 126, 190], [0, 64, 200, 264, 300, 364], [0, 100, 164, 230, 420], [30, 60, 90, 300, 440], [250],
    ):  # fmt: skip
        check(raw(diagonals, list(range(0, 500, 9)), 450, 500, rows), 1, 64)


@pytest.mark.parametrize("rows", [64, 128])
def test_parts_alone(rows):
    both = factored(3, 1, 2, 2, 300, 400, rows=rows, holes=False)
    check(replace(both, columns=None, column_count=None), 1, 64)
    check(replace(both, diagonals=None, diagonal_count=None), 1, 64)
    check(raw([], [], 200, 300, rows), 1, 64)


def test_parts_of_different_lead():
    both = factored(4, 2, 4, 4, 300, 300, holes=False)
    check(replace(both, columns=both.columns[:1, :1], column_count=both.column_count[:1, :1]), 2, 64)
    check(replace(both, diagonals=both.diagonals[:, :2], diagonal_count=both.diagonal_count[:, :2]), 2, 64)


def test_everything_is_dense():
    """Every distance: the result is that of a dense layout, whatever the columns name again."""
    layout = raw(list(range(0, 320, 64)), list(range(0, 300, 2)), 300, 300)
    dense = check(Layout.dense(1, 1, 300, 300), 1, 64)
    torch.testing.assert_close(check(layout, 1, 64), dense, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("rows", [64, 128])
def test_steps_that_all_rows_see_whole_run_bare(rows):
    work = base.work_of(raw([0, 64, 128, 192, 400], [], 512, 512, rows))
    words = work.tiles[0, 0, 0].tolist()
    assert words[:7] == ([-1, 128, 256, 384, 511, 799, 927] if rows == 64 else [0, 128, 256, 384, 800, 1 << 28, 1 << 28])


def test_keys_that_nothing_names_are_not_read():
    layout = factored(9, 1, 2, 2, 384, 700, distances=4, columns=20, holes=False)
    named = replace(layout, causal=False).to_mask().any(2)  # a tile is read whole, also by rows before its last keys
    assert bool((~named).any())
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, x, y, 64, generator=gen).bfloat16() for x, y in ((2, 384), (2, 700), (2, 700)))
    clean = base.emulate(q, k, v, layout, 0.1, 2)
    k, v = (t.masked_fill(~named[..., None], float("nan")) for t in (k, v))
    dirty = base.emulate(q, k, v, layout, 0.1, 2)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


SCRIPT = """
import torch
from foveate.kernels.gluon.prepare import prepare
from tests.test_gluon_factored import factored, raw
from tests.test_gluon_compile import work_of
layouts = [
    factored(seed, b, 4, hl, n, m, rows=rows, distances=distances, columns=m // 4)
    for seed, (n, m, rows, b, hl, distances) in enumerate((
        (300, 300, 64, 1, 4, 5), (200, 700, 128, 2, 2, 9), (513, 3000, 64, 1, 1, 70), (300, 170, 64, 1, 2, 3),
        (513, 3000, 128, 1, 1, 40), (200, 4100, 64, 1, 1, 1500),
    ))
]
layouts += [raw([0, 64, 200, 264, 300, 364], [1, 5], 450, 500, rows) for rows in (64, 128)] + [raw([], [], 200, 300)]
for i, layout in enumerate(layouts):
    work, want = prepare(layout, torch.device("cpu")), work_of(layout)
    assert torch.equal(work.plan, want.plan), (i, work.plan, want.plan)
    assert torch.equal(work.cover, want.cover), i
    assert int(work.counter) == 0 and work.share == want.share and work.lag == want.lag
    mine, theirs = work.tiles[:, :, 0], want.tiles[:, :, 0]
    used = theirs != 1 << 28
    size = min(mine.shape[-1], theirs.shape[-1])
    assert not bool(used[..., size:].any())
    assert torch.equal(mine[..., :size][used[..., :size]], theirs[used]), (i, mine, theirs)
print("same")
"""


def test_plan_kernels_under_the_interpreter():
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr
