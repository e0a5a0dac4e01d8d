"""Qwen2.5-1M against slow transcriptions of its card: positions of dual chunk attention, selection, refinement."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.errors import ConfigError, UnsupportedError
from foveate.kernels.dispatch import attend
from foveate.layout import Layout, Parts
from foveate.methods.base import State
from foveate.methods.qwen1m import Qwen1M
from foveate.methods.search import Target
from foveate.profile import Profile
from foveate.recipe import Recipe
from foveate.registry import parse
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES, Case
from tests.prompts import call

SMALL = dict(chunk=112, local=16, block=16, threshold=0, columns=20, diagonals=12, sink=5, near=6, last_q=16)
DCA = dict(chunk=40, local=8, block=16, sparse=False)
DCA_TEXT = "qwen1m:chunk=40,local=8,block=16,sparse=false"


# ---------------------------------------------------------------------- slow transcriptions
def query_position(i: int, j: int, size: int, local: int) -> int:
    """Card, steps 1-3: where query i stands for key j, which stands at j mod L."""
    length = size - local
    u, own, other = i % length, i // length, j // length
    if own == other:
        return u
    return min(u + length, size) if own == other + 1 else min(2 * length - 1, size)


def logits(q, k, rope, size, local, scale, position=query_position):
    """fp64 `[H, N, M]` of one sequence with re-assigned positions, row by row; -inf above the diagonal."""
    h, n, g, m = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    length = size - local
    every = torch.arange(m)[None]
    raw_q, raw_k = rope.unrotate(q, every[:, m - n :]), rope.unrotate(k, every)
    low_k = rope.rotate(raw_k, every % length)[0].repeat_interleave(h // g, 0)
    out = torch.full((h, n, m), float("-inf"), dtype=q.dtype)
    at = torch.tensor(
        [[position(m - n + row, j, size, local) if j <= m - n + row else -1 for j in range(m)] for row in range(n)]
    )
    for other in range(0, m, length):  # keys of one chunk see a query at one place
        moved = rope.rotate(raw_q, at[:, other][None].clamp(min=0))[0]
        s = scale * moved @ low_k[:, other : other + length].mT
        out[:, :, other : other + length] = s.masked_fill(at[:, other : other + length] < 0, float("-inf"))
    assert all(len(set(row[o : o + length].tolist()) - {-1}) <= 1 for row in at for o in range(0, m, length))
    return out


def naive(q, k, v, rope, size, local, scale, warm=None):
    """Dual chunk attention as one softmax; `warm` `[N]` multiplies the logits of each row."""
    s = logits(q, k, rope, size, local, scale)
    if warm is not None:
        s = s * warm[None, :, None]
    return s.softmax(-1) @ v[0].repeat_interleave(q.shape[1] // v.shape[1], 0)


def critical(i: int, j: int, size: int, local: int) -> int:
    """Card, step 6: positions of the probe, not cut off."""
    length = size - local
    u, own, other = i % length, i // length, j // length
    return u if own == other else u + length if own == other + 1 else u + size


def best(score, k, must):
    order = sorted(range(len(score)), key=lambda j: (j not in must, -score[j], j))
    return set(order[: max(k, len(must))])


def chosen(method, q, k, rope, start, scale):
    """Per chunk of this call's rows (by its number): the keys and distances of each head, with loops."""
    m, length, out = k.shape[2], method.chunk - method.local, {}
    for own in range(start // length, (m - 1) // length + 1):
        a, end = max(start, own * length), min(m, (own + 1) * length)
        rows = min(method.last_q, end - a)
        s = logits(q[:, :, end - rows : end], k[:, :, :end], rope, method.chunk, method.local, scale, critical)
        p = s.softmax(-1)
        for head in range(q.shape[1]):
            columns, far = p[head].sum(0).tolist(), [0.0] * end
            for r, row in enumerate(p[head].tolist()):
                for j in range(end - rows + r + 1):
                    far[end - rows + r - j] += row[j]
            some = best(columns, min(end, max(method.columns, method.sink)), set(range(min(end, method.sink))))
            out[own, head] = some, best(far, min(end, max(method.diagonals, method.near)), set(range(min(end, method.near))))
    return out


def selected(method, q, k, rope, start, scale):
    """bool `[H, N, M]`: the pairs of the card, distances rounded to key blocks."""
    m, length, block = k.shape[2], method.chunk - method.local, method.block
    picks = chosen(method, q, k, rope, start, scale)
    out = torch.zeros(q.shape[1], m - start, m, dtype=torch.bool)
    for head in range(q.shape[1]):
        for first in range(start // block * block, m, block):  # a block of queries: what any of its rows reaches
            columns, distances = picks[first // length, head]
            reached = {(i - d) // block for i in range(first, first + block) for d in distances if i >= d}
            keys = sorted(j for j in range(m) if j in columns or j // block in reached)
            for i in range(max(first, start), min(m, first + block)):
                out[head, i - start, [j for j in keys if j <= i]] = True
    return out


def rotated_call(case: Case, start: int = 0, end: int | None = None):
    q, k, v, rope = case.make()
    q, k, v = (t[:, :, :end].double() for t in (q, k, v))
    return replace(call(q, k, v, start), rope=rope), (q, k, v, rope)


def masks(x, plan):
    """bool `[H, N, M]` of each part, in columns of the text (far keys are the first ones)."""
    parts = plan.parts if isinstance(plan, Parts) else [None]
    out = []
    for part in parts:
        layout = plan if part is None else part.layout
        mask = layout.to_mask(x.kv if part is None or part.kv is None else part.kv)[0]
        out.append(torch.nn.functional.pad(mask, (0, x.kv.capacity - mask.shape[-1])))
    return out


# ---------------------------------------------------------------------- positions
def test_the_table_of_distances():
    """c_s = 8, l = 2, L = 6: true inside a chunk and up to l + 1 over one boundary, never above c_s."""
    grid = Qwen1M(chunk=8, local=2, block=1).grid
    want = {
        (5, 0): 5, (7, 7): 0, (6, 5): 1, (7, 5): 2, (8, 5): 3, (9, 5): 3, (11, 5): 3, (11, 0): 8, (8, 0): 8, (7, 0): 7,
        (12, 6): 6, (17, 11): 3, (12, 5): 3, (12, 0): 8, (30, 0): 8, (30, 5): 3, (30, 18): 8, (30, 24): 6, (30, 29): 1,
    }  # fmt: skip
    for (i, j), distance in want.items():
        assert query_position(i, j, 8, 2) - j % 6 == distance, (i, j)
    for i in range(40):
        at = torch.tensor([i])
        for j in range(i + 1):
            assert int(grid.towards(at, j // 6)) - j == query_position(i, j, 8, 2) - j % 6 <= 8, (i, j)
    assert grid.inter == 8 and Qwen1M(chunk=9, local=6, block=1).grid.inter == 5  # min(2 L - 1, c_s)


@pytest.mark.parametrize("m", [1, 33, 40])
def test_up_to_a_chunk_nothing_changes(m):
    q, k, v = qkv(1, 4, 2, 42)
    drive, want = Drive(DCA_TEXT), oracle(q, (k, v))
    torch.testing.assert_close(drive(*(t[:, :, :m] for t in (q, k, v))), want[:, :, :m], atol=1e-5, rtol=1e-5)
    assert isinstance(drive.last[1], Layout) and drive.last[1].full
    for i in range(m, 40):
        step = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        torch.testing.assert_close(step, want[:, :, i : i + 1], atol=1e-5, rtol=1e-5)
    steps = [drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in (40, 41)] if m == 40 else []
    if steps:  # key 0 is 40 away from row 40, the largest distance there is, and from row 41 as well
        torch.testing.assert_close(steps[0], want[:, :, 40:41], atol=1e-5, rtol=1e-5)
        assert isinstance(drive.last[1], Parts) and not torch.allclose(steps[1], want[:, :, 41:], atol=1e-5)


@pytest.mark.parametrize(
    "h,g,cuts,size,local",
    [
        (3, 3, (150,), 40, 8),
        (6, 2, (32, 64, 96, 150), 40, 8),
        (4, 1, (45, 46, 101, 150), 40, 8),
        (8, 1, (7, 150), 40, 8),
        (4, 2, (45, 46, 101, 150), 48, 32),
        (4, 2, (150,), 48, 32),
    ],
)
def test_prefill_and_decode_are_one_softmax_over_moved_positions(h, g, cuts, size, local):
    """Also where local > chunk / 2, in any chunks, at the end of every one, and for decode steps over a boundary."""
    q, k, v = qkv(1, h, g, 164)
    want = naive(*(t.double() for t in (q, k, v)), Rotary(16), size, local, 0.25).float()[None]
    drive = Drive(f"qwen1m:chunk={size},local={local},block=16,sparse=false", backend="torch" if h == 6 else "reference")
    got = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip((0, *cuts), cuts, strict=False)]
    got += [drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(150, 164)]
    torch.testing.assert_close(torch.cat(got, 2), want, atol=2e-5, rtol=2e-5)


def test_rows_of_different_length_in_every_storage():
    q, k, v = qkv(2, 4, 2, 140)
    lens = (130, 50)
    valid = torch.zeros(2, 130, dtype=torch.bool)
    for b, n in enumerate(lens):
        valid[b, 130 - n :] = True
    for storage in ("dense", "paged"):
        recipe = replace(Recipe.of(DCA_TEXT), storage=storage)
        drive = Drive(recipe, backend="torch" if storage == "paged" else "reference")
        drive(*(t[:, :, :130] for t in (q, k, v)), valid=valid)
        steps = torch.cat([drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(130, 140)], 2)
        for b, n in enumerate(lens):
            one = [t[b : b + 1, :, 130 - n :].double() for t in (q, k, v)]
            want = naive(*one, Rotary(16), 40, 8, 0.25).float()[:, -10:]
            torch.testing.assert_close(steps[b], want, atol=2e-5, rtol=2e-5)


def test_pages_that_do_not_fit_a_chunk():
    q, k, v = qkv(1, 4, 2, 100)
    text = "qwen1m:chunk=30,local=6,block=8,sparse=false"  # L = 24, pages of 16
    one, two = Drive(replace(Recipe.of(text), storage="paged")), Drive(text)
    for a, b in [(0, 90), *((i, i + 1) for i in range(90, 100))]:
        got = [d(*(t[:, :, a:b] for t in (q, k, v))) for d in (one, two)]
        torch.testing.assert_close(*got, atol=1e-5, rtol=1e-5)


def test_decode_over_an_evicted_cache_uses_text_positions():
    """Entries of a compressed cache keep their chunk: the softmax over what is left, at re-assigned positions."""
    q, k, v = qkv(1, 4, 2, 121)
    drive = Drive(f"{DCA_TEXT}+cache=snapkv:window=16,capacity=48", backend="torch")
    drive(*(t[:, :, :120] for t in (q, k, v)))
    got = drive(*(t[:, :, 120:] for t in (q, k, v)))
    x = drive.last[0]
    assert x.kv.pos is not None and x.kv.capacity < 60
    s = logits(*(t.double() for t in (q[:, :, 120:], k)), Rotary(16), 40, 8, 0.25)
    for head in range(4):
        at = x.kv.positions()[0, head // 2]
        want = s[head, 0, at].softmax(-1) @ v[0, head // 2, at].double()
        torch.testing.assert_close(got[0, head, 0], want.float(), atol=2e-5, rtol=2e-5)


def test_positions_of_a_million_tokens():
    """fp64 angles here: the moved query itself loses nothing at large positions."""
    rope, base = Rotary(16), 1_000_000
    grid = Qwen1M().grid
    base = base // grid.length * grid.length
    q, k, _ = (t.double() for t in qkv(1, 1, 1, 8))
    pos = torch.arange(base, base + 8)[None]
    at = rope.rotate(q, grid.succ(pos))  # q as raw
    key = rope.rotate(k, pos - grid.length)
    low = rope.rotate(q, (pos % grid.length + grid.length).clamp(max=grid.size)) @ rope.rotate(k, pos % grid.length).mT
    torch.testing.assert_close(at @ key.mT, low, atol=1e-8, rtol=1e-8)


def test_temperature():
    """f = 1 up to `original`; beyond it logits gain f^2 of the row's own length, in prefill, chunks and decode alike."""
    q, k, v = qkv(1, 4, 2, 108)
    text = f"{DCA_TEXT},original=60"
    f = 1 + 0.1 * ((torch.arange(108) + 1) / 60).log().clamp(min=0).double()
    want = naive(*(t.double() for t in (q, k, v)), Rotary(16), 40, 8, 0.25, warm=f * f).float()[None]
    plain = naive(*(t.double() for t in (q, k, v)), Rotary(16), 40, 8, 0.25).float()[None]
    assert torch.equal(want[:, :, :60], plain[:, :, :60]) and not torch.allclose(
        want[:, :, 90:], plain[:, :, 90:], atol=1e-4
    )
    for cuts in ((100,), (64, 100)):
        drive = Drive(text)
        got = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip((0, *cuts), cuts, strict=False)]
        got += [drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(100, 108)]
        torch.testing.assert_close(torch.cat(got, 2), want, atol=2e-5, rtol=2e-5)
    short = Drive("qwen1m:chunk=200,local=8,block=16,sparse=false,original=60")  # one chunk, warm
    got = [short(*(t[:, :, :100] for t in (q, k, v))), short(*(t[:, :, 100:101] for t in (q, k, v)))]
    s = logits(q.double(), k.double(), Rotary(16), 200, 8, 0.25) * (f * f)[None, :, None]
    want = (s.softmax(-1) @ v[0].repeat_interleave(2, 0).double()).float()[None]
    torch.testing.assert_close(torch.cat(got, 2), want[:, :, :101], atol=2e-5, rtol=2e-5)


# ---------------------------------------------------------------------- selection
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("start", [0, 150])
def test_selection_is_the_card(case, start):
    x, (q, k, _, rope) = rotated_call(case, start)
    method = Qwen1M(**SMALL)
    plan = method.plan(x, State())
    got = masks(x, plan)
    for part in plan.parts:
        part.layout.validate()
    assert int(sum(m.int() for m in got).max()) == 1  # no pair twice
    assert torch.equal(sum(got) > 0, selected(method, q, k, rope, start, x.scale))
    length, rows = 96, torch.arange(start, 300)[:, None] // 96
    for name, mask, lag in zip(("intra", "succ", "inter"), got, (0, 1, 2), strict=True):
        apart = (rows - torch.arange(300) // length)[None].expand_as(mask)[mask]
        assert bool((apart == lag).all() if lag < 2 else (apart >= 2).all()), name


@pytest.mark.parametrize("case", CASES[1::4], ids=str)
def test_the_output_is_one_softmax_over_the_selected_pairs(case):
    x, (q, k, v, rope) = rotated_call(case)
    method = Qwen1M(**SMALL)
    mask = selected(method, q, k, rope, 0, x.scale)
    s = logits(q, k, rope, 112, 16, x.scale).masked_fill(~mask, float("-inf"))
    want = s.softmax(-1) @ v[0].repeat_interleave(q.shape[1] // v.shape[1], 0)
    got = attend(q, x.kv, method.plan(x, State()), scale=x.scale, backend="reference")
    torch.testing.assert_close(got[0], want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
@pytest.mark.parametrize("start", [0, 150])
def test_one_chunk_is_vertical_slash(case, start):
    """No longer than a chunk: distances as the card has them, of blocks that end where theirs end, not of a grid."""
    x, (q, k, _, rope) = rotated_call(case, start)
    method = Qwen1M(**SMALL | {"chunk": 336})  # L = 320
    layout = method.plan(x, State())
    assert isinstance(layout, Layout) and layout.tiles is None and layout.entries is None
    layout.validate()
    got, block = layout.to_mask(x.kv)[0], method.block
    for head, (columns, distances) in ((h, chosen(method, q, k, rope, start, x.scale)[0, h]) for h in range(q.shape[1])):
        reached = {d + 1 + r for d in distances for r in range(block)}  # from the end of a block to a key
        runs = sorted(y for y in reached if y - 1 not in reached)
        ends = [next(z for z in range(y, 999) if z not in reached) for y in runs]
        tiles = {z for y, end in zip(runs, ends, strict=True) for z in range(y, y + -(-(end - y) // block) * block)}
        for i in range(start, 300):
            away = (i // block + 1) * block
            assert set(got[head, i - start].nonzero()[:, 0].tolist()) == {
                j for j in range(i + 1) if j in columns or away - j in tiles
            }, (head, i)


def test_one_chunk_is_the_plan_of_minference():
    """Its fast path; and the published configuration has one chunk up to 253,952 tokens."""
    x, _ = rotated_call(CASES[4])
    same = dict(columns=20, diagonals=70, sink=5, last_q=16)
    want = parse("minference:" + ",".join(f"{a}={b}" for a, b in same.items()) + ",local=60").plan(x, State())
    for share in ("head", "group"):
        got = parse("qwen1m@1m").make("1m", threshold=0, near=60, share=share, **same).plan(x, State())
        assert got.diagonals.shape[1] == (x.groups if share == "group" else x.q.shape[1])
        if share == "head":
            for name in ("diagonals", "diagonal_count", "columns", "column_count"):
                assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert parse("qwen1m@1m").grid.length == 253952


def test_pieces_of_one_chunk_are_the_whole_prompt():
    """From the second chunk on: what is no longer than one has distances without a grid."""
    q, k, v, rope = CASES[1].make()
    text = "qwen1m:" + ",".join(f"{a}={b}" for a, b in SMALL.items())
    whole, drive = Drive(text, d=32), Drive(text, d=32)
    want = whole(q, k, v)
    got = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 192), (192, 288), (288, 300))]
    torch.testing.assert_close(torch.cat(got, 2), want, atol=1e-5, rtol=1e-5)


def test_full_budget_is_plain_dual_chunk_attention_with_recall_one():
    x, (q, k, v, rope) = rotated_call(CASES[4])
    dense = Qwen1M(**SMALL | {"sparse": False}).plan(x, State())
    want, full = attend(q, x.kv, dense, scale=x.scale, return_lse=True, backend="reference")
    for columns, diagonals in ((300, 0), (0, 300), (10, 30)):
        plan = Qwen1M(**SMALL | {"columns": columns, "diagonals": diagonals}).plan(x, State())
        got, lse = attend(q, x.kv, plan, scale=x.scale, return_lse=True, backend="reference")
        recall = (lse - full).exp()
        assert float(recall.max()) <= 1 + 1e-9
        if columns + diagonals >= 300:
            torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
        else:
            assert 0.1 < float(recall.mean()) < 0.999


def test_a_planted_column_is_kept_in_every_later_chunk():
    q, k, v, rope = Case("flat", 400).make()
    q, k, v = (t.double() for t in (q, k, v))
    raw = torch.zeros(32, dtype=torch.float64)
    raw[15] = 6.0  # the axis that turns slowest
    k[:, :, 37] = rope.rotate(raw.expand(1, 2, 1, 32), torch.tensor([[37]]))[:, :, 0]
    q[:] = q * 0.3 + rope.rotate(raw.expand(1, 4, 400, 32), torch.arange(400)[None])
    x = replace(call(q, k, v), rope=rope)
    plan = Qwen1M(**SMALL | {"columns": 6, "diagonals": 6}).plan(x, State())
    assert bool((sum(masks(x, plan)) > 0)[:, 38:, 37].all())


def test_share_group_serves_the_heads_together():
    x, (q, k, v, rope) = rotated_call(CASES[4])
    assert q.shape[1] > k.shape[1]
    plan = Qwen1M(**SMALL, share="group").plan(x, State())
    assert all(p.layout.tiles.shape[1] == k.shape[1] for p in plan.parts)
    r = q.shape[1] // k.shape[1]
    for mask in masks(x, plan):
        assert torch.equal(mask[::r].repeat_interleave(r, 0), mask)
    for part in plan.parts:
        part.layout.validate()


def test_thirty_columns_are_a_hundred_and_thirty():
    """The card: the base size 30 holds nothing but the sink, so the code adds 100."""
    x, _ = rotated_call(CASES[3])
    assert Qwen1M(columns=30)._sizes(x) == ((130,) * 4, (6096,) * 4)
    assert Qwen1M(columns=31, diagonals=0)._sizes(x) == ((31,) * 4, (100,) * 4)


def test_lists_in_pieces_are_the_same(monkeypatch):
    from foveate.scores import dual_chunk, rotation
    from foveate.scores.keys import pieces

    x, _ = rotated_call(CASES[5])
    want = masks(x, Qwen1M(**SMALL).plan(x, State()))
    for module in (dual_chunk, rotation):
        monkeypatch.setattr(module, "pieces", lambda total, cost, *_: pieces(total, cost, 100))
    for a, b in zip(masks(x, Qwen1M(**SMALL).plan(x, State())), want, strict=True):
        assert torch.equal(a, b)


def test_paged_prefill_is_dense_prefill():
    q, k, v, rope = CASES[0].make()
    text = "qwen1m:" + ",".join(f"{a}={b}" for a, b in SMALL.items())
    got = []
    for storage in ("dense", "paged"):
        drive = Drive(replace(Recipe.of(text), storage=storage), d=32)
        got.append(torch.cat([drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 130), (130, 299), (299, 300))], 2))
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- refinement
def test_refinement_meets_the_target_with_the_fewest_steps(tmp_path):
    method = Qwen1M(**SMALL | {"chunk": 64, "step": 24, "columns": 8, "diagonals": 6})
    calls = [replace(rotated_call(Case(n, 150))[0], layers=1) for n in ("smollm2-3",)]
    search = method.search(Target("recall", 0.9))
    for x in calls:
        search.see(x, x.q, None)
        saved = search.state()
        search = method.search(Target("recall", 0.9))
        search.resume(saved)
    search.end_pass()
    found, h = search.finish(), calls[0].q.shape[1]
    columns = found.tensors["columns"]
    assert columns.shape == (1, h) and len(columns.unique()) > 1 and bool(((columns - 8) % 24 == 0).all())
    assert torch.equal(columns - 8, found.tensors["diagonals"] - 6)
    assert float(found.tensors["recall"].min()) >= 0.9 and found.report["missed"] == 0

    def recall(m):
        total = torch.zeros(h, dtype=torch.float64)
        for x in calls:
            plans = [m.plan(x, State()), replace(m, sparse=False).plan(x, State())]
            lse = [attend(x.q, x.kv, p, scale=x.scale, return_lse=True, backend="reference")[1] for p in plans]
            total += (lse[0] - lse[1]).exp().mean((0, 2)) / len(calls)
        return total

    path = str(Profile("qwen1m", tensors=found.tensors).save(tmp_path / "p"))
    torch.testing.assert_close(recall(replace(method, profile=path)).float(), found.tensors["recall"][0])
    grown = columns[0] > 8
    less = {n: torch.where(grown, t - 24, t) for n, t in found.tensors.items() if n != "recall"}
    path = str(Profile("qwen1m", tensors=less).save(tmp_path / "q"))
    assert float(recall(replace(method, profile=path))[grown].max()) < 0.9  # one step less misses it
    with pytest.raises(ConfigError, match=rf"columns of shape \[3, {h}\], got \[1, {h}\]"):
        replace(method, profile=path).plan(replace(calls[0], layers=3), State())


def test_refinement_of_some_layers():
    """The first layer is not among them, as with --layers or with a window of the model's own there."""
    method = Qwen1M(**SMALL | {"chunk": 64, "step": 24, "columns": 8, "diagonals": 6})
    x = replace(rotated_call(Case("smollm2-3", 150))[0], layers=4)
    alone, some = method.search(Target("recall", 0.9)), method.search(Target("recall", 0.9))
    alone.see(replace(x, layer=0), x.q, None)
    want = alone.finish().tensors
    for layer in (1, 3, 1, 3):  # two prompts
        some.see(replace(x, layer=layer), x.q, None)
        again = method.search(Target("recall", 0.9))
        again.resume(some.state())
        some = again
    found = some.finish()
    for name in ("columns", "diagonals"):
        assert torch.equal(found.tensors[name][[1, 3]], want[name][[0, 0]])
        assert bool((found.tensors[name][[0, 2]] == getattr(method, name)).all())
    torch.testing.assert_close(found.tensors["recall"][[1, 3]], want["recall"][[0, 0]])
    assert found.report["recall"] <= 1 and int(want["columns"].max()) > 8


# ---------------------------------------------------------------------- input, gates, presets
@pytest.mark.parametrize(
    "options,words",
    [
        ({"chunk": 64, "local": 64, "block": 16}, "local expected below chunk = 64, got 64"),
        ({"chunk": 100, "local": 10}, "chunk - local expected a multiple of block = 64, got 90"),
        ({"sink": 0}, "sink"),
        ({"near": 0}, "near"),
        ({"original": 0}, "original"),
        ({"share": "vote"}, "share"),
        ({"columns": -1}, "columns"),
        ({"sparse": 1}, "sparse"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        Qwen1M(**options)


def test_needs_a_rotation_only_where_it_moves_something():
    x, _ = rotated_call(CASES[3])
    with pytest.raises(UnsupportedError, match="rotation"):
        Qwen1M(**SMALL).plan(replace(x, rope=None), State())
    assert Qwen1M(chunk=512, local=128, threshold=0, block=64).plan(replace(x, rope=None), State()) is not None
    with pytest.raises(ConfigError, match="recall="):
        Qwen1M().search(Target("density", 0.1))


def test_gates_and_presets():
    assert Qwen1M().min_length == 8193 and parse("qwen1m@8k").min_length == 2049 and parse("qwen1m@dca").min_length == 7041
    assert Qwen1M(original=4096).min_length == 4097  # beyond, the temperature is not 1
    assert parse("qwen1m@1m").grid.length % 64 == 0 and Qwen1M.extends
    dca = parse("qwen1m@dca")
    assert dca.chunk + dca.local < 8192 and dca.grid.length % dca.block == 0


def test_the_8k_preset_is_sparse_at_7000_tokens():
    from tests.prompts import prompt

    q, k, v = (t.float() for t in prompt("peaked", h=2, g=1, m=7000, d=16))
    got = parse("qwen1m@8k").plan(replace(call(q, k, v), rope=Rotary(16)), State())
    assert isinstance(got, Layout) and got.density() <= got.density_computed() <= 0.32


def test_dense_parts_are_tiles_for_gpu_kernels():
    """Whole chunks of 16,384 tokens: aligned tiles of 128 shared by all heads, kilobytes of indices."""
    x = call(torch.zeros(1, 2, 16384, 2), *(torch.zeros(1, 1, 16384, 2),) * 2)
    plan = parse("qwen1m@dca").plan(replace(x, rope=Rotary(2)), State())
    assert len(plan.parts) == 3 and all(p.layout.entries is None and p.layout.block_q == 128 for p in plan.parts)
    assert sum(p.layout.nbytes for p in plan.parts) < 200_000
    pairs = sum(int(p.layout.pairs(p.kv or x.kv)[0, 0]) for p in plan.parts)
    assert pairs == 16384 * 16385 // 2
    assert math.isclose(sum(p.layout.density(p.kv) for p in plan.parts[:2]), 0.85, abs_tol=0.15)
