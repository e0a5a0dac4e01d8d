"""Tree searches on a GPU: the lists of the plain code, little memory, equal runs, no waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.kv import KV
    from foveate.methods.base import State
    from foveate.methods.hip import HiP
    from tests import estimate_tree_cases as cases

GPU = dict(device="cuda")
BASE = dict(dense_layers=0)
METHODS = [
    {},
    dict(share="group"),
    dict(k=2048, sink=128, window=1024),
    dict(k=500, block_k=4, tile=64, representative="last"),
    dict(k=300, block_k=1, stride=8, representative="first"),
    dict(k=512, block_k=16, block_q=128, stride=4),
]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("start", [0, 1500])
def test_plans(options, start):
    """Inputs of half precision, judged in fp32 on the same numbers; two ranges that tie to within rounding may swap."""
    for dtype, d in ((torch.bfloat16, 128), (torch.float16, 64)):
        x = cases.peaked(8, 2, 6000, d, start, dtype=dtype, **GPU)
        judged = replace(x, q=x.q.float(), kv=KV.dense(x.kv.k.float(), x.kv.v.float()))
        assert cases.differing(HiP(**BASE | options), x, judged) < 2e-3


def test_plans_in_fp32():
    """Products of three tf32 parts are a little less exact than those of the plain code."""
    x = cases.peaked(4, 2, 5000, 128, dtype=torch.float32, **GPU)
    assert cases.differing(HiP(**BASE), x, x) < 5e-3


@pytest.mark.parametrize("options", METHODS[:3], ids=str)
def test_ties(options):
    """Numbers whose sums no order rounds: equal lists, to the last index."""
    cases.check(HiP(**BASE | options), cases.tied(cases.peaked(8, 2, 5000, 64, dtype=torch.bfloat16, **GPU)))


@pytest.mark.parametrize("share", ["head", "group"])
def test_decode(share):
    x = cases.decode(3, 8, 2, 9000, 128, (9000, 5000, 300), dtype=torch.bfloat16, **GPU)
    judged = replace(x, q=x.q.float(), kv=KV.dense(x.kv.k.float(), x.kv.v.float(), len=x.kv.len))
    assert cases.differing(HiP(**BASE | dict(share=share)), x, judged) < 5e-3


def test_long_search_holds_little_memory_and_repeats():
    """32K keys: the lists and a few MiB; equal runs."""
    x, method = cases.peaked(32, 8, 32768, 128, dtype=torch.bfloat16, **GPU), HiP(**BASE)
    first = method.plan(x, State())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = method.plan(x, State())
    held = torch.cuda.max_memory_allocated() - before
    assert held < again.tiles.numel() * 4 + 8 * 2**20, held
    for _ in range(5):
        again = method.plan(x, State())
        assert torch.equal(first.tiles, again.tiles) and torch.equal(first.tile_count, again.tile_count)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_planning_waits_for_nothing(phase):
    """torch reports every synchronisation as an error here; a CUDA graph holds the plan."""
    if phase == "prefill":
        x = cases.peaked(8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    else:
        x = cases.decode(2, 8, 2, 4000, 128, (4000, 3000), dtype=torch.bfloat16, **GPU)
    method = HiP(**BASE)
    want, got = cases.planned_in_a_graph(method, x)
    assert torch.equal(got.tiles, want.tiles) and torch.equal(got.tile_count, want.tile_count)
