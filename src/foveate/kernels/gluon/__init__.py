"""Prefill forward on Hopper GPUs, in Gluon (Triton's low-level dialect), at D 64 or 128.

It serves tiles and single keys per query block (of 64 rows, or any multiple of 128), diagonals + columns, sink + window,
and dense layouts.

`kernel.py` is the kernel with its consumers, `feed.py` its producer (`tile.py` says what it feeds for a tile),
`columns.py` the gather of single keys, `masks.py` the masks; `prepare.py` turns a Layout into its lists (`factored.py` one
of diagonals + columns), `launch.py` calls it, `shim.py` holds what depends on the version of Triton. `private*.py` are the
same for lists of 64-row blocks that a head has for itself, or that begin inside a block. None of these is imported before a
call that this backend could serve, so that a machine without Triton or without a GPU gets a reason instead of an error.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ..base import Want

NAME = "gluon"
Run = Callable[[Tensor, Tensor, Tensor, Layout, float], tuple[Tensor, Tensor]]
LONGEST = 1 << 24  # rows or keys; key numbers and steps are 32-bit words in the kernel
_HERE = nullcontext()


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
    if kv.kind != "dense":
        return f"it reads dense storage, not {kv.kind}"
    if (why := _unserved_layout(layout)) is not None:
        return why
    _, g, _, _, dv = kv.shape
    if not _private(layout) and (why := _unpaired(layout, g)) is not None:
        return why
    if kv.len is not None or kv.bias is not None:
        return "it has no rows of different length and no entry weights"
    if kv.pos is not None and layout.causal:
        return "positions are not entry numbers"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    d = q.shape[-1]
    if d not in (64, 128) or dv != d:
        return f"it has head dims 64 and 128 with values as wide as keys, not {d} and {dv}"
    if not _hopper(q.device):
        return "it needs a Hopper GPU"
    return _missing()


@cache
def _hopper(device: torch.device) -> bool:
    here = device.type == "cuda" and torch.version.hip is None  # AMD's gfx9 call themselves 9, too
    return here and torch.cuda.get_device_capability(device)[0] == 9


def _unserved_layout(layout: Layout) -> str | None:
    b, h, n, m = layout.shape
    if layout.q_pos is not None and layout.causal:
        return "query positions are not the last N"
    if max(n, m, b * h * -(-n // 64)) > LONGEST:
        return f"more than {LONGEST} rows, keys or tiles"
    if layout.full or layout.has_rule:
        return _unserved_rule(layout) if n >= 128 else f"{n} query rows leave most of its 128-row tiles empty"
    if layout.columns is not None or layout.diagonals is not None:
        return _unserved_factored(layout)
    if layout.tiles is None and layout.entries is None:
        return "the layout names nothing"
    if layout.block_q % 128 and layout.block_q != 64:
        return f"it has query blocks of 64, 128, 256, 384 ... rows, not {layout.block_q}"
    if layout.block_q % 128 == 0 and layout.q_offset % 128:
        return f"its tiles of 128 rows cannot be cut: q_offset must be a multiple of 128, not {layout.q_offset}"
    if layout.q_offset and n < 64:
        return f"{n} query rows that begin inside a query block leave most of its 128-row tiles empty"
    if layout.tiles is not None and layout.tile_width not in (32, 64, 128):
        return f"it has tiles of 32, 64 and 128 keys, not {layout.tile_width}"
    if layout.tiles is not None and layout.entries is not None and layout.tile_width == 32:
        return "it has tiles of 32 keys or single keys, not both"
    return None


def _unserved_factored(layout: Layout) -> str | None:
    n = layout.shape[2]
    if layout.tiles is not None or layout.entries is not None:
        return "it walks factored parts or lists of each query block, not both"
    if not layout.causal:
        return "its factored parts are causal"
    if layout.block_q not in (64, 128) or layout.q_offset:
        return f"it has query blocks of 128 rows (or 64) from row 0, not {layout.block_q} from {-layout.q_offset}"
    if layout.diagonals is not None and layout.tile_width != 64:
        return f"its diagonals are tiles of 64 keys, not {layout.tile_width}"
    return None if n >= 128 else f"{n} query rows leave most of its 128-row tiles empty"


def _unserved_rule(layout: Layout) -> str | None:
    if layout.full:
        return None
    if layout.has_lists:
        return "it has static rules (sink, window) or lists, not both"
    if layout.stride is not None:
        return "its static rules are sink and window, not strides"
    return None if layout.causal else "its static rules are causal"


def _unpaired(layout: Layout, g: int) -> str | None:
    """Lists of 64-row blocks: a tile takes two neighbouring heads, which must share K, V and the lists, from row 0. In
    factored layouts it takes two neighbouring blocks of one head."""
    if (layout.tiles is None and layout.entries is None) or layout.block_q != 64:
        return None
    h = layout.shape[1]
    lead = math.lcm(*(t.shape[1] for t in (layout.tiles, layout.entries) if t is not None))
    if h // g % 2 or h // lead % 2 or layout.q_offset:
        return (
            "query blocks of 64 rows want tiles of 32 or 64 keys, or q_offset 0 and lists that an even number of the heads "
            "of a group share"
        )
    return None


def _private(layout: Layout) -> bool:
    """Whether the kernel of `private.py` serves lists of 64-row blocks that `_unpaired` refuses."""
    return layout.tiles is None or layout.tile_width in (32, 64)


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    shared, private = _runs()
    run = shared if _unpaired(layout, kv.k.shape[1]) is None else private
    with _on(q.device):
        out, lse = run(q, kv.k, kv.v, layout, scale)
    return out, lse if want.lse else None, None


@cache
def _runs() -> tuple[Run, Run]:
    """Forward of everything but, and of, lists of 64-row blocks that each head has for itself: (q, k, v, layout, scale) in,
    (out, lse) out. Imported by the first call, looked up once."""
    from . import launch, prepare, private

    def shared_lists(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        return launch.run(q, k, v, layout, prepare.prepare(layout, q.device), scale)

    def private_lists(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
        return private.run(q, k, v, layout, private.prepare(layout, q.device), scale)

    return shared_lists, private_lists


def _on(device: torch.device) -> AbstractContextManager[object]:
    """`torch.cuda.device`, which costs more than to find out that there is nothing to do."""
    return _HERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)
