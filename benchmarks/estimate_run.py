"""Estimators of one layer on a GPU: plain PyTorch against fused kernels, and whole plans, beside dense attention.

    python benchmarks/estimate_run.py [--out FILE] [--rounds 5]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, queries that peak at a few keys and distances. Everything of one length
takes turns in one process. `share` in the params is the part of the dense time (cuDNN, causal). "graph" rows replay a CUDA
graph, so they show the device alone; the others include what the host needs for its launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from foveate.bench import results
from foveate.bench.results import Row
from foveate.kernels.triton import estimate_launch as kernels
from foveate.kernels.triton import estimate_lowbit_launch as lowbit
from foveate.kv import KV
from foveate.methods.anchor_attention import AnchorAttention
from foveate.methods.base import AttnInput, State
from foveate.methods.flexprefill import FlexPrefill
from foveate.methods.hip import HiP
from foveate.methods.minference import MInference
from foveate.methods.sale import SALE
from foveate.methods.spargeattn import SpargeAttn
from foveate.methods.xattention import XAttention
from foveate.scores import antidiagonal, fused, pooled, probes, similarity, votes

H, G, D = 32, 8, 128
PLANS = {
    "minference": MInference(),
    "minference block_sparse": MInference(pattern="block_sparse"),
    "flexprefill": FlexPrefill(),
    "flexprefill all pairs": FlexPrefill(tau=10.0),
    "hip": HiP(dense_layers=0),
    "hip, a list per kv head": HiP(dense_layers=0, share="group"),
    "anchor_attention": AnchorAttention(),
    "anchor_attention, a list per kv head": AnchorAttention(share="group"),
    "sale": SALE.make("8k"),
    "sale, a list per kv head": SALE.make("8k", share="group"),
    "xattention": XAttention(),
    "spargeattn": SpargeAttn.make("8k"),
}
SLOW, LONG = ("plan of hip", "plan of sale"), 32768  # plans that take seconds in plain PyTorch: only up to this length
WAITS = ("plan of sale", "plan of anchor_attention")  # beyond that length they ask for their longest list: no graph
Call = Callable[[], Any]


def problem(n: int) -> AttnInput:
    gen = torch.Generator("cuda").manual_seed(n)
    draw = lambda h: torch.randn(1, h, n, D, generator=gen, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = draw(H), draw(G), draw(G)
    for i in range(6):
        q += (1.2 - 0.1 * i) * k[:, :, n // (i + 2)].repeat_interleave(H // G, 1)[:, :, None]
    kv = KV.dense(k, v)
    return AttnInput(q, kv, "prefill", 0, 1, D**-0.5, q_pos=torch.arange(n, device="cuda")[None])


def estimators(x: AttnInput) -> dict[str, Call]:
    """Each estimator through the functions that methods call."""
    m = x.q.shape[2]

    def probe(rows: int) -> Any:
        return probes.last_queries(x.q, x.kv, rows, scale=x.scale)

    def vote() -> Any:
        return probes.vote(probe(64), m, (1000,) * H, (6096,) * H, sink=30, local=100)

    def top_blocks() -> Any:
        qbar, kbar = pooled.block_pool(x.q, 128), pooled.pool_keys(x.kv, 128)
        return pooled.top_blocks(qbar, kbar, (64,) * H, first=0, block=128)

    def antidiagonals() -> Any:
        return [p.mass for p in antidiagonal.block_mass(x.q, x.kv, 16, 128, start=0, scale=x.scale)]

    def window_votes() -> Any:
        how: dict[str, Any] = dict(kernel=5, pooling="avg", reduce="mean", scale=x.scale)
        assert x.q_pos is not None
        return votes.window_votes(x.q[:, :, -64:], x.kv, x.q_pos[:, -64:], 64, **how)

    def alike() -> Any:
        return similarity.self_similarity(x.q, 128), similarity.key_similarity(x.kv, m, 64)

    return {
        "probe of 64 rows": lambda: probe(64),
        "probe of 128 rows": lambda: probe(128),
        "probe of 64 rows, lists of 1000 keys and 6096 distances": vote,
        "probe of 128 rows, numbers for 0.9 of the mass": lambda: probes.needed(probe(128), m, 0.9),
        "means of blocks of 128": lambda: (pooled.block_pool(x.q, 128), pooled.pool_keys(x.kv, 128)),
        "means of blocks of 128, scores, top 64": top_blocks,
        "votes of a window of 64 rows": window_votes,
        "antidiagonals of stride 16, mass of blocks of 128": antidiagonals,
        "similarity of blocks of 128 queries and 64 keys": alike,
        **{f"plan of {name}": lambda p=plan: p.plan(x, State()) for name, plan in PLANS.items()},
    }


def logits(x: AttnInput) -> Call:
    """Integer keys, and the logits of all pairs against bars: sale's plan without its sums and lists."""
    q, k, n = x.q[0], x.kv.k[0], x.q.shape[2]
    mean, centre = lowbit.means(q), lowbit.means(k)
    bar = torch.full((H, n), 6.0, device=q.device)
    words = torch.zeros(H, n // 64, n // 1024, dtype=torch.int32, device=q.device)
    how: dict[str, Any] = dict(start=0, scale=x.scale, share="fragment", bits=4)

    def call() -> Any:
        for g in range(G):
            at = slice(g * H // G, (g + 1) * H // G)
            same = q[at], k[g : g + 1], centre[g : g + 1], mean[at], bar[at], words[at]
            lowbit.block_bits(*same, (64, 32, 128, 128), 32, **how)
        return words

    return call


def by_triton(call: Call) -> Call:
    """The same call with sale's logits from Triton's kernel."""

    def plain() -> Any:
        before, lowbit.HOPPER = lowbit.HOPPER, False
        try:
            return call()
        finally:
            lowbit.HOPPER = before

    return plain


def block_mass(x: AttnInput) -> Call:
    """Means, probabilities of blocks, and lists that hold 0.9 of each row: only fused."""

    def call() -> Any:
        qbar, kbar = pooled.block_pool(x.q, 128), pooled.pool_keys(x.kv, 128)
        prob = kernels.block_scores(qbar, kbar, x.scale, None, 0, softmax=True)
        return kernels.top_blocks(prob, 0, 128, p=0.9)

    return call


def dense(x: AttnInput, which: SDPBackend) -> Call:
    k, v = (
        (t.repeat_interleave(H // G, 1) for t in (x.kv.k, x.kv.v))
        if which is SDPBackend.CUDNN_ATTENTION
        else (x.kv.k, x.kv.v)
    )

    def call() -> Any:
        with sdpa_kernel(which):
            return scaled_dot_product_attention(x.q, k, v, is_causal=True, enable_gqa=k.shape[1] != H)

    return call


def without_kernels(call: Call) -> Call:
    """The same call on the plain code."""

    def plain() -> Any:
        before, fused.estimates = fused.estimates, lambda t: None
        try:
            return call()
        finally:
            fused.estimates = before

    return plain


def captured(call: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def clock(call: Call) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def case(n: int, rounds: int) -> list[Row]:
    x = problem(n)
    calls = {
        "dense, cuDNN": dense(x, SDPBackend.CUDNN_ATTENTION),
        "dense, FlashAttention-2": dense(x, SDPBackend.FLASH_ATTENTION),
    }
    for name, call in estimators(x).items():
        if n <= LONG or not name.startswith(SLOW):
            calls[f"{name}: torch"] = without_kernels(call)
        calls[f"{name}: fused"] = call
        if name.startswith("plan of sale"):
            calls[f"{name}, logits by Triton: fused"] = by_triton(call)
    calls["sale's logits, by Gluon on Hopper: fused"] = logits(x)
    calls["sale's logits, by Triton: fused"] = by_triton(logits(x))
    calls["means of blocks of 128, probabilities, 0.9 of a row's mass: fused"] = block_mass(x)
    held: dict[str, float] = {}
    listed: dict[str, float] = {}
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            call()  # compiles
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            listed[name] = getattr(call(), "nbytes", 0) / 2**20  # a plan's own tensors, part of the peak
            torch.cuda.synchronize()
            held[name] = (torch.cuda.max_memory_allocated() - base) / 2**20
            ready[name] = call
            if name.endswith("fused") and (n <= LONG or not name.startswith(WAITS)):
                ready[f"{name}, graph"] = captured(call)
        except Exception as err:
            print(f"  {name}: {type(err).__name__} {str(err).splitlines()[0][:100]}", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds):
        for name in list(ready)[:: 1 if turn % 2 == 0 else -1]:
            slow = samples[name] and samples[name][0] > 50
            samples[name] += [clock(ready[name]) for _ in range(1 if slow or turn == 0 else 3)]
    took = {name: results.spread(ms[1:] or ms) for name, ms in samples.items()}
    whole = took.get("dense, cuDNN", took["dense, FlashAttention-2"])["median"]
    out = []
    for name, ms in took.items():
        memory = held.get(name.removesuffix(", graph"))
        params = dict(b=1, h=H, g=G, n=n, d=D, dtype="bfloat16", share=round(ms["median"] / whole, 5))
        if memory is not None:
            params["peak_mib"] = round(memory, 1)
            if lists := listed.get(name.removesuffix(", graph")):
                params["lists_mib"] = round(lists, 1)
        work = 4 * D * H * (n * (n + 1) / 2) / ms["median"] / 1e9 if name.startswith("dense") else None
        out.append(Row("estimate", name, params, ms, work, 1.0 if work else None))
        print(
            f"{n:7d} {name:75s} {ms['median']:9.3f} ms [{ms['min']:.3f}, {ms['max']:.3f}] {ms['median'] / whole:7.2%} of "
            f"dense, peak {memory or 0:.0f} MiB",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with torch.inference_mode():
        rows = []
        for n in (32768, 131072):
            rows += case(n, args.rounds)
            torch.cuda.empty_cache()
            if args.out:
                results.write(args.out, results.result("estimate", rows, torch.device("cuda")))


if __name__ == "__main__":
    main()
