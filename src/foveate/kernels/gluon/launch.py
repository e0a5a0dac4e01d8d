"""Arguments and launch of the kernel, shared by `forward`, the offline compilation test and the benchmark."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ...layout import Layout
from ..relaunch import Arguments, Like
from ..relaunch import launch as again
from .kernel import attend_kernel
from .prepare import BLOCK_Q, Work
from .shim import TensorDescriptor, gl, shared_layout

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def run(q: Tensor, k: Tensor, v: Tensor, layout: Layout, work: Work, scale: float) -> tuple[Tensor, Tensor]:
    """(out with the strides of q, lse fp32 `[B, H, N]`). `work` is fresh from `prepare`: its counter is 0."""
    q, k, v, out, lse, scale = opened(q, k, v, scale)
    tensors = (q, k, v, out, lse, work.counter, work.tiles, work.plan, work.columns, work.cover)
    facts = (
        layout.causal, layout.full, scale, work.share, work.width, work.rule, work.block, work.group, work.ahead, work.lag,
    )  # fmt: skip

    def build() -> Arguments:
        ctas = min(grid(q, work), _multiprocessors(q.device))
        return (ctas,), *arguments(q, k, v, out, lse, layout, work, scale)

    again(attend_kernel, tensors, facts, build)
    return out, lse


def opened(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """q, k, v as TMA can read them, room for out and lse, and a scale above 0: the running maximum comes before scaling."""
    if scale <= 0:
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = readable(q), readable(k), readable(v)
    return q, k, v, torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), scale


def grid(q: Tensor, work: Work) -> int:
    """Tiles of a call: 128 rows of a head, or 64 rows of two."""
    return q.shape[0] * q.shape[1] * -(-q.shape[2] // work.block) * work.block // BLOCK_Q


def arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, work: Work, scale: float
) -> tuple[list[Any], dict[str, Any]]:
    """(positional arguments, constexpr arguments and launch options) of `attend_kernel`, for `readable` tensors."""
    b, h, n, d = q.shape
    g, m = k.shape[1], k.shape[2]
    rows, keys = [1, 1, 64, d], [1, 1, 128, d] if work.width == 128 else [1, 1, work.width, 64]
    nq = -(-n // work.block)
    cols = work.columns is not None
    steps = [s // 8 for t in (k, v) for s in t.stride()[:3]] if cols else [0] * 6  # 16 bytes: what a thread copies
    cover = work.cover
    args = [
        _descriptor(q, rows), _descriptor(k, keys), _descriptor(v, keys), _descriptor(out, rows), lse, work.counter,
        work.tiles, work.plan, work.columns if cols else work.tiles, k, v, work.plan if cover is None else cover,
        *work.strides(), *steps, work.group, work.ahead, 0 if cover is None else cover.shape[-1], work.lag, work.share,
        scale * math.log2(math.e), grid(q, work), h, g, nq, n, m,
    ]  # fmt: skip
    options = dict(
        FLAT=shared_layout([64, d], DTYPES[q.dtype]), CAUSAL=layout.causal, DENSE=layout.full, WIDTH=work.width, COLS=cols,
        RULE=work.rule, DIAG=cover is not None, BLOCK=work.block, D=d, STAGES=2 if d == 128 else 4, num_warps=4,
        maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip
    return args, options


def readable(t: Tensor) -> Tensor:
    """`t`, or a copy if TMA cannot walk it: unit stride along D, the others positive multiples of 16 bytes."""
    if t.data_ptr() % 16 == 0 and _walks(t.shape, t.stride()):
        return t
    return t.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=512)
def _walks(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(s > 0 and s % 8 == 0 for s, size in zip(strides[:-1], shape[:-1]) if size > 1)


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of `[B, H, N, D]`."""
    assert t.data_ptr() % 16 == 0
    return _like(t.shape, t.stride(), t.dtype, tuple(block)).over(t)


@lru_cache(maxsize=512)
def _like(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, block: tuple[int, ...]) -> Like:
    """The descriptor of such tensors; the stride of an axis of length 1 may be anything in torch."""
    steps = [s if size > 1 else shape[-1] for s, size in zip(strides[:-1], shape[:-1])]
    some = torch.empty(0, dtype=dtype)
    return Like.of(TensorDescriptor(some, list(shape), [*steps, 1], list(block), shared_layout(block, DTYPES[dtype])))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
