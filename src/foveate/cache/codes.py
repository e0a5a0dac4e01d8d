"""Numbers in 8, 4 or 2 bits with a minimum and a scale per group, packed into bytes, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import Coded
from ..packed import unpack as unpack
from .rows import Rows, put
from .store import SLACK

PIECE = 1 << 24  # numbers quantised at a time (64 MiB in fp32)


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, grouped along `dim`, as (uint8 codes of its shape, scale, low), the latter in x's dtype with size 1 at `dim`.

    low is the group's minimum, scale its range / (2^bits - 1), at least the smallest normal number, so that a group of
    equal numbers comes back exactly. |x - (code * scale + low)| <= scale / 2.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    most = 2**bits - 1
    scale = ((high.float() - low.float()) / most).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
    codes = ((x.float() - low.float()) / scale.float()).round_().clamp_(0, most)
    return codes.to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[..., D]` below 2^bits as bytes `[..., D * bits / 8]`: byte j holds channels j, j + W, j + 2W, ..."""
    wide = codes.shape[-1] * bits // 8
    out = codes[..., :wide].clone()
    for i in range(1, 8 // bits):
        out |= codes[..., i * wide : (i + 1) * wide] << (bits * i)
    return out


class Codes:
    """The quantised entries of all rows, each row's from its first on. Tensors `[B, G, capacity, ...]`.

    codes: bytes `[.., D * bits / 8]`, or at 16 bits the entries themselves. scale, low: in the entries' dtype, one per
    group: `[B, G, capacity / group, 1, D]` for groups of tokens, `[B, G, capacity, D / group, 1]` for groups of channels.
    """

    def __init__(self, like: Tensor, bits: int, group: int, by: str):
        b, g, _, d = like.shape
        self.bits, self.group, self.by = bits, group, by
        self.unit = group if by == "token" and bits < 16 else 1  # tokens that must be quantised together
        self.done = Rows([0] * b, like.device)
        wide = d * bits // 8
        self.codes = like.new_empty(b, g, 0, d) if bits == 16 else like.new_empty(b, g, 0, wide, dtype=torch.uint8)
        few = (0,) if bits == 16 else (1, d) if by == "token" else (d // group, 1)
        self.scale, self.low = like.new_empty(b, g, 0, *few), like.new_empty(b, g, 0, *few)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes} if self.bits == 16 else {"codes": self.codes, "scale": self.scale, "low": self.low}

    def count(self, name: str) -> Rows:
        """How many entries of the tensor of this name are in use."""
        return self.done if name == "codes" else self.done.map(lambda n: n // self.unit)

    def push(self, x: Tensor, counts: Rows) -> None:
        """Quantise the first counts[b] entries of x `[B, G, n, D]`, multiples of `unit`, in bounded memory."""
        b, g, _, d = x.shape
        self._reserve((self.done + counts).most)
        marks, units = self.count("scale"), counts.map(lambda n: n // self.unit)
        step = max(1, PIECE // (self.unit * b * g * d))
        for lo in range(0, units.most, step):
            part = x[:, :, lo * self.unit : min(lo + step, units.most) * self.unit]
            if self.bits == 16:
                put(self.codes, self.done, part, counts, lo)
                continue
            dim = 3 if self.by == "token" else 4
            codes, scale, low = quantise(self._grouped(part), self.bits, dim)
            put(self.codes, self.done, pack(codes.reshape(part.shape), self.bits), counts, lo * self.unit)
            put(self.scale, marks, scale, units, lo)
            put(self.low, marks, low, units, lo)
        self.done = self.done + counts

    def read(self, out: Tensor) -> None:
        """Write what is stored over the first max(done) entries of out `[B, G, m, D]`."""
        n = self.done.most
        here = out[:, :, :n]
        if self.bits == 16:
            here.copy_(self.codes[:, :, :n])
        elif n:
            Coded(self.codes, self.scale, self.low, out, self.done.there(), self.bits, self.group, self.by).read(0, n, here)

    def _grouped(self, x: Tensor) -> Tensor:
        """`[B, G, n, D]` as `[B, G, n / group, group, D]` or `[B, G, n, D / group, group]`, without a copy."""
        return x.unflatten(2, (-1, self.group)) if self.by == "token" else x.unflatten(3, (-1, self.group))

    def _reserve(self, need: int) -> None:
        """Room for `need` entries and a spare slot. It grows by a fixed amount: every step reads all of it anyway."""
        for name, t in self.tensors().items():
            unit = 1 if name == "codes" else self.unit
            have, want = t.shape[2] * unit, need + self.unit
            if want <= have:
                continue
            big = t.new_zeros(*t.shape[:2], -(-(need + max(SLACK, self.unit)) // unit), *t.shape[3:])
            used = self.count(name).most
            big[:, :, :used] = t[:, :, :used]
            setattr(self, name, big)
