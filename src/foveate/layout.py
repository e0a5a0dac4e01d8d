"""Layout: which (query, key) pairs get computed, as plain tensors. Parts, several partial softmaxes, are in `parts.py`.

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

A head has (b) and (c), or (d), never both; the rule (a) may stand beside either and may name the same keys.
Distances are counted in entry numbers, so (d) is for views in text order (`kv.pos` None; under ragged `kv.len` give
`q_pos`). `full=True` is dense attention. Index tensors may have 1 for B, and any divisor of H for H (H // G query
heads then share one list). Rows are int32, padded beyond their count with anything in range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from . import checks, convert, counts, lists
from .convert import Inverse
from .errors import LayoutError
from .kv import KV
from .lists import NO_LIMIT, RULE_FIELDS
from .parts import Part, Parts

__all__ = ["NO_LIMIT", "RULE_FIELDS", "TENSOR_FIELDS", "Inverse", "Layout", "Part", "Parts"]


@dataclass(frozen=True)
class Layout:
    """Which pairs of a [B, H, N, M] attention are computed. Build with the class methods below.

    Attributes:
        shape: (B, H, N, M): batch rows, query heads, query rows, capacity of the KV view.
        causal: a pair needs pos[key] <= q_pos[query].
        full: every (causally visible) pair; all other parts are then absent.
        block_q, q_offset: rows in a query block; rows of block 0 that lie before this call's first row.
        q_pos: int `[B, N]` text positions of the query rows; None: the last N positions before `kv.len`. A view
            with its own `kv.pos` wants it given, since entry numbers say nothing about positions there.
        sink, window, stride, phase: int32 `[B|1, Hl]`, the static rule (0 switches a part off); key block
            p // tile_width is seen when stride > 0 and (p // tile_width) % stride == phase.
        tiles, tile_count, tile_width: int32 `[B|1, Hl, nq, T]`, `[B|1, Hl, nq]`, keys per tile.
        entries, entry_count: int32 `[B|1, Hl, nq, C]`, `[B|1, Hl, nq]`.
        diagonals, diagonal_count: int32 `[B|1, Hl, S]`, `[B|1, Hl]`, distances ascending.
        columns, column_count: int32 `[B|1, Hl, V]`, `[B|1, Hl]`.
        share: per thousand visible pairs, those of its whole tiles where a validation found all of them on the grid of
            tile_width; -1 where nobody asked. It tells the host, and so a choice of kernels, what lists hold.
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
    share: int = -1

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
        validate: bool = True,
    ) -> Layout:
        """A rule without lists. Each of sink, window, stride, phase is an int or a tensor `[Hl]` or `[B|1, Hl]`.

        Tensors are checked for negative values with one synchronisation each, unless `validate` is False.
        """
        if validate:
            checks.shape_fits(shape)
        phase = 0 if stride is not None and phase is None else phase
        rule = dict(zip(RULE_FIELDS, (sink, window, stride, phase), strict=True))
        return Layout(
            shape,
            causal=causal,
            block_q=block_q,
            q_offset=q_offset,
            tile_width=stride_block,
            q_pos=q_pos,
            **{name: checks.rule(name, value, device, validate) for name, value in rule.items()},
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
        sink: int | Tensor | None = None,
        window: int | Tensor | None = None,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
        causal: bool = True,
        validate: bool = True,
    ) -> Layout:
        """Per-block lists given by the user; validated here with a few synchronisations (LayoutError names the place).

        Rows of tile starts and of entries ascend. Tiles may overlap: the later one owns the shared keys. Entries that
        lie inside a tile of their row are dropped.
        """
        index = tiles if tiles is not None else entries
        device = "cpu" if index is None else index.device
        layout = Layout(
            shape,
            causal=causal,
            block_q=block_q,
            q_offset=q_offset,
            tile_width=tile_width,
            q_pos=q_pos,
            sink=checks.rule("sink", sink, device, validate),
            window=checks.rule("window", window, device, validate),
            tiles=checks.int32("tiles", tiles),
            tile_count=checks.counts_of(tiles, tile_count),
            entries=checks.int32("entries", entries),
            entry_count=checks.counts_of(entries, entry_count),
        )
        if validate:
            checks.lists_fit(layout)
        if tiles is not None and entries is not None:
            e, c = lists.drop_covered(layout)
            layout = replace(layout, entries=e, entry_count=c)
        return replace(layout, share=checks.share(layout)) if validate else layout

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
        validate: bool = True,
    ) -> Layout:
        """Diagonals (distances `[B|1, Hl, S]`) and columns `[B|1, Hl, V]` shared by every row; causal.

        Any distances and columns 0..M-1 may be given, in any order, repeated or not: rows of a block that ends before
        position e reach a distance d as the keys [e-d-block_q, e-d), and the union of those is re-cut here into tiles
        of `tile_width` (it may grow by less than a tile per run of neighbouring distances). Time and scratch memory
        are O(M) per head; `validate=False` saves four of the five synchronisations.
        """
        if validate:
            checks.in_range("diagonals", diagonals, checks.counts_of(diagonals, diagonal_count), shape[3])
            checks.in_range("columns", columns, checks.counts_of(columns, column_count), shape[3])
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
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise LayoutError(f"mask: expected bool [B, H, nq, nk], got {mask.dtype} {list(mask.shape)}")
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
        indptr: Tensor,
        ids: Tensor,
        shape: tuple[int, int, int, int],
        *,
        block_q: int,
        block_k: int,
        causal: bool = True,
        q_offset: int = 0,
        q_pos: Tensor | None = None,
    ) -> Layout:
        """From CSR over (b, h, query block) rows: indptr `[B*H*nq + 1]`, ids = ascending key block numbers. Validated."""
        plain = dict(causal=causal, q_offset=q_offset, q_pos=q_pos)
        return convert.from_csr(Layout, indptr, ids, shape, block_q, block_k, **plain).validated()

    @staticmethod
    def from_torch_block_mask(block_mask: object, h: int, *, causal: bool = True) -> Layout:
        """From a `flex_attention.BlockMask`: its block structure; its mask_mod must be causal or none."""
        return convert.from_torch_block_mask(Layout, block_mask, h, causal)

    @staticmethod
    def by_head(mask: Tensor, a: Layout, b: Layout) -> Layout:
        """Heads where `mask` (bool `[H]` or `[B, H]`) is True follow `a`, the others follow `b`.

        Lists of both sides need one grid of query blocks and one tile width; a rule or a dense side follows the other
        side's grid. Raises LayoutError with the reason otherwise.
        """
        return convert.by_head(mask, a, b)

    # ------------------------------------------------------------------ properties
    @property
    def num_blocks(self) -> int:
        """Query blocks, the first of which may be partial (`q_offset`)."""
        return -(-(self.shape[2] + self.q_offset) // self.block_q)

    @property
    def has_lists(self) -> bool:
        """Any of `INDEX_FIELDS`."""
        listed = self.tiles is not None or self.entries is not None
        return listed or self.diagonals is not None or self.columns is not None

    @property
    def has_rule(self) -> bool:
        """Any of `RULE_FIELDS`."""
        near = self.sink is not None or self.window is not None
        return near or self.stride is not None or self.phase is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors."""
        return sum(t.numel() * t.element_size() for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor))

    def tensors(self) -> list[Tensor | None]:
        """The tensor fields in a fixed order (`from_tensors` is the inverse; `attend`'s operator uses both)."""
        return [
            self.q_pos, self.sink, self.window, self.stride, self.phase, self.tiles, self.tile_count, self.entries,
            self.entry_count, self.diagonals, self.diagonal_count, self.columns, self.column_count,
        ]  # fmt: skip

    def meta(self) -> list[int]:
        """The plain fields as integers, in a fixed order."""
        return [*self.shape, int(self.causal), int(self.full), self.block_q, self.q_offset, self.tile_width, self.share]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor | None], meta: Sequence[int]) -> Layout:
        b, h, n, m, causal, full, block_q, q_offset, width, share = meta
        plain = dict(causal=bool(causal), full=bool(full), block_q=block_q, q_offset=q_offset, tile_width=width, share=share)
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
    def to_mask(self, kv: KV | None = None, rows: Tensor | None = None) -> Tensor:
        """bool `[B, H, N, M]`: the pairs this layout names. For tests and pictures; costs N x M.

        With `rows` int64 `[R]`, numbers of this call's query rows: `[B, H, R, M]` of those alone, for the memory of
        those alone.
        """
        return lists.to_mask(self, kv, rows)

    def to_block_mask(self, block_q: int, block_k: int, kv: KV | None = None, q_offset: int = 0) -> Tensor:
        """bool `[B, H, nq, nk]`: blocks that hold at least one named and visible pair; exact.

        Key blocks count from entry 0. `q_offset` rows of row block 0 lie before this call's first row: 0 anchors the
        grid at the call, `layout.q_offset` at the layout's own query blocks. Give `kv` when it has lengths, positions
        or biases of its own.
        """
        return counts.to_block_mask(self, block_q, block_k, kv, q_offset)

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """(indptr int64 `[B*H*nq + 1]`, ids int32) of a tile layout whose tiles are aligned to `tile_width`."""
        return convert.to_csr(self)

    def to_torch_block_mask(self, block: int = 128) -> object:
        """A `torch.nn.attention.flex_attention.BlockMask` that computes exactly these pairs, for default positions.

        Its mask_mod evaluates the rule and searches the lists, so it holds nothing of size N x M beyond the block
        structure that every BlockMask has.
        """
        return convert.to_torch_block_mask(self, block)

    def inverse(self) -> Inverse:
        """For each key tile, and each single key, the query blocks that list it, ascending: what a backward pass over
        keys walks. Tiles and diagonals of any origin, per list head; the rule is not part of it. Deterministic."""
        return convert.inverse(self)

    def pairs(self, kv: KV | None = None) -> Tensor:
        """int64 `[B, H]`: named and visible pairs. Exact, without N x M memory.

        A view with positions or biases of its own (`kv`) and permuted `q_pos` cost time N x M; everything else costs
        time in proportion to the lists.
        """
        return counts.count_pairs(self, kv)

    def visible(self, kv: KV | None = None) -> Tensor:
        """int64 `[B, H]`: pairs that dense attention with this causality would compute. Costs as `pairs`."""
        return counts.visible_pairs(self, kv)

    def computed(self, tiling: tuple[int, int] | None = None, kv: KV | None = None) -> int:
        """Pairs a kernel computes, over all batch rows and heads.

        `tiling` is the kernel's own grid (block_q, block_k), anchored where the layout's query blocks are (a rule alone
        has none: at this call's first row): every block with a named pair counts whole, cut only at the first and last
        row and the last entry. None is a kernel that walks the lists as they are: a tile counts `tile_width` keys and
        an entry one for each row of its block, visible or not; pairs of the rule count one by one, and those that lists
        name too count twice. A dense layout counts its visible pairs under any tiling: it is the unit.
        """
        return counts.computed_pairs(self, tiling, kv)

    def density(self, kv: KV | None = None) -> float:
        """Named pairs / visible pairs, over all rows and heads; exact. In decode this is entries read / entries that
        exist. Entry weights other than -inf do not matter."""
        return float(self.pairs(kv).sum()) / max(1, int(self.visible(kv).sum()))

    def density_computed(self, tiling: tuple[int, int] | None = None, kv: KV | None = None) -> float:
        """`computed` pairs / visible pairs: the figure that speed claims cite. It may exceed 1."""
        return self.computed(tiling, kv) / max(1, int(self.visible(kv).sum()))

    # ------------------------------------------------------------------ checks
    def validated(self) -> Layout:
        """This layout, checked, with its `share` where it has tiles alone."""
        self.validate()
        return replace(self, share=checks.share(self))

    def validate(self) -> None:
        """Raise LayoutError for lists that cannot be executed or name a key twice (a few host synchronisations)."""
        checks.lists_fit(self)
        checks.named_once(self)


TENSOR_FIELDS = tuple(f.name for f in fields(Layout) if "Tensor" in str(f.type))
