"""RazorAttention: roles from scores, the mean entry, the memory it frees, and the calibration on repeated noise."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.cache import persist
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput
from foveate.methods.razor_attention import FOLDED, RazorAttention, best
from foveate.methods.razor_attention_search import EchoSearch, repeated, scores
from foveate.methods.search import Target, searchable
from foveate.profile import Profile
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.runtime import Step, compress
from tests.drive import Drive, Rotary, qkv
from tests.profiles import folder
from tests.test_adakv import storage

NAN = float("nan")
CUT = "induction=0,echo=0,sink=4,window=20,fraction=0"


@pytest.fixture(scope="module")
def profile():
    """Four layers of three kv heads; in layer 2 only kv head 1 is a retrieval head at a share of 0.3 (4 of 12 heads)."""
    score = torch.tensor([[9.0, 0, 1], [0, 8, 0], [0, 7, 0], [0, 2, 0]])
    return folder(Profile("razor_attention", tensors={"induction": score, "echo": score.clone()}))


def dense_with_mean(q, k, v, keep, drop, scale=0.25):
    """The card's step 3 of one query head: q `[D]`, keys and values `[M, D]`, lists of what stays and what was dropped."""
    q, k, v = (t.double() for t in (q, k, v))
    e = (k[keep] @ q * scale).exp()
    top, low = e @ v[keep], e.sum()
    if drop:
        one = len(drop) * math.exp(float(k[drop].mean(0) @ q) * scale)
        top, low = top + one * v[drop].mean(0), low + one
    return top / low


def play(recipe, q, k, v, prompt, layer=2, backend="reference", cuts=()):
    drive = Drive(recipe, backend=backend, layer=layer)
    for a, b in zip((0, *cuts), (*cuts, prompt), strict=True):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    for i in range(prompt, q.shape[2]):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    return drive


# ---------------------------------------------------------------------- attention and the mean entry
@pytest.mark.parametrize("h,g", [(3, 3), (9, 3), (12, 3), (24, 3)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cuts", [(), (64, 128)])
def test_decode_is_the_card(h, g, backend, cuts, profile):
    """One token joins the mean a step (slack 1): S + W + 1 entries of local heads, everything of the retrieval head."""
    q, k, v = qkv(1, h, g, 156)
    recipe = f"razor_attention:profile={profile},induction=0.3,sink=4,window=20,fraction=0,slack=1"
    drive = play(recipe, q, k, v, 150, backend=backend, cuts=cuts)
    assert drive.cache.store.lens == [[24, 156, 24]]
    for x, plan, out in drive.watch.calls[len(cuts) + 1 :]:
        t = int(x.q_pos)
        for i in range(h):
            j = i // (h // g)
            first = t - 20  # a step attends before it evicts: the window and the token itself
            drop = [] if j == 1 else list(range(4, first))
            want = dense_with_mean(q[0, i, t], k[0, j], v[0, j], [e for e in range(t + 1) if e not in drop], drop)
            torch.testing.assert_close(out[0, i, 0].double(), want, atol=1e-5, rtol=1e-5)
        plan.validate()


@pytest.mark.parametrize("slack", [1, 3, 7])
def test_incremental_mean_is_the_batch_mean(slack):
    q, k, v = qkv(1, 4, 2, 141)
    drive = play(f"razor_attention:{CUT},slack={slack}", q, k, v, 100)
    held = drive.cache.rows[0][FOLDED]
    last = int(drive.cache.store.view().positions()[0, 0, 4])  # the oldest that is not in the mean
    assert 121 - slack < last <= 121
    torch.testing.assert_close(held[..., :16], k[:, :, 4:last].mean(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(held[..., 16:32], v[:, :, 4:last].mean(2), atol=1e-5, rtol=1e-5)
    assert held[0, :, 32].tolist() == [last - 4] * 2 and held[0, :, 33].tolist() == [20, 20]


def test_identical_tokens_are_compensated_exactly():
    """If all dropped tokens are the same, log n makes the result dense; a weight of 1, or none, does not."""
    q, k, v = qkv(1, 4, 2, 140)
    k[:, :, 4:120], v[:, :, 4:120] = k[:, :, 4:5], v[:, :, 4:5]
    dense = play("dense", q, k, v, 130)
    drive = play(f"razor_attention:{CUT},slack=2", q, k, v, 130)
    assert drive.cache.store.lens[0][0] < 30
    torch.testing.assert_close(drive.last[2], dense.last[2], atol=1e-5, rtol=1e-5)
    bare = play(f"razor_attention:{CUT},slack=2,compensate=false", q, k, v, 130)
    assert float((bare.last[2] - dense.last[2]).abs().max()) > 1e-2
    drive.cache.rows[0][FOLDED][..., 32] = 1.0  # the vendor's weight
    again = drive(*(t[:, :, -1:] for t in (q, k, v)))
    assert float((again - dense(*(t[:, :, -1:] for t in (q, k, v)))).abs().max()) > 1e-2


@pytest.mark.parametrize("options", ["induction=1", "induction=0,echo=0,window=200", "induction=0,echo=0,fraction=1"])
def test_nothing_dropped_is_dense(options):
    q, k, v = qkv(1, 6, 2, 153)
    drive, dense = play(f"razor_attention:{options}", q, k, v, 150), play("dense", q, k, v, 150)
    for (_, plan, out), (_, _, want) in zip(drive.watch.calls, dense.watch.calls, strict=True):
        assert isinstance(plan, Layout) and plan.full
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert not drive.cache.evicted


def test_a_second_turn_sees_the_mean():
    """Questions after an eviction (several rows, N != M) attend to it, in one piece and in chunks; then it grows."""
    q, k, v = qkv(1, 4, 2, 200)
    for cuts in ((160, 190), (160, 171, 190)):
        drive = play(f"razor_attention:{CUT},slack=64", q[:, :, :160], k[:, :, :160], v[:, :, :160], 150)
        outs = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip(cuts, cuts[1:], strict=False)]
        out = torch.cat(outs, 2)
        drop = list(range(4, 130))
        for i in range(4):
            for t in (160, 175, 189):
                keep = [e for e in range(t + 1) if e not in drop]
                want = dense_with_mean(q[0, i, t], k[0, i // 2], v[0, i // 2], keep, drop)
                torch.testing.assert_close(out[0, i, t - 160].double(), want, atol=1e-5, rtol=1e-5)
        drive(*(t[:, :, 190:191] for t in (q, k, v)))
        torch.testing.assert_close(drive.cache.rows[0][FOLDED][..., :16], k[:, :, 4:170].mean(2), atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch():
    """Padding enters no mean, rows fold by their own lengths, a short one beside a long one is as alone."""
    q, k, v = qkv(2, 4, 2, 168)
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, :136] = False
    recipe = f"razor_attention:{CUT},slack=4"
    both, alone = Drive(recipe), [Drive(recipe) for _ in range(2)]
    both(*(t[:, :, :150].masked_fill(~valid[:, None, :, None], NAN) for t in (q, k, v)), valid=valid)
    alone[0](*(t[:1, :, :150] for t in (q, k, v)))
    alone[1](*(t[1:, :, 136:150] for t in (q, k, v)))
    for i in range(150, 168):
        got = both(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for b in range(2):
            one = alone[b](*(t[b : b + 1, :, i : i + 1] for t in (q, k, v)))
            torch.testing.assert_close(got[b : b + 1], one, atol=1e-5, rtol=1e-5)
    assert both.cache.store.lens == [a.cache.store.lens[0] for a in alone]
    assert both.cache.rows[1][FOLDED][0, :, 32].tolist() == [6, 6] and both.cache.rows[0][FOLDED][0, 0, 32] == 142


def test_the_mean_follows_forks_beams_and_files(tmp_path):
    q, k, v = qkv(2, 4, 2, 160)
    drive = play(f"razor_attention:{CUT},slack=2", q[:, :, :155], k[:, :, :155], v[:, :, :155], 150)
    copy = drive.cache.fork()
    lost = persist.save(tmp_path / "c", [drive.cache], "m", "r")
    assert lost == []
    loaded = persist.load(tmp_path / "c", "m")[0]
    loaded.steps = drive.cache.steps
    want = [drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(155, 160)]
    for cache in (copy, loaded):
        drive.cache = cache
        got = [drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(155, 160)]
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    before = drive.cache.rows[1][FOLDED].clone()
    drive.cache.reorder(torch.tensor([1, 0, 1]))
    assert torch.equal(drive.cache.rows[0][FOLDED], before) and torch.equal(drive.cache.rows[2][FOLDED], before)


def test_a_loaded_mean_survives_the_eviction_of_another_row(tmp_path):
    """Row 1 gets no new tokens and drops nothing; row 0 does, and what both hold beside the cache is asked to follow."""
    q, k, v = qkv(2, 4, 2, 190)
    drive = Drive(f"razor_attention:{CUT}")
    drive(*(t[:, :, :150] for t in (q, k, v)))
    compress(drive.recipe, drive.cache, Step(run=drive.run), drive.info)
    persist.save(tmp_path / "c", [drive.cache], "m", "r")
    drive.cache = persist.load(tmp_path / "c", "m")[0]
    valid = torch.ones(2, 39, dtype=torch.bool)
    valid[1] = False
    drive(*(t[:, :, 150:189] for t in (q, k, v)), valid=valid)
    drive(*(t[:, :, 189:] for t in (q, k, v)))
    assert [drive.cache.rows[i][FOLDED][0, 0, 32].item() for i in (0, 1)] == [165.0, 126.0]


# ---------------------------------------------------------------------- memory
def test_the_window_follows_the_prompt():
    q, k, v = qkv(1, 4, 2, 205)
    drive = play("razor_attention:induction=0,echo=0,window=20,fraction=0.3,slack=2", q, k, v, 200)
    assert drive.cache.store.lens[0] == [4 + 60 + 1] * 2  # of the prompt's 200 tokens, and it stays so


def test_memory_falls():
    """8K tokens at a budget of a half (one of three kv heads whole): at least 40 % of the bytes are freed, and stay freed.
    Bytes = sum over heads of full or S + W, with room to grow; the mean entry lies beside them."""
    q, k, v = qkv(1, 3, 3, 8393)
    score = torch.zeros(4, 3)
    score[2, 1] = 1.0
    path = folder(Profile("razor_attention", tensors={"induction": score, "echo": score.clone()}))
    recipe = f"razor_attention:profile={path},induction=0.01,echo=0,window=2040,fraction=0"
    drive = Drive(recipe, backend="torch")
    drive.cache.append(k[:, :, :8192], v[:, :, :8192])
    drive.cache.pending = True
    before, real = drive.cache.nbytes, storage(drive.cache.store)
    drive.watch.attended = lambda x, plan, out: None  # it would keep a copy of every view
    for i in range(8192, 8393):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        if i in (8192, 8392):
            store, local = drive.cache.store, 4 + 2040 + (i - 8191) % drive.recipe.cache.slack
            assert store.lens == [[local, i + 1, local]]
            assert store.k.shape[0] - sum(store.lens[0]) <= sum(store.lens[0]) // 8  # free slots
            assert drive.cache.nbytes <= 0.6 * before and storage(store) <= 0.6 * real
            assert drive.cache.rows[0][FOLDED].shape == (1, 3, 34)


# ---------------------------------------------------------------------- roles
def test_quotas_are_exact_and_global():
    score = torch.tensor([[0.5, 0.9], [0.5, 0.5], [NAN, NAN], [0.1, 0.5]])
    assert best(score, 0.5).tolist() == [[True, True], [True, False], [False, False], [False, False]]  # 3 of 6, no more
    assert best(score, 0.0).sum() == 0 and best(score, 0.01).sum() == 1 and best(score, 1.0).sum() == 6


def test_retrieval_is_the_union_in_every_layer():
    """The echo quota adds heads in all layers (one vendor's loop returns after the first)."""
    induction, echo = torch.zeros(4, 5), torch.zeros(4, 5)
    induction[0, :2] = induction[3, 4] = 1.0
    echo[1, 2] = echo[3, 0] = 1.0
    path = folder(Profile("razor_attention", tensors={"induction": induction, "echo": echo}))
    got = RazorAttention(profile=path, induction=0.14, echo=0.1).retrieval(4, 5)
    assert got.nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [3, 0], [3, 4]]


def test_without_a_profile_one_clear_error(profile):
    with pytest.raises(ConfigError, match="foveate calibrate razor_attention --out FOLDER and give profile=FOLDER"):
        Drive("razor_attention")(*qkv(1, 4, 2, 30))
    with pytest.raises(ConfigError, match=r"induction \[layers, kv heads\] = \[4, 2\], got \[4, 3\]"):
        Drive(f"razor_attention:profile={profile}")(*qkv(1, 4, 2, 30))


def test_recipes():
    assert Recipe.of("razor_attention:induction=1").decode.id == "razor_attention"
    with pytest.raises(ConfigError, match="cache: razor_attention does not fit this recipe: quest does not attend"):
        Recipe.of("quest+cache=razor_attention:induction=1")
    assert Recipe.of("quest+cache=razor_attention:induction=1,compensate=false").cache.id == "razor_attention"
    q, k, v = qkv(1, 4, 2, 153)
    drive = play(f"cache=razor_attention:{CUT}", q, k, v, 150)
    assert drive.cache.store.lens[0] == [27, 27] and isinstance(drive.last[1], Layout)


@pytest.mark.parametrize(
    "options", [dict(induction=1.5), dict(echo=-0.1), dict(sink=-1), dict(window=0), dict(fraction=2.0), dict(slack=0)]
)
def test_bad_hyperparameters(options):
    with pytest.raises(ConfigError, match=f"razor_attention: {next(iter(options))} expected"):
        RazorAttention(**options)
    assert parse("razor_attention").window == 4000 and parse("razor_attention@vendor").window == 251


# ---------------------------------------------------------------------- calibration
def call(q, k, v, layer=0, layers=2):
    n = q.shape[2]
    return AttnInput(q, KV.dense(k, v), "prefill", layer, layers, 1 / math.sqrt(q.shape[-1]), 0, q_pos=torch.arange(n)[None])


def heads(period=24, lead=1, d=32, seed=0):
    """Four heads of one layer reading repeated noise, head 0 by hand an induction head (keys carry the code of the token
    before), head 1 an echo head, head 2 local, head 3 flat. Values depend on the token alone."""
    gen = torch.Generator().manual_seed(seed)
    n = lead + 4 * period
    ids = torch.cat([torch.full((lead,), period), torch.arange(period).repeat(4)])
    code = torch.nn.functional.normalize(torch.randn(period + 1, d, generator=gen), dim=-1) * 12
    token, before = code[ids], code[ids.roll(1)]
    near = Rotary(d).rotate(torch.full((1, 1, n, d), 2.5), torch.arange(n)[None])[0, 0]
    q = torch.stack([token, token, near, 0 * token])[None]
    k = torch.stack([before, token, near, token])[None]
    return q, k, token.expand(1, 4, n, d)


def slow_scores(q, k, lead, period, shift):
    """The card's step 2 of one head, from the whole map."""
    n = q.shape[0]
    s = q.double() @ k.double().T / math.sqrt(q.shape[1])
    a = s.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    rows = range(lead + period, n)
    total = 0.0
    for i in rows:
        j = i - period
        while j >= lead:
            total += float(a[i, j + shift])
            j -= period
    return total / len(rows)


@pytest.mark.parametrize("lead", [0, 1])
def test_scores_are_the_card(lead):
    q, k, v = heads(lead=lead)
    got = scores(call(q, k, v), lead, 24)
    for name, shift in (("echo", 0), ("induction", 1)):
        want = [slow_scores(q[0, i], k[0, i], lead, 24, shift) for i in range(4)]
        assert got[name].tolist() == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert got["induction"].argmax() == 0 and got["echo"].argmax() == 1
    assert got["induction"][0] > 0.9 and got["echo"][1] > 0.6 and float(got["induction"][2]) < 0.05
    rank = got["induction"].argsort(descending=True).tolist()
    assert rank[0] == 0 and rank.index(2) > rank.index(3)  # the local head comes after the flat one


def test_a_kv_head_has_the_best_of_its_query_heads():
    q, k, v = heads()
    x = call(q[:, [3, 0]], k[:, :1], v[:, :1])
    both = scores(x, 1, 24)["induction"]
    assert both.tolist() == pytest.approx([slow_scores(q[0, 0], k[0, 0], 1, 24, 1)], rel=1e-4)


def test_search_to_serving(tmp_path):
    """See, state, resume, finish, profile: the induction head keeps everything, layers not shown have no score."""
    method = RazorAttention(induction=0.2, echo=0.0)
    assert searchable(method) is None
    search = method.search(Target())
    for seed in (0, 1):
        q, k, v = heads(seed=seed)
        x = call(q, k, v, layers=3)
        search.see(x, x.q, None)
        q, k = q.flip(1), k.flip(1)
        search.see(call(q * 0.5, k, v, layer=1, layers=3), q, None)
        again = EchoSearch()
        again.resume(search.state())
        search = again
        search.end_pass()
    found = search.finish()
    assert found.tensors["induction"].shape == (3, 4) and bool(found.tensors["induction"][2].isnan().all())
    assert found.report["best_induction"] > 0.9 and found.report["layers"] == 2
    path = folder(Profile("razor_attention", tensors=found.tensors))
    got = RazorAttention(profile=path, induction=0.2, echo=0.0).retrieval(3, 4)
    assert got.nonzero().tolist() == [[0, 0], [1, 3]]


def test_text_is_refused():
    q, k, v = qkv(1, 2, 1, 97)
    with pytest.raises(ConfigError, match="4 copies of the same random tokens, and this prompt of 97 tokens is"):
        EchoSearch().see(call(q, k, v), q, None)


class Words:
    """As much of a tokenizer as is asked for."""

    all_special_ids = (10_001,)

    def __len__(self):
        return 50_000

    def __call__(self, text, **more):
        return {"input_ids": [7]}


def test_prompts():
    """Four copies behind the first token, no special ids, deterministic; the published range where there is room for it."""
    a, b = (EchoSearch().prompts(Words(), 10_001, 2, 5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a[0], a[1])
    ids = a[0][0]
    assert ids.shape == (10_001,) and ids[0] == 7 and torch.equal(ids[1:2501], ids[7501:])
    assert int(ids[1:].min()) >= 10_000 and int(ids.max()) < 12_500 and 10_001 not in ids.tolist()
    small = repeated(100, 43, 0, [], {99})
    assert small.shape == (1, 40) and int(small.min()) >= 50 and int(small.max()) < 99
    with pytest.raises(ConfigError, match="expected at least 9 tokens"):
        repeated(100, 7, 0, [1], set())


def test_a_model_is_scored():
    """End to end on a tiny model through the capture of `foveate calibrate`: every layer is shown, scores are finite."""
    from foveate.calibrate.capture import each_layer
    from tests.tiny import llama

    model = llama()
    search = EchoSearch()
    ids = repeated(101, 121, 0, [1], {0, 1, 2})
    each_layer(model, ids, lambda x, out: search.see(x, out, None))
    found = search.finish()
    for score in found.tensors.values():
        assert score.shape == (3, 2) and bool(((score > 0) & (score < 1)).all())


def test_the_command_calibrates_it(tmp_path):
    """The loop asks the search for its own prompts; texts are for the held-out check."""
    from foveate.calibrate import run as calibrate
    from foveate.models import load
    from foveate.recipe import Recipe as R
    from tests.tiny import save_model

    model, tokenizer = load(save_model(tmp_path / "model"), device="cpu", dtype="fp32")
    found = calibrate(model, tokenizer, "razor_attention", out=tmp_path / "razor", length=64, samples=2, held=1)
    assert found.method == "razor_attention" and found.tensors
    R.of(f"razor_attention:profile={tmp_path / 'razor'}")
