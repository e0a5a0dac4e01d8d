"""Problems for the kernel of tree searches, on any device; the plain code of `scores/tree.py` judges."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate import lists
from foveate.kernels.triton import estimate_tree_launch as kernels
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.hip import HiP
from tests.estimate_cases import draw, peaked, plain, planned_in_a_graph, rounded

SMALL = dict(k=32, block_k=2, window=20, sink=4, dense_layers=0, block_q=32)


def both(method: HiP, x: AttnInput, judged: AttnInput | None = None):
    """(layout of the kernel, layout of the plain code), of `judged` where that is another call."""
    rows = method.block_q // method.stride if x.phase == "prefill" else 1
    per = x.q.shape[1] // x.groups if method.share == "group" else 1
    assert kernels.descents(x.q, x.kv, rows * per, method.groups, method.block_k)
    mine = method.plan(x, State())
    with plain():
        theirs = method.plan(judged or x, State())
    mine.validate()
    return mine, theirs


def check(method: HiP, x: AttnInput) -> float:
    """Equal lists, with their padding but that of empty ones. Returns the share of searched blocks that were found."""
    mine, theirs = both(method, x)
    assert mine.tiles.dtype == theirs.tiles.dtype and mine.tile_count.dtype == theirs.tile_count.dtype
    some = mine.tile_count[..., None] > 0  # nobody reads an empty list: 0 from the kernel, the first searched key here
    assert torch.equal(mine.tile_count, theirs.tile_count)
    assert torch.equal(mine.tiles.where(some, 0), theirs.tiles.where(some, 0))
    assert mine.tile_count.numel() > 1 or x.phase == "decode"
    return float(mine.tile_count.sum()) * method.width / (mine.tile_count.numel() * x.kv.capacity)


def differing(method: HiP, x: AttnInput, judged: AttnInput) -> float:
    """Share of the tiles named by either path that only one of them names."""
    mine, theirs = both(method, x, judged)
    marks = [mark(layout) for layout in (mine, theirs)]
    return float((marks[0] ^ marks[1]).sum()) / float((marks[0] | marks[1]).sum())


def mark(layout):
    """bool `[B, Hl, n, tiles]` of the tiles a layout lists."""
    used = lists.used_slots(layout.tiles, layout.tile_count)
    width = layout.shape[3] // layout.tile_width + 2
    at = torch.where(used, layout.tiles.long() // layout.tile_width, width - 1)
    out = torch.zeros(*at.shape[:3], width, dtype=torch.bool, device=at.device)
    return out.scatter_(-1, at, True)[..., :-1]


def decode(b, h, g, m, d, lengths, *, dtype=torch.float32, device="cpu") -> AttnInput:
    """A decode step of rows of different lengths; what lies beyond is NaN."""
    q, k = draw(b, h, 1, d, dtype=dtype), draw(b, g, m, d, seed=1, dtype=dtype)
    ends = torch.tensor(lengths)
    for row in range(b):
        q[row] += 1.5 * k[row, :, lengths[row] // 3].repeat_interleave(h // g, 0)[:, None]
        k[row, :, lengths[row] :] = float("nan")
    q, k, ends = q.to(device), k.to(device), ends.to(device)
    kv = KV.dense(k, k, len=ends[:, None].expand(b, g).int().contiguous())
    return AttnInput(q, kv, "decode", 5, 8, d**-0.5, q_pos=ends[:, None] - 1)


def tied(x: AttnInput) -> AttnInput:
    """The same call with keys that repeat, so that most ranges tie, and numbers whose products no order of sums rounds."""
    k = rounded(x.kv.k[:, :, torch.arange(x.kv.capacity, device=x.device) % 5], 4)
    return replace(x, q=rounded(x.q, 4), kv=KV.dense(k, k))


__all__ = ["SMALL", "check", "decode", "differing", "kernels", "peaked", "planned_in_a_graph", "replace", "tied"]
