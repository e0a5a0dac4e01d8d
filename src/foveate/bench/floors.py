"""What no method can go below: the pairs that an oracle needs for a share of the attention mass, by the unit it chooses in.

The oracle knows every probability. Its unit is a group of neighbouring rows times a group of neighbouring keys, as those
of a method's lists are; it takes whole units, of all heads together the ones with the most mass a visible pair, until the
mean over rows and heads holds the share. So heads whose mass lies in few pairs keep more of it than the share, and flat
ones less, where that is cheaper: the floor of settings by head. Time N x M for the sampled rows, memory a few of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..methods.base import AttnInput
from .prefill import KINDS, kind_of

UNITS = ((1, 1), (64, 1), (128, 1), (2048, 1), (64, 32), (64, 64), (128, 64), (128, 128))  # (rows: 1 or 64s, keys)
BASE = 64  # rows that all larger units are made of
GROUPS = 4  # stretches of rows that are looked at, evenly spread
BINS, LOW = 4096, -40.0  # of the logarithm of mass a pair, from LOW to 0
HELD = 1 << 26  # logits at a time, beside the probabilities of a stretch (2048 rows: 1 GiB at 128K)
SINGLE = 16  # rows of a stretch whose own keys are looked at


def floors(x: AttnInput, share: float = 0.95) -> dict[str, dict[str, float]]:
    """For each unit ("128 x 64") of a call with B = 1 and at least 256 rows: "density", the part of all visible pairs that
    holds `share` of the mass, and of each kind of head "KIND mass" and "KIND density" at that choice. Units of more rows
    than a quarter of the call (to the 64) have that many."""
    h, n = x.q.shape[1:3]
    size = min(max(rows for rows, _ in UNITS), n // GROUPS // BASE * BASE)
    kinds, every = list(dict.fromkeys(KINDS)), max(1, size // SINGLE)
    tables = {unit: torch.zeros(2, len(kinds), BINS, dtype=torch.float64, device=x.device) for unit in UNITS}
    for begin in [min((2 * i + 1) * n // (2 * GROUPS), n - size) // BASE * BASE for i in range(GROUPS)]:
        at = torch.arange(begin, begin + size, device=x.device)
        key = torch.arange(begin + size, device=x.device)
        seen = torch.stack([(part[:, None] >= key).sum(0, dtype=torch.float32) for part in at.split(BASE)])
        single = (at[::every, None] >= key).float()
        for head in range(h):
            kind = kinds.index(kind_of(head, h, x.groups))
            p = _probabilities(x, head, at, key)
            each, some = p[::every], p.unflatten(0, (-1, BASE)).sum(1)
            for rows, keys in UNITS:
                pair = (each, single) if rows == 1 else (some, seen)
                _add(tables[rows, keys][:, kind], *(_pooled(t, max(1, min(rows, size) // BASE), keys) for t in pair))
    return {f"{rows} x {keys}": _found(tables[rows, keys], kinds, share) for rows, keys in UNITS}


def _probabilities(x: AttnInput, head: int, at: Tensor, key: Tensor) -> Tensor:
    """fp32 `[rows, keys]`: the softmax of the rows `at` of one head over the keys 0.. to the last of them."""
    k = x.kv.k[0, head * x.groups // x.q.shape[1], : len(key)].float()
    p = torch.empty(len(at), len(key), device=x.device)
    step = max(1, HELD // len(key))
    for lo in range(0, len(at), step):
        rows = at[lo : lo + step]
        s = (x.q[0, head, rows].float() @ k.T) * x.scale
        p[lo : lo + step] = s.masked_fill_(rows[:, None] < key, -math.inf).softmax(-1)
    return p


def _pooled(t: Tensor, rows: int, keys: int) -> Tensor:
    """Sums over `rows` x `keys` neighbours of `[R, M]`, flat; the last ones may have fewer."""
    t = pad(t, (0, -t.shape[1] % keys, 0, -t.shape[0] % rows))
    return t.unflatten(1, (-1, keys)).sum(-1).unflatten(0, (-1, rows)).sum(1).flatten()


def _add(table: Tensor, mass: Tensor, pairs: Tensor) -> None:
    """Add units to fp64 `[2, BINS]`, mass and visible pairs by the logarithm of mass a pair."""
    place = ((mass / pairs.clamp(min=1)).clamp(min=1e-30).log() - LOW) * (BINS / -LOW)
    place = place.clamp(0, BINS - 1).long()
    for total, t in zip(table, (mass, pairs), strict=True):
        total.index_add_(0, place, t.double())


def _found(table: Tensor, kinds: list[str], share: float) -> dict[str, float]:
    """The choice that holds `share` of all mass, from the bins of most mass a pair down."""
    down = table.flip(-1).cumsum(-1)  # [mass | pairs, kind, bins]
    held, total = down[0].sum(0), down[0, :, -1].sum()
    stop = int((held < share * total).sum().clamp(max=BINS - 1))
    out = {"density": float(down[1, :, stop].sum() / down[1, :, -1].sum())}
    for i, kind in enumerate(kinds):
        if float(down[0, i, -1]):
            out[f"{kind} mass"] = float(down[0, i, stop] / down[0, i, -1])
            out[f"{kind} density"] = float(down[1, i, stop] / down[1, i, -1])
    return {name: round(value, 4) for name, value in out.items()}
