"""What a method is: a frozen dataclass that answers which pairs are worth computing, or which entries worth keeping.

A method implements any of

    plan(x, state) -> Layout | Parts | None     which pairs this call computes; None means dense
    observe(x, out, lse, mass, state)           look at the result (declare `sees` to get lse and mass)
    compress(x, state) -> Selection             which entries a cache keeps, once, after the prompt
    evict(x, state) -> Selection                which entries it keeps after a decode step

`x` is an `AttnInput`: everything about this call and nothing about the model. In prefill the batch is unpadded first:
x holds one batch row (B = 1) whose first real token has position 0. In decode x holds all rows, one query each.
State lives in three places: `state.layer` with the cache of this layer (and this row, in prefill and compress),
`state.step` shared by all layers of one forward and then dropped, `state.run` for a whole generation.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import CacheError, ConfigError, nearest
from ..kv import KV
from ..layout import Layout, Parts
from ._options import check_type
from ._options import option as option
from ._options import shared as shared

if TYPE_CHECKING:
    from .search import Knob, Search, Target


class Rope(Protocol):
    """The model's own rotation, for methods that need keys or queries before it."""

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rotate x `[B, heads, n, D]` to positions `[B, n]`."""

    def unrotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """The inverse of `rotate`."""


@dataclass
class LayerState(dict):  # type: ignore[type-arg]
    """A method's memory beside one layer's cache: a dict that follows the cache through its operations.

    A value may handle an operation itself: `truncate(n)`, `keep(selection)`, `fork()`, `reorder(index)`; before a truncate
    `passed(step)` tells it the number of the last decode step, since it was not asked in replayed ones. Without one,
    truncate and keep drop the value (the method computes it again from the cache), fork copies it, and reorder picks
    the rows of a tensor, keeps plain values and drops the rest. Files hold tensors, and of a value the tensors that its
    `saved()` names: what is loaded has them, by those names, in its place.
    """

    def truncate(self, n: int) -> None:
        self._each("truncate", n)

    def passed(self, step: int) -> None:
        for value in self.values():
            if hasattr(value, "passed"):
                value.passed(step)

    def keep(self, selection: Selection) -> None:
        """The cache keeps only these entries; what refers to old entry numbers is gone."""
        self._each("keep", selection)

    def fork(self) -> LayerState:
        out = LayerState()
        for key, value in self.items():
            out[key] = value.fork() if hasattr(value, "fork") else copy.deepcopy(value)
        return out

    def reorder(self, index: Tensor) -> None:
        for key in list(self):
            value = self[key]
            if hasattr(value, "reorder"):
                value.reorder(index)
            elif isinstance(value, Tensor):
                self[key] = value.index_select(0, index.to(value.device))
            elif not isinstance(value, (int, float, str, type(None))):
                del self[key]

    def _each(self, operation: str, argument: Any) -> None:
        for key in list(self):
            if hasattr(self[key], operation):
                getattr(self[key], operation)(argument)
            else:
                del self[key]


@dataclass
class State:
    """Where a method keeps what it must remember.

    Attributes:
        layer: beside this layer's cache; of one batch row in prefill and compress, of all rows in decode.
        rows: in decode, the `layer` of each batch row's prefill.
        step: shared by all layers of one forward (of one batch row in prefill), then dropped.
        run: for a whole generation.
    """

    layer: LayerState = field(default_factory=LayerState)
    step: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    rows: list[LayerState] = field(default_factory=list)


@dataclass
class AttnInput:
    """One attention call, as a method sees it.

    Attributes:
        q: `[B, H, N, D]`, rotated queries. kv: the view of all stored entries, these N tokens included.
        phase: "prefill" (N rows of one sequence) or "decode" (one query per row).
        layer, layers: this layer's number and how many there are.
        scale: softmax scale. softcap: or None.
        start: position of the first query row (prefill). q_pos: int64 `[B, N]`.
        step: decode steps since the last call of several tokens, 0 in the first one.
        rope: the model's rotation, if the adapter could supply it.
        window: the model's own sliding window in this layer, or None; the runtime applies it on top of any plan.
        backend: the kernel backend the user named, for methods that call `attend` themselves; None: the best one.
        stored: in gated decode steps, entries of the longest row and kv head as the host counts them, where `kv.capacity`
            may be a store's room. Gates go by it, with a graph for either side; a captured plan may not depend on it.
        part: (first query head, all query heads of the layer) where a call has some kv heads only (see `pieces`), or None.
        note: call with a sentence worth telling the user (kept once per run).
    """

    q: Tensor
    kv: KV
    phase: str
    layer: int
    layers: int
    scale: float
    start: int = 0
    step: int = 0
    q_pos: Tensor | None = None
    softcap: float | None = None
    rope: Rope | None = None
    window: int | None = None
    backend: str | None = None
    stored: int | None = None
    part: tuple[int, int] | None = None
    note: Callable[[str], None] = lambda text: None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M), the shape a layout for this call has."""
        return self.q.shape[0], self.q.shape[1], self.q.shape[2], self.kv.capacity

    @property
    def groups(self) -> int:
        """G, the number of kv heads."""
        return self.kv.shape[1]

    @property
    def device(self) -> torch.device:
        return self.q.device

    def only(self, first: int, end: int) -> AttnInput:
        """The call of kv heads first..end - 1 and of the query heads that read them; nothing is copied."""
        h = self.q.shape[1]
        per, (before, heads) = h // self.groups, self.part or (0, h)
        some = dict(q=self.q[:, first * per : end * per], kv=self.kv.heads(first, end), part=(before + first * per, heads))
        return dataclasses.replace(self, **some)  # type: ignore[arg-type]

    def all_lists(self, lists: int) -> int:
        """How many lists the whole layer has if this call has so many: what a profile's tables are made for."""
        return lists if self.part is None else lists * self.part[1] // self.q.shape[1]

    def own_lists(self, table: Tensor) -> Tensor:
        """Of a tensor whose last dimension runs over the lists of the layer, what belongs to the heads of this call."""
        if self.part is None:
            return table
        (first, heads), lists = self.part, table.shape[-1]
        return table[..., first * lists // heads : (first + self.q.shape[1]) * lists // heads]

    def offset(self, block: int) -> int:
        """q_offset of this call's first row in a grid of `block` rows anchored at position 0."""
        return self.start % block

    def positions(self) -> Tensor:
        """int64 `[B, N]`, true positions of the query rows."""
        if self.q_pos is not None:
            return self.q_pos
        return torch.arange(self.start, self.start + self.q.shape[2], device=self.device).expand(self.q.shape[0], -1)

    def dense(self) -> Layout:
        return Layout.dense(*self.shape, q_pos=self.layout_pos())

    def layout_pos(self) -> Tensor | None:
        """q_pos for a layout of this call: None where the default (queries last of `capacity` entries) is right."""
        spare = self.phase == "prefill" and self.kv.capacity > self.start + self.q.shape[2]  # pages not filled yet
        return self.q_pos if self.kv.pos is not None or spare else None


@dataclass(frozen=True)
class Selection:
    """Entries a cache keeps, per batch row and kv head.

    Attributes:
        indices: int64 `[B, G, K]`, entry numbers, ascending; padded beyond the count with anything in range.
        counts: int64 `[B, G]`, or None for K everywhere.
        bias: float `[B, G, K]` added to the logits of kept entries, or None.
        ring: (sink, window): keep that many first and last tokens from now on, in constant memory.
        channels: int64 `[B, G, D']`, ascending: the key channels to keep of older entries; for a store that can.
    """

    indices: Tensor
    counts: Tensor | None = None
    bias: Tensor | None = None
    ring: tuple[int, int] | None = None
    channels: Tensor | None = None

    @staticmethod
    def stack(rows: list[Selection]) -> Selection:
        """One selection for a batch from one per row (B = 1 each)."""
        if len(rows) == 1:
            return rows[0]
        widths = [r.indices.shape[-1] for r in rows]
        ragged = len(set(widths)) > 1 or any(r.counts is not None for r in rows)
        wide = max(widths)
        indices = torch.cat([torch.nn.functional.pad(r.indices, (0, wide - w)) for r, w in zip(rows, widths, strict=True)])
        counts = None
        if ragged:
            counts = torch.cat([r.full_counts() for r in rows])
        bias = None
        if any(r.bias is not None for r in rows):
            none = [torch.zeros_like(r.indices, dtype=torch.float32) if r.bias is None else r.bias for r in rows]
            bias = torch.cat([torch.nn.functional.pad(t, (0, wide - t.shape[-1])) for t in none])
        few = [r.channels for r in rows if r.channels is not None]
        if few and (len(few) < len(rows) or len({c.shape[-1] for c in few}) > 1):
            raise CacheError("channels: expected the same number of key channels for every batch row")
        return Selection(indices, counts, bias, rows[0].ring, torch.cat(few) if few else None)

    def row(self, i: int) -> Selection:
        """What concerns batch row i, as a selection of one row."""
        one = slice(i, i + 1)
        counts, bias, few = (None if t is None else t[one] for t in (self.counts, self.bias, self.channels))
        return Selection(self.indices[one], counts, bias, self.ring, few)

    def full_counts(self) -> Tensor:
        """int64 `[B, G]`, entries kept."""
        if self.counts is not None:
            return self.counts.long()
        return torch.full(self.indices.shape[:2], self.indices.shape[2], device=self.indices.device)


@dataclass(frozen=True)
class Method:
    """Base of all methods: published hyperparameters as fields, facts about the method as class variables.

    Class variables:
        id: the registry id. roles: what it can serve as ("prefill", "decode", "cache", "heads").
        selection: "causal" (a row's set does not depend on later tokens) or "prompt" (looks at the whole prompt).
        share: "head" or "group", whether query heads of a group have their own lists.
        needs: "nothing", "profile" or "weights". source: paper. tail: query rows `compress` wants (0: none).
        sees: results `observe` wants ("lse", "mass").
        presets: named settings for other lengths, `method@name`.
        observes: phases in which `observe` is called.
        evicted_ok: prefill planning works on a cache whose entries are no longer all positions 0..M-1.
        apart: in prefill no head looks at another and nothing is remembered: `plan` may get some kv heads at a time.
        together: `compress` keeps no state and takes rows of equal lengths as one batch.
        whole_text: decode steps are captured only over caches that drop no entry.
        knob: the hyperparameter that the generic offline search bisects, or None (see `search.py`).
        extends: re-assigned positions keep every distance inside the model's range, so prompts may be longer than it.
    """

    id: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()
    selection: ClassVar[str] = "causal"
    share: ClassVar[str] = "head"
    needs: ClassVar[str] = "nothing"
    source: ClassVar[str] = ""
    status: ClassVar[str] = "stable"
    sees: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    evicted_ok: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    together: ClassVar[bool] = False
    whole_text: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    knob: ClassVar[Knob | None] = None
    extends: ClassVar[bool] = False

    @property
    def tail(self) -> int:
        """Query rows at the end of the prompt that `compress` wants."""
        return 0

    @property
    def min_length(self) -> int:
        """Below this many tokens the method's own rule says dense."""
        return 0

    @property
    def keeps_all(self) -> bool:
        """As a cache policy it drops no entry (it may store them otherwise)."""
        return False

    @property
    def default_roles(self) -> tuple[str, ...]:
        """Roles this method takes in a recipe that names none."""
        return self.roles

    def refuses(self, recipe: Any) -> str | None:
        """The reason this method does not work inside `recipe`, or None."""
        return None

    def plan(self, x: AttnInput, state: State) -> Layout | Parts | None:
        return None

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        return None

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        return None

    def evict(self, x: AttnInput, state: State) -> Selection | None:
        """As a cache policy, after each decode step: which entries stay, or None for all of them.

        `state.layer` is that of decode, all rows; `state.rows` those of the prompt. An eviction copies what stays, so a
        policy lets some entries gather before it drops them.
        """
        return None

    def evicts(self, step: int) -> bool | None:
        """As a cache policy: whether `evict` may drop entries after decode step number `step`; None: nobody knows before.

        Steps that drop nothing are captured (`phase`), so `evict` must not count calls on the host: they do not see replays.
        """
        return None

    def phase(self, step: int) -> str | None:
        """Which captured decode step serves decode step number `step`, or None: this method's steps are not captured.

        Steps of one name run the same kernels on tensors of the same shapes: a plan that looks at nothing but `x.step`
        and shapes on the host, and keeps what it remembers in tensors of `state.layer` that stay in the same memory. A
        method that selects anew every R steps answers "select" and "reuse".
        """
        return None

    def resumes(self, layer: int, rows: list[LayerState]) -> bool:
        """Whether captured steps go on being right in this layer after a call of several tokens and rollbacks round it.

        `rows`: `state.rows` as they are after that. What decode remembers must not outlive the call, except as memory: the
        first step behind it, whose `phase` no other step has, makes it anew from `rows`. Graphs go anyway when a tensor has
        moved. Replays do not tell the host, so what it counted itself may be old.
        """
        return False

    def storage(self) -> dict[str, Any]:
        """As a cache policy, how entries are stored: {"kind": a name of `cache.layer.STORAGE`, its options...}; {}: as
        the recipe says."""
        return {}

    def search(self, target: Target) -> Search | None:
        """This method's own offline search towards `target`, or None if it has none (see `search.py`)."""
        return None

    def owns(self, x: AttnInput, state: State) -> Tensor | None:
        """bool `[H]`: the heads that follow this method's plan in a recipe where it serves as `heads`; None: all."""
        return None

    # ------------------------------------------------------------------ checks shared by all
    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            check_type(self.id, f, value)
            low, high = f.metadata.get("range", (None, None))
            inside = (low is None or value is None or value >= low) and (high is None or value is None or value <= high)
            if not inside or value != value:  # NaN compares to nothing, itself included
                bound = f">= {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{self.id}: {f.name} expected {bound}, got {value!r}")
            choices = f.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigError(f"{self.id}: {f.name} expected one of {', '.join(choices)}, got {value!r}")

    @classmethod
    def make(cls, preset: str | None = None, **options: Any) -> Method:
        """An instance from a preset name and options by keyword; unknown names suggest the nearest one."""
        values: dict[str, Any] = {}
        if preset is not None:
            if preset not in cls.presets:
                known = ", ".join(cls.presets) or "none"
                raise ConfigError(f"{cls.id}: unknown preset {preset!r}{nearest(preset, cls.presets)}; known: {known}")
            values.update(cls.presets[preset])
        names = [f.name for f in dataclasses.fields(cls)]
        for key, value in options.items():
            if key not in names:
                raise ConfigError(
                    f"{cls.id}: unknown hyperparameter {key!r}{nearest(key, names)}; known: {', '.join(names) or 'none'}"
                )
            values[key] = value
        return cls(**values)

    def describe(self) -> str:
        """`id:key=value,...` with every hyperparameter."""
        args = ",".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.id}:{args}" if args else self.id
