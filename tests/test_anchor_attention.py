"""AnchorAttention against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kernels.dispatch import attend
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.anchor_attention import AnchorAttention
from foveate.methods.base import State
from foveate.registry import parse
from foveate.scores import stripes
from tests.drive import oracle
from tests.fidelity import CASES, planned
from tests.prompts import SHAPES, call, prompt

SMALL = dict(block=16, step=3)


def near(t, method):
    """Positions that the row at position t sees whatever its content."""
    b, g0 = method.block, t // (method.block * method.step) * method.block * method.step
    return {j for j in range(t + 1) if j < method.init * b or j >= g0 - method.local * b}


def transcribe(q, k, method, start, scale):
    """Per group of the call, the stripes of one head; q `[N, D]` from position `start`, k `[M, D]`."""
    b, rows, m = method.block, method.block * method.step, k.shape[0]
    logits = scale * q.double() @ k.double().T
    out = []
    for group in range(start // rows, -(-m // rows)):
        g0, found = group * rows, set()
        for block in range(group * method.step, (group + 1) * method.step):
            mine = [t for t in range(block * b, (block + 1) * b) if start <= t < m]
            if not mine:
                continue
            anchor = sum(float(logits[t - start, sorted(near(t, method))].max()) for t in mine) / len(mine)
            mean = sum(q[t - start].double() for t in mine) / len(mine)
            far = scale * k.double() @ mean
            found |= {j for j in range(method.init * b, g0 - method.local * b) if float(far[j]) + method.theta >= anchor}
        out.append(found)
    return out


def listed(layout, head):
    """Stripes per group, out of a layout."""
    h = head * layout.entries.shape[1] // layout.shape[1]
    rows = zip(layout.entries[0, h].tolist(), layout.entry_count[0, h].tolist(), strict=True)
    out = [row[:count] for row, count in rows]
    assert all(row == sorted(set(row)) for row in out)
    return [set(row) for row in out]


def check(layout, x, method, heads):
    """Stripes are the card's, and every row sees them and its near keys, once each."""
    layout.validate()
    rows = method.block * method.step
    assert (layout.block_q, layout.tile_width, layout.q_offset) == (rows, method.block, x.start % rows)
    total, mask = 0, layout.to_mask()[0]
    for h in heads:
        want = transcribe(x.q[0, h], x.kv.k[0, h * x.groups // x.q.shape[1]], method, x.start, x.scale)
        assert listed(layout, h) == want
        total += sum(map(len, want))
        for i in (0, x.q.shape[2] // 2, x.q.shape[2] - 1):
            t = x.start + i
            seen = near(t, method) | want[t // rows - x.start // rows]
            assert set(mask[h, i].nonzero().flatten().tolist()) == seen
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case):
    q, k, v, _ = case.make()
    method = AnchorAttention(block=32, step=2, theta=0.5)
    layout = planned("prefill=anchor_attention:block=32,step=2,theta=0.5", case)
    check(layout, call(q, k, v), method, range(q.shape[1]))


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1)])
@pytest.mark.parametrize("m,start", [(150, 96), (133, 40), (120, 117)])
def test_groups_chunks_and_partial_blocks(h, g, m, start):
    q, k, v = prompt("peaked", h=h, g=g, m=m)
    method = AnchorAttention(**SMALL, theta=0.0)
    x = call(q, k, v, start)
    assert check(method.plan(x, State()), x, method, range(h)) > 0


SIZES = [dict(local=0), dict(local=2), dict(init=2), dict(init=4, step=2), dict(local=5, step=2), dict(step=1, local=3)]


@pytest.mark.parametrize("option", SIZES, ids=str)
def test_regions_of_any_size(option):
    q, k, v = prompt("blocks", m=200)
    method = AnchorAttention(**{**SMALL, "theta": 1.0, **option})
    x = call(q, k, v, 21)
    check(method.plan(x, State()), x, method, (0, 3))


@pytest.mark.parametrize("option", [dict(), *SIZES], ids=str)
@pytest.mark.parametrize("start", [0, 37])
def test_anchors_are_mean_row_maxima_over_near_keys(option, start):
    """Rows look at themselves most, at keys to come more still, and, in the first group, less than nothing at the others."""
    q, k, _ = prompt("random", m=110)
    k[:, :, :, 0] = 3 + torch.arange(110) / 20
    q = k.repeat_interleave(2, 1) * torch.where(torch.arange(110) < 20, 1.0, 0.6)[:, None]
    q[:, :, 10:14] *= -1
    method = AnchorAttention(**{**SMALL, **option})
    grid = dict(start=start, block=16, step=method.step, init=method.init, local=method.local, scale=0.2)
    got = stripes.anchors(q[:, :, start:], KV.dense(k, k), **grid)
    logits = (0.2 * q @ k.repeat_interleave(2, 1).transpose(-1, -2))[0]
    for block in range(start // 16, 7):
        rows = range(max(start, block * 16), min(110, block * 16 + 16))
        want = sum(logits[:, t, sorted(near(t, method))].amax(-1) for t in rows) / len(rows)
        torch.testing.assert_close(got[0, :, block - start // 16], want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["head", "group"])
def test_infinite_theta_is_dense_and_minus_infinity_is_sink_and_local(shape, share):
    """The published kernels lose the block before a group, and count selected keys of the first group twice."""
    q, k, v = prompt(shape, m=170)
    x = call(q, k, v)
    got = AnchorAttention(**SMALL, theta=math.inf, share=share).plan(x, State())
    assert torch.equal(got.to_mask(), Layout.dense(1, 4, 170, 170).to_mask())
    got.validate()
    method = AnchorAttention(**SMALL, theta=-math.inf, share=share)
    mask = method.plan(x, State()).to_mask()[0]
    for t in range(170):
        assert all(set(mask[h, t].nonzero().flatten().tolist()) == near(t, method) for h in (0, 3))


def test_no_key_is_named_twice():
    """The sum of what lists name equals the size of their union, and stripes end before the local keys of their group."""
    q, k, v = prompt("random", m=300)
    got = AnchorAttention(block=16, step=4, theta=1.5).plan(call(q, k, v), State())
    for group in range(got.num_blocks):
        tiles = got.tiles[0, 0, group, : int(got.tile_count[0, 0, group])].tolist()
        whole = [j for a in tiles for j in range(a, a + 16)]
        for h in range(4):
            single = got.entries[0, h, group, : int(got.entry_count[0, h, group])].tolist()
            assert len(set(whole + single)) == len(whole) + len(single)
            assert all(16 <= j < group * 64 - 16 for j in single)


def test_one_softmax_over_all_keys():
    """Near keys and stripes computed apart and merged by their log-sum-exp give what the layout gives at once."""
    q, k, v = prompt("peaked", m=200)
    x = call(q, k, v)
    got = AnchorAttention(**SMALL, theta=0.0).plan(x, State())
    none = AnchorAttention(**SMALL, theta=-math.inf).plan(x, State())
    s = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(32))[0]
    values = v.repeat_interleave(2, 1)[0]

    def state(mask):
        seen = s.masked_fill(~mask, -math.inf)
        top = seen.logsumexp(-1, keepdim=True).clamp(min=-1e9)
        return torch.exp(seen - top) @ values, top

    (a, la), (b, lb) = state(none.to_mask()[0]), state(got.to_mask()[0] & ~none.to_mask()[0])
    both = torch.logaddexp(la, lb)
    want = (torch.exp(la - both) * a + torch.exp(lb - both) * b)[None]
    torch.testing.assert_close(oracle(q, (k, v), got), want.float())
    torch.testing.assert_close(attend(q.float(), KV.dense(k.float(), v.float()), got), want.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [6, 7, 8])
def test_a_key_that_a_whole_query_block_wants_is_in_the_list_of_its_group(block):
    """Also where only one block of the group wants it; without the key's own logit it is not."""
    q, k, v = (0.1 * t for t in prompt("random", m=160))
    x = call(q, k, v)
    method = AnchorAttention(**SMALL, theta=-0.5)
    assert all(40 not in row for h in range(4) for row in listed(method.plan(x, State()), h))
    q[:, :, block * 16 : (block + 1) * 16, 0], k[:, :, 40, 0] = 5.0, 5.0
    for h in range(4):
        rows = listed(method.plan(x, State()), h)
        assert [40 in row for row in rows] == [False, False, True, False]


def test_raising_theta_never_drops_a_key():
    q, k, v = prompt("diagonal", m=200)
    last = None
    for theta in (-2.0, 0.0, 1.0, 3.0, 12.0):
        mask = AnchorAttention(**SMALL, theta=theta).plan(call(q, k, v), State()).to_mask()
        assert last is None or not (last & ~mask).any()
        last = mask


def test_chunks_that_end_with_groups_choose_what_the_whole_prompt_does():
    q, k, v = prompt("peaked", m=250)
    method = AnchorAttention(**SMALL, theta=0.0)
    whole = method.plan(call(q, k, v), State())
    for a, b in ((96, 192), (192, 250)):
        part = method.plan(call(q[:, :, :b], k[:, :, :b], v[:, :, :b], a), State())
        for h in range(4):
            assert listed(part, h) == listed(whole, h)[a // 48 : -(-b // 48)]


def test_share_group_is_the_union():
    q, k, v = prompt("peaked", h=6, g=2, m=200)
    each = AnchorAttention(**SMALL, theta=0.0).plan(call(q, k, v), State())
    got = AnchorAttention(**SMALL, theta=0.0, share="group").plan(call(q, k, v), State())
    got.validate()
    assert got.entries.shape[1] == 2
    for g in range(2):
        lists = [listed(each, h) for h in range(3 * g, 3 * g + 3)]
        assert listed(got, 3 * g) == [set.union(*rows) for rows in zip(*lists, strict=True)]


def test_work_in_pieces_is_the_same(monkeypatch):
    q, k, v = prompt("peaked", m=200)
    method = AnchorAttention(block=16, step=2, local=3, init=3, theta=0.0)
    whole = method.plan(call(q, k, v, 21), State())
    monkeypatch.setattr(stripes, "BUDGET", 1)
    cut = method.plan(call(q, k, v, 21), State())
    cut.validate()
    assert torch.equal(cut.to_mask(), whole.to_mask())


def test_softcap_reaches_both_scores():
    q, k, v = prompt("peaked", m=200)
    x = call(q, k, v)
    x.softcap = 2.0
    got = listed(AnchorAttention(**SMALL, theta=0.3).plan(x, State()), 1)
    s = 2 * torch.tanh(q[0, 1] @ k[0, 0].T * x.scale / 2)
    method = AnchorAttention(**SMALL)
    for group, stripe in enumerate(got):
        want = set()
        for t0 in range(group * 48, min(200, group * 48 + 48), 16):
            rows = range(t0, min(200, t0 + 16))
            anchor = sum(float(s[t, sorted(near(t, method))].max()) for t in rows) / len(rows)
            far = 2 * torch.tanh(k[0, 0] @ q[0, 1, t0 : t0 + len(rows)].mean(0) * x.scale / 2)
            want |= {j for j in range(16, group * 48 - 16) if far[j] + 0.3 >= anchor}
        assert stripe == want


def test_rows_of_a_batch_pages_and_low_precision():
    both = [torch.cat(t) for t in zip(prompt("peaked", m=200, seed=1), prompt("random", m=200, seed=2))]
    method = AnchorAttention(**SMALL, theta=0.0)
    got = method.plan(call(*both), State()).to_mask()
    for b in range(2):
        assert torch.equal(got[b : b + 1], method.plan(call(*(t[b : b + 1] for t in both)), State()).to_mask())
    q, k, v = prompt("random", m=150)
    flat = [torch.full((2 * 160, 32), float("nan"), dtype=torch.float64) for _ in range(2)]
    for g in range(2):
        flat[0][g * 160 : g * 160 + 150], flat[1][g * 160 : g * 160 + 150] = k[0, g], v[0, g]
    pools = [t.view(40, 8, 32) for t in flat]
    kv = KV.paged(*pools, torch.arange(40).view(1, 2, 20).int(), torch.tensor([[150, 150]], dtype=torch.int32))
    paged = method.plan(call(q, k, v, kv=kv), State()).to_mask(kv)
    assert torch.equal(paged[..., :150], method.plan(call(q, k, v), State()).to_mask()) and not paged[..., 150:].any()
    for dtype in (torch.float16, torch.bfloat16):
        for size in (0.0, 1.0, 30.0):
            part = method.plan(call(*(t.to(dtype) * size for t in (q, k, v))), State())
            part.validate()
            assert part.to_mask()[0].diagonal(dim1=-2, dim2=-1).all()


def test_options():
    small, whole = parse("anchor_attention@8k"), AnchorAttention()
    assert (whole.theta, whole.block, whole.step, whole.init, whole.local) == (12.0, 128, 16, 1, 1)
    assert whole.min_length == 2049 and small.min_length == 513 and (small.step, small.theta) == (4, 6.0)
    assert AnchorAttention(block=16, step=2, local=3, init=2).min_length == 97  # the group from 96 on leaves block 2 out
    assert parse("anchor_attention:theta=-inf").theta == -math.inf and AnchorAttention.knob.name == "theta"
    q, k, v = prompt("random", m=144)
    assert AnchorAttention(**SMALL).min_length == 49 and AnchorAttention().plan(call(q, k, v), State()) is None
    for text in ("theta=nan", "theta=x", "block=4", "step=0", "init=0", "local=-1", "share=row"):
        with pytest.raises(ConfigError, match=text.split("=")[0]):
            parse(f"anchor_attention:{text}")
