"""The kernels over per-token lists on a GPU, against the oracle on the same layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.kernels.triton import tokens, tokens_backward
    from foveate.kv import KV
    from tests import token_cases as cases
    from tests.kernel_cases import Case, Maker
    from tests.token_cases import check, check_backward, listed

# the inputs are exact; partial results and outputs are rounded to the dtype
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHARES = (None, 0.0, 2.0)  # as configured; all blocks walked by tiles of tokens; none


def make(n: int, dtype=torch.bfloat16, **more) -> Maker:
    return Maker(n, dtype=dtype, device="cuda", **{"d": 128, **more})


def both_ways(case: Case, **more) -> None:
    base = tokens.config(case.q, case.kv, case.layout.tile_width)
    for share in SHARES:
        check(case, base if share is None else replace(base, shared=share, **more), TOLERANCE[case.q.dtype])


@both
@pytest.mark.parametrize("h,g", [(4, 4), (8, 2), (16, 1), (6, 2), (64, 2), (64, 1)])
@pytest.mark.parametrize("local", [False, True])
def test_groups(h, g, local, dtype):
    both_ways(listed(make(700, dtype, h=h, g=g), 6, 64, sink=True, local=local))


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_lists_that_heads_share_or_do_not(heads):
    both_ways(listed(make(500, h=8, g=4), 5, 64, heads=heads, local=True))


@pytest.mark.parametrize("n,m", [(1, 1), (33, 33), (64, 64), (500, 1333), (1333, 500), (1, 700), (1000, 1001)])
def test_lengths(n, m):
    for causal in (True, False):
        both_ways(listed(make(n), 4, 64, m=m, causal=causal))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("keep", [1, 16, 60])
def test_widths_and_lists(width, keep):
    both_ways(listed(make(900, h=4, g=1), keep, width, sink=True))


@both
def test_tiles_at_any_start(dtype):
    for seed in range(2):
        both_ways(cases.odd(make(600, dtype, seed=seed), 64, 5))


@both
def test_keys_of_a_listed_block_that_no_row_sees(dtype):
    both_ways(cases.unseen(make(600, dtype), 64))
    gradients(cases.unseen(make(600, dtype), 64))
    both_ways(cases.odd(make(600, dtype), 64, 2, every=100))


@both
@pytest.mark.parametrize("d,dv", [(64, 64), (96, 96), (128, 64), (40, 128)])
def test_head_dims(d, dv, dtype):
    both_ways(listed(make(400, dtype, d=d), 4, 64, dv=dv))


def test_batch_strides_and_lists_shared_by_rows():
    x = make(400)
    case = listed(x, 4, 64, b=2)
    both_ways(case)
    one = replace(case.layout, tiles=case.layout.tiles[:1], tile_count=case.layout.tile_count[:1])
    both_ways(replace(case, layout=one))
    q, k, v = (x.randn(2, 400, heads, 128).transpose(1, 2) for heads in (4, 2, 2))
    both_ways(Case(q, KV.dense(k, v), case.layout))


def test_large_logits():
    case = listed(make(400), 4, 64)
    check(replace(case, q=case.q * 30), tolerance=3e-2)


def test_chunks(monkeypatch):
    monkeypatch.setattr(tokens, "ROWS_MOST", 256)
    case = listed(make(1000, h=8, g=2), 5, 64, sink=True)
    assert [len(x) for x in tokens.Work(case.q, case.kv, case.layout, 0.1).batches()] == [4]
    both_ways(case)
    both_ways(case, scratch=1)  # a batch of lists for each chunk
    gradients(case)


@pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (8, 2, 2), (16, 1, 1), (64, 1, 1), (8, 2, 8)])
@pytest.mark.parametrize("local", [False, True])
def test_lists_hold_every_pair_once(h, g, heads, local):
    """Ids and shared blocks of all chunks together, as a mask of whole blocks, and the slots that are said to be written."""
    case = listed(make(3000, h=h, g=g), 12, 64, heads=heads, local=local, sink=True)
    x = case.layout
    for share in SHARES:
        base = replace(tokens.config(case.q, case.kv, 64), scratch=64 << 20)
        work = tokens.Work(case.q, case.kv, x, 0.1, base if share is None else replace(base, shared=share))
        lists, leads = work.heads.lists, work.heads.leads
        at = torch.arange(leads, device="cuda")
        blocks, n, slots = 47, 3000, x.tiles.shape[-1]
        start = x.tiles[0, (at % (g * lists)) * work.heads.share * x.tiles.shape[1] // h].long()
        count = x.tile_count[0, (at % (g * lists)) * work.heads.share * x.tiles.shape[1] // h]
        used = torch.arange(slots, device="cuda") < count[..., None]
        want = torch.zeros(leads, n, blocks + 1, dtype=torch.bool, device="cuda")
        want.scatter_(2, torch.where(used, start // 64, blocks), True)
        seen = torch.arange(blocks, device="cuda") * 64 <= torch.arange(n, device="cuda")[:, None]
        want = want[..., :blocks] & seen
        for batch in work.batches():
            made = work.lists(batch)
            k = leads * made.blocks
            got = torch.zeros(leads, n, blocks, dtype=torch.int32, device="cuda")
            present = torch.zeros(leads, n, slots + 1, dtype=torch.bool, device="cuda")
            for number, (first, rows) in enumerate(batch):
                length, offset = made.counts[number].long(), made.offset[number].long()
                row = torch.repeat_interleave(torch.arange(k, device="cuda"), length)
                inside = torch.arange(len(row), device="cuda") - (length.cumsum(0) - length)[row]
                word = made.ids[offset[row] + inside].long()
                assert bool(((word.diff() > 0) | (row.diff() > 0)).all())
                lead, block, token = row // made.blocks, row % made.blocks, first + (word >> 8)
                got.index_put_((lead, token, block), torch.ones_like(word, dtype=torch.int32), accumulate=True)
                assert torch.equal(start[lead, token, word & 255], block * 64)
                present[lead, token, word & 255] = True
                items = made.items[number, : int(made.plan[number])].long()
                sizes = torch.zeros(k, dtype=torch.long, device="cuda").index_add_(0, items[:, 0], items[:, 2] - items[:, 1])
                assert torch.equal(sizes, length) and bool((items[:, 2] - items[:, 1] <= work.longest).all())
            end = batch[-1][0] + batch[-1][1]
            width, (first, _) = made.shared.shape[2], batch[0]
            i = torch.arange(width, device="cuda")
            front, back = made.shared_count.long().split(1, -1)
            named = torch.zeros(*made.shared.shape[:2], blocks + 1, dtype=torch.bool, device="cuda")
            live = (i < front) | (i >= width - back)
            named.scatter_(2, torch.where(live, made.shared, blocks).long(), True)
            shared = named[..., :blocks].repeat_interleave(made.tile, 1)[:, : end - first] & want[:, first:end]
            got[:, first:end] += shared.int()
            assert torch.equal(got[:, first:end], want[:, first:end].int())
            present[:, first:end, slots] = shared.any(-1)
            bits = (made.present[:, : end - first, :, None] >> torch.arange(32, device="cuda", dtype=torch.int32)) & 1
            assert torch.equal(bits.flatten(2)[..., : slots + 1].bool(), present[:, first:end])


@pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (8, 2, 2), (64, 1, 1), (8, 2, 8)])
@pytest.mark.parametrize("scratch", [1 << 12, 1 << 28])
def test_inverse_lists(h, g, heads, scratch):
    cases.check_inverse(listed(make(1500, h=h, g=g), 12, 64, heads=heads, sink=True, b=2), scratch)
    cases.check_inverse(cases.odd(make(700, h=h, g=g), 64, 6), scratch)


def test_runs_are_equal():
    case = listed(make(2000, h=8, g=2), 8, 64, sink=True)
    first = tokens.attend(case.q, case.kv, case.layout, case.scale, True)
    for _ in range(10):
        again = tokens.attend(case.q, case.kv, case.layout, case.scale, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_attend_takes_these_kernels_and_waits_for_nothing(monkeypatch):
    calls = []
    real = tokens.attend
    monkeypatch.setattr(tokens, "attend", lambda *a: calls.append(1) or real(*a))
    case = listed(make(800, h=8, g=2), 6, 64)
    cases.through_attend(case)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = cases.through_attend(case)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(calls) == 2
    torch.testing.assert_close(out.float(), case.oracle()[0], atol=2e-2, rtol=0)


# ---------------------------------------------------------------------- gradients
GRADIENTS = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest element


def gradients(case: Case) -> None:
    for share in SHARES:
        base = tokens.config(case.q, case.kv, case.layout.tile_width)
        knobs = base if share is None else replace(base, shared=share)
        check_backward(case, knobs, tolerance=GRADIENTS[case.q.dtype])


@both
@pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (8, 2, 2), (16, 1, 1), (6, 2, 2), (8, 4, 8), (64, 1, 1)])
def test_gradients(h, g, heads, dtype):
    gradients(listed(make(600, dtype, h=h, g=g), 6, 64, heads=heads, sink=True))


@pytest.mark.parametrize("n,m", [(64, 64), (500, 1333), (1333, 500)])
def test_gradients_of_lengths(n, m):
    for causal in (True, False):
        gradients(listed(make(n), 4, 64, m=m, causal=causal))


@pytest.mark.parametrize("width", [16, 32, 128])
@pytest.mark.parametrize("d,dv", [(64, 64), (128, 64), (40, 128)])
def test_gradients_of_widths_and_head_dims(width, d, dv):
    gradients(listed(make(400, d=d), 5, width, dv=dv))


@both
def test_gradients_of_tiles_at_any_start(dtype):
    gradients(cases.odd(make(600, dtype), 64, 5))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_gradients_of_many_steps(stages):
    """Every row names the first block: list words are loaded a step ahead, rows as many as there are stages."""
    for h, g in ((8, 2), (16, 1), (2, 2)):
        case = listed(make(900, h=h, g=g), 6, 64, sink=True)
        check_backward(case, None, tokens_backward.Config(stages=stages), tolerance=GRADIENTS[torch.bfloat16])


def test_gradients_are_equal_in_every_run():
    case = listed(make(2000, h=8, g=2), 8, 64, sink=True)
    first = check_backward(case, tolerance=GRADIENTS[torch.bfloat16])
    for _ in range(3):
        again = check_backward(case, tolerance=GRADIENTS[torch.bfloat16])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_attend_takes_this_backward(monkeypatch):
    calls = []
    real = tokens_backward.backward
    monkeypatch.setattr(tokens_backward, "backward", lambda *a, **k: calls.append(1) or real(*a, **k))
    case = listed(make(700, h=8, g=2), 6, 64)
    q, k, v = (t.detach().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
    foveate.attend(q, (k, v), case.layout).float().square().sum().backward()
    assert calls and all(bool(torch.isfinite(t.grad).all()) for t in (q, k, v))
