"""RetrievalAttention: the keys between sink and recent window live in a search index; a query attends to what it finds."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..scores.graph import Graph
from ..scores.labels import key_range
from .base import AttnInput, Method, State, option

INDEX, SEEN = "retrieval_attention.index", "retrieval_attention.seen"
LEAST = 1024  # keys below which scanning them costs no more than a graph


@dataclass(frozen=True)
class RetrievalAttention(Method):
    """Liu et al. 2024, "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval" (2409.10516).

    A decode query attends to the first `sink` tokens, at least the `recent` newest ones, and the `budget` keys between
    them with the highest inner product that a graph search on the host finds (algorithm A of the paper; `breadth`
    candidates at a time). The graph of a kv head is built at the first step after a prompt; up to `links` edges of a key
    go to keys that the prompt's queries attend to together with it: exact top `reach` of up to `queries` queries of the
    kv head's query heads. `aware=false` leaves these out, which shows what they are worth. Tokens come under the index
    `update` at a time, those of after the prompt are scanned until they are as many as the graph's, and then a graph is
    built of all.

    `index="flat"` scans every key and needs no faiss: exact, and the bound of what a graph can find. Experimental: the
    search waits for the device and runs head by head on the host, so that no step is captured; it pays where keys do not
    fit the device. One graph serves the query heads of a kv head, where the paper leaves open whether each has its own.
    """

    sink: int = option(128, low=0, help="first tokens of the text, always included")
    recent: int = option(512, low=1, help="newest tokens, always included")
    budget: int = option(100, low=1, help="keys a query reads that the search found")
    index: str = option("graph", choices=("graph", "flat"), help="search by a graph or over every key")
    aware: bool = option(True, help="link keys that queries of the prompt read together")
    breadth: int = option(128, low=1, help="candidates a search holds at a time")
    links: int = option(16, low=2, help="most links of a key")
    reach: int = option(32, low=2, help="best keys of a query that become linked")
    queries: int = option(2048, low=1, help="most prompt queries of a kv head that make links")
    update: int = option(512, low=1, help="tokens that join the index at a time")
    dense_layers: int = option(0, low=0, help="first layers, which stay dense")

    id: ClassVar[str] = "retrieval_attention"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    source: ClassVar[str] = "Liu et al. 2024, arXiv 2409.10516"
    status: ClassVar[str] = "experimental"
    observes: ClassVar[tuple[str, ...]] = ("prefill",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"sink": 64, "recent": 256, "update": 256}}

    @property
    def min_length(self) -> int:
        return self.sink + self.recent + self.budget + 1

    def refuses(self, recipe: Any) -> str | None:
        return "its index names entries, which a cache policy drops or moves" if recipe.evicts else None

    # ------------------------------------------------------------------ the prompt
    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        if self.index == "graph" and self.aware and x.layer >= self.dense_layers:
            seen = state.layer.setdefault(SEEN, Seen())
            seen.add(x.q[0], max(1, self.queries * x.groups // x.q.shape[1]))

    # ------------------------------------------------------------------ a step
    def end(self, m: int) -> int:
        """The first entry behind the index in a row of m entries: it moves `update` entries at a time."""
        return self.sink + max(0, m - self.sink - self.recent) // self.update * self.update

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.layer < self.dense_layers or x.kv.capacity < self.min_length:
            return None
        held: Index = state.layer.setdefault(INDEX, Index(self.sink))
        held.lens = x.kv.lengths()[:, 0].tolist()
        rows = [self._row(x, b, held, state) for b in range(len(held.lens))]
        wide = max(t.shape[-1] for t in rows)
        full = torch.full((len(rows), x.q.shape[1], wide), x.kv.capacity)  # beyond every entry
        for b, t in enumerate(rows):
            full[b, :, : t.shape[-1]] = t
        entries = full.sort(-1).values
        count = (entries < x.kv.capacity).sum(-1, dtype=torch.int32)
        entries = torch.where(entries < x.kv.capacity, entries, 0).to(torch.int32)
        entries, count = (t[:, :, None].to(x.device) for t in (entries, count))
        return Layout(x.shape, q_pos=x.layout_pos(), entries=entries, entry_count=count)

    def _row(self, x: AttnInput, b: int, held: Index, state: State) -> Tensor:
        """Entries int64 `[H, n]` of batch row b, in any order; beyond the capacity where a search found too few."""
        m, kv, h = held.lens[b], x.kv.row(b), x.q.shape[1]
        end = self.end(m)
        q = x.q[b, :, 0].to(kv.device).unflatten(0, (x.groups, -1))  # [G, r, D]
        near = torch.cat([torch.arange(min(self.sink, m)), torch.arange(min(end, m), m)]).expand(h, -1)
        if end <= self.sink:
            return near
        first, found = self.sink, []
        if self.index == "graph":
            graphs = self._graphs(x, b, kv, end, held, state)
            if graphs:
                k = min(self.budget, graphs[0].size)
                got = [graph.search(q[g], k, self.breadth) for g, graph in enumerate(graphs)]
                score, index = (torch.stack(t) for t in zip(*got, strict=True))
                found.append((score, index + self.sink))
                first += graphs[0].size
        if first < end:  # what no graph covers is scanned
            acc = torch.promote_types(q.dtype, torch.float32)
            score = q.to(acc) @ key_range(kv, first, end)[0].to(acc).transpose(-1, -2)
            top = score.topk(min(self.budget, end - first), -1)
            found.append((top.values.cpu(), top.indices.cpu() + first))
        score, index = (torch.cat(t, -1) for t in zip(*found, strict=True))
        top = score.topk(min(self.budget, score.shape[-1]), -1)
        index = index.gather(-1, top.indices).masked_fill(top.values == float("-inf"), x.kv.capacity)
        return torch.cat([near, index.flatten(0, 1)], -1)

    def _graphs(self, x: AttnInput, b: int, kv: KV, end: int, held: Index, state: State) -> list[Graph]:
        """The graphs of batch row b, one a kv head, over the entries from the sink on; [] while scanning is cheaper."""
        graphs = held.graphs.setdefault(b, [])
        size = graphs[0].size if graphs else 0
        rest = end - self.sink - size
        if rest < 0:  # after a rollback the recent window begins inside it
            graphs, size, rest = [], 0, end - self.sink
        if rest >= LEAST and (rest >= size or x.step == 0):
            keys = key_range(kv, self.sink, end)[0]
            seen = state.rows[b].get(SEEN) if b < len(state.rows) else None
            queries = seen.of(x.groups) if isinstance(seen, Seen) else [None] * x.groups
            how = dict(links=self.links, reach=self.reach)
            graphs = [Graph(keys[g], queries[g], **how) for g in range(x.groups)]
        held.graphs[b] = graphs
        return graphs


@dataclass
class Seen:
    """Queries of a prompt, thinned out evenly. q: `[H, n, D]` on the host, or None; step: every how manieth they are."""

    q: Tensor | None = None
    step: int = 1
    count: int = 0  # rows that came so far

    def add(self, q: Tensor, most: int) -> None:
        """Rows `[H, n, D]` of the next chunk; at most `most` rows stay, at even distances, chunks or not."""
        first = -self.count % self.step
        self.count += q.shape[1]
        new = q[:, first :: self.step].detach().cpu()
        self.q = new.clone() if self.q is None else torch.cat([self.q, new], 1)
        while self.q.shape[1] > most:
            self.q, self.step = self.q[:, ::2].clone(), 2 * self.step

    def of(self, groups: int) -> list[Tensor | None]:
        """Queries `[r * n, D]` of each kv head."""
        return [None] * groups if self.q is None else list(self.q.unflatten(0, (groups, -1)).flatten(1, 2))

    def truncate(self, n: int) -> None:
        return None  # the queries that were asked stay a sample of what queries look like

    def fork(self) -> Seen:
        return copy.copy(self)


@dataclass
class Index:
    """The graphs of each batch row, which forks share: they never change. first: the entry they begin with. lens: entries
    of each row at the last step, or fewer."""

    first: int
    graphs: dict[int, list[Graph]] = field(default_factory=dict)
    lens: list[int] = field(default_factory=list)

    def truncate(self, n: int) -> None:
        self.lens = [m - n for m in self.lens]
        for b, graphs in self.graphs.items():
            if graphs and self.lens[b] < self.first + graphs[0].size:  # some of its keys are gone
                self.graphs[b] = []

    def fork(self) -> Index:
        return Index(self.first, {b: list(graphs) for b, graphs in self.graphs.items()}, list(self.lens))

    def reorder(self, index: Tensor) -> None:
        order = index.tolist()
        self.graphs = {new: list(self.graphs.get(old, [])) for new, old in enumerate(order)}
        self.lens = [self.lens[old] for old in order if old < len(self.lens)]
