"""FlexPrefill against a slow transcription of its card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.methods.flexprefill import FlexPrefill
from foveate.profile import Profile
from foveate.registry import parse
from tests.drive import oracle
from tests.prompts import SHAPES, call, probe_rows, prompt

SMALL = dict(block=16, min_budget=32)


def smallest(mass, gamma):
    """Indices of the smallest set that reaches gamma of the mass, highest first, ties to the lower index."""
    keep, got = [], 0.0
    for j in sorted(range(len(mass)), key=lambda j: (-mass[j], j)):
        if got >= gamma * sum(mass) and gamma < 1:
            break
        keep.append(j)
        got += mass[j]
    return keep


def best(score, k):
    """The k highest, index 0 first of all."""
    return set(sorted(range(len(score)), key=lambda j: (j != 0, -score[j], j))[:k])


def softmax(row):
    top = max(row)
    e = [math.exp(x - top) for x in row]
    return [x / sum(e) for x in e]


def transcribe(method, x, head):
    """(set of block pairs (row, column) by absolute number, query-aware or not) of one head, with loops."""
    b, n = method.block, x.q.shape[2]
    m = x.start + n
    nk, first = -(-m // b), x.start // b
    q, k = x.q[0, head], x.kv.k[0, head // (x.q.shape[1] // x.groups)]
    # Step 2: the probe, and its mass by key and by distance.
    rows = min(b, n)
    p = probe_rows(x, rows, head).tolist()
    vert, slash = [0.0] * m, [0.0] * m
    for i, row in enumerate(p):
        for j in range(m - rows + i + 1):
            vert[j] += row[j] / rows
            slash[m - rows + i - j] += row[j] / rows
    # Step 4: by block. A distance d meets block diagonal d // b in the rows whose offset in their block is large enough.
    by_column, by_diagonal = [0.0] * nk, [0.0] * (nk + 1)
    for j in range(m):
        by_column[j // b] += vert[j]
        for offset in range(b):  # of the query row in its block; its key lies j before it
            by_diagonal[-((offset - j) // b)] += slash[j] / b
    by_diagonal = by_diagonal[:nk]
    # Step 5: do pooled keys predict the same blocks?
    mean = q[n - rows :].mean(0)
    kbar = [k[j * b : min(m, (j + 1) * b)].mean(0) for j in range(nk)]
    guess = softmax([x.scale * float(mean @ kb) for kb in kbar])
    mix = [(s + t) / 2 for s, t in zip(guess, by_column)]
    kl = lambda a: sum(s * math.log(s / t) for s, t in zip(a, mix) if s > 0)  # noqa: E731
    aware = math.sqrt(max(0.0, (kl(guess) + kl(by_column)) / 2)) < method.tau
    # Steps 3 and 7: tokens needed, in blocks; a run of distances reaches one block diagonal further than its length.
    most = nk if method.max_budget is None else min(nk, -(-method.max_budget // b))
    least = min(-(-method.min_budget // b), most)
    n_v = least if aware else min(max(len(smallest(vert, method.gamma)) // b + 1, least), most)
    n_s = least if aware else min(max(len(smallest(slash, method.gamma)) // b + 2, least), most)
    columns, diagonals = best(by_column, n_v), best(by_diagonal, n_s)
    last = (m - 1) // b
    pairs = {(i, j) for i in range(first, last + 1) for j in range(i + 1) if j in columns or i - j in diagonals}
    # Step 8: block pairs of all rows together.
    if aware:
        flat, names = [], []
        for i in range(first, last + 1):
            qbar = q[max(0, i * b - x.start) : (i + 1) * b - x.start].mean(0)
            flat += softmax([x.scale * float(qbar @ kbar[j]) for j in range(i + 1)])
            names += [(i, j) for j in range(i + 1)]
        pairs |= {names[t] for t in smallest(flat, method.gamma)}
    return pairs, aware


def named(layout, x, head, b):
    """Block pairs of one head in a layout of whole blocks, by absolute number."""
    out = set()
    for blk in range(layout.num_blocks):
        h = head * layout.tiles.shape[1] // x.q.shape[1]
        for start in layout.tiles[0, h, blk, : int(layout.tile_count[0, h, blk])].tolist():
            assert start % b == 0
            out.add((x.start // b + blk, start // b))
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m,start", [(110, 0), (128, 0), (133, 64), (120, 55), (101, 97)])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_selection_is_the_card(shape, m, start, tau):
    """Block by block, for whole prompts and later chunks (also ones shorter than the probe) under both patterns."""
    q, k, v = prompt(shape, m=m)
    x = call(q, k, v, start)
    method = FlexPrefill(**SMALL, tau=tau, gamma=0.63)
    got = method.plan(x, State())
    got.validate()
    assert (got.block_q, got.tile_width, got.q_offset) == (16, 16, start % 16)
    for h in range(4):
        want, aware = transcribe(method, x, h)
        assert aware == (tau == 1.0) and named(got, x, h, 16) == want


def test_the_test_tells_heads_apart():
    """At the published tau, heads with uniform attention trust the pooled guess and heads with peaks do not."""
    q, k, v = prompt("peaked", m=400)
    q[:, :2] *= 0.01  # kv head 0: nearly uniform
    method = FlexPrefill(**SMALL)
    assert [transcribe(method, call(q, k, v), h)[1] for h in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("option", [dict(max_budget=40), dict(max_budget=16), dict(gamma=0.0), dict(gamma=0.99)])
@pytest.mark.parametrize("shape", SHAPES)
def test_budgets_are_the_card(option, shape):
    q, k, v = prompt(shape, m=120, seed=3)
    x = call(q, k, v)
    method = FlexPrefill(**{**SMALL, "tau": 0.3, **option})
    got = method.plan(x, State())
    for h in range(4):
        assert named(got, x, h, 16) == transcribe(method, x, h)[0]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_gamma_one_and_large_budgets_are_dense(tau):
    q, k, v = prompt("random", m=150)
    dense = Layout.dense(1, 4, 150, 150).to_mask()
    for method in (FlexPrefill(**SMALL, gamma=1.0, tau=tau), FlexPrefill(block=16, min_budget=144, tau=tau)):
        assert torch.equal(method.plan(call(q, k, v), State()).to_mask(), dense)
    assert FlexPrefill(block=16, min_budget=150).plan(call(q, k, v), State()) is None
    assert FlexPrefill().plan(call(q, k, v), State()) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_raising_gamma_never_drops_a_pair(shape):
    q, k, v = prompt(shape, m=200)
    last = None
    for gamma in (0.1, 0.5, 0.8, 0.95, 1.0):
        mask = FlexPrefill(**SMALL, gamma=gamma).plan(call(q, k, v), State()).to_mask()
        assert last is None or not (last & ~mask).any()
        last = mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 90])
def test_first_column_and_diagonal_blocks_are_always_in(shape, start):
    q, k, v = prompt(shape, m=200)
    got = FlexPrefill(block=16, min_budget=1, gamma=0.0, tau=1.0).plan(call(q, k, v, start), State())
    mask = got.to_mask()[0]
    for i in range(200 - start):
        t = start + i
        assert mask[:, i, : min(16, t + 1)].all() and mask[:, i, t // 16 * 16 : t + 1].all()


@pytest.mark.parametrize("shape", ["peaked", "diagonal"])
@pytest.mark.parametrize("m", [192, 201])
def test_probe_rows_keep_gamma_of_their_mass(shape, m):
    """To within a block, where the peaks fit into the least budget; diagonals across two block diagonals included."""
    q, k, v = prompt(shape, m=m, d=64)
    x = call(q, k, v)
    mask = FlexPrefill(block=16, min_budget=80, tau=0.0, gamma=0.9).plan(x, State()).to_mask()[0, :, -16:]
    kept = torch.stack([(probe_rows(x, 16, h) * mask[h]).sum(-1).mean() for h in range(4)])
    assert (kept >= 0.9 - 1 / (m // 16)).all()


def test_pooled_guess_that_is_exact_is_trusted():
    """Keys alike within each block and one query: the pooled and the exact distribution are the same, distance 0."""
    k = torch.randn(1, 1, 13, 8, dtype=torch.float64).repeat_interleave(16, 2)
    q = torch.randn(1, 2, 1, 8, dtype=torch.float64).expand(1, 2, 208, 8)
    x = call(q, k, k, 207)  # one query, the last: its causal row is all keys
    method = FlexPrefill(block=16, min_budget=16, tau=1e-6)
    assert all(transcribe(method, x, h)[1] for h in range(2))
    got = method.plan(x, State())
    for h in range(2):
        assert named(got, x, h, 16) == transcribe(method, x, h)[0]


def gammas(tmp_path, table, **options):
    made = {"block": 16, "tau": 0.1, "min_budget": 32, "max_budget": None} | options
    Profile(method="flexprefill", options=made, tensors={"gamma": torch.tensor(table)}).save(tmp_path / "p")
    return FlexPrefill(block=16, min_budget=32, tau=made["tau"], profile=str(tmp_path / "p"))


@pytest.mark.parametrize("tau", [0.0, 0.3, 10.0])  # no head, some and all trust the pooled guess
def test_a_gamma_per_head_is_that_gamma(tau, tmp_path):
    q, k, v = prompt("random", h=6, g=3, m=200)
    x = replace(call(q, k, v, 40), layer=1, layers=2)
    row = [0.0, 0.25, 0.5, 0.75, 0.875, 1.0]
    got = gammas(tmp_path, [[0.5] * 6, row], tau=tau).plan(x, State())
    sizes = []
    for head, gamma in enumerate(row):
        want = FlexPrefill(**SMALL, gamma=gamma, tau=tau).plan(x, State())
        assert named(got, x, head, 16) == named(want, x, head, 16)
        sizes.append(len(named(got, x, head, 16)))
    assert sizes[0] < sizes[-1] == int(FlexPrefill(**SMALL, gamma=1.0).plan(x, State()).tile_count[0, 0].sum())


def test_profiles_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"profile was made with tau=0\.2, but tau is 0\.1"):
        replace(gammas(tmp_path, [[0.5]], tau=0.2), tau=0.1)
    with pytest.raises(ConfigError, match=r"gamma \[layers, heads\]"):
        gammas(tmp_path, [0.5])


def test_work_in_pieces_is_the_same(monkeypatch):
    from foveate.scores import pairs
    from foveate.scores.keys import pieces

    q, k, v = prompt("random", m=200)
    q[:, 2:] *= 3  # so that the groups keep different numbers of blocks
    method = FlexPrefill(**SMALL, tau=0.2)
    whole = method.plan(call(q, k, v), State())
    monkeypatch.setattr(pairs, "pieces", lambda total, cost: pieces(total, cost, 1))
    cut = method.plan(call(q, k, v), State())
    assert torch.equal(cut.to_mask(), whole.to_mask())
    cut.validate()


def test_share_group_is_the_union():
    q, k, v = prompt("peaked", h=6, g=2, m=200)
    x = call(q, k, v)
    got = FlexPrefill(**SMALL, share="group").plan(x, State())
    got.validate()
    assert got.tiles.shape[1] == 2
    each = FlexPrefill(**SMALL).plan(x, State())
    for g in range(2):
        assert named(got, x, 3 * g, 16) == set().union(*(named(each, x, h, 16) for h in range(3 * g, 3 * g + 3)))


def test_rows_of_a_batch_are_independent():
    both = [torch.cat(t) for t in zip(prompt("peaked", m=200, seed=1), prompt("random", m=200, seed=2))]
    method = FlexPrefill(**SMALL, tau=0.2)
    got = method.plan(call(*both), State()).to_mask()
    for b in range(2):
        assert torch.equal(got[b : b + 1], method.plan(call(*(t[b : b + 1] for t in both)), State()).to_mask())


def test_csr_round_trip_and_attention():
    q, k, v = prompt("blocks", m=180)
    layout = FlexPrefill(**SMALL).plan(call(q, k, v), State())
    back = Layout.from_csr(*layout.to_csr(), layout.shape, block_q=16, block_k=16)
    assert torch.equal(back.to_mask(), layout.to_mask())
    mask = layout.to_mask()
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32)).masked_fill(~mask, -math.inf)
    want = s.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(oracle(q, (k, v), layout), want.float())


def test_pages_that_are_not_filled_yet():
    q, k, v = prompt("random", m=150)
    flat = [torch.full((2 * 160, 32), float("nan"), dtype=torch.float64) for _ in range(2)]
    for g in range(2):
        flat[0][g * 160 : g * 160 + 150], flat[1][g * 160 : g * 160 + 150] = k[0, g], v[0, g]
    pools = [t.view(40, 8, 32) for t in flat]
    kv = KV.paged(*pools, torch.arange(40).view(1, 2, 20).int(), torch.tensor([[150, 150]], dtype=torch.int32))
    for tau in (0.0, 1.0):
        method = FlexPrefill(**SMALL, tau=tau)
        got = method.plan(call(q, k, v, kv=kv), State()).to_mask(kv)
        assert torch.equal(got[..., :150], method.plan(call(q, k, v), State()).to_mask()) and not got[..., 150:].any()


def test_low_precision_and_extreme_input():
    q, k, v = prompt("peaked", m=200)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        FlexPrefill(**SMALL).plan(call(*(t.to(dtype) for t in (q, k, v))), State()).validate()
    for scale in (0.0, 1e3):
        got = FlexPrefill(**SMALL).plan(call(*(t * scale for t in (q, k, v))), State())
        assert got.to_mask()[0].diagonal(dim1=-2, dim2=-1).all()


def test_presets_and_bad_options():
    small = parse("flexprefill@8k")
    assert (small.gamma, small.min_budget, small.block, small.tau) == (0.9, 512, 128, 0.1)
    assert (FlexPrefill().gamma, FlexPrefill().min_budget, FlexPrefill().max_budget) == (0.9, 1024, None)
    assert FlexPrefill().min_length == 1025 and small.min_length == 513
    for text in ("gamma=1.5", "tau=-1", "min_budget=0", "block=4", "share=row", "max_budget=0"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            parse(f"flexprefill:{text}")
