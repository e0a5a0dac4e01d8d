"""The kernels that turn lists of tokens round: bits, counts in front of them, places. See `tokens_lists.py`.

Who names what is a bit, `[list, span, key block, word]`: a span is the 32 tokens (or the tile, if longer) that one program
owns, so all a program touches lies in a few KB. Bits are set by atomic "or", whose order leaves no trace; the place of an
entry in its list is the count of bits in front of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import _ones

BITS = tl.constexpr(8)  # an id is token of the chunk << BITS | slot: shifts, for a division takes twenty instructions
MASK = tl.constexpr((1 << 8) - 1)


@triton.jit
def _last(token, N, M, NK, WIDTH: tl.constexpr, CAUSAL: tl.constexpr):
    """The last key block that a token sees, -1 for none."""
    if CAUSAL:
        return tl.where(M - N + token < 0, -1, tl.minimum(NK - 1, (M - N + token) // WIDTH))
    return token * 0 + NK - 1


@triton.jit
def _length(n, PIECE: tl.constexpr, STEP: tl.constexpr):
    """Entries of an item of a list of n: all items about equally long, in whole steps."""
    pieces = tl.maximum((n + PIECE - 1) // PIECE, 1)
    return tl.maximum(((n + pieces - 1) // pieces + STEP - 1) // STEP, 1) * STEP


@triton.jit(do_not_specialize=["lead0", "first", "rows", "NK", "width"])
def mark_kernel(tiles, count, bits, odd, loose, shared, shared_count, sb, st, sq, cb, ch, cq, LISTS, SHARE, H, HL, lead0,
                first, rows, NK, N, M, T, width, least, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, SPAN: tl.constexpr,
                LIST: tl.constexpr, TILE: tl.constexpr, ZERO: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """bits `[leads, spans, NK, SPAN / 32]` of the blocks that tokens name whole. grid: (spans, leads).

    loose `[leads, spans]`: 1 if a token of the span names a part of a block; then, and only then, `odd`, of the shape of
    bits, says which. With TILE above 0 blocks that `least` tokens of a tile name, or one in part, move from the bits to
    the shared lists. Leads from lead0 on; LISTS: lists of a batch row. Blocks that no token of the span sees stay unwritten.
    """
    WORDS: tl.constexpr = SPAN // 32
    span = tl.program_id(0)
    lead = tl.program_id(1) + lead0
    inner = tl.arange(0, SPAN)
    row = span * SPAN + inner
    b = (lead // LISTS).to(tl.int64)
    head = (lead % LISTS) * SHARE * HL // H
    n = tl.load(count + b * cb + head * ch + (first + row) * cq, mask=row < rows, other=0)
    tiles += b * sb + head.to(tl.int64) * st + (first + row).to(tl.int64)[:, None] * sq
    last = _last(first + row, N, M, NK, WIDTH, CAUSAL)[:, None]
    limit = _last(first + tl.minimum(span * SPAN + SPAN, rows) - 1, N, M, NK, WIDTH, CAUSAL) + 1
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + span
    bits += at * NK * WORDS
    odd += at * NK * WORDS
    for c in range(0, limit * WORDS, ZERO):
        i = c + tl.arange(0, ZERO)
        tl.store(bits + i, tl.zeros([ZERO], tl.int32), mask=i < limit * WORDS)
    tl.debug_barrier()
    word = (inner // 32)[:, None]
    one = tl.full([SPAN, LIST], 1, tl.int32) << (inner % 32)[:, None]
    some = 0
    for c in range(0, T, LIST):
        i = (c + tl.arange(0, LIST))[None, :]
        used = (i < n[:, None]) & (i < T)
        start = tl.load(tiles + i, mask=used, other=0)
        here = used & (start // WIDTH <= last)
        whole = start % WIDTH == 0
        tl.atomic_or(bits + start // WIDTH * WORDS + word, one, mask=here & whole, sem="relaxed")
        some = tl.maximum(some, tl.max(tl.max((here & (start % WIDTH != 0)).to(tl.int32), 1), 0))
    tl.store(loose + at, some)
    if some > 0:
        for c in range(0, limit * WORDS, ZERO):
            i = c + tl.arange(0, ZERO)
            tl.store(odd + i, tl.zeros([ZERO], tl.int32), mask=i < limit * WORDS)
        tl.debug_barrier()
        for c in range(0, T, LIST):
            i = (c + tl.arange(0, LIST))[None, :]
            used = (i < n[:, None]) & (i < T)
            start = tl.load(tiles + i, mask=used, other=0)
            used = used & (start % WIDTH != 0)
            to = odd + start // WIDTH * WORDS + word
            tl.atomic_or(to, one, mask=used & (start // WIDTH <= last), sem="relaxed")
            tl.atomic_or(to + WORDS, one, mask=used & (start // WIDTH + 1 <= last), sem="relaxed")
    if TILE > 0:
        tl.debug_barrier()  # bits are in L2: atomics go there, and the loads below pass L1 by
        TILES: tl.constexpr = SPAN // TILE
        loose_limit = tl.where(some > 0, limit, 0)  # `odd` was written up to here
        if TILES > 1:
            tile = tl.arange(0, TILES)[None, :]
            front = tl.zeros([1, TILES], tl.int32)
            back = tl.zeros([1, TILES], tl.int32)
            mine = tl.full([1, TILES], (1 << TILE) - 1, tl.int32) << tile * TILE
        else:
            tile = 0
            front = 0
            back = 0
        lo = M - N + first + span * SPAN + tile * TILE  # where the first token of a tile stands
        shared += (at * TILES + tile) * width
        for c in range(0, limit, CHUNK):
            k = c + tl.arange(0, CHUNK)
            if TILES > 1:  # the tiles of one word
                k = k[:, None]
                x = tl.load(bits + k, mask=k < limit, other=0, cache_modifier=".cg")
                y = tl.load(odd + k, mask=k < loose_limit, other=0, cache_modifier=".cg")
                named = _ones((x | y) & mine)
                part = (y & ~x & mine) != 0
            else:  # the words of one tile
                named = tl.zeros([CHUNK], tl.int32)
                loose_bits = tl.zeros([CHUNK], tl.int32)
                for w in tl.static_range(WORDS):
                    x = tl.load(bits + k * WORDS + w, mask=k < limit, other=0, cache_modifier=".cg")
                    y = tl.load(odd + k * WORDS + w, mask=k < loose_limit, other=0, cache_modifier=".cg")
                    named += _ones(x | y)
                    loose_bits = loose_bits | (y & ~x)
                part = loose_bits != 0
            both = tl.where((named >= least) | part, 1, 0)
            cut = part
            if CAUSAL:
                cut = cut | (k * WIDTH + WIDTH - 1 > lo)
            a = tl.where(cut, 0, both)
            o = tl.where(cut, both, 0)
            tl.store(shared + (front + tl.cumsum(a, 0) - a), k, mask=a > 0)
            tl.store(shared + (width - 1 - back - tl.cumsum(o, 0) + o), k, mask=o > 0)
            if TILES > 1:
                gone = tl.sum(tl.where(both > 0, mine, 0), 1)[:, None]
                tl.store(bits + k, x & ~gone, mask=(k < limit) & (gone != 0))
                front += tl.sum(a, 0)[None, :]
                back += tl.sum(o, 0)[None, :]
            else:
                for w in tl.static_range(WORDS):
                    tl.store(bits + k * WORDS + w, tl.zeros([CHUNK], tl.int32), mask=(k < limit) & (both > 0))
                front += tl.sum(a, 0)
                back += tl.sum(o, 0)
        shared_count += (at * TILES + tile) * 2
        tl.store(shared_count, front)
        tl.store(shared_count + 1, back)


@triton.jit(do_not_specialize=["first", "rows", "NK", "spans", "total", "per"])
def scan_kernel(bits, odd, loose, base, base_odd, counts, first, rows, NK, N, M, spans, total, per,
                WIDTH: tl.constexpr, CAUSAL: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr,
                DEEP: tl.constexpr, ODD: tl.constexpr):  # fmt: skip
    """base, of the shape of bits: the tokens in front of a span that name a block (first of its words), and their counts.

    A segment is `total` spans, those of one list or of several after each other (`spans` each); it is cut into chunks of
    `per` spans, counted by themselves. grid: (NK / COLUMNS, segments, chunks). counts `[chunks, segments, NK]`; with ODD
    `[segments, NK, 3]` of one chunk: (0, whole, all), base_odd counting the tokens that name only a part of a block.
    """
    WORDS: tl.constexpr = SPAN // 32
    segment = tl.program_id(1)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(2) * per
    end = tl.minimum(begin + per, total)
    if CAUSAL:  # no span before this one sees one of the blocks
        early = (tl.program_id(0) * COLUMNS * WIDTH - (M - N) - first) // SPAN
        begin = tl.where(total == spans, tl.maximum(begin, early), begin)
    made = tl.zeros([COLUMNS], tl.int32)
    made_odd = tl.zeros([COLUMNS], tl.int32)
    for c in range(begin, end, DEEP):
        r = c + tl.arange(0, DEEP)
        token = first + tl.minimum((r % spans) * SPAN + SPAN, rows) - 1
        ok = ((r < end)[:, None] & (j <= _last(token, N, M, NK, WIDTH, CAUSAL)[:, None])) & (j < NK)[None, :]
        at = ((segment.to(tl.int64) * total + r) * NK)[:, None] * WORDS + j[None, :] * WORDS
        n = tl.zeros([DEEP, COLUMNS], tl.int32)
        if ODD:
            mixed = ok & (tl.load(loose + segment.to(tl.int64) * total + r, mask=r < end, other=0) > 0)[:, None]
            n_odd = tl.zeros([DEEP, COLUMNS], tl.int32)
        for w in tl.static_range(WORDS):
            x = tl.load(bits + at + w, mask=ok, other=0)
            n += _ones(x)
            if ODD:
                n_odd += _ones(tl.load(odd + at + w, mask=mixed, other=0) & ~x)
        tl.store(base + at, made[None, :] + tl.cumsum(n, 0) - n, mask=ok)
        made += tl.sum(n, 0)
        if ODD:
            tl.store(base_odd + at, made_odd[None, :] + tl.cumsum(n_odd, 0) - n_odd, mask=mixed)
            made_odd += tl.sum(n_odd, 0)
    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + segment) * NK + j
    if ODD:
        tl.store(counts + at * 3, tl.zeros([COLUMNS], tl.int32), mask=j < NK)
        tl.store(counts + at * 3 + 1, made, mask=j < NK)
        tl.store(counts + at * 3 + 2, made + made_odd, mask=j < NK)
    else:
        tl.store(counts + at, made, mask=j < NK)


@triton.jit(do_not_specialize=["K", "room"])
def plan_kernel(counts, offset, begin, plan, K, room, PIECE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Where the lists of a chunk begin in ids, and their items. One program a chunk, `room` ids each."""
    number = tl.program_id(0)
    made = number * room
    items = 0
    for c in range(0, K, CHUNK):
        i = c + tl.arange(0, CHUNK)
        n = tl.load(counts + number * K + i, mask=i < K, other=0)
        length = _length(n, PIECE, STEP)
        pieces = (n + length - 1) // length
        tl.store(offset + number * K + i, made + tl.cumsum(n, 0) - n, mask=i < K)
        tl.store(begin + number * K + i, items + tl.cumsum(pieces, 0) - pieces, mask=i < K)
        made += tl.sum(n)
        items += tl.sum(pieces)
    tl.store(plan + number, items)


@triton.jit
def _ahead(bits, base, at, x, word, below, hit, WORDS: tl.constexpr):
    """Tokens in front of each one that name the block at `at`; x is its word of bits, `below` the bits of earlier ones."""
    n = tl.load(base + at, mask=hit, other=0) + _ones(x & below)
    for w in tl.static_range(WORDS - 1):
        n += _ones(tl.load(bits + at + w, mask=hit & (word > w), other=0))
    return n


@triton.jit(do_not_specialize=["first", "rows", "NK", "max_items"])
def fill_kernel(tiles, count, bits, base, counts, offset, begin, ids, items, present, sb, st, sq, cb, ch, cq, LISTS, SHARE,
                H, HL, first, rows, size, NK, N, M, T, max_items, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
                SPAN: tl.constexpr, LIST: tl.constexpr, SLOT_WORDS: tl.constexpr, PIECE: tl.constexpr,
                STEP: tl.constexpr):  # fmt: skip
    """Ids, items and `present` of the tokens of one span: each knows its places. grid: (spans, leads)."""
    WORDS: tl.constexpr = SPAN // 32
    span = tl.program_id(0)
    lead = tl.program_id(1)
    inner = tl.arange(0, SPAN)
    row = span * SPAN + inner
    number = span * SPAN // size  # the chunk
    b = (lead // LISTS).to(tl.int64)
    head = (lead % LISTS) * SHARE * HL // H
    n = tl.load(count + b * cb + head * ch + (first + row) * cq, mask=row < rows, other=0)
    tiles += b * sb + head.to(tl.int64) * st + (first + row).to(tl.int64)[:, None] * sq
    last = _last(first + row, N, M, NK, WIDTH, CAUSAL)[:, None]
    at = lead.to(tl.int64) * tl.num_programs(0) + span
    bits += at * NK * WORDS
    base += at * NK * WORDS
    here = (number * tl.num_programs(1) + lead) * NK
    counts += here
    offset += here
    begin += here
    items += number * max_items * 3
    present += (at * SPAN + inner) * SLOT_WORDS
    word = (inner // 32)[:, None]
    one = tl.full([SPAN, LIST], 1, tl.int32) << (inner % 32)[:, None]
    some = tl.zeros([SPAN], tl.int32)
    for p in range(0, SLOT_WORDS):
        i = (p * 32 + tl.arange(0, LIST))[None, :]
        used = (i < n[:, None]) & (i < T)
        start = tl.load(tiles + i, mask=used, other=0)
        block = start // WIDTH
        used = used & (block <= last)
        x = tl.load(bits + block * WORDS + word, mask=used, other=0)
        hit = used & (start % WIDTH == 0) & ((x & one) != 0)
        rank = _ahead(bits, base, block * WORDS, x, word, one - 1, hit, WORDS)
        to = tl.load(offset + block, mask=hit, other=0)
        tl.store(ids + to + rank, ((row - number * size)[:, None] << BITS) | i, mask=hit)
        entries = tl.load(counts + block, mask=hit, other=0)
        length = _length(entries, PIECE, STEP)
        opens = hit & (rank % length == 0)
        item = items + (tl.load(begin + block, mask=opens, other=0) + rank // length) * 3
        tl.store(item, lead * NK + block, mask=opens)
        tl.store(item + 1, to + rank, mask=opens)
        tl.store(item + 2, to + tl.minimum(rank + length, entries), mask=opens)
        # What a token names and finds no bit of is walked by its tile.
        behind = used & (start % WIDTH != 0) & (block + 1 <= last)
        y = tl.load(bits + block * WORDS + WORDS + word, mask=behind, other=0)
        walked = (used & ((x & one) == 0)) | (behind & ((y & one) == 0))
        some = tl.maximum(some, tl.max(walked.to(tl.int32), 1))
        got = tl.sum(tl.where(hit, tl.full([SPAN, LIST], 1, tl.int32) << (i % 32), 0), 1)
        tl.store(present + p, got | tl.where(p == SLOT_WORDS - 1, some << (T % 32), 0))
