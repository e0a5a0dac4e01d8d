"""Kernels of labels and of the best single entries: in Triton's interpreter (a process of its own) and compiled."""

from __future__ import annotations

import os

import pytest
import torch

from foveate.scores.entries import best_entries
from tests.compiling import hopper
from tests.processes import run_in_the_interpreter, runs_without_triton

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_no_triton_without_a_device():
        code = (
            "import torch; from foveate.scores.entries import best_entries; from foveate.scores.labels import Codes;"
            "from foveate.kv import KV; k = torch.randn(1, 2, 100, 32); kv = KV.dense(k, k);"
            "best_entries(Codes(32, 1.0, False, k.device).rank(k[:, :, :1], kv, 0, group=True), 9)"
        )
        runs_without_triton(code)

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
        """At 128K: nothing spills where a key is scored, and bits are counted by the machine's own instruction."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import labels, labels_launch, labels_words, select_entries, select_entries_long
        from foveate.kernels.triton import select_entries_launch as chosen
        from foveate.kv import KV

        meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        q, k, length = meta(1, 32, 1, 128), meta(1, 8, 1 << 17, 128), meta(1, 8, dtype=torch.int32)
        kv, table = KV.dense(k, k, len=length), meta(1, 8, 64, dtype=torch.int64)
        names = ("score_channels", "code_rows", "near_codes")
        with hopper(monkeypatch, tmp_path, labels, *names) as scored:
            labels_launch.score(q, kv, table[..., :32], [meta(1, 8, 1 << 17, 32)], 16, group=False, append=True)
            labels_launch.near(q, kv, meta(1, 8, 1 << 17, 8, dtype=torch.int32), 1.0, None, group=False, append=True)
        with hopper(monkeypatch, tmp_path, labels_words, "query_words", "score_words") as words:
            data = [meta(1, 8, 1 << 17, 16, dtype=torch.uint8), meta(1, 8, 1 << 17, 2, dtype=torch.float16)]
            labels_launch.score(q, kv, table, data, 2, group=False, append=True)
        with hopper(monkeypatch, tmp_path, select_entries_long, "count_digit", "write_chunks") as choices:
            chosen.best_entries(meta(1, 32, 1 << 17, dtype=torch.float32), 1024, length=length)
        with hopper(monkeypatch, tmp_path, select_entries, "block_peaks", "choose") as short:
            chosen.best_entries(meta(1, 32, 4096, dtype=torch.float32), 1024, length=length)
            chosen.best_entries(meta(1, 32, 1 << 17, dtype=torch.int16), 128, length=length, late=True)
        assert [name for name, _, _ in scored] == list(names) and len(choices) == 4 and len(short) == 4
        for name, _, usage in scored + words + choices + short:
            assert usage["STACK"] <= (32 if name in ("count_digit", "write_chunks") else 0), name  # 64 registers are theirs
        scoring = words[1][1]
        assert (
            scoring.asm["ptx"].count("dp4a.u32.u32") == 2 * (4 + 4 * 16) and scoring.metadata.shared == 0
        )  # 2 keys a thread
        adds = [done.asm["ptx"].count("red.shared") for _, done, _ in choices]
        assert adds == [16, 16, 16, 0]  # one a key: a digit is counted once, not again for each layout of the result
        assert scored[2][1].asm["ptx"].count("popc.b32") == 64  # 4 words of 2 numbers for 4 heads and 2 keys a thread

else:
    from foveate.kernels.triton import labels_launch, paging_launch
    from foveate.kernels.triton import select_entries_launch as chosen
    from foveate.methods.adamas import Adamas
    from foveate.methods.double_sparsity import DoubleSparsity
    from tests import label_cases as cases

    LENGTHS = [((70, 70), (66, 71)), ((64, 31), (1, 80)), None]

    @pytest.fixture(autouse=True)
    def few(monkeypatch):
        """Few programs a row: the interpreter takes as long for a small one as for a large one."""
        monkeypatch.setattr(labels_launch, "device", lambda index: (1 << 17, 2))

    @pytest.fixture
    def short(monkeypatch):
        """Rows of a few hundred entries go the way of long ones."""
        monkeypatch.setattr(chosen, "ONE", 256)
        monkeypatch.setattr(chosen, "CHUNKS", (128, 256))
        monkeypatch.setattr(chosen, "FEW", 0)
        monkeypatch.setattr(chosen, "PEAKS", 256)

    @pytest.mark.parametrize("case", cases.CHOICES, ids=str)
    def test_choice(short, case):
        cases.check_choice(chosen, case, 513, torch.int16 if case[-1] and case[0] == 4 else torch.float32)

    @pytest.mark.parametrize("case", [*cases.CHOICES[1:6], (2, 9, ((1.0,), (0.3,)), 0, 1, True, False)], ids=str)
    def test_choice_through_peaks(short, monkeypatch, case):
        """Blocks of 2 to 8 entries, the last one cut; rows of fewer blocks than are asked for."""
        monkeypatch.setattr(chosen, "FEW", 512)
        cases.check_choice(chosen, case, 513, torch.int16 if case[-1] and case[0] == 4 else torch.float32)

    @pytest.mark.parametrize("few", [0, 512])
    @pytest.mark.parametrize("late", [False, True])
    def test_choice_at_the_edges(short, monkeypatch, few, late):
        """Rows of no entry, of those that are forced, of fewer than asked for; the least and the highest score there is."""
        monkeypatch.setattr(chosen, "FEW", few)
        score = -torch.randint(0, 3, (2, 2, 300), generator=torch.Generator().manual_seed(0)).to(torch.int16)
        score[..., ::7], score[..., 5::90] = -32768, 32767
        options = dict(length=torch.tensor([[0, 2], [9, 290]]), sink=1, recent=1, late=late)
        want, got = cases.law(score, 10, **options), chosen.best_entries(score, 10, **options)
        assert got[1].tolist() == want[1].tolist() == [[0, 2], [9, 10]]
        assert torch.equal(got[0].flatten(0, 1)[1:], want[0].flatten(0, 1)[1:]) and not got[0][0, 0].any()

    def test_keys_that_differ_in_their_last_digit(short):
        score = cases.close(700)
        for keep, late in ((300, False), (5, True)):
            assert torch.equal(chosen.best_entries(score, keep, late=late)[0], cases.law(score, keep, late=late)[0])

    def test_a_row_at_once():
        cases.check_choice(chosen, cases.CHOICES[2], 250)

    @pytest.mark.parametrize("r,d,n,bits", cases.LABELS)
    def test_channels(r, d, n, bits):
        kind, lens = ("paged", LENGTHS[0]) if bits == 4 else ("dense", None if bits == 8 else LENGTHS[1])
        dtype = torch.float16 if bits == 8 else torch.float32  # fp16 rounds a step, which 8 bits notice
        for group in (False, True):
            q, kv = cases.problem(r, d, lens, kind, dtype, seed=bits)
            cases.check_labels(cases.channels(d, n, bits, learnt=bits == 4), q, kv, group, 1e-4)

    @pytest.mark.parametrize("r,d,spread", cases.CODES)
    def test_codes(r, d, spread):
        """The same codes and the same distances, without tolerance."""
        for group in (False, True):
            q, kv = cases.problem(r, d, None if r == 1 else LENGTHS[0], "paged" if group and r > 1 else "dense", seed=d)
            cases.check_labels(cases.codes(d, spread), q, kv, group, 0)

    @pytest.mark.parametrize(
        "method", [DoubleSparsity(budget=20, dense_layers=0), Adamas(budget=20, theta=0.5, share="group")]
    )
    def test_a_step(method):
        q, kv = cases.problem(4, 64, ((150, 150), (77, 70)))
        cases.check_step(method, q, kv, 3e-5)

    def test_what_the_plain_code_serves():
        q, kv = cases.problem(4, 64, LENGTHS[0])
        assert cases.codes(64, False)()._kernels(q, kv) is labels_launch
        pos = torch.zeros(2, 2, kv.capacity, dtype=torch.int32)
        for view in (cases.replace(kv, pos=pos), cases.replace(kv, bias=pos.float()), cases.replace(kv, kind="ragged")):
            assert cases.codes(64, False)()._kernels(q, view) is None
        q, kv = cases.problem(4, 16, LENGTHS[0])
        assert cases.codes(16, False)()._kernels(q, kv) is None and paging_launch.INTERPRET
