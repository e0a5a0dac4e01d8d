"""Partial softmaxes put together by one kernel, on the device."""

from __future__ import annotations

import pytest
import torch

from tests.join_cases import check

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts, heads, n, d", [(2, 32, 4099, 128), (3, 8, 1, 64), (3, 5, 700, 80)])
def test_one_kernel(parts, heads, n, d, dtype, transposed):
    check(parts, heads, n, d, dtype, "cuda", transposed)
