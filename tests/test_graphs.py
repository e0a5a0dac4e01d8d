"""Captured decode steps without a device: everything but the capture. tests/gpu/test_graphs.py replays real graphs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate.adapters.graphs import Graphs
from foveate.cache.dense import DenseStore
from foveate.cache.fixed import FixedDense
from foveate.errors import CacheError, ConfigError
from foveate.methods.base import Method, Selection
from foveate.profile import Profile
from foveate.recipe import Recipe
from tests.indexers import random_profile
from tests.models import generate, tiny, tokens
from tests.profiles import folder

RECIPES = (
    "dense",
    "quest:budget=32,dense_layers=0",
    "minference@8k+quest:budget=32,dense_layers=0,share=group",
    "cache=snapkv:window=8,capacity=40",
    "quest:budget=16,dense_layers=0+cache=snapkv:window=8,capacity=40",
    "dense+cache=streaming_llm:sink=4,window=20",
    "uneven",
)


@dataclass(frozen=True)
class Uneven(Method):
    """Keeps every entry of kv head 0 and the last 30 of the others: ragged storage."""

    id = "uneven"
    roles = ("cache",)

    def compress(self, x, state):
        m, g = x.kv.capacity, x.groups
        counts = torch.full((1, g), min(30, m))
        counts[:, 0] = m
        first = m - counts[..., None]
        return Selection((first + torch.arange(m)).clamp(max=m - 1), counts)


def said(model, ids, mask=None, steps=8):
    return generate(model, ids, mask, max_new_tokens=steps, min_new_tokens=steps).sequences


class Replay:
    """Stands for a graph: runs the step, whose host part then counts by itself."""

    def __init__(self, graphs, cache, held):
        self.graphs, self.cache, self.held = graphs, cache, held
        self.logits = torch.empty(len(held.ids), 1, graphs.handle.model.config.vocab_size)

    def replay(self):
        self.logits.copy_(self.graphs._run(self.cache, self.held.ids, self.held.at).logits)


class Called:
    """Stands for the graph of a call of a few tokens, with the host's numbers as they were when it was recorded: views and
    positions that knew of them would be wrong. What the host does behind a replay is not done here."""

    def __init__(self, graphs, cache, held):
        self.graphs, self.cache, self.held, self.layers = graphs, cache, held, [x.cache for x in cache.layers]
        self.then = self.host()
        self.logits = graphs._run(cache, held.ids, held.at).logits
        self.rows, self.fresh = [bindings(c.rows) for c in self.layers], True

    def host(self):
        return [
            ((list(c.seen), c.steps, c.fresh, c.pending, bindings(c.rows), c.batch), c.store.counted(), layer.columns)
            for c, layer in zip(self.layers, self.cache.layers, strict=True)
        ]

    def set(self, held):
        for c, layer, (facts, counted, columns) in zip(self.layers, self.cache.layers, held, strict=True):
            (c.seen, c.steps, c.fresh, c.pending, c.rows, c.batch), layer.columns = facts, columns
            c.store.recount(counted)

    def replay(self):
        if self.fresh:  # the capture itself, which has run
            self.fresh = False
            return
        now = self.host()
        rows = [c.rows for c in self.layers]
        self.set([((list(f[0]), *f[1:4], bindings(f[4]), f[5]), counted, n) for f, counted, n in self.then])
        self.logits.copy_(self.graphs._run(self.cache, self.held.ids, self.held.at).logits)
        for c, old in zip(self.layers, self.rows, strict=True):
            for there, t in zip(tensors(old), tensors(c.rows), strict=True):
                there.copy_(t)  # where the graph's own memory is
        self.set(now)
        for c, held in zip(self.layers, rows, strict=True):
            c.rows = held


class Dry(Graphs):
    devices = ("cpu",)

    def record(self, cache, held):
        if held.ids.shape[1] > 1:
            called = Called(self, cache, held)
            return called, called.logits
        held.advance = lambda cache: None
        replay = Replay(self, cache, held)
        return replay, replay.logits


def bindings(value):
    """A copy of everything in a value of `state.layer` but its tensors, which stay the same."""
    if isinstance(value, torch.Tensor) or not (isinstance(value, (dict, list, tuple)) or hasattr(value, "__dict__")):
        return value
    if isinstance(value, dict):
        out = type(value)()
        out.update({name: bindings(part) for name, part in value.items()})
        return out
    if isinstance(value, (list, tuple)):
        return type(value)(bindings(part) for part in value)
    out = copy.copy(value)
    for name, part in vars(value).items():
        object.__setattr__(out, name, bindings(part))
    return out


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    parts = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, dict) else parts
    return [t for part in parts for t in tensors(part)]


class Recorded(Replay):
    """As a graph does it: with the step number and the tensors of its capture, and what the host remembers unmoved."""

    def __init__(self, graphs, cache, held):
        super().__init__(graphs, cache, held)
        self.layers = [layer.cache for layer in cache.layers]
        self.step, self.before = self.layers[0].steps, [bindings((c.batch, c.rows)) for c in self.layers]
        self.after = None

    def replay(self):
        now, step = [(c.batch, c.rows) for c in self.layers], self.layers[0].steps
        for c, then in zip(self.layers, self.before, strict=True):
            (c.batch, c.rows), c.steps = bindings(then), self.step
        super().replay()
        new = [(c.batch, c.rows) for c in self.layers]
        if self.after is None:  # the capture itself, which the host has seen
            self.after = new
            return
        for c, held, old, got in zip(self.layers, now, self.after, new, strict=True):
            (c.batch, c.rows), c.steps = held, step + 1
            for there, t in zip(tensors(old), tensors(got), strict=True):
                there.copy_(t)  # where the graph's own memory is


class Strict(Dry):
    def record(self, cache, held):
        if held.ids.shape[1] > 1:
            return super().record(cache, held)
        held.advance = lambda cache: None
        replay = Recorded(self, cache, held)
        return replay, replay.logits


def dry(model, recipe):
    handle = foveate.apply(model, recipe)
    handle.graphs = Dry(handle)
    handle.graphs.install()
    return handle


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_steps_are_the_steps(recipe):
    recipe = Recipe(decode="quest:budget=16,dense_layers=0", cache=Uneven()) if recipe == "uneven" else recipe
    model, ids = tiny(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with foveate.use(model, recipe):
        want = said(model, ids, mask, 24)
    handle = dry(model, recipe)
    got = said(model, ids, mask, 24)
    assert torch.equal(got, want) and handle.graphs.replays >= 20 and not handle.notes
    handle.remove()
    assert "forward" not in vars(model)


def test_a_cache_that_changed_is_captured_anew():
    """A second question, a rollback and a fork after replays: the same tokens as without graphs."""
    model, ids, more = tiny(), tokens(1, 60), tokens(1, 9, seed=3)

    def talk():
        out = [model(ids, use_cache=True)]
        cache = out[0].past_key_values
        token = ids[:, :1]
        for i in range(30):
            if i == 8:
                out.append(model(more, past_key_values=cache, use_cache=True))
            if i == 16:
                cache.crop(-3)
            if i == 20:
                cache = cache.fork()
            out.append(model(input_ids=token, past_key_values=cache, use_cache=True))
            token = out[-1].logits[:, -1:].argmax(-1)
        return torch.cat([o.logits[:, -1] for o in out])

    with torch.no_grad():
        with foveate.use(model, "quest:budget=32,dense_layers=0"):
            want = talk()
        handle = dry(model, "quest:budget=32,dense_layers=0")
        got = talk()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert handle.graphs.replays > 10
    handle.remove()


def test_room_runs_out():
    model, ids = tiny(), tokens(1, 20)
    with foveate.use(model, "dense"):
        want = said(model, ids, steps=300)
    handle = dry(model, "dense")
    assert torch.equal(said(model, ids, steps=300), want)
    handle.remove()


def test_what_is_not_captured_says_why():
    model, ids = tiny(), tokens(1, 60)
    recipe = Recipe(decode="dense", storage="paged")
    with foveate.use(model, recipe):
        want = said(model, ids)
    handle = dry(model, recipe)
    assert torch.equal(said(model, ids), want) and handle.graphs.replays == 0
    assert handle.notes == ["decode steps are not captured: storage of kind 'paged' grows on the host"]
    handle.remove()


DECODE = (
    "quest:budget=32,dense_layers=0",
    "adamas:budget=16,dense_layers=0,theta=1",
    "tidal_decode:start=0,reselect=2,budget=12",
    "token_select:sink=2,local=8,budget=8,chunk=8",
    "longheads:chunk=8,attention=32,block=8",
    "lserve:page=4,logical=2,budget=16,sink=4,window=8,assign=even",
    "lserve:page=4,logical=2,budget=16,sparsity=0+cache=snapkv:window=8,capacity=40",
    "recycled_attention:stride=5",  # a share of a fixed store's room is more tokens than one of its entries
    "recycled_attention:stride=3,budget=12,tau=none",
    "dsa:budget=20,profile={dsa}",
    "double_sparsity:budget=16,dense_layers=0,profile={labels}",
)


@pytest.mark.parametrize("recipe", DECODE)
def test_a_recorded_step_is_right_at_every_later_step(recipe):
    """What a method decides on the host, and which tensors it reads, stay as they were at the capture. The store is
    replaced by a larger one on the way."""
    channels = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    recipe = recipe.format(
        dsa=random_profile(4, 2, 16),
        labels=folder(Profile("double_sparsity", {"channel": "q"}, {"channels": channels.int().view(3, 2, 16)})),
    )
    recipe = f"prefill=dense+decode={recipe}"
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with foveate.use(model, recipe):
        want = generate(model, ids, mask, max_new_tokens=150, min_new_tokens=150)
    handle = foveate.apply(model, recipe)
    handle.graphs = Strict(handle)
    handle.graphs.install()
    got = generate(model, ids, mask, max_new_tokens=150, min_new_tokens=150)
    assert handle.graphs.replays > 100 and not handle.notes
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    handle.remove()


RAZOR = "razor_attention:profile={echo},induction=0.3,sink=4,window=20,fraction=0,slack=9"
DROPS = (  # recipe, how many graphs are recorded in 42 steps
    ("cache=h2o:heavy=12,recent=12,slack=10", 1),
    ("cache=h2o:heavy=12,recent=12,slack=10,norm=mean,reduce=max", 1),
    ("cache=h2o:heavy=60,recent=20,slack=10", 2),  # nothing goes after the prompt: the first drop brings positions
    ("quest:budget=16,dense_layers=0+cache=h2o:heavy=24,recent=12,slack=12", 4),  # its bounds begin anew
    ("duo_attention:sink=4,window=12,slack=10,profile={gates}", 1),
    ("duo_attention:sink=4,window=12,slack=10,sparsity=1", 1),
    ("heads=duo_attention:sink=4,window=12,profile={gates}+decode=quest:budget=32,dense_layers=0", 1),
    ("moa:density=0.3,sink=4,block=4,slack=10", 1),
    (RAZOR, 1),
    (RAZOR + ",compensate=false", 1),
    ("cache=razor_attention:induction=0,echo=0,sink=4,window=20,fraction=0,slack=9,compensate=false", 1),
)


@pytest.mark.parametrize("recipe,graphs", DROPS)
def test_steps_between_evictions_are_replayed(recipe, graphs):
    """Entries are dropped in place every few steps, by steps that are not replayed; the graphs before stay right after."""
    profiles = {
        "gates": folder(Profile("duo_attention", {}, {"gates": torch.tensor([[0.9, 0.2], [0.1, 0.3], [0.8, 0.7]])})),
        "echo": folder(Profile("razor_attention", {}, {n: torch.rand(3, 2) for n in ("induction", "echo")})),
    }
    recipe = recipe.format(**profiles)
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=42, min_new_tokens=42)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    recorded = []

    class Counts(Strict):
        def record(self, cache, held):
            recorded.append([layer.cache.evicted for layer in cache.layers])
            return super().record(cache, held)

    handle = foveate.apply(model, recipe)
    handle.graphs = Counts(handle)
    handle.graphs.install()
    got = run()
    assert not handle.notes and len(recorded) == graphs
    assert handle.graphs.replays > (22 if "quest" in recipe else 33)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(got.sequences, want.sequences)
    handle.remove()


def test_a_policy_that_drops_after_every_step_is_not_captured():
    model, ids = tiny(), tokens(1, 60)
    handle = dry(model, "cache=h2o:heavy=12,recent=12,slack=1")
    said(model, ids)
    assert handle.graphs.replays == 0
    assert handle.notes == ["decode steps are not captured: h2o drops entries after every step"]
    handle.remove()


def test_graphs_of_another_recipe_are_not_replayed():
    model, ids = tiny(), tokens(1, 60)
    step = lambda cache: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # noqa: E731
    handle = dry(model, RECIPES[1])
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(5):
            step(cache)
        old = cache.captured
        assert old is not None and old.graphs
        handle.remove()
        handle = dry(model, "dense")
        for _ in range(5):
            step(cache)
    assert cache.captured is not old and handle.graphs.replays > 0
    handle.remove()


def test_a_broken_cache_is_refused_without_the_device():
    class Silent(Dry):
        def record(self, cache, held):
            replay, logits = super().record(cache, held)
            replay.replay = lambda: None
            return replay, logits

    model, ids = tiny(), tokens(1, 60)
    handle = foveate.apply(model, "dense")
    handle.graphs = Silent(handle)
    handle.graphs.install()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(4):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.broken = True
        with pytest.raises(CacheError, match="failed half-way"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    handle.remove()


def test_a_capture_that_fails_is_a_step_like_any_other():
    class Fails(Dry):
        def record(self, cache, held):
            super().record(cache, held)
            raise RuntimeError("operation not permitted when stream is capturing")

    model, ids = tiny(), tokens(1, 60)
    with foveate.use(model, RECIPES[1]):
        want = said(model, ids)
    handle = foveate.apply(model, RECIPES[1])
    handle.graphs = Fails(handle)
    handle.graphs.install()
    assert torch.equal(said(model, ids), want)
    assert handle.notes == [
        "decode steps are not captured: the capture failed: operation not permitted when stream is capturing"
    ]
    handle.remove()


def test_on_a_cpu_the_reason_is_the_device():
    model, ids = tiny(), tokens(1, 20)
    with foveate.use(model, "dense", graphs=True) as handle:
        said(model, ids, steps=4)
        assert handle.notes == ["decode steps are not captured: CUDA graphs need a CUDA device"]


def test_a_fixed_store_is_a_dense_store():
    gen = torch.Generator().manual_seed(0)
    new = lambda n: (torch.randn(2, 2, n, 8, generator=gen), torch.randn(2, 2, n, 8, generator=gen))  # noqa: E731
    first, steps = new(10), [new(1) for _ in range(5)]
    dense = DenseStore.empty(*first).append(*first, None, [0, 0])
    fixed = FixedDense(dense.fork(), [10, 10], 64)
    for i, (k, v) in enumerate(steps):
        dense, fixed = dense.append(k, v, None, [10 + i] * 2), fixed.append(k, v, None, [10 + i] * 2)
    assert isinstance(fixed, FixedDense) and fixed.lens == dense.lens and fixed.view().capacity == 64
    for a, b in zip(fixed.view().to_dense().k[:, :, :15], dense.view().k, strict=True):
        assert torch.equal(a, b)
    assert fixed.now.tolist() == [[15, 15]] * 2 and fixed.seen_now.tolist() == [15, 15]
    fixed.truncate(2)
    assert fixed.now.tolist() == [[13, 13]] * 2 and fixed.seen_now.tolist() == [13, 13]
    fixed.reorder(torch.tensor([1, 1]))
    assert torch.equal(fixed.view().k[0, :, :13], fixed.view().k[1, :, :13])
    kept = fixed.select(Selection(torch.arange(5).expand(2, 2, 5)))
    assert kept.lens == [[5, 5]] * 2 and not isinstance(kept, FixedDense)


# ---------------------------------------------------------------------- compiled layers
def compiling(model, recipe, record=Dry.record, backend=None):
    """A handle whose captured steps are compiled by a backend that counts: (handle, one list of operations a graph)."""
    built = []

    def count(graph, inputs):
        built.append([n.target for n in graph.graph.nodes if n.op in ("call_function", "call_method")])
        return graph.forward

    kind = type("Compiling", (Dry,), {"backend": staticmethod(backend or count), "record": record})
    torch._dynamo.reset()
    handle = foveate.apply(model, recipe)
    handle.graphs = kind(handle, compiled=True)
    handle.graphs.install()
    return handle, built


@pytest.mark.parametrize("family,layers", [("llama", 10), ("gemma2", 4)])  # dynamo gives up at the ninth number of a layer
def test_layers_are_compiled_once(family, layers):
    """Four pieces of code serve all layers that look alike, one the norm behind them; later steps compile nothing, and
    nothing of it stays."""
    model, ids = tiny(family, num_hidden_layers=layers), tokens(1, 40)
    recipe = "quest:budget=16,dense_layers=0"
    with foveate.use(model, recipe):
        want = generate(model, ids, max_new_tokens=12, min_new_tokens=12)
    handle, built = compiling(model, recipe)
    got = generate(model, ids, max_new_tokens=4, min_new_tokens=4)
    pieces = len(built)
    assert pieces == (6 if family == "gemma2" else 5)  # gemma2 has layers of two kinds
    assert sum(len(p) for p in built) > 40
    got = generate(model, ids, max_new_tokens=12, min_new_tokens=12)
    assert len(built) == pieces and handle.graphs.replays >= 8 and not [n for n in handle.notes if "compiled" in n]
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=1e-5)
    assert not any("forward" in vars(module) for module in model.get_decoder().modules())
    handle.remove()


def test_a_tuned_head_is_compiled():
    """With `tuned` the head is one piece more, unless somebody has replaced its forward."""
    from foveate.adapters.compiled import Layers

    model = tiny()
    handle, _ = compiling(model, "dense")
    plain, tuned = (Layers(handle, tuned=way, backend="eager").modules for way in (False, True))
    assert plain[-1] is model.get_decoder().norm and tuned == [*plain, model.lm_head]
    model.lm_head.forward = model.lm_head.forward
    assert Layers(handle, tuned=True, backend="eager").modules == plain
    del model.lm_head.forward
    handle.remove()


def test_a_compiler_that_fails_leaves_plain_captures():
    def fails(graph, inputs):
        raise RuntimeError("no compiler here")

    model, ids = tiny(), tokens(2, 40)
    with foveate.use(model, RECIPES[1]):
        want = said(model, ids)
    handle, _ = compiling(model, RECIPES[1], backend=fails)
    assert torch.equal(said(model, ids), want) and handle.graphs.replays >= 5
    assert len(handle.notes) == 1 and handle.notes[0].startswith("layers are not compiled: torch.compile failed: ")
    assert "no compiler here" in handle.notes[0]
    handle.remove()


def test_a_compiled_capture_that_fails_is_tried_without_the_compiler():
    def record(self, cache, held):
        out = Dry.record(self, cache, held)
        if self.layers is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return out

    model, ids = tiny(), tokens(1, 60)
    with foveate.use(model, RECIPES[1]):
        want = said(model, ids, steps=12)
    handle, _ = compiling(model, RECIPES[1], record)
    assert torch.equal(said(model, ids, steps=12), want) and handle.graphs.replays >= 6
    assert handle.notes == ["layers are not compiled: the capture failed: operation not permitted when stream is capturing"]
    handle.remove()


def test_what_cannot_be_compiled_says_why():
    model, ids = tiny(), tokens(1, 30)
    layer = model.get_decoder().layers[1]
    layer.forward = layer.forward  # as accelerate does
    handle, built = compiling(model, "dense")
    said(model, ids)
    assert not built and handle.graphs.replays > 0 and "forward" in vars(layer)
    assert handle.notes == ["layers are not compiled: another library has replaced the forward of its layers"]
    handle.remove()
    with pytest.raises(ConfigError, match="compiled: expected graphs=True"):
        foveate.apply(model, "dense", compiled=True)
    with pytest.raises(ConfigError, match="compiled: expected True, False or 'tuned', got 'fast'"):
        foveate.apply(model, "dense", graphs=True, compiled="fast")


def test_the_compiler_itself():
    """Inductor on the CPU: one compilation, the logits of plain steps."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 40)
    with foveate.use(model, "dense"):
        want = generate(model, ids)
    torch._dynamo.reset()
    handle = foveate.apply(model, "dense")
    handle.graphs = Dry(handle, compiled=True)
    handle.graphs.install()
    got = generate(model, ids)
    if handle.notes:
        pytest.skip(handle.notes[0])
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    handle.remove()
