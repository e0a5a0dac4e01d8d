"""Prefill forward on Hopper GPUs, in Gluon (Triton's low-level dialect): aligned tiles and dense layouts, D 64 or 128.

`kernel.py` is the kernel, `prepare.py` turns a Layout into its lists, `launch.py` calls it, `shim.py` holds what depends
on the version of Triton. None of these is imported before a call that this backend could serve, so that a machine
without Triton or without a GPU gets a reason instead of an error.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ..base import Want

NAME = "gluon"
LONGEST = 1 << 24  # rows or keys; key numbers and steps are 32-bit words in the kernel


@cache
def _missing() -> str | None:
    """The reason Gluon cannot be used in this installation."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from . import shim  # noqa: F401
    except (ImportError, AttributeError) as err:
        return f"this Triton has no Gluon that the kernel knows ({err})"
    return None


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if want.mass or want.softcap:
        return "it returns no mass and has no softcap"
    if (why := _unserved_layout(layout)) is not None:
        return why
    if kv.kind != "dense":
        return f"it reads dense storage, not {kv.kind}"
    if kv.len is not None or kv.bias is not None:
        return "it has no rows of different length and no entry weights"
    if kv.pos is not None and layout.causal:
        return "positions are not entry numbers"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128) or kv.shape[4] != q.shape[-1]:
        return f"it has head dims 64 and 128 with values as wide as keys, not {q.shape[-1]} and {kv.shape[4]}"
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a Hopper GPU"
    return _missing()


def _unserved_layout(layout: Layout) -> str | None:
    b, h, n, m = layout.shape
    if layout.q_pos is not None and layout.causal:
        return "query positions are not the last N"
    if max(n, m, b * h * -(-n // 128)) > LONGEST:
        return f"more than {LONGEST} rows, keys or tiles"
    if layout.full:
        return None if n >= 128 else f"{n} query rows leave most of its 128-row tiles empty"
    if layout.has_rule:
        return "it has no static rules (sink, window, stride)"
    if layout.entries is not None or layout.columns is not None or layout.diagonals is not None:
        return "it walks tiles, not single entries or factored parts"
    if layout.tiles is None:
        return "the layout names nothing"
    if layout.block_q != 128 or layout.q_offset:
        return f"it has query blocks of 128 rows from row 0, not {layout.block_q} from {-layout.q_offset}"
    if layout.tile_width not in (64, 128):
        return f"it has tiles of 64 and 128 keys, not {layout.tile_width}"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from .launch import run
    from .prepare import prepare

    with torch.cuda.device(q.device):
        out, lse = run(q, kv.k, kv.v, layout, prepare(layout, q.device), scale)
    return out, lse if want.lse else None, None
