"""Block-list attention forward for Hopper: one producer warp, two consumer warpgroups of 64 rows, persistent CTAs.

A *tile* is 128 query rows of one head. A *step* is 128 keys: one list entry of width 128, a pair of entries of width
64, or an implicit block of a dense layout. Lists are ascending in memory and walked backwards, so that the steps that
need a mask (the diagonal, the last keys, the missing half of an odd list) come first and all others run bare.

    producer   takes tiles from an atomic counter two ahead, turns list entries into TMA loads
    ring       entry i holds (K_i, V_{i-1}) of the flattened sequence of steps of ALL tiles of this CTA; one full and
               one empty barrier an entry. Beside it, words (start, stop) of the keys of each half, for the mask
    consumer   wait(entry); S = Q K^T and O += P V in flight together; softmax(S) while P V runs; release(entry)
    tile end   the same step with the next tile's Q: its first product runs beside this tile's last; then the epilogue

A masked score is -2^100: its product with any scale is exact, so a row that has seen no key keeps p = 1 (finite), and
the first real key wipes it with alpha = 0. A row that never sees one is written as 0 and lse -inf.
"""

from .shim import (
    as_blocks,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    store_wait,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HIDDEN = gl.constexpr(-(2.0**100))
LN2 = gl.constexpr(0.6931471805599453)
WORDS = gl.constexpr(5)  # words of a tile: steps, masked steps, query block, batch row, head
LINE = gl.constexpr(4)  # words of a ring entry: start and stop of each half


@gluon.jit
def _ring(it, STAGES: gl.constexpr):
    """(slot, phase) of ring entry `it`; STAGES is 2 or 4."""
    SHIFT: gl.constexpr = 1 if STAGES == 2 else 2
    return it & (STAGES - 1), (it >> SHIFT) & 1


# ---------------------------------------------------------------------- consumer
@gluon.jit
def _word(words, i):
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
def _mask(s, words, slot, row_pos, CAUSAL: gl.constexpr, PAIR: gl.constexpr):
    base = slot * LINE
    last = _last_seen(row_pos, _word(words, base), _word(words, base + 1), CAUSAL)
    if PAIR:
        right = _last_seen(row_pos, _word(words, base + 2), _word(words, base + 3), CAUSAL)
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
def _row_sums(p):
    """Sums over columns that one thread holds: `[64, 8]`; the 8 are added once a tile."""
    return gl.sum(p.reshape([64, 16, 8]), 1)


@gluon.jit
def _step(q, k_bufs, v_bufs, words, full, empty, it, o, m, l, pb, scale_log2, row_pos,
          masked, CAUSAL: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    P: gl.constexpr = pb.type.layout
    O: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    slot, phase = _ring(it, STAGES)
    mbarrier.wait(full.index(slot), phase)
    s = warpgroup_mma(
        q, k_bufs.index(slot).permute((1, 0)), gl.zeros([64, 128], gl.float32, S), use_acc=False, is_async=True
    )
    o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if masked:
        s = _mask(s, words, slot, row_pos, CAUSAL, PAIR)
        top = gl.max(s, 1)
    else:
        top = gl.max(s, 1)
    top = gl.maximum(m, top * scale_log2)
    alpha = gl.exp2(m - top)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(top, 1))
    l = l * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout), assert_trivial=True), 1)
    l = l + _row_sums(p)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(slot), count=1)
    o = o * gl.expand_dims(gl.convert_layout(alpha, O), 1)
    return o, top, l, gl.convert_layout(p.to(pb.dtype), P)


@gluon.jit
def _consumer(WG: gl.constexpr, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M,
              CAUSAL: gl.constexpr, PAIR: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Rows 64 * WG to 64 * WG + 63 of every tile of this CTA."""
    q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words = bufs
    q_full, q_empty, full, empty = bars
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, O)
    DT: gl.constexpr = o_desc.dtype
    zero = gl.zeros([64, 128], gl.float32, S)
    rows = M - N + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))  # position of a row of query block 0
    out_rows = WG * 64 + gl.arange(0, 64, layout=R)
    o_tma = as_blocks(o_bufs, o_desc, 2, 64, D).index(WG)
    it = 0  # ring entries consumed
    qt = 0  # tiles begun

    # the first step of the first tile
    mbarrier.wait(q_full.index(WG), 0)
    n = _word(tile_words, 0)
    masked = _word(tile_words, 1)
    block = _word(tile_words, 2)
    b = _word(tile_words, 3)
    h = _word(tile_words, 4)
    mbarrier.wait(full.index(0), 0)
    q = q_bufs.index(WG)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = _mask(s, step_words, 0, rows + block * 128, CAUSAL, PAIR)
    mbarrier.arrive(empty.index(0), count=1)
    it += 1
    m = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
    l = _row_sums(p)
    pb = gl.convert_layout(p.to(DT), P)

    while n > 0:
        o = gl.zeros([64, D], gl.float32, O)
        row_pos = rows + block * 128
        for j in range(1, n):
            o, m, l, pb = _step(q, k_bufs, v_bufs, step_words, full, empty, it, o, m, l, pb, scale_log2, row_pos,
                                j < masked, CAUSAL, PAIR, STAGES)  # fmt: skip
            it += 1

        # the last P V of this tile beside the first Q K^T of the next (of stale memory, unused, after the last tile)
        mbarrier.arrive(q_empty.index((qt & 1) * 2 + WG), count=1)
        qt += 1
        turn = qt & 1
        mbarrier.wait(q_full.index(turn * 2 + WG), (qt >> 1) & 1)
        n_next = _word(tile_words, turn * WORDS)
        masked_next = _word(tile_words, turn * WORDS + 1)
        block_next = _word(tile_words, turn * WORDS + 2)
        b_next = _word(tile_words, turn * WORDS + 3)
        h_next = _word(tile_words, turn * WORDS + 4)
        slot, phase = _ring(it, STAGES)
        mbarrier.wait(full.index(slot), phase)
        q = q_bufs.index(turn * 2 + WG)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        s = _mask(s, step_words, slot, rows + block_next * 128, CAUSAL, PAIR)
        m_tile = gl.convert_layout(m, R)
        l_tile = gl.convert_layout(gl.sum(l, 1), R)
        m = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - gl.expand_dims(m, 1))
        l = _row_sums(p)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot), count=1)
        it += 1
        pb = gl.convert_layout(p.to(DT), P)

        # epilogue
        seen = m_tile > scale_log2 * (0.5 * HIDDEN)
        lse = gl.where(seen, (m_tile + gl.log2(l_tile)) * LN2, float("-inf"))
        row = block * 128 + out_rows
        gl.store(lse_ptr + (b * H + h).to(gl.int64) * N + row, lse, mask=row < N)
        o = gl.where(gl.expand_dims(seen, 1), o * gl.expand_dims(1.0 / l_tile, 1), 0.0)
        store_wait(0)
        partition_barrier()
        o_bufs.index(WG).store(o.to(DT))
        fence_async_shared()
        tma_store(o_desc, [b, h, block * 128 + WG * 64, 0], o_tma)
        n = n_next
        masked = masked_next
        block = block_next
        b = b_next
        h = h_next
    store_wait(0)


# ---------------------------------------------------------------------- producer
@gluon.jit
def _place(t, H, G, NQ):
    """(batch row, head, kv head, query block) of tile t: kv heads outermost, late query blocks first, then the group."""
    group = H // G
    size = group * NQ
    bg = t // size
    r = t - bg * size
    back = r // group
    b = bg // G
    g = bg - b * G
    return b, g * group + (r - back * group), g, NQ - 1 - back


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
def _open(t, tiles_ptr, plan_ptr, strides, share, T, H, G, NQ, N, M, CAUSAL: gl.constexpr, DENSE: gl.constexpr,
          PAIR: gl.constexpr):  # fmt: skip
    """What the producer must know of tile t: its place, its list (pointer, length), its steps."""
    b, h, g, block = _place(gl.minimum(t, T - 1), H, G, NQ)
    if DENSE:
        row = tiles_ptr
        count, masked = _dense_plan(block, N, M, CAUSAL)
        n = count
    else:
        head = h // share
        at = plan_ptr + 2 * (b * strides[3] + head * NQ + block)
        count = gl.load(at)
        masked = gl.load(at + 1)
        row = tiles_ptr + (b.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + block.to(gl.int64) * strides[2])
        if PAIR:
            n = gl.maximum((count + 1) >> 1, 1)
        else:
            n = gl.maximum(count, 1)
    return b, h, g, block, row, count, masked, n


@gluon.jit
def _entries(row, pos, DENSE: gl.constexpr, PAIR: gl.constexpr):
    """First keys of the list entries at pos and pos - 1 (the second only where a step takes two)."""
    if DENSE:
        first = pos * 128
        second = first + 0
    else:
        first = gl.load(row + gl.maximum(pos, 0))
        if PAIR:
            second = gl.load(row + gl.maximum(pos - 1, 0))
        else:
            second = first + 0
    return first, second


@gluon.jit
def _producer(q_desc, k_desc, v_desc, bufs, bars, counter, tiles_ptr, plan_ptr, strides, share, T, H, G, NQ, N, M,
              CAUSAL: gl.constexpr, DENSE: gl.constexpr, PAIR: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """Feeds the ring. strides: of the lists (batch, list, block) and of the plan (batch); share: heads a list serves."""
    q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words = bufs
    q_full, q_empty, full, empty = bars
    W: gl.constexpr = 64 if PAIR else 128
    BYTES: gl.constexpr = 128 * D * 2
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
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
    b, h, g, block, row, count, masked, n = _open(
        t, tiles_ptr, plan_ptr, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR
    )
    first, second = _entries(row, count - 1, DENSE, PAIR)
    t1 = gl.atomic_add(counter, 1) + grid
    it = 0
    qt = 0
    # V of the step before: none yet, so the very first entry brings rows nobody reads
    v_b = 0
    v_g = 0
    v_first = 0
    v_second = 0
    while t < T:
        turn = qt & 1
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(turn * 2 + c), ((qt >> 1) & 1) ^ 1)
        tile_words.index(turn * WORDS).store(one * n)
        tile_words.index(turn * WORDS + 1).store(one * masked)
        tile_words.index(turn * WORDS + 2).store(one * block)
        tile_words.index(turn * WORDS + 3).store(one * b)
        tile_words.index(turn * WORDS + 4).store(one * h)
        for c in gl.static_range(2):
            bar = q_full.index(turn * 2 + c)
            mbarrier.arrive(bar, count=1)
            mbarrier.expect(bar, 64 * D * 2)
            tma_load(q_desc, [b, h, block * 128 + c * 64, 0], bar, q_tma.index(turn * 2 + c))
        qt += 1
        # The next tile's place and plan travel while this one's steps are issued, its first entries and the claim of
        # the tile after it while the ring is full: every latency hides behind a step.
        b1, h1, g1, block1, row1, count1, masked1, n1 = _open(
            t1, tiles_ptr, plan_ptr, strides, share, T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR
        )
        # An empty list: one step at key 0 that stops before key 0.
        some = count > 0
        first = gl.where(some, first, 0)
        second = gl.where(some, second, 0)
        prev = gl.where(some, M, 0)
        pos = count - 1
        for j in range(n):
            if PAIR:
                odd = gl.where(j == 0, count & 1, 0)  # an odd list: its last entry alone, the right half hidden
                second = gl.where(odd == 1, first, second)
                pos += odd - 2
            else:
                pos -= 1
            first_next, second_next = _entries(row, pos, DENSE, PAIR)
            slot, phase = _ring(it, STAGES)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            line = slot * LINE
            step_words.index(line).store(one * first)
            step_words.index(line + 1).store(one * gl.minimum(first + W, prev))
            if PAIR:
                step_words.index(line + 2).store(one * second)
                step_words.index(line + 3).store(one * gl.minimum(second + W, first))
            bar = full.index(slot)
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
        first, second = _entries(row1, count1 - 1, DENSE, PAIR)
        t2 = gl.atomic_add(counter, 1) + grid
        t = t1
        t1 = t2
        b = b1
        h = h1
        g = g1
        block = block1
        row = row1
        count = count1
        masked = masked1
        n = n1
    # end of work: a tile of 0 steps, and the last V
    turn = qt & 1
    for c in gl.static_range(2):
        mbarrier.wait(q_empty.index(turn * 2 + c), ((qt >> 1) & 1) ^ 1)
    tile_words.index(turn * WORDS).store(one * 0)
    for c in gl.static_range(2):
        mbarrier.arrive(q_full.index(turn * 2 + c), count=2)
    slot, phase = _ring(it, STAGES)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    bar = full.index(slot)
    mbarrier.arrive(bar, count=1)
    mbarrier.expect(bar, BYTES)
    _load_keys(v_desc, v_tma, slot, bar, v_b, v_g, v_first, v_second, PAIR, D)


# ---------------------------------------------------------------------- the kernel
@gluon.jit(do_not_specialize=["sb", "sh", "sq", "pb", "share", "T", "H", "G", "NQ", "N", "M"])
def attend_kernel(q_desc, k_desc, v_desc, o_desc, lse_ptr, counter, tiles_ptr, plan_ptr, sb, sh, sq, pb, share, scale_log2,
                  T, H, G, NQ, N, M, FLAT: gl.constexpr, CAUSAL: gl.constexpr, DENSE: gl.constexpr, PAIR: gl.constexpr,
                  D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Launch with min(tiles, multiprocessors) CTAs, num_warps=4, maxnreg=168, and *counter = 0.

    Args:
        q_desc, k_desc, v_desc, o_desc: rank 4, blocks [1, 1, 64, D] for q and o, [1, 1, 128, D] (PAIR: [1, 1, 64, 64])
            for k and v. FLAT: the layout of a [64, D] block in shared memory.
        lse_ptr: fp32 `[B, H, N]`, contiguous.
        tiles_ptr, sb, sh, sq: first keys, ascending; strides of batch row, list, query block. Unread when DENSE.
        plan_ptr, pb: int32 `[.., NQ, 2]` (entries used, steps to mask); stride of a batch row in rows of 2.
    """
    DT: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(DT, [4, 64, D], FLAT)
    o_bufs = gl.allocate_shared_memory(DT, [2, 64, D], FLAT)
    k_bufs = gl.allocate_shared_memory(DT, [STAGES, 128, D], FLAT)
    v_bufs = gl.allocate_shared_memory(DT, [STAGES, 128, D], FLAT)
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_words = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], WORD)
    step_words = gl.allocate_shared_memory(gl.int32, [STAGES * LINE, 1], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=2)  # the words, and the bytes
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)  # both consumers
    fence_async_shared()
    bufs = (q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words)
    bars = (q_full, q_empty, full, empty)
    strides = (sb, sh, sq, pb)
    gl.warp_specialize(
        [
            (_consumer, (0, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M, CAUSAL, PAIR, D, STAGES)),
            (_consumer, (1, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M, CAUSAL, PAIR, D, STAGES)),
            (_producer, (q_desc, k_desc, v_desc, bufs, bars, counter, tiles_ptr, plan_ptr, strides, share,
                         T, H, G, NQ, N, M, CAUSAL, DENSE, PAIR, D, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
