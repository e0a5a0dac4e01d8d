"""Problems for the dense decode kernel and for merges inside a launch, on any device; judged by the oracle in fp32."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from foveate.kernels import reference
from foveate.kernels.base import Want
from foveate.kernels.triton import arrivals
from foveate.kernels.triton import dense_decode_launch as kernels
from foveate.kv import KV
from foveate.layout import Layout
from tests.kernel_cases import poison

NAN = float("nan")


def problem(
    lens, r=4, d=64, dv=None, kind="dense", dtype=torch.float32, device="cpu", seed=0, room=21, bias=False, pos=False, n=1
):
    """q `[B, H, n, D]` and a view whose rows and kv heads have the lengths `[B][G]`, NaN in every slot beyond them.

    pos: shuffled positions, of which the queries see about two thirds. bias: weights, some -inf. What no query sees is NaN.
    """
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    b, g, m, dv = len(lens), len(lens[0]), max(max(row) for row in lens) + room, dv or d
    length = torch.tensor(lens, dtype=torch.int32)
    q, k, v = draw(b, g * r, n, d), draw(b, g, m, d), draw(b, g, m, dv)
    live = torch.arange(m) < length[..., None]
    more, q_pos = {}, None
    if bias:
        more["bias"] = draw(b, g, m).masked_fill(torch.rand(b, g, m, generator=gen) < 0.2, float("-inf"))
        live &= more["bias"] > float("-inf")
    if pos:
        more["pos"] = torch.stack([torch.randperm(m, generator=gen).int() for _ in range(b * g)]).view(b, g, m)
        q_pos = torch.full((b, 1), 2 * m // 3 - n + 1) + torch.arange(n)
        live &= more["pos"] <= q_pos[:, -1:, None]
    k, v = (t.masked_fill(~live[..., None], NAN).to(device, dtype) for t in (k, v))
    more = {name: t.to(device) for name, t in more.items()}
    kv = KV.dense(k, v, len=length.to(device), **more)
    if kind == "ragged":
        flat = [t.reshape(b * g * m, -1) for t in (k, v)]
        offsets = torch.arange(b * g, device=device).view(b, g) * m
        kv = KV.ragged(*flat, offsets, kv.len, m, pos=kv.pos, bias=kv.bias)
    layout = Layout.dense(b, g * r, n, m, q_pos=None if q_pos is None else q_pos.to(device))
    return q.to(device, dtype), kv, layout


def oracle(q, kv, layout, softcap=0.0, scale=None):
    exact = replace(kv, k=kv.k.float(), v=kv.v.float())
    scale = scale or 1 / math.sqrt(q.shape[-1])
    out, lse, _ = reference.forward(q.float(), exact, layout, scale=scale, softcap=softcap, want=Want())
    return out, lse


def check(q, kv, layout, tolerance, softcap=0.0, want=None):
    """The kernel equals the oracle, and leaves all counters at 0; returns (out, lse)."""
    assert kernels.why_not(q, kv, layout) is None
    want, want_lse = want or oracle(q, kv, layout, softcap)
    with poison():  # torch.empty holds NaN
        out, lse = kernels.attend(q, kv, layout, 1 / math.sqrt(q.shape[-1]), softcap, True)
    dead = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), dead) and out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse[~dead], want_lse[~dead], atol=max(2e-5, tolerance / 2), rtol=1e-5)
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=0)
    at_rest()
    return out, lse


def at_rest():
    """Every counter is 0 between launches."""
    for held in [*arrivals._streams.values(), *arrivals._captured.values()]:
        assert not bool(held.any())
