"""Which heads ACT should calibrate: those whose calibration lowers the model's loss, to first order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import AttnInput
from .search import Found

if TYPE_CHECKING:
    from .act import ACT


class HeadSearch:
    """The change of the loss when one head alone is calibrated, sum of gradient * change of its output, over prompts.

    The paper calibrates one head after another and keeps those that raise the accuracy on labelled sets: one evaluation
    per head. The gradient gives all of these changes, to first order, in one pass, with the text's own loss for the
    accuracy. Heads with a mean change below zero in the layers from the third to the last but one are kept; the target's
    number has no meaning here.
    """

    passes = 1
    wants_grad = True

    def __init__(self, method: ACT):
        self.method = replace(method, profile=None)
        self.change = torch.zeros(0, 0, dtype=torch.float64)  # [layers, H]
        self.prompts, self.last = 0, 1 << 30  # the layer seen last

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from ..kernels.dispatch import attend
        from .act import Sinks

        if grad is None:
            raise ConfigError("act: the search for heads needs the gradient of the loss, got none")
        if not self.change.numel():
            self.change = torch.zeros(x.layers, x.q.shape[1], dtype=torch.float64)
        self.prompts, self.last = self.prompts + (x.layer <= self.last), x.layer
        heads = self.method.heads(x)
        if heads is None:
            return
        how = dict(scale=x.scale, softcap=x.softcap)
        with torch.no_grad():
            plain, lse, mass = attend(x.q, x.kv, None, return_lse=True, return_mass=True, **how)  # type: ignore[arg-type]
            found = Sinks().add(x, mass, self.method.theta)
            moved = self.method.calibrate(x, plain, lse, found, heads) - plain
            self.change[x.layer] += (grad.double() * moved.double()).sum((0, 2, 3)).cpu()

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        heads = self.change < 0
        mean = self.change / max(1, self.prompts)
        report = {"heads": int(heads.sum()), "of": heads.numel(), "predicted_change": float(mean[heads].sum())}
        plain = {"beta": self.method.beta, "theta": self.method.theta}
        return Found(options=plain, tensors={"heads": heads, "change": mean.float()}, report=report)

    def state(self) -> dict[str, Tensor]:
        return {"change": self.change, "prompts": torch.tensor(self.prompts)}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.change, self.prompts = state["change"].clone(), int(state["prompts"])
