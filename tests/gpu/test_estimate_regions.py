"""Lists by region and moved vectors on a GPU: the plans of qwen1m without kernels, exact lists, one wait a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.bench.prefill import Turn
    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores import dual_chunk, fused, rotation
    from tests import estimate_cases as cases


@pytest.mark.parametrize("name,tolerance", [("bfloat16", 2e-2), ("float16", 4e-3), ("float32", 1e-3)])
@pytest.mark.parametrize("b,heads,n,d", [(1, 8, 5000, 128), (2, 2, 3000, 64), (1, 3, 1700, 96)])
def test_moved(b, heads, n, d, name, tolerance):
    """Angles of large positions carry fp32's error of about position * 1e-7, on either path."""
    dtype, rope = getattr(torch, name), Turn()
    x = cases.draw(b, n, heads, d, device="cuda", dtype=dtype).transpose(1, 2)
    old = torch.arange(n, device="cuda").expand(b, n)
    assert x.numel() > rotation.SMALL and fused.turns(x) is not None
    got = rotation.moved(x, rope, old, old % 700 + 30), rotation.unrotated(x, rope, old, torch.float32)
    with cases.plain():
        want = rotation.moved(x.float(), rope, old, old % 700 + 30), rotation.unrotated(x.float(), rope, old, torch.float32)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    torch.testing.assert_close(got[0].float(), want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], want[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("first,blocks", [(0, 500), (130, 200)])
def test_lists(first, blocks):
    block, each, b, heads = 64, 112, 1, 8
    gen, chosen, last = torch.Generator().manual_seed(first), [], first + blocks
    for c in range(first // each, (last - 1) // each + 1):
        end, four = min(last, (c + 1) * each) * block, []
        for most in (1000, 200):
            some = torch.rand(b, heads, end, generator=gen).argsort(-1)[..., :most].sort(-1).values.int().cuda()
            four += [some, torch.randint(1, some.shape[-1] + 1, (b, heads), generator=gen).int().cuda()]
        chosen.append(tuple(four))
    got = dual_chunk.by_regions(chosen, first, blocks, block, each * block)
    with cases.plain():
        want = dual_chunk.by_regions(chosen, first, blocks, block, each * block)
    for name in dual_chunk.REGIONS:
        for at in (0, 2):
            (index, count), (other, many) = got[name][at : at + 2], want[name][at : at + 2]
            live = torch.arange(index.shape[-1], device="cuda") < count[..., None]
            assert torch.equal(count, many) and index.shape == other.shape and torch.equal(index[live], other[live]), name


@pytest.mark.parametrize("start", [0, 9000])
def test_plans_of_qwen1m(start):
    """Probes run in bf16 products either way; lists may differ where rounding moved a key or a vote."""
    x = replace(cases.peaked(8, 2, 20000, 128, start, dtype=torch.bfloat16, device="cuda"), rope=Turn())
    method = parse("qwen1m:threshold=0,columns=500,diagonals=300")
    got = method.plan(x, State())
    with cases.plain():
        want = method.plan(x, State())
    for mine, theirs in zip(got.parts, want.parts, strict=True):
        kv = x.kv if theirs.kv is None else theirs.kv
        rows = torch.arange(0, x.q.shape[2], 501, device="cuda")
        a, z = mine.layout.to_mask(kv, rows), theirs.layout.to_mask(kv, rows)
        assert float((a != z).sum()) <= 0.05 * float(z.sum()), (int((a != z).sum()), int(z.sum()))


def test_the_device_is_waited_for_once():
    x = replace(cases.peaked(8, 2, 20000, 128, dtype=torch.bfloat16, device="cuda"), rope=Turn())
    method = parse("qwen1m:threshold=0,columns=500,diagonals=300")
    method.plan(x, State())  # compiles, and reads the pairs of channels off the rotation
    waits, tolist = [], torch.Tensor.tolist
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")

        def counted(t):
            torch.cuda.set_sync_debug_mode("default")
            waits.append(t.shape)
            found = tolist(t)
            torch.cuda.set_sync_debug_mode("error")
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", counted)
            method.plan(x, State())
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert waits == [torch.Size([6])]
