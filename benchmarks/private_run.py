"""Times attention over private lists of 64-row blocks on a Hopper GPU: the Gluon kernel of two rings against Triton's.

    python benchmarks/private_run.py [--out FILE.json] [--only TEXT] [--rounds 3] [--rep 80] [--check]

Lists per head (`foveate.bench.workloads`): 64 x 64 blocks, random and shaped like real attention, tiles + columns, and
random 64 x 32 blocks of a head (what sale plans), at 32K and 128K. Beside them, in the same process: the same kind of lists
in 128-row blocks (64 x 64 is to reach 0.85 of 128 x 128), and cuDNN dense as the minute's yardstick. B 1, H 32, G 8, D 128,
bf16, causal. Implementations of a case are interleaved, L2 is flushed before every sample (`do_bench`), outputs come from
memory full of NaN. TFLOP/s count kept pairs. `L2` is the rate at which tiles and columns of K and V must be read for that:
4 D bytes a key of a list. A hang ends the process; rows are written as soon as they exist.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from forward_lists import Build, Call, backend, checked, cudnn, limit, timed  # noqa: E402

from foveate.bench import results, workloads  # noqa: E402
from foveate.layout import Layout  # noqa: E402

H, G, D = 32, 8, 128
DEVICE = "cuda"


@dataclass(frozen=True)
class Case:
    n: int
    kind: str  # "random", "realistic", "columns"
    block: int  # rows of a query block
    width: int  # keys of a tile
    density: float = 0.1

    @property
    def name(self) -> str:
        what = "96 tiles + 900 columns" if self.kind == "columns" else f"{self.kind} {self.density:g}"
        return f"{self.n // 1024}K {what}, {self.block} x {self.width}"

    def layout(self) -> Layout:
        if self.kind == "columns":
            return workloads.tiles_and_columns(H, self.n, block=self.block, device=DEVICE)
        make = workloads.random_blocks if self.kind == "random" else workloads.realistic
        return make(H, self.n, self.density, block_q=self.block, block_k=self.width, device=DEVICE)


CASES = [
    *(
        Case(n, kind, block, width, density)
        for n, density in ((32768, 0.1), (131072, 0.03))
        for kind in ("random", "realistic", "columns")
        for block, width in ((64, 64), (128, 64 if kind == "columns" else 128))
    ),
    *(Case(n, "random", 64, 32, 0.2) for n in (32768, 131072)),
]


class Problem:
    """The lists of a case, its inputs, and what to count."""

    def __init__(self, case: Case):
        self.case, self.layout = case, case.layout()
        n = case.n
        self.pairs = float(self.layout.pairs().sum())
        self.density = self.pairs / (n * (n + 1) / 2 * H)
        lists = self.layout
        keys = float(lists.tile_count.double().sum()) * lists.tile_width if lists.tile_count is not None else 0.0
        keys += float(lists.entry_count.double().sum()) if lists.entry_count is not None else 0.0
        self.read = keys * 4 * D  # bytes of K and V that tiles of `block` rows bring into shared memory
        torch.manual_seed(n)
        self.q, self.k, self.v = (torch.randn(1, x, n, D, device=DEVICE, dtype=torch.bfloat16) for x in (H, G, G))
        self.scale = 1 / math.sqrt(D)


# ---------------------------------------------------------------------- implementations: Problem -> call
def kernel(p: Problem) -> Call:
    """The Gluon kernel alone, its plan made beforehand (the counter is cleared by a memset each time)."""
    if p.case.block == 64:
        from foveate.kernels.gluon import private as module

        prepare = module.prepare
    else:
        from foveate.kernels.gluon import launch as module
        from foveate.kernels.gluon.prepare import prepare
    work = prepare(p.layout, p.q.device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        work.counter.zero_()
        return module.run(p.q, p.k, p.v, p.layout, work, p.scale)

    return call


LISTS: dict[str, Build] = {"gluon kernel": kernel, "gluon": backend("gluon"), "triton": backend("triton")}


# ---------------------------------------------------------------------- phases
def measure(case: Case, rounds: int, rep: int, check_only: bool) -> list[results.Row]:
    with limit(120, f"{case.name}: lists and inputs"):
        p = Problem(case)
        torch.cuda.synchronize()
    builds = {**LISTS, "cudnn": cudnn} if case.n <= 32768 else LISTS
    calls, errors = checked(case.name, p, builds, LISTS, case.block)
    if check_only:
        return []
    rows = []
    for name, samples in timed(case.name, calls, rounds, rep).items():
        ms = results.spread(samples)
        pairs, density = (p.pairs, p.density) if name in LISTS else (p.pairs / p.density, 1.0)
        params = {"B": 1, "H": H, "G": G, "N": case.n, "D": D, "dtype": "bf16", "block_q": case.block, "width": case.width}
        tflops = 4 * D * pairs / ms["median"] / 1e9
        if name in LISTS:
            params["L2"] = p.read / ms["median"] / 1e9  # TB/s
        rows.append(results.Row(case.name, name, params, ms, tflops, density, errors[name]))
    return rows


def table(rows: list[results.Row]) -> None:
    names = [*LISTS, "cudnn"]
    print(f"{'case':<44}{'density':>8} " + "".join(f"{n:>14}" for n in names) + "   L2 of the kernel   (TFLOP/s, TB/s)")
    for case in dict.fromkeys(r.case for r in rows):
        mine = {r.impl: r for r in rows if r.case == case}
        density = next((r.density for n, r in mine.items() if n in LISTS), math.nan)
        cells = "".join(f"{mine[n].tflops:>14.0f}" if n in mine else f"{'-':>14}" for n in names)
        rate = mine["gluon kernel"].params["L2"] if "gluon kernel" in mine else math.nan
        print(f"{case:<44}{density:>8.3f} {cells}{rate:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "private.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=80, help="milliseconds of samples a round")
    parser.add_argument("--check", action="store_true", help="check every case, time none")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("needs a Hopper GPU")
    rows: list[results.Row] = []
    for case in CASES:
        if args.only in case.name:
            rows += measure(case, args.rounds, args.rep, args.check)
            results.write(args.out, results.result("private", rows, DEVICE))
            torch.cuda.empty_cache()
    table(rows)


if __name__ == "__main__":
    main()
