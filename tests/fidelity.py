"""Queries and keys on which a method's selection is compared, index by index, with a slow transcription of its card.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_selection(case):
        q, k, v, rope = case.make()            # fp32 [1, H, N, D], [1, G, N, D], [1, G, N, D]; a rotation with .rotate
        layout = planned("xattention:block=32", case)          # one prefill call, the whole prompt
        layout = planned("xattention:block=32", case, chunks=(128, 256))   # a list: one layout per chunk

Cases: `peaked` (a few keys hold nearly all mass), `diagonal` (each query looks at one distance), `blocks` (runs of queries
look at runs of keys), `flat` (random), and `smollm2-3`, `smollm2-17`: rotated q, k, v of two layers of SmolLM2 reading an
essay (scripts/capture_qk.py), cut to 300 tokens, a length that ends inside every block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from foveate.layout import Layout, Parts
from foveate.recipe import Recipe
from tests.drive import Drive, Rotary

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2_qk.safetensors"


@dataclass(frozen=True)
class Case:
    name: str
    length: int = 300

    def __str__(self) -> str:
        return self.name

    def make(self) -> tuple[Tensor, Tensor, Tensor, Rotary]:
        """(q [1, H, N, D], k [1, G, N, D], v [1, G, N, D], rotation), always the same."""
        return _make(self.name, self.length)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.make()[0].shape[-1])


@cache
def _make(name: str, n: int) -> tuple[Tensor, Tensor, Tensor, Rotary]:
    if name.startswith("smollm2"):
        layer = name.split("-")[1]
        tensors = load_file(FIXTURE)
        q, k, v = (tensors[f"{t}{layer}"][:, :, :n].float() for t in "qkv")
        return q, k, v, Rotary(q.shape[-1], 1e5)
    gen = torch.Generator().manual_seed(sum(map(ord, name)))
    h, g, d = 4, 2, 32
    q, k, v = (torch.randn(1, heads, n, d, generator=gen) for heads in (h, g, g))
    if name == "peaked":
        for at in (0, 41, 137, 222):
            k[:, :, at] = 0
            k[:, :, at, at % d] = 6.0
            q[:, :, :, at % d] = q[:, :, :, at % d].abs() + 2.0
    elif name == "diagonal":  # query i carries the code of key i - 23 of its kv head
        code = torch.randn(1, g, n, d, generator=gen)
        k = 1.5 * code
        q = 0.3 * q + 3.0 * torch.roll(code, 23, 2).repeat_interleave(h // g, 1)
    elif name == "blocks":  # runs of 48 rows share a direction with runs of 32 keys
        codes = torch.randn(7, d, generator=gen)
        rows, keys = torch.arange(n) // 48 % 7, torch.arange(n) // 32 * 3 % 7
        q, k = 0.5 * q + 2.0 * codes[rows], 0.5 * k + 2.0 * codes[keys]
    else:
        assert name == "flat"
    return q, k, v, Rotary(d)


CASES = [Case(n) for n in ("peaked", "diagonal", "blocks", "flat", "smollm2-3", "smollm2-17")]


def planned(recipe: str, case: Case, chunks: tuple[int, ...] = (), layer: int = 2) -> Layout | Parts | list[Layout | Parts]:
    """What a recipe's prefill method plans for this case: of the whole prompt, or one per chunk cut at `chunks`."""
    q, k, v, rope = case.make()
    drive = Drive(Recipe.of(recipe), d=q.shape[-1], layer=layer)
    object.__setattr__(drive.info, "rope", rope)
    cuts = (0, *chunks, q.shape[2])
    for a, b in zip(cuts, cuts[1:], strict=False):
        drive(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
    plans = [plan for _, plan, _ in drive.watch.calls]
    return plans if chunks else plans[0]
