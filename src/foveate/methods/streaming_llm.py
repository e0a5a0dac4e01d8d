"""StreamingLLM: a few attention sinks and a window of recent tokens, as a mask and as a cache of constant size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import UnsupportedError
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..scores.rotation import moved
from .base import AttnInput, Method, Selection, State, option
from .search import Knob


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    Row i sees key j <= i when j < sink or i - j < window. As a cache policy it keeps sink + window entries in a ring.

    `positions` "text" leaves all distances as in the text. "cache" counts them inside a cache of sink + window entries,
    as the paper does: a row stands at min(i, sink + window - 1) for the sinks, so no distance ever exceeds the cache
    and a stream may run far beyond the model's positions. Window tokens are neighbours in the text, so their distances
    are true either way, and only the query is rotated a second time, for the sinks; the reference rotates its whole
    cache at each step. In prefill every row then computes what it would as a decode step (the published prefill mask
    has true positions). The query's own token counts towards the window.
    """

    sink: int = option(4, low=0, help="first tokens of the text, always included")
    window: int = option(2044, low=1, help="newest tokens, always included")
    positions: str = option("text", choices=("text", "cache"), help="distances as in the text, or inside the cache")

    id: ClassVar[str] = "streaming_llm"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache")
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    knob: ClassVar[Knob | None] = Knob("window", 32, 65536, log=True, whole=True)
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"sink": 4, "window": 1020},
        "chat": {"sink": 4, "window": 2000},
        "stream": {"sink": 4, "window": 1020, "positions": "cache"},
    }

    @property
    def extends(self) -> bool:  # type: ignore[override]
        """Positions inside the cache stay within the model's, however long the text."""
        return self.positions == "cache"

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | Parts:
        # Nothing has left the cache: every distance inside it is the true one. Entry numbers say so without positions.
        short = x.kv.pos is None and x.kv.capacity <= self.sink + self.window
        if self.positions == "text" or self.sink == 0 or short:
            return self._rule(x, self.sink)
        return Parts((Part(self._rule(x, 0)), self._sinks(x)))

    def _rule(self, x: AttnInput, sink: int) -> Layout:
        return Layout.static(
            x.shape,
            sink=sink,
            window=self.window,
            block_q=128 if x.phase == "prefill" else 1,
            q_offset=x.offset(128) if x.phase == "prefill" else 0,
            q_pos=x.layout_pos(),
            device=x.device,
            validate=False,
        )

    def _sinks(self, x: AttnInput) -> Part:
        """The sinks that have left the window of a row, seen from its place inside the cache."""
        if x.rope is None:
            raise UnsupportedError("streaming_llm: positions='cache' needs the model's rotation, and none was found")
        (b, h, n, m), pos = x.shape, x.positions()
        few = min(self.sink, m)
        index = torch.arange(few, device=x.device).expand(b, x.groups, few)
        k, v = x.kv.gather(index)
        kept = {name: None if (t := getattr(x.kv, name)) is None else t[:, :, :few] for name in ("pos", "bias")}
        bias = kept["bias"]
        if kept["pos"] is not None:  # another policy may have dropped a sink; what took its place is none
            bias = torch.zeros(index.shape, device=x.device) if bias is None else bias
            bias = bias.masked_fill(kept["pos"] >= self.sink, float("-inf"))
        length = None if x.kv.len is None else x.kv.len.clamp(max=few)
        q = moved(x.q, x.rope, pos, pos.clamp(max=self.sink + self.window - 1))
        # A sink j belongs to this part where i - j >= window: it is causally visible from i - window.
        layout = Layout.dense(b, h, n, few, q_pos=pos - self.window)
        return Part(layout, q=q, kv=KV.dense(k, v, len=length, pos=kept["pos"], bias=bias))

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        m = x.kv.capacity if x.kv.pos is not None else x.start + x.q.shape[2]  # pages are as many as the longest row needs
        first, last = min(self.sink, m), max(self.sink, m - self.window)
        index = torch.cat([torch.arange(first), torch.arange(min(last, m), m)]).to(x.device)
        return Selection(index.expand(1, x.groups, -1), ring=(self.sink, self.window))
