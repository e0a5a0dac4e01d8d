"""The best single entries: the plain code against a sort, the kernels in Triton's interpreter (a process of its own)."""

from __future__ import annotations

import os

import pytest
import torch

from foveate.scores.entries import best_entries
from tests.compiling import hopper
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    @pytest.mark.parametrize("late", [False, True])
    def test_the_plain_choice_is_a_sort(late):
        """Forced entries first, then the score, then the entry number; entries beyond the length do not exist."""
        gen = torch.Generator().manual_seed(0)
        score, length = torch.randint(0, 5, (2, 4, 50), generator=gen), torch.tensor([[50, 31], [4, 9]])
        index, count = best_entries(score, 12, length=length, sink=2, recent=3, late=late)
        for b in range(2):
            for r in range(4):
                n = int(length[b, r // 2])
                forced = lambda i, n=n: i >= 2 and i < n - 3  # noqa: E731
                order = sorted(range(n), key=lambda i: (forced(i), -int(score[b, r, i]), -i if late else i))
                want = sorted(order[:12])
                assert int(count[b, r]) == len(want)
                assert index[b, r].tolist() == want + [want[-1]] * (12 - len(want))

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """At 128K: scores are read 16 bytes at once, keys too; nothing is spilled."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import select_entries, select_entries_listed, select_entries_long
        from foveate.kernels.triton import select_entries_launch as chosen

        meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        length = meta(1, 8, dtype=torch.int32)
        with (
            hopper(monkeypatch, tmp_path, select_entries_listed, "choose_listed") as listed,
            hopper(monkeypatch, tmp_path, select_entries_long, "list_entries") as long,
        ):
            chosen.best_entries(meta(1, 32, 1 << 17), 1024, length=length)
            chosen.best_entries(meta(1, 8, 1 << 17, dtype=torch.int16), 128, length=length, late=True)
        with hopper(monkeypatch, tmp_path, select_entries, "choose") as short:
            chosen.best_entries(meta(1, 32, 8192), 1024, length=length)
        assert [len(built) for built in (long, listed, short)] == [2, 2, 1]
        for name, done, usage in long + listed + short:
            assert usage["STACK"] == 0, name
            assert "ld.global.v4.b32" in done.asm["ptx"], name

else:
    from foveate.kernels.triton import select_entries_launch as chosen
    from tests import label_cases as cases

    @pytest.fixture(autouse=True)
    def few(monkeypatch):
        """Rows of a few hundred entries go the way of long ones: parts of 256, in two steps."""
        monkeypatch.setattr(chosen, "device", lambda index: (1 << 17, 2))
        monkeypatch.setattr(chosen, "ONE", 256)
        monkeypatch.setattr(chosen, "PARTS", (128, 256))
        monkeypatch.setattr(chosen, "STEP", 128)
        monkeypatch.setattr(chosen, "SAMPLES", (64, 64))
        monkeypatch.setattr(chosen, "HELD", (64, 256))

    def check(score, keep, late=False, **options):
        want, got = (best(score, keep, late=late, **options) for best in (cases.law, chosen.best_entries))
        assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])

    @pytest.mark.parametrize("case", [cases.CHOICES[1], *cases.CHOICES[3:6], cases.CHOICES[8]], ids=str)
    def test_choice(case):
        """Four lists of int16 with ties (the late ones: `test_at_the_edges`), lists that share a length, a list of two kv
        heads, only what is forced, and whole rows, one of them as long as there is room."""
        cases.check_choice(chosen, case, 300, torch.int16 if case[-1] and case[0] == 4 else torch.float32)

    @pytest.mark.parametrize("late", [False, True])
    def test_at_the_edges(late):
        """Rows of no entry, of those that are forced, of fewer than asked for; the least and the highest score there is."""
        score = -torch.randint(0, 3, (2, 2, 300), generator=torch.Generator().manual_seed(0)).to(torch.int16)
        score[..., ::7], score[..., 5::90] = -32768, 32767
        options = dict(length=torch.tensor([[0, 2], [9, 290]]), sink=1, recent=1, late=late)
        want, got = cases.law(score, 10, **options), chosen.best_entries(score, 10, **options)
        assert got[1].tolist() == want[1].tolist() == [[0, 2], [9, 10]]
        assert torch.equal(got[0].flatten(0, 1)[1:], want[0].flatten(0, 1)[1:]) and not got[0][0, 0].any()

    @pytest.mark.parametrize("name", cases.HARD)
    def test_hard_rows(name):
        for late in (False, True) if name == "equal" else (name == "ties",):  # late ones of a few positive: below
            score, options = cases.hard(name, 500)
            check(score, 60 if late else 20, late, **options)

    def test_all_of_a_row_but_one():
        check(cases.close(270), 269)

    def test_more_than_a_program_holds(monkeypatch):
        """128 are held, what is listed is gone through in every round."""
        monkeypatch.setattr(chosen, "HELD", (64, 64))
        check(cases.hard("few positive", 400)[0], 60, late=True)
        check(cases.close(400), 90)

    def test_more_parts_than_a_warp_has_threads(monkeypatch):
        """34 parts, and with these 64 numbers across a warp."""
        monkeypatch.setattr(chosen, "device", lambda index: (1 << 17, 64))
        monkeypatch.setattr(chosen, "HELD", (64, 2048))
        score = cases.close(4300)
        score[0, 0, 700:1900] = 0.0  # parts that list nothing
        check(score, 30, sink=1, recent=5)

    @pytest.mark.parametrize("late", [False, True])
    def test_lists_that_overflow(monkeypatch, late):
        """No part has room for what it should list: the row is gone through."""
        monkeypatch.setattr(chosen, "_expected", lambda *given: (64, 4))
        monkeypatch.setattr(chosen, "HELD", (128, 128))
        check(cases.hard("ties", 300)[0], 40, late)

    @pytest.mark.parametrize("late", [False, True])
    def test_more_ties_than_a_list_has_room_for(monkeypatch, late):
        monkeypatch.setattr(chosen, "_expected", lambda *given: (256, 160))
        check(cases.hard("few positive", 500)[0], 60, late)

    def test_a_sample_that_misleads():
        """It promises more than the row has: fewer than asked for reach the bound."""
        score = cases.misleading(600, 64)
        assert int((score == 100).sum()) == 60
        check(score, 100)

    def test_a_row_at_once():
        cases.check_choice(chosen, cases.CHOICES[2], 250)
