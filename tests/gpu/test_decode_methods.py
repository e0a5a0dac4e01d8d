"""Decode methods whose scores read all keys, on a GPU: against fp64 and plain code, in replayed graphs, without waiting."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import capturing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.scores import observed
    from tests import estimate_votes_cases as cases
    from tests.estimate_cases import plain

GPU = dict(device="cuda")
RECIPES = (
    "decode=token_select:sink=4,local=64,budget=64,chunk=64,pool=3",
    "decode=token_select:sink=4,local=64,budget=64,chunk=64,positions=text",
    "decode=token_select:sink=4,local=64,budget=64,chunk=64,theta=0.2,refresh=9",
    "decode=token_select:sink=4,local=64,budget=64,chunk=64,theta=0.2,refresh=9,pool=3,positions=text",
    "decode=longheads:chunk=16,attention=64,block=16",
    "decode=longheads:chunk=16,attention=64,block=16,share=group",
    "recycled_attention:stride=5,budget=100",
    "pillar_attn:draft=4,ratio=0.1",
    "pillar_attn:draft=4,ratio=0.1,warm=true",
    "tidal_decode:start=0,reselect=2,budget=64,share=group",
    "decode=topk_exact:budget=40,share=group",
)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [
    (1, 32, 8, 20011, 128),
    (2, 6, 2, 2777, 64),
    (1, 16, 1, 3001, 96),
    (3, 4, 4, 1000, 256),
    (1, 64, 8, 5000, 128),
])  # fmt: skip
def test_votes(shape, name):
    cases.check(*shape, lists=1, first=100, tail=200, dtype=getattr(torch, name), tolerance=3e-4, **GPU)


@pytest.mark.parametrize("options", [
    dict(lists=2, most=True, lengths=(3000, 61), softcap=3.0),
    dict(lists=8, lengths=(40, 3000), shift=3),
    dict(lists=1, exact=True, lengths=(3000, 6), first=4, tail=8),  # fp32 queries; a row without candidates
    dict(lists=8, exact=True, shift=2990),
], ids=str)  # fmt: skip
def test_options(options):
    cases.check(2, 8, 2, 3000, 128, tolerance=3e-4, dtype=torch.bfloat16, **options, **GPU)


def test_fp32_queries_keep_their_precision():
    """Beside keys of 16 bits, votes of unscaled logits: rounding the query shows in the logits."""
    q, kv, q_pos = cases.problem(1, 8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    q = 3.0 * q.float() + 0.01 * torch.randn(q.shape, device="cuda")
    want = observed.row_logits(*cases.doubled(q, kv), q_pos, scale=1.0)
    got = cases.kernels.logits(q, kv.k, None, scale=1.0).double() * 0.6931471805599453
    torch.testing.assert_close(got, want, atol=1e-3, rtol=3e-6)
    rough = observed.row_logits(*cases.doubled(q.bfloat16(), kv), q_pos, scale=1.0)
    assert float((rough - want).abs().amax()) > 0.03


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_scores_of_methods(name):
    cases.same_scores(
        2, 32, 8, 4096, 128, lengths=(4096, 999), dtype=getattr(torch, name), keep=300, tolerance=3e-4, slack=0.01, **GPU
    )


@pytest.mark.parametrize("text", [
    "token_select:sink=128,local=512,budget=1024,temperature=0.09",
    "token_select:sink=16,local=512,budget=1024,pool=5,positions=text,temperature=0.09",
    "longheads:chunk=128,attention=1024",
    "longheads:chunk=128,attention=1024,share=group",
    "longheads:chunk=64,attention=1408,block=64",  # lists of 22 chunks
])  # fmt: skip
@pytest.mark.parametrize("lengths", [None, (8100, 1500)])
def test_steps_are_those_of_plain_code(text, lengths):
    b, grows = (1, (0, 0, 0)) if lengths is None else (2, (0, 1, 2))
    cases.same_steps(
        text, b, 32, 8, 8192, 128, lengths=lengths, dtype=torch.bfloat16, tolerance=2e-2, grows=grows, slack=0.02, **GPU
    )


@pytest.mark.parametrize("positions", ["rank", "text"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_lists_that_are_used_again(positions, name):
    """Rows choose anew when their own queries turn, and when a list is older than six tokens; one is shorter than a list."""
    text = f"token_select:sink=16,local=512,budget=1024,temperature=0.09,theta=0.9,refresh=6,positions={positions}"
    turns = ((4, 5), (), (3, 9))
    how = dict(dtype=getattr(torch, name), tolerance=2e-2, slack=0.02)
    seen = cases.same_held(text, 3, 32, 8, 8192, 128, lengths=(8100, 1200, 4000), steps=12, turns=turns, **how, **GPU)
    for row, at in enumerate(turns):
        want, last = [], -99
        for step in range(12):
            new = step in at or step - last > 6
            last = step if new else last
            want.append(new)
        assert [made[row] for made in seen] == want


@pytest.mark.parametrize("text", [
    "recycled_attention:stride=6,tau=0.5",
    "recycled_attention:budget=1500,stride=6,tau=none",
    "recycled_attention:budget=5,stride=13,tau=none",  # more tokens than places
    "pillar_attn",
    "pillar_attn:draft=3,ratio=0.2",
])  # fmt: skip
@pytest.mark.parametrize("lengths", [(8150,), (8150, 1500)])
def test_sets_are_those_of_plain_code(text, lengths):
    """Steps that choose, steps that use the set again, and a check that one turned query makes a full step."""
    seen = cases.same_sets(
        text, len(lengths), 32, 8, 8192, 128, lengths=lengths, steps=14, turns=(12,), dtype=torch.bfloat16, tolerance=1e-2,
        slack=0.01, **GPU,
    )  # fmt: skip
    assert seen[0] == 1 and max(seen[1:3]) < 0.25
    if "tau=0.5" in text:
        assert seen[12] > 0.5 and max(seen[6:12]) < 0.25


@pytest.mark.parametrize("n,size", [(16400, 16384), (5, 4), (2048, 2048), (30000, 20000)])
def test_kept_lists(n, size):
    cases.check_kept(n, size, (1, 9, size - 1, size + 1, size + 700), **GPU)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [
    (1, 32, 8, 20011, 128, 2688, (2688,)),
    (3, 16, 2, 2000, 64, 300, (300, 299, 1)),
    (2, 6, 2, 1500, 96, 1111, (1111, 400)),
    (1, 16, 1, 1000, 256, 640, (640,)),
    (16, 32, 8, 700, 128, 600, tuple(range(150, 600, 29))),
])  # fmt: skip
@pytest.mark.parametrize("mixed", [False, True])  # halves turn together, or neighbours
def test_lists_that_count_their_own_positions(shape, name, mixed):
    tolerance = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}[name]
    cases.check_ranked(
        *shape, tolerance=tolerance, softcap=3.0 if shape[0] == 2 else None, dtype=getattr(torch, name), mixed=mixed, **GPU
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_steps_are_the_steps(recipe, rows):
    capturing.check_model(recipe, rows, prompt=600, new=50, eager=8)


@pytest.mark.parametrize("text", [
    "token_select:budget=1024", "token_select@cached", "longheads", "recycled_attention", "pillar_attn", "topk_exact",
    "tidal_decode",
])  # fmt: skip
def test_a_step_waits_for_nothing_and_repeats(text):
    """Steps after the first: no synchronisation, and equal bits from equal calls."""
    step = cases.Turning(text, 1, 32, 8, 1 << 15, 128, lengths=((1 << 15) - 8,), dtype=torch.bfloat16, **GPU)
    x = [step.inputs(i) for i in range(21)]
    for i in range(11):
        step.run(x[i])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [step.run(x[i])[1] for i in range(11, 21)]  # each kind of step
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = cases.Turning(text, 1, 32, 8, 1 << 15, 128, lengths=((1 << 15) - 8,), dtype=torch.bfloat16, **GPU)
    outs = [again.run(x[i])[1] for i in range(21)]
    assert all(torch.equal(a, b) for a, b in zip(got, outs[11:], strict=True))


def test_long_caches_hold_little_memory():
    """Scores of 128K keys: fp32 numbers a head and key, no copy of the keys; plain code converts them."""
    q, kv, q_pos = cases.problem(1, 32, 8, 1 << 17, 128, dtype=torch.bfloat16, **GPU)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = observed.group_probabilities(q, kv, q_pos, scale=128**-0.5)
    assert torch.cuda.max_memory_allocated() - before < 32 * (1 << 17) * 4 * 1.5
    with plain():
        want = observed.group_probabilities(q, kv, q_pos, scale=128**-0.5)
    torch.testing.assert_close(got, want, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("n,m,options", [
    (6567, 131072, dict(ratio=0.05, least=128)),
    (6567, 131072, dict(ratio=0.04, least=128, ago=5, ties=True)),
    (300, 900, dict(ratio=0.9, least=30)),
    (16384, 20000, dict(ratio=0.5, least=1)),
])  # fmt: skip
def test_strongest(n, m, options):
    cases.check_strongest(n, m, **options, **GPU)
