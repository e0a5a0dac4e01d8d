"""The best single entries on a GPU, index by index: lengths, ties, rows that mislead a sample, CUDA graphs, equal runs."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.kernels.triton import select_entries_launch as chosen
    from tests import label_cases as cases

    CHOICES, HARD = cases.CHOICES, cases.HARD
else:
    CHOICES, HARD = [], []


def check(score, keep, length=None, late=False, **options):
    want, got = (best(score, keep, length=length, late=late, **options) for best in (cases.law, chosen.best_entries))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16], ids=str)
@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_choice(case, dtype):
    """Short rows at once, long ones by parts; odd lengths, ties, NaN and infinities."""
    for m in (1, 33, 1000, 8192, 8193, 40001, (1 << 17) + 37):
        if case[1] <= m or case[1] > 1000:
            cases.check_choice(chosen, case, m, dtype, "cuda")


def test_choice_of_whole_numbers():
    """int32 ranks as fp32 does, also where that rounds."""
    gen = torch.Generator(device="cuda").manual_seed(0)
    score = torch.randint(-(1 << 31), (1 << 31) - 1, (1, 3, 60_000), device="cuda", generator=gen).int()
    score[0, 1] = (1 << 30) + score[0, 1] % 1000
    for keep in (100, 3000):
        check(score, keep)


@pytest.mark.parametrize("keep", [1, 128, 1024, 2048, 6500, 16384, 32768])
def test_choice_of_many(keep):
    """At 128K; rows whose best entries lie side by side, equal scores everywhere, one block of them, and close scores."""
    m = 1 << 17
    lists = torch.randn(1, 6, m, device="cuda")
    lists[0, 1] = torch.linspace(0, 1, m, device="cuda")
    lists[0, 2] = 1.0
    lists[0, 3] = (torch.arange(m, device="cuda") // 3000 == 7).float()
    lists[0, 4] = cases.close(m, device="cuda")[0, 0]
    lists[0, 5] = cases.close(1000, device="cuda")[0, 0].repeat(m // 1000 + 1)[:m]
    length = torch.tensor([[m, 100_001, m - 1, m, 77_777, 500]], dtype=torch.int32, device="cuda")
    beyond = lists.masked_fill(torch.arange(m, device="cuda") >= length[..., None], float("nan"))
    for late in (False, True):
        check(lists, keep, None, late)
        check(beyond, keep, length, late)
        check(beyond[:, [0, 2, 4, 5]].repeat(1, 8, 1), keep, length[:, [0, 2, 4, 5]].repeat(1, 8), late)  # larger parts


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("m", [20_001, 1 << 17, (1 << 19) + 3])
def test_hard_rows(name, m):
    score, options = cases.hard(name, m, 2, "cuda")
    for keep in (17, 1024, 5000):
        for late in (False, True):
            check(score, keep, None, late, **options)
    check(score, m)
    check(score, m - 1)


@pytest.mark.parametrize("rows", [1, 8, 33, 64])
def test_rows_share_the_machine(rows):
    """Parts of every size, rows of all lengths, from none on; local and sink entries."""
    m = 70_016
    gen = torch.Generator(device="cuda").manual_seed(rows)
    score = torch.randn(rows, 1, m, device="cuda", generator=gen)
    length = torch.randint(600, m + 1, (rows, 1), device="cuda", generator=gen, dtype=torch.int32)
    length[:: max(2, rows // 7)] = torch.randint(600, 3000, (1,), device="cuda", generator=gen, dtype=torch.int32)
    for keep in (600, 2500):
        check(score, keep, length, sink=64, recent=512)
        check((40 * score).to(torch.int16), keep, length, True, sink=64, recent=512)
    length[0] = 0
    assert chosen.best_entries(score, 10, length=length)[1][0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16], ids=str)
def test_choice_of_a_million(dtype):
    gen = torch.Generator(device="cuda").manual_seed(0)
    score = (100 * torch.randn(2, 1, (1 << 20) + 5, device="cuda", generator=gen)).to(dtype)
    length = torch.tensor([[1 << 20], [3]], dtype=torch.int32, device="cuda")
    for keep in (128, 2048, 16384):
        for late in (False, True):
            check(score, keep, length, late)


def test_a_sample_that_misleads():
    """Fewer entries than asked for reach what the sample promises: the row is gone through."""
    score = cases.misleading(1 << 17, chosen.SAMPLES[1], "cuda")
    assert int((score == 100).sum()) < 5000
    for late in (False, True):
        check(score, 5000, None, late)
        check(score, 5000, torch.tensor([[1 << 17]], dtype=torch.int32, device="cuda"), late)


@pytest.mark.parametrize("room", [(1024, 32), (1024, 2200)])
def test_lists_that_overflow(room, monkeypatch):
    """No room in a part for what it should list; no room for its ties."""
    monkeypatch.setattr(chosen, "_expected", lambda *given: room)
    for name in ("few positive", "ties", "a run"):
        for late in (False, True):
            check(cases.hard(name, 100_000, 3, "cuda")[0], 1000, None, late)


@pytest.mark.parametrize("held", [1024, 4096])
def test_more_than_a_program_holds(held, monkeypatch):
    """What is listed is gone through in pieces, in every round of the search: the same choice as at once."""
    monkeypatch.setattr(chosen, "HELD", (held, held))
    for name in HARD:
        score, options = cases.hard(name, 1 << 17, 2, "cuda")
        for late in (False, True):
            check(score, 6500, None, late, **options)
            check(score, 900, None, late, **options)
    for seed in range(20):
        gen = torch.Generator(device="cuda").manual_seed(seed)
        check(torch.randn(1, 3, 100_001, device="cuda", generator=gen), 2048, None, seed % 2 == 1)


def test_many_parts():
    """Up to 128 of a row, most of which list nothing."""
    gen = torch.Generator(device="cuda").manual_seed(0)
    for m in (300_001, (1 << 20) + 3):
        score = torch.randn(1, 1, m, device="cuda", generator=gen)
        score[0, 0, m // 9 : m // 2] = -9.0
        score[0, 0, m - m // 4 :] -= 7.0
        for keep in (200, 2048, 9000):
            check(score, keep, None, keep == 200)
            check(score, keep, torch.tensor([[m - m // 3]], dtype=torch.int32, device="cuda"), sink=4, recent=64)


def test_many_draws():
    """3,000 rows, then 300 of more to choose: whatever the sample says of them, the choice is exact."""
    for seed in range(50):
        gen = torch.Generator(device="cuda").manual_seed(seed)
        score = torch.randn(1, 60, 33_000, device="cuda", generator=gen)
        check(score, (40, 300, 1500)[seed % 3], None, seed % 2 == 1)
        score = torch.randn(1, 6, 1 << 17, device="cuda", generator=gen)
        check(score if seed % 2 else score.exp(), (1024, 2048, 6500)[seed % 3], None, seed % 2 == 1)


@pytest.mark.parametrize("early", [False, True])
def test_a_choice_in_a_graph(early, monkeypatch):
    """Replays read new scores and lengths, leave nothing behind for the next one, and wait for nothing."""
    monkeypatch.setattr(chosen, "EARLY", early and torch.cuda.get_device_capability()[0] >= 9)
    score = torch.randn(2, 4, 50_000, device="cuda")
    length = torch.tensor([[50_000, 40_000], [20_000, 30]], dtype=torch.int32, device="cuda")
    chosen.best_entries(score, 500, length=length)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index, count = chosen.best_entries(score, 500, length=length)
    for i in range(10):
        score.copy_(torch.randn_like(score) if i % 2 else torch.randint_like(score, 9))
        length[1, 1] += 7000
        length.clamp_(max=50_000)
        graph.replay()
        want = cases.law(score, 500, length=length)
        assert torch.equal(index, want[0]) and torch.equal(count, want[1])


def test_runs_are_equal_and_wait_for_nothing():
    score = torch.randn(1, 16, 100_000, device="cuda").round(decimals=1)
    first = chosen.best_entries(score, 3000)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [chosen.best_entries(score, 3000) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(run[0], first[0]) for run in runs)
