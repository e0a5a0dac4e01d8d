"""Sparsity refinement of Qwen2.5-1M: both sizes of a head grow until the mass it keeps meets the target."""

from __future__ import annotations

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
    worst of its heads.
    """

    passes = 1
    wants_grad = False

    def __init__(self, method: Qwen1M, target: Target):
        if target.kind != "recall":
            raise ConfigError(f"qwen1m: target expected recall=, which its refinement grows towards, got {target}")
        self.target = target.value
        self.method = replace(method, profile=None, sparse=True, threshold=0)
        self.layers: list[Tensor] = []  # per layer, recall summed over prompts, fp64 [steps, Hl]
        self.prompts = 0

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from ..kernels.dispatch import attend

        self.prompts += x.layer == 0
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
        self._add(x.layer, torch.stack(got))

    def _sizes(self, steps: int) -> tuple[int, int]:
        return self.method.columns + steps * self.method.step, self.method.diagonals + steps * self.method.step

    def _add(self, layer: int, got: Tensor) -> None:
        """Add one prompt's recalls `[steps, Hl]`; a prompt that stopped earlier keeps what it had reached."""
        if layer == len(self.layers):
            self.layers.append(got)
            return
        old = self.layers[layer]
        steps = max(len(old), len(got))
        self.layers[layer] = _longer(old, steps) + _longer(got, steps)

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        steps, recall = [], []
        for total in self.layers:
            mean = total / max(1, self.prompts)
            met = mean >= self.target - 1e-9
            first = torch.where(met.any(0), met.int().argmax(0), len(mean) - 1)
            steps.append(first)
            recall.append(mean.gather(0, first[None])[0])
        many, reached = torch.stack(steps), torch.stack(recall)
        columns, diagonals = self._sizes(0)
        tensors = {
            "columns": (columns + many * self.method.step).int(),
            "diagonals": (diagonals + many * self.method.step).int(),
            "recall": reached.float(),
        }
        report = {
            "recall": float(reached.mean()),
            "worst_recall": float(reached.min()),
            "missed": int((reached < self.target - 1e-9).sum()),
            "steps": {str(t): int((many == t).sum()) for t in many.unique().tolist()},
        }
        return Found(tensors=tensors, report=report)

    def state(self) -> dict[str, Tensor]:
        steps = max((len(t) for t in self.layers), default=0)
        done = {"recall": torch.stack([_longer(t, steps) for t in self.layers])} if self.layers else {}
        return {"prompts": torch.tensor(self.prompts), **done}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.prompts = int(state["prompts"])
        self.layers = list(state["recall"].clone().unbind(0)) if "recall" in state else []


def _longer(t: Tensor, steps: int) -> Tensor:
    """The last row repeated up to `steps` rows."""
    return torch.cat([t, t[-1:].expand(steps - len(t), -1)])
