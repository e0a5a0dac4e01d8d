"""Sparsity refinement of Qwen2.5-1M: both sizes of a head grow until the mass it keeps meets the target."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import AttnInput, State
from .search import Found, Target

if TYPE_CHECKING:
    from .qwen1m import Qwen1M


class Refinement:
    """Recall of each head with t = 0, 1, ... steps more than the method's sizes; the fewest that meet the target win.

    Recall is exp(lse_sparse - lse_dense), both under dual chunk attention, mean over rows and prompts. A layer stops
    growing for a prompt once all its heads meet the target there, or once both sizes cover the prompt. Each step of a
    layer is one sparse attention over the prompt; all prompts are seen once. Under share "group" a list must serve the
    worst of its heads. Layers that were not shown keep the method's sizes.
    """

    passes = 1
    wants_grad = False

    def __init__(self, method: Qwen1M, target: Target):
        if target.kind != "recall":
            raise ConfigError(f"qwen1m: target expected recall=, which its refinement grows towards, got {target}")
        self.target = target.value
        self.method = replace(method, profile=None, sparse=True, threshold=0)
        self.layers = 0  # of the model
        self.prompts: dict[int, int] = {}  # that each layer has seen
        self.recall: dict[int, Tensor] = {}  # of each layer, summed over prompts, fp64 [steps, Hl]

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from ..kernels.dispatch import attend

        how = dict(scale=x.scale, softcap=x.softcap, return_lse=True)
        m, method, got = x.kv.capacity, self.method, []
        with torch.no_grad():
            full = attend(x.q, x.kv, replace(method, sparse=False).plan(x, State()), **how)[1]  # type: ignore[arg-type]
            for t in range(-(-m // method.step) + 1):
                columns, diagonals = self._sizes(t)
                plan = replace(method, columns=columns, diagonals=diagonals).plan(x, State())
                recall = (attend(x.q, x.kv, plan, **how)[1] - full).exp().double().mean((0, 2)).cpu()  # type: ignore[arg-type]
                if method.share == "group":
                    recall = recall.unflatten(0, (x.groups, -1)).amin(1)
                got.append(recall)
                if bool((recall >= self.target).all()) or min(columns, diagonals) >= m:
                    break
        self.layers, self.prompts[x.layer] = x.layers, self.prompts.get(x.layer, 0) + 1
        self._add(x.layer, torch.stack(got))

    def _sizes(self, steps: int) -> tuple[int, int]:
        return self.method.columns + steps * self.method.step, self.method.diagonals + steps * self.method.step

    def _add(self, layer: int, got: Tensor) -> None:
        """Add one prompt's recalls `[steps, Hl]`; a prompt that stopped earlier keeps what it had reached."""
        old = self.recall.get(layer, torch.zeros_like(got))
        steps = max(len(old), len(got))
        self.recall[layer] = _longer(old, steps) + _longer(got, steps)

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        if not self.recall:
            raise ConfigError("qwen1m: the refinement was shown no layer")
        heads = next(iter(self.recall.values())).shape[1]
        many = torch.zeros(self.layers, heads, dtype=torch.int64)
        recall = torch.full(many.shape, math.nan, dtype=torch.float64)
        for layer, total in self.recall.items():
            mean = total / self.prompts[layer]
            met = mean >= self.target - 1e-9
            many[layer] = torch.where(met.any(0), met.int().argmax(0), len(mean) - 1)
            recall[layer] = mean.gather(0, many[layer][None])[0]
        shown = sorted(self.recall)
        some, reached = many[shown], recall[shown]
        columns, diagonals = self._sizes(0)
        tensors = {
            "columns": (columns + many * self.method.step).int(),
            "diagonals": (diagonals + many * self.method.step).int(),
            "recall": recall.float(),
        }
        report = {
            "recall": float(reached.mean()),
            "worst_recall": float(reached.min()),
            "missed": int((reached < self.target - 1e-9).sum()),
            "steps": {str(t): int((some == t).sum()) for t in some.unique().tolist()},
        }
        return Found(tensors=tensors, report=report)

    def state(self) -> dict[str, Tensor]:
        out = {"layers": torch.tensor(self.layers)}
        for layer, total in self.recall.items():
            out |= {f"recall.{layer}": total, f"prompts.{layer}": torch.tensor(self.prompts[layer])}
        return out

    def resume(self, state: dict[str, Tensor]) -> None:
        self.layers = int(state["layers"])
        for key, value in state.items():
            name, _, layer = key.partition(".")
            if name == "recall":
                self.recall[int(layer)] = value.clone()
            elif name == "prompts":
                self.prompts[int(layer)] = int(value)


def _longer(t: Tensor, steps: int) -> Tensor:
    """The last row repeated up to `steps` rows."""
    return torch.cat([t, t[-1:].expand(steps - len(t), -1)])
