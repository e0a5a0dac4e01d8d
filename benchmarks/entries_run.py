"""Attention of one decode step over single listed entries on a GPU, and what the same methods launch around it.

    python benchmarks/entries_run.py [--tokens 131072] [--layers 8] [--rounds 3] [--sweep] [--out FILE]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, lengths on the device, in CUDA graphs over several layers with caches of their
own, so that no call finds its entries in the L2 cache; figures are per layer, all calls take turns. Lists are random, as
long as those of the methods named. "votes" is scores and votes, "scores" what of it is not votes. "pillar: set" is a choice
of its set, once a draft, "pillar: list" the set and the tokens since, in every step. `--sweep` also times other launch
constants.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from decode_run import D, G, H, capture, interleave
from torch import Tensor

from foveate.bench import results
from foveate.bench.prefill import Turn
from foveate.bench.results import Row
from foveate.kernels.triton import estimate_votes_launch as votes
from foveate.kernels.triton import kept_lists, paging_launch
from foveate.kernels.triton import ranked_steps_launch as ranked
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, LayerState, State
from foveate.methods.pillar_attn import PillarAttn
from foveate.scores.turns import Turns

SPEED = 4.1  # terabytes a second that a floor stands for: what the fastest dense kernel reads on an H200
LISTS = {
    "dsa": (1, 2048),
    "adamas": (32, 128),
    "double_sparsity": (32, 1024),
    "topk_exact": (8, 2048),
    "pillar_attn": (8, 6576),
}
RANKED = 2688
Call = Callable[[], Any]
ENTRY = ("ENTRIES", "ENTRY_SHARE", "ENTRY_WARPS", "ENTRY_STAGES")
SWEEP: tuple[tuple[Any, tuple[str, ...], dict[str, int]], ...] = (
    *((paging_launch, tuple(LISTS), dict(zip(ENTRY, c, strict=True))) for c in (
        (64, 2, 4, 2), (64, 3, 4, 3), (64, 1, 4, 3), (64, 4, 4, 2), (128, 1, 8, 2), (128, 2, 8, 2), (32, 4, 4, 3),
    )),
    *((ranked, ("ranked",), dict(KEYS=k, SHARE=s, WARPS=w, STAGES=st)) for k, s, w, st in (
        (64, 2, 8, 2), (64, 3, 8, 2), (32, 2, 4, 3), (32, 3, 4, 3), (32, 4, 4, 2),
    )),
    *((votes, ("votes",), dict(VOTES=k, LINES=n, READ=s)) for k, n, s in (
        (512, 8, 1), (1024, 8, 2), (512, 4, 4), (512, 16, 2), (256, 8, 3),
    )),
    (votes, ("votes",), dict(STAY=0)),
)  # fmt: skip


def entries(lists: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """`lists` random lists of n different entries, ascending: (int32 `[1, lists, 1, n]`, counts)."""
    rows = [torch.randperm(m, device="cuda")[:n].sort().values for _ in range(lists)]
    return torch.stack(rows)[None, :, None].int(), torch.full((1, lists, 1), n, dtype=torch.int32, device="cuda")


def calls(kv: KV, m: int, draw: Callable[..., Tensor], shared: dict[str, Any]) -> dict[str, Call]:
    """One layer's calls."""
    q, scale = draw(1, H, 1, D), 1 / math.sqrt(D)
    out: dict[str, Call] = {}
    for name, (lists, n) in LISTS.items():
        e, count = entries(lists, min(n, m), m)
        layout = Layout((1, H, 1, kv.capacity), entries=e, entry_count=count)
        out[name] = functools.partial(paging_launch.attend, q, kv, layout, scale, False)
    assert kv.len is not None
    pos = kv.lengths()[:, :1].long() - 1
    x = AttnInput(q, kv, "decode", 2, 4, scale, step=1, q_pos=pos, rope=Turn())
    turns = Turns.of(x, shared, "entries_run")
    assert turns is not None
    tokens, count = entries(1, min(RANKED, m), m)
    tokens, count = tokens[:, 0, 0], count[:, 0, 0]
    table, how = turns.asked(tokens.shape[1]), dict(scale=scale, softcap=None, halves=turns.halves)
    out["ranked"] = lambda: ranked.attend(q, kv.k, kv.v, tokens, count, table, turns.partner, **how)  # type: ignore[arg-type]
    voter = q.float()
    out["scores"] = lambda: votes._scores(voter, kv.k, kv.len, None, 128, 512, 1.0, None, True)
    out["votes"] = lambda: votes.votes(voter, kv.k, kv.len, lists=1, first=128, tail=512, scale=1.0)
    pillar = PillarAttn()
    state, score = State(rows=[LayerState()]), torch.rand(1, G, kv.capacity, device="cuda")
    held = pillar._select(x, state, score, pos - 8, 8, 0, 0)
    begin = held.first[:, 0]
    out["pillar: set"] = lambda: pillar._select(x, state, score, pos - 8, 8, 0, 0)
    out["pillar: list"] = lambda: kept_lists.extend(held.index, begin, pos, 17, used=held.count)
    return out


def floor(name: str, m: int) -> float | None:
    """Microseconds in which a call's bytes can be read, or None where launches are what it costs."""
    lists, n = LISTS.get(name, (1, RANKED if name == "ranked" else 0))
    read = G * m * D * 2 if name in ("scores", "votes") else max(lists, G) * n * 4 * D
    return read / SPEED / 1e6 if read else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="also time other launch constants")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    m, rows = args.tokens, []
    draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    with torch.inference_mode():
        length, shared = torch.full((1, G), m, dtype=torch.int32, device="cuda"), {}
        kvs = [KV.dense(draw(1, G, m + 256, D), draw(1, G, m + 256, D), len=length) for _ in range(args.layers)]
        these = [calls(kv, m, draw, shared) for kv in kvs]
        graphs = {name: (capture([layer[name] for layer in these]), args.layers) for name in these[0]}
        for module, names, options in SWEEP if args.sweep else ():
            before = {key: getattr(module, key) for key in options}
            plans = [p for p in (getattr(module, n, None) for n in ("_plan", "_entries_plan")) if p is not None]
            try:
                for key, value in options.items():
                    setattr(module, key, value)
                for name in names:
                    for plan in plans:
                        plan.cache_clear()
                    label = f"{name} {' '.join(f'{key.lower()} {value}' for key, value in options.items())}"
                    graphs[label] = capture([layer[name] for layer in these]), args.layers
            except Exception as err:
                print(f"  {names} {options}: {type(err).__name__} {str(err).splitlines()[0][:80]}", flush=True)
            finally:
                for key, value in before.items():
                    setattr(module, key, value)
                for plan in plans:
                    plan.cache_clear()
        for name, ms in interleave(graphs, args.rounds).items():
            spread, least = results.spread(ms), floor(name.split(" ")[0], m)
            rows.append(Row(f"{m} tokens, batch 1", name, dict(b=1, n=m, h=H, g=G, d=D, layers=args.layers), spread))
            said = "" if least is None else f"  floor {least:.1f} us"
            print(f"{name:60s} {1e3 * spread['median']:8.1f} us{said}", flush=True)
    if args.out:
        results.write(args.out, results.result("entries", rows, torch.device("cuda")))


if __name__ == "__main__":
    main()
