"""A slow model of a layout for tests: Python sets and loops over the definition, sharing no code with the library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st

from foveate.kv import KV
from foveate.layout import Layout


@dataclass
class Head:
    """What one head of one batch row sees. tiles, entries: one list per query block."""

    full: bool = False
    sink: int = 0
    window: int = 0
    stride: int = 0
    phase: int = 0
    tiles: list[list[int]] | None = None
    entries: list[list[int]] | None = None
    diagonals: list[int] | None = None
    columns: list[int] = field(default_factory=list)


@dataclass
class Model:
    """heads[b][h]; q_pos[b] are the positions of the query rows, or None for the default."""

    shape: tuple[int, int, int, int]
    heads: list[list[Head]]
    causal: bool = True
    block_q: int = 1
    q_offset: int = 0
    width: int = 1
    q_pos: list[list[int]] | None = None

    def block_of(self, i: int) -> int:
        return (i + self.q_offset) // self.block_q

    @property
    def num_blocks(self) -> int:
        return self.block_of(self.shape[2] - 1) + 1

    def rows_of(self, blk: int) -> list[int]:
        return [i for i in range(self.shape[2]) if self.block_of(i) == blk]

    def position(self, b: int, i: int, length: int) -> int:
        return self.q_pos[b][i] if self.q_pos is not None else length - self.shape[2] + i

    # ------------------------------------------------------------------ lists of a block
    def end(self, b: int, blk: int) -> int:
        """Entry number just after the last row of a query block."""
        _, _, n, m = self.shape
        first = m - n if self.q_pos is None else self.q_pos[b][0]
        return first - self.q_offset + (blk + 1) * self.block_q

    def tile_keys(self, b: int, h: int, blk: int) -> list[set[int]]:
        """Keys of every tile or diagonal that a block reads, in the same order as the lists."""
        head, m = self.heads[b][h], self.shape[3]
        out = [set(range(a, min(a + self.width, m))) for a in (head.tiles[blk] if head.tiles else [])]
        if head.diagonals is not None:
            e = self.end(b, blk)
            out += [set(range(e - d - self.width, e - d)) & set(range(m)) for d in self.cut(head.diagonals)]
        return out

    def cut(self, distances: list[int]) -> list[int]:
        """The tile distances that stand for these: runs of the union of (d, d + block_q], cut every `width`."""
        reached = sorted({x for d in distances for x in range(d, d + self.block_q)})
        tiles, start = [], None
        for i, x in enumerate(reached):
            if i == 0 or reached[i - 1] != x - 1:
                start = x
            if (x - start) % self.width == 0:
                tiles.append(x)
        return tiles

    def single_keys(self, b: int, h: int, blk: int) -> set[int]:
        """Single keys that no tile of the block holds."""
        head = self.heads[b][h]
        singles = set(head.entries[blk] if head.entries else []) | set(head.columns)
        return singles - set().union(*self.tile_keys(b, h, blk))

    # ------------------------------------------------------------------ meaning
    def named(self, b: int, h: int, i: int, q: int, entry: int, pos: int) -> bool:
        head = self.heads[b][h]
        blk = self.block_of(i)
        near = q - pos < head.window and (self.causal or pos - q < head.window)
        return (
            head.full
            or pos < head.sink
            or (head.window > 0 and near)
            or (head.stride > 0 and (pos // self.width) % head.stride == head.phase % head.stride)
            or any(entry in t for t in self.tile_keys(b, h, blk))
            or entry in self.single_keys(b, h, blk)
        )

    def mask(self, kv: KV | None = None, everything: bool = False) -> torch.Tensor:
        b_, h_, n, m = self.shape
        out = torch.zeros(self.shape, dtype=torch.bool)
        for b in range(b_):
            for h in range(h_):
                length, pos, bias = m, list(range(m)), [0.0] * m
                if kv is not None:
                    g = h * kv.shape[1] // h_
                    length = m if kv.len is None else int(kv.len[b, g])
                    pos = pos if kv.pos is None else kv.pos[b, g].tolist()
                    bias = bias if kv.bias is None else kv.bias[b, g].tolist()
                lists = [self.tile_keys(b, h, blk) for blk in range(self.num_blocks)]
                named = [set().union(*t) | self.single_keys(b, h, blk) for blk, t in enumerate(lists)]
                bare = replace(self.heads[b][h], tiles=None, entries=None, diagonals=None, columns=[])
                rule = Model(self.shape, [[bare]], self.causal, self.block_q, self.q_offset, self.width)
                for i in range(n):
                    q = self.position(b, i, length)
                    for e in range(length):
                        seen = (not self.causal or pos[e] <= q) and bias[e] != -math.inf
                        listed = e in named[self.block_of(i)]
                        out[b, h, i, e] = seen and (everything or listed or rule.named(0, 0, i, q, e, pos[e]))
        return out


# ---------------------------------------------------------------------- strategies
def divisors(h: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, h + 1) if h % d == 0])


@st.composite
def shapes(draw):
    b, h = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4, 6]))
    return b, h, draw(st.integers(1, 12)), draw(st.integers(1, 32))


@st.composite
def subsets(draw, lead: tuple[int, ...], m: int, most: int):
    """Nested lists of shape `lead` of ascending distinct numbers below m, as a padded tensor with counts as well."""
    number = math.prod(lead)
    lists = [sorted(draw(st.sets(st.integers(0, m - 1), max_size=most))) for _ in range(number)]
    width = max(1, *map(len, lists)) + draw(st.integers(0, 2))
    junk = draw(st.integers(0, m - 1))
    index = torch.tensor([x + [junk] * (width - len(x)) for x in lists], dtype=torch.int32).view(*lead, width)
    return lists, index, torch.tensor([len(x) for x in lists], dtype=torch.int32).view(lead)


def spread(values, lead: tuple[int, int], b: int, h: int) -> list[list]:
    """values of `[Bl, Hl]` in row order -> [b][h]."""
    bl, hl = lead
    return [[values[(i if bl > 1 else 0) * hl + j * hl // h] for j in range(h)] for i in range(b)]


@st.composite
def layouts(draw, kinds=("full", "rule", "lists", "factored", "mixed"), stride=True, shape=None, consecutive=True):
    """(Layout, Model) of one meaning. `consecutive`: query positions are a run, else anything."""
    kind = draw(st.sampled_from(kinds))
    b, h, n, m = shape = draw(shapes()) if shape is None else shape
    causal = True if kind in ("factored", "mixed") else draw(st.booleans())
    block_q = draw(st.integers(1, 7))
    plain = dict(causal=causal, block_q=block_q, q_offset=draw(st.integers(0, block_q - 1)))
    width = draw(st.integers(1, 9))
    q_pos = None
    if draw(st.booleans()) or not consecutive:
        q_pos = []
        for _ in range(b):
            first = draw(st.integers(-2, m + 2))
            q_pos.append(list(range(first, first + n)) if consecutive else draw(st.permutations(range(n))))
    model = Model(shape, [[Head() for _ in range(h)] for _ in range(b)], width=width, q_pos=q_pos, **plain)
    plain["q_pos"] = None if q_pos is None else torch.tensor(q_pos)

    def heads():
        return draw(st.sampled_from([1, b])), draw(divisors(h))

    def rule(names):
        out = {}
        for name in names:
            lead = heads()
            values = draw(st.lists(st.integers(0, m + 3), min_size=math.prod(lead), max_size=math.prod(lead)))
            out[name] = torch.tensor(values).view(lead)
            each = spread(values, lead, b, h)
            for i in range(b):
                for j in range(h):
                    setattr(model.heads[i][j], name, each[i][j])
        return out

    def per_block(name, most):
        lead = heads()
        lists, index, count = draw(subsets((*lead, model.num_blocks), m, most))
        rows = [lists[i : i + model.num_blocks] for i in range(0, len(lists), model.num_blocks)]
        for i, line in enumerate(spread(rows, lead, b, h)):
            for j, row in enumerate(line):
                setattr(model.heads[i][j], name, row)
        return index, count

    def shared(name, most):
        lead = heads()
        lists, index, count = draw(subsets(lead, m, most))
        for i, line in enumerate(spread(lists, lead, b, h)):
            for j, row in enumerate(line):
                setattr(model.heads[i][j], name, row)
        if int(count.min()) == index.shape[-1]:  # in any order
            index = index[..., draw(st.permutations(range(index.shape[-1])))]
        return index, count

    def lists():
        tiles, entries = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
        out = {}
        if tiles:
            out["tiles"], out["tile_count"] = per_block("tiles", 4)
        if entries:
            out["entries"], out["entry_count"] = per_block("entries", 5)
        names = draw(st.sets(st.sampled_from(["sink", "window"])))
        made = Layout.lists(shape, tile_width=width, **out, **rule(sorted(names)), **plain)
        return strided(made) if stride and draw(st.booleans()) else made

    def strided(layout):
        """Beside lists no builder takes a stride, but the format does."""
        return replace(layout, **{name: t.int() for name, t in rule(["stride", "phase"]).items()})

    def factored():
        d, dc = shared("diagonals", 4)
        c, cc = shared("columns", 5)
        rest = {k: v for k, v in plain.items() if k != "causal"}
        made = Layout.factored(shape, diagonals=d, diagonal_count=dc, columns=c, column_count=cc, tile_width=width, **rest)
        return strided(made) if stride and draw(st.booleans()) else made

    def static():
        names = sorted(draw(st.sets(st.sampled_from(["sink", "window"]))))
        names += ["stride", "phase"] if stride and draw(st.booleans()) else []
        return Layout.static(shape, stride_block=width, **rule(names), **plain)

    def full():
        for line in model.heads:
            for head in line:
                head.full = True
        return Layout.dense(*shape, causal=causal, q_pos=plain["q_pos"])

    build = {"full": full, "rule": static, "lists": lists, "factored": factored}
    if kind != "mixed":
        return build[kind](), model
    sides = draw(st.permutations(list(build)))[:2]
    made = []
    for side in sides:
        model.heads = [[Head() for _ in range(h)] for _ in range(b)]
        made.append((build[side](), model.heads))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=h, max_size=h)))
    model.heads = [[made[0 if mask[j] else 1][1][i][j] for j in range(h)] for i in range(b)]
    return Layout.by_head(mask, made[0][0], made[1][0]), model


@st.composite
def views(draw, b: int, h: int, m: int, parts=("len", "pos", "bias"), kinds=("dense", "paged", "ragged"), d=2):
    """A KV over random storage, with some of `parts`; junk beyond lengths is NaN."""
    g = draw(divisors(h))
    some = draw(st.sets(st.sampled_from(parts)))
    kind = draw(st.sampled_from(kinds))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    k, v = torch.randn(b, g, m, d, generator=gen), torch.randn(b, g, m, d + 1, generator=gen)
    extra = {}
    length = torch.full((b, g), m)
    if "len" in some or kind != "dense":
        length = torch.tensor(draw(st.lists(st.integers(0, m), min_size=b * g, max_size=b * g))).view(b, g)
        extra["len"] = length.int()
        beyond = torch.arange(m) >= length[..., None]
        k, v = k.masked_fill(beyond[..., None], math.nan), v.masked_fill(beyond[..., None], math.nan)
    if "pos" in some:
        gaps = torch.randint(1, 3, (b, g, m), generator=gen)
        pos = gaps.cumsum(-1) - 1
        if draw(st.booleans()):  # a ring: not in text order
            pos = pos[..., torch.randperm(m, generator=gen)]
        extra["pos"] = pos.int()
    if "bias" in some:
        hidden = torch.rand(b, g, m, generator=gen) < 0.2
        extra["bias"] = torch.randn(b, g, m, generator=gen).masked_fill(hidden, -math.inf)
    if kind == "dense":
        return KV.dense(k, v, **extra)
    if kind == "ragged":
        order = torch.randperm(b * g, generator=gen)
        offsets, flat_k, flat_v, at = torch.zeros(b * g, dtype=torch.long), [], [], 0
        for s in order.tolist():
            n = int(length.flatten()[s])
            offsets[s] = at
            flat_k.append(k.view(-1, m, d)[s, :n])
            flat_v.append(v.view(-1, m, d + 1)[s, :n])
            at += n
        return KV.ragged(torch.cat(flat_k), torch.cat(flat_v), offsets.view(b, g), capacity=m, **extra)
    page = draw(st.sampled_from([p for p in (1, 2, 4, 5) if m % p == 0]))
    used = b * g * (m // page)
    table = torch.randperm(used + 3, generator=gen)[:used].view(b, g, m // page)
    pool_k = torch.full((used + 3, page, d), math.nan)
    pool_v = torch.full((used + 3, page, d + 1), math.nan)
    pool_k[table.flatten()], pool_v[table.flatten()] = k.reshape(used, page, d), v.reshape(used, page, d + 1)
    beyond = torch.arange(m // page) * page >= length[..., None]
    table = torch.where(beyond, draw(st.sampled_from([-1, 10**6])), table)  # pages never given out
    return KV.paged(pool_k, pool_v, table.int(), **extra)
