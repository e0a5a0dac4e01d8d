"""Apply a Selection: gather the kept entries into the storage that fits their shape."""

from __future__ import annotations

import torch

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .dense import DenseStore
from .paged import PagedStore
from .ragged import RaggedStore
from .ring import RingStore
from .store import Store

FILL = 0.8  # a rectangle that is at least this full stays one: kernels read it faster and slack costs as much


def apply(kv: KV, selection: Selection) -> Store:
    """A store with only the selected entries of `kv`.

    A ring where the selection asks for one, pages where the view has pages, a rectangle where all heads of a row keep
    the same number and little of it would stay empty, else ragged. Raises CacheError for a selection that does not
    fit the view (one synchronisation).
    """
    check(kv, selection)
    if selection.channels is not None:
        raise CacheError("selection: this store keeps whole keys; a part of their channels needs storage of kind 'channels'")
    index = selection.indices.long()
    pos = kv.positions().gather(2, index).int()
    bias = selection.bias
    if kv.bias is not None:
        old = kv.bias.gather(2, index)
        bias = old if bias is None else old + bias
    if selection.ring is not None:
        if bias is not None:
            raise CacheError("selection: a ring holds no entry weights, got a bias")
        return RingStore.build(*kv.gather(index), pos, selection)
    if kv.kind == "paged":
        return PagedStore.build(kv, selection, pos, bias)
    counts = selection.full_counts().tolist()
    wide = max(max(row) for row in counts)
    kept = sum(sum(row) for row in counts)
    if all(n == row[0] for row in counts for n in row) and kept >= FILL * wide * len(counts) * len(counts[0]):
        k, v = kv.gather(index[:, :, :wide])
        bias = None if bias is None else bias[:, :, :wide].contiguous()
        return DenseStore(k, v, [row[0] for row in counts], pos[:, :, :wide].contiguous(), bias)
    return RaggedStore.build(kv, selection, pos, bias)


def check(kv: KV, selection: Selection) -> None:
    b, g, _, _, _ = kv.shape
    index = selection.indices
    if index.dim() != 3 or tuple(index.shape[:2]) != (b, g):
        raise CacheError(f"selection: expected indices [B, G, K] with [B, G] = {[b, g]}, got {list(index.shape)}")
    counts, width = selection.full_counts(), index.shape[2]
    if tuple(counts.shape) != (b, g) or bool(((counts < 0) | (counts > width)).any()):
        raise CacheError(f"selection: expected counts [{b}, {g}] between 0 and {width}, got {counts.tolist()}")
    if bool((index < 0).any() | (index >= max(kv.capacity, 1)).any()):
        raise CacheError(f"selection: expected entry numbers between 0 and {kv.capacity - 1}")
    live = torch.arange(width, device=index.device) < counts[..., None]
    if bool((live & (index >= kv.lengths()[..., None])).any()):
        raise CacheError("selection: names entries beyond the length of their row and kv head")
    falls = live[..., 1:] & (index[..., 1:] <= index[..., :-1])
    if bool(falls.any()):
        raise CacheError("selection: expected ascending entry numbers without repeats")
    if selection.bias is not None and selection.bias.shape != index.shape:
        raise CacheError(f"selection: expected a bias of shape {list(index.shape)}, got {list(selection.bias.shape)}")
