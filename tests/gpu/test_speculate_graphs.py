"""Real CUDA graphs in self-speculation: drafts and verifications are replayed, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import speculate
from foveate.methods.pillar_attn import SEEN
from tests.models import tiny, tokens
from tests.test_speculate_graphs import cycles, ragged, remembered, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RECIPES = ("pillar_attn:draft=6,ratio=0.05,least=32", "pillar_attn:draft=6,ratio=0.2,least=32,dense_layers=1", "dense")


def model_(family="llama"):
    wide = dict(num_hidden_layers=4, hidden_size=256, head_dim=64, max_position_embeddings=4096)
    return tiny(family, **wide).to("cuda", torch.float32)


def counted(handle):
    """Decode steps of the graphs recorded from now on; those of verifications are counted by `Graphs.calls`."""
    recorded, record = [], handle.graphs.record

    def wrapped(cache, held):
        if held.ids.shape[1] == 1:
            recorded.append(cache.layers[0].cache.steps)
        return record(cache, held)

    handle.graphs.record = wrapped
    return recorded


def alike(model, got, want, mask):
    """The same tokens, but that a row may part where two logits are as good as equal."""
    for a, b, real in zip(got, want, mask, strict=True):
        if not torch.equal(a, b):
            n, first = int((a == b).long().cumprod(0).sum()), int((real == 0).sum())
            logits = model(a[None, first:n]).logits[0, -1].float()
            if abs(float(logits[a[n]] - logits[b[n]])) > 5e-3:
                return False
    return True


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_replayed_drafts_lose_nothing(recipe, family, rows):
    """Dense tokens, the acceptance of drafts without graphs, and no capture behind the third cycle."""
    model, (ids, mask) = model_(family), (t.cuda() for t in ragged(rows, 900))
    want, stats = run(model, ids, mask, new=120), {}
    for graphs in (False, True):
        stats[graphs] = speculate.Stats()
        with foveate.use(model, recipe, graphs=graphs) as handle:
            graph, recorded = handle.graphs, counted(handle) if graphs else []
            got = run(model, ids, mask, new=120, custom_generate=speculate.generate, draft=6, stats=stats[graphs])
            notes = [n for n in handle.notes if "captured" in n]
        assert alike(model, got, want, mask)
    assert not notes and len(recorded) <= 3
    assert graph.replays >= 6 * (stats[True].cycles - 3) - 12  # the last drafts are shorter
    assert graph.calls.replays >= stats[True].cycles - 9 and graph.calls.failed is None
    assert abs(stats[True].cycles - stats[False].cycles) <= 2 and stats[True].cycles >= 17


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", [0, 5])
@pytest.mark.parametrize("backs", [(0, 1, 2, 3, 4, 0, 4, 4), (5, 5, 0, 5, 2, 6, 1, 9)])
@torch.no_grad()
def test_rollbacks_of_every_length(backs, keep, compiled):
    """5 takes the whole verification back and with it the scores, 6 and 9 some of what came before. keep: all logits of a
    verification, which is then captured, the third one and its replays."""
    model, ids = model_(), tokens(1, 700).cuda()
    with foveate.use(model, "pillar_attn:draft=4,ratio=0.2,least=12"):
        want, plain = cycles(model, ids, backs, keep=keep)
    with foveate.use(model, "pillar_attn:draft=4,ratio=0.2,least=12", graphs=True, compiled=compiled) as handle:
        got, cache = cycles(model, ids, backs, keep=keep)
        assert handle.graphs.replays >= 8 and handle.graphs.calls.replays == (6 if keep else 0), handle.notes
    torch.testing.assert_close(got, want, atol=5e-3, rtol=5e-3)
    store = cache.layers[1].cache.store
    assert store.now.tolist() == [[n] * 2 for n in store.count] and store.seen_now.tolist() == cache.seen
    assert remembered(cache) == remembered(plain)
    seen = [c.layers[1].cache.rows[0].get(SEEN) for c in (cache, plain)]
    if seen[0] is not None:  # what a replay observed
        m = min(s.score.shape[-1] for s in seen)
        torch.testing.assert_close(seen[0].score[..., :m], seen[1].score[..., :m], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_cycle_waits_for_the_device_twice():
    """The drafts of a cycle wait for nothing: the host asks for them all, then looks at what stands and at what ended."""
    model, ids = model_(), tokens(1, 700).cuda()
    with foveate.use(model, RECIPES[0], graphs=True) as handle:
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        token = ids[:, :7]

        def cycle():
            for i in range(6):
                model(input_ids=token[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache.crop(-6)

        def verify():
            out = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=7)
            cache.crop(-3)
            return out.logits

        for _ in range(5):
            cycle()
            verify()
        torch.cuda.synchronize()
        before, mode = (handle.graphs.replays, handle.graphs.calls.replays), torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            cycle()
            assert verify().shape[1] == 7
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert handle.graphs.replays == before[0] + 6 and handle.graphs.calls.replays == before[1] + 1, handle.notes


@torch.no_grad()
def test_sampled_drafts_are_replayed():
    model, ids = model_(), tokens(2, 700).cuda()
    with foveate.use(model, RECIPES[0], graphs=True) as handle:
        recorded, stats = counted(handle), speculate.Stats()
        options = dict(custom_generate=speculate.generate, stats=stats, do_sample=True, temperature=0.7)
        out = run(model, ids, new=90, **options)
    assert out.shape == (2, 790) and len(recorded) <= 3 and 0 < stats.rate <= 1


@pytest.mark.parametrize("recipe", ["dense", "pillar_attn:draft=8,ratio=0.05,least=64"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_long_verification_in_bf16(recipe, rows):
    """70,000 tokens, so that the kernel that reads keys and values once serves: logits near those of the eager call, after
    rollbacks of different lengths, and equal from replay to replay."""
    model = tiny(num_hidden_layers=2, hidden_size=512, head_dim=64, max_position_embeddings=80000).to("cuda", torch.bfloat16)
    ids, more = tokens(rows, 70000).cuda(), tokens(rows, 300, seed=3).cuda()
    outs = []
    for graphs in (False, True):
        with foveate.use(model, recipe, graphs=graphs) as handle:
            cache, out = model(ids, use_cache=True, logits_to_keep=1).past_key_values, []
            for i, back in enumerate((0, 3, 9, 1, 8, 2, 0)):
                new = more[:, 9 * i : 9 * i + 9]
                for t in range(8):
                    model(input_ids=new[:, t : t + 1], past_key_values=cache, use_cache=True)
                cache.crop(-8)
                out.append(model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=9).logits.float())
                cache.crop(-back) if back else None
            if graphs:
                assert handle.graphs.calls.replays == 5, handle.notes
                again = []
                for _ in range(2):
                    args = dict(past_key_values=cache, use_cache=True, logits_to_keep=9)
                    again.append(model(input_ids=more[:, 200:209], **args).logits)
                    cache.crop(-9)
                assert torch.equal(*again) and handle.graphs.calls.replays == 7
            outs.append(torch.cat(out))
    assert torch.isfinite(outs[1]).all()
    assert float((outs[0] - outs[1]).abs().mean()) < 0.02 * float(outs[0].std())
