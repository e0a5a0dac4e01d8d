"""Decode steps of methods that cut their own caches, or read chunks at other positions: what a device and Triton's
interpreter are both asked."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from foveate.bench.prefill import Turn
from foveate.kernels.dispatch import attend
from foveate.kv import KV
from foveate.layout import Parts
from foveate.methods import _cut
from foveate.methods.base import AttnInput, State
from foveate.profile import Profile
from foveate.registry import parse
from foveate.scores import fused
from foveate.scores.dual_chunk import AtOnce
from tests.profiles import folder


def profiles(layers, h, g):
    """Texts of the three methods with profiles in which heads differ; entries are dropped every few steps."""
    gen = torch.Generator().manual_seed(1)
    score = lambda n: torch.rand(layers, n, generator=gen)  # noqa: E731
    gates = folder(Profile("duo_attention", {}, {"gates": score(g)}))
    beta = torch.where(score(h) < 0.5, 0.1, 0.3)
    spans = folder(Profile("moa", {}, {"alpha": torch.zeros(layers, h), "beta": beta}))
    echo = folder(Profile("razor_attention", {}, {"induction": score(g), "echo": score(g)}))
    return (
        f"duo_attention:sink=4,window=20,slack=12,profile={gates}",
        f"moa:sink=4,block=8,slack=12,profile={spans}",
        f"razor_attention:induction=0.3,sink=4,window=20,fraction=0.2,slack=12,profile={echo}",
    )


def step_of(b, h, g, m, d, lengths, *, dtype=torch.float32, device="cpu", room=0):
    """A decode step over dense keys with room behind them, rows of these lengths."""
    gen = torch.Generator().manual_seed(m)
    draw = lambda *s: torch.randn(*s, generator=gen).to(device, dtype)  # noqa: E731
    k, v, q = draw(b, g, m + room, d), draw(b, g, m + room, d), draw(b, h, 1, d)
    have = torch.tensor(lengths, device=device)
    for row, n in enumerate(lengths):  # whatever lies behind them is never read
        k[row, :, n:], v[row, :, n:] = float("nan"), float("nan")
    kv = KV.dense(k, v, len=have.int()[:, None].expand(b, g).contiguous())
    return AttnInput(q, kv, "decode", 2, 4, d**-0.5, q_pos=have[:, None] - 1, rope=Turn(), step=3)


def check_chunks(text, b, h, g, m, d, lengths, *, tolerance, softcap=None, **where):
    """All chunks in one call against chunk by chunk."""
    x = replace(step_of(b, h, g, m, d, lengths, room=7, **where), softcap=softcap)
    plan = parse(text).plan(x, State())
    assert isinstance(plan, AtOnce)
    out, lse = plan.joint(scale=x.scale, softcap=softcap, backend=None)
    assert out.shape == x.q.shape and out.dtype == x.q.dtype
    want = attend(x.q, x.kv, Parts(plan.parts), scale=x.scale, softcap=softcap, return_lse=True)
    apart = lambda a, b: float((a.float() - b.float()).norm() / b.float().norm())  # noqa: E731
    assert apart(out, want[0]) < tolerance  # of many keys outputs are small: only their ratio says something
    torch.testing.assert_close(lse, want[1], atol=tolerance, rtol=tolerance)
    true = attend(x.q, x.kv, None, scale=x.scale, softcap=softcap)
    if max(lengths) > parse(text).grid.exact:
        assert apart(out, true) > 0.05
    else:
        assert apart(out, true) < 3 * tolerance


@contextlib.contextmanager
def by_position():
    """In this block rules ask every entry for its position."""
    before = _cut.fused
    _cut.fused = type("none", (), {"estimates": staticmethod(lambda t: None)})
    try:
        yield
    finally:
        _cut.fused = before


@contextlib.contextmanager
def by_number():
    """In this block rules count entries wherever the cache allows it, kernels or not."""
    before = _cut.fused
    _cut.fused = type("all", (), {"estimates": staticmethod(lambda t: fused)})
    try:
        yield
    finally:
        _cut.fused = before


def same_rule(method, x, state):
    """The plan by entry number names the entries that the plan by position names. Returns whether there was one."""
    with by_number():
        plan = method.plan(x, state)
    with by_position():
        want = method.plan(x, state)
    if not isinstance(plan, Parts):
        return False
    (part,) = plan.parts
    assert part.kv.pos is None and part.kv.k is x.kv.k
    assert torch.equal(part.layout.to_mask(part.kv), want.to_mask(x.kv))
    return True
