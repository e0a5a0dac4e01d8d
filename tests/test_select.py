"""Selection rules against plain python that sorts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.select import above, above_max, top_k, top_p

ROWS = settings(deadline=None, max_examples=50)


@st.composite
def case(draw, low=-8, high=8):
    """A row of scores with many ties, and which entries are valid and forced."""
    n = draw(st.integers(1, 20))
    # Quarters: sums are exact, so that the plain python decides every boundary as the library does.
    score = [draw(st.integers(low, high)) / 4 for _ in range(n)]
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    return score, draw(flags), draw(flags)


def tensors(score, valid, forced):
    return torch.tensor(score), torch.tensor(valid), torch.tensor(forced)


def plain_top_k(score, k, valid, forced):
    keep = {i for i in range(len(score)) if forced[i] and valid[i]}
    for i in sorted((i for i in range(len(score)) if valid[i] and i not in keep), key=lambda i: (-score[i], i)):
        if len(keep) >= k:
            break
        keep.add(i)
    return keep


def plain_top_p(prob, p, valid, forced, least):
    keep = {i for i in range(len(prob)) if forced[i] and valid[i]}
    total = sum(x for x, ok in zip(prob, valid) if ok)
    mass = sum(prob[i] for i in keep)
    for i in sorted((i for i in range(len(prob)) if valid[i] and i not in keep), key=lambda i: (-prob[i], i)):
        if mass >= p * total and p < 1 and len(keep) >= least:
            break
        keep.add(i)
        mass += prob[i]
    return keep


def picked(mask):
    return set(mask.nonzero().flatten().tolist())


@ROWS
@given(case(), st.integers(0, 25))
def test_top_k_is_the_sorted_prefix(row, k):
    score, valid, forced = tensors(*row)
    want = plain_top_k(row[0], k, row[1], row[2])
    assert picked(top_k(score, k, valid=valid, forced=forced)) == want
    assert picked(top_k(score, torch.tensor(k), valid=valid, forced=forced)) == want


@ROWS
@given(st.lists(case(), min_size=1, max_size=4), st.data())
def test_rows_are_independent_and_take_their_own_k(rows, data):
    n = max(len(r[0]) for r in rows)
    pad = lambda x, v: x + [v] * (n - len(x))  # noqa: E731
    ks = [data.draw(st.integers(0, n + 2)) for _ in rows]
    score = torch.tensor([pad(r[0], 9.0) for r in rows])
    valid = torch.tensor([pad(r[1], False) for r in rows])
    forced = torch.tensor([pad(r[2], True) for r in rows])
    got = top_k(score, torch.tensor(ks), valid=valid, forced=forced)
    for row, k, mask in zip(rows, ks, got):
        assert picked(mask) == plain_top_k(row[0], k, row[1], row[2])


@ROWS
@given(case(low=0), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.0]), st.integers(0, 6))
def test_top_p_is_the_smallest_prefix_that_reaches_p(row, p, least):
    prob, valid, forced = tensors(*row)
    got = top_p(prob, p, valid=valid, forced=forced, least=least)
    assert picked(got) == plain_top_p(row[0], p, row[1], row[2], least)


@ROWS
@given(case(low=0), st.floats(0, 1), st.floats(0, 1))
def test_top_p_grows_with_p(row, a, b):
    prob, valid, _ = tensors(*row)
    small, large = (top_p(prob, p, valid=valid) for p in sorted((a, b)))
    assert not (small & ~large).any()


@ROWS
@given(case(low=0), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_thresholds(row, t):
    score, valid, forced = tensors(*row)
    n = range(len(row[0]))
    must = {i for i in n if row[1][i] and row[2][i]}
    assert picked(above(score, t, valid=valid, forced=forced)) == must | {i for i in n if row[1][i] and row[0][i] >= t}
    peak = max((row[0][i] for i in n if row[1][i]), default=math.inf)
    want = must | {i for i in n if row[1][i] and row[0][i] >= t * peak}
    assert picked(above_max(score, t, valid=valid, forced=forced)) == want


@pytest.mark.parametrize("k", [3, torch.tensor(3)], ids=["int", "tensor"])
def test_equal_scores_go_to_the_lower_index(k):
    assert picked(top_k(torch.zeros(1000), k)) == {0, 1, 2}
    assert picked(top_k(torch.tensor([1.0, 2, 1, 2, 1, 1]), k)) == {0, 1, 3}


def test_infinities_and_nan():
    """+inf does not push out what is forced, -inf is still a valid entry, NaN ranks last and is never an error."""
    s = torch.tensor([float("inf"), float("nan"), -1.0, float("-inf"), float("inf")])
    forced = torch.tensor([False, False, True, False, False])
    assert picked(top_k(s, 2, forced=forced)) == {0, 2}
    assert picked(top_k(s, 3)) == {0, 2, 4}
    assert picked(top_k(s, 5)) == {0, 1, 2, 3, 4}
    assert picked(top_p(torch.tensor([0.5, float("nan"), 0.5]), 0.9)) == {0, 2}
    assert picked(above(s, -1.0)) == {0, 2, 4}


def test_all_forced_stay_and_none_beyond_them():
    forced = torch.tensor([True, True, True, False])
    assert picked(top_k(torch.tensor([0.0, 0, 0, 9]), 2, forced=forced)) == {0, 1, 2}


def test_forced_mass_counts_towards_p():
    prob = torch.tensor([1.0, 5, 3, 1])
    assert picked(top_p(prob, 0.5)) == {1}
    assert picked(top_p(prob, 0.5, forced=torch.tensor([False, False, True, False]))) == {1, 2}
    assert picked(top_p(prob, 0.3, forced=torch.tensor([False, False, True, False]))) == {2}


def test_a_long_tail_is_not_lost():
    """A million equal probabilities: half the mass is half of them, which sums in fp32 miss by thousands."""
    n = 1 << 20
    assert int(top_p(torch.full((n,), 1.0), 0.5).sum()) == n // 2
    prob = torch.cat([torch.tensor([1e7]), torch.full((n,), 0.5)])
    assert abs(int(top_p(prob, (1e7 + n / 4) / (1e7 + n / 2)).sum()) - n // 2) <= 2


def test_p_per_row_and_empty_rows():
    prob = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    assert top_p(prob, torch.tensor([0.5, 0.7])).tolist() == [[True, False], [True, True]]
    none = torch.zeros(2, 0)
    assert top_k(none, 3).shape == top_p(none, 0.5).shape == above_max(none, 0.5).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    s = torch.tensor([1, 5, 3, 5], dtype=dtype)
    assert picked(top_k(s, 2)) == {1, 3} and picked(top_p(s, 0.5)) == {1, 3} and picked(above(s, 3)) == {1, 2, 3}
