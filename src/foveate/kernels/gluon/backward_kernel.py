"""dk and dv of attention over block lists on Hopper: one producer warp, two consumer warpgroups, persistent CTAs.

A *unit* is a block of keys of one kv head, or one item of a block that is cut (`triton/inverse.py`). A *step* is 64
query rows of one head that the unit's inverse list names. Keys are the rows of every product:

    S = K Q^T, dP = V dO^T (64 keys x 64 rows a warpgroup), P = exp2(S - lse), dS = P (dP - delta)
    dV += P dO, dK += dS Q, with P and dS as operands in registers

    KEYS 128   each warpgroup owns 64 of the keys and takes every step
    KEYS 64    both own all keys and take steps in turn; at the end they exchange halves of their sums through the
               memory that held K and V
    producer   takes units from an atomic counter, turns list entries into TMA loads of Q and dO, brings lse and delta
    ring       an entry is a step: Q, dO, lse, delta, and words for the mask; one full and one empty barrier each
    consumer   dV and dK of the step before are issued together with S and dP of this one, so that a warpgroup asks for
               four products at a time and does all its arithmetic while the other has the tensor cores
    order      a list begins with its free steps; only the others (and the first, to save code) are masked

Keys that no row of a step sees may hold NaN: they are rows of their own in S and dP and are replaced there. What lies
outside a tensor is read as zero. All heads of a group add to the same registers, so nothing is added in memory.
"""

from .shim import (
    as_blocks,
    as_floats,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    partition_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BIG = gl.constexpr(1 << 30)
WORDS = gl.constexpr(5)  # words of a unit: steps, free steps, first key, batch row * G + kv head, item (-1: not cut)
LINE = gl.constexpr(3)  # words of a step: position of its first row; its list names keys below `stop` and from `start` on
STEPS = gl.constexpr(10)  # where the words of steps begin, after those of two units
ROWS = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
# One allocation holds all barriers (each allocation costs memory that a ring entry needs): where which of them begin.
KV_FULL = gl.constexpr(0)
KV_EMPTY = gl.constexpr(2)
SWAP = gl.constexpr(4)
FULL_BAR = gl.constexpr(7)  # STAGES of them, then STAGES empty ones


# ---------------------------------------------------------------------- consumer
@gluon.jit
def _word(words, i):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(words.index(i).load(layout), 0)


@gluon.jit
def _seen(words, slot, key, row):
    """bool `[64, 64]`: keys (rows) that query rows (columns) of a step see."""
    last = _word(words, STEPS + slot * LINE) + row
    named = (key < _word(words, STEPS + slot * LINE + 1)) | (key >= _word(words, STEPS + slot * LINE + 2))
    return gl.expand_dims(named, 1) & (gl.expand_dims(key, 1) <= gl.expand_dims(last, 0))


@gluon.jit
def _first(kt, vt, bufs, bars, it, key, row, scale2, D: gl.constexpr, STAGES: gl.constexpr):
    """P and dS of a unit's first step, as operands."""
    q_do, sums, words = bufs
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    DT: gl.constexpr = q_do.dtype
    slot = it % STAGES
    zero = gl.zeros([64, 64], gl.float32, S)
    mbarrier.wait(bars.index(FULL_BAR + slot), (it // STAGES) & 1)
    s = warpgroup_mma(kt, q_do.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma(vt, q_do.index(slot * 2 + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale2 - gl.expand_dims(sums.index(slot * 2).load(ROW), 0))
    p = gl.where(_seen(words, slot, key, row), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - gl.expand_dims(sums.index(slot * 2 + 1).load(ROW), 0))
    ds = gl.where(p > 0, ds, 0.0)
    return gl.convert_layout(p.to(DT), P), gl.convert_layout(ds.to(DT), P)


@gluon.jit
def _step(kt, vt, bufs, bars, it, before, dk, dv, pb, db, key, row, scale2, MASK: gl.constexpr, STAGES: gl.constexpr):
    """dv and dk of the step in ring entry `before`, and P (pb) and dS (db) of the one in entry `it`."""
    q_do, sums, words = bufs
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S)
    P: gl.constexpr = pb.type.layout
    DT: gl.constexpr = q_do.dtype
    slot = it % STAGES
    last = before % STAGES
    zero = gl.zeros([64, 64], gl.float32, S)
    mbarrier.wait(bars.index(FULL_BAR + slot), (it // STAGES) & 1)
    dv = warpgroup_mma(pb, q_do.index(last * 2 + 1), dv, is_async=True)
    dk = warpgroup_mma(db, q_do.index(last * 2), dk, is_async=True)
    s = warpgroup_mma(kt, q_do.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
    dv, dk = warpgroup_mma_wait(1, deps=[dv, dk])  # products end in order; pb and db make room for dp
    dp = warpgroup_mma(vt, q_do.index(slot * 2 + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.arrive(bars.index(FULL_BAR + STAGES + last), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale2 - gl.expand_dims(sums.index(slot * 2).load(ROW), 0))
    if MASK:
        p = gl.where(_seen(words, slot, key, row), p, 0.0)
    pb = gl.convert_layout(p.to(DT), P)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - gl.expand_dims(sums.index(slot * 2 + 1).load(ROW), 0))
    if MASK:
        ds = gl.where(p > 0, ds, 0.0)
    return dk, dv, pb, gl.convert_layout(ds.to(DT), P)


@gluon.jit
def _write(x, ptr, part, at, item, key, lead, M, KEYS: gl.constexpr, D: gl.constexpr):
    """Sums `[64, D]` of keys `key + at`: to `ptr` `[leads, M, D]`, or as fp32 into line `item` of `part` (rows of 2 D)."""
    col = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, x.type.layout)), 0)
    if item < 0:
        row = gl.expand_dims(key + at, 1)
        to = lead.to(gl.int64) * M * D + (row * D + col)
        gl.store(ptr + to, x.to(ptr.dtype.element_ty), mask=(row < M) & (col < D))
    else:
        to = item.to(gl.int64) * (KEYS * 2 * D) + (gl.expand_dims(at, 1) * (2 * D) + col)
        gl.store(part + to, x)


@gluon.jit
def _consumer(WG: gl.constexpr, dk_ptr, dv_ptr, part, bufs, bars, scale, M, KEYS: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """The sums of 64 keys of every unit of this CTA."""
    q_do, kv_bufs, sums, words = bufs
    ring = (q_do, sums, words)
    scale2 = scale * LOG2E
    SPLIT: gl.constexpr = KEYS == 64  # steps, not keys, are split between the warpgroups
    STRIDE: gl.constexpr = 2 if SPLIT else 1
    TILES: gl.constexpr = KEYS // 64
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    OWN: gl.constexpr = 0 if SPLIT else WG
    row = gl.arange(0, 64, layout=gl.SliceLayout(0, S))
    own = OWN * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    at = OWN * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, O))
    it = WG if SPLIT else 0
    unit = 0
    mbarrier.wait(bars.index(KV_FULL), 0)
    n = _word(words, 0)
    while n > 0:
        turn = unit & 1
        free = _word(words, turn * WORDS + 1)
        key = _word(words, turn * WORDS + 2) + own
        if SPLIT:
            n = n >> 1
            free = free >> 1
        kt = kv_bufs.index(turn * (2 * TILES) + OWN)
        vt = kv_bufs.index(turn * (2 * TILES) + TILES + OWN)
        dk = gl.zeros([64, D], gl.float32, O)
        dv = gl.zeros([64, D], gl.float32, O)
        pb, db = _first(kt, vt, ring, bars, it, key, row, scale2, D, STAGES)
        for _ in range(1, free):
            it += STRIDE
            dk, dv, pb, db = _step(kt, vt, ring, bars, it, it - STRIDE, dk, dv, pb, db, key, row, scale2, False, STAGES)
        for _ in range(gl.maximum(free, 1), n):
            it += STRIDE
            dk, dv, pb, db = _step(kt, vt, ring, bars, it, it - STRIDE, dk, dv, pb, db, key, row, scale2, True, STAGES)
        last = it % STAGES
        it += STRIDE
        dv = warpgroup_mma(pb, q_do.index(last * 2 + 1), dv, is_async=True)
        dk = warpgroup_mma(db, q_do.index(last * 2), dk, is_async=True)
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        mbarrier.arrive(bars.index(FULL_BAR + STAGES + last), count=1)
        key0 = _word(words, turn * WORDS + 2)
        lead = _word(words, turn * WORDS + 3)
        item = _word(words, turn * WORDS + 4)
        if SPLIT:
            spare = as_floats(kv_bufs, 2, 64, D).index(turn)
            if WG == 0:
                mbarrier.wait(bars.index(SWAP), unit & 1)  # the other is done with K and V
                spare.store(dk)
                mbarrier.arrive(bars.index(SWAP + 1), count=1)
                mbarrier.wait(bars.index(SWAP + 2), unit & 1)
                dv = dv + spare.load(O)
                partition_barrier()
                fence_async_shared()  # TMA writes here next
                mbarrier.arrive(bars.index(KV_EMPTY + turn), count=1)
                _write(dv, dv_ptr, part + D, at, item, key0, lead, M, KEYS, D)
            else:
                mbarrier.arrive(bars.index(SWAP), count=1)
                mbarrier.wait(bars.index(SWAP + 1), unit & 1)
                dk = (dk + spare.load(O)) * scale
                partition_barrier()
                spare.store(dv)
                fence_async_shared()
                mbarrier.arrive(bars.index(SWAP + 2), count=1)
                mbarrier.arrive(bars.index(KV_EMPTY + turn), count=1)
                _write(dk, dk_ptr, part, at, item, key0, lead, M, KEYS, D)
        else:
            mbarrier.arrive(bars.index(KV_EMPTY + turn), count=1)
            _write(dk * scale, dk_ptr, part, at, item, key0, lead, M, KEYS, D)
            _write(dv, dv_ptr, part + D, at, item, key0, lead, M, KEYS, D)
        unit += 1
        mbarrier.wait(bars.index(KV_FULL + (unit & 1)), (unit >> 1) & 1)
        n = _word(words, (unit & 1) * WORDS)


# ---------------------------------------------------------------------- producer
@gluon.jit
def _place(word, j, INNER: gl.constexpr, SHARE: gl.constexpr, BITS: gl.constexpr):
    """(query head within the group, first row on the padded grid) of step j, whose list entry is `word`.

    An entry is INNER steps: PARTS = INNER / SHARE of each query head that follows its list.
    """
    PARTS: gl.constexpr = INNER // SHARE
    head = (word >> BITS) * SHARE + (j % INNER) // PARTS
    return head, (word & ((1 << BITS) - 1)) * (PARTS * ROWS) + (j % PARTS) * ROWS


@gluon.jit
def _reach(row, n, key0, WIDTH: gl.constexpr):
    """(stop, start): of a block at key0 a list row of n tiles names the keys below stop and those from start on."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=L)
    last = gl.full([32], -BIG, gl.int32, L)
    after = gl.full([32], BIG, gl.int32, L)
    for c in range(0, n, 32):
        x = gl.load(row + (c + lane), mask=c + lane < n, other=BIG)
        last = gl.maximum(last, gl.where(x <= key0, x, -BIG))
        after = gl.minimum(after, gl.where(x > key0, x, BIG))
    return gl.max(last, 0) + WIDTH, gl.min(after, 0)


@gluon.jit
def _producer(q_desc, do_desc, k_desc, v_desc, bufs, bars, counter, lists, inverse, stats, shape, KEYS: gl.constexpr,
              WIDTH: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, MANY: gl.constexpr,
              PER: gl.constexpr, BITS: gl.constexpr, CAUSAL: gl.constexpr, FULL: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    q_do, kv_bufs, sums, words = bufs
    tiles, count, NB, T = lists
    ids, offset, counts, cuts, items, plan = inverse
    G, N, M, NK, K, q_offset = shape
    TILES: gl.constexpr = KEYS // 64
    LEAST: gl.constexpr = 1 if KEYS == 128 else 2
    PAIRS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    one = gl.full([1], 1, gl.int32, ONE)
    lane = gl.arange(0, 64, layout=PAIRS)
    q_tma = as_blocks(q_do, q_desc, 2 * STAGES, 64, D)
    kv_tma = as_blocks(kv_bufs, k_desc, 4 * TILES, 64, D)
    padded = NB * (INNER // SHARE * ROWS)
    delta = stats + K // NK * GROUP * padded
    grid = gl.num_programs(0)
    size = gl.load(plan)
    made = gl.load(plan + 1)
    t = gl.program_id(0)
    it = 0
    unit = 0
    while t < made + K:
        t_next = gl.atomic_add(counter, 1) + grid
        piece = t < made  # items first: they are the longest
        key = gl.where(piece, gl.load(items + gl.minimum(t, gl.maximum(made - 1, 0))), t - made)
        begin = gl.load(cuts + key * 2)
        pieces = gl.load(cuts + key * 2 + 1)
        if piece | (pieces == 0):
            begin = gl.where(piece, (t - begin) * size, 0)
            end = gl.load(counts + key * 3 + 2)
            end = gl.where(piece, gl.minimum(end, begin + size), end)
            free = gl.minimum(gl.maximum(gl.load(counts + key * 3), begin), end) - begin
            whole = gl.minimum(gl.maximum(gl.load(counts + key * 3 + 1), begin), end) - begin
            row = ids + (gl.load(offset + key) + begin)
            some = end > begin
            n = gl.maximum((end - begin) * INNER, LEAST)  # an empty list: steps of rows that do not exist
            lead = key // NK
            key0 = (key - lead * NK) * KEYS
            b = lead // G
            g = lead - b * G
            head0 = g * GROUP
            base = lead * GROUP * padded
            turn = unit & 1
            mbarrier.wait(bars.index(KV_EMPTY + turn), ((unit >> 1) & 1) ^ 1)
            words.index(turn * WORDS).store(one * n)
            words.index(turn * WORDS + 1).store(one * (free * INNER))
            words.index(turn * WORDS + 2).store(one * key0)
            words.index(turn * WORDS + 3).store(one * lead)
            words.index(turn * WORDS + 4).store(one * gl.where(piece, t, -1))
            bar = bars.index(KV_FULL + turn)
            mbarrier.arrive(bar, count=1)
            mbarrier.expect(bar, 2 * KEYS * D * 2)
            for c in gl.static_range(TILES):
                tma_load(k_desc, [b, g, key0 + c * 64, 0], bar, kv_tma.index(turn * (2 * TILES) + c))
                tma_load(v_desc, [b, g, key0 + c * 64, 0], bar, kv_tma.index(turn * (2 * TILES) + TILES + c))
            unit += 1
            # The word of the step after next and the sums of the next travel while a step waits for its ring entry.
            word = gl.where(some, gl.load(row), 0)
            ahead = gl.where(some, gl.load(row + gl.minimum(1, n - 1) // INNER), 0)
            head, line = _place(word, 0, INNER, SHARE, BITS)
            from_ = base + head * padded + line
            s2 = gl.load(stats + (from_ + lane))
            d2 = gl.load(delta + (from_ + lane))
            for j in range(n):
                later = gl.where(some, gl.load(row + gl.minimum(j + 2, n - 1) // INNER), 0)
                head, line = _place(word, j, INNER, SHARE, BITS)
                first = gl.where(some, line - q_offset, N)
                place = BIG + 0
                if CAUSAL:
                    place = M - N + first
                stop = gl.where(some, BIG, -BIG)
                start = word * 0 + BIG
                if not FULL:  # noqa: SIM102
                    if (j >= whole * INNER) & some:  # its list names a part of the block
                        here = ((b * MANY * G * GROUP + head0 + head) // PER) * NB + (word & ((1 << BITS) - 1))
                        stop, start = _reach(tiles + here.to(gl.int64) * T, gl.load(count + here), key0, WIDTH)
                slot = it % STAGES
                mbarrier.wait(bars.index(FULL_BAR + STAGES + slot), ((it // STAGES) & 1) ^ 1)
                sums.index(slot * 2).store(s2)
                sums.index(slot * 2 + 1).store(d2)
                words.index(STEPS + slot * LINE).store(one * place)
                words.index(STEPS + slot * LINE + 1).store(one * stop)
                words.index(STEPS + slot * LINE + 2).store(one * start)
                bar = bars.index(FULL_BAR + slot)
                mbarrier.arrive(bar, count=1)
                mbarrier.expect(bar, 2 * ROWS * D * 2)
                tma_load(q_desc, [b, head0 + head, first, 0], bar, q_tma.index(slot * 2))
                tma_load(do_desc, [b, head0 + head, first, 0], bar, q_tma.index(slot * 2 + 1))
                head, line = _place(ahead, j + 1, INNER, SHARE, BITS)
                from_ = base + head * padded + line
                s2 = gl.load(stats + (from_ + lane))
                d2 = gl.load(delta + (from_ + lane))
                it += 1
                word = ahead + 0  # never "x = y" for what a loop carries (GLUON: lost loop variable)
                ahead = later + 0
        t = t_next
    # end of work: a unit of 0 steps
    turn = unit & 1
    mbarrier.wait(bars.index(KV_EMPTY + turn), ((unit >> 1) & 1) ^ 1)
    words.index(turn * WORDS).store(one * 0)
    mbarrier.arrive(bars.index(KV_FULL + turn), count=2)


# ---------------------------------------------------------------------- the kernel
@gluon.jit(do_not_specialize=["NB", "T", "G", "N", "M", "NK", "K", "q_offset"])
def keys_kernel(q_desc, do_desc, k_desc, v_desc, dk, dv, part, counter, tiles, count, NB, T, ids, offset, counts, cuts,
                items, plan, stats, scale, G, N, M, NK, K, q_offset, FLAT: gl.constexpr, KEYS: gl.constexpr,
                WIDTH: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, SHARE: gl.constexpr, MANY: gl.constexpr,
                PER: gl.constexpr, BITS: gl.constexpr, CAUSAL: gl.constexpr, FULL: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """Launch with at most as many CTAs as multiprocessors, num_warps=4, maxnreg=168, and *counter = 0.

    Args:
        q_desc, do_desc `[B, H, N, D]`, k_desc, v_desc `[B, G, M, D]`: blocks [1, 1, 64, D]. FLAT: the layout of a
            [64, D] block in shared memory.
        dk, dv: `[B, G, M, D]`, contiguous. part: fp32 `[items, KEYS, 2 D]`, dk then dv of an item.
        tiles, count: `[B, H / PER, NB, T]` and `[B, H / PER, NB]` (B: 1 unless MANY), contiguous; unread when FULL.
        ids .. plan: the inverse lists; K key blocks in all, NK of a kv head. INNER: steps of an entry, 64 rows each, for
            SHARE query heads; even when KEYS is 64. GROUP: query heads of a kv head. BITS: of the block in an entry.
        stats: fp32 `[2, B * H, NB * rows of a block]`, lse * log2(e) (+inf: a row without keys), and delta.
    """
    DT: gl.constexpr = q_desc.dtype
    TILES: gl.constexpr = KEYS // 64
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_do = gl.allocate_shared_memory(DT, [2 * STAGES, 64, D], FLAT)
    kv_bufs = gl.allocate_shared_memory(DT, [4 * TILES, 64, D], FLAT)
    sums = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 64], WORD)
    words = gl.allocate_shared_memory(gl.int32, [STEPS + STAGES * LINE, 1], WORD)
    bars = gl.allocate_shared_memory(gl.int64, [FULL_BAR + 2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(KV_FULL + i), count=2)  # the words, and the bytes
        mbarrier.init(bars.index(KV_EMPTY + i), count=2)  # both consumers
    for i in gl.static_range(3):
        mbarrier.init(bars.index(SWAP + i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(FULL_BAR + i), count=2)
        mbarrier.init(bars.index(FULL_BAR + STAGES + i), count=TILES)  # the consumers of a step
    fence_async_shared()
    bufs = (q_do, kv_bufs, sums, words)
    lists = (tiles, count, NB, T)
    inverse = (ids, offset, counts, cuts, items, plan)
    shape = (G, N, M, NK, K, q_offset)
    gl.warp_specialize(
        [
            (_consumer, (0, dk, dv, part, bufs, bars, scale, M, KEYS, D, STAGES)),
            (_consumer, (1, dk, dv, part, bufs, bars, scale, M, KEYS, D, STAGES)),
            (_producer, (q_desc, do_desc, k_desc, v_desc, bufs, bars, counter, lists, inverse, stats, shape,
                         KEYS, WIDTH, INNER, GROUP, SHARE, MANY, PER, BITS, CAUSAL, FULL, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
