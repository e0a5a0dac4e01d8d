"""Attention forward for Hopper: one producer, two consumer warpgroups of 64 rows, persistent CTAs.

A *tile* is 128 query rows of one head, or 64 rows of two heads that share their lists. A *step* is 128 keys: one list
entry of width 128, two of width 64, four of width 32, an implicit block (dense layouts, static rules), or 128 single
keys. A row of lists may serve several tiles: each walks what its own rows see of it. Lists are ascending in memory and
walked backwards, so that the steps that need a mask (the diagonal, the last keys, the missing parts of a list that does
not fill its steps) come first; single keys follow, walked forwards, so that those which some row must not see come last.
Rules walk the window backwards, then the sink. All steps between run bare.

    producer   `feed.py`: takes tiles from an atomic counter two ahead, turns what they list into loads
    ring       entry i holds (K_i, V_{i-1}) of the flattened sequence of steps of ALL tiles of this CTA; one full and
               one empty barrier an entry. Beside it, what the mask needs: words (start, stop) of the keys of each
               half, or, where a layout has single keys, the positions of a step's 128 keys
    consumer   wait(entry); S = Q K^T and O += P V in flight together; softmax(S) while P V runs; release(entry)
    tile end   the same step with the next tile's Q: its first product runs beside this tile's last; then the epilogue

`masks.py` holds the masks, and what a masked score is.
"""

from . import softmax
from .feed import produce, ring
from .masks import LINE, mask_keys, mask_places, mask_rule, word
from .shim import (
    as_blocks,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    store_wait,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .tile import WORDS, read_tile


# ---------------------------------------------------------------------- consumer
@gluon.jit
def _mask(s, words, places, slot, row_pos, window, sink, WG: gl.constexpr, CAUSAL: gl.constexpr, WIDTH: gl.constexpr,
          COLS: gl.constexpr, RULE: gl.constexpr, DIAG: gl.constexpr):  # fmt: skip
    """Scores of a step with those that a row must not see hidden."""
    if RULE:
        s = mask_rule(s, words, slot, row_pos, window, sink)
    elif DIAG:
        s = mask_places(s, places, slot * 2 + WG, row_pos, CAUSAL)
    elif COLS or WIDTH == 32:
        s = mask_places(s, places, slot, row_pos, CAUSAL)
    else:
        s = mask_keys(s, words, slot, row_pos, CAUSAL, WIDTH)
    return s


@gluon.jit
def _step(q, k_bufs, v_bufs, words, places, full, empty, it, o, m, l, pb, scale_log2, row_pos, masked, window, sink,
          WG: gl.constexpr, CAUSAL: gl.constexpr, WIDTH: gl.constexpr, COLS: gl.constexpr, RULE: gl.constexpr,
          DIAG: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    P: gl.constexpr = pb.type.layout
    O: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    slot, phase = ring(it, STAGES)
    mbarrier.wait(full.index(slot), phase)
    s = warpgroup_mma(
        q, k_bufs.index(slot).permute((1, 0)), gl.zeros([64, 128], gl.float32, S), use_acc=False, is_async=True
    )
    o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
    if DIAG:
        masked = word(words, slot * LINE) > 0
    s = warpgroup_mma_wait(1, deps=[s])
    if masked:
        s = _mask(s, words, places, slot, row_pos, window, sink, WG, CAUSAL, WIDTH, COLS, RULE, DIAG)
        top = gl.max(s, 1)
    else:
        top = gl.max(s, 1)
    m, l, p, alpha = softmax.advance(s, top, m, l, scale_log2)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(slot), count=1)
    o = o * gl.expand_dims(gl.convert_layout(alpha, O), 1)
    return o, m, l, gl.convert_layout(p.to(pb.dtype), P)


@gluon.jit
def _consumer(WG: gl.constexpr, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M, CAUSAL: gl.constexpr,
              WIDTH: gl.constexpr, COLS: gl.constexpr, RULE: gl.constexpr, DIAG: gl.constexpr, BLOCK: gl.constexpr,
              D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Rows 64 * WG to 64 * WG + 63 of every tile of this CTA, or (BLOCK 64) all rows of its head number WG.

    Steps before `masked` of a tile need a mask; with columns or a rule those from `tail` on do, too. Of factored layouts
    (DIAG) a word of each step says whether it needs one.
    """
    q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words, places = bufs
    q_full, q_empty, full, empty = bars
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, O)
    DT: gl.constexpr = o_desc.dtype
    zero = gl.zeros([64, 128], gl.float32, S)
    SKIP: gl.constexpr = WG * 64 if BLOCK == 128 else 0  # rows of a block, and heads of a tile, before this consumer's
    AHEAD: gl.constexpr = WG if BLOCK == 64 else 0
    rows = M - N + SKIP + gl.arange(0, 64, layout=gl.SliceLayout(1, S))  # position of a row of query block 0
    out_rows = SKIP + gl.arange(0, 64, layout=R)
    o_tma = as_blocks(o_bufs, o_desc, 2, 64, D).index(WG)
    it = 0  # ring entries consumed
    qt = 0  # tiles begun

    # the first step of the first tile
    mbarrier.wait(q_full.index(WG), 0)
    n, masked, tail, block, b, h = read_tile(tile_words, 0)
    window = 0
    sink = 0
    if RULE:
        window = word(tile_words, 6)
        sink = word(tile_words, 7)
    mbarrier.wait(full.index(0), 0)
    q = q_bufs.index(WG)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = _mask(s, step_words, places, 0, rows + block * BLOCK, window, sink, WG, CAUSAL, WIDTH, COLS, RULE, DIAG)
    mbarrier.arrive(empty.index(0), count=1)
    it += 1
    m, l, p = softmax.begin(s, scale_log2)
    pb = gl.convert_layout(p.to(DT), P)

    while n > 0:
        o = gl.zeros([64, D], gl.float32, O)
        row_pos = rows + block * BLOCK
        for j in range(1, n):
            hide = j < masked
            if COLS or RULE:
                hide = hide | (j >= tail)
            o, m, l, pb = _step(q, k_bufs, v_bufs, step_words, places, full, empty, it, o, m, l, pb, scale_log2, row_pos,
                                hide, window, sink, WG, CAUSAL, WIDTH, COLS, RULE, DIAG, STAGES)  # fmt: skip
            it += 1

        # the last P V of this tile beside the first Q K^T of the next (of stale memory, unused, after the last tile)
        mbarrier.arrive(q_empty.index((qt & 1) * 2 + WG), count=1)
        qt += 1
        turn = qt & 1
        mbarrier.wait(q_full.index(turn * 2 + WG), (qt >> 1) & 1)
        n_next, masked_next, tail_next, block_next, b_next, h_next = read_tile(tile_words, turn * WORDS)
        if RULE:
            window = word(tile_words, turn * WORDS + 6)
            sink = word(tile_words, turn * WORDS + 7)
        slot, phase = ring(it, STAGES)
        mbarrier.wait(full.index(slot), phase)
        q = q_bufs.index(turn * 2 + WG)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        s = _mask(s, step_words, places, slot, rows + block_next * BLOCK, window, sink, WG, CAUSAL, WIDTH, COLS, RULE, DIAG)
        m_tile = gl.convert_layout(m, R)
        l_tile = gl.convert_layout(gl.sum(l, 1), R)
        m, l, p = softmax.begin(s, scale_log2)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot), count=1)
        it += 1
        pb = gl.convert_layout(p.to(DT), P)

        # epilogue
        seen, lse = softmax.end(m_tile, l_tile, scale_log2)
        row = block * BLOCK + out_rows
        gl.store(lse_ptr + (b * H + h + AHEAD).to(gl.int64) * N + row, lse, mask=row < N)
        o = gl.where(gl.expand_dims(seen, 1), o * gl.expand_dims(1.0 / l_tile, 1), 0.0)
        store_wait(0)
        partition_barrier()
        o_bufs.index(WG).store(o.to(DT))
        fence_async_shared()
        tma_store(o_desc, [b, h + AHEAD, block * BLOCK + SKIP, 0], o_tma)
        n = n_next
        masked = masked_next
        tail = tail_next
        block = block_next
        b = b_next
        h = h_next
    store_wait(0)


# ---------------------------------------------------------------------- the kernel
PLAIN_INTS = ["sb", "sh", "sq", "pb", "cb", "ch", "cq", "k_sb", "k_sg", "k_sm", "v_sb", "v_sg", "v_sm",
              "group", "ahead", "cover_n", "lag", "share", "T", "H", "G", "NQ", "N", "M"]  # fmt: skip


@gluon.jit(do_not_specialize=PLAIN_INTS)
def attend_kernel(q_desc, k_desc, v_desc, o_desc, lse_ptr, counter, tiles_ptr, plan_ptr, cols_ptr, k_ptr, v_ptr, cover_ptr,
                  sb, sh, sq, pb, cb, ch, cq, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm, group, ahead, cover_n, lag, share,
                  scale_log2, T, H, G, NQ, N, M, FLAT: gl.constexpr, CAUSAL: gl.constexpr, DENSE: gl.constexpr,
                  WIDTH: gl.constexpr, COLS: gl.constexpr, RULE: gl.constexpr, DIAG: gl.constexpr, BLOCK: gl.constexpr,
                  D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Launch with min(tiles, multiprocessors) CTAs, num_warps=4, maxnreg=168, and *counter = 0.

    Args:
        q_desc, k_desc, v_desc, o_desc: rank 4, blocks [1, 1, 64, D] for q and o, [1, 1, 128, D] (WIDTH below
            128: [1, 1, WIDTH, 64]) for k and v. FLAT: the layout of a [64, D] block in shared memory.
        lse_ptr: fp32 `[B, H, N]`, contiguous.
        tiles_ptr, sb, sh, sq: first keys, ascending; strides of batch row, list, query block. Unread when DENSE or RULE.
        group, ahead: tiles that a row of lists serves, and how many of the first row's lie before tile 0.
        plan_ptr, pb: int32 `[.., NQ, 2]` (entries used, steps to mask), with COLS `[.., NQ, 4]` (.., columns used, steps
            of columns that every row sees), with RULE `[.., 2]` (window, sink); stride of a batch row in rows.
        cols_ptr, cb, ch, cq: single keys, ascending; strides as of tiles. k_ptr, v_ptr, k_sb .. v_sm: K and V once more,
            with strides of batch row, kv head, key divided by 8. Unread without COLS.
        cover_ptr, cover_n, lag: see `factored.py`. With DIAG (and COLS, WIDTH 64) tiles hold words of distances and the plan
            (entries used, entries before them, columns used, 0).
        NQ: tiles of a head.
        BLOCK: rows of a tile in one head: 128, or 64 for lists that neighbouring heads share. WIDTH: keys of a list entry.
    """
    DT: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(DT, [4, 64, D], FLAT)
    o_bufs = gl.allocate_shared_memory(DT, [2, 64, D], FLAT)
    k_bufs = gl.allocate_shared_memory(DT, [STAGES, 128, D], FLAT)
    v_bufs = gl.allocate_shared_memory(DT, [STAGES, 128, D], FLAT)
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_words = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], WORD)
    step_words = gl.allocate_shared_memory(gl.int32, [STAGES * LINE, 1], WORD)
    places = gl.allocate_shared_memory(gl.int32, [STAGES * (2 if DIAG else 1), 128 if COLS or WIDTH == 32 else 1], WORD)
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
    bufs = (q_bufs, k_bufs, v_bufs, o_bufs, tile_words, step_words, places)
    bars = (q_full, q_empty, full, empty)
    lists = (tiles_ptr, plan_ptr, cols_ptr)
    strides = (sb, sh, sq, pb, cb, ch, cq, group, ahead)
    rows = (k_ptr, v_ptr, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm)
    reach = (cover_ptr, cover_n, lag)
    FEEDERS: gl.constexpr = 4 if COLS else 1
    gl.warp_specialize(
        [
            (_consumer, (0, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M, CAUSAL, WIDTH, COLS, RULE, DIAG, BLOCK,
                         D, STAGES)),
            (_consumer, (1, o_desc, bufs, bars, lse_ptr, scale_log2, H, N, M, CAUSAL, WIDTH, COLS, RULE, DIAG, BLOCK,
                         D, STAGES)),
            (produce, (q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, reach, share,
                       T, H, G, NQ, N, M, FLAT, CAUSAL, DENSE, WIDTH, COLS, RULE, DIAG, BLOCK, D, STAGES)),
        ],
        [4, FEEDERS],
        [216, 72] if COLS else [224, 56] if WIDTH == 32 else [232, 40],
    )  # fmt: skip
