"""Gradients of attention over per-token lists, in Triton: what `tokens.py` computes, backwards.

dq goes the way of the forward pass: partial results by key block, and by tile of neighbouring tokens for the blocks they
share, then their sum. dk and dv are sums over the tokens that name a key block, along the inverse lists of
`tokens_inverse.py`, which cut key blocks that very many tokens name. Each result has one owner: the same bits on every run.
Probabilities are computed again from the lse (Dao 2023, arXiv 2307.08691, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ..base import Want
from . import inverse, supports, tokens, tokens_inverse
from . import tokens_grads as grads
from .backward_kernels import join_kernel
from .config import device
from .inverse import InverseLists
from .tokens_lists import TokenLists

KEYS = 64  # most keys of a program of dk and dv


@dataclass(frozen=True)
class Config:
    """Query rows of a step, Triton's warps and stages: of dk and dv; and of dq beside the knobs of `tokens.Config`."""

    rows: int = 32
    warps: int = 4
    stages: int = 3
    dq_stages: int = 2
    walk_stages: int = 2


WIDE = Config()
SINGLE = Config(stages=1, dq_stages=1, walk_stages=1)  # fp32, in the interpreter


def backward_supports(q: Tensor, kv: KV, layout: Layout, softcap: float) -> str | None:
    """The reason this backward pass cannot serve a call, or None."""
    if (why := supports(q, kv, layout, Want(lse=True))) is not None:
        return why
    if (why := tokens.refused(q, kv, layout, softcap)) is not None:
        return why
    b, h, n, _ = layout.shape
    if b * n < tokens.ROWS:
        return f"it pays from {tokens.ROWS} query rows on, not at {b * n}"
    if h // kv.shape[1] * n * max(kv.shape[3:]) >= 1 << 31:
        return "the query rows of a kv head are more than 32 bits say"
    shared, _ = device(q.device.index if q.device.type == "cuda" else None)
    if shared < 160 * 1024 and q.element_size() < 4:
        return "it needs a card that gives a program 160 KB of shared memory"
    return inverse.refused(layout, kv.shape[1])


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
    knobs: tokens.Config | None = None,
    steps: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients (dq `[B, H, N, D]`, dk `[B, G, M, D]`, dv `[B, G, M, Dv]`, None) for a call that `backward_supports`.

    dout `[B, H, N, Dv]` and dlse fp32 `[B, H, N]` are the gradients of both outputs, out and lse those outputs. Sums are
    fp32, partial results of dq and all results have the dtype of q. `knobs`, `steps`: for measurements.
    """
    work = Work(q, kv, layout, scale, knobs, steps)
    work.rows(dout, dlse, out, lse)
    return work.queries(), *work.keys(work.inverse()), None


class Work:
    """One backward pass: `rows` prepares it; `queries` gives dq, `inverse` and `keys` give dk and dv, in any order."""

    def __init__(
        self,
        q: Tensor,
        kv: KV,
        layout: Layout,
        scale: float,
        knobs: tokens.Config | None = None,
        steps: Config | None = None,
    ):
        q, k, v = (t.contiguous() for t in (q, kv.k, kv.v))
        self.q, self.k, self.v, self.layout = q, k, v, layout
        self.front = tokens.Work(q, replace(kv, k=k, v=v), layout, 1.0, knobs)  # chunks and lists are those of the forward
        self.steps = steps or self.config()
        keep = ("G", "SHARE", "N", "M", "WIDTH", "HEADS", "D", "D_PAD", "DV", "DV_PAD", "CAUSAL", "FP32")
        heads = self.front.heads
        self.plain: dict[str, object] = {n: self.front.plain[n] for n in keep} | dict(scale=scale, H=heads.h)
        self.listed = self.front.named() | dict(T_PAD=max(16, triton.next_power_of_2(self.front.slots - 1)))
        del self.listed["H"]  # one of `plain`

    def config(self) -> Config:
        """The steps for this device and dtype."""
        if self.q.element_size() == 4:
            return SINGLE
        shared, _ = device(self.q.device.index if self.q.device.type == "cuda" else None)
        both = tokens._pad(self.q.shape[-1]) + tokens._pad(self.v.shape[-1])
        block, knobs = self.layout.tile_width * both, self.front.knobs
        keys, rows = min(KEYS, self.layout.tile_width), max(WIDE.rows, self.front.group)
        return replace(
            WIDE,
            stages=tokens.fitting(shared // 2, WIDE.stages, keys * both, rows * both),  # two programs beside each other
            dq_stages=tokens.fitting(shared, WIDE.dq_stages, block, knobs.rows * both),
            walk_stages=tokens.fitting(shared, WIDE.walk_stages, knobs.tile * both, block),
        )

    def rows(self, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor) -> None:
        """lse in units of log 2 and delta."""
        self.dout = dout.contiguous()
        self.lse2, self.delta = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
        dv = self.v.shape[-1]
        grads.delta_kernel[(-(-lse.numel() // 32),)](
            out.contiguous(), self.dout, lse.contiguous(), dlse.contiguous(), self.lse2, self.delta, lse.numel(), 32, dv,
            tokens._pad(dv), num_warps=4,
        )  # fmt: skip

    def queries(self) -> Tensor:
        """dq."""
        front, d = self.front, self.q.shape[-1]
        dq = torch.empty_like(self.q)
        rows = front.heads.leads * front.size * front.slots * front.heads.share
        part = torch.empty(rows * d, dtype=self.q.dtype, device=self.q.device)
        for batch in front.batches():
            x = front.lists(batch)
            for number in range(len(batch)):
                self.partial(x, number, part)
                front.merge(x, number, part, None, dq, None)
        return dq

    def partial(self, x: TokenLists, number: int, part: Tensor) -> None:
        """Partial results of a chunk of a batch, by key block and by tile of tokens."""
        front, c = self.front, self.front.knobs
        tiles, place = front.place(x, number)
        same = (self.q, self.k, self.v, self.dout, self.lse2, self.delta, part)
        more = dict(LISTS=front.heads.g * front.heads.lists, size=front.size, SLOTS=front.slots, **self.plain)
        grads.dq_partial_kernel[(x.max_items,)](
            *same, x.ids, x.items, x.plan, number=number, max_items=x.max_items, first=place["first"], NK=x.blocks,
            ROWS=max(c.rows, front.group), LONGEST=front.longest, STAGES=self.steps.dq_stages, num_warps=c.warps,
            num_stages=self.steps.dq_stages, **more,
        )  # fmt: skip
        grads.dq_walk_kernel[(tiles, front.heads.leads)](
            *same, shared=x.shared, shared_count=x.shared_count, width=x.shared.shape[2], ROWS=front.tile * front.group,
            STAGES=self.steps.walk_stages, num_warps=c.tile_warps, num_stages=self.steps.walk_stages, **place, **self.listed,
            **more,
        )  # fmt: skip

    def inverse(self) -> InverseLists:
        """The inverse lists of all tokens; they depend on the layout alone."""
        _, cores = device(self.q.device.index if self.q.device.type == "cuda" else None)
        keys, layout = min(KEYS, self.layout.tile_width), self.front.layout
        if keys < layout.tile_width:
            return inverse.build(layout, self.k.shape[1], keys, cores, self.q.device)
        return tokens_inverse.build(layout, self.front.heads, cores)

    def keys(self, lists: InverseLists) -> tuple[Tensor, Tensor]:
        """dk and dv."""
        b, g, m, d = self.k.shape
        dv, c = self.v.shape[-1], self.steps
        made = torch.empty_like(self.k), torch.empty_like(self.v)
        wide = tokens._pad(d) + tokens._pad(dv)
        part = torch.empty(max(1, lists.max_items * lists.keys * wide), dtype=torch.float32, device=self.q.device)
        grads.dkdv_rows_kernel[(lists.max_items + lists.key_blocks * b * g,)](
            self.q, self.k, self.v, self.dout, self.lse2, self.delta, *made, part, ids=lists.ids, offset=lists.offset,
            counts=lists.counts, cuts=lists.cuts, items=lists.items, plan=lists.plan, LISTS=lists.lists, NK=lists.key_blocks,
            max_items=lists.max_items, KEYS=lists.keys, ROWS=max(c.rows, self.front.group), STAGES=c.stages,
            num_warps=c.warps, num_stages=c.stages, **self.listed, **self.plain,
        )  # fmt: skip
        if lists.max_items:
            step = min(16, lists.keys)
            join_kernel[(lists.max_items, lists.keys // step)](
                part, lists.cuts, lists.items, lists.plan, *made, lists.key_blocks, m, step, lists.keys,
                d, tokens._pad(d), dv, tokens._pad(dv), num_warps=4,
            )  # fmt: skip
        return made
