"""Adamas: every token ranked by the distance of two-bit Hadamard codes to the query's; exact attention on the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..layout import Layout
from ..scores.entries import best_entries, best_tokens
from ..scores.labels import Codes
from .base import AttnInput, Method, State, option, shared
from .search import Knob

CODES = "adamas.codes"


@dataclass(frozen=True)
class Adamas(Method):
    """Yan et al. 2025, "Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference" (arXiv 2510.18413).

    Queries and keys are turned by a Hadamard matrix, which spreads outliers over all channels, and each channel becomes
    a code from 0 to 3 by the thresholds -theta, 0 and theta. A decode query attends to the `budget` tokens whose codes
    are nearest to its own (sum of absolute differences), its own token always among them; equal distances go to the
    later token. `share="group"` ranks by the nearest of the query heads of a kv head. The first `dense_layers` layers
    stay dense.

    `theta` of 10 is the paper's, for Llama-2's keys; where activations are smaller, all codes are 1 or 2 and only signs
    count. `unit="std"` (preset "std") counts theta in standard deviations instead: for keys that of the first 64 entries
    of a row and kv head, never computed again, for a query its own; steps are captured once every row has these 64.
    Differs from the published kernel, which takes codes 1 and 2 to be 3 apart: here they are 1 apart, as in the paper. The
    norm of a key is not part of its code, and weights of entries in an evicted cache do not change their rank.
    """

    budget: int = option(128, low=1, help="tokens a query reads")
    theta: float = option(10.0, low=0.0, help="threshold between codes, in the given unit")
    unit: str = option("absolute", choices=("absolute", "std"), help="unit of theta: absolute or in standard deviations")
    dense_layers: int = option(2, low=0, help="first layers, which stay dense")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "adamas"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    source: ClassVar[str] = "Yan et al. 2025, arXiv 2510.18413"
    knob: ClassVar[Knob | None] = Knob("budget", 32, 65536, log=True, whole=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"budget": 256, "unit": "std", "theta": 0.5},
        "std": {"unit": "std", "theta": 0.5},
    }

    @property
    def min_length(self) -> int:
        return self.budget + 1

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.layer < self.dense_layers or x.kv.capacity <= self.budget:
            return None
        codes = state.layer.get(CODES)
        if not isinstance(codes, Codes):
            codes = state.layer[CODES] = Codes(x.q.shape[-1], self.theta, self.unit == "std", x.device)
        group = self.share == "group"
        if x.kv.bias is None and x.kv.pos is None:
            near = codes.rank(x.q, x.kv, x.step, group=group)
            entries, count = best_entries(near, self.budget, length=x.kv.len, late=True)
        else:
            codes.update(x.kv, x.step)
            entries, count = best_tokens(-codes.distance(x.q), x.kv, self.budget, group=group, recent=True)
        return Layout(x.shape, q_pos=x.layout_pos(), entries=entries[:, :, None], entry_count=count[:, :, None])
