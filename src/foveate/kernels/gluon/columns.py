"""Single keys as steps of the ring: 128 rows of K or V from anywhere, brought by cp.async of 16 bytes a thread.

TMA on Hopper copies boxes, not lists of rows, so a producer of four warps copies them itself: eight lanes a row, 128
bytes at a time. cp.async writes through the generic proxy and wgmma reads through the async one, so the order is: copy,
wait, fence by every thread, barrier of the partition, one arrival. With two ring slots nothing is won by waiting later:
the next slot comes free a step after this one.
"""

from .masks import NOWHERE
from .shim import as_rows, copy_async, gl, gluon

ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of a [128, 64] block: 8 pieces a thread


@gluon.jit
def column_keys(row, at, used, wanted):
    """int32 `[128]`: the columns at .. at + 127 of a list; beyond its `used` ones the last again, so that no key is
    read that the list does not name. Nothing is read unless `wanted`."""
    lane = gl.arange(0, 128, layout=gl.SliceLayout(1, ROWS))
    return gl.load(row + gl.maximum(gl.minimum(at + lane, used - 1), 0), mask=(lane >= 0) & wanted, other=0)


@gluon.jit
def leave_places(places, slot, row, at, used):
    """The positions of those columns for the mask, NOWHERE beyond `used`."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = at + gl.arange(0, 128, layout=LANES)
    key = gl.load(row + gl.maximum(gl.minimum(lane, used - 1), 0))
    places.index(slot).store(gl.where(lane < used, key, NOWHERE))


@gluon.jit
def leave_tiles(places, slot, first, second, third, fourth, prev, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """The positions of a step of tiles, which begin at `first` (64 wide: and at `second`; 32 wide: at all four) and stop
    where the tile before them in the step begins, the first one before `prev`. WARPS: of the partition."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    lane = gl.arange(0, 128, layout=LANES)
    key = first + lane
    stop = lane * 0 + prev
    if WIDTH < 128:
        key = gl.where(lane < WIDTH, key, second + lane - WIDTH)
        stop = gl.where(lane < WIDTH, stop, first)
    if WIDTH == 32:
        key = gl.where(lane < 64, key, gl.where(lane < 96, third + lane - 64, fourth + lane - 96))
        stop = gl.where(lane < 64, stop, gl.where(lane < 96, second, third))
    places.index(slot).store(gl.where(key < stop, key, NOWHERE))


@gluon.jit
def factored_places(cover, edge, lag, row, at, used, col, wanted, first, second, prev):
    """(int32 `[128]`, the same) for the first and the last 64 rows of a tile: the positions of a step of diagonals, or
    (col) of single keys, NOWHERE where those rows do not see one: a key of a tile that they reach at no distance, or
    that a nearer tile owns; a single key that they reach. Nothing is read unless `wanted`.

    cover: 1 at the distances that a diagonal reaches. edge: where the tile's rows end; the first 64 end `lag` earlier.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 128, layout=LANES)
    single = (lane >= 0) & col
    left = lane < 64
    key = gl.where(left, first + lane, second + lane - 64)
    own = (key < gl.where(left, lane * 0 + prev, lane * 0 + first)) & (key >= 0)
    spot = at + lane
    key = gl.where(single, gl.load(row + gl.maximum(gl.minimum(spot, used - 1), 0), mask=single, other=0), key)
    own = gl.where(single, spot < used, own) & wanted
    late = gl.load(cover + gl.maximum(edge - key, 0), mask=own, other=0) > 0
    early = gl.load(cover + gl.maximum(edge - lag - key, 0), mask=own, other=0) > 0
    return gl.where(own & (early != single), key, NOWHERE), gl.where(own & (late != single), key, NOWHERE)


@gluon.jit
def gather(base, b, g, sb, sg, sm, keys, bufs, slot, D: gl.constexpr, STAGES: gl.constexpr, FLAT: gl.constexpr):
    """Start copying rows `keys` of a `[B, G, M, D]` tensor, strides (sb, sg, sm) / 8, into ring slot `slot`."""
    parts: gl.constexpr = D // 64
    to = as_rows(bufs, STAGES * parts, 128, 64, FLAT)
    base += (b.to(gl.int64) * sb + g.to(gl.int64) * sg) * 8
    row = gl.expand_dims(keys.to(gl.int64) * sm * 8, 1)
    col = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS)), 0)
    for c in gl.static_range(parts):
        copy_async(to.index(slot * parts + c), base + (row + (col + c * 64)))
