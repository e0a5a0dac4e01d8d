"""Partial softmaxes put together by one kernel: in Triton's interpreter (a process of its own) and when it is not asked."""

from __future__ import annotations

import os

import pytest
import torch

from foveate.combine import merge
from foveate.kernels.join import _twin, joined
from tests.join_cases import check
from tests.processes import run_in_the_interpreter

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        pytest.importorskip("triton")
        run_in_the_interpreter(__file__)

    def test_on_the_cpu_it_is_merge():
        parts = [(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)) for _ in range(3)]
        for got, want in zip(joined(parts), merge(parts), strict=True):
            assert torch.equal(got, want)

else:

    @pytest.mark.parametrize("parts", [2, 3])
    @pytest.mark.parametrize("n, d, dtype", [(70, 80, torch.float32), (33, 64, torch.float16)])
    def test_one_kernel(parts, n, d, dtype):
        check(parts, 3, n, d, dtype, "cpu", transposed=n == 33)

    def test_what_it_refuses():
        one = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5)
        twin = _twin()
        assert "1 parts" in twin.why_not([one])
        assert "4 parts" in twin.why_not([one] * 4)
        assert "gradients" in twin.why_not([one, (one[0].clone().requires_grad_(), one[1])])
        assert "fp32" in twin.why_not([one, (one[0], one[1].double())])
        assert "outputs of other shapes" in twin.why_not([one, (one[0][:, :, 1:], one[1][:, :, 1:])])
        assert "another shape than their outputs" in twin.why_not([one, (one[0], one[1][:, :, 1:])])
        for got, want in zip(joined([one] * 4), merge([one] * 4), strict=True):
            assert torch.equal(got, want)
