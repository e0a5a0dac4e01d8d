"""KIVI: a cache in 2 to 8 bits, keys per channel and values per token, with a recent part in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ConfigError
from .base import AttnInput, Method, Selection, State, option


@dataclass(frozen=True)
class KIVI(Method):
    """Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv 2402.02750).

    Drops nothing: every entry stays, in `bits` bits (values in `value_bits`, by default as many; 16 leaves them as they
    are). Keys are quantised in groups of `group` tokens of one channel, whenever `residual` of them have gathered;
    values in groups of `group` channels of one token, all but the last `residual`. The prompt attends to itself in full
    precision and is quantised when it is over (`compress_at="chunk"`: after each of its chunks, which lowers the peak).
    2 bits, the published default, are meant for models with as many kv heads as query heads; with shared kv heads take
    4. Each group adds two numbers of the cache's own dtype, 1 bit a value for fp16 at group 32. Dense decode steps, and
    steps over listed pages or entries or under a rule, read the codes themselves (one kernel on a GPU, pieces on a CPU);
    prompts, and methods that score raw keys, read a dequantised copy of one layer.
    """

    bits: int = option(2, low=2, high=16, help="bits of a stored key element; 16: not quantised")
    value_bits: int | None = option(None, low=2, high=16, help="bits of a stored value element; none: as bits")
    group: int = option(32, low=1, help="elements that share one scale")
    residual: int = option(128, low=1, help="newest tokens in full precision")

    id: ClassVar[str] = "kivi"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Liu et al. 2024, arXiv 2402.02750"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "gqa": {"bits": 4},
        "8k": {"bits": 4, "group": 64},
        "int8": {"bits": 8, "group": 64},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "value_bits"):
            if (value := getattr(self, name)) not in (None, 2, 4, 8, 16):
                raise ConfigError(f"kivi: {name} expected 2, 4, 8 or 16, got {value}")
        if self.residual % self.group:
            raise ConfigError(f"kivi: residual expected a multiple of group = {self.group}, got {self.residual}")

    @property
    def keeps_all(self) -> bool:
        return True

    def refuses(self, recipe: Any) -> str | None:
        return None if recipe.storage == "dense" else f"it stores entries quantised, which storage={recipe.storage!r} cannot"

    def storage(self) -> dict[str, Any]:
        return {
            "kind": "quantised",
            "bits": self.bits,
            "value_bits": self.value_bits,
            "group": self.group,
            "residual": self.residual,
        }

    def compress(self, x: AttnInput, state: State) -> Selection:
        """Every entry: a quantised store quantises when it is asked to select."""
        return Selection(torch.arange(x.kv.capacity, device=x.device).expand(1, x.groups, -1))
