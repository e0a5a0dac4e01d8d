"""Gradients of attention over block lists and dense layouts, in Triton: tiles of any alignment over dense storage.

Two passes, each of which owns what it writes, so that two runs give the same bits. The pass over queries (`dq_kernel`)
also computes delta = rowsum(dout * out) - dlse, since the probability is the derivative of the lse too. The pass over
keys (`dkdv_kernel`) walks inverse lists (`inverse.py`); all query heads of a group add to the same dk and dv in
registers. Key blocks that very many rows name are cut into items, whose fp32 sums a third kernel adds in order. On
Hopper both passes are Gluon kernels (`gluon/backward.py`) where those have no reason against it.
Probabilities are computed again from the lse (Dao 2023, arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kv import KV
from ...layout import Layout
from ..base import Want
from ..gluon import backward as hopper
from . import inverse, supports
from .backward_kernels import dkdv_kernel, dq_kernel, join_kernel
from .config import device
from .inverse import InverseLists

HEAD_DIM = 128


@dataclass(frozen=True)
class Steps:
    """Tile of one pass: rows and keys of a step, Triton's warps and stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the pass over queries and of the pass over keys; both are cut down to the blocks of the layout."""

    dq: Steps
    dkdv: Steps


WIDE = Config(dq=Steps(128, 64, 8, 3), dkdv=Steps(64, 128, 8, 3))  # 16-bit inputs where a program gets 200 KB
FINE = Config(dq=Steps(128, 64, 8, 3), dkdv=Steps(64, 64, 4, 2))  # the same for tiles of 64 keys: two programs at a time
NARROW = Config(dq=Steps(64, 64, 4, 2), dkdv=Steps(32, 64, 4, 2))
SINGLE = Config(dq=Steps(32, 32, 4, 1), dkdv=Steps(32, 32, 4, 1))  # fp32


def backward_supports(q: Tensor, kv: KV, layout: Layout, softcap: float) -> str | None:
    """The reason this backward pass cannot serve a call, or None."""
    if (why := supports(q, kv, layout, Want(lse=True))) is not None:
        return why
    if softcap:
        return "its backward pass has no softcap"
    if kv.kind != "dense" or kv.len is not None or kv.pos is not None or kv.bias is not None:
        return "its backward pass reads dense storage without lengths, positions and entry weights"
    if layout.q_pos is not None and layout.causal:
        return "its backward pass has no query positions"
    if layout.has_rule or any(getattr(layout, n) is not None for n in ("entries", "diagonals", "columns")):
        return "its backward pass walks tiles, not rules, single entries or factored parts"
    if layout.tiles is None and not layout.full:
        return "the layout names nothing"
    size = q.element_size()
    if max(kv.shape[3:]) > HEAD_DIM or any(x * size % 16 for x in kv.shape[3:]):
        return f"its backward pass has head dims up to {HEAD_DIM} in whole 16 bytes, not {kv.shape[3]} and {kv.shape[4]}"
    if layout.tiles is not None:
        for name, x in (("query blocks", layout.block_q), ("tiles", layout.tile_width)):
            if x < 16 or x & (x - 1):
                return f"its backward pass has {name} of 16, 32, 64 ... rows, not {x}"
    return inverse.refused(_blocked(layout), kv.shape[1])


def _blocked(layout: Layout) -> Layout:
    """A dense layout on a grid of its own; others as they are."""
    return replace(layout, block_q=128, q_offset=0, tile_width=128) if layout.full else layout


# ---------------------------------------------------------------------- launch
def config(q: Tensor, d: int, width: int) -> Config:
    """Tiles by what the device can hold, for a padded head dim and tiles of `width` keys."""
    if q.element_size() == 4:
        return SINGLE
    shared, _ = device(q.device.index if q.device.type == "cuda" else None)
    if shared < 200 * 1024 or d < 64:
        return NARROW
    return WIDE if width >= WIDE.dkdv.keys else FINE


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    kv: KV,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
    tiles: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients (dq `[B, H, N, D]`, dk `[B, G, M, D]`, dv `[B, G, M, Dv]`, None) for a call that `backward_supports`.

    dout `[B, H, N, Dv]` and dlse fp32 `[B, H, N]` are the gradients of both outputs, out and lse those outputs. Sums are
    fp32; results have the dtype of q. `tiles` replaces the choice of `config` and of Gluon (for measurements).
    """
    d, dv = kv.shape[3:]
    layout = _blocked(layout)
    work = Work(
        q, kv, layout, scale, tiles or config(q, max(d, dv), layout.tile_width),
        gluon_queries=tiles is None and hopper.why_not_queries(q, kv, layout) is None,
        gluon_keys=tiles is None and hopper.why_not(q, kv, layout) is None,
    )  # fmt: skip
    dq = work.queries(dout, dlse, out, lse)
    return dq, *work.keys(dout, work.inverse()), None


class Work:
    """One backward pass in its three steps: `queries`, `inverse`, `keys` (in any order, but queries before keys).

    gluon_queries, gluon_keys: hand that step to the Gluon kernel; `hopper.why_not_queries` and `why_not` must allow it.
    """

    def __init__(
        self, q: Tensor, kv: KV, layout: Layout, scale: float, tiles: Config, *,
        gluon_queries: bool = False, gluon_keys: bool = False,
    ):  # fmt: skip
        self.q, self.k, self.v, self.layout, self.tiles, self.scale = q, kv.k, kv.v, layout, tiles, scale
        self.gluon_queries, self.gluon_keys = gluon_queries, gluon_keys
        b, h, n, d = q.shape
        _, g, m, _, dv = kv.shape
        lists = layout.tiles
        if lists is not None and lists.stride(-1) != 1:
            lists = lists.contiguous()
        at: dict[str, object] = dict(tiles=None, count=None, sb=0, st=0, sq=0, cb=0, ch=0, cq=0, HL=1, CHUNK=16)
        if lists is not None and layout.tile_count is not None:
            s, c = lists.stride(), layout.tile_count.stride()
            many = lists.shape[0] > 1
            at = dict(
                tiles=lists, count=layout.tile_count, sb=s[0] * many, st=s[1], sq=s[2], cb=c[0] * many, ch=c[1], cq=c[2],
                HL=lists.shape[1], CHUNK=min(256, max(16, triton.next_power_of_2(lists.shape[-1]))),
            )  # fmt: skip
        self.d_pad, self.dv_pad = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
        self.args: dict[str, object] = dict(
            at, scale=scale, H=h, G=g, N=n, M=m, NB=layout.num_blocks, q_offset=layout.q_offset, BLOCK=layout.block_q,
            WIDTH=layout.tile_width, D=d, D_PAD=self.d_pad, DV=dv, DV_PAD=self.dv_pad, CAUSAL=layout.causal,
            FULL=layout.full, FP32=q.dtype == torch.float32,
        )  # fmt: skip
        padded = b * h * layout.num_blocks * layout.block_q
        self.stats = torch.empty(2, padded, dtype=torch.float32, device=q.device)
        self.lse2, self.delta = self.stats

    def queries(self, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """dq; leaves lse and delta for `keys`."""
        b, h, n, d = self.q.shape
        t = self.tiles.dq
        rows, keys = min(t.rows, self.layout.block_q), min(t.keys, self.layout.tile_width)
        dq = torch.empty(b, h, n, d, dtype=self.q.dtype, device=self.q.device)
        if self.gluon_queries:
            lse, dlse = lse.contiguous(), dlse.contiguous()
            hopper.run_queries(self.q, self.k, self.v, out, dout, lse, dlse, dq, self.stats, self.layout, self.scale)
            return dq
        dq_kernel[(b * h * self.layout.num_blocks * (self.layout.block_q // rows),)](
            q=_rows(self.q, rows), dout=_rows(dout, rows), k=_rows(self.k, keys), v=_rows(self.v, keys),
            out=out.contiguous(), lse=lse.contiguous(), dlse=dlse.contiguous(), dq=dq, lse2=self.lse2, delta=self.delta,
            ROWS=rows, KEYS=keys, STAGES=t.stages, num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
            **self.args,
        )  # fmt: skip
        return dq

    def inverse(self) -> InverseLists:
        """The inverse lists; they depend on the layout and the tiles alone."""
        _, cores = device(self.q.device.index if self.q.device.type == "cuda" else None)
        keys = min(self.tiles.dkdv.keys, self.layout.tile_width)
        return inverse.build(self.layout, self.k.shape[1], keys, cores, self.q.device)

    def keys(self, dout: Tensor, lists: InverseLists) -> tuple[Tensor, Tensor]:
        """dk and dv."""
        b, g, m, d = self.k.shape
        dv = self.v.shape[-1]
        t = self.tiles.dkdv
        rows = min(t.rows, self.layout.block_q)
        grads = [torch.empty(b, g, m, x, dtype=self.q.dtype, device=self.q.device) for x in (d, dv)]
        width = self.d_pad + self.dv_pad
        part = torch.empty(max(1, lists.max_items * lists.keys * width), dtype=torch.float32, device=self.q.device)
        if self.gluon_keys:
            hopper.run_keys(
                self.q, self.k, self.v, dout, self.stats, grads[0], grads[1], part, self.layout, lists, self.scale
            )
        else:
            dkdv_kernel[(lists.max_items + lists.key_blocks * b * g,)](
                q=_rows(self.q, rows), dout=_rows(dout, rows), k=_rows(self.k, lists.keys), v=_rows(self.v, lists.keys),
                lse2=self.lse2, delta=self.delta, dk=grads[0], dv=grads[1], part=part, ids=lists.ids, offset=lists.offset,
                counts=lists.counts, cuts=lists.cuts, items=lists.items, plan=lists.plan, NK=lists.key_blocks,
                max_items=lists.max_items, ROWS=rows, KEYS=lists.keys, SHARE=lists.share, LISTS=lists.lists,
                STAGES=t.stages, num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
                **self.args,
            )  # fmt: skip
        if lists.max_items:
            step = min(16, lists.keys)
            join_kernel[(lists.max_items, lists.keys // step)](
                part, lists.cuts, lists.items, lists.plan, *grads, lists.key_blocks, m, step, lists.keys,
                d, self.d_pad, dv, self.dv_pad, num_warps=4,
            )  # fmt: skip
        return grads[0], grads[1]


def _rows(t: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of blocks of `rows` rows of `[B, H, N, D]`; a copy where TMA cannot walk the strides."""
    unit = 16 // t.element_size()
    odd = any(s <= 0 or s % unit for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    if odd or t.stride(-1) != 1 or t.data_ptr() % 16:
        t = t.contiguous()
    d = t.shape[-1]
    strides = [s if size > 1 else d for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, max(16, triton.next_power_of_2(d))])
