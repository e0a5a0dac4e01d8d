"""S2-Attention's strided shards against a slow transcription of its card."""

from __future__ import annotations

import pytest
import torch

from foveate import attend
from foveate.errors import ConfigError
from foveate.layout import Layout
from foveate.methods.base import AttnInput, State
from foveate.methods.s2_strided import S2Strided
from foveate.recipe import Recipe
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned
from tests.prompts import call


def slow_mask(m, heads, repeat, *, block, local, stride, offset=0, dense=0, homo=False, sink=0):
    """The card, pair by pair: bool `[heads * repeat, m, m]`. `heads` is what phases run over."""
    step = 0 if homo else max(1, stride // max(1, heads - dense))
    out = torch.zeros(heads * repeat, m, m, dtype=torch.bool)
    for h in range(heads):
        s = stride if h < heads - dense else 1
        for t in range(m):
            for j in range(t + 1):
                far, near = t // block, j // block
                seen = far - near < local or (near + h * step + offset) % s == 0 or j < sink
                out[h * repeat : (h + 1) * repeat, t, j] = seen
    return out


OPTIONS = [
    dict(local=2, stride=4),
    dict(local=1, stride=3, share="head"),
    dict(local=2, stride=4, offset=3, dense_heads=1, sink=5),
    dict(local=1, stride=5, homo=True, offset=2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("h,g", [(1, 1), (3, 3), (4, 1), (8, 1), (6, 2)])
def test_layout_is_the_card(options, h, g):
    """Pair by pair: whole, in chunks that end inside blocks, and every decode row, for a length that fills no block."""
    m = 117
    q, k, v = qkv(1, h, g, m)
    method = S2Strided(block=16, **options)
    heads = h if method.share == "head" else g
    rest = {n: options[n] for n in ("local", "stride", "offset", "homo", "sink") if n in options}
    want = slow_mask(m, heads, h // heads, block=16, dense=method.dense_heads, **rest)
    for start, stop in ((0, m), (0, 50), (50, 90), (90, m)):
        layout = method.plan(call(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], start), State())
        layout.validate()
        assert torch.equal(layout.to_mask()[0], want[:, start:stop, :stop])
    for t in (0, 15, 16, 63, 64, m - 1):
        x = AttnInput(q[:, :, t : t + 1], call(q, k[:, :, : t + 1], v[:, :, : t + 1]).kv, "decode", 0, 1, 0.25)
        x.q_pos = torch.tensor([[t]])
        assert torch.equal(method.plan(x, State()).to_mask()[0], want[:, t : t + 1, : t + 1])


@pytest.mark.parametrize("case", CASES[:2] + CASES[4:5], ids=str)
def test_through_the_runtime(case):
    """The layout of the common cases; the content of a prompt plays no part in it."""
    layout = planned("s2_strided:block=32,local=2,stride=3", case)
    q, k, _, _ = case.make()
    want = slow_mask(120, k.shape[1], q.shape[1] // k.shape[1], block=32, local=2, stride=3)
    assert isinstance(layout, Layout) and torch.equal(layout.to_mask()[0, :, :120, :120], want)


@pytest.mark.parametrize("stride", [1, 2, 5, 8])
def test_heads_cover_the_context(stride):
    """With at least `stride` heads the union over heads is everything visible; stride 1 is dense in every head."""
    q, k, v = qkv(1, 8, 8, 160)
    x = call(q, k, v)
    notes = []
    x.note = notes.append
    mask = S2Strided(block=16, local=1, stride=stride).plan(x, State()).to_mask()[0]
    causal = torch.ones(160, 160, dtype=torch.bool).tril()
    assert torch.equal(mask.any(0), causal) and not notes
    if stride == 1:
        assert torch.equal(mask, causal.expand(8, -1, -1))
    else:
        for i in range(8 - stride + 1):  # any run of `stride` heads will do
            assert torch.equal(mask[i : i + stride].any(0), causal)


def test_too_few_heads_are_spread_and_named():
    """8 query heads on 2 kv heads, stride 4: phases are two apart, not neighbours, and the gap is said out loud."""
    q, k, v = qkv(1, 8, 2, 160)
    x, notes = call(q, k, v), []
    x.note = notes.append
    stride, phase = S2Strided(stride=4).shards(2, x)
    assert phase.tolist() == [0, 2] and stride.tolist() == [4, 4]
    assert len(notes) == 1 and "2 heads have 2 phases of 4" in notes[0]
    notes.clear()
    mask = S2Strided(block=16, local=1, stride=4, share="head").plan(x, State()).to_mask()[0]
    assert not notes and torch.equal(mask.any(0), torch.ones(160, 160, dtype=torch.bool).tril())


def test_what_is_left_behind_stays_behind():
    """A block that a head no longer sees beyond the band is never seen again: its entries could be dropped."""
    q, k, v = qkv(1, 4, 4, 200)
    mask = S2Strided(block=16, local=2, stride=4).plan(call(q, k, v), State()).to_mask()[0]
    seen = mask[:, 15::16]  # the last row of each block
    for i in range(seen.shape[1] - 1):
        assert (seen[:, i + 1, : i * 16] <= seen[:, i, : i * 16]).all()


def test_dense_layers_and_heads():
    q, k, v = qkv(1, 4, 4, 120)
    method = S2Strided(block=16, local=1, stride=4, dense_every=2)
    plans = [method.plan(call(q, k, v, layer=i, layers=4), State()) for i in range(4)]
    assert [p is None for p in plans] == [False, True, False, True]
    mask = S2Strided(block=16, local=1, stride=4, dense_heads=4).plan(call(q, k, v), State()).to_mask()[0]
    assert torch.equal(mask, torch.ones(120, 120, dtype=torch.bool).tril().expand(4, -1, -1))


@pytest.mark.parametrize("sink", [0, 4])  # as lists, and as a rule
@pytest.mark.parametrize("options", [{"stride": 8}, {"stride": 3, "offset": 1, "homo": True}])
def test_a_dense_head_has_no_phase(options, sink):
    """The last head sees every block, whatever phase its number would have beside sparse ones."""
    q, k, v = qkv(1, 4, 4, 120)
    method = S2Strided(block=16, local=1, dense_heads=1, share="head", sink=sink, **options)
    mask = method.plan(call(q, k, v), State()).to_mask()[0]
    tril = torch.ones(120, 120, dtype=torch.bool).tril()
    assert torch.equal(mask[3], tril)
    assert all(not torch.equal(mask[h], tril) for h in range(3))


def test_decode_after_an_eviction():
    """Positions, not entry numbers, decide: entries of a ring are seen as the text positions they stand for."""
    recipe = Recipe.of("decode=s2_strided:block=16,local=1,stride=2+cache=streaming_llm:sink=20,window=40")
    q, k, v = qkv(1, 2, 2, 102)
    drive = Drive(recipe)
    drive(*(t[:, :, :100] for t in (q, k, v)))
    for t in (100, 101):
        drive(*(a[:, :, t : t + 1] for a in (q, k, v)))
    x, plan, out = drive.last
    want = slow_mask(102, 2, 1, block=16, local=1, stride=2)[:, 101]
    live, pos = x.kv.exists()[0], x.kv.positions()[0]
    assert torch.equal(plan.to_mask(x.kv)[0, :, 0] & live, want.gather(1, pos.clamp(max=101)) & live & (pos <= 101))
    assert len(set(pos[0][live[0]].tolist())) == 60
    torch.testing.assert_close(out, oracle(x.q, x.kv, plan))


@pytest.mark.parametrize("share", ["group", "head"])
def test_output_lse_and_gradients(share):
    """Masked dense attention in both directions, gradient of the lse included; two key halves merge to the whole."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 2, 70, dtype=torch.float64))
    plain = [t.detach() for t in (q, k, v)]
    method = S2Strided(block=16, local=1, stride=3, share=share)
    layout = method.plan(call(*plain), State())
    gen = torch.Generator().manual_seed(2)
    a, b = (
        torch.randn(1, 4, 70, 16, dtype=torch.float64, generator=gen),
        torch.randn(1, 4, 70, dtype=torch.float64, generator=gen),
    )
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    s = s.masked_fill(~layout.to_mask(), float("-inf"))
    want = (s.softmax(-1) @ v.repeat_interleave(2, 1), s.logsumexp(-1))
    got = attend(q, (k, v), layout, return_lse=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)
    grads = [torch.autograd.grad((o * a).sum() + (e * b).sum(), (q, k, v)) for o, e in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "text,message",
    [
        ("s2_strided:block=8", "block expected >= 16, got 8"),
        ("s2_strided:local=0", "local expected >= 1, got 0"),
        ("s2_strided:stride=0", "stride expected >= 1, got 0"),
        ("s2_strided:dense_every=0", "dense_every expected >= 1, got 0"),
        ("s2_strided:dense_heads=-1", "dense_heads expected >= 0, got -1"),
        ("s2_strided:share=both", "share expected one of head, group"),
        ("s2_strided:strid=4", "did you mean 'stride'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
