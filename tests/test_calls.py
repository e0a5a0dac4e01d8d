"""Calls of a few tokens, the verification of drafts, without a device: what is replayed is what would have run. Rollbacks,
padding and growing stores are in tests/test_speculate_graphs.py; tests/gpu/test_speculate_graphs.py replays real graphs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate import speculate
from foveate.adapters import calls
from foveate.cache import store
from foveate.cache.fixed import Fixed, FixedDense
from foveate.cache.layer import LayerCache
from foveate.errors import CacheError
from foveate.methods.base import LayerState, Method
from foveate.recipe import Recipe
from tests.models import tiny, tokens
from tests.test_graphs import compiling
from tests.test_speculate_graphs import BACKS, PILLAR, Counts, counting, cycles, ragged, remembered, run


class Kept:
    """Stays through rollbacks. A name of its own, a number, a tensor."""

    def __init__(self, t, number=7):
        self.t, self.number, self.name = t, number, object()

    def truncate(self, n):
        self.number = self.number - n if self.number == 7 else self.number


@dataclass(frozen=True)
class Watches(Method):
    """Dense decoding that keeps something of every call: `kind` says what."""

    kind: str = "mean"

    id = "watches"
    roles = ("decode",)
    sees = ("lse",)
    observes = ("prefill",)

    def phase(self, step):
        return "step"

    def resumes(self, layer, rows):
        return True

    def observe(self, x, out, lse, mass, state):
        old, mean = state.layer.get("kept"), lse.mean().view(1)
        if old is not None and self.kind != "moves":
            mean = old.t.copy_(mean)
        number = {"counts": 100 if old is None else old.number + 1, "start": 1000 + x.start}.get(self.kind, 7)
        state.layer["kept"] = Kept(mean if self.kind != "moves" or old is None else torch.cat([old.t, mean]), number)


@dataclass(frozen=True)
class Weighs(Watches):
    sees = ("mass",)

    def observe(self, x, out, lse, mass, state):
        assert mass is not None


def plainly(recipe, backs=BACKS[0]):
    """Logits and caches of cycles without graphs."""
    model = tiny(num_hidden_layers=2)
    with foveate.use(model, recipe):
        return cycles(model, tokens(1, 60), backs, keep=5)


@pytest.fixture(scope="module")
@torch.no_grad()
def pillar():
    """What cycles of self-speculation give without graphs, run once and before any fault is planted."""
    return plainly(PILLAR)


def both(recipe, backs=BACKS[0], make=counting, plain=None):
    """(logits and caches of cycles without graphs and with, the handle)."""
    want, model = plain or plainly(recipe, backs), tiny(num_hidden_layers=2)
    handle = make(model, recipe)
    got = cycles(model, tokens(1, 60), backs, keep=5)
    handle.remove()
    return want, got, handle


@torch.no_grad()
def test_what_a_method_makes_of_the_results(monkeypatch):
    """In the memory of the first call, also by replays, and with the plain values beside it, which a rollback changes."""
    replays, advance = [], calls.Call.advance
    monkeypatch.setattr(calls.Call, "advance", lambda self, cache: (replays.append(1), advance(self, cache)))
    (want, plain), (got, cache), _ = both(Recipe(decode=Watches()), (0, 1, 2, 3, 4, 0, 4, 1))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert len(replays) >= 5
    for a, b in zip(plain.layers, cache.layers, strict=True):
        ours, theirs = b.cache.rows[0]["kept"], a.cache.rows[0]["kept"]
        torch.testing.assert_close(ours.t, theirs.t)
        assert ours.number == theirs.number < 7


@pytest.mark.parametrize("kind", ["counts", "start", "moves"])
@torch.no_grad()
def test_what_differs_from_call_to_call_is_not_captured(kind):
    (want, plain), (got, cache), handle = both(Recipe(decode=Watches(kind)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    said = [n for n in handle.notes if n.startswith("verifications")]
    assert said == ["verifications are not captured: what watches keeps of one differs from the next"]
    ours, theirs = (c.layers[1].cache.rows[0]["kept"] for c in (cache, plain))
    assert ours.number == theirs.number and ours.t.shape == theirs.t.shape


@pytest.mark.parametrize("recipe,why", [
    ("decode=quest:page=4,budget=8,dense_layers=0", "quest does not say that its steps go on behind them"),
    (Recipe(decode=Weighs()), "watches wants the mass of every entry"),
])  # fmt: skip
@torch.no_grad()
def test_what_is_not_captured_says_why(recipe, why):
    (want, _), (got, _), handle = both(recipe)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert f"verifications are not captured: {why}" in handle.notes


@torch.no_grad()
def test_other_calls_are_left_alone():
    """A question whose last logits alone are asked for, a number of tokens too many, and a fifth number of tokens."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    handle = counting(model, "dense")
    cache = model(ids, use_cache=True).past_key_values
    seen = []
    for n, keep in ((5, 1), (33, 33), (5, 5), (4, 4), (3, 3), (2, 2), (6, 6)):
        for _ in range(3):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            out = model(input_ids=ids[:, :n], past_key_values=cache, use_cache=True, logits_to_keep=keep)
            assert out.logits.shape[1] == keep
            cache.crop(-n)
        seen.append(handle.graphs.calls.replays)
    assert seen == [0, 0, 1, 2, 3, 4, 4] and handle.graphs.verified == [5, 4, 3, 2]
    handle.remove()


@torch.no_grad()
def test_an_end_inside_a_draft():
    """Rows that end at different places of a cycle, one of them padded."""
    model, (ids, mask) = tiny(num_hidden_layers=2), ragged(2)
    free = run(model, ids, mask, new=30)[:, 45:]
    end = [int(free[0, 19]), int(free[1, 26])]
    options = dict(new=30, eos_token_id=end)
    want = run(model, ids, mask, **options)
    handle, stats = counting(model, PILLAR), speculate.Stats()
    for _ in range(2):  # a second context of the same model
        got = run(model, ids, mask, custom_generate=speculate.generate, stats=stats, **options)
        assert torch.equal(got, want)
    assert handle.graphs.calls.replays >= 4 and not [n for n in handle.notes if "captured" in n]
    handle.remove()


# ---------------------------------------------------------------------- faults
@pytest.mark.parametrize("fault", ["narrow", "still", "forgetful", "short"])
@torch.no_grad()
def test_a_planted_fault_shows(fault, pillar, monkeypatch):
    """Views of the length at the capture, positions from then, what a method keeps not put back, tokens not counted."""
    if fault == "narrow":
        monkeypatch.setattr(Fixed, "wide", property(lambda self: False, lambda self, value: None))
    if fault == "still":
        monkeypatch.setattr(LayerCache, "positions", lambda self, n, device: store.last_positions(self.seen, n, device))
    if fault == "forgetful":
        monkeypatch.setattr(calls, "_change", lambda old, row: ([], {}))
    if fault == "short":
        real = FixedDense.replayed
        monkeypatch.setattr(FixedDense, "replayed", lambda self, n=1: real(self, min(n, 2)))
    try:
        (want, plain), (got, cache), _ = both(PILLAR, plain=pillar)
    except (RuntimeError, CacheError):
        return  # lengths on the host and on the device that disagree
    assert not torch.allclose(got, want, atol=1e-4, rtol=1e-4) or remembered(cache) != remembered(plain)


@torch.no_grad()
def test_a_capture_that_fails_is_a_call_like_any_other(pillar):
    class Fails(Counts):
        def record(self, cache, held):
            if held.ids.shape[1] > 1:
                cache.layers[0].columns += 5  # what the host had done by then
                cache.layers[0].cache.rows[0].clear()
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().record(cache, held)

    def make(model, recipe):
        handle = foveate.apply(model, recipe)
        handle.graphs = Fails(handle)
        handle.graphs.install()
        return handle

    (want, _), (got, cache), handle = both(PILLAR, make=make, plain=pillar)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    said = "verifications are not captured: the capture failed: operation not permitted when stream is capturing"
    assert said in handle.notes and not cache.broken


# ---------------------------------------------------------------------- compiled layers
@torch.no_grad()
def test_calls_go_through_the_compiler(pillar):
    """Pieces for one token, and the same for five; the last cycles' fewer tokens are not worth it."""
    model = tiny(num_hidden_layers=2)
    handle, built = compiling(model, PILLAR)
    got, _ = cycles(model, tokens(1, 60), BACKS[0], keep=5)
    torch.testing.assert_close(got, pillar[0], atol=1e-4, rtol=1e-4)
    assert len(built) == 10 and handle.graphs.calls.replays >= 5 and not [n for n in handle.notes if "compiled" in n]
    assert model.get_decoder().config._attn_implementation == "foveate"
    handle.remove()


# ---------------------------------------------------------------------- what the host remembers
def test_twins_share_tensors_and_nothing_else():
    class Thing:
        def __init__(self):
            self.t, self.n, self.name, self.parts = torch.ones(2), 3, object(), [torch.zeros(1), {"a": 1}]

    state = LayerState()
    state["x"], state["y"] = Thing(), (1, "two", None)
    copy = calls.twin(state)
    assert type(copy) is LayerState and copy["y"] == state["y"] and calls.facts(copy) == calls.facts(state)
    a, b = state["x"], copy["x"]
    assert a is not b and a.t is b.t and a.parts is not b.parts and a.parts[0] is b.parts[0] and a.name is not b.name
    b.n, b.parts[1]["a"] = 4, 5
    assert a.n == 3 and a.parts[1] == {"a": 1} and calls.facts(copy) != calls.facts(state)
    gone, new = calls._change({k: (v, calls.facts(v)) for k, v in {"y": state["y"], "z": 1}.items()}, state)
    assert gone == ["z"] and list(new) == ["x"]
