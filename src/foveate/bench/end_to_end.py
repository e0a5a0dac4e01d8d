"""Whole-model timing in alternating rounds: stock transformers with SDPA, recipe dense, and other recipes.

Every round runs all subjects once, and every second round in reverse order, so that a slow drift of the machine hits
them alike. Wall time and CPU time of the process are both kept: on shared cores the second is the steadier one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..facts import facts
from ..measure import Progress
from ..prompts import Prompt, check_fits
from ..recipe import Recipe
from . import results

STOCK = "transformers sdpa"
PREFILL = ("dense", "flexprefill@8k")
DECODE = ("dense", "decode=quest@8k")
WARM_TOKENS = 2048


def prefill(
    model: Any,
    prompt: Prompt,
    recipes: Sequence[str] = PREFILL,
    *,
    rounds: int = 4,
    backend: str | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Time to first token of each subject, `rounds` times. Returns facts and one row a subject, with every sample."""
    _check(model, prompt, rounds, 1)
    ids = _ids(model, prompt)
    subjects = _subjects(model, recipes, backend)
    for subject in subjects.values():
        subject(lambda: _step(model, ids[:, :WARM_TOKENS], None))
    samples: dict[str, list[tuple[float, float]]] = {key: [] for key in subjects}
    for key, share in _order(list(subjects), rounds):
        if progress:
            progress(key, share)
        samples[key].append(subjects[key](lambda: _timed(model, lambda: _step(model, ids, None))))
    return _result("prefill", model, prompt, backend, name, samples, 1)


def decode(
    model: Any,
    prompt: Prompt,
    recipes: Sequence[str] = DECODE,
    *,
    rounds: int = 6,
    steps: int = 8,
    backend: str | None = None,
    progress: Progress | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Seconds per decode step after the prompt. Each subject prefills its own cache once, untimed, and keeps it."""
    _check(model, prompt, rounds, rounds * steps + 2)
    ids = _ids(model, prompt)
    subjects = _subjects(model, recipes, backend)
    held: dict[str, tuple[Tensor, Any]] = {}
    for i, (key, subject) in enumerate(subjects.items()):
        if progress:
            progress(f"{key}: prompt", 0.5 * i / len(subjects))
        token, cache = subject(lambda: _step(model, ids, None))
        held[key] = subject(lambda token=token, cache=cache: _step(model, token, cache))  # compresses, warms up
    samples: dict[str, list[tuple[float, float]]] = {key: [] for key in subjects}
    for key, share in _order(list(subjects), rounds):
        if progress:
            progress(key, 0.5 + 0.5 * share)

        def several(key: str = key) -> None:
            for _ in range(steps):
                held[key] = _step(model, *held[key])

        wall, cpu = subjects[key](lambda run=several: _timed(model, run))
        samples[key].append((wall / steps, cpu / steps))
    return _result("decode", model, prompt, backend, name, samples, steps)


# ---------------------------------------------------------------------- subjects
def _subjects(model: Any, recipes: Sequence[str], backend: str | None) -> dict[str, Callable[..., Any]]:
    """Name -> a function that calls something with that subject's attention in place."""
    from ..adapters.transformers import use

    def stock(call: Callable[[], Any]) -> Any:
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            return call()
        finally:
            model.set_attn_implementation(before)

    def under(recipe: Recipe) -> Callable[..., Any]:
        def call_it(call: Callable[[], Any]) -> Any:
            with use(model, recipe, backend=backend, graphs=model.device.type == "cuda"):
                return call()

        return call_it

    out: dict[str, Callable[..., Any]] = {STOCK: stock}
    for text in ["dense", *recipes]:
        out.setdefault(text, under(Recipe.of(text)))
    return out


def _order(keys: list[str], rounds: int) -> list[tuple[str, float]]:
    """ABC, CBA, ABC, ... with the share of the work done before each."""
    whole = [key for i in range(rounds) for key in (keys if i % 2 == 0 else keys[::-1])]
    return [(key, i / len(whole)) for i, key in enumerate(whole)]


def _step(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def _timed(model: Any, call: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of a call, waiting for the device."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


# ---------------------------------------------------------------------- results
def _check(model: Any, prompt: Prompt, rounds: int, new_tokens: int) -> None:
    if rounds < 1:
        raise ConfigError(f"rounds: expected at least 1, got {rounds}")
    check_fits(prompt, getattr(model.get_decoder().config, "max_position_embeddings", None), new_tokens)


def _ids(model: Any, prompt: Prompt) -> Tensor:
    return prompt.ids.to(next(model.parameters()).device)


def _result(
    what: str,
    model: Any,
    prompt: Prompt,
    backend: str | None,
    name: str,
    samples: dict[str, list[tuple[float, float]]],
    steps: int,
) -> dict[str, Any]:
    """A result file's contents (see `results`): wall time in `ms`, CPU time and the ratio to dense in `params`."""
    base = statistics.median(wall for wall, _ in samples["dense"])
    rows = []
    for key, pairs in samples.items():
        wall, cpu = [1000 * w for w, _ in pairs], [1000 * c for _, c in pairs]
        params = {
            "tokens": prompt.tokens,
            "steps": steps,
            "of_dense": statistics.median(wall) / (1000 * base),
            "cpu_ms": results.spread(cpu),
            "samples": wall,
        }
        rows.append(results.Row(what, key, params, results.spread(wall)))
    device = next(model.parameters()).device
    return results.result(what, rows, device, facts=facts(model, prompt, 0, backend, 0, name))


def table(data: dict[str, Any]) -> str:
    """A result as text, one line a subject."""
    lines = [
        f"{data['device']}, {data['date']}",
        f"{'':44s} {'ms':>9s} {'min':>9s} {'max':>9s} {'CPU ms':>9s} {'of dense':>9s}",
    ]
    for row in data["rows"]:
        ms, params = row["ms"], row["params"]
        lines.append(
            f"{row['impl'][:44]:44s} {ms['median']:9.1f} {ms['min']:9.1f} {ms['max']:9.1f} "
            f"{params['cpu_ms']['median']:9.1f} {params['of_dense']:9.3f}"
        )
    return "\n".join(lines)
