"""Other people's attention kernels beside ours: adapters for what is installed, or lies in a folder named with `at`.

| name | what | lists it walks | where from |
| --- | --- | --- | --- |
| `fa4` | FlashAttention-4 (CuTe DSL) | blocks of 128 x 64 or 128, dense | package `flash-attn-4` |
| `flex` | compiled FlexAttention | blocks of 128 x 128 | torch |
| `fla` | flash-linear-attention, `parallel_nsa` | blocks per token, groups of 16 query heads or more | package `fla-core` |
| `fsa` | Flash Sparse Attention (Relaxed-System-Lab) | blocks per token | a checkout of its repository |
| `minference` | MInference's vertical-slash kernel | tiles of 64 and single keys per 64 rows | checkout or package |

An adapter turns a `Layout` into the peer's own lists first (`Run.prepare`, which the benchmark reports apart): these are
what the peer's own estimator would hand it. `Run.call` is then the peer's kernel alone. Nothing here is imported unless
asked for, and nothing of the peers is part of this package.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError, UnsupportedError, nearest
from ..kernels import fa4 as fa4_backend
from ..kernels.base import Want
from ..kv import KV
from ..layout import Layout
from ..lists import repeat_heads, used_slots

Grads = tuple[Tensor, ...]
_paths: dict[str, Path] = {}  # folders named with `at`


@dataclass(frozen=True)
class Run:
    """A peer on one problem.

    Attributes:
        prepare: makes the peer's lists from the layout anew (what `call` uses was made the same way).
        call: out `[B, H, N, D]`.
        gradients: from dout `[B, H, N, D]` a function that returns (dq, dk, dv), its forward made once; None: it has none.
    """

    prepare: Callable[[], Any]
    call: Callable[[], Tensor]
    gradients: Callable[[Tensor], Callable[[], Grads]] | None = None


@dataclass(frozen=True)
class Peer:
    """`missing` is the reason it cannot be imported here, `build` makes a `Run` or raises UnsupportedError."""

    missing: Callable[[], str | None]
    build: Callable[[Tensor, Tensor, Tensor, Layout], Run]
    by_path: bool = False


def at(name: str, path: str | Path) -> None:
    """Take a peer from this folder. Raises ConfigError for a peer that is not taken by path, or no folder."""
    known = [n for n, peer in PEERS.items() if peer.by_path]
    if name not in known:
        raise ConfigError(f"peer: unknown name {name!r}{nearest(name, known)}; taken by path: {', '.join(known)}")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"peer: expected the folder of a checkout of {name}, got {str(path)!r}")
    _paths[name] = folder
    _minference_module.cache_clear()


def why_not(name: str) -> str | None:
    """The reason this peer cannot run here, or None."""
    return PEERS[name].missing()


def build(name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """The peer on q `[B, H, N, D]`, k, v `[B, G, M, D]` and a layout. UnsupportedError: it is not here, or cannot."""
    if name not in PEERS:
        raise ConfigError(f"peer: unknown name {name!r}{nearest(name, PEERS)}; known: {', '.join(PEERS)}")
    if (why := why_not(name)) is not None:
        raise UnsupportedError(f"{name}: {why}")
    return PEERS[name].build(q, k, v, layout)


def _refuse(name: str, why: str | None) -> None:
    if why is not None:
        raise UnsupportedError(f"{name}: {why}")


# ---------------------------------------------------------------------- FlashAttention-4
def fa4(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """Its kernels on lists made beforehand, with inputs `[B, N, H, D]` contiguous as it likes them."""
    kv = KV.dense(k, v)
    _refuse("fa4", fa4_backend.supports(q, kv, layout, Want()))
    interface = importlib.import_module("flash_attn.cute.interface")
    plain = tuple(t.detach().transpose(1, 2).contiguous() for t in (q, k, v))

    def prepare() -> dict[str, Any]:
        if layout.full:
            return dict(causal=layout.causal)
        return dict(fa4_backend.sparse(layout, fa4_backend.forward_lists(layout)), pack_gqa=False)

    def prepare_backward() -> dict[str, Any]:
        return prepare() if layout.full else fa4_backend.sparse(layout, fa4_backend.backward_lists(layout))

    how = prepare()

    def gradients(dout: Tensor) -> Callable[[], Grads]:
        _refuse("fa4", fa4_backend.backward_supports(q, kv, layout, 0.0))
        out, lse = interface._flash_attn_fwd(*plain, return_lse=True, **how)[:2]
        back, do = prepare_backward(), dout.transpose(1, 2).contiguous()

        def call() -> Grads:
            return tuple(t.transpose(1, 2) for t in interface._flash_attn_bwd(*plain, out, do, lse, **back)[:3])

        return call

    return Run(prepare, lambda: interface._flash_attn_fwd(*plain, **how)[0].transpose(1, 2), gradients)


# ---------------------------------------------------------------------- compiled FlexAttention
@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """FlexAttention with a block mask of full and causal blocks; differentiable on a GPU."""
    _, _, n, m = layout.shape
    if layout.tiles is None or layout.has_rule or layout.entries is not None or layout.q_offset:
        raise UnsupportedError("flex: it is asked for block lists from row 0 only")
    if not layout.causal or n != m or (layout.block_q, layout.tile_width) != (128, 128):
        raise UnsupportedError("flex: it is asked for square causal layouts of blocks of 128 x 128 only")

    def prepare() -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        made, nk = fa4_backend.forward_lists(layout), -(-m // 128)
        wide = {x: pad(made[f"{x}_block_idx"], (0, nk - made[f"{x}_block_idx"].shape[-1])) for x in ("mask", "full")}
        wide = {x: t.masked_fill(~used_slots(t, made[f"{x}_block_cnt"]), 0) for x, t in wide.items()}
        return BlockMask.from_kv_blocks(
            made["mask_block_cnt"], wide["mask"], made["full_block_cnt"], wide["full"], BLOCK_SIZE=(128, 128),
            mask_mod=lambda b, h, i, j: j <= i, seq_lengths=(n, m),
        )  # fmt: skip

    mask = prepare()
    attend = lambda *x: _flex()(*x, block_mask=mask, enable_gqa=True)  # noqa: E731
    return Run(prepare, lambda: attend(q, k, v), lambda dout: _through_autograd(attend, (q, k, v), dout))


def _through_autograd(attend: Callable[..., Tensor], inputs: Grads, dout: Tensor) -> Callable[[], Grads]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    with torch.enable_grad():
        out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


# ---------------------------------------------------------------------- blocks per token
def _per_token(name: str, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(block numbers `[B|1, G, N, S]`, -1 in unused slots, counts) of aligned blocks per token, one list per kv head."""
    b, h, n, m = layout.shape
    g = k.shape[1]
    others = layout.has_rule or any(getattr(layout, x) is not None for x in ("entries", "diagonals", "columns"))
    if layout.tiles is None or layout.tile_count is None or others or layout.block_q != 1 or not layout.causal or n != m:
        raise UnsupportedError(f"{name}: it walks a list of blocks per token, causal, with as many rows as keys")
    if layout.tiles.shape[1] not in (1, g):
        raise UnsupportedError(f"{name}: it has one list per kv head, not {layout.tiles.shape[1]} for {g} kv heads")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(f"{name}: it computes in bf16 and fp16, not {str(q.dtype).removeprefix('torch.')}")
    block = torch.where(used_slots(layout.tiles, layout.tile_count), layout.tiles // layout.tile_width, -1)
    return repeat_heads(block, g), repeat_heads(layout.tile_count, g)


def fla(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """The selected part of flash-linear-attention's native sparse attention, forward and backward."""
    group = q.shape[1] // k.shape[1]
    _per_token("fla", q, k, layout)
    if group < 16 or group & (group - 1):
        raise UnsupportedError(f"fla: it needs groups of 16, 32 .. query heads a kv head, got {group}")
    nsa = importlib.import_module("fla.ops.nsa.parallel").ParallelNSAFunction
    turned = tuple(t.detach().transpose(1, 2).contiguous() for t in (q, k, v))

    def prepare() -> tuple[Tensor, Tensor]:
        block, count = _per_token("fla", q, k, layout)
        block, count = block.transpose(1, 2), count.transpose(1, 2)
        lead = (q.shape[0], -1, -1)
        return block.expand(*lead, -1).contiguous().long(), count.expand(*lead).contiguous().long()

    lists, scale = prepare(), 1 / math.sqrt(q.shape[-1])
    attend = lambda *x: nsa.apply(*x, *lists, layout.tile_width, scale, None)  # noqa: E731

    def gradients(dout: Tensor) -> Callable[[], Grads]:
        call = _through_autograd(attend, turned, dout.transpose(1, 2).contiguous())
        return lambda: tuple(t.transpose(1, 2) for t in call())

    return Run(prepare, lambda: attend(*turned).transpose(1, 2), gradients)


def fsa(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """Flash Sparse Attention's selected attention (Yan et al. 2025), forward and backward. It waits for the device."""
    _per_token("fsa", q, k, layout)
    if q.shape[0] != 1 or layout.tile_width not in (32, 64, 128, 256):
        raise UnsupportedError("fsa: it is asked for one batch row and blocks of 32, 64, 128 or 256 keys")
    attention = importlib.import_module("fsa.ops.FSA_topk_sparse_attention").FSA_topk_sparse_attention
    flat = tuple(t.detach()[0].transpose(0, 1).contiguous() for t in (q, k, v))  # [N, heads, D]
    ends = torch.tensor([0, q.shape[2]], dtype=torch.int32, device=q.device)

    def prepare() -> Tensor:
        return _per_token("fsa", q, k, layout)[0][0].to(torch.int32).contiguous()

    lists = prepare()
    attend = lambda *x: attention(*x, lists, layout.tile_width, ends)  # noqa: E731

    def gradients(dout: Tensor) -> Callable[[], Grads]:
        call = _through_autograd(attend, flat, dout[0].transpose(0, 1).contiguous())
        return lambda: tuple(t.transpose(0, 1)[None] for t in call())

    return Run(prepare, lambda: attend(*flat).transpose(0, 1)[None], gradients)


def _fsa_missing() -> str | None:
    if (path := _paths.get("fsa")) is not None and str(path) not in sys.path:
        sys.path.append(str(path))
    return _importable("fsa.ops.FSA_topk_sparse_attention", "a checkout of Flash-Sparse-Attention (--peer fsa=PATH)")


# ---------------------------------------------------------------------- tiles and columns
def minference(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Run:
    """MInference's Triton kernel for tiles of 64 keys and single keys per block of 64 rows; keys before the block's rows.

    It has no grouped heads: `prepare` repeats keys and values, as its callers do. Forward only.
    """
    b, h, n, m = layout.shape
    if layout.has_rule or layout.diagonals is not None or layout.columns is not None or layout.tiles is None:
        raise UnsupportedError("minference: it walks tiles and single keys per block of rows")
    if (layout.block_q, layout.tile_width, layout.q_offset) != (64, 64, 0) or not layout.causal or n != m or n % 64:
        raise UnsupportedError("minference: it is asked for square causal layouts of 64-row blocks with tiles of 64 keys")
    if q.shape[-1] not in (16, 32, 64, 128) or q.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError("minference: it has head dims 16, 32, 64 and 128 in bf16 and fp16")
    kernel = _minference_module()._triton_mixed_sparse_attention

    def prepare() -> list[Tensor]:
        tiles, count = layout.tiles, layout.tile_count
        entries, used = layout.entries, layout.entry_count
        assert tiles is not None and count is not None
        if entries is None or used is None:
            entries, used = tiles.new_zeros(*tiles.shape[:3], 1), torch.zeros_like(count)
        given = (k, v, count, tiles, used, entries)
        return [repeat_heads(t, h).expand(b, *[-1] * (t.dim() - 1)).contiguous() for t in given]

    wide_k, wide_v, *lists = prepare()
    x, lengths, scale = q.contiguous(), torch.full((b,), n, dtype=torch.int32, device=q.device), 1 / math.sqrt(q.shape[-1])
    return Run(prepare, lambda: kernel(x, wide_k, wide_v, lengths, *lists, scale, 64, 64))


@cache
def _minference_module() -> types.ModuleType:
    """Its kernel file alone: the package around it wants compiled extensions that the kernel does not use."""
    if (path := _paths.get("minference")) is not None:
        roots = [path / "minference"]
    else:
        spec = importlib.util.find_spec("minference")
        roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec is not None else []
    files = [f for r in roots if (f := r / "ops" / "pit_sparse_flash_attention_v2.py").is_file()]
    if not files:
        raise ImportError("no file minference/ops/pit_sparse_flash_attention_v2.py in a checkout (--peer minference=PATH)")
    root = "_foveate_peer_minference"
    for name in (root, f"{root}.ops", f"{root}.cuda"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules[f"{root}.cuda"].convert_vertical_slash_indexes = None  # type: ignore[attr-defined]
    made = importlib.util.spec_from_file_location(f"{root}.ops.kernel", files[0])
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    sys.modules[made.name] = module  # Triton looks a kernel's module up
    with contextlib.redirect_stdout(io.StringIO()):  # it advises to install other packages
        made.loader.exec_module(module)
    return module


def _minference_missing() -> str | None:
    try:
        _minference_module()
    except Exception as err:
        return f"not installed here ({type(err).__name__}: {err})"
    return None


def _importable(module: str, what: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as err:  # a package that cannot be imported, for whatever reason, cannot be compared
        return f"{what} is not here ({type(err).__name__}: {err})"
    return None


PEERS = {
    "fa4": Peer(fa4_backend.missing, fa4),
    "flex": Peer(lambda: None, flex),
    "fla": Peer(lambda: _importable("fla.ops.nsa.parallel", "fla-core"), fla),
    "fsa": Peer(_fsa_missing, fsa, by_path=True),
    "minference": Peer(_minference_missing, minference, by_path=True),
}
