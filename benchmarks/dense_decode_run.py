"""Dense attention of one decode step of one layer on a GPU, in CUDA graphs: our kernel beside PyTorch's and cuDNN's.

    python benchmarks/dense_decode_run.py [--out FILE] [--rounds 5] [--sweep]

Llama-3-8B's heads (H 32, G 8, D 128) in bf16, caches with room behind their entries. "one launch" reads lengths on the
device (`kernels/triton/dense_decode.py`), as does the general kernel (`walk.py`), which served such steps before; PyTorch's
kernels are told the length by shapes, which a graph cannot change. As in `decode_run.py` a graph holds several layers,
figures are per layer, and all take turns in one process. `--sweep` times other constants of `dense_decode_launch.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decode_run import COLD, D, G, H, capture, copy_bandwidth, host_time, interleave
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import foveate
from foveate.bench import results
from foveate.bench.results import Row
from foveate.kernels.triton import dense_decode_launch as kernels
from foveate.kv import KV

# (batch, entries, one long row beside rows of a 64th)
CASES = (
    (1, 131072, False), (8, 32768, False), (1, 8192, False), (8, 131072, False), (1, 1024, False), (64, 1024, False),
    (8, 131072, True),
)  # fmt: skip
FREE = 512  # free slots behind a row, as a fixed store has them


def one_launch(q: Tensor, kv: KV) -> Tensor:
    """By the special kernel, also where little is to be read and `why_not` leaves the call to the general one."""
    with instead("ROOM", 0):
        return foveate.attend(q, kv, backend="triton")


def general(q: Tensor, kv: KV) -> Tensor:
    """The same call without its special kernel."""
    with instead("why_not", lambda *_: "left out"):
        return foveate.attend(q, kv, backend="triton")


@contextmanager
def instead(name: str, value: Any) -> Iterator[None]:
    before = getattr(kernels, name)
    setattr(kernels, name, value)
    try:
        yield
    finally:
        setattr(kernels, name, before)


def pytorch(which: SDPBackend) -> Callable[[Tensor, KV], Tensor]:
    def step(q: Tensor, kv: KV) -> Tensor:
        n = kv.capacity - FREE  # shapes say the length
        with sdpa_kernel(which):
            return scaled_dot_product_attention(q, kv.k[:, :, :n], kv.v[:, :, :n], enable_gqa=True)

    return step


WAYS = {
    "dense, one launch": one_launch,
    "dense, general kernel": general,
    "torch flash": pytorch(SDPBackend.FLASH_ATTENTION),
    "cuDNN": pytorch(SDPBackend.CUDNN_ATTENTION),
}


def case(b: int, n: int, rounds: int, speed: float, sweep: bool, uneven: bool) -> list[Row]:
    """All ways over the same caches with room behind n entries; uneven: one row of n, the others of n / 64."""
    lens = [n if i == 0 or not uneven else n // 64 for i in range(b)]
    size = 2 * G * sum(lens) * D * 2
    count = max(2, min(16, math.ceil(COLD / size)))
    k, v = (torch.randn(count, b, G, n + FREE, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    length = torch.tensor(lens, dtype=torch.int32, device="cuda")[:, None].expand(b, G).contiguous()
    caches = [
        (torch.randn(b, H, 1, D, device="cuda", dtype=k.dtype), KV.dense(k[i], v[i], len=length)) for i in range(count)
    ]
    want = float_attention(*caches[0], lens)
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    about: dict[str, tuple[float, float]] = {}  # (largest error, host time)
    for name, way in WAYS.items():
        if uneven and name in ("torch flash", "cuDNN"):
            continue
        try:
            worst = float((way(*caches[0]).float() - want).abs().max())
            graphs[name] = capture([lambda c=c, way=way: way(*c) for c in caches]), count
            about[name] = worst, host_time(lambda way=way: way(*caches[0]))
        except RuntimeError as err:
            print(f"# {name} left out: {str(err).splitlines()[0][:100]}")
    out, label = [], f"{n} entries, batch {b}" + (", one long row" if uneven else "")
    for name, ms in interleave(graphs, rounds).items():
        took, (worst, host) = results.spread(ms), about[name]
        rate = size / took["median"] / 1e9
        params = dict(b=b, h=H, g=G, n=n, d=D, dtype="bfloat16", layers=count, bytes=size, host_ms=host, uneven=int(uneven))
        params |= {"TB/s": round(rate, 3), "share_of_copy": round(rate / speed, 3)}
        out.append(Row(label, name, params, took, size * H / G / took["median"] / 1e9, 1.0, worst))
        print(
            f"{label:36s} {name:24s} {took['median'] * 1e3:8.1f} us [{took['min'] * 1e3:.1f}, {took['max'] * 1e3:.1f}] "
            f"{rate:5.2f} TB/s ({rate / speed:4.0%} of copy) host {host * 1e3:6.1f} us error {worst:.1e}",
            flush=True,
        )
    if sweep:
        variants(caches, label, rounds)
    return out


def float_attention(q: Tensor, kv: KV, lens: list[int]) -> Tensor:
    """In fp32, a row at a time."""
    rows = []
    for i, n in enumerate(lens):
        k, v = (t[i, :, :n].float() for t in (kv.k, kv.v))
        s = q[i].float().view(G, H // G, D) @ k.mT / math.sqrt(D)
        rows.append((torch.softmax(s, -1) @ v).view(H, 1, D))
    return torch.stack(rows)


def variants(caches: list[tuple[Tensor, KV]], label: str, rounds: int) -> None:
    """Other launch constants than those of `dense_decode_launch.py`."""
    knobs = ("SHARE", "STAGES", "STEP", "WARPS", "LEAST")
    tries = [
        (2, 4, 16384, 4, 1), (2, 3, 16384, 4, 1), (4, 4, 16384, 4, 1), (4, 3, 8192, 4, 1), (3, 4, 8192, 4, 1),
        (2, 6, 8192, 4, 1), (1, 6, 16384, 4, 1), (1, 4, 32768, 8, 1), (6, 4, 8192, 4, 1), (2, 4, 16384, 4, 2),
        (2, 4, 16384, 4, 4), (2, 4, 16384, 8, 1), (4, 4, 8192, 8, 1),
    ]  # fmt: skip
    before, graphs = {name: getattr(kernels, name) for name in knobs}, {}
    for values in tries:
        said = " ".join(f"{a.lower()} {c}" for a, c in zip(knobs, values, strict=True))
        try:
            for name, value in zip(knobs, values, strict=True):
                setattr(kernels, name, value)
            kernels._plan.cache_clear()
            graphs[said] = capture([lambda c=c: one_launch(*c) for c in caches]), len(caches)
        except Exception as err:
            print(f"  {said}: {type(err).__name__} {str(err).splitlines()[0][:80]}")
        finally:
            for name, value in before.items():
                setattr(kernels, name, value)
            kernels._plan.cache_clear()
    for said, ms in interleave(graphs, max(2, rounds // 2)).items():
        print(f"  sweep {label}: {said:50s} {results.spread(ms)['median'] * 1e3:8.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also time other launch constants")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        speed = copy_bandwidth()
        print(f"copy {speed:.2f} TB/s")
        for b, n, uneven in CASES:
            rows += case(b, n, args.rounds, speed, args.sweep and n > 1024, uneven)
            torch.cuda.empty_cache()
            if args.out:
                report = results.result("dense decode", rows, torch.device("cuda"), copy_tbps=round(speed, 3))
                results.write(args.out, report)


if __name__ == "__main__":
    main()
