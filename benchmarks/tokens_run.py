"""Checks and times per-token block lists on a GPU: 32K tokens, 16 blocks of 64 keys each, bf16, D 128.

    python benchmarks/tokens_run.py [--out FILE.json] [--only TEXT] [--rounds 3] [--rep 40] [--tune] [--budget 70]

Lists: "random" are independent draws of every token and kv head; "local" hold the first block, the newest two and blocks
by scores that drift slowly along the text, as trained selectors give. One process, implementations interleaved, L2
flushed before every sample. TFLOP/s count 4 D operations for each kept pair. "ours" is what `attend` runs, lists built
anew; "lists", "partial", "walk" and "merge" time its steps over all chunks; "shared S" and "scratch S" move one knob;
"rows" fetches the keys of each token by themselves (`walk.py`). A new case begins while `--budget` seconds last.
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

from foveate.bench import results  # noqa: E402
from foveate.kernels import triton as backend  # noqa: E402
from foveate.kernels.base import Want  # noqa: E402
from foveate.kernels.triton import tokens  # noqa: E402
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
    "scratch 256M": dict(scratch=256 << 20), "scratch 64M": dict(scratch=64 << 20), "scratch 4G": dict(scratch=4 << 30),
    "rows 128 w8": dict(rows=128, warps=8, regs=None), "rows 128 w8 r128": dict(rows=128, warps=8, regs=128),
    "rows 64 free": dict(regs=None), "rows 64 s2": dict(stages=2), "rows 64 r128": dict(regs=128),
    "piece 256": dict(piece=256), "piece 1024": dict(piece=1024), "merge 8": dict(merge=8), "merge 32": dict(merge=32),
    "tile 128 w8": dict(tile=128, tile_warps=8, tile_stages=2), "tile s2": dict(tile_stages=2),
}  # fmt: skip


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
        for h, row in ((0, 0), (self.case.h - 1, N - 1), (0, 100), (self.case.h // 2, N // 2 + 37), (1, 8191), (2, 20000)):
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
    set_to = replace(tokens.config(p.q), **knobs)
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
    made = [work.lists(*c) for c in work.chunks()]
    used = sum(int(x.counts.sum()) for x in made)
    walked = sum(int(x.shared_count.sum()) for x in made)
    print(
        f"#   {used} partial results a head of a group, {walked} shared steps, {len(made)} chunks of {work.size}", flush=True
    )
    return {
        "lists": lambda: [work.lists(*c) for c in work.chunks()],
        "partial": lambda: [work.partial(x, part, part_lse) for x in made],
        "walk": lambda: [work.walk(x, part, part_lse) for x in made],
        "merge": lambda: [work.merge(x, part, part_lse, out, lse) for x in made],
    }


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
    for r in range(rounds):
        for name, call in calls.items():
            if r == 0 or name in ("ours", "cudnn"):
                times.setdefault(name, []).append(do_bench(call, warmup=10, rep=rep, quantiles=[0.5]))
    rows = []
    for name, samples in times.items():
        ms = results.spread(samples)
        pairs, density = p.pairs, p.density
        if name in ("cudnn", "flash"):
            pairs, density = N * (N + 1) / 2 * case.h, 1.0
        params = {"B": 1, "H": case.h, "G": case.g, "N": N, "D": D, "width": WIDTH, "keep": KEEP, "dtype": "bf16"}
        tflops = None if name in ("lists", "partial", "walk", "merge") else 4 * D * pairs / ms["median"] / 1e9
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
    args = parser.parse_args()
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
