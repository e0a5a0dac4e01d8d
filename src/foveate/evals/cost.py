"""What a recipe costs at a length: time to first token, decode step, bytes, density; recipes alternate in rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters.transformers import use
from ..diagnosis import Diagnosis
from ..measure import StopWatch
from ..recipe import Recipe

STEPS = 16  # decode steps of a round


def cost(
    model: Any,
    recipe: Recipe,
    ids: Tensor,
    *,
    watch: bool,
    backend: str | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """One round on a prompt `[1, N]`: seconds of the prefill and of a median decode step, bytes of the cache.

    With `watch` a second, untimed pass adds densities and the first pass of the model is a warm-up that is not timed.
    """
    on_host = ids.device.type == "cpu"  # elsewhere the clock around `plan` sees only launches
    with use(model, recipe, backend=backend, graphs=not on_host) as handle, torch.no_grad():
        if watch:
            handle.meter = seen = Diagnosis(recipe, backend, seed=seed)
            _generate(model, ids, 3, tick)
        clock = StopWatch(lambda phase: None)
        handle.meter = clock if on_host else None  # steps that are watched are not captured
        seconds, cache = _generate(model, ids, STEPS + 1, tick)
        values = {
            "first_token": seconds[0],
            "step": statistics.median(seconds[1:]),
            "kv_bytes": float(cache.nbytes),
        }
        if on_host:
            values["estimator"] = clock.seconds["prefill"] / seconds[0]
            values["decode_estimator"] = clock.seconds["decode"] / sum(seconds[1:])
        if watch:
            shares = {"": "prefill", "decode_": "decode"}
            found = {f"{p}density": seen.named[n].value for p, n in shares.items()}
            found |= {f"{p}computed": seen.computed[n].value for p, n in shares.items()}
            values |= {name: float(v) for name, v in found.items() if v is not None}
    return values


def _generate(model: Any, ids: Tensor, count: int, tick: Callable[[int], None]) -> tuple[list[float], Any]:
    seconds: list[float] = []
    cache = None
    for _ in range(count):
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        began = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tick(int(ids.shape[1]))
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        ids.tolist()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds, cache
