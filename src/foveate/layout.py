"""Layout: which (query, key) pairs get computed, as plain tensors. Parts: several partial softmaxes.

Indices are *entry numbers* of a `KV` view; causality and windows compare *positions* (`q_pos` against `kv.pos`).
Query rows are grouped into blocks of `block_q` rows; the grid is anchored at absolute position 0, so a chunk that
starts inside a block says so with `q_offset` and gets the same blocks as the whole prompt would.

A head sees the union of up to four parts; a key named by two of them counts once:

(a) a static rule: `sink` first positions, a `window` of most recent positions, every `stride`-th key block;
(b) `tiles`: per query block, `tile_width` keys from each start, ascending; where two overlap, the later one owns
    the shared keys (a tile stops where the next one starts);
(c) `entries`: per query block, single keys, ascending;
(d) the factored form, shared by all query blocks of a head and expanded on the device by the kernel that needs it:
    `diagonals` (distance d stands for the tile [e - d - w, e - d) of a block that ends before position e; a nearer
    tile owns what two share) and
    `columns` (single keys). A million-token vertical-slash head is a few kilobytes.

`full=True` is dense attention. Index tensors may have 1 for B, and any divisor of H for H (H // G query heads then
share one list). Rows are int32, padded beyond their count with anything in range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import lists
from .errors import LayoutError
from .kv import KV
from .lists import Inverse

INDEX_FIELDS = ("tiles", "entries", "diagonals", "columns")
RULE_FIELDS = ("sink", "window", "stride", "phase")
NO_LIMIT = 2**30  # a window nothing is older than


@dataclass(frozen=True)
class Layout:
    """Which pairs of a [B, H, N, M] attention are computed. Build with the class methods below.

    Attributes:
        shape: (B, H, N, M): batch rows, query heads, query rows, capacity of the KV view.
        causal: a pair needs pos[key] <= q_pos[query].
        full: every (causally visible) pair; all other parts are then absent.
        block_q, q_offset: rows in a query block; rows of block 0 that lie before this call's first row.
        q_pos: int `[B, N]` text positions of the query rows; None: the last N positions before `kv.len`.
        sink, window, stride, phase: int32 `[B|1, Hl]`, the static rule (0 switches a part off); key block
            p // tile_width is seen when stride > 0 and (p // tile_width) % stride == phase.
        tiles, tile_count, tile_width: int32 `[B|1, Hl, nq, T]`, `[B|1, Hl, nq]`, keys per tile.
        entries, entry_count: int32 `[B|1, Hl, nq, C]`, `[B|1, Hl, nq]`.
        diagonals, diagonal_count: int32 `[B|1, Hl, S]`, `[B|1, Hl]`, distances ascending.
        columns, column_count: int32 `[B|1, Hl, V]`, `[B|1, Hl]`.
    """

    shape: tuple[int, int, int, int]
    causal: bool = True
    full: bool = False
    block_q: int = 1
    q_offset: int = 0
    tile_width: int = 1
    q_pos: Tensor | None = None
    sink: Tensor | None = None
    window: Tensor | None = None
    stride: Tensor | None = None
    phase: Tensor | None = None
    tiles: Tensor | None = None
    tile_count: Tensor | None = None
    entries: Tensor | None = None
    entry_count: Tensor | None = None
    diagonals: Tensor | None = None
    diagonal_count: Tensor | None = None
    columns: Tensor | None = None
    column_count: Tensor | None = None

    # ------------------------------------------------------------------ builders
    @staticmethod
    def dense(b: int, h: int, n: int, m: int, *, causal: bool = True, q_pos: Tensor | None = None) -> Layout:
        """Every visible pair."""
        return Layout((b, h, n, m), causal=causal, full=True, q_pos=q_pos)

    @staticmethod
    def static(
        shape: tuple[int, int, int, int],
        *,
        sink: int | Tensor = 0,
        window: int | Tensor = 0,
        stride: int | Tensor | None = None,
        phase: int | Tensor | None = None,
        stride_block: int = 64,
        block_q: int = 128,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
        causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> Layout:
        """A rule without lists. Each of sink, window, stride, phase is an int or a tensor `[Hl]` or `[B|1, Hl]`."""
        for name, value in (("sink", sink), ("window", window), ("stride", stride or 0), ("phase", phase or 0)):
            if not isinstance(value, Tensor) and value < 0:
                raise LayoutError(f"{name}: expected a number of keys >= 0, got {value}")

        def rule(x: int | Tensor | None) -> Tensor | None:
            if x is None:
                return None
            t = x.to(torch.int32) if isinstance(x, Tensor) else torch.full((1, 1), min(x, NO_LIMIT), dtype=torch.int32)
            return (t if t.dim() == 2 else t.view(1, -1)).to(device)

        return Layout(
            shape,
            causal=causal,
            block_q=block_q,
            q_offset=q_offset,
            tile_width=stride_block,
            q_pos=q_pos,
            sink=rule(sink),
            window=rule(window),
            stride=rule(stride),
            phase=rule(phase if phase is not None else (0 if stride is not None else None)),
        )

    @staticmethod
    def lists(
        shape: tuple[int, int, int, int],
        *,
        block_q: int,
        tile_width: int = 1,
        tiles: Tensor | None = None,
        tile_count: Tensor | None = None,
        entries: Tensor | None = None,
        entry_count: Tensor | None = None,
        sink: Tensor | None = None,
        window: Tensor | None = None,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
        causal: bool = True,
        validate: bool = True,
    ) -> Layout:
        """Per-block lists given by the user; validated here with one synchronisation (LayoutError names the row)."""
        layout = Layout(
            shape,
            causal=causal,
            block_q=block_q,
            q_offset=q_offset,
            tile_width=tile_width,
            q_pos=q_pos,
            sink=sink,
            window=window,
            tiles=_int32(tiles),
            tile_count=_counts(tiles, tile_count),
            entries=_int32(entries),
            entry_count=_counts(entries, entry_count),
        )
        if validate:
            layout.validate()
        if tiles is not None and entries is not None:
            e, c = lists.drop_covered(layout)
            layout = replace(layout, entries=e, entry_count=c)
        return layout

    @staticmethod
    def factored(
        shape: tuple[int, int, int, int],
        *,
        diagonals: Tensor,
        columns: Tensor,
        diagonal_count: Tensor | None = None,
        column_count: Tensor | None = None,
        block_q: int = 64,
        tile_width: int = 64,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
    ) -> Layout:
        """Diagonals (distances `[B|1, Hl, S]`) and columns `[B|1, Hl, V]` shared by every row; causal.

        Any distances may be given, in any order: rows of a block reach a distance d as the tile [e-d-block_q, e-d),
        and the union of those tiles is re-cut here into tiles of `tile_width`.
        """
        d, dc = lists.merge_diagonals(diagonals, diagonal_count, shape[3], block_q, tile_width)
        c, cc = lists.sort_unique(columns, column_count)
        return Layout(
            shape,
            block_q=block_q,
            q_offset=q_offset,
            tile_width=tile_width,
            q_pos=q_pos,
            diagonals=d,
            diagonal_count=dc,
            columns=c,
            column_count=cc,
        )

    @staticmethod
    def from_block_mask(
        mask: Tensor,
        n: int,
        m: int,
        *,
        block_q: int,
        block_k: int,
        heads: int | None = None,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
        causal: bool = True,
    ) -> Layout:
        """From a boolean block map `[B, Hl, nq, nk]` (True: compute the block). No host synchronisation."""
        b, hl, nq, nk = mask.shape
        want = (-(-(n + q_offset) // block_q), -(-m // block_k))
        if (nq, nk) != want:
            raise LayoutError(f"mask: expected {list(want)} blocks of {block_q} x {block_k}, got {[nq, nk]}")
        index, count = lists.compact(mask)
        return Layout(
            (b, heads or hl, n, m),
            causal=causal,
            block_q=block_q,
            q_offset=q_offset,
            q_pos=q_pos,
            tiles=index * block_k,
            tile_count=count,
            tile_width=block_k,
        )

    @staticmethod
    def from_csr(
        indptr: Tensor, ids: Tensor, shape: tuple[int, int, int, int], *, block_q: int, block_k: int, causal: bool = True
    ) -> Layout:
        """From CSR over (b, h, query block) rows: indptr `[B*H*nq + 1]`, ids = ascending key block numbers."""
        return replace(
            lists.csr_to_lists(Layout, indptr, ids, shape, block_q, block_k), causal=causal, q_offset=0
        ).validated()

    @staticmethod
    def from_torch_block_mask(block_mask: object, h: int, *, causal: bool = True) -> Layout:
        """From a `flex_attention.BlockMask`: its block structure; its mask_mod must be causal or none."""
        return lists.from_torch_block_mask(Layout, block_mask, h, causal)

    @staticmethod
    def by_head(mask: Tensor, a: Layout, b: Layout) -> Layout:
        """Heads where `mask` (bool `[H]` or `[B, H]`) is True follow `a`, the others follow `b`."""
        return lists.by_head(mask, a, b)

    # ------------------------------------------------------------------ properties
    @property
    def num_blocks(self) -> int:
        """Query blocks, the first of which may be partial (`q_offset`)."""
        return -(-(self.shape[2] + self.q_offset) // self.block_q)

    @property
    def has_lists(self) -> bool:
        return any(getattr(self, n) is not None for n in INDEX_FIELDS)

    @property
    def has_rule(self) -> bool:
        return any(getattr(self, n) is not None for n in RULE_FIELDS)

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors."""
        return sum(t.numel() * t.element_size() for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor))

    def tensors(self) -> list[Tensor | None]:
        """The tensor fields in a fixed order (`from_tensors` is the inverse; `attend`'s operator uses both)."""
        return [getattr(self, n) for n in TENSOR_FIELDS]

    def meta(self) -> list[int]:
        """The plain fields as integers, in a fixed order."""
        return [*self.shape, int(self.causal), int(self.full), self.block_q, self.q_offset, self.tile_width]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor | None], meta: Sequence[int]) -> Layout:
        b, h, n, m, causal, full, block_q, q_offset, width = meta
        plain = dict(causal=bool(causal), full=bool(full), block_q=block_q, q_offset=q_offset, tile_width=width)
        return Layout((b, h, n, m), **plain, **dict(zip(TENSOR_FIELDS, tensors, strict=True)))  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, **{n: t.to(device) for n in TENSOR_FIELDS if (t := getattr(self, n)) is not None})

    def query_positions(self, kv: KV | None = None) -> Tensor:
        """int64 `[B, G|1, N]`, text position of every query row."""
        b, _, n, m = self.shape
        if self.q_pos is not None:
            return self.q_pos.to(torch.int64)[:, None, :]
        steps = torch.arange(n, device=self.device if kv is None else kv.device)
        if kv is None or kv.len is None:
            return (m - n + steps).expand(b, 1, n)
        return kv.lengths()[..., None] - n + steps

    @cached_property
    def device(self) -> torch.device:
        for name in TENSOR_FIELDS:
            if (t := getattr(self, name)) is not None:
                return t.device
        return torch.device("cpu")

    # ------------------------------------------------------------------ meaning
    def to_mask(self, kv: KV | None = None) -> Tensor:
        """bool `[B, H, N, M]`: the pairs this layout names. For tests and pictures; costs N x M."""
        return lists.to_mask(self, kv)

    def to_block_mask(self, block_q: int, block_k: int) -> Tensor:
        """bool `[B, H, nq, nk]`: aligned blocks that hold at least one named pair (causal blocks only)."""
        return lists.to_block_mask(self, block_q, block_k)

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """(indptr int64 `[B*H*nq + 1]`, ids int32) of a tile layout whose tiles are aligned to `tile_width`."""
        return lists.to_csr(self)

    def to_torch_block_mask(self, block: int = 128) -> object:
        """A `torch.nn.attention.flex_attention.BlockMask` that computes exactly these pairs."""
        return lists.to_torch_block_mask(self, block)

    def inverse(self) -> Inverse:
        """For each key tile the query blocks that list it, ascending: what the backward pass walks."""
        return lists.inverse(self)

    def pairs(self) -> Tensor:
        """int64 `[B, H]`: named pairs (for default positions; costs the lists, not N x M)."""
        return lists.count_pairs(self)

    def density(self) -> float:
        """Named pairs / visible pairs, over all heads."""
        return float(self.pairs().sum()) / max(1, lists.visible_pairs(self) * self.shape[0] * self.shape[1])

    def density_computed(self, tiling: tuple[int, int] | None = None) -> float:
        """Pairs a kernel computes / visible pairs. `tiling` is the kernel's own aligned grid (block_q, block_k), or
        None for one that walks the lists as they are. Speed claims cite this figure."""
        done = lists.computed_pairs(self, tiling)
        return done / max(1, lists.visible_pairs(self) * self.shape[0] * self.shape[1])

    # ------------------------------------------------------------------ checks
    def validated(self) -> Layout:
        self.validate()
        return self

    def validate(self) -> None:
        """Raise LayoutError for a list that cannot be executed (one host synchronisation)."""
        b, h, n, m = self.shape
        if min(b, h, n, m) < 1:
            raise LayoutError(f"shape: expected B, H, N, M >= 1, got {self.shape}")
        if self.block_q < 1 or self.tile_width < 1 or not 0 <= self.q_offset < self.block_q:
            raise LayoutError(
                f"expected block_q >= 1, tile_width >= 1 and 0 <= q_offset < block_q, "
                f"got {self.block_q}, {self.tile_width}, {self.q_offset}"
            )
        if self.q_pos is not None and tuple(self.q_pos.shape) != (b, n):
            raise LayoutError(f"q_pos: expected [B, N] = [{b}, {n}], got {list(self.q_pos.shape)}")
        for name in RULE_FIELDS:
            t = getattr(self, name)
            if t is not None:
                _lead(name, t, b, h, 2)
                if bool((t < 0).any()):
                    raise LayoutError(f"{name}: expected values >= 0, got {int(t.min())}")
        for name, count_name, blocked in (
            ("tiles", "tile_count", True),
            ("entries", "entry_count", True),
            ("diagonals", "diagonal_count", False),
            ("columns", "column_count", False),
        ):
            index, count = getattr(self, name), getattr(self, count_name)
            if index is None:
                continue
            _lead(name, index, b, h, 4 if blocked else 3)
            if blocked and index.shape[2] != self.num_blocks:
                raise LayoutError(f"{name}: expected {self.num_blocks} query blocks, got {index.shape[2]}")
            _check_rows(name, index, count, m + self.block_q if name == "diagonals" else m)


TENSOR_FIELDS = tuple(f.name for f in fields(Layout) if "Tensor" in str(f.type))


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)


def _counts(index: Tensor | None, count: Tensor | None) -> Tensor | None:
    if index is None:
        return None
    if count is None:
        return torch.full(index.shape[:-1], index.shape[-1], dtype=torch.int32, device=index.device)
    return count.to(torch.int32)


def _lead(name: str, t: Tensor, b: int, h: int, dims: int) -> None:
    if t.dim() != dims or t.shape[0] not in (1, b) or h % t.shape[1]:
        raise LayoutError(f"{name}: expected {dims} dimensions [1 or {b}, a divisor of {h}, ...], got {list(t.shape)}")


def _check_rows(name: str, index: Tensor, count: Tensor, m: int) -> None:
    width = index.shape[-1]
    if count is None or count.shape != index.shape[:-1]:
        raise LayoutError(f"{name}: expected counts of shape {list(index.shape[:-1])}")
    where = ((count < 0) | (count > width)).nonzero()
    if len(where):
        at = where[0].tolist()
        raise LayoutError(f"{name}: count at {at} is {int(count[tuple(at)])}, expected 0 to the width {width}")
    used = torch.arange(width, device=index.device) < count[..., None]
    where = (used & ((index < 0) | (index >= m))).nonzero()
    if len(where):
        at = where[0].tolist()
        raise LayoutError(f"{name}: index {int(index[tuple(at)])} at {at} is outside 0 to {m - 1}")
    step = pad(index[..., 1:] - index[..., :-1], (1, 0), value=1)
    where = (used & (step <= 0)).nonzero()
    if len(where):
        at = where[0].tolist()
        what = "duplicated" if int(step[tuple(at)]) == 0 else "not ascending"
        raise LayoutError(f"{name}: index {int(index[tuple(at)])} at {at} is {what}")


@dataclass(frozen=True)
class Part:
    """One partial softmax: a layout over its own views of queries and keys (None: those of the call).

    `gate` `[B, H, N]` multiplies this part's output under combine="gated". `scale` overrides the softmax scale.
    """

    layout: Layout
    q: Tensor | None = None
    kv: KV | None = None
    gate: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Parts:
    """Several partial softmaxes: under "lse" one softmax over their disjoint union, under "gated" a weighted sum.

    Under "lse" the parts must be disjoint or carry entry weights (`KV.bias`); `validate` checks the first for parts
    that read the same view.
    """

    parts: tuple[Part, ...]
    combine: str = "lse"

    def __post_init__(self) -> None:
        if self.combine not in ("lse", "gated"):
            raise LayoutError(f"combine: expected 'lse' or 'gated', got {self.combine!r}")
        if not self.parts:
            raise LayoutError("parts: expected at least one part, got none")
        if self.combine == "gated" and any(p.gate is None for p in self.parts):
            raise LayoutError("parts: combine='gated' expects a gate on every part")

    def validate(self) -> None:
        """Raise LayoutError if two parts that read the call's own keys name the same pair (costs N x M)."""
        seen: Tensor | None = None
        for i, part in enumerate(self.parts):
            part.layout.validate()
            if self.combine == "lse" and part.kv is None:
                mask = part.layout.to_mask()
                if seen is not None and bool((seen & mask).any()):
                    at = (seen & mask).nonzero()[0].tolist()
                    raise LayoutError(f"parts: part {i} overlaps an earlier part at [b, h, query, key] = {at}")
                seen = mask if seen is None else seen | mask
