"""Profiles of lightning indexers made on the fly: weights that see what stands out, or any random ones."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from foveate.profile import Profile
from tests.profiles import folder


@cache
def dsa_profile(d: int = 16, axis: int = 7, layers: int = 4) -> str:
    """For any number of heads: both indexer heads compare the mean query with the mean key, noise beside it; the weight is
    high for queries along `axis`."""
    gen = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}
    for i in range(layers):
        eye = torch.eye(d)
        tensors[f"layer.{i}.q"] = torch.stack([eye, eye + 0.1 * torch.randn(d, d, generator=gen)])
        tensors[f"layer.{i}.k"] = eye.clone()
        tensors[f"layer.{i}.w"] = 0.2 * torch.randn(2, d, generator=gen)
        tensors[f"layer.{i}.w"][:, axis] = 1.0
    return folder(Profile("dsa", {"rope_dims": d}, tensors))


def random_profile(h: int, g: int, d: int, heads: int = 3, width: int = 8, rope: int = 4, **options: float) -> str:
    """Weights over all heads side by side, norms included."""
    gen = torch.Generator().manual_seed(h * 100 + g)
    make = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    tensors: dict[str, Tensor] = {}
    for i in range(4):
        tensors[f"layer.{i}.q"] = make(heads, width, h * d) / (h * d) ** 0.5
        tensors[f"layer.{i}.k"] = make(width, g * d) / (g * d) ** 0.5
        tensors[f"layer.{i}.w"] = make(heads, h * d)
        tensors[f"layer.{i}.norm"] = torch.stack([1 + 0.3 * make(width), 0.3 * make(width)])
    return folder(Profile("dsa", {"rope_dims": rope, **options}, tensors))


class Pairs:
    """A rotation of neighbouring dims, over the first half of them: no family that tests have otherwise."""

    def __init__(self, d: int):
        self.freq = 1e3 ** (-torch.arange(0, d // 2, 2) / d)

    def _turn(self, x, pos, sign):
        a = pos[:, None, :, None].to(x.dtype) * self.freq.to(x.dtype).to(x.device)
        c, s = a.cos(), sign * a.sin()
        first, rest = x.split([2 * len(self.freq), x.shape[-1] - 2 * len(self.freq)], -1)
        x1, x2 = first[..., ::2], first[..., 1::2]
        return torch.cat([torch.stack([x1 * c - x2 * s, x2 * c + x1 * s], -1).flatten(-2), rest], -1)

    def rotate(self, x, pos):
        return self._turn(x, pos, 1.0)

    def unrotate(self, x, pos):
        return self._turn(x, pos, -1.0)
