"""Every logit from low-bit numbers against a bar of its row, on Hopper: one producer warp, two consumer warpgroups.

What it computes is `low_bits` of `triton/estimate_lowbit.py`, bit by bit. A CTA owns 256 query rows of one head: 128 a
warpgroup, two products of 64 rows. A *step* is 128 keys.

    producer   keys by TMA, what the mean query adds to each of them and the steps of their groups by plain loads
    ring       an entry is a step; one full and one empty barrier each
    consumer   queries are rounded once and stay in registers. It takes two steps at a time, four products of which two are
               in flight: comparisons run beside the next one, the last beside those of the other warpgroup. (A product in
               flight from one round of the loop to the next made ptxas wait for each of them.)

A thread's eight numbers of 32 keys in the accumulators are what one group of keys is (`key_peaks` of `scores/lowbit.py`), so
the best of them is found in registers, and one comparison a row serves eight logits. What a thread has found is a word of
32 key blocks; threads meet once a word.

Where the levels are -7 .. 7 the operands are e4m3, in which they are exact, and the sums come as fp32: an int32 sum would
take a conversion a logit. Of such sums Hopper keeps 13 bits, aligned to the largest term (reports differ by one more). Those
of 128 products of these levels are integers below 2^13, so nothing is lost; `test_the_largest_sums` asks the card.
"""

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

ROWS = gl.constexpr(256)  # of a CTA
KEYS = gl.constexpr(128)  # of a step
BIG = gl.constexpr(1e30)
ROUND = gl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again it rounds to the nearest even integer


@gluon.jit
def _steps(tile, first, nq, sink, window, segment, BLOCK: gl.constexpr):
    """Steps of a tile, an even number: up to the local region of its last query block (`Grid.local`)."""
    last = first + gl.minimum((tile + 1) * (ROWS // BLOCK), nq) - 1
    rest = last * BLOCK - window - sink
    far = gl.where(rest >= 0, sink + gl.maximum(rest, 0) // segment * segment, 0)
    return (far + 2 * KEYS - 1) // (2 * KEYS) * 2


@gluon.jit
def _produce(desc, bufs, bars, steps_ptr, extra_ptr, g, n, W: gl.constexpr, STAGES: gl.constexpr):
    """Feeds the ring with n steps of kv head g. steps_ptr, extra_ptr: of its keys, and of its keys for this query head."""
    keys, extras, units = bufs
    full, empty = bars
    tma = as_blocks(keys, desc, STAGES, KEYS, W)
    one = gl.arange(0, KEYS, layout=gl.BlockedLayout([4], [32], [1], [0]))
    U: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    unit = gl.arange(0, 4, layout=gl.SliceLayout(1, U))
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, U))
    two = gl.expand_dims(unit * 32, 1) + gl.expand_dims(group * 2, 0)
    extra = gl.load(extra_ptr + one)
    step = gl.load(steps_ptr + two)
    for j in range(n):
        slot = j & (STAGES - 1)
        after = gl.minimum(j + 1, n - 1) * KEYS  # loads of the next step travel while this one waits for room
        extra_next = gl.load(extra_ptr + (after + one))
        step_next = gl.load(steps_ptr + (after + two))
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((j // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, KEYS * W)
        tma_load(desc, [0, g, j * KEYS, 0], bar, tma.index(slot))
        extras.index(slot).store(extra)
        units.index(slot).store(step)
        partition_barrier()
        mbarrier.arrive(bar, count=1)
        extra = extra_next
        step = step_next


@gluon.jit
def _queries(q_ptr, mean_ptr, q_sn, row, n, scale, DT: gl.constexpr, TOP: gl.constexpr, D: gl.constexpr, W: gl.constexpr):
    """(levels `[64, W]` as a left operand, fp32 step times scale `[64]`) of the rows row .. row + 63 of a head."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // W, W // 8], [4, 1], [1, 0])
    R: gl.constexpr = gl.SliceLayout(1, L)
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    rows = row + gl.arange(0, 64, layout=R)
    d = gl.arange(0, W, layout=gl.SliceLayout(0, L))
    ok = gl.expand_dims((rows >= 0) & (rows < n), 1) & gl.expand_dims(d < D, 0)
    at = gl.expand_dims(rows.to(gl.int64) * q_sn, 1) + gl.expand_dims(d, 0)
    x = gl.load(q_ptr + at, mask=ok, other=0.0).to(gl.float32)
    mean = gl.load(mean_ptr + d, mask=d < D, other=0.0)
    x = gl.where(ok, x - gl.expand_dims(mean, 0), 0.0)
    peak = gl.max(gl.abs(x), 1).reshape([4, 2, 8])
    peak = gl.maximum(peak, gl.expand_dims(gl.max(peak, 1), 1))  # rows t and t + 8 of each 16 share a step
    peak = gl.convert_layout(peak.reshape([64]), R)
    step = gl.div_rn(peak, gl.full([64], TOP, gl.float32, R))
    step = gl.where(step > 0, step, 1.0)
    wide = gl.zeros([64, W], gl.float32, L) + gl.expand_dims(step, 1)
    y = (gl.div_rn(x, wide) + ROUND) - ROUND
    y = gl.minimum(gl.maximum(y, -TOP), TOP).to(DT)
    return gl.convert_layout(y, gl.DotOperandLayout(0, S, 4)), gl.convert_layout(step * scale, gl.SliceLayout(1, S))


@gluon.jit
def _hits(s, step, least, extra, unit):
    """Of 64 rows and 4 blocks of 32 keys, int32 `[4, 8, 4]` by thread: bit u is set if it holds a logit above the bar of its
    row in block u. s `[64, 128]`; step, least fp32 `[64]`; extra `[128]`; unit `[4, 4]`, the steps of groups of keys."""
    s = s.to(gl.float32) * gl.expand_dims(step, 1) + gl.expand_dims(extra, 0)
    top = gl.max(gl.max(s.reshape([64, 4, 4, 4, 2]), 4), 2)
    B: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, top.type.layout))
    bar = gl.expand_dims(gl.expand_dims(gl.convert_layout(least, B, assert_trivial=True), 1), 2)
    unit = gl.convert_layout(unit, gl.SliceLayout(0, top.type.layout), assert_trivial=True)
    over = (top * gl.expand_dims(unit, 0) > bar).reshape([4, 2, 8, 4, 4])
    over = gl.reduce_or(over, 1)  # rows t and t + 8
    N: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, over.type.layout)))
    bit = gl.full([4], 1, gl.int32, N) << gl.arange(0, 4, layout=N)
    bit = gl.expand_dims(gl.expand_dims(gl.expand_dims(bit, 0), 1), 3)
    return gl.sum(gl.where(over, bit, 0), 2)


@gluon.jit
def _note(word, s, step, least, extra, unit, place):
    """The word of each thread with what it finds in the scores of a step, whose blocks begin at bit `place`."""
    return word | gl.convert_layout(_hits(s, step, least, extra, unit), word.type.layout, assert_trivial=True) << place


@gluon.jit
def _leave(words_ptr, word, line, nq, many, BLOCK: gl.constexpr):
    """Adds what 64 rows from `line` on have found to a word of their query blocks; words_ptr points to that of block 0."""
    some = gl.reduce_or(word.reshape([4, 32]), 1)
    warp = gl.arange(0, 4, layout=some.type.layout)
    block = (line + warp * 16) // BLOCK
    gl.atomic_or(words_ptr + block.to(gl.int64) * many, some, mask=(some != 0) & (block < nq), sem="relaxed")


@gluon.jit
def _consume(WG: gl.constexpr, q_ptr, mean_ptr, bar_ptr, words_ptr, bufs, bars, scale, tile, n, rows, start, first, nq, many,
             q_sn, BLOCK: gl.constexpr, DT: gl.constexpr, ACC: gl.constexpr, TOP: gl.constexpr, D: gl.constexpr,
             W: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Rows 128 * WG to 128 * WG + 127 of the tile. Pointers are those of its head. n: steps; rows: of q."""
    keys, extras, units = bufs
    full, empty = bars
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    T: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [4, 1, 1], [2, 1, 0])  # a number for each thread
    zero = gl.zeros([64, KEYS], ACC, S)
    line = tile * ROWS + WG * 128  # of the grid of query blocks
    row = first * BLOCK + line - start
    y0, step0 = _queries(q_ptr, mean_ptr, q_sn, row, rows, scale, DT, TOP, D, W)
    y1, step1 = _queries(q_ptr, mean_ptr, q_sn, row + 64, rows, scale, DT, TOP, D, W)
    i = line + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    least0 = gl.load(bar_ptr + i, mask=i < nq * BLOCK, other=BIG)
    least1 = gl.load(bar_ptr + (i + 64), mask=i + 64 < nq * BLOCK, other=BIG)
    word0 = gl.zeros([4, 8, 4], gl.int32, T)
    word1 = gl.zeros([4, 8, 4], gl.int32, T)
    U: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [1, 0])
    for j in range(0, n, 2):
        slot = j & (STAGES - 1)
        mbarrier.wait(full.index(slot), (j // STAGES) & 1)
        kt = keys.index(slot).permute((1, 0))
        s0 = warpgroup_mma(y0, kt, zero, use_acc=False, is_async=True)
        s1 = warpgroup_mma(y1, kt, zero, use_acc=False, is_async=True)
        extra = extras.index(slot).load(gl.SliceLayout(0, S))
        unit = units.index(slot).load(U)
        place = (j & 7) * 4  # of a step's 4 blocks in a word
        s0 = warpgroup_mma_wait(1, deps=[s0])
        word0 = _note(word0, s0, step0, least0, extra, unit, place)
        other = (j + 1) & (STAGES - 1)
        mbarrier.wait(full.index(other), ((j + 1) // STAGES) & 1)
        kt = keys.index(other).permute((1, 0))
        t0 = warpgroup_mma(y0, kt, zero, use_acc=False, is_async=True)
        s1 = warpgroup_mma_wait(1, deps=[s1])
        mbarrier.arrive(empty.index(slot), count=1)
        word1 = _note(word1, s1, step1, least1, extra, unit, place)
        t1 = warpgroup_mma(y1, kt, zero, use_acc=False, is_async=True)
        extra = extras.index(other).load(gl.SliceLayout(0, S))
        unit = units.index(other).load(U)
        t0 = warpgroup_mma_wait(1, deps=[t0])
        word0 = _note(word0, t0, step0, least0, extra, unit, place + 4)
        t1 = warpgroup_mma_wait(0, deps=[t1])
        mbarrier.arrive(empty.index(other), count=1)
        word1 = _note(word1, t1, step1, least1, extra, unit, place + 4)
        if ((j & 7) == 6) | (j + 2 >= n):
            _leave(words_ptr + j // 8, word0, line, nq, many, BLOCK)
            _leave(words_ptr + j // 8, word1, line + 64, nq, many, BLOCK)
            word0 = gl.zeros([4, 8, 4], gl.int32, T)
            word1 = gl.zeros([4, 8, 4], gl.int32, T)


PLAIN_INTS = ["n", "start", "first", "nq", "many", "sink", "window", "segment", "wide"]


@gluon.jit(do_not_specialize=PLAIN_INTS)
def lowbit_kernel(desc, q, mean, bar, steps, extra, words, scale, n, start, first, nq, many, sink, window, segment, q_sh,
                  q_sn, wide, FLAT: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, ACC: gl.constexpr,
                  TOP: gl.constexpr, D: gl.constexpr, W: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Sets bits of words, int32 `[heads, nq, many]`, zeros before. grid: (tiles of 256 rows, heads).

    Args:
        desc: int8 or e4m3 keys `[1, g, wide, W]`, blocks [1, 1, 128, W]; FLAT: the layout of such a block in shared memory.
        q, mean, bar, steps, extra and the sizes: as `low_bits` takes them. ACC: int32, or fp32 for e4m3.
        STAGES: entries of the ring, a power of two.
    """
    DT: gl.constexpr = desc.dtype
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PAIR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    keys = gl.allocate_shared_memory(DT, [STAGES, KEYS, W], FLAT)
    extras = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], WORD)
    units = gl.allocate_shared_memory(gl.float32, [STAGES, 4, 4], PAIR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)  # the bytes, and the numbers beside them
        mbarrier.init(empty.index(i), count=2)  # both consumers
    fence_async_shared()
    tile = gl.num_programs(0) - 1 - gl.program_id(0)  # long ones first
    head = gl.program_id(1)
    h = head.to(gl.int64)
    g = h // GROUP
    count = _steps(tile, first, nq, sink, window, segment, BLOCK)
    bufs = (keys, extras, units)
    bars = (full, empty)
    q += h * q_sh
    mean += h * D
    bar += h * nq * BLOCK
    words += h * nq * many
    gl.warp_specialize(
        [
            (_consume, (0, q, mean, bar, words, bufs, bars, scale, tile, count, n, start, first, nq, many, q_sn, BLOCK, DT,
                        ACC, TOP, D, W, STAGES)),
            (_consume, (1, q, mean, bar, words, bufs, bars, scale, tile, count, n, start, first, nq, many, q_sn, BLOCK, DT,
                        ACC, TOP, D, W, STAGES)),
            (_produce, (desc, bufs, bars, steps + g * wide, extra + h * wide, head // GROUP, count, W, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
