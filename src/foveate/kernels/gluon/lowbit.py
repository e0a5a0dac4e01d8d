"""Bits of key blocks from low-bit logits on Hopper: when `lowbit_kernel.py` serves a call, and how it is called.

`triton/estimate_lowbit_launch.py` asks `why_not`, makes keys of the dtype of `levels`, and hands them to `run`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import LONGEST, _missing

EXACT = 4  # bits of which sums of e4m3 products are exact, see `lowbit_kernel.py`; 0: all are int8
STAGES = 8  # ring entries, a power of two above 1: 132 KiB at D 128
ROWS = 256  # of a tile
LEAST = 128  # rows below which most of a tile is empty


def why_not(q: Tensor, width: int, block_q: int, block_k: int, share: str) -> str | None:
    """The reason the kernel cannot serve queries `[heads, n, D]` beside integer keys of `width` channels, or None."""
    if width not in (64, 128):
        return f"it has 64 and 128 channels, not {width}"
    if block_k != 32 or block_q not in (16, 32, 64, 128):
        return f"it has blocks of 16, 32, 64 or 128 rows and 32 keys, not {block_q} and {block_k}"
    if share != "fragment":
        return f"its keys share their steps by fragments, not by {share}"
    if not LEAST <= q.shape[1] <= LONGEST:
        return f"it has {LEAST} to {LONGEST} rows, not {q.shape[1]}"
    if q.device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a Hopper GPU"
    return _missing()


def levels(bits: int) -> torch.dtype:
    """The dtype of integer keys: that of the fastest product which is exact."""
    return torch.float8_e4m3fn if bits <= EXACT else torch.int8


def run(q: Tensor, mean: Tensor, bar: Tensor, keys: tuple[Tensor, Tensor, Tensor], words: Tensor, **sizes: Any) -> None:
    """Sets bits of words, int32 `[heads, nq, many]`, zeros before; see `arguments`."""
    from .lowbit_kernel import lowbit_kernel

    with torch.cuda.device(q.device):
        grid, args, options = arguments(q, mean, bar, keys, words, **sizes)
        lowbit_kernel[grid](*args, **options)


def arguments(
    q: Tensor, mean: Tensor, bar: Tensor, keys: tuple[Tensor, Tensor, Tensor], words: Tensor, *,
    sizes: tuple[int, int, int, int], start: int, scale: float, bits: int,
) -> tuple[tuple[int, int], list[Any], dict[str, Any]]:  # fmt: skip
    """(grid, positional arguments, constexpr arguments and launch options) of `lowbit_kernel`.

    Args:
        q: `[heads, n, D]`, last axis contiguous, the positions from `start` on. mean: fp32 `[heads, D]`. bar: fp32
            `[heads, nq * block_q]`, finite.
        keys: levels `[g, wide, W]` of the dtype of `levels`, steps fp32 `[g, wide]`, products with the mean queries fp32
            `[heads, wide]`; wide is a multiple of 256.
        sizes: rows of a query block, then sink, window and segment, in tokens.
    """
    from .shim import TensorDescriptor, gl, shared_layout

    ints, steps, extra = keys
    (h, n, d), (g, wide, width) = q.shape, ints.shape
    block, *spans = sizes
    nq, many = words.shape[1:]
    exact = ints.dtype == torch.float8_e4m3fn
    dtype, box = gl.float8e4nv if exact else gl.int8, [1, 1, 128, width]
    desc = TensorDescriptor(ints[None], [1, g, wide, width], [g * wide * width, wide * width, width, 1], box,
                            shared_layout(box, dtype))  # fmt: skip
    args = [
        desc, q, mean, bar, steps, extra, words, scale, n, start, start // block, nq, many, *spans,
        q.stride(0), q.stride(1), wide,
    ]  # fmt: skip
    options = dict(
        FLAT=shared_layout([128, width], dtype), GROUP=h // g, BLOCK=block, ACC=gl.float32 if exact else gl.int32,
        TOP=2 ** (bits - 1) - 1, D=d, W=width, STAGES=STAGES, num_warps=4, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip
    return (-(-nq * block // ROWS), h), args, options
