"""PagedStore: entries in pages of a pool. Forks and beams share pages by reference and copy one only to write to it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .store import Store, pack, room, take


class Pool:
    """Pages k `[pages, page, D]`, v `[pages, page, Dv]` with a reference count each, for one store and its forks."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v = k, v
        self.refs = [0] * k.shape[0]
        self.idle = list(range(k.shape[0] - 1, -1, -1))

    @property
    def page(self) -> int:
        return self.k.shape[1]

    def take(self, n: int) -> list[int]:
        """n pages nobody uses, with one reference each; the pool grows when it has too few."""
        if n > len(self.idle):
            have = len(self.refs)
            size = have + n - len(self.idle) + room(have * self.page) // self.page
            for name in ("k", "v"):
                old = getattr(self, name)
                new = old.new_empty(size, *old.shape[1:])
                new[:have] = old
                setattr(self, name, new)
            self.refs += [0] * (size - have)
            self.idle = list(range(size - 1, have - 1, -1)) + self.idle
        got = [self.idle.pop() for _ in range(n)]
        for page in got:
            self.refs[page] = 1
        return got

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self.refs[page] += 1

    def drop(self, pages: list[int]) -> None:
        for page in pages:
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self.idle.append(page)


class PagedStore:
    """A list of pages per row and kv head. Lengths may differ everywhere; `pos` and `bias` are `[B, G, longest]`."""

    kind: ClassVar[str] = "paged"

    def __init__(
        self,
        pool: Pool,
        pages: list[list[list[int]]],
        counts: list[list[int]],
        pos: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        self.pool, self.pages, self.counts, self.pos, self.bias = pool, pages, counts, pos, bias
        self._table: Tensor
        self._len: Tensor
        self._index()

    def __del__(self) -> None:
        for row in getattr(self, "pages", []):
            for pages in row:
                self.pool.drop(pages)

    @staticmethod
    def empty(k: Tensor, v: Tensor, page: int = 16) -> PagedStore:
        """An empty store for rows, heads, widths and dtypes like those of k and v `[B, G, n, D]`."""
        b, g = k.shape[:2]
        pool = Pool(k.new_empty(0, page, k.shape[3]), v.new_empty(0, page, v.shape[3]))
        return PagedStore(pool, [[[] for _ in range(g)] for _ in range(b)], [[0] * g for _ in range(b)])

    @staticmethod
    def build(kv: KV, selection: Selection, pos: Tensor, bias: Tensor | None) -> PagedStore:
        """From the selected entries of a view, in pages of the view's size (16 for a view without pages)."""
        counts = selection.full_counts()
        live = torch.arange(selection.indices.shape[2], device=counts.device) < counts[..., None]
        k, v = take(kv, selection.indices, live)
        page = kv.k.shape[1] if kv.kind == "paged" else 16
        return PagedStore._filled(k, v, counts.tolist(), page, pos.int(), bias)

    @staticmethod
    def _filled(
        k: Tensor, v: Tensor, counts: list[list[int]], page: int, pos: Tensor | None, bias: Tensor | None
    ) -> PagedStore:
        """From packed entries k `[T, D]`, v `[T, Dv]` and rectangles pos, bias."""
        need = [[-(-n // page) for n in row] for row in counts]
        total = sum(sum(row) for row in need)
        pool = Pool(k.new_empty(total, page, k.shape[1]), v.new_empty(total, page, v.shape[1]))
        store = PagedStore(pool, [[pool.take(n) for n in row] for row in need], counts, pos, bias)
        kv = store.view()
        entries = torch.arange(kv.capacity, device=k.device).expand(*kv.shape[:3])
        rows = kv.rows(entries)[entries < kv.lengths()[..., None]]
        pool.k.view(-1, k.shape[1])[rows] = k
        pool.v.view(-1, v.shape[1])[rows] = v
        return store

    # ------------------------------------------------------------------ the contract
    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool and of this store's own side arrays. Stores that share a pool each report it."""
        own = (self._table, self._len, self.pos, self.bias)
        return sum(t.numel() * t.element_size() for t in (self.pool.k, self.pool.v, *own) if t is not None)

    @property
    def lens(self) -> list[list[int]]:
        return [list(row) for row in self.counts]

    @property
    def positions_true(self) -> bool:
        return self.pos is None

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        n = k.shape[2]
        keep = [n] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        self._prepare(keep)
        if n == 1 and min(keep) == 1:
            entries = self._len[..., None].long()
            self._write(entries, k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3]), None, seen)
            self._len = self._len + 1
        else:
            real = k.new_ones(k.shape[0], n, dtype=torch.bool) if valid is None else valid
            steps = (real.long().cumsum(-1) - 1).clamp(min=0)[:, None]  # the how manieth new entry of its row
            live = real[:, None].expand(k.shape[:3])
            entries = torch.where(live, self._len[..., None].long() + steps, 0)
            self._write(entries, k[live], v[live], live, seen)
            self._len = self._len + torch.tensor(keep, dtype=torch.int32, device=k.device)[:, None]
        self.counts = [[c + m for c in row] for row, m in zip(self.counts, keep, strict=True)]
        return self

    def _write(self, entries: Tensor, k: Tensor, v: Tensor, live: Tensor | None, seen: list[int]) -> None:
        """Rows k, v to the live ones (None: all) of these entries `[B, G, n]`."""
        rows = self._view(self._wide()).rows(entries)
        rows = rows.view(-1) if live is None else rows[live]
        self.pool.k.view(-1, k.shape[1]).index_copy_(0, rows, k)
        self.pool.v.view(-1, v.shape[1]).index_copy_(0, rows, v)
        if self.pos is not None:
            first = torch.tensor(seen, dtype=self.pos.dtype, device=k.device)[:, None, None]
            new = (first + entries - self._len[..., None]).to(self.pos.dtype)
            self._side(self.pos, entries, new, live)
        if self.bias is not None:
            self._side(self.bias, entries, torch.zeros_like(entries, dtype=self.bias.dtype), live)

    @staticmethod
    def _side(t: Tensor, entries: Tensor, new: Tensor, live: Tensor | None) -> None:
        if live is None:
            t.scatter_(2, entries, new)
        else:
            b, g, _ = live.nonzero(as_tuple=True)
            t[b, g, entries[live]] = new[live]

    def _prepare(self, keep: list[int]) -> None:
        """Pages for `keep[b]` more entries of each row, none of which somebody else reads from."""
        page, changed, copied = self.pool.page, [], False
        for b, m in enumerate(keep):
            for g, c in enumerate(self.counts[b]):
                mine = self.pages[b][g]
                if m and c % page and self.pool.refs[mine[-1]] > 1:
                    (fresh,) = self.pool.take(1)
                    self.pool.k[fresh], self.pool.v[fresh] = self.pool.k[mine[-1]], self.pool.v[mine[-1]]
                    self.pool.drop([mine[-1]])
                    mine[-1] = fresh
                    copied = True
                need = -(-(c + m) // page) - len(mine)
                if need > 0:
                    changed += [(b, g, len(mine) + i) for i in range(need)]
                    mine += self.pool.take(need)
        longest = max(max(c + m for c in row) for row, m in zip(self.counts, keep, strict=True))
        if copied or self._wide() * page < longest:
            self._index()  # a new table: earlier views keep theirs
        elif changed:  # columns no earlier view looks at
            new = [self.pages[b][g][i] for b, g, i in changed]
            at = torch.tensor(changed, device=self._table.device).unbind(1)
            self._table[at] = torch.tensor(new, dtype=torch.int32, device=self._table.device)
        for name in ("pos", "bias"):  # beside the pages, with as many free slots as the table has
            t = getattr(self, name)
            if t is not None and t.shape[2] < longest:
                out = t.new_zeros(*t.shape[:2], self._wide() * page)
                out[:, :, : t.shape[2]] = t
                setattr(self, name, out)

    def _wide(self) -> int:
        return self._table.shape[2]

    def _index(self) -> None:
        """Write the table and the lengths anew."""
        longest = max(len(pages) for row in self.pages for pages in row)
        wide = longest + max(longest // 8, 1)
        table = [[pages + [0] * (wide - len(pages)) for pages in row] for row in self.pages]
        self._table = torch.tensor(table, dtype=torch.int32, device=self.pool.k.device)
        self._len = torch.tensor(self.counts, dtype=torch.int32, device=self.pool.k.device)

    def _view(self, wide: int) -> KV:
        m = max(max(row) for row in self.counts)
        pos = None if self.pos is None else self.pos[:, :, :m]
        bias = None if self.bias is None else self.bias[:, :, :m]
        table = self._table[:, :, :wide]
        return KV(self.pool.k, self.pool.v, "paged", m, len=self._len, table=table, pos=pos, bias=bias)

    def view(self) -> KV:
        return self._view(-(-max(max(row) for row in self.counts) // self.pool.page))

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self.view(), selection)

    def truncate(self, n: int) -> None:
        if self.pos is not None:
            raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")
        least = min(min(row) for row in self.counts)
        if not 0 <= n <= least:
            raise CacheError(f"truncate: expected 0 to {least} entries, got {n}")
        self.counts = [[c - n for c in row] for row in self.counts]
        for pages, c in ((self.pages[b][g], c) for b, row in enumerate(self.counts) for g, c in enumerate(row)):
            cut = -(-c // self.pool.page)
            self.pool.drop(pages[cut:])
            del pages[cut:]
        self._index()

    def reorder(self, index: Tensor) -> None:
        order = index.tolist()
        old = self.pages
        self.pages = [[list(pages) for pages in old[b]] for b in order]
        for row in self.pages:
            for pages in row:
                self.pool.share(pages)
        for row in old:
            for pages in row:
                self.pool.drop(pages)
        self.counts = [list(self.counts[b]) for b in order]
        rows = index.to(self.pool.k.device)
        self.pos = None if self.pos is None else self.pos.index_select(0, rows)
        self.bias = None if self.bias is None else self.bias.index_select(0, rows)
        self._index()

    def fork(self) -> PagedStore:
        """A store that shares every page until one of the two writes to it."""
        pages = [[list(p) for p in row] for row in self.pages]
        for row in pages:
            for p in row:
                self.pool.share(p)
        own = [None if t is None else t.clone() for t in (self.pos, self.bias)]
        return PagedStore(self.pool, pages, self.lens, own[0], own[1])

    def state(self) -> dict[str, Tensor]:
        view = self.view()
        out = pack(view) | {"page": torch.tensor(self.pool.page)}
        return out | {n: t for n in ("pos", "bias") if (t := getattr(view, n)) is not None}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> PagedStore:
        """The inverse of `state`."""
        pos, bias = (state[n].clone() if n in state else None for n in ("pos", "bias"))
        return PagedStore._filled(state["k"], state["v"], state["counts"].tolist(), int(state["page"]), pos, bias)
