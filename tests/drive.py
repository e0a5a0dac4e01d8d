"""Drive a recipe with random tensors, no model: what tests/test_methods.py runs every method through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.cache import LayerCache
from foveate.kernels import reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout, Parts
from foveate.recipe import Recipe
from foveate.runtime import Info, Step, attention


@dataclass
class Watch:
    """A meter that keeps every call."""

    calls: list = field(default_factory=list)

    def planned(self, x, plan, seconds):
        pass

    def attended(self, x, plan, out):
        kv = replace(x.kv, k=x.kv.k.clone(), v=x.kv.v.clone(), pos=None if x.kv.pos is None else x.kv.pos.clone())
        self.calls.append((replace(x, kv=kv), plan, out))  # a copy: a ring overwrites what the view saw


class Rotary:
    """A plain rotation for tests of methods that need one."""

    def __init__(self, d: int, base: float = 1e4):
        self.freq = base ** (-torch.arange(0, d, 2) / d)

    def _turn(self, x: Tensor, pos: Tensor, sign: float) -> Tensor:
        a = pos[:, None, :, None].to(x.dtype) * self.freq.to(x.dtype)
        c, s = a.cos(), sign * a.sin()
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)

    def rotate(self, x, pos):
        return self._turn(x, pos, 1.0)

    def unrotate(self, x, pos):
        return self._turn(x, pos, -1.0)


class Drive:
    """One layer under a recipe. `backend` "reference" by default: methods are judged on the oracle."""

    def __init__(self, recipe, d=16, backend="reference", layers=4, layer=2, sinks=None, window=None):
        self.recipe = Recipe.of(recipe)
        self.cache = LayerCache()
        self.watch = Watch()
        self.run = {}
        self.notes = {}
        self.info = Info(layer, layers, 1 / math.sqrt(d), rope=Rotary(d), backend=backend, sinks=sinks, window=window)

    def __call__(self, q, k, v, valid=None):
        counts = [q.shape[2]] * q.shape[0] if valid is None else valid.sum(-1).tolist()
        step = Step(valid, counts, run=self.run, meter=self.watch, notes=self.notes)
        return attention(self.recipe, self.cache, q, k, v, step, self.info)

    @property
    def last(self):
        return self.watch.calls[-1]


def qkv(b=1, h=4, g=2, n=50, d=16, dv=None, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=gen, dtype=dtype)  # noqa: E731
    return make(b, h, n, d), make(b, g, n, d), make(b, g, n, dv or d)


def oracle(q: Tensor, kv: KV | tuple, plan: Layout | Parts | None = None, scale=None) -> Tensor:
    """Masked dense attention in fp64."""
    view = KV.of(kv)
    view = KV(view.k.double(), view.v.double(), view.kind, view.capacity, view.len, view.table, view.offsets, view.pos,
              None if view.bias is None else view.bias.double())  # fmt: skip
    layout = plan if plan is not None else Layout.dense(q.shape[0], q.shape[1], q.shape[2], view.capacity)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    return reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want())[0].float()
