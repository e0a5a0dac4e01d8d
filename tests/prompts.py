"""Synthetic prompts whose attention has a known shape, for the tests of prefill methods."""

from __future__ import annotations

import math

import torch

from foveate.kv import KV
from foveate.methods.base import AttnInput

SHAPES = ("random", "peaked", "diagonal", "blocks")


def prompt(shape: str, h: int = 4, g: int = 2, m: int = 300, d: int = 32, seed: int = 0):
    """q `[1, h, m, d]`, k and v `[1, g, m, d]` in fp64.

    random: no structure. peaked: all queries look at three keys of their kv head. diagonal: every query looks at the
    keys 70 and 131 before it. blocks: keys of a run of 64 are alike, and queries look at runs.
    """
    gen = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)  # noqa: E731
    q, k, v = make(1, h, m, d), make(1, g, m, d), make(1, g, m, d)
    wide = lambda t: t.repeat_interleave(h // g, 1)  # noqa: E731
    if shape == "peaked":
        for at in (m // 7, m // 3, m // 2):
            q = q + 2.0 * wide(k[:, :, at : at + 1])
    elif shape == "diagonal":
        for far in (70, 131):
            q[:, :, far:] += 2.0 * wide(k[:, :, :-far])
    elif shape == "blocks":
        runs = make(1, g, -(-m // 64), d).repeat_interleave(64, 2)[:, :, :m]
        k = 0.2 * k + runs
        q = 0.2 * q + 2.0 * wide(runs.roll(-64, 2))
    return q, k, v


def call(q, k, v, start: int = 0, *, layer: int = 0, layers: int = 1, kv: KV | None = None) -> AttnInput:
    """The prefill call of the rows from `start` on, over the keys up to the last row."""
    b, _, n, d = q[:, :, start:].shape
    pos = torch.arange(start, start + n).expand(b, n)
    scale = 1 / math.sqrt(d)
    return AttnInput(q[:, :, start:], kv or KV.dense(k, v), "prefill", layer, layers, scale, start=start, q_pos=pos)


def probe_rows(x: AttnInput, rows: int, head: int) -> torch.Tensor:
    """Softmax of the last `rows` queries of one head, `[rows, M]`, row by row."""
    n = x.q.shape[2]
    m = x.start + n
    k = x.kv.k[0, head // (x.q.shape[1] // x.groups)]
    out = torch.zeros(rows, m, dtype=torch.float64)
    for i in range(rows):
        t = m - rows + i
        out[i, : t + 1] = (k[: t + 1] @ x.q[0, head, n - rows + i] * x.scale).softmax(-1)
    return out


def listed(index: torch.Tensor, count: torch.Tensor) -> list[int]:
    """The used part of one row of a list."""
    return index[: int(count)].tolist()
