"""Block lists and dense layouts on FlashAttention-4 (the optional package `flash-attn-4`), forward and backward, Hopper.

Its kernels walk two lists of aligned key blocks per query block: blocks that every row sees whole, and blocks under a
mask, here the causal one. Its backward walks the transposed lists, query blocks per key block, in blocks of 128 keys;
they are built here, on the device. Lists that are shared by heads are written out for each.

Measured on an H100 in bf16: over lists of 32,768 tokens and more it is slower forward than `gluon` at every density
(`benchmarks/results/h100_blocks_fa4.json`), so `auto` never takes it there. Its backward pass made 630 TFLOP/s on dense
layouts (cuDNN 553, `triton` 398) and is faster than `triton` over lists of a density above 0.25. Of these `auto` takes
the dense ones: how dense lists are, and whether their tiles lie on the grid (any others would be wrong here), is known to
the device alone, and asking costs a synchronisation. Who names this backend pays for the second question, once a call and
once more in its backward pass.

Source: Dao 2023 (arXiv 2307.08691); Zadouri et al. 2026, FlashAttention-4.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..lists import compact, repeat_heads, used_slots
from .base import Want

NAME = "fa4"
GRID = 128  # rows of its query tiles; keys of its key blocks in the backward pass
WIDTHS = (64, 128)  # keys of a block it was tested with, forward
HEAD_DIMS = (64, 128)
FULL = 250  # `Layout.share` above which its backward pass over lists was measured to be faster than ours
PAYS = 8192  # rows and keys from which a dense backward pass was measured to be faster
SCRATCH = 1 << 24  # blocks of the transposed table in use at once
_FORWARD = ("softmax_scale", "causal", "pack_gqa", "mask_mod", "block_sparse_tensors", "return_lse", "out")
_BACKWARD = ("softmax_scale", "causal", "deterministic", "dq", "dk", "dv", "mask_mod", "block_sparse_tensors", "dlse")


# ---------------------------------------------------------------------- what it can serve
@cache
def missing() -> str | None:
    """The reason FlashAttention-4 cannot be used in this installation."""
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch  # noqa: B018
    except Exception as err:  # its libraries look for a driver and more when they are imported
        return f"flash-attn-4 is not installed here, or cannot be imported ({type(err).__name__}: {err})"
    for name, needed in (("_flash_attn_fwd", _FORWARD), ("_flash_attn_bwd", _BACKWARD)):
        known = inspect.signature(getattr(interface, name)).parameters if hasattr(interface, name) else {}
        if lacking := [x for x in needed if x not in known]:
            return f"this version of flash-attn-4 has no {name} with {', '.join(lacking)}"
    return None


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if want.mass or want.softcap:
        return "it returns no mass and has no softcap here"
    if (why := _unserved(q, kv, layout)) is not None:
        return why
    return _off_grid(layout)


def backward_supports(q: Tensor, kv: KV, layout: Layout, softcap: float) -> str | None:
    """The reason this backward pass cannot serve a call, or None."""
    if softcap:
        return "its backward pass has no softcap here"
    if (why := _unserved(q, kv, layout)) is not None:
        return why
    if layout.tiles is not None and layout.tile_width != GRID:
        return f"its backward pass has blocks of {GRID} keys, not {layout.tile_width}"
    if layout.tiles is not None and torch.are_deterministic_algorithms_enabled():
        return "its backward pass over lists adds in any order, and deterministic algorithms were asked for"
    return _off_grid(layout)


def backward_pays(q: Tensor, kv: KV, layout: Layout) -> bool:
    """`auto` takes this backward pass: long dense layouts, and long lists known to be dense. Reads no device value."""
    return (layout.full or layout.share > FULL) and min(layout.shape[2:]) >= PAYS


def _unserved(q: Tensor, kv: KV, layout: Layout) -> str | None:
    """What shapes and the installation say, the cheap questions first."""
    _, _, n, m = layout.shape
    if layout.has_rule or any(getattr(layout, name) is not None for name in ("entries", "diagonals", "columns")):
        return "it walks blocks, not rules, single entries or factored parts"
    if layout.tiles is None and not layout.full:
        return "the layout names nothing"
    if layout.tiles is not None:
        if layout.block_q % GRID or layout.q_offset:
            return f"it has query blocks of whole {GRID} rows from row 0, not {layout.block_q} from {-layout.q_offset}"
        if layout.tile_width not in WIDTHS:
            return f"it has key blocks of 64 and 128, not {layout.tile_width}"
    if kv.kind != "dense" or kv.len is not None or kv.bias is not None:
        return "it reads dense storage without lengths and entry weights"
    if layout.causal and (layout.q_pos is not None or kv.pos is not None):
        return "positions are not entry numbers"
    if n < GRID or (layout.causal and n > m):
        return f"it is asked for {GRID} rows or more, and no more rows than keys, not for {n} rows and {m} keys"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS or kv.shape[4] != q.shape[-1]:
        return f"it has head dims 64 and 128 with values as wide as keys, not {q.shape[-1]} and {kv.shape[4]}"
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a Hopper GPU here"
    return missing()


def _off_grid(layout: Layout) -> str | None:
    """Whether every tile begins on the grid: the one question about data (one synchronisation)."""
    tiles, count = layout.tiles, layout.tile_count
    if tiles is None or count is None or layout.share >= 0:  # a validation has looked
        return None
    if tiles.is_cuda and torch.cuda.is_current_stream_capturing():
        return "whether tiles lie on its grid cannot be asked while a CUDA graph is captured"
    if bool((used_slots(tiles, count) & (tiles % layout.tile_width != 0)).any()):
        return f"its tiles lie on a grid of {layout.tile_width} keys, and these do not"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None if layout.full else (layout.block_q, layout.tile_width)


# ---------------------------------------------------------------------- from a layout to its lists
def forward_lists(layout: Layout) -> dict[str, Tensor]:
    """int32 `full_block_cnt` and `mask_block_cnt` `[B|1, H|1, nq]`, `full_block_idx` and `mask_block_idx` `[.., nq, T]`.

    Whole blocks are the first of an ascending row, the blocks that causality cuts follow, what no row sees is left out.
    A last key block that is not filled is always the last of its list, where the kernel looks at the length.
    """
    tiles, count = layout.tiles, layout.tile_count
    assert tiles is not None and count is not None
    tiles = tiles[..., : -(-layout.shape[3] // layout.tile_width)]  # no row names more blocks than there are
    if tiles.shape[-1] == 0:
        tiles = tiles.new_zeros((*tiles.shape[:-1], 1))
    w, width, (first, last) = layout.tile_width, tiles.shape[-1], _rows(layout)
    used = used_slots(tiles, count)
    whole = (used & (tiles + (w - 1) <= first[:, None])).sum(-1, dtype=torch.int32)
    seen = (used & (tiles <= last[:, None])).sum(-1, dtype=torch.int32)
    cut = min(width, -(-(layout.block_q - 1) // w) + 1 if layout.causal else 1)  # no more blocks of a row are cut
    at = whole[..., None] + torch.arange(cut, device=tiles.device)
    blocks = tiles // w
    masked = blocks.gather(-1, at.clamp(max=width - 1))
    return _per_head(
        layout, dict(full_block_cnt=whole, full_block_idx=blocks, mask_block_cnt=seen - whole, mask_block_idx=masked)
    )


def backward_lists(layout: Layout) -> dict[str, Tensor]:
    """The same for the backward pass: `[B|1, H|1, nk]` and `[.., nk, nq]`, query blocks of each key block, ascending.

    A table of list head x key block x query block is made some list heads at a time.
    """
    tiles, count = layout.tiles, layout.tile_count
    assert tiles is not None and count is not None
    (b, hl, nq, _), w = tiles.shape, layout.tile_width
    nk = -(-layout.shape[3] // w)
    first, last = _rows(layout)
    start = torch.arange(nk, device=tiles.device)[:, None] * w
    whole, seen = start + (w - 1) <= first, start <= last
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, SCRATCH // (b * nk * nq))
    for lo in range(0, hl, step):
        index, used = tiles[:, lo : lo + step], used_slots(tiles, count)[:, lo : lo + step]
        named = torch.zeros(*index.shape[:3], nk + 1, dtype=torch.bool, device=tiles.device)
        named.scatter_(-1, torch.where(used, index // w, nk).long(), True)
        named = named[..., :nk].transpose(-1, -2)
        parts.append((*compact(named & whole), *compact(named & seen & ~whole)))
    names = ("full_block_idx", "full_block_cnt", "mask_block_idx", "mask_block_cnt")
    made = {name: torch.cat(column, 1) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
    cut = min(nq, -(-(w - 1) // layout.block_q) + 1 if layout.causal else 1)  # no more query blocks cut a key block
    made["mask_block_idx"] = made["mask_block_idx"][..., :cut]
    return _per_head(layout, made)


def _rows(layout: Layout) -> tuple[Tensor, Tensor]:
    """Positions int64 `[nq]` of the first and the last row of each query block; all after the last key if not causal."""
    _, _, n, m = layout.shape
    lo = torch.arange(0, n, layout.block_q, device=layout.device)
    if not layout.causal:
        far = torch.full_like(lo, m + layout.tile_width)
        return far, far
    return lo + (m - n), (lo + layout.block_q).clamp(max=n) + (m - n - 1)


def _per_head(layout: Layout, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lists for every query head, or one for all; contiguous."""
    h = layout.shape[1]
    return {name: (t if t.shape[1] == 1 else repeat_heads(t, h)).contiguous() for name, t in made.items()}


def sparse(layout: Layout, made: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments that hand lists to the kernels."""
    tensors = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    mask = None
    if layout.causal:
        from . import fa4_masks

        mask = fa4_masks.causal_square if layout.shape[2] == layout.shape[3] else fa4_masks.causal_last
    return dict(mask_mod=mask, block_sparse_tensors=tensors(**made, block_size=(layout.block_q, layout.tile_width)))


# ---------------------------------------------------------------------- the calls
def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    interface = importlib.import_module("flash_attn.cute.interface")
    sign, scale = _positive(scale)
    how = dict(causal=layout.causal) if layout.full else dict(sparse(layout, forward_lists(layout)), pack_gqa=False)
    out = torch.empty(*q.shape[:3], kv.shape[4], dtype=q.dtype, device=q.device)
    with torch.cuda.device(q.device):
        result = interface._flash_attn_fwd(
            *_turned(q if sign == 1 else q * sign, kv.k, kv.v), softmax_scale=scale, return_lse=True,
            out=out.transpose(1, 2), **how,
        )  # fmt: skip
    return out, result[1] if want.lse else None, None


def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, kv: KV, layout: Layout, out: Tensor, lse: Tensor, *, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients (dq `[B, H, N, D]`, dk, dv `[B, G, M, D]`, None) for a call that `backward_supports`, in the dtype of q.

    dout `[B, H, N, D]` and dlse fp32 `[B, H, N]` are the gradients of both outputs, out and lse those outputs.
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    sign, scale = _positive(scale)
    how: dict[str, Any] = dict(causal=layout.causal, deterministic=torch.are_deterministic_algorithms_enabled())
    if not layout.full:
        how = sparse(layout, backward_lists(layout))
    dq, dk, dv = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, kv.k, kv.v))
    with torch.cuda.device(q.device):
        interface._flash_attn_bwd(
            *_turned(q if sign == 1 else q * sign, kv.k, kv.v, out, dout), lse.contiguous(), softmax_scale=scale,
            dq=dq.transpose(1, 2), dk=dk.transpose(1, 2), dv=dv.transpose(1, 2), dlse=dlse.contiguous(), **how,
        )  # fmt: skip
    return dq if sign == 1 else dq * sign, dk, dv, None


def _positive(scale: float) -> tuple[int, float]:
    """(factor of q, scale): its running maximum is taken before scaling, so that scales have to be above 0."""
    return (1, scale) if scale > 0 else (-1, -scale) if scale < 0 else (0, 1.0)


def _turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, N, D]` as the views `[B, N, H, D]` it takes; detached, since it looks at who needs gradients."""
    return tuple(t.detach().transpose(1, 2) for t in tensors)
