"""Decode steps of a model's attention alone: every layer's append, plan and attend through the runtime, in CUDA graphs.

Keys, values and queries are random: a step's time depends on how much a method reads, not on what. A method's memory, its
dense first layers and what layers share are those of a model of that many layers. A cache policy has cut the caches before
the first step; what it drops between steps is measured apart (`Subject.dropping`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cache import DenseStore, LayerCache
from ..cache.fixed import Fixed, FixedDense, FixedRagged, fix
from ..kernels.dispatch import attend
from ..layout import Layout, Parts
from ..methods.base import AttnInput, LayerState, Method
from ..recipe import Recipe
from ..runtime import Info, Step, attention, compress
from ..scores.bounds import Bounds
from .prefill import Turn, clock

ROOM = 256  # tokens that fit behind a context: little, as a graph computes over capacities
DEVICES = ("cuda",)  # that have graphs
WARM = 9  # steps before the first graph: kernels are compiled, and what a method remembers stays where it is


class Stage:
    """Caches of n tokens for all layers, which all subjects share: k, v `[layers, 1, G, n + ROOM, D]`, q `[layers, 1, H,
    1, D]`, the token that every step stores, and a step of dense attention."""

    CYCLE = 8  # steps that are timed together: a multiple of the usual intervals between selections

    def __init__(self, n: int, h: int, g: int, d: int, dtype: torch.dtype, layers: int, device: torch.device):
        gen = torch.Generator(device=device).manual_seed(0)
        draw = lambda *s: torch.empty(layers, 1, *s, dtype=dtype, device=device).normal_(generator=gen)  # noqa: E731
        self.n, self.device, self.layers = n, device, layers
        self.k, self.v, self.q, self.new = draw(g, n + ROOM, d), draw(g, n + ROOM, d), draw(h, 1, d), draw(g, 1, d)
        self.infos = [Info(i, layers, d**-0.5, rope=Turn()) for i in range(layers)]
        self._dense: Subject | None = None

    def subject(self, recipe: Recipe) -> Subject:
        return Subject(self, recipe)

    def dense(self) -> Subject:
        """Dense attention, back at the end of the context: it remembers nothing else."""
        if self._dense is None:
            self._dense = Subject(self, Recipe.of("dense"))
        for cache, counted in zip(self._dense.caches, self._dense.counted, strict=True):
            cache.seen = [self.n]
            if isinstance(cache.store, FixedDense):  # in place: graphs hold these
                cache.store.now.fill_(self.n)
                cache.store.seen_now.fill_(self.n)
                cache.store.recount(counted)
            elif cache.store is not None:
                cache.store.truncate(cache.store.lens[0][0] - self.n)
        return self._dense


class Subject:
    """A recipe on the caches of a stage, warm, its steps captured where they can be.

    Attributes:
        density: pairs named by a step, of the visible, mean over layers; None where a plan is no layout.
        attends: attention of all layers over the plans of one step, or None where the method attends itself.
    """

    def __init__(self, stage: Stage, recipe: Recipe):
        self.stage, self.recipe = stage, recipe
        self.run: dict[str, Any] = {}
        method = recipe.decode
        assert method is None or isinstance(method, Method)
        self.method, self.captured = method, stage.device.type in DEVICES and capturable(method)
        self.graphs: dict[str | None, Any] = {}
        self.caches = [self._cache(i) for i in range(stage.layers)]
        self.counted = [c.store.counted() if isinstance(c.store, Fixed) else None for c in self.caches]  # before any step
        for _ in range(WARM - 2):
            self._step()
        seen = Plans()
        self._step(seen)
        self.density = seen.density
        self.attends = None if hasattr(method, "attend") else self._attends(seen)
        for cache in self.caches:
            if isinstance(cache.store, Fixed):  # it writes page bounds along with its tokens, as in a model's steps
                cache.store.beside = next((held for held in cache.batch.values() if isinstance(held, Bounds)), None)
        self._step()
        for _ in range(stage.CYCLE):
            self.advance()

    def _cache(self, i: int) -> LayerCache:
        """Layer i as if a prompt had just been read; entries share the stage's memory where no cache policy dropped any."""
        cache, n = LayerCache(), self.stage.n
        cache.store = DenseStore(self.stage.k[i], self.stage.v[i], [n])
        cache.seen, cache.rows, cache.tails = [n], [LayerState()], [None]
        compress(self.recipe, cache, Step(run=self.run), self.stage.infos[i])
        if self.captured:
            cache.store = fix(cache.store, [n])
        return cache

    def _step(self, meter: Plans | None = None) -> None:
        step, s = Step(run=self.run, meter=meter), self.stage
        for i, cache in enumerate(self.caches):
            attention(self.recipe, cache, s.q[i], s.new[i], s.new[i], step, s.infos[i])

    def _attends(self, seen: Plans) -> Callable[[], Any]:
        def calls() -> None:
            for x, plan in seen.calls:
                attend(x.q, x.kv, plan, scale=x.scale)

        calls()
        return _record(calls).replay if self.captured else calls

    # ------------------------------------------------------------------ steps
    @property
    def left(self) -> int:
        """Cycles that still fit behind the context."""
        free = [c.store.free for c in self.caches if isinstance(c.store, FixedRagged)]
        return min(ROOM - (self.caches[0].seen[0] - self.stage.n), *free, ROOM) // self.stage.CYCLE

    def advance(self) -> None:
        """One step: replayed where its phase was captured, captured where it can be, else as it is."""
        if not self.captured:
            return self._step()
        assert self.method is not None
        phase = self.method.phase(self.caches[0].steps)
        if phase not in self.graphs:
            self.graphs[phase] = _record(self._step)  # the host has counted the step, the device has not run it
            self.graphs[phase].replay()
            return None
        self.graphs[phase].replay()
        for cache in self.caches:
            assert isinstance(cache.store, Fixed)
            cache.seen, cache.steps = [n + 1 for n in cache.seen], cache.steps + 1
            cache.store.replayed()
        return None

    def cycle(self) -> None:
        """`CYCLE` steps in a row."""
        for _ in range(self.stage.CYCLE):
            self.advance()

    def dropping(self) -> tuple[int, float]:
        """(steps from one that drops entries to the next, milliseconds of such a step), or (0, 0) without captured steps,
        which have their drops in them, or a policy that names its steps. It runs as it is, the host's launches
        counted, and may move what graphs read: the last thing that is asked. One token has come since the drop before, so
        what moves is what always moves, but a head whose window grows by fractions may have nothing to drop."""
        policy = self.recipe.cache
        if not self.captured or not isinstance(policy, Method) or type(policy).evict is Method.evict:
            return 0, 0.0
        every = next((n for n in range(1, 1 << 12) if policy.evicts(n - 1)), 0)
        took = 0.0
        for _ in range(2 if every else 0):  # the first one drops what has gathered, and compiles
            for cache in self.caches:
                cache.steps = every - 1
            took = clock(self._step, self.stage.device)[0]
        return every, took


class Plans:
    """A meter that keeps what one step planned."""

    def __init__(self) -> None:
        self.calls: list[tuple[AttnInput, Layout | Parts]] = []

    def planned(self, x: AttnInput, plan: Layout | Parts, seconds: float) -> None:
        self.calls.append((x, plan))

    def attended(self, x: AttnInput, plan: Layout | Parts, out: Tensor) -> None:
        pass

    @property
    def density(self) -> float | None:
        known = [plan.density(x.kv) for x, plan in self.calls if isinstance(plan, Layout)]
        return statistics.fmean(known) if len(known) == len(self.calls) else None


def capturable(method: Method | None) -> bool:
    """Whether decode steps of this method can be recorded (see `Method.phase`)."""
    if method is None or method.phase(0) is None:
        return False
    return type(method).observe is Method.observe or "decode" not in method.observes


def _record(call: Callable[[], Any]) -> Any:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph
