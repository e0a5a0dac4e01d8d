"""A prompt's attention some kv heads at a time: lists and partial results of the others then need no memory.

The lists of a long prompt may have room for every key in every group of rows, and a plan of several softmaxes has as many
outputs: for all heads at once that is a large part of what the keys and values of a whole model take. Heads do not look at
each other in most methods (`Method.apart`), so such a call can be cut by kv heads without changing a number.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .methods.base import AttnInput, Method

ROWS = 1 << 20  # query rows, counted for each head, of a piece at least: tiles for every multiprocessor many times over


def ranges(x: AttnInput, method: Method | None) -> list[tuple[int, int]]:
    """(first, end) of the kv heads of each piece; one piece where the call is short or the method wants it whole."""
    b, h, n, _ = x.shape
    groups = x.groups
    if method is None or not method.apart or x.phase != "prefill" or b * h * n <= ROWS:
        return [(0, groups)]
    each = -(-ROWS // (b * n * (h // groups)))
    return [(lo, min(lo + each, groups)) for lo in range(0, groups, each)]


def by_pieces(x: AttnInput, method: Method | None, call: Callable[[AttnInput], Tensor]) -> Tensor:
    """`call` of each piece, put together: `[B, H, N, Dv]`. A call of one piece is handed on as it is."""
    some = ranges(x, method)
    if len(some) == 1:
        return call(x)
    per, out = x.q.shape[1] // x.groups, None
    for lo, hi in some:
        got = call(x.only(lo, hi))
        if out is None:
            out = got.new_empty(*x.q.shape[:3], got.shape[-1])
        out[:, lo * per : hi * per] = got
        del got  # before the next piece asks for memory
    assert out is not None
    return out
