"""Checks and times per-token block lists on a GPU: 32K tokens, 16 blocks of 64 keys each, bf16, D 128.

    python benchmarks/tokens_run.py [--out FILE.json] [--only TEXT] [--rounds 3] [--rep 40] [--tune] [--budget 70]
        [--peer fsa=FOLDER]

Lists: "random" are independent draws of every token and kv head; "local" hold the first block, the newest two and blocks
by scores that drift slowly along the text, as trained selectors give. One process, implementations interleaved, L2
flushed before every sample. TFLOP/s count 4 D operations for each kept pair. "ours" is what `attend` runs, lists built
anew; "lists", "partial", "walk" and "merge" time its steps over all chunks; `--tune` moves one knob at a time; names that
begin with "bwd" are gradients alone, from saved out and lse (10 D operations a pair). "rows" fetches the keys of each
token by themselves (`walk.py`). "fsa" (Flash Sparse Attention, a checkout given with `--peer`) and "fla" (the package
`fla-core`, groups of 16 only) are peers on lists made beforehand. A new case begins while `--budget` seconds last.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from foveate.bench import peers, results  # noqa: E402
from foveate.bench.kernels import paths_of  # noqa: E402
from foveate.kernels import triton as backend  # noqa: E402
from foveate.kernels.base import Want  # noqa: E402
from foveate.kernels.triton import tokens, tokens_backward  # noqa: E402
from foveate.kv import KV  # noqa: E402
from foveate.layout import Layout  # noqa: E402

N, D, KEEP, WIDTH = 32768, 128, 16, 64
DEVICE, DTYPE = "cuda", torch.bfloat16


@dataclass(frozen=True)
class Case:
    """H query heads over G kv heads."""

    h: int
    g: int
    local: bool

    @property
    def name(self) -> str:
        return f"group {self.h // self.g} {'local' if self.local else 'random'}"


CASES = [Case(h, g, local) for h, g in ((32, 8), (64, 4), (4, 4)) for local in (False, True)]
KNOBS = {
    "shared 0.25": dict(shared=0.25), "shared 0.6": dict(shared=0.6), "shared 2": dict(shared=2.0),
    "scratch 256M": dict(scratch=256 << 20), "scratch 4G": dict(scratch=4 << 30),
    "rows 128 w8": dict(rows=128, warps=8, regs=None), "rows 128 w8 r128": dict(rows=128, warps=8, regs=128),
    "rows 64 free": dict(regs=None), "rows 64 s2": dict(stages=2), "rows 64 s5": dict(stages=5),
    "rows 64 r128": dict(regs=128),
    "piece 256": dict(piece=256), "piece 1024": dict(piece=1024), "merge 8": dict(merge=8), "merge 32": dict(merge=32),
    "tile 128 w8": dict(tile=128, tile_warps=8, tile_stages=2), "tile s2": dict(tile_stages=2),
}  # fmt: skip

BWD_KNOBS = {
    "rows 64": dict(rows=64, stages=2), "rows 64 w8": dict(rows=64, warps=8), "rows 32 s2": dict(stages=2),
    "rows 32 w8": dict(warps=8),
}  # fmt: skip
STEPS = ("lists", "partial", "walk", "merge", "bwd dq", "bwd lists", "bwd dkdv")


def draw(case: Case, gen: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """tiles `[1, G, N, KEEP]` and counts, kv head by kv head."""
    blocks = N // WIDTH
    last = torch.arange(N, device=DEVICE) // WIDTH
    number = torch.arange(blocks, device=DEVICE)
    tiles, counts = [], []
    for _ in range(case.g):
        score = torch.rand(N, blocks, generator=gen, device=DEVICE)
        if case.local:  # anchors every 256 tokens, straight lines between them, a little noise
            anchor = torch.rand(N // 256 + 1, blocks, generator=gen, device=DEVICE)
            at = torch.arange(N, device=DEVICE)
            part = ((at % 256) / 256)[:, None]
            score = anchor[at // 256] * (1 - part) + anchor[at // 256 + 1] * part + 0.02 * score
            score[:, 0] = 4
            score = torch.where((number >= last[:, None] - 1), 4.0, score)
        score = torch.where(number <= last[:, None], score, -1.0)
        pick = score.topk(KEEP, -1)
        start = torch.where(pick.values >= 0, pick.indices * WIDTH, 1 << 29).sort(-1).values
        tiles.append(start.int())
        counts.append((pick.values >= 0).sum(-1).int())
    return torch.stack(tiles)[None], torch.stack(counts)[None]


class Problem:
    """Inputs and lists of a case; what to count."""

    def __init__(self, case: Case):
        gen = torch.Generator(DEVICE).manual_seed(0)
        self.case, self.scale = case, 1 / math.sqrt(D)
        normal = lambda heads: torch.randn(1, heads, N, D, generator=gen, device=DEVICE, dtype=DTYPE)  # noqa: E731
        self.q, self.k, self.v = normal(case.h), normal(case.g), normal(case.g)
        self.tiles, self.count = draw(case, gen)
        self.kv = KV.dense(self.k, self.v)
        self.layout = Layout((1, case.h, N, N), tile_width=WIDTH, tiles=self.tiles, tile_count=self.count)
        at = torch.arange(N, device=DEVICE)[:, None]
        used = torch.arange(KEEP, device=DEVICE) < self.count[..., None]
        seen = (at + 1 - self.tiles).clamp(0, WIDTH).masked_fill(~used, 0)
        self.pairs = float(seen.sum()) * case.h / case.g
        self.density = self.pairs / (N * (N + 1) / 2 * case.h)

    def error(self, out: torch.Tensor) -> tuple[float, float]:
        """(relative, largest) error of sampled rows against fp64."""
        off = size = largest = 0.0
        for h, row in (
            (0, 0),
            (self.case.h - 1, N - 1),
            (0, 100),
            (self.case.h // 2, N // 2 + 37),
            (1, N // 4 - 1),
            (2, N * 5 // 8),
        ):
            g = h * self.case.g // self.case.h
            starts = self.tiles[0, g, row, : int(self.count[0, g, row])].long()
            keys = (starts[:, None] + torch.arange(WIDTH, device=DEVICE)).flatten()
            keys = keys[keys <= row]
            p = torch.softmax(self.k[0, g, keys].double() @ self.q[0, h, row].double() * self.scale, 0)
            want = p @ self.v[0, g, keys].double()
            diff = out[0, h, row].double() - want
            off, size = off + float(diff.square().sum()), size + float(want.square().sum())
            largest = max(largest, float(diff.abs().max()))
        return math.sqrt(off / size), largest


# ---------------------------------------------------------------------- implementations: Problem -> call
def ours(p: Problem, **knobs):
    set_to = replace(tokens.config(p.q, p.kv, WIDTH), **knobs)
    return lambda: tokens.attend(p.q, p.kv, p.layout, p.scale, True, set_to)[0]


def by_rows(p: Problem):
    def call():
        real = tokens.serves
        tokens.serves = lambda *_: False
        try:
            return backend.forward(p.q, p.kv, p.layout, scale=p.scale, softcap=0.0, want=Want(lse=True))[0]
        finally:
            tokens.serves = real

    return call


def dense(name: str):
    def build(p: Problem):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        def call():
            with sdpa_kernel(getattr(SDPBackend, name)):
                return scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True)

        return call

    return build


def parts(p: Problem):
    """The steps of ours, each over all chunks."""
    work = tokens.Work(p.q, p.kv, p.layout, p.scale)
    out, (part, part_lse) = torch.empty_like(p.q), work.scratch()
    lse = torch.empty(1, p.case.h, N, device=DEVICE)
    made = [work.lists(batch) for batch in work.batches()]
    each = [(x, number) for x in made for number in range(len(x.chunks))]
    used = sum(int(x.counts.sum()) for x in made)
    walked = sum(int(x.shared_count.sum()) for x in made)
    print(f"#   {used} partial results a head of a group, {walked} shared steps", flush=True)
    print(f"#   {len(each)} chunks of {work.size}, {len(made)} batches", flush=True)
    return {
        "lists": lambda: [work.lists(batch) for batch in work.batches()],
        "partial": lambda: [work.partial(*x, part, part_lse) for x in each],
        "walk": lambda: [work.walk(*x, part, part_lse) for x in each],
        "merge": lambda: [work.merge(*x, part, part_lse, out, lse) for x in each],
    }


def backward(p: Problem):
    """Gradients as `attend` makes them, and their steps; the calls, or None where they are wrong."""
    out, lse = tokens.attend(p.q, p.kv, p.layout, p.scale, True)
    assert lse is not None
    dout, dlse = torch.randn_like(out), torch.zeros_like(lse)

    def call():
        return tokens_backward.backward(dout, dlse, p.q, p.kv, p.layout, out, lse, scale=p.scale, softcap=0.0)[:3]

    first = call()
    if not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)):
        print("#   bwd is WRONG: two runs differ", flush=True)
    off, size = gradient_error(p, dout, first)
    if not math.sqrt(off / size) < 1.5e-2:
        print(f"#   bwd is WRONG: relative error {math.sqrt(off / size)}", flush=True)
        return {}
    print(f"#   bwd: relative error {math.sqrt(off / size):.1e}", flush=True)
    made = {"bwd ours": call}
    work = tokens_backward.Work(p.q, p.kv, p.layout, p.scale, None)
    work.rows(dout, dlse, out, lse)
    lists = work.inverse()
    made |= {"bwd dq": work.queries, "bwd lists": work.inverse, "bwd dkdv": lambda: work.keys(lists)}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        q, k, v = (t.detach().requires_grad_() for t in (p.q, p.k, p.v))
        if (peer := attempt(name, lambda n=name, x=(q, k, v): dense_backward(n, *x, dout))) is not None:
            made[f"bwd {name[:5].lower()}"] = peer
    return made


def dense_backward(name: str, q, k, v, dout):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel(getattr(SDPBackend, name)):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def tuned(p: Problem):
    """dk and dv under each configuration."""
    out, lse = tokens.attend(p.q, p.kv, p.layout, p.scale, True)
    assert lse is not None
    for name, knobs in BWD_KNOBS.items():
        work = tokens_backward.Work(p.q, p.kv, p.layout, p.scale, None, replace(tokens_backward.WIDE, **knobs))
        work.rows(out, lse, out, lse)
        lists = work.inverse()
        yield f"bwd dkdv {name}", (lambda w=work, x=lists: w.keys(x))


def gradient_error(p: Problem, dout: torch.Tensor, grads) -> tuple[float, float]:
    """Squared error and size of dq in sampled rows and of dk, dv in a late and an early key block, in fp32."""
    off = size = 0.0
    group = p.case.h // p.case.g
    wanted: list[tuple[torch.Tensor, torch.Tensor]] = []

    def row(h: int, t: int):
        g = h // group
        starts = p.tiles[0, g, t, : int(p.count[0, g, t])].long()
        keys = (starts[:, None] + torch.arange(WIDTH, device=DEVICE)).flatten()
        keys = keys[keys <= t]
        k, v, q, do = p.k[0, g, keys].double(), p.v[0, g, keys].double(), p.q[0, h, t].double(), dout[0, h, t].double()
        s = torch.softmax(k @ q * p.scale, 0)
        dp = v @ do
        return keys, k, q, do, s, s * (dp - (s * dp).sum())

    for h, t in ((0, 100), (p.case.h - 1, N - 1), (1, N // 4 - 1), (2, N * 5 // 8)):
        _, k, _, _, _, ds = row(h, t)
        wanted.append((grads[0][0, h, t], ds @ k * p.scale))
    for g, block in ((p.case.g - 1, N // WIDTH - 1), (0, N // WIDTH - 3)):
        dk, dv = (torch.zeros(WIDTH, D, device=DEVICE, dtype=torch.float64) for _ in range(2))
        used = torch.arange(KEEP, device=DEVICE) < p.count[0, g, :, None]
        named = ((p.tiles[0, g] == block * WIDTH) & used).any(-1).nonzero().flatten().tolist()
        for t in named:
            for h in range(g * group, (g + 1) * group):
                keys, _, q, do, s, ds = row(h, t)
                here = (keys >= block * WIDTH) & (keys < (block + 1) * WIDTH)
                dk[keys[here] - block * WIDTH] += ds[here, None] * q * p.scale
                dv[keys[here] - block * WIDTH] += s[here, None] * do
        at = slice(block * WIDTH, (block + 1) * WIDTH)
        wanted += [(grads[1][0, g, at], dk), (grads[2][0, g, at], dv)]
    for got, want in wanted:
        off, size = off + float((got.double() - want).square().sum()), size + float(want.square().sum())
    return off, size


def others(p: Problem):
    """(name, call, largest error) of the peers that are here, forward and backward; what is far off is left out."""
    dout = torch.randn(p.q.shape, device=DEVICE, dtype=DTYPE, generator=torch.Generator(DEVICE).manual_seed(3))
    for name in ("fsa", "fla"):
        if (run := attempt(name, lambda x=name: peers.build(x, p.q, p.k, p.v, p.layout))) is None:
            continue
        if (out := attempt(name, run.call)) is None:
            continue
        relative, largest = p.error(out)
        print(f"#   {name}: relative error {relative:.1e}", flush=True)
        if not relative < 3e-2:
            continue
        yield name, run.call, largest
        if run.gradients is None or (call := attempt(f"bwd {name}", lambda r=run: r.gradients(dout))) is None:
            continue
        if (grads := attempt(f"bwd {name}", call)) is None:
            continue
        off, size = gradient_error(p, dout, grads)
        print(f"#   bwd {name}: relative error {math.sqrt(off / size):.1e}", flush=True)
        if math.sqrt(off / size) < 3e-2:
            yield f"bwd {name}", call, None


# ---------------------------------------------------------------------- phases
def attempt(name: str, make):
    try:
        made = make()
        torch.cuda.synchronize()
        return made
    except Exception as err:
        print(f"#   {name} left out: {type(err).__name__}: {str(err)[:300]}", flush=True)
        return None


def measure(case: Case, rounds: int, rep: int, tune: bool) -> list[results.Row]:
    from triton.testing import do_bench

    start = time.time()
    p = Problem(case)
    calls, errors, times = {}, {}, {}
    builds = {"ours": ours, "rows": by_rows}
    if tune:
        builds |= {name: (lambda x, k=knobs: ours(x, **k)) for name, knobs in KNOBS.items()}
    for name, build in builds.items():
        if (call := attempt(name, lambda b=build: b(p))) is None or (out := attempt(name, call)) is None:
            continue
        relative, errors[name] = p.error(out)
        if not relative < 1e-2:
            print(f"#   {name} is WRONG: relative error {relative}", flush=True)
            continue
        calls[name] = call
    if "ours" in calls and not torch.equal(calls["ours"](), calls["ours"]()):
        print("#   ours is WRONG: two runs differ", flush=True)
    steps = (attempt("parts", lambda: parts(p)) or {}).items()
    for name, call in (*steps, ("cudnn", dense("CUDNN_ATTENTION")(p)), ("flash", dense("FLASH_ATTENTION")(p))):
        if attempt(name, lambda c=call: (c(), 1)[1]) is not None:
            calls[name], errors[name] = call, None
    for name, call, largest in others(p):
        calls[name], errors[name] = call, largest
    later = dict(attempt("bwd", lambda: backward(p)) or {})
    later |= dict(attempt("bwd knobs", lambda: list(tuned(p))) or ()) if tune else {}
    for name, call in later.items():
        if attempt(name, lambda c=call: (c(), 1)[1]) is not None:
            calls[name], errors[name] = call, None
    for r in range(rounds):
        for name, call in calls.items():
            if r == 0 or name in ("ours", "cudnn", "bwd ours", "fsa", "fla", "bwd fsa", "bwd fla"):
                times.setdefault(name, []).append(do_bench(call, warmup=10, rep=rep, quantiles=[0.5]))
    rows = []
    for name, samples in times.items():
        ms = results.spread(samples)
        pairs, density = p.pairs, p.density
        if name in ("cudnn", "flash", "bwd cudnn", "bwd flash"):
            pairs, density = N * (N + 1) / 2 * case.h, 1.0
        params = {"B": 1, "H": case.h, "G": case.g, "N": N, "D": D, "width": WIDTH, "keep": KEEP, "dtype": "bf16"}
        work = (10 if name.startswith("bwd") else 4) * D * pairs
        tflops = None if name.startswith(STEPS) else work / ms["median"] / 1e9
        rows.append(results.Row(case.name, name, params, ms, tflops, density, errors[name]))
        shown = "-" if tflops is None else f"{tflops:.0f}"
        print(f"{case.name:<18}{density:>7.3f}  {name:<18}{ms['median']:>9.3f} ms {shown:>6} TFLOP/s", flush=True)
    print(f"# {case.name}: {time.time() - start:.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "tokens.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of samples a round")
    parser.add_argument("--tune", action="store_true", help="also move each knob")
    parser.add_argument("--budget", type=float, default=70, help="seconds after which no further case begins")
    parser.add_argument("--peer", action="append", metavar="NAME=PATH", help="the checkout of a peer (fsa)")
    args = parser.parse_args()
    for name, path in paths_of(args.peer).items():
        peers.at(name, path)
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    start = time.time()
    rows: list[results.Row] = []
    for case in CASES:
        if args.only in case.name and time.time() - start < args.budget:
            rows += measure(case, args.rounds, args.rep, args.tune)
            results.write(args.out, results.result("tokens", rows, DEVICE))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
