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

WORDS = gl.constexpr(8)  # words of a tile: steps, masked, tail, query block, batch row, head, window, sink


@gluon.jit
def ring(it, STAGES: gl.constexpr):
    """(slot, phase) of ring entry `it`; STAGES is 2 or 4."""
    SHIFT: gl.constexpr = 1 if STAGES == 2 else 2
    return it & (STAGES - 1), (it >> SHIFT) & 1


@gluon.jit
def _place(t, H, G, NQ, BLOCK: gl.constexpr):
    """(batch row, head, kv head, query block) of tile t: kv heads outermost, late query blocks first, then the group.

    A tile of 64-row blocks holds one block of two neighbouring heads, of which `head` is the first.
    """
    PACK: gl.constexpr = 128 // BLOCK
    group = H // G // PACK
    size = group * NQ
    bg = t // size
    r = t - bg * size
    back = r // group
    b = bg // G
    g = bg - b * G
    return b, (g * group + (r - back * group)) * PACK, g, NQ - 1 - back


@gluon.jit
def _dense_plan(block, N, M, CAUSAL: gl.constexpr):
    """(steps, masked steps) of a query block of a dense layout."""
    if CAUSAL:
        first = M - N + block * 128  # position of the first row
        stop = gl.minimum(gl.maximum(first + 128, 0), M)
        whole = gl.minimum(gl.maximum(first + 1, 0), M) // 128
    else:
        stop = M + 0
        whole = M // 128
    n = gl.maximum((stop + 127) // 128, 1)
    return n, gl.maximum(n - whole, 1)


@gluon.jit
def _rule_plan(block, N, M, window, sink):
    """(first key block, window steps, all steps, masked steps, tail) of a query block under sink and window, causal.

    Key blocks go down from the diagonal to the window's left edge, then from the last block of the sink to block 0. Steps
    before `masked` hold keys that some row must not see yet, steps from `tail` on keys too old for some row.
    """
    first = M - N + block * 128
    stop = gl.minimum(gl.maximum(first + 128, 0), M)  # keys from here on are seen by no row
    low = gl.maximum(first - window + 1, 0)
    top = (stop + 127) // 128 - 1
    bottom = low // 128
    near = gl.where((window > 0) & (low < stop), top + 1 - bottom, 0)
    below = gl.where(near > 0, bottom, top + 1)
    n = near + gl.minimum((gl.minimum(sink, stop) + 127) // 128, below)
    whole = gl.minimum(gl.maximum(first + 1, 0), M) // 128
    edge = (gl.maximum(stop - window, 0) + 127) // 128  # from this block on every row's window holds the keys
    tail = gl.minimum(gl.maximum(top + 1 - edge, 0), near)
    return gl.where(near > 0, top, n - 1), near, gl.maximum(n, 1), gl.maximum(top + 1 - whole, 1), tail


@gluon.jit
def _load_keys(desc, buf, slot, bar, b, g, first, second, PAIR: gl.constexpr, D: gl.constexpr):
    """128 rows of K or V into ring slot `slot`: rows from `first`, or 64 from `first` and 64 from `second`."""
    if PAIR:
        # with the 128-byte swizzle a [128, D] tile is D / 64 column parts of two [64, 64] tiles each
        parts: gl.constexpr = D // 64
        for c in gl.static_range(parts):
            at = (slot * parts + c) * 2
            tma_load(desc, [b, g, first, c * 64], bar, buf.index(at))
            tma_load(desc, [b, g, second, c * 64], bar, buf.index(at + 1))
    else:
        tma_load(desc, [b, g, first, 0], bar, buf.index(slot))


@gluon.jit
def _open(t, lists, strides, share, T, H, G, NQ, N, M, CAUSAL: gl.constexpr, DENSE: gl.constexpr, PAIR: gl.constexpr,
          COLS: gl.constexpr, RULE: gl.constexpr, DIAG: gl.constexpr, BLOCK: gl.constexpr):  # fmt: skip
    """What the producer must know of tile t.

    Its place (b, h, g, block), its list and that of its columns (pointers), the position of its first step in the list,
    entries, masked steps, tail (see `_consumer`), all steps, and two numbers: (window steps, 0) of a rule, (steps of
    tiles, columns used) of lists with columns.
    """
    tiles_ptr, plan_ptr, cols_ptr = lists
    b, h, g, block = _place(gl.minimum(t, T - 1), H, G, NQ, BLOCK)
    head = h // share
    row = tiles_ptr
    cols = cols_ptr
    tail = 0
    x = 0
    y = 0
    window = 0
    sink = 0
    if DENSE:
        count, masked = _dense_plan(block, N, M, CAUSAL)
        n = count
        pos = count - 1
    elif RULE:
        at = plan_ptr + 2 * (b * strides[3] + head)
        window = gl.minimum(gl.load(at), 1 << 30)
        sink = gl.load(at + 1)
        pos, x, n, masked, tail = _rule_plan(block, N, M, window, sink)
        count = n
    else:
        PLAN: gl.constexpr = 4 if COLS else 2
        at = plan_ptr + PLAN * (b * strides[3] + head * NQ + block)
        count = gl.load(at)
        masked = gl.load(at + 1)
        row = tiles_ptr + (b.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + block.to(gl.int64) * strides[2])
        pos = count - 1
        if PAIR:
            n = gl.maximum((count + 1) >> 1, 1)
        else:
            n = gl.maximum(count, 1)
        if DIAG:  # distances are ascending: their keys come in the kernel's order from the list's front
            row += masked + gl.maximum(pos, 0)
        if COLS:
            x = n
            y = gl.load(at + 2)
            tail = n + gl.load(at + 3)
            n = x + ((y + 127) >> 7)
            cols = cols_ptr + (
                b.to(gl.int64) * strides[4] + head.to(gl.int64) * strides[5] + block.to(gl.int64) * strides[6]
            )
    return b, h, g, block, row, cols, pos, count, masked, tail, n, x, y, window, sink


@gluon.jit
def _entries(row, pos, edge, IMPLICIT: gl.constexpr, PAIR: gl.constexpr, DIAG: gl.constexpr):
    """First keys of the list entries at pos and pos - 1 (the second only where a step takes two).

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
        if PAIR:
            second = gl.load(row + gl.maximum(pos - 1, 0))
        else:
            second = first + 0
    return first, second


@gluon.jit
def _leave_words(words, slot, one, first, second, prev, PAIR: gl.constexpr):
    """Start and stop of the keys of a step, or of both its halves, for the mask."""
    W: gl.constexpr = 64 if PAIR else 128
    line = slot * LINE
    words.index(line).store(one * first)
    words.index(line + 1).store(one * gl.minimum(first + W, prev))
    if PAIR:
        words.index(line + 2).store(one * second)
        words.index(line + 3).store(one * gl.minimum(second + W, first))


@gluon.jit
def produce(q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, reach, share, T, H, G, NQ, N, M,
            FLAT: gl.constexpr, CAUSAL: gl.constexpr, DENSE: gl.constexpr, PAIR: gl.constexpr, COLS: gl.constexpr,
            RULE: gl.constexpr, DIAG: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Feeds the ring. One warp; four where there are columns (COLS).

    lists: pointers (tiles, plan, columns). strides: of the tiles (batch, list, block), of the plan (batch), of the columns
    (batch, list, block). rows: pointers and strides / 8 of K and V (batch, kv head, key). reach: of factored layouts
    (DIAG), pointer and length of the table of distances, lag of the first 64 rows. share: heads a list serves.
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
    if PAIR:
        k_tma = as_blocks(k_bufs, k_desc, STAGES * (D // 32), 64, 64)
        v_tma = as_blocks(v_bufs, v_desc, STAGES * (D // 32), 64, 64)
    else:
        k_tma = as_blocks(k_bufs, k_desc, STAGES, 128, D)
        v_tma = as_blocks(v_bufs, v_desc, STAGES, 128, D)
    grid = gl.num_programs(0)
    t = gl.program_id(0)
    b, h, g, block, row, cols, pos, count, masked, tail, n, x, y, window, sink = _open(
        t, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR, COLS, RULE, DIAG, BLOCK
    )
    edge = M - N + block * BLOCK + BLOCK  # one past the position of the tile's last row
    first, second = _entries(row, pos, edge, IMPLICIT, PAIR, DIAG)
    t1 = gl.atomic_add(counter, 1) + grid
    it = 0
    qt = 0
    # V of the step before: none yet, so the very first entry brings rows nobody reads
    v_b = 0
    v_g = 0
    v_first = 0
    v_second = 0
    if COLS:
        v_cols = cols + 0  # V of the step before, if it is gathered: its list, place in it (else -1), columns used
        v_at = x * 0 - 1
        v_used = y + 0
    while t < T:
        turn = qt & 1
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(turn * 2 + c), ((qt >> 1) & 1) ^ 1)
        tile_words.index(turn * WORDS).store(one * n)
        tile_words.index(turn * WORDS + 1).store(one * masked)
        tile_words.index(turn * WORDS + 2).store(one * tail)
        tile_words.index(turn * WORDS + 3).store(one * block)
        tile_words.index(turn * WORDS + 4).store(one * b)
        tile_words.index(turn * WORDS + 5).store(one * h)
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
            b1, h1, g1, block1, row1, cols1, pos1, count1, masked1, tail1, n1, x1, y1, window1, sink1 = _open(
                t1, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR, COLS, RULE, DIAG, BLOCK
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
            if PAIR:
                odd = gl.where(j == 0, count & 1, 0)  # an odd list: its last entry alone, the right half hidden
                second = gl.where(odd == 1, first, second)
                pos += odd - 2
            elif RULE:
                pos = gl.where(j + 1 == x, n - x, pos) - 1  # from the window's last block to the sink's
            else:
                pos -= 1
            first_next, second_next = _entries(row, pos, edge, IMPLICIT, PAIR, DIAG)
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
                        _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, PAIR, D)
                    if v_col:
                        v_keys = column_keys(v_cols, v_at, v_used, True)
                        gather(v_ptr, v_b, v_g, v_sb, v_sg, v_sm, v_keys, v_bufs, slot, D, STAGES, FLAT)
                    else:
                        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)
                    copy_commit()
                    copy_wait(0)
                    fence_async_shared()
                else:
                    mbarrier.expect(bar, 2 * BYTES)
                    _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, PAIR, D)
                    _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)
                if DIAG:
                    step_words.index(slot * LINE).store(one * gl.where(hide, 1, 0))
                    places.index(slot * 2).store(early)
                    places.index(slot * 2 + 1).store(late)
                elif j >= tail:
                    leave_places(places, slot, cols, at, y)
                elif j < masked:
                    leave_tiles(places, slot, first, second, prev, PAIR)
                partition_barrier()
                mbarrier.arrive(bar, count=1)
                v_cols = cols + 0
                v_at = gl.where(col, at, -1)
                v_used = y + 0
            else:
                mbarrier.wait(empty.index(slot), phase ^ 1)
                _leave_words(step_words, slot, one, first, second, prev, PAIR)
                mbarrier.arrive(bar, count=1)
                mbarrier.expect(bar, 2 * BYTES)
                _load_keys(k_desc, k_tma, slot, bar, b, g, first, second, PAIR, D)
                _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)
            it += 1
            v_b = b + 0  # never "x = y" for what a loop carries: the front end may lose x (GLUON: lost loop variable)
            v_g = g + 0
            v_first = first + 0
            v_second = second + 0
            prev = second + 0
            first = first_next
            second = second_next
        if COLS:
            b1, h1, g1, block1, row1, cols1, pos1, count1, masked1, tail1, n1, x1, y1, window1, sink1 = _open(
                t1, lists, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR, COLS, RULE, DIAG, BLOCK
            )
        edge = M - N + block1 * BLOCK + BLOCK
        first, second = _entries(row1, pos1, edge, IMPLICIT, PAIR, DIAG)
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
            _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)
        partition_barrier()
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.arrive(bar, count=1)
        mbarrier.expect(bar, BYTES)
        _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)
