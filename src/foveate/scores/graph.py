"""A search graph over keys whose edges know what queries attend to, on the host, with faiss.

Liu et al. 2024, "RetrievalAttention: Accelerating Long-Context LLM Inference via Vector Retrieval" (arXiv 2409.10516).
Decode queries are far from every key, so a graph that links keys to near keys leads a search astray; here keys that one
query of the prompt attended to are linked as well.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedError
from .keys import pieces


def faiss() -> ModuleType:
    """The faiss module. UnsupportedError with the remedy if it is not installed."""
    try:
        import faiss
    except ImportError as err:
        raise UnsupportedError(
            "retrieval_attention: index='graph' needs faiss; install foveate[ann], or give index='flat', "
            f"which scores every key ({err})"
        ) from err
    return faiss  # type: ignore[no-any-return]


class Graph:
    """The keys `[n, D]` of one kv head as a navigable graph for inner products. It never changes once it is built.

    `2 * links` edges leave a key: up to half of them to keys that the same queries reach (`co_attended`), the others to
    keys near to it, as HNSW (Malkov and Yashunin 2016) chooses them, which also keep the graph connected. Without
    queries all edges are of the second kind. Keys are copied to the host in fp32.
    """

    def __init__(self, keys: Tensor, queries: Tensor | None, *, links: int, reach: int):
        module, (n, d) = faiss(), keys.shape
        self.index: Any = module.IndexHNSWFlat(d, links, module.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = max(40, 2 * links)
        self.index.add(keys.float().cpu().contiguous().numpy())
        self.size = n
        if queries is not None and len(queries) and n > 1:
            self._link(co_attended(queries, keys, min(reach, n), links))

    def search(self, q: Tensor, k: int, breadth: int) -> tuple[Tensor, Tensor]:
        """(scores fp32 `[r, k]`, numbers of keys int64 `[r, k]`) for queries `[r, D]`, best first; where fewer than k
        keys were found, -inf and -1. `breadth`: keys a search holds as candidates."""
        module = faiss()
        how = module.SearchParametersHNSW(efSearch=max(k, breadth))
        score, index = self.index.search(q.float().cpu().contiguous().numpy(), k, params=how)
        index = torch.from_numpy(index)
        return torch.from_numpy(score).masked_fill(index < 0, float("-inf")), index

    @property
    def nbytes(self) -> int:
        """Bytes of keys and edges on the host."""
        return self.size * self.index.d * 4 + self.index.hnsw.neighbors.size() * 4

    def _link(self, near: np.ndarray) -> None:
        """Put the edges `[n, links]` (-1: none) in front of those of the lowest level, which lose the last ones."""
        module, hnsw = faiss(), self.index.hnsw
        edges = module.vector_to_array(hnsw.neighbors)
        first = module.vector_to_array(hnsw.offsets)[:-1].astype(np.int64)
        slots = first[:, None] + np.arange(hnsw.nb_neighbors(0))
        for lo, hi in pieces(self.size, slots.shape[1] * (near.shape[1] + 8)):
            old, new = edges[slots[lo:hi]], near[lo:hi]
            old = np.where((old[:, :, None] == new[:, None]).any(-1), -1, old)
            both = np.concatenate([new, old], 1)
            order = np.argsort(both < 0, axis=1, kind="stable")[:, : slots.shape[1]]
            edges[slots[lo:hi]] = np.take_along_axis(both, order, 1)
        module.copy_array_to_vector(edges, hnsw.neighbors)


def co_attended(queries: Tensor, keys: Tensor, reach: int, most: int) -> np.ndarray:
    """Edges between keys that one query attends to: int32 `[n, most]`, those of most queries first, -1 where none are left.

    Each query `[nq, D]` reaches the `reach` keys `[n, D]` of highest inner product, exactly, computed where the keys are.
    Its best key is linked with all of these, and each one with the next best, in both directions: the second kind still
    leads from key to key where a best key has more edges than it may keep.
    """
    n, pairs = len(keys), []
    acc = torch.promote_types(keys.dtype, torch.float32)
    for lo, hi in pieces(len(queries), 2 * n):
        score = queries[lo:hi].to(keys.device, acc) @ keys.to(acc).transpose(0, 1)
        top = score.topk(reach, -1).indices  # [., reach], best first
        best = top[:, :1].expand(-1, reach - 1)
        pairs.append(torch.cat([torch.stack([best, top[:, 1:]]), torch.stack([top[:, 1:-1], top[:, 2:]])], 2).flatten(1))
    a, b = torch.cat(pairs, 1).cpu().numpy()
    code, count = np.unique(np.concatenate([a * n + b, b * n + a]), return_counts=True)
    source, target = code // n, code % n
    order = np.lexsort((target, -count, source))
    source, target = source[order], target[order]
    rank = np.arange(len(source)) - np.searchsorted(source, source)  # how manieth edge of its key
    out = np.full((n, most), -1, dtype=np.int32)
    keep = rank < most
    out[source[keep], rank[keep]] = target[keep]
    return out
