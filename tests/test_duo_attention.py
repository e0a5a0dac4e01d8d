"""DuoAttention against a slow transcription of its card, as a plan, as a cache policy, and beside other methods."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import ConfigError
from foveate.methods.base import State
from foveate.methods.duo_attention import DuoAttention
from foveate.profile import Profile
from foveate.recipe import Recipe
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, Case, planned
from tests.prompts import call, prompt

GATES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.05], [0.3, 0.6]])  # layer 2 (the one driven): head 1 streams


@pytest.fixture
def folder(tmp_path):
    """A profile for 4 layers of 2 kv heads."""
    return str(Profile("duo_attention", tensors={"gates": GATES}).save(tmp_path / "gates"))


def slow_mask(n: int, m: int, streams: list[bool], r: int, sink: int, window: int) -> torch.Tensor:
    """bool `[H, n, m]`, with loops: a streaming head sees the sink and the window, the others everything before."""
    rows = []
    for streaming in streams:
        for _ in range(r):
            for t in range(m - n, m):
                rows.append([j <= t and (not streaming or j < sink or t - j < window) for j in range(m)])
    return torch.tensor(rows).view(len(streams) * r, n, m)


def slow_roles(gates: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The card: threshold = quantile(alpha, sparsity), full iff alpha >= threshold (all gates different)."""
    return gates < torch.quantile(gates.double().flatten(), sparsity)


# ---------------------------------------------------------------------- which heads
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.61, 0.75, 0.99])
@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (7, 1)])
def test_roles_are_the_quantile(sparsity, shape, tmp_path):
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(4))
    path = str(Profile("duo_attention", tensors={"gates": gates}).save(tmp_path))
    got = DuoAttention(sparsity=sparsity, profile=path).streaming(*shape)
    assert torch.equal(got, slow_roles(gates, sparsity))


def test_ties_are_broken_so_that_the_count_is_exact(tmp_path):
    path = str(Profile("duo_attention", tensors={"gates": torch.ones(4, 4)}).save(tmp_path))
    got = DuoAttention(sparsity=0.5, profile=path).streaming(4, 4)
    assert got.flatten().tolist() == [True] * 8 + [False] * 8


def test_threshold(folder):
    got = DuoAttention(threshold=0.5, profile=folder).streaming(4, 2)
    assert torch.equal(got, GATES < 0.5)


# ---------------------------------------------------------------------- prefill
@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("smollm2")], ids=str)
def test_selection(case, folder):
    n = case.make()[0].shape[2]
    layout = planned(f"prefill=duo_attention:sink=5,window=40,profile={folder}", case)
    layout.validate()
    assert torch.equal(layout.to_mask()[0], slow_mask(n, n, [False, True], 2, 5, 40))


def test_selection_of_smollm2_heads(tmp_path):
    case = Case("smollm2-3")
    q, k, _, _ = case.make()
    g, n = k.shape[1], q.shape[2]
    gates = torch.full((4, g), 0.9)
    gates[2, 0] = 0.1
    path = Profile("duo_attention", tensors={"gates": gates}).save(tmp_path)
    layout = planned(f"prefill=duo_attention:sink=5,window=40,threshold=0.5,profile={path}", case)
    streams = [i == 0 for i in range(g)]
    assert torch.equal(layout.to_mask()[0], slow_mask(n, n, streams, q.shape[1] // g, 5, 40))


@pytest.mark.parametrize("chunks", [(1, 2, 3, 60), (37, 130), (128,)])
def test_chunks_change_nothing(chunks, folder):
    """The published code lets a chunk's rows see all of it, and runs the first chunk dense."""
    recipe = Recipe.of(f"prefill=duo_attention:sink=4,window=20,profile={folder}")
    q, k, v = qkv(1, 4, 2, 150)
    whole = Drive(recipe)(q, k, v)
    cuts = (0, *chunks, 150)
    drive = Drive(recipe)
    got = torch.cat([drive(*(t[:, :, a:b] for t in (q, k, v))) for a, b in zip(cuts, cuts[1:], strict=False)], 2)
    torch.testing.assert_close(got, whole, atol=1e-6, rtol=1e-5)
    mask = slow_mask(150, 150, [False, True], 2, 4, 20)
    s = (q[0] @ k[0].repeat_interleave(2, 0).transpose(-1, -2) / 4).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(whole[0], s.softmax(-1) @ v[0].repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1), (8, 2)])
def test_groups(h, g):
    x = call(*prompt("random", h, g, 133), start=60)
    layout = DuoAttention(sparsity=1, sink=3, window=17).plan(x, State())
    assert torch.equal(layout.to_mask(x.kv).expand(-1, h, -1, -1)[0], slow_mask(73, 133, [True] * g, h // g, 3, 17))


def test_sparsity_zero_is_dense_and_needs_no_gates():
    assert DuoAttention(sparsity=0).plan(call(*prompt("random", m=90)), State()) is None


# ---------------------------------------------------------------------- cache
def test_cache_keeps_what_the_card_says(folder):
    """G_f * M + G_s * (S + W) entries after the prompt; S first and W last of streaming heads."""
    drive = Drive(f"duo_attention:sink=4,window=20,slack=6,profile={folder}")
    q, k, v = qkv(1, 4, 2, 150)
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive(*(t[:, :, 100:101] for t in (q, k, v)))
    assert drive.cache.store.lens == [[101, 25]]
    view = drive.cache.store.view()
    assert view.positions()[0, 1, :25].tolist() == [*range(4), *range(80, 101)]
    longest = 0
    for t in range(101, 150):
        got = drive(*(x[:, :, t : t + 1] for x in (q, k, v)))
        mask = slow_mask(1, t + 1, [False, True], 2, 4, 20)[:, 0]
        s = (q[0, :, t, None] @ k[0, :, : t + 1].repeat_interleave(2, 0).transpose(-1, -2))[:, 0] / 4
        want = s.masked_fill(~mask, float("-inf")).softmax(-1)[:, None] @ v[0, :, : t + 1].repeat_interleave(2, 0)
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
        full, streaming = drive.cache.store.lens[0]
        assert full == t + 1
        longest = max(longest, streaming)
    assert longest <= 4 + 20 + 6  # slack entries gather, then leave


def test_short_prompts_keep_everything():
    """Sink and window must not overlap: with fewer than S + W tokens nothing is dropped, until they are more."""
    drive = Drive("duo_attention:sparsity=1,sink=8,window=20,slack=4")
    q, k, v = qkv(1, 4, 2, 60)
    drive(*(t[:, :, :20] for t in (q, k, v)))
    for t in range(20, 28):
        drive(*(x[:, :, t : t + 1] for x in (q, k, v)))
    assert drive.cache.store.lens == [[28, 28]] and not drive.cache.evicted
    for t in range(28, 60):
        drive(*(x[:, :, t : t + 1] for x in (q, k, v)))
        assert max(drive.cache.store.lens[0]) <= 8 + 20 + 4
    assert drive.cache.store.view().positions()[0, 0, :8].tolist() == list(range(8))


def test_a_question_after_eviction_equals_the_uncut_rule(folder):
    """Prefill goes on over an evicted cache: what is gone lies outside every later row's rule."""
    text = f"duo_attention:sink=4,window=20,profile={folder}"
    q, k, v = qkv(1, 4, 2, 160)
    cut, whole = Drive(text), Drive(f"prefill={text}+decode={text}")
    for a, b in ((0, 100), (100, 101), (101, 140), (140, 141)):
        one, two = (d(*(t[:, :, a:b] for t in (q, k, v))) for d in (cut, whole))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert cut.cache.evicted and not whole.cache.evicted


def test_rows_of_a_batch_evict_by_their_own_length(folder):
    text = f"duo_attention:sink=4,window=20,slack=3,profile={folder}"
    q, k, v = qkv(2, 4, 2, 110)
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, :37] = False
    both = Drive(text)
    both(*(t[:, :, :100] for t in (q, k, v)), valid=valid)
    alone = Drive(text)
    alone(*(t[1:, :, 37:100] for t in (q, k, v)))
    for t in range(100, 110):
        got = both(*(x[:, :, t : t + 1] for x in (q, k, v)))
        want = alone(*(x[1:, :, t : t + 1] for x in (q, k, v)))
        torch.testing.assert_close(got[1:], want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- beside other methods
def test_as_heads_it_leaves_the_rest_to_others(folder):
    drive = Drive(f"prefill=streaming_llm:sink=1,window=9+heads=duo_attention:sink=4,window=20,profile={folder}")
    q, k, v = qkv(1, 4, 2, 80)
    got = drive(q, k, v)
    mask = drive.last[1].to_mask()[0]
    duo, other = slow_mask(80, 80, [True, True], 2, 4, 20), slow_mask(80, 80, [True, True], 2, 1, 9)
    assert torch.equal(mask, torch.cat([other[:2], duo[2:]]))
    torch.testing.assert_close(got, oracle(q, (k, v), drive.last[1]), atol=1e-5, rtol=1e-5)


def test_owns_are_the_streaming_heads(folder):
    x = call(*prompt("random", 4, 2, 50), layer=2, layers=4)
    assert DuoAttention(profile=folder).owns(x, State()).tolist() == [False, False, True, True]


# ---------------------------------------------------------------------- what is refused
def test_without_gates_one_clear_error():
    drive = Drive("duo_attention")
    with pytest.raises(ConfigError, match="foveate calibrate duo_attention --out FOLDER and give profile=FOLDER"):
        drive(*qkv(1, 4, 2, 30))


def test_gates_of_another_shape(folder):
    with pytest.raises(ConfigError, match=r"gates \[layers, kv heads\] = \[4, 1\], got \[4, 2\]"):
        Drive(f"duo_attention:profile={folder}")(*qkv(1, 4, 1, 30))
    with pytest.raises(ConfigError, match=r"expected a folder with profile\.json"):
        DuoAttention(profile="nowhere")


@pytest.mark.parametrize(
    "options", [dict(sparsity=1.5), dict(threshold=-0.1), dict(sink=-1), dict(window=0), dict(slack=0), dict(profile=3)]
)
def test_bad_hyperparameters(options):
    with pytest.raises(ConfigError, match=f"duo_attention: {next(iter(options))} expected"):
        DuoAttention(**options)
