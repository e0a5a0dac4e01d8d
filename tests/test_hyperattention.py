"""HyperAttention against a slow transcription of its card, in values, selection and gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from foveate.cache import PagedStore
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods.base import State
from foveate.methods.hyperattention import HyperAttention
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.lsh import buckets, directions, gray_rank, pair_up
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned
from tests.prompts import call

SMALL = dict(block=16, samples=12, min_seq_len=32)


# ---------------------------------------------------------------------- the card, slowly
def reflected(bits):
    """The binary reflected order of codes, built by recursion."""
    if bits == 0:
        return [0]
    half = reflected(bits - 1)
    return half + [c + (1 << (bits - 1)) for c in reversed(half)]


def slow_buckets(x, planes):
    """Bucket numbers of the rows of x `[n, D]`."""
    order = reflected(planes.shape[1])
    return [order.index(sum(1 << i for i, side in enumerate(row) if side > 0)) for row in (x @ planes).tolist()]


def slow_square(bq, bk, width, samples):
    """Steps 2 to 4 for one head: {(query, key): weight} of buckets bq and bk; samples are places in the sorted keys."""
    order_q = sorted(range(len(bq)), key=lambda i: (bq[i], i))
    order_k = sorted(range(len(bk)), key=lambda j: (bk[j], j))
    rows = max(1, math.ceil(len(bq) * width / len(bk)))
    weight: dict[tuple[int, int], float] = {}
    for rank, i in enumerate(order_q):
        centre = (rank // rows + 0.5) * rows / len(bq) * len(bk)  # of these queries, among the keys
        block = min(int(centre // width), math.ceil(len(bk) / width) - 1)
        for place in range(block * width, min(len(bk), block * width + width)):
            weight[i, order_k[place]] = 1.0
        for place in samples:
            if place // width != block:
                pair = i, order_k[place]
                weight[pair] = weight.get(pair, 0.0) + len(bk) / len(samples)
    return weight


def slow_weights(q, k, plan, method, start):
    """`[H, N, M]`: what exp(logit) of each pair is multiplied with. The samples are the plan's: they are the input."""
    (h, n), (g, m) = q.shape[1:3], k.shape[1:3]
    planes = directions(q.shape[3], method.planes, method.seed).to(q.dtype)
    bq = [slow_buckets(q[0, i], planes) for i in range(h)]
    bk = [slow_buckets(k[0, i], planes) for i in range(g)]
    out = [[[0.0] * m for _ in range(n)] for _ in range(h)]
    depth = 0
    while math.ceil(n / 2**depth) > method.min_seq_len:
        depth += 1
    length = math.ceil(n / 2**depth)
    assert (length, depth) == (plan.length, len(plan.levels))
    for head in range(h):
        for t in range(n):
            for j in range(start + t // length * length, start + t + 1):
                out[head][t][j] = 1.0
    squares = []  # (drawn samples, number of the square, first query, queries, first key, keys)
    if start:
        squares.append((plan.before, 0, 0, n, 0, start))
    for j, level in enumerate(plan.levels):
        size = length << j
        for i, a in enumerate(range(0, n, 2 * size)):
            squares.append((level, i, a + size, size, start + a, size))
    for drawn, i, q0, nq, k0, nk in squares:
        if q0 >= n:
            continue
        for head in range(h):
            mine = bq[head][q0 : q0 + nq]
            mine += [1 << method.planes] * (nq - len(mine))  # rows that fill up: last, and not looked at
            theirs = bk[head * g // h][k0 : k0 + nk]
            assert len(theirs) == nk
            chosen = drawn.samples[i, head].tolist()
            assert len(chosen) == (method.samples if nk > method.block else 0) and all(0 <= c < nk for c in chosen)
            for (row, key), w in slow_square(mine, theirs, method.block, chosen).items():
                if q0 + row < n:
                    out[head][q0 + row][k0 + key] += w
    return torch.tensor(out, dtype=q.dtype)


def weighted(q, k, v, weight, scale):
    """(out, lse) of softmax with these factors, dense and differentiable."""
    r = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(r, 1).transpose(-1, -2) * scale + weight.log()
    return s.softmax(-1) @ v.repeat_interleave(r, 1), s.logsumexp(-1)


def run(method, x):
    plan = method.plan(x, State())
    return method.attend(x, x.dense() if plan is None else plan, State())[:2]


# ---------------------------------------------------------------------- fidelity
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_selection_are_the_card(case):
    """Selection pair by pair, out and lse to fp64: the whole prompt, and a chunk after another."""
    q, k, v, _ = case.make()
    q, k, v = (t[:, :, :110].double() for t in (q, k, v))
    method = HyperAttention(**SMALL)
    for start, stop in ((0, 110), (47, 110)):
        x = call(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop], start)
        plan = method.plan(x, State())
        weight = slow_weights(x.q, k, plan, method, start)
        assert torch.equal(plan.to_mask()[0], weight > 0)
        for got, want in zip(method.attend(x, plan, State())[:2], weighted(x.q, k, v, weight, x.scale), strict=True):
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (4, 1), (8, 2)])
@pytest.mark.parametrize("n,start", [(97, 0), (90, 33), (1, 60), (12, 20)])
def test_shapes(h, g, n, start):
    """Groups of 1 to 4, prompts that fill nothing evenly, chunks of one row, and rows below the length of a piece."""
    q, k, v = qkv(1, h, g, start + n, dtype=torch.float64, seed=n)
    method = HyperAttention(block=8, samples=5, min_seq_len=12, planes=3)
    x = call(q, k, v, start)
    plan = method.plan(x, State())
    weight = slow_weights(x.q, k, plan, method, start)
    for got, want in zip(method.attend(x, plan, State())[:2], weighted(x.q, k, v, weight, x.scale), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_the_sampled_estimator():
    """Through out and lse, in queries, keys and values, against autograd of the transcription."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 2, 70, dtype=torch.float64))
    method = HyperAttention(block=8, samples=6, min_seq_len=20)
    x = call(q, k, v)
    plan = method.plan(x, State())
    weight = slow_weights(q.detach(), k.detach(), plan, method, 0)
    gen = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, 4, 70, *more, dtype=torch.float64, generator=gen) for more in ((16,), ()))
    pairs = (method.attend(x, plan, State())[:2], weighted(q, k, v, weight, x.scale))
    grads = [torch.autograd.grad((o * a).sum() + (e * b).sum(), (q, k, v)) for o, e in pairs]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------- what must hold
@pytest.mark.parametrize("options", [dict(samples=0), dict(samples=9)])
@pytest.mark.parametrize("start", [0, 70])
def test_one_block_is_exact(options, start):
    """block >= keys: nothing is left to sample, and nothing is missing."""
    q, k, v = qkv(1, 6, 2, 130)
    x = call(q, k, v, start)
    out, _ = run(HyperAttention(block=256, min_seq_len=16, **options), x)
    torch.testing.assert_close(out, oracle(x.q, (k, v)), atol=1e-5, rtol=1e-5)


def test_short_prompts_are_exact():
    q, k, v = qkv(1, 2, 1, 50)
    assert HyperAttention(min_seq_len=50).plan(call(q, k, v), State()) is None
    assert HyperAttention(min_seq_len=49).plan(call(q, k, v), State()) is not None
    assert HyperAttention(min_seq_len=49, dense_layers=1).plan(call(q, k, v), State()) is None
    torch.testing.assert_close(run(HyperAttention(), call(q, k, v))[0], oracle(q, (k, v)), atol=1e-5, rtol=1e-5)


def test_hashing():
    """Buckets next to each other differ in one bit; only the direction counts; equal vectors keep their order."""
    for bits in (1, 3, 7):
        rank = gray_rank(torch.arange(1 << bits, dtype=torch.int32)).tolist()
        assert [rank.index(i) for i in range(1 << bits)] == reflected(bits)
        codes = [rank.index(i) for i in range(1 << bits)]
        assert all((a ^ b).bit_count() == 1 for a, b in zip(codes, codes[1:], strict=False))
    q, _, _ = qkv(1, 3, 1, 40, dtype=torch.float64)
    planes = directions(16, 7, 0)
    length = torch.linspace(0.01, 50, 40, dtype=torch.float64)[:, None]
    assert torch.equal(buckets(q, planes), buckets(q * length, planes)) and len(buckets(q, planes).unique()) > 20
    same = torch.zeros(1, 2, 33, dtype=torch.int32)
    squares = pair_up(same, same, 8, 4, torch.Generator().manual_seed(0))
    assert torch.equal(squares.queries, torch.arange(33).expand(1, 2, 33)) and torch.equal(squares.keys, squares.queries)


def test_sorted_neighbours_find_heavy_keys():
    """Queries that equal a far key meet it in a block: much more often than by the share of keys that blocks hold."""
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 2, 512, 32, dtype=torch.float64, generator=gen) for _ in "kv")
    order = torch.randperm(256, generator=gen)
    q = torch.cat([k[:, :, :256], k[:, :, order]], 2)
    mask = HyperAttention(block=16, samples=0, min_seq_len=256).plan(call(q, k, v), State()).to_mask()
    found = mask[0, :, 256 + torch.arange(256), order].double().mean()
    assert found > 0.5 > 16 / 256


def test_the_normaliser_is_unbiased():
    """The mean of exp(lse) over draws approaches the exact sum, rows of the last, incomplete block included.

    Counting samples of the row's own block again, or weights of n / (n - b), would be 16/44 off. Batch rows draw their own
    samples, seeds their own hyperplanes as well.
    """
    q, k, v = qkv(1, 2, 1, 88, dtype=torch.float64, seed=2)
    q, k, v = (t.expand(60, -1, -1, -1) for t in (0.5 * q, k, v))
    x = call(q, k, v)
    exact = (q @ k.transpose(-1, -2) * x.scale).masked_fill(torch.ones(88, 88).triu(1).bool(), float("-inf")).logsumexp(-1)
    draws = [run(HyperAttention(block=16, samples=24, min_seq_len=44, seed=seed), x)[1] for seed in range(3)]
    ratio = (torch.cat(draws) - exact.repeat(3, 1, 1)).exp().mean(0)
    assert abs(float(ratio[:, 44:].mean()) - 1) < 0.02 and float((ratio[:, 44:] - 1).abs().max()) < 0.25
    assert float((ratio[:, :44] - 1).abs().max()) < 1e-9


def test_what_fills_up_is_never_seen():
    """All logits are -40: a filled-up key of logit 0 would take all the weight. Values of 1 must come out as 1."""
    q, k = torch.ones(1, 2, 75, 16), -10.0 * torch.ones(1, 1, 75, 16)
    v = torch.ones(1, 1, 75, 16)
    for start in (0, 30):
        out, lse = run(HyperAttention(block=16, samples=8, min_seq_len=10), call(q, k, v, start))
        torch.testing.assert_close(out, torch.ones_like(out))
        assert bool((lse < -30).all())


def test_no_value_or_key_of_the_future():
    """Values of later rows change nothing, bit for bit; under one plan their keys and queries neither."""
    q, k, v = qkv(1, 4, 2, 150)
    method, t = HyperAttention(**SMALL), 97
    changed = [a.clone() for a in (q, k, v)]
    for a in changed:
        a[:, :, t:] += 3.0
    x, later = call(q, k, v), call(q, k, changed[2])
    plan = method.plan(x, State())
    first = method.attend(x, plan, State())
    for other, frozen in ((later, method.plan(later, State())), (call(*changed), plan)):
        got = method.attend(other, frozen, State())
        assert torch.equal(got[0][:, :, :t], first[0][:, :, :t]) and torch.equal(got[1][:, :, :t], first[1][:, :, :t])
        assert not torch.equal(got[0][:, :, t:], first[0][:, :, t:])


def test_seeds_and_storage():
    """One seed is one result, layers draw their own; pages that are not full give what a rectangle gives."""
    q, k, v = qkv(1, 4, 2, 150)
    method = HyperAttention(**SMALL)
    one, _ = run(method, call(q, k, v))
    assert torch.equal(one, run(method, call(q, k, v))[0])
    assert not torch.equal(one, run(HyperAttention(**SMALL, seed=1), call(q, k, v))[0])
    assert not torch.equal(one, run(method, call(q, k, v, layer=1, layers=2))[0])
    store = PagedStore.empty(k, v, 64).append(k, v, None, [0])
    x = call(q, k, v, kv=store.view())
    torch.testing.assert_close(run(method, x)[0], one, atol=1e-6, rtol=1e-6)
    spare = KV.dense(*(torch.cat([t, torch.full((1, 2, 42, 16), float("nan"))], 2) for t in (k, v)))
    x = call(q, k, v, kv=spare)  # rows of the storage that nothing has filled yet
    assert torch.equal(run(method, x)[0], one) and method.plan(x, State()).to_mask().shape[-1] == 192


def test_every_seed_layer_and_start_draws_its_own_samples():
    """A generator on the CPU reads the low 32 bits of a seed only, and refuses more than 64."""

    def drawn(seed=0, layer=0, start=0):
        q, k, v = qkv(1, 2, 1, 100)
        x = call(q, k, v, start=start, layer=layer, layers=9)
        return HyperAttention(block=8, samples=8, min_seq_len=16, seed=seed).plan(x, State()).levels[-1].samples

    some = [drawn(seed=seed) for seed in (0, 1, 4, 20_000, 12_345_678, (1 << 32) - 1)]
    some += [drawn(layer=layer) for layer in (1, 4, 8)] + [drawn(start=start) for start in (4, 8)]
    some = [t.flatten()[:16] for t in some]
    assert not any(torch.equal(a, b) for i, a in enumerate(some) for b in some[:i])


@pytest.mark.parametrize(
    "nq,nk,width", [(64, 64, 8), (60, 60, 8), (30, 3000, 256), (100, 3000, 256), (1, 900, 64), (9, 20, 64)]
)
def test_blocks_of_queries_meet_the_keys_of_their_buckets(nq, nk, width):
    """Short chunks after long ones: the middle of each block of queries falls into its block of keys, or nearest to it."""
    codes = [torch.arange(n).flip(0)[None, None].int() for n in (nq, nk)]
    squares = pair_up(*codes, width, 0, torch.Generator().manual_seed(0))
    middles = (torch.arange(squares.blocks) + 0.5) * squares.rows / nq * nk
    first = squares.met * width
    assert bool(((first <= middles) & ((middles < first + width) | (first + width >= nk))).all()), (first, middles)
    if nq == nk:
        assert squares.met.tolist() == list(range(-(-nk // width)))


def test_softcap():
    q, k, v = qkv(1, 2, 2, 60, dtype=torch.float64)
    x = call(3 * q, k, v)
    x.softcap = 2.0
    out, _ = run(HyperAttention(block=64, min_seq_len=16), x)
    s = (2.0 * torch.tanh(x.q @ k.transpose(-1, -2) * x.scale / 2.0)).masked_fill(torch.ones(60, 60).triu(1).bool(), -1e30)
    torch.testing.assert_close(out, s.softmax(-1) @ v, atol=1e-10, rtol=1e-10)


def test_recipes_that_want_mass_are_refused():
    """Weighted samples have no mass per entry to hand on; a method that asks for it must not get None."""
    method = HyperAttention()
    asks = SimpleNamespace(id="asks", sees=("mass",), observes=("prefill", "decode"))
    later = SimpleNamespace(id="later", sees=("mass",), observes=("decode",))
    assert method.refuses(SimpleNamespace(methods=[method, later])) is None
    assert "asks wants the attention mass" in method.refuses(SimpleNamespace(methods=[method, later, asks]))


def test_through_the_runtime():
    """Plans of the common driver, whole and in chunks; an evicted cache runs dense."""
    plans = planned("hyperattention:block=16,samples=8,min_seq_len=64", CASES[0], chunks=(100, 250))
    assert plans[1].before is not None and plans[0].before is None
    assert [p.length << len(p.levels) >= n for p, n in zip(plans, (100, 150, 50), strict=True)] == [True] * 3
    q, k, v = qkv(1, 4, 2, 150)
    text = "hyperattention:block=16,samples=8,min_seq_len=32"
    drive = Drive(Recipe.of(text), backend=None)
    x = call(q, k, v, layer=2, layers=4)
    assert torch.equal(drive(q, k, v), run(parse(text), x)[0])
    drive = Drive(Recipe.of(f"{text}+cache=streaming_llm:sink=4,window=60"))
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive(*(t[:, :, 100:101] for t in (q, k, v)))
    out = drive(*(t[:, :, 101:] for t in (q, k, v)))
    assert bool(torch.isfinite(out).all()) and any("evicted" in note for note in drive.notes)


@pytest.mark.parametrize(
    "text,message",
    [
        ("hyperattention:block=0", "block expected >= 1, got 0"),
        ("hyperattention:samples=-1", "samples expected >= 0, got -1"),
        ("hyperattention:planes=17", "planes expected between 1 and 16, got 17"),
        ("hyperattention:min_seq_len=0", "min_seq_len expected >= 1, got 0"),
        ("hyperattention:seed=4294967296", "seed expected between 0 and 4294967295"),
        ("hyperattention:seed=1.5", "seed expected int, got 1.5"),
        ("hyperattention:sample=4", "did you mean 'samples'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
