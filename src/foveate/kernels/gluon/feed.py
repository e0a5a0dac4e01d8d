"""The producer: takes tiles from an atomic counter two ahead and turns lists, rules and dense blocks into loads."""

from .columns import column_keys, factored_places, gather, leave_places, leave_tiles
from .masks import LINE
from .shim import (
    as_blocks,
    copy_commit,
    copy_wait,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    tma_load,
)
from .tile import WORDS, leave_tile, open_tile


@gluon.jit
def ring(it, STAGES: gl.constexpr):
    """(slot, phase) of ring entry `it`; STAGES is 2 or 4."""
    SHIFT: gl.constexpr = 1 if STAGES == 2 else 2
    return it & (STAGES - 1), (it >> SHIFT) & 1


@gluon.jit
def _load_keys(desc, buf, slot, bar, b, g, first, second, third, fourth, WIDTH: gl.constexpr, D: gl.constexpr):
    """128 rows of K or V into ring slot `slot`: from `first`, or 64 each from two starts, or 32 each from four."""
    if WIDTH < 128:
        # with the 128-byte swizzle a [128, D] tile is D / 64 column parts of two [64, 64] or four [32, 64] tiles each
        parts: gl.constexpr = D // 64
        for c in gl.static_range(parts):
            at = (slot * parts + c) * (128 // WIDTH)
            tma_load(desc, [b, g, first, c * 64], bar, buf.index(at))
            tma_load(desc, [b, g, second, c * 64], bar, buf.index(at + 1))
            if WIDTH == 32:
                tma_load(desc, [b, g, third, c * 64], bar, buf.index(at + 2))
                tma_load(desc, [b, g, fourth, c * 64], bar, buf.index(at + 3))
    else:
        tma_load(desc, [b, g, first, 0], bar, buf.index(slot))


@gluon.jit
def _entries(row, pos, edge, IMPLICIT: gl.constexpr, WIDTH: gl.constexpr, DIAG: gl.constexpr):
    """First keys of the list entries at pos, pos - 1, pos - 2 and pos - 3, as many as a step takes.

    DIAG: twice the keys, plus 1 where the tile needs a mask; the rows end at `edge`.
    """
    if IMPLICIT:
        first = gl.maximum(pos, 0) * 128
        second = first + 0
    elif DIAG:
        first = 2 * (edge - 64) - gl.load(row - gl.maximum(pos, 0))
        second = 2 * (edge - 64) - gl.load(row - gl.maximum(pos - 1, 0))
    else:
        first = gl.load(row + gl.maximum(pos, 0))
        if WIDTH < 128:
            second = gl.load(row + gl.maximum(pos - 1, 0))
        else:
            second = first + 0
    third = second * 0
    fourth = second * 0
    if WIDTH == 32:
        third = gl.load(row + gl.maximum(pos - 2, 0))
        fourth = gl.load(row + gl.maximum(pos - 3, 0))
    return first, second, third, fourth


@gluon.jit
def _leave_words(words, slot, one, first, second, prev, WIDTH: gl.constexpr):
    """Start and stop of the keys of a step, or of both its halves, for the mask."""
    line = slot * LINE
    words.index(line).store(one * first)
    words.index(line + 1).store(one * gl.minimum(first + WIDTH, prev))
    if WIDTH == 64:
        words.index(line + 2).store(one * second)
        words.index(line + 3).store(one * gl.minimum(second + WIDTH, first))


@gluon.jit
def produce(q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, reach, share, T, H, G, NQ, N, M,
            FLAT: gl.constexpr, CAUSAL: gl.constexpr, DENSE: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr,
            RULE: gl.constexpr, DIAG: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Feeds the ring. One warp; four where there are columns (COLS).

    lists: pointers (tiles, plan, columns). strides: of the tiles (batch, list, row), of the plan (batch), of the columns
    (batch, list, row); tiles a row of lists serves, and those of the first row before tile 0. rows: pointers and strides / 8
    of K and V (batch, kv head, key). reach: of factored layouts (DIAG), pointer and length of the table of distances, lag
    of the first 64 rows. share: heads a list serves.
    """
    q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words, places = bufs
    q_full, q_empty, full, empty = bars
    k_ptr, v_ptr, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm = rows
    cover_ptr, cover_n, lag = reach
    IMPLICIT: gl.constexpr = DENSE or RULE
    BYTES: gl.constexpr = 128 * D * 2
    WARPS: gl.constexpr = 4 if COLS else 1
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    one = gl.full([1], 1, gl.int32, ONE)
    q_tma = as_blocks(q_bufs, q_desc, 4, 64, D)
    if WIDTH < 128:
        k_tma = as_blocks(k_bufs, k_desc, STAGES * (D // 64) * (128 // WIDTH), WIDTH, 64)
        v_tma = as_blocks(v_bufs, v_desc, STAGES * (D // 64) * (128 // WIDTH), WIDTH, 64)
    else:
        k_tma = as_blocks(k_bufs, k_desc, STAGES, 128, D)
        v_tma = as_blocks(v_bufs, v_desc, STAGES, 128, D)
    grid = gl.num_programs(0)
    t = gl.program_id(0)
    b, h, g, block, row, cols, pos, count, masked, tail, n, x, y, window, sink = open_tile(
        t, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, WIDTH, COLS, RULE, DIAG, BLOCK
    )
    edge = M - N + block * BLOCK + BLOCK  # one past the position of the tile's last row
    first, second, third, fourth = _entries(row, pos, edge, IMPLICIT, WIDTH, DIAG)
    t1 = gl.atomic_add(counter, 1) + grid
    it = 0
    qt = 0
    # V of the step before: none yet, so the very first entry brings rows nobody reads
    v_b = 0
    v_g = 0
    v_first = 0
    v_second = 0
    v_third = 0
    v_fourth = 0
    if COLS:
        v_cols = cols + 0  # V of the step before, if it is gathered: its list, place in it (else -1), columns used
        v_at = x * 0 - 1
        v_used = y + 0
    while t < T:
        turn = qt & 1
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(turn * 2 + c), ((qt >> 1) & 1) ^ 1)
        leave_tile(tile_words, turn * WORDS, one, n, masked, tail, block, b, h)
        if RULE:
            tile_words.index(turn * WORDS + 6).store(one * window)
            tile_words.index(turn * WORDS + 7).store(one * sink)
        for c in gl.static_range(2):
            bar = q_full.index(turn * 2 + c)
            mbarrier.arrive(bar, count=1)
            mbarrier.expect(bar, 64 * D * 2)
            if BLOCK == 64:
                tma_load(q_desc, [b, h + c, block * 64, 0], bar, q_tma.index(turn * 2 + c))
            else:
                tma_load(q_desc, [b, h, block * 128 + c * 64, 0], bar, q_tma.index(turn * 2 + c))
        qt += 1
        if not COLS:
            # The next tile's place and plan travel while this one's steps are issued, its first entries and the claim
            # of the tile after it while the ring is full: every latency hides behind a step. With columns tiles are
            # long and registers few: there all of it waits until the ring is full.
            b1, h1, g1, block1, row1, cols1, pos1, count1, masked1, tail1, n1, x1, y1, window1, sink1 = open_tile(
                t1, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, WIDTH, COLS, RULE, DIAG, BLOCK
            )
        # An empty list: one step that stops before it starts; where columns follow, beyond M, which TMA reads as zeros,
        # since a key that is no number would spoil the sums.
        some = count > 0
        nowhere = (2 * M if DIAG else M) if COLS else 0
        first = gl.where(some, first, nowhere)
        second = gl.where(some, second, nowhere)
        prev = gl.where(some, M, 0)
        cover = cover_ptr
        if DIAG:
            cover = cover_ptr + (b * strides[3] // NQ + h // share).to(gl.int64) * cover_n
        for j in range(n):
            if WIDTH == 64:
                odd = gl.where(j == 0, count & 1, 0)  # an odd list: its last entry alone, the right half hidden
                second = gl.where(odd == 1, first, second)
                pos += odd - 2
            elif WIDTH == 32:
                odd = gl.where(j == 0, count & 3, 0)  # so too with four: the last 1 to 3 first, again in hidden places
                second = gl.where(odd == 1, first, second)
                third = gl.where((odd == 1) | (odd == 2), second, third)
                fourth = gl.where(odd > 0, third, fourth)
                pos -= gl.where(odd > 0, odd, 4)
            elif RULE:
                pos = gl.where(j + 1 == x, n - x, pos) - 1  # from the window's last block to the sink's
            else:
                pos -= 1
            first_next, second_next, third_next, fourth_next = _entries(row, pos, edge, IMPLICIT, WIDTH, DIAG)
            slot, phase = ring(it, STAGES)
            bar = full.index(slot)
            if COLS:
                col = j >= x
                v_col = v_at >= 0
                at = (j - x) * 128
                keys = column_keys(cols, at, y, col)
                if DIAG:
                    partial = (first | second) & 1
                    first = first >> 1
                    second = second >> 1
                    hide = col | (j == 0) | (partial > 0) | (first > edge - 191) | (second < 0)
                    early, late = factored_places(cover, edge, lag, cols, at, y, col, hide, first, second, prev)
                mbarrier.wait(empty.index(slot), phase ^ 1)
                # One arrival announces the bytes of TMA, or that there are none; the other the positions and the gathers.
                if col | v_col:
                    mbarrier.expect(bar, BYTES, pred=col != v_col)
                    mbarrier.arrive(bar, count=1, pred=col & v_col)
                    if col:
                        gather(k_ptr, b, g, k_sb, k_sg, k_sm, keys, k_bufs, slot, D, STAGES, FLAT)
                    else:
                        _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, third, fourth, WIDTH, D)
                    if v_col:
                        v_keys = column_keys(v_cols, v_at, v_used, True)
                        gather(v_ptr, v_b, v_g, v_sb, v_sg, v_sm, v_keys, v_bufs, slot, D, STAGES, FLAT)
                    else:
                        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, v_third, v_fourth, WIDTH, D)
                    copy_commit()
                    copy_wait(0)
                    fence_async_shared()
                else:
                    mbarrier.expect(bar, 2 * BYTES)
                    _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, third, fourth, WIDTH, D)
                    _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, v_third, v_fourth, WIDTH, D)
                if DIAG:
                    step_words.index(slot * LINE).store(one * gl.where(hide, 1, 0))
                    places.index(slot * 2).store(early)
                    places.index(slot * 2 + 1).store(late)
                elif j >= tail:
                    leave_places(places, slot, cols, at, y)
                elif j < masked:
                    leave_tiles(places, slot, first, second, third, fourth, prev, WIDTH, WARPS)
                partition_barrier()
                mbarrier.arrive(bar, count=1)
                v_cols = cols + 0
                v_at = gl.where(col, at, -1)
                v_used = y + 0
            else:
                mbarrier.wait(empty.index(slot), phase ^ 1)
                if WIDTH < 64:
                    if j < masked:
                        leave_tiles(places, slot, first, second, third, fourth, prev, WIDTH, WARPS)
                        partition_barrier()
                else:
                    _leave_words(step_words, slot, one, first, second, prev, WIDTH)
                mbarrier.arrive(bar, count=1)
                mbarrier.expect(bar, 2 * BYTES)
                _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, third, fourth, WIDTH, D)
                _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, v_third, v_fourth, WIDTH, D)
            it += 1
            v_b = b + 0  # never "x = y" for what a loop carries: the front end may lose x (GLUON: lost loop variable)
            v_g = g + 0
            v_first = first + 0
            v_second = second + 0
            v_third = third + 0
            v_fourth = fourth + 0
            prev = fourth + 0 if WIDTH == 32 else second + 0
            first = first_next
            second = second_next
            third = third_next
            fourth = fourth_next
        if COLS:
            b1, h1, g1, block1, row1, cols1, pos1, count1, masked1, tail1, n1, x1, y1, window1, sink1 = open_tile(
                t1, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, WIDTH, COLS, RULE, DIAG, BLOCK
            )
        edge = M - N + block1 * BLOCK + BLOCK
        first, second, third, fourth = _entries(row1, pos1, edge, IMPLICIT, WIDTH, DIAG)
        t2 = gl.atomic_add(counter, 1) + grid
        t = t1
        t1 = t2
        b = b1
        h = h1
        g = g1
        block = block1
        row = row1
        cols = cols1
        pos = pos1
        count = count1
        masked = masked1
        tail = tail1
        n = n1
        x = x1
        y = y1
        window = window1
        sink = sink1
    # end of work: a tile of 0 steps, and the last V
    turn = qt & 1
    for c in gl.static_range(2):
        mbarrier.wait(q_empty.index(turn * 2 + c), ((qt >> 1) & 1) ^ 1)
    tile_words.index(turn * WORDS).store(one * 0)
    for c in gl.static_range(2):
        mbarrier.arrive(q_full.index(turn * 2 + c), count=2)
    slot, phase = ring(it, STAGES)
    bar = full.index(slot)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    if COLS:
        v_col = v_at >= 0
        mbarrier.expect(bar, BYTES, pred=v_col == False)  # noqa: E712
        mbarrier.arrive(bar, count=1, pred=v_col)
        if v_col:
            v_keys = column_keys(v_cols, v_at, v_used, True)
            gather(v_ptr, v_b, v_g, v_sb, v_sg, v_sm, v_keys, v_bufs, slot, D, STAGES, FLAT)
            copy_commit()
            copy_wait(0)
            fence_async_shared()
        else:
            _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, v_third, v_fourth, WIDTH, D)
        partition_barrier()
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.arrive(bar, count=1)
        mbarrier.expect(bar, BYTES)
        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, v_third, v_fourth, WIDTH, D)
