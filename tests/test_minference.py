"""MInference against a slow transcription of its card."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.methods.minference import MInference
from foveate.registry import parse
from tests.drive import oracle
from tests.prompts import SHAPES, call, listed, probe_rows, prompt

SMALL = dict(columns=12, diagonals=50, sink=5, local=20, last_q=16)


def best(score, k, must):
    """The k highest of a list, `must` first, ties to the lower index."""
    order = sorted(range(len(score)), key=lambda j: (j not in must, -score[j], j))
    return sorted(order[: max(k, len(must))])


def vertical_slash(method, x, head):
    """(columns, distances) of one head, with loops."""
    m, rows = x.start + x.q.shape[2], min(method.last_q, x.q.shape[2])
    p = probe_rows(x, rows, head).tolist()
    vert, slash = [0.0] * m, [0.0] * m
    for i, row in enumerate(p):
        for j, mass in enumerate(row):
            vert[j] += mass
            if m - rows + i - j >= 0:
                slash[m - rows + i - j] += mass
    v = best(vert, min(m, max(method.columns, method.sink)), set(range(min(method.sink, m))))
    s = best(slash, min(m, max(method.diagonals, 50)), set(range(min(method.local, m))))
    return v, s


def cut(distances, block=64):
    """The walk of the card over one block of rows: each distance covers 64 keys, neighbours merge into a run, and a
    run is cut from its near end into tiles of 64 (the last may overshoot)."""
    reached = {x for d in distances for x in range(d, d + block)}
    tiles = []
    for x in sorted(reached):
        if x - 1 not in reached:
            first = x
        if (x - first) % block == 0:
            tiles.append(x)
    return tiles


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m,start", [(300, 0), (233, 130), (130, 121)])
def test_vertical_slash_is_the_card(shape, m, start):
    """Index by index, for whole prompts and later chunks, also chunks shorter than the probe."""
    q, k, v = prompt(shape, m=m)
    method, x = MInference(**SMALL), call(q, k, v, start)
    got = method.plan(x, State())
    got.validate()
    assert (got.block_q, got.tile_width, got.q_offset) == (64, 64, start % 64)
    mask = got.to_mask(x.kv)[0]
    for h in (0, 3):
        columns, distances = vertical_slash(method, x, h)
        assert listed(got.columns[0, h], got.column_count[0, h]) == columns
        tiles = listed(got.diagonals[0, h], got.diagonal_count[0, h])
        assert tiles == cut(distances)
        for i in range(m - start):
            t = start + i
            end = (t // 64 + 1) * 64
            reach = lambda ds: {j for d in ds for j in range(end - d - 64, end - d) if 0 <= j <= t}  # noqa: B023, E731
            asked = {j for j in columns if j <= t} | reach(distances)
            assert {t - d for d in distances if d <= t} <= asked
            named = set(mask[h, i].nonzero().flatten().tolist())
            assert asked <= named == asked | reach(tiles)
            assert set(range(min(5, t + 1))) | set(range(max(0, t - 19), t + 1)) <= named


def test_tiles_and_columns_are_disjoint():
    from foveate import lists

    q, k, v = prompt("peaked", m=400)
    got = MInference(**SMALL).plan(call(q, k, v), State())
    rows = lists.expand(got, 0, got.num_blocks)
    for h in range(4):
        for blk in range(got.num_blocks):
            seen = []
            for a, z in zip(rows.start[0, h, blk].tolist(), rows.stop[0, h, blk].tolist()):
                seen += range(a, z)
            seen += rows.entries[0, h, blk][rows.live[0, h, blk]].tolist()
            assert len(seen) == len(set(seen))


@pytest.mark.parametrize("name", ["vertical_slash", "a_shape", "block_sparse"])
@pytest.mark.parametrize("m", [1, 63, 64, 65, 200])
def test_published_budgets_are_dense_on_short_prompts(name, m):
    q, k, v = prompt("random", m=m)
    got = MInference(pattern=name).plan(call(q, k, v), State())
    assert torch.equal(got.to_mask(), Layout.dense(1, 4, m, m).to_mask())


def test_all_columns_alone_are_dense():
    q, k, v = prompt("random", m=200)
    x = call(q, k, v)
    got = MInference(columns=200, diagonals=0, local=1).plan(x, State())
    torch.testing.assert_close(oracle(q.float(), (k.float(), v.float()), got), oracle(q.float(), (k.float(), v.float())))


def test_a_planted_column_and_a_planted_diagonal_are_found():
    q, k, v = prompt("random", m=400)
    q[:, :, -64:] += 4 * k[:, :, 151:152].repeat_interleave(2, 1)
    got = MInference(columns=31, diagonals=50).plan(call(q, k, v), State())
    assert all(151 in listed(got.columns[0, h], got.column_count[0, h]) for h in range(4))
    q, k, v = prompt("diagonal", m=400)
    method = MInference(columns=0, diagonals=50, local=30, sink=0)
    for h in range(4):
        assert {70, 131} <= set(vertical_slash(method, call(q, k, v), h)[1])
    mask = method.plan(call(q, k, v), State()).to_mask()[0]
    for t in range(131, 400):
        assert mask[:, t, t - 70].all() and mask[:, t, t - 131].all()


def test_fewer_diagonals_than_the_local_band_keep_the_band():
    """The published code forces 100 equal scores into 50 places and may lose the diagonal itself."""
    q, k, v = prompt("random", m=300)
    mask = MInference(columns=0, diagonals=0, local=100).plan(call(q, k, v), State()).to_mask()[0]
    for t in range(300):
        assert mask[:, t, max(0, t - 99) : t + 1].all()


@pytest.mark.parametrize("start", [0, 130, 299])
def test_a_shape_is_the_mask(start):
    q, k, v = prompt("random", m=300)
    x = call(q, k, v, start)
    mask = MInference(pattern="a_shape", init=7, recent=33).plan(x, State()).to_mask()[0]
    for i in range(300 - start):
        t = start + i
        want = {j for j in range(t + 1) if j < 7 or t - j < 33}
        assert all(set(mask[h, i].nonzero().flatten().tolist()) == want for h in range(4))


def test_sizes_of_nothing_leave_every_row_its_own_key():
    """A profile may name 0 of everything, for one head or for all."""
    q, k, v = prompt("random", m=300)
    nothing = [(name, 0, 0) for name in ("a_shape", "vertical_slash", "block_sparse")]
    for entries in (nothing + nothing[:1], nothing[:1] * 4):
        mask = MInference(profile=(tuple(entries),)).plan(call(q, k, v, 70), State()).to_mask()[0]
        assert mask.diagonal(70, 1, 2).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m,start,blocks", [(600, 0, 3), (600, 0, 1), (577, 250, 4), (640, 256, 4), (700, 690, 2)])
def test_block_sparse_is_the_card(shape, m, start, blocks):
    """Mean pooling over the rows a block has, top blocks of each row, and (not in the code) sink and diagonal first."""
    q, k, v = prompt(shape, m=m)
    x = call(q, k, v, start)
    got = MInference(pattern="block_sparse", blocks=blocks).plan(x, State())
    got.validate()
    for h in range(4):
        for row in range(start // 64, -(-m // 64)):
            mean = q[0, h, max(start, row * 64) : (row + 1) * 64].mean(0)
            score = [float(mean @ k[0, h // 2, j * 64 : (j + 1) * 64].mean(0)) for j in range(row + 1)]
            want = [64 * j for j in best(score, blocks, {0, row})]
            at = row - start // 64
            assert listed(got.tiles[0, h, at], got.tile_count[0, h, at]) == want


def test_work_in_pieces_is_the_same(monkeypatch):
    from foveate.scores import pooled
    from foveate.scores.keys import pieces

    q, k, v = prompt("blocks", m=600)
    method = MInference(pattern="block_sparse", blocks=3)
    whole = method.plan(call(q, k, v), State()).to_mask()
    monkeypatch.setattr(pooled, "pieces", lambda total, cost: pieces(total, cost, 100))
    assert torch.equal(method.plan(call(q, k, v), State()).to_mask(), whole)


def test_share_group_votes_by_the_highest_score():
    q, k, v = prompt("random", h=6, g=2, m=400)
    q[:, 4, -64:] += 4 * k[:, 1, 151:152]  # one head of the second group alone needs this key
    x = call(q, k, v)
    got = MInference(columns=31, diagonals=50, share="group").plan(x, State())
    assert got.columns.shape[1] == 2 and bool(got.to_mask()[0, 3:, -1, 151].all())
    got.validate()
    blocks = MInference(pattern="block_sparse", blocks=3, share="group").plan(x, State())
    means = torch.stack([k[0, 1, 64 * j : 64 * j + 64].mean(0) for j in range(6)])
    score = q[0, 3:, 320:384].mean(1) @ means.T  # query heads of the group x key blocks, for the last full row block
    want = [64 * j for j in best(score.max(0).values.tolist(), 3, {0, 5})]
    assert listed(blocks.tiles[0, 1, 5], blocks.tile_count[0, 1, 5]) == want


def test_profile_mixes_patterns_and_sizes_by_head():
    q, k, v = prompt("random", h=6, g=2, m=400)
    kinds = [("vertical_slash", 12, 60), ("a_shape", 7, 33), ("block_sparse", 3, 0), ("vertical_slash", 40, 50),
             ("block_sparse", 2, 0), ("a_shape", 2, 64)]  # fmt: skip
    method = MInference(sink=5, local=20, profile=((kinds[0],) * 6, tuple(kinds)))
    assert hash(method) == hash(dataclasses.replace(method))
    for start in (0, 70):
        got = method.plan(call(q, k, v, start, layer=1, layers=2), State())
        got.validate()
        mask = got.to_mask()
        for h, (name, a, b) in enumerate(kinds):
            sizes = {"vertical_slash": ("columns", "diagonals"), "a_shape": ("init", "recent"), "block_sparse": ("blocks",)}
            alone = MInference(pattern=name, sink=5, local=20, **dict(zip(sizes[name], (a, b))))
            want = alone.plan(call(q, k, v, start), State()).to_mask()[:, h]
            assert torch.equal(mask[:, h], want), (h, name)


def test_starting_layer_and_storage():
    q, k, v = prompt("random", m=150)
    method = MInference(**SMALL, starting_layer=2)
    assert method.plan(call(q, k, v, layer=1, layers=4), State()) is None
    want = method.plan(call(q, k, v, layer=2, layers=4), State())
    pages = torch.full((2 * 20, 8, 32), float("nan"), dtype=torch.float64)
    pools = [pages.clone(), pages.clone()]
    for g in range(2):
        for e in range(150):
            pools[0][g * 20 + e // 8, e % 8], pools[1][g * 20 + e // 8, e % 8] = k[0, g, e], v[0, g, e]
    table = torch.arange(40).view(1, 2, 20).int()  # room for 160 entries, 150 used
    kv = KV.paged(*pools, table, torch.tensor([[150, 150]], dtype=torch.int32))
    for name in ("vertical_slash", "a_shape", "block_sparse"):
        one = dataclasses.replace(method, pattern=name, init=3, recent=20, blocks=2)
        want = one.plan(call(q, k, v, layer=2), State()).to_mask()
        got = one.plan(call(q, k, v, layer=2, kv=kv), State()).to_mask(kv)
        assert torch.equal(got[..., :150], want) and not got[..., 150:].any(), name


def test_rows_of_a_batch_are_independent():
    both = [torch.cat(t) for t in zip(prompt("peaked", seed=1), prompt("diagonal", seed=2))]
    for name in ("vertical_slash", "block_sparse"):
        method = MInference(pattern=name, blocks=2, **SMALL)
        got = method.plan(call(*both), State()).to_mask()
        for b in range(2):
            one = [t[b : b + 1] for t in both]
            assert torch.equal(got[b : b + 1], method.plan(call(*one), State()).to_mask())


def test_long_prompts_take_kilobytes_a_head():
    m = 1 << 18
    k = torch.zeros(1, 1, m, 2)
    x = call(torch.zeros(1, 1, m, 2)[:, :, -64:], k, k)
    x.start = m - 64
    got = MInference(columns=1000, diagonals=2000).plan(x, State())
    assert got.nbytes < 40_000


@pytest.mark.parametrize("bad", [
    (("vertical_slash", 1, 2),),
    ((("spiral", 1, 2),),),
    ((("a_shape", -1, 2),),),
    ((("a_shape", 1),),),
    "plan.json",
])  # fmt: skip
def test_bad_profiles_are_refused(bad):
    with pytest.raises(ConfigError, match="profile"):
        MInference(profile=bad)


def test_other_bad_input():
    q, k, v = prompt("random", m=100)
    method = MInference(profile=((("a_shape", 1, 2),) * 3,))
    with pytest.raises(ConfigError, match=r"1 layers with 4 heads each, got 1 layers, 3 heads"):
        method.plan(call(q, k, v), State())
    with pytest.raises(ConfigError, match="group"):
        MInference(profile=((("a_shape", 1, 2),),), share="group")
    with pytest.raises(ConfigError, match="pattern"):
        MInference(pattern="slash")
    with pytest.raises(ConfigError, match="columns"):
        parse("minference:columns=-1")


def test_length_gate_follows_the_budget():
    assert MInference().min_length == 50_000
    assert MInference.make("8k").min_length < 7000 < MInference(pattern="a_shape").min_length


@pytest.mark.parametrize("shape", SHAPES)
def test_the_8k_preset_is_sparse_at_7000_tokens(shape):
    q, k, v = (t.float() for t in prompt(shape, h=2, g=1, m=7000, d=16))
    got = parse("minference@8k").plan(call(q, k, v), State())
    assert got.density() <= got.density_computed() <= 0.3
