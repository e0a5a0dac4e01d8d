"""KV: a view of the stored keys and values that attention reads.

A view names *entries*: entry e of batch row b and kv head g is one key with its value. Three storages share one
meaning: `dense` rectangles, `paged` pools with a page table per kv head, and `ragged` flat buffers with an offset per
kv head. Whatever the storage, only the first `len[b, g]` entries exist; what lies beyond may hold anything, NaN
included, and never reaches an output. `pos` gives the true text position of each entry (entry number by default) and
`bias` is added to its logit (log-weights, compensation entries, -inf for an entry that must not be seen).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import ShapeError


@dataclass(frozen=True)
class KV:
    """Keys and values of every batch row and kv head, in one of three storages.

    Attributes:
        k, v: storage. dense `[B, G, M, D]` and `[B, G, M, Dv]`; paged pools `[pages, page, D]`; ragged flat `[T, D]`.
            Of one dtype; any strides.
        kind: "dense", "paged" or "ragged".
        len: int32 `[B, G]`, entries that exist; None means all M (dense only).
        table: int32 `[B, G, n]`, page numbers (paged only). A page belongs to one kv head; a pool laid out
            `[pages, G, page, D]` is the same storage seen as `[pages * G, page, D]` with table * G + g.
        offsets: int64 `[B, G]`, first row of each segment in the flat buffers (ragged only).
        capacity: M, an upper bound of `len` known to the host; lists and masks have this width.
        pos: int `[B, G, M]`, text position of each entry; None means the entry number. A layout over such a view
            says where its queries stand (`Layout.q_pos`).
        bias: float `[B, G, M]`, added to the logit of each entry; may require a gradient.
    """

    k: Tensor
    v: Tensor
    kind: str
    capacity: int
    len: Tensor | None = None
    table: Tensor | None = None
    offsets: Tensor | None = None
    pos: Tensor | None = None
    bias: Tensor | None = None

    # ---------------------------------------------------------------- building
    @staticmethod
    def dense(k: Tensor, v: Tensor, len: Tensor | None = None, pos: Tensor | None = None, bias: Tensor | None = None) -> KV:
        """A rectangle: k `[B, G, M, D]`, v `[B, G, M, Dv]`. Raises ShapeError on anything else."""
        if k.dim() != 4 or v.dim() != 4:
            raise ShapeError(f"k and v: expected 4 dimensions [B, G, M, D], got {list(k.shape)} and {list(v.shape)}")
        if k.shape[:3] != v.shape[:3]:
            raise ShapeError(f"v: expected the [B, G, M] of k {list(k.shape[:3])}, got {list(v.shape[:3])}")
        return KV(k, v, "dense", k.shape[2], len=len, pos=pos, bias=bias)._checked()

    @staticmethod
    def paged(k: Tensor, v: Tensor, table: Tensor, len: Tensor, pos: Tensor | None = None, bias: Tensor | None = None) -> KV:
        """Pools k `[pages, page, D]`, v `[pages, page, Dv]`, table int32 `[B, G, n]`, len `[B, G]`."""
        if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
            raise ShapeError(f"paged k and v: expected [pages, page, D], got {list(k.shape)} and {list(v.shape)}")
        if table.dim() != 3:
            raise ShapeError(f"table: expected [B, G, n], got {list(table.shape)}")
        return KV(k, v, "paged", table.shape[2] * k.shape[1], len=len, table=table, pos=pos, bias=bias)._checked()

    @staticmethod
    def ragged(
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        len: Tensor,
        capacity: int,
        pos: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> KV:
        """Flat buffers k `[T, D]`, v `[T, Dv]`; segment (b, g) is rows offsets[b,g] .. offsets[b,g] + len[b,g]."""
        if k.dim() != 2 or v.dim() != 2 or k.shape[0] != v.shape[0]:
            raise ShapeError(f"ragged k and v: expected [T, D], got {list(k.shape)} and {list(v.shape)}")
        return KV(k, v, "ragged", int(capacity), len=len, offsets=offsets, pos=pos, bias=bias)._checked()

    @staticmethod
    def of(kv: KV | tuple[Tensor, Tensor]) -> KV:
        """A KV from a KV or from the shorthand (k, v)."""
        if isinstance(kv, KV):
            return kv
        if isinstance(kv, (tuple, list)) and len(kv) == 2 and all(isinstance(t, Tensor) for t in kv):
            return KV.dense(kv[0], kv[1])
        raise ShapeError(f"kv: expected a KV or a pair (k, v) of tensors, got {type(kv).__name__}")

    def _checked(self) -> KV:
        if self.k.dtype != self.v.dtype or self.k.device != self.v.device:
            raise ShapeError(
                f"v: expected dtype {self.k.dtype} on {self.k.device} like k, got {self.v.dtype} on {self.v.device}"
            )
        given = {n: t for n in ("table", "len", "offsets", "pos", "bias") if (t := getattr(self, n)) is not None}
        if not given:
            return self
        lead = self.shape[:2]
        shapes = {"len": lead, "offsets": lead, "pos": (*lead, self.capacity), "bias": (*lead, self.capacity)}
        for name, t in given.items():
            axes = "[B, G]" if len(shapes.get(name, ())) == 2 else "[B, G, M]"
            if name in shapes and tuple(t.shape) != shapes[name]:
                raise ShapeError(f"{name}: expected {axes} = {list(shapes[name])}, got {list(t.shape)}")
            if t.is_floating_point() != (name == "bias") or t.dtype == torch.bool:
                raise ShapeError(f"{name}: expected {'floats' if name == 'bias' else 'integers'}, got {t.dtype}")
            if t.device != self.k.device:
                raise ShapeError(f"{name}: expected a tensor on {self.k.device} like k, got {t.device}")
        return self

    def validate(self) -> None:
        """Raise ShapeError if lengths, pages or segments reach outside the storage (a few host synchronisations).

        Views that the library's own caches build are trusted and skip this.
        """
        if self.len is not None:
            self._within("len", self.len, 0, self.capacity)
        if self.kind == "paged":
            assert self.table is not None
            used = torch.arange(self.table.shape[2], device=self.device) * self.k.shape[1] < self.lengths()[..., None]
            self._within("table", torch.where(used, self.table, 0), 0, max(0, self.k.shape[0] - 1))
        if self.kind == "ragged":
            assert self.offsets is not None
            self._within("offsets", self.offsets, 0, self.k.shape[0])
            self._within("offsets + len", self.offsets + self.lengths(), 0, self.k.shape[0])

    @staticmethod
    def _within(name: str, t: Tensor, low: int, high: int) -> None:
        wrong = (t < low) | (t > high)
        if bool(wrong.any()):
            b, g, *page = wrong.nonzero()[0].tolist()
            at = f"batch row {b}, kv head {g}" + (f", page {page[0]}" if page else "")
            raise ShapeError(f"{name}: expected {low} to {high}, got {int(t[wrong][0])} ({at})")

    # ---------------------------------------------------------------- reading
    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, G, M, D, Dv)."""
        if self.kind == "dense":
            b, g = self.k.shape[:2]
        else:
            index = self.table if self.kind == "paged" else self.offsets
            assert index is not None
            b, g = index.shape[:2]
        return b, g, self.capacity, self.k.shape[-1], self.v.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.k, self.v, self.bias))

    def lengths(self) -> Tensor:
        """int64 `[B, G]`, entries that exist."""
        b, g, m, _, _ = self.shape
        if self.len is None:
            return torch.full((b, g), m, dtype=torch.int64, device=self.device)
        return self.len.to(torch.int64)

    def longest(self) -> int:
        """Entries of the longest row and kv head. Asks the device only where lengths differ."""
        return self.shape[2] if self.len is None else int(self.len.max())

    def positions(self) -> Tensor:
        """int64 `[B, G, M]`, text position of each entry."""
        b, g, m, _, _ = self.shape
        if self.pos is None:
            return torch.arange(m, device=self.device).expand(b, g, m)
        return self.pos.to(torch.int64)

    def exists(self) -> Tensor:
        """bool `[B, G, M]`: the entry is within `len` and its bias is not -inf."""
        b, g, m, _, _ = self.shape
        live = torch.arange(m, device=self.device) < self.lengths()[..., None]
        return live if self.bias is None else live & (self.bias > float("-inf"))

    def rows(self, entries: Tensor) -> Tensor:
        """Row numbers in the flattened storage of entries `[B, G, ...]`, 0 <= entry < M; see `flat`.

        An entry beyond `len` gives some row of paged and ragged storage, never one outside it.
        """
        b, g, m, _, _ = self.shape
        entries = entries.to(torch.int64)
        lead = (b, g) + (1,) * (entries.dim() - 2)
        if self.kind == "dense":
            base = torch.arange(b * g, device=self.device).view(lead) * self.k.shape[2]
            return base + entries
        if self.kind == "ragged":
            assert self.offsets is not None
            return (self.offsets.view(lead) + entries).clamp(0, max(0, self.k.shape[0] - 1))
        assert self.table is not None
        pages, page = self.k.shape[:2]
        number = torch.gather(self.table.to(torch.int64), 2, (entries // page).flatten(2)).view(entries.shape)
        return number.clamp(0, max(0, pages - 1)) * page + entries % page

    def flat(self) -> tuple[Tensor, Tensor]:
        """Storage as rows `[T, D]` and `[T, Dv]`, the space that `rows` indexes.

        Copies a dense view that is not contiguous, such as the used part of a larger buffer: index that as it is.
        """
        return self.k.reshape(-1, self.k.shape[-1]), self.v.reshape(-1, self.v.shape[-1])

    def gather(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of entries `[B, G, n]` as `[B, G, n, D]` and `[B, G, n, Dv]`; entries must be in range."""
        if self.kind == "dense":
            index = entries.to(torch.int64)[..., None]
            k = torch.gather(self.k, 2, index.expand(*entries.shape, self.k.shape[-1]))
            v = torch.gather(self.v, 2, index.expand(*entries.shape, self.v.shape[-1]))
            return k, v
        rows = self.rows(entries)
        k, v = self.flat()
        return k[rows], v[rows]

    def to_dense(self) -> KV:
        """The same entries as a dense view. Slots beyond `len` are zero, whatever the storage held there."""
        b, g, m, _, _ = self.shape
        if self.kind == "dense" and self.len is None:
            return self
        live = (torch.arange(m, device=self.device) < self.lengths()[..., None])[..., None]
        if self.kind == "dense":
            k, v = self.k, self.v
        elif self.k.numel() == 0:
            k, v = (t.new_zeros(b, g, m, t.shape[-1]) for t in (self.k, self.v))
        else:
            k, v = self.gather(torch.arange(m, device=self.device).expand(b, g, m))
        k, v = k.masked_fill(~live, 0), v.masked_fill(~live, 0)
        return KV(k, v, "dense", m, len=self.len, pos=self.pos, bias=self.bias)

    def row(self, b: int) -> KV:
        """The view of batch row b alone, without copying."""
        cut = {n: t[b : b + 1] for n in ("len", "table", "offsets", "pos", "bias") if (t := getattr(self, n)) is not None}
        if self.kind == "dense":
            return replace(self, k=self.k[b : b + 1], v=self.v[b : b + 1], **cut)
        return replace(self, **cut)

    def heads(self, first: int, end: int) -> KV:
        """The view of kv heads first..end - 1 alone, without copying."""
        some = {
            n: t[:, first:end] for n in ("len", "table", "offsets", "pos", "bias") if (t := getattr(self, n)) is not None
        }
        if self.kind == "dense":
            return replace(self, k=self.k[:, first:end], v=self.v[:, first:end], **some)
        return replace(self, **some)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage this view sees (the whole pool for paged and ragged views)."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.pos, self.bias) if t is not None)
