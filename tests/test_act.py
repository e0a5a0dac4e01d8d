"""ACT against the explicit arithmetic of its card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.errors import ConfigError
from foveate.methods.act import ACT, Sinks
from foveate.methods.base import State
from foveate.methods.search import Target
from foveate.profile import Profile
from foveate.recipe import Recipe
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.prompts import call


def planted(h=4, g=2, n=90, at=(0, 17, 40), seed=0):
    """Every query looks strongly at a few keys."""
    q, k, v = qkv(1, h, g, n, seed=seed)
    for j, size in zip(at, (2.0, 3.0, 2.0), strict=False):
        k[:, :, j] = 0
        k[:, :, j, j % 16] = 2.5 * size
        q[:, :, :, j % 16] = q[:, :, :, j % 16].abs() + 0.8
    return q, k, v


def attention(q, k, scale):
    """fp64 `[H, N, N]`, causal."""
    h, n = q.shape[1], q.shape[2]
    s = q[0].double() @ k[0].double().repeat_interleave(h // k.shape[1], 0).mT * scale
    return s.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)


def hidden(a, rows, theta):
    """Card, steps 1 and 2, for each head: the columns whose mean over the rows < `rows` that see them exceeds theta."""
    out = []
    for head in a:
        means = [float(head[j:rows, j].sum()) / (rows - j) for j in range(rows)]
        out.append({j for j, m in enumerate(means) if m > theta and j > 0})
    return out


def explicit(a, v, sinks, beta):
    """Card, steps 3 and 4, row by row."""
    out, r = a.clone(), a.shape[0] // v.shape[1]
    for h, columns in enumerate(sinks):
        sink = torch.tensor([j in columns for j in range(a.shape[2])])
        for i in range(a.shape[1]):
            w = (1 - beta) * a[h, i, sink].sum()
            out[h, i, sink] = beta * a[h, i, sink]
            out[h, i, ~sink] = a[h, i, ~sink] + w * a[h, i, ~sink] / a[h, i, ~sink].sum()
    torch.testing.assert_close(out.sum(-1), torch.ones(a.shape[:2], dtype=torch.float64))  # rows keep their sum
    return out @ v[0].double().repeat_interleave(r, 0)


@pytest.mark.parametrize("h,g", [(3, 3), (6, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_prefill_is_the_card(h, g, backend):
    q, k, v = planted(h, g)
    a = attention(q, k, 0.25)
    sinks = hidden(a, 90, 0.1)
    assert all({17} <= s for s in sinks)
    drive = Drive("act", backend=backend)
    got = drive(q, k, v)
    torch.testing.assert_close(got[0], explicit(a, v, sinks, 0.4).float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, oracle(q, (k, v)), atol=1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hidden_sinks_index_by_index(case):
    q, k, v, _ = case.make()
    method, state = ACT(theta=0.03), State()
    x = replace(call(q, k, v), layer=2, layers=5)
    out, _, _ = method.attend(x, method.plan(x, state), state)
    a = attention(q, k, x.scale)
    want = hidden(a, 300, 0.03)
    found = state.layer["act.sinks"]
    for h in range(q.shape[1]):
        assert found.index[0, h, : int(found.count[0, h])].tolist() == sorted(want[h])
    torch.testing.assert_close(out[0], explicit(a, v, want, 0.4).float(), atol=2e-5, rtol=2e-5)


def test_paged_storage():
    q, k, v = planted(n=93)
    got = []
    for storage in ("dense", "paged"):
        drive = Drive(replace(Recipe.of("act"), storage=storage), backend="torch")
        got.append(torch.cat([drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 60), (60, 92), (92, 93))], 2))
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-5)


def test_beta_one_and_no_sink_are_the_identity():
    q, k, v = planted()
    want = oracle(q, (k, v))
    for text in ("act:beta=1.0", "act:theta=1.0"):
        torch.testing.assert_close(Drive(text)(q, k, v), want, atol=1e-5, rtol=1e-5)
    for layer in (0, 1, 3):  # of four layers only the third has calibrated heads
        torch.testing.assert_close(Drive("act", layer=layer)(q, k, v), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(Drive("act", layer=2)(q, k, v), want, atol=1e-2)


def test_position_zero_is_exempt_even_if_it_is_no_sink():
    """The published code exempts the first sink it finds, whatever it is."""
    q, k, v = planted(at=(17,))
    a = attention(q, k, 0.25)
    assert float(a[:, :, 0].mean()) < 0.1
    drive = Drive("act")
    drive(q, k, v)
    found = drive.cache.rows[0]["act.sinks"]
    assert all(17 in found.index[0, h, : int(found.count[0, h])].tolist() for h in range(4))


def test_decode_keeps_the_sinks_of_the_prompt():
    q, k, v = planted(n=100)
    a = attention(q, k, 0.25)
    sinks = hidden(a, 90, 0.1)
    want = explicit(a, v, sinks, 0.4).float()
    drive = Drive("act")
    drive(*(t[:, :, :90] for t in (q, k, v)))
    got = torch.cat([drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(90, 100)], 2)
    torch.testing.assert_close(got[0], want[:, 90:], atol=1e-5, rtol=1e-5)
    drive.cache.truncate(10)  # and after a rollback, and in a fork
    other = Drive("act")
    other.cache = drive.cache.fork()
    for d in (drive, other):
        step = d(*(t[:, :, 90:91] for t in (q, k, v)))
        torch.testing.assert_close(step[0], want[:, 90:91], atol=1e-5, rtol=1e-5)


def test_chunks_continue_the_means():
    """The second chunk's rows are calibrated by the means over both; decode then equals that after a whole prompt."""
    q, k, v = planted(n=95)
    a = attention(q, k, 0.25)
    drive, whole = Drive("act"), Drive("act")
    first = drive(*(t[:, :, :50] for t in (q, k, v)))
    second = drive(*(t[:, :, 50:94] for t in (q, k, v)))
    torch.testing.assert_close(first[0], explicit(a, v, hidden(a, 50, 0.1), 0.4).float()[:, :50], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second[0], explicit(a, v, hidden(a, 94, 0.1), 0.4).float()[:, 50:94], atol=1e-5, rtol=1e-5)
    whole(*(t[:, :, :94] for t in (q, k, v)))
    torch.testing.assert_close(*(d(*(t[:, :, 94:] for t in (q, k, v))) for d in (drive, whole)), atol=1e-5, rtol=1e-5)


def test_a_second_prompt_part_renews_what_decode_uses():
    q, k, v = planted(n=80, at=(0, 17))
    k[:, :, 45], q[:, :, 46:, 9] = 0, 2.0
    k[:, :, 45, 9] = 9.0  # a sink of the second part
    drive, whole = Drive("act"), Drive("act")
    drive(*(t[:, :, :40] for t in (q, k, v)))
    drive(*(t[:, :, 40:41] for t in (q, k, v)))
    drive(*(t[:, :, 41:79] for t in (q, k, v)))
    whole(*(t[:, :, :79] for t in (q, k, v)))
    found = drive.cache.rows[0]["act.sinks"]
    assert all(45 in found.index[0, h, : int(found.count[0, h])].tolist() for h in range(4))
    got = [d(*(t[:, :, 79:] for t in (q, k, v))) for d in (drive, whole)]
    torch.testing.assert_close(*got, atol=2e-3, rtol=2e-3)  # one row less in the means: the same sinks


@pytest.mark.parametrize("cache", ["kivi:bits=16", "kivi:bits=8,group=16,residual=32", "think:ratio=0.2,window=8"])
@pytest.mark.parametrize("lens", [(90,), (90, 60)])
def test_a_cache_that_stores_all_entries_otherwise_keeps_the_sinks(cache, lens):
    """Such a policy selects all entries after each prompt: nothing gets another number, so sinks and means stay."""
    parts = [planted(n=112, at=(90 - n, 107 - n), seed=b) for b, n in enumerate(lens)]
    q, k, v = (torch.cat(t) for t in zip(*parts, strict=True))
    valid = torch.arange(90) >= torch.tensor([[90 - n] for n in lens])
    plain, stored = Drive("act"), Drive(f"act+cache={cache}")
    for d in (plain, stored):
        d(*(t[:, :, :90] for t in (q, k, v)), valid=valid)
        d(*(t[:, :, 90:91] for t in (q, k, v)))
    for one, other in zip(plain.cache.rows, stored.cache.rows, strict=True):
        assert torch.equal(one["act.sinks"].index, other["act.sinks"].index) and int(one["act.sinks"].count.max()) > 0
    uncalibrated = Drive(f"dense+cache={cache}")
    uncalibrated(*(t[:, :, :90] for t in (q, k, v)), valid=valid)
    got, without = stored.last[2], uncalibrated(*(t[:, :, 90:91] for t in (q, k, v)))
    assert all(float(row.abs().max()) > 0.05 for row in got - without)  # every row's step is calibrated
    if "bits=16" in cache:
        assert torch.equal(plain.last[2], got)
    for d in (plain, stored):  # a second part of the prompt continues the means
        d(*(t[:, :, 91:111] for t in (q, k, v)))
    for one, other in zip(plain.cache.rows, stored.cache.rows, strict=True):
        assert one["act.sinks"].mass.shape == other["act.sinks"].mass.shape
        exact = "bits=16" in cache  # else the second part read stored keys, and the means are those of them
        close = {} if exact else dict(atol=1.0, rtol=0.1)
        torch.testing.assert_close(one["act.sinks"].mass, other["act.sinks"].mass, **close)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_have_their_own_sinks(side):
    rows = [planted(n=92, at=(0, 17), seed=1), planted(n=92, at=(0, 30, 50), seed=2)]
    lens, valid = (90, 60), torch.zeros(2, 90, dtype=torch.bool)
    both = [torch.zeros(2, *t.shape[1:]) for t in rows[0]]
    for b, n in enumerate(lens):
        here = slice(90 - n, 90) if side == "left" else slice(0, n)
        valid[b, here] = True
        for t, one in zip(both, rows[b], strict=True):
            t[b, :, :90][:, here], t[b, :, 90:] = one[0, :, :n], one[0, :, n : n + 2]
    batch = Drive("act")
    batch(*(t[:, :, :90] for t in both), valid=valid)
    steps = [batch(*(t[:, :, i : i + 1] for t in both)) for i in (90, 91)]
    for b, n in enumerate(lens):
        alone = Drive("act")
        alone(*(t[:, :, :n] for t in rows[b]))
        for i, step in enumerate(steps):
            want = alone(*(t[:, :, n + i : n + i + 1] for t in rows[b]))
            torch.testing.assert_close(step[b : b + 1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale,share", [(1.0, 0.98), (8.0, 1 - 1e-9)])
def test_rows_with_nearly_all_mass_on_sinks_lose_no_digits(scale, share):
    """The form with dense - sinks divides by 1 - f, which rounds to 0 here."""
    q, k, v = planted()
    q, want = q * scale, oracle(q * scale, (k, v))
    a = attention(q, k, 0.25)
    sinks = hidden(a, 90, 0.1)
    inside = torch.stack([a[h][:, sorted(s)].sum(-1) for h, s in enumerate(sinks)])
    assert float(inside.max()) > share
    got = Drive("act")(q, k, v)
    torch.testing.assert_close(got[0], explicit(a, v, sinks, 0.4).float(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, want, atol=1e-2)


def test_the_width_of_the_list_is_enough():
    """As many keys over theta as there can be: the last ones, each just above it."""
    n = 400
    x = replace(call(*(torch.zeros(1, 1, n, 2),) * 3), layer=2, layers=5)
    for theta in (0.1, 0.01):
        rows = torch.arange(n, 0, -1).float()
        mass, left = torch.zeros(n), float(n)
        for j in reversed(range(n)):
            if left < theta * 1.01 * rows[j]:
                break
            mass[j] = theta * 1.01 * rows[j]
            left -= float(mass[j])
        index, count = Sinks().add(x, mass[None, None], theta)
        assert int(count) == int((mass[1:] > 0).sum()) <= index.shape[-1]


def test_profile_and_head_search(tmp_path):
    """Heads whose calibration lowers the loss, found from its gradient; the profile then calibrates them alone."""
    q, k, v = planted(n=60)
    x = replace(call(q, k, v), layers=5)
    method = ACT()
    plain = oracle(q, (k, v))
    a = attention(q, k, x.scale)
    moved = explicit(a, v, hidden(a, 60, 0.1), 0.4).float()[None]
    goal = torch.where(torch.tensor([True, False, True, False])[:, None, None], moved, 2 * plain - moved)
    search = method.search(Target())
    for layer in range(5):
        search.see(replace(x, layer=layer), plain, plain - goal)  # the gradient of half the squared distance to a goal
    with pytest.raises(ConfigError, match="gradient"):
        search.see(x, plain, None)
    again = method.search(Target())
    again.resume(search.state())
    again.end_pass()
    found = again.finish()
    assert found.tensors["heads"].tolist() == [[False] * 4] * 2 + [[True, False, True, False]] * 2 + [[False] * 4]
    assert found.report["heads"] == 4 and found.report["predicted_change"] < 0 and again.prompts == 1
    for layer in (2, 3):  # a second prompt, the same one; not all layers are shown
        again.see(replace(x, layer=layer), plain, plain - goal)
    assert again.prompts == 2
    torch.testing.assert_close(again.finish().tensors["change"], found.tensors["change"])
    path = str(Profile("act", tensors=found.tensors).save(tmp_path / "p"))
    drive = Drive(ACT(profile=path), layers=5, layer=2)
    torch.testing.assert_close(drive(q, k, v)[0, ::2], moved[0, ::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drive.watch.calls[0][2][0, 1::2], plain[0, 1::2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"heads of shape \[4, 4\], got \[5, 4\]"):
        Drive(ACT(profile=path), layers=4)(q, k, v)


def test_bad_options():
    shared = "act+heads=duo_attention:sparsity=1"  # would report the plan of those heads and compute another
    bad = {"act:beta=1.5": "beta", "act:theta=0": "theta", "act+cache=snapkv": "evicts", shared: "computes all heads"}
    for text, words in bad.items():
        with pytest.raises(ConfigError, match=words):
            Recipe.of(text)
    assert parse("act").describe() == "act:beta=0.4,theta=0.1,profile=None"
