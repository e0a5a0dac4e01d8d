"""Caches that a sink-and-window rule has cut itself: every kv head holds its first tokens and a run of its newest ones.

Over such a cache the rule may count entries in place of positions: the first `sink` entries are the first tokens and the
last w entries the w newest, wherever the run reaches that far. Kernels then read what a window names and nothing else, where
entries with positions of their own have to be tested one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..kv import KV
from ..scores import fused
from .base import AttnInput, Method, Selection, State

CUT = "cut"


@dataclass(frozen=True)
class Cut:
    """Lies in `state.layer` of a row whose cache `by` alone has cut (None: a method that must go on asking for positions).

    It names no entry, so it outlives them; it is not saved, since who reads a file may have another recipe.
    """

    by: Method | None

    def keep(self, selection: Selection) -> None:
        return None

    def truncate(self, n: int) -> None:
        return None

    def fork(self) -> Cut:
        return self

    def saved(self) -> dict[str, Tensor]:
        return {}


def mark(x: AttnInput, state: State, method: Method) -> None:
    """For `compress`: from now on the cache is this method's cut, if it was whole so far. What cut it before stays known."""
    if x.kv.pos is None:
        state.layer.setdefault(CUT, Cut(method))


def counted(x: AttnInput, state: State, method: Method) -> KV | None:
    """The view of a decode step by entry number, or None where positions have to be asked: no kernels, or another's cut.

    A layout over it leaves `q_pos` out: the query is the last entry of each kv head.
    """
    if x.kv.pos is None or type(x.kv) is not KV or fused.estimates(x.q) is None or not state.rows:
        return None
    cuts = (row.get(CUT) for row in state.rows)
    return replace(x.kv, pos=None) if all(isinstance(c, Cut) and c.by == method for c in cuts) else None
