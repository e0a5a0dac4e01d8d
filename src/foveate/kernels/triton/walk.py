"""The attention kernel: one program computes one tile of query rows over everything its layout names.

What a tile reads comes from up to six sources: the sink range, the near range (window, or everything), strided key
blocks, listed tiles, tiles made from diagonals, and single entries (twice: per block and, compacted, shared columns).
Every source is a flat sequence of keys. The part of a source that all rows of the tile see in full, without any test,
is walked in whole steps by a loop without masks; what is left of all sources is strung together and walked by one
loop with masks, so that a few sink keys, the diagonal block and the remainder of a list share a step.

Ownership keeps a key from counting twice: the rule owns what it names, lists own the rest; where two tiles overlap,
`Layout` says which one owns the shared keys. Tiles and entries of one row are disjoint by construction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import BIG, FLOOR, LN2, LOG2E, _finish, _fold, _logits, _offsets, _product, _read
from .walk_lists import _listed, _starts, _survey, _survey_diagonals


@triton.jit(do_not_specialize=["nil"])
def attend(
    q, k, v, out, lse,
    q_pos, length, pos, bias, table, offsets,
    sink, window, stride, phase,
    tiles, tile_count, diagonals, diagonal_count, entries, entry_count, columns, column_count,
    scale, softcap,
    heads, kv_heads, n_rows, capacity, q_offset, first_block, end0,
    q_sb, q_sh, q_sn, k_s0, k_sg, k_sm, v_s0, v_sg, v_sm, qp_sb, table_width,
    sink_sb, sink_div, window_sb, window_div, stride_sb, stride_div, phase_sb, phase_div,
    tiles_sb, tiles_div, tiles_n, diagonals_sb, diagonals_div, diagonals_n,
    entries_sb, entries_div, entries_n, columns_sb, columns_div, columns_n, columns_blocks,
    num_blocks, nil,
    BLOCK: tl.constexpr,  # query rows of a layout block
    PARTS: tl.constexpr,  # row tiles of one block
    ROWS: tl.constexpr,  # query rows of a tile, per head
    PACK: tl.constexpr,  # query heads that share the tile (they share their lists and their kv head)
    TILE: tl.constexpr,  # ROWS times PACK rounded up to a power of two, at least 16
    KEYS: tl.constexpr,  # keys of a step
    WIDTH: tl.constexpr,  # the layout's tile_width
    PAGE: tl.constexpr,  # keys of a page, 0 for dense and ragged storage
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FULL: tl.constexpr, RULE: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr,
    TILES_CHUNK: tl.constexpr, DIAGONALS_CHUNK: tl.constexpr, ENTRIES_CHUNK: tl.constexpr, COLUMNS_CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share one tile's keys; more than one: partial results, every step masked
    LSE: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop without masks
    MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """grid: (blocks * PARTS, B * H / PACK, SPLITS). Optional tensors are None; a CHUNK of 0 means no such list."""
    BIAS: tl.constexpr = bias is not None
    POS: tl.constexpr = pos is not None
    PLAIN: tl.constexpr = (not CAP) and (not BIAS)
    x = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows see more keys: start them first
    block = first_block + x // PARTS
    units = heads // PACK
    b = (tl.program_id(1) // units).to(tl.int64)
    h = (tl.program_id(1) % units) * PACK
    g = h // (heads // kv_heads)
    split = tl.program_id(2)

    # ---- rows
    r = tl.arange(0, TILE)
    inner = (x % PARTS) * ROWS + r % ROWS
    row = block * BLOCK - q_offset + inner
    head = h + r // ROWS
    live = (row >= 0) & (row < n_rows) & (inner < BLOCK) & (r // ROWS < PACK)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    q_at = b * q_sb + head.to(tl.int64) * q_sh + row.to(tl.int64) * q_sn
    qt = _read(q, q_at, live, d, D, D_PAD, True)

    size = capacity  # entries that exist
    if length is not None:
        size = tl.minimum(tl.load(length + b * kv_heads + g).to(tl.int32), capacity)
    if q_pos is not None:
        qp = tl.load(q_pos + b * qp_sb + row, mask=live, other=0).to(tl.int32)
    else:
        qp = size - n_rows + row
    # nil is 0, which the compiler must not know. A select of two runs of keys that begin at multiples of 16 keeps "multiple
    # of 16" in its analysis though only the first of each run is one; a comparison with rows known to begin at a multiple of
    # 16 then passes for constant over 16 rows, and rows 8 to 15 get the mask of rows 0 to 7 (Triton 3.6, seen on an H100).
    qp = qp + nil
    q_lo = tl.min(tl.where(live, qp, BIG))
    q_hi = tl.max(tl.where(live, qp, -BIG))
    near_base = b * kv_heads + g

    # ---- where keys lie
    if PAGE > 0:
        table += near_base * table_width
    elif offsets is not None:
        start = tl.load(offsets + near_base).to(tl.int64)
        k += start * k_sm
        v += start * v_sm
    else:
        k += b * k_s0 + g.to(tl.int64) * k_sg
        v += b * v_s0 + g.to(tl.int64) * v_sg
    if POS:
        pos += near_base * capacity
    if BIAS:
        bias += near_base * capacity

    # ---- what every row sees without a test: keys in [free_lo, free_hi) that the rule does not name
    end = size  # no row sees a key from here on
    free_hi = size
    if CAUSAL and not POS:
        end = tl.minimum(size, q_hi + 1)
        free_hi = tl.minimum(size, q_lo + 1)
    if POS and (CAUSAL or RULE):
        free_hi = 0
    free_lo = 0

    # ---- the rule
    n_sink = 0
    n_near = 0
    n_stride = 0
    near0 = 0
    near1 = 0
    near_cut = 0
    near_steps = 0
    sinks = 0
    wide = 0
    step = 0
    shift = 0
    if FULL:
        near1 = tl.maximum(end, 0)
        near_steps = tl.maximum(free_hi, 0) // KEYS
    elif RULE:
        if sink is not None:
            sinks = tl.load(sink + b * sink_sb + h // sink_div)
        if window is not None:
            wide = tl.load(window + b * window_sb + h // window_div)
        if stride is not None:
            step = tl.load(stride + b * stride_sb + h // stride_div)
            if phase is not None:
                shift = tl.load(phase + b * phase_sb + h // phase_div) % tl.maximum(step, 1)
        if POS:  # positions are in no order: every entry is tested
            near1 = size
        else:
            n_sink = tl.maximum(tl.minimum(sinks, end), 0)
            near0 = tl.maximum(q_lo - wide + 1, n_sink)
            near1 = end if CAUSAL else tl.minimum(size, q_hi + wide)
            near1 = tl.maximum(tl.where(wide > 0, near1, 0), near0)
            # keys of the window that every row of the tile sees
            inside0 = tl.minimum(tl.maximum(q_hi - wide + 1, near0), near1)
            inside1 = tl.minimum(free_hi, near1) if CAUSAL else tl.minimum(near1, q_lo + wide)
            near_cut = inside0 - near0
            near_steps = tl.maximum(inside1 - inside0, 0) // KEYS
            if stride is not None:
                blocks = (tl.maximum(end, 0) + WIDTH - 1) // WIDTH
                n_stride = tl.where(step > 0, tl.maximum(blocks - shift + step - 1, 0) // tl.maximum(step, 1), 0) * WIDTH
        free_hi = tl.where((wide > 0) | CAUSAL, tl.minimum(free_hi, q_lo - wide + 1), free_hi)
        free_hi = tl.where(step > 0, 0, free_hi)
        free_lo = sinks
    if SPLITS > 1:
        near_steps = 0
        free_hi = 0
    n_near = near1 - near0 - near_steps * KEYS

    # ---- the lists: counts, and the run of each that needs no mask
    tile_rows = 0
    tile_used = 0
    tile_cut = 0
    tile_steps = 0
    if TILES_CHUNK > 0:
        at = b * tiles_sb + (h // tiles_div).to(tl.int64) * num_blocks + block
        tiles += at * tiles_n
        tile_used = tl.load(tile_count + at)
        if SPLITS == 1:
            lo, hi, tile_rows = _survey(tiles, tile_used, free_lo, free_hi, BIG if POS else end, WIDTH, TILES_CHUNK)
            tile_cut = lo * WIDTH
            tile_steps = (hi - lo) * WIDTH // KEYS
        else:
            tile_rows = tile_used
        tile_rows = tile_rows * WIDTH - tile_steps * KEYS
    diagonal_rows = 0
    diagonal_cut = 0
    diagonal_steps = 0
    e = end0
    if DIAGONALS_CHUNK > 0:
        if q_pos is not None:
            e = tl.load(q_pos + b * qp_sb).to(tl.int32) - q_offset
        e += (block + 1) * BLOCK
        at = b * diagonals_sb + h // diagonals_div
        diagonals += at * diagonals_n
        diagonal_rows = tl.load(diagonal_count + at)
        if SPLITS == 1:
            lo, hi, diagonal_rows = _survey_diagonals(diagonals, diagonal_rows, e, free_lo, free_hi, WIDTH, DIAGONALS_CHUNK)
            diagonal_cut = lo * WIDTH
            diagonal_steps = (hi - lo) * WIDTH // KEYS
        diagonal_rows = diagonal_rows * WIDTH - diagonal_steps * KEYS
    entry_rows = 0
    entry_cut = 0
    entry_steps = 0
    if ENTRIES_CHUNK > 0:
        at = b * entries_sb + (h // entries_div).to(tl.int64) * num_blocks + block
        entries += at * entries_n
        entry_rows = tl.load(entry_count + at)
        if SPLITS == 1:
            entry_cut, hi, entry_rows = _survey(entries, entry_rows, free_lo, free_hi, BIG if POS else end, 1, ENTRIES_CHUNK)
            entry_steps = (hi - entry_cut) // KEYS
        entry_rows -= entry_steps * KEYS
    column_rows = 0
    column_cut = 0
    column_steps = 0
    if COLUMNS_CHUNK > 0:  # one row a head, or one a block of this launch (compacted beside diagonals)
        at = b * columns_sb + (h // columns_div).to(tl.int64) * columns_blocks
        at += tl.where(columns_blocks > 1, block - first_block, 0)
        columns += at * columns_n
        column_rows = tl.load(column_count + at)
        if SPLITS == 1:
            column_cut, hi, column_rows = _survey(
                columns, column_rows, free_lo, free_hi, BIG if POS else end, 1, COLUMNS_CHUNK
            )
            column_steps = (hi - column_cut) // KEYS
        column_rows -= column_steps * KEYS

    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    i = tl.arange(0, KEYS)

    # ---- the rest of every source, with masks
    steps = tl.cdiv(n_sink + n_near + n_stride + tile_rows + diagonal_rows + entry_rows + column_rows, KEYS)
    first = 0
    if SPLITS > 1:
        share = tl.cdiv(steps, SPLITS)
        first = split * share
        steps = tl.minimum(steps, first + share)
    for t in tl.range(first, steps, num_stages=MASKED_STAGES):
        spot = t * KEYS + i
        key = spot
        ok = spot < 0
        if TILES_CHUNK > 0:
            skip = tile_steps * KEYS
            if WIDTH % KEYS == 0:  # numbers, where rows of numbers would cost as much as the rest of the step
                begin, stop = _listed(tiles, t * KEYS, tile_rows, tile_used, tile_cut, skip, WIDTH)
                key = begin + i
                ok = key < stop
            elif WIDTH * 2 == KEYS:
                begin, stop = _listed(tiles, t * KEYS, tile_rows, tile_used, tile_cut, skip, WIDTH)
                begin2, stop2 = _listed(tiles, t * KEYS + WIDTH, tile_rows, tile_used, tile_cut, skip, WIDTH)
                key = tl.where(i < WIDTH, begin + i, begin2 - WIDTH + i)
                ok = key < tl.where(i < WIDTH, stop, stop2)
            else:
                mine = spot < tile_rows
                flat = spot + tl.where(spot >= tile_cut, skip, 0)
                which = flat // WIDTH
                key = tl.load(tiles + which, mask=mine, other=0) + flat % WIDTH
                stop = tl.load(tiles + which + 1, mask=mine & (which + 1 < tile_used), other=BIG)
                ok = mine & (key < stop)
            spot -= tile_rows
        ruled = ok
        if FULL or RULE:
            ruled = (spot >= 0) & (spot < n_sink)
            key = tl.where(ruled, spot, key)
            spot -= n_sink
            mine = (spot >= 0) & (spot < n_near)
            key = tl.where(mine, near0 + spot + tl.where(spot >= near_cut, near_steps * KEYS, 0), key)
            ruled = ruled | mine
            spot -= n_near
            if stride is not None:
                other = (shift + (spot // WIDTH) * step) * WIDTH + spot % WIDTH
                mine = (spot >= 0) & (spot < n_stride)
                key = tl.where(mine, other, key)
                ruled = ruled | (mine & (other >= n_sink) & ((other < near0) | (other >= near1)))
                spot -= n_stride
            ok = ok | ruled
        if DIAGONALS_CHUNK > 0:
            mine = (spot >= 0) & (spot < diagonal_rows)
            flat = spot + tl.where(spot >= diagonal_cut, diagonal_steps * KEYS, 0)
            which = flat // WIDTH
            other = e - tl.load(diagonals + which, mask=mine, other=0) - WIDTH + flat % WIDTH
            nearer = tl.load(diagonals + which - 1, mask=mine & (which > 0), other=-WIDTH)
            key = tl.where(mine, other, key)
            ok = ok | (mine & (other < e - nearer - WIDTH))
            spot -= diagonal_rows
        if ENTRIES_CHUNK > 0:
            mine = (spot >= 0) & (spot < entry_rows)
            flat = spot + tl.where(spot >= entry_cut, entry_steps * KEYS, 0)
            key = tl.where(mine, tl.load(entries + flat, mask=mine, other=0), key)
            ok = ok | mine
            spot -= entry_rows
        if COLUMNS_CHUNK > 0:
            mine = (spot >= 0) & (spot < column_rows)
            flat = spot + tl.where(spot >= column_cut, column_steps * KEYS, 0)
            key = tl.where(mine, tl.load(columns + flat, mask=mine, other=0), key)
            ok = ok | mine
        ok = ok & (key >= 0) & (key < size)
        key = tl.where(ok, key, 0)
        where = key
        if POS:
            where = tl.load(pos + key, mask=ok, other=0).to(tl.int32)
        weight = m
        if BIAS:
            weight = tl.load(bias + key, mask=ok, other=0.0).to(tl.float32)
            ok = ok & (weight > float("-inf"))
        if CAUSAL:
            ok = ok & (where <= q_hi)
        k_off, v_off = _offsets(key, table, k_s0, k_sm, v_s0, v_sm, PAGE)
        kt = _read(k, k_off, ok, d, D, D_PAD, True)
        s = _logits(_product(qt, kt, FP32), scale, softcap, weight, CAP, BIAS)
        if CAUSAL:
            seen = tl.where(ok, where, BIG)[None, :] <= qp[:, None]
        else:
            seen = ok[None, :]
        if RULE:
            back = qp[:, None] - where[None, :]
            named = back < wide
            if not CAUSAL:
                named = named & (-back < wide)
            always = where < sinks
            if stride is not None:
                always = always | ((step > 0) & ((where // WIDTH) % tl.maximum(step, 1) == shift))
            seen = seen & ((named | always[None, :]) == ruled[None, :])
        s = tl.where(seen, s, float("-inf"))
        vt = _read(v, v_off, ok, dv, DV, DV_PAD, True)
        m, l, acc = _fold(s, vt, m, l, acc, scale, PLAIN, FP32)

    # ---- whole steps that every row sees
    if SPLITS == 1:
        for t in tl.range(0, near_steps + tile_steps + diagonal_steps + entry_steps + column_steps, num_stages=STAGES):
            key = near0 + near_cut + t * KEYS + i
            spot = tl.zeros([], tl.int32) + t - near_steps
            if TILES_CHUNK > 0:
                mine = (spot >= 0) & (spot < tile_steps)
                other, inside = _starts(tiles, tile_cut + spot * KEYS, mine, WIDTH, KEYS)
                key = tl.where(mine, other + inside, key) if FULL or RULE else other + inside
                spot -= tile_steps
            if DIAGONALS_CHUNK > 0:
                mine = (spot >= 0) & (spot < diagonal_steps)
                other, inside = _starts(diagonals, diagonal_cut + spot * KEYS, mine, WIDTH, KEYS)
                key = tl.where(mine, e - other - WIDTH + inside, key)
                spot -= diagonal_steps
            if ENTRIES_CHUNK > 0:
                mine = (spot >= 0) & (spot < entry_steps)
                other, inside = _starts(entries, entry_cut + spot * KEYS, mine, 1, KEYS)
                key = tl.where(mine, other, key)
                spot -= entry_steps
            if COLUMNS_CHUNK > 0:
                mine = (spot >= 0) & (spot < column_steps)
                other, inside = _starts(columns, column_cut + spot * KEYS, mine, 1, KEYS)
                key = tl.where(mine, other, key)
            weight = m
            ok = key >= 0
            if BIAS:
                weight = tl.load(bias + key).to(tl.float32)
                ok = weight > float("-inf")
            k_off, v_off = _offsets(key, table, k_s0, k_sm, v_s0, v_sm, PAGE)
            kt = _read(k, k_off, ok, d, D, D_PAD, BIAS)
            s = _logits(_product(qt, kt, FP32), scale, softcap, weight, CAP, BIAS)
            if BIAS:
                s = tl.where(ok[None, :], s, float("-inf"))
            vt = _read(v, v_off, ok, dv, DV, DV_PAD, BIAS)
            m, l, acc = _fold(s, vt, m, l, acc, scale, PLAIN, FP32)

    # ---- out
    at = ((b * heads + head) * n_rows + row) * SPLITS + split
    _finish(out, lse, at, live, dv, dv < DV, acc, m, l, DV, LSE)


@triton.jit
def reduce_splits(
    part, part_lse, out, lse,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One row of out from its SPLITS partial results. grid: (B * H * N,)."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS_PAD)
    d = tl.arange(0, DV_PAD)
    w = tl.load(part_lse + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(w)
    top = tl.where(top > float("-inf"), top, 0.0)
    w = tl.exp2((w - top) * LOG2E)
    total = tl.sum(w)
    at = (row * SPLITS + s)[:, None] * DV + d[None, :]
    x = tl.load(part + at, mask=(s < SPLITS)[:, None] & (d < DV)[None, :], other=0.0)
    y = tl.sum(x * w[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DV + d, y.to(out.dtype.element_ty), mask=d < DV)
    if LSE:
        tl.store(lse + row, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)) * LN2, float("-inf")))
