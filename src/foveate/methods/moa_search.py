"""MoA's own search: what each window would cost by first-order influence, then the cheapest rules within the density."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError
from ..kv import KV
from ..scores.keys import pieces, read_keys
from ..scores.pooled import block_pool
from .base import AttnInput
from .search import Found, Target

if TYPE_CHECKING:
    from .moa import MoA

STATES = 256  # partial assignments that are followed at a time
CELLS = 2048  # how many are compared one by one


class Spans:
    """One pass over prompts with gradients, then an assignment of (alpha, beta) to every head.

    Kept per prompt length and head: the influence on the loss of the keys at each distance in blocks, beyond the sink.
    From it the predicted loss of any window is a sum. The mean density over heads (of what really runs, sinks included)
    stays below the target at every length seen and at twice the longest. Differs from the published search: an exact
    dynamic programme over non-dominated assignments, thinned to `STATES` of them, takes the place of the commercial
    solver; the lengths' losses are added, each as a part of what masking everything would cost, instead of a front of
    which one point is chosen by a run at an unseen length; and no least density is asked for, since wider never costs.
    """

    wants_grad = True
    passes = 1

    def __init__(self, method: MoA, target: Target):
        if target.kind != "density":
            raise ConfigError(f"target: moa expects density=..., the part of causal pairs it may compute, got {target}")
        self.method, self.target = method, target
        self.sums: dict[int, Tensor] = {}  # by tokens of a prompt: fp64 [layers, H, blocks], summed over such prompts
        self.counts: dict[int, Tensor] = {}  # by tokens: int64 [layers], how many

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        if grad is None:
            raise ConfigError("moa: its search needs the gradient of the loss by the attention output, got none")
        if x.window is not None:  # the model's own rule
            return
        n, block = x.q.shape[2], self.method.block
        with torch.no_grad():
            e = influence(x.q, x.kv, grad, block, scale=x.scale, softcap=x.softcap)[0]
            far = by_distance(e, -(-self.method.sink // block)).double().cpu()
        if n not in self.sums:
            self.sums[n] = torch.zeros(x.layers, *far.shape, dtype=torch.float64)
            self.counts[n] = torch.zeros(x.layers, dtype=torch.int64)
        self.sums[n][x.layer] += far
        self.counts[n][x.layer] += 1

    def end_pass(self) -> None:
        return None

    def state(self) -> dict[str, Tensor]:
        return {f"sum.{n}": t for n, t in self.sums.items()} | {f"count.{n}": t for n, t in self.counts.items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        for name, t in state.items():
            kind, n = name.split(".")
            (self.sums if kind == "sum" else self.counts)[int(n)] = t.clone()

    def finish(self) -> Found:
        if not self.sums:
            raise ConfigError("moa: expected prompts with at least one layer of full attention, got none")
        method, lengths = self.method, sorted(self.sums)
        rules = candidates(lengths[0], lengths[-1], method.alpha_step, method.betas)
        groups = _alike(lengths)
        loss = torch.stack([self._loss(g, rules) for g in groups])  # [lengths, layers, H, rules]
        at = [g[-1] for g in groups] + [2 * lengths[-1]]
        dens = torch.stack([density(rules, n, method.sink, method.block) for n in at], -1)  # [rules, lengths]
        live = torch.stack(list(self.counts.values())).sum(0) > 0
        choice = assign(loss.sum(0)[live], dens, self.target.value, method.rules)
        rule = rules.new_tensor([0.0, 1.0]).repeat(*loss.shape[1:3], 1)  # [layers, H, 2]; what was not shown stays dense
        rule[live] = rules[choice]
        kinds, many = rule[live].flatten(0, 1).unique(dim=0, return_counts=True)
        report = {
            "lengths": at,
            "density": dens[choice].mean((0, 1)).tolist(),
            "loss": [float(part[live].gather(-1, choice[..., None]).sum()) for part in loss],
            "rules": [[*map(float, r), int(c)] for r, c in zip(kinds, many, strict=True)],
        }
        options = {"density": self.target.value, "block": method.block, "sink": method.sink}
        return Found(options, {"alpha": rule[..., 0].float(), "beta": rule[..., 1].float()}, report)

    def _loss(self, lengths: list[int], rules: Tensor) -> Tensor:
        """fp64 `[layers, H, rules]`: mean predicted loss of prompts of these lengths, in parts of what all heads lose if
        each keeps only its diagonal blocks."""
        parts = []
        for n in lengths:
            beyond = pad(self.sums[n].flip(-1).cumsum(-1).flip(-1), (0, 1))  # [.., w]: distances of w blocks and more
            wide = _blocks(rules, n, self.method.block)
            parts.append(beyond[..., wide] / beyond[..., 1].sum().clamp(min=torch.finfo(torch.float64).tiny))
        return torch.stack(parts).mean(0)


# ---------------------------------------------------------------------- what a pair is worth
def influence(
    q: Tensor, kv: KV, grad: Tensor, block: int, *, scale: float, softcap: float | None = None, eps: float | None = None
) -> Tensor:
    """First-order change of the loss if one pair is masked and its row renormalised, |.| summed per pair of blocks.

    E_ij = -A_ij (g_ij - sum_n g_in A_in) / (1 - A_ij + eps) with g_ij = grad_i . v_j; a row of one key: -A g.

    Args:
        q, grad: `[B, H, N, D]` and `[B, H, N, Dv]`, of a whole prompt, the first N entries of `kv` in text order.
        eps: that of the dtype (at least fp32) unless given.

    Returns:
        `[B, H, n, n]` for blocks of `block` rows and keys, fp32 (fp64 for fp64). Rows go in pieces of bounded memory.
    """
    (b, h, n, _), g = q.shape, kv.shape[1]
    r, count, acc = h // g, -(-n // block), torch.promote_types(q.dtype, torch.float32)
    eps = torch.finfo(acc).eps if eps is None else eps
    at = torch.arange(n, device=q.device)
    values = kv.gather(at.expand(b, g, n))[1][:, :, None]
    heads = []
    for g0, g1 in pieces(g, 6 * b * r * block * n):
        mine = slice(g0 * r, g1 * r)
        k = read_keys(kv, g0, g1)[:, :, None, :n].to(acc).transpose(-1, -2)
        v = values[:, g0:g1].to(acc).transpose(-1, -2)
        rows = []
        for lo, hi in pieces(count, 6 * b * (g1 - g0) * r * block * n):
            some = slice(lo * block, min(n, hi * block))
            s = (q[:, mine, some].to(acc) * scale).unflatten(1, (-1, r)) @ k
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            a = s.masked_fill_(at > at[some, None], float("-inf")).softmax(-1)
            w = grad[:, mine, some].to(acc).unflatten(1, (-1, r)) @ v
            e = a * (w - (w * a).sum(-1, keepdim=True)) / (1 - a + eps)
            if lo == 0:
                e[..., 0, 0] = w[..., 0, 0]
            e = pad(e.abs().flatten(1, 2), (0, count * block - n)).unflatten(-1, (count, block)).sum(-1)
            rows.append(block_pool(e, block, "sum"))
        heads.append(torch.cat(rows, 2))
    return torch.cat(heads, 1)


def by_distance(e: Tensor, sink: int) -> Tensor:
    """`[H, n, n]` per pair of blocks -> `[H, n]` by distance in blocks, without the first `sink` columns."""
    n = e.shape[-1]
    at = torch.arange(n, device=e.device)
    gap = at[:, None] - at
    e = e.masked_fill((gap < 0) | (at < sink), 0.0)
    out = torch.zeros_like(e[:, 0])
    return out.scatter_add(-1, gap.clamp(min=0).flatten().expand(e.shape[0], -1), e.flatten(1))


# ---------------------------------------------------------------------- which rules there are
def candidates(shortest: int, longest: int, step: int, betas: int) -> Tensor:
    """fp64 `[rules, 2]`: alpha in multiples of `step` from -shortest to longest, beta in `betas` steps from 0 to 1, where
    0 < alpha + beta n at the shortest length and alpha + beta n <= n at the longest one."""
    alpha = torch.arange(-(shortest // step), longest // step + 1, dtype=torch.float64) * step
    beta = torch.linspace(0, 1, betas, dtype=torch.float64)
    rules = torch.cartesian_prod(alpha, beta)
    near, far = (rules[:, 0] + rules[:, 1] * n for n in (shortest, longest))
    return rules[(near > 0) & (far <= longest)]


def _blocks(rules: Tensor, n: int, block: int) -> Tensor:
    """Blocks that the band of each rule holds in a prompt of n tokens, the diagonal one included: int64 `[rules]`."""
    count = -(-n // block)
    return (rules[:, 0] / block + rules[:, 1] * n / block).floor().long().clamp(1, count)


def density(rules: Tensor, n: int, sink: int, block: int) -> Tensor:
    """fp64 `[rules]`: the part of the causal pairs of n tokens that a window by each rule, and the sink, compute."""
    width = (rules[:, 0] + rules[:, 1] * n).floor().clamp(min=block)[:, None]
    seen = torch.arange(1, n + 1, dtype=torch.float64)
    kept = seen.minimum(width) + (seen - width).clamp(0, sink)
    return kept.sum(1) / (n * (n + 1) / 2)


def _alike(lengths: list[int]) -> list[list[int]]:
    """Ascending lengths in groups that agree to half a power of two: each is one constraint."""
    out: list[list[int]] = []
    for n in lengths:
        if out and round(2 * math.log2(n)) == round(2 * math.log2(out[-1][0])):
            out[-1].append(n)
        else:
            out.append([n])
    return out


# ---------------------------------------------------------------------- which head gets which
def assign(loss: Tensor, dens: Tensor, bound: float, most: int) -> Tensor:
    """The rules of lowest total loss whose mean density is at most `bound` at every length.

    Args:
        loss: fp64 `[layers, H, rules]`. dens: fp64 `[rules, lengths]`. most: distinct rules of a layer, 1 or 2.

    Returns:
        int64 `[layers, H]`, rule numbers. Exact while no more than `CELLS` states compete at a time and no more than
        `STATES` of them are worth following; beyond, those of best cost plus density at its dual price are followed.
        Raises ConfigError if no rules are as sparse as the bound.
    """
    layers, heads, _ = loss.shape
    limit = dens.new_full((dens.shape[1],), bound * layers * heads + 1e-9)
    layer = [_options(part, dens, most) for part in loss]
    toll = prices(layer, limit)
    narrow = dens.amin(0) * heads
    cost, used = loss.new_zeros(1), dens.new_zeros(1, dens.shape[1])
    trail = []
    for i, (options, price, weight) in enumerate(layer):
        own = front(price, weight, toll)
        c, u = (cost[:, None] + price[own]).flatten(), (used[:, None] + weight[own]).flatten(0, 1)
        ok = (u + narrow * (layers - 1 - i) <= limit).all(1).nonzero()[:, 0]
        keep = ok[front(c[ok], u[ok], toll)]
        trail.append((keep // len(own), options[own[keep % len(own)]]))
        cost, used = c[keep], u[keep]
    if not len(cost):
        least = float(dens.amax(1).min())
        raise ConfigError(f"target: moa expects density >= {least:.3g}, that of its narrowest rule, got {bound:g}")
    at, out = int(cost.argmin()), list[Tensor]()
    for part, (before, options) in zip(reversed(loss), reversed(trail), strict=True):
        a, b, k = options[at].tolist()
        row = torch.full((heads,), a)
        row[(part[:, a] - part[:, b]).sort(descending=True).indices[:k]] = b
        out.append(row)
        at = int(before[at])
    return torch.stack(out[::-1])


def _options(loss: Tensor, dens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """What one layer may do: (options int64 `[O, 3]`, loss `[O]`, summed density `[O, lengths]`).

    An option (a, b, k): the k heads that gain most from rule b have it, the others a. Density asks only how many.
    """
    h, n = loss.shape
    a, b = torch.triu_indices(n, n, 1) if most == 2 and n > 1 else torch.arange(n).expand(2, -1)
    gain = (loss[:, a] - loss[:, b]).sort(0, descending=True).values  # [H, pairs]
    price = loss[:, a].sum(0) - pad(gain.cumsum(0), (0, 0, 1, 0))  # [H + 1, pairs]
    k = torch.arange(h + 1)[:, None].expand(-1, len(a))
    weight = (h - k)[..., None] * dens[a] + k[..., None] * dens[b]
    return torch.stack([a.expand_as(k), b.expand_as(k), k], -1).flatten(0, 1), price.flatten(), weight.flatten(0, 1)


def prices(layer: list[tuple[Tensor, Tensor, Tensor]], limit: Tensor, rounds: int = 200) -> Tensor:
    """What a unit of density is worth at each length, fp64 `[lengths]`: the dual of the limits, by its subgradient."""
    toll, best, found = torch.zeros_like(limit), -math.inf, torch.zeros_like(limit)
    unit = sum(float(price.max() - price.min()) for _, price, _ in layer) / limit
    for i in range(rounds):
        value, used = -float(toll @ limit), -limit
        for _, price, weight in layer:
            low, at = (price + weight @ toll).min(0)
            value, used = value + float(low), used + weight[at]
        if value > best:
            best, found = value, toll
        toll = (toll + unit * used / limit / (1 + i) ** 0.75).clamp(min=0)
    return found


def front(cost: Tensor, used: Tensor, toll: Tensor) -> Tensor:
    """Numbers of the states `cost` `[S]`, `used` `[S, C]` that no other one beats in everything, best first by cost plus
    use at its `toll` `[C]`. Of more than CELLS only the first so many compete, and STATES of them are returned."""
    worth = cost + used @ toll
    alive = worth.argsort(stable=True)[:CELLS]
    alive = alive[used[alive].sum(1).argsort(stable=True)]
    alive = alive[cost[alive].argsort(stable=True)]  # of equal cost, one that beats another comes first
    better = torch.ones(len(alive), len(alive), dtype=torch.bool)
    for column in used[alive].T:  # [i, j]: i uses no more than j
        better &= column[:, None] <= column
    alive = alive[~better.triu(1).any(0)]  # i before j costs no more: j is beaten
    return alive[worth[alive].argsort(stable=True)[:STATES]]
