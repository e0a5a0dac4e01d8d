"""Double Sparsity's offline calibration: which channels of a head carry its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..scores.keys import pieces, read_keys
from .base import AttnInput
from .search import Found

if TYPE_CHECKING:
    from .double_sparsity import DoubleSparsity


class OutlierChannels:
    """Mean |q|, |k| (both before the rotation) or |q k| of one token (after it), by channel and kv head, over all prompts.

    |q| and |q k| are summed over the query heads of a kv head, whose labels they share. The mean is over all tokens of all
    prompts; the published code keeps the last prompt's |q k| alone. Channels go to the profile in descending order of it,
    so that one profile serves every `group_factor`; the target's number has no meaning here.
    """

    passes, wants_grad = 1, False

    def __init__(self, method: DoubleSparsity):
        self.method = method
        self.sums = torch.zeros(0, 0, 0, dtype=torch.float64)  # [layers, G, D]
        self.tokens = torch.zeros(0, dtype=torch.int64)  # [layers]

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        g, n, d = x.groups, x.q.shape[2], x.q.shape[3]
        if not self.sums.numel():
            self.sums, self.tokens = torch.zeros(x.layers, g, d, dtype=torch.float64), torch.zeros(x.layers).long()
        pos, r = torch.arange(n, device=x.device)[None], x.q.shape[1] // g
        for g0, g1 in pieces(g, 6 * n * d * r):
            q, k = x.q[:, g0 * r : g1 * r].float(), read_keys(x.kv, g0, g1)[:, :, :n].float()
            if self.method.channel == "qk":
                size = (q.unflatten(1, (g1 - g0, r)) * k[:, :, None]).abs().sum((0, 2, 3), dtype=torch.float64)
            elif self.method.channel == "q":
                size = self._before(x, q, pos).unflatten(1, (g1 - g0, r)).abs().sum((0, 2, 3), dtype=torch.float64)
            else:
                size = self._before(x, k, pos).abs().sum((0, 2), dtype=torch.float64)
            self.sums[x.layer, g0:g1] += size.cpu()
        self.tokens[x.layer] += n

    def _before(self, x: AttnInput, t: Tensor, pos: Tensor) -> Tensor:
        if x.rope is None:
            raise UnsupportedError(
                f"double_sparsity: channel={self.method.channel} is measured before the rotation, which this model's "
                "adapter does not give; take channel=qk"
            )
        return x.rope.unrotate(t, pos)

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        if not len(self.tokens) or not bool((self.tokens > 0).all()):
            raise ConfigError("double_sparsity: the calibration was shown no token of some layer")
        mean = self.sums / self.tokens[:, None, None]
        order = mean.sort(dim=-1, descending=True, stable=True)
        first = order.values[..., : max(1, mean.shape[-1] // self.method.group_factor)].sum(-1)
        share = first / order.values.sum(-1).clamp(min=1e-30)  # of the statistic, on the channels of a label
        report = {"tokens": int(self.tokens.min()), "share": float(share.mean()), "worst_share": float(share.min())}
        tensors = {"channels": order.indices.int(), "statistic": mean.float()}
        return Found(options={"channel": self.method.channel}, tensors=tensors, report=report)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "tokens": self.tokens}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.sums, self.tokens = state["sums"].clone(), state["tokens"].clone()
