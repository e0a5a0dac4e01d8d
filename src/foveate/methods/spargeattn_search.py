"""SpargeAttn's offline search: per layer and head the cdf and theta that compute least within a relative L1 error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.dispatch import attend
from ..layout import Layout
from .base import AttnInput
from .search import Found, Target

if TYPE_CHECKING:
    from ._allocation import Allocation
    from .spargeattn import SpargeAttn

STEP, BIN = 1 / 16, 2  # between thetas tried; thetas of a bin
LOW = -BIN * STEP  # a similarity is never negative: all thetas below 0 choose the same blocks
THETAS = [LOW + i * STEP for i in range(round((1 - LOW) / STEP) + 1)]
BINS = -(-len(THETAS) // BIN)
HALVINGS = 10  # of the range of cdf: to 0.001
LEAST = 0.1  # a head that skips less than this share of its blocks is dense


class SpargeSearch:
    """Zhang et al. 2025 (arXiv 2502.18137), the paper's own search without the kernel's lambda, which Foveate has not.

    Of every layer, head and prompt, for theta upwards in steps of 1/16: the least cdf (by bisection) whose output has a
    relative L1 error below `error`, until less than a tenth of the blocks is skipped. Of all prompts' candidates, those
    of one bin of theta (width 1/8) with the largest sum of skipped shares win; the largest cdf and the largest theta
    among them are the head's. A head that skips a tenth or less, averaged over the prompts and thetas of its bin, is dense
    (cdf 1, no theta).

    All heads of a layer are bisected at once: about ten attentions a theta and layer, whatever the number of heads.
    """

    passes, wants_grad = 1, False

    def __init__(self, method: SpargeAttn, error: float):
        self.method, self.error = method, error
        self.layers = 0  # of the model
        self.prompts: dict[int, int] = {}  # that each layer has seen
        self.skipped: dict[int, Tensor] = {}  # of each layer fp64 [H, BINS]: sums of skipped shares
        self.best: dict[int, Tensor] = {}  # of each layer fp64 [2, H, BINS]: largest cdf and theta

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        h, dev = x.q.shape[1], x.device
        if x.layer not in self.skipped:
            self.skipped[x.layer] = torch.zeros(h, BINS, dtype=torch.float64)
            self.best[x.layer] = torch.full((2, h, BINS), float("-inf"), dtype=torch.float64)
        self.layers, self.prompts[x.layer] = x.layers, self.prompts.get(x.layer, 0) + 1
        live = torch.ones(h, dtype=torch.bool, device=dev)
        for i, number in enumerate(THETAS):
            theta = torch.full((h,), number, dtype=torch.float64, device=dev)
            cdf = self._least(x, out, theta)
            share = 1 - self._computed(x, cdf, theta)
            live &= share >= LEAST
            if not bool(live.any()):
                break
            self.skipped[x.layer][:, i // BIN] += torch.where(live, share, 0.0).cpu()
            for slot, value in enumerate((cdf, theta)):
                held = self.best[x.layer][slot, :, i // BIN]
                held.copy_(torch.maximum(held, torch.where(live, value, float("-inf")).cpu()))

    def _least(self, x: AttnInput, out: Tensor, theta: Tensor) -> Tensor:
        """The least cdf of each head, fp64 `[H]`, whose error stays below the bound; 1 always does."""
        low, high = torch.zeros_like(theta), torch.ones_like(theta)
        size = out.abs().sum((0, 2, 3), dtype=torch.float64)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            got = attend(x.q, x.kv, self._layout(x, middle, theta), scale=x.scale, softcap=x.softcap)
            assert isinstance(got, Tensor)
            error = (got - out).abs().sum((0, 2, 3), dtype=torch.float64) / size
            fits = error < self.error
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high

    def _layout(self, x: AttnInput, cdf: Tensor, theta: Tensor) -> Layout:
        return self.method.planned(x, cdf[:, None, None], theta[:, None, None])

    def _computed(self, x: AttnInput, cdf: Tensor, theta: Tensor) -> Tensor:
        """The share of its causal blocks that each head computes, fp64 `[H]`."""
        mine, every = (self._blocks(x, p, theta) for p in (cdf, torch.ones_like(cdf)))
        return (mine / every).repeat_interleave(len(cdf) // len(mine))

    def _blocks(self, x: AttnInput, cdf: Tensor, theta: Tensor) -> Tensor:
        count = self._layout(x, cdf, theta).tile_count
        assert count is not None
        return count.sum((0, 2), dtype=torch.float64)

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        h = next(iter(self.skipped.values())).shape[0]
        cdf = torch.ones(self.layers, h, dtype=torch.float64)  # layers that were not shown stay dense
        theta = torch.full_like(cdf, LOW)
        for i, skipped in self.skipped.items():
            total, at = skipped.max(-1)
            best = self.best[i].gather(-1, at[None, :, None].expand(2, -1, 1))[..., 0]  # [2, H]
            sparse = total / (BIN * self.prompts[i]) > LEAST
            cdf[i], theta[i] = (torch.where(sparse, a, b) for a, b in zip(best, (1.0, LOW), strict=True))
        report = {"error": self.error, "dense heads": int((cdf == 1).sum()), "heads": cdf.numel()}
        blocks = {"block_q": self.method.block_q, "block_k": self.method.block_k}
        return Found(options=blocks, tensors={"cdf": cdf, "theta": theta}, report=report)

    def state(self) -> dict[str, Tensor]:
        out = {"layers": torch.tensor(self.layers)}
        for i, many in self.prompts.items():
            of = torch.tensor(many), self.skipped[i].clone(), self.best[i].clone()
            out |= {f"{name}.{i}": t for name, t in zip(("prompts", "skipped", "best"), of, strict=True)}
        return out

    def resume(self, state: dict[str, Tensor]) -> None:
        self.layers = int(state["layers"])
        for key, value in state.items():
            name, dot, layer = key.partition(".")
            if name == "prompts":
                self.prompts[int(layer)] = int(value)
            elif dot:
                getattr(self, name)[int(layer)] = value.cpu()


def by_head(method: SpargeAttn, target: Target) -> Allocation:
    """The search for a target of mass by head: a cdf each, under the method's theta."""
    from ._allocation import SHARES, Allocation, Ladder

    def found(shares: Sequence[float], choice: Tensor) -> Found:
        cdf = torch.tensor([*shares, 1.0], dtype=torch.float64)[choice]  # -1, not shown: dense
        blocks = {"block_q": method.block_q, "block_k": method.block_k}
        return Found(blocks, {"cdf": cdf, "theta": torch.full_like(cdf, method.theta)})

    def plan(x: AttnInput, cdf: float) -> Layout:
        return method.planned(x, cdf, method.theta)

    return Allocation(target, Ladder(method.id, lambda length: SHARES, plan, found))
