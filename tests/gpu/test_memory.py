"""What executing a layout costs in memory: q, k, v, out and the layout's own bytes, and little else."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.bench import workloads
from foveate.layout import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N, H, G, D = 131072, 32, 8, 128


@pytest.mark.parametrize("kind", ["blocks", "factored", "static"])
def test_a_128k_layout_runs_within_a_fifth_more(kind):
    """Peak bytes of attend() at about 10 % density, against inputs, output and layout."""
    dev = torch.device("cuda")
    if kind == "blocks":
        layout = workloads.random_blocks(H, N, 0.1, device=dev)
    elif kind == "factored":
        layout = workloads.diagonals_and_columns(H, N, device=dev)
    else:
        layout = Layout.static((1, H, N, N), sink=4, window=6000, device=dev)
    q = torch.randn(1, H, N, D, device=dev, dtype=torch.bfloat16)
    k, v = (torch.randn(1, G, N, D, device=dev, dtype=torch.bfloat16) for _ in range(2))
    foveate.attend(q, (k, v), layout)  # what a first call loads
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = foveate.attend(q, (k, v), layout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    whole = sum(t.numel() * t.element_size() for t in (q, k, v, out)) + layout.nbytes
    held = whole - out.numel() * out.element_size()  # allocated before the call
    assert held + peak <= 1.2 * whole, f"{(held + peak) / whole:.2f} times q, k, v, out and the layout"
