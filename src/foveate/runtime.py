"""One attention call of one layer: append, plan, attend, observe, and the lazy compression. No model in sight.

The adapter hands over what the model computed; tests drive it with random tensors. Data goes one way:
queries, keys, values -> cache -> method -> layout -> kernel -> output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .cache import LayerCache
from .cache.offload import Near, OffloadStore, bring, fetch, fetch_parts, follow
from .cache.offload import whole as whole_view
from .cache.store import last_positions, longest
from .combine import sink_logit
from .errors import UnsupportedError
from .kernels.dispatch import attend
from .kv import KV
from .layout import Layout, Part, Parts
from .methods.base import AttnInput, Method, Rope, Selection, State
from .payoff import pay_off
from .pieces import by_pieces
from .recipe import Recipe

STORES = "runtime.stores"  # in `state.run`: the stores in host memory by layer, as far as steps have come


class Meter(Protocol):
    """Watches calls. `seconds` is the time `plan` took (0 on a device whose clock was not asked)."""

    def planned(self, x: AttnInput, plan: Layout | Parts, seconds: float) -> None: ...

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None: ...


@dataclass
class Step:
    """One forward of the model, shared by its layers.

    Attributes:
        valid: bool `[B, N]`, real tokens of this call, or None when all are.
        counts: real tokens per row. shared: `state.step`, one for each batch row and one (key None) for all of them.
        run: `state.run`. notes: sentences for the user, kept once.
    """

    valid: Tensor | None = None
    counts: list[int] = field(default_factory=list)
    shared: dict[int | None, dict[str, Any]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    meter: Meter | None = None
    gate: bool = False  # dense below the lengths from which methods pay (never in compare, eval and tests)

    def note(self, text: str) -> None:
        self.notes[text] = None

    def state(self, cache: LayerCache, row: int | None = None) -> State:
        """What a method may remember: of one batch row, or (None) of all of them together."""
        layer = cache.batch if row is None else cache.rows[row]
        return State(layer, self.shared.setdefault(row, {}), self.run, [] if row is not None else cache.rows)


@dataclass(frozen=True)
class Info:
    """What stays the same for a layer: its number, the number of layers, scale, softcap, window, sinks, rotation."""

    layer: int
    layers: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None  # learned sink logits [H], gpt-oss
    rope: Rope | None = None
    backend: str | None = None


def attention(recipe: Recipe, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, step: Step, info: Info) -> Tensor:
    """Attend q `[B, H, N, D]` over the cache and the new k, v `[B, G, N, D]`, which are stored first.

    Rows of padding (`step.valid` False) return zeros. Returns `[B, H, N, Dv]`.
    """
    b, _, n, _ = q.shape
    counts = step.counts or [n] * b
    single = n == 1 and all(c == 1 for c in counts)
    if single and cache.pending:
        compress(recipe, cache, step, info)
    cache.append(k, v, step.valid, counts, recipe.stored)
    if isinstance(cache.store, OffloadStore) and cache.store.k.device != q.device:
        bring((cache.batch, *cache.rows), cache.store.k.device if single else q.device)
    if single:
        cache.tails = [None] * b  # the queries saved for a compression are not the last ones any more
        out = _decode(recipe, cache, q, step, info)
        cache.steps += 1
        return out
    cache.steps = 0
    out = _prefill(recipe, cache, q, v.shape[-1], step, info, counts)
    cache.pending = True
    if recipe.compress_at == "chunk":
        compress(recipe, cache, step, info)
    return out


# ---------------------------------------------------------------------- prefill: one row at a time, unpadded
def _prefill(recipe: Recipe, cache: LayerCache, q: Tensor, dv: int, step: Step, info: Info, counts: list[int]) -> Tensor:
    method: Method | None = recipe.prefill  # type: ignore[assignment]
    tail = max((m.tail for m in recipe.methods), default=0)
    b, h, n, _ = q.shape
    view = _at(q, cache.store.view())  # type: ignore[union-attr]
    whole = step.valid is None and view.len is None
    if whole and b > 1 and tail == 0 and _plain(recipe, method) and view.pos is None:
        x = _input(q, view, "prefill", info, step, cache.seen[0] - n, last_positions(cache.seen, n, q.device))
        return _run(recipe, x, None, step.state(cache), step, info)
    out = q.new_zeros(b, h, n, dv)
    for i in range(b):
        if counts[i] == 0:
            continue
        real = slice(None) if counts[i] == n else step.valid[i]  # type: ignore[index]
        qi = q[i : i + 1, :, real]
        kv = view.row(i)
        if kv.len is not None and kv.kind == "dense":  # one row has one length; cut instead of masking
            m = cache.store.lens[i][0]  # type: ignore[union-attr]
            kv = type(kv).dense(
                kv.k[:, :, :m],
                kv.v[:, :, :m],
                pos=None if kv.pos is None else kv.pos[:, :, :m],
                bias=None if kv.bias is None else kv.bias[:, :, :m],
            )
        start = cache.seen[i] - counts[i]
        x = _input(qi, kv, "prefill", info, step, start, last_positions([cache.seen[i]], counts[i], q.device))
        run = _run if method is None or not method.apart else _run_pieces
        oi = run(recipe, x, method, step.state(cache, i), step, info)
        cache.save_tail(i, qi, tail)
        if b == 1 and whole:
            return oi
        out[i : i + 1, :, real] = oi
    return out


def _at(q: Tensor, view: KV) -> KV:
    """The view on the device of q: entries that live elsewhere are lent for this call."""
    return view if view.device == q.device else whole_view(view, q.device)


def _plain(recipe: Recipe, method: Method | None) -> bool:
    return (method is None or method.id == "dense") and recipe.heads is None and not _observers(recipe, "prefill")


# ---------------------------------------------------------------------- decode: all rows at once
def _decode(recipe: Recipe, cache: LayerCache, q: Tensor, step: Step, info: Info) -> Tensor:
    view = cache.store.view()  # type: ignore[union-attr]
    x = _input(q.to(view.device), view, "decode", info, step, 0, cache.positions(1, view.device), cache.steps)
    if step.gate:
        x.stored = longest(cache.store)  # type: ignore[arg-type]
    near = None
    if isinstance(cache.store, OffloadStore):
        near = cache.store.near
        if view.device != q.device:
            stores = step.run.setdefault(STORES, WeakValueDictionary())
            stores[info.layer] = cache.store
            follow(stores, info.layer, q.device)
    out = _run(recipe, x, recipe.decode, step.state(cache), step, info, q.device, near)  # type: ignore[arg-type]
    policy: Method | None = recipe.cache  # type: ignore[assignment]
    if policy is not None and type(policy).evict is not Method.evict and info.window is None:
        keep = policy.evict(x, step.state(cache))
        if keep is not None:
            cache.select(keep, [keep.row(i) for i in range(q.shape[0])])
    return out


def _run_pieces(recipe: Recipe, x: AttnInput, method: Method | None, state: State, step: Step, info: Info) -> Tensor:
    """`_run`, some kv heads at a time where nobody looks at all of them together."""
    watched = step.meter is not None or bool(_observers(recipe, x.phase)) or recipe.heads is not None
    whole = watched or info.sinks is not None or x.window is not None
    return by_pieces(x, None if whole else method, lambda piece: _run(recipe, piece, method, state, step, info))


# ---------------------------------------------------------------------- both
def _run(
    recipe: Recipe,
    x: AttnInput,
    method: Method | None,
    state: State,
    step: Step,
    info: Info,
    home: torch.device | None = None,
    near: Near | None = None,
) -> Tensor:
    """Plan and attend. `home` is where the model computes, if the entries lie elsewhere: the plan is made beside them, and
    `near` is what the last step fetched of them."""
    own_window = x.window is not None  # the model's own sliding-window layer: its rule, not the method's
    observers = [] if own_window else _observers(recipe, x.phase)
    began = time.perf_counter()
    plan = _window(x, method) if own_window else _plan(recipe, x, method, state, step)
    spent = time.perf_counter() - began
    if step.meter is not None:
        step.meter.planned(x, plan, spent)
    want_lse = info.sinks is not None or any("lse" in m.sees for m in observers)
    want_mass = any("mass" in m.sees for m in observers)
    if info.sinks is not None and isinstance(plan, Parts) and plan.combine == "gated":
        raise UnsupportedError("a gated sum of softmaxes has no place for the model's attention sinks")
    custom = None if own_window else getattr(method, "attend", None)
    q, kv, what = x.q, x.kv, plan
    if home is not None and home != kv.device:
        if custom is not None or observers:
            who = ", ".join(m.id for m in {method, *observers} if m is not None)
            raise UnsupportedError(f"storage: with entries on {kv.device} and the model on {home}, {who} cannot attend")
        q = q.to(home)
        if isinstance(plan, Parts):
            what = fetch_parts(kv, plan, home)
            assert what.parts[0].kv is not None
            kv = what.parts[0].kv  # each part has its own
        else:
            kv, what = fetch(kv, plan, home, near)
    if custom is not None:
        out, lse, mass = custom(x, plan, state)
    else:
        got = attend(
            q,
            kv,
            what,
            scale=info.scale,
            softcap=info.softcap,
            return_lse=want_lse,
            return_mass=want_mass,
            backend=info.backend,
        )
        out, *extra = got if isinstance(got, tuple) else (got,)
        lse = extra.pop(0) if want_lse else None
        mass = extra.pop(0) if want_mass else None
    for m in observers:  # who did not ask would take what another method's arithmetic gives for that of all keys
        m.observe(x, out, lse if "lse" in m.sees else None, mass if "mass" in m.sees else None, state)
    if info.sinks is not None:
        assert lse is not None
        out, _ = sink_logit(out, lse, info.sinks)
    if step.meter is not None:
        step.meter.attended(x, plan, out)
    return out


def _window(x: AttnInput, method: Method | None) -> Layout:
    """The plan of a layer with the model's own sliding window."""
    assert x.window is not None
    if method is not None and method.id != "dense":
        x.note(f"{method.id}: layers with the model's own sliding window keep that rule")
    if x.kv.capacity <= x.window:
        return x.dense()
    return Layout.static(
        x.shape,
        window=x.window,
        block_q=128 if x.phase == "prefill" else 1,
        q_offset=x.offset(128) if x.phase == "prefill" else 0,
        q_pos=x.layout_pos(),
        device=x.device,
        validate=False,
    )


def _plan(recipe: Recipe, x: AttnInput, method: Method | None, state: State, step: Step) -> Layout | Parts:
    plan = _plan_of(x, method, state, step)
    heads: Method | None = recipe.heads  # type: ignore[assignment]
    if heads is None or x.phase not in heads.roles:
        return plan
    own = _plan_of(x, heads, state, step)
    mask = heads.owns(x, state)
    if mask is None:
        return own
    if isinstance(plan, Layout) and isinstance(own, Layout):
        return Layout.by_head(mask, own, plan)
    one_softmax = isinstance(plan, Parts) and plan.combine == "lse" and not hasattr(method, "attend")
    if not isinstance(plan, Parts) or not isinstance(own, Layout) or not one_softmax:
        raise UnsupportedError(f"heads: {heads.id} cannot share a layer with a method that plans several softmaxes")
    rest = tuple(replace(part, layout=_only(~mask, part.layout)) for part in plan.parts)
    return Parts((*rest, Part(_only(mask, own))))


def _only(heads: Tensor, layout: Layout) -> Layout:
    """The layout with nothing for all but these heads (bool `[H]`)."""
    shared: dict[str, Any] = dict(causal=layout.causal, q_pos=layout.q_pos)
    nothing = Layout.static(layout.shape, device=heads.device, **shared) if layout.full else Layout(layout.shape, **shared)
    return Layout.by_head(heads, layout, nothing)


def _plan_of(x: AttnInput, method: Method | None, state: State, step: Step) -> Layout | Parts:
    if method is None:
        return x.dense()
    if x.phase == "prefill" and x.kv.pos is not None and not method.evicted_ok:
        x.note(f"{method.id}: this cache has evicted entries; the new prompt part runs dense")
        return x.dense()
    n = x.kv.capacity if x.stored is None else x.stored
    if step.gate and n < (gate := pay_off(method, x.phase, x.device)).length:
        x.note(f"{method.id}: {gate}")
        return x.dense()
    plan = method.plan(x, state)
    return x.dense() if plan is None else plan


def _observers(recipe: Recipe, phase: str) -> list[Method]:
    return [m for m in recipe.methods if type(m).observe is not Method.observe and phase in m.observes]


def _input(q: Tensor, kv: Any, phase: str, info: Info, step: Step, start: int, q_pos: Tensor, number: int = 0) -> AttnInput:
    note: Callable[[str], None] = step.note
    return AttnInput(
        q=q,
        kv=kv,
        phase=phase,
        layer=info.layer,
        layers=info.layers,
        scale=info.scale,
        start=start,
        step=number,
        q_pos=q_pos,
        softcap=info.softcap,
        rope=info.rope,
        window=info.window,
        backend=info.backend,
        note=note,
    )


def compress(recipe: Recipe, cache: LayerCache, step: Step, info: Info) -> None:
    """Ask the cache policy which entries stay, row by row or of all rows at once, and drop the others for good."""
    policy = recipe.cache
    assert policy is None or isinstance(policy, Method)
    if isinstance(cache.store, OffloadStore):
        bring((cache.batch, *cache.rows), cache.store.k.device)
    if policy is None or cache.store is None or info.window is not None:
        cache.pending = False
        return
    chosen: list[Selection] = []
    view, b = cache.store.view(), len(cache.seen)
    drops, whole = False, policy.together and _alike(cache)
    for i in range(1 if whole else b):
        kv, at = (view, slice(0, b)) if whole else (view.row(i), slice(i, i + 1))
        lens, seen = cache.store.lens[i], cache.seen[at]
        m = max(lens)
        if kv.kind == "dense" and min(lens) == m:
            cut = {n: t[:, :, :m] for n in ("pos", "bias") if (t := getattr(kv, n)) is not None}
            kv = type(kv).dense(kv.k[:, :, :m], kv.v[:, :, :m], **cut)
        tails = [t for t in cache.tails[at] if t is not None]
        q = torch.cat(tails) if tails else view.k.new_empty(len(seen), 1, 0, view.k.shape[-1])
        q = q.to(view.device)
        rows = q.shape[2]
        x = _input(q, kv, "prefill", info, step, seen[0] - rows, last_positions(seen, rows, view.device))
        got = policy.compress(x, step.state(cache, i))
        drops = drops or got is not None
        if got is None:  # keeps everything of this row
            everything = torch.arange(m, device=view.device).expand(len(seen), kv.shape[1], m)
            got = Selection(everything, None if min(lens) == m else torch.tensor([lens], device=view.device))
        chosen += [got.row(j) for j in range(b)] if whole else [got]
    if drops:
        cache.select(Selection.stack(chosen), chosen)
    cache.pending = False  # last: a policy that failed is asked again


def _alike(cache: LayerCache) -> bool:
    """All rows and heads have as many entries, and all rows have seen as many tokens and saved as many queries."""
    assert cache.store is not None
    lens = {n for row in cache.store.lens for n in row}
    tails = {None if t is None else t.shape for t in cache.tails}
    return len(lens) == len(set(cache.seen)) == len(tails) == 1
