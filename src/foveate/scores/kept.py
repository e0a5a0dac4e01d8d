"""What a plan keeps of dense attention, on sampled rows: the yardstick of every offline search.

Recall is the attention mass on the named pairs, exp(lse_sparse - lse_full), exact and between 0 and 1; loss is the
relative L1 error of the output. Both are figures of a head, so that a search can choose for each one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..lists import repeat_heads

ROWS = 64  # rows of a head that are looked at, fewer where their scores would not fit
BUDGET = 1 << 27  # scores of all heads held at a time (512 MiB in fp32)


def some_rows(n: int, count: int, seed: int = 0) -> Tensor:
    """int64 `[min(n, count)]`, ascending: one random row of each of `count` stretches of n rows."""
    count = max(1, min(n, count))
    edge = torch.arange(count + 1) * n // count
    where = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return edge[:-1] + (where * (edge[1:] - edge[:-1])).long()


class Sampled:
    """Dense attention of one batch row on some of its queries, to compare plans with.

    Attributes:
        rows: int64 `[R]`, numbers of the query rows. lse: fp32 `[H, R]`. out: fp32 `[H, R, Dv]`, dense attention's.
    """

    def __init__(
        self,
        q: Tensor,
        kv: KV,
        q_pos: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        rows: Tensor | None = None,
        seed: int = 0,
    ):
        """q `[1, H, N, D]`, q_pos int `[1, N]`; `rows` are drawn by `seed` where not given."""
        _, h, n, _ = q.shape
        self.kv = kv.to_dense()
        if rows is None:
            rows = some_rows(n, min(ROWS, max(1, BUDGET // (h * self.kv.capacity))), seed)
        self.rows = rows.to(q.device)
        seen = self.kv.positions()[0, :, None] <= q_pos[0, self.rows][:, None]  # [G, R, M]
        seen = seen & self.kv.exists()[0, :, None]
        grouped = q[0][:, self.rows].float().unflatten(0, (seen.shape[0], -1))
        s = (grouped @ self.kv.k[0].float()[:, None].transpose(-1, -2)).flatten(0, 1) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        if self.kv.bias is not None:
            s = s + repeat_heads(self.kv.bias.float(), h)[0, :, None]
        self.scores = s.masked_fill_(~seen.repeat_interleave(h // seen.shape[0], 0), float("-inf"))
        self.lse, self.out = self._attend(self.scores)

    def judge(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """(recall `[H]`, loss `[H]`) of a layout for the whole call: mean over the rows, and one quotient for all rows."""
        if layout.full:
            return torch.ones_like(self.lse[:, 0]), torch.zeros_like(self.lse[:, 0])
        named = layout.to_mask(self.kv, rows=self.rows)[0]
        lse, out = self._attend(self.scores.masked_fill(~named, float("-inf")))
        return torch.exp(lse - self.lse).clamp(max=1.0).mean(-1), loss(out, self.out)

    def _attend(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(lse `[H, R]`, out `[H, R, Dv]`) of scores `[H, R, M]`; rows without keys give -inf and 0."""
        lse = s.logsumexp(-1)
        p = (s - torch.where(torch.isfinite(lse), lse, 0.0)[..., None]).exp_()
        return lse, (p.unflatten(0, (self.kv.shape[1], -1)) @ self.kv.v[0].float()[:, None]).flatten(0, 1)


def loss(out: Tensor, dense: Tensor) -> Tensor:
    """`[H]`: sum of |out - dense| over rows and channels of `[H, R, Dv]`, over the sum of |dense|."""
    wrong = (out.float() - dense.float()).abs().sum((-1, -2))
    return wrong / dense.float().abs().sum((-1, -2)).clamp(min=1e-20)
