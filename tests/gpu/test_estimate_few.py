"""The mean mass of a few tokens on a GPU: against PyTorch in fp32, over lengths on the device, equal from run to run."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
if torch.cuda.is_available():
    from foveate.kernels.triton import estimate_few_launch as kernels
    from foveate.kv import KV

SHAPES = [(9, 4, 128), (17, 4, 128), (16, 8, 128), (5, 7, 64), (2, 1, 96), (9, 2, 256), (32, 4, 64), (16, 1, 128)]
LENGTHS = [((9000, 9000),), ((40001, 39990), (33, 70)), ((1, 5), (130, 128), (2047, 2050))]


@pytest.mark.parametrize("lens", LENGTHS, ids=str)
@pytest.mark.parametrize("n,r,d", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_pytorch(n, r, d, lens, dtype):
    """Rows shorter than the call see nothing with their first tokens; what lies behind a row is NaN."""
    gen = torch.Generator("cuda").manual_seed(n)
    b, g, m = len(lens), 2, max(map(max, lens)) + 77
    draw = lambda *s: torch.randn(*s, device="cuda", generator=gen).to(dtype)  # noqa: E731
    q, k = draw(b, g * r, n, d), draw(b, g, m, d)
    length = torch.tensor(lens, dtype=torch.int32, device="cuda")
    at = length[:, :1].long() - n + torch.arange(n, device="cuda")
    length = length[:, :1].expand(b, g).contiguous()  # a call stands at one place of a row
    k.masked_fill_((torch.arange(m, device="cuda") >= length[..., None])[..., None], float("nan"))
    s = (q.float().view(b, g, r * n, d) @ k.float().mT).view(b, g, r, n, m) * d**-0.5
    hidden = torch.arange(m, device="cuda") > at[:, None, None, :, None]
    s = s.masked_fill(hidden | (torch.arange(m, device="cuda") >= length[..., None, None, None]), float("-inf"))
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()
    sees = (at[:, -1:] + 1 - torch.arange(m, device="cuda")).clamp(1, n)
    want = p.mean(2).sum(2) / sees[:, None]
    kv = KV.dense(k, k, len=length)
    assert kernels.reads(q, kv)
    got = kernels.mean_mass(q, kv, at, lse.view(b, g * r, n), scale=d**-0.5)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-2)
    assert bool((got[torch.arange(m, device="cuda") >= length[..., None]] == 0).all())
    assert torch.equal(got, kernels.mean_mass(q, kv, at, lse.view(b, g * r, n), scale=d**-0.5))
