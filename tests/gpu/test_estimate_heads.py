"""Blocks of a probe's heads on a GPU: the choices of the plain code, no waiting."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.scores import fused, heads
    from foveate.scores.probes import Probe
    from tests.estimate_cases import draw, plain


def problem(h, g, m, block, rows=128):
    """Mass that falls off in a different order in every head, so that rounding decides nothing; a uniform head."""
    nk = -(-m // block)
    gen = torch.Generator().manual_seed(m)
    order = torch.rand(2, 1, h, nk, generator=gen).argsort(-1).float()
    mass = (1.02**order).repeat_interleave(block, -1)[..., :m]
    mass[0, :, 0] = 1 + 0.01 * (order / nk).repeat_interleave(block, -1)[0, :, 1, :m]
    mass = (mass / mass.sum(-1, keepdim=True) * rows).cuda()
    mean, kbar = draw(1, h, 128, device="cuda"), draw(1, g, nk, 128, seed=1, device="cuda")
    mean[:, 0] = 0.0  # predicts equal mass
    return Probe(mass[0], mass[1], rows), mean, kbar


@pytest.mark.parametrize("tau", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("m", [2000, 16384, 100_000])
def test_blocks(m, tau):
    probe, mean, kbar = problem(8, 2, m, 128)
    how = dict(tau=tau, least=4, most=min(600, kbar.shape[2]), block=128, scale=0.1, softcap=None)
    assert fused.heads(probe.columns[..., :1]) is not None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = heads.head_blocks(probe, mean, kbar, m, 0.9, **how)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    with plain():
        want = heads.head_blocks(probe, mean, kbar, m, 0.9, **how)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert {0.0: 0, 0.1: 1, 10.0: 8}[tau] == int(got[2].sum())
