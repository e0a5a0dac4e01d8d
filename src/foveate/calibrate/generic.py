"""The generic search: one hyperparameter, bisected until one error level for all heads holds the target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout, Parts
from ..methods.base import AttnInput, LayerState, Method, State
from ..methods.search import Found, Target
from ..scores.kept import Sampled, loss

FIRST, NEXT, PASSES = 9, 7, 3  # values of the first pass (both ends included) and of each later one: 1/512 of the range
STEPS = 4  # decode steps of a prompt that a decode-only method is judged on


# ---------------------------------------------------------------------- one plan against dense
@dataclass(frozen=True)
class Figures:
    """What a plan keeps, mean over heads: recall (NaN where a method's own arithmetic gives no log-sum-exp), relative L1
    loss, pairs named and pairs computed over causal pairs (NaN where they were not asked for)."""

    recall: float
    loss: float
    density: float = math.nan
    computed: float = math.nan

    def tensor(self) -> Tensor:
        """fp64 `[4]`."""
        return torch.tensor([self.recall, self.loss, self.density, self.computed], dtype=torch.float64)


class Judge:
    """Dense attention of one captured call, and what methods keep of it.

    Methods that serve prefill plan the whole prompt, and are judged on sampled rows; decode-only methods plan single
    steps at the end of the prompt, each over the keys before it.
    """

    def __init__(self, x: AttnInput, *, decode: bool = False, backend: str | None = None):
        calls = _steps(x) if decode else [x]
        self.backend = backend
        self.calls = [(c, Sampled(c.q, c.kv, _pos(c), scale=c.scale, softcap=c.softcap, seed=c.layer)) for c in calls]
        self._whole: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, method: Method, step: dict[str, Any] | None = None, *, count: bool = False) -> Figures:
        """Figures of a method. `step` is the memory that its layers share; `count` pairs as well."""
        got = [self._one(i, method, State(step=step if step is not None else {}), count) for i in range(len(self.calls))]
        return Figures(*torch.stack(got).mean(0).tolist())

    def _one(self, i: int, method: Method, state: State, count: bool) -> Tensor:
        x, dense = self.calls[i]
        if x.phase == "decode":
            state.rows = [LayerState()]
        plan = method.plan(x, state)
        plan = x.dense() if plan is None else plan
        custom = getattr(method, "attend", None)
        if custom is None and isinstance(plan, Layout):
            recall, wrong = dense.judge(plan)
        else:
            out, lse = self._attend(x, plan) if custom is None else custom(x, plan, state)[:2]
            want, full = self._dense(i)
            recall = torch.full((1,), math.nan) if lse is None else torch.exp(lse - full).clamp(max=1.0)
            wrong = loss(out[0], want[0])
        named, computed = _pairs(x, plan) if count else (math.nan, math.nan)
        return Figures(float(recall.mean()), float(wrong.mean()), named, computed).tensor()

    def _dense(self, i: int) -> tuple[Tensor, Tensor]:
        if i not in self._whole:
            self._whole[i] = self._attend(self.calls[i][0], self.calls[i][0].dense())
        return self._whole[i]

    def _attend(self, x: AttnInput, plan: Layout | Parts) -> tuple[Tensor, Tensor]:
        got = attend(x.q, x.kv, plan, scale=x.scale, softcap=x.softcap, return_lse=True, backend=self.backend)
        return got[0], got[1]


def judge(method: Method, x: AttnInput, *, backend: str | None = None) -> Figures:
    """What a method keeps of one captured call `x` (a whole prompt), pairs counted."""
    return Judge(x, decode=decodes(method), backend=backend)(method, count=True)


def decodes(method: Method) -> bool:
    """Whether a method is judged on decode steps. ConfigError if it plans neither phase."""
    if "prefill" in method.roles:
        return False
    if "decode" in method.roles:
        return True
    raise ConfigError(f"{method.id}: the generic search judges plans of prefill and decode; it serves as {method.roles[0]}")


def _steps(x: AttnInput) -> list[AttnInput]:
    """Single decode steps in the last quarter of a prompt, each over the keys up to its own."""
    n = x.q.shape[2]
    kv = x.kv.to_dense()
    out = []
    for t in sorted({n - 1 - i * n // (4 * STEPS) for i in range(STEPS)}):
        one = KV.dense(kv.k[:, :, : t + 1], kv.v[:, :, : t + 1])
        out.append(replace(x, q=x.q[:, :, t : t + 1], kv=one, phase="decode", q_pos=torch.tensor([[t]], device=x.device)))
    return out


def _pos(x: AttnInput) -> Tensor:
    assert x.q_pos is not None
    return x.q_pos


def _pairs(x: AttnInput, plan: Layout | Parts) -> tuple[float, float]:
    """(named, computed) pairs over those of dense attention."""
    parts = [(plan, x.kv)] if isinstance(plan, Layout) else [(p.layout, p.kv or x.kv) for p in plan.parts]
    visible = float(x.dense().pairs(x.kv).sum())
    named = sum(float(layout.pairs(kv).sum()) for layout, kv in parts)
    return named / visible, sum(layout.computed(kv=kv) for layout, kv in parts) / visible


# ---------------------------------------------------------------------- the search
class Bisect:
    """Bisection of `method.knob` to a target, several values a pass (see `Search` for the contract).

    Every pass judges its values on all captured layers of all prompts and takes the mean over layers, prompts and heads.
    Values are walked from the end that surely holds the target (most pairs for recall and loss, fewest for density) up
    to the first that does not; the next pass looks between it and the last that did. What is found is the last value
    that held: for recall and loss the cheapest, for density the richest.
    """

    passes = PASSES
    wants_grad = False

    def __init__(self, method: Method, target: Target, backend: str | None = None):
        if method.knob is None:
            raise ConfigError(f"{method.id}: it names no hyperparameter to bisect")
        self.method, self.target, self.knob, self.backend = method, target, method.knob, backend
        self.decode = decodes(method)
        self.known: dict[float, Tensor] = {}  # value: mean figures [4]
        low, high = float(self.knob.low), float(self.knob.high)
        keeps = (high, low) if self.knob.more else (low, high)  # (most pairs, fewest)
        self.bracket = keeps if target.kind != "density" else keeps[::-1]  # (holds, does not)
        self._start(self._between(*self.bracket, FIRST - 2, ends=True))

    def _start(self, values: list[float]) -> None:
        self.values = values
        self.sums = torch.zeros(len(values), 4, dtype=torch.float64)
        self.calls = 0
        self._steps: list[dict[str, Any]] = []
        self._layer = -1

    def _between(self, a: float, b: float, count: int, ends: bool = False) -> list[float]:
        """Values from a to b, evenly spaced (their logarithms, if the knob says so), without repetition."""
        if self.knob.log:
            a, b = math.log(a), math.log(b)
        steps = range(0 if ends else 1, count + (2 if ends else 1))
        raw = [a + (b - a) * i / (count + 1) for i in steps]
        raw = [math.exp(v) for v in raw] if self.knob.log else raw
        low, high = float(self.knob.low), float(self.knob.high)
        made = [min(max(round(v) if self.knob.whole else float(f"{v:.6g}"), low), high) for v in raw]
        return [v for v in dict.fromkeys(made) if v not in self.known]

    def method_at(self, value: float) -> Method:
        return replace(self.method, **{self.knob.name: int(value) if self.knob.whole else value})

    # ------------------------------------------------------------------ the contract
    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        if x.layer <= self._layer or not self._steps:  # another prompt: what layers of a forward share starts anew
            self._steps = [{} for _ in self.values]
        self._layer = x.layer
        if not self.values:
            return
        one = Judge(x, decode=self.decode, backend=self.backend)
        for i, value in enumerate(self.values):
            got = one(self.method_at(value), self._steps[i], count=self.target.kind == "density")
            self.sums[i] += got.tensor()
        self.calls += 1

    def end_pass(self) -> None:
        for i, value in enumerate(self.values):
            self.known[value] = self.sums[i] / max(1, self.calls)
        good, bad = self.bracket = self._narrowed(*self.bracket)
        self._start(self._between(good, bad, NEXT) if self._holds(good) and good != bad else [])

    def aim(self, value: float) -> None:
        """Another value of the target for the next `finish`, to what the passes so far have tried."""
        self.target = replace(self.target, value=value)
        low, high = min(self.known), max(self.known)
        most_first = self.knob.more == (self.target.kind != "density")
        self.bracket = self._narrowed(*((high, low) if most_first else (low, high)))

    def _narrowed(self, good: float, bad: float) -> tuple[float, float]:
        """(the last value that holds, the first that does not) of those known from `good` to `bad`."""
        inside = sorted((v for v in self.known if min(good, bad) <= v <= max(good, bad)), reverse=good > bad)
        for value in inside:
            if not self._holds(value):
                return good, value
            good = value
        return good, bad

    def _holds(self, value: float) -> bool:
        recall, wrong, _, computed = self.known[value].tolist()
        if self.target.kind == "recall":
            if math.isnan(recall):
                raise ConfigError(f"{self.method.id}: its arithmetic gives no attention mass; use --target loss=... for it")
            return bool(recall >= self.target.value)
        return bool((wrong if self.target.kind == "loss" else computed) <= self.target.value)

    def finish(self) -> Found:
        value = self.bracket[0]
        recall, wrong, _, computed = self.known[value].tolist()
        tried = [{"value": v, "recall": f[0], "loss": f[1], "computed": f[3]} for v, f in self._tried()]
        report = {"recall": recall, "loss": wrong, "computed": computed, "holds": self._holds(value), "tried": tried}
        return Found({self.knob.name: int(value) if self.knob.whole else value}, report=_plain(report))

    def _tried(self) -> list[tuple[float, list[float]]]:
        return [(v, self.known[v].tolist()) for v in sorted(self.known)]

    def state(self) -> dict[str, Tensor]:
        wide = {"values": self.values, "bracket": self.bracket, "known": list(self.known), "calls": [self.calls]}
        out = {name: torch.tensor(v, dtype=torch.float64) for name, v in wide.items()}
        figures = list(self.known.values())
        return out | {"sums": self.sums, "figures": torch.stack(figures) if figures else torch.zeros(0, 4)}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.known = dict(zip(state["known"].tolist(), state["figures"].double(), strict=True))
        good, bad = state["bracket"].tolist()
        self.bracket = good, bad
        self._start(state["values"].tolist())
        self.sums, self.calls = state["sums"].clone(), int(state["calls"])


def _plain(value: Any) -> Any:
    """JSON values: NaN and infinity become None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
