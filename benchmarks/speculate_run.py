"""A cycle of self-speculation of a model of Llama-3-8B's shape: drafts, the verification and both rollbacks, beside as many
dense steps.

    python benchmarks/speculate_run.py [--cases 131072x1] [--draft 8] [--accepted 6] [--cycles 8] [--layers 32] [--out FILE]
        [--ways graphs,compiled] [--tiny]

Random weights and random caches: what is accepted means nothing, so every cycle keeps `--accepted` of the drafted tokens and
the one behind them. A cycle is what `foveate.speculate.generate` asks of the model: the drafts one by one, a rollback of
them, one dense call of draft + 1 tokens, a rollback of those that fall. Its parts are timed by themselves as well, on the
device and on the host; `verify` is replayed, `verify eager` the same call without its graph, in cycles behind the others.
`token_ms` is a cycle by the tokens it gives, `token_ms_at` the same were 0, 1, ... of the drafted tokens accepted (what a
cycle takes hardly depends on it), `gain_at` how many times as fast as dense steps that is; `even_at` is the number of tokens
a cycle must give to be as fast as those. `captures` counts graphs recorded while the clock ran: 0. `--tiny` is a dry run on
the CPU, without graphs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import step_run

import foveate
from foveate.bench import results

PARTS = ("draft", "back", "verify", "reject")
WARM = 4  # cycles before the clock: the third one records the last graph
EAGER = 4  # cycles whose verification is not replayed, the first of them without the clock


class Clock:
    """Milliseconds of named parts, on the device and, until the call returns, on the host."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.parts: dict[str, list[tuple[Any, Any]]] = {}
        self.host: dict[str, list[float]] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> None:
        began, edges = time.perf_counter(), [torch.cuda.Event(enable_timing=True) for _ in range(2 * self.cuda)]
        if self.cuda:
            edges[0].record()
        work()
        spent = 1e3 * (time.perf_counter() - began)
        if self.cuda:
            edges[1].record()
            self.parts.setdefault(name, []).append((edges[0], edges[1]))
        self.host.setdefault(name, []).append(spent)

    def ms(self) -> dict[str, list[float]]:
        """Of every part; waits for the device."""
        if not self.cuda:
            return self.host
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(z) for a, z in pairs] for name, pairs in self.parts.items()}


def call(net: Any, cache: Any, ids: Tensor) -> Tensor:
    out = net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=ids.shape[1])
    return out.logits.argmax(-1)  # type: ignore[no-any-return]


def dense(net: Any, entries: list[tuple[Tensor, Tensor]], m: int, way: dict[str, Any], steps: int) -> dict[str, float]:
    """Milliseconds of a dense step, graphs as for drafts."""
    b, device = entries[0][0].shape[0], entries[0][0].device
    token = torch.full((b, 1), 5, device=device)
    with torch.no_grad(), foveate.use(net, "dense", **way) as handle:
        cache = step_run.context(entries, m, handle)
        for _ in range(4):
            call(net, cache, token)
        return results.spread(step_run.timed(lambda: call(net, cache, token), steps, device)[0])


def cycles(
    net: Any, entries: list[tuple[Tensor, Tensor]], m: int, way: dict[str, Any], draft: int, accepted: int, times: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any]]:
    """(milliseconds of whole cycles and of their parts, those of the host, facts)."""
    b, device = entries[0][0].shape[0], entries[0][0].device
    token = torch.full((b, draft + 1), 5, device=device)
    with torch.no_grad(), foveate.use(net, f"pillar_attn:draft={draft}", **way) as handle:
        cache, clock = step_run.context(entries, m, handle), Clock(device)
        recorded: list[int] = []
        if handle.graphs is not None:
            record = handle.graphs.record
            handle.graphs.record = lambda *args: (recorded.append(1), record(*args))[1]  # type: ignore[method-assign,func-returns-value]

        def drafts() -> None:
            for i in range(draft):
                call(net, cache, token[:, i : i + 1])

        def cycle() -> None:
            clock("draft", drafts)
            clock("back", lambda: cache.crop(-draft))
            clock("verify", lambda: call(net, cache, token))
            clock("reject", lambda: cache.crop(accepted - draft))

        for _ in range(WARM):
            cycle()
        clock, whole, before = Clock(device), Clock(device), len(recorded)
        replays, calls = (handle.graphs.replays, handle.graphs.calls.replays) if handle.graphs is not None else (0, 0)
        for _ in range(times):
            whole("cycle", cycle)
            if device.type == "cuda":
                torch.cuda.synchronize()  # as the loop does when it looks at what stands
        facts: dict[str, Any] = {"captures": len(recorded) - before}
        if handle.graphs is not None:
            facts["replays"] = handle.graphs.replays - replays
            facts["verifications"] = handle.graphs.calls.replays - calls
            why = "; ".join(handle.notes) or "no reason given"
            if facts["replays"] < draft * times:
                raise RuntimeError(f"only {facts['replays']} of {draft * times} drafted steps were replayed: {why}")
            if facts["verifications"] < times:
                raise RuntimeError(f"only {facts['verifications']} of {times} verifications were replayed: {why}")
        ms, host = clock.ms() | whole.ms(), clock.host | whole.host
        if handle.graphs is not None:
            handle.graphs.calls.most = 0
            for i in range(EAGER):
                clock = Clock(device) if i < 2 else clock
                cycle()
            ms["verify eager"], host["verify eager"] = clock.ms()["verify"], clock.host["verify"]
        return ms, {name: statistics.median(spent) for name, spent in host.items()}, facts


def case(net: Any, b: int, m: int, way: str, args: argparse.Namespace) -> list[results.Row]:
    entries, options = step_run.memory(net, b, m), step_run.WAYS[way][1]
    one = dense(net, entries, m, options, args.cycles * 4)
    ms, host, facts = cycles(net, entries, m, options, args.draft, args.accepted, args.cycles)
    whole, name = results.spread(ms["cycle"]), f"{m} tokens, batch {b}"
    facts |= {"way": way, "draft": args.draft, "accepted": args.accepted, "layers": net.config.num_hidden_layers}
    facts |= {"dense_ms": round(one["median"], 3), "token_ms": round(whole["median"] / (args.accepted + 1), 3)}
    facts["even_at"] = round(whole["median"] / one["median"], 2)
    facts["token_ms_at"] = " ".join(f"{whole['median'] / (a + 1):.3f}" for a in range(args.draft + 1))
    facts["gain_at"] = " ".join(f"{one['median'] * (a + 1) / whole['median']:.3f}" for a in range(args.draft + 1))
    rows = [results.Row(name, f"cycle, {way}", facts | {"host_ms": round(host["cycle"], 3)}, whole)]
    rows += [
        results.Row(name, f"{p}, {way}", {"host_ms": round(host[p], 3)}, results.spread(ms[p])) for p in ms if p != "cycle"
    ]
    for row in rows:
        print(f"{name:26s} {row.impl:20s} {row.ms['median']:9.3f} ms  {row.params}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="131072x1", help="TOKENSxBATCH, comma between them")
    parser.add_argument("--ways", default="graphs,compiled", help=f"comma between them: {', '.join(step_run.WAYS)}")
    parser.add_argument("--draft", type=int, default=8)
    parser.add_argument("--accepted", type=int, default=6, help="drafted tokens that every cycle keeps")
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small model and a short context on the CPU, without graphs")
    args = parser.parse_args(argv)
    if not 0 <= args.accepted <= args.draft:
        parser.error(f"--accepted: expected 0 to {args.draft} of the drafted tokens, got {args.accepted}")
    if (need := (args.cycles + WARM + EAGER) * (args.accepted + 1) + args.draft) > step_run.ROOM:
        parser.error(f"--cycles: expected at most {step_run.ROOM} tokens behind the context, got {need}")
    ways = ["plain"] if args.tiny else [way.strip() for way in args.ways.split(",")]
    if unknown := [way for way in ways if way not in step_run.WAYS]:
        parser.error(f"--ways: expected some of {', '.join(step_run.WAYS)}, got {', '.join(unknown)}")
    device = torch.device("cpu" if args.tiny else "cuda")
    asked = "300x1" if args.tiny and args.cases == parser.get_default("cases") else args.cases
    cases = [tuple(int(n) for n in text.split("x")) for text in asked.split(",")]
    shape = step_run.TINY if args.tiny else step_run.SHAPE | {"num_hidden_layers": args.layers}
    net, rows = step_run.model(shape, max(m for m, _ in cases), device), []
    for m, b in cases:
        for way in ways:
            rows += case(net, b, m, way, args)
            step_run.release()
            if args.out:
                results.write(args.out, results.result("speculate", rows, device))


if __name__ == "__main__":
    main()
