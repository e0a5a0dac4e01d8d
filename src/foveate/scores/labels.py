"""A small label of every key beside the cache, and the tokens whose labels say they matter: token-level decode.

`Channels`: a few channels of the key, in few bits. Yang et al. 2024, "Post-Training Sparse Attention with Double
Sparsity" (arXiv 2408.07092). `Codes`: two bits for each channel of the key's Hadamard transform. Yan et al. 2025,
"Adamas: Hadamard Sparse Attention for Efficient Long-Context Inference" (arXiv 2510.18413).
"""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ShapeError, UnsupportedError
from ..kv import KV
from ..packed import PackedKV
from . import fused
from .keys import pieces

SAMPLE = 64  # first entries of a row that a basis is learnt from, where no calibration gives one
WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


class Labels:
    """What `encode` makes of each key, kept beside a layer's cache; the model of it is `bounds.Bounds`.

    `update` brings it up to date with a view and reads only new keys, and nothing of it waits for the device once the
    basis is settled. It lives in `state.layer`, whose truncate, fork and reorder it follows; an eviction drops it.

    A basis (channels, thresholds) that no calibration gave is learnt from the first `sample` entries of each row, so that
    a prompt in one piece, in chunks or token by token gives the same labels; up to that many entries it still changes.
    """

    sample = 0

    def __init__(self) -> None:
        self.data: list[Tensor] = []  # each [B, G, size, W]
        self.basis: Tensor | None = None  # [B or 1, G, ...], what `encode` needs
        self.done = 0  # entries of the longest row that are covered
        self.even = False  # they are all entries there are, in every row
        self.least = -1  # the basis holds for rows of at least `sample` entries, and the shortest one has these; -1: none

    def encode(self, k: Tensor) -> tuple[Tensor, ...]:
        """Labels `[B, G, n, W]` of keys `[B, G, n, D]`."""
        raise NotImplementedError

    def learn(self, k: Tensor, live: Tensor) -> Tensor:
        """The basis, from the keys `[B, G, n, D]` where `live` `[B, G, n]`."""
        raise NotImplementedError

    def rank(self, q: Tensor, kv: KV, step: int, *, group: bool) -> Tensor:
        """Cover all entries of `kv` and score them for q `[B, H, 1, D]`: `[B, H, M]`, or `[B, G, M]` with the highest of the
        query heads of each kv head. For views in text order; see `update`. On a GPU one or two kernels do this.
        """
        kernels = self._kernels(q, kv)
        if kernels is None:
            self.update(kv, step)
            score = self._score(q)
            return score.amax(2) if group else score.flatten(1, 2)
        grown = self._grown(kv, step)
        if grown:
            self._reserve(kv, kv.capacity)
            self._covered(kv)
        else:
            self.update(kv, step)
        return self._launch(kernels, q, kv, group, grown)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.data)

    def update(self, kv: KV, step: int) -> None:
        """Cover all entries of `kv`, which continues the view of the last call.

        Args:
            step: decode steps since the last call of several tokens. From the second one on a view that has grown by
                one entry at most, as the host sees it, has one new entry in each row and kv head.
        """
        m, plain = kv.capacity, kv.len is None and kv.pos is None
        if self.data and tuple(self.data[0].shape[:2]) != kv.shape[:2]:
            raise ShapeError(
                f"kv: expected the {list(self.data[0].shape[:2])} rows and kv heads these labels were built for, "
                f"got {list(kv.shape[:2])}"
            )
        changed = self._settle(kv)
        if plain and self.even and self.data and not changed and self.done <= m:
            self._span(kv, self.done, m)
        elif not plain and not changed and self._grown(kv, step):
            self._reserve(kv, m)
            at = newest(kv)[..., None]
            for t, new in zip(self.data, self.encode(keys_at(kv, at)), strict=True):
                t.scatter_(2, at[..., None].expand_as(new), new)
        else:
            self._span(kv, 0, m)
        self._covered(kv)

    # ------------------------------------------------------------------ with the cache
    def truncate(self, n: int) -> None:
        self.done = max(0, self.done - n)
        self.least = max(-1, self.least - n)

    def fork(self) -> Self:
        out = copy.copy(self)
        out.data = [t.clone() for t in self.data]
        return out

    def reorder(self, index: Tensor) -> None:
        self.data = [t.index_select(0, index.to(t.device)) for t in self.data]
        if self.basis is not None and self.basis.shape[0] > 1:
            self.basis = self.basis.index_select(0, index.to(self.basis.device))

    # ------------------------------------------------------------------ inside
    def _score(self, q: Tensor) -> Tensor:
        """What entries are ranked by, `[B, G, r, M]`."""
        raise NotImplementedError

    def _kernels(self, q: Tensor, kv: KV) -> ModuleType | None:
        """The twin of `update` and `_score`, where it serves."""
        plain = kv.pos is None and kv.bias is None and kv.kind != "ragged"
        return fused.labels(q) if plain and kv.dtype == q.dtype else None

    def _launch(self, kernels: ModuleType, q: Tensor, kv: KV, group: bool, append: bool) -> Tensor:
        raise NotImplementedError

    def _grown(self, kv: KV, step: int) -> bool:
        """The view is that of the last call and one new entry in each row and kv head: see `update`."""
        m, settled = kv.capacity, self.sample == 0 or self.least >= self.sample
        if not self.data or tuple(self.data[0].shape[:2]) != kv.shape[:2] or not settled:
            return False
        if kv.len is None and kv.pos is None:
            return self.even and m - self.done == 1
        return step > 0 and 0 <= m - self.done <= 1

    def _covered(self, kv: KV) -> None:
        plain = kv.len is None and kv.pos is None
        self.done, self.even = kv.capacity, plain
        self.least = kv.capacity if plain and self.least >= 0 else self.least

    def _settle(self, kv: KV) -> bool:
        """Learn the basis while a row is shorter than the sample (one look at the device each time); True: it is new."""
        if self.sample == 0 or self.least >= self.sample:
            return False
        if kv.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(f"a captured step cannot learn from keys: every row needs {self.sample} tokens before it")
        n = min(self.sample, kv.capacity)
        entries = torch.arange(n, device=kv.device).expand(*kv.shape[:2], n)
        live = entries < kv.lengths()[..., None]
        self.basis = self.learn(keys_at(kv, entries).masked_fill(~live[..., None], 0), live)
        self.least = int(kv.lengths().min())
        return True

    def _span(self, kv: KV, lo: int, hi: int) -> None:
        """Labels of the entries lo..hi of every row."""
        b, g, _, d, _ = kv.shape
        self._reserve(kv, hi)
        for a, z in pieces(hi - lo, 6 * b * g * d):
            for t, new in zip(self.data, self.encode(key_range(kv, lo + a, lo + z)), strict=True):
                t[:, :, lo + a : lo + z] = new

    def _reserve(self, kv: KV, need: int) -> None:
        """Room for `need` entries: an eighth more than asked for, so that growth copies rarely."""
        if self.data and self.data[0].shape[2] >= need:
            return
        like = self.data or self.encode(key_range(kv, 0, 1))
        new = [t.new_zeros(*kv.shape[:2], need + max(128, need // 8), t.shape[3]) for t in like]
        for t, old in zip(new, self.data, strict=False):
            t[:, :, : old.shape[2]] = old
        self.data = new


class Channels(Labels):
    """Keys on `r` channels, in 2, 4 or 8 bits (packed, with a minimum and a step per key) or 16 (as they are).

    `table` int64 `[G, r]` names the channels of each kv head; None: those of the largest mean |k| in the sample.
    """

    def __init__(self, r: int, bits: int, table: Tensor | None = None):
        super().__init__()
        self.r, self.bits, self.sample = r, bits, SAMPLE if table is None else 0
        self.basis = None if table is None else table[None]

    def learn(self, k: Tensor, live: Tensor) -> Tensor:
        order = k.abs().sum(2, dtype=torch.float32).sort(dim=-1, descending=True, stable=True).indices
        return order[..., : self.r]

    def encode(self, k: Tensor) -> tuple[Tensor, ...]:
        k = self._pick(k)
        if self.bits == 16:
            return (k,)
        return quantise(k, self.bits)

    def score(self, q: Tensor) -> Tensor:
        """q . k on the channels, both as their labels say: fp32 (fp64 for fp64) `[B, G, r, M]`, unscaled.

        q `[B, H, 1, D]`. Entries that do not exist have no meaning.
        """
        acc = torch.promote_types(q.dtype, torch.float32)
        b, g, r = q.shape[0], self.data[0].shape[1], q.shape[1] // self.data[0].shape[1]
        q = self._pick(q.reshape(b, g, r, -1).to(acc))
        if self.bits < 16:
            q = dequantise(*quantise(q, self.bits), self.r, self.bits)
        out = []
        for lo, hi in pieces(self.done, 3 * b * g * self.r):
            part = [t[:, :, lo:hi] for t in self.data]
            if self.bits == 16:
                out.append(q @ part[0].to(acc).transpose(-1, -2))
                continue
            low, step = part[1].to(acc)[:, :, None].unbind(-1)
            levels = unpack(part[0], self.r, self.bits).to(acc)
            out.append(q.sum(-1, keepdim=True) * low + (q @ levels.transpose(-1, -2)) * step)
        return torch.cat(out, -1)

    def _score(self, q: Tensor) -> Tensor:
        return self.score(q)

    def _launch(self, kernels: ModuleType, q: Tensor, kv: KV, group: bool, append: bool) -> Tensor:
        assert self.basis is not None
        score: Tensor = kernels.score(q, kv, self.basis, self.data, self.bits, group=group, append=append)
        return score

    def _pick(self, t: Tensor) -> Tensor:
        """The channels of `[B, G, n, D]`."""
        assert self.basis is not None
        return t.gather(-1, self.basis[:, :, None].expand(*t.shape[:3], -1))


class Codes(Labels):
    """Hadamard transforms of keys in two bits a channel: how many of the thresholds -t, 0, t lie below it.

    `theta` is t, or with `spread` t is theta times the standard deviation: that of the sample's keys, per kv head, for
    keys, and its own for a query. Two planes of bits, packed to words: D / 4 bytes a key for D of at least 8.
    """

    def __init__(self, d: int, theta: float, spread: bool, device: torch.device):
        super().__init__()
        self.theta, self.sample = theta, SAMPLE if spread else 0
        self.matrix = hadamard(d, device)
        self.word = min(64, max(8, d))

    def learn(self, k: Tensor, live: Tensor) -> Tensor:
        k = self._turned(k)
        count = live.sum(-1, dtype=k.dtype).clamp(min=1) * k.shape[-1]
        mean = k.sum((2, 3)) / count
        return ((k.square().sum((2, 3)) / count - mean.square()).clamp(min=0).sqrt() * self.theta)[..., None, None]

    def encode(self, k: Tensor) -> tuple[Tensor, ...]:
        return (self._packed(self._turned(k), self.theta if self.basis is None else self.basis),)

    def distance(self, q: Tensor) -> Tensor:
        """Sum over channels of |code of q - code of k|, int16 `[B, G, r, M]`, for q `[B, H, 1, D]`.

        As the number of different bits in three planes, one for each threshold. Entries that do not exist have no meaning.
        """
        (data,) = self.data
        b, g, r = q.shape[0], data.shape[1], q.shape[1] // data.shape[1]
        turned = self._turned(q.reshape(b, g, r, -1))
        t: Tensor | float = self.theta
        if self.sample:
            t = turned.std(-1, correction=0, keepdim=True) * self.theta
        mine = _planes(self._packed(turned, t)[:, :, :, None])  # [B, G, r, 1, W]
        out = []
        for lo, hi in pieces(self.done, 6 * b * g * r * data.shape[-1]):
            keys = _planes(data[:, :, None, lo:hi])
            out.append(popcount(torch.stack([a ^ k for a, k in zip(mine, keys, strict=True)], -1).flatten(-2)).sum(-1))
        return torch.cat(out, -1).to(torch.int16)  # up to 3 D: bf16 would round it

    def _score(self, q: Tensor) -> Tensor:
        return -self.distance(q)

    def _kernels(self, q: Tensor, kv: KV) -> ModuleType | None:
        kernels = super()._kernels(q, kv)
        return kernels if kernels is not None and kernels.serves_codes(q.shape[-1]) else None

    def _launch(self, kernels: ModuleType, q: Tensor, kv: KV, group: bool, append: bool) -> Tensor:
        near: Tensor = kernels.near(q, kv, self.data[0], self.theta, self.basis, group=group, append=append)
        return near

    def _turned(self, x: Tensor) -> Tensor:
        acc = torch.promote_types(x.dtype, torch.float32)
        return x.to(acc) @ self.matrix.to(acc)

    def _packed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Codes of x `[..., D]` as words `[..., 2 W]`: their high bits, then their low bits."""
        high = x > 0
        low = (x > t) | ((x > -t) & ~high)
        return torch.cat([_words(high, self.word), _words(low, self.word)], -1)


# ---------------------------------------------------------------------- entries
def newest(kv: KV) -> Tensor:
    """int64 `[B, G]`, the entry with the highest text position; a ring writes it anywhere."""
    if kv.pos is None:
        return (kv.lengths() - 1).clamp(min=0)
    live = torch.arange(kv.capacity, device=kv.device) < kv.lengths()[..., None]
    return torch.where(live, kv.pos, -1).argmax(-1)


def key_range(kv: KV, lo: int, hi: int) -> Tensor:
    """Keys `[B, G, hi - lo, D]`; where an entry does not exist, anything."""
    if kv.kind == "dense" and not isinstance(kv, PackedKV):
        return kv.k[:, :, lo:hi]
    return keys_at(kv, torch.arange(lo, hi, device=kv.device).expand(*kv.shape[:2], -1))


def keys_at(kv: KV, entries: Tensor) -> Tensor:
    """Keys `[B, G, n, D]` of entries int64 `[B, G, n]`; of packed ones no others are unpacked."""
    if isinstance(kv, PackedKV):
        return kv.keys_at(entries)
    if kv.kind == "dense":
        return kv.k.gather(2, entries[..., None].expand(-1, -1, -1, kv.k.shape[-1]))
    return kv.k.reshape(-1, kv.k.shape[-1])[kv.rows(entries)]


# ---------------------------------------------------------------------- bits
def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(levels 0 .. 2^bits - 1 of x `[..., r]`, packed uint8 `[..., ceil(r * bits / 8)]`; minimum and step `[..., 2]`).

    Levels are evenly spaced from the least to the largest number of a row, and a row of equal numbers has step 1.
    Minimum and step are fp16 for half types and count as stored, so that a level is never far from its number.
    """
    small = torch.float16 if x.dtype.itemsize == 2 else x.dtype
    acc = torch.promote_types(x.dtype, torch.float32)
    x = x.to(acc)
    low, high = x.amin(-1), x.amax(-1)
    step = ((high - low) / high.new_full((), 2**bits - 1)).to(small)  # a true division: by a number, devices differ
    scale = torch.stack([low.to(small), torch.where(step > 0, step, 1)], -1)
    low, step = scale.to(acc)[..., None, :].unbind(-1)
    level = ((x - low) / step).round().clamp(0, 2**bits - 1).nan_to_num(0).to(torch.uint8)
    per = 8 // bits
    shift = torch.arange(per, device=x.device, dtype=torch.uint8) * bits
    level = pad(level, (0, -x.shape[-1] % per)).unflatten(-1, (-1, per))
    return (level << shift).sum(-1, dtype=torch.uint8), scale


def unpack(packed: Tensor, r: int, bits: int) -> Tensor:
    """uint8 `[..., r]`, the levels of `quantise`."""
    shift = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shift) & (2**bits - 1)).flatten(-2)[..., :r]


def dequantise(packed: Tensor, scale: Tensor, r: int, bits: int) -> Tensor:
    """What `quantise` stands for, `[..., r]` in fp32, or in the dtype of the scale if that is wider."""
    acc = torch.promote_types(scale.dtype, torch.float32)
    low, step = scale.to(acc)[..., None, :].unbind(-1)
    return low + unpack(packed, r, bits).to(acc) * step


def hadamard(d: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal Hadamard matrix fp64 `[d, d]`. UnsupportedError unless d is a power of two."""
    if d < 1 or d & (d - 1):
        raise UnsupportedError(f"head dim: a Hadamard transform needs a power of two, got {d}")
    out = torch.ones(1, 1, dtype=torch.float64)
    while len(out) < d:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    return (out / d**0.5).to(device)


def popcount(x: Tensor) -> Tensor:
    """Bits that are set in each word of x (uint8, int16, int32 or int64), in its dtype."""
    width, shift = 8 * x.element_size(), 1
    while shift < width:
        mask = (2**width - 1) // (2**shift + 1)  # as many zeros as ones, `shift` at a time
        x = (x & mask) + ((x >> shift) & mask)
        shift *= 2
    return x


def _words(bit: Tensor, width: int) -> Tensor:
    """bool `[..., D]` as words of `width` bits, `[..., ceil(D / width)]`."""
    bit = pad(bit, (0, -bit.shape[-1] % width)).unflatten(-1, (-1, width))
    place = torch.arange(width, device=bit.device)
    return (bit.long() << place).sum(-1).to(WORDS[width])


def _planes(words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bits "above -t", "above 0" and "above t" of packed codes."""
    high, low = words.chunk(2, -1)
    return high | low, high, high & low
