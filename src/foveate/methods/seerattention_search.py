"""SeerAttention's own search: gates distilled from the attention of the frozen model, then the threshold for the target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import AdamW

from ..errors import ConfigError, UnsupportedError
from ..scores.gates import POOLS, Gate, block_map, choose, key_features, query_means
from ..scores.keys import pieces
from ..scores.pooled import block_logits, block_softmax, causal_blocks
from .base import AttnInput, Rope
from .search import Found, Target

if TYPE_CHECKING:
    from .seerattention import SeerAttention

WARM_UP = 20  # optimiser steps
SPREAD = 0.02  # of the initial weights
GRID = [10 ** (-5 + i / 8) for i in range(37)]  # thresholds to choose from, 1e-5 .. 0.3


class Distillation:
    """One optimiser step per layer and prompt in each of `epochs` passes; a last pass measures thresholds.

    The target of a row of blocks is the largest attention probability of each key block, normalised to one; the loss
    is the divergence of the gate's softmax from it, summed over key blocks and averaged over rows and heads (an average
    over key blocks too, as published, would weigh long prompts down), without the first quarter of the rows. AdamW
    without decay, a warm-up and a cosine over the passes. Weights start near mean pooling (published: near zero), so few
    passes suffice. The model gets no gradient.
    """

    wants_grad = False

    def __init__(self, method: SeerAttention, target: Target):
        if target.kind == "loss":
            raise ConfigError(f"target: seerattention expects recall=... or density=..., got {target}")
        if method.ratio is not None or method.budget is not None:
            raise ConfigError("seerattention: its search chooses the threshold, expected neither ratio nor budget")
        self.method, self.target = method, target
        self.passes = method.epochs + 1
        self.at = 0  # passes done
        self.weights: dict[str, Tensor] = {}  # "layer.N.k", "layer.N.q"
        self.adam: dict[int, AdamW] = {}
        self.loss, self.steps = 0.0, 0  # of this pass
        self.history: list[float] = []
        self.kept = torch.zeros(len(GRID), 2, dtype=torch.float64)  # recall and density of each threshold, summed
        self.seen = 0

    # ------------------------------------------------------------------ the contract
    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        if x.rope is None:
            raise UnsupportedError("seerattention: its gates need queries and keys before rotation, and x.rope is not there")
        size = self.method.block
        if x.window is not None or x.q.shape[2] <= size:  # the model's own rule, or a single block
            return
        with torch.inference_mode(False):
            with torch.no_grad():
                q = query_means(x.q, x.rope, size, 0)
                k = key_features(x.kv, x.rope, size, x.q.shape[2])
            if self.at < self.method.epochs:
                with torch.enable_grad():
                    self._step(x, q, k)
            else:
                with torch.no_grad():
                    self._measure(x, q, k)

    def end_pass(self) -> None:
        if self.at < self.method.epochs:
            self.history.append(self.loss / max(1, self.steps))
        self.loss, self.steps = 0.0, 0
        self.at += 1

    def finish(self) -> Found:
        recall, density = (self.kept / max(1, self.seen)).T
        if self.target.kind == "recall":
            good = (recall >= self.target.value).nonzero()
            best = int(good.max()) if len(good) else 0
        else:
            good = (density <= self.target.value).nonzero()
            best = int(good.min()) if len(good) else len(GRID) - 1
        report = {"recall": float(recall[best]), "density": float(density[best]), "met": len(good) > 0, "loss": self.history}
        tensors = {n: w.detach().clone() for n, w in self.weights.items()}
        return Found({"threshold": GRID[best], "block": self.method.block}, tensors, report)

    def state(self) -> dict[str, Tensor]:
        out = {n: w.detach() for n, w in self.weights.items()}
        for layer, adam in self.adam.items():
            for name in self._names(layer):
                out |= {f"{name}.{what}": t for what, t in adam.state[self.weights[name]].items()}
        plain = torch.tensor([self.at, self.seen, self.loss, self.steps, *self.history], dtype=torch.float64)
        return out | {"plain": plain, "kept": self.kept}

    def resume(self, state: dict[str, Tensor]) -> None:
        at, seen, self.loss, steps, *self.history = state["plain"].tolist()
        self.at, self.seen, self.steps, self.kept = int(at), int(seen), int(steps), state["kept"].clone()
        names = [n for n in state if n.startswith("layer.") and n.count(".") == 2]
        self.weights = {n: state[n].clone().requires_grad_() for n in names}
        for layer in sorted({int(n.split(".")[1]) for n in names}):
            adam = self.adam[layer] = self._optimiser(layer)
            for name in self._names(layer):
                held = {n[len(name) + 1 :]: t.clone() for n, t in state.items() if n.startswith(f"{name}.")}
                if held:  # a layer that has made no step yet has no moments
                    adam.state[self.weights[name]] = held

    # ------------------------------------------------------------------ one layer of one prompt
    def gate(self, x: AttnInput) -> Gate:
        """The gate of this layer as it is now, made at its first sight."""
        if f"layer.{x.layer}.k" not in self.weights:
            self._create(x)
        for name in self._names(x.layer):
            if (w := self.weights[name]).device != x.device:  # resumed from a file
                w.data = w.data.to(x.device)
                held = self.adam[x.layer].state[w]
                held |= {n: t.to(x.device) for n, t in held.items() if n != "step"}
        key, query = (self.weights.get(f"layer.{x.layer}.{n}") for n in ("k", "q"))
        assert key is not None
        return Gate(key, query)

    def _step(self, x: AttnInput, q: Tensor, k: Tensor) -> None:
        gate = self.gate(x)
        adam = self.adam[x.layer]
        steps = int(adam.state[gate.key]["step"]) if gate.key in adam.state else 0
        decay = 0.5 * (1 + math.cos(math.pi * self.at / self.method.epochs))
        adam.param_groups[0]["lr"] = self.method.rate * min(1.0, (steps + 1) / WARM_UP) * decay
        adam.zero_grad()
        loss = distil(gate, q, k, _targets(x, self.method.block), _rope(x), self.method.block)
        adam.step()
        self.loss, self.steps = self.loss + loss, self.steps + 1

    def _measure(self, x: AttnInput, q: Tensor, k: Tensor) -> None:
        size, rows = self.method.block, 2 if self.method.last_block_dense else 0
        prob = block_softmax(_logits(self.gate(x), q, k, _rope(x), size))
        mass = block_map(x.q, x.kv, size, "sum", scale=x.scale, softcap=x.softcap)
        total, pairs = mass.sum(), causal_blocks(q.shape[2], k.shape[2], 0, q.device).sum() * q.shape[1]
        figures = []
        for t in GRID:
            kept = choose(prob, 0, threshold=t, keep=None, dense_rows=rows)
            figures.append(torch.stack([mass[kept].sum() / total, kept.sum() / pairs]))
        self.kept = self.kept + torch.stack(figures).double().cpu()
        self.seen += 1

    def _create(self, x: AttnInput) -> None:
        (_, h, _, d), gen = x.q.shape, torch.Generator().manual_seed(x.layer)

        def near(heads: int, features: int) -> Tensor:
            w = torch.randn(heads, features, d, generator=gen) * SPREAD
            w[:, features - d :] += torch.eye(d)  # the last features of keys are their means
            return w.to(x.device).requires_grad_()

        self.weights[f"layer.{x.layer}.k"] = near(x.groups if self.method.query_map else h, len(POOLS) * d)
        if self.method.query_map:
            self.weights[f"layer.{x.layer}.q"] = near(h, d)
        self.adam[x.layer] = self._optimiser(x.layer)

    def _names(self, layer: int) -> list[str]:
        return [n for n in (f"layer.{layer}.k", f"layer.{layer}.q") if n in self.weights]

    def _optimiser(self, layer: int) -> AdamW:
        return AdamW([self.weights[n] for n in self._names(layer)], lr=self.method.rate, weight_decay=0.0)


def distil(gate: Gate, q: Tensor, k: Tensor, target: Tensor, rope: Rope, block: int) -> float:
    """Add the gradient of the distillation loss to the gate's weights and return the loss, a few kv heads at a time.

    q `[1, H, n, D]` and k `[1, G, n, 3D]` are pooled features, target `[1, H, n, n]` with rows that sum to one.
    """
    h, n, g = q.shape[1], q.shape[2], k.shape[1]
    total, skip = 0.0, n // 4
    for g0, g1 in pieces(g, 4 * (h // g) * n * n):
        heads = slice(g0 * h // g, g1 * h // g)
        some = Gate(_cut(gate.key, g0, g1, g, h), None if gate.query is None else _cut(gate.query, g0, g1, g, h))
        logits = _logits(some, q[:, heads], k[:, g0:g1], rope, block)[:, :, skip:]
        t = target[:, heads, skip:]
        seen = causal_blocks(n - skip, n, skip, q.device)
        log = logits.masked_fill(~seen, float("-inf")).log_softmax(-1).masked_fill(~seen, 0.0)
        loss = (torch.special.xlogy(t, t) - t * log).sum() / (h * (n - skip))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _cut(w: Tensor, g0: int, g1: int, g: int, h: int) -> Tensor:
    """The weights of the kv heads g0..g1, of one per query head or per kv head."""
    share = w.shape[0] // g
    return w[g0 * share : g1 * share]


def _logits(gate: Gate, q: Tensor, k: Tensor, rope: Rope, block: int) -> Tensor:
    return block_logits(gate.queries(q, rope, 0, block), gate.keys(k, rope, block), 1 / math.sqrt(q.shape[-1]))


def _targets(x: AttnInput, block: int) -> Tensor:
    with torch.no_grad():
        top = block_map(x.q, x.kv, block, "max", scale=x.scale, softcap=x.softcap)
        return top / top.sum(-1, keepdim=True)


def _rope(x: AttnInput) -> Rope:
    assert x.rope is not None
    return x.rope
