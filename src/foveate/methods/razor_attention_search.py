"""RazorAttention's calibration: which heads look back to the same token, and to what followed it, in repeated noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..lists import repeat_heads
from ..scores.keys import pieces, read_keys
from ..scores.mass import row_lse
from .base import AttnInput
from .search import Found

COPIES = 4
SHIFTS = {"echo": 0, "induction": 1}  # keys looked at, counted from the earlier occurrence of the query's token


class EchoSearch:
    """The procedure of Tang et al. 2024 for models with rotary positions: data-free.

    A prompt is the model's first token, if it has one, and four copies of the same random tokens (published: 2,500 of
    them). A head's echo score is the probability its queries in copies 2 to 4 give the same token in earlier copies; its
    induction score, that of the tokens after those; both mean over queries. A kv head has the best score of its query
    heads, in the mean over prompts. Only these diagonals are computed, from each row's log-sum-exp: nothing of size
    N x N is held. Layers that were not shown keep NaN.
    """

    passes = 1
    wants_grad = False

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # fp64 [layers, kv heads]
        self.seen = torch.zeros(0, dtype=torch.int64)  # [layers], prompts

    def prompts(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Tensor]:
        """`count` prompts int64 `[1, <= length]` to search on, instead of texts. ConfigError if length has no room."""
        lead = list(tokenizer("", verbose=False)["input_ids"])[:1]
        special = set(getattr(tokenizer, "all_special_ids", ()) or ())
        return [repeated(len(tokenizer), length, seed + i, lead, special) for i in range(count)]

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        n = x.q.shape[2]
        lead, period = n % COPIES, n // COPIES
        if period < 2 or (x.layer == 0 and not _repeats(x, lead, period)):
            raise ConfigError(
                f"razor_attention: heads are scored on {COPIES} copies of the same random tokens, and this prompt of {n} "
                "tokens is something else"
            )
        if not self.sums:
            self.sums = {name: torch.zeros(x.layers, x.groups, dtype=torch.float64) for name in SHIFTS}
            self.seen = torch.zeros(x.layers, dtype=torch.int64)
        for name, score in scores(x, lead, period).items():
            self.sums[name][x.layer] += score.double().cpu()
        self.seen[x.layer] += 1

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        mean = {name: (t / self.seen[:, None]).float() for name, t in self.sums.items()}  # 0 / 0: never shown
        known = self.seen > 0
        report = {f"best_{name}": float(t[known].max()) for name, t in mean.items()} if bool(known.any()) else {}
        return Found(tensors=mean, report=report | {"layers": int(known.sum())})

    def state(self) -> dict[str, Tensor]:
        return {**self.sums, "seen": self.seen}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.sums = {name: state[name].clone() for name in SHIFTS if name in state}
        self.seen = state["seen"].clone()


def scores(x: AttnInput, lead: int, period: int) -> dict[str, Tensor]:
    """Echo and induction score of each kv head, fp32 `[G]`, of a prompt of `lead` tokens and copies of `period` tokens."""
    assert x.q_pos is not None
    n, h = x.q.shape[2], x.q.shape[1]
    lse = row_lse(x.q, x.kv, x.q_pos, scale=x.scale, softcap=x.softcap)
    keys = read_keys(x.kv, 0, x.groups)
    out = {}
    for name, shift in SHIFTS.items():
        total = torch.zeros(h, device=x.device)
        for first, lo, hi in _diagonals(lead, period, n, h * x.q.shape[3]):
            key = repeat_heads(keys[:, :, lo - first + lead + shift : hi - first + lead + shift], h)
            s = (x.q[:, :, lo:hi].float() * key.float()).sum(-1) * x.scale
            s = x.softcap * torch.tanh(s / x.softcap) if x.softcap else s
            total += (s - lse[:, :, lo:hi]).exp().sum((0, 2))
        out[name] = (total / ((COPIES - 1) * period)).view(x.groups, -1).amax(1)
    return out


def _diagonals(lead: int, period: int, n: int, cost: int) -> Iterator[tuple[int, int, int]]:
    """(first, lo, hi): rows lo..hi meet the keys first - lead before them, for every distance of whole copies."""
    for back in range(1, COPIES):
        first = lead + back * period
        for lo, hi in pieces(n - first, 2 * cost):
            yield first, first + lo, first + hi


def repeated(vocabulary: int, length: int, seed: int, lead: list[int], special: set[int]) -> Tensor:
    """int64 `[1, <= length]`: `lead`, then four copies of the same random tokens, special ones left out.

    Tokens come from 10,000 to 12,500 as published, or from the upper half of a smaller vocabulary.
    """
    period = (length - len(lead)) // COPIES
    if period < 2:
        raise ConfigError(f"length: expected at least {2 * COPIES + len(lead)} tokens for {COPIES} copies, got {length}")
    low, high = (10_000, 12_500) if vocabulary >= 12_500 else (vocabulary // 2, vocabulary)
    ids = torch.tensor([i for i in range(low, high) if i not in special])
    drawn = ids[torch.randint(len(ids), (period,), generator=torch.Generator().manual_seed(seed))]
    return torch.cat([torch.tensor(lead, dtype=torch.int64), drawn.repeat(COPIES)])[None]


def _repeats(x: AttnInput, lead: int, period: int) -> bool:
    """Whether the tokens repeat: the first layer's values depend on nothing else in a model with rotary positions."""
    v = x.kv.to_dense().v[0, :, lead : lead + COPIES * period].float().unflatten(1, (COPIES, period))
    wrong, scale = (v - v[:, :1]).abs().amax(), v.abs().amax()
    return bool(wrong <= 0.02 * scale)
