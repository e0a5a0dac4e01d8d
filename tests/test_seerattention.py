"""SeerAttention against a slow transcription of its card, and the distillation of its gates."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import chain

import pytest
import torch

from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.search import Target
from foveate.methods.seerattention import SeerAttention
from foveate.methods.seerattention_search import GRID, _targets, distil
from foveate.profile import Profile, load
from foveate.registry import parse
from foveate.scores.gates import Gate, block_map, key_features, query_means
from foveate.scores.keys import pieces
from tests.drive import Drive, Rotary, qkv
from tests.fidelity import CASES, planned
from tests.profiles import folder, gates, seer_profile


def call(q, k, v, rope, start=0, layer=2, **extra):
    n = q.shape[2]
    pos = torch.arange(start, start + n)[None]
    return AttnInput(q, KV.dense(k, v), "prefill", layer, 4, 1 / math.sqrt(q.shape[3]), start, q_pos=pos, rope=rope, **extra)


def slow_gate(q, k, rope, wk, wq, block):
    """The card's steps 1 to 4, block by block: probabilities as nested lists of tensors, `[H][n]` of `[i + 1]`."""
    h, n, d = q.shape[1:]
    pos = torch.arange(n)[None]
    q, k = rope.unrotate(q, pos), rope.unrotate(k, pos)
    r, count, out = h // k.shape[1], -(-n // block), []

    def placed(x, i):
        return rope.rotate(x[None, None, None], torch.tensor([[i * block]]))[0, 0, 0]

    for head in range(h):
        w, asks, answers = wk[head * wk.shape[0] // h], [], []
        for i in range(count):
            rows = slice(i * block, min(n, (i + 1) * block))
            mean, keys = q[0, head, rows].mean(0), k[0, head // r, rows]
            asks.append(placed(mean if wq is None else mean @ wq[head * wq.shape[0] // h], i))
            answers.append(placed(torch.cat([keys.max(0).values, keys.min(0).values, keys.mean(0)]) @ w, i))
        out.append([(torch.stack(answers[: i + 1]) @ asks[i] / math.sqrt(d)).softmax(0) for i in range(count)])
    return out


@cache
def slow_case(case, path):
    q, k, _, rope = case.make()
    weights = load(path).tensors
    return slow_gate(q, k, rope, weights["layer.2.k"], weights.get("layer.2.q"), 16)


def slow_choice(prob, i, count, threshold, keep, last_dense):
    """Step 5 for one row, with the first and the diagonal block forced: a set of blocks."""
    if last_dense and i >= count - 2:
        return set(range(i + 1))
    must = {0, i}
    if keep is None:
        return must | {j for j in range(i + 1) if prob[j] >= threshold}
    order = [j for j in prob.argsort(descending=True, stable=True).tolist() if j not in must]
    return must | set(order[: max(0, keep - len(must))])


def listed(layout):
    """`[Hl][nq]` sets of block numbers."""
    tiles, count, width = layout.tiles[0], layout.tile_count[0], layout.tile_width
    return [
        [set((row[:c] // width).tolist()) for row, c in zip(a, b, strict=True)] for a, b in zip(tiles, count, strict=True)
    ]


OPTIONS = {
    "threshold": ("threshold=0.12,last_block_dense=false", 0.12, None, False),
    "dense end": ("threshold=0.12", 0.12, None, True),
    "ratio": ("ratio=0.4", 0.12, "ratio", True),
    "budget": ("budget=80,last_block_dense=false", 0.12, 5, False),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mapped", [False, True], ids=["keys", "both maps"])
def test_selection_is_the_card(case, name, mapped):
    text, threshold, keep, last = OPTIONS[name]
    q, k = case.make()[:2]
    h, g, d = q.shape[1], k.shape[1], q.shape[3]
    path = seer_profile(d, g, 0.1, query=h) if mapped else seer_profile(d, h, 0.1)
    count = -(-q.shape[2] // 16)
    layout = planned(f"seerattention:profile={path},block=16,{text}", case)
    prob = slow_case(case, path)
    if keep == "ratio":
        keep = max(1, int((1 - math.sqrt(1 - 0.4)) * count))
    close = 0
    for got, rows in zip(listed(layout), prob, strict=True):
        for i, p in enumerate(rows):
            want = slow_choice(p, i, count, threshold, keep, last)
            if got[i] != want:  # rounding may swap blocks whose probabilities agree to five digits
                edge = [float(p[j]) for j in got[i] ^ want] + ([threshold] if keep is None else [])
                assert max(edge) - min(edge) < 1e-5 * max(edge), (i, got[i], want)
                close += 1
    assert close <= 2


@pytest.mark.parametrize("h,g", [(2, 2), (6, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("cuts", [(128,), (64, 192), (50, 51, 177)])
def test_chunks(h, g, cuts):
    """Chunks that end with a block choose what the whole prompt chooses; others choose something sound."""
    q, k, v = qkv(1, h, g, 250)
    text = f"seerattention:profile={seer_profile()},block=16,threshold=0.1,last_block_dense=false"
    whole = Drive(text)
    whole(q, k, v)
    drive = Drive(text)
    edges = (0, *cuts, 250)
    for a, b in zip(edges, edges[1:], strict=False):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    plans = [plan for x, plan, _ in drive.watch.calls if x.phase == "prefill"]
    if all(c % 16 == 0 for c in cuts):
        joined = [list(chain(*rows)) for rows in zip(*(listed(p) for p in plans), strict=True)]
        assert joined == listed(whole.last[1])
    for x, plan, _ in drive.watch.calls:
        mask = plan.to_mask(x.kv)
        assert mask[..., 0].all() and all(mask[0, :, i, x.start + i].all() for i in range(x.q.shape[2]))


def test_remembered_keys_follow_the_cache():
    """Pooled keys beside the cache: truncated and written anew, they give what a fresh cache gives."""
    q, k, v = qkv(1, 4, 2, 300)
    text = f"seerattention:profile={seer_profile()},block=16,threshold=0.1"
    a, b = Drive(text), Drive(text)
    a(*(t[:, :, :100] for t in (q, k, v)))
    a(*(t[:, :, 200:300] for t in (q, k, v)))
    a.cache.truncate(100)
    fork = Drive(text)
    fork.cache = a.cache.fork()
    b(*(t[:, :, :100] for t in (q, k, v)))
    for d in (a, fork, b):
        d(*(t[:, :, 100:200] for t in (q, k, v)))
    assert listed(a.last[1]) == listed(fork.last[1]) == listed(b.last[1])
    known = a.cache.rows[0]["seerattention.keys"]
    want = key_features(KV.dense(k[:, :, :192], v[:, :, :192]), Rotary(16), 16, 192)
    torch.testing.assert_close(known, want)


def test_storage_does_not_matter():
    q, k, v = qkv(1, 4, 2, 150)
    text = f"prefill=seerattention:profile={seer_profile()},block=16,threshold=0.1"
    a, b = Drive(text), Drive(replace(Drive(text).recipe, storage="paged"))
    for d in (a, b):
        d(*(t[:, :, :70] for t in (q, k, v)))
        d(*(t[:, :, 70:] for t in (q, k, v)))
    assert b.last[0].kv.kind == "paged" and listed(a.last[1]) == listed(b.last[1])


@pytest.mark.parametrize("option", ["threshold=0.0", "ratio=1.0", "budget=4096"])
def test_dense_at_the_end_of_the_scale(option):
    q, k, v = qkv(1, 4, 2, 200)
    drive = Drive(f"seerattention:profile={seer_profile()},block=16,{option}")
    drive(q, k, v)
    x, plan, _ = drive.last
    assert plan.tiles is not None and plan.to_mask(x.kv).sum() == 4 * 200 * 201 // 2


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("start", [0, 320, 1200])
def test_ratio_is_the_part_of_causal_blocks(ratio, start):
    """Of a prompt and of a later chunk; whole blocks, and one or two forced ones, are all that moves it."""
    q, k, v = qkv(1, 4, 2, 1600)
    x = call(q[:, :, start:], k, v, Rotary(16), start)
    plan = SeerAttention(profile=seer_profile(), block=16, ratio=ratio, last_block_dense=False).plan(x, State())
    kept = int(plan.tile_count.sum()) / (4 * sum(range(start // 16 + 1, 101)))
    assert ratio - 0.02 <= kept <= ratio + 0.03


def test_group_lists_hold_the_best_of_each_head():
    q, k, v = qkv(1, 6, 2, 250)
    x = call(q, k, v, Rotary(16))
    for options in (dict(threshold=0.1), dict(budget=64)):
        head, group = (
            SeerAttention(profile=seer_profile(), block=16, last_block_dense=False, share=s, **options).plan(x, State())
            for s in ("head", "group")
        )
        assert group.tiles.shape[1] == 2
        if "threshold" in options:
            for j, rows in enumerate(listed(group)):
                members = listed(head)[3 * j : 3 * j + 3]
                assert rows == [set.union(*sets) for sets in zip(*members, strict=True)]
        else:
            assert int(group.tile_count.max()) == 4 and group.tiles.shape[-1] == 4


def test_a_partial_block_pools_what_is_there():
    """The fault of padding: zeros beside keys that are all negative would be their maximum."""
    k = -torch.rand(1, 2, 20, 16) - 1
    rope = Rotary(16)
    got = key_features(KV.dense(rope.rotate(k, torch.arange(20)[None]), k), rope, 16, 20)
    last = k[:, :, 16:]
    want = torch.cat([last.amax(2), last.amin(2), last.mean(2)], -1)
    torch.testing.assert_close(got[:, :, 1], want, atol=1e-5, rtol=1e-5)
    q = query_means(rope.rotate(k, torch.arange(20)[None]), rope, 16, 0)
    torch.testing.assert_close(q[:, :, 1], last.mean(2), atol=1e-5, rtol=1e-5)


def test_what_it_needs(tmp_path):
    q, k, v = qkv(1, 4, 2, 150)
    x = call(q, k, v, Rotary(16))

    def fails(kind, match, **options):
        with pytest.raises(kind, match=match):
            SeerAttention(**options).plan(options.pop("x", x), State())

    fails(ConfigError, "foveate calibrate seerattention")
    path = seer_profile()
    with pytest.raises(UnsupportedError, match="is not available"):
        SeerAttention(profile=path).plan(replace(x, rope=None), State())
    fails(ConfigError, r"expected key weights \[4 or a divisor of 2, 48, 16\].*got \[1, 96, 32\]", profile=seer_profile(32))
    fails(ConfigError, r"got \[3, 48, 16\]", profile=seer_profile(16, 3))
    other = folder(Profile("seerattention", {"block": 32}, gates(16)))
    fails(ConfigError, r"block expected 32 like the profile .* got 64", profile=other)
    notes = []
    assert SeerAttention(profile=path).plan(replace(x, layer=9, note=notes.append), State()) is None
    assert notes == ["seerattention: its profile has no gates for some layers; they run dense"]
    fails(ConfigError, "expected gates in the profile", profile=folder(Profile("seerattention")))
    for text, match in (
        ("threshold=0.1,budget=64", "expected one of threshold, ratio and budget, got threshold and budget"),
        ("ratio=1.5", "ratio expected between"),
        ("block=8", "block expected >= 16"),
        ("share=vote", "share expected one of head, group"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse(f"seerattention:{text}")
    with pytest.raises(ConfigError, match=r"got loss=0\.1$"):
        SeerAttention().search(Target("loss", 0.1))
    with pytest.raises(ConfigError, match="neither ratio nor budget"):
        SeerAttention(budget=64).search(Target())


# ---------------------------------------------------------------------- distillation
@pytest.mark.parametrize("kind", ["max", "sum"])
def test_the_target_map(kind, monkeypatch):
    """Pieces of rows and heads give what pooling the whole N x N map gives, a partial block included."""
    q, k, v = qkv(1, 6, 2, 91)
    s = q.unflatten(1, (2, 3)) @ k[:, :, None].transpose(-1, -2) / 4
    p = s.masked_fill(torch.ones(91, 91).triu(1).bool(), float("-inf")).softmax(-1).flatten(1, 2)
    want = torch.zeros(1, 6, 6, 6)
    for i in range(6):
        for j in range(6):
            block = p[:, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            want[:, :, i, j] = block.amax((-1, -2)) if kind == "max" else block.sum((-1, -2))
    for budget in (1 << 24, 1):
        monkeypatch.setattr("foveate.scores.gates.pieces", lambda n, cost, b=budget: pieces(n, cost, b))
        torch.testing.assert_close(block_map(q, KV.dense(k, v), 16, kind, scale=0.25), want, atol=1e-6, rtol=1e-5)


def test_targets_are_the_largest_probabilities_as_shares():
    q, k, v = qkv(1, 6, 2, 91)
    top = block_map(q, KV.dense(k, v), 16, "max", scale=0.25)
    got = _targets(call(q, k, v, Rotary(16)), 16)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 6, 6))
    torch.testing.assert_close(got * top.sum(-1, keepdim=True), top)


@pytest.mark.parametrize("mapped", [False, True])
def test_gradient_is_that_of_the_dense_divergence(mapped):
    q, k, v = qkv(1, 6, 2, 120)
    rope, x = Rotary(16), call(q, k, v, Rotary(16))
    qm, kf = query_means(q, rope, 16, 0), key_features(x.kv, rope, 16, 120)
    top = block_map(q, x.kv, 16, "max", scale=0.25)
    target = top / top.sum(-1, keepdim=True)
    wk = gates(16, 2 if mapped else 6, 0.3)["layer.0.k"].requires_grad_()
    wq = gates(16, query=6)["layer.0.q"].requires_grad_() if mapped else None
    loss = distil(Gate(wk, wq), qm, kf, target, rope, 16)
    a, b = wk.detach().clone().requires_grad_(), None if wq is None else wq.detach().clone().requires_grad_()
    total = 0
    prob = slow_gate(q, k, rope, a, b, 16)
    for head in range(6):
        for i in range(2, 8):  # 8 rows of blocks, the first quarter dropped
            t = target[0, head, i, : i + 1]
            total = total + torch.nn.functional.kl_div(prob[head][i].log(), t, reduction="sum") / (6 * 6)
    total.backward()
    assert abs(loss - float(total.detach())) < 1e-4
    torch.testing.assert_close(wk.grad, a.grad, atol=1e-5, rtol=1e-3)
    if mapped:
        torch.testing.assert_close(wq.grad, b.grad, atol=1e-5, rtol=1e-3)


def lesson(seed, n=256, d=16):
    """A prompt whose attention no mean shows: each block of 16 keys hides one loud key, its sign cancelled in the mean.

    Key block j says "code c" by +a in one key and -a in another; queries of a block ask for two codes.
    """
    gen = torch.Generator().manual_seed(seed)
    count = n // 16
    k, q = 0.3 * torch.randn(1, 2, n, d, generator=gen), 0.3 * torch.randn(1, 4, n, d, generator=gen)
    axes = torch.tensor([5, 6, 7, 13, 14, 15])  # the pairs that turn slowly
    code = axes[torch.randint(0, 6, (count,), generator=gen)]
    for j in range(count):
        k[:, :, 16 * j + 3, code[j]] += 5.0
        k[:, :, 16 * j + 9, code[j]] -= 5.0
        q[:, :, 16 * j : 16 * j + 16, axes[torch.randint(0, 6, (1,), generator=gen)]] += 5.0
    rope = Rotary(d)
    pos = torch.arange(n)[None]
    return rope.rotate(q, pos), rope.rotate(k, pos), torch.randn(1, 2, n, d, generator=gen), rope


def recall(method, x):
    """Attention mass of the blocks a plan keeps."""
    plan = method.plan(x, State())
    mass = block_map(x.q, x.kv, 16, "sum", scale=x.scale)
    keep = plan.to_block_mask(16, 16)
    return float((mass * keep).sum() / mass.sum())


@pytest.mark.parametrize("mapped", [False, True])
def test_distilled_gates_find_what_means_do_not(mapped, tmp_path):
    """The whole search: passes over prompts, then a profile that keeps clearly more mass than untrained gates."""
    method = SeerAttention(block=16, epochs=20, rate=0.01, query_map=mapped, last_block_dense=False)
    search = method.search(Target("density", 0.4))
    prompts = [call(*lesson(s), layer=0) for s in range(4)]
    with torch.inference_mode():
        for _ in range(search.passes):
            for x in prompts:
                search.see(x, x.q, None)
            search.end_pass()
    found = search.finish()
    untrained = method.search(Target("density", 0.4))
    untrained.gate(prompts[0])
    fresh = call(*lesson(100), layer=0)
    paths = [Profile("seerattention", found.options, found.tensors).save(tmp_path / "a")]
    paths += [Profile("seerattention", {}, untrained.finish().tensors).save(tmp_path / "b")]
    options = dict(block=16, budget=64, last_block_dense=False)
    after, before = (recall(SeerAttention(profile=str(p), **options), fresh) for p in paths)
    assert after > before + 0.15 and after > 0.8
    assert search.history[-1] < 0.5 * search.history[0]
    assert found.report["density"] <= 0.4 and found.report["met"] and found.options["threshold"] in GRID
    plan = replace(method, profile=str(paths[0])).plan(fresh, State())  # at the threshold of the profile
    density = plan.tile_count.sum() / (4 * 16 * 17 / 2)
    assert abs(float(density) - found.report["density"]) < 0.1
    assert not fresh.q.requires_grad and all(not t.requires_grad for t in found.tensors.values())


def test_more_recall_wants_a_lower_threshold():
    found = []
    for value in (0.7, 0.99):
        search = SeerAttention(block=16, epochs=1).search(Target("recall", value))
        for _ in range(search.passes):
            search.see(call(*lesson(0), layer=0), None, None)
            search.end_pass()
        found.append(search.finish())
        assert found[-1].report["recall"] >= value
    assert found[0].options["threshold"] > found[1].options["threshold"]


@pytest.mark.parametrize("stop", [(0, 1), (1, 2), (3, 1)])
def test_resumed_search_ends_the_same(stop):
    """Interrupted after any prompt of any pass, the measuring one included."""
    prompts = [call(*lesson(s, n=128), layer=i) for s in range(3) for i in range(2)]
    method = SeerAttention(block=16, epochs=3)

    def run(search, steps):
        for at, x in steps:
            search.see(x, x.q, None)
            if at == len(prompts) - 1:
                search.end_pass()

    every = [(i, x) for _ in range(4) for i, x in enumerate(prompts)]
    whole, first = method.search(Target()), method.search(Target())
    run(whole, every)
    at = stop[0] * 6 + stop[1] * 2
    run(first, every[:at])
    second = method.search(Target())
    second.resume({n: t.clone() for n, t in first.state().items()})
    run(second, every[at:])
    a, b = whole.finish(), second.finish()
    assert a.options == b.options and a.report == b.report
    assert a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
