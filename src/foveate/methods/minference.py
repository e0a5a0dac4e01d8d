"""MInference 1.0: every head follows one of three patterns, whose indices come from a cheap probe of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import profile as profiles
from ..errors import ConfigError
from ..layout import Layout, Part, Parts
from ..scores.pooled import block_pool, pool_keys, top_blocks
from ..scores.probes import factored, last_queries, vote
from ._allocation import own_lists
from .base import AttnInput, Method, State, option, shared
from .minference_search import KernelAware, by_head
from .search import Search, Target

PATTERNS = ("vertical_slash", "a_shape", "block_sparse")
BLOCK = 64  # query rows and keys of a tile, in all three patterns
LEAST_DIAGONALS = 50
PARTED = 8192  # tokens from which, on a GPU, lists of two sorts of heads run one after the other

Entry = tuple[str, int, int]
Profile = tuple[tuple[Entry, ...], ...]
Sizes = tuple[int, ...]  # one number a list


@dataclass(frozen=True)
class MInference(Method):
    """Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs" (arXiv 2407.02490).

    Patterns:
        vertical_slash: the last `last_q` queries vote for the `columns` keys and the `diagonals` distances with the
            most probability; every row sees those keys, and the 64 keys that its block of rows reaches per distance.
        a_shape: the first `init` keys and the `recent` newest ones.
        block_sparse: per block of 64 rows the `blocks` key blocks whose mean key scores highest with the mean query.

    The first `sink` keys and the `local` nearest distances (vertical_slash), the first and the diagonal block
    (block_sparse) are always in and count towards the budget.

    `pattern` holds for all heads. `profile[layer][head]` = (pattern, a, b) overrides it and the two sizes for single
    heads: (columns, diagonals), (init, recent) or (blocks, ignored). It has an entry for every layer and query head.
    As text it names a folder that `foveate calibrate minference` wrote, whose search is the paper's (`KernelAware`): one
    cost for all heads. Target "mass=" gives each head the cost it needs (`minference_search.by_head`).
    `share` "group" lets the query heads of a kv head vote together (by their highest score) for one list.
    Layers below `starting_layer` stay dense.
    """

    pattern: str = option("vertical_slash", choices=PATTERNS, help="pattern of all heads that no profile names")
    columns: int = option(1000, low=0, help="key columns a head reads (vertical_slash)")
    diagonals: int = option(6096, low=0, help="distances a head reads (vertical_slash)")
    sink: int = option(30, low=0, help="first tokens of the text, always included")
    local: int = option(100, low=1, help="nearest distances, always included")
    last_q: int = option(64, low=1, help="last queries of the prompt, which vote")
    init: int = option(1024, low=0, help="first keys a query sees (a_shape)")
    recent: int = option(4096, low=1, help="newest keys a query sees (a_shape)")
    blocks: int = option(100, low=1, help="key blocks that 64 rows read (block_sparse)")
    starting_layer: int = option(0, low=0, help="first layers, which stay dense")
    profile: Profile | str | None = option(None, help="folder that `foveate calibrate` wrote, or a table")  # noqa: RUF009
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "minference"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Jiang et al. 2024, arXiv 2407.02490"
    # For prompts of about 7,000 tokens the published budget is dense. A distance costs every row a tile of 64 keys, so
    # the local band (3 tiles of the 3,500 keys that a row sees on average) is 0.055 of dense attention and each further
    # distance up to 0.018, where it lies alone; a column costs at most 1 / 3,500. 800 columns and no distance beyond
    # the band stay below 0.29 whatever the prompt looks like. On SmolLM2-135M (7,000 tokens of essays, 8 layers) this
    # kept 0.90 of the attention mass, as 500 + 150 did, with the planted fact in twice as many heads' columns.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"columns": 800, "diagonals": 100}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None:
            if self.share == "group":
                raise ConfigError("minference: share='group' does not go with a profile, which is per query head")
            if isinstance(self.profile, str):
                profiles.of(self.id, self.profile)  # a folder that is none is an error here, not at the first token
            else:
                _check_profile(self.profile)

    @property
    def min_length(self) -> int:
        """The paper's code breaks even with dense attention near 50K tokens at its budget of 1000 + 6096."""
        budget = {
            "vertical_slash": self.columns + self.diagonals,
            "a_shape": self.init + self.recent,
            "block_sparse": self.blocks * BLOCK,
        }
        return 50_000 * budget[self.pattern] // 7096

    def search(self, target: Target) -> Search:
        if target.by_head:
            own_lists(self)
            return by_head(self, target)
        return KernelAware(self, target)

    def plan(self, x: AttnInput, state: State) -> Layout | Parts | None:
        if x.layer < self.starting_layer:
            return None
        names, a, b = self._sizes(x)
        if x.device.type == "cuda" and x.q.shape[2] >= PARTED and set(names) == {"vertical_slash", "block_sparse"}:
            return self._parts(x, names, a, b)
        layout: Layout | None = None
        for name in PATTERNS:
            heads = [n == name for n in names]
            if not any(heads):
                continue
            mine = _BUILD[name](self, x, a, b)
            layout = mine if layout is None else Layout.by_head(torch.tensor(heads, device=x.device), mine, layout)
        return layout

    def _parts(self, x: AttnInput, names: list[str], a: Sizes, b: Sizes) -> Parts:
        """Vertical-slash and block-sparse heads apart: each sort has a fast kernel, and a layout of both has none. A head
        has nothing in the other part, which costs that part a few instructions a tile and the sum a pass over outputs."""
        parts = []
        for name in ("vertical_slash", "block_sparse"):
            mine = torch.tensor([n == name for n in names], device=x.device)
            layout = _BUILD[name](self, x, a, b)
            fields = ("diagonal_count", "column_count") if name == "vertical_slash" else ("tile_count",)
            counts = {f: getattr(layout, f) for f in fields}
            some = {f: torch.where(mine.view(-1, *[1] * (c.dim() - 2)), c, 0) for f, c in counts.items()}
            parts.append(Part(replace(layout, **some)))
        return Parts(tuple(parts))

    def _sizes(self, x: AttnInput) -> tuple[list[str], Sizes, Sizes]:
        """Pattern of each list, and its two sizes."""
        h = x.groups if self.share == "group" else x.q.shape[1]
        if self.profile is None:
            sizes = {
                "vertical_slash": (self.columns, self.diagonals),
                "a_shape": (self.init, self.recent),
                "block_sparse": (self.blocks, 0),
            }
            entries: tuple[Entry, ...] = ((self.pattern, *sizes[self.pattern]),) * h
        else:
            layers, heads, entries = _at(self.profile, x.layer)
            if (layers, heads) != (x.layers, h):
                have = f"{layers} layers, {heads} heads"
                raise ConfigError(f"minference: profile expected {x.layers} layers with {h} heads each, got {have}")
        return [e[0] for e in entries], tuple(e[1] for e in entries), tuple(e[2] for e in entries)

    # ------------------------------------------------------------------ the three patterns, each for all heads
    def _vertical_slash(self, x: AttnInput, a: Sizes, b: Sizes) -> Layout:
        m = x.start + x.q.shape[2]
        reduce = "max" if self.share == "group" else "none"
        probe = last_queries(x.q, x.kv, self.last_q, scale=x.scale, softcap=x.softcap, reduce=reduce)
        columns = tuple(min(max(n, self.sink), m) for n in a)
        diagonals = tuple(min(max(n, LEAST_DIAGONALS, self.local), m) for n in b)
        chosen = vote(probe, m, columns, diagonals, sink=self.sink, local=self.local)
        grid: dict[str, Any] = dict(block_q=BLOCK, tile_width=BLOCK, q_offset=x.offset(BLOCK), q_pos=x.layout_pos())
        layout, most = factored(x.shape, chosen, **grid), 2 * (m // BLOCK + 2)
        assert layout.diagonals is not None
        if layout.diagonals.shape[-1] <= most:
            return layout
        # A run of distances is at least a tile long, so that many tiles cover all there are: a head with every distance
        # leaves no list of a number per key to those who size their scratch by it.
        return replace(layout, diagonals=layout.diagonals[..., :most].contiguous())

    def _a_shape(self, x: AttnInput, a: Sizes, b: Sizes) -> Layout:
        b = tuple(max(n, 1) for n in b)  # a row sees itself, whatever a profile says
        same = len(set(a)) == len(set(b)) == 1  # a number needs no copy to the device
        return Layout.static(
            x.shape,
            sink=a[0] if same else torch.tensor(a),
            window=b[0] if same else torch.tensor(b),
            block_q=BLOCK,
            q_offset=x.offset(BLOCK),
            q_pos=x.layout_pos(),
            device=x.device,
            validate=False,
        )

    def _block_sparse(self, x: AttnInput, a: Sizes, b: Sizes) -> Layout:
        n, offset, first = x.q.shape[2], x.offset(BLOCK), x.start // BLOCK
        kbar = pool_keys(x.kv, BLOCK)[:, :, : -(-(x.start + n) // BLOCK)]
        qbar = block_pool(x.q, BLOCK, offset=offset)
        tiles, count = top_blocks(qbar, kbar, a, first=first, block=BLOCK, group=self.share == "group")
        return Layout(
            x.shape,
            block_q=BLOCK,
            q_offset=offset,
            tile_width=BLOCK,
            q_pos=x.layout_pos(),
            tiles=tiles,
            tile_count=count,
        )


_BUILD = {
    "vertical_slash": MInference._vertical_slash,
    "a_shape": MInference._a_shape,
    "block_sparse": MInference._block_sparse,
}


def _at(profile: Profile | str, layer: int) -> tuple[int, int, tuple[Entry, ...]]:
    """(layers, heads, entries of one layer) of a profile or of the folder that holds it; the last layer's where there is
    no such layer."""
    if not isinstance(profile, str):
        entries = profile[min(layer, len(profile) - 1)]
        return len(profile), len(entries), entries
    found = profiles.of("minference", profile)
    assert found is not None
    names, sizes = (found.tensors.get(n) for n in ("pattern", "sizes"))
    if names is None or sizes is None or names.dim() != 2 or sizes.shape != (*names.shape, 2):
        raise ConfigError(f"minference: {profile!r} expected tensors pattern [layers, heads] and sizes [layers, heads, 2]")
    if int(names.min()) < 0 or int(names.max()) >= len(PATTERNS) or int(sizes.min()) < 0:
        raise ConfigError(f"minference: {profile!r} expected patterns 0 to {len(PATTERNS) - 1} and sizes >= 0")
    at = min(layer, names.shape[0] - 1)
    pairs = zip(names[at].tolist(), sizes[at].tolist(), strict=True)
    return names.shape[0], names.shape[1], tuple((PATTERNS[n], a, b) for n, (a, b) in pairs)


def _check_profile(profile: Any) -> None:
    """A ConfigError that names the first entry which is not (pattern, size >= 0, size >= 0)."""
    if not isinstance(profile, tuple) or not profile or not all(isinstance(layer, tuple) for layer in profile):
        raise ConfigError(f"minference: profile expected a tuple of layers of (pattern, a, b), got {profile!r}")
    for i, layer in enumerate(profile):
        for j, entry in enumerate(layer):
            ok = isinstance(entry, tuple) and len(entry) == 3 and entry[0] in PATTERNS
            if not ok or not all(isinstance(n, int) and n >= 0 for n in entry[1:]):
                known = ", ".join(PATTERNS)
                raise ConfigError(f"minference: profile[{i}][{j}] expected ({known}; two sizes >= 0), got {entry!r}")
