"""Where a score has a twin in Triton: one look-up for all of them. Without a device for it Triton is never imported."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

from torch import Tensor


def pages(t: Tensor) -> ModuleType | None:
    """The kernels of page bounds (`kernels/triton/paging_launch.py`) if they compute on tensors like t, else None."""
    return _usable("paging_launch", t)


def estimates(t: Tensor) -> ModuleType | None:
    """The kernels of probes and pooled blocks (`kernels/triton/estimate_launch.py`), likewise."""
    return _usable("estimate_launch", t)


def rows(t: Tensor) -> ModuleType | None:
    """The kernels of antidiagonals and lists of rows (`kernels/triton/estimate_rows_launch.py`), where those above are."""
    return None if estimates(t) is None else _usable("estimate_rows_launch", t)


def trees(t: Tensor) -> ModuleType | None:
    """The kernel of tree searches (`kernels/triton/estimate_tree_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_tree_launch", t)


def windows(t: Tensor) -> ModuleType | None:
    """The kernels of attention mass by key (`kernels/triton/estimate_window_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_window_launch", t)


def lowbit(t: Tensor) -> ModuleType | None:
    """The kernels of 4-bit logits (`kernels/triton/estimate_lowbit_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_lowbit_launch", t)


def stripes(t: Tensor) -> ModuleType | None:
    """The kernels of anchors and stripes (`kernels/triton/estimate_stripes_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_stripes_launch", t)


def heads(t: Tensor) -> ModuleType | None:
    """The kernels of a probe's blocks (`kernels/triton/estimate_heads_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_heads_launch", t)


def regions(t: Tensor) -> ModuleType | None:
    """The kernel of lists by region (`kernels/triton/estimate_regions_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_regions_launch", t)


def turns(t: Tensor) -> ModuleType | None:
    """The kernel that moves vectors to other positions (`kernels/triton/rotate_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("rotate_launch", t)


def codes(t: Tensor) -> ModuleType | None:
    """The kernel that appends to a quantised store (`kernels/triton/quantised_append.py`), likewise."""
    return _usable("quantised_append", t)


def thinned(t: Tensor) -> ModuleType | None:
    """The kernels of keys that lack channels (`kernels/triton/thinned_launch.py`), likewise."""
    return _usable("thinned_launch", t)


def entries(t: Tensor) -> ModuleType | None:
    """The kernels of the best single entries (`kernels/triton/select_entries_launch.py`), likewise; t holds scores."""
    return _usable("select_entries_launch", t)


def labels(t: Tensor) -> ModuleType | None:
    """The kernels of labels and codes beside keys (`kernels/triton/labels_launch.py`), likewise."""
    return _usable("labels_launch", t)


def indexers(t: Tensor) -> ModuleType | None:
    """The kernels of a lightning indexer (`kernels/triton/indexer_launch.py`), likewise; t are queries."""
    return _usable("indexer_launch", t)


def few(t: Tensor) -> ModuleType | None:
    """The kernel of what a few new tokens look at (`kernels/triton/estimate_few_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_few_launch", t)


def votes(t: Tensor) -> ModuleType | None:
    """The kernels of one query a row against all keys (`kernels/triton/estimate_votes_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("estimate_votes_launch", t)


def kept(t: Tensor) -> ModuleType | None:
    """The kernel of lists and the tokens since (`kernels/triton/kept_lists.py`), likewise; t are queries."""
    return None if estimates(t) is None else _usable("kept_lists", t)


def chunks(t: Tensor) -> ModuleType | None:
    """The kernels of chunks that are joined (`kernels/triton/chunk_steps_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("chunk_steps_launch", t)


def ranked(t: Tensor) -> ModuleType | None:
    """The kernels of re-assigned positions (`kernels/triton/ranked_steps_launch.py`), likewise."""
    return None if estimates(t) is None else _usable("ranked_steps_launch", t)


def _usable(name: str, t: Tensor) -> ModuleType | None:
    if t.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    module = _module(name)
    return module if module is not None and module.usable(t) else None


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"..kernels.triton.{name}", __package__)
    except ImportError:
        return None
