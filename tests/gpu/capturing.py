"""CUDA graphs in tests: a step recorded once and replayed over changing memory, or the decode steps of a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import foveate
from tests.models import generate, tiny, tokens


def record(step: Callable[[], Any], before: Callable[[], Any] = lambda: None, warm: bool = True) -> tuple[Any, Any]:
    """(graph, what the recorded call returned: memory that a replay writes).

    `step` runs on a side stream first, unless not `warm`: what a first call allocates or compiles is not recorded.
    `before` runs ahead of each of the two calls, outside the graph.
    """
    if warm:
        before()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
    before()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    return graph, got


def check_replays(graph: Any, times: int, change: Callable[[], Any], check: Callable[[int], Any], every: int = 1) -> None:
    """Change what the recorded step reads, replay it and, `every` so many replays, check what it wrote."""
    for i in range(times):
        change()
        graph.replay()
        if i % every == 0:
            check(i)


def small(**options: Any) -> Any:
    """A model of four layers with 4 query and 2 kv heads of 64, fp32, on the GPU."""
    sizes = dict(num_hidden_layers=4, hidden_size=256, head_dim=64, max_position_embeddings=4096)
    return tiny(**sizes, **options).to("cuda", torch.float32)


def check_model(recipe: str, rows: int, prompt: int = 700, new: int = 40, eager: int = 4) -> None:
    """Replayed decode steps say what steps one by one say; all but `eager` are replays. Of several rows one is padded."""
    model, ids = small(), tokens(rows, prompt).cuda()
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :133] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=new, min_new_tokens=new)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    with foveate.use(model, recipe, graphs=True) as handle:
        got = run()
        assert handle.graphs.replays >= new - eager, handle.notes
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-3, rtol=1e-3)
