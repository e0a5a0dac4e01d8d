"""Dense attention of a few tokens of one layer on a GPU, in CUDA graphs: what a verification of drafts asks of each layer.

    python benchmarks/dense_few_run.py [--out FILE] [--rounds 5] [--new 1,5,9,17]

Shapes, ways and clocks are those of `dense_decode_run.py`, with `--new` queries a row, the last entries being their own. The
floor is keys and values read once, whatever their number: compare with the row of one token. "general kernel" is what serves
where `dense_decode_launch.py` refuses; "torch" is PyTorch's own with a mask, told the length by shapes. "append" is the
launch that writes the tokens into a fixed store.
"""

from __future__ import annotations

import argparse
import math

import torch
from decode_run import COLD, D, G, H, capture, copy_bandwidth, interleave
from dense_decode_run import FREE, instead
from torch import Tensor

import foveate
from foveate.bench import results
from foveate.bench.results import Row
from foveate.kernels import sdpa
from foveate.kernels.base import Want
from foveate.kernels.triton import append_launch, dense_decode_launch
from foveate.kv import KV
from foveate.layout import Layout

CASES = ((1, 131072), (8, 32768), (1, 32768), (1, 16384), (1, 8192), (8, 131072))


def special(q: Tensor, kv: KV) -> Tensor:
    with instead("ROOM", 0), instead("ROOM_FEW", 0):
        return foveate.attend(q, kv, backend="triton")


def general(q: Tensor, kv: KV) -> Tensor:
    with instead("why_not", lambda *_: "left out"):
        return foveate.attend(q, kv, backend="triton")


def pytorch(q: Tensor, kv: KV) -> Tensor:
    n = kv.capacity - FREE  # shapes say the length
    cut = KV.dense(kv.k[:, :, :n], kv.v[:, :, :n])
    layout = Layout.dense(*q.shape[:3], n)
    return sdpa.forward(q, cut, layout, scale=D**-0.5, softcap=0.0, want=Want())[0]


WAYS = {"dense_decode": special, "general kernel": general, "torch": pytorch}


def exact(q: Tensor, kv: KV) -> Tensor:
    """The first row's output in fp32, a kv head at a time."""
    n, new = kv.capacity - FREE, q.shape[2]
    out, last = [], torch.arange(n - new, n, device=q.device)
    for g in range(G):
        k, v = (t[0, g, :n].float() for t in (kv.k, kv.v))
        s = q[0, g * (H // G) : (g + 1) * (H // G)].float() @ k.mT / math.sqrt(D)
        s = s.masked_fill(torch.arange(n, device=q.device) > last[:, None], float("-inf"))
        out.append(s.softmax(-1) @ v)
    return torch.cat(out)


def case(b: int, n: int, news: list[int], rounds: int, speed: float) -> list[Row]:
    size = 2 * G * b * n * D * 2
    count = max(2, min(16, math.ceil(COLD / size)))
    k, v = (torch.randn(count, b, G, n + FREE, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    length = torch.full((b, G), n, dtype=torch.int32, device="cuda")
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    errors: dict[str, float] = {}
    for new in news:
        caches = [
            (torch.randn(b, H, new, D, device="cuda", dtype=k.dtype), KV.dense(k[i], v[i], len=length)) for i in range(count)
        ]
        want = exact(*caches[0])
        for name, way in WAYS.items():
            said = f"{name}, {new} tokens"
            try:
                errors[said] = float((way(*caches[0])[0].float() - want).abs().max())
                graphs[said] = capture([lambda c=c, way=way: way(*c) for c in caches]), count
            except RuntimeError as err:
                print(f"# {said} left out: {str(err).splitlines()[0][:100]}")
        fresh = torch.randn(b, new, G, D, device="cuda", dtype=k.dtype).transpose(1, 2)
        now, seen = length - FREE, torch.zeros(b, dtype=torch.int64, device="cuda")  # counts that grow with each replay
        if new > 1:
            write = [lambda i=i, fresh=fresh, now=now, seen=seen: (
                now.fill_(n - FREE), append_launch.append(fresh, fresh, k[i], v[i], now, seen)
            ) for i in range(count)]  # fmt: skip
            graphs[f"append (and a fill), {new} tokens"] = capture(write), count
    out, label = [], f"{n} entries, batch {b}"
    for said, ms in interleave(graphs, rounds).items():
        took, error = results.spread(ms), errors.get(said, 0.0)
        rate = size / took["median"] / 1e9
        params = dict(b=b, h=H, g=G, n=n, d=D, dtype="bfloat16", layers=count, bytes=size)
        out.append(Row(label, said, params | {"share_of_copy": round(rate / speed, 3)}, took, 0.0, 1.0, error))
        print(
            f"{label:26s} {said:32s} {took['median'] * 1e3:8.1f} us [{took['min'] * 1e3:.1f}, {took['max'] * 1e3:.1f}] "
            f"{rate:5.2f} TB/s ({rate / speed:4.0%} of copy) error {error:.1e}",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", default="1,5,9,17", help="tokens of a call, comma between them")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        speed = copy_bandwidth()
        print(f"copy {speed:.2f} TB/s; multiprocessors {dense_decode_launch.device(0)[1]}")
        for b, n in CASES:
            rows += case(b, n, [int(x) for x in args.new.split(",")], args.rounds, speed)
            torch.cuda.empty_cache()
            if args.out:
                results.write(args.out, results.result("dense few", rows, torch.device("cuda"), copy_tbps=round(speed, 3)))


if __name__ == "__main__":
    main()
