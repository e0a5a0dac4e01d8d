"""One decode step of one layer of token_select on a GPU: its parts, a list that is used again, and dense attention.

    python benchmarks/token_select_run.py [--cases 131072x1,32768x8] [--layers 6] [--rounds 5] [--sweep] [--out FILE]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, lengths on the device, in CUDA graphs over several layers with caches of their
own, so that no call finds its data in the L2 cache; figures are per layer, all calls of a case take turns. What the layers
of a step share (the table of rotations) is made once outside, and timed alone: "table" is per step, not per layer. `--sweep`
also times other launch constants of the kernels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from decode_run import D, G, H, capture, interleave

import foveate
from foveate.bench import results
from foveate.bench.prefill import Turn
from foveate.bench.results import Row
from foveate.kernels.triton import estimate_votes_launch as votes
from foveate.kernels.triton import ranked_steps_launch as ranked
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.token_select import KEYS, TOKENS, TURNS, TokenSelect
from foveate.scores.entries import best_entries
from foveate.scores.turns import Turns

SPEED = 4.1  # terabytes a second that a floor stands for: what the fastest dense kernel reads on an H200
Call = Callable[[], Any]
SWEEP: tuple[tuple[Any, str, dict[str, Any]], ...] = (
    *((votes, "votes", dict(STAY=s)) for s in (0, 24 << 20)),
    *((votes, "votes", dict(KEYS=k, STAGES=s, WARPS=w)) for k, s, w in ((128, 3, 8), (64, 6, 4), (64, 4, 4), (256, 2, 8))),
    *((votes, "votes", dict(SPLITS=s)) for s in (32, 33, 128)),
    *((votes, "votes", dict(VOTES=k, LINES=n, READ=s)) for k, n, s in ((512, 8, 1), (1024, 8, 3), (512, 16, 2))),
    *((ranked, "attend", dict(KEYS=k, SHARE=s, STAGES=st, WARPS=w)) for k, s, st, w in (
        (32, 3, 0, 4), (32, 2, 2, 4), (32, 4, 2, 4), (32, 6, 0, 4), (64, 2, 2, 8), (64, 1, 2, 8), (16, 3, 2, 4),
    )),
)  # fmt: skip


class Layer:
    """One layer's cache and what its step has remembered: of a method without theta and of one with it."""

    def __init__(self, q: torch.Tensor, kv: KV, shared: dict[str, Any]):
        pos = kv.lengths()[:, :1].long() - 1
        self.x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(D), step=1, q_pos=pos, rope=Turn())
        self.shared, self.plain, self.cached = shared, TokenSelect(), TokenSelect(theta=0.9)
        self.states = [State(), State()]
        for method, state in zip((self.plain, self.cached), self.states, strict=True):
            state.step = shared
            method.plan(replace(self.x, step=0), state)

    def step(self, state: State, method: TokenSelect) -> torch.Tensor:
        state.layer[KEYS].step = 0  # as if every replay were the step after the first
        return method.attend(self.x, method.plan(self.x, state), state)[0]  # type: ignore[arg-type]

    def anew(self) -> torch.Tensor:
        """A step whose list is due: its query is like none. A launch more than a model has."""
        self.states[1].layer[TOKENS].query.zero_()
        return self.step(self.states[1], self.cached)

    def calls(self) -> dict[str, Call]:
        x, kv, (plain, cached) = self.x, self.x.kv, self.states
        total, local = self.plain.total, self.plain.local
        turns = Turns.of(x, self.shared, TURNS)
        assert turns is not None
        raw, held = plain.layer[KEYS].data, cached.layer[TOKENS]
        table, wide = turns.asked(total), turns.asked(total + self.cached.refresh)
        common = (x.q, kv, x.q_pos, raw)
        voter, query = ranked.turn_step(*common, table, turns.partner, near=local, last=total - 1)
        none = torch.zeros_like(kv.len)  # type: ignore[arg-type]
        how = dict(lists=1, first=self.plain.sink, tail=local, scale=1.0)
        vote = votes.votes(voter, raw[:, :, : kv.capacity], kv.len, **how)  # type: ignore[arg-type]
        pick = dict(sink=self.plain.sink, recent=local)
        tokens, count = best_entries(vote, total, length=kv.len, **pick)
        tokens, count = tokens[:, 0], count[:, 0]
        state = (held.query, held.pos, held.count)
        heads: Any = dict(scale=x.scale, softcap=None, halves=turns.halves)
        own = dict(near=local, total=total, theta=0.9, refresh=64)

        def decide() -> Any:
            return ranked.decide(*common, wide, turns.partner, state, first=False, **own)  # type: ignore[arg-type]

        def scores(length: torch.Tensor | None) -> Any:
            return votes.votes(voter, raw[:, :, : kv.capacity], length, **how)  # type: ignore[arg-type]

        def logits() -> Any:
            return votes._scores(voter, raw[:, :, : kv.capacity], kv.len, None, self.plain.sink, local, 1.0, None, True)

        look, now = decide()[2:]
        return {
            "dense": lambda: foveate.attend(x.q, kv),
            "turn": lambda: ranked.turn_step(*common, table, turns.partner, near=local, last=total - 1),
            "scores": logits,
            "votes": lambda: scores(kv.len),
            "choice": lambda: best_entries(vote, total, length=kv.len, **pick),
            "attend": lambda: ranked.attend(query, raw, kv.v, tokens, count, table, turns.partner, **heads),
            "step": lambda: self.step(plain, self.plain),
            "again: decide": decide,
            "again: votes": lambda: scores(none),
            "again: choice": lambda: best_entries(vote, total, length=none, **pick),
            "again: keep": lambda: ranked.keep(tokens, look, now, held.tokens, held.pos, held.count),
            "again: step": lambda: self.step(cached, self.cached),
            "due: step": self.anew,
        }


def floor(name: str, b: int, n: int) -> float | None:
    """Microseconds in which a call's bytes can be read, or None where launches are what it costs."""
    key, total = 2 * b * G * D, 2688
    read = {"dense": 2 * n * key, "scores": n * key, "votes": n * key, "step": (n + 2 * total) * key}
    read |= {"attend": 2 * total * key, "again: step": 2 * total * key, "due: step": read["step"]}
    return read[name] / SPEED / 1e6 if name in read else None


def case(b: int, n: int, layers: int, rounds: int, sweep: bool) -> list[Row]:
    draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    length = torch.full((b, G), n, dtype=torch.int32, device="cuda")
    shared: dict[str, Any] = {}
    kvs = [KV.dense(draw(b, G, n, D), draw(b, G, n, D), len=length) for _ in range(layers)]
    these = [Layer(0.3 * draw(b, H, 1, D), kv, shared) for kv in kvs]
    calls = [layer.calls() for layer in these]

    def table() -> Any:
        turns = Turns.of(these[0].x, {}, TURNS)
        assert turns is not None
        return turns.asked(these[0].plain.total)

    graphs = {name: (capture([call[name] for call in calls]), layers) for name in calls[0]}
    graphs["table"] = capture([table]), 1
    keep: list[Any] = []  # graphs read tensors that nothing else may hold
    if sweep:
        graphs |= variants(these, keep)
    rows, where = [], f"{n} tokens, batch {b}"
    for name, ms in interleave(graphs, rounds).items():
        spread, least = results.spread(ms), floor(name, b, n)
        rows.append(Row(where, f"token_select: {name}", dict(b=b, n=n, h=H, g=G, d=D, layers=graphs[name][1]), spread))
        said = "" if least is None else f"  floor {least:.1f} us"
        print(f"{where:26s} {name:44s} {1e3 * spread['median']:8.1f} us{said}", flush=True)
    return rows


def variants(these: list[Layer], keep: list[Any]) -> dict[str, tuple[torch.cuda.CUDAGraph, int]]:
    """Calls under other launch constants."""
    graphs = {}
    for module, name, options in SWEEP:
        before = {key: getattr(module, key) for key in options}
        try:
            for key, value in options.items():
                setattr(module, key, value)
            votes._plan.cache_clear()
            label = f"sweep {name} {' '.join(f'{key.lower()} {value}' for key, value in options.items())}"
            keep.append([layer.calls() for layer in these])
            graphs[label] = capture([calls[name] for calls in keep[-1]]), len(these)
        except Exception as err:
            print(f"  {name} {options}: {type(err).__name__} {str(err).splitlines()[0][:80]}")
        finally:
            for key, value in before.items():
                setattr(module, key, value)
            votes._plan.cache_clear()
    return graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="131072x1,32768x8", help="TOKENSxBATCH, comma between them")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also time other launch constants")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for text in args.cases.split(","):
            n, b = (int(part) for part in text.split("x"))
            rows += case(b, n, args.layers, args.rounds, args.sweep)
            torch.cuda.empty_cache()
    if args.out:
        results.write(args.out, results.result("token_select", rows, torch.device("cuda")))


if __name__ == "__main__":
    main()
