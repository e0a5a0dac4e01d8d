"""What rows of a tile see of a step: masks of the consumers, from words that the producer leaves in shared memory.

A masked score is -2^100: its product with any scale is exact, so a row that has seen no key keeps p = 1 (finite), and
the first real key wipes it with alpha = 0. A row that never sees one is written as 0 and lse -inf.
"""

from .shim import gl, gluon

HIDDEN = gl.constexpr(-(2.0**100))
LINE = gl.constexpr(4)  # words of a ring entry: start and stop of each half
NOWHERE = gl.constexpr(1 << 30)  # position of a place that holds no key


@gluon.jit
def word(words, i):
    """The scalar in word i, for a partition of four warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(words.index(i).load(layout), 0)


@gluon.jit
def _last_seen(row_pos, start, stop, CAUSAL: gl.constexpr):
    """Per row the last column of a half that it sees (negative: none)."""
    if CAUSAL:
        return gl.minimum(row_pos, stop - 1) - start
    else:
        return row_pos * 0 + (stop - 1 - start)


@gluon.jit
def mask_keys(s, words, slot, row_pos, CAUSAL: gl.constexpr, WIDTH: gl.constexpr):
    """Scores `[64, 128]` of keys from start to stop, or (WIDTH 64) of 64 keys from each of two starts."""
    base = slot * LINE
    last = _last_seen(row_pos, word(words, base), word(words, base + 1), CAUSAL)
    if WIDTH == 64:
        right = _last_seen(row_pos, word(words, base + 2), word(words, base + 3), CAUSAL)
        s3 = s.reshape([64, 2, 64])
        L3: gl.constexpr = s3.type.layout
        HALF: gl.constexpr = gl.SliceLayout(2, L3)
        half = gl.expand_dims(gl.arange(0, 2, layout=gl.SliceLayout(0, HALF)), 0)
        last2 = gl.expand_dims(gl.convert_layout(last, gl.SliceLayout(1, HALF)), 1)
        right2 = gl.expand_dims(gl.convert_layout(right, gl.SliceLayout(1, HALF)), 1)
        edge = gl.expand_dims(gl.where(half == 0, last2, right2), 2)
        col = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(0, L3)))
        col3 = gl.expand_dims(gl.expand_dims(col, 0), 0)
        s3 = gl.where(col3 <= edge, s3, HIDDEN)
        return gl.convert_layout(s3.reshape([64, 128]), s.type.layout, assert_trivial=True)
    else:
        col = gl.arange(0, 128, layout=gl.SliceLayout(0, s.type.layout))
        return gl.where(gl.expand_dims(col, 0) <= gl.expand_dims(last, 1), s, HIDDEN)


@gluon.jit
def mask_rule(s, words, slot, row_pos, window, sink):
    """Scores `[64, 128]` of keys from start to stop: the causal window of a row, and the first `sink` keys."""
    base = slot * LINE
    start = word(words, base)
    last = gl.expand_dims(_last_seen(row_pos, start, word(words, base + 1), True), 1)
    left = gl.expand_dims(row_pos - window + 1 - start, 1)
    col = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, s.type.layout)), 0)
    return gl.where((col <= last) & ((col >= left) | (col < sink - start)), s, HIDDEN)


@gluon.jit
def mask_places(s, places, slot, row_pos, CAUSAL: gl.constexpr):
    """Scores `[64, KEYS]` of keys whose positions (all below M, or NOWHERE) lie in row `slot` of `places`."""
    key = gl.expand_dims(places.index(slot).load(gl.SliceLayout(0, s.type.layout)), 0)
    if CAUSAL:
        return gl.where(key <= gl.expand_dims(row_pos, 1), s, HIDDEN)
    else:
        return gl.where(key < NOWHERE, s, HIDDEN)
