"""Expected Attention: entries kept by the attention that a Gaussian model of future queries would pay them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..lists import compact
from ..scores.keys import pieces, read_keys
from ..select import top_k
from .base import AttnInput, LayerState, Method, Rope, Selection, State, option

COUNT, MEAN, SPREAD = (f"expected_attention.{n}" for n in ("count", "mean", "spread"))


@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution" (arXiv 2510.00636).

    Mean and covariance of the prompt's queries before rotation, from position `sink` on, are gathered while it is read
    and turned by the average rotation of the next `future` positions. An entry's score is the expected attention,
    averaged over the query heads of its group, plus `eps`, times the norm of its value; the first `sink` positions are
    not scored and always stay. `capacity` entries are kept, or without one all but the fraction `ratio` of those
    that are there (the paper names no default; 0.5 is ours).

    Needs the model's rotation (`x.rope`): UnsupportedError when the adapter has none.
    """

    capacity: int | None = option(None, low=1, help="entries a kv head keeps; none: by ratio")
    ratio: float = option(0.5, low=0.0, high=1.0, help="fraction of the entries that is dropped")
    future: int = option(512, low=1, help="next positions that queries are expected at")
    sink: int = option(4, low=0, help="first tokens of the text, always included")
    covariance: bool = option(True, help="count the covariance of queries, not only their mean")
    value_norm: bool = option(True, help="multiply scores by the norm of the value")
    eps: float = option(0.0, low=0.0, help="added to an expected probability before the value norm")

    id: ClassVar[str] = "expected_attention"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    observes: ClassVar[tuple[str, ...]] = ("prefill",)
    source: ClassVar[str] = "Devoto et al. 2025, arXiv 2510.00636"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"capacity": 1024}}

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        if x.rope is None:
            raise UnsupportedError(
                "expected_attention: needs queries before rotation, and this model's rotation is not available (x.rope)"
            )
        assert x.q_pos is not None
        first = max(0, self.sink - x.start)
        for lo, hi in pieces(max(0, x.q.shape[2] - first), x.q.shape[1] * x.q.shape[3]):
            rows = slice(first + lo, first + hi)
            gather(state.layer, x.rope.unrotate(x.q[:, :, rows].float(), x.q_pos[:, rows])[0])

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        m = x.kv.longest()
        keep = self.capacity if self.capacity is not None else int(m * (1 - self.ratio) + 1e-6)
        keep = max(keep, self.sink, 1)
        if m <= keep:
            return None
        if MEAN not in state.layer:
            x.note("expected_attention: no prompt queries were seen beside this cache; every entry is kept")
            return None
        exists = x.kv.exists()
        sinks = exists & (x.kv.positions() < self.sink)
        score = self.scores(x, state.layer, exists & ~sinks)
        index, count = compact(top_k(score, keep, valid=exists, forced=sinks))
        return Selection(index[..., :keep].long(), count.long())

    def scores(self, x: AttnInput, stats: LayerState, live: Tensor) -> Tensor:
        """fp32 `[1, G, M]`: the score of each live entry."""
        assert x.rope is not None
        turn = mean_rotation(x.rope, x.start + x.q.shape[2], self.future, stats[MEAN].shape[-1], x.device)
        mean = stats[MEAN] @ turn  # [H, D]
        spread = turn.T @ (stats[SPREAD] / stats[COUNT]) @ turn  # [H, D, D]
        r = mean.shape[0] // x.groups
        rows = []
        for g in range(x.groups):  # one kv head at a time: [r, M, D] is the largest thing held
            k = read_keys(x.kv, g, g + 1)[0, 0].float()
            heads = slice(g * r, (g + 1) * r)
            z = (mean[heads] @ k.T) * x.scale
            if self.covariance:
                z = z + ((k @ spread[heads]) * k).sum(-1) * (x.scale * x.scale / 2)
            rows.append(z.masked_fill(~live[0, g], float("-inf")).softmax(-1).mean(0))
        expected = torch.stack(rows)[None].nan_to_num(0.0) + self.eps
        if self.value_norm:
            every = torch.arange(x.kv.capacity, device=x.device).expand(1, x.groups, -1)
            last = (x.kv.lengths() - 1).clamp(min=0)[..., None]
            expected = expected * x.kv.gather(torch.minimum(every, last))[1].float().norm(dim=-1)
        return expected


def gather(stats: LayerState, q: Tensor) -> None:
    """Add queries `[H, n, D]` to the count, mean `[H, D]` and summed outer deviations `[H, D, D]` (fp32, Chan et al.)."""
    n = q.shape[1]
    mean = q.mean(1)
    centred = q - mean[:, None]
    spread = centred.transpose(1, 2) @ centred
    if MEAN in stats:
        before = stats[COUNT]
        total = before + n
        shift = mean - stats[MEAN]
        spread = stats[SPREAD] + spread + shift[:, :, None] * shift[:, None, :] * (before * n / total)
        stats[COUNT], stats[MEAN], stats[SPREAD] = total, stats[MEAN] + shift * (n / total), spread
    else:
        stats[COUNT], stats[MEAN], stats[SPREAD] = torch.tensor(float(n), device=q.device), mean, spread


def mean_rotation(rope: Rope, start: int, n: int, d: int, device: torch.device) -> Tensor:
    """fp32 `[D, D]`: `x @ it` is x turned by the average rotation of the positions start .. start + n - 1."""
    out = torch.zeros(d, d, device=device)
    eye = torch.eye(d, device=device)
    for lo, hi in pieces(n, d * d):
        pos = torch.arange(start + lo, start + hi, device=device)[None]
        out += rope.rotate(eye[None, :, None].expand(1, d, hi - lo, d), pos)[0].sum(1)
    return out / n
