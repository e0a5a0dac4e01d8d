"""Kernels of labels beside keys: in Triton's interpreter (a process of its own) and compiled."""

from __future__ import annotations

import os

import pytest
import torch

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

    def test_compiles_for_hopper(monkeypatch, tmp_path):
        """At 128K: nothing spills where a key is scored, and bits are counted by the machine's own instruction."""
        pytest.importorskip("triton")
        from foveate.kernels.triton import labels, labels_launch, labels_words
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
        assert [name for name, _, _ in scored] == list(names)
        for name, _, usage in scored + words:
            assert usage["STACK"] == 0, name
        scoring = words[1][1]
        assert (
            scoring.asm["ptx"].count("dp4a.u32.u32") == 2 * (4 + 4 * 16) and scoring.metadata.shared == 0
        )  # 2 keys a thread
        assert scored[2][1].asm["ptx"].count("popc.b32") == 64  # 4 words of 2 numbers for 4 heads and 2 keys a thread

else:
    from foveate.kernels.triton import labels_launch, paging_launch
    from foveate.methods.adamas import Adamas
    from foveate.methods.double_sparsity import DoubleSparsity
    from tests import label_cases as cases

    LENGTHS = [((70, 70), (66, 71)), ((64, 31), (1, 80)), None]

    @pytest.fixture(autouse=True)
    def few(monkeypatch):
        """Few programs a row: the interpreter takes as long for a small one as for a large one."""
        monkeypatch.setattr(labels_launch, "device", lambda index: (1 << 17, 2))

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
