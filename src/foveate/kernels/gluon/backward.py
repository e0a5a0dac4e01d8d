"""The backward pass over block lists on Hopper: when its two Gluon kernels serve a call, and how they are called.

`triton/backward.py` runs the pass. It hands dq to `run_queries` where `why_not_queries` has no reason against it, and dk
and dv to `run_keys` where `why_not` has none; inverse lists, and the sums of key blocks that are cut, are Triton's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ..triton.inverse import LIST_BITS, InverseLists
from . import LONGEST, _missing

STAGES = {(128, 128): 3, (64, 128): 5, (128, 64): 6, (64, 64): 8}  # ring entries by (keys, D): what shared memory holds
STAGES_QUERIES = {128: 4, 64: 8}


def why_not(q: Tensor, kv: KV, layout: Layout) -> str | None:
    """The reason the kernel of dk and dv cannot serve a backward pass that Triton's serves, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128) or kv.shape[4] != q.shape[-1]:
        return f"it has head dims 64 and 128 with values as wide as keys, not {q.shape[-1]} and {kv.shape[4]}"
    if not layout.full:
        if layout.tile_width % 64:
            return f"it has tiles of 64, 128, 256 ... keys, not {layout.tile_width}"
        least = 128 if layout.tile_width == 64 else 64
        if layout.block_q % least:
            return f"it has query blocks of {least}, {2 * least}, {4 * least} ... rows for such tiles, not {layout.block_q}"
    rows = q.shape[0] * q.shape[1] * layout.num_blocks * layout.block_q  # of which there are two numbers each in `stats`
    if max(layout.shape[2:]) > LONGEST or 2 * rows >= 1 << 31:
        return f"more than {LONGEST} rows or keys, or 2^30 rows of all heads"
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a Hopper GPU"
    return _missing()


def why_not_queries(q: Tensor, kv: KV, layout: Layout) -> str | None:
    """The reason the kernel of dq cannot serve a backward pass that Triton's serves, or None."""
    if not layout.full and layout.block_q != 128:
        return f"it has query blocks of 128 rows, not {layout.block_q}"
    return why_not(q, kv, layout)


def run_keys(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, stats: Tensor, dk: Tensor, dv: Tensor, part: Tensor,
    layout: Layout, lists: InverseLists, scale: float,
) -> None:  # fmt: skip
    """Writes dk and dv `[B, G, M, D]`, and fp32 `[items, keys, 2 D]` (dk, dv) of cut key blocks into `part`.

    stats: fp32 `[2, B * H * rows of the padded grid]`, lse2 and delta as `dq_kernel` leaves them. layout: tiles, or
    dense on a grid of 128 rows.
    """
    from .backward_kernel import keys_kernel
    from .launch import _multiprocessors

    with torch.cuda.device(q.device):
        args, options = arguments_keys(q, k, v, dout, stats, dk, dv, part, layout, lists, scale)
        units = lists.max_items + lists.key_blocks * k.shape[0] * k.shape[1]
        keys_kernel[(min(units, _multiprocessors(q.device)),)](*args, **options)


def arguments_keys(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, stats: Tensor, dk: Tensor, dv: Tensor, part: Tensor,
    layout: Layout, lists: InverseLists, scale: float,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """(positional arguments, constexpr arguments and launch options) of `keys_kernel`."""
    from .launch import DTYPES, _descriptor, readable
    from .shim import shared_layout

    b, h, n, d = q.shape
    g, m = k.shape[1], k.shape[2]
    tiles, count, width, per = _lists(layout, lists.plan)
    block = [1, 1, 64, d]
    args = [
        *(_descriptor(readable(t), block) for t in (q, dout, k, v)), dk, dv, part,
        torch.zeros(1, dtype=torch.int32, device=q.device), tiles, count, layout.num_blocks, width,
        lists.ids, lists.offset, lists.counts, lists.cuts, lists.items, lists.plan, stats, scale,
        g, n, m, lists.key_blocks, lists.key_blocks * b * g, layout.q_offset,
    ]  # fmt: skip
    options = dict(
        FLAT=shared_layout([64, d], DTYPES[q.dtype]), KEYS=lists.keys, WIDTH=layout.tile_width,
        INNER=layout.block_q // 64 * lists.share, GROUP=h // g, SHARE=lists.share, MANY=int(tiles.shape[0] > 1), PER=per,
        BITS=LIST_BITS, CAUSAL=layout.causal, FULL=layout.full, D=d, STAGES=STAGES[lists.keys, d],
        num_warps=4, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip
    return args, options


def run_queries(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor, dq: Tensor, stats: Tensor,
    layout: Layout, scale: float,
) -> None:  # fmt: skip
    """Writes dq `[B, H, N, D]`, and stats as `run_keys` reads them. lse, dlse: fp32 `[B, H, N]`, contiguous."""
    from .backward_queries import queries_kernel
    from .launch import _multiprocessors

    with torch.cuda.device(q.device):
        args, options = arguments_queries(q, k, v, out, dout, lse, dlse, dq, stats, layout, scale)
        tiles = q.shape[0] * q.shape[1] * layout.num_blocks
        queries_kernel[(min(tiles, _multiprocessors(q.device)),)](*args, **options)


def arguments_queries(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor, dq: Tensor, stats: Tensor,
    layout: Layout, scale: float,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """(positional arguments, constexpr arguments and launch options) of `queries_kernel`."""
    from .launch import DTYPES, _descriptor, readable
    from .shim import shared_layout

    b, h, n, d = q.shape
    g, m = k.shape[1], k.shape[2]
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    tiles, count, width, per = _lists(layout, counter)
    block = [1, 1, 64, d]
    args = [
        *(_descriptor(readable(t), block) for t in (q, dout, out, k, v)), lse, dlse, dq, stats, counter, tiles, count,
        scale, g, n, m, layout.num_blocks, b * h, layout.q_offset, width,
    ]  # fmt: skip
    options = dict(
        FLAT=shared_layout([64, d], DTYPES[q.dtype]), WIDTH=layout.tile_width, GROUP=h // g, MANY=int(tiles.shape[0] > 1),
        PER=per, CAUSAL=layout.causal, FULL=layout.full, D=d, STAGES=STAGES_QUERIES[d],
        num_warps=4, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip
    return args, options


def _lists(layout: Layout, unread: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """(tiles, count, entries of a row, query heads of a list), contiguous; `unread` stands for those of a dense layout."""
    tiles, count = layout.tiles, layout.tile_count
    if tiles is None or count is None:
        return unread[:1], unread, 0, 1
    return tiles.contiguous(), count.contiguous(), tiles.shape[-1], layout.shape[1] // tiles.shape[1]
