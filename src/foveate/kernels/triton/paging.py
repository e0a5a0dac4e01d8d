"""Kernels of one decode step over pages: keep page bounds, score pages, pick the best, attend to the keys listed.

Each is bound by memory or by its launch: bounds and listed keys are read once per kv head, the query heads of a group
share a tile. `walk.attend` serves everything else; these do one thing each with few arguments. Lengths are read on the
device, so a step can be captured in a CUDA graph and replayed while the cache grows within its capacity.

The bounds are those of Tang et al. 2024, "Quest" (arXiv 2406.10774), as `scores/bounds.py` stores them; the choice is
that of `select.top_indices`. `paging_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import leave, merge
from .steps import BIG, FLOOR, _finish, _fold, _offsets, _product, _read

NEWEST = tl.constexpr(0xFFFFFFFF)  # above the ordered bits of every float
TOP_BIT = tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["covered_n", "size_n"])
def update_bounds(
    k, table, covered, length, data, covered_n, size_n,
    kv_heads, k_s0, k_sg, k_sm, table_width, data_rows,
    PAGE: tl.constexpr,  # keys of a storage page, 0 for dense storage
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,  # keys of a page of bounds
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Bounds of the pages that hold entries from `covered` on, from their keys. grid: (B * G,).

    `covered` int `[B, G]` becomes `length`; where either is None the numbers covered_n and size_n stand for all rows.
    Pages are read whole instead of folding in the new key: at one page a row this costs no more, and it stays right
    after a rollback within a page.
    """
    row = tl.program_id(0)
    b = (row // kv_heads).to(tl.int64)
    g = row % kv_heads
    size = size_n
    if length is not None:
        size = tl.load(length + row).to(tl.int32)
    was = covered_n
    if covered is not None:
        was = tl.load(covered + row).to(tl.int32)
        tl.debug_barrier()  # every warp has read it before one of them writes it below
    if PAGE > 0:
        table += row * table_width
    else:
        k += b * k_s0 + g * k_sg
    i = tl.arange(0, WIDTH_PAD)
    d = tl.arange(0, D_PAD)
    data += row.to(tl.int64) * data_rows * (2 * D)
    for page in range(was // WIDTH, tl.cdiv(size, WIDTH)):
        key = page * WIDTH + i
        ok = (i < WIDTH) & (key < size)
        offset, _ = _offsets(tl.where(ok, key, 0), table, k_s0, k_sm, k_s0, k_sm, PAGE)
        x = _read(k, offset, ok, d, D, D_PAD, True).to(tl.float32)
        high = tl.max(tl.where(ok[:, None], x, float("-inf")), 0)
        low = tl.min(tl.where(ok[:, None], x, float("inf")), 0)
        at = data + page * (2 * D) + d
        tl.store(at, high.to(data.dtype.element_ty), mask=d < D)
        tl.store(at + D, low.to(data.dtype.element_ty), mask=d < D)
    if covered is not None:
        tl.store(covered + row, size.to(covered.dtype.element_ty))


@triton.jit(do_not_specialize=["pages", "steps"])
def score_pages(
    q, data, length, score, pages, steps,
    kv_heads, q_sb, q_sh, data_rows,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,  # query heads of a kv head
    D: tl.constexpr, D_PAD: tl.constexpr,
    PAGES: tl.constexpr,  # pages of a step
    REDUCE: tl.constexpr,  # the highest score of the group instead of one a head
    FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Upper bound of q . k over each page. grid: (ceil(pages / (PAGES * steps)), B * G).

    score fp32 `[B, G, pages]` or `[B, G, GROUP, pages]`. Steps beyond the row's length are skipped: those scores have no
    meaning and keep what was there. Each bound is read once, whatever the group.
    """
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    g = row % kv_heads
    end = pages
    if length is not None:
        end = tl.minimum(pages, tl.cdiv(tl.load(length + row).to(tl.int32), WIDTH))
    h = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    i = tl.arange(0, PAGES)
    qt = _read(q, b * q_sb + (g * GROUP + h).to(tl.int64) * q_sh, h < GROUP, d, D, D_PAD, True)
    up = tl.trans(tl.maximum(qt, 0.0).to(qt.dtype))
    down = tl.trans(tl.minimum(qt, 0.0).to(qt.dtype))
    data += row.to(tl.int64) * data_rows * (2 * D)
    first = tl.program_id(0) * PAGES * steps
    last = tl.minimum(first + PAGES * steps, end)
    for p in tl.range(first, last, PAGES, num_stages=STAGES):
        ok = p + i < end
        offset = (p + i).to(tl.int64) * (2 * D)
        high = _read(data, offset, ok, d, D, D_PAD, True)
        low = _read(data + D, offset, ok, d, D, D_PAD, True)
        if FP32:
            s = tl.dot(high, up, input_precision="ieee")
            s = tl.dot(low, down, s, input_precision="ieee")
        else:
            s = tl.dot(high, up)
            s = tl.dot(low, down, s)
        if REDUCE:
            s = tl.max(tl.where((h < GROUP)[None, :], s, float("-inf")), 1)
            tl.store(score + row.to(tl.int64) * pages + p + i, s, mask=ok)
        else:
            at = (row.to(tl.int64) * GROUP + h[None, :]) * pages + (p + i)[:, None]
            tl.store(score + at, s, mask=ok[:, None] & (h < GROUP)[None, :])


@triton.jit
def _order(score, first, n, CHUNK: tl.constexpr):
    """(numbers of CHUNK pages, uint32 keys that rank as the scores do): the newest page highest, those that do not exist 0.

    NaN ranks as -inf, -0 as 0.
    """
    i = first + tl.arange(0, CHUNK)
    x = tl.load(score + i, mask=i < n, other=0.0)
    x = tl.where(x == 0, 0.0, x)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)
    key = tl.where(i == n - 1, NEWEST, key)
    return i, tl.where(i < n, key, 0)


@triton.jit(do_not_specialize=["pages"])
def select_pages(
    score, length, tiles, count, pages, keep, rows_each,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,  # pages held at once: all of a row, unless MANY
    MANY: tl.constexpr,
):  # fmt: skip
    """The `keep` best pages of each row, the newest among them, ascending, as first entries. grid: (rows,).

    score fp32 `[rows, pages]`; `length` `[rows / rows_each]` or None: all pages are full. tiles int32 `[rows, keep]`,
    padded with the row's last tile; count int32 `[rows]`. Ties go to the lower page. A threshold that `keep` pages reach is
    searched between the lowest and the highest key, two guesses a round (rounds are what a row costs: about 8 for 8,192
    pages without ties, at most 21); a prefix sum then packs what lies above and the first that tie with it.
    """
    row = tl.program_id(0)
    n = pages
    if length is not None:
        n = tl.minimum(pages, tl.cdiv(tl.load(length + row // rows_each).to(tl.int32), WIDTH))
    score += row.to(tl.int64) * pages
    tiles += row.to(tl.int64) * keep
    k = tl.minimum(keep, n)
    i, key = _order(score, 0, n, CHUNK)
    low = tl.min(tl.where(i < n, key, NEWEST))
    high = tl.max(tl.where(key == NEWEST, 0, key))  # of the others
    if MANY:
        for c in range(CHUNK, n, CHUNK):
            j, other = _order(score, c, n, CHUNK)
            low = tl.minimum(low, tl.min(tl.where(j < n, other, NEWEST)))
            high = tl.maximum(high, tl.max(tl.where(other == NEWEST, 0, other)))
    low = tl.where(k > 1, low, NEWEST)
    high = tl.where(k > 1, tl.where(k < n, high, low), NEWEST)
    while low < high:  # at least k pages reach low, fewer than k lie above high: cut what is between in three
        third = (high - low) // 3
        a = low + third + 1
        z = high - third
        reach = tl.sum((key >= a).to(tl.int32) | ((key >= z).to(tl.int32) << 16))
        reach_a = reach & 0xFFFF
        reach_z = reach >> 16
        if MANY:
            for c in range(CHUNK, n, CHUNK):
                _, other = _order(score, c, n, CHUNK)
                reach = tl.sum((other >= a).to(tl.int32) | ((other >= z).to(tl.int32) << 16))
                reach_a += reach & 0xFFFF
                reach_z += reach >> 16
        below = tl.where(reach_a > k, z - 1, tl.where(reach_a == k, a, a - 1))  # exactly k reach it: the search is over
        high = tl.where(reach_z > k, high, tl.where(reach_z == k, z, below))
        low = tl.where(reach_z >= k, z, tl.where(reach_a >= k, a, low))
    edge = low
    above = tl.sum((key > edge).to(tl.int32))
    if MANY:
        for c in range(CHUNK, n, CHUNK):
            _, other = _order(score, c, n, CHUNK)
            above += tl.sum((other > edge).to(tl.int32))
    room = k - above
    kept = 0
    tied_before = 0
    newest = 0
    for c in range(0, n if MANY else 1, CHUNK):
        if MANY:
            i, key = _order(score, c, n, CHUNK)
        better = key > edge
        tied = (key == edge) & (i < n)
        both = tl.cumsum((better.to(tl.int32) << 16) | tied.to(tl.int32), 0)  # two sums in one; CHUNK is below 1 << 15
        rank = tied_before + (both & 0xFFFF)
        take = better | (tied & (rank <= room))
        slot = kept + (both >> 16) + tl.minimum(rank, room) - 1
        tl.store(tiles + slot, i * WIDTH, mask=take)
        newest = tl.maximum(newest, tl.max(tl.where(take, i, 0)))
        kept += tl.sum(better.to(tl.int32))
        tied_before += tl.sum(tied.to(tl.int32))
    for c in range(k, keep, 128):
        j = c + tl.arange(0, 128)
        tl.store(tiles + j, newest * WIDTH + tl.zeros([128], tl.int32), mask=j < keep)
    tl.store(count + row, k)


@triton.jit(do_not_specialize=["capacity"])
def attend_tiles(
    q, k, v, out, lse, part, part_lse, arrived, tiles, tile_count, length, table,
    scale, capacity,
    units, kv_heads, lists, tiles_sb, tiles_n,
    q_sb, q_sh, k_s0, k_sg, k_sm, v_s0, v_sg, v_sm, table_width,
    WIDTH: tl.constexpr,  # keys of a tile
    KEYS: tl.constexpr,  # keys of a step
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # heads that share the tile; a power of two; at least 16
    PAGE: tl.constexpr,  # keys of a storage page, 0 for dense storage
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    FP32: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query a row over its listed tiles. grid: (SPLITS, B * units), a unit being PACK query heads of one list.

    tiles int32 `[B|1, lists, tiles_n]`, ascending; a tile stops where the next one starts. out `[B, H, DV]`, lse `[B, H]`
    (natural log). SPLITS > 1: part `[B * units * SPLITS, PACK, DV]`, part_lse and the counters `arrived` `[B * units]` are
    those of `arrivals.py`; programs beyond a list's last step have no part in it.
    """
    split = tl.program_id(0)
    b = tl.program_id(1) // units
    unit = tl.program_id(1) % units
    g = unit * kv_heads // units
    row = b * lists + unit * lists // units
    if tiles_sb == 0:
        row = unit * lists // units
    used = tl.load(tile_count + row)
    tiles += row.to(tl.int64) * tiles_n
    size = capacity
    if length is not None:
        size = tl.minimum(tl.load(length + b * kv_heads + g).to(tl.int32), capacity)
    if PAGE > 0:
        table += (b * kv_heads + g) * table_width
    else:
        k += b.to(tl.int64) * k_s0 + g.to(tl.int64) * k_sg
        v += b.to(tl.int64) * v_s0 + g.to(tl.int64) * v_sg
    r = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    i = tl.arange(0, KEYS)
    head = unit * PACK + r
    qt = _read(q, b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, r < PACK, d, D, D_PAD, True)
    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    steps = tl.cdiv(used * WIDTH, KEYS)
    share = tl.maximum(tl.cdiv(steps, SPLITS), 1)
    for t in tl.range(split * share, tl.minimum(steps, (split + 1) * share), num_stages=STAGES):
        flat = t * KEYS + i
        which = flat // WIDTH
        start = tl.load(tiles + which, mask=which < used, other=BIG)
        stop = tl.load(tiles + which + 1, mask=which + 1 < used, other=BIG)
        key = start + flat % WIDTH
        ok = (key >= 0) & (key < tl.minimum(stop, size))
        k_off, v_off = _offsets(tl.where(ok, key, 0), table, k_s0, k_sm, v_s0, v_sm, PAGE)
        kt = _read(k, k_off, ok, d, D, D_PAD, True)
        vt = _read(v, v_off, ok, dv, DV, DV_PAD, True)
        s = tl.where(ok[None, :], _product(qt, kt, FP32), float("-inf"))
        m, l, acc = _fold(s, vt, m, l, acc, scale, True, FP32)
    spot = tl.program_id(1)
    if SPLITS > 1:
        parts = tl.maximum(tl.cdiv(steps, share), 1)
        if split < parts:  # noqa: SIM102  (`and` would leave a part before it asks)
            if leave(part, part_lse, spot * SPLITS + split, arrived + spot, parts, acc, m, l, r, dv, PACK, DV):
                merge(
                    part, part_lse, spot * SPLITS, parts, arrived + spot, out, lse, spot * PACK, PACK, PACK_PAD, DV, DV_PAD,
                    CHUNK, 1, LSE,
                )  # fmt: skip
    else:
        _finish(out, lse, spot.to(tl.int64) * PACK + r, r < PACK, dv, dv < DV, acc, m, l, DV, LSE)


@triton.jit(do_not_specialize=["capacity", "splits"])
def attend_entries(
    q, k, v, out, lse, part, part_lse, arrived, entries, count, length, table,
    scale, capacity, splits,
    units, kv_heads, lists, entries_sb, n,
    q_sb, q_sh, k_s0, k_sg, k_sm, v_s0, v_sg, v_sm, table_width,
    KEYS: tl.constexpr,  # entries of a step
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # heads that share the tile; a power of two; at least 16
    PAGE: tl.constexpr,  # keys of a storage page, 0 for dense storage
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    FP32: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`attend_tiles` for tiles of one key. grid: (splits, B * units).

    Program s takes the steps s, s + splits, .. of a list. entries int32 `[B|1, lists, n]`, distinct. SHARED: programs share
    lists (splits > 1).

    A program has a few steps, so what it costs is the trips to memory that wait for each other, and the instructions
    between them. Entries are asked for before their count is known, and those of the next step while keys and values of this
    one are on their way: so the loop finds no list to follow, and Triton asks for all keys and values of a step at once.
    """
    split = tl.program_id(0)
    b = tl.program_id(1) // units
    unit = tl.program_id(1) % units
    g = unit * kv_heads // units
    row = b * lists + unit * lists // units
    if entries_sb == 0:
        row = unit * lists // units
    i = tl.arange(0, KEYS)
    entries += row.to(tl.int64) * n
    place = split * KEYS + i
    key = tl.load(entries + place, mask=place < n, other=-1)
    used = tl.minimum(tl.load(count + row), n)
    size = capacity
    if length is not None:
        size = tl.minimum(tl.load(length + b * kv_heads + g).to(tl.int32), capacity)
    r = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    head = unit * PACK + r
    qt = _read(q, b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh, r < PACK, d, D, D_PAD, True)
    if PAGE > 0:
        table += (b * kv_heads + g) * table_width
    else:
        k += b.to(tl.int64) * k_s0 + g.to(tl.int64) * k_sg
        v += b.to(tl.int64) * v_s0 + g.to(tl.int64) * v_sg
    steps = tl.cdiv(used, KEYS)
    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    for t in tl.range(split, steps, splits, num_stages=STAGES):
        ok = (t * KEYS + i < used) & (key >= 0) & (key < size)
        k_off, v_off = _offsets(tl.where(ok, key, 0), table, k_s0, k_sm, v_s0, v_sm, PAGE)
        kt = _read(k, k_off, ok, d, D, D_PAD, True)
        vt = _read(v, v_off, ok, dv, DV, DV_PAD, True)
        place += splits * KEYS
        key = tl.load(entries + place, mask=place < n, other=-1)
        s = tl.where(ok[None, :], _product(qt, kt, FP32), float("-inf"))
        m, l, acc = _fold(s, vt, m, l, acc, scale, True, FP32)
    spot = tl.program_id(1)
    if SHARED:
        parts = tl.maximum(tl.minimum(steps, splits), 1)
        if split < parts:  # noqa: SIM102  (`and` would leave a part before it asks)
            if leave(part, part_lse, spot * splits + split, arrived + spot, parts, acc, m, l, r, dv, PACK, DV):
                merge(
                    part, part_lse, spot * splits, parts, arrived + spot, out, lse, spot * PACK, PACK, PACK_PAD, DV, DV_PAD,
                    CHUNK, 1, LSE,
                )  # fmt: skip
    else:
        _finish(out, lse, spot.to(tl.int64) * PACK + r, r < PACK, dv, dv < DV, acc, m, l, DV, LSE)
