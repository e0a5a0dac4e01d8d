"""SpecKV: a small model guesses the answer, and the prompt entries that the guess looks at are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError
from ..layout import Layout
from ..lists import compact
from ..scores.window import group_reduce, pool, row_mass
from ..select import top_k
from .base import AttnInput, Method, Selection, State, option

PROMPT, SEEN, NOW = "speckv.prompt", "speckv.seen", "speckv.now"


@dataclass(frozen=True)
class SpecKV(Method):
    """Galim et al. 2025, "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SpecKV.

    `foveate.speculate.look_ahead` runs the prompt and a draft model's guess behind it through the target. The last
    `window` + 1 prompt tokens and the guess are the queries; an entry before them scores the highest probability (or
    with `reduce="mean"` the mean) that any of them, in any query head of its kv head, gives it, pooled along the keys.
    The guess is rolled back, and `capacity` prompt entries stay: the best, the `window` last ones before the final
    token, which is fed anew, and the first `sink` positions (the published code protects none). Without a guess the
    last `window` prompt queries decide alone, which is SnapKV with one list per kv head.

    As prefill method, prompts of more than `columns` + `band` tokens attend to the `columns` best entries per kv head
    and the diagonals 0, 64, ..., `band`. Only the call that ends a prompt has the right queries: a chunk before it uses
    its own last ones. `band` is a multiple of 64. With capacity None only this part is used.
    """

    capacity: int | None = option(512, low=2, help="prompt entries a kv head keeps; none: all")
    window: int = option(32, low=1, help="last prompt tokens, which vote and always stay")
    kernel: int = option(7, low=1, help="neighbouring tokens pooled together, an odd number")
    pooling: str = option("max", choices=("avg", "max"), help="how neighbouring scores are pooled: mean or maximum")
    reduce: str = option("max", choices=("mean", "max"), help="how the scores of queries and query heads are joined")
    sink: int = option(4, low=0, help="first tokens of the text, always included")
    columns: int = option(2048, low=1, help="prompt entries a row reads during prefill")
    band: int = option(2048, low=64, help="tokens the diagonals reach back, a multiple of 64")

    id: ClassVar[str] = "speckv"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "cache")
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Galim et al. 2025, arXiv 2506.08373"
    observes: ClassVar[tuple[str, ...]] = ("prefill",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"columns": 1024, "band": 512}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ConfigError(f"speckv: kernel expected an odd number, got {self.kernel}")
        if self.band % 64:
            raise ConfigError(f"speckv: band expected a multiple of 64, got {self.band}")
        if self.capacity is None:
            return
        if self.capacity < self.window + self.sink:
            raise ConfigError(
                f"speckv: capacity expected at least window + sink = {self.window + self.sink}, got {self.capacity}"
            )
        if self.capacity > self.columns + self.band:
            raise ConfigError(
                f"speckv: capacity expected at most columns + band = {self.columns + self.band}, got {self.capacity}"
            )

    @property
    def tail(self) -> int:
        return 0 if self.capacity is None else self.window

    @property
    def min_length(self) -> int:
        return 0 if self.capacity is None else self.capacity + 1

    # ------------------------------------------------------------------ while the prompt and the guess are read
    def plan(self, x: AttnInput, state: State) -> Layout | None:
        m = x.kv.capacity
        if x.phase != "prefill" or m <= self.columns + self.band:
            return None
        score = state.layer[NOW] = self._look(x, state)
        sinks = x.kv.exists() & (x.kv.positions() < self.sink)
        index, count = compact(top_k(self._rank(score), self.columns, valid=x.kv.exists(), forced=sinks))
        return Layout.factored(
            x.shape,
            diagonals=torch.arange(0, self.band + 1, 64, device=x.device).expand(1, x.groups, -1),
            columns=index[..., : max(self.columns, self.sink)],
            column_count=count,
            q_offset=x.offset(64),
            q_pos=x.layout_pos(),
            validate=False,
        )

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        """Gather what the guess looks at, over as many calls as it takes."""
        now = state.layer.pop(NOW, None)
        if PROMPT not in state.run or self.capacity is None or x.kv.pos is not None:
            return
        first = max(0, state.run[PROMPT] - 1 - self.window)  # the first position that is a query
        if x.start + x.q.shape[2] <= first:
            return
        score = (self._look(x, state) if now is None else now)[:, :, :first]
        old = state.layer.get(SEEN)
        if isinstance(old, Seen) and x.start > first:
            score = torch.maximum(old.score, score) if self.reduce == "max" else old.score + score
        state.layer[SEEN] = Seen(score, first)

    def _look(self, x: AttnInput, state: State) -> Tensor:
        """`_mass` of this call's queries from the last `window` + 1 of the prompt on; of its own last ones before that."""
        n = x.q.shape[2]
        at = state.run.get(PROMPT, x.start + n) - 1 - self.window - x.start
        at = max(0, at if at < n else n - 1 - self.window)
        assert x.q_pos is not None
        return self._mass(x, x.q[:, :, at:], x.q_pos[:, at:])

    # ------------------------------------------------------------------ after it
    def compress(self, x: AttnInput, state: State) -> Selection | None:
        length = x.kv.lengths()
        if self.capacity is None or x.kv.longest() <= self.capacity:
            return None
        exists, pos = x.kv.exists(), x.kv.positions()
        recent = exists & (torch.arange(x.kv.capacity, device=x.device) >= length[..., None] - self.window)
        seen = state.layer.get(SEEN)
        if isinstance(seen, Seen) and x.kv.capacity == seen.first + self.window:  # the prompt without its last token
            score = pad(seen.score, (0, self.window))
        elif x.q.shape[2]:
            x.note("speckv: no guess was run behind this prompt; its last queries choose alone")
            assert x.q_pos is not None
            score = self._mass(x, x.q, x.q_pos).masked_fill(recent, 0.0)
        else:
            x.note("speckv: no prompt queries were saved with this cache; every entry is kept")
            return None
        keep = recent | (exists & (pos < self.sink))
        index, count = compact(top_k(self._rank(score), self.capacity, valid=exists, forced=keep))
        return Selection(index[..., : self.capacity].long(), count.long())

    # ------------------------------------------------------------------ scores
    def _mass(self, x: AttnInput, q: Tensor, q_pos: Tensor) -> Tensor:
        """fp32 `[1, G, M]`: highest, or summed, probability over the rows; then highest, or mean, over a group's heads."""
        how = "max" if self.reduce == "max" else "sum"
        return group_reduce(row_mass(q, x.kv, q_pos, reduce=how, scale=x.scale, softcap=x.softcap), x.groups, self.reduce)

    def _rank(self, score: Tensor) -> Tensor:
        return pool(score, self.kernel, self.pooling)


@dataclass
class Seen:
    """What the guess and the window before it looked at: score fp32 `[1, G, first]`, entries before position `first`."""

    score: Tensor
    first: int

    def truncate(self, n: int) -> None:
        """The guess is rolled back, what it has seen stays; `compress` uses it at the prompt's own length alone."""

    def fork(self) -> Seen:
        return Seen(self.score, self.first)
