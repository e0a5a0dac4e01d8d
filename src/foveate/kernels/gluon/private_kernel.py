"""Attention forward for Hopper over private lists of 64-row blocks: two consumers, each with a tile and a ring of its own.

A *tile* is 64 query rows of one head, a *step* 64 keys: one list entry of width 64, two of 32, or 64 single keys.
`kernel.py` gives both consumers one list, which heads with lists of their own do not have. Here each consumer warpgroup has
its own producer, and nothing ties the two halves of a CTA together but the counter that hands out tiles.

    producer   `private_feed.py`: takes tiles from the counter two ahead, turns what they list into loads
    ring       entry i holds (K_i, V_{i-1}) of the steps of ALL tiles of this consumer; one full and one empty barrier.
               Beside it the positions of the step's keys, for the mask
    order      tiles backwards, the masked ones first; then columns forwards, the masked ones last
    Q          in registers: m64n64 products that read both operands from shared memory are bound by it, and the buffer is
               free for the next tile's rows as soon as this tile begins
    consumer   as in `kernel.py`; the two run at unrelated phases, so that one has the tensor cores while the other
               computes exponentials
    output     straight from registers: the rings leave no room for a buffer, and a tile writes 1 byte for 100 it reads

Bound by L2: a step of 2.1 MFLOP (D 128) reads 32 KB. Neighbouring tiles are neighbouring blocks of one kv head, all walked
backwards from the diagonal, so that what they share is read while it is in L2.
"""

from . import softmax
from .masks import mask_places
from .private_feed import entry, produce
from .shim import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .tile import WORDS, read_tile


# ---------------------------------------------------------------------- consumer
@gluon.jit
def _step(q, k_bufs, v_bufs, places, full, empty, it, o, m, l, pb, scale_log2, row_pos, masked, WG: gl.constexpr,
          CAUSAL: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    P: gl.constexpr = pb.type.layout
    O: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    slot, phase = entry(it, WG, STAGES)
    mbarrier.wait(full.index(slot), phase)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), gl.zeros([64, 64], gl.float32, S), use_acc=False, is_async=True)
    o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if masked:
        s = mask_places(s, places, slot, row_pos, CAUSAL)
        top = gl.max(s, 1)
    else:
        top = gl.max(s, 1)
    m, l, p, alpha = softmax.advance(s, top, m, l, scale_log2)
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(empty.index(slot), count=1)
    o = o * gl.expand_dims(gl.convert_layout(alpha, O), 1)
    return o, m, l, gl.convert_layout(p.to(pb.dtype), P)


@gluon.jit
def _take(q_bufs, words, q_full, q_empty, qt, WG: gl.constexpr, Q: gl.constexpr):
    """Tile number `qt` of consumer WG: (Q in registers, steps, masked steps, tail, query block, batch row, head).

    What lay in shared memory is given back at once.
    """
    mbarrier.wait(q_full.index(WG), qt & 1)
    n, masked, tail, block, b, h = read_tile(words, WG * WORDS)
    q = q_bufs.index(WG).load(Q)
    partition_barrier()
    mbarrier.arrive(q_empty.index(WG), count=1)
    return q, n, masked, tail, block, b, h


@gluon.jit
def _consume(WG: gl.constexpr, out_ptr, lse_ptr, bufs, bars, out_sb, out_sh, out_sn, scale_log2, H, N, M, skew,
             CAUSAL: gl.constexpr, COLS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Every tile that producer WG of this CTA took. Steps before `masked` of a tile need a mask, with columns those from
    `tail` on, too."""
    q_bufs, k_bufs, v_bufs, tile_words, places = bufs
    q_full, q_empty, full, empty = bars
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, O)
    DT: gl.constexpr = q_bufs.dtype
    zero = gl.zeros([64, 64], gl.float32, S)
    rows = M - N - skew + gl.arange(0, 64, layout=gl.SliceLayout(1, S))  # position of a row of query block 0
    out_rows = gl.arange(0, 64, layout=R) - skew
    out_cols = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, O)), 0)
    it = 0  # ring entries consumed
    qt = 0  # tiles begun

    # the first step of the first tile
    q, n, masked, tail, block, b, h = _take(q_bufs, tile_words, q_full, q_empty, qt, WG, Q)
    slot, phase = entry(it, WG, STAGES)
    mbarrier.wait(full.index(slot), phase)
    s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    s = mask_places(s, places, slot, rows + block * 64, CAUSAL)
    mbarrier.arrive(empty.index(slot), count=1)
    it += 1
    m, l, p = softmax.begin(s, scale_log2)
    pb = gl.convert_layout(p.to(DT), P)

    while n > 0:
        o = gl.zeros([64, D], gl.float32, O)
        row_pos = rows + block * 64
        for j in range(1, n):
            hide = j < masked
            if COLS:
                hide = hide | (j >= tail)
            o, m, l, pb = _step(q, k_bufs, v_bufs, places, full, empty, it, o, m, l, pb, scale_log2, row_pos,
                                hide, WG, CAUSAL, STAGES)  # fmt: skip
            it += 1

        # the last P V of this tile beside the first Q K^T of the next (of stale memory, unused, after the last tile)
        qt += 1
        q, n_next, masked_next, tail_next, block_next, b_next, h_next = _take(q_bufs, tile_words, q_full, q_empty, qt, WG, Q)
        slot, phase = entry(it, WG, STAGES)
        mbarrier.wait(full.index(slot), phase)
        s = warpgroup_mma(q, k_bufs.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        o = warpgroup_mma(pb, v_bufs.index(slot), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        s = mask_places(s, places, slot, rows + block_next * 64, CAUSAL)
        m_tile = gl.convert_layout(m, R)
        l_tile = gl.convert_layout(gl.sum(l, 1), R)
        m, l, p = softmax.begin(s, scale_log2)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(empty.index(slot), count=1)
        it += 1
        pb = gl.convert_layout(p.to(DT), P)

        # epilogue
        seen, lse = softmax.end(m_tile, l_tile, scale_log2)
        row = block * 64 + out_rows
        stored = (row >= 0) & (row < N)
        gl.store(lse_ptr + (b * H + h).to(gl.int64) * N + row, lse, mask=stored)
        o = gl.where(gl.expand_dims(seen, 1), o * gl.expand_dims(1.0 / l_tile, 1), 0.0)
        to = out_ptr + (b.to(gl.int64) * out_sb + h.to(gl.int64) * out_sh) * 8
        to = to + (gl.expand_dims(row.to(gl.int64) * out_sn * 8, 1) + out_cols)
        gl.store(to, o.to(DT), mask=gl.expand_dims(stored, 1) & (out_cols >= 0))
        n = n_next
        masked = masked_next
        tail = tail_next
        block = block_next
        b = b_next
        h = h_next


# ---------------------------------------------------------------------- the kernel
PLAIN_INTS = ["sb", "sh", "sq", "pb", "cb", "ch", "cq", "k_sb", "k_sg", "k_sm", "v_sb", "v_sg", "v_sm", "out_sb", "out_sh",
              "out_sn", "share", "T", "H", "G", "NQ", "N", "M", "skew"]  # fmt: skip


@gluon.jit(do_not_specialize=PLAIN_INTS)
def private_kernel(q_desc, k_desc, v_desc, out_ptr, lse_ptr, counter, tiles_ptr, plan_ptr, cols_ptr, k_ptr, v_ptr,
                   sb, sh, sq, pb, cb, ch, cq, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm, out_sb, out_sh, out_sn, share, scale_log2,
                   T, H, G, NQ, N, M, skew, FLAT: gl.constexpr, CAUSAL: gl.constexpr, COLS: gl.constexpr,
                   WIDTH: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, FEEDERS: gl.constexpr):  # fmt: skip
    """Launch with min(half the tiles, multiprocessors) CTAs, num_warps=4, maxnreg=168, and *counter = 0.

    Args:
        q_desc, k_desc, v_desc: rank 4, blocks [1, 1, 64, D] (WIDTH 32: [1, 1, 32, 64] for k and v). FLAT: the layout of a
            [64, D] block in shared memory.
        out_ptr, out_sb, out_sh, out_sn: `[B, H, N, D]`, unit stride along D, the other strides divided by 8.
        lse_ptr: fp32 `[B, H, N]`, contiguous.
        tiles_ptr, sb, sh, sq: first keys, ascending; strides of batch row, list, query block.
        plan_ptr, pb: int32 `[.., NQ, 2]`, tiles used and how many steps, from their last on, need a mask, with COLS
            `[.., NQ, 4]` (.., columns used, whole steps of 64 of them that every row sees); lists of a batch row (0: all
            batch rows share them).
        cols_ptr, cb, ch, cq: single keys, ascending; strides as of tiles. k_ptr, v_ptr, k_sb .. v_sm: K and V once more,
            with strides of batch row, kv head, key divided by 8. Unread without COLS.
        share: heads a list serves. T: tiles, B * H * NQ. skew: rows of block 0 before row 0 (a chunk that begins inside
            a block). WIDTH: keys of a list entry, 64 or 32. FEEDERS: warps of a producer, 1, or 2 with COLS.
    """
    DT: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(DT, [2, 64, D], FLAT)
    k_bufs = gl.allocate_shared_memory(DT, [2 * STAGES, 64, D], FLAT)
    v_bufs = gl.allocate_shared_memory(DT, [2 * STAGES, 64, D], FLAT)
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_words = gl.allocate_shared_memory(gl.int32, [2 * WORDS, 1], WORD)
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 64], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=2)  # the words, and the bytes
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    bufs = (q_bufs, k_bufs, v_bufs, tile_words, places)
    bars = (q_full, q_empty, full, empty)
    lists = (tiles_ptr, plan_ptr, cols_ptr)
    strides = (sb, sh, sq, pb, cb, ch, cq)
    rows = (k_ptr, v_ptr, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm)
    gl.warp_specialize(
        [
            (_consume, (0, out_ptr, lse_ptr, bufs, bars, out_sb, out_sh, out_sn, scale_log2, H, N, M, skew, CAUSAL, COLS, D,
                        STAGES)),
            (_consume, (1, out_ptr, lse_ptr, bufs, bars, out_sb, out_sh, out_sn, scale_log2, H, N, M, skew, CAUSAL, COLS, D,
                        STAGES)),
            (produce, (0, q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, share, T, H, G, NQ, M, skew,
                       FLAT, COLS, WIDTH, FEEDERS, D, STAGES)),
            (produce, (1, q_desc, k_desc, v_desc, bufs, bars, counter, lists, strides, rows, share, T, H, G, NQ, M, skew,
                       FLAT, COLS, WIDTH, FEEDERS, D, STAGES)),
        ],
        [4, FEEDERS, FEEDERS],
        [208, 88, 88] if COLS else [224, 56, 56] if WIDTH == 32 else [232, 40, 40],
    )  # fmt: skip
