"""TidalDecode: several layers of one step, against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate.cache import LayerCache
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, LayerState, State
from foveate.methods.tidal_decode import TidalDecode
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.runtime import Info, Step, attention
from tests.drive import Rotary, Watch, oracle, qkv
from tests.fidelity import CASES
from tests.models import tiny, tokens
from tests.test_graphs import dry, said


class Stack:
    """Several layers under a recipe: one step is one forward of all of them. windows: {layer: its own window}."""

    def __init__(self, recipe, layers, d=16, windows=None):
        self.recipe, self.watch, self.run = Recipe.of(recipe), Watch(), {}
        self.caches = [LayerCache() for _ in range(layers)]
        rope = Rotary(d)
        self.infos = [
            Info(i, layers, 1 / math.sqrt(d), rope=rope, backend="reference", window=(windows or {}).get(i))
            for i in range(layers)
        ]

    def __call__(self, tensors, a, b):
        """tensors: (q, k, v) of each layer, of which tokens a..b are new. Returns the outputs."""
        self.watch.calls.clear()
        n = len(tensors[0][0])
        step = Step(None, [b - a] * n, run=self.run, meter=self.watch)
        both = zip(self.caches, self.infos, tensors, strict=True)
        return [attention(self.recipe, c, *(t[:, :, a:b] for t in qkv), step, i) for c, i, qkv in both]

    @property
    def plans(self):
        return [plan for _, plan, _ in self.watch.calls]


def best(q, k, i, budget):
    """The card: the keys of highest logit of each query head, the token itself among them."""
    h, g = q.shape[1], k.shape[1]
    out = []
    for a in range(h):
        z = (k[0, a // (h // g), : i + 1].double() @ q[0, a, i].double()).tolist()
        order = sorted((j for j in range(i)), key=lambda j: (-z[j], j))
        out.append(sorted([*order[: budget - 1], i]))
    return out


def sets(x, layout):
    mask = layout.to_mask(x.kv)[0, :, 0]
    return [row.nonzero().flatten().tolist() for row in mask]


def several(layers, n, h=4, g=2, b=1):
    return [qkv(b, h, g, n, seed=seed) for seed in range(layers)]


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection(case):
    """Layers start.. use the choice of `start`, layers reselect.. that of `reselect`; nothing else decides."""
    q, k, v, _ = case.make()
    other = [t.flip(1) for t in (q, k, v)]  # another layer: the heads in another order
    tensors = [(q, k, v), (q, k, v), other, other, (q, k, v)]
    stack = Stack("tidal_decode:start=1,reselect=3,budget=24", 5, d=q.shape[-1])
    stack(tensors, 0, 290)
    for i in range(290, 293):
        stack(tensors, i, i + 1)
        full = [plan.full for plan in stack.plans]
        assert full == [True, True, False, True, False]
        first, second = best(q, k, i, 24), best(other[0], other[1], i, 24)
        assert sets(*stack.watch.calls[2][:2]) == first
        assert sets(*stack.watch.calls[4][:2]) == second


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1)])
def test_budget_of_everything_is_dense(h, g):
    tensors = several(4, 40, h, g)
    stack = Stack("tidal_decode:start=1,reselect=3,budget=40", 4)
    stack(tensors, 0, 37)
    for i in range(37, 40):
        for out, (q, k, v) in zip(stack(tensors, i, i + 1), tensors, strict=True):
            torch.testing.assert_close(out, oracle(q[:, :, : i + 1], (k[:, :, : i + 1], v[:, :, : i + 1]))[:, :, -1:])


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1)])
def test_equal_layers_give_exact_topk(h, g):
    """Two layers with the same q and K: the second one's output is that of the `budget` best keys."""
    q, k, v = qkv(1, h, g, 60)
    stack = Stack("tidal_decode:start=0,reselect=none,budget=8", 2)
    stack([(q, k, v)] * 2, 0, 59)
    _, out = stack([(q, k, v)] * 2, 59, 60)
    for a, chosen in enumerate(best(q, k, 59, 8)):
        z = q[0, a, 59] @ k[0, a // (h // g), chosen].T / 4
        torch.testing.assert_close(out[0, a, 0], z.softmax(-1) @ v[0, a // (h // g), chosen], atol=1e-5, rtol=1e-5)


def test_budget_changes_only_layers_between():
    """Layers before `start` and the two that choose are dense, bit for bit, whatever the budget."""
    tensors = several(6, 60)
    outs = {}
    for recipe in ("dense", "tidal_decode:start=1,reselect=4,budget=8", "tidal_decode:start=1,reselect=4,budget=30"):
        stack = Stack(recipe, 6)
        stack(tensors, 0, 59)
        outs[recipe] = stack(tensors, 59, 60)
    dense, few, more = outs.values()
    for layer in (0, 1, 4):
        assert torch.equal(dense[layer], few[layer]) and torch.equal(dense[layer], more[layer])
    for layer in (2, 3, 5):
        assert not torch.allclose(dense[layer], few[layer]) and not torch.allclose(few[layer], more[layer])


def test_nothing_lasts_longer_than_a_step():
    tensors = several(3, 60)
    stack = Stack("tidal_decode:start=1,reselect=none,budget=8", 3)
    stack(tensors, 0, 58)
    for i in (58, 59):
        stack(tensors, i, i + 1)
        assert [plan.full for plan in stack.plans] == [True, True, False]
        assert sets(*stack.watch.calls[2][:2]) == best(tensors[1][0], tensors[1][1], i, 8)
    assert not stack.run and not any(cache.batch for cache in stack.caches)


def test_the_token_itself_is_always_chosen():
    """Traps of the published code: neither the current token nor a kv head that several heads share is its case."""
    q, k, v = qkv(1, 4, 2, 50)
    k = k.clone()
    k[:, :, -1] = -10 * q[:, ::2, -1]
    stack = Stack("tidal_decode:start=0,reselect=none,budget=5", 2)
    stack([(q, k, v)] * 2, 0, 49)
    stack([(q, k, v)] * 2, 49, 50)
    assert all(49 in row and len(row) == 5 for row in sets(*stack.watch.calls[1][:2]))


def test_group_lists_rank_by_probability():
    """One head is sure of key 7, the other one spreads larger logits over many: the sum of probabilities decides."""
    q, k, v = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4)
    k[..., 7, 0], k[..., 10:30, 1] = 8.0, 10.0
    q[0, 0, 0, 0], q[0, 1, 0, 1] = 1.0, 1.0
    x = AttnInput(q, KV.dense(k, v), "decode", 0, 4, 1.0, q_pos=torch.tensor([[39]]))
    state = State()
    method = TidalDecode(start=0, budget=3, share="group")
    assert method.plan(x, state) is None
    x.layer = 1
    layout = method.plan(x, state)
    assert layout.entries.shape[1] == 1 and {7, 39} <= set(sets(x, layout)[0])


# ---------------------------------------------------------------------- batches, other caches, other layers
@pytest.mark.parametrize("share", ["head", "group"])
def test_rows_of_any_length(share):
    """A shorter row gets the sets it gets alone; slots beyond a row's end hold NaN."""
    lens, method = (37, 3, 60), TidalDecode(start=0, budget=8, share=share)
    q, k, v = qkv(3, 4, 2, 60)
    for i, n in enumerate(lens):
        k[i, :, n:] = v[i, :, n:] = float("nan")
    at = torch.tensor(lens)
    kv = KV.dense(k, v, len=at[:, None].expand(3, 2).int())
    both = []
    for kv_, q_, pos in [(kv, q[:, :, :1], at[:, None] - 1)] + [
        (KV.dense(k[i : i + 1, :, :n], v[i : i + 1, :, :n]), q[i : i + 1, :, :1], torch.tensor([[n - 1]]))
        for i, n in enumerate(lens)
    ]:
        state, x = State(), AttnInput(q_, kv_, "decode", 0, 4, 0.25, q_pos=pos)
        method.plan(x, state)
        x.layer = 1
        both.append((method.plan(x, state) or Layout.dense(*x.shape)).to_mask(kv_))
    for i, n in enumerate(lens):
        assert torch.equal(both[0][i, :, :, :n], both[1 + i][0]) and not both[0][i, :, :, n:].any()


@pytest.mark.parametrize("policy", ["snapkv:window=8,capacity=30", "streaming_llm:sink=4,window=25"])
def test_caches_that_dropped_entries(policy):
    """Layers keep different entries: a choice is one of text positions, and each layer reads those it still has."""
    tensors = several(3, 74)
    stack = Stack(f"decode=tidal_decode:start=1,reselect=none,budget=10+cache={policy}", 3)
    stack(tensors, 0, 70)
    for i in range(70, 74):
        stack(tensors, i, i + 1)
        x, plan, out = stack.watch.calls[2]
        torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)
        xs = stack.watch.calls[1][0]  # the layer that chose
        for a in range(4):
            z = torch.where(xs.kv.exists()[0, a // 2], (xs.kv.k[0, a // 2] @ xs.q[0, a, 0]).double(), float("-inf"))
            at = xs.kv.positions()[0, a // 2]
            z = torch.where(at == i, float("inf"), z)
            chosen = set(at[z.topk(10).indices].tolist())
            mask = plan.to_mask(x.kv)[0, a, 0]
            assert set(x.kv.positions()[0, a // 2][mask].tolist()) == chosen & set(x.kv.positions()[0, a // 2].tolist())
            assert i in chosen


def test_a_layer_with_its_own_window_does_not_choose():
    tensors = several(4, 60)
    stack = Stack("tidal_decode:start=1,reselect=none,budget=8", 4, windows={1: 20})
    stack(tensors, 0, 59)
    stack(tensors, 59, 60)
    assert stack.plans[2].full and sets(*stack.watch.calls[3][:2]) == best(tensors[2][0], tensors[2][1], 59, 8)


def test_a_layer_with_other_heads_chooses_anew():
    method, state = TidalDecode(start=0, budget=8), State(LayerState())
    for layer, (h, g) in enumerate([(4, 2), (4, 2), (6, 2), (6, 2)]):
        q, k, v = qkv(1, h, g, 40)
        x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", layer, 4, 0.25, q_pos=torch.tensor([[39]]))
        assert (method.plan(x, state) is None) == (layer in (0, 2))


def test_captured_steps():
    """Steps over stores of fixed size (more room than tokens) say what ordinary steps say."""
    model, ids = tiny(), tokens(2, 60)
    recipe = "tidal_decode:start=0,reselect=none,budget=12"
    with foveate.use(model, recipe):
        want = said(model, ids)
    handle = dry(model, recipe)
    assert torch.equal(said(model, ids), want) and handle.graphs.replays >= 4 and not handle.notes
    handle.remove()


@pytest.mark.parametrize(
    "text,message",
    [
        ("tidal_decode:budget=0", "budget expected >= 1, got 0"),
        ("tidal_decode:start=-1", "start expected >= 0, got -1"),
        ("tidal_decode:start=5,reselect=5", "reselect expected above start = 5, got 5"),
        ("tidal_decode:share=vote", "share expected one of head, group"),
        ("tidal_decode:layer=3", "unknown hyperparameter 'layer'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
