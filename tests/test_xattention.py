"""XAttention against a slow transcription of its card, and its search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.methods.search import Target
from foveate.methods.xattention import XAttention
from foveate.profile import Profile
from foveate.registry import parse
from foveate.scores.antidiagonal import block_mass
from tests.drive import oracle
from tests.fidelity import CASES, planned
from tests.prompts import SHAPES, call, prompt

SMALL = dict(block=16, stride=4)


def squares(q, k, stride, start, scale):
    """X of one head: X[a, c], the mean over the stride pairs of the antidiagonal of square (a, c); absent pairs are 0."""
    m = k.shape[0]
    logits = torch.zeros(*[-(-m // stride) * stride] * 2, dtype=torch.float64)
    logits[start:m, :m] = scale * q.double() @ k.double().T
    x = sum(logits[stride - 1 - t :: stride, t::stride] for t in range(stride)) / stride
    return x.masked_fill(torch.ones_like(x).triu(1).bool(), -math.inf)


def masses(q, k, stride, block, start, scale):
    """A of one head `[blocks, blocks]`, all rows of the grid up to the last key; those without queries are 0."""
    p = squares(q, k, stride, start, scale).softmax(-1)
    m, per = k.shape[0], block // stride
    out = torch.zeros(-(-m // block), -(-m // block), dtype=torch.float64)
    for i in range(len(out)):
        rows = [a for a in range(i * per, min(len(p), (i + 1) * per)) if (a + 1) * stride > start]
        for j in range(i + 1):
            out[i, j] = p[rows, j * per : (j + 1) * per].sum()
    return out


def smallest(row, i, tau):
    """Blocks of query block i: 0 and i first, then the best until the mass before one reaches tau of the row."""
    keep = sorted({0, i})
    total, held = float(row[: i + 1].sum()), float(row[keep].sum())
    for j in sorted(set(range(i + 1)) - {0, i}, key=lambda j: (-float(row[j]), j)):
        if held >= tau * total and tau < 1:
            break
        keep.append(j)
        held += float(row[j])
    return set(keep)


def transcribe(q, k, method, start, scale):
    """Per query block of the call, the set of key blocks of one head."""
    a = masses(q, k, method.stride, method.block, start, scale)
    return [smallest(a[i], i, method.threshold) for i in range(start // method.block, len(a))]


def named(layout, head, block):
    """The same, out of a layout."""
    h = head * layout.tiles.shape[1] // layout.shape[1]
    rows = zip(layout.tiles[0, h].tolist(), layout.tile_count[0, h].tolist(), strict=True)
    return [{start // block for start in row[:count]} for row, count in rows]


def collect(q, k, stride, block, start=0, scale=None, **kw):
    """All pieces of the estimate put together: `[H, nq, nk]`."""
    h, g = q.shape[1], k.shape[1]
    nk = -(-k.shape[2] // block)
    out = torch.zeros(g, h // g, nk - start // block, nk, dtype=torch.float64)
    scale = scale or 1 / math.sqrt(q.shape[-1])
    for g0, g1, lo, hi, mass in block_mass(q, KV.dense(k, k), stride, block, start=start, scale=scale, **kw):
        out[g0:g1, :, lo:hi, : mass.shape[-1]] = mass[0].double()
    return out.flatten(0, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stride,tau", [(8, 0.7)])
def test_selection_is_the_card(case, stride, tau):
    q, k, _, _ = case.make()
    method = XAttention(block=32, stride=stride, threshold=tau)
    layout = planned(f"prefill={method.describe()}", case)
    layout.validate()
    assert (layout.block_q, layout.tile_width, layout.q_offset) == (32, 32, 0)
    r, dropped = q.shape[1] // k.shape[1], 0
    for h in range(q.shape[1]):
        want = transcribe(q[0, h], k[0, h // r], method, 0, case.scale)
        assert named(layout, h, 32) == want
        dropped += sum(i + 1 - len(row) for i, row in enumerate(want))
    assert dropped > 0


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1)])
@pytest.mark.parametrize("m,start", [(133, 64), (101, 97), (110, 33)])
def test_groups_chunks_and_partial_blocks(h, g, m, start):
    q, k, v = prompt("blocks", h=h, g=g, m=m)
    method = XAttention(**SMALL, threshold=0.6)
    x = call(q, k, v, start)
    got = method.plan(x, State())
    got.validate()
    assert got.q_offset == start % 16 and got.shape[2:] == (m - start, m)
    for head in range(h):
        assert named(got, head, 16) == transcribe(q[0, head, start:], k[0, head * g // h], method, start, x.scale)


@pytest.mark.parametrize("chunks", [(64, 160, 256), (32, 288)])
@pytest.mark.parametrize("shape", ["peaked", "blocks"])
def test_chunks_that_end_with_blocks_choose_what_the_whole_prompt_does(shape, chunks):
    """The published fallback masks every column of the later chunks of queries."""
    q, k, v = prompt(shape, m=300)
    method = XAttention(block=32, stride=8, threshold=0.7)
    whole = method.plan(call(q, k, v), State())
    cuts = (*chunks, 300)
    for a, b in zip(cuts, cuts[1:], strict=False):
        part = method.plan(call(q[:, :, :b], k[:, :, :b], v[:, :, :b], a), State())
        for h in range(4):
            assert named(part, h, 32) == named(whole, h, 32)[a // 32 : -(-b // 32)]


@pytest.mark.parametrize("stride", [2, 4, 16])
@pytest.mark.parametrize("m,start", [(75, 0), (83, 37)])
def test_estimate_is_the_antidiagonal_sum(stride, m, start):
    q, k, _ = prompt("peaked", m=m)
    got = collect(q[:, :, start:], k, stride, 16, start)
    for h in range(4):
        want = masses(q[0, h, start:], k[0, h // 2], stride, 16, start, 1 / math.sqrt(32))
        torch.testing.assert_close(got[h], want[start // 16 :], atol=1e-10, rtol=1e-8)


def test_stride_one_is_the_exact_mass():
    q, k, _ = prompt("diagonal", m=90)
    got = collect(q, k, 1, 16)
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32))[0]
    p = s.masked_fill(torch.ones(90, 90).triu(1).bool(), -math.inf).softmax(-1)
    p = torch.nn.functional.pad(p, (0, 6, 0, 6)).unflatten(2, (6, 16)).unflatten(1, (6, 16)).sum((2, 4))
    torch.testing.assert_close(got, p)


def test_softcap_reaches_the_estimate():
    q, k, _ = prompt("peaked", m=64)
    got = collect(q * 3, k, 1, 16, softcap=5.0)
    s = 5 * torch.tanh(3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32) / 5)[0]
    p = s.masked_fill(torch.ones(64, 64).triu(1).bool(), -math.inf).softmax(-1)
    torch.testing.assert_close(got, p.unflatten(2, (4, 16)).unflatten(1, (4, 16)).sum((2, 4)))


@pytest.mark.parametrize("shape", SHAPES)
def test_threshold_one_is_dense(shape):
    q, k, v = prompt(shape, m=150)
    got = XAttention(**SMALL, threshold=1.0).plan(call(q, k, v), State())
    assert torch.equal(got.to_mask(), Layout.dense(1, 4, 150, 150).to_mask())
    assert XAttention().plan(call(q, k, v), State()) is None and XAttention().min_length == 257


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [0.3, 0.8])
def test_kept_mass_reaches_the_threshold_and_no_block_is_spare(shape, tau):
    q, k, v = prompt(shape, m=200)
    estimate = collect(q, k, 4, 16)
    got = XAttention(**SMALL, threshold=tau).plan(call(q, k, v), State())
    for h in range(4):
        for i, keep in enumerate(named(got, h, 16)):
            row = estimate[h, i]
            held, free = row[sorted(keep)].sum(), keep - {0, i}
            assert {0, i} <= keep <= set(range(i + 1)) and held >= (tau - 1e-9) * row.sum()
            assert not free or held - row[sorted(free)].min() < tau * row.sum()


@pytest.mark.parametrize("at", range(41, 45))
def test_a_column_is_seen_at_any_place(at):
    """A key that every query looks at: one of the four pairs of each antidiagonal holds it."""
    q, k, v = (0.1 * t for t in prompt("random", m=160))
    q[..., 0], k[:, :, at, 0] = 4.0, 24.0
    got = XAttention(**SMALL, threshold=0.5).plan(call(q, k, v), State())
    for h in range(4):
        assert all(at // 16 in row for row in named(got, h, 16)[at // 16 + 1 :])


def lines(far, wide):
    """q, k of four heads: query i carries the codes of the keys far, ..., far + wide - 1 before it."""
    gen = torch.Generator().manual_seed(far)
    k = torch.randn(1, 1, 160, 64, generator=gen, dtype=torch.float64)
    q = 6 * sum(torch.roll(k, far + i, 2) for i in range(wide)) / wide
    return q.expand(1, 4, -1, -1).clone(), k


@pytest.mark.parametrize("far", [17, 24, 33, 50, 63, 64, 91])
def test_a_line_of_two_distances_is_seen_at_any_distance(far):
    q, k = lines(far, 2)
    got = XAttention(**SMALL, threshold=0.9).plan(call(q, k, k), State())
    rows = torch.arange(far + 1, 160)
    assert got.to_mask()[0][:, rows, rows - far].float().mean() > 0.95


@pytest.mark.parametrize("stride,distances", [(4, (33, 91)), (5, (24, 33, 64))])
def test_a_line_of_one_distance_is_seen_where_it_meets_the_antidiagonals(stride, distances):
    """row + key = stride - 1 and row - key = distance, modulo stride: no solution where stride and distance are even.

    A block of which the line crosses no more than a corner may be left out.
    """
    for far in distances:
        q, k = lines(far, 1)
        mask = XAttention(block=4 * stride, stride=stride, threshold=0.9).plan(call(q, k, k), State()).to_mask()[0, 0]
        rows = torch.arange(far, 160)
        assert mask[rows, rows - far].float().mean() > 0.85 and mask.sum() < 0.7 * 160 * 161 / 2
    if stride == 4:  # the limit is real: this line's logits reach no score
        q, k = lines(64, 1)
        with_line = squares(q[0, 0], k[0, 0], 4, 0, 1.0)
        rows = torch.arange(64, 160)
        logits = (q @ k.transpose(-1, -2))[0, 0]
        logits[rows, rows - 64] = 0
        x = sum(logits[3 - t :: 4, t::4] for t in range(4)) / 4
        assert torch.allclose(x.tril(), with_line.masked_fill(with_line == -math.inf, 0))


def test_forced_blocks_alone_at_threshold_zero():
    q, k, v = prompt("random", m=200)
    for start in (0, 90):
        got = XAttention(**SMALL, threshold=0.0).plan(call(q, k, v, start), State())
        assert named(got, 3, 16) == [{0, i} for i in range(start // 16, 13)]


def test_share_group_is_the_union():
    q, k, v = prompt("peaked", h=6, g=2, m=200)
    each = XAttention(**SMALL, threshold=0.6).plan(call(q, k, v), State())
    got = XAttention(**SMALL, threshold=0.6, share="group").plan(call(q, k, v), State())
    got.validate()
    assert got.tiles.shape[1] == 2
    for g in range(2):
        lists = [named(each, h, 16) for h in range(3 * g, 3 * g + 3)]
        assert named(got, 3 * g, 16) == [set.union(*rows) for rows in zip(*lists, strict=True)]


def test_work_in_pieces_is_the_same(monkeypatch):
    from foveate.methods import xattention

    q, k, v = prompt("blocks", m=200)
    method = XAttention(**SMALL, threshold=0.6)
    whole = method.plan(call(q, k, v, 19), State())
    monkeypatch.setattr(xattention, "WHOLE", 1)
    monkeypatch.setattr("foveate.scores.antidiagonal.BUDGET", 3000)
    cut = method.plan(call(q, k, v, 19), State())
    cut.validate()
    assert torch.equal(cut.to_mask(), whole.to_mask()) and cut.tiles.shape[-1] < whole.tiles.shape[-1]


def test_rows_of_a_batch_pages_and_low_precision():
    both = [torch.cat(t) for t in zip(prompt("peaked", m=200, seed=1), prompt("random", m=200, seed=2))]
    method = XAttention(**SMALL, threshold=0.6)
    got = method.plan(call(*both), State()).to_mask()
    for b in range(2):
        assert torch.equal(got[b : b + 1], method.plan(call(*(t[b : b + 1] for t in both)), State()).to_mask())
    q, k, v = prompt("random", m=150)
    flat = [torch.full((2 * 160, 32), float("nan"), dtype=torch.float64) for _ in range(2)]
    for g in range(2):
        flat[0][g * 160 : g * 160 + 150], flat[1][g * 160 : g * 160 + 150] = k[0, g], v[0, g]
    pools = [t.view(40, 8, 32) for t in flat]
    kv = KV.paged(*pools, torch.arange(40).view(1, 2, 20).int(), torch.tensor([[150, 150]], dtype=torch.int32))
    paged = method.plan(call(q, k, v, kv=kv), State()).to_mask(kv)
    assert torch.equal(paged[..., :150], method.plan(call(q, k, v), State()).to_mask()) and not paged[..., 150:].any()
    for dtype in (torch.float16, torch.bfloat16):
        for size in (0.0, 1.0, 30.0):
            part = method.plan(call(*(t.to(dtype) * size for t in (q, k, v))), State())
            part.validate()
            assert part.to_mask()[0].diagonal(dim1=-2, dim2=-1).all()


def test_output_is_attention_over_the_blocks():
    q, k, v = prompt("peaked", m=180)
    layout = XAttention(**SMALL, threshold=0.5).plan(call(q, k, v), State())
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32)).masked_fill(~layout.to_mask(), -math.inf)
    torch.testing.assert_close(oracle(q, (k, v), layout), (s.softmax(-1) @ v.repeat_interleave(2, 1)).float())


def test_presets_and_bad_options():
    small = parse("xattention@8k")
    assert (small.stride, small.threshold, small.block) == (8, 0.9, 64)
    assert (XAttention().stride, XAttention().threshold, XAttention().block) == (16, 0.9, 128)
    for text in ("threshold=1.5", "threshold=-0.1", "stride=0", "block=4", "share=row", "stride=24", "profile=3"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            parse(f"xattention:{text}")
    with pytest.raises(ConfigError, match="expected a divisor of block=128, got 24"):
        parse("xattention:stride=24")


# ---------------------------------------------------------------------- thresholds per head
def mixed(m=200, seed=0):
    """Two heads with peaks and two without."""
    q, k, v = prompt("peaked", m=m, seed=seed)
    q[:, ::2] *= 0.05
    return q, k, v


def search(target, prompts=2, layers=2):
    found = XAttention(**SMALL).search(Target.parse(target))
    for seed in range(prompts):
        for layer in range(layers):
            q, k, v = mixed(seed=seed)
            found.see(call(q * (1 + layer), k, v, layer=layer, layers=layers), q, None)
    found.end_pass()
    return found


@pytest.fixture(scope="module")
def searched():
    return search("recall=0.9")


def kept(method, x):
    """(share of the true mass, share of the causal pairs) of each head."""
    mask = method.plan(x, State()).to_mask()[0]
    n = mask.shape[-1]
    s = (x.q @ x.kv.k.repeat_interleave(2, 1).transpose(-1, -2) * x.scale)[0]
    p = s.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)
    return (p * mask).sum((-1, -2)) / n, mask.sum((-1, -2)) / (n * (n + 1) / 2)


def test_search_counts_mass_and_pairs(searched):
    """Its tables are what the layouts of these thresholds keep."""
    for step in (2, 9):
        got = torch.zeros(2, 2, 4, dtype=torch.float64)
        for seed in range(2):
            for layer in range(2):
                q, k, v = mixed(seed=seed)
                x = call(q * (1 + layer), k, v, layer=layer, layers=2)
                got[:, layer] += torch.stack(kept(XAttention(**SMALL, threshold=0.9**step), x)) / 2
        torch.testing.assert_close(searched.sums[..., step] / 2, got, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["recall=0.9", "recall=0.6", "density=0.5", "density=0.3"])
def test_search_meets_its_target(searched, target):
    searched.target = Target.parse(target)
    found = searched.finish()
    mass, density = searched.sums[0].flatten(0, 1) / 2, searched.sums[1].flatten(0, 1) / 2
    steps = (found.tensors["threshold"].flatten().double().log() / math.log(0.9)).round().long()[:, None]
    assert found.report["recall"] == pytest.approx(mass.gather(1, steps).mean().item())
    assert found.report["density"] == pytest.approx(density.gather(1, steps).mean().item())
    assert found.report["steps"] == int(steps.sum()) and len(set(steps.flatten().tolist())) > 1
    kind, value = target.split("=")
    assert found.report[kind] >= float(value) if kind == "recall" else found.report[kind] <= float(value)


def test_search_allocates_best_of_all():
    """On small tables, what the dynamic programming keeps is the maximum over all allocations of that many steps."""
    import itertools

    from foveate.methods import xattention_search as module

    gen = torch.Generator().manual_seed(0)
    mass = torch.rand(3, module.STEPS + 1, generator=gen, dtype=torch.float64).sort(-1, descending=True).values
    steps = module.Steps(XAttention(), Target("recall", 0.7))
    got, report = steps._allocate(mass, mass)
    every = {
        c: sum(mass[h, s].item() for h, s in enumerate(c)) for c in itertools.product(range(module.STEPS + 1), repeat=3)
    }
    most = max(sum(c) for c, kept in every.items() if kept / 3 >= 0.7)
    assert int(got.sum()) == report["steps"] == most
    assert report["recall"] * 3 == pytest.approx(max(kept for c, kept in every.items() if sum(c) == most))


def test_search_resumes_and_needs_prompts(searched):
    again = XAttention(**SMALL).search(Target("recall", 0.9))
    with pytest.raises(ConfigError, match="got none"):
        again.finish()
    searched.target = Target("recall", 0.9)
    again.resume(searched.state())
    assert torch.equal(again.finish().tensors["threshold"], searched.finish().tensors["threshold"])
    assert XAttention().search(Target("loss", 0.1)) is None and XAttention.knob.name == "threshold"


def test_profile_gives_each_head_its_threshold(searched, tmp_path):
    searched.target = Target("density", 0.5)
    found = searched.finish()
    path = str(Profile("xattention", found.options, found.tensors).save(tmp_path / "p"))
    method = parse(f"xattention:block=16,stride=4,profile={path}")
    q, k, v = mixed(seed=5)
    for layer in range(2):
        state = State()
        for _ in range(2):
            got = method.plan(call(q, k, v, layer=layer, layers=2), state)
        for h in range(4):
            one = replace(XAttention(**SMALL), threshold=float(found.tensors["threshold"][layer, h]))
            assert named(got, h, 16) == named(one.plan(call(q, k, v), State()), h, 16)
    with pytest.raises(ConfigError, match="stride=4, but stride is 8"):
        parse(f"xattention:block=16,stride=8,profile={path}")
    with pytest.raises(ConfigError, match=r"expected threshold \[layers, heads\] = \[3, 4\], got \[2, 4\]"):
        method.plan(call(q, k, v, layers=3), State())
    Profile("xattention", found.options, {}).save(tmp_path / "empty")
    with pytest.raises(ConfigError, match="expected a tensor threshold"):
        parse(f"xattention:block=16,stride=4,profile={tmp_path / 'empty'}")
