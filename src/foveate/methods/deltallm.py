"""DeltaLLM: far keys are read through a reference that moves only where a key changes enough; near ones as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..scores.delta import advance, references
from .base import AttnInput, Method, State, option

BLOCK = 128  # query rows of the window's grid


@dataclass(frozen=True)
class DeltaLLM(Method):
    """Qi et al. 2025, "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference"
    (arXiv 2507.19608).

    Neighbouring keys are alike, so each element of a key is stored as its difference from a running reference, and as
    nothing where that is below `theta`. A query's logits are exact for the `window` newest keys and come from the
    references beyond it; the softmax runs over all keys. Every pair is computed and the layout is dense: what gets sparse
    are the elements of keys, so hardware that skips multiplications by zero gains and a GPU does not. Research
    arithmetic, here to measure what the approximation loses; `scores.delta.zero_share` tells what it would save.

    The reference begins with the first key itself, so that the sink stays exact. `rotated` takes differences of the keys as
    stored; without it, of the keys before the model's rotation, with references rotated again (needs `x.rope`). The paper
    names no theta and window that hold for all models: 1.0 leaves out 50 to 70 % of the key elements of SmolLM2.
    """

    theta: float = option(1.0, low=0, help="least change of a key element that is stored")
    window: int = option(128, low=1, help="newest keys whose logits are exact")
    rotated: bool = option(True, help="differences of keys after rotation, not before")

    id: ClassVar[str] = "deltallm"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    share: ClassVar[str] = "group"
    status: ClassVar[str] = "research"
    source: ClassVar[str] = "Qi et al. 2025, arXiv 2507.19608"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"theta": 1.0, "window": 256}}

    @property
    def min_length(self) -> int:
        """Inside the window all is exact."""
        return self.window + 1

    def refuses(self, recipe: Any) -> str | None:
        return "its references follow every key of the text" if recipe.cache is not None else None

    def attend(self, x: AttnInput, plan: Layout, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, None): one softmax over near keys as they are and far keys as their references."""
        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=x.backend, return_lse=True)
        if x.kv.pos is not None:
            x.note("deltallm: this cache has evicted entries; their successors have no references, so attention is exact")
        if x.kv.pos is not None or x.kv.capacity <= self.window:
            out, lse = attend(x.q, x.kv, plan, **how)
            return out, lse, None
        assert x.q_pos is not None
        block = BLOCK if x.phase == "prefill" else 1
        grid: dict[str, Any] = dict(block_q=block, q_offset=x.offset(block), q_pos=x.q_pos)
        near = Layout.static(x.shape, window=self.window, device=x.device, validate=False, **grid)
        # A query that stood `window` tokens earlier sees exactly the keys beyond the window.
        far = Layout.dense(*x.shape, q_pos=x.q_pos - self.window)
        out, lse = attend(x.q, x.kv, Parts((Part(near), Part(far, kv=self._far(x, state)))), **how)
        return out, lse, None

    def _far(self, x: AttnInput, state: State) -> KV:
        """The same entries with references in place of keys."""
        kv = x.kv.to_dense()  # a copy where storage is paged or rows differ in length
        if x.phase == "decode":
            held = state.layer.get("deltallm.references")
            if held is None or held.setting != (self.theta, self.rotated):
                held = state.layer["deltallm.references"] = References(self)
            keys = held.update(x, kv)
        else:
            keys = references(self.before(x, kv.k), self.theta)
        if not self.rotated:
            assert x.rope is not None
            keys = x.rope.rotate(keys, torch.arange(keys.shape[2], device=x.device).expand(keys.shape[0], -1))
        return KV.dense(keys, kv.v, len=kv.len, bias=kv.bias)

    def before(self, x: AttnInput, k: Tensor, pos: Tensor | None = None) -> Tensor:
        """Keys `[B, G, n, D]` as differences are taken of them; at positions pos `[B, n]`, or 0..n-1."""
        if self.rotated:
            return k
        if x.rope is None:
            raise UnsupportedError("deltallm: rotated=false needs the model's rotation, and the adapter has none here")
        return x.rope.unrotate(k, torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1) if pos is None else pos)


class References:
    """Reference keys of decode, `[B, G, capacity, D]`, kept beside the layer's cache in the space where differences are
    taken. A step that follows the last one adds one for each row; anything else computes them again."""

    def __init__(self, method: DeltaLLM):
        self.method, self.setting = method, (method.theta, method.rotated)
        self.data: Tensor | None = None
        self.step = -1  # the decode step of the last update

    def update(self, x: AttnInput, kv: KV) -> Tensor:
        """References of the dense view `kv`, `[B, G, M, D]`."""
        m, fresh = kv.capacity, self.data is None or x.step == 0 or x.step != self.step + 1
        data = self._reserved(kv.k, m)
        if fresh:
            data[:, :, :m] = references(self.method.before(x, kv.k), self.method.theta)
        else:
            at = (kv.lengths() - 1)[..., None]  # [B, G, 1]: the newest entry of each row
            spot = at[..., None].expand(-1, -1, -1, kv.k.shape[-1])
            new = self.method.before(x, kv.k.gather(2, spot), at[:, 0])
            held = data.gather(2, (spot - 1).clamp(min=0))
            data.scatter_(2, spot, torch.where(spot == 0, new, advance(new, held, self.method.theta)))
        self.step = x.step
        return data[:, :, :m]

    def _reserved(self, k: Tensor, m: int) -> Tensor:
        if self.data is None or self.data.shape[2] < m:
            new = k.new_zeros(*k.shape[:2], m + max(64, m // 8), k.shape[3])
            if self.data is not None:
                new[:, :, : self.data.shape[2]] = self.data
            self.data = new
        return self.data

    # ------------------------------------------------------------------ with the cache
    def truncate(self, n: int) -> None:
        """References of what stays hold: none depends on a later key."""

    def fork(self) -> References:
        out = References(self.method)
        out.data, out.step = None if self.data is None else self.data.clone(), self.step
        return out

    def reorder(self, index: Tensor) -> None:
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))
