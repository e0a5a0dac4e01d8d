"""Double Sparsity against a slow transcription of its card, its labels, and its calibration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import foveate
from foveate import calibrate, models
from foveate.cache import DenseStore, PagedStore
from foveate.cache.fixed import fix
from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.double_sparsity import LABELS, DoubleSparsity
from foveate.methods.double_sparsity_search import OutlierChannels
from foveate.methods.search import Target
from foveate.methods.topk_exact import TopKExact
from foveate.profile import Profile
from foveate.registry import parse
from foveate.scores import labels
from foveate.scores.labels import Channels, Codes, dequantise, quantise
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES
from tests.models import generate, tokens
from tests.profiles import folder
from tests.prompts import call, listed
from tests.tiny import save_model

NAN = float("nan")


def profile(order, layers=4, **options):
    """A profile whose order of channels [G, D] serves all layers."""
    return folder(Profile("double_sparsity", options=options, tensors={"channels": order.int().expand(layers, -1, -1)}))


def some_order(g, d, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(d, generator=gen) for _ in range(g)])


# ---------------------------------------------------------------------- slow transcription
def rounded(x, bits):
    """The card's quantiser on a list of numbers, and back."""
    if bits == 16:
        return x
    low, high = min(x), max(x)
    width = high - low if high > low else 1.0
    top = 2**bits - 1
    return [low + math.floor((v - low) / width * top + 0.5) * width / top for v in x]


def guessed(keys, r):
    """Channels of the largest mean magnitude of the first keys; equal ones in order."""
    mean = keys[: labels.SAMPLE].abs().mean(0).tolist()
    return sorted(range(len(mean)), key=lambda c: (-mean[c], c))[:r]


def slow_list(queries, keys, channels, budget, bits):
    """Entries for the query heads [r, D] that share a list, over keys [M, D] of their kv head."""
    m = len(keys)
    label = [rounded([k[c] for c in channels], bits) for k in keys.tolist()]
    mine = [rounded([q[c] for c in channels], bits) for q in queries.tolist()]
    score = [max(sum(a * b for a, b in zip(q, k, strict=True)) for q in mine) for k in label]
    ranked = sorted(range(m), key=lambda j: (j != m - 1, -score[j], j))
    return sorted(ranked[:budget])


def plan(q, kv, step=0, **options):
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), step=step, q_pos=kv.lengths().amax(1)[:, None] - 1)
    return DoubleSparsity(**options).plan(x, State())


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("options", [dict(bits=2), dict(bits=4, group_factor=4), dict(bits=16, share="group"), dict(bits=8)])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, options, calibrated):
    """Index by index, a prompt and two steps through the runtime, with calibrated channels and with guessed ones."""
    q, k, v, _ = (t[:, :, :120].double() if isinstance(t, torch.Tensor) else t for t in case.make())
    h, g, d = q.shape[1], k.shape[1], q.shape[3]
    order, n = some_order(g, d), d // options.get("group_factor", 2)
    text = ",".join(f"{a}={o}" for a, o in dict(budget=20, **options).items())
    drive = Drive(f"double_sparsity:{text}" + (f",profile={profile(order)}" if calibrated else ""), d=d)
    drive(*(t[:, :, :118] for t in (q, k, v)))
    for i in (118, 119):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    assert calibrated == (not drive.notes)
    layout, r = drive.last[1], h // g
    layout.validate()
    for a in range(layout.entries.shape[1]):
        heads, at = (list(range(a * r, a * r + r)), a) if options.get("share") == "group" else ([a], a // r)
        channels = order[at, :n].tolist() if calibrated else guessed(k[0, at], n)
        want = slow_list(q[0, heads, 119], k[0, at], channels, 20, options["bits"])
        assert listed(layout.entries[0, a, 0], layout.entry_count[0, a, 0]) == want


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (4, 1), (8, 1), (6, 2)])
def test_all_channels_as_they_are_is_exact_top_k(h, g):
    q, k, v = qkv(2, h, g, 90, dtype=torch.float64)
    kv = KV.dense(k, v)
    got = plan(q[:, :, -1:], kv, budget=17, group_factor=1, bits=16)
    x = AttnInput(q[:, :, -1:], kv, "decode", 2, 4, 0.25, q_pos=torch.full((2, 1), 89))
    assert torch.equal(got.to_mask(), TopKExact(budget=17).plan(x, State()).to_mask())
    own = plan(q[:, :, -1:], KV.dense(torch.cat([k[:, :, :-1], -q[:, :: h // g, -1:]], 2), v), budget=5)
    assert bool(own.to_mask()[..., -1].all())  # a key that points away from its query stays in


def test_budget_of_everything_is_dense():
    q, k, v = qkv(2, 4, 2, 70)
    drive = Drive("double_sparsity:budget=70,group_factor=1,bits=16")
    drive(*(t[:, :, :69] for t in (q, k, v)))
    got = drive(*(t[:, :, 69:] for t in (q, k, v)))
    torch.testing.assert_close(got, oracle(q, (k, v))[:, :, 69:], atol=1e-5, rtol=1e-5)
    # k > M: rows shorter than the budget list what they have and nothing else
    store = DenseStore.empty(k, v).append(k, v, torch.arange(70) < torch.tensor([[9], [70]]), [0, 0])
    store.k[0, :, 9:] = NAN
    layout = plan(q[:, :, -1:], store.view(), budget=30)
    assert layout.entry_count[:, :, 0].tolist() == [[9] * 4, [30] * 4]
    assert layout.entries[0, :, 0, :9].tolist() == [list(range(9))] * 4 and int(layout.entries[0].max()) < 70


def test_a_needle_on_the_channels_is_found_and_one_beside_them_is_not():
    d = 32
    order = torch.arange(d).expand(2, d)
    q, k, v = (t * 0.1 for t in qkv(1, 4, 2, 200, d=d))
    for channel, seen in ((3, True), (20, False)):
        q2, k2 = q.clone(), k.clone()
        q2[..., channel], k2[:, :, 57, channel] = 9.0, 9.0
        got = plan(q2[:, :, -1:], KV.dense(k2, v), budget=10, profile=profile(order)).to_mask()[0, :, 0, 57]
        assert bool(got.all()) == seen and bool(got.any()) == seen


def test_permuted_channels_change_nothing():
    d = 16
    q, k, v = qkv(1, 4, 2, 100, d=d, dtype=torch.float64)
    order = some_order(2, d)
    move = torch.randperm(d, generator=torch.Generator().manual_seed(3))  # new channel i is the old move[i]
    where = move.argsort()
    for bits in (2, 16):
        a = plan(q[:, :, -1:], KV.dense(k, v), budget=12, bits=bits, profile=profile(order))
        b = plan(q[:, :, -1:][..., move], KV.dense(k[..., move], v), budget=12, bits=bits, profile=profile(where[order]))
        assert torch.equal(a.to_mask(), b.to_mask())


def test_heads_of_one_share_what_heads_of_their_own_have():
    """A model of 4 heads with a kv head each, and the same keys as groups of one."""
    q, k, v = qkv(1, 4, 4, 100)
    order = some_order(4, 16)
    a = plan(q[:, :, -1:], KV.dense(k, v), budget=12, profile=profile(order))
    b = plan(q[:, :, -1:], KV.dense(k, v), budget=12, share="group", profile=profile(order))
    assert torch.equal(a.to_mask(), b.to_mask())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 16])
def test_quantiser(bits, dtype, r):
    """Half a step at most; equal numbers come back as they are; packed to r * bits / 8 bytes."""
    x = (3 * qkv(1, 1, 1, 200, d=r)[0] + 2).to(dtype)
    x[:, :, 7] = 1.25
    packed, scale = quantise(x, bits)
    back = dequantise(packed, scale, r, bits)
    low, step = scale[..., :1].double(), scale[..., 1:].double()
    slack = 2e-3 * (x.double().amax(-1, keepdim=True) - low).abs() if dtype == torch.bfloat16 else 1e-6
    assert bool(((back.double() - x.double()).abs() <= step / 2 + slack).all())
    assert torch.equal(back[:, :, 7], torch.full_like(back[:, :, 7], 1.25))
    assert packed.shape[-1] == -(-r * bits // 8) and packed.dtype == torch.uint8
    assert scale.dtype == (torch.float16 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("bits", [2, 16])
def test_score_is_the_product_of_what_is_stored(bits, monkeypatch):
    q, k, v = qkv(2, 4, 2, 60, dtype=torch.float64)
    held = Channels(6, bits, some_order(2, 16)[:, :6])
    held.update(KV.dense(k, v), 0)
    cut = lambda t, g: t[..., held.basis[0, g]]  # noqa: E731
    for g in range(2):
        mine, keys = cut(q[:, 2 * g : 2 * g + 2, -1:], g), cut(k[:, g : g + 1], g)
        if bits == 2:
            mine, keys = (dequantise(*quantise(t, 2), 6, 2) for t in (mine, keys))
        torch.testing.assert_close(held.score(q[:, :, -1:])[:, g], (mine @ keys.transpose(-1, -2))[:, :, 0])
    want = held.score(q[:, :, -1:])
    monkeypatch.setattr(labels, "pieces", lambda total, cost: ((i, min(i + 7, total)) for i in range(0, total, 7)))
    torch.testing.assert_close(held.score(q[:, :, -1:]), want)


def test_memory_of_the_labels():
    """1/16 of fp16 keys: 2 bits of half of the channels, and four bytes a key for minimum and step."""
    _, k, v = qkv(1, 2, 2, 2000, d=128, dtype=torch.float16)
    held = Channels(64, 2, torch.arange(64).expand(2, 64))
    held.update(KV.dense(k, v), 0)
    assert sum(t.shape[-1] * t.element_size() for t in held.data) == 64 * 2 // 8 + 4
    assert held.nbytes <= 1.2 * 2 * 2000 * 20 and held.nbytes < 0.1 * k.numel() * 2


# ---------------------------------------------------------------------- beside the cache
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", ["dense", "paged", "fixed"])
def test_labels_follow_the_cache(kind, calibrated):
    """Prompt with padding, steps, rollback, a second turn: labels of what exists are those of the keys."""
    lens = [70, 33, 95]
    _, k, v = qkv(3, 4, 2, 200)
    store = (PagedStore.empty(k, v, 8) if kind == "paged" else DenseStore.empty(k, v)).append(
        k[:, :, :95], v[:, :, :95], torch.arange(95) < torch.tensor(lens)[:, None], [0] * 3
    )
    store = fix(store, lens) if kind == "fixed" else store
    make = lambda: Channels(6, 4, some_order(2, 16)[:, :6] if calibrated else None)  # noqa: E731
    held, at = make(), 95

    def check():
        fresh, kv = make(), store.view()
        fresh.update(kv, 0)
        live = kv.exists()[..., None]
        for a, b in zip(fresh.data, held.data, strict=True):
            assert torch.equal(*(t[:, :, : kv.capacity].masked_fill(~live, 0) for t in (a, b)))

    def steps(n, first):
        nonlocal store, at, lens
        for number in range(first, first + n):
            store = store.append(k[:, :, at : at + 1], v[:, :, at : at + 1], None, lens)
            at, lens = at + 1, [s + 1 for s in lens]
            held.update(store.view(), number)
            check()

    steps(6, 0)
    store.truncate(4)
    held.truncate(4)
    lens = [s - 4 for s in lens]
    steps(3, 2)
    # more turns: of any lengths, then without a token for the longest row, then to rows of one length
    for fill in ((9, 1, 4), (9, 1, 0), None):
        counts = fill or [max(lens) - n for n in lens]
        wide = max(counts)
        new = torch.arange(wide) < torch.tensor(counts)[:, None]
        store = store.append(k[:, :, at : at + wide], v[:, :, at : at + wide], new, lens)
        at, lens = at + wide, [a + b for a, b in zip(lens, counts, strict=True)]
        steps(3, 0)
    assert len(set(lens)) == 1


@pytest.mark.parametrize("make", [lambda: Channels(6, 4), lambda: Codes(16, 0.5, True, torch.device("cpu"))])
@pytest.mark.parametrize("back,new", [(3, 5), (20, 1), (20, 40)])
def test_rollback_and_other_tokens(make, back, new):
    """As many tokens as were forgotten, or more, and fewer than a guess is made from: labels of the keys there are."""
    _, k, v = qkv(1, 2, 2, 200)
    store, held = DenseStore.empty(k, v).append(k[:, :, :75], v[:, :, :75], None, [0]), make()
    held.update(store.view(), 0)
    store.truncate(back)
    held.truncate(back)
    store = store.append(k[:, :, 100 : 100 + new], v[:, :, 100 : 100 + new], None, [75 - back])
    held.update(store.view(), 0)
    fresh = make()
    fresh.update(store.view(), 0)
    assert torch.equal(fresh.basis, held.basis)
    for a, b in zip(fresh.data, held.data, strict=True):
        assert torch.equal(*(t[:, :, : store.lens[0][0]] for t in (a, b)))


@pytest.mark.parametrize("make", [lambda: Channels(6, 4), lambda: Codes(16, 0.5, True, torch.device("cpu"))])
def test_a_guess_is_made_from_a_rows_own_keys(make):
    """A row shorter than the sample, beside a longer one and unused slots of NaN, guesses what it would alone."""
    _, k, v = qkv(2, 2, 2, 90)
    store = DenseStore.empty(k, v).append(k, v, torch.arange(90) < torch.tensor([[90], [33]]), [0, 0])
    store.k[1, :, 33:] = NAN
    both, alone = make(), make()
    both.update(store.view(), 0)
    alone.update(KV.dense(k[1:, :, :33], v[1:, :, :33]), 0)
    torch.testing.assert_close(both.basis[1:], alone.basis)


def test_a_calibrated_step_asks_the_device_nothing(monkeypatch):
    q, k, v = qkv(2, 4, 2, 100)
    store = fix(DenseStore.empty(k, v).append(k[:, :, :90], v[:, :, :90], None, [0, 0]), [90, 90])
    method, state = DoubleSparsity(budget=16, profile=profile(some_order(2, 16))), State()
    for i in range(3):
        store = store.append(k[:, :, 90 + i : 91 + i], v[:, :, 90 + i : 91 + i], None, [90 + i] * 2)
        if i == 1:
            for name in ("__bool__", "item", "tolist", "__int__"):
                monkeypatch.setattr(torch.Tensor, name, lambda t: pytest.fail("looked at the device"))
        x = AttnInput(q[:, :, 90 + i : 91 + i], store.view(), "decode", 2, 4, 0.25, step=i, q_pos=torch.full((2, 1), 90 + i))
        layout = method.plan(x, state)
    monkeypatch.undo()
    assert method.phase(1) == "step" and DoubleSparsity().phase(1) == "step"
    assert bool((layout.to_mask(x.kv).sum(-1) == 16).all()) and bool(layout.to_mask(x.kv)[..., 92].all())


def test_beams_and_forks():
    q, k, v = qkv(2, 4, 2, 81)
    a = Drive("double_sparsity:budget=16")
    a(*(t[:, :, :80] for t in (q, k, v)))
    a(*(t[:, :, 80:] for t in (q, k, v)))
    b = Drive("double_sparsity:budget=16")
    b.cache = a.cache.fork()
    b.cache.reorder(torch.tensor([1, 0]))
    new = qkv(2, 4, 2, 1, seed=5)
    first, second = a(*new), b(*(t[[1, 0]] for t in new))
    torch.testing.assert_close(second[[1, 0]], first)
    assert a.cache.batch[LABELS].data[0] is not b.cache.batch[LABELS].data[0]


# ---------------------------------------------------------------------- calibration
def seen(channel, shapes=(("a", 40), ("b", 70)), layers=2, h=6, g=2):
    """A search that was shown some prompts, and the prompts."""
    search, calls = OutlierChannels(DoubleSparsity(channel=channel)), []
    for number, (_, m) in enumerate(shapes):
        for layer in range(layers):
            q, k, v = qkv(1, h, g, m, seed=10 * number + layer)
            x = replace(call(q * (number + 1), k, v, layer=layer, layers=layers), rope=Rotary(16))
            search.see(x, v, None)
            calls.append(x)
    search.end_pass()
    return search, calls


def slow_statistic(calls, channel, layer, group):
    """Mean over the tokens of all prompts, token by token; of the heads of a group, the sum."""
    total, tokens = [0.0] * 16, 0
    for x in calls:
        if x.layer != layer:
            continue
        pos = torch.arange(x.q.shape[2])[None]
        q, k = x.q, x.kv.k
        if channel in ("q", "k"):
            q, k = x.rope.unrotate(q, pos), x.rope.unrotate(k, pos)
        heads = range(3 * group, 3 * group + 3)
        for t in range(x.q.shape[2]):
            tokens += 1
            for c in range(16):
                if channel == "k":
                    total[c] += abs(float(k[0, group, t, c]))
                for h in heads if channel != "k" else ():
                    total[c] += abs(float(q[0, h, t, c]) * (float(k[0, group, t, c]) if channel == "qk" else 1.0))
    return torch.tensor([v / tokens for v in total])


@pytest.mark.parametrize("channel", ["q", "k", "qk"])
def test_calibration_is_the_card(channel):
    """All prompts count, the first as well: the published code keeps the last one's |q k|."""
    search, calls = seen(channel)
    found = search.finish()
    for layer in range(2):
        for group in range(2):
            want = slow_statistic(calls, channel, layer, group)
            torch.testing.assert_close(found.tensors["statistic"][layer, group], want, atol=1e-4, rtol=1e-4)
            got = found.tensors["channels"][layer, group].long()
            assert (want[got].diff() <= 1e-4).all() and sorted(got.tolist()) == list(range(16))
    assert found.options == {"channel": channel} and found.report["tokens"] == 110
    assert 0.5 < found.report["worst_share"] <= found.report["share"] < 1
    last = slow_statistic(calls[2:], channel, 0, 0)
    assert channel == "k" or (found.tensors["statistic"][0, 0] - last).abs().max() > 0.05


def test_a_profile_of_the_search_serves_the_method(tmp_path):
    search, calls = seen("qk")
    again = OutlierChannels(DoubleSparsity(channel="qk"))
    again.resume(search.state())
    found = again.finish()
    path = str(Profile("double_sparsity", options=found.options, tensors=found.tensors).save(tmp_path))
    with pytest.raises(ConfigError, match="channel expected 'qk' like the profile, got 'q'"):
        DoubleSparsity(profile=path)
    x = replace(calls[0], q=calls[0].q[:, :, -1:], phase="decode", q_pos=torch.tensor([[39]]))
    layout = DoubleSparsity(profile=path, channel="qk", budget=9, dense_layers=0, bits=16).plan(x, State())
    want = slow_list(x.q[0, [4], 0], x.kv.k[0, 1], found.tensors["channels"][0, 1, :8].tolist(), 9, 16)
    assert listed(layout.entries[0, 4, 0], layout.entry_count[0, 4, 0]) == want
    assert isinstance(DoubleSparsity().search(Target()), OutlierChannels)


def test_outlier_channels_keep_what_matters():
    """Channels that carry the logits come first, by every statistic, and half of them then finds what all would."""
    loud = torch.ones(16)
    loud[[2, 11, 13]] = 8.0
    for channel in ("q", "k", "qk"):
        search = OutlierChannels(DoubleSparsity(channel=channel))
        q, k, v = qkv(1, 4, 2, 200)
        turn = Rotary(16)
        pos = torch.arange(200)[None]
        q, k = turn.rotate(q * loud, pos), turn.rotate(k * loud, pos)
        search.see(replace(call(q, k, v), rope=turn), v, None)
        first = search.finish().tensors["channels"][0, :, :8].tolist()
        assert all({2, 11, 13} <= set(row) for row in first)


def test_foveate_calibrate_makes_a_profile_that_a_model_runs_with(tmp_path):
    """Through the loop of `foveate calibrate` on a tiny model, whose captured queries are rotated; then ten tokens."""
    model, tokenizer = models.load(save_model(tmp_path / "model"), device="cpu", dtype="fp32")
    (tmp_path / "text.txt").write_text(" ".join(f"line {i} of {i * i % 97} words." for i in range(150)))
    name = "double_sparsity:budget=16,dense_layers=0,bits=4"
    how = dict(target="recall=0.5", length=140, samples=2, held=1, data=[tmp_path / "text.txt"])
    found = calibrate.run(model, tokenizer, name, out=tmp_path / "plan", **how)
    config = model.config
    want = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    assert tuple(found.tensors["channels"].shape) == want and found.options == {"channel": "q"}
    assert found.report["search"]["tokens"] >= 2 * 135
    handle = foveate.apply(model, f"{name},profile={tmp_path / 'plan'}")
    said = generate(model, tokens(1, 90), max_new_tokens=10, min_new_tokens=10).sequences
    assert said.shape[1] == 100 and not any("guess" in note for note in handle.notes)


def test_errors_of_the_calibration():
    with pytest.raises(ConfigError, match="shown no token"):
        OutlierChannels(DoubleSparsity()).finish()
    q, k, v = qkv(1, 2, 1, 20)
    with pytest.raises(UnsupportedError, match="take channel=qk"):
        OutlierChannels(DoubleSparsity()).see(call(q, k, v), v, None)


# ---------------------------------------------------------------------- options
def test_options():
    assert parse("double_sparsity@speed") == DoubleSparsity(budget=256, group_factor=4, bits=16)
    first = DoubleSparsity()
    assert (first.group_factor, first.bits, first.channel, first.dense_layers) == (2, 2, "q", 2)
    for text, what in (
        ("double_sparsity:budget=0", "budget expected >= 1"),
        ("double_sparsity:bits=3", "bits expected one of 2, 4, 8, 16, got 3"),
        ("double_sparsity:channel=v", "channel expected one of q, k, qk"),
        ("double_sparsity:group_factor=0", "group_factor expected >= 1"),
        ("double_sparsity:profile=nowhere", "expected a folder with profile.json"),
        ("double_sparsity:share=vote", "share expected one of"),
    ):
        with pytest.raises(ConfigError, match=what):
            parse(text)


def test_profiles_that_do_not_fit():
    q, k, v = qkv(1, 4, 2, 50)
    kv = KV.dense(k, v)
    with pytest.raises(ConfigError, match="group_factor expected at most 16"):
        plan(q[:, :, -1:], kv, budget=8, group_factor=17)
    for order in (some_order(2, 8), some_order(1, 16)):
        with pytest.raises(ConfigError, match=r"channels \[layers, kv heads, head dim\] = \[4, 2, 16\], got"):
            plan(q[:, :, -1:], kv, budget=8, profile=profile(order))
    with pytest.raises(ConfigError, match=r"head dim\] = \[4, 2, 16\], got none"):
        plan(q[:, :, -1:], kv, budget=8, profile=folder(Profile("double_sparsity")))
    with pytest.raises(ConfigError, match="an order of all channels"):
        plan(q[:, :, -1:], kv, budget=8, profile=profile(torch.zeros(2, 16)))
