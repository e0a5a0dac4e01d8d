"""PyramidKV: SnapKV's votes, with a budget that falls from the first layer to the last at the same total."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..lists import compact
from ..select import top_k
from ._voting import Voting
from .base import AttnInput, Selection, State, option


@dataclass(frozen=True)
class PyramidKV(Voting):
    """Cai et al. 2024, "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling" (arXiv
    2406.02069).

    Entries are ranked as in SnapKV (`window`, `kernel`, `pooling`, `reduce`). `capacity` is the mean over the layers of
    what stays, window and the first `sink` positions included; the last layer keeps a `beta`-th of the mean before its
    window, the first as much more, and the layers between lie on a straight line (beta = 1: all the same). Where the
    first layers could keep more than there is, the line gets flatter. A prompt of at most `capacity` tokens stays whole.

    The published code divides integers in three places, so its total drifts from layers * capacity, and it uses one
    flat budget for prompts below twice the capacity; here the total is exact and the line holds for every length.
    """

    window: int = option(8, low=1, help="last prompt tokens, which vote and always stay")
    capacity: int = option(2048, low=2, help="entries a kv head keeps, mean over the layers")
    beta: float = option(20.0, low=1.0, help="mean budget divided by that of the last layer")
    kernel: int = option(7, low=1, help="neighbouring tokens pooled together, an odd number")
    pooling: str = option("max", choices=("avg", "max"), help="how neighbouring scores are pooled: mean or maximum")
    reduce: str = option("mean", choices=("mean", "max", "sum"), help="how query heads of a kv head are joined")
    sink: int = option(4, low=0, help="first tokens of the text, always included")

    id: ClassVar[str] = "pyramidkv"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Cai et al. 2024, arXiv 2406.02069"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"capacity": 1024, "window": 32},
        "small": {"capacity": 128},
        "class": {"window": 64, "kernel": 5, "pooling": "avg"},
    }

    def budgets(self, layers: int, length: int) -> list[int]:
        """Entries before the window that each layer keeps of a prompt of `length` tokens, never rising.

        Their sum is layers * (capacity - window), or all there are. A layer keeps its sinks even where this is less.
        """
        mean, there = self.capacity - self.window, max(0, length - self.window)
        if there <= mean:
            return [there] * layers
        low = mean / self.beta
        high = min(2 * mean - low, there)
        low = 2 * mean - high
        exact = [high - i * (high - low) / max(1, layers - 1) if layers > 1 else mean for i in range(layers)]
        out = [int(x + 1e-6) for x in exact]
        most = sorted(range(layers), key=lambda i: (out[i] - exact[i], i))  # whom rounding down took most from: still falls
        for i in most[: layers * mean - sum(out)]:
            out[i] += 1
        return out

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        seen = x.start + x.q.shape[2]  # of the text: the same schedule in all layers, whatever they have dropped before
        budget = self.window + self.budgets(x.layers, seen)[x.layer]
        if x.kv.longest() <= budget:
            return None
        if (votes := self.votes(x)) is None:
            return None
        (score, recent), exists = votes, x.kv.exists()
        keep = exists & (recent | (x.kv.positions() < self.sink))
        index, count = compact(top_k(score, budget, valid=exists, forced=keep))
        most = max(budget, self.window + self.sink)  # late layers may have less to give than what they must keep
        return Selection(index[..., :most].long(), count.long())
