"""Problems for the kernels over per-token lists, on any device; judged by the oracle on the same layout."""

from __future__ import annotations

from dataclasses import replace

import torch

import foveate
from foveate.kernels.triton import inverse, tokens, tokens_backward, tokens_inverse
from foveate.kernels.triton.tokens_lists import heads_of
from foveate.layout import Layout
from foveate.lists import repeat_heads
from tests.kernel_cases import Case, Maker, poison


def listed(
    x: Maker, keep: int = 3, width: int = 16, *, m: int | None = None, b: int = 1, heads: int | None = None,
    local: bool = False, sink: bool = False, dv: int | None = None, causal: bool = True,
) -> Case:  # fmt: skip
    """Random ascending lists of aligned tiles, `[b, heads or G, N, keep]`, unequal counts, empty rows, junk behind them.

    local: lists that change from token to token in one tile at most. sink: every row names the first tile.
    """
    m = x.n if m is None else m
    heads = x.g if heads is None else heads
    blocks = -(-m // width)
    keep = min(keep, blocks)
    draw = torch.rand(b, heads, x.n, blocks, generator=x.gen)
    if local:  # scores drift slowly, so neighbours agree
        draw = torch.rand(b, heads, 1, blocks, generator=x.gen) + 0.02 * draw
    if sink:
        draw[..., 0] = 2
    if causal:
        last = (m - x.n + torch.arange(x.n)).clamp(min=0) // width
        draw = draw.masked_fill(torch.arange(blocks) > last[:, None], -1)
    pick = draw.topk(keep, -1).indices.sort(-1).values
    count = torch.randint(0, keep + 1, (b, heads, x.n), generator=x.gen)
    count[..., ::3] = keep
    count[..., 1::7] = 0
    tiles = (pick * width).masked_fill(torch.arange(keep) >= count[..., None], 2**28)
    tiles, count = tiles.int().to(x.device), count.int().to(x.device)
    layout = Layout((b, x.h, x.n, m), causal=causal, tile_width=width, tiles=tiles, tile_count=count)
    return Case(x.q(b=b), x.dense(m, b=b, dv=dv), layout)


def odd(x: Maker, width: int = 16, keep: int = 4, every: int = 4) -> Case:
    """One list in `every` holds tiles at any start, overlapping or not; the others are aligned."""
    case = listed(x, keep, width)
    tiles, count = case.layout.tiles.clone(), case.layout.tile_count.clone()
    rows = tiles[:, :, ::every]
    loose = torch.rand(*rows.shape[:3], x.n, generator=x.gen).topk(rows.shape[-1], -1).indices.sort(-1).values
    loose[..., 1] = loose[..., 0] // width * width  # aligned, beside a piece of its own block
    tiles[:, :, ::every], count[:, :, ::every] = loose.sort(-1).values.int().to(x.device), rows.shape[-1]
    same = tiles[..., 1:] == tiles[..., :-1]  # starts are distinct
    count = torch.where(same.any(-1), 1, count)
    return replace(case, layout=replace(case.layout, tiles=tiles, tile_count=count.int()))


def unseen(x: Maker, width: int = 16) -> Case:
    """Only some early rows of a block list it: its other keys may hold anything."""
    row = torch.arange(x.n)
    tiles = (row // width * width).view(1, 1, -1, 1).expand(1, x.g, -1, 1).contiguous()
    count = (row % width < 5).int().expand(1, x.g, -1).contiguous()
    layout = Layout((1, x.h, x.n, x.n), tile_width=width, tiles=tiles.int().to(x.device), tile_count=count.to(x.device))
    case = Case(x.q(), x.dense(), layout)
    assert bool(case.poisoned().kv.v.isnan().any())
    return case


def check(case: Case, knobs: tokens.Config | None = None, tolerance: float = 2e-5):
    """(out, lse) of the kernels; NaN in keys that no row sees and in all memory before it is written."""
    assert tokens.refused(case.q, case.kv, case.layout, 0.0) is None
    want, want_lse = case.oracle()
    dirty = case.poisoned()
    with poison():
        out, lse = tokens.attend(dirty.q, dirty.kv, case.layout, case.scale, True, knobs)
    assert out.dtype == case.q.dtype and out.shape == want.shape
    dead = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), dead)
    torch.testing.assert_close(lse[~dead], want_lse[~dead], atol=max(2e-5, tolerance / 10), rtol=1e-5)
    rounding = 0 if case.q.dtype == torch.float32 else tolerance / 2
    torch.testing.assert_close(out.float(), want, atol=tolerance, rtol=rounding)
    assert bool((out[dead] == 0).all())
    return out, lse


def check_inverse(case: Case, scratch: int) -> None:
    """The inverse lists of tokens against the layout itself, and against those that `inverse.py` builds for any layout."""
    x, g, device = case.layout, case.kv.shape[1], case.q.device
    assert x.tiles is not None and x.tile_count is not None
    heads, (b, h, n, m), width = heads_of(x, g), x.shape, x.tile_width
    first, tokens_inverse.SCRATCH = tokens_inverse.SCRATCH, scratch
    try:
        with poison():
            got = tokens_inverse.build(x, heads, 4)
    finally:
        tokens_inverse.SCRATCH = first
    other = inverse.build(x, g, width, 4, device)
    for name in ("offset", "cuts", "plan"):
        assert torch.equal(getattr(got, name), getattr(other, name)), name
    assert torch.equal(got.counts[:, 2], other.counts[:, 2]) and got.max_items == other.max_items
    assert torch.equal(got.items[: int(got.plan[1])], other.items[: int(other.plan[1])])
    blocks, used = -(-m // width), torch.arange(x.tiles.shape[-1], device=device) < x.tile_count[..., None]
    start = x.tiles.long()
    seen = torch.arange(blocks, device=device) * width <= (m - n + torch.arange(n, device=device))[:, None]

    def names(which, block):  # [B, lists, N, blocks]
        made = torch.zeros(*start.shape[:3], blocks + 1, dtype=torch.bool, device=device)
        return made.scatter_(3, torch.where(which, block, blocks).clamp(max=blocks), True)[..., :blocks] & seen

    whole = names(used & (start % width == 0), start // width)
    loose = used & (start % width != 0)
    part = (names(loose, start // width) | names(loose, start // width + 1)) & ~whole
    given = torch.arange(g * heads.lists, device=device) * heads.share * start.shape[1] // h
    rows = [y[:, given].view(b, g, heads.lists * n, blocks).transpose(2, 3).flatten(0, 2) for y in (whole, part)]
    for k, (begin, (_, middle, every)) in enumerate(zip(got.offset.tolist(), got.counts.tolist(), strict=True)):
        for ids, mask in zip((got.ids[begin : begin + middle], got.ids[begin + middle : begin + every]), rows, strict=True):
            row = mask[k].nonzero().flatten()
            assert torch.equal(ids.long(), row // n << 24 | row % n)


def gradients(case: Case, dout, dlse):
    """out, lse and the gradients of (out * dout).sum() + (lse * dlse).sum(), by autograd through all scores in fp64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
    mask, h = case.layout.to_mask(case.kv), q.shape[1]
    dead = ~mask.any(-1)
    s = (q @ repeat_heads(k, h).transpose(-1, -2)) * case.scale
    s = s.masked_fill(~mask, float("-inf")).masked_fill(dead[..., None], 0)
    lse = s.logsumexp(-1)
    out = torch.softmax(s, -1).masked_fill(dead[..., None], 0) @ repeat_heads(v, h)
    loss = (out * dout.double()).sum() + (lse.masked_fill(dead, 0) * dlse.double()).sum()
    grads = torch.autograd.grad(loss, (q, k, v))
    return out.detach(), lse.detach().masked_fill(dead, float("-inf")), grads


def check_backward(
    case: Case, knobs: tokens.Config | None = None, steps: tokens_backward.Config | None = None, tolerance: float = 3e-5
):
    """The gradients of the kernels; keys that no row sees hold NaN, and so do all results before they are written."""
    gen = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=gen).to(case.q.device)  # noqa: E731
    dout = draw(*case.q.shape[:3], case.kv.shape[4]).to(case.q.dtype)
    dlse = draw(*case.q.shape[:3])
    out, lse, want = gradients(case, dout, dlse)
    dirty = case.poisoned()
    with poison():
        *got, none = tokens_backward.backward(
            dout, dlse, dirty.q, dirty.kv, case.layout, out.to(case.q.dtype), lse.float(), scale=case.scale, softcap=0.0,
            knobs=knobs, steps=steps,
        )  # fmt: skip
    assert none is None
    for name, a, b, t in zip(("dq", "dk", "dv"), got, want, (case.q, case.kv.k, case.kv.v), strict=True):
        assert a.shape == t.shape and a.dtype == t.dtype, name
        assert bool(torch.isfinite(a).all()), f"{name} was not written, or NaN reached it"
        off = float((a.double() - b).abs().max())
        assert off <= tolerance * max(1.0, float(b.abs().max())), f"{name} is off by {off}"
    assert bool((got[1][dirty.kv.k.isnan()] == 0).all()) and bool((got[2][dirty.kv.v.isnan()] == 0).all())
    return got


def through_attend(case: Case):
    return foveate.attend(case.q, case.kv, case.layout, backend="triton", return_lse=True)
