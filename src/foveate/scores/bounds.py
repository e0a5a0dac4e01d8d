"""Page bounds: the largest and smallest key per page, and from them the highest logit a query can have in a page.

Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774).
"""

from __future__ import annotations

import weakref
from types import ModuleType

import torch
from torch import Tensor

from ..errors import ShapeError
from ..kv import KV
from ..packed import CodedPair, PackedKV
from ..select import top_indices
from . import fused
from .keys import pieces

FEW = 16384  # entries of an evicted cache that are cheaper to read again than to ask about


class Bounds:
    """Element-wise maximum and minimum of the keys of each page of `page` entries, kept beside a layer's cache.

    `update` brings it up to date with a view and reads only the pages that changed since: the last one in a decode
    step. Pages are numbered by entries, so evicted caches and rows of different length need nothing special. It lives
    in `state.layer`, whose truncate, fork and reorder it follows; a truncated page is computed again from its keys, and so
    are pages of keys that a store has turned into codes since, so that bounds are those of the keys attention reads.
    """

    def __init__(self, page: int):
        self.page = page
        self.data: Tensor | None = None  # [B, G, pages, 2D]: maxima, then minima, side by side for one product
        self.done = 0  # entries of the longest row that are covered
        self.len: Tensor | None = None  # int [B, G] entries covered, where rows or heads differ
        self.coded: Tensor | None = None  # int32 [B, G], of a view that holds codes: keys in codes when it was covered
        self._fresh: weakref.ref[Tensor] | None = None  # the lengths of a view that is covered already, see `joined`

    def update(self, kv: KV) -> None:
        """Cover all entries of `kv`. The view must continue the one of the last call (same rows, entries appended)."""
        if self._fresh is not None and kv.len is not None and self._fresh() is kv.len:
            return
        m, pages = kv.capacity, -(-kv.capacity // self.page)
        if self.data is not None and tuple(self.data.shape[:2]) != kv.shape[:2]:
            raise ShapeError(f"kv: expected the {list(self.data.shape[:2])} rows and kv heads these bounds were built for")
        if kv.len is None and self.len is None and kv.pos is None and self.done == m and self.data is not None:
            return
        if (kernels := self._steady(kv)) is not None:
            self._reserve(kv, pages)
            more = () if _pair(kv) is None else (self.coded,)
            kernels.update(kv, self.data, self.page, self.done if self.len is None else self.len, *more)
            self.done = m
            return
        start: int | None = 0  # first page to read again; None: the last page of every row and head
        if kv.pos is not None and kv.device.type == "cuda" and m <= FEW:
            pass  # what an eviction left is read whole, without asking the device what is new: a step can be captured
        elif kv.len is None and self.len is None and self.done < m:
            start = self.done // self.page
        elif kv.len is not None and self.len is not None and torch.equal(kv.len, self.len + 1):
            start = None
        elif kv.pos is None and self.done == m and self._same(kv.len):
            return
        whole = kv.pos is not None and kv.device.type == "cuda" and m <= FEW  # read whole: nothing to ask the device
        if not whole and (first := self._recoded(kv)) is not None:
            start = first if start is None else min(start, first)
        self._reserve(kv, pages)
        if start is None:
            self._last(kv)
        else:
            self._fill(kv, start, pages)
        self.done, self.len = m, None if kv.len is None else kv.len.clone(memory_format=torch.contiguous_format)

    def score(self, q: Tensor) -> Tensor:
        """Upper bound of q . k over each page: `[B, G, r, pages]` for q `[B, H, 1, D]`, unscaled, in the dtype of q.

        sum over d of max(q_d max_d, q_d min_d), as one product: positive channels meet the maxima, negative ones the
        minima. Pages without entries have no meaning.
        """
        assert self.data is not None
        b, g = self.data.shape[:2]
        q = q.reshape(b, g, -1, q.shape[-1])
        split = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
        return split @ self.data[:, :, : -(-self.done // self.page)].transpose(-1, -2)

    def top(self, q: Tensor, kv: KV, keep: int, *, group: bool) -> tuple[Tensor, Tensor]:
        """First entries of the `keep` pages of highest bound, the page of the newest entry among them.

        For views in text order. `group` ranks by the highest bound of the query heads of a kv head. Ties go to the lower
        page. On a GPU two kernels do this, with scores in fp32; nothing waits for the device.

        Returns:
            (int32 `[B, G or H, min(keep, pages)]`, ascending, padded with the row's last; counts int32 `[B, G or H]`).
        """
        assert self.data is not None
        pages = -(-self.done // self.page)
        if (kernels := fused.pages(q)) is not None:
            score = kernels.score(q, self.data, pages, self.page, kv.len, group=group)
            return kernels.select(score, keep, self.page, kv.len)
        score = self.score(q)
        score = score.amax(2) if group else score.flatten(1, 2)
        number = torch.arange(pages, device=q.device)
        if kv.len is None:
            index, count = top_indices(score, keep, forced=number == pages - 1)
        else:
            last = (kv.lengths() - 1)[..., None] // self.page
            last = last.repeat_interleave(score.shape[1] // last.shape[1], 1)
            index, count = top_indices(score, keep, valid=number <= last, forced=number == last)
        return index * self.page, count

    # ------------------------------------------------------------------ with the cache
    def joins(self, k: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """(data, entries covered, entries a page) for a store that appends to keys k `[B, G, size, D]` and brings these
        bounds up to date in the same launch; it says so by `joined`. None where they cannot: another size, or nothing yet.
        """
        data, pages = self.data, -(-k.shape[2] // self.page)
        if data is None or self.len is None or self.done != k.shape[2] or data.dtype != k.dtype:
            return None
        if data.shape[:2] != k.shape[:2] or data.shape[2] < pages or data.shape[3] != 2 * k.shape[3]:
            return None
        return (data, self.len, self.page) if data.is_contiguous() and self.len.is_contiguous() else None

    def joined(self, length: Tensor) -> None:
        """A view whose `len` is this very tensor is covered: `update` has nothing to do for it."""
        self._fresh = weakref.ref(length)

    def truncate(self, n: int) -> None:
        self._fresh = None
        self.done = max(0, self.done - n)
        self.len = None if self.len is None else (self.len - n).clamp(min=0)

    def fork(self) -> Bounds:
        out = Bounds(self.page)
        out.data = None if self.data is None else self.data.clone()
        out.done, out.len = self.done, None if self.len is None else self.len.clone()
        out.coded = None if self.coded is None else self.coded.clone()
        return out

    def reorder(self, index: Tensor) -> None:
        self._fresh = None
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))
        if self.len is not None:
            self.len = self.len.index_select(0, index.to(self.len.device))
        if self.coded is not None:
            self.coded = self.coded.index_select(0, index.to(self.coded.device))

    # ------------------------------------------------------------------ inside
    def _steady(self, kv: KV) -> ModuleType | None:
        """The kernels, where they can bring these bounds up to date by themselves: a few new entries in text order.

        They compare lengths on the device, where the code below would wait for it; long pieces are better read in parallel.
        """
        few = self.data is not None and 0 <= kv.capacity - self.done <= 64 * self.page
        same = (kv.len is None) == (self.len is None) and kv.pos is None and kv.kind != "ragged"
        if not (few and same):
            return None
        if (pair := _pair(kv)) is not None:
            return None if self.coded is None else fused.codes(pair.keys.tail)
        if not isinstance(kv, PackedKV) or kv.made or kv.packed is None:
            return fused.pages(kv.k)
        assert not isinstance(kv.packed, CodedPair)
        return fused.thinned(kv.packed.tail)

    def _recoded(self, kv: KV) -> int | None:
        """The first page with a key that has become a code since the last call, which is noted; None if there is none."""
        if (pair := _pair(kv)) is None:
            self.coded = None
            return None
        old, new = self.coded, pair.keys.done[:, None].expand(kv.shape[:2]).to(torch.int32)
        if old is not None and old.shape == new.shape and torch.equal(old, new):
            return None
        if old is None or old.shape != new.shape:
            self.coded = new.contiguous().clone()
            return None if self.data is None else 0
        first = int(torch.minimum(old, new).min()) // self.page
        old.copy_(new)  # where it is: captured steps write there
        return first

    def _same(self, lengths: Tensor | None) -> bool:
        if lengths is None or self.len is None:
            return lengths is self.len
        return torch.equal(lengths, self.len)

    def _reserve(self, kv: KV, pages: int) -> None:
        b, g, _, d, _ = kv.shape
        if self.data is not None and self.data.shape[2] >= pages:
            return
        new = torch.zeros(b, g, pages + max(8, pages // 8), 2 * d, dtype=kv.dtype, device=kv.device)
        if self.data is not None:
            new[:, :, : self.data.shape[2]] = self.data
        self.data = new

    def _fill(self, kv: KV, first: int, pages: int) -> None:
        """Pages first..pages from their keys."""
        assert self.data is not None
        p, d = self.page, kv.shape[3]
        lo = first * p
        if isinstance(kv, PackedKV) and not kv.made:
            b, g = kv.shape[:2]
            for i, j in pieces(pages - first, b * g * p * d):  # no more of it is unpacked at a time
                span = slice(first + i, first + j)
                k = self._keys(kv, torch.arange(span.start * p, span.stop * p, device=kv.device)).unflatten(2, (j - i, p))
                self.data[:, :, span] = torch.cat([k.amax(3), k.amin(3)], -1)
            return
        if kv.kind != "dense" or kv.len is not None:
            n = pages - first
            k = self._keys(kv, torch.arange(lo, pages * p, device=kv.device)).unflatten(2, (n, p))
            self.data[:, :, first:pages] = torch.cat([k.amax(3), k.amin(3)], -1)
            return
        whole = kv.capacity // p
        if whole > first:
            k = kv.k[:, :, lo : whole * p].unflatten(2, (whole - first, p))
            self.data[:, :, first:whole, :d], self.data[:, :, first:whole, d:] = k.amax(3), k.amin(3)
        if pages > whole:
            k = kv.k[:, :, whole * p : kv.capacity]
            self.data[:, :, whole, :d], self.data[:, :, whole, d:] = k.amax(2), k.amin(2)

    def _last(self, kv: KV) -> None:
        """The page that holds the newest entry of each row and kv head."""
        assert self.data is not None
        page = (kv.lengths() - 1).clamp(min=0) // self.page
        k = self._keys(kv, page[..., None] * self.page + torch.arange(self.page, device=kv.device))
        new = torch.cat([k.amax(2, keepdim=True), k.amin(2, keepdim=True)], -1)
        self.data.scatter_(2, page[..., None, None].expand_as(new), new)

    @staticmethod
    def _keys(kv: KV, entries: Tensor) -> Tensor:
        """Keys `[B, G, n, D]`; beyond the last entry that one again, which changes no extreme."""
        last = (kv.lengths() - 1).clamp(min=0)[..., None]
        entries = torch.minimum(entries.to(last.dtype).expand(*last.shape[:2], -1), last)
        if isinstance(kv, PackedKV):
            return kv.keys_at(entries)
        if kv.kind == "dense":
            return kv.k.gather(2, entries[..., None].expand(-1, -1, -1, kv.k.shape[-1]))
        return kv.flat()[0][kv.rows(entries)]


def _pair(kv: KV) -> CodedPair | None:
    """The codes of a view whose keys are codes as far as its store has got, and exact behind that."""
    return kv.packed if isinstance(kv, PackedKV) and isinstance(kv.packed, CodedPair) else None
