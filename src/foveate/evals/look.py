"""What a recipe computed and missed while it answered one sample: density, attention mass, and whether it saw the needle."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diagnosis import Diagnosis, of_entries
from ..layout import Layout, Parts
from ..methods.base import AttnInput
from ..recipe import Recipe
from .task import Encoded

ROWS = 32  # question rows of a head that are looked at
STEPS = 4  # decode steps that are looked at


@dataclass
class Look(Diagnosis):
    """A diagnosis of one sample (batch 1) that also asks for each head whether its layout names a key of every needle.

    Attributes:
        whole: count pairs and mass as well; not where an eviction comes before the question, for then the keys that
            are left are no measure of attention mass.
        needles: (first, last + 1) tokens. question_at: rows from here on ask; in decode every row does.
        hits: per phase, share of heads that see every needle, one number a layer and call.
    """

    whole: bool = True
    needles: tuple[tuple[int, int], ...] = ()
    question_at: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    hits: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        if x.phase == "decode" and (done := self.steps.get(x.layer, 0)) >= STEPS:
            return
        if x.phase == "decode":
            self.steps[x.layer] = done + 1
        if self.whole:
            super().attended(x, plan, out)
        layouts = of_entries(x, plan)
        assert x.q_pos is not None
        rows = (x.q_pos[0] >= self.question_at).nonzero()[:, 0][-ROWS:]
        if not self.needles or not layouts or not len(rows) or x.window is not None:
            return
        at = x.kv.positions()[0]  # [G or 1, M] text positions of the entries
        exists = x.kv.exists()[0]
        named = torch.stack([layout.to_mask(kv, rows=rows)[0] for layout, kv in layouts]).any(0)
        heads = named.any(1)  # [H, M]
        seen = heads.new_ones(heads.shape[0])
        for first, last in self.needles:
            inside = (at >= first) & (at < last) & exists
            inside = inside.expand(max(inside.shape[0], 1), -1).repeat_interleave(heads.shape[0] // inside.shape[0], 0)
            seen &= (heads & inside).any(-1)
        self.hits[x.phase].append(float(seen.float().mean()))

    def values(self) -> dict[str, float]:
        """What was seen, under the names of `Record.values`; what was not measured is left out."""
        mean = lambda v: sum(v) / len(v) if v else None  # noqa: E731
        found = {
            "density": self.named["prefill"].value,
            "computed": self.computed["prefill"].value,
            "mass": self.mass_kept("prefill"),
            "needle_hit": mean(self.hits["prefill"]),
            "decode_density": self.named["decode"].value,
            "decode_computed": self.computed["decode"].value,
            "decode_mass": self.mass_kept("decode"),
            "decode_needle_hit": mean(self.hits["decode"]),
        }
        return {name: float(value) for name, value in found.items() if value is not None}


def look(recipe: Recipe, encoded: Encoded, protocol: str, backend: str | None, seed: int) -> Look:
    """A meter for one sample under a protocol."""
    whole = protocol == "seen" or (protocol == "chunked" and not recipe.evicts)
    return Look(recipe, backend, seed=seed, whole=whole, needles=encoded.needles, question_at=encoded.question_at)
