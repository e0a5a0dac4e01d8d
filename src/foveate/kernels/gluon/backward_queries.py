"""dq over block lists on Hopper: one producer warp, two consumer warpgroups of 64 query rows, persistent CTAs.

A *tile* is 128 query rows of one head, a *step* 64 keys of its list. Q and dO of a tile go to registers and stay there:

    S = Q K^T, dP = dO V^T (64 rows x 64 keys a warpgroup), dS = exp2(S - lse) (dP - delta), dQ += dS K

    producer   takes tiles from an atomic counter, counts what its list holds, loads Q, dO, out of the next tile while this
               one runs, and K, V of each step
    consumer   delta = rowsum(dO out) - dlse at the start of a tile, kept for the pass over keys; then as in
               `backward_kernel.py`: dQ of the step before is issued together with S and dP of this one
    order      lists ascend, so steps that every row sees in full come first and run without masks

Keys that no row of a tile sees may hold NaN: K is a factor of dQ too, so such rows of it are zeroed where they lie.
"""

from .backward_kernel import BIG, LOG2E, ROWS, _word
from .shim import (
    as_blocks,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

WORDS = gl.constexpr(4)  # words of a tile: steps, free steps, first row, batch row * H + head
LINE = gl.constexpr(2)  # words of a step: first key, and the end of those that are its own and seen by some row


# ---------------------------------------------------------------------- consumer
@gluon.jit
def _weights(s, lse, words, slot, pos, scale2, MASK: gl.constexpr, CAUSAL: gl.constexpr):
    """Probabilities of scores s, 0 where a row does not see a key."""
    p = gl.exp2(s * scale2 - gl.expand_dims(lse, 1))
    if MASK:
        base = WORDS + slot * LINE
        key = _word(words, base) + gl.arange(0, 64, layout=gl.SliceLayout(0, s.type.layout))
        seen = gl.expand_dims(key < _word(words, base + 1), 0)
        if CAUSAL:
            seen = seen & (gl.expand_dims(key, 0) <= gl.expand_dims(pos, 1))
        p = gl.where(seen, p, 0.0)
    return p


@gluon.jit
def _clean(k_buf, words, slot, D: gl.constexpr):
    """Zeroes the rows of K that no row of the tile sees. Both warpgroups do, and write the same."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    base = WORDS + slot * LINE
    start = _word(words, base)
    seen = _word(words, base + 1)
    if seen < start + 64:
        row = start + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
        x = k_buf.load(L)
        k_buf.store(gl.where(gl.expand_dims(row < seen, 1), x, gl.zeros([64, D], x.dtype, L)))
        fence_async_shared()
        partition_barrier()


@gluon.jit
def _first(qa, da, kv, words, bars, it, lse, delta, pos, scale2, CAUSAL: gl.constexpr, D: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """dS of a tile's first step, as an operand."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    full, empty = bars
    slot = it % STAGES
    zero = gl.zeros([64, 64], gl.float32, S)
    mbarrier.wait(full.index(slot), (it // STAGES) & 1)
    s = warpgroup_mma(qa, kv.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(da, kv.index(slot * 2 + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    p = _weights(s, lse, words, slot, pos, scale2, True, CAUSAL)
    ds = gl.where(p > 0, p * (dp - gl.expand_dims(delta, 1)), 0.0)
    _clean(kv.index(slot * 2), words, slot, D)
    return gl.convert_layout(ds.to(kv.dtype), P)


@gluon.jit
def _step(qa, da, kv, words, bars, it, dq, db, lse, delta, pos, scale2, MASK: gl.constexpr, CAUSAL: gl.constexpr,
          D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """dq of the step before, dS (db) of the one in ring entry `it`."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    P: gl.constexpr = db.type.layout
    full, empty = bars
    slot = it % STAGES
    last = (it - 1) % STAGES
    zero = gl.zeros([64, 64], gl.float32, S)
    mbarrier.wait(full.index(slot), (it // STAGES) & 1)
    dq = warpgroup_mma(db, kv.index(last * 2), dq, is_async=True)
    s = warpgroup_mma(qa, kv.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(da, kv.index(slot * 2 + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    dq, s = warpgroup_mma_wait(1, deps=[dq, s])  # products end in order
    mbarrier.arrive(empty.index(last), count=1)
    p = _weights(s, lse, words, slot, pos, scale2, MASK, CAUSAL)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - gl.expand_dims(delta, 1))
    if MASK:
        ds = gl.where(p > 0, ds, 0.0)
        _clean(kv.index(slot * 2), words, slot, D)
    return dq, gl.convert_layout(ds.to(kv.dtype), P)


@gluon.jit
def _consumer(WG: gl.constexpr, dq_ptr, stats, bufs, bars, scale, T, N, shift, q_offset, padded, CAUSAL: gl.constexpr,
              D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Rows 64 * WG to 64 * WG + 63 of every tile of this CTA."""
    rows, kv, sums, words = bufs
    q_full, q_empty, full, empty = bars
    gates = (full, empty)
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, S)
    at = WG * 64 + gl.arange(0, 64, layout=R)
    scale2 = scale * LOG2E
    it = 0
    tile = 0
    mbarrier.wait(q_full.index(0), 0)
    n = _word(words, 0)
    while n > 0:
        free = _word(words, 1)
        first = _word(words, 2)
        head = _word(words, 3)
        qa = rows.index(WG).load(A)
        da = rows.index(2 + WG).load(A)
        lse = sums.index(WG).load(R)
        delta = gl.sum(rows.index(2 + WG).load(O).to(gl.float32) * rows.index(4 + WG).load(O).to(gl.float32), 1)
        delta = gl.convert_layout(delta, R) - sums.index(2 + WG).load(R)
        mbarrier.arrive(q_empty.index(0), count=1)
        to = head * padded + q_offset + first + at
        gl.store(stats + to, lse)
        gl.store(stats + (T * padded + to), delta)
        pos = shift + first + at
        dq = gl.zeros([64, D], gl.float32, O)
        db = _first(qa, da, kv, words, gates, it, lse, delta, pos, scale2, CAUSAL, D, STAGES)
        for _ in range(1, free):
            it += 1
            dq, db = _step(qa, da, kv, words, gates, it, dq, db, lse, delta, pos, scale2, False, CAUSAL, D, STAGES)
        for _ in range(gl.maximum(free, 1), n):
            it += 1
            dq, db = _step(qa, da, kv, words, gates, it, dq, db, lse, delta, pos, scale2, True, CAUSAL, D, STAGES)
        last = it % STAGES
        it += 1
        dq = warpgroup_mma(db, kv.index(last * 2), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(empty.index(last), count=1)
        row = gl.expand_dims(first + WG * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, O)), 1)
        col = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, O)), 0)
        out = head.to(gl.int64) * N * D + (row * D + col)
        gl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(row >= 0) & (row < N) & (col < D))
        tile += 1
        mbarrier.wait(q_full.index(0), tile & 1)
        n = _word(words, 0)


# ---------------------------------------------------------------------- producer
@gluon.jit
def _count(row, n, whole, stop, WIDTH: gl.constexpr):
    """Of n ascending tiles: those that end by `whole` (none where tiles overlap), and those that begin before `stop`."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=L)
    free = gl.full([32], 0, gl.int32, L)
    used = gl.full([32], 0, gl.int32, L)
    clash = gl.full([32], 0, gl.int32, L)
    for c in range(0, n, 32):
        x = gl.load(row + (c + lane), mask=c + lane < n, other=BIG)
        after = gl.load(row + (c + lane + 1), mask=c + lane + 1 < n, other=BIG + BIG - 1)
        free += (x + WIDTH <= whole).to(gl.int32)
        used += (x < stop).to(gl.int32)
        clash += (after - x < WIDTH).to(gl.int32)
    return gl.where(gl.max(clash, 0) > 0, 0, gl.sum(free, 0)), gl.sum(used, 0)


@gluon.jit
def _producer(q_desc, do_desc, out_desc, k_desc, v_desc, lse, dlse, bufs, bars, counter, tiles, count, shape,
              WIDTH: gl.constexpr, GROUP: gl.constexpr, MANY: gl.constexpr, PER: gl.constexpr, CAUSAL: gl.constexpr,
              FULL: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    rows, kv, sums, words = bufs
    q_full, q_empty, full, empty = bars
    G, N, M, NB, T, q_offset, width = shape
    INNER: gl.constexpr = WIDTH // 64
    H = G * GROUP
    PAIRS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    one = gl.full([1], 1, gl.int32, ONE)
    lane = gl.arange(0, 64, layout=PAIRS)
    rows_tma = as_blocks(rows, q_desc, 6, 64, D)
    kv_tma = as_blocks(kv, k_desc, 2 * STAGES, 64, D)
    grid = gl.num_programs(0)
    t = gl.program_id(0)
    it = 0
    tile = 0
    while t < T * NB:
        t_next = gl.atomic_add(counter, 1) + grid
        head = t // NB
        block = NB - 1 - (t - head * NB)
        b = head // H
        h = head - b * H
        g = h // GROUP
        first = block * 128 - q_offset
        whole = M + 0
        stop = M + 0
        if CAUSAL:
            whole = gl.minimum(M - N + gl.maximum(first, 0) + 1, M)
            stop = gl.minimum(M - N + gl.minimum(first + 128, N), M)
        if FULL:
            list_row = tiles
            length = (M + 127) // 128
            free = gl.maximum(whole, 0) // 128
            used = (gl.maximum(stop, 0) + 127) // 128
            x = block * 0
            after = x + WIDTH
        else:
            here = ((b * MANY * H + h) // PER) * NB + block
            length = gl.load(count + here)
            list_row = tiles + here.to(gl.int64) * width
            free, used = _count(list_row, length, whole, stop, WIDTH)
            x = gl.load(list_row, mask=length > 0, other=0)
            after = gl.load(list_row + 1, mask=length > 1, other=BIG)
        n = gl.maximum(used * INNER, 1)
        stop = gl.where(used > 0, stop, -BIG)  # an empty list: one step of keys that nobody sees
        mbarrier.wait(q_empty.index(0), (tile & 1) ^ 1)
        words.index(0).store(one * n)
        words.index(1).store(one * (free * INNER))
        words.index(2).store(one * first)
        words.index(3).store(one * head)
        for c in gl.static_range(2):
            row = first + c * 64 + lane
            live = (row >= 0) & (row < N)
            src = head.to(gl.int64) * N + row
            s2 = gl.load(lse + src, mask=live, other=float("-inf"))
            sums.index(c).store(gl.where(s2 > float("-inf"), s2 * LOG2E, float("inf")))
            sums.index(2 + c).store(gl.load(dlse + src, mask=live, other=0.0))
        mbarrier.arrive(q_full.index(0), count=1)
        mbarrier.expect(q_full.index(0), 6 * 64 * D * 2)
        for c in gl.static_range(2):
            tma_load(q_desc, [b, h, first + c * 64, 0], q_full.index(0), rows_tma.index(c))
            tma_load(do_desc, [b, h, first + c * 64, 0], q_full.index(0), rows_tma.index(2 + c))
            tma_load(out_desc, [b, h, first + c * 64, 0], q_full.index(0), rows_tma.index(4 + c))
        tile += 1
        for j in range(n):
            key = x + (j % INNER) * 64
            own = gl.minimum(gl.where(j // INNER + 1 < length, after, BIG), M)
            slot = it % STAGES
            mbarrier.wait(empty.index(slot), ((it // STAGES) & 1) ^ 1)
            words.index(WORDS + slot * LINE).store(one * key)
            words.index(WORDS + slot * LINE + 1).store(one * gl.minimum(own, stop))
            bar = full.index(slot)
            mbarrier.arrive(bar, count=1)
            mbarrier.expect(bar, 2 * ROWS * D * 2)
            tma_load(k_desc, [b, g, key, 0], bar, kv_tma.index(slot * 2))
            tma_load(v_desc, [b, g, key, 0], bar, kv_tma.index(slot * 2 + 1))
            it += 1
            up = (j + 1) // INNER  # the tile of the next step
            if FULL:
                x = up * WIDTH
                after = x + WIDTH
            else:
                x = gl.where(up > j // INNER, after, x)
                after = gl.load(list_row + (up + 1), mask=up + 1 < length, other=BIG)
        t = t_next
    # end of work: a tile of 0 steps
    mbarrier.wait(q_empty.index(0), (tile & 1) ^ 1)
    words.index(0).store(one * 0)
    mbarrier.arrive(q_full.index(0), count=2)


# ---------------------------------------------------------------------- the kernel
@gluon.jit(do_not_specialize=["G", "N", "M", "NB", "T", "q_offset", "length"])
def queries_kernel(q_desc, do_desc, out_desc, k_desc, v_desc, lse, dlse, dq, stats, counter, tiles, count, scale, G, N, M,
                   NB, T, q_offset, length, FLAT: gl.constexpr, WIDTH: gl.constexpr, GROUP: gl.constexpr,
                   MANY: gl.constexpr, PER: gl.constexpr, CAUSAL: gl.constexpr, FULL: gl.constexpr, D: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """Launch with at most as many CTAs as multiprocessors, num_warps=4, maxnreg=168, and *counter = 0.

    Args:
        q_desc, do_desc, out_desc `[B, H, N, D]`, k_desc, v_desc `[B, G, M, D]`: blocks [1, 1, 64, D]. FLAT: the layout
            of a [64, D] block in shared memory.
        lse, dlse: fp32 `[B, H, N]`. dq: `[B, H, N, D]`, contiguous.
        stats: fp32 `[2, B * H, NB * 128]`, written: lse * log2(e) (+inf: a row without keys), and delta.
        tiles, count: `[B, H / PER, NB, length]` and `[B, H / PER, NB]` (B: 1 unless MANY), contiguous; unread when FULL.
        T: B * H. GROUP: query heads of a kv head. Query blocks have 128 rows.
    """
    DT: gl.constexpr = q_desc.dtype
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.allocate_shared_memory(DT, [6, 64, D], FLAT)  # q, dout, out: two halves each
    kv = gl.allocate_shared_memory(DT, [2 * STAGES, 64, D], FLAT)
    sums = gl.allocate_shared_memory(gl.float32, [4, 64], WORD)
    words = gl.allocate_shared_memory(gl.int32, [WORDS + STAGES * LINE, 1], WORD)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=2)  # the words, and the bytes
    mbarrier.init(q_empty.index(0), count=2)  # both consumers
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    bufs = (rows, kv, sums, words)
    bars = (q_full, q_empty, full, empty)
    shape = (G, N, M, NB, T, q_offset, length)
    gl.warp_specialize(
        [
            (_consumer, (0, dq, stats, bufs, bars, scale, T, N, M - N, q_offset, NB * 128, CAUSAL, D, STAGES)),
            (_consumer, (1, dq, stats, bufs, bars, scale, T, N, M - N, q_offset, NB * 128, CAUSAL, D, STAGES)),
            (_producer, (q_desc, do_desc, out_desc, k_desc, v_desc, lse, dlse, bufs, bars, counter, tiles, count, shape,
                         WIDTH, GROUP, MANY, PER, CAUSAL, FULL, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
