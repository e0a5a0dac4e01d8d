"""Apply a Selection: gather the kept entries into the storage that fits their shape."""

from __future__ import annotations

from ..kv import KV
from ..methods.base import Selection
from .dense import DenseStore
from .store import Store


def apply(kv: KV, selection: Selection) -> Store:
    """A store with only the selected entries of `kv`. Uniform counts stay a rectangle, others become ragged."""
    k, v = kv.gather(selection.indices)
    pos = kv.positions().gather(2, selection.indices.long()).int()
    bias = selection.bias
    if kv.bias is not None:
        old = kv.bias.gather(2, selection.indices.long())
        bias = old if bias is None else old + bias
    if selection.ring is not None:
        from .ring import RingStore

        return RingStore.build(k, v, pos, selection)
    if selection.counts is None:
        return DenseStore(k, v, [k.shape[2]] * k.shape[0], pos, bias)
    from .ragged import RaggedStore

    return RaggedStore.build(k, v, pos, bias, selection.counts)
