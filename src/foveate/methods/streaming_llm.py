"""StreamingLLM: a few attention sinks and a window of recent tokens, as a mask and as a cache of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..layout import Layout
from .base import AttnInput, Method, Selection, State, option


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    Row i sees key j <= i when j < sink or i - j < window. As a cache policy it keeps sink + window entries in a ring.
    Positions stay true text positions; the paper's re-assignment inside the cache (for streams beyond the model's
    positions) is not done here.
    """

    sink: int = option(4, low=0)
    window: int = option(2044, low=1)

    id: ClassVar[str] = "streaming_llm"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache")
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"sink": 4, "window": 1020},
        "chat": {"sink": 4, "window": 2000},
    }

    def plan(self, x: AttnInput, state: State) -> Layout:
        return Layout.static(
            x.shape,
            sink=self.sink,
            window=self.window,
            block_q=128 if x.phase == "prefill" else 1,
            q_offset=x.offset(128) if x.phase == "prefill" else 0,
            q_pos=x.layout_pos(),
            device=x.device,
            validate=False,
        )

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        m = x.kv.capacity
        first, last = min(self.sink, m), max(self.sink, m - self.window)
        index = torch.cat([torch.arange(first), torch.arange(min(last, m), m)]).to(x.device)
        return Selection(index.expand(1, x.groups, -1), ring=(self.sink, self.window))
