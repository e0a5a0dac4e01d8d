"""SpecKV and SpecPC against slow transcriptions of their cards, and the two models together."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate import speculate
from foveate.errors import ConfigError, ShapeError
from foveate.kv import KV
from foveate.methods.speckv import PROMPT, SEEN, SpecKV
from foveate.methods.specpc import PROMPT as PC_PROMPT
from foveate.methods.specpc import SCORE, SpecPC
from foveate.scores import keys
from foveate.scores.window import group_reduce, row_mass, window_mass
from foveate.speculate.draft import _cache
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.models import generate as plain
from tests.models import tiny, tokens


def probabilities(q, k, rows):
    """fp64 [H, len(rows), M], zero for what a row does not see; q [H, N, D], k [G, N, D]."""
    h, n, d = q.shape
    k = k.repeat_interleave(h // k.shape[0], 0).double()
    s = q[:, rows].double() @ k.transpose(1, 2) / math.sqrt(d)
    unseen = torch.arange(n) > torch.tensor(list(rows))[:, None]
    return s.masked_fill(unseen, float("-inf")).softmax(-1)


def slow_speckv(q, k, n, capacity, window, kernel, sink, reduce="max"):
    """The card: prompt of n tokens, the rest of q and k is the guess. [G] lists of kept prompt entries."""
    first, g = n - 1 - window, k.shape[0]
    p = probabilities(q, k, range(first, q.shape[1]))[:, :, :first]
    kept = []
    for j in range(g):
        own = p[j * q.shape[0] // g : (j + 1) * q.shape[0] // g].flatten(0, 1)
        score = own.amax(0) if reduce == "max" else own.mean(0)
        pooled = [max(score[max(0, e - kernel // 2) : e + kernel // 2 + 1].tolist()) for e in range(first)]
        ranked = sorted(range(first), key=lambda e: (e >= sink, -pooled[e], e))
        kept.append(sorted(ranked[: capacity - window]) + list(range(first, n - 1)))
    return kept


def compressed(recipe, tensors, n, cuts=()):
    """Prompt and guess through one layer, rolled back to n - 1 tokens and compressed; [G] kept positions."""
    q = tensors[0]
    drive = Drive(recipe, d=q.shape[-1])
    drive.run[PROMPT] = n
    edges = (0, *cuts, q.shape[2])
    for a, b in zip(edges, edges[1:], strict=False):
        drive(*(t[:, :, a:b] for t in tensors))
    del drive.run[PROMPT]
    drive.cache.truncate(q.shape[2] - n + 1)
    drive(*(t[:, :, n - 1 : n] for t in tensors))
    x, plan, out = drive.last
    torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)
    assert drive.cache.seen == [n] and not drive.notes
    return [row[:-1].tolist() for row in x.kv.positions()[0]], drive


# ---------------------------------------------------------------------- scores
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 2)])
@pytest.mark.parametrize("budget", [1 << 24, 300])
def test_row_mass(heads, budget, monkeypatch):
    monkeypatch.setattr(keys, "BUDGET", budget)
    monkeypatch.setattr(keys.pieces, "__defaults__", (budget,))
    q, k, _ = qkv(1, *heads, 60, d=8)
    pos, weight = torch.arange(48, 60)[None], torch.linspace(0, 1, 12)
    p = probabilities(q[0], k[0], range(48, 60))
    options = dict(scale=8**-0.5, weight=weight)
    got = row_mass(q[:, :, 48:], KV.dense(k, k), pos, reduce="max", **options)[0]
    torch.testing.assert_close(got.double(), (p * weight[:, None]).amax(1), atol=1e-6, rtol=1e-5)
    got = row_mass(q[:, :, 48:], KV.dense(k, k), pos, reduce="sum", **options)[0]
    torch.testing.assert_close(got.double(), (p * weight[:, None]).sum(1), atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------- SpecKV
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_selection_is_the_card(case, reduce):
    tensors = case.make()[:3]
    kept, drive = compressed(f"cache=speckv:capacity=60,window=16,sink=2,kernel=5,reduce={reduce}", tensors, 280)
    want = slow_speckv(tensors[0][0], tensors[1][0], 280, 60, 16, 5, 2, reduce)
    assert kept == want
    assert drive.cache.store.lens == [[61] * len(want)]  # exactly the capacity, and the token fed anew


@pytest.mark.parametrize("cuts", [(128,), (263,), (270,), (264, 281), (100, 298)])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_chunks_of_prompt_and_guess_change_nothing(cuts, reduce):
    tensors = qkv(1, 6, 2, 300)
    recipe = f"cache=speckv:capacity=60,window=16,reduce={reduce}"
    assert compressed(recipe, tensors, 280, cuts)[0] == compressed(recipe, tensors, 280)[0]


def test_what_only_the_guess_looks_at_is_kept():
    q, k, v = qkv(1, 4, 2, 300)
    q[:, :, 285:], k[:, :, 77] = 0.0, 0.0
    q[:, :, 285:, 3] = k[:, :, 77, 3] = 8.0
    kept, _ = compressed("cache=speckv:capacity=40,window=16", (q, k, v), 280)
    assert all(77 in row for row in kept)
    cut = [t[:, :, :280] for t in (q, k, v)]  # without the guess it is one of many
    assert not all(77 in row for row in compressed("cache=speckv:capacity=40,window=16,kernel=1", cut, 280)[0])


def test_without_a_guess_it_is_snapkv_per_kv_head():
    """a = 0, mean, and the window's rows alone: SnapKV's votes, and a note that says so."""
    q, k, v = qkv(1, 6, 2, 150)
    sets = []
    for recipe in ("speckv:window=16,capacity=48,reduce=mean", "snapkv:window=16,capacity=48,kernel=7,pooling=max"):
        drive = Drive(f"cache={recipe}")
        for a, b in ((0, 149), (149, 150)):
            drive(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
        sets.append(drive.last[0].kv.positions().tolist())
    assert sets[0] == sets[1]
    pos = torch.arange(134, 150)[None]
    a = group_reduce(row_mass(q[:, :, 134:], KV.dense(k, k), pos, reduce="sum", scale=0.25), 2, "mean")
    torch.testing.assert_close(a, group_reduce(window_mass(q[:, :, 134:], KV.dense(k, k), pos, scale=0.25), 2, "mean"))
    drive = Drive("cache=speckv:window=16,capacity=48")
    drive(q[:, :, :149], k[:, :, :149], v[:, :, :149])
    drive(q[:, :, 149:], k[:, :, 149:], v[:, :, 149:])
    assert "no guess" in next(iter(drive.notes))


@pytest.mark.parametrize("n,guess", [(300, 0), (280, 20)])
def test_sparse_prefill_is_columns_and_a_band(n, guess):
    tensors = qkv(1, 6, 2, 300)
    drive = Drive("prefill=speckv:capacity=none,window=16,columns=24,band=64,sink=2,kernel=3")
    drive.run |= {PROMPT: n} if guess else {}
    out = drive(*tensors)
    x, layout, _ = drive.last
    layout.validate()
    torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
    p = probabilities(tensors[0][0], tensors[1][0], range(n - 17, 300))
    mask = layout.to_mask()[0]
    for j in range(2):
        score = p[3 * j : 3 * j + 3].flatten(0, 1).amax(0)
        pooled = [max(score[max(0, e - 1) : e + 2].tolist()) for e in range(300)]
        columns = sorted(range(300), key=lambda e: (e >= 2, -pooled[e], e))[:24]
        for i in (0, 5, 63, 64, 127, 200, 299):
            end = (i // 64 + 1) * 64
            tiles = range(max(0, end - 128), end)  # distances 0 and 64
            want = sorted({e for e in (*columns, *tiles) if e <= i})
            assert mask[3 * j, i].nonzero().flatten().tolist() == want
    assert torch.equal(mask[0], mask[2])


def test_a_question_behind_the_context_chooses_anew():
    """Scores belong to the prompt they were made for; more tokens before the answer and the tail decides, not they."""
    tensors = qkv(1, 4, 2, 300)
    drive = Drive("cache=speckv:window=16,capacity=48")
    drive.run[PROMPT] = 200
    drive(*(t[:, :, :220] for t in tensors))
    del drive.run[PROMPT]
    drive.cache.truncate(21)
    assert isinstance(drive.cache.rows[0][SEEN].score, torch.Tensor)
    drive(*(t[:, :, 199:260] for t in tensors))
    drive(*(t[:, :, 260:261] for t in tensors))
    fresh = Drive("cache=speckv:window=16,capacity=48")
    fresh(*(t[:, :, :260] for t in tensors))
    fresh(*(t[:, :, 260:261] for t in tensors))
    assert torch.equal(drive.last[0].kv.positions(), fresh.last[0].kv.positions())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"kernel": 4}, "kernel expected an odd number"),
        ({"band": 100}, "band expected a multiple of 64"),
        ({"capacity": 33}, "capacity expected at least window"),
        ({"capacity": 600, "columns": 100, "band": 64}, r"capacity expected at most columns \+ band"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=f"speckv: {words}"):
        SpecKV(**options)


# ---------------------------------------------------------------------- SpecPC
def slow_pick(score, capacity, window, prefix, pool, neighbors):
    n, before = len(score), (pool - 1) // 2
    room = [0.0] * before + list(score) + [0.0] * (pool - 1 - before)
    pooled = [max(room[i : i + pool]) for i in range(n)]
    order = list(range(n - window, n)) + list(range(prefix))
    for top in sorted(range(n), key=lambda i: (-pooled[i], i))[:capacity]:
        order += [min(max(top + o - (neighbors - 1) // 2, 0), n - 1) for o in range(neighbors)]
    return sorted(list(dict.fromkeys(order))[:capacity])


@pytest.mark.parametrize("pool,neighbors", [(1, 1), (4, 6), (5, 3), (32, 32)])
@pytest.mark.parametrize("prefix", [0, 3])
def test_pick_is_the_card(pool, neighbors, prefix):
    score = torch.rand(200, generator=torch.Generator().manual_seed(7)).tolist()
    score[40:44] = [0.5] * 4
    method = SpecPC(capacity=60, window=20, prefix=prefix, pool=pool, neighbors=neighbors)
    got = method.pick(torch.tensor(score)).tolist()
    assert got == slow_pick(torch.tensor(score).tolist(), 60, 20, prefix, pool, neighbors)
    assert got[-20:] == list(range(180, 200)) and got[:prefix] == list(range(prefix)) and len(set(got)) == 60
    top = max(range(200), key=lambda i: score[i])
    if pool == 1:
        assert set(range(max(0, top - (neighbors - 1) // 2), min(200, top + neighbors // 2))) <= set(got)
    assert SpecPC(capacity=200, window=20).pick(torch.tensor(score)).tolist() == list(range(200))


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk", [None, 50])
@torch.no_grad()
def test_draft_scores_are_the_card(reduce, weighted, chunk):
    """Against attention maps of the plain model: last rows with a ramp, then generated tokens, layers from 1 on."""
    model, ids = tiny(), tokens(1, 120)
    method = SpecPC(
        capacity=40, window=10, pool=3, neighbors=4, reduce=reduce, weighted=weighted, lookahead=4, first_layer=1
    )
    out = speculate.compress_prompt(model, ids, method, chunk=chunk, eos=[])
    whole = torch.cat([ids, out.guess], 1)
    assert torch.equal(whole, plain(model, ids, max_new_tokens=4, min_new_tokens=4, eos_token_id=None).sequences)
    maps = model(whole[:, :-1], output_attentions=True).attentions
    weight = torch.linspace(0, 1, 10) if weighted else torch.ones(10)
    rows = torch.stack([torch.cat([m[0, :, 110:120, :120] * weight[:, None], m[0, :, 120:, :120]], 1) for m in maps[1:]])
    want = rows.amax((0, 1, 2)) if reduce == "max" else rows.sum((0, 1, 2))
    torch.testing.assert_close(out.score, want, atol=1e-4, rtol=1e-4)
    assert out.positions.tolist() == slow_pick(out.score.tolist(), 40, 10, 0, 3, 4)
    assert torch.equal(out.ids, ids[:, out.positions])
    assert model.config._attn_implementation == "eager"  # the draft is what it was


def test_a_window_of_one_row_has_no_ramp():
    q, k, v = qkv(1, 4, 2, 50)
    drive = Drive("dense")
    method = SpecPC(capacity=20, window=1, pool=1, neighbors=1, first_layer=0)
    object.__setattr__(drive, "recipe", foveate.Recipe(prefill=method, decode=method))
    drive.run[PC_PROMPT] = 50
    drive(q, k, v)
    torch.testing.assert_close(drive.run[SCORE].double(), probabilities(q[0], k[0], [49]).amax((0, 1)), atol=1e-6, rtol=1e-5)


def test_pick_in_nested_budgets_is_nested_also_with_neighbors():
    score = torch.rand(300, generator=torch.Generator().manual_seed(1))
    sets = [set(SpecPC(capacity=c, window=16, pool=5, neighbors=6).pick(score).tolist()) for c in (40, 41, 80, 200)]
    assert all(a <= b for a, b in zip(sets, sets[1:], strict=False))


@torch.no_grad()
def test_short_prompts_and_wrong_ones():
    model, ids = tiny(), tokens(1, 40)
    out = speculate.compress_prompt(model, ids, SpecPC(capacity=40, window=8))
    assert torch.equal(out.ids, ids) and out.score is None and out.positions.tolist() == list(range(40))
    with pytest.raises(ConfigError, match="window expected at most the prompt's 40 tokens, got 64"):
        speculate.compress_prompt(model, ids)
    with pytest.raises(ConfigError, match="first_layer expected below the draft's 3 layers, got 8"):
        speculate.compress_prompt(model, ids, SpecPC(capacity=20, window=8))
    with pytest.raises(ShapeError, match="one row"):
        speculate.compress_prompt(model, tokens(2, 40))
    with pytest.raises(ConfigError, match="capacity expected at least window"):
        SpecPC(capacity=30)
    foveate.use(model, "dense").__enter__().remove()  # nothing stayed applied


# ---------------------------------------------------------------------- two models
@torch.no_grad()
def test_look_ahead_continues_from_the_compressed_prompt():
    """Two models of one vocabulary: prompt entries only, exactly the capacity, at true positions, chunked or not."""
    model, draft, ids = tiny(), tiny(seed=3, num_hidden_layers=1), tokens(1, 90)
    answer = speculate.guess(draft, ids, 6, eos=[])
    assert torch.equal(torch.cat([ids, answer], 1), plain(draft, ids, max_new_tokens=6, min_new_tokens=6).sequences)
    with foveate.use(model, "cache=speckv:capacity=24,window=8,sink=2"):
        cache = speculate.look_ahead(model, ids, answer)
        assert cache.seen == [89] and cache.get_seq_length() == 89 and cache.evicted
        lens = [layer.cache.store.lens for layer in cache.layers]
        assert lens == [[[24, 24]]] * 3  # prompt entries only, exactly the capacity
        pos = [layer.cache.store.view().positions()[0] for layer in cache.layers]
        assert all(row[-8:].tolist() == list(range(81, 89)) and row[:2].tolist() == [0, 1] for p in pos for row in p)
        chunked = speculate.look_ahead(model, ids, answer, chunk=31)
        assert all(torch.equal(c.cache.store.view().positions()[0], p) for c, p in zip(chunked.layers, pos, strict=True))
        nbytes = cache.nbytes
        out = plain(model, ids, past_key_values=cache)
        assert torch.isfinite(torch.stack(out.logits)).all() and out.sequences.shape == (1, 98)
        fresh = plain(model, ids)
    assert nbytes < 0.5 * sum(k.numel() * 8 for k in [layer.keys for layer in model(ids).past_key_values.layers])
    assert not torch.equal(fresh.logits[0], out.logits[0])  # the guess chose other entries


@torch.no_grad()
def test_capacity_of_everything_is_plain_generation():
    model, ids = tiny(), tokens(1, 90)
    want = plain(model, ids)
    with foveate.use(model, "cache=speckv:capacity=90"):
        cache = speculate.look_ahead(model, ids, tokens(1, 5, seed=2))
        assert not cache.evicted and not cache.run
        got = plain(model, ids, past_key_values=cache)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=2e-4)
    with foveate.use(model, "cache=snapkv"), pytest.raises(ConfigError, match="expected one with speckv"):
        speculate.look_ahead(model, ids, ids)
    running = foveate.Recipe(cache="speckv", compress_at="chunk")
    with foveate.use(model, running), pytest.raises(ConfigError, match="compress_at='end'"):
        speculate.look_ahead(model, ids, ids)


@torch.no_grad()
def test_cascade_uses_one_draft_run():
    model, ids = tiny(), tokens(1, 150)
    small = speculate.compress_prompt(model, ids, SpecPC(capacity=80, window=10, first_layer=1, lookahead=5), eos=[])
    assert small.guess.shape == (1, 5)
    with foveate.use(model, "cache=speckv:capacity=30,window=8") as handle:
        cache = speculate.look_ahead(model, small.ids, small.guess)
        assert cache.seen == [79] and cache.layers[0].cache.store.lens == [[30, 30]]
        assert PROMPT not in cache.run
        out = plain(model, small.ids, past_key_values=cache)
        assert out.sequences.shape == (1, 88) and _cache(handle, {}).seen == []
