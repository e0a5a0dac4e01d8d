"""Launches made again from what was remembered of a first (`kernels/relaunch.py`), against the oracle in fp64."""

from __future__ import annotations

import pytest
import torch

from foveate import attend
from foveate.kernels import gluon, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_gluon import DEVICE, HOPPER, assert_close, inputs, lists, watchdog  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    """What is remembered, empty at first."""
    from foveate.kernels import relaunch

    held = {}
    monkeypatch.setattr(relaunch, "_HELD", held)
    return held


def compare(q, k, v, layout, scale=0.1):
    out, lse = attend(q, (k, v), layout, scale=scale, backend="gluon", return_lse=True)
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, q.dtype)


def columns(n, seed):
    gen = torch.Generator(DEVICE).manual_seed(seed)
    index = torch.rand(1, 4, n // 128, n, generator=gen, device=DEVICE).argsort(-1)[..., :96].sort(-1).values.int()
    return Layout.lists((1, 4, n, n), block_q=128, entries=index)


PLANS = {
    "tiles": lambda n, seed: lists(1, 4, 4, n, n, 128, 0.4, seed=seed),
    "narrow tiles": lambda n, seed: lists(1, 2, 4, n, n, 64, 0.4, seed=seed),
    "columns": columns,
    "dense": lambda n, seed: Layout.dense(1, 4, n, n),
    "rule": lambda n, seed: Layout.static((1, 4, n, n), sink=3 + seed, window=100 + 40 * seed, device=DEVICE),
    "factored": lambda n, seed: Layout.factored(
        (1, 4, n, n), diagonals=torch.tensor([[[0, 64 * (1 + seed)]]], device=DEVICE).expand(1, 4, 2),
        columns=torch.tensor([[[seed, 70]]], device=DEVICE).expand(1, 4, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", PLANS)
def test_other_tensors_and_lists_of_one_shape(name, d, remembered):
    """Every call has tensors and lists of its own, all alive; shapes come back after others came between."""
    alive = []
    for seed in range(3):
        for n in (256, 640):
            q, k, v = inputs(1, 4, 2, n, n, d, seed=seed)
            alive.append((q, k, v, PLANS[name](n, seed)))
            compare(*alive[-1])
        if seed == 0:
            first = len(remembered)
            assert first >= 2
    if name in ("columns", "dense", "rule"):  # the longest lists of the others may differ from seed to seed
        assert len(remembered) == first


def test_scale_strides_and_alignment_are_told_apart():
    q, k, v = inputs(1, 4, 2, 256, 256, 128)
    layout = lists(1, 4, 4, 256, 256, 128, 0.5)
    turned = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    tiles = layout.tiles.new_zeros(layout.tiles.numel() + 1)[1:].view_as(layout.tiles).copy_(layout.tiles)
    moved = Layout(layout.shape, block_q=128, tile_width=128, tiles=tiles, tile_count=layout.tile_count)
    for _ in range(2):
        compare(q, k, v, layout)
        compare(q, k, v, layout, scale=0.2)
        compare(*turned, layout)
        compare(turned[0], k, turned[2], layout)
        compare(q, k, v, moved)
        compare(*(t.half() for t in (q, k, v)), layout)


def test_a_captured_call_is_replayed():
    q, k, v = inputs(1, 4, 2, 256, 256, 128)
    layout = lists(1, 4, 4, 256, 256, 128, 0.5)
    for _ in range(2):
        attend(q, (k, v), layout, backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, (k, v), layout, backend="gluon")
    q.copy_(inputs(1, 4, 2, 256, 256, 128, seed=7)[0])
    graph.replay()
    assert torch.equal(out, attend(q, (k, v), layout, backend="gluon"))


def test_a_call_outside_the_current_device_context():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for _ in range(2):
        for device in ("cuda:0", "cuda:1"):
            q, k, v = (t.to(device) for t in inputs(1, 4, 2, 256, 256, 128))
            assert gluon.supports(q, KV.dense(k, v), Layout.dense(1, 4, 256, 256), Want()) is None
            compare(q, k, v, Layout.dense(1, 4, 256, 256))
