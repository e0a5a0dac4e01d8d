"""One small case of every kernel family, for `sanitize_run.py`: each launches its kernels once, on a few hundred tokens."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks import racecheck  # noqa: E402

import foveate  # noqa: E402
from foveate.kv import KV  # noqa: E402
from foveate.layout import Layout  # noqa: E402
from foveate.methods.base import AttnInput, State  # noqa: E402
from foveate.registry import parse  # noqa: E402

SKIPPED = 77  # exit code of a case that cannot run here
PLANTED, RACED = "planted", "raced"
HANDED, STARTED = racecheck.HANDED, racecheck.STARTED
N = 200  # tokens: no multiple of a block
DEVICE, DTYPE = "cuda", torch.bfloat16


class Skip(Exception):
    """Why a case cannot run here."""


# ---------------------------------------------------------------------- small problems
def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def qkv(n: int = N, m: int = N, d: int = 64, h: int = 4, g: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return rand(1, h, n, d), rand(1, g, m, d, seed=1), rand(1, g, m, d, seed=2)


def blocks(block_q: int, block_k: int, n: int = N, h: int = 4) -> Layout:
    """Random blocks, some rows empty."""
    mask = torch.rand(1, h, -(-n // block_q), -(-n // block_k), generator=torch.Generator().manual_seed(3)) < 0.6
    return Layout.from_block_mask(mask.to(DEVICE), n, n, block_q=block_q, block_k=block_k)


def entries(block_q: int, many: int = 40, n: int = N, h: int = 4) -> torch.Tensor:
    """Ascending single keys of each query block, `[1, H, blocks, many]`."""
    draw = torch.rand(1, h, -(-n // block_q), n, generator=torch.Generator().manual_seed(4))
    return draw.topk(many, -1).indices.sort(-1).values.to(DEVICE)


def plan(*names: str, n: int = 700, d: int = 64) -> None:
    """Methods' plans of a prompt's last tokens and of all of it."""
    q, k, _ = qkv(n, n, d)
    for name, start in itertools.product(names, (0, 300)):
        at = torch.arange(start, n, device=DEVICE)[None]
        x = AttnInput(q[:, :, start:], KV.dense(k, k), "prefill", 0, 1, d**-0.5, start=start, q_pos=at)
        parse(name).plan(x, State())


def differentiate(layout: Layout, d: int = 64, backend: str | None = None) -> None:
    _, h, n, m = layout.shape
    q, k, v = (t.requires_grad_() for t in qkv(n, m, d, h))
    out, lse = foveate.attend(q, (k, v), layout, return_lse=True, backend=backend)
    (out.float().square().sum() + lse.masked_fill(lse.isneginf(), 0).sum()).backward()


# ---------------------------------------------------------------------- one case a family
def walk() -> None:
    """triton/walk.py: tiles, a rule, entries, columns beside diagonals; head dims that are no powers of two."""
    shape, gen = (1, 4, N, N), torch.Generator().manual_seed(6)
    lines, columns = (torch.randperm(N, generator=gen)[:c].sort().values.to(DEVICE)[None, None] for c in (5, 40))
    for d in (64, 96):
        q, k, v = qkv(d=d)
        for layout in (
            blocks(32, 16),
            Layout.static(shape, sink=5, window=30, stride=3, device=DEVICE),
            Layout.lists(shape, block_q=32, entries=entries(32), sink=3, window=9),
            Layout.factored(shape, diagonals=lines, columns=columns, block_q=32, tile_width=16),
        ):
            foveate.attend(q, (k, v), layout, backend="triton", return_lse=True)


def walk_decode() -> None:
    """triton/walk.py: one row over dense, paged and ragged storage, split among programs."""
    m, d = 1000, 64
    length = torch.tensor([[1000, 733]], dtype=torch.int32, device=DEVICE)
    table = torch.randperm(2 * 63, generator=torch.Generator().manual_seed(7)).view(1, 2, 63).int().to(DEVICE)
    pool, flat = rand(2 * 63, 16, d), rand(1733, d)
    for kv in (
        KV.dense(rand(1, 2, m, d), rand(1, 2, m, d), len=length),
        KV.paged(pool, pool, table, length),
        KV.ragged(flat, flat, torch.tensor([[0, 1000]], device=DEVICE), length, m),
    ):
        shape = (1, 4, 1, kv.capacity)
        for layout in (Layout.dense(*shape), Layout.static(shape, sink=4, window=30, device=DEVICE)):
            foveate.attend(rand(1, 4, 1, d), kv, layout, backend="triton", return_lse=True)


def pages() -> None:
    """triton/paging.py: bounds, scores, choice and attention of Quest."""
    k, v = rand(2, 2, 500, 64, seed=1), rand(2, 2, 500, 64, seed=2)
    kv = KV.dense(k, v, len=torch.tensor([[433, 433], [77, 77]], dtype=torch.int32, device=DEVICE))
    q, at = rand(2, 4, 1, 64), torch.tensor([[432], [76]], device=DEVICE)
    layout = parse("quest:page=16,budget=128,dense_layers=0,share=group").plan(
        AttnInput(q, kv, "decode", 0, 1, 0.125, q_pos=at), State()
    )
    foveate.attend(q, kv, layout, backend="triton", return_lse=True)


def append() -> None:
    """triton/append.py: tokens into a fixed store with bounds beside it."""
    from foveate.cache.dense import DenseStore
    from foveate.cache.fixed import FixedDense
    from foveate.scores.bounds import Bounds

    k = rand(2, 2, 40, 64)
    store = FixedDense(DenseStore.empty(k, k).append(k, k, None, [0, 0]), [40, 40], 47)
    store.beside = bounds = Bounds(16)
    bounds.update(store.view())
    for i in range(7):  # to the last free entry
        store.append(rand(2, 2, 1, 64, seed=i), rand(2, 2, 1, 64, seed=i), None, [0, 0])


def tokens() -> None:
    """triton/tokens_{lists,kernels,grads}.py and inverse.py: a list of tiles for each token, forward and backward."""
    n, gen = 600, torch.Generator().manual_seed(5)
    tiles = torch.rand(1, 2, n, -(-n // 64), generator=gen).topk(4, -1).indices.sort(-1).values * 64
    count = torch.randint(0, 5, (1, 2, n), generator=gen)
    lists = dict(tiles=tiles.int().to(DEVICE), tile_count=count.int().to(DEVICE))
    differentiate(Layout((1, 4, n, n), tile_width=64, **lists), backend="triton")


def backward() -> None:
    """triton/backward_kernels.py and inverse.py, also where Gluon's kernels would run."""
    from foveate.kernels.triton import backward as bw

    q, k, v = qkv()
    for layout in (blocks(64, 64), blocks(128, 64), Layout.dense(1, 4, N, N)):
        out, lse = foveate.attend(q, (k, v), layout, backend="triton", return_lse=True)
        bw.backward(
            q, lse.nan_to_num(0, 0, 0), q, KV.dense(k, v), layout, out, lse, scale=0.125, softcap=0.0,
            tiles=bw.config(q, 64, 64),
        )  # fmt: skip


def window() -> None:
    """triton/estimate_window.py: votes of SnapKV."""
    from foveate.scores.votes import window_votes

    q, k, _ = qkv(32, 700)
    at = torch.arange(668, 700, device=DEVICE)[None]
    window_votes(q, KV.dense(k, k), at, 32, kernel=7, pooling="avg", reduce="mean", scale=0.125)


def codes() -> None:
    """triton/quantised_{decode,append}.py: steps over 4-bit codes, to the end of the store."""
    from foveate.cache.fixed import fix
    from foveate.cache.quantised import QuantisedStore

    k = rand(2, 2, 150, 64)
    store = QuantisedStore.empty(k[:, :, :0], k[:, :, :0], 4, None, 32, 64).append(k, k, None, [0, 0])
    store = fix(store, [150, 150])
    for i in range(3):
        store = store.append(rand(2, 2, 1, 64, seed=i), rand(2, 2, 1, 64, seed=i), None, [150 + i] * 2)
        view = store.view()
        foveate.attend(rand(2, 8, 1, 64), view, Layout.dense(2, 8, 1, view.capacity), return_lse=True, backend="packed")


def hopper() -> None:
    if DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        raise Skip("needs a Hopper GPU")


def gluon_lists() -> None:
    """gluon/kernel.py and columns.py: dense, tiles of both widths, tiles with columns, a rule."""
    hopper()
    tiles = blocks(128, 64)
    lists = dict(tiles=tiles.tiles, tile_count=tiles.tile_count, entries=entries(128))
    both = Layout.lists((1, 4, N, N), block_q=128, tile_width=64, **lists)
    rule = Layout.static((1, 4, N, N), sink=5, window=70, device=DEVICE)
    for d in (64, 128):
        q, k, v = qkv(d=d)
        for layout in (Layout.dense(1, 4, N, N), tiles, blocks(128, 128), both, rule):
            foveate.attend(q, (k, v), layout, backend="gluon", return_lse=True)


def gluon_private() -> None:
    """gluon/private_kernel.py and private_feed.py: own lists of 64-row blocks, of both widths, with columns."""
    hopper()
    tiles = blocks(64, 64)
    lists = dict(tiles=tiles.tiles, tile_count=tiles.tile_count, entries=entries(64))
    both = Layout.lists((1, 4, N, N), block_q=64, tile_width=64, **lists)
    for layout in (tiles, blocks(64, 32), both):
        q, k, v = qkv()
        foveate.attend(q, (k, v), layout, backend="gluon", return_lse=True)


def gluon_backward() -> None:
    """gluon/backward_{kernel,queries}.py."""
    hopper()
    for d in (64, 128):
        for layout in (blocks(128, 64), blocks(128, 128)):
            differentiate(layout, d)


def fa4() -> None:
    """FlashAttention-4 through kernels/fa4.py."""
    from foveate.kernels import fa4 as module

    hopper()
    if why := module.missing():
        raise Skip(why)
    differentiate(blocks(128, 128), 128, backend="fa4")


if triton is not None:

    @triton.jit
    def _past_the_end(x, n):
        tl.store(x + n, 1.0)


def planted() -> None:
    """A write one element past the end: what a tool must find."""
    if triton is None or DEVICE != "cuda":
        raise Skip("needs Triton and a GPU")
    x = torch.zeros(1024, device=DEVICE)
    _past_the_end[(1,)](x, x.numel())


def calibrate(case: Callable[[str], None]) -> None:
    """A case of `racecheck.py`."""
    if triton is None or DEVICE != "cuda":
        raise Skip("needs Triton and a GPU")
    hopper()
    case(DEVICE)


CASES: dict[str, Callable[[], None]] = {
    PLANTED: planted,
    RACED: lambda: calibrate(racecheck.raced),
    HANDED: lambda: calibrate(racecheck.handed),
    STARTED: lambda: calibrate(racecheck.started),
    "gluon lists": gluon_lists,
    "gluon private": gluon_private,
    "gluon backward": gluon_backward,
    "low bits": lambda: plan("sale:tau=0.05"),
    "walk": walk,
    "walk decode": walk_decode,
    "pages": pages,
    "append": append,
    "tokens": tokens,
    "backward": backward,
    "probe": lambda: plan("minference:columns=40,diagonals=100"),
    "pooled blocks": lambda: plan("minference:pattern=block_sparse,blocks=3", "flexprefill:min_budget=128,tau=0.1"),
    "antidiagonals": lambda: plan("xattention:threshold=0.8"),
    "similarity": lambda: plan("spargeattn@8k"),
    "stripes": lambda: plan("anchor_attention:theta=3,step=4"),
    "tree": lambda: plan("hip:k=256,sink=64,window=128,dense_layers=0"),
    "window": window,
    "codes": codes,
    "fa4": fa4,
}


def run_case(name: str, device: str) -> int:
    """One case in this process. The exit code: 0, or SKIPPED with the reason as the last line."""
    global DEVICE, DTYPE
    DEVICE, DTYPE = device, torch.bfloat16 if device == "cuda" else torch.float16
    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise Skip("needs a CUDA device")
        CASES[name]()
        if device == "cuda":
            torch.cuda.synchronize()
    except (Skip, ImportError) as why:
        print(why)
        return SKIPPED
    return 0
