"""Labels of 2, 4 or 8 bits a channel that fill words, scored by integer products of four channels at a time.

`Channels.score` quantises queries as it does keys, so that the sum of products of levels is an integer: four bytes of a word
of levels times those of a query, added up, are one instruction (dp4a). A thread has all of a key; nothing goes through
shared memory. What is computed is `scores/labels.py` (Yang et al. 2024, arXiv 2408.07092); `labels_launch.py` calls this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .labels import _label, _level, _spot, _step


@triton.jit
def query_words(
    q, k, table, channels, labels, scales, length, mine, facts, m,
    groups, q_sb, q_sh, k_s0, k_sg, k_sm, table_width, channels_sb, rows,
    PAGE: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,  # bytes of a label
    APPEND: tl.constexpr,
):  # fmt: skip
    """Levels of the queries of a kv head, and (APPEND) the newest key's label. grid: (B * G,).

    Arguments as those of `labels.score_channels`. mine int32 `[B, H, 8 / BITS, WORDS / 4]`: byte i of word w of part j is
    the level of channel (4 w + i) 8 / BITS + j, its place in a label that is shifted by j * BITS. facts fp32 `[B, H, 4]`:
    minimum and step of the levels, and the sum of what they stand for.
    """
    row = tl.program_id(0)
    b = (row // groups).to(tl.int64)
    g = (row % groups).to(tl.int64)
    TOP: tl.constexpr = (1 << BITS) - 1
    PER: tl.constexpr = 8 // BITS
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + row).to(tl.int32), m)
    c = tl.arange(0, WORDS_PAD)
    h = tl.arange(0, GROUP_PAD)
    heads = (h < GROUP)[None, :]
    channels += b * channels_sb + g * R
    query = q + b * q_sb + (g * GROUP + h) * q_sh
    if APPEND:  # noqa: SIM102 (known when compiled, unlike the next)
        if n > 0:
            key = _spot(k, table, row, groups, n - 1, k_s0, k_sg, k_sm, table_width, PAGE)
            labels += row.to(tl.int64) * rows * WORDS
            scales += row.to(tl.int64) * rows * 2
            _label(key, channels, labels, scales, (n - 1).to(tl.int64), c, R, BITS, TOP, PER, WORDS, WORDS_PAD)
    low = tl.full([GROUP_PAD], float("inf"), tl.float32)
    high = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    for j in tl.static_range(PER):
        ok = c * PER + j < R
        at = tl.load(channels + c * PER + j, mask=ok, other=0)
        x = tl.load(query[None, :] + at[:, None], mask=ok[:, None] & heads, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(ok[:, None], x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(ok[:, None], x, float("-inf")), 0))
    step = _step(low, high, TOP)
    step = tl.where(step > 0, step, 1.0)
    w = tl.arange(0, WORDS_PAD // 4)
    place = (tl.arange(0, 4) * 8)[None, :, None]
    total = tl.zeros([GROUP_PAD], tl.int32)
    for j in tl.static_range(PER):
        ok = c * PER + j < R
        at = tl.load(channels + c * PER + j, mask=ok, other=0)
        x = tl.load(query[None, :] + at[:, None], mask=ok[:, None] & heads, other=0.0).to(tl.float32)
        level = _level(x, low[None, :], tl.broadcast_to(step[None, :], x.shape), TOP)
        level = tl.where(ok[:, None] & heads, level, 0.0).to(tl.int32)
        total += tl.sum(level, 0)
        word = tl.sum(tl.reshape(level, [WORDS_PAD // 4, 4, GROUP_PAD]) << place, 1)
        to = mine + ((row * GROUP + h[None, :]) * PER + j) * (WORDS // 4) + w[:, None]
        tl.store(to, word, mask=(w < WORDS // 4)[:, None] & heads)
    fact = facts + (row * GROUP + h) * 4
    tl.store(fact, low, mask=h < GROUP)
    tl.store(fact + 1, step, mask=h < GROUP)
    tl.store(fact + 2, R * low + step * total.to(tl.float32), mask=h < GROUP)


@triton.jit
def _add_products(a, b, total, PTX: tl.constexpr):
    """total + the sum over the four bytes of words a, b of their products."""
    if PTX:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            total += ((a >> (8 * i)) & 255) * ((b >> (8 * i)) & 255)
    return total


@triton.jit(do_not_specialize=["m", "steps", "wide"])
def score_words(
    mine, facts, labels, scales, length, out, m, steps, wide, rows,
    GROUP: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,  # words of a label, int32
    KEYS: tl.constexpr, REDUCE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """q . k on the channels of labels, as `labels.score_channels` gives it. grid: (ceil(m / (KEYS * steps)), B * G).

    labels int32 `[B, G, rows, WORDS]`; mine and facts as `query_words` writes them. wide: numbers of `out` for a kv head, of
    which Triton shall not know that GROUP divides it: it would send scores through shared memory to store two at a time.
    """
    row = tl.program_id(1)
    PER: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 0x03030303 if BITS == 2 else (0x0F0F0F0F if BITS == 4 else -1)
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + row).to(tl.int32), m)
    w = tl.arange(0, WORDS_PAD)
    i = tl.arange(0, KEYS)
    labels += row.to(tl.int64) * rows * WORDS
    scales += row.to(tl.int64) * rows * 2
    mine += row * GROUP * PER * WORDS
    facts += row * GROUP * 4
    out += row.to(tl.int64) * wide
    first = tl.program_id(0) * KEYS * steps
    end = tl.minimum(first + KEYS * steps, n)
    new = _words(labels, first + i, end, w, WORDS, WORDS_PAD)
    for p in tl.range(first, end, KEYS):
        word = new
        new = _words(labels, p + KEYS + i, end, w, WORDS, WORDS_PAD)  # on their way while these are scored
        entry = p + i
        live = entry < end
        scale = scales + entry.to(tl.int64) * 2
        low_k = tl.load(scale, mask=live, other=0.0).to(tl.float32)
        step_k = tl.load(scale + 1, mask=live, other=0.0).to(tl.float32)
        four = tl.zeros([KEYS, WORDS_PAD], tl.int32)  # sums of up to four levels of at most 63 in each byte, or levels
        for j in tl.static_range(PER):
            four += (word >> (j * BITS)) & LEVELS
        none = tl.zeros([KEYS, WORDS_PAD], tl.int32)
        sum_b = tl.sum(_add_products(four, none + 0x01010101, none, PTX), 1).to(tl.float32)
        best = tl.full([KEYS], float("-inf"), tl.float32)
        for e in tl.static_range(GROUP):
            total = none
            for j in tl.static_range(PER):
                level = tl.load(mine + (e * PER + j) * WORDS + w, mask=w < WORDS, other=0)
                level = tl.broadcast_to(level[None, :], [KEYS, WORDS_PAD])
                total = _add_products((word >> (j * BITS)) & LEVELS, level, total, PTX)
            s = tl.sum(total, 1).to(tl.float32)
            low_q = tl.load(facts + e * 4)
            step_q = tl.load(facts + e * 4 + 1)
            sum_q = tl.load(facts + e * 4 + 2)
            s = low_k * sum_q + step_k * (low_q * sum_b + step_q * s)
            if REDUCE:
                best = tl.maximum(best, s)
            else:
                tl.store(out + e * m + entry, s, mask=live)
        if REDUCE:
            tl.store(out + entry, best, mask=live)


@triton.jit
def _words(labels, entry, end, w, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr):
    """Labels of some entries, int32 `[KEYS, WORDS_PAD]`."""
    ok = (entry < end)[:, None]
    if WORDS < WORDS_PAD:
        ok = ok & (w < WORDS)[None, :]
    return tl.load(labels + entry.to(tl.int64)[:, None] * WORDS + w[None, :], mask=ok, other=0)
