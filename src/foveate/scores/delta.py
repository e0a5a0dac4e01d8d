"""Keys as deltas: a running reference per element that moves only where a key is far enough from it.

The delta networks of Neil et al. 2017 (arXiv 1612.05571), as DeltaLLM applies them to keys (Qi et al. 2025, arXiv
2507.19608).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .keys import pieces

TABLES = 32  # numbers held for each element of a piece: two tables of about 11 levels, and a few indices
MOST = 1 << 26  # such numbers at once (256 MiB): for 8 kv heads of 128, pieces of 2,048 tokens


def references(k: Tensor, theta: float, before: Tensor | None = None) -> Tensor:
    """The reference after each key: that of the token before, in every element that differs from it by less than theta;
    where it differs by theta or more, the element of the key itself.

    Exactly the recurrence, without a loop over tokens: pieces of bounded memory follow each other, and inside one the
    next token at which a reference would move is found for all tokens at once.

    Args:
        k: `[B, G, M, D]`, keys in text order. theta: >= 0; 0 gives the keys.
        before: the reference after the token before the first, `[B, G, D]`; None: the first key itself.

    Returns:
        `[B, G, M, D]`, in the dtype of k. Element by element |k - reference| < theta, or they are equal. Nothing waits for
        the device.
    """
    b, g, m, d = k.shape
    now = k[:, :, 0] if before is None else before
    out = torch.empty_like(k, memory_format=torch.contiguous_format)
    for lo, hi in pieces(m, TABLES * b * g * d, MOST):
        out[:, :, lo:hi] = _follow(torch.cat([now[:, :, None], k[:, :, lo:hi]], 2), theta)[:, :, 1:]
        now = out[:, :, hi - 1]
    return out


def advance(k: Tensor, before: Tensor, theta: float) -> Tensor:
    """One step of `references`: k and the reference before it, both `[..., D]`."""
    return torch.where((_wide(k) - _wide(before)).abs() >= theta, k, before)


def zero_share(reference: Tensor) -> Tensor:
    """The share of deltas that are zero, fp32 `[B, G]`: of the multiplications that q . k needs through deltas, those
    saved. The first key counts as all non-zero."""
    moved = (reference[:, :, 1:] != reference[:, :, :-1]).sum((2, 3)) + reference.shape[-1]
    return 1 - moved / (reference.shape[2] * reference.shape[3])


def _follow(k: Tensor, theta: float) -> Tensor:
    """`references` of `[B, G, n, D]` whose first row is a reference, by doubling: log2(n) steps over all elements."""
    x = _wide(k).transpose(-1, -2).contiguous()  # [B, G, D, n]
    n = x.shape[-1]
    levels = max(1, (n - 1).bit_length())
    high, low = [x], [x]  # at level l, the largest and smallest of 2^l elements from each on
    for level in range(levels - 1):
        high.append(torch.maximum(high[-1], _later(high[-1], 1 << level, float("-inf"))))
        low.append(torch.minimum(low[-1], _later(low[-1], 1 << level, float("inf"))))
    # The first later element that is theta or more away: walk over the longest runs that hold none.
    step = torch.arange(1, n + 1, device=x.device).expand(x.shape)
    for level in reversed(range(levels)):
        at = step.clamp(max=n - 1)
        moves = (high[level].gather(-1, at) - x >= theta) | (x - low[level].gather(-1, at) >= theta)
        step = torch.where(moves & (step < n), step, step + (1 << level)).clamp(max=n)
    # Which elements a chain of such steps from the first one meets: twice as far every time.
    met = torch.zeros(*x.shape[:-1], n + 1, dtype=torch.bool, device=x.device)
    met[..., 0] = True
    step = pad(step, (0, 1), value=n)
    for _ in range(levels):
        met |= torch.zeros_like(met).scatter_(-1, torch.where(met, step, n), True)
        step = step.gather(-1, step)
    number = torch.arange(n, device=x.device)
    last = torch.where(met[..., :n], number, 0).cummax(-1).values
    return k.gather(2, last.transpose(-1, -2))


def _later(x: Tensor, by: int, value: float) -> Tensor:
    return pad(x[..., by:], (0, by), value=value)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
