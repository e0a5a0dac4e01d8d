"""Caches: what stays in memory. Stores hold entries; `LayerCache` is one layer's store with the methods' state."""

from .dense import DenseStore
from .fixed_pruned import FixedChannels
from .fixed_quantised import FixedQuantised
from .layer import LayerCache
from .paged import PagedStore
from .ragged import RaggedStore
from .ring import RingStore
from .store import Store

__all__ = ["DenseStore", "FixedChannels", "FixedQuantised", "LayerCache", "PagedStore", "RaggedStore", "RingStore", "Store"]
