"""Checks and times our backward pass over block lists on a GPU against cuDNN, FlashAttention-2 and FlashAttention-4.

    python benchmarks/backward_run.py [--out FILE.json] [--only TEXT] [--rounds 3] [--rep 40] [--budget 110] [--plain]

One process, implementations interleaved, every second round backwards, L2 flushed before every sample
(`triton.testing.do_bench`). Every time is that of gradients alone, from saved out and lse. TFLOP/s count 10 D operations
for each kept pair (five products), half of a diagonal block. "ours" is what `attend` runs and makes the inverse lists as
a training step would; "triton" is the same without the Gluon kernel; "ours, lists" times the lists alone; "dq" and
"dkdv" time the two passes with every configuration tried (`--plain` leaves them out). "fa4" is FlashAttention-4 on lists
made beforehand and inputs as it likes them, "fa4 attend" the backend `fa4` as `attend` runs it, "fa4, lists" the
transposed lists alone. `--flex` adds compiled FlexAttention. A new case begins while `--budget` seconds last.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from foveate.bench import peers, results  # noqa: E402
from foveate.kernels import dispatch, fa4  # noqa: E402
from foveate.kernels.base import Want  # noqa: E402
from foveate.kernels.triton import backward as bw  # noqa: E402
from foveate.kv import KV  # noqa: E402
from foveate.layout import Layout  # noqa: E402

B, H, G, D = 1, 32, 8, 128
DEVICE = "cuda"
DTYPE = torch.bfloat16
PLAIN = False  # leave out the passes by themselves

S = bw.Steps
DQ = {  # rows, keys, warps, stages
    "128x64 w8 s3": S(128, 64, 8, 3), "128x64 w8 s2": S(128, 64, 8, 2), "128x128 w8 s2": S(128, 128, 8, 2),
    "64x64 w4 s2": S(64, 64, 4, 2),
}  # fmt: skip
DKDV = {
    "64x128 w8 s3": S(64, 128, 8, 3), "64x128 w8 s2": S(64, 128, 8, 2), "64x64 w4 s2": S(64, 64, 4, 2),
    "32x128 w8 s3": S(32, 128, 8, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Random causal blocks of 128 x width, own list per head, the diagonal and the first block forced."""

    n: int
    width: int
    keep: float  # chance of a block; 1.0 lists every block
    tune: bool = False  # try every configuration

    @property
    def name(self) -> str:
        return f"{self.n // 1024}K w{self.width} keep {self.keep:g}"


CASES = [  # densities 0.065, 1, 0.26, 0.11 and 0.05, then with 64 keys 0.06, 0.26 and 0.11
    Case(32768, 128, 0.05, True), Case(32768, 128, 1.0, True), Case(32768, 128, 0.25), Case(32768, 128, 0.1),
    Case(32768, 128, 0.035), Case(32768, 64, 0.05, True), Case(32768, 64, 0.25), Case(32768, 64, 0.1),
]  # fmt: skip


class Problem:
    """Lists, inputs and the saved forward of a case; what to count."""

    def __init__(self, case: Case):
        n, width = case.n, case.width
        nq, nk = n // 128, n // width
        gen = torch.Generator(DEVICE).manual_seed(0)
        first = torch.arange(nq, device=DEVICE)[:, None] * 128
        key = torch.arange(nk, device=DEVICE)[None] * width
        causal = key <= first + 127
        self.diagonal = (key >= first) & causal
        self.mask = ((torch.rand(H, nq, nk, device=DEVICE, generator=gen) < case.keep) & causal) | self.diagonal
        self.mask[..., 0] = True
        kept, diagonal = int(self.mask.sum()), int(self.diagonal.sum()) * H
        self.pairs = (kept - diagonal) * 128 * width + diagonal * 128 * width / 2
        self.density = kept / (int(causal.sum()) * H)
        self.layout = Layout.from_block_mask(self.mask[None], n, n, block_q=128, block_k=width)
        torch.manual_seed(n)
        self.q, self.k, self.v, self.dout = (torch.randn(B, x, n, D, device=DEVICE, dtype=DTYPE) for x in (H, G, G, H))
        self.case, self.scale, self.kv = case, 1 / math.sqrt(D), KV.dense(self.k, self.v)
        out, lse, _ = dispatch.backend("triton").forward(
            self.q, self.kv, self.layout, scale=self.scale, softcap=0.0, want=Want(lse=True)
        )
        assert lse is not None
        self.out, self.lse, self.dlse = out, lse, torch.zeros_like(lse)

    def error(self, grads: tuple[torch.Tensor, ...]) -> tuple[float, float]:
        """(relative error, largest difference) of dq in sampled query blocks and of dk, dv in sampled key blocks, fp32.

        NaN if any element of a gradient is. The fp32 sums take out and lse from fp32 softmax on the same inputs.
        """
        if not all(bool(torch.isfinite(g).all()) for g in grads):
            return math.nan, math.nan
        n = self.case.n
        off = size = largest = 0.0

        def compare(got: torch.Tensor, want: torch.Tensor) -> None:
            nonlocal off, size, largest
            diff = got.float() - want
            off, size = off + float(diff.square().sum()), size + float(want.square().sum())
            largest = max(largest, float(diff.abs().max()))

        def rows(h: int, block: int) -> tuple[torch.Tensor, ...]:
            """Probabilities and logit gradients fp32 of one query block against all keys."""
            at = slice(block * 128, block * 128 + 128)
            seen = self.mask[h, block].repeat_interleave(self.case.width)
            where = torch.arange(n, device=DEVICE)
            seen = seen & (where <= where[at, None])
            k, v = self.k[0, h * G // H].float(), self.v[0, h * G // H].float()
            q, do = self.q[0, h, at].float(), self.dout[0, h, at].float()
            p = torch.softmax((q @ k.T * self.scale).masked_fill(~seen, float("-inf")), -1)
            dp = do @ v.T
            return q, k, do, p, p * (dp - (p * dp).sum(-1, keepdim=True))

        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        for h, block in ((0, 0), (H - 1, n // 128 - 1), (H // 6, n // 256), (H // 2, n // 400)):
            _, k, _, _, ds = rows(h, block)
            compare(grads[0][0, h, block * 128 : block * 128 + 128], ds @ k * self.scale)
        for g, key in ((G - 1, n // 128 - 2), (0, n // 128 - n // 4096 - 1)):  # late key blocks: few query blocks see them
            at = slice(key * 128, key * 128 + 128)
            dk, dv = torch.zeros(128, D, device=DEVICE), torch.zeros(128, D, device=DEVICE)
            for h in range(g * H // G, (g + 1) * H // G):
                for block in range(key, n // 128):
                    q, _, do, p, ds = rows(h, block)
                    dk += ds[:, at].T @ q * self.scale
                    dv += p[:, at].T @ do
            compare(grads[1][0, g, at], dk)
            compare(grads[2][0, g, at], dv)
        torch.backends.cuda.matmul.allow_tf32 = before
        return math.sqrt(off / size), largest


# ---------------------------------------------------------------------- implementations: Problem -> call
def ours(p: Problem):
    why = bw.backward_supports(p.q, p.kv, p.layout, 0.0)
    if why is not None:
        raise RuntimeError(why)
    return lambda: bw.backward(p.dout, p.dlse, p.q, p.kv, p.layout, p.out, p.lse, scale=p.scale, softcap=0.0)[:3]


def triton_alone(p: Problem):
    """Ours without the Gluon kernel for the pass over keys."""
    tiles = bw.config(p.q, D, p.case.width)
    return lambda: bw.backward(
        p.dout, p.dlse, p.q, p.kv, p.layout, p.out, p.lse, scale=p.scale, softcap=0.0, tiles=tiles
    )[:3]  # fmt: skip


def through_autograd(p: Problem, forward):
    """Gradients of a differentiable call, its forward made once."""
    q, k, v = (t.detach().requires_grad_() for t in (p.q, p.k, p.v))
    out = forward(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), p.dout, retain_graph=True)


def sdpa(name: str):
    def build(p: Problem):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(getattr(SDPBackend, name)):
            return through_autograd(
                p, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )

    return build


def fa4_dense(p: Problem):
    from flash_attn.cute.interface import flash_attn_func

    q, k, v, dout = (t.transpose(1, 2).contiguous() for t in (p.q, p.k, p.v, p.dout))  # [B, N, H, D]
    for t in (q, k, v):
        t.requires_grad_()
    out = flash_attn_func(q, k, v, causal=True)
    out = out[0] if isinstance(out, tuple) else out

    def call():
        return tuple(t.transpose(1, 2) for t in torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))

    return call


def peer(name: str):
    """A peer on lists made beforehand."""

    def build(p: Problem):
        make = peers.build(name, p.q, p.k, p.v, p.layout).gradients
        if make is None:
            raise RuntimeError("it has no backward pass")
        return make(p.dout)

    return build


def fa4_attend(p: Problem):
    """The backend `fa4` with the lists made anew, as `attend` calls it, its questions included."""
    if (why := fa4.backward_supports(p.q, p.kv, p.layout, 0.0)) is not None:
        raise RuntimeError(why)

    def call():
        fa4.backward_supports(p.q, p.kv, p.layout, 0.0)
        return fa4.backward(p.dout, p.dlse, p.q, p.kv, p.layout, p.out, p.lse, scale=p.scale, softcap=0.0)[:3]

    return call


LISTS = {"ours": ours, "triton": triton_alone, "fa4": peer("fa4"), "fa4 attend": fa4_attend}
DENSE = {"cudnn": sdpa("CUDNN_ATTENTION"), "flash": sdpa("FLASH_ATTENTION"), "fa4 dense": fa4_dense}


def parts(p: Problem):
    """Calls that are parts of ours: the inverse lists, and both passes under each configuration; with their share of
    the work in products of five."""
    base = bw.config(p.q, D, p.case.width)
    work = bw.Work(p.q, p.kv, p.layout, p.scale, base)
    work.queries(p.dout, p.dlse, p.out, p.lse)
    made = {"ours, lists": (work.inverse, None)}
    if p.case.width == 128 and fa4.missing() is None:
        made["fa4, lists"] = (lambda: fa4.backward_lists(p.layout), None)
    if PLAIN:
        return made
    for name, steps in (DQ if p.case.tune else {"default": base.dq}).items():
        one = bw.Work(p.q, p.kv, p.layout, p.scale, bw.Config(steps, base.dkdv))
        made[f"dq {name}"] = (lambda w=one: w.queries(p.dout, p.dlse, p.out, p.lse), 3)
    for name, steps in (DKDV if p.case.tune else {"default": base.dkdv}).items():
        if steps.keys > p.case.width:
            continue
        one = bw.Work(p.q, p.kv, p.layout, p.scale, bw.Config(base.dq, steps))
        one.queries(p.dout, p.dlse, p.out, p.lse)
        lists = one.inverse()
        made[f"dkdv {name}"] = (lambda w=one, x=lists: w.keys(p.dout, x), 4)
    return made


# ---------------------------------------------------------------------- phases
def attempt(name: str, make):
    try:
        made = make()
        torch.cuda.synchronize()
        return made
    except Exception as err:
        print(f"#   {name} left out: {type(err).__name__}: {str(err)[:300]}", flush=True)
        return None


def measure(case: Case, rounds: int, rep: int) -> list[results.Row]:
    from triton.testing import do_bench

    start = time.time()
    p = Problem(case)
    calls, errors, products = {}, {}, {}
    for name, build in {**LISTS, **(DENSE if case.keep == 1.0 else {"cudnn": DENSE["cudnn"]})}.items():
        if (call := attempt(name, lambda b=build: b(p))) is None or (grads := attempt(name, call)) is None:
            continue
        relative, errors[name] = p.error(grads) if name in LISTS or case.keep == 1.0 else (0.0, None)
        if not relative < 1.5e-2:
            print(f"#   {name} is WRONG: relative error {relative}", flush=True)
            continue
        print(f"#   {name}: relative error {relative:.1e}", flush=True)
        calls[name], products[name] = call, 5
    first = calls["ours"]() if "ours" in calls else ()
    if first and not all(torch.equal(a, b) for a, b in zip(first, calls["ours"](), strict=True)):
        print("#   ours is WRONG: two runs differ", flush=True)
    del first
    for name, (call, share) in parts(p).items():
        if attempt(name, call) is not None:
            calls[name], products[name], errors[name] = call, share, None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds):
        for name, call in list(calls.items())[:: 1 if r % 2 == 0 else -1]:
            if r == 0 or not name.startswith(("dq", "dkdv")):
                times[name].append(do_bench(call, warmup=10, rep=rep, quantiles=[0.5]))
    dense = case.n * (case.n + 1) / 2 * H
    rows = []
    for name, samples in times.items():
        ms = results.spread(samples)
        same_work = name not in DENSE or case.keep == 1.0
        work, density = (p.pairs, p.density) if same_work else (dense, 1.0)
        params = {"B": B, "H": H, "G": G, "N": case.n, "D": D, "width": case.width, "dtype": "bf16", "causal": True}
        share = products[name]
        if share is not None:
            params["products"] = share
        tflops = None if share is None else 2 * D * share * work / ms["median"] / 1e9
        rows.append(results.Row(case.name, name, params, ms, tflops, density, errors[name]))
        shown = "-" if tflops is None else f"{tflops:.0f}"
        print(f"{case.name:<22}{density:>7.3f}  {name:<22}{ms['median']:>9.3f} ms {shown:>6} TFLOP/s", flush=True)
    print(f"# {case.name}: {time.time() - start:.1f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "backward.json")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep", type=int, default=40, help="milliseconds of samples a round")
    parser.add_argument("--budget", type=float, default=110, help="seconds after which no further case begins")
    parser.add_argument("--plain", action="store_true", help="no passes by themselves")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; it compiles for about a minute")
    args = parser.parse_args()
    global PLAIN
    PLAIN = args.plain
    if args.flex:
        LISTS["flex"] = peer("flex")
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    start = time.time()
    rows: list[results.Row] = []
    for case in CASES:
        if args.only in case.name and time.time() - start < args.budget:
            rows += measure(case, args.rounds, args.rep)
            results.write(args.out, results.result("backward", rows, DEVICE))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
