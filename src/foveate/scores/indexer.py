"""The lightning indexer: a few small heads score every earlier token for a query, one score for all attention heads.

DeepSeek-AI 2025, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, pad

from ..errors import ConfigError
from ..kv import KV
from ..packed import PackedKV
from . import fused
from .keys import BUDGET, GPU_BUDGET, pieces
from .turns import Turns

if TYPE_CHECKING:
    from ..methods.base import AttnInput, Rope

FLOOR = 1e-4  # the least magnitude a scale is made for; the largest number of e4m3 is 448
EPS = 1e-6


@dataclass(frozen=True)
class Indexer:
    """One layer's weights, fp32.

    Attributes:
        query: `[HI, DI, Fq]`. key: `[DI, Fk]`. weight: `[HI, Fq]`. norm: `[2, DI]`, scale and shift of the keys' LayerNorm.
        rope: how many of the first dims of DI are rotated, in halves (dim i with dim i + rope / 2). theta: their base.
        fp8: queries and keys are rounded to e4m3 after a Hadamard transform, as published.
    Fq is H * D (queries of all heads before rotation, side by side) or D (their mean); Fk likewise with G.
    """

    query: Tensor
    key: Tensor
    weight: Tensor
    norm: Tensor
    rope: int
    theta: float
    fp8: bool

    def check(self, heads: int, groups: int, width: int) -> None:
        """ConfigError unless these weights fit each other and H = `heads`, G = `groups`, D = `width`."""
        hi, di = self.query.shape[0], self.query.shape[1] if self.query.dim() == 3 else -1
        wanted: dict[str, tuple[Tensor, list[tuple[int, ...]]]] = {
            "q": (self.query, [(hi, di, heads * width), (hi, di, width)]),
            "k": (self.key, [(di, groups * width), (di, width)]),
            "w": (self.weight, [(hi, *self.query.shape[2:])]),
            "norm": (self.norm, [(2, di)]),
        }
        for name, (t, shapes) in wanted.items():
            if tuple(t.shape) not in shapes:
                said = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
                raise ConfigError(f"indexer: expected {name} weights {said} for this model, got {list(t.shape)}")
        if self.rope % 2 or not 0 <= self.rope <= di:
            raise ConfigError(f"indexer: rope_dims expected an even number between 0 and {di}, got {self.rope}")
        if self.fp8 and (di > 128 or di & (di - 1)):
            raise ConfigError(f"indexer: fp8 expected a width that is a power of two up to 128, got {di}")

    def queries(self, features: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, n, HI, DI]` and their weights `[B, n, HI]` (scales included) from features `[B, n, Fq]`."""
        hi, di = self.query.shape[:2]
        q = self._turn((features @ self.query.flatten(0, 1).T).unflatten(-1, (hi, di)), pos[..., None])
        w = features @ self.weight.T * (hi * di) ** -0.5
        if not self.fp8:
            return q, w
        q, scale = round8(hadamard(q))
        return q, w * scale

    def keys(self, features: Tensor, pos: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys `[B, n, DI]` of features `[B, n, Fk]`; with fp8 rounded ones and a scale `[B, n]` for their scores."""
        k = layer_norm(features @ self.key.T, self.key.shape[:1], self.norm[0], self.norm[1], EPS)
        k = self._turn(k, pos)
        return round8(hadamard(k)) if self.fp8 else (k, None)

    def _turn(self, x: Tensor, pos: Tensor) -> Tensor:
        half = self.rope // 2
        if half == 0:
            return x
        a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        c, s = (t.to(x.dtype) for t in self.turn(pos))
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    def turn(self, pos: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., rope / 2]` of positions `[...]`."""
        half = self.rope // 2
        angle = pos[..., None] * self.theta ** (-torch.arange(half, device=pos.device) / half)
        return angle.cos(), angle.sin()


def scores(q: Tensor, w: Tensor, k: Tensor, scale: Tensor | None = None) -> Tensor:
    """sum over j of w_j ReLU(q_j . k), `[B, n, M]`, for q `[B, n, HI, DI]`, w `[B, n, HI]`, k `[B, M, DI]`.

    One head at a time: nothing of size HI x n x M is held, but for a single query. `scale` `[B, M]` multiplies sums; it is
    positive, so that this is the score of k * scale.
    """
    k = k.mT.to(q.dtype)
    if q.shape[1] == 1:
        out = w @ (q[:, 0] @ k).relu_()
    else:
        out = (q[:, :, 0] @ k).relu_().mul_(w[:, :, 0, None])
        for j in range(1, q.shape[2]):
            out.addcmul_((q[:, :, j] @ k).relu_(), w[:, :, j, None])
    return out if scale is None else out.mul_(scale[:, None])


def hadamard(x: Tensor) -> Tensor:
    """x times the Hadamard matrix of its last dim (a power of two) / sqrt(dim): dot products stay what they are."""
    n = x.shape[-1]
    y = x
    for half in (1 << i for i in range(n.bit_length() - 1)):
        y = y.unflatten(-1, (-1, 2, half))
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2).flatten(-3)
    return y * n**-0.5


def round8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers that e4m3 holds, fp32; their scale without the last dim, a power of two): x is about the product."""
    most = x.abs().amax(-1).clamp(min=FLOOR).float()
    # Of the least power of two that brings it down to 1.75 * 2^8, by its bits: logarithms differ between devices.
    scale = ((((most.view(torch.int32) + 0x1FFFFF) >> 23) - 8) << 23).view(torch.float32)
    return (x / scale[..., None]).to(torch.float8_e4m3fn).to(x.dtype), scale


# ---------------------------------------------------------------------- features
def flat(x: Tensor, pos: Tensor, rope: Rope, width: int) -> Tensor:
    """Rotated `[B, heads, n, D]` at positions `[B, n]` -> fp32 features `[B, n, width]`: all heads, or D: their mean."""
    raw = rope.unrotate(x.float(), pos)
    if width == x.shape[-1]:
        return raw.mean(1)
    return raw.transpose(1, 2).flatten(2)


class IndexKeys:
    """The indexer's keys of all entries, beside a layer's cache: DI bytes and a scale a token with fp8, else fp32.

    `update` computes those of new entries. It counts on the host where lengths are the host's, and on decode steps where
    they are not: a step that follows the last one has one new entry in each row, the last. For views in text order.
    """

    def __init__(self) -> None:
        self.data: Tensor | None = None  # [B, room, DI], fp32 or e4m3 as uint8
        self.scale: Tensor | None = None  # [B, room]
        self.done = 0  # entries covered, for views whose length the host knows
        self.step: int | None = None  # the last decode step covered

    def update(self, x: AttnInput, indexer: Indexer) -> None:
        """Cover all entries of x.kv."""
        assert x.rope is not None
        first = self._begin(x, indexer)
        if first is None:
            self._compute(x.kv, x.rope, x.kv.lengths()[:, :1] - 1, indexer)
        else:
            self._compute(x.kv, x.rope, torch.arange(first, self._size(x), device=x.device)[None], indexer)
        self._end(x)

    def rank(self, x: AttnInput, indexer: Indexer, shared: dict[str, Any]) -> Tensor:
        """Cover all entries of a decode step and score them: fp32 `[B, 1, M]`. `shared`: `state.step`, for all layers.

        Entries that do not exist have no meaning. On a GPU three kernels do this, up to the order of sums.
        """
        assert x.rope is not None and x.q_pos is not None
        kernels = self._kernels(x, indexer)
        turns = None if kernels is None else Turns.of(x, shared, "indexer.turns")
        if kernels is None or turns is None:
            self.update(x, indexer)
            q, w = indexer.queries(flat(x.q, x.q_pos, x.rope, indexer.query.shape[2]), x.q_pos)
            return scores(q, w, *self.read(x.kv.capacity))
        first, m = self._begin(x, indexer), x.kv.capacity
        grown = (first is None or first == m - 1) and not isinstance(x.kv, PackedKV)
        if grown:
            self._end(x)
        else:
            self.update(x, indexer)
        own = shared.setdefault("indexer.own", {})
        if (which := (indexer.rope, indexer.theta)) not in own:
            own[which] = torch.stack(indexer.turn(x.q_pos[:, 0]), 1)
        weights = indexer.query, indexer.key, indexer.weight, indexer.norm
        back, sizes = (*turns.plain(), turns.partner), {"eps": EPS, "floor": FLOOR}
        score: Tensor = kernels.rank(x.q, x.kv, weights, back, own[which], self.data, self.scale, append=grown, **sizes)
        return score

    def score(self, q: Tensor, w: Tensor, pos: Tensor, m: int, kernels: ModuleType | None) -> Tensor:
        """`scores` of the first m entries, fp32 `[B, n, m]`, for queries at positions `[B, n]`; what comes after a query has
        no meaning. `kernels`: what `twin` gives."""
        if kernels is None:
            return scores(q, w, *self.read(m))
        score: Tensor = kernels.score_prompt(q, w, self.data, self.scale, pos, m)
        return score

    @staticmethod
    def twin(x: AttnInput, indexer: Indexer) -> ModuleType | None:
        """The kernels of scores, where they serve this indexer and device."""
        kernels = fused.indexers(x.q) if indexer.fp8 else None
        return kernels if kernels is not None and kernels.serves(*indexer.query.shape[:2]) else None

    def read(self, m: int) -> tuple[Tensor, Tensor | None]:
        """Keys `[B, m, DI]` as floats, and their scales `[B, m]`."""
        assert self.data is not None
        data = self.data[:, :m]
        if self.scale is None:
            return data, None
        return data.view(torch.float8_e4m3fn).float(), self.scale[:, :m]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale) if t is not None)

    def _kernels(self, x: AttnInput, indexer: Indexer) -> ModuleType | None:
        """The twin of `update`, `Indexer.queries` and `scores` in a decode step, where it serves."""
        plain = x.kv.pos is None and x.kv.bias is None and x.kv.kind != "ragged" and x.kv.dtype == x.q.dtype
        return self.twin(x, indexer) if plain else None

    @staticmethod
    def _known(x: AttnInput) -> bool:
        return x.phase == "prefill" or x.kv.len is None

    @staticmethod
    def _size(x: AttnInput) -> int:
        return x.start + x.q.shape[2] if x.phase == "prefill" else x.kv.capacity

    def _begin(self, x: AttnInput, indexer: Indexer) -> int | None:
        """Make room, and tell the first entry that is missing; None: the newest of each row, and nothing else."""
        self._reserve(x.kv, self._size(x), indexer)
        if self._known(x):
            return min(self._size(x) - 1, self.done)
        return None if self.step is not None and x.step == self.step + 1 else 0

    def _end(self, x: AttnInput) -> None:
        self.done, self.step = self._size(x) if self._known(x) else 0, x.step if x.phase == "decode" else None

    def _compute(self, kv: KV, rope: Rope, entries: Tensor, indexer: Indexer) -> None:
        """Keys of entries `[B|1, n]`, to their places."""
        assert self.data is not None
        b, g, _, d, _ = kv.shape
        last = (kv.lengths()[:, :1] - 1).clamp(min=0)
        for lo, hi in pieces(entries.shape[1], 4 * b * g * d, GPU_BUDGET // 2 if kv.device.type == "cuda" else BUDGET):
            at = entries[:, lo:hi].expand(b, -1)
            k, _ = kv.gather(torch.minimum(at, last)[:, None].expand(-1, g, -1))  # what does not exist is not read
            new, scale = indexer.keys(flat(k, at, rope, indexer.key.shape[1]), at)
            new = new if scale is None else new.to(torch.float8_e4m3fn).view(torch.uint8)
            self.data.scatter_(1, at[..., None].expand_as(new), new)
            if scale is not None:
                assert self.scale is not None
                self.scale.scatter_(1, at, scale)

    def _reserve(self, kv: KV, m: int, indexer: Indexer) -> None:
        have = 0 if self.data is None or self.data.shape[0] != kv.shape[0] else self.data.shape[1]
        if have == 0:
            self.data = self.scale = None
            self.done, self.step = 0, None
        if have >= m:
            return
        size = m + max(128, m // 8)
        if self.data is not None:
            self.data = pad(self.data, (0, 0, 0, size - have))
            self.scale = None if self.scale is None else pad(self.scale, (0, size - have))
            return
        b, di = kv.shape[0], indexer.key.shape[0]
        self.data = torch.zeros(b, size, di, dtype=torch.uint8 if indexer.fp8 else torch.float32, device=kv.device)
        self.scale = torch.zeros(b, size, device=kv.device) if indexer.fp8 else None

    # ------------------------------------------------------------------ with the cache
    def truncate(self, n: int) -> None:
        """Numbers of steps begin anew after a call of several tokens, and steps within the budget ask for nothing: one that
        seems to follow the last one need not."""
        self.done, self.step = max(0, self.done - n), None

    def fork(self) -> IndexKeys:
        out = IndexKeys()
        out.data, out.scale = (None if t is None else t.clone() for t in (self.data, self.scale))
        out.done, out.step = self.done, self.step
        return out

    def reorder(self, index: Tensor) -> None:
        for name in ("data", "scale"):
            if (t := getattr(self, name)) is not None:
                setattr(self, name, t.index_select(0, index.to(t.device)))
