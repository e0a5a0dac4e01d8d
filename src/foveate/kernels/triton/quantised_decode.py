"""One decode step over the codes of a quantised store: bytes are read once per kv head and unpacked in registers.

Keys are in groups of tokens of one channel, values in groups of channels of one token, as KIVI has them (Liu et al. 2024,
arXiv 2402.02750); `packed.Coded` says how they lie in memory. Recent entries are read as they are. Lengths are read on the
device, so a step can be captured in a CUDA graph. `quantised_launch.py` calls the kernel, `walk.reduce_splits` merges what
several programs found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import FLOOR, _finish, _fold, _logits, _product

FEW = tl.constexpr(8)  # most scales of a token's channels: each channel chooses among them


@triton.jit
def _begin(codes, scale, low, tail, wide, rows, few, tail_rows, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Where kv head `wide` of all begins in the tensors of a side. N: numbers of one of its `few` scales."""
    return codes + wide * rows * W, scale + wide * few * N, low + wide * few * N, tail + wide * tail_rows * D


@triton.jit
def _channels(BITS: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr):
    """(channels in the order in which bytes hold them, parts padded to powers of two; which of them there are)."""
    c = tl.arange(0, 8 // BITS * W_PAD)
    there = c % W_PAD < W
    if W < W_PAD:
        c = c // W_PAD * W + c % W_PAD
    return c, there


@triton.jit
def _unpack(x, BITS: tl.constexpr):
    """Bytes `[KEYS, W]` as numbers `[KEYS, W * 8 / BITS]`: all first ones of the bytes, all second ones, and so on."""
    if BITS == 4:
        x = tl.permute(tl.join(x & 15, x >> 4), (0, 2, 1))
    elif BITS == 2:
        x = tl.permute(tl.join(tl.join(x & 3, (x >> 2) & 3), tl.join((x >> 4) & 3, x >> 6)), (0, 3, 2, 1))
    if BITS < 8:
        x = tl.reshape(x, (x.shape[0], x.numel // x.shape[0]))
    return x


@triton.jit
def _coded(
    codes, scale, low, like, key, ok, c, c_ok,
    KEYS: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    TOKENS: tl.constexpr,  # groups are of tokens, else of channels
    ALIGNED: tl.constexpr,  # the first of the keys is a multiple of KEYS
    RUN: tl.constexpr = False,  # they are neighbours, ok or not, at least 0
):  # fmt: skip
    """Coded entries `key` `[KEYS]` as `[KEYS, channels c]` in the dtype of `like`. ALIGNED ones are neighbours.

    Where not ok it holds anything finite. Numbers of one row and kv head are counted in 31 bits, see `serves`.
    """
    j = tl.arange(0, W_PAD)
    x = _unpack(tl.load(codes + key[:, None] * W + j[None, :], mask=ok[:, None] & (j < W)[None, :], other=0), BITS)
    x = x.to(tl.float32)
    N: tl.constexpr = D // GROUP
    if TOKENS and ALIGNED and GROUP % KEYS == 0:
        spot = tl.min(key) // GROUP * D + c
        y = x * tl.load(scale + spot, mask=c_ok, other=0.0).to(tl.float32)[None, :]
        y += tl.load(low + spot, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    elif TOKENS and RUN and GROUP >= KEYS:  # two groups at most
        group = key // GROUP
        lower = tl.min(group)
        upper = tl.max(tl.where(ok, group, -1))
        here = (group == lower)[:, None]
        spot = lower * D + c
        some = c_ok & (c < tl.where(upper >= lower, D, 0))
        s = tl.load(scale + spot, mask=some, other=0.0).to(tl.float32)[None, :]
        l = tl.load(low + spot, mask=some, other=0.0).to(tl.float32)[None, :]
        some = c_ok & (c < tl.where(upper > lower, D, 0))
        s = tl.where(here, s, tl.load(scale + spot + D, mask=some, other=0.0).to(tl.float32)[None, :])
        l = tl.where(here, l, tl.load(low + spot + D, mask=some, other=0.0).to(tl.float32)[None, :])
        y = x * s + l
    elif not TOKENS:
        tl.static_assert(N <= FEW)
        s = tl.zeros_like(x)
        l = tl.zeros_like(x)
        for i in tl.static_range(N):
            here = (c // GROUP == i)[None, :]
            s = tl.where(here, tl.load(scale + key * N + i, mask=ok, other=0.0).to(tl.float32)[:, None], s)
            l = tl.where(here, tl.load(low + key * N + i, mask=ok, other=0.0).to(tl.float32)[:, None], l)
        y = x * s + l
    else:
        spots = (key // GROUP * D)[:, None] + c[None, :]
        both = ok[:, None] & c_ok[None, :]
        y = x * tl.load(scale + spots, mask=both, other=0.0).to(tl.float32)
        y += tl.load(low + spots, mask=both, other=0.0).to(tl.float32)
    return y.to(like.dtype.element_ty)  # what an unpacked copy would hold


@triton.jit
def _late(tail, key, ok, done, ring, c, c_ok, D: tl.constexpr):
    """Entries `key` `[KEYS]` that are not coded, as `[KEYS, channels c]`; zero where not ok."""
    slot = key - done
    if ring > 0:
        slot = key % ring
    return tl.load(tail + slot[:, None] * D + c[None, :], mask=ok[:, None] & c_ok[None, :], other=0.0)


@triton.jit
def _step(qt, kt, vt, key, ok, m, l, acc, scale, bias, base, BIAS: tl.constexpr, FP32: tl.constexpr):
    """Fold entries `key` `[KEYS]` into the running softmax where ok; their bias lies at `base`."""
    s = _product(qt, kt, FP32)
    if BIAS:
        s = _logits(s, scale, 0.0, tl.load(bias + base + key, mask=ok, other=0.0), False, True)
    s = tl.where(ok[None, :], s, float("-inf"))
    return _fold(s, vt, m, l, acc, scale, not BIAS, FP32)


COUNTS = ["capacity", "k_rows", "k_few", "k_tail_rows", "k_ring", "v_rows", "v_few", "v_tail_rows", "v_ring"]


@triton.jit(do_not_specialize=COUNTS)
def attend_codes(
    q, out, lse,
    k_codes, k_scale, k_low, k_tail, v_codes, v_scale, v_low, v_tail,
    k_done, v_done, length, bias,
    scale, capacity, kv_heads, q_sb, q_sh,
    k_rows, k_few, k_tail_rows, k_ring, v_rows, v_few, v_tail_rows, v_ring,  # slots of a kv head
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_W: tl.constexpr, K_W_PAD: tl.constexpr, D: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_W: tl.constexpr, V_W_PAD: tl.constexpr, DV: tl.constexpr,
    PACK: tl.constexpr, TILE: tl.constexpr,  # query heads of a kv head; rounded up to a power of two, at least 16
    KEYS: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr, LSE: tl.constexpr, FP32: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One query a row over all entries. grid: (SPLITS, B * G).

    Codes, scales, lows and tails are contiguous; k_done, v_done int64 `[B]`, length int `[B, G]`, bias fp32
    `[B, G, capacity]`. out `[B, H, SPLITS, DV]` and lse `[B, H, SPLITS]` (natural log) are partial results when SPLITS > 1.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    b = row // kv_heads
    g = row % kv_heads
    wide = row.to(tl.int64)
    size = tl.minimum(tl.load(length + row).to(tl.int32), capacity)
    k_end = tl.load(k_done + b).to(tl.int32)
    v_end = tl.load(v_done + b).to(tl.int32)
    k_codes, k_scale, k_low, k_tail = _begin(k_codes, k_scale, k_low, k_tail, wide, k_rows, k_few, k_tail_rows, K_W, D, D)
    v_codes, v_scale, v_low, v_tail = _begin(
        v_codes, v_scale, v_low, v_tail, wide, v_rows, v_few, v_tail_rows, V_W, DV // V_GROUP, DV
    )
    kc, kc_ok = _channels(K_BITS, K_W, K_W_PAD)
    vc, vc_ok = _channels(V_BITS, V_W, V_W_PAD)
    r = tl.arange(0, TILE)
    i = tl.arange(0, KEYS)
    head = g * PACK + r
    at = b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
    qt = tl.load(q + at[:, None] + kc[None, :], mask=(r < PACK)[:, None] & kc_ok[None, :], other=0.0)
    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, 8 // V_BITS * V_W_PAD], tl.float32)
    # Steps over what is coded on both sides, then over the entries whose values are not.
    v_end = tl.minimum(v_end, size)
    clear = tl.cdiv(v_end, KEYS)
    steps = clear + tl.cdiv(size - v_end, KEYS)
    share = tl.cdiv(steps, SPLITS)
    first = split * share
    last = tl.minimum(steps, first + share)
    for t in tl.range(first, tl.minimum(last, clear), num_stages=STAGES):
        key = t * KEYS + i
        ok = key < v_end
        kt = _coded(k_codes, k_scale, k_low, k_tail, key, ok, kc, kc_ok, KEYS, K_BITS, K_W, K_W_PAD, K_GROUP, D, True, True)
        vt = _coded(
            v_codes, v_scale, v_low, v_tail, key, ok, vc, vc_ok, KEYS, V_BITS, V_W, V_W_PAD, V_GROUP, DV, False, True
        )
        m, l, acc = _step(qt, kt, vt, key, ok, m, l, acc, scale, bias, wide * capacity, BIAS, FP32)
    for t in tl.range(tl.maximum(first, clear), last, num_stages=1):  # few: their memory is better spent above
        key = v_end + (t - clear) * KEYS + i
        ok = key < size
        old = ok & (key < k_end)
        kt = _coded(
            k_codes, k_scale, k_low, k_tail, key, old, kc, kc_ok, KEYS, K_BITS, K_W, K_W_PAD, K_GROUP, D, True, False
        )
        kt = tl.where(old[:, None], kt, _late(k_tail, key, ok & (key >= k_end), k_end, k_ring, kc, kc_ok, D))
        vt = _late(v_tail, key, ok, v_end, v_ring, vc, vc_ok, DV)
        m, l, acc = _step(qt, kt, vt, key, ok, m, l, acc, scale, bias, wide * capacity, BIAS, FP32)
    _finish(out, lse, (wide * PACK + r) * SPLITS + split, r < PACK, vc, vc_ok, acc, m, l, DV, LSE)
