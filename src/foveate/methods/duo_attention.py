"""DuoAttention: streaming heads see a sink and a window, in plans and in the cache; retrieval heads see everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError
from ..layout import NO_LIMIT, Layout, Part, Parts
from ..lists import compact, trim
from ._cut import CUT, Cut, counted, mark
from .base import AttnInput, Method, Selection, State, option
from .search import Knob


@dataclass(frozen=True)
class DuoAttention(Method):
    """Xiao et al. 2024, "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads" (arXiv
    2410.10819).

    `foveate calibrate duo_attention` learns a gate per kv head on planted passkeys, and `profile` names the folder it
    wrote. The kv heads with the lowest gates stream: a query sees the first `sink` keys and the `window` newest, and as
    a cache policy only those entries stay. `sparsity` is the share of heads that stream (published: 0.5 with grouped
    kv heads, 0.75 without), ties going to the lower layer and head; `threshold` asks for the gates below it instead.
    Sparsity 0 and 1 need no gates. Every row of a prompt obeys the rule, so results do not depend on chunks; in the
    published code the rows of a chunk see all of it, and the first chunk runs dense. While decoding up to `slack` entries
    gather in a streaming head before they are dropped in one copy; the rule hides them meanwhile. As `heads` it serves
    its streaming heads and leaves the others to the other methods of the recipe.
    """

    sparsity: float = option(0.5, low=0.0, high=1.0, help="share of the kv heads that stream")
    threshold: float | None = option(None, low=0.0, high=1.0, help="gate below which heads stream; none: by sparsity")
    sink: int = option(64, low=0, help="first tokens a streaming head sees")
    window: int = option(256, low=1, help="newest tokens a streaming head sees")
    slack: int = option(128, low=1, help="decode steps from one eviction to the next")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")

    id: ClassVar[str] = "duo_attention"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache", "heads")
    share: ClassVar[str] = "group"
    needs: ClassVar[str] = "profile"
    source: ClassVar[str] = "Xiao et al. 2024, arXiv 2410.10819"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"mha": {"sparsity": 0.75}}
    knob: ClassVar[Knob | None] = Knob("sparsity", 0.0, 1.0, more=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        profiles.of(self.id, self.profile)  # a folder that is none is an error here, not at the first token

    @property
    def default_roles(self) -> tuple[str, ...]:
        return ("prefill", "decode", "cache")

    @property
    def min_length(self) -> int:
        """Below it no head drops anything."""
        return self.sink + self.window

    def plan(self, x: AttnInput, state: State) -> Layout | Parts | None:
        count = sum(self._streaming(x, state))
        if count == 0:
            return None
        block = 128 if x.phase == "prefill" else 1
        sink: int | Tensor = self.sink
        window: int | Tensor = self.window
        if count < x.groups:  # numbers need no copy to the device
            sink, window = self._rules(x, state)
        kv = counted(x, state, self) if x.phase == "decode" else None
        layout = Layout.static(
            x.shape,
            sink=sink,
            window=window,
            block_q=block,
            q_offset=x.offset(block) if x.phase == "prefill" else 0,
            q_pos=x.layout_pos() if kv is None else None,
            device=x.device,
            validate=False,
        )
        return layout if kv is None else Parts((Part(layout, kv=kv),))

    def _rules(self, x: AttnInput, state: State) -> tuple[Tensor, Tensor]:
        """(sink, window) of a layer where some heads stream, int32, made once a generation: of each query head of a prompt,
        of each kv head in a decode step, whose kernels then read each key once for all its query heads."""
        key = f"{self.describe()} {x.layers} {x.groups} {x.device} {x.layer} {x.q.shape[1]} {x.phase}"
        if key not in state.run:
            mine = self._mask(x, state) if x.phase == "decode" else self._heads(x, state)
            state.run[key] = tuple(torch.where(mine, n, m).int() for n, m in ((self.sink, 0), (self.window, NO_LIMIT)))
        return state.run[key]  # type: ignore[no-any-return]

    def owns(self, x: AttnInput, state: State) -> Tensor:
        """bool `[H]`: the query heads of streaming kv heads."""
        if x.phase == "prefill":
            state.layer[CUT] = Cut(None)  # beside other methods the plan of a step has to be one layout
        return self._heads(x, state)

    def _heads(self, x: AttnInput, state: State) -> Tensor:
        return self._mask(x, state).repeat_interleave(x.q.shape[1] // x.groups)

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        mark(x, state, self)
        end = torch.tensor([x.start + x.q.shape[2]], device=x.device)
        return self._keep(x, state, end) if x.kv.capacity > self.sink + self.window else None

    def evict(self, x: AttnInput, state: State) -> Selection | None:
        if not self.evicts(x.step) or x.kv.capacity <= self.sink + self.window:
            return None
        assert x.q_pos is not None
        return self._keep(x, state, x.q_pos[:, 0] + 1)

    def evicts(self, step: int) -> bool:
        return (step + 1) % self.slack == 0

    def phase(self, step: int) -> str | None:
        return "step"

    def _keep(self, x: AttnInput, state: State, end: Tensor) -> Selection | None:
        """All entries of retrieval heads; of streaming heads the sink and the last `window` before `end` `[B]`."""
        if not any(self._streaming(x, state)):
            return None
        pos = x.kv.positions()
        near = (pos < self.sink) | (pos >= end[:, None, None] - self.window)
        index, count = compact(x.kv.exists() & (near | ~self._mask(x, state)[:, None]))
        return Selection(trim(index, count).long(), count.long())

    # ------------------------------------------------------------------ which heads stream
    def _streaming(self, x: AttnInput, state: State) -> list[bool]:
        """Of each kv head of this layer."""
        return self._roles(x, state)[0][x.layer]  # type: ignore[no-any-return]

    def _mask(self, x: AttnInput, state: State) -> Tensor:
        """The same as bool `[G]` on the device of x."""
        return self._roles(x, state)[1][x.layer]  # type: ignore[no-any-return]

    def _roles(self, x: AttnInput, state: State) -> Any:
        """(lists, tensor) of all layers, made once a generation."""
        key = f"{self.describe()} {x.layers} {x.groups} {x.device}"
        if key not in state.run:
            streaming = self.streaming(x.layers, x.groups)
            state.run[key] = streaming.tolist(), streaming.to(x.device)
        return state.run[key]

    def streaming(self, layers: int, groups: int) -> Tensor:
        """bool `[layers, kv heads]`: the heads that stream. Raises ConfigError without the gates this needs."""
        if self.threshold is None and self.sparsity in (0, 1):
            return torch.full((layers, groups), bool(self.sparsity))
        if self.profile is None:
            raise ConfigError(
                f"duo_attention: sparsity={self.sparsity:g} needs gates; make them with foveate calibrate duo_attention "
                "--out FOLDER and give profile=FOLDER"
            )
        found = profiles.of(self.id, self.profile)
        assert found is not None
        gates = found.tensors.get("gates")
        if gates is None or tuple(gates.shape) != (layers, groups):
            got = "none" if gates is None else list(gates.shape)
            raise ConfigError(f"duo_attention: profile expected gates [layers, kv heads] = {[layers, groups]}, got {got}")
        if self.threshold is not None:
            return gates < self.threshold
        return lowest(gates, self.sparsity)


def lowest(gates: Tensor, share: float) -> Tensor:
    """bool like gates: those below their quantile `share`, with ties broken by number so that the count is exact."""
    flat = gates.float().flatten()
    if share >= 1:
        return torch.ones_like(gates, dtype=torch.bool)
    count = math.ceil(share * (flat.numel() - 1) - 1e-9)  # ranks strictly below the (interpolated) quantile
    out = torch.zeros_like(flat, dtype=torch.bool)
    out[flat.argsort(stable=True)[:count]] = True
    return out.view(gates.shape)
