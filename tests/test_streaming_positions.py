"""StreamingLLM with positions inside the cache, against the published decode algorithm in slow steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import foveate
from foveate.errors import ConfigError, UnsupportedError
from foveate.layout import Layout, Parts
from foveate.methods.base import State
from foveate.methods.streaming_llm import StreamingLLM
from foveate.recipe import Recipe
from foveate.registry import parse
from tests.drive import Drive, Rotary, oracle, qkv
from tests.models import tiny, tokens
from tests.prompts import call
from tests.test_graphs import dry, said

TEXT = "streaming_llm:sink=4,window=20,positions=cache"


def reference(q, k, v, sink, window, rope, scale):
    """Card, decode steps 1-4, token by token: keys kept before their rotation, slots as positions. fp64 `[H, N, D]`."""
    n, r = q.shape[2], q.shape[1] // k.shape[1]
    every = torch.arange(n)[None]
    raw_q, raw_k = rope.unrotate(q.double(), every), rope.unrotate(k.double(), every)
    kept, out = [], []
    for t in range(n):
        kept.append(t)
        if len(kept) > sink + window:  # one convention: a row sees sink + window entries, its own among them
            del kept[sink]
        c = len(kept)
        key = rope.rotate(raw_k[:, :, kept], torch.arange(c)[None])[0].repeat_interleave(r, 0)
        query = rope.rotate(raw_q[:, :, t : t + 1], torch.tensor([[c - 1]]))[0]
        out.append((query @ key.mT * scale).softmax(-1) @ v[0, :, kept].double().repeat_interleave(r, 0))
    return torch.cat(out, 1)


PHASES = f"prefill={TEXT}+decode={TEXT}"
RING = "+cache=streaming_llm:sink=4,window=20"


@pytest.mark.parametrize("h,g,ring", [(3, 3, ""), (6, 2, ""), (4, 1, RING), (8, 1, RING)])
def test_decode_and_chunks_are_the_slot_reference(h, g, ring):
    """Prompt, chunk and decode steps over a full cache and over a ring; several turns."""
    q, k, v = qkv(1, h, g, 90)
    want = reference(q, k, v, 4, 20, Rotary(16), 0.25).float()[None]
    drive = Drive(PHASES + ring, backend="torch" if h == 6 else "reference")
    cuts = [0, 50, *range(51, 61), 85, *range(86, 91)]
    got = torch.cat([drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip(cuts, cuts[1:], strict=False)], 2)
    if ring:  # the first rows of a second turn miss the entries that the ring had to drop before them
        want, got = (torch.cat([t[:, :, :61], t[:, :, 80:]], 2) for t in (want, got))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_thousands_of_steps():
    """fp32 decode over a ring at text positions near 3,000 against fp64 slots."""
    q, k, v = qkv(1, 2, 1, 3008)
    drive = Drive(PHASES + RING, backend="torch")
    drive(*(t[:, :, :3000] for t in (q, k, v)))
    got = torch.cat([drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(3000, 3008)], 2)
    rope = Rotary(16)
    for i in range(3000, 3008):  # the reference of one row: sinks and the last 20
        kept = [*range(4), *range(i - 19, i + 1)]
        raw = rope.unrotate(k.double(), torch.arange(3008)[None])[:, :, kept]
        key = rope.rotate(raw, torch.arange(24)[None])[0]
        query = rope.rotate(rope.unrotate(q[:, :, i : i + 1].double(), torch.tensor([[i]])), torch.tensor([[23]]))[0]
        want = (query @ key.mT / 4).softmax(-1) @ v[0, :, kept].double()
        torch.testing.assert_close(got[0, :, i - 3000], want[:, 0].float(), atol=1e-4, rtol=1e-4)


def test_true_positions_are_unchanged_and_differ():
    q, k, v = qkv(1, 4, 2, 100)
    true, cache = Drive("streaming_llm:sink=4,window=20"), Drive(TEXT)
    a, b = (d(*(t[:, :, :99] for t in (q, k, v))) for d in (true, cache))
    assert isinstance(true.last[1], Layout) and isinstance(cache.last[1], Parts)
    torch.testing.assert_close(a, oracle(q[:, :, :99], (k[:, :, :99], v[:, :, :99]), true.last[1]))
    torch.testing.assert_close(a[:, :, :24], b[:, :, :24], atol=1e-5, rtol=1e-5)  # nothing has left the cache yet
    assert not torch.allclose(a[:, :, 40:], b[:, :, 40:], atol=1e-3)


def test_short_texts_and_no_sinks_need_no_second_softmax():
    q, k, v = qkv(1, 4, 2, 30)
    drive = Drive(PHASES)
    want = oracle(q, (k, v))
    got = [drive(*(t[:, :, :20] for t in (q, k, v)))] + [
        drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(20, 24)
    ]
    assert all(isinstance(plan, Layout) for _, plan, _ in drive.watch.calls)
    torch.testing.assert_close(torch.cat(got, 2), want[:, :, :24], atol=1e-5, rtol=1e-5)
    x = replace(call(q, k, v), rope=None)
    assert isinstance(StreamingLLM(sink=0, window=5, positions="cache").plan(x, State()), Layout)


@pytest.mark.parametrize("ring", ["", RING])
def test_rows_of_different_length_in_every_storage(ring):
    q, k, v = qkv(2, 4, 2, 70)
    lens = (60, 21)
    valid = torch.zeros(2, 60, dtype=torch.bool)
    for b, n in enumerate(lens):
        valid[b, 60 - n :] = True
    for storage in ("dense", "paged"):
        drive = Drive(replace(Recipe.of(PHASES + ring), storage=storage))
        first = drive(*(t[:, :, :60] for t in (q, k, v)), valid=valid)
        steps = torch.cat([drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(60, 70)], 2)
        for b, n in enumerate(lens):
            one = [t[b : b + 1, :, 60 - n :] for t in (q, k, v)]
            want = reference(*one, 4, 20, Rotary(16), 0.25).float()
            torch.testing.assert_close(first[b][:, valid[b]], want[:, :n], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(steps[b], want[:, n:], atol=2e-5, rtol=2e-5)


def test_a_sink_that_another_policy_dropped_is_not_replaced():
    """Under SnapKV the first entries of a head may be later tokens: they are no sinks."""
    q, k, v = qkv(1, 4, 2, 121)
    method = "streaming_llm:sink=8,window=20,positions=cache"
    drive = Drive(f"decode={method}+cache=snapkv:window=16,capacity=24", backend="torch")
    drive(*(t[:, :, :120] for t in (q, k, v)))
    got = drive(*(t[:, :, 120:] for t in (q, k, v)))
    x, rope = drive.last[0], Rotary(16)
    pos = x.kv.positions()[0]
    assert bool(((pos[:, :8] >= 8) & (pos[:, :8] < 101)).any())
    raw = rope.unrotate(q[:, :, 120:].double(), torch.tensor([[120]]))
    for head in range(4):
        at = pos[head // 2]
        near, sinks = at[at > 100], at[(at < 8) & (at <= 100)]
        low = rope.rotate(raw, torch.tensor([[27]]))[0, head, 0]
        s = torch.cat([k[0, head // 2, near].double() @ q[0, head, 120].double(), k[0, head // 2, sinks].double() @ low]) / 4
        want = s.softmax(0) @ v[0, head // 2, torch.cat([near, sinks])].double()
        torch.testing.assert_close(got[0, head, 0], want.float(), atol=2e-5, rtol=2e-5)


def test_options():
    assert not StreamingLLM().extends and StreamingLLM(positions="cache").extends and parse("streaming_llm@stream").extends
    assert Recipe.of(TEXT).extends and not Recipe.of("streaming_llm").extends
    with pytest.raises(ConfigError, match="positions expected one of text, cache, got 'slot'"):
        parse("streaming_llm:positions=slot")
    x = replace(call(*(t.double() for t in qkv(1, 2, 1, 50))), rope=None)
    with pytest.raises(UnsupportedError, match="positions='cache' needs the model's rotation"):
        StreamingLLM(window=9, positions="cache").plan(x, State())


@pytest.mark.parametrize(
    "recipe",
    [
        "streaming_llm:sink=4,window=20",
        PHASES,
        "decode=s2_strided:block=16,local=2,stride=3,share=head,dense_heads=1",
        "topk_exact:budget=20,share=group",
    ],
)
def test_steps_that_look_at_no_device_value_are_replayed(recipe):
    """Rules and exact top-k plan by shapes alone: captured steps say the same tokens."""
    model, ids = tiny(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with foveate.use(model, recipe):
        want = said(model, ids, mask, 24)
    handle = dry(model, recipe)
    assert torch.equal(said(model, ids, mask, 24), want) and handle.graphs.replays >= 20
    handle.remove()
