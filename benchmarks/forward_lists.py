"""What `gluon_run.py` and `private_run.py` share: implementations, and how they are checked and timed.

A problem `p` holds the inputs q `[1, H, N, D]`, k and v `[1, G, N, D]`, the `layout` and the softmax `scale`. An
implementation takes it and returns a call that gives (out, lse `[1, H, N]` or None).
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from foveate.kernels import dispatch
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout

FIELDS = ("tiles", "tile_count", "entries", "entry_count", "diagonals", "diagonal_count", "columns", "column_count", "sink",
          "window")  # fmt: skip


class Problem(Protocol):
    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scale: float


Call = Callable[[], tuple[Tensor, Tensor | None]]
Build = Callable[[Problem], Call]


# ---------------------------------------------------------------------- implementations
def backend(name: str) -> Build:
    """A backend as `attend` calls it, planning of the lists included."""

    def build(p: Problem) -> Call:
        kv, want, module = KV.dense(p.k, p.v), Want(lse=True), dispatch.backend(name)
        if (why := module.supports(p.q, kv, p.layout, want)) is not None:
            raise RuntimeError(why)
        return lambda: module.forward(p.q, kv, p.layout, scale=p.scale, softcap=0.0, want=want)[:2]

    return build


def cudnn(p: Problem) -> Call:
    """Dense causal, without lse."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call() -> tuple[Tensor, None]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(p.q, p.k, p.v, is_causal=True, enable_gqa=True), None

    return call


# ---------------------------------------------------------------------- checks
@contextlib.contextmanager
def limit(seconds: int, what: str) -> Iterator[None]:
    """Ends the process if the block takes longer: a hanging kernel cannot be interrupted any other way."""
    print(f"# {what}", flush=True)
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def poison(p: Problem) -> None:
    """Fill the allocator's free blocks that the next output will come from with NaN."""
    waste = [torch.full_like(p.q, float("nan")), torch.full(p.q.shape[:3], float("nan"), device=p.q.device)]
    torch.cuda.synchronize()
    del waste


def error(p: Problem, out: Tensor, lse: Tensor | None, rows: int = 128, samples: int = 9) -> tuple[float, float]:
    """(relative error, largest difference) of sampled blocks of `rows` queries against fp64 softmax on the same inputs.

    NaN if any element of out is, or if a sampled lse is off by more than 1e-3.
    """
    if not bool(torch.isfinite(out.float()).all()):
        return math.nan, math.nan
    (h_, n), g_ = p.q.shape[1:3], p.k.shape[1]
    gen = torch.Generator().manual_seed(1)
    picks = [(0, 0), (h_ - 1, n // rows - 1)]
    picks += [tuple(int(torch.randint(x, (1,), generator=gen)) for x in (h_, n // rows)) for _ in range(samples - 2)]
    off = size = largest = 0.0
    for h, block in picks:
        at = torch.arange(block * rows, block * rows + rows, device=p.q.device)
        end = block * rows + rows  # no key beyond is seen
        seen = _head(p.layout, h).to_mask(rows=at)[0, 0, :, :end]
        s = p.q[0, h, at].double() @ p.k[0, h * g_ // h_, :end].double().T * p.scale
        s = s.masked_fill(~seen, float("-inf"))
        want = torch.softmax(s, -1) @ p.v[0, h * g_ // h_, :end].double()
        diff = out[0, h, at].double() - want
        off += float(diff.square().sum())
        largest = max(largest, float(diff.abs().max()))
        size += float(want.square().sum())
        if lse is not None and float((lse[0, h, at].double() - torch.logsumexp(s, -1)).abs().max()) > 1e-3:
            return math.nan, math.nan
    return math.sqrt(off / size), largest


def _head(layout: Layout, h: int) -> Layout:
    """The layout of one head."""
    b, heads, n, m = layout.shape
    cut = {x: None if (t := getattr(layout, x)) is None else t[:, h * t.shape[1] // heads][:, None] for x in FIELDS}
    return replace(layout, shape=(b, 1, n, m), **cut)


def checked(
    label: str, p: Problem, builds: dict[str, Build], compare: Collection[str], rows: int = 128
) -> tuple[dict[str, Call], dict[str, float | None]]:
    """Calls that run and, where `compare` names them, are right; and how far off those are at most."""
    calls: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for name, build in builds.items():
        with limit(120, f"{label}: {name}"):
            try:
                call = build(p)
                poison(p)
                out, lse = call()
                torch.cuda.synchronize()
            except Exception as err:
                print(f"#   {name} left out: {type(err).__name__}: {str(err)[:200]}", flush=True)
                continue
            relative, errors[name] = error(p, out, lse, rows) if name in compare else (0.0, None)
            if not relative < 1e-2:
                print(f"#   {name} is WRONG: relative error {relative}", flush=True)
                continue
            calls[name] = call
    return calls, errors


def timed(label: str, calls: dict[str, Call], rounds: int, rep: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the calls of a round one after another; L2 is flushed before every sample."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with limit(90, f"{label}: time {name}"):
                times[name].append(do_bench(call, warmup=25, rep=rep, quantiles=[0.5]))
    return times
