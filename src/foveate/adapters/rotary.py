"""The model's own rotation, for methods that look at keys or queries before it.

The modelling file's `apply_rotary_pos_emb` does the arithmetic (halves, interleaved pairs, partial widths: each family
has its own), the decoder's `rotary_emb` gives cos and sin. Some layers do not rotate at all (NoPE).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


class ModelRope:
    """`methods.base.Rope` over a model's rotary modules."""

    def __init__(self, rotary: Any, function: Any, layer_type: str | None):
        self.rotary, self.function, self.layer_type = rotary, function, layer_type

    @property
    def steady(self) -> bool:
        """Angles are products of the position and fixed frequencies, whatever the length: distances alone decide."""
        kinds = getattr(self.rotary, "rope_type", "default")
        return not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds])

    def _tables(self, x: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        args = (x, pos) if self.layer_type is None else (x, pos, self.layer_type)
        cos, sin = self.rotary(*args)
        return cos, sin

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = self._tables(x, pos)
        return self.function(x, x, cos, sin)[0]  # type: ignore[no-any-return]

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        cos, sin = self._tables(x.float(), pos)
        size = cos * cos + sin * sin  # not 1 where the family scales its tables (YaRN)
        return self.function(x.float(), x.float(), cos / size, -sin / size)[0].to(x.dtype)  # type: ignore[no-any-return]


class NoRope:
    """A layer without positions."""

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return x

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        return x


def rope_of(decoder: Any, module: torch.nn.Module) -> ModelRope | NoRope | None:
    """The rotation of this attention layer; None where the model's parts are not found under their usual names."""
    rotary = getattr(decoder, "rotary_emb", None)
    function = getattr(sys.modules.get(type(module).__module__), "apply_rotary_pos_emb", None)
    if rotary is None or function is None:
        return None
    config = decoder.config
    if not getattr(module, "use_rope", True):
        return NoRope()
    if config.model_type == "cohere2" and getattr(module, "sliding_window", None) is None:
        return NoRope()
    kinds = getattr(config, "layer_types", None)
    by_type = kinds is not None and any(hasattr(rotary, f"{kind}_inv_freq") for kind in set(kinds))
    return ModelRope(rotary, function, kinds[module.layer_idx] if by_type else None)  # type: ignore[index]
