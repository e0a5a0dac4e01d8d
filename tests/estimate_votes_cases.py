"""Problems for the kernels of one query a row against all keys, on any device; plain code in fp64 judges."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch

from foveate.kernels.dispatch import attend
from foveate.kernels.triton import estimate_votes_launch as kernels
from foveate.kernels.triton import kept_lists
from foveate.kernels.triton import ranked_steps_launch as ranked
from foveate.kv import KV
from foveate.methods.base import AttnInput, LayerState, State
from foveate.registry import parse
from foveate.scores import exact, observed
from foveate.scores.turns import Turns
from tests.drive import Rotary
from tests.estimate_cases import draw, plain


def problem(b, h, g, m, d, *, lengths=None, dtype=torch.float32, device="cpu", seed=0):
    """(q, kv, q_pos): one row that looks at a few keys, at the end of each batch row; NaN past the end."""
    q, k, v = draw(b, h, 1, d, dtype=dtype, seed=seed), draw(b, g, m, d, seed=seed + 1), draw(b, g, m, d, seed=seed + 2)
    for i in range(3):
        k[:, :, m // (i + 3)] += 0.5 * q.float().view(b, g, -1, d).mean(2)
    ends = torch.tensor([m] * b if lengths is None else lengths)
    for row in range(b):
        k[row, :, int(ends[row]) :] = v[row, :, int(ends[row]) :] = float("nan")
    k, v = k.to(dtype), v.to(dtype)
    kv = KV.dense(k, v, len=None if lengths is None else ends[:, None].expand(b, g).int().contiguous())
    q = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # strides of a model
    return q.to(device), at(kv, device), (ends[:, None] - 1).to(device)


def at(kv, device):
    return replace(kv, k=kv.k.to(device), v=kv.v.to(device), len=None if kv.len is None else kv.len.to(device))


def doubled(q, kv):
    return q.double(), replace(kv, k=kv.k.double().nan_to_num(0.0), v=kv.v.double().nan_to_num(0.0))


def check(b, h, g, m, d, *, tolerance, lists, most=False, lengths=None, first=0, tail=0, shift=0, softcap=None,
          exact=False, dtype=torch.float32, device="cpu"):  # fmt: skip
    """Logits and votes against fp64. shift: how far the rows stand before the end; exact: q is fp32 beside other keys."""
    q, kv, q_pos = problem(b, h, g, m, d, lengths=lengths, dtype=dtype, device=device)
    q_pos = q_pos - shift
    if exact:
        q = q.float() + 0.01 * draw(b, h, 1, d, seed=9, device=device)
    assert kernels.reads(q, kv)
    how = dict(scale=d**-0.5, softcap=softcap)
    truth = observed.row_logits(*doubled(q, kv), q_pos, **how)
    seen = truth > float("-inf")
    got = kernels.logits(q, kv.k, kv.len, q_pos, **how).double() * math.log(2)
    torch.testing.assert_close(got[seen], truth[seen], atol=tolerance, rtol=tolerance)
    number = torch.arange(m, device=device)
    inside = seen & (number >= first) & (number <= q_pos[:, :, None] - tail)
    prob = truth.masked_fill(~inside, float("-inf")).softmax(-1).nan_to_num(0.0).unflatten(1, (lists, -1))
    want = prob.amax(2) if most else prob.sum(2)
    got = kernels.votes(q, kv.k, kv.len, q_pos, lists=lists, most=most, first=first, tail=tail, **how)
    assert got.dtype == torch.float32 and bool(torch.isfinite(got).all())
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
    if shift < m and first + tail < m // 2:
        assert float(want.amax()) > 2 * float(want.mean())  # not flat


class Turning:
    """What a step of `text` plans and gives, over rows of these lengths, with kernels and without."""

    def __init__(self, text, b=1, h=4, g=2, m=200, d=16, *, lengths=None, dtype=torch.float32, device="cpu"):
        self.method, self.d = parse(text), d
        self.rope = Rotary(d)
        self.rope.freq = self.rope.freq.to(device)
        self.shape, self.lengths, self.dtype, self.device = (b, h, g, m, d), lengths, dtype, device
        self.state = State(rows=[LayerState() for _ in range(b)])

    def step(self, number, grown=0):
        """(plan, out, lse) of decode step `number`, over rows that are `grown` entries longer."""
        return self.run(self.inputs(number, grown))

    def inputs(self, number, grown=0):
        ends = None if self.lengths is None else [n + grown for n in self.lengths]
        q, kv, q_pos = problem(*self.shape, lengths=ends, dtype=self.dtype, device=self.device)
        return AttnInput(q, kv, "decode", 3, 8, self.d**-0.5, step=number, q_pos=q_pos, rope=self.rope)

    def run(self, x):
        self.state.step = {}
        plan = self.method.plan(x, self.state)
        if not hasattr(self.method, "attend"):
            return plan, *attend(x.q, x.kv, plan, scale=x.scale, return_lse=True)
        return plan, *self.method.attend(x, plan, self.state)[:2]


def same_steps(text, *shape, tolerance, grows=(0, 1, 2), slack=0.0, **options):
    """Steps of a method with its kernels against those of plain code: equal lists, outputs within the tolerance."""
    fast, slow = Turning(text, *shape, **options), Turning(text, *shape, **options)
    for number, grown in enumerate(grows):
        with counted() as calls:
            got = fast.step(number, grown)
        assert calls
        with plain():
            want = slow.step(number, grown)
        same_lists(got[0], want[0], slack)
        torch.testing.assert_close(got[1].float(), want[1].float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got[2], want[2], atol=tolerance, rtol=tolerance)
    return fast, slow


def same_sets(text, *shape, lengths, steps, tolerance, turns=(), slack=0.0, **options):
    """Steps of a method that keeps a set, over rows that grow by a token each, with kernels and without: what is named, and
    outputs. At the steps `turns` the queries turn around. Returns the densities of the steps."""
    fast, slow = (Turning(text, *shape, lengths=lengths, **options) for _ in range(2))
    seen, sign = [], 1.0
    for number in range(steps):
        x = fast.inputs(number, number)
        sign = -sign if number in turns else sign
        x = replace(x, q=x.q * sign)
        got = fast.run(x)
        with plain():
            want = slow.run(x)
        if got[0] is None:
            assert want[0] is None
            seen.append(1.0)
            continue
        mine, theirs = (one[0].to_mask(x.kv) for one in (got, want))
        assert float((mine ^ theirs).sum()) <= slack * float((mine | theirs).sum()), number
        torch.testing.assert_close(got[1].float(), want[1].float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got[2], want[2], atol=tolerance, rtol=tolerance)
        seen.append(float(mine.sum()) / mine.numel())
        entries = got[0].entries
        if entries is not None and not got[0].full:
            used = torch.arange(entries.shape[-1], device=entries.device) < got[0].entry_count[..., None]
            assert bool((entries.diff(dim=-1) > 0)[used[..., 1:]].all()) and int(entries.min()) >= 0
            assert int(entries.max()) < x.kv.capacity
    return seen


def same_held(text, *shape, lengths, steps, turns, tolerance, slack=0.0, **options):
    """Steps of token_select with a selection cache, over rows that grow by a token each, with kernels and without: lists,
    outputs, and which rows chose anew, `[steps][rows]`. At the steps `turns[row]` a row's queries become others."""
    fast, slow = (Turning(text, *shape, lengths=lengths, **options) for _ in range(2))
    seen, others, plain_q = [], torch.zeros(len(lengths), dtype=torch.long), None
    for number in range(steps):
        x = fast.inputs(number, number)
        if plain_q is None:  # some queries of each row before their rotation
            first = fast.rope.unrotate(x.q.float(), x.q_pos)
            plain_q = torch.stack([first, *(torch.randn_like(first) for _ in range(steps))])
        for row, at in enumerate(turns):
            others[row] += number in at
        q = torch.stack([plain_q[which, row] for row, which in enumerate(others.tolist())])
        x = replace(x, q=fast.rope.rotate(q, x.q_pos).to(x.q.dtype))
        with counted() as calls:
            got = fast.run(x)
        assert calls
        with plain():
            want = slow.run(x)
        same_lists(got[0], want[0], slack)
        torch.testing.assert_close(got[1].float(), want[1].float(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got[2], want[2], atol=tolerance, rtol=tolerance)
        made = [one.state.layer["token_select.tokens"].pos == x.q_pos[:, 0] for one in (fast, slow)]
        assert torch.equal(*made)
        seen.append(made[0].tolist())
    return seen


def same_scores(*shape, lengths, tolerance=2e-5, keep=20, slack=1e-9, **options):
    """Scores that methods ask for, and the entries they choose, with kernels and without."""
    q, kv, q_pos = problem(*shape, lengths=lengths, **options)
    how = dict(scale=shape[4] ** -0.5, softcap=None)
    pos = torch.arange(shape[3], device=q.device).flip(0).expand(*kv.shape[:3])  # a cache in no order
    wide = dict(pos=pos + 1000)
    calls = [
        lambda: observed.group_probabilities(q, kv, q_pos, **how),
        *(lambda r=r: observed.step_mass(q, kv, q_pos, r, **how) for r in ("mean", "max", "sum")),
        lambda: observed.step_mass(q, replace(kv, **wide), q_pos + 1000 + shape[3], "sum", **how),  # behind all entries
    ]
    for call in calls:
        with counted() as seen:
            got = call()
        assert seen
        with plain():
            want = call()
        torch.testing.assert_close(got, want.float(), atol=tolerance, rtol=tolerance)
    for group in (False, True):
        with counted() as seen:
            got, count = exact.top_keys(q, kv, q_pos, keep, group=group, **how)
        assert seen and got.shape[1] == (shape[2] if group else shape[1])
        with plain():
            want, number = exact.top_keys(q, kv, q_pos, keep, group=group, **how)
        used = torch.arange(keep, device=q.device) < number[..., None]
        assert torch.equal(count, number) and float((got == want)[used].float().mean()) > 1 - slack


@contextlib.contextmanager
def counted():
    """The launches of `row_scores` in this block: whether the kernels ran at all."""
    calls, before = [], kernels._scores
    kernels._scores = lambda *a: calls.append(1) or before(*a)
    try:
        yield calls
    finally:
        kernels._scores = before


def same_lists(got, want, slack=0.0):
    """Two layouts have lists of the same lengths that name the same keys, but for a share of them."""
    name, number = ("entries", "entry_count") if want.entries is not None else ("tiles", "tile_count")
    a, n, b, m = getattr(got, name), getattr(got, number), getattr(want, name), getattr(want, number)
    assert torch.equal(n, m)
    used = torch.arange(b.shape[-1], device=b.device) < m[..., None]
    if slack == 0:
        assert torch.equal(a[..., : b.shape[-1]][used], b[used])
    else:  # one other key moves all places behind it
        mine, theirs = got.to_mask(), want.to_mask()
        assert float((mine ^ theirs).sum()) <= slack * float(theirs.sum())


class Neighbours(Rotary):
    """Channels 0 and 1, 2 and 3, ... turn together."""

    def _turn(self, x, pos, sign):
        return super()._turn(x.unflatten(-1, (-1, 2)).mT.flatten(-2), pos, sign).unflatten(-1, (2, -1)).mT.flatten(-2)


def check_ranked(b, h, g, m, d, n, counts, *, tolerance, softcap=None, dtype=torch.float32, device="cpu", mixed=False):
    """`attend_ranked` against fp64: every listed key turned to its place in the list. mixed: neighbouring channels turn
    together, else halves."""
    sizes = enumerate(((h, 1), (g, m + 7), (g, m)))
    q, raw, v = (2 * draw(b, heads, rows, d, seed=i, dtype=dtype).to(device) for i, (heads, rows) in sizes)
    rope = Neighbours(d) if mixed else Rotary(d)
    rope.freq = rope.freq.to(device)
    gen = torch.Generator().manual_seed(4)
    tokens = torch.stack([torch.randperm(m, generator=gen)[:n].sort().values for _ in range(b)]).int().to(device)
    count = torch.tensor(counts, dtype=torch.int32, device=device)
    for row, many in enumerate(counts):  # what is not listed is never read
        out = torch.ones(m, dtype=torch.bool, device=device)
        out[tokens[row, :many].long()] = False
        raw[row, :, :m][:, out] = v[row][:, out] = float("nan")
        tokens[row, many:] = tokens[row, many - 1]
    zero = torch.zeros(b, 1, dtype=torch.int64, device=device)
    x = AttnInput(q, KV.dense(v, v), "decode", 0, 1, 0.05, q_pos=zero, rope=rope)
    turns = Turns.of(x, {}, "ranked")
    assert turns.halves == (not mixed)
    how = dict(scale=0.05, softcap=softcap, halves=turns.halves)
    got, lse = ranked.attend(q, raw, v, tokens, count, turns.asked(n), turns.partner, **how)
    for row, many in enumerate(counts):
        at = tokens[row, :many].long()
        keys = rope.rotate(raw[row : row + 1, :, at].double(), torch.arange(many, device=device)[None])
        keys, values = (t.repeat_interleave(h // g, 1) for t in (keys, v[row : row + 1, :, at].double()))
        s = q[row : row + 1].double() @ keys.transpose(-1, -2) * 0.05
        s = softcap * torch.tanh(s / softcap) if softcap else s
        torch.testing.assert_close(got[row : row + 1].double(), s.softmax(-1) @ values, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[row : row + 1].double(), s.logsumexp(-1), atol=tolerance, rtol=tolerance)
    again, _ = ranked.attend(q, raw, v, tokens, count, turns.asked(n), turns.partner, **how)
    assert torch.equal(got, again)


def check_kept(n, size, since, device="cpu"):
    """`kept_lists.extend` of long lists with ranks, and of lists with counts, against loops over rows."""
    b, g, gen = len(since), 3, torch.Generator().manual_seed(n)
    draws = [torch.randperm(8 * n, generator=gen)[:n].sort().values for _ in range(b * g)]
    entries = torch.stack(draws).view(b, g, n).int()
    rank = torch.stack([torch.randperm(n, generator=gen) for _ in range(b * g)]).view(b, g, n).int()
    limit = torch.tensor([size, n, 1]).expand(b, g).contiguous()
    begin = torch.full((b,), 8 * n)
    newest = begin + torch.tensor(since) - 1
    args = [t.to(device) for t in (entries, begin, newest[:, None])]
    got, count = kept_lists.extend(*args, 1, rank=rank.to(device), limit=limit.to(device))
    used = (limit // 2).int()
    plain_got, plain_count = kept_lists.extend(*args, max(since), used=used.to(device))
    assert int(got.max()) <= int(newest.max()) and int(got.min()) >= 0
    for i in range(b):
        for j in range(g):
            s, most = since[i], int(limit[i, j])
            stay = entries[i, j][rank[i, j] < most - s + 1].tolist()
            want = stay + list(range(int(newest[i]) - min(s, most + 1) + 1, int(newest[i]) + 1))
            assert got[i, j, : int(count[i, j])].tolist() == want and len(want) <= most + 1
            want = entries[i, j, : int(used[i, j])].tolist() + list(range(8 * n, int(newest[i]) + 1))
            assert plain_got[i, j, : int(plain_count[i, j])].tolist() == want


def check_strongest(n, m, *, ratio, least, ago=0, ties=False, device="cpu"):
    """`kept_lists.strongest` against sorting, rows with fewer entries than the list has room for among them."""
    b, g, gen = 3, 2, torch.Generator().manual_seed(n)
    score = torch.rand(b, g, m + 8, generator=gen)[..., :m]  # a view, as of scores with room behind them
    score = (score * 8).round() / 8 if ties else score
    entries = torch.stack([torch.randperm(m, generator=gen)[:n].sort().values for _ in range(b * g)]).view(b, g, n).int()
    used = torch.tensor([[n, n], [n, n // 2], [1, 0]], dtype=torch.int32)
    length = torch.tensor([[m, m], [m // 2, m // 2 + 1], [m, m]], dtype=torch.int32)
    newest = torch.tensor([[m - 1], [m // 2], [m - 1]])
    begin = newest[:, 0] - torch.tensor([0, 3, 5])
    how = dict(ago=ago, ratio=ratio, least=least, capacity=m)
    for lengths in (length, None):
        args = (entries, used, score, begin, lengths, newest)
        got, count = kept_lists.strongest(*(None if t is None else t.to(device) for t in args), **how)
        for i in range(b):
            for j in range(g):
                tokens = m if lengths is None else int(length[i, j])
                budget = max(least, math.ceil(ratio * (tokens - ago) - 1e-9))
                keep = max(0, budget - (int(newest[i]) + 1 - ago - int(begin[i])))
                mine = entries[i, j, : int(used[i, j])].tolist()
                want = sorted(sorted(mine, key=lambda e, row=score[i, j]: (-float(row[e]), e))[:keep])
                found = got[i, j].tolist()
                assert found[: int(count[i, j])] == want and int(count[i, j]) == len(want)
                assert found[len(want) :] == [want[-1] if want else 0] * (n - len(want))
