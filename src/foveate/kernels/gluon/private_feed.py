"""The producers of `private_kernel.py`: each takes tiles from the counter and fills the ring of one consumer.

Tiles of 64 keys come by TMA, those of 32 two to a step: an odd list has its last one alone in the first step, twice, the
second time hidden. Single keys (COLS) are gathered in steps of 64 rows of K and V by `cp.async`, 16 bytes a
thread, eight lanes a row: TMA on Hopper copies boxes. Such copies write through the generic proxy and wgmma reads through
the async one, so a step is announced after a wait for its group, a fence by every thread and a barrier of the partition:
one step late, when the next one's copies are on their way, so that two steps are in flight.
"""

from .masks import NOWHERE
from .shim import (
    as_blocks,
    as_rows,
    copy_async,
    copy_commit,
    copy_wait,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    tma_load,
)
from .tile import WORDS, leave_tile, place


@gluon.jit
def entry(it, WG: gl.constexpr, STAGES: gl.constexpr):
    """(slot, phase) of entry `it` of the ring of consumer WG."""
    return it % STAGES + WG * STAGES, (it // STAGES) & 1


@gluon.jit
def _open(t, lists, strides, share, T, H, G, NQ, COLS: gl.constexpr):
    """Of tile t: its place (b, h, g, block), its lists of tiles and columns (pointers), the tiles it uses, how many of them,
    from the last on, are masked, the columns it uses, and the whole steps of them that need no mask."""
    tiles_ptr, plan_ptr, cols_ptr = lists
    b, h, g, block = place(gl.minimum(t, T - 1), H, G, NQ, 128)  # one head a tile
    head = h // share
    PLAN: gl.constexpr = 4 if COLS else 2
    at = plan_ptr + PLAN * ((b * strides[3] + head) * NQ + block)
    row = tiles_ptr + (b.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + block.to(gl.int64) * strides[2])
    cols = cols_ptr
    y = 0
    whole = 0
    if COLS:
        cols = cols_ptr + (b.to(gl.int64) * strides[4] + head.to(gl.int64) * strides[5] + block.to(gl.int64) * strides[6])
        y = gl.load(at + 2)
        whole = gl.load(at + 3)
    return b, h, g, block, row, cols, gl.load(at), gl.load(at + 1), y, whole


@gluon.jit
def _entries(row, pos, WIDTH: gl.constexpr):
    """First keys of the tiles of a step, of which the list entry `pos` is the last: two of 32 keys, or one (then twice)."""
    first = gl.load(row + gl.maximum(pos, 0))
    second = first + 0
    if WIDTH == 32:
        second = gl.load(row + gl.maximum(pos - 1, 0))
    return first, second


@gluon.jit
def _load_keys(desc, buf, slot, bar, b, g, first, second, WIDTH: gl.constexpr, D: gl.constexpr):
    """64 rows of K or V into ring slot `slot`: from `first`, or 32 each from two starts."""
    if WIDTH == 32:
        # with the 128-byte swizzle a [64, D] tile is D / 64 column parts of two [32, 64] tiles each
        parts: gl.constexpr = D // 64
        for c in gl.static_range(parts):
            at = (slot * parts + c) * 2
            tma_load(desc, [b, g, first, c * 64], bar, buf.index(at))
            tma_load(desc, [b, g, second, c * 64], bar, buf.index(at + 1))
    else:
        tma_load(desc, [b, g, first, 0], bar, buf.index(slot))


@gluon.jit
def _gather(base, b, g, sb, sg, sm, keys, bufs, slot, col, D: gl.constexpr, STAGES: gl.constexpr, FLAT: gl.constexpr):
    """Start copying rows `keys` of a `[B, G, M, D]` tensor, strides (sb, sg, sm) / 8, into ring slot `slot`.

    col: int `[1, 64]`, the columns of a piece of 128 bytes.
    """
    parts: gl.constexpr = D // 64
    to = as_rows(bufs, 2 * STAGES * parts, 64, 64, FLAT)
    base += (b.to(gl.int64) * sb + g.to(gl.int64) * sg) * 8
    row = gl.expand_dims(keys.to(gl.int64) * sm * 8, 1)
    for c in gl.static_range(parts):
        copy_async(to.index(slot * parts + c), base + (row + (col + c * 64)))


@gluon.jit
def produce(WG: gl.constexpr, q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, share, T, H, G, NQ, M, skew,
            FLAT: gl.constexpr, COLS: gl.constexpr, WIDTH: gl.constexpr, WARPS: gl.constexpr, D: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Feeds the ring of consumer WG. WIDTH: keys of a list entry. WARPS: of this partition.

    lists: pointers (tiles, plan, columns). strides: of the tiles (batch, list, block), lists of a batch row in the plan
    (0: shared), of the columns (batch, list, block). rows: pointers and strides / 8 of K and V (batch, kv head, key).
    """
    q_bufs, k_bufs, v_bufs, tile_words, places = bufs
    q_full, q_empty, full, empty = bars
    k_ptr, v_ptr, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm = rows
    BYTES: gl.constexpr = 64 * D * 2
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    one = gl.full([1], 1, gl.int32, ONE)
    lane = gl.arange(0, 64, layout=ONE)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    spot = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    part = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS)), 0)
    q_tma = as_blocks(q_bufs, q_desc, 2, 64, D).index(WG)
    if WIDTH == 32:
        k_tma = as_blocks(k_bufs, k_desc, 2 * STAGES * (D // 64) * 2, 32, 64)
        v_tma = as_blocks(v_bufs, v_desc, 2 * STAGES * (D // 64) * 2, 32, 64)
    else:
        k_tma = as_blocks(k_bufs, k_desc, 2 * STAGES, 64, D)
        v_tma = as_blocks(v_bufs, v_desc, 2 * STAGES, 64, D)
    q_bar = q_full.index(WG)
    grid = gl.num_programs(0) * 2
    t = gl.program_id(0) * 2 + WG
    b, h, g, block, row, cols, count, masked, y, whole = _open(t, lists, strides, share, T, H, G, NQ, COLS)
    first, second = _entries(row, count - 1, WIDTH)
    t1 = gl.atomic_add(counter, 1) + grid
    it = 0
    qt = 0
    # V of the step before: none yet, so the very first entry brings rows nobody reads
    v_b = 0
    v_g = 0
    v_first = 0
    v_second = 0
    if COLS:
        keys = spot * 0
        v_keys = keys + 0
        v_col = t < 0
        late = t < 0  # the step before waits to be announced
        late_slot = 0
    while t < T:
        mbarrier.wait(q_empty.index(WG), (qt & 1) ^ 1)
        x = gl.maximum((count + (64 // WIDTH - 1)) // (64 // WIDTH), 1)
        n = x + ((y + 63) >> 6)
        tail = x + whole
        leave_tile(tile_words, WG * WORDS, one, n, masked, tail, block, b, h)
        if COLS:
            partition_barrier()
        mbarrier.arrive(q_bar, count=1)
        mbarrier.expect(q_bar, BYTES)
        tma_load(q_desc, [b, h, block * 64 - skew, 0], q_bar, q_tma)
        qt += 1
        if not COLS:
            # The next tile's place and plan travel while this one's steps are issued. With columns registers are few.
            b1, h1, g1, block1, row1, cols1, count1, masked1, y1, whole1 = _open(
                t1, lists, strides, share, T, H, G, NQ, COLS
            )
        # An empty list: one step that stops before it starts, beyond M, which TMA reads as zeros, since a key that is no
        # number would spoil the sums of columns that follow.
        some = count > 0
        first = gl.where(some, first, M)
        second = gl.where(some, second, M)
        prev = gl.where(some, M, 0)
        pos = count - 2  # the next step's last tile
        if WIDTH == 32:
            odd = count & 1
            second = gl.where(odd == 1, first, second)
            pos = pos - 1 + odd
        for j in range(n):
            first_next, second_next = _entries(row, pos, WIDTH)
            slot, phase = entry(it, WG, STAGES)
            bar = full.index(slot)
            if COLS:
                col = j >= x
                at = (j - x) * 64
                ahead = gl.maximum(gl.minimum(at + 64 + spot, y - 1), 0)  # the next step's, known before it is its turn
                keys_next = gl.load(cols + ahead, mask=(spot >= 0) & (j + 1 >= x), other=0)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            # for the mask: the positions of the step's keys, NOWHERE beyond the list or where a later tile owns one
            if COLS and j >= tail:
                key = gl.load(cols + gl.maximum(gl.minimum(at + lane, y - 1), 0))
                places.index(slot).store(gl.where(at + lane < y, key, NOWHERE))
            elif (j == 0) | (j < masked):
                key = first + lane
                stop = lane * 0 + prev
                if WIDTH == 32:
                    key = gl.where(lane < 32, key, second + lane - 32)
                    stop = gl.where(lane < 32, stop, first)
                places.index(slot).store(gl.where(key < stop, key, NOWHERE))
            if COLS:
                copies = col | v_col
                if copies:
                    # one arrival announces the bytes of TMA, or that there are none; the other the copies
                    mbarrier.expect(bar, BYTES, pred=col != v_col)
                    mbarrier.arrive(bar, count=1, pred=col & v_col)
                    if col:
                        _gather(k_ptr, b, g, k_sb, k_sg, k_sm, keys, k_bufs, slot, part, D, STAGES, FLAT)
                    else:
                        _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, WIDTH, D)
                    if v_col:
                        _gather(v_ptr, v_b, v_g, v_sb, v_sg, v_sm, v_keys, v_bufs, slot, part, D, STAGES, FLAT)
                    else:
                        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, WIDTH, D)
                else:
                    mbarrier.expect(bar, 2 * BYTES)
                    _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, WIDTH, D)
                    _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, WIDTH, D)
                copy_commit()  # of nothing, where all came by TMA
                copy_wait(1)
                fence_async_shared()
                partition_barrier()
                mbarrier.arrive(full.index(late_slot), count=1, pred=late)
                mbarrier.arrive(bar, count=1, pred=copies == False)  # noqa: E712
                late = copies | (t < 0)
                late_slot = slot + 0
                v_keys = keys + 0
                keys = keys_next
                v_col = col | (t < 0)
            else:
                mbarrier.arrive(bar, count=1)
                mbarrier.expect(bar, 2 * BYTES)
                _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, WIDTH, D)
                _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, WIDTH, D)
            it += 1
            pos -= 64 // WIDTH
            v_b = b + 0  # never "x = y" for what a loop carries: the front end may lose x (GLUON: lost loop variable)
            v_g = g + 0
            v_first = first + 0
            v_second = second + 0
            prev = second + 0
            first = first_next
            second = second_next
        if COLS:
            b1, h1, g1, block1, row1, cols1, count1, masked1, y1, whole1 = _open(
                t1, lists, strides, share, T, H, G, NQ, COLS
            )
        first, second = _entries(row1, count1 - 1, WIDTH)
        t2 = gl.atomic_add(counter, 1) + grid
        t = t1
        t1 = t2
        b = b1
        h = h1
        g = g1
        block = block1
        row = row1
        cols = cols1
        count = count1
        masked = masked1
        y = y1
        whole = whole1
    # end of work: a tile of 0 steps, and the last V
    mbarrier.wait(q_empty.index(WG), (qt & 1) ^ 1)
    tile_words.index(WG * WORDS).store(one * 0)
    if COLS:
        partition_barrier()
    mbarrier.arrive(q_bar, count=2)
    slot, phase = entry(it, WG, STAGES)
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    if COLS:
        mbarrier.expect(bar, BYTES, pred=v_col == False)  # noqa: E712
        mbarrier.arrive(bar, count=1, pred=v_col)
        if v_col:
            _gather(v_ptr, v_b, v_g, v_sb, v_sg, v_sm, v_keys, v_bufs, slot, part, D, STAGES, FLAT)
        else:
            _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, WIDTH, D)
        copy_commit()
        copy_wait(0)
        fence_async_shared()
        partition_barrier()
        mbarrier.arrive(full.index(late_slot), count=1, pred=late)
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.arrive(bar, count=1)
        mbarrier.expect(bar, BYTES)
        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, WIDTH, D)
