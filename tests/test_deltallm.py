"""DeltaLLM against a slow transcription of its card, token by token and row by row."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods.base import State
from foveate.methods.deltallm import DeltaLLM
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores import delta
from foveate.scores.delta import references, zero_share
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES
from tests.prompts import call, prompt


def slow_references(k, theta, before=None):
    """kref_t, one token and one element at a time (the elements as a vector)."""
    out, now = torch.empty_like(k), k[:, :, 0] if before is None else before
    for t in range(k.shape[2]):
        d = k[:, :, t].to(torch.promote_types(k.dtype, torch.float32)) - now
        now = torch.where(d.abs() >= theta, k[:, :, t], now)
        out[:, :, t] = now
    return out


def slow_attention(q, k, v, theta, window, scale, start=0, rope=None):
    """Row by row: exact logits at distances below the window, q . kref beyond; fp64. With a rope, deltas before it."""
    q, k, v = q.double(), k.double(), v.double()
    pos = torch.arange(k.shape[2])[None]
    ref = slow_references(k, theta) if rope is None else rope.rotate(slow_references(rope.unrotate(k, pos), theta), pos)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    r = q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            t = start + i
            keys = torch.where((t - torch.arange(t + 1) < window)[:, None], k[0, h // r, : t + 1], ref[0, h // r, : t + 1])
            out[0, h, i] = (scale * keys @ q[0, h, i]).softmax(-1) @ v[0, h // r, : t + 1]
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0, 4.0])
def test_references_are_the_recurrence(case, theta, monkeypatch):
    k = case.make()[1][:, :, :150]
    want = slow_references(k, theta)
    assert torch.equal(references(k, theta), want)
    half = k.bfloat16()
    assert torch.equal(references(half, theta), slow_references(half, theta))
    monkeypatch.setattr(delta, "MOST", 37 * delta.TABLES * k.shape[1] * k.shape[-1])  # pieces of 37 tokens
    assert torch.equal(references(k, theta), want)


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 200])
def test_references_of_any_length(n):
    k = torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(references(k, 0.8), slow_references(k, 0.8))
    whole = (2 * k).round()  # differences of exactly theta move the reference
    assert torch.equal(references(whole, 2.0), slow_references(whole, 2.0))


def test_a_carried_reference_changes_nothing():
    _, k, _, _ = CASES[-1].make()
    whole = references(k, 1.0)
    first = references(k[:, :, :77], 1.0)
    assert torch.equal(torch.cat([first, references(k[:, :, 77:], 1.0, first[:, :, -1])], 2), whole)
    assert not torch.equal(references(k[:, :, 77:], 1.0), whole[:, :, 77:])  # without it, another start


@pytest.mark.parametrize("theta", [0.2, 1.0, 3.0])
def test_errors_stay_below_theta(theta):
    """Element-wise at every token (errors never add up), and so logits within scale theta |q|_1."""
    q, k, _, _ = CASES[-1].make()
    ref = references(k, theta)
    gap = (k - ref).abs()
    assert float(gap.max()) < theta and float(gap.max()) > 0.5 * theta
    s, s2 = (q @ t.repeat_interleave(3, 1).transpose(-1, -2) * 0.125 for t in (k, ref))
    assert ((s - s2).abs() <= 0.125 * theta * q.abs().sum(-1, keepdim=True) + 1e-4).all()


def test_constant_keys_and_theta_zero():
    k = torch.randn(1, 2, 1, 8).expand(1, 2, 50, 8)
    torch.testing.assert_close(zero_share(references(k, 0.5)), torch.full((1, 2), 1 - 1 / 50))
    k = torch.randn(1, 2, 50, 8)
    assert torch.equal(references(k, 0.0), k) and zero_share(references(k, 0.0)).abs().max() < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("theta,window", [(1.0, 1), (0.6, 37)])
def test_prefill_in_chunks_and_decode_are_the_card(case, theta, window):
    q, k, v, _ = case.make()
    q, k, v = (t[:, :, :161] for t in (q, k, v))
    want = slow_attention(q, k, v, theta, window, case.scale)
    drive = Drive(f"deltallm:theta={theta},window={window}", d=q.shape[-1])
    cuts = (0, 70, 150, *range(151, 162))
    got = torch.cat([drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip(cuts, cuts[1:], strict=False)], 2)
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)
    exact = oracle(q, (k, v))
    assert (exact - want).abs().max() > 1e-3  # the approximation is there to be seen


@pytest.mark.parametrize("h,g", [(1, 1), (4, 1), (8, 1), (6, 2)])
def test_differences_before_the_rotation(h, g):
    """Prefill, then decode, where differences are taken of unrotated keys."""
    q, k, v = qkv(1, h, g, 60)
    rope = Rotary(16)
    want = slow_attention(q, k, v, 0.7, 10, 0.25, rope=rope)
    drive = Drive("deltallm:theta=0.7,window=10,rotated=false")
    steps = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 50), *((t, t + 1) for t in range(50, 60)))]
    torch.testing.assert_close(torch.cat(steps, 2), want.float(), atol=1e-4, rtol=1e-4)
    other = slow_attention(q, k, v, 0.7, 10, 0.25)
    assert (want - other).abs().max() > 1e-2


@pytest.mark.parametrize("text", ["theta=0", "theta=5,window=300"])
def test_exact_settings(text):
    q, k, v = qkv(1, 6, 2, 153)
    drive = Drive(f"deltallm:{text}")
    steps = [drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 150), (150, 151), (151, 152), (152, 153))]
    torch.testing.assert_close(torch.cat(steps, 2), oracle(q, (k, v)), atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_are_independent_in_decode():
    """Rows of different length, padding full of NaN, several steps, a rollback in between."""
    lens = (60, 41)
    q, k, v = qkv(2, 4, 2, 70)
    valid = torch.arange(60) >= torch.tensor([[60 - n] for n in lens])
    bad = [t[:, :, :60].masked_fill(~valid[:, None, :, None], float("nan")) for t in (q, k, v)]
    text = "deltallm:theta=0.8,window=2"
    batch, alone = Drive(text), [Drive(text) for _ in lens]
    batch(*bad, valid=valid)
    for b, d in enumerate(alone):
        d(*(t[b : b + 1, :, 60 - lens[b] : 60] for t in (q, k, v)))
    for i, at in enumerate((60, 61, 62, 63, 64, 65)):
        if i == 4:
            for d in (batch, *alone):
                d.cache.truncate(2)
        got = batch(*(t[:, :, at : at + 1] for t in (q, k, v)))
        for b, d in enumerate(alone):
            torch.testing.assert_close(
                got[b : b + 1], d(*(t[b : b + 1, :, at : at + 1] for t in (q, k, v))), atol=1e-5, rtol=1e-5
            )
    row = torch.cat([k[:1, :, :62], k[:1, :, 64:66]], 2)
    value = torch.cat([v[:1, :, :62], v[:1, :, 64:66]], 2)
    want = slow_attention(q[:1, :, 65:66], row, value, 0.8, 2, 0.25, start=63)
    torch.testing.assert_close(got[:1], want.float(), atol=1e-4, rtol=1e-4)


def test_a_decode_step_reads_one_key(monkeypatch):
    """References are computed once after the prompt and then one a step."""
    calls = []
    from foveate.methods import deltallm

    monkeypatch.setattr(deltallm, "references", lambda k, theta: calls.append(k.shape[2]) or references(k, theta))
    drive = Drive("decode=deltallm:theta=0.8,window=7")
    q, k, v = qkv(1, 4, 2, 60)
    for a, b in ((0, 50), *((t, t + 1) for t in range(50, 60))):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    assert calls == [51]


def test_paged_storage():
    q, k, v = qkv(1, 4, 2, 40)
    pools = [t.reshape(20, 4, 16) for t in (k, v)]
    table = torch.arange(20).view(1, 2, 10).int()
    kv = KV.paged(*pools, table, torch.tensor([[40, 40]]).int())
    method = parse("deltallm:theta=0.8,window=7")
    x = call(q, k, v, kv=kv)
    out, lse, mass = method.attend(x, x.dense(), State())
    torch.testing.assert_close(out, slow_attention(q, k, v, 0.8, 7, 0.25).float(), atol=1e-4, rtol=1e-4)
    assert lse.shape == q.shape[:3] and mass is None


def test_low_precision_and_softcap():
    q, k, v = (t.float() for t in prompt("peaked", m=80))
    method = parse("deltallm:theta=0.8,window=7")
    x = call(q, k, v)
    x.softcap = 2.0
    ref = slow_references(k, 0.8)
    s, s2 = (2 * torch.tanh(q @ t.repeat_interleave(2, 1).mT / math.sqrt(32) / 2) for t in (k, ref))
    far = torch.arange(80)[:, None] - torch.arange(80) >= 7
    p = torch.where(far, s2, s).masked_fill(torch.arange(80)[:, None] < torch.arange(80), -math.inf).softmax(-1)
    want = p @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(method.attend(x, x.dense(), State())[0], want, atol=1e-4, rtol=1e-4)
    half = [t.bfloat16() for t in (q, k, v)]
    x = call(*half)
    got = method.attend(x, x.dense(), State())[0]
    want = slow_attention(*half, 0.8, 7, 1 / math.sqrt(32))
    torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0.05)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="cannot leave some of them to another method"):
        Recipe.of("deltallm+heads=duo_attention:sparsity=1")
    with pytest.raises(ConfigError, match="references follow every key"):
        Recipe.of("deltallm+cache=snapkv")
    q, k, v = prompt("random", m=40)
    x = call(q, k, v)
    with pytest.raises(UnsupportedError, match="rotation"):
        parse("deltallm:rotated=false,window=3").attend(x, x.dense(), State())
    kv = KV.dense(k, v, pos=torch.arange(40).expand(1, 2, 40))
    said = []
    x = call(q, k, v, kv=kv)
    x.note = said.append
    out = parse("deltallm:theta=5,window=3").attend(x, x.dense(), State())[0]
    torch.testing.assert_close(out.float(), oracle(q, (k, v)))
    assert "evicted" in said[0]
    for text in ("theta=-1", "window=0", "rotated=2"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            parse(f"deltallm:{text}")
    assert (DeltaLLM().min_length, parse("deltallm@8k").window) == (129, 256)
