"""Checks and times the Gluon forward on a Hopper GPU against cuDNN, FlashAttention-4 and the Triton backend.

    python benchmarks/gluon_run.py [--out FILE.json] [--only TEXT] [--rounds 3] [--rep 80] [--check] [--profile]

One process, implementations interleaved, L2 flushed before every sample (`triton.testing.do_bench`), inputs fresh
normal data, outputs full of NaN before each check. TFLOP/s count the kept pairs, half of a diagonal block. A hang ends
the process: every phase has its own time limit, and rows are written as soon as they exist. FlashAttention-4 is used
when `flash_attn.cute` can be imported. `--profile` launches every implementation once per case between
cudaProfilerStart and Stop (for `ncu --profile-from-start off`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from forward_lists import backend, checked, cudnn, limit, timed  # noqa: E402
from gluon_cases import CASES, DEVICE, DTYPE, B, Case, G, H, Named, small  # noqa: E402

from foveate.bench import results  # noqa: E402
from foveate.kernels import dispatch, gluon  # noqa: E402
from foveate.kernels.base import Want  # noqa: E402
from foveate.kv import KV  # noqa: E402
from foveate.layout import Layout  # noqa: E402


class Problem:
    """The lists of a case, its inputs, and what to count."""

    def __init__(self, case: Case):
        n, width, d = case.n, case.width, case.d
        nq, nk = n // 128, n // width
        gen = torch.Generator(DEVICE).manual_seed(0)
        first = torch.arange(nq, device=DEVICE)[:, None] * 128
        key = torch.arange(nk, device=DEVICE)[None] * width
        causal = key <= first + 127
        self.diagonal = (key >= first) & causal
        chosen = torch.rand(H, nq, nk, device=DEVICE, generator=gen) < case.keep
        self.mask = (chosen & causal) | self.diagonal
        self.mask[..., 0] = True
        kept, diagonal = int(self.mask.sum()), int(self.diagonal.sum()) * H
        self.pairs = (kept - diagonal) * 128 * width + diagonal * 128 * width / 2
        self.density = kept / (int(causal.sum()) * H)
        self.layout = Layout.from_block_mask(self.mask[None], n, n, block_q=128, block_k=width)
        torch.manual_seed(n)
        self.q, self.k, self.v = (torch.randn(B, x, n, d, device=DEVICE, dtype=DTYPE) for x in (H, G, G))
        self.case, self.scale = case, 1 / math.sqrt(d)


class NamedProblem:
    """The same for a `Named` case."""

    def __init__(self, case: Named):
        n, d = case.n, case.d
        self.layout = case.layout()
        self.pairs = float(self.layout.pairs().sum())
        self.density = self.pairs / (n * (n + 1) / 2 * H)
        torch.manual_seed(n)
        self.q, self.k, self.v = (torch.randn(B, x, n, d, device=DEVICE, dtype=DTYPE) for x in (H, G, G))
        self.case, self.scale = case, 1 / math.sqrt(d)


# ---------------------------------------------------------------------- implementations: Problem -> (call, result)
def gluon_kernel(p: Problem):
    """The kernel alone, its plan made beforehand (the counter is cleared by a memset each time)."""
    from foveate.kernels.gluon import launch, prepare

    if (why := gluon.supports(p.q, KV.dense(p.k, p.v), p.layout, Want())) is not None:
        raise RuntimeError(why)
    if gluon._unpaired(p.layout, G) is not None:
        raise RuntimeError("private lists have a kernel of their own: see private_run.py")
    work = prepare.prepare(p.layout, p.q.device)

    def call():
        work.counter.zero_()
        return launch.run(p.q, p.k, p.v, p.layout, work, p.scale)

    return call


def dense_layout(p: Problem):
    """Dense causal without lists, by this kernel."""
    kv, layout = KV.dense(p.k, p.v), Layout.dense(B, H, p.case.n, p.case.n)
    return lambda: gluon.forward(p.q, kv, layout, scale=p.scale, softcap=0.0, want=Want(lse=True))[:2]


def fa4(p: Problem):
    """FlashAttention-4 on the same lists: full blocks bare, diagonal blocks under its causal mask."""
    import cutlass.cute as cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    @cute.jit
    def causal(b, h, m, n, info, aux):
        return n <= m

    def pack(mask):
        order = torch.argsort(mask[None].to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
        return mask[None].sum(-1).to(torch.int32).contiguous(), order.contiguous()

    part_count, part = pack(p.mask & p.diagonal)
    full_count, full = pack(p.mask & ~p.diagonal)
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=part_count, mask_block_idx=part, full_block_cnt=full_count, full_block_idx=full,
        block_size=(128, p.case.width),
    )  # fmt: skip
    q, k, v = (t.transpose(1, 2).contiguous() for t in (p.q, p.k, p.v))  # [B, N, H, D]

    def call():
        out = _flash_attn_fwd(q, k, v, mask_mod=causal, block_sparse_tensors=blocks)
        return out[0].transpose(1, 2), None

    return call


def fa4_dense(p: Problem):
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (p.q, p.k, p.v))

    def call():
        out = flash_attn_func(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2), None

    return call


LISTS = {"gluon kernel": gluon_kernel, "gluon": backend("gluon"), "triton": backend("triton"), "fa4": fa4}
DENSE = {"gluon dense": dense_layout, "cudnn": cudnn, "fa4 dense": fa4_dense}


def implementations(case: Case | Named):
    """Dense implementations join where they do the same work; cuDNN also elsewhere at 32K, as the minute's yardstick."""
    if isinstance(case, Named):
        served = {name: LISTS[name] for name in ("gluon kernel", "gluon", "triton")}
        return {**served, "cudnn": cudnn} if case.n <= 32768 or case.kind == "factored" else served
    if case.full:
        return {**LISTS, **DENSE}
    return {**LISTS, "cudnn": cudnn} if case.n <= 32768 else dict(LISTS)


# ---------------------------------------------------------------------- phases
def what(layout: Layout) -> str:
    parts = [name for name in ("tiles", "entries", "diagonals", "columns", "window") if getattr(layout, name) is not None]
    return " + ".join(parts) + (f" of {layout.tile_width}" if layout.tiles is not None else "") or "dense"


def tiny(cases: list[Case | Named]) -> None:
    """Odd lengths of what these cases run, and nothing else: a variant takes seconds to compile. Wrong or hanging kernels
    stop here."""
    wanted = {(case.kind if isinstance(case, Named) else "lists", case.d) for case in cases}
    for kind, d, layout in small():
        if (kind, d) not in wanted:
            continue
        h, n = layout.shape[1:3]
        with limit(60, f"tiny: {kind}, n {n}, d {d}, {what(layout)}"):
            q, k, v = (torch.randn(1, x, n, d, device=DEVICE, dtype=DTYPE) for x in (h, 1, 1))
            out, lse, _ = gluon.forward(q, KV.dense(k, v), layout, scale=0.1, softcap=0.0, want=Want(lse=True))
            torch.cuda.synchronize()
            reference = dispatch.backend("reference")
            wide = KV.dense(k.double(), v.double())
            want, want_lse, _ = reference.forward(q.double(), wide, layout, scale=0.1, softcap=0.0, want=Want())
            off = float((out.double() - want).norm() / want.norm().clamp(min=1e-9))
            dead = want_lse.isneginf()
            far = float((lse.double() - want_lse)[~dead].abs().max())
            if not (off < 1e-2 and far < 1e-3 and torch.equal(lse.isneginf(), dead)):
                sys.exit(f"wrong: relative error {off}, lse off by {far}")
            print(f"#   relative error {off:.1e}", flush=True)


def measure(case: Case | Named, rounds: int, rep: int, profile: bool, check_only: bool) -> list[results.Row]:
    with limit(120, f"{case.name}: lists and inputs"):
        p = NamedProblem(case) if isinstance(case, Named) else Problem(case)
        torch.cuda.synchronize()
    builds = implementations(case)
    calls, errors = checked(case.name, p, builds, builds if case.full else LISTS)
    if profile:
        for name, call in calls.items():
            print(f"ORDER {case.name}: {name}", flush=True)
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    if profile or check_only:
        return []
    dense = case.n * (case.n + 1) / 2 * H
    rows = []
    for name, samples in timed(case.name, calls, rounds, rep).items():
        ms = results.spread(samples)
        same_work = name in LISTS or case.full
        work, density = (p.pairs, p.density) if same_work else (dense, 1.0)
        params = {"B": B, "H": H, "G": G, "N": case.n, "D": case.d, "dtype": "bf16", "causal": True, **case.params()}
        tflops = 4 * case.d * work / ms["median"] / 1e9
        rows.append(results.Row(case.name, name, params, ms, tflops, density, errors[name]))
    return rows


def table(rows: list[results.Row]) -> None:
    names = [n for n in {**LISTS, **DENSE} if any(r.impl == n for r in rows)]
    print(f"{'case':<54}{'density':>8} " + "".join(f"{n:>14}" for n in names) + "   (TFLOP/s)")
    for case in dict.fromkeys(r.case for r in rows):
        mine = {r.impl: r for r in rows if r.case == case}
        density = next((r.density for n, r in mine.items() if n in LISTS), math.nan)
        cells = "".join(f"{mine[n].tflops:>14.0f}" if n in mine else f"{'-':>14}" for n in names)
        print(f"{case:<54}{density:>8.3f} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gluon.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=80, help="milliseconds of samples a round")
    parser.add_argument("--check", action="store_true", help="check every case, time none")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("needs a Hopper GPU")
    cases = [case for case in CASES if args.only in case.name]
    tiny(cases)
    rows: list[results.Row] = []
    for case in cases:
        rows += measure(case, args.rounds, args.rep, args.profile, args.check)
        results.write(args.out, results.result("gluon", rows, DEVICE))
        torch.cuda.empty_cache()
    table(rows)


if __name__ == "__main__":
    main()
