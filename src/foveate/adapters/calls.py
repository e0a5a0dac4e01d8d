"""Calls of a few tokens as CUDA graphs: the verification of drafts, dense attention of k + 1 queries a row.

Where decode steps are captured over a cache, and all methods of the recipe say that these go on behind a call of several
tokens (`Method.resumes`), the call is captured too. Its stores take the tokens where device tensors say and hand out views
of one shape (`Fixed.wide`), so attention has a function of its own here, `attention`, that knows no length on the host. What
methods observe runs inside the graph; what the host remembers of it is put back after each replay, which must not depend on
how long the cache is: two calls that leave different things behind are a reason not to capture any. An `observe` inside a
graph may therefore look at shapes and tensors, `x.q_pos` among them, but not at `x.start`.

The first call of so many tokens runs as it is, so does the second (through the compiler, if layers are compiled), the third
is captured, all later ones are replayed.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import runtime
from ..cache import LayerCache
from ..cache.fixed import Fixed
from ..combine import sink_logit
from ..kernels.dispatch import attend
from ..layout import Layout
from ..methods.base import LayerState, Method
from ..runtime import Info, Step
from .context import ContextCache

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .graphs import Captured, Graphs
    from .transformers import Handle

NAME = "foveate_few"
MOST = 32  # tokens of a call
COUNTS = 4  # most numbers of tokens that one cache has graphs for
MISSES = 4  # calls in a row that may each leave other things behind before none is captured


class Calls:
    """The calls of a few tokens of a model whose steps are captured.

    Attributes:
        replays: calls that were replayed. failed: why none is captured any more, or None. most: tokens of the longest call
            that is captured; 0 switches them off. compiled: the next one runs through the compiler, if layers are compiled.
    """

    def __init__(self, graphs: Graphs):
        self.graphs, self.replays, self.most, self.compiled = graphs, 0, MOST, False
        self.failed: str | None = None
        self.compiles = True  # until a capture fails

    def are(self, kwargs: dict[str, Any]) -> bool:
        """Whether this may be such a call: few tokens, the logits of all of them, over a cache with captured steps."""
        ids, cache, handle = kwargs.get("input_ids"), kwargs.get("past_key_values"), self.graphs.handle
        if ids is None or not 1 < ids.shape[1] <= self.most or not isinstance(cache, ContextCache):
            return False
        keep, n = kwargs.get("logits_to_keep"), ids.shape[1]
        if isinstance(keep, Tensor) or keep != n or cache.handle is not handle or handle.meter is not None:
            return False
        if cache.broken or cache.captured is None or ids.shape[0] != len(cache.seen):
            return False
        mask = kwargs.get("attention_mask")
        return mask is None or (mask.dim() == 2 and bool(mask[:, -n:].all()))

    def why_not(self, kwargs: dict[str, Any]) -> str | None:
        """The reason this call is not captured, or None."""
        recipe: Recipe = self.graphs.handle.recipe
        if self.failed is not None:
            return self.failed
        for method in recipe.methods:
            if type(method).resumes is Method.resumes:
                return f"{method.id} does not say that its steps go on behind them"
        for store in kwargs["past_key_values"].captured.stores:
            if type(store).takes is Fixed.takes:
                return f"storage of kind {store.kind!r} takes several tokens on the host"
        for other in (recipe.prefill, recipe.heads):
            if isinstance(other, Method) and other.id != "dense":
                return f"{other.id} plans on the host"
        for method in recipe.methods:
            if method.tail:
                return f"{method.id} wants their queries"
        for method in runtime._observers(recipe, "prefill"):
            if "mass" in method.sees:
                return f"{method.id} wants the mass of every entry"
        return self.graphs.why_not({name: value for name, value in kwargs.items() if name != "attention_mask"})

    def run(self, kwargs: dict[str, Any]) -> Any:
        """The call, as it is or replayed."""
        cache, ids, at = kwargs["past_key_values"], kwargs["input_ids"], kwargs.get("position_ids")
        graphs, n, held = self.graphs, ids.shape[1], cache.captured
        if not (held.fits(cache) and all(s.takes(n) for s in held.stores)):
            return graphs.forward(**kwargs)  # other stores than those of the steps, or no room in them: they grow
        if n not in held.calls and len(held.calls) == COUNTS:
            return graphs.forward(**kwargs)
        if n not in held.calls:
            held.calls[n] = Call(held, ids)
        call, key = held.calls[n], f"call of {n}"
        first = cache.get_seq_length()
        at = torch.arange(first, first + n, device=ids.device).expand_as(ids) if at is None else at
        known = key in held.graphs
        self.compiled = self.compiles and call.tries > 0
        call.ids.copy_(ids)
        call.at.copy_(at)
        if not known and not (call.ready and call.there == places([x.cache.rows for x in cache.layers])):
            return self._plainly(cache, call)
        if not known and (why := graphs.capture(cache, call, key)) is not None:
            call.ready = False
            if self.compiles and graphs.layers is not None:  # the next ones try again without the compiler
                self.compiles = False
                graphs.handle.note_store[f"verifications are not compiled: {why}"] = None
            else:
                self.failed = why
            return graphs.forward(**kwargs)
        graph, logits = held.graphs[key]
        graph.replay()
        if known:
            call.advance(cache)
        self.replays += 1
        return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=cache)

    def _plainly(self, cache: ContextCache, call: Call) -> Any:
        """Run what will be captured, and see whether it leaves behind what the last one did."""
        graphs = self.graphs
        if self.compiled and graphs.layers is not None:
            with few(graphs.handle, None):
                why = graphs.layers.trial(graphs.forward, call.ids, call.at - call.at[:, :1])
            if why is not None:
                self.compiles = self.compiled = False
                graphs.handle.note_store[f"verifications are not compiled: {why}"] = None
        out = graphs._run(cache, call.ids, call.at)
        call.saw(cache)
        if call.misses == MISSES:
            who = ", ".join(m.id for m in runtime._observers(graphs.handle.recipe, "prefill")) or "the cache"
            self.failed = f"what {who} keeps of one differs from the next"
        return out


class Call:
    """The calls of n tokens over one cache.

    Attributes:
        ids, at: `[B, n]`, tokens and positions that the graph reads.
        tries: calls that ran as they are. ready: the last two of them left the same things behind. misses: how often they
            did not, one after the other. there: where the tensors of these things lie.
        changed: by layer and batch row, what the call changes in `LayerCache.rows`: (names that go, values that come).
    """

    def __init__(self, held: Captured, ids: Tensor):
        self.held, self.tries, self.misses, self.ready = held, 0, 0, False
        self.there: list[tuple[int, ...]] = []
        with torch.inference_mode(False):  # written by calls of any mode; dense, whatever ids is a part of
            self.ids, self.at = (torch.zeros(ids.shape, dtype=ids.dtype, device=ids.device) for _ in range(2))
        self.left: object = None
        self.before: list[list[dict[Any, tuple[Any, object]]]] = []
        self.changed: list[list[tuple[list[Any], dict[Any, Any]]]] = []
        self.pending = True

    @property
    def pool(self) -> Any:
        return self.held.pool

    def saw(self, cache: ContextCache) -> None:
        """A call has run as it is."""
        left = self._left(cache)
        self.ready = self.tries > 0 and left == self.left
        self.misses = 0 if self.ready else self.misses + (self.tries > 0)
        self.left, self.there, self.tries = left, places([layer.cache.rows for layer in cache.layers]), self.tries + 1

    def _left(self, cache: ContextCache) -> object:
        return facts([[layer.cache.rows for layer in cache.layers], cache.run])

    def opens(self, cache: ContextCache) -> None:
        """The call is about to be recorded."""
        self.before = [
            [{name: (value, facts(value)) for name, value in row.items()} for row in x.cache.rows] for x in cache.layers
        ]

    def closes(self, cache: ContextCache) -> None:
        """It was recorded, and the host has done its part. RuntimeError if that was not what it did before."""
        if self._left(cache) != self.left:
            self.ready = False
            raise RuntimeError("what methods keep of one call differs from the next")
        self.changed = [
            [_change(old, row) for old, row in zip(before, layer.cache.rows, strict=True)]
            for before, layer in zip(self.before, cache.layers, strict=True)
        ]
        self.before, self.pending = [], cache.layers[0].cache.pending

    def advance(self, cache: ContextCache) -> None:
        """Count the tokens of a replayed call on the host, and remember what it does of them."""
        n = self.ids.shape[1]
        for layer in cache.layers:
            layer.columns += n
        for (held, store), changed in zip(self.held.pairs(cache), self.changed, strict=True):
            held.seen = [s + n for s in held.seen]
            held.fresh = (held.fresh if held.pending else 0) + n
            held.steps, held.pending = 0, self.pending
            for row, (gone, new) in zip(held.rows, changed, strict=True):
                for name in gone:
                    row.pop(name, None)
                row.update({name: twin(value) for name, value in new.items()})
            store.replayed(n)


def _change(old: dict[Any, tuple[Any, object]], row: LayerState) -> tuple[list[Any], dict[Any, Any]]:
    new = {k: twin(v) for k, v in row.items() if k not in old or old[k][0] is not v or old[k][1] != facts(v)}
    return [name for name in old if name not in row], new


def twin(value: Any) -> Any:
    """A copy of a value of `state.layer` that shares its tensors. A bare `object()`, which names something, is a new one."""
    if type(value) is object:
        return object()
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        out = copy.copy(value)
        out.update({name: twin(part) for name, part in value.items()})
        return out
    if type(value) in (list, tuple):
        return type(value)(twin(part) for part in value)
    if hasattr(value, "__dict__") and not callable(value):
        out = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(out, name, twin(part))
        return out
    return value


def places(held: Any) -> list[tuple[int, ...]]:
    """Address and shape of every tensor inside a value of `state.layer`, in a fixed order."""
    if isinstance(held, Tensor):
        return [(held.data_ptr(), *held.shape)]
    if isinstance(held, (dict, list, tuple)):
        parts = held.values() if isinstance(held, dict) else held
        return [place for part in parts for place in places(part)]
    return places(vars(held)) if hasattr(held, "__dict__") else []


def facts(value: Any) -> object:
    """What can be compared of a value of `state.layer`: numbers, names, where its tensors lie; of other objects the type."""
    if isinstance(value, Tensor):
        return value.data_ptr(), tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return [(name, facts(part)) for name, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [facts(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value), [(name, facts(part)) for name, part in vars(value).items()] if hasattr(value, "__dict__") else None


# ---------------------------------------------------------------------- attention of such a call
_THREAD = threading.local()


@contextlib.contextmanager
def few(handle: Handle, cache: ContextCache | None) -> Iterator[None]:
    """Attention of the calls in this block is `attention`, over this cache, or without one."""
    from .transformers import NAME as PLAIN

    decoder = handle.decoder
    stores: list[Any] = [] if cache is None else [layer.cache.store for layer in cache.layers]
    decoder.set_attn_implementation(NAME)
    _THREAD.call = handle, cache
    for store in stores:
        store.wide = True
    try:
        yield
    finally:
        for store in stores:
            store.wide = False
        _THREAD.call = None
        decoder.set_attn_implementation(PLAIN)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if getattr(_THREAD, "call", None) is None:  # the forward of another thread, while this model's function is ours
        from .transformers import _attend as plain

        given = dict(scaling=scaling, softcap=softcap, sliding_window=sliding_window, s_aux=s_aux)
        return plain(module, query, key, value, attention_mask, **given, **kwargs)
    handle, cache = _THREAD.call
    info, n = handle.info(module, scaling, softcap, sliding_window, s_aux), query.shape[2]
    step = Step(counts=[n] * query.shape[0], notes=handle.note_store)
    if cache is None:
        out = runtime.attention(handle.recipe, LayerCache(), query, key, value, step, info)
    else:
        layer, step.run = cache.layers[module.layer_idx], cache.run
        layer.info = info
        try:
            out = attention(handle.recipe, layer.cache, query, key, value, step, info)
        except BaseException:
            cache.broken = True
            raise
        layer.columns += n
    return out.transpose(1, 2).contiguous(), None


def attention(recipe: Recipe, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, step: Step, info: Info) -> Tensor:
    """What `runtime.attention` computes for a few real tokens of every row under dense attention, without asking the host
    for a length: q `[B, H, n, D]` over the cache and the new k, v `[B, G, n, D]`. Returns `[B, H, n, Dv]`."""
    b, _, n, _ = q.shape
    cache.append(k, v, None, [n] * b, recipe.stored)
    cache.steps = 0
    assert cache.store is not None
    view, at = cache.store.view(), cache.positions(n, q.device)
    x = runtime._input(q, view, "prefill", info, step, 0, at)
    if info.window is None or view.capacity <= info.window:
        plan = Layout.dense(*x.shape)
    else:
        plan = Layout.static(x.shape, window=info.window, block_q=1, q_pos=at, device=q.device, validate=False)
    observers = [] if info.window is not None else runtime._observers(recipe, "prefill")
    want_lse = info.sinks is not None or bool(observers)  # it costs nothing here, and saves who asks for it a pass over keys
    got = attend(q, view, plan, scale=info.scale, softcap=info.softcap, return_lse=want_lse, backend=info.backend)
    out, lse = got if isinstance(got, tuple) else (got, None)
    for i in range(b) if observers else ():
        row = slice(i, i + 1)
        start = cache.seen[i] - n  # old in a replay, see above
        one = runtime._input(q[row], view.row(i), "prefill", info, step, start, at[row])
        for m in observers:
            m.observe(one, out[row], None if lse is None else lse[row], None, step.state(cache, i))
    if info.sinks is not None:
        assert lse is not None
        out, _ = sink_logit(out, lse, info.sinks)
    cache.pending = True
    if recipe.compress_at == "chunk":
        runtime.compress(recipe, cache, step, info)
    return out


AttentionInterface.register(NAME, _attend)
