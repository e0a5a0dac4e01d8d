"""SpargeAttn against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import State
from foveate.methods.search import Target
from foveate.methods.spargeattn import SpargeAttn
from foveate.profile import Profile
from foveate.registry import parse
from foveate.scores.similarity import key_similarity, self_similarity
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned
from tests.prompts import SHAPES, call, prompt

SMALL = "block_q=32,block_k=16"


def gram_similarity(x):
    """Mean of the cosine Gram matrix, all pairs formed; a zero vector has cosine 0 with all."""
    norm = (x * x).sum(-1).sqrt()
    below = norm[:, None] * norm[None, :]
    return float(torch.where(below > 0, (x @ x.T) / below.clamp(min=1e-300), 0.0).sum()) / len(x) ** 2


def transcribe(q, k, scale, *, bq, bk, cdf, theta, topk=None, start=0):
    """Key blocks of each query block of one head, {absolute row: set}; q are the rows from `start` on. Loops, fp64."""
    q, k = q.double(), k.double()
    m = start + len(q)
    k = k[:m]
    blocks = [k[j : j + bk] for j in range(0, m, bk)]
    centre = k.mean(0)
    alike = [gram_similarity(b - centre) for b in blocks]
    out, scores = {}, {}
    for i in range(start // bq, (m - 1) // bq + 1):
        rows = q[max(0, i * bq - start) : (i + 1) * bq - start]
        seen = [j for j in range(len(blocks)) if j * bk < (i + 1) * bq]
        must = {j for j in seen if j == 0 or (j + 1) * bk > i * bq}
        score = {j: scale * float(rows.mean(0) @ (blocks[j] - centre).mean(0)) for j in seen}
        trusted = [j for j in seen if alike[j] > theta]
        keep = must & set(trusted)
        order = sorted((j for j in trusted if j not in keep), key=lambda j: (-score[j], j))
        if topk is not None:
            keep |= set(order[: max(0, max(1, math.floor(topk * len(seen))) - len(keep))])
        elif trusted:
            top = max(score[j] for j in trusted)
            mass = {j: math.exp(score[j] - top) for j in trusted}
            whole = sum(mass.values())
            got = sum(mass[j] for j in keep)
            for j in order:
                if got >= cdf * whole and keep and cdf < 1:
                    break
                keep.add(j)
                got += mass[j]
        keep |= must | {j for j in seen if alike[j] <= theta}
        if gram_similarity(rows) <= theta:
            keep = set(seen)
        out[i], scores[i] = keep, score
    return out


def named(layout, head, start, bq, bk):
    out = {}
    at = head * layout.tiles.shape[1] // layout.shape[1]
    for blk in range(layout.num_blocks):
        starts = layout.tiles[0, at, blk, : int(layout.tile_count[0, at, blk])].tolist()
        assert starts == sorted(set(starts)) and all(s % bk == 0 for s in starts)
        out[start // bq + blk] = {s // bk for s in starts}
    return out


SETTINGS = [
    dict(cdf=0.98, theta=-0.1),
    dict(cdf=0.7, theta=-0.1),
    dict(cdf=0.7, theta=0.07),  # some of the key blocks are trusted in every case, some of the query blocks in some
    dict(cdf=0.6, theta=0.6),
    dict(cdf=0.98, theta=-0.1, topk=0.4),
    dict(cdf=0.98, theta=0.07, topk=0.4),
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, options):
    """Block by block, on the whole prompt and on chunks; the card with the diagonal and the first block counted first."""
    q, k, _, _ = case.make()
    text = f"spargeattn:{SMALL}," + ",".join(f"{a}={b}" for a, b in options.items())
    r = q.shape[1] // k.shape[1]
    layouts = [planned(text, case), *planned(text, case, chunks=(137,))]
    for layout, start, end in zip(layouts, (0, 0, 137), (300, 137, 300), strict=True):
        layout.validate()
        for h in (0, q.shape[1] - 1):
            want = transcribe(q[0, h, start:end], k[0, h // r], case.scale, bq=32, bk=16, start=start, **options)
            assert named(layout, h, start, 32, 16) == want


def test_the_gate_opens_and_shuts_in_these_cases():
    """The settings above compare something: the middle theta trusts some blocks of both sides and not others."""
    both = {"rows": set(), "keys": set()}
    for case in CASES:
        q, k, _, _ = case.make()
        both["rows"] |= set((self_similarity(q, 32) > 0.07).flatten().tolist())
        both["keys"] |= set((key_similarity(KV.dense(k, k), 300, 16) > 0.07).flatten().tolist())
    assert both == {"rows": {True, False}, "keys": {True, False}}


@pytest.mark.parametrize("offset", [0, 5])
def test_similarity_is_the_mean_of_the_gram_matrix(offset):
    x = torch.randn(1, 2, 45, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[0, 0, 20:30] = x[0, 0, 20].clone()
    x[0, 1, 3] = 0
    for centre in (False, True):
        got = self_similarity(x, 16, offset=offset, centre=centre)
        for h in range(2):
            rows = x[0, h] - (x[0, h].mean(0) if centre else 0)
            cut = [max(0, i * 16 - offset) for i in range(got.shape[-1] + 1)]
            want = [gram_similarity(rows[a:b]) for a, b in zip(cut, cut[1:], strict=False)]
            torch.testing.assert_close(got[0, h], torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 90])
def test_settings_that_are_dense(shape, start):
    q, k, v = prompt(shape, m=200)
    x = call(q, k, v, start)
    dense = Layout.dense(1, 4, 200 - start, 200).to_mask()
    for text in ("theta=1.1,cdf=0.0", "cdf=1.0,theta=-1", "topk=1.0,theta=-1"):
        assert torch.equal(parse(f"spargeattn:{SMALL},{text}").plan(x, State()).to_mask(), dense)
    assert SpargeAttn(block_q=256).plan(x, State()) is None


def test_no_block_is_trusted():
    """Keys unlike each other everywhere: all blocks are computed, and no NaN comes from a softmax over none."""
    q, k, v = prompt("random", m=200)
    layout = parse(f"spargeattn:{SMALL},theta=0.5,cdf=0.1").plan(call(q, k, v), State())
    assert torch.equal(layout.to_mask(), Layout.dense(1, 4, 200, 200).to_mask())


@pytest.mark.parametrize("text", ["cdf=0.7,theta=-1", "cdf=0.3,theta=0.3", "topk=0.3,theta=0.3"])
@pytest.mark.parametrize("shape", ["blocks", "peaked"])  # keys alike, and keys unlike but for the constant
def test_a_constant_added_to_the_keys_changes_nothing(text, shape):
    q, k, v = prompt(shape, m=200)
    method = parse(f"spargeattn:{SMALL},{text}")
    a, b = (method.plan(call(q, keys, v), State()).to_mask() for keys in (k, k + 3 * prompt("random", m=1, seed=9)[1]))
    assert torch.equal(a, b)


@pytest.mark.parametrize("start", [0, 90])
def test_every_row_has_its_own_token_and_the_first_block(start):
    q, k, v = prompt("peaked", m=200)
    mask = parse(f"spargeattn:{SMALL},cdf=0.0,theta=-1").plan(call(q, k, v, start), State()).to_mask()[0]
    for i in range(200 - start):
        t = start + i
        assert mask[:, i, : min(16, t + 1)].all() and mask[:, i, t // 32 * 32 : t + 1].all()


def test_rows_of_every_age_keep_the_same_fraction():
    """The published topk counts by the whole row: a row with half of the blocks would keep all of them."""
    q, k, v = prompt("random", m=640)
    layout = parse("spargeattn:block_q=16,block_k=16,topk=0.5,theta=-1").plan(call(q, k, v), State())
    assert layout.tile_count[0, 0].tolist() == [max(min(2, i + 1), (i + 1) // 2) for i in range(40)]


def test_no_leak_at_the_last_token_of_a_block():
    """With the plan frozen, the last row of a block (and every other) does not see later keys of its diagonal block."""
    q, k, v = (t.float() for t in prompt("peaked", m=200))
    method = parse(f"spargeattn:{SMALL},cdf=0.5,theta=-1")
    plan = method.plan(call(q, k, v), State())
    from foveate import attend

    before = attend(q, (k, v), plan)
    for t in (31, 47, 63, 64, 130):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t + 1 :] += 5
        v2[:, :, t + 1 :] -= 5
        assert torch.equal(attend(q, (k2, v2), plan)[:, :, : t + 1], before[:, :, : t + 1])
    torch.testing.assert_close(before, oracle(q, (k, v), plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (8, 1), (6, 2)])
def test_heads_of_a_group_unite(h, g):
    q, k, v = prompt("peaked", h=h, g=g, m=150)
    x = call(q, k, v)
    each, both = (parse(f"spargeattn:{SMALL},cdf=0.6,theta=-1,share={s}").plan(x, State()) for s in ("head", "group"))
    assert both.tiles.shape[1] == g
    want = each.to_mask().unflatten(1, (g, -1)).any(2).repeat_interleave(h // g, 1)
    assert torch.equal(both.to_mask(), want)
    if h == 8:
        assert each.pairs().sum() < both.pairs().sum()


def test_work_in_pieces_is_the_same(monkeypatch):
    from foveate.methods import spargeattn
    from foveate.scores import similarity
    from foveate.scores.keys import pieces

    q, k, v = prompt("random", m=200)
    method = parse(f"spargeattn:{SMALL},cdf=0.6,theta=0.06")
    whole = method.plan(call(q, k, v), State()).to_mask()
    for module in (spargeattn, similarity):
        monkeypatch.setattr(module, "pieces", lambda total, cost: pieces(total, cost, 1))
    assert torch.equal(method.plan(call(q, k, v), State()).to_mask(), whole)


def test_pages_that_are_not_filled_yet():
    q, k, v = prompt("random", m=150)
    flat = [torch.full((2 * 160, 32), float("nan"), dtype=torch.float64) for _ in range(2)]
    for g in range(2):
        flat[0][g * 160 : g * 160 + 150], flat[1][g * 160 : g * 160 + 150] = k[0, g], v[0, g]
    kv = KV.paged(
        *(t.view(40, 8, 32) for t in flat), torch.arange(40).view(1, 2, 20).int(), torch.tensor([[150, 150]]).int()
    )
    method = parse(f"spargeattn:{SMALL},cdf=0.6,theta=0.06")
    got = method.plan(call(q, k, v, kv=kv), State()).to_mask(kv)
    assert torch.equal(got[..., :150], method.plan(call(q, k, v), State()).to_mask()) and not got[..., 150:].any()


def test_csr_round_trip():
    q, k, v = prompt("blocks", m=200)
    layout = parse(f"spargeattn:{SMALL},cdf=0.6,theta=-1").plan(call(q, k, v), State())
    back = Layout.from_csr(*layout.to_csr(), layout.shape, block_q=32, block_k=16)
    assert torch.equal(back.to_mask(), layout.to_mask())


def test_low_precision_and_extreme_input():
    q, k, v = prompt("peaked", m=200)
    method = parse(f"spargeattn:{SMALL},cdf=0.6,theta=0.06")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        method.plan(call(*(t.to(dtype) for t in (q, k, v))), State()).validate()
    for scale in (0.0, 1e-30, 1e3):
        got = method.plan(call(*(t * scale for t in (q, k, v))), State())
        assert got.to_mask()[0].diagonal(dim1=-2, dim2=-1).all()


# ---------------------------------------------------------------------- profiles and the search
def saved(path, cdf, theta, method="spargeattn"):
    return str(Profile(method, tensors={"cdf": torch.tensor(cdf), "theta": torch.tensor(theta)}).save(path))


def test_a_profile_gives_each_head_its_thresholds(tmp_path):
    q, k, v = prompt("peaked", m=200)
    x = call(q, k, v, layer=1, layers=2)
    theta = [-0.1, 0.06, -0.1, 0.06]
    path = saved(tmp_path / "p", [[0.5] * 4, [1.0, 0.9, 0.3, 0.6]], [[0.0] * 4, theta])
    got = SpargeAttn(block_q=32, block_k=16, profile=path).plan(x, State())
    for h, cdf in enumerate((1.0, 0.9, 0.3, 0.6)):
        one = SpargeAttn(block_q=32, block_k=16, cdf=cdf, theta=theta[h]).plan(x, State())
        assert torch.equal(got.to_mask()[:, h], one.to_mask()[:, h])


def test_profiles_that_do_not_fit(tmp_path):
    x = call(*prompt("random", m=200), layers=2)
    wrong = saved(tmp_path / "wrong", [[0.5] * 4], [[0.0] * 4])
    with pytest.raises(ConfigError, match=r"cdf \[layers, heads\] = \[2, 4\].*got \[1, 4\]"):
        SpargeAttn(block_q=32, profile=wrong).plan(x, State())
    blocks = Profile("spargeattn", {"block_k": 32}, {n: torch.zeros(2, 4) for n in ("cdf", "theta")}).save(tmp_path / "b")
    with pytest.raises(ConfigError, match="made with block_k=32, but block_k is 64"):
        SpargeAttn(block_q=32, profile=str(blocks)).plan(x, State())
    other = saved(tmp_path / "other", [[0.5] * 4] * 2, [[0.0] * 4] * 2, "quest")
    with pytest.raises(ConfigError, match="made for quest"):
        SpargeAttn(block_q=32, profile=other).plan(x, State())
    with pytest.raises(ConfigError, match="topk"):
        SpargeAttn(topk=0.5, profile=other)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """The search attends hundreds of small layouts: on the backend that compiles nothing."""
    from foveate import attend
    from foveate.methods import spargeattn_search

    monkeypatch.setattr(spargeattn_search, "attend", lambda *a, **options: attend(*a, backend="torch", **options))


def searched(error, prompts=(0, 1)):
    search = parse("spargeattn:block_q=16,block_k=16").search(Target("loss", error))
    for seed in prompts:
        x = call(*(t.float() for t in prompt("peaked", m=90, seed=seed)))
        search.see(x, oracle(x.q, x.kv), None)
    search.end_pass()
    return search


def test_the_search_finds_the_least_cdf_within_the_error():
    """Bisection: the cdf of each head keeps the error below the bound, and 1 / 1024 less does not."""
    q, k, v, _ = CASES[-1].make()
    x = call(q, k, v)
    want = oracle(q, (k, v))
    search = parse("spargeattn:block_q=16,block_k=16").search(Target("loss", 0.1))
    theta = torch.full((6,), -0.1, dtype=torch.float64)
    cdf = search._least(x, want, theta)
    assert ((cdf > 0.3) & (cdf < 1)).all() and len(set(cdf.tolist())) > 3
    for less, fits in ((0.0, True), (1 / 1024, False)):
        out = oracle(q, (k, v), search.method.planned(x, cdf[:, None, None] - less, theta[:, None, None]))
        error = (out - want).abs().sum((0, 2, 3)) / want.abs().sum((0, 2, 3))
        assert ((error < 0.1) == fits).all()


def test_the_bin_that_skips_most_wins():
    """Of the candidates of two prompts: sums decide the bin, maxima the thresholds, and a bound what is dense."""
    search = parse("spargeattn").search(Target("loss", 0.1))
    search.layers, search.prompts = 2, {0: 2}
    search.skipped[0] = torch.zeros(2, 10, dtype=torch.float64)
    search.best[0] = torch.full((2, 2, 10), float("-inf"), dtype=torch.float64)
    search.skipped[0][0, [1, 4]] = torch.tensor([1.2, 1.3], dtype=torch.float64)
    search.best[0][0, 0, [1, 4]] = torch.tensor([0.95, 0.9], dtype=torch.float64)
    search.best[0][1, 0, [1, 4]] = torch.tensor([0.0625, 0.4375], dtype=torch.float64)
    search.skipped[0][1, 3] = 0.39  # of four candidates, a little less than a tenth each
    search.best[0][:, 1, 3] = 0.3
    found = search.finish()
    assert found.tensors["cdf"].tolist() == [[0.9, 1.0], [1.0, 1.0]]  # a layer that was not shown is dense
    assert found.tensors["theta"][0, 0] == 0.4375 and found.report["dense heads"] == 3
    assert found.options == {"block_q": 128, "block_k": 64}


def test_a_strict_bound_leaves_heads_dense():
    found = searched(1e-6).finish()
    assert found.tensors["cdf"].tolist() == [[1.0] * 4] and found.report["dense heads"] == 4


def test_the_search_resumes_and_its_profile_is_read(tmp_path):
    whole = searched(0.2).finish()
    first = searched(0.2, prompts=(0,))
    second = parse("spargeattn:block_q=16,block_k=16").search(Target("loss", 0.2))
    second.resume(first.state())
    x = call(*(t.float() for t in prompt("peaked", m=90, seed=1)))
    second.see(x, oracle(x.q, x.kv), None)
    found = second.finish()
    assert found.report == whole.report
    for name, t in whole.tensors.items():
        assert torch.equal(found.tensors[name], t)
    path = str(Profile("spargeattn", tensors=whole.tensors).save(tmp_path / "p"))
    drive = Drive(f"spargeattn:block_q=16,block_k=16,profile={path}", d=32, layers=1, layer=0)
    drive(*qkv(1, 4, 2, 150, d=32))
    assert drive.last[1].tiles.shape[1] == 4


def test_other_targets_go_to_the_generic_search():
    assert SpargeAttn().search(Target("recall", 0.9)) is None and SpargeAttn().knob.name == "cdf"


def test_presets_and_bad_options():
    assert (SpargeAttn().cdf, SpargeAttn().theta, SpargeAttn().topk) == (0.98, 0.6, None)
    assert (SpargeAttn().block_q, SpargeAttn().block_k) == (128, 64)
    top = parse("spargeattn@topk")
    assert (top.topk, top.theta) == (0.5, -0.1)
    assert parse("spargeattn@8k").theta < 0
    for text in ("cdf=1.5", "topk=-1", "block_q=4", "block_k=8", "share=row", "theta=high"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            parse(f"spargeattn:{text}")
