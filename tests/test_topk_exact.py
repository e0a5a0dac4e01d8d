"""Exact top-k against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import attend
from foveate.cache import DenseStore, PagedStore
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, State
from foveate.methods.topk_exact import TopKExact
from foveate.registry import parse
from foveate.scores import exact
from tests.drive import oracle, qkv
from tests.fidelity import CASES, planned
from tests.prompts import call, listed

NAN = float("nan")


def slow_list(logits, heads, rows, t_of, k):
    """The card for one list: the k best of the keys up to the newest of these rows, own tokens first.

    logits[head][row] is a list over keys; t_of[row] is the row's position.
    """
    newest = max(t_of[i] for i in rows)
    own = {t_of[i] for i in rows}
    if len(rows) * len(heads) == 1:
        score = logits[heads[0]][rows[0]]
    else:
        score = [0.0] * (newest + 1)
        for h in heads:
            for i in rows:
                seen = logits[h][i][: t_of[i] + 1]
                top = max(seen)
                total = sum(math.exp(z - top) for z in seen)
                for j, z in enumerate(seen):
                    score[j] += math.exp(z - top) / total
    score = torch.tensor(score[: newest + 1], dtype=torch.float64).float().tolist()  # the library ranks in fp32
    ranked = sorted(range(newest + 1), key=lambda j: (j not in own, -score[j], j))
    return sorted(ranked[:k])


def slow_lists(q, k, start, budget, block, group):
    """{(list head, query block): entries} of queries from `start` on."""
    h, g, n = q.shape[1], k.shape[1], q.shape[2]
    r = h // g
    s = (q[0] @ k[0].repeat_interleave(r, 0).transpose(-1, -2) / math.sqrt(q.shape[-1])).tolist()
    t_of = [start + i for i in range(n)]
    blocks: dict[int, list[int]] = {}
    for i, t in enumerate(t_of):
        blocks.setdefault(t // block - start // block, []).append(i)
    lists = [list(range(i * r, i * r + r)) for i in range(g)] if group else [[i] for i in range(h)]
    return {(a, b): slow_list(s, heads, rows, t_of, budget) for a, heads in enumerate(lists) for b, rows in blocks.items()}


@pytest.mark.parametrize(
    "options", ["budget=20", "budget=24,block=16", "budget=20,share=group", "budget=40,block=7,share=group"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, options):
    """List by list, whole and in chunks that end inside blocks. Scores in fp64, so that only the ranking rounds."""
    q, k, v, _ = case.make()
    q, k, v = (t[:, :, :100].double() for t in (q, k, v))
    method = parse(f"topk_exact:{options}")
    for start, stop in ((0, 100), (37, 81)):
        x = call(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], start)
        layout = method.plan(x, State())
        layout.validate()
        want = slow_lists(q[:, :, start:stop], k[:, :, :stop], start, method.budget, method.block, method.share == "group")
        assert set(want) == {(a, b) for a in range(layout.entries.shape[1]) for b in range(layout.num_blocks)}
        for (a, b), entries in want.items():
            assert listed(layout.entries[0, a, b], layout.entry_count[0, a, b]) == entries


def test_the_runtime_plans_it():
    """The common driver hands over rotated queries of a whole prompt and of chunks; both give lists of the budget."""
    whole = planned("topk_exact:budget=20", CASES[0])
    parts = planned("topk_exact:budget=20", CASES[0], chunks=(110, 217))
    assert isinstance(whole, Layout) and int(whole.entry_count.max()) == 20
    masks = [p.to_mask() if isinstance(p, Layout) else None for p in parts]
    full = whole.to_mask()
    for mask, (lo, hi) in zip(masks, ((0, 110), (110, 217), (217, 300)), strict=True):
        assert torch.equal(mask, full[:, :, lo:hi, :hi])


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("share", ["head", "group"])
def test_decode_rows_of_any_length(h, g, share):
    """Rows of different length over dense and paged storage whose unused slots are NaN; each row is its own card."""
    lens = (37, 5, 60)
    q, k, v = qkv(3, h, g, 60, dtype=torch.float64, seed=h)
    fill = torch.arange(60) < torch.tensor(lens)[:, None]
    for kind in (DenseStore.empty, lambda k, v: PagedStore.empty(k, v, 8)):
        store = kind(k, v).append(k, v, fill, [0] * 3)
        if isinstance(store, DenseStore):
            for i, n in enumerate(lens):
                store.k[i, :, n:] = NAN
        kv = store.view()
        pos = kv.lengths().amax(1)[:, None] - 1
        layout = TopKExact(budget=8, share=share).plan(AttnInput(q[:, :, :1], kv, "decode", 0, 1, 0.25, q_pos=pos), State())
        layout.validate()
        for i, n in enumerate(lens):
            want = slow_lists(q[i : i + 1, :, :1], k[i : i + 1, :, :n], n - 1, 8, 1, share == "group")
            for a in range(layout.entries.shape[1]):
                assert listed(layout.entries[i, a, 0], layout.entry_count[i, a, 0]) == want[a, 0]


def test_evicted_entries_and_weights():
    """Positions decide what is visible, hidden entries are never listed, and an entry's weight counts in its logit."""
    q, k, v = qkv(1, 2, 1, 12, dtype=torch.float64)
    pos = torch.tensor([[[0, 3, 4, 9, 11, 12, 17, 20, 21, 22, 23, 24]]])
    bias = torch.zeros(1, 1, 12, dtype=torch.float64)
    bias[..., 2], bias[..., 3] = 50.0, float("-inf")
    kv = KV.dense(k, v, pos=pos, bias=bias)
    at = torch.tensor([[12, 24]])
    x = AttnInput(q[:, :, :2], kv, "prefill", 0, 1, 0.25, start=12, q_pos=at)
    layout = TopKExact(budget=3).plan(x, State())
    mask = layout.to_mask(kv)[0]
    assert mask[:, :, 2].all() and not mask[:, :, 3].any() and not mask[:, 0, 6:].any()
    assert mask[:, 0, 5].all() and mask[:, 1, 11].all() and (mask.sum(-1) == 3).all()


def test_ties_and_few_visible_keys():
    """Equal logits go to the lower entry and never lengthen a list; a row with fewer keys than the budget keeps all."""
    q, k, v = torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4)
    layout = TopKExact(budget=3).plan(call(q, k, v), State())
    got = [listed(layout.entries[0, 0, i], layout.entry_count[0, 0, i]) for i in range(9)]
    assert got == [[0], [0, 1], [0, 1, 2], *([0, 1, i] for i in range(3, 9))]


def test_mass_and_error_bound():
    """No set of k keys has more mass; mass grows with k; the output is off by at most 2 (1 - mass) max |v|."""
    q, k, v = qkv(1, 4, 2, 80, dtype=torch.float64, seed=3)
    x = call(2 * q, k, v)
    dense, full = attend(x.q, x.kv, None, return_lse=True)
    before = torch.zeros(1, 4, 80, dtype=torch.float64)
    gen = torch.Generator().manual_seed(1)
    for budget in (2, 4, 8, 16, 40):
        layout = TopKExact(budget=budget).plan(x, State())
        out, lse = attend(x.q, x.kv, layout, return_lse=True)
        mass = (lse - full).exp()
        off = (dense - out).norm(dim=-1)
        assert (off <= 2 * (1 - mass) * v.norm(dim=-1).max() + 1e-9).all()
        assert (mass >= before - 1e-12).all()
        before = mass
        some = torch.stack([torch.randperm(79, generator=gen)[: budget - 1].sort().values for _ in range(20)])
        for pick in some:  # random sets of the last row that hold its own token
            mask = torch.zeros(80, dtype=torch.bool).index_fill(0, torch.cat([pick, torch.tensor([79])]), True)
            s = (x.q[0, :, -1] @ k[0].repeat_interleave(2, 0).transpose(-1, -2)).diagonal().T / 4
            assert (s[:, mask].logsumexp(-1) <= lse[0, :, -1] + 1e-9).all()


def test_keys_may_be_permuted():
    """Decode: the order of keys does not matter, beyond the own token, which is the newest one."""
    q, k, v = qkv(1, 4, 2, 50, dtype=torch.float64)
    order = torch.cat([torch.randperm(49, generator=torch.Generator().manual_seed(0)), torch.tensor([49])])
    plans = []
    for keys in (k, k[:, :, order]):
        x = AttnInput(q[:, :, -1:], KV.dense(keys, v), "decode", 0, 1, 0.25, q_pos=torch.tensor([[49]]))
        plans.append(TopKExact(budget=9).plan(x, State()).to_mask())
    assert torch.equal(plans[0][..., order], plans[1])


@pytest.mark.parametrize("block", [1, 8])
def test_gradient_is_that_of_masked_attention(block):
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 2, 40, dtype=torch.float64))
    layout = TopKExact(budget=10, block=block).plan(call(q.detach(), k.detach(), v.detach()), State())
    weight = torch.randn(1, 4, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((attend(q, (k, v), layout) * weight).sum(), (q, k, v))
    s = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    p = s.masked_fill(~layout.to_mask(), float("-inf")).softmax(-1)
    want = torch.autograd.grad(((p @ v.repeat_interleave(2, 1)) * weight).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"block": 16}, {"share": "group"}, {"block": 16, "share": "group"}])
def test_pieces_change_nothing(options, monkeypatch):
    """Few rows, or one kv head, at a time give the lists of all at once."""
    q, k, v = qkv(2, 6, 3, 60, dtype=torch.float64)
    x = AttnInput(q[:, :, 25:], KV.dense(k, v), "prefill", 0, 1, 0.25, start=25, q_pos=torch.arange(25, 60).expand(2, 35))
    method = TopKExact(budget=20, **options)
    whole = method.plan(x, State())
    for budget in (1, 60_000):
        monkeypatch.setattr(exact, "BUDGET", budget)
        assert torch.equal(method.plan(x, State()).to_mask(), whole.to_mask())


def test_own_tokens_even_of_small_logits():
    """A key that its own query points away from is still in."""
    q, k, v = qkv(1, 2, 2, 64)
    for method in (TopKExact(budget=16), TopKExact(budget=16, block=16), TopKExact(budget=16, block=16, share="group")):
        x = call(q, -q, v)
        mask = method.plan(x, State()).to_mask()
        assert mask.diagonal(dim1=-2, dim2=-1).all()
        torch.testing.assert_close(attend(x.q, x.kv, method.plan(x, State())), oracle(x.q, x.kv, method.plan(x, State())))


def test_softcap_and_dense_layers():
    q, k, v = qkv(1, 2, 1, 50)
    x = call(q, k, v)
    assert TopKExact(budget=50).plan(x, State()) is None and TopKExact(budget=4, dense_layers=1).plan(x, State()) is None
    x.softcap = 5.0  # monotonous: it moves no single row's order
    a = TopKExact(budget=9).plan(x, State()).to_mask()
    x.softcap = None
    assert torch.equal(a, TopKExact(budget=9).plan(x, State()).to_mask())


@pytest.mark.parametrize(
    "text,message",
    [
        ("topk_exact:budget=0", "budget expected >= 1, got 0"),
        ("topk_exact:block=0", "block expected >= 1, got 0"),
        ("topk_exact:budget=8,block=16", "budget expected at least block = 16"),
        ("topk_exact:share=vote", "share expected one of head, group"),
        ("topk_exact:dense_layers=-1", "dense_layers expected >= 0"),
        ("topk_exact:budgt=4", "did you mean 'budget'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
