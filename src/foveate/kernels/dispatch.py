"""attend(): one entry to every kernel. A flat dispatch that can explain itself."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..combine import join_lse
from ..errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..kv import KV
from ..layout import Layout, Parts
from ..packed import PackedKV
from . import fa4, sdpa, torch_gather
from .base import WANTS, Want
from .join import joined

BACKENDS = {
    "reference": "foveate.kernels.reference",
    "sdpa": "foveate.kernels.sdpa",
    "torch": "foveate.kernels.torch_gather",
    "flex": "foveate.kernels.flex",
    "triton": "foveate.kernels.triton",
    "gluon": "foveate.kernels.gluon",
    "fa4": "foveate.kernels.fa4",
    "packed": "foveate.kernels.packed",
}
# Tried in this order; the first without a reason against it runs. `reference` is never chosen: it costs N x M,
# nor is `fa4` forward: what it serves `gluon` serves too, and `gluon` is faster there.
AUTO = {"cpu": ("sdpa", "flex", "torch"), "cuda": ("gluon", "sdpa", "triton", "torch")}
# Backward passes of their own, tried in order on the device (or for the backend) named; `torch` differentiates the rest.
# One with `backward_pays` is taken on a device only where that says so: where it was measured to be the fastest.
_TRITON = ("foveate.kernels.triton.backward", "foveate.kernels.triton.tokens_backward")
_FA4 = ("foveate.kernels.fa4",)
BACKWARD = {"cuda": _FA4 + _TRITON, "triton": _TRITON, "fa4": _FA4 + _TRITON}
_KINDS = ("dense", "paged", "ragged")
_KV_FIELDS = ("len", "table", "offsets", "pos")


def backend(name: str) -> ModuleType:
    """The backend module of this name. Raises ConfigError for an unknown name."""
    if name not in BACKENDS:
        raise ConfigError(f"backend: unknown name {name!r}{nearest(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
    return _module(BACKENDS[name])


_module = cache(importlib.import_module)  # what could not be imported is tried again


@dataclass(frozen=True)
class Choice:
    """One line of an explanation: a backend and the reason it cannot run (None: it can)."""

    backend: str
    reason: str | None


def explain(
    q: Tensor, kv: KV | tuple[Tensor, Tensor], layout: Layout | None = None, want: Want | None = None
) -> list[Choice]:
    """Every backend `auto` considers for this call, in order, each with its reason against or None: the first runs."""
    view = KV.of(kv)
    _check(q, view, layout)
    layout = Layout.dense(*_dims(q, view)) if layout is None else layout
    return [Choice(n, _asked(n, q, view, layout, want or Want())[1]) for n in _auto(q, view)]


def _auto(q: Tensor, kv: KV) -> tuple[str, ...]:
    names = AUTO.get(q.device.type, ("torch",))
    return ("packed", *names) if isinstance(kv, PackedKV) and kv.packed is not None else names


def _asked(name: str, q: Tensor, kv: KV, layout: Layout, want: Want) -> tuple[ModuleType | None, str | None]:
    """The backend of this name and the reason it cannot run; no backend where it is not installed."""
    try:
        module = backend(name)
    except ImportError as err:
        return None, f"{name} is not installed here ({err})"
    return module, module.supports(q, kv, layout, want)


def choose(q: Tensor, kv: KV, layout: Layout, want: Want, name: str | None = None) -> ModuleType:
    """The backend that will run. A named one that cannot is an UnsupportedError with its reason."""
    if name is not None and name != "auto":
        named = backend(name)
        if (why := named.supports(q, kv, layout, want)) is not None:
            raise UnsupportedError(f"backend {name!r} cannot serve this call: {why}")
        return named
    reasons = []
    for candidate in _auto(q, kv):
        module, why = _asked(candidate, q, kv, layout, want)
        if module is not None and why is None:
            return module
        reasons.append(f"{candidate}: {why}")
    raise UnsupportedError("no backend can serve this call: " + "; ".join(reasons))


def attend(
    q: Tensor,
    kv: KV | tuple[Tensor, Tensor],
    plan: Layout | Parts | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    softcap: float | None = None,
    backend: str | None = None,
    strict: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Exact attention over exactly the pairs a plan names.

    Args:
        q: `[B, H, N, D]`, fp16, bf16, fp32 or fp64.
        kv: a `KV` view or the pair (k `[B, G, M, D]`, v `[B, G, M, Dv]`); H % G == 0.
        plan: a `Layout`, `Parts`, or None for dense causal attention with the queries last.
        scale: softmax scale, 1/sqrt(D) by default.
        softcap: c, logits become c * tanh(logit / c) before the entry bias.
        return_lse: also return lse `[B, H, N]` (natural log; -inf for rows without keys, whose output is 0).
        return_mass: also return the probability each entry received, summed over rows, `[B, H, M]`.
        backend: a name, or None for the first that can (see `explain`).
        strict: look for NaN and infinity in q, k, v first and name the tensor (one synchronisation).

    Returns:
        out `[B, H, N, Dv]`, or a tuple (out[, lse][, mass]). Differentiable in q, k, v and the bias through out and lse.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit. UnsupportedError: no backend can run this, with reasons.
    """
    view = KV.of(kv)
    _check(q, view, plan)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if strict:
        view.validate()
        _finite(q, view)
    if isinstance(plan, Parts):
        out, lse, mass = _attend_parts(q, view, plan, scale, return_lse, return_mass, softcap, backend)
    else:
        layout = plan if plan is not None else Layout.dense(*_dims(q, view))
        out, lse, mass = _attend(q, view, layout, scale, return_lse, return_mass, softcap, backend)
    if return_mass:
        return (out, lse, mass) if return_lse else (out, mass)
    return (out, lse) if return_lse else out


def _dims(q: Tensor, kv: KV) -> tuple[int, int, int, int]:
    return q.shape[0], q.shape[1], q.shape[2], kv.capacity


def _check(q: Tensor, kv: KV, plan: Layout | Parts | None) -> None:
    if q.dim() != 4:
        raise ShapeError(f"q: expected 4 dimensions [B, H, N, D], got {list(q.shape)}")
    (b, h, n, d), (kb, g, m, kd, _) = q.shape, kv.shape
    if b != kb:
        raise ShapeError(f"q: expected the batch size of kv, {kb}, got {b}")
    if g == 0 or h % g:
        raise ShapeError(f"q: expected H to be a multiple of the {g} kv heads, got H = {h}")
    if d != kd:
        raise ShapeError(f"q: expected the head dim of k, {kd}, got {d}")
    if not (b and h and n and d and m):
        raise ShapeError(f"expected at least one query and one key, got q {list(q.shape)} and M = {m}")
    if q.dtype != kv.dtype:
        raise ShapeError(f"q: expected the dtype of k, {kv.dtype}, got {q.dtype}")
    device = q.device
    if device != kv.device:
        raise ShapeError(f"q: expected the device of k, {kv.device}, got {device}")
    if not q.dtype.is_floating_point:
        raise ShapeError(f"q: expected a floating point dtype, got {q.dtype}")
    if isinstance(plan, Layout):
        if plan.shape != (b, h, n, m) and tuple(plan.shape) != (b, h, n, m):
            raise ShapeError(f"plan: expected a layout of shape {(b, h, n, m)} (B, H, N, M), got {plan.shape}")
        for t in plan.tensors():
            if t is not None and t.device != device:
                raise ShapeError(f"plan: expected a layout on the device of q, {device}, got {t.device}")
    elif plan is not None and not isinstance(plan, Parts):
        raise ShapeError(f"plan: expected a Layout, Parts or None, got {type(plan).__name__}")


def _finite(q: Tensor, kv: KV) -> None:
    live = kv.to_dense()
    for name, t in (("q", q), ("k", live.k), ("v", live.v)):
        if not bool(torch.isfinite(t).all()):
            at = (~torch.isfinite(t)).nonzero()[0].tolist()
            raise ShapeError(f"{name}: expected finite values, got {float(t[tuple(at)])} at {at}")


def _attend_parts(q, kv, plan, scale, want_lse, want_mass, softcap, name):  # type: ignore[no-untyped-def]
    gated = plan.combine == "gated"
    if plan.joint is not None and not want_mass:  # all parts in one call
        return *plan.joint(scale=scale, softcap=softcap, backend=name), None
    if want_mass and (gated or any(p.kv is not None for p in plan.parts)):
        raise UnsupportedError("return_mass: gated parts, and parts with keys of their own, have no common softmax")
    parts = [(q if p.q is None else p.q, kv if p.kv is None else p.kv, p) for p in plan.parts]
    for i, (pq, pkv, part) in enumerate(parts):
        _check(pq, pkv, part.layout)
        if pq.shape[:3] != q.shape[:3] or pkv.shape[4] != kv.shape[4]:
            want, got = [*q.shape[:3], kv.shape[4]], [*pq.shape[:3], pkv.shape[4]]
            raise ShapeError(f"parts: expected outputs [B, H, N, Dv] = {want} of every part, got {got} of part {i}")
        if part.gate is not None and part.gate.shape != q.shape[:3]:
            raise ShapeError(f"gate: expected [B, H, N] = {list(q.shape[:3])}, got {list(part.gate.shape)} in part {i}")
    scales = [scale if p.scale is None else p.scale for p in plan.parts]
    keep_lse = want_lse or not gated
    results = [
        _attend(pq, pkv, part.layout, s, keep_lse, False, softcap, name)[:2]
        for (pq, pkv, part), s in zip(parts, scales, strict=True)
    ]
    if gated:
        out = sum(o * p.gate[..., None].to(o.dtype) for (o, _), p in zip(results, plan.parts, strict=True))
        return out, join_lse([lse for _, lse in results])[1] if want_lse else None, None
    out, lse = joined(results)
    mass = None
    if want_mass:
        with torch.no_grad():
            mass = sum(
                torch_gather.mass(pq, pkv, part.layout, lse, scale=s, softcap=float(softcap or 0.0))
                for (pq, pkv, part), s in zip(parts, scales, strict=True)
            )
    return out, lse, mass


def _attend(q, kv, layout, scale, want_lse, want_mass, softcap, name):  # type: ignore[no-untyped-def]
    cap = float(softcap or 0.0)
    grad = torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)
    want = WANTS[want_lse, want_mass, grad, cap > 0]
    if (not grad and not torch.compiler.is_compiling()) or name == "packed":  # which reads what no operator is handed
        return _forward(q, kv, layout, scale, cap, want, name)
    if (
        name in (None, "auto", "sdpa")
        and sdpa.supports(q, kv, layout, want) is None
        and (name == "sdpa" or not _fa4_trains(q, kv, layout))
    ):
        # Plain PyTorch: autograd and the compiler see through it, and dense training gets PyTorch's own backward.
        with _cudnn_first(q, layout):
            return sdpa.forward(q, kv, layout, scale=scale, softcap=cap, want=want)
    pack, meta = _pack(kv, layout), _meta(kv, layout)
    out, lse, mass = _operator(q, kv.k, kv.v, kv.bias, pack, meta, scale, cap, name or "auto", want_lse or grad, want_mass)
    return out, lse if want_lse else None, mass.detach() if want_mass else None


def _fa4_trains(q: Tensor, kv: KV, layout: Layout) -> bool:
    """Dense training goes through the operator below where FlashAttention-4 is the fastest backward pass."""
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return fa4.backward_pays(q, kv, layout) and fa4.backward_supports(q, kv, layout, 0.0) is None


def _cudnn_first(q: Tensor, layout: Layout) -> AbstractContextManager[object]:
    """Long dense training on Hopper: cuDNN before PyTorch's own choice, since it is 1.6 times faster there."""
    _, _, n, m = layout.shape
    if torch.compiler.is_compiling() or n != m or n < fa4.PAYS or q.device.type != "cuda":
        return nullcontext()
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return nullcontext()
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)


def _forward(q, kv, layout, scale, cap, want, name):  # type: ignore[no-untyped-def]
    module = choose(q, kv, layout, want, name)
    try:
        return module.forward(q, kv, layout, scale=scale, softcap=cap, want=want)
    except UnsupportedError:  # found out on the way, such as a compiler that fails; the backend says so from now on
        if name not in (None, "auto") or module.supports(q, kv, layout, want) is None:
            raise
    return choose(q, kv, layout, want, name).forward(q, kv, layout, scale=scale, softcap=cap, want=want)


# ---------------------------------------------------------------------- the operator (autograd, torch.compile)
def _pack(kv: KV, layout: Layout) -> list[Tensor | None]:
    return [*layout.tensors(), *(getattr(kv, n) for n in _KV_FIELDS)]


def _meta(kv: KV, layout: Layout) -> list[int]:
    return [*layout.meta(), _KINDS.index(kv.kind), kv.capacity]


def _unpack(
    k: Tensor, v: Tensor, bias: Tensor | None, index: Sequence[Tensor | None], meta: Sequence[int]
) -> tuple[KV, Layout]:
    cut = len(index) - len(_KV_FIELDS)
    layout = Layout.from_tensors(index[:cut], meta[:-2])
    kv = KV(k, v, _KINDS[meta[-2]], meta[-1], bias=bias, **dict(zip(_KV_FIELDS, index[cut:], strict=True)))
    return kv, layout


@torch.library.custom_op("foveate::attend", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    index: Sequence[Tensor | None],
    meta: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
    want_lse: bool,
    want_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kv, layout = _unpack(k, v, bias, index, meta)
    want = Want(lse=want_lse, mass=want_mass, grad=False, softcap=softcap > 0)
    out, lse, mass = _forward(q, kv, layout, scale, softcap, want, backend)
    none = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = lse.contiguous() if want_lse else q.new_empty(0, dtype=none)
    return out.contiguous(), lse, mass.contiguous() if want_mass else q.new_empty(0, dtype=torch.float32)


@_operator.register_fake
def _fake(q, k, v, bias, index, meta, scale, softcap, backend, want_lse, want_mass):  # type: ignore[no-untyped-def]
    b, h, n, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(b, h, n, v.shape[-1])
    lse = q.new_empty((b, h, n) if want_lse else (0,), dtype=acc)
    return out, lse, q.new_empty((b, h, meta[-1]) if want_mass else (0,), dtype=torch.float32)


def _backward_module(q: Tensor, kv: KV, layout: Layout, softcap: float, name: str) -> ModuleType:
    """The first backward pass without a reason against it. Those who name `torch` or the oracle get `torch`'s."""
    key = name if name in ("triton", "fa4", "torch", "reference") else q.device.type
    for path in BACKWARD.get(key, ()):
        try:
            module = importlib.import_module(path)
        except ImportError:
            continue
        pays = getattr(module, "backward_pays", None)
        if (pays is None or name == module.NAME or pays(q, kv, layout)) and (
            module.backward_supports(q, kv, layout, softcap) is None
        ):
            return module
    return torch_gather


@torch.library.custom_op("foveate::attend_backward", mutates_args=())
def _backward_operator(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    index: Sequence[Tensor | None],
    meta: Sequence[int],
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kv, layout = _unpack(k, v, bias, index, meta)
    module = _backward_module(q, kv, layout, softcap, backend)
    dq, dk, dv, db = module.backward(dout, dlse, q, kv, layout, out, lse, scale=scale, softcap=softcap)
    return dq, dk, dv, db if db is not None else q.new_empty(0, dtype=torch.float32)


@_backward_operator.register_fake
def _backward_fake(dout, dlse, q, k, v, bias, out, lse, index, meta, scale, softcap, backend):  # type: ignore[no-untyped-def]
    db = bias.new_empty(bias.shape) if bias is not None else q.new_empty(0, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), db


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, index, meta, scale, softcap, backend, _, _ = inputs
    out, lse, _mass = output
    tensors = [t for t in index if t is not None]
    ctx.save_for_backward(q, k, v, bias, out, lse, *tensors)
    ctx.present = [t is not None for t in index]
    ctx.plain = (list(meta), scale, softcap, backend)


def _grad(ctx, dout, dlse, _dmass):  # type: ignore[no-untyped-def]
    q, k, v, bias, out, lse, *tensors = ctx.saved_tensors
    it = iter(tensors)
    index = [next(it) if there else None for there in ctx.present]
    meta, scale, softcap, name = ctx.plain
    dout = torch.zeros_like(out) if dout is None else dout.contiguous()
    dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
    dq, dk, dv, db = _backward_operator(dout, dlse, q, k, v, bias, out, lse, index, meta, scale, softcap, name)
    return dq, dk, dv, db if bias is not None else None, None, None, None, None, None, None, None


_operator.register_autograd(_grad, setup_context=_setup)
