"""The runtime's own promises: heads that follow another method, what methods remember, a policy that fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from foveate.errors import UnsupportedError
from foveate.layout import Layout, Part, Parts
from foveate.methods.base import AttnInput, LayerState, Method, Selection, State, option
from foveate.methods.dense import Dense
from foveate.recipe import Recipe
from tests.drive import Drive, oracle, qkv


@dataclass(frozen=True)
class Stream(Method):
    """Every second head sees a window alone, the others what the recipe's other methods say."""

    window: int = option(8, low=1)

    id: ClassVar[str] = "stream"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "heads")

    def plan(self, x: AttnInput, state: State) -> Layout:
        return Layout.static(x.shape, window=self.window, block_q=1, q_pos=x.layout_pos())

    def owns(self, x: AttnInput, state: State):
        return torch.arange(x.q.shape[1]) % 2 == 1


def test_heads_are_mixed():
    """`heads=` takes its own heads in prefill and decode; the others stay with the recipe's method."""
    q, k, v = qkv(1, 4, 2, 41)
    dense = oracle(q, (k, v))
    window = oracle(q, (k, v), Layout.static((1, 4, 41, 41), window=8, block_q=1))
    for recipe in (Recipe(heads=Stream()), Recipe(prefill=Dense(), decode=Dense(), heads=Stream())):
        drive = Drive(recipe)
        got = torch.cat([drive(*(t[:, :, :40] for t in (q, k, v))), drive(*(t[:, :, 40:] for t in (q, k, v)))], 2)
        torch.testing.assert_close(got[:, ::2], dense[:, ::2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[:, 1::2], window[:, 1::2], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Halves(Method):
    """The first ten keys and all later ones, apart: two softmaxes put together. `gated`: added up instead."""

    gated: bool = option(False)

    id: ClassVar[str] = "halves"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)

    def plan(self, x: AttnInput, state: State) -> Parts:
        sets = (torch.arange(10), torch.arange(10, x.shape[3]))
        lists = [keys.int().expand(1, 1, -(-x.shape[2] // 16), -1) for keys in sets]
        parts = [Layout.lists(x.shape, block_q=16, entries=e.contiguous(), q_pos=x.layout_pos()) for e in lists]
        gate = torch.ones(x.shape[:3]) if self.gated else None
        return Parts(tuple(Part(p, gate=gate) for p in parts), "gated" if self.gated else "lse")


def test_heads_are_mixed_with_a_method_of_several_parts():
    """As minference plans on a GPU: heads of their own get a part of their own, with nothing in the others."""
    q, k, v = qkv(1, 4, 2, 41)
    dense = oracle(q, (k, v))
    window = oracle(q, (k, v), Layout.static((1, 4, 41, 41), window=8, block_q=1))
    drive = Drive(Recipe(prefill=Halves(), heads=Stream()))
    got = drive(q, k, v)
    torch.testing.assert_close(got[:, ::2], dense[:, ::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 1::2], window[:, 1::2], atol=1e-5, rtol=1e-5)
    whole = Drive(Recipe(prefill=Halves(), heads=Stream(window=1000)))
    torch.testing.assert_close(whole(q, k, v), dense, atol=1e-5, rtol=1e-5)
    drive.last[1].validate()
    assert len(drive.last[1].parts) == 3 and [part.layout.has_rule for part in drive.last[1].parts] == [False, False, True]
    with pytest.raises(UnsupportedError, match="several softmaxes"):
        Drive(Recipe(prefill=Halves(gated=True), heads=Stream()))(q, k, v)


def test_heads_that_see_everything_beside_parts(monkeypatch):
    monkeypatch.setattr(Stream, "plan", lambda self, x, state: x.dense())
    q, k, v = qkv(1, 4, 2, 41)
    got = Drive(Recipe(prefill=Halves(), heads=Stream()))(q, k, v)
    torch.testing.assert_close(got, oracle(q, (k, v)), atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Recorder(Method):
    """Writes into every place it may write to, and reads back what it can see."""

    id: ClassVar[str] = "recorder"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    seen: ClassVar[list] = []

    def plan(self, x: AttnInput, state: State) -> Layout:
        if x.phase == "prefill":
            self.seen.append(("step", dict(state.step)))
            state.step["row"] = state.layer["row"] = int(x.q.shape[2])
        else:
            self.seen.append(("rows", [s["row"] for s in state.rows]))
        return x.dense()


def test_what_prefill_remembers_reaches_decode_and_rows_do_not_mix():
    Recorder.seen.clear()
    drive = Drive(Recipe(prefill=Recorder(), decode=Recorder()))
    q, k, v = qkv(2, 4, 2, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :10] = False
    drive(q, k, v, valid)
    drive(*(t[:, :, :1] for t in (q, k, v)))
    assert Recorder.seen == [("step", {}), ("step", {}), ("rows", [20, 30])]


@dataclass(frozen=True)
class Moody(Method):
    """A cache policy that fails the first time."""

    id: ClassVar[str] = "moody"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    failed: ClassVar[list] = []

    def compress(self, x: AttnInput, state: State) -> Selection:
        if not self.failed:
            self.failed.append(True)
            raise RuntimeError("not now")
        bias = torch.full((1, x.groups, x.kv.capacity), -1.0)
        return Selection(torch.arange(x.kv.capacity).expand(1, x.groups, -1), bias=bias)


def test_a_policy_that_failed_is_asked_again_and_its_weights_count():
    q, k, v = qkv(1, 4, 2, 31)
    drive = Drive(Recipe(cache=Moody()))
    drive(*(t[:, :, :30] for t in (q, k, v)))
    with pytest.raises(RuntimeError, match="not now"):
        drive(*(t[:, :, 30:] for t in (q, k, v)))
    drive(*(t[:, :, 30:] for t in (q, k, v)))
    view = drive.cache.store.view()
    assert view.bias is not None and bool((view.bias[..., :30] == -1).all()) and bool((view.bias[..., 30:] == 0).all())
    assert not drive.cache.pending and not drive.cache.evicted  # weighted, but nothing is gone


@pytest.mark.parametrize("recipe", ["dense", "streaming_llm:sink=2,window=9", "quest:page=4,budget=8,dense_layers=0"])
def test_paged_storage_changes_nothing(recipe):
    q, k, v = qkv(2, 4, 2, 42)
    parts = Recipe.of(recipe)
    paged = Recipe(prefill=parts.prefill, decode=parts.decode, storage="paged")
    a, b = Drive(Recipe(prefill=parts.prefill, decode=parts.decode)), Drive(paged)
    for lo, hi in ((0, 40), (40, 41), (41, 42)):
        x, y = (d(*(t[:, :, lo:hi] for t in (q, k, v))) for d in (a, b))
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert b.cache.store.view().kind == "paged"
    fork = b.cache.fork()
    assert fork.store.nbytes == b.cache.store.nbytes  # pages are shared until one side writes


def test_memory_follows_the_cache():
    class Kept:
        def __init__(self):
            self.log = []

        def truncate(self, n):
            self.log.append(("truncate", n))

        def keep(self, selection):
            self.log.append("keep")

        def fork(self):
            return Kept()

        def reorder(self, index):
            self.log.append(index.tolist())

    state = LayerState()
    state.update(kept=Kept(), rows=torch.arange(3), names=["a", "b", "c"], n=5)
    copy = state.fork()
    copy["names"].append("d")
    assert state["names"] == ["a", "b", "c"] and copy["kept"] is not state["kept"]
    state.reorder(torch.tensor([2, 0]))
    assert state["rows"].tolist() == [2, 0] and state["n"] == 5 and "names" not in state
    kept = state["kept"]
    state.keep(Selection(torch.zeros(1, 1, 1, dtype=torch.long)))
    assert list(state) == ["kept"]
    state.truncate(4)
    assert kept.log == [[2, 0], "keep", ("truncate", 4)]


def test_who_did_not_ask_for_the_lse_gets_none():
    """With sinks there is one, of the plan's pairs: a method that trusts any would take it for that of all keys."""
    seen = []

    class Nosy(Method):
        id, roles, observes = "nosy", ("prefill",), ("prefill",)

        def plan(self, x, state):
            return Layout.static(x.shape, window=4, device=x.device)

        def observe(self, x, out, lse, mass, state):
            seen.append((lse, mass))

    class Asking(Nosy):
        id, sees = "asking", ("lse",)

    q, k, v = qkv(1, 4, 2, 20)
    for method in (Nosy(), Asking()):
        Drive(Recipe(prefill=method), sinks=torch.zeros(4))(q, k, v)
    assert seen[0] == (None, None) and seen[1][0].shape == (1, 4, 20) and seen[1][1] is None


def test_gated_parts_refuse_attention_sinks():
    @dataclass(frozen=True)
    class Gated(Method):
        id: ClassVar[str] = "gated"
        roles: ClassVar[tuple[str, ...]] = ("prefill",)

        def plan(self, x, state):
            gate = torch.ones(x.shape[:3])
            return Parts((Part(x.dense(), gate=gate),), combine="gated")

    drive = Drive(Recipe(prefill=Gated()), sinks=torch.zeros(4))
    with pytest.raises(UnsupportedError, match="sinks"):
        drive(*qkv(1, 4, 2, 20))


@pytest.mark.parametrize("storage", ["dense", "paged"])
@pytest.mark.parametrize("text", ["snapkv", "pyramidkv:beta=2", "adakv", "think:ratio=0.5", "snapkv,capacity=300"])
def test_equal_rows_are_compressed_together(monkeypatch, text, storage):
    """One call for rows of one length, and what each keeps is what it keeps alone; one a row where lengths differ."""
    name, _, more = text.partition("," if "," in text else ":")
    if name == "think" and storage == "paged":
        pytest.skip("it stores a part of the channels")
    options = ",".join(x for x in ("window=8", "" if "capacity" in more else "capacity=24", more) if x)
    recipe = replace(Recipe.of(f"cache={name}:{options}"), storage=storage)
    policy = type(recipe.cache)
    plain, calls = policy.compress, []

    def counted(self, x, state):
        calls.append(len(x.q))
        return plain(self, x, state)

    monkeypatch.setattr(policy, "compress", counted)
    q, k, v = qkv(3, 4, 2, 81)

    def run(valid=None):
        calls.clear()
        drive = Drive(recipe, backend="torch")
        drive(*(t[:, :, :80] for t in (q, k, v)), valid=valid)
        out = drive(*(t[:, :, 80:] for t in (q, k, v)))
        return out, [
            t.tolist() for t in (drive.last[0].kv.positions() * drive.last[0].kv.exists(), drive.last[0].kv.lengths())
        ]

    together, made = run()
    assert calls == [3]
    monkeypatch.setattr(policy, "together", False)
    alone, same = run()
    assert calls == [1, 1, 1] and made == same
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(policy, "together", True)
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[1, :9] = False
    run(valid)
    assert calls == [1, 1, 1]
