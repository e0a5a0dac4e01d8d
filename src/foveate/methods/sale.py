"""SALE: every logit estimated with 4 bits; blocks with one large logit, relative to sink and local keys, are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..profile import of
from ..scores.lowbit import SHARES, Grid, relative_blocks
from ._allocation import own_lists
from .base import AttnInput, Method, State, option, shared
from .search import Found, Knob, Search, Target

START, FLOOR = 0.008, 1e-4  # where the search for a head's threshold begins, and below which the head is dense
DENSE = 1e-5  # thresholds below mean a dense head


@dataclass(frozen=True)
class SALE(Method):
    """Ji et al. 2025, "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling"
    (arXiv 2505.24179).

    A block of `block_q` rows computes the first `sink` keys, its local region (the block and at least `window` keys
    before it, so that a whole number of `segment` keys lies between) and every block of `block_k` keys between them in
    which any logit of any row is large: exp(logit) > `tau` times the sum of exp(logit) over that row's sink and local
    keys. These logits come from queries and keys without their means, in `bits` bits; `quant` says which rows share a
    step: those of a tensor core fragment as published, one row ("token"), or no quantisation at all ("exact").

    `tau` below 1e-5 makes a head dense. `profile` names a folder with one tau per layer and head; the search for it
    ("loss" targets) halves tau from 0.008 while the L1 error of a head is `theta` or more a row, or above the target; that
    for targets "mass=" gives each head the power of 1/2 it needs (`sale_search.by_head`).
    `share` "group" gives the query heads of a kv head the union of their blocks.

    This is the two-pass variant: the sums are not refreshed by later blocks, so a smaller tau keeps a superset. Differs
    from the published code in two points: the mean query's products are not rounded to the integer grid of the estimate,
    and the window is one number (its checks say 128, its kernel computes 256). The estimate costs N x M products.
    """

    tau: float = option(0.004, low=0, help="least weight of a logit against sink and local keys")
    block_q: int = option(64, low=16, help="queries of a block")
    block_k: int = option(32, low=8, help="keys of a block")
    sink: int = option(32, low=0, help="first tokens of the text, always included")
    window: int = option(256, low=0, help="keys before a block, always included")
    segment: int = option(128, low=8, help="keys the estimated part is a multiple of")
    bits: int = option(4, low=2, high=8, help="bits of queries and keys in the estimate")
    quant: str = option("fragment", choices=SHARES, help="rows that share a quantisation step; exact: no quantisation")
    theta: float | None = option(0.4, low=0, help="largest L1 error a row in the search; none: any")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "sale"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"  # the means run over the whole prompt, and the rows of a block choose together
    source: ClassVar[str] = "Ji et al. 2025, arXiv 2505.24179"
    # On 512 tokens of two layers of SmolLM2-135M, tau = 0.02 keeps 0.99 of the attention mass; 0.004 drops next to nothing.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"tau": 0.02, "window": 128}}
    knob: ClassVar[Knob | None] = Knob("tau", FLOOR, 1.0, more=False, log=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sink", "segment"):
            if getattr(self, name) % self.block_k:
                raise ConfigError(f"sale: {name} expected a multiple of block_k = {self.block_k}, got {getattr(self, name)}")
        if self.block_q % 16:
            raise ConfigError(f"sale: block_q expected a multiple of 16, got {self.block_q}")

    @property
    def min_length(self) -> int:
        """Published code runs dense up to 1024 tokens."""
        return 1025

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        m = x.start + x.q.shape[2]
        local = (m - 1) // self.block_q * self.block_q - self.window - self.sink
        if local < self.segment or x.kv.bias is not None:  # no block has a segment between sink and local region
            return None
        if self.profile is None:
            return None if self.tau < DENSE else self.layout(x, self._same(x, self.tau))
        if (kept := state.run.get("sale.tau")) is None or kept[0] != (self.profile, x.device):
            kept = state.run["sale.tau"] = ((self.profile, x.device), self._profiled(x))
        return self.layout(x, kept[1][x.layer])

    def layout(self, x: AttnInput, tau: Tensor) -> Layout:
        """The plan under one threshold per query head, fp32 `[H]`."""
        tiles, count = relative_blocks(
            x.q,
            x.kv,
            torch.where(tau < DENSE, 0, tau).log(),
            Grid(self.block_q, self.block_k, self.sink, self.window, self.segment),
            start=x.start,
            scale=x.scale,
            softcap=x.softcap,
            share=self.quant,
            bits=self.bits,
            group=self.share == "group",
        )
        return Layout(
            x.shape,
            block_q=self.block_q,
            q_offset=x.offset(self.block_q),
            tile_width=self.block_k,
            q_pos=x.layout_pos(),
            tiles=tiles,
            tile_count=count,
        )

    def search(self, target: Target) -> Search | None:
        """The paper's search for a "loss", a tau per head for mass by head; others go to the generic one."""
        if target.by_head:
            from .sale_search import by_head

            own_lists(self)
            return by_head(self, target)
        return Halving(self, target) if target.kind == "loss" else None

    def _same(self, x: AttnInput, tau: float) -> Tensor:
        return torch.full((x.q.shape[1],), tau, device=x.device)

    def _profiled(self, x: AttnInput) -> Tensor:
        """Thresholds of the profile, fp32 `[layers, H]`."""
        found = of(self.id, self.profile)
        tau = None if found is None else found.tensors.get("tau")
        want = [x.layers, x.q.shape[1]]
        if tau is None or list(tau.shape) != want:
            got = "none" if tau is None else list(tau.shape)
            raise ConfigError(f"sale: profile expected a tensor tau of shape [layers, heads] = {want}, got {got}")
        return tau.to(x.device, torch.float32)


@dataclass
class Halving:
    """The paper's search: each head's tau is halved while its output is too far from dense, and never rises again."""

    method: SALE
    target: Target
    tau: dict[int, Tensor] = field(default_factory=dict)
    layers: int = 0
    passes: int = 1
    wants_grad: bool = False

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from ..kernels.dispatch import attend  # the one place where a method computes attention: offline

        plan = replace(self.method, profile=None)
        tau = self.tau.get(x.layer)
        tau = plan._same(x, START) if tau is None else tau.to(x.device)
        size = out.abs().sum((0, 2, 3), dtype=torch.float64)
        limit = self.target.value * size
        if self.method.theta is not None:
            limit = limit.clamp(max=self.method.theta * x.q.shape[2])
        while True:
            got = attend(x.q, x.kv, plan.layout(x, tau), scale=x.scale, softcap=x.softcap)
            assert isinstance(got, Tensor)
            bad = ((got - out).abs().sum((0, 2, 3), dtype=torch.float64) >= limit) & (tau > 0)
            if not bool(bad.any()):
                break
            tau = torch.where(bad, tau / 2, tau)
            tau = torch.where(tau <= FLOOR, 0, tau)
        self.tau[x.layer], self.layers = tau.cpu(), x.layers

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        tau = self.state()["tau"]
        dense = float((tau == 0).float().mean())
        report = {"dense_heads": dense, "median_tau": float(tau.median())}
        return Found(tensors={"tau": tau}, report=report)

    def state(self) -> dict[str, Tensor]:
        if not self.tau:
            return {}
        unseen = torch.full_like(next(iter(self.tau.values())), self.method.tau)
        return {"tau": torch.stack([self.tau.get(i, unseen) for i in range(self.layers)])}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.tau = dict(enumerate(state["tau"])) if "tau" in state else {}
        self.layers = len(self.tau)
