"""Time every backend on seeded workloads, beside PyTorch's dense attention, in one process and in alternating rounds.

Clocks and power move by several per cent within minutes, so figures are compared within one run: each round times all
implementations of a case, dense ones included, and every second round goes backwards. On a GPU the L2 cache is
overwritten before each call. What is reported is the median over all rounds, and the error against fp64 on sampled rows.
Peers (`peers.py`) are timed on lists made beforehand in their own format; what making them took is the row's `lists_ms`.

    python -m foveate.bench.kernels --json benchmarks/results/kernels.json
    python -m foveate.bench.kernels --against cudnn,fa4,flex,minference,fsa,fla --peer fsa=PATH --peer minference=PATH
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError, UnsupportedError, nearest
from ..kernels.base import Want
from ..kernels.dispatch import BACKENDS, backend
from ..kv import KV
from ..layout import Layout
from . import peers, results, workloads
from .results import Row

DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION, "sdpa": None}
LENGTHS = {"cuda": (8192, 32768, 131072), "cpu": (2048,)}
IMPLS = {"cuda": ("cudnn", "fa2", "gluon", "triton", "flex"), "cpu": ("sdpa", "flex", "torch")}
DECODE_IMPLS = {"cuda": ("sdpa", "fa2", "gluon", "triton"), "cpu": ("sdpa", "torch")}
OURS = {"cuda": ("gluon", "triton"), "cpu": ("torch",)}  # what runs beside names that hold none of ours
PEERS = tuple(name for name in peers.PEERS if name != "flex")  # compiled FlexAttention is a backend too
SAMPLED_ROWS = 24
FLUSH = 256 << 20  # bytes written between calls: more than any L2
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Shape:
    """One attention call: keys, batch rows, query heads, kv heads, head dim, dtype, query rows (0: as many as keys)."""

    n: int
    b: int = 1
    h: int = 32
    g: int = 8
    d: int = 128
    dtype: torch.dtype = torch.bfloat16
    rows: int = 0

    @property
    def queries(self) -> int:
        return self.rows or self.n


@dataclass(frozen=True)
class Problem:
    """A named workload: `make(device)` builds the layout, `shape` the tensors; `params` go into the row."""

    case: str
    shape: Shape
    make: Callable[[torch.device], Layout]
    params: dict[str, Any]


def problems(shape: Shape) -> list[Problem]:
    """The workloads of one shape: dense, random blocks, 64-wide blocks, tiles with columns, factored, realistic."""
    h, n = shape.h, shape.n
    short = n <= 65536
    out = [Problem("dense", shape, lambda dev: Layout.dense(shape.b, h, n, n), {})]

    def add(case: str, make: Callable[..., Layout], **params: Any) -> None:
        out.append(Problem(case, shape, lambda dev: make(h, n, device=dev, **params), params))

    for density in (0.25, 0.1, 0.05, 0.02) if short else (0.1, 0.03, 0.01):
        add("blocks", workloads.random_blocks, density=density)
    for density in (0.25, 0.1, 0.05) if short else (0.1, 0.03):
        add("blocks of 64 keys", workloads.random_blocks, density=density, block_k=64)
    add("blocks of 64 x 64", workloads.random_blocks, density=0.1, block_q=64, block_k=64)
    tiles, columns = (96, 900) if n >= 16384 else (max(2, n // 512), n // 40)
    for block in (64, 128):
        add("tiles and columns", workloads.tiles_and_columns, tiles=tiles, columns=columns, block=block)
    add("diagonals and columns", workloads.diagonals_and_columns, diagonals=tiles, columns=columns)
    add("realistic", workloads.realistic, density=0.1)
    if short:
        params = dict(keep=16, block=64)
        make = lambda dev: blocks_per_token(shape, device=dev, **params)  # noqa: E731
        out.append(Problem("blocks per token", shape, make, params))
    return out


def blocks_per_token(shape: Shape, *, keep: int, block: int, device: torch.device | str = "cpu", seed: int = 0) -> Layout:
    """Per token and kv head, `keep` random key blocks of its past, its own and the first among them."""
    gen = torch.Generator(device=device).manual_seed(seed)
    count = -(-shape.n // block)
    last, number = (torch.arange(x, device=device) for x in (shape.n, count))
    last = (last // block)[:, None]
    tiles, used = [], []
    for _ in range(shape.g):
        score = torch.rand(shape.n, count, device=device, generator=gen)
        score = score.masked_fill((number == last) | (number == 0), 2).masked_fill_(number > last, -1)
        best = score.topk(min(keep, count), -1)
        tiles.append(torch.where(best.values >= 0, best.indices * block, 1 << 29).sort(-1).values.int())
        used.append((best.values >= 0).sum(-1, dtype=torch.int32))
    index, live = torch.stack(tiles)[None], torch.stack(used)[None]
    index = index.masked_fill(index == 1 << 29, 0)
    size = (shape.b, shape.h, shape.n, shape.n)
    return Layout(size, tile_width=block, tiles=index, tile_count=live)


def decode_problems(shape: Shape) -> list[Problem]:
    """One decode step: dense, and lists of pages per kv head that hold `budget` tokens."""
    b, h, n = shape.b, shape.h, shape.n
    out = [Problem("decode dense", shape, lambda dev: Layout.dense(b, h, 1, n), {})]
    for page in (16, 64):
        params = dict(page=page, budget=min(2048, n // 4))
        make = lambda dev, p=params: workloads.pages(b, h, shape.g, n, device=dev, **p)  # noqa: E731
        out.append(Problem("decode pages", shape, make, params))
    return out


def default_shapes(dev: torch.device, lengths: Sequence[int] | None = None) -> list[Shape]:
    """Llama-3-8B's heads in bf16 on a GPU, something small in fp32 on a CPU."""
    if dev.type == "cpu":
        return [Shape(n, h=8, g=2, d=64, dtype=torch.float32) for n in lengths or LENGTHS["cpu"]]
    return [Shape(n) for n in lengths or LENGTHS["cuda"]]


def run(
    *,
    device: str | torch.device | None = None,
    shapes: Sequence[Shape] | None = None,
    cases: Iterable[str] | None = None,
    impls: Sequence[str] | None = None,
    rounds: int = 3,
    budget: float | None = None,
    json: str | None = None,
    progress: Progress | None = None,
    layouts: Sequence[Problem] | None = None,
    paths: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run the kernel benchmark and return its result (see `results`), with a list `notes` of what did not run and why.

    Args:
        device: "cuda", "cpu" or None for the best there is. shapes: Llama-3-8B's at `LENGTHS` by default.
        cases: names of `problems` to keep; all by default. layouts: problems of your own instead.
        impls: dense baselines (cudnn, fa2, sdpa), backends and peers, see `IMPLS` and `PEERS`. A peer that is not here is
            left out, and `notes` says why.
        paths: folders of peers that are taken by path, as `peers.at` takes them.
        rounds: alternating rounds. budget: seconds after which no further problem is started.
        json: a file that is rewritten after every problem, so that an interrupted run keeps what it has.
        progress: called with a sentence and the share that is done.

    Raises:
        ConfigError: an unknown implementation or case.
    """
    dev = _device(device)
    impls = tuple(impls or IMPLS[dev.type])
    for name in impls:
        if name not in DENSE and name not in BACKENDS and name not in PEERS:
            known = [*DENSE, *BACKENDS, *PEERS]
            raise ConfigError(f"impls: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    shapes = default_shapes(dev) if shapes is None else shapes
    todo = list(layouts) if layouts is not None else [p for shape in shapes for p in problems(shape)]
    if cases is not None:
        cases = list(cases)
        for name in cases:
            if name not in {p.case for p in todo}:
                known = sorted({p.case for p in todo})
                raise ConfigError(f"cases: unknown name {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        todo = [p for p in todo if p.case in cases]
    began, rows, notes = time.monotonic(), [], []
    for name, path in (paths or {}).items():
        peers.at(name, path)
    for name in [x for x in impls if x in PEERS]:
        why = "a peer for GPUs" if dev.type != "cuda" else peers.why_not(name)
        if why is not None:
            notes.append(f"{name}: {why}")
            impls = tuple(x for x in impls if x != name)
    for i, problem in enumerate(todo):
        if budget is not None and time.monotonic() - began > budget:
            notes.append(f"{len(todo) - i} problems were not run: the budget of {budget:g} s was spent")
            break
        if progress:
            progress(f"{problem.case}, {problem.shape.n} tokens", i / len(todo))
        try:
            rows += _problem(problem, impls, dev, rounds, notes)
        except (RuntimeError, ValueError) as err:  # out of memory, say: the other problems still count
            notes.append(f"{problem.case} {problem.shape.n}: {_line(err)}")
        if dev.type == "cuda":
            torch.cuda.empty_cache()
        if json is not None and rows:
            results.write(json, results.result("kernels", rows, dev, notes=notes))
    return results.result("kernels", rows, dev, notes=notes)


# ---------------------------------------------------------------------- one problem
def _problem(problem: Problem, impls: Sequence[str], dev: torch.device, rounds: int, notes: list[str]) -> list[Row]:
    s = problem.shape
    gen = torch.Generator(device=dev).manual_seed(1)
    sizes = ((s.h, s.queries), (s.g, s.n), (s.g, s.n))
    q, k, v = (torch.randn(s.b, x, n, s.d, device=dev, generator=gen).to(s.dtype) for x, n in sizes)
    layout = problem.make(dev)
    density = layout.density()
    visible = (s.n - (s.queries - 1) / 2) * s.queries * s.b * s.h
    calls, errors, made = {}, {}, {}
    if problem.case != "dense" and "cudnn" in impls:  # one dense figure of the same minute is enough
        impls = [name for name in impls if name != "fa2"]
    for name in impls:
        try:
            if name in PEERS:
                run = peers.build(name, q, k, v, layout)
                call, made[name] = run.call, run.prepare
            else:
                call = _call(name, q, k, v, layout)
            errors[name] = error(call(), q, k, v, None if name in DENSE else layout)
        except UnsupportedError as err:
            notes.append(f"{problem.case} {s.n} {name}: {str(err).removeprefix(f'{name}: ')}")
            continue
        except Exception as err:  # one implementation that fails must not take the others with it
            notes.append(f"{problem.case} {s.n} {name}: {type(err).__name__}: {_line(err)}")
            continue
        calls[name] = call
    samples = interleave(calls, dev, rounds)
    lists = interleave({name: make for name, make in made.items() if name in calls}, dev, 1)
    params = dict(
        b=s.b, h=s.h, g=s.g, n=s.n, rows=s.queries, d=s.d, dtype=str(s.dtype).removeprefix("torch."), **problem.params
    )
    out = []
    for name, ms in samples.items():
        share = 1.0 if name in DENSE else density
        took = results.spread(ms)
        rate = 4 * s.d * visible * share / took["median"] / 1e9
        more = {"lists_ms": results.spread(lists[name])["median"]} if name in lists else {}
        out.append(Row(problem.case, name, {**params, **more}, took, rate, share, errors[name]))
    return out


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Callable[[], Tensor]:
    """A function without arguments that attends. UnsupportedError: the reason there is none."""
    if (kernel := DENSE.get(name)) is not None:
        if q.device.type != "cuda":
            raise UnsupportedError("a CUDA library")

        def dense() -> Tensor:
            with sdpa_kernel(kernel):
                return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])

        return dense
    try:
        module = backend(name)
    except ImportError as err:
        raise UnsupportedError(f"not installed here ({err})") from None
    kv, scale = KV.dense(k, v), 1 / math.sqrt(q.shape[-1])
    if name in DENSE:  # PyTorch's own choice, with the query heads of a group packed in decode
        b, h, n, _ = q.shape
        layout = Layout.dense(b, h, n, k.shape[2])
    if (why := module.supports(q, kv, layout, Want())) is not None:
        raise UnsupportedError(why)
    return lambda: module.forward(q, kv, layout, scale=scale, softcap=0.0, want=Want())[0]


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, rows: int = SAMPLED_ROWS) -> float:
    """Largest difference from fp64 on sampled query rows of every head (all visible keys when layout is None)."""
    (b, h, n, d), m = q.shape, k.shape[2]
    gen = torch.Generator().manual_seed(2)
    at = torch.cat([torch.tensor([0, n // 2, n - 1]), torch.randint(0, n, (rows,), generator=gen)]).unique().to(q.device)
    causal = torch.arange(m, device=q.device) <= at[:, None] + m - n
    mask = causal.expand(b, h, -1, -1) if layout is None or layout.full else layout.to_mask(rows=at)
    worst = 0.0
    if not bool(torch.isfinite(out).all()):
        return math.inf
    group = h // k.shape[1]
    for head in range(h):
        x = q[:, head, at].double() @ k[:, head // group].double().mT / math.sqrt(d)
        x = x.masked_fill(~mask[:, head], -math.inf)
        p = torch.softmax(x, -1).masked_fill(~mask[:, head], 0)
        want = p @ v[:, head // group].double()
        worst = max(worst, float((out[:, head, at].double() - want).abs().max()))
    return worst


# ---------------------------------------------------------------------- timing
def interleave(calls: dict[str, Callable[[], Any]], dev: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of single calls: `rounds` rounds over all calls, every second one backwards, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    clock = _cuda_clock(dev) if dev.type == "cuda" else _cpu_clock
    reps = {}
    for name, call in calls.items():
        first = min(clock(call, 2))
        reps[name] = max(1, min(30, int((60 if dev.type == "cuda" else 1000) / max(first, 1e-3))))
    for turn in range(rounds):
        order = list(calls)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            samples[name] += clock(calls[name], reps[name])
    return samples


def _cpu_clock(call: Callable[[], Any], reps: int) -> list[float]:
    out = []
    for _ in range(reps):
        began = time.perf_counter()
        call()
        out.append((time.perf_counter() - began) * 1e3)
    return out


def _cuda_clock(dev: torch.device) -> Callable[[Callable[[], Any], int], list[float]]:
    flush = torch.empty(FLUSH, dtype=torch.int8, device=dev)

    def clock(call: Callable[[], Any], reps: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
        for start, stop in events:
            flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize(dev)
        return [start.elapsed_time(stop) for start, stop in events]

    return clock


def beside(names: Sequence[str] | None, dev: torch.device) -> tuple[str, ...] | None:
    """Implementations of `--against NAMES`: those, and ours before them if none of ours is named. None: the usual ones."""
    if names is None:
        return None
    mine = () if any(name in ("gluon", "triton", "torch") for name in names) else OURS[dev.type]
    return (*mine, *names)


def paths_of(given: Sequence[str] | None) -> dict[str, str]:
    """NAME=PATH texts as a dictionary."""
    pairs = [text.partition("=") for text in given or ()]
    for name, sign, path in pairs:
        if not sign or not path:
            raise ConfigError(f"peer: expected NAME=PATH, got {name + sign + path!r}")
    return {name: path for name, _, path in pairs}


def _device(name: str | torch.device | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _line(err: BaseException) -> str:
    return (str(err).strip().splitlines() or [""])[0][:200]


def table(data: dict[str, Any]) -> str:
    """A result as fixed-width text, one line a row, the notes below."""
    head = f"{'case':24s} {'tokens':>7s} {'density':>8s} {'impl':10s} {'ms':>9s} {'min':>9s} {'TFLOP/s':>8s} {'error':>8s}"
    head += f" {'lists ms':>8s}" if any("lists_ms" in row["params"] for row in data["rows"]) else ""
    lines = [f"{data['device']}, {data['date']}", head]
    for row in data["rows"]:
        wrong = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        lists = f"{row['params']['lists_ms']:8.3f}" if "lists_ms" in row["params"] else ""
        lines.append(
            f"{row['case']:24s} {row['params'].get('n', 0):7d} {row['density']:8.3f} {row['impl']:10s} "
            f"{row['ms']['median']:9.3f} {row['ms']['min']:9.3f} {row['tflops']:8.1f} {wrong:>8s} {lists}".rstrip()
        )
    return "\n".join([*lines, *data.get("notes", [])])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="OUT", help="file to write")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--lengths", type=lambda t: [int(x) for x in t.split(",")], help="tokens, comma-separated")
    parser.add_argument("--cases", type=lambda t: t.split(","), help="workloads to keep, comma-separated")
    parser.add_argument("--against", type=lambda t: t.split(","), help="baselines, backends and peers, comma-separated")
    parser.add_argument("--peer", action="append", metavar="NAME=PATH", help="the checkout of a peer (fsa, minference)")
    parser.add_argument("--decode", action="store_true", help="one decode step, batches of 1 and 8, instead of a prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, help="seconds after which no further problem starts")
    args = parser.parse_args(argv)
    shapes = default_shapes(_device(args.device), args.lengths)
    layouts, impls = None, beside(args.against, _device(args.device))
    if args.decode:
        impls = impls or DECODE_IMPLS[_device(args.device).type]
        layouts = [p for s in shapes for b in (1, 8) for p in decode_problems(replace(s, b=b, rows=1))]
    say = lambda text, share: print(f"[{share:4.0%}] {text}", flush=True)  # noqa: E731
    data = run(
        device=args.device, shapes=shapes, cases=args.cases, impls=impls, rounds=args.rounds, budget=args.budget,
        json=args.json, progress=say, layouts=layouts, paths=paths_of(args.peer),
    )  # fmt: skip
    print(table(data))


if __name__ == "__main__":
    main()
