"""Block layouts on compiled FlexAttention: whole blocks without mask work, the edges under an exact mask. Inference.

It serves layouts made of whole key blocks (aligned tiles, strides), alone or beside a static rule. Blocks of which
every pair is named run unmasked. The others, at the diagonal and where a rule cuts through, run under a mask that asks
which keys are visible and named: pairs outside the layout are never attended (but a NaN in a touched block reaches the
rows of that block). Refused because the `torch` backend was faster on the CPU in every measurement: single keys,
diagonals, unaligned tiles; and there also a rule alone (unless it has a softcap), and bf16 without AVX512.

Compilation is `dynamic=True`: one kernel serves all lengths. What does force another kernel (dtype, heads, head dim,
grid, scale, threads) is in the key of `_kernels`, and each kernel has a code object of its own: torch counts recompiles
per code object, and beyond its limit flex would run eager over N x M. `fullgraph=True` turns that into an error, which
`supports` gives as its reason from then on, and a kernel that finds itself run eagerly raises.

Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(arXiv 2412.05496).
"""

from __future__ import annotations

import math
import os
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.nn.functional import pad

from .. import lists
from ..errors import UnsupportedError
from ..kv import KV
from ..layout import NO_LIMIT, Layout
from ..lists import repeat_heads
from .base import Want

NAME = "flex"
BLOCK = 128  # the grid where the layout does not ask for a finer one
MIN_BLOCK = 16  # finer grids spend their time on overhead
MIN_PAIRS = 1 << 20  # N * M below which no prompt earns back a compilation
MAX_KERNELS = 32  # compilations of several seconds each that one process may ask for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Key = tuple[Any, ...]
_kernels: dict[Key, Callable[..., Any]] = {}
_failed: dict[Key, str] = {}  # kernels that could not be built, with the reason


# ---------------------------------------------------------------------- what it can serve
def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    _, _, n, m = layout.shape
    device = q.device.type
    if device not in ("cpu", "cuda"):
        return f"compiled for the CPU and CUDA only, not for {device}"
    if want.grad:
        return "inference only: compiled FlexAttention has no backward pass on the CPU, and none is built here"
    if want.mass:
        return "it does not return the attention mass"
    if want.lse and device == "cpu":
        return "compiled FlexAttention returns no lse on the CPU"
    if q.dtype not in DTYPES:
        return f"no kernel for {_name(q.dtype)}"
    if kv.kind != "dense":
        return f"it reads dense storage, not {kv.kind}"
    if kv.len is not None or kv.bias is not None:
        return "rows of different length and entry weights would put a mask on every block"
    if kv.pos is not None or layout.q_pos is not None:
        return "positions are not entry numbers"
    if n == 1:
        return "decode reads few keys for one row: gathering them is faster"
    if (why := _not_blocks(layout)) is not None:
        return why
    grid = _grid(layout)
    if not bool(_corners(layout, grid)[1].all()):
        return "some rows name the blocks at the diagonal and others do not, beside a rule: that needs a mask per block"
    if device == "cuda" and grid != (BLOCK, BLOCK):
        return f"on CUDA its blocks are {BLOCK} x {BLOCK}; this layout needs {grid[0]} x {grid[1]}"
    if n <= grid[0] or m <= grid[1] or n * m < MIN_PAIRS:
        return f"{n} x {m} is too short to earn back a compilation of several seconds"
    if device == "cpu" and (why := _no_gain(q.dtype, layout, want)) is not None:
        return why
    if device == "cpu" and (why := _cannot_compile(os.environ.get("CXX", "g++"), os.environ.get("PATH", ""))) is not None:
        return why
    case = _case(q, kv, grid, want)
    for key, why in _failed.items():
        if key[: len(case)] == case:
            return why
    if len(_kernels) >= MAX_KERNELS and not any(key[: len(case)] == case for key in _kernels):
        return f"this process has compiled {MAX_KERNELS} kernels already and this call needs another"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_blocks(layout: Layout) -> str | None:
    """Why a layout is not made of whole key blocks of a grid."""
    if layout.entries is not None or layout.columns is not None:
        return "single keys would touch nearly every block: gathering them is faster"
    if layout.diagonals is not None:
        return "diagonals lie off the grid of blocks: gathering their tiles is faster"
    bq, bk = _grid(layout)
    if bq < MIN_BLOCK:
        return f"query blocks of {layout.block_q} rows fit no grid of blocks of {MIN_BLOCK} to {BLOCK} rows"
    if bk < MIN_BLOCK:
        return f"key blocks of {layout.tile_width} fit no grid of blocks of {MIN_BLOCK} to {BLOCK} keys"
    if layout.tiles is not None:
        used = torch.arange(layout.tiles.shape[-1], device=layout.device) < layout.tile_count[..., None]  # type: ignore[index]
        if bool((used & (layout.tiles % bk != 0)).any()):
            return f"tiles lie off the grid of {bk} keys: gathering them is faster"
    return None


def _no_gain(dtype: torch.dtype, layout: Layout, want: Want) -> str | None:
    """What the CPU can compute here, but never faster than the backends behind this one."""
    if layout.tiles is None and layout.stride is None and not want.softcap:
        return "a rule alone, and dense layouts, are read in place by other backends, which is faster"
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not capability.startswith("AVX512")):
        return f"{_name(dtype)} on {capability} is no faster than gathering the tiles"
    return None


@cache
def _cannot_compile(compiler: str, path: str) -> str | None:
    """Why kernels cannot be built on this machine's CPU, asked once per compiler and search path."""
    if shutil.which(compiler, path=path) is None:
        return f"no C++ compiler: {compiler!r} was not found (install g++ or set CXX)"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"compiled FlexAttention needs a CPU with AVX2 or AVX512; this one runs as {capability}"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    """The aligned grid (block_q, block_k) that is computed; None for a layout it does not serve."""
    return None if _not_blocks(layout) is not None else _grid(layout)


def _grid(layout: Layout) -> tuple[int, int]:
    """A rule has neither query blocks nor key blocks and takes the coarsest grid."""
    blocked = layout.tiles is not None or layout.stride is not None
    return (
        math.gcd(layout.block_q, BLOCK) if layout.tiles is not None else BLOCK,
        math.gcd(layout.tile_width, BLOCK) if blocked else BLOCK,
    )


# ---------------------------------------------------------------------- the run
def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Raises UnsupportedError if the kernel cannot be built; from then on `supports` gives the reason."""
    grid = _grid(layout)
    blocks = plan_blocks(layout, grid)
    front = _front(layout)
    if front:  # rows before the first one of this call: with them, query blocks begin where the layout's do
        q = pad(q, (0, 0, front, 0))
    key = (*_case(q, kv, grid, want), scale, softcap)
    if key not in _kernels:
        _kernels[key] = _build(grid, scale, softcap, want.lse)
    # Torch compiles once more for a view and for other strides: hand over plain tensors.
    inputs = [t.to(q.device).contiguous().detach() for t in (q, kv.k, kv.v, *blocks.tensors())]
    for t in inputs[-2:]:  # what the mask reads has no symbolic sizes: the CPU template confuses their names with its own
        torch._dynamo.mark_static(t)
    try:
        # N == M is no case of its own; scale and softcap are constants of the kernel.
        with torch.no_grad(), fx_config.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):  # type: ignore[attr-defined]
            out, lse = _kernels[key](*inputs)
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as err:
        _failed[key] = f"its kernel could not be built here ({type(err).__name__}: {str(err).strip().splitlines()[0]})"
        raise UnsupportedError(f"backend 'flex': {_failed[key]}") from err
    return out[:, :, front:], None if lse is None else lse[:, :, front:], None


def _case(q: Tensor, kv: KV, grid: tuple[int, int], want: Want) -> Key:
    """What `supports` can know of a kernel's key."""
    shape = (q.shape[0], q.shape[1], kv.k.shape[1], q.shape[3], kv.v.shape[3])
    return (q.device.type, q.dtype, *shape, *grid, want.lse, torch.get_num_threads())


def _build(grid: tuple[int, int], scale: float, softcap: float, lse: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    bq, bk = grid

    def cap(s, b, h, i, j):  # type: ignore[no-untyped-def]
        return softcap * torch.tanh(s / softcap)

    def run(q, k, v, part_count, part, full_count, full, edge, rule):  # type: ignore[no-untyped-def]
        if not torch.compiler.is_compiling():
            raise UnsupportedError("backend 'flex': torch.compile is switched off, and eager FlexAttention costs N x M")

        def seen(b, h, i, j):  # type: ignore[no-untyped-def]
            ahead = j - i - edge[0]  # position of the key minus position of the row
            above = torch.maximum(i // bq * bq + edge[0], edge[2])  # first row of the query block
            last = torch.minimum(j // bk * bk + (bk - 1), edge[3])  # last key of the key block
            hit = (j < rule[0, b, h]) | (torch.abs(ahead) < rule[1, b, h]) | ((last > above) & (rule[2, b, h] > 0))
            return hit & (ahead <= edge[1])

        mask = BlockMask(
            seq_lengths=(q.shape[2], k.shape[2]),
            kv_num_blocks=part_count,
            kv_indices=part,
            full_kv_num_blocks=full_count,
            full_kv_indices=full,
            q_num_blocks=None,
            q_indices=None,
            full_q_num_blocks=None,
            full_q_indices=None,
            BLOCK_SIZE=grid,
            mask_mod=seen,
        )
        score = cap if softcap else None
        if lse:
            out, aux = flex_attention(q, k, v, score, mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True))
            return out, aux.lse
        return flex_attention(q, k, v, score, mask, scale=scale, enable_gqa=True), None

    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)


# ---------------------------------------------------------------------- from a layout to blocks
@dataclass(frozen=True)
class Blocks:
    """What a kernel walks, over nq x nk blocks of the grid.

    Attributes:
        part_count, part: int32 `[B, H, nq]`, `[B, H, nq, nk]`, blocks that run under the mask.
        full_count, full: the same for blocks of which every pair is named.
        edge: int64 `[4]`: position of row 0; how far ahead of a row its visible keys reach (0 when causal); position of
            the first real row; last key.
        rule: int64 `[3, B, H]`: sink; window; 1 where every touched block that the diagonal cuts is named whole.
    """

    part_count: Tensor
    part: Tensor
    full_count: Tensor
    full: Tensor
    edge: Tensor
    rule: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.part_count, self.part, self.full_count, self.full, self.edge, self.rule]


def _front(layout: Layout) -> int:
    """Rows to add in front so that query blocks of the grid are those of the layout."""
    return layout.q_offset if layout.tiles is not None else 0


def plan_blocks(layout: Layout, grid: tuple[int, int]) -> Blocks:
    """The blocks of `grid` that a layout touches, masked and unmasked ones apart. Costs blocks, never N x M."""
    b, h, n, m = layout.shape
    dev = layout.device
    above, below, first, last = _edges(layout, grid)
    named, (near, within) = _named(layout, grid), _ruled(layout, grid)
    touched, whole = named | near, named | within
    if layout.causal:
        touched, whole = touched & (first <= below), whole & (last <= above)
    touched, whole = touched.expand(b, -1, -1, -1), whole.expand(b, -1, -1, -1)
    part, part_count = lists.compact(touched & ~whole)
    full, full_count = lists.compact(touched & whole)
    reach = 0 if layout.causal else 2 * NO_LIMIT
    edge = torch.tensor([m - n - _front(layout), reach, m - n, m - 1], device=dev)
    rule = torch.stack([t.expand(b, h) for t in (*_rule(layout), _corners(layout, grid)[0].long())])
    return Blocks(part_count, part, full_count, full, edge, rule)


def _rule(layout: Layout) -> tuple[Tensor, Tensor]:
    """Sink and window, int64 `[Bl, H]`, 0 where the layout has none."""
    zero, h = torch.zeros(1, 1, dtype=torch.int32, device=layout.device), layout.shape[1]
    sink, window = (repeat_heads(zero if t is None else t, h).long() for t in (layout.sink, layout.window))
    return sink, window


def _edges(layout: Layout, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the first and last real row of each query block `[nq, 1]`, first and last key of key blocks `[nk]`."""
    _, _, n, m = layout.shape
    (bq, bk), dev, front = grid, layout.device, _front(layout)
    row = torch.arange(0, n + front, bq, device=dev)[:, None]
    key = torch.arange(0, m, bk, device=dev)
    shift = m - n - front
    return row.clamp(min=front) + shift, (row + bq).clamp(max=n + front) - 1 + shift, key, (key + bk).clamp(max=m) - 1


def _ruled(layout: Layout, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """bool `[Bl, H, nq, nk]`: blocks in which sink or window name a pair, and those in which one of them names all."""
    above, below, first, last = _edges(layout, grid)
    sink, window = (t[..., None, None] for t in _rule(layout))
    near, within = (last > above - window) & (window > 0), first > below - window
    if not layout.causal:
        near, within = near & (first < below + window), within & (last < above + window)
    return near | (first < sink), within | (last < sink)


def _corners(layout: Layout, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of heads `[Bl, H]`: may the mask pass every visible pair of the blocks that the diagonal cuts, because tiles or
    strides name those of them that are touched; and is one such answer a head exact."""
    if layout.sink is None and layout.window is None:  # nothing else is touched
        yes = torch.ones(1, layout.shape[1], dtype=torch.bool, device=layout.device)
        return yes & layout.causal, yes
    above, below, first, last = _edges(layout, grid)
    cut = (first <= below) & (last > above) & layout.causal
    named, (near, _) = _named(layout, grid), _ruled(layout, grid)
    every = ~(near & ~named & cut).any(-1).any(-1)
    exact = every | ~(named & cut).any(-1).any(-1)
    return every & layout.causal, exact | (_rule(layout)[1] >= sum(grid))  # so wide a window names all visible there


def _named(layout: Layout, grid: tuple[int, int]) -> Tensor:
    """bool `[Bl, H, nq, nk]`: key blocks that tiles and strides name, visible or not."""
    (bq, bk), dev = grid, layout.device
    _, h, n, m = layout.shape
    nq, nk = -(-(n + _front(layout)) // bq), -(-m // bk)
    out = torch.full((1, h, nq, nk), layout.full, device=dev)
    if layout.tiles is not None:
        rows = lists.expand(layout, 0, layout.num_blocks)
        hit = torch.zeros(*rows.start.shape[:3], nk + 1, dtype=torch.bool, device=dev)
        for at in range(0, layout.tile_width, bk):
            key = rows.start + at
            hit.scatter_(-1, torch.where(key < rows.stop, key // bk, nk), True)
        out = repeat_heads(hit[..., :nk], h).repeat_interleave(layout.block_q // bq, 2)[:, :, :nq]
    if layout.stride is not None:
        phase = torch.zeros_like(layout.stride) if layout.phase is None else layout.phase
        step, phase = (repeat_heads(t, h).long()[..., None, None] for t in (layout.stride, phase))
        cell = torch.arange(nk, device=dev) * bk // layout.tile_width
        out = out | ((step > 0) & (cell % step.clamp(min=1) == phase % step.clamp(min=1)))
    return out
