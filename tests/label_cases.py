"""Problems for the kernels of labels and single entries, on any device; judged by `scores/labels.py` and `entries.py`."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import torch

import foveate
from foveate.kernels.triton import paging_launch
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.scores import entries, fused
from foveate.scores.labels import Channels, Codes
from tests.paging_cases import NAN, problem

# lists, keep, lengths of kv heads (None: all), sink, recent, late, ties; rows of M entries
CHOICES = [
    (4, 20, None, 0, 1, False, False),
    (4, 20, ((1.0, 0.04), (0.007, 0.4)), 0, 1, False, True),
    (4, 20, ((1.0, 0.04), (0.007, 0.4)), 0, 1, True, True),
    (2, 64, ((1.0,), (0.05,)), 3, 7, True, True),  # lists that share a length
    (1, 9, ((0.9, 0.5), (0.05, 0.5)), 2, 3, False, True),  # a list of two kv heads
    (2, 4, None, 2, 2, True, False),  # only what is forced
    (2, 1, None, 0, 1, False, False),
    (2, 30, None, 0, 0, False, False),
    (2, 10**6, ((0.5, 1.0), (0.3, 0.2)), 0, 1, False, True),
]
LABELS = [(4, 64, 32, 2), (3, 64, 20, 4), (1, 96, 48, 8), (8, 64, 7, 2), (2, 128, 40, 16)]  # group, D, channels, bits
CODES = [(4, 64, False), (3, 128, True), (1, 32, False)]  # query heads a group, D, theta in deviations


def law(*args, **options):
    with patch.object(fused, "entries", lambda t: None):
        return entries.best_entries(*args, **options)


def scores(b, lists, m, lens, ties, dtype=torch.float32, device="cpu", seed=0):
    """(scores with NaN beyond each length and a few NaN, infinities and zeros of both signs inside, lengths)."""
    gen = torch.Generator().manual_seed(seed)
    score = torch.randn(b, lists, m, generator=gen)
    score = (score * 3).round() if ties else score
    if not dtype.is_floating_point:
        return score.to(dtype).to(device), None if lens is None else counts(lens, m).to(device)
    for value in (NAN, float("inf"), float("-inf"), -0.0):
        score[torch.rand(score.shape, generator=gen) < 0.01] = value
    if lens is None:
        return score.to(dtype).to(device), None
    length = counts(lens, m)
    own = length[:, torch.arange(lists) * length.shape[1] // lists, None]
    return score.masked_fill(torch.arange(m) >= own, NAN).to(dtype).to(device), length.to(device)


def counts(lens, m):
    return torch.tensor([[max(1, int(part * m)) for part in row] for row in lens], dtype=torch.int32)


def check_choice(kernels, case, m, dtype=torch.float32, device="cpu"):
    """Index by index that of the plain code."""
    lists, keep, lens, sink, recent, late, ties = case
    score, length = scores(2, lists, m, lens, ties or not dtype.is_floating_point, dtype, device)
    options = dict(length=length, sink=sink, recent=recent, late=late)
    want, got = law(score, keep, **options), kernels.best_entries(score, keep, **options)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])


def close(m, rows=1, device="cpu"):
    """fp32 `[1, rows, m]`: numbers one bit apart in any order, so that their keys differ in the last digits only."""
    gen = torch.Generator().manual_seed(m)
    bits = torch.stack([torch.randperm(m, generator=gen) for _ in range(rows)]) + torch.tensor(1.0).view(torch.int32)
    return bits.to(torch.int32).view(torch.float32)[None].to(device)


HARD = ["equal", "one huge", "few positive", "ties", "infinite", "a run", "rising", "exponent", "zeros of int16"]


def hard(name, m, rows=1, device="cpu"):
    """(scores `[1, rows, m]`, options of the choice) that are hard for a threshold that is guessed from a sample."""
    gen = torch.Generator().manual_seed(m)
    score, options = torch.zeros(1, rows, m), {}
    draw = lambda *shape: torch.rand(shape, generator=gen)  # noqa: E731
    if name == "one huge":
        score[..., m // 3] = 3e38
    elif name == "few positive":  # most scores are zero, as behind a relu
        score[..., torch.randperm(m, generator=gen)[: m // 12]] = draw(1, rows, m // 12)
    elif name == "ties":
        score = (3 * draw(1, rows, m)).round()
    elif name == "infinite":
        score[:] = float("-inf")
        score[..., ::30], score[..., 5], score[..., 7 :: m // 4] = NAN, 0.0, float("inf")
    elif name == "a run":  # the best lie side by side
        score[..., m // 2 : m // 2 + m // 5] = draw(1, rows, m // 5)
    elif name == "rising":
        score += torch.linspace(-1, 1, m)
        options = {"sink": 3, "recent": 12}
    elif name == "exponent":
        score = 1 + draw(1, rows, m) / 4
    elif name == "zeros of int16":
        score[..., :: m // 40] = -5
        score = score.to(torch.int16)
    return score.to(device), options


def misleading(n, sample, device="cpu"):
    """fp32 `[1, 1, n]`: 100 wherever the kernel's sample of so many looks, between 0 and 1 elsewhere."""
    i = torch.arange(sample)
    mixed = (i * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    width = -(-n // sample)
    place = i // 32 + (i % 32) * (sample // 32)
    place = place * width + ((((mixed ^ (mixed >> 13)) >> 16) * width) >> 16)
    score = torch.rand(1, 1, n, generator=torch.Generator().manual_seed(n))
    score[0, 0, place[place < n]] = 100.0
    return score.to(device)


# ---------------------------------------------------------------------- labels
def earlier(kv: KV) -> KV:
    """The view one token ago."""
    if kv.len is not None:
        return replace(kv, len=kv.len - 1)
    return replace(kv, k=kv.k[:, :, :-1], v=kv.v[:, :, :-1], capacity=kv.capacity - 1)


def plain(labels):
    labels._kernels = lambda q, kv: None
    return labels


def pair(make, q, kv):
    """(labels by the kernels, by the plain code), both having seen all but the newest token."""
    ours, other = make(), plain(make())
    for labels in (ours, other):
        labels.rank(q, earlier(kv), 0, group=False)
    return ours, other


def check_labels(make, q, kv, group, tolerance):
    """Scores of all but the newest entry, whose score does not count, and its label; returns how far scores are apart."""
    ours, other = pair(make, q, kv)
    assert ours._kernels(q, kv) is not None
    got, want = (labels.rank(q, kv, 1, group=group) for labels in (ours, other))
    number = torch.arange(kv.capacity, device=kv.device)
    live = number < kv.lengths()[..., None]
    old = number < kv.lengths()[..., None] - 1
    old = old if group else old.repeat_interleave(q.shape[1] // kv.shape[1], 1)
    assert got.shape == want.shape and (ours.done, ours.even, ours.least) == (other.done, other.even, other.least)
    torch.testing.assert_close(got[old].double(), want[old].double(), atol=tolerance, rtol=1e-5)
    for a, b in zip(ours.data, other.data, strict=True):
        assert torch.equal(a[:, :, : kv.capacity][live], b[:, :, : kv.capacity][live])


def channels(d, r, bits, g=2, device="cpu", learnt=False):
    """Labels on channels that are given, or learnt from each row's first 64 keys."""
    if learnt:
        return lambda: Channels(r, bits)
    gen = torch.Generator().manual_seed(d)
    table = torch.stack([torch.randperm(d, generator=gen)[:r] for _ in range(g)]).to(device)
    return lambda: Channels(r, bits, table)


def codes(d, spread, device="cpu"):
    return lambda: Codes(d, 0.5, spread, torch.device(device))


# ---------------------------------------------------------------------- a step
def step(method, q, kv, state, number):
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), step=number, q_pos=kv.lengths().amax(1)[:, None] - 1)
    return method.plan(x, state)


def check_step(method, q, kv, tolerance):
    """Lists hold the best of the kernels' own scores, and attention over them is the oracle's."""
    state = State()
    step(method, q, earlier(kv), state, 0)
    kept = []
    before = entries.best_entries
    with patch(f"{type(method).__module__}.best_entries", lambda s, *a, **k: kept.append((s, a, k)) or before(s, *a, **k)):
        layout = step(method, q, kv, state, 1)
    score, args, options = kept[0]
    want = law(score, *args, **options)
    assert torch.equal(layout.entries[:, :, 0], want[0]) and torch.equal(layout.entry_count[:, :, 0], want[1])
    assert paging_launch.serves(q, kv, layout, 0.0)
    exact = replace(kv, k=kv.k.float(), v=kv.v.float())
    out = foveate.attend(q.float(), exact, layout, backend="reference")
    got, lse = paging_launch.attend(q, kv, layout, 1 / math.sqrt(q.shape[-1]), True)
    torch.testing.assert_close(got.float(), out, atol=tolerance, rtol=0)
    assert bool(torch.isfinite(lse).all())


__all__ = ["CHOICES", "CODES", "LABELS", "problem"]
