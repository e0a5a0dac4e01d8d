"""Launches of `labels.py`: scores of all keys of a decode step by their labels, the newest key's label made on the way."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...kv import KV
from ...packed import PackedKV, Thinned
from . import labels as kernels
from . import labels_words as packed
from .config import device
from .paging_launch import _pad, _storage, _tight, usable

__all__ = ["near", "score", "usable"]
KEYS, WARPS = {2: 128, 4: 128, 8: 128, 16: 64}, 4  # of score_channels: keys of a step by bits of a channel
PACKED, PACKED_WARPS, LIMIT = 256, 4, 64  # of score_words; bytes of a label at most
NEAR, NEAR_WARPS = 256, 4  # of near_codes
SHARE = {"score": 4, "packed": 5, "near": 8}  # programs a multiprocessor, as many as its registers hold


def score(q: Tensor, kv: KV, channels: Tensor, data: list[Tensor], bits: int, *, group: bool, append: bool) -> Tensor:
    """What `Channels.score` gives, fp32 `[B, H, M]`, or with `group` its highest of each kv head, `[B, G, M]`.

    Args:
        q: `[B, H, 1, D]`. kv: dense or paged, in text order. channels: int64 `[B or 1, G, R]`.
        data: labels `[B, G, size, W]` and, below 16 bits, scales `[B, G, size, 2]`, contiguous, with room for all of kv.
        append: make the newest entry's label first. Entries beyond a row's length have no meaning.
    """
    b, h, _, _ = q.shape
    g, m, r = kv.shape[1], kv.shape[2], channels.shape[-1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, (s0, sg, sm, page, per) = _keys(kv, append)
    channels = channels.contiguous()
    words, shared = data[0].shape[3], device(q.device.index if q.device.type == "cuda" else None)[0]
    if bits < 16 and words % 4 == 0 and words <= LIMIT:
        where = (g, q.stride(0), q.stride(1), s0, sg, sm, per, channels.stride(0) if channels.shape[0] > 1 else 0)
        return _score_words(q, k, kv, channels, data, bits, where, page, group, append)
    wide = KEYS[bits] * _pad(words) * data[0].element_size()  # bytes of a step's labels
    out = torch.empty(b, g if group else h, m, dtype=torch.float32, device=q.device)
    blocks, steps = _steps(q, m, KEYS[bits], b * g, SHARE["score"])
    kernels.score_channels[(blocks, b * g)](
        q, k, _tight(kv.table), channels, data[0], data[1] if bits < 16 else None, _tight(kv.len), out, m, steps,
        g, q.stride(0), q.stride(1), s0, sg, sm, per, channels.stride(0) if channels.shape[0] > 1 else 0, data[0].shape[2],
        PAGE=page, GROUP=h // g, GROUP_PAD=_pad(h // g + 1), R=r, BITS=bits, WORDS=words, WORDS_PAD=_pad(words),
        KEYS=KEYS[bits], REDUCE=group, APPEND=append, FP32=data[0].dtype == torch.float32, num_warps=WARPS,
        num_stages=3 if 3 * wide < 0.6 * shared else 1,
    )  # fmt: skip
    return out


def _score_words(
    q: Tensor, k: Tensor, kv: KV, channels: Tensor, data: list[Tensor], bits: int, where: tuple[int, ...], page: int,
    group: bool, append: bool,
) -> Tensor:  # fmt: skip
    """`score` of labels that fill words of 32 bits. k: keys, contiguous along D. where: strides, as kernels take them."""
    b, h, g, m, words = q.shape[0], q.shape[1], kv.shape[1], kv.shape[2], data[0].shape[3]
    mine = torch.empty(b, h, 8 // bits, words // 4, dtype=torch.int32, device=q.device)
    facts = torch.empty(b, h, 4, dtype=torch.float32, device=q.device)
    out = torch.empty(b, g if group else h, m, dtype=torch.float32, device=q.device)
    packed.query_words[(b * g,)](
        q, k, _tight(kv.table), channels, *data, _tight(kv.len), mine, facts, m, *where, data[0].shape[2],
        PAGE=page, GROUP=h // g, GROUP_PAD=triton.next_power_of_2(h // g), R=channels.shape[-1], BITS=bits,
        WORDS=words, WORDS_PAD=triton.next_power_of_2(words), APPEND=append, num_warps=1,
    )  # fmt: skip
    blocks, steps = _steps(q, m, PACKED, b * g, SHARE["packed"])
    packed.score_words[(blocks, b * g)](
        mine, facts, data[0].view(torch.int32), data[1], _tight(kv.len), out, m, steps,
        out.shape[1] // g * m, data[0].shape[2],
        GROUP=h // g, BITS=bits, WORDS=words // 4, WORDS_PAD=triton.next_power_of_2(words // 4), KEYS=PACKED, REDUCE=group,
        PTX=q.device.type != "cpu" and torch.version.hip is None, num_warps=PACKED_WARPS,
    )  # fmt: skip
    return out


def serves_codes(d: int) -> bool:
    """Whether `near` knows codes of this head dim: whole words, and a matrix that fits a program."""
    return d in (32, 64, 128)


def near(q: Tensor, kv: KV, data: Tensor, theta: float, edges: Tensor | None, *, group: bool, append: bool) -> Tensor:
    """Minus what `Codes.distance` gives, int16 `[B, H, M]`, or with `group` the nearest of each kv head, `[B, G, M]`.

    Args:
        q: `[B, H, 1, D]`. kv: dense or paged, in text order. data: codes `[B, G, size, W]` of words of 32 or 64 bits.
        theta: the outer threshold; with edges (fp32 `[B or 1, G, 1, 1]`, thresholds of keys) in deviations of a query.
        append: make the newest entry's code first. Entries beyond a row's length have no meaning.
    """
    b, h, _, d = q.shape
    g, m, words = kv.shape[1], kv.shape[2], d // 32
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, (s0, sg, sm, page, per) = _keys(kv, append)
    flat = data.view(torch.int32)
    mine = torch.empty(b, h, 2 * words, dtype=torch.int32, device=q.device)
    kernels.code_rows[(b * g,)](
        q, k, _tight(kv.table), flat, None if edges is None else edges.float().contiguous(), _tight(kv.len), mine, theta, m,
        g, q.stride(0), q.stride(1), s0, sg, sm, per, g if edges is not None and edges.shape[0] > 1 else 0, data.shape[2],
        PAGE=page, GROUP=h // g, ROWS=_pad(h // g + 1), D=d, APPEND=append, SPREAD=edges is not None,
        FP32=q.dtype == torch.float32, num_warps=16 if q.dtype == torch.float32 else 4,
    )  # fmt: skip
    out = torch.empty(b, g if group else h, m, dtype=torch.int16, device=q.device)
    blocks, steps = _steps(q, m, NEAR, b * g, SHARE["near"])
    kernels.near_codes[(blocks, b * g)](
        mine, flat, _tight(kv.len), out, m, steps, data.shape[2],
        GROUP=h // g, WORDS=words, KEYS=NEAR, REDUCE=group, num_warps=NEAR_WARPS,
    )  # fmt: skip
    return out


def _keys(kv: KV, append: bool) -> tuple[Tensor, tuple[int, int, int, int, int]]:
    """Keys of which kernels read the newest if `append`, none else; strides as `_storage` has them.

    Of packed entries that key alone is handed over, at the place of every entry.
    """
    if isinstance(kv, PackedKV) and kv.packed is not None and not kv.made:
        tail = kv.packed.tail if isinstance(kv.packed, Thinned) else kv.packed.keys.tail
        k = kv.newest() if append else tail
        return k, (k.stride(0), k.stride(1), 0, 0, 0)
    k = kv.k if kv.k.stride(-1) == 1 else kv.k.contiguous()
    return k, _storage(k, kv)


def _steps(q: Tensor, m: int, keys: int, rows: int, share: int) -> tuple[int, int]:
    """(programs of a row, steps of a program): `share` programs a multiprocessor, evenly loaded."""
    _, cores = device(q.device.index if q.device.type == "cuda" else None)
    blocks = -(-m // keys)
    programs = max(1, min(blocks, share * cores // rows))
    steps = -(-blocks // programs)
    return -(-blocks // steps), steps
