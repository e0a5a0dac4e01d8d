"""Decode steps as CUDA graphs: what the host does 30 to 40 times a step (launches, plans, checks) is recorded once.

`foveate.apply(model, recipe, graphs=True)` replaces the model's `forward` by one that recognises a single-token step over
a cache of ours. Its stores become fixed ones; the first step of each phase runs as it is, the second is captured, all
later ones are replayed. What cannot be captured runs as it is, and `Handle.notes` says why. Selection is inside the graph:
nothing is planned on the host. A step after which a cache policy drops entries runs as it is: fixed stores drop in place,
so the graphs of the other steps stay what they are. With `compiled=True` the layers of captured steps are compiled first
(`compiled.py`). A call of several tokens and a rollback end the graphs, unless all methods say that they go on
(`Method.resumes`): then drafts are replayed from one verification to the next, and so are the verifications (`calls.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache.fixed import Fixed, fix, fixable
from ..cache.store import longest
from ..methods.base import Method
from ..payoff import pay_off
from ..scores.bounds import Bounds
from .calls import Call, Calls, few, places
from .compiled import Layers
from .context import ContextCache

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .transformers import Handle

PLAIN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict")


class Graphs:
    """The replaced `forward` of a model.

    Args:
        compiled: compile the layers of these steps; "tuned" also lets the compiler search launch constants.

    Attributes:
        replays: steps that were replayed. failed: why nothing is captured any more, or None. layers: the compiled layers,
            or None where they run as they are. calls: those of a few tokens.
    """

    devices = ("cuda",)
    backend: Any = "inductor"  # of torch.compile

    def __init__(self, handle: Handle, compiled: bool | str = False):
        self.handle, self.replays = handle, 0
        self.forward: Callable[..., Any] = handle.model.forward
        self.failed: str | None = None
        self.layers: Layers | None = None
        self.calls = Calls(self)
        if compiled:
            layers = Layers(handle, tuned=compiled == "tuned", backend=self.backend)
            if (why := layers.why_not()) is None:
                self.layers = layers
            else:
                self.plain(why)

    def install(self) -> None:
        @functools.wraps(self.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args and self._is_step(kwargs):
                if (why := self.why_not(kwargs)) is None:
                    return self._step(kwargs)
                self.handle.note_store[f"decode steps are not captured: {why}"] = None
            elif not args and self.calls.are(kwargs):
                if (why := self.calls.why_not(kwargs)) is None:
                    return self.calls.run(kwargs)
                self.handle.note_store[f"verifications are not captured: {why}"] = None
            return self.forward(*args, **kwargs)

        self.handle.model.forward = forward

    def remove(self) -> None:
        del self.handle.model.forward  # the class's own method comes to light again

    # ------------------------------------------------------------------ what can be captured
    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None or ids.shape[1] != 1 or not isinstance(cache, ContextCache) or cache.handle is not self.handle:
            return False
        if cache.broken or ids.shape[0] != len(cache.seen):  # the forward says so
            return False
        if self.handle.meter is not None:  # it wants to see every call
            return False
        if any(layer.cache.store is None for layer in cache.layers):
            return False
        waits = any(layer.cache.pending for layer in cache.layers)  # for a compression, or for methods to begin anew
        return not waits or (cache.captured is not None and self._resumes(cache))

    def _resumes(self, cache: ContextCache) -> bool:
        """Captured steps may follow the call of several tokens that came last."""
        own = [x.info is not None and x.info.window is not None for x in cache.layers]  # the model's rule, not a method's
        rows = [(i, layer.cache.rows) for i, layer in enumerate(cache.layers) if not own[i]]
        return stays(self.handle.recipe) and all(m.resumes(i, row) for m in self.handle.recipe.methods for i, row in rows)

    def why_not(self, kwargs: dict[str, Any]) -> str | None:
        """The reason this single-token step is not captured, or None."""
        recipe, model = self.handle.recipe, self.handle.model
        if self.failed is not None:
            return self.failed
        if torch.is_grad_enabled() or model.training:
            return "gradients are on; use model.eval() and torch.no_grad()"
        asked = kwargs.get("return_dict")
        if not (getattr(model.config, "return_dict", True) if asked is None else asked):
            return "the call asks for a tuple"
        if more := sorted(k for k, v in kwargs.items() if k not in PLAIN and v is not None and v is not False):
            return f"the call asks for {', '.join(more)}"
        if isinstance(recipe.cache, Method) and type(recipe.cache).evict is not Method.evict:
            if recipe.cache.evicts(0) is None:
                return f"{recipe.cache.id} drops entries while decoding"
            if all(self._drops(step) for step in range(4)):
                return f"{recipe.cache.id} drops entries after every step"
        for method in recipe.methods:
            decodes = method is recipe.decode or method is recipe.heads
            looks = type(method).observe is not Method.observe and "decode" in method.observes
            if looks and method.phase(0) is None:
                return f"{method.id} looks at the result of every step"
            if decodes and method.phase(0) is None:
                return f"{method.id} plans on the host"
            if decodes and method.whole_text and recipe.evicts:
                return f"{method.id} asks the device how far a text has come of which entries were dropped"
        for layer in kwargs["past_key_values"].layers:
            if not fixable(layer.cache.store):
                return f"storage of kind {layer.cache.store.kind!r} grows on the host"
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or not bool(mask[:, -1].all())):
            return "a row of this step is padding"
        if kwargs["input_ids"].device.type not in self.devices:
            return "CUDA graphs need a CUDA device"
        return None

    # ------------------------------------------------------------------ a step
    def _step(self, kwargs: dict[str, Any]) -> Any:
        cache, ids, at = kwargs["past_key_values"], kwargs["input_ids"], kwargs.get("position_ids")
        if cache.captured is None or not cache.captured.fits(cache):
            cache.captured = Captured(cache, ids)
        held: Captured = cache.captured
        held.settle(cache, cache.layers[0].cache.steps == 0 and self._resumes(cache))
        at = torch.full_like(ids, cache.get_seq_length()) if at is None else at  # as the model counts, padding included
        step = cache.layers[0].cache.steps
        stores = "/".join(s.phase() for s in held.stores)
        gates = self._gates(held, ids.device)
        phase, drops = f"{self._phase(step)}; {stores}; {gates}", self._drops(step)
        held.gated(gates, step)
        if self.layers is not None and (why := self.layers.trial(self.forward, held.ids, held.at)) is not None:
            self.plain(why)
        joined = phase not in held.graphs and held.join(cache)  # then stores append by another kernel than before
        if drops or phase not in held.warm or joined:
            held.warm.add(phase)
            out = self._run(cache, ids, at)
            if (held.graphs or drops) and held.memory != memory(cache):
                held.clear()  # what this step remembered is elsewhere now: they would read what it replaced
                if drops:  # methods begin anew, at any phase
                    held.warm.clear()
            return out
        held.ids.copy_(ids)
        held.at.copy_(at)
        known = phase in held.graphs
        if not known and (why := self.capture(cache, held, phase)) is not None:
            cache.captured = None
            if self.layers is None:
                self.failed = why
            else:  # the next steps try again without the compiler
                self.plain(why)
            return self._run(cache, ids, at)
        graph, logits = held.graphs[phase]
        graph.replay()
        if known:
            held.advance(cache)
        self.replays += 1
        return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=cache)

    def _phase(self, step: int) -> str:
        return "+".join(str(m.phase(step)) for m in self._deciders())

    def _gates(self, held: Captured, device: torch.device) -> str:
        """Which layers a length gate makes dense in the next step: what it lets through is another graph."""
        if not self.handle.gate:
            return ""
        lengths = [longest(s) + 1 for s in held.stores]  # type: ignore[arg-type]
        gates = [pay_off(m, "decode", device).length for m in self._deciders()]
        sides = ["".join("d" if n < gate else "s" for n in lengths) for gate in gates]
        return "+".join(side if len(set(side)) > 1 else side[:1] for side in sides)

    def _deciders(self) -> list[Method]:
        recipe = self.handle.recipe
        return [m for m in (recipe.decode, recipe.heads) if isinstance(m, Method)]

    def _drops(self, step: int) -> bool:
        """The cache policy may drop entries after decode step number `step`."""
        policy = self.handle.recipe.cache
        return isinstance(policy, Method) and bool(policy.evicts(step))

    def _run(self, cache: ContextCache, ids: Tensor, at: Tensor) -> Any:
        n, plain = ids.shape[1], contextlib.nullcontext()
        layers = self.layers if n == 1 or self.calls.compiled else None
        with layers or plain, plain if n == 1 else few(self.handle, cache):
            return self.forward(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=n)

    def plain(self, why: str) -> None:
        self.layers = None
        self.handle.note_store[f"layers are not compiled: {why}"] = None

    def capture(self, cache: ContextCache, held: Captured | Call, phase: str) -> str | None:
        """Record a step or a call (nothing runs on the device, the host counts it) or return why that could not be done."""
        captured: Captured = cache.captured  # type: ignore[assignment]
        before = [(vars(c) | {"seen": list(c.seen)}, s.counted()) for c, s in captured.pairs(cache)]
        columns = [layer.columns for layer in cache.layers]
        try:
            if isinstance(held, Call):
                if captured.graphs and captured.memory != memory(cache):  # steps of before read what is elsewhere now
                    captured.clear()
                    captured.warm.clear()
                held.opens(cache)
            graph = self.record(cache, held)
            if isinstance(held, Call):
                held.closes(cache)
            captured.graphs[phase], captured.memory = graph, memory(cache)
        except Exception as err:
            for (layer_cache, store), (then, counted) in zip(captured.pairs(cache), before, strict=True):
                for name in ("seen", "steps", "fresh", "pending"):
                    setattr(layer_cache, name, then[name])
                store.recount(counted)
                layer_cache.forget()
            for layer, count in zip(cache.layers, columns, strict=True):
                layer.columns, layer.open = count, False
            cache.broken = False
            return f"the capture failed: {str(err).splitlines()[0] if str(err) else type(err).__name__}"
        return None

    def record(self, cache: ContextCache, held: Captured | Call) -> tuple[Any, Tensor]:
        """(the graph of a step or a call, its logits); the host has counted it, the device has not run it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=held.pool):
            logits = self._run(cache, held.ids, held.at).logits
        return graph, logits


class Captured:
    """The graphs over one cache, and the tensors they read.

    Attributes:
        stores: one a layer; graphs hold their addresses. ids, at: `[B, 1]`, token and position of the step.
        warm: phases that ran once. graphs: phase -> (graph, its logits `[B, 1, V]`). memory: where the methods' tensors
            were when the last one was recorded. gates: what the length gates said of the last step. calls: of a few tokens,
            by their number; their graphs are among the others.
    """

    def __init__(self, cache: ContextCache, ids: Tensor):
        self.stores: list[Fixed] = []
        for layer in cache.layers:
            layer.cache.store = fixed = fix(layer.cache.store, layer.cache.seen)
            assert isinstance(fixed, Fixed)
            fixed.stays, fixed.moved = cache.handle is not None and stays(cache.handle.recipe), False
            self.stores.append(fixed)
        self.ids, self.at = torch.zeros_like(ids), torch.zeros_like(ids)
        self.warm: set[str] = set()
        self.graphs: dict[str, tuple[Any, Tensor]] = {}
        self.memory: list[tuple[int, ...]] = []
        self.calls: dict[int, Call] = {}
        self.gates = ""
        self.pool = self._pool()
        self.rows = [(s, s.seen_now) for s in self.stores]  # reordered rows have new tensors

    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self.ids.device.type == "cuda" else None

    def clear(self) -> None:
        """Drop all graphs; those to come share another memory pool, since torch gives up a pool with its last graph."""
        self.graphs.clear()
        self.pool = self._pool()

    def settle(self, cache: ContextCache, resumes: bool) -> None:
        """Several tokens came in, or some went, in the memory of these stores: drop the graphs, unless they go on."""
        if any(s.moved for s in self.stores):
            if not resumes or (self.graphs and self.memory != memory(cache)):
                self.clear()
                self.warm.clear()
            for s in self.stores:
                s.moved = False

    def gated(self, gates: str, step: int) -> None:
        """Steps that a gate keeps dense ask no method. Where it opens behind the first one after a call of several tokens,
        graphs of an earlier call would go on with what that one's first step remembered: drop them."""
        if step and gates != self.gates and any(s.stays for s in self.stores):
            self.clear()
            self.warm.clear()
        self.gates = gates

    def fits(self, cache: ContextCache) -> bool:
        """The cache still has these stores, as they were, and room for a token."""
        same = all(layer.cache.store is s for layer, s in zip(cache.layers, self.stores, strict=True))
        return same and not any(s.full for s in self.stores) and all(s.seen_now is t for s, t in self.rows)

    def join(self, cache: ContextCache) -> bool:
        """Let each store write the page bounds that lie beside it along with its tokens; whether any did not before."""
        new = False
        for layer, store in self.pairs(cache):
            bounds = next((held for held in layer.batch.values() if isinstance(held, Bounds)), None)
            new, store.beside = new or bounds is not store.beside, bounds
        return new

    def pairs(self, cache: ContextCache) -> list[tuple[Any, Fixed]]:
        return [(layer.cache, s) for layer, s in zip(cache.layers, self.stores, strict=True)]

    def advance(self, cache: ContextCache) -> None:
        """Count one more token on the host."""
        for layer in cache.layers:
            layer.columns += 1
        for layer_cache, store in self.pairs(cache):
            layer_cache.seen = [s + 1 for s in layer_cache.seen]
            layer_cache.steps += 1
            layer_cache.pending = False
            store.replayed()


def stays(recipe: Recipe) -> bool:
    """Whether graphs of this recipe may outlive a call of several tokens: all its methods have a word on it."""
    return recipe.cache is None and all(type(m).resumes is not Method.resumes for m in recipe.methods)


def memory(cache: ContextCache) -> list[tuple[int, ...]]:
    """Where everything is that methods remember beside these layers."""
    return places([(layer.cache.batch, layer.cache.rows) for layer in cache.layers])
