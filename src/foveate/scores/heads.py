"""Which block columns and block diagonals a head needs, by a probe, and whether pooled blocks may be trusted for it.

Lai et al. 2025, "FlexPrefill: A Context-Aware Sparse Attention Mechanism" (arXiv 2502.20766).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..select import top_k
from . import fused
from .divergence import jensen_shannon
from .pooled import block_logits, block_pool
from .probes import Probe, needed


def head_blocks(
    probe: Probe,
    mean: Tensor,
    kbar: Tensor,
    m: int,
    share: float | Tensor,
    *,
    tau: float,
    least: int,
    most: int,
    block: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block columns and block diagonals of each head, bool `[B, H, nk]` twice, and bool `[B, H]`, "aware" heads.

    A head takes the blocks with the most mass, as many as the tokens fill that hold `share` of it, at least `least` and at
    most `most`, the first one always in. It is aware where the mean query predicts the mass of each key block to within a
    Jensen-Shannon distance of tau, and then takes `least`.

    Args:
        probe: rows at the end of a call, over the first m entries. mean: fp32 `[B, H, D]`, the mean of their queries.
        share: one number, or one a head `[1 or B, H]`.
        kbar: pooled keys `[B, G, nk, D]`, nk = ceil(m / block).

    Nothing waits for the device; on a GPU two kernels do all but count the tokens.
    """
    args = dict(tau=tau, least=least, most=most, block=block, scale=scale, softcap=softcap)
    many = needed(probe, m, share)
    if (kernels := fused.heads(probe.columns[..., :1])) is not None and kbar.shape[2] <= kernels.BLOCKS:
        both: tuple[Tensor, Tensor, Tensor] = kernels.head_blocks(
            probe.columns, probe.diagonals, probe.rows, m, torch.stack(many), mean, kbar, **args
        )
        return both
    columns = block_pool(probe.columns[..., :m, None] / probe.rows, block, "sum")[..., 0]
    estimate = block_logits(mean[:, :, None], kbar, scale, softcap).softmax(-1)[:, :, 0]
    aware = jensen_shannon(estimate, columns) < tau
    forced = torch.arange(columns.shape[-1], device=columns.device) == 0
    out = []
    for tokens, blocks, extra in (
        (many[0], columns, 1),
        (many[1], block_diagonals(probe.diagonals[..., :m] / probe.rows, block), 2),
    ):
        need = torch.where(aware, least, (tokens // block + extra).clamp(least, most))
        out.append(top_k(blocks, need, forced=forced))
    return out[0], out[1], aware


def block_diagonals(by_distance: Tensor, size: int) -> Tensor:
    """Mass by distance `[..., m]` -> by block diagonal `[..., ceil(m / size)]`.

    Rows at all offsets within a block are equally likely: distance D * size + e joins blocks that are D apart for
    (size - e) / size of them and D + 1 apart for the others.
    """
    nk = -(-by_distance.shape[-1] // size)
    x = pad(by_distance, (0, nk * size - by_distance.shape[-1])).unflatten(-1, (nk, size))
    over = torch.arange(size, device=x.device) / size
    near, far = (x * (1 - over)).sum(-1), (x * over).sum(-1)
    return near + pad(far, (1, -1))
