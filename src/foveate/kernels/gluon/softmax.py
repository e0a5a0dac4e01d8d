"""The running softmax of a consumer: 64 rows, in base 2, scores scaled where they are exponentiated."""

from .masks import HIDDEN
from .shim import gl, gluon

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def row_sums(p):
    """Sums over columns that one thread holds: `[64, 8]`; the 8 are added once a tile."""
    return gl.sum(p.reshape([64, p.shape[1] // 8, 8]), 1)


@gluon.jit
def begin(s, scale_log2):
    """(m, l, p) after the first scores `[64, KEYS]` of a tile: maxima `[64]`, sums `[64, 8]`, exponentials."""
    m = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
    return m, row_sums(p), p


@gluon.jit
def advance(s, top, m, l, scale_log2):
    """(m, l, p, alpha) after scores whose row maxima are `top`; alpha `[64]` is the factor of what came before."""
    top = gl.maximum(m, top * scale_log2)
    alpha = gl.exp2(m - top)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(top, 1))
    l = l * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout), assert_trivial=True), 1)
    return top, l + row_sums(p), p, alpha


@gluon.jit
def end(m, l, scale_log2):
    """(seen, lse) of a tile, its sums l `[64]` added up: which rows have seen a key, and -inf where not."""
    seen = m > scale_log2 * (0.5 * HIDDEN)
    return seen, gl.where(seen, (m + gl.log2(l)) * LN2, float("-inf"))
