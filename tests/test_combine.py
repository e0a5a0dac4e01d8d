"""merge: partial softmaxes put together equal the whole, empty ones are neutral, everything differentiates."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import KV, Layout, attend, merge
from foveate.combine import join_lse, sink_logit
from tests.drive import qkv

quick = settings(max_examples=30, deadline=None)


def close(got, want, tol=2e-5):
    torch.testing.assert_close(got, want, atol=tol, rtol=tol)


def cut(k, v, owner, part):
    """The call's keys with those of other parts hidden."""
    return KV.dense(k, v, bias=torch.where(owner == part, 0.0, float("-inf")).to(k.dtype).expand(k.shape[:3]).contiguous())


@quick
@given(st.integers(1, 5), st.integers(1, 23), st.integers(0, 2**31 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_parts_equal_the_whole(parts, m, seed, dtype):
    """Keys dealt out at random, so that parts are often empty for a row or altogether."""
    q, k, v = qkv(2, 4, 2, m, seed=seed, dtype=dtype)
    owner = torch.randint(0, parts, (m,), generator=torch.Generator().manual_seed(seed))
    layout = Layout.dense(2, 4, m, m)
    want = attend(q, (k, v), layout, return_lse=True, backend="reference")
    got = merge([attend(q, cut(k, v, owner, i), layout, return_lse=True) for i in range(parts)])
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    close(got[0], want[0], tol)
    close(got[1], want[1], tol)


def test_empty_parts_are_neutral():
    out, lse = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5)
    none = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for parts in ([(out, lse), none], [none, (out, lse)], [none, (out, lse), none]):
        got = merge(parts)
        close(got[0], out)
        close(got[1], lse)
    got = merge([none, none])
    assert (got[0] == 0).all() and torch.isneginf(got[1]).all()
    assert merge([none])[1] is none[1]


def test_large_and_small_lse():
    """Weights come from differences: neither overflow nor underflow of the parts themselves matters."""
    one = torch.ones(1, 1, 1, 1)
    for shift in (-1e4, 0.0, 1e4):
        out, lse = merge([(one, torch.full((1, 1, 1), shift)), (3 * one, torch.full((1, 1, 1), shift))])
        close(out, 2 * one)
        close(lse, torch.full((1, 1, 1), shift + 0.6931472))


def test_gradient_equals_that_of_the_whole():
    q, k, v = qkv(1, 4, 2, 17, dtype=torch.float64)
    owner = torch.arange(17) % 3
    owner[0] = 0  # rows 0 and 1 have parts without keys
    layout = Layout.dense(1, 4, 17, 17)
    weight, weight_lse = torch.randn(1, 4, 17, 16, dtype=torch.float64), torch.randn(1, 4, 17, dtype=torch.float64)

    def gradients(run):
        x = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = run(*x)
        ((out * weight).sum() + (lse * weight_lse).sum()).backward()
        return [t.grad for t in x]

    want = gradients(lambda q, k, v: attend(q, (k, v), layout, return_lse=True))
    got = gradients(
        lambda q, k, v: merge([attend(q, cut(k, v, owner, i), layout, return_lse=True) for i in range(4)])
    )  # part 3 has no key at all
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-10)


def test_gradient_of_rows_without_keys_is_zero():
    out = torch.zeros(1, 1, 3, 2, requires_grad=True)
    lse = torch.full((1, 1, 3), float("-inf"), requires_grad=True)
    merged, joined = merge([(out, lse), (out, lse)])
    (merged.sum() + torch.where(torch.isfinite(joined), joined, 0.0).sum()).backward()
    assert (out.grad == 0).all() and (lse.grad == 0).all()


def test_gradcheck():
    a, b = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    la, lb = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    x = [t.requires_grad_() for t in (a, la, b, lb)]
    assert torch.autograd.gradcheck(lambda a, la, b, lb: merge([(a, la), (b, lb)]), x)


def test_shares_sum_to_one():
    lses = [torch.randn(2, 3), torch.full((2, 3), float("-inf")), torch.randn(2, 3)]
    shares, lse = join_lse(lses)
    close(shares.sum(0), torch.ones(2, 3))
    assert (shares[1] == 0).all()
    close(lse, torch.logaddexp(lses[0], lses[2]))


def test_keeps_the_dtype_of_the_outputs():
    out = torch.randn(1, 1, 4, 8).bfloat16()
    got = merge([(out, torch.zeros(1, 1, 4)), (out, torch.zeros(1, 1, 4))])
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32


def test_sink_logit_is_a_key_of_value_zero():
    q, k, v = qkv(2, 4, 4, 12)
    logit = torch.randn(4)
    out, lse = sink_logit(*attend(q, (k, v), return_lse=True), logit)
    # One more key of q k = 0 and value 0, whose entry bias is the logit; first, so that every row sees it.
    pad = torch.zeros(2, 4, 1, 16)
    bias = torch.cat([logit.view(1, 4, 1).expand(2, 4, 1), torch.zeros(2, 4, 12)], 2)
    kv = KV.dense(torch.cat([pad, k], 2), torch.cat([pad, v], 2), bias=bias)
    want = attend(q, kv, return_lse=True, backend="reference")
    close(out, want[0])
    close(lse, want[1])


def test_sink_logit_of_a_row_without_keys():
    out, lse = sink_logit(torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), float("-inf")), torch.tensor([0.5, -1.0]))
    assert (out == 0).all()
    close(lse, torch.tensor([[[0.5], [-1.0]]]))


def test_sink_logit_differentiates():
    x = (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.randn(2))
    assert torch.autograd.gradcheck(sink_logit, [t.double().requires_grad_() for t in x])
