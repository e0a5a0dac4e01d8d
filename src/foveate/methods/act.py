"""ACT: tokens beside the first that soak up attention are scaled down, and the others get what they lose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists, profile
from ..errors import ConfigError
from ..kv import KV
from ..layout import Layout
from .base import AttnInput, Method, State, option


@dataclass(frozen=True)
class ACT(Method):
    """Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks" (arXiv 2406.15765): quality, not speed.

    In calibrated heads, keys whose mean attention over the rows that see them exceeds `theta` (position 0 exempt) keep
    `beta` of it; the rest goes to the other keys in proportion. Heads: those of `profile` (found by `search`), without
    one all heads of the layers from the third to the last but one. A calibrated layer costs two dense attentions and the
    column means of a prompt: the other keys are attended on their own, since subtracting the sinks from the dense
    result loses all digits where they hold nearly all mass.

    The prompt names the sinks; later chunks continue the means over all prompt rows so far, decode steps use the
    prompt's sinks and change none (the published code names them from one row there, exempts the first it finds
    instead of position 0, and breaks the row sum).
    """

    beta: float = option(0.4, low=0, high=1, help="share of its attention that a sink keeps")
    theta: float = option(0.1, low=1e-4, help="mean attention above which a token is a sink")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")

    id: ClassVar[str] = "act"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Yu et al. 2024, arXiv 2406.15765"

    def refuses(self, recipe: Any) -> str | None:
        return "hidden sinks must stay in the cache, and its policy evicts entries" if recipe.evicts else None

    def plan(self, x: AttnInput, state: State) -> Layout:
        return x.dense()

    def attend(self, x: AttnInput, plan: Layout, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Dense attention, calibrated. The log-sum-exp and the mass are those of dense attention, where computed."""
        from ..kernels.dispatch import attend

        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=x.backend)
        heads = self.heads(x)
        if heads is None or x.kv.pos is not None:
            out, lse = attend(x.q, x.kv, plan, return_lse=True, **how)
            return out, lse, None
        if x.phase == "decode":
            out, lse = attend(x.q, x.kv, plan, return_lse=True, **how)
            found, mass = _of_rows(x, state), None
        else:
            out, lse, mass = attend(x.q, x.kv, plan, return_lse=True, return_mass=True, **how)
            sinks = state.layer.get("act.sinks")
            if sinks is None:
                sinks = state.layer["act.sinks"] = Sinks()
            found = sinks.add(x, mass, self.theta)
        if found is not None:
            out = self.calibrate(x, out, lse, found, heads)
        return out, lse, mass

    def search(self, target: Any) -> Any:
        from .act_search import HeadSearch

        return HeadSearch(self)

    def heads(self, x: AttnInput) -> Tensor | None:
        """bool `[H]`, the calibrated heads of this layer; None where there is none."""
        h = x.q.shape[1]
        found = profile.of(self.id, self.profile)
        if found is None:
            return torch.ones(h, dtype=torch.bool, device=x.device) if 2 <= x.layer <= x.layers - 2 else None
        table = found.tensors.get("heads")
        if table is None or tuple(table.shape) != (x.layers, h):
            got = "nothing" if table is None else str(list(table.shape))
            raise ConfigError(f"act: profile expected heads of shape {[x.layers, h]}, got {got}")
        mine = table[x.layer].bool()  # on the host: a layer without any costs nothing
        return mine.to(x.device) if bool(mine.any()) else None

    def calibrate(self, x: AttnInput, out: Tensor, lse: Tensor, found: tuple[Tensor, Tensor], heads: Tensor) -> Tensor:
        """From dense out `[B, H, N, Dv]` and lse, and the hidden sinks (int32 `[B, H, V]`, counts): the calibrated out."""
        from ..kernels.dispatch import attend

        columns, count = found
        if x.phase == "decode":
            named: dict[str, Any] = dict(entries=columns[:, :, None], entry_count=(count * heads)[:, :, None])
        else:
            named = dict(block_q=64, q_offset=x.offset(64), columns=columns, column_count=count * heads)
        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=x.backend, return_lse=True)
        there, part = attend(x.q, x.kv, Layout(x.shape, q_pos=x.layout_pos(), **named), **how)
        f = (part - lse).exp()[..., None]  # mass on the hidden sinks
        used = lists.used_slots(columns, count * heads)
        rest = attend(*_without(x, columns, used), scale=x.scale, softcap=x.softcap, backend=x.backend)
        assert isinstance(rest, Tensor)
        mixed = (1 - self.beta * f) * rest.view_as(out) + self.beta * f * there
        return torch.where(f > 0, mixed.to(out.dtype), out)


def _without(x: AttnInput, columns: Tensor, used: Tensor) -> tuple[Tensor, KV, Layout]:
    """Queries, keys and layout of dense attention without some keys of each query head (int32 and bool `[B, H, V]`).

    Entry weights belong to kv heads, so each query head gets one of its own over the same storage: kv heads move to the
    batch axis, and the r query heads of one read it with a stride of 0.
    """
    (b, h, n, m), g = x.shape, x.groups
    r, kv = h // g, x.kv

    def own(t: Tensor) -> Tensor:
        """`[B, G, ...]` -> `[B * G, r, ...]`, nothing copied."""
        return t.flatten(0, 1)[:, None].expand(b * g, r, *t.shape[2:])

    bias = torch.zeros(b, h, m + 1, device=x.device)
    bias = bias.scatter_(-1, torch.where(used, columns, m).long(), float("-inf"))[..., :m].reshape(b * g, r, m)
    if kv.bias is not None:
        bias = bias + own(kv.bias)
    moved = {name: own(t) for name in ("len", "table", "offsets") if (t := getattr(kv, name)) is not None}
    if kv.kind == "dense":
        moved |= {"k": own(kv.k), "v": own(kv.v)}
    pos = x.layout_pos()
    layout = Layout.dense(b * g, r, n, m, q_pos=None if pos is None else pos.repeat_interleave(g, 0))
    return x.q.reshape(b * g, r, n, -1), replace(kv, bias=bias, **moved), layout


class Sinks:
    """The hidden sinks of one prompt and layer, and the running means that name them; follows the cache.

    Attributes:
        mass: fp32 `[1, H, M]`, probability each key received. rows: fp32 `[M]`, prompt rows that see it.
        index, count: int32 `[1, H, V]`, `[1, H]`. later: tokens that came after the prompt.
    """

    def __init__(self) -> None:
        self.mass: Tensor | None = None
        self.rows: Tensor | None = None
        self.index: Tensor | None = None
        self.count: Tensor | None = None
        self.length = 0
        self.later = 0

    def add(self, x: AttnInput, mass: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        """Count the rows of a prompt or of a chunk, whose keys received `mass` `[1, H, M]`: (index, count)."""
        n, m = x.q.shape[2], x.start + x.q.shape[2]
        entry = torch.arange(m, device=x.device)
        rows = (m - entry).clamp(max=n).float()
        mass = mass[..., :m]
        if self.mass is not None and self.rows is not None:
            mass = mass + pad(self.mass[..., :m], (0, m - min(m, self.mass.shape[-1])))
            rows = rows + pad(self.rows[:m], (0, m - min(m, len(self.rows))))
        self.mass, self.rows, self.length, self.later = mass, rows, m, 0
        hidden = (mass > theta * rows) & (entry > 0)
        # All means over theta: the last k keys need k (k + 1) / 2 rows of mass theta, others more; M rows are all there is.
        most = min(m, int((2 * m / theta) ** 0.5) + 2)
        index, self.count = lists.compact(hidden)
        self.index = index[..., :most].contiguous()
        return self.index, self.count

    def truncate(self, n: int) -> None:
        """Forget the last n tokens; sinks among them are no longer any."""
        inside = max(0, n - self.later)
        self.later = max(0, self.later - n)
        if inside and self.index is not None and self.count is not None and self.mass is not None and self.rows is not None:
            self.length = max(0, self.length - inside)
            used = lists.used_slots(self.index, self.count) & (self.index < self.length)
            self.count = used.sum(-1, dtype=torch.int32)
            self.mass, self.rows = self.mass[..., : self.length], self.rows[: self.length]

    def fork(self) -> Sinks:
        out = Sinks()
        out.__dict__.update(self.__dict__)  # tensors are replaced, never written to
        return out


def _of_rows(x: AttnInput, state: State) -> tuple[Tensor, Tensor] | None:
    """The hidden sinks of every row's prompt, `[B, H, V]` and `[B, H]`; None if no row has any."""
    every: list[Sinks | None] = [row.get("act.sinks") for row in state.rows]
    for one in every:
        if one is not None:
            one.later += 1
    counts = [None if one is None else one.count for one in every]
    held = state.layer.get("act.batch")
    if held is not None and all(a is b for a, b in zip(held.source, counts, strict=True)):
        return held.found  # type: ignore[no-any-return]
    indices = [one.index for one in every if one is not None and one.index is not None]
    if not indices:
        return None
    wide = max(t.shape[-1] for t in indices)
    none = torch.zeros(1, x.q.shape[1], wide, dtype=torch.int32, device=x.device)
    rows = [none if one is None or one.index is None else pad(one.index, (0, wide - one.index.shape[-1])) for one in every]
    count = torch.cat([none[..., 0] if c is None else c for c in counts])
    found = lists.trim(torch.cat(rows), count), count  # waits for the device once per prompt
    state.layer["act.batch"] = Batch(found, counts)
    return found


@dataclass
class Batch:
    """What `_of_rows` found, and the counts it was made of: until a row has others."""

    found: tuple[Tensor, Tensor]
    source: list[Tensor | None]
