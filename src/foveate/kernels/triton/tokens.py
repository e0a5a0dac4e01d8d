"""Attention where every token has a list of key blocks of its own (NSA, InfLLM-v2, MoBA): many rows, tiles, `block_q` 1.

A kernel that fetches the keys of each token by themselves moves 32 KB through the L2 cache for every listed block of 64
keys, and is held by that (18 ms for 32K tokens of 8 kv heads and 16 blocks on an H100). Here keys are fetched for many
tokens at once, in two ways between which the device chooses block by block:

- blocks that many of some neighbouring tokens list (the sink, the own block, whatever lists that change slowly share) are
  walked by the tile of these tokens together, each row under its own mask;
- of all others, the list is turned round: one program holds a key block and computes a partial result for each token that
  names it. Those cost memory traffic, `2 * Dv` bytes written and read for each row and block; tokens go through in chunks
  that bound them. A last kernel adds the partial results of each token.

Floors for 32K tokens, H 32, G 8, 16 random blocks, D 128, bf16 on an H100: 0.55 TFLOP, 0.9 ms at 600 TFLOP/s; partial
results 4.3 GB written and read, 2.9 ms at 3 TB/s; rows of q 4.3 GB from L2. Every result has one owner; only bits of
lists are set by atomics, whose order leaves no trace: the same bits on every run, and no host synchronisation.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from . import tokens_kernels as kernels
from .config import device
from .tokens_lists import SLOTS, TokenLists, build, heads_of, listed, slot_words, token_bytes

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read when the kernels were decorated, as Triton does
SCRATCH = 1 << 30  # bytes of partial results and lists in flight
ROWS = 512  # query rows from which on this way pays for its launches
ROWS_MOST = 1 << 15  # tokens of a chunk
WIDEST = 128  # keys of a block, held by one program
GROUP = 64  # query heads that follow one list
HEAD_DIM = 128
SHARED = 0.4  # part of a tile's tokens that must list a block for the tile to walk it


@dataclass(frozen=True)
class Config:
    """Knobs of the kernels.

    Attributes:
        rows, warps, stages, regs: query rows of a step by key block, Triton's warps and stages (one holds list words), most
            registers of a thread (None: as many as the compiler likes).
        piece: query rows of an item.
        tile, tile_warps, tile_stages: query rows of a tile of neighbouring tokens; the stages of its walk.
        merge: rows of a program that adds partial results.
        shared: part of a tile's tokens that must list a block to walk it together; above 1: none, 0: all.
        scratch: bytes of a chunk.
    """

    rows: int = 64
    warps: int = 4
    stages: int = 3
    regs: int | None = 168
    piece: int = 512
    tile: int = 64
    tile_warps: int = 4
    tile_stages: int = 3
    merge: int = 16
    shared: float = SHARED
    scratch: int = SCRATCH


WIDE = Config()  # where a program gets 160 KB
NARROW = Config(stages=2, tile_stages=2)
SINGLE = Config(rows=32, stages=1, tile=32, tile_stages=1)  # fp32, in the interpreter


def config(q: Tensor, kv: KV, width: int) -> Config:
    """The knobs for a device, a dtype and tiles of `width` keys; stages are cut down to what the device can hold."""
    if q.element_size() == 4:
        return SINGLE
    shared, _ = device(q.device.index if q.device.type == "cuda" else None)
    c = WIDE if shared >= 160 * 1024 else NARROW
    d, both = _pad(kv.shape[3]), _pad(kv.shape[3]) + _pad(kv.shape[4])
    stages = fitting(shared, c.stages, width * both, c.rows * d)
    walked = fitting(shared, c.tile_stages, c.tile * d, width * both)
    return replace(c, stages=stages, tile_stages=walked, regs=c.regs if width <= 64 else None)


def fitting(shared: int, stages: int, fixed: int, each: int) -> int:
    """Most stages, at least 1, whose 16-bit numbers (`each` of a stage, `fixed` beside them) fit a program's memory."""
    return max(1, min(stages, (int(0.95 * shared) // 2 - fixed) // each))


def refused(q: Tensor, kv: KV, layout: Layout, softcap: float) -> str | None:
    """The reason these kernels cannot compute a call (of what the backend as a whole serves), or None."""
    x, width = layout, layout.tile_width
    if x.tiles is None or x.block_q != 1 or x.full:
        return "it takes lists of tiles for single query rows"
    if x.has_rule or any(getattr(x, n) is not None for n in ("entries", "diagonals", "columns")):
        return "it takes tiles, not rules, single entries or factored parts"
    if kv.kind != "dense" or kv.len is not None or kv.pos is not None or kv.bias is not None:
        return "it reads dense storage without lengths, positions and entry weights"
    if x.q_pos is not None or x.q_offset:
        return "it has no query positions"
    if softcap:
        return "it has no softcap"
    if not 16 <= width <= WIDEST or width & (width - 1):
        return f"it has tiles of 16, 32, 64 or {WIDEST} keys, not {width}"
    if not 0 < x.tiles.shape[-1] <= SLOTS:
        return f"it has lists of 1 to {SLOTS} tiles, not {x.tiles.shape[-1]}"
    if max(kv.shape[3:]) > HEAD_DIM:
        return f"it has head dims up to {HEAD_DIM}, not {max(kv.shape[3:])}"
    if q.dtype == torch.float32 and not INTERPRET:
        return "it has no fp32: blocks and rows of it do not fit beside each other"
    if (share := heads_of(x, kv.shape[1]).share) > GROUP:
        return f"it has up to {GROUP} query heads that follow one list, not {share}"
    if share * q.stride(1) + ROWS_MOST * q.stride(2) >= 1 << 31:
        return "the query heads that follow one list lie further apart than 32 bits say"
    return None


def serves(q: Tensor, kv: KV, layout: Layout, softcap: float) -> bool:
    """Whether `attend` computes this call and is the better way to."""
    return q.shape[0] * q.shape[2] >= ROWS and refused(q, kv, layout, softcap) is None


class Work:
    """One call in chunks of tokens: `batches` names them, `lists` builds the lists of a batch of them at once, `attend`
    computes them one by one. The partial results of a chunk and the lists of a batch take at most `scratch` together."""

    def __init__(self, q: Tensor, kv: KV, layout: Layout, scale: float, knobs: Config | None = None):
        self.q, self.k, self.v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k, kv.v))
        assert layout.tiles is not None and layout.tile_count is not None
        self.layout = layout if layout.tiles.stride(-1) == 1 else replace(layout, tiles=layout.tiles.contiguous())
        self.knobs = knobs or config(q, kv, layout.tile_width)
        b, h, n, d = q.shape
        _, g, m, _, dv = kv.shape
        self.heads = heads_of(layout, g)
        self.group = triton.next_power_of_2(self.heads.share)
        self.tile = max(1, self.knobs.tile // self.group)
        self.slots = layout.tiles.shape[-1] + 1  # the last one is that of shared blocks
        each = h * self.slots * (dv * q.element_size() + 4) * b  # bytes of partial results of a token
        lists = token_bytes(layout, self.heads, self.tile)
        most = min(ROWS_MOST, max(256, self.knobs.scratch // (each + lists) // 256 * 256))
        number = -(-n // most)
        unit = max(64, self.tile)
        self.size = -(-n // (number * unit)) * unit
        self.together = max(1, (self.knobs.scratch - self.size * each) // (self.size * lists))  # chunks of a batch
        self.listed = listed(self.layout, self.heads)
        self.piece = max(1, self.knobs.piece // self.group)
        self.longest = triton.next_power_of_2(max(self.piece, 2 * max(self.knobs.rows, self.group) // self.group))
        self.plain: dict[str, object] = dict(
            scale=max(scale, 1e-30) * math.log2(math.e), LISTS=self.heads.g * self.heads.lists, SHARE=self.heads.share, G=g,
            size=self.size, N=n, M=m, SLOTS=self.slots, WIDTH=layout.tile_width, HEADS=self.group, D=d, D_PAD=_pad(d), DV=dv,
            DV_PAD=_pad(dv), CAUSAL=layout.causal, FP32=q.dtype == torch.float32,
        )  # fmt: skip
        for name, t in (("q", self.q), ("k", self.k), ("v", self.v)):
            row = "n" if name == "q" else "m"
            self.plain |= dict(zip((f"{name}_sb", f"{name}_s{'h' if name == 'q' else 'g'}", f"{name}_s{row}"), t.stride()))

    def batches(self) -> list[list[tuple[int, int]]]:
        """(first token, tokens) of each chunk of each batch."""
        n = self.q.shape[2]
        chunks = [(first, min(self.size, n - first)) for first in range(0, n, self.size)]
        return [chunks[i : i + self.together] for i in range(0, len(chunks), self.together)]

    def lists(self, batch: list[tuple[int, int]]) -> TokenLists:
        c = self.knobs
        return build(
            self.layout, self.heads, batch, self.size, tile=self.tile, least=max(1, round(self.tile * c.shared)),
            piece=self.piece, step=max(c.rows, self.group) // self.group,
        )  # fmt: skip

    def scratch(self) -> tuple[Tensor, Tensor]:
        """Room for the partial results of one chunk and their lse."""
        rows, dv = self.heads.leads * self.size * self.slots * self.heads.share, self.v.shape[-1]
        part = torch.empty(rows * dv, dtype=self.q.dtype, device=self.q.device)
        return part, torch.empty(rows, dtype=torch.float32, device=self.q.device)

    def partial(self, x: TokenLists, number: int, part: Tensor, part_lse: Tensor) -> None:
        """Partial results of chunk `number` of a batch, block by block."""
        c = self.knobs
        kernels.partial_kernel[(x.max_items,)](
            self.q, self.k, self.v, part, part_lse, x.ids, x.items, x.plan, number=number, max_items=x.max_items,
            first=x.chunks[number][0], NK=x.blocks, ROWS=max(c.rows, self.group), LONGEST=self.longest, STAGES=c.stages,
            num_warps=c.warps, num_stages=c.stages, **_cap(c.regs), **self.plain,
        )  # fmt: skip

    def place(self, x: TokenLists, number: int) -> tuple[int, dict[str, int]]:
        """Tiles of a chunk, and where they are among those of its batch."""
        first, rows = x.chunks[number]
        tile0 = (first - x.chunks[0][0]) // x.tile
        return -(-rows // x.tile), dict(tile0=tile0, tiles_all=x.shared.shape[1], first=first, rows=rows)

    def walk(self, x: TokenLists, number: int, part: Tensor, part_lse: Tensor) -> None:
        """Partial results of a chunk over what tiles of tokens share."""
        c, (tiles, place) = self.knobs, self.place(x, number)
        kernels.walk_kernel[(tiles, self.heads.leads)](
            self.q, self.k, self.v, part, part_lse, shared=x.shared, shared_count=x.shared_count, width=x.shared.shape[2],
            ROWS=self.tile * self.group, T_PAD=max(16, triton.next_power_of_2(self.slots - 1)), STAGES=c.tile_stages,
            num_warps=c.tile_warps, num_stages=c.tile_stages, **place, **self.named(), **self.plain,
        )  # fmt: skip

    def named(self) -> dict[str, object]:
        """What kernels that read lists take beside `plain`."""
        return {n: self.listed[n] for n in ("tiles", "count", "sb", "st", "sq", "cb", "ch", "cq", "H", "HL")}

    def merge(
        self, x: TokenLists, number: int, part: Tensor, part_lse: Tensor | None, out: Tensor, lse: Tensor | None
    ) -> None:
        """Output of a chunk: the sum of its partial results, without part_lse as they are. It uses part_lse up."""
        first, rows = x.chunks[number]
        held, d = max(self.knobs.merge, self.group), out.shape[-1]
        kernels.merge_kernel[(-(-rows * self.group // held), self.heads.leads)](
            part, part_lse, x.present, out, lse, self.heads.g * self.heads.lists, self.heads.share, self.heads.h,
            first - x.chunks[0][0], x.present.shape[1], first, rows, self.size, self.q.shape[2], self.slots, ROWS=held,
            HEADS=self.group, LSE=lse is not None, SUM=part_lse is None, SLOTS_PAD=triton.next_power_of_2(self.slots),
            SLOT_WORDS=slot_words(self.slots - 1), DV=d, DV_PAD=_pad(d), num_warps=4,
        )  # fmt: skip

    def attend(self, want_lse: bool) -> tuple[Tensor, Tensor | None]:
        b, h, n, _ = self.q.shape
        out = torch.empty(b, h, n, self.v.shape[-1], dtype=self.q.dtype, device=self.q.device)
        lse = torch.empty(b, h, n, dtype=torch.float32, device=self.q.device) if want_lse else None
        part, part_lse = self.scratch()
        for batch in self.batches():
            x = self.lists(batch)
            for number in range(len(batch)):
                self.partial(x, number, part, part_lse)
                self.walk(x, number, part, part_lse)
                self.merge(x, number, part, part_lse, out, lse)
        return out, lse


def _cap(regs: int | None) -> dict[str, int]:
    return {} if regs is None or INTERPRET or torch.version.hip is not None else {"maxnreg": regs}


def _pad(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def attend(
    q: Tensor, kv: KV, layout: Layout, scale: float, want_lse: bool, knobs: Config | None = None
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, N, Dv]` and lse fp32 `[B, H, N]` or None, for a call that is not `refused` and a scale above 0.

    `knobs` replaces the choice of `config` (for measurements).
    """
    return Work(q, kv, layout, scale, knobs).attend(want_lse)
