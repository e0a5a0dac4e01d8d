"""Prefill methods calibrated on made prompts: settings found on some draws, tried on others, and measured on none of them.

Which head is of which kind is the same in every draw, as it is in a model; strengths, directions, frequencies, distances
and texts are drawn anew. The prompt that `prefill_run.py` measures has seed 0 and is never looked at here.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.generic import Bisect, _plain
from ..errors import ConfigError
from ..kernels.dispatch import attend
from ..methods.base import AttnInput, Method
from ..methods.search import Found, Search, Target, searchable
from ..profile import Profile
from ..recipe import Recipe
from .prefill import LAYERS, attended, planned, prompt, sampled

DRAWS, CHECKS = 2, 2  # that settings are found on: seeds 1 and 2; that they are tried on: 3 and 4
TRIES = 6  # targets, where a draw of the check keeps less than the first


@dataclass
class Calibrated:
    """A method with settings of its own for this data. facts: what a row says about where they come from."""

    method: Method
    facts: dict[str, Any]


@dataclass
class Draws:
    """Prompts that settings are found on, those they are tried on, and the seeds of all, in this order."""

    shown: list[AttnInput]
    checks: list[AttnInput]
    seeds: tuple[int, ...]

    @staticmethod
    def make(n: int, h: int, g: int, d: int, dtype: torch.dtype, device: torch.device | str) -> Draws:
        seeds = tuple(range(1, DRAWS + CHECKS + 1))  # 0 is the prompt that is measured
        every = [prompt(n, h, g, d, dtype, device, seed) for seed in seeds]
        return Draws(every[:DRAWS], every[DRAWS:], seeds)


def reason(method: Method) -> str | None:
    """Why this method cannot be calibrated here, or None."""
    if (why := searchable(method)) is not None:
        return why
    return None if "prefill" in method.roles else f"{method.id} plans no prefill"


def calibrate(text: str, target: Target, draws: Draws, folder: Path) -> Calibrated:
    """The method of a recipe with settings that keep `target` on every draw of the check; its profile lies in `folder`.

    A choice that holds on the draws it was found on may miss elsewhere by a little: the target then rises by what was
    missed, and the choice is made again from the same figures. ConfigError: nothing to calibrate, or another target.
    """
    method = Recipe.of(text).prefill
    if target.kind != "recall":
        raise ConfigError(f"calibrate: expected a target mass= or recall=, got {target}")
    if not isinstance(method, Method) or (why := reason(method)) is not None:
        raise ConfigError(f"calibrate: {text}: {why if isinstance(method, Method) else 'no method serves prefill'}")
    began = time.perf_counter()
    search = method.search(target) or Bisect(method, target)
    for _ in range(search.passes):
        for x in draws.shown:
            search.see(x, _dense(x), None)
        search.end_pass()
    searched = time.perf_counter() - began
    x, tried = draws.checks[0], list[list[float]]()
    for found in _finishes(search, target, tried):
        chosen = _keep(method, found, target, draws, folder / slug(text, target, x))
        tried.append([round(kept(chosen, check), 4) for check in draws.checks])
    seconds = time.perf_counter() - began
    asked = getattr(getattr(search, "target", None), "value", target.value)
    facts = {
        "target": str(target), "seeds": list(draws.seeds[:DRAWS]), "check_seeds": list(draws.seeds[DRAWS:]),
        "n": x.q.shape[2], "check_mass": tried, "asked": round(asked, 4), "search_s": round(searched, 1),
        "seconds": round(seconds, 1), "found": {k: v for k, v in found.report.items() if k != "tried"},
    }  # fmt: skip
    return Calibrated(chosen, facts)


def _finishes(search: Search, target: Target, tried: list[list[float]]) -> Iterator[Found]:
    """What the search finds, first for the target, then for higher ones until the last entry of `tried` holds."""
    yield search.finish()
    asked = target.value
    while (missed := target.value - min(tried[-1])) > 0 and len(tried) < TRIES and hasattr(search, "aim") and asked < 0.999:
        asked = min(0.999, asked + max(1.25 * missed, 0.002))  # a little more than was missed: settings are steps
        search.aim(asked)
        yield search.finish()


def _dense(x: AttnInput) -> Tensor:
    got = attend(x.q, x.kv, None, scale=x.scale)
    assert isinstance(got, Tensor)
    return got


def _keep(method: Method, found: Found, target: Target, draws: Draws, folder: Path) -> Method:
    """The method with what was found, which it reads from the profile that this writes."""
    x = draws.checks[0]
    _, h, n, _ = x.shape
    Profile(
        method=method.id, options=found.options, tensors=found.tensors, model="made queries and keys",
        fingerprint=f"layers {LAYERS}; heads {h}; kv heads {x.groups}; head dim {x.q.shape[-1]}",
        data=f"foveate.bench.prefill.made, {n} tokens, seeds {', '.join(map(str, draws.seeds[:DRAWS]))}",
        seed=draws.seeds[0], target=str(target), report=_plain(found.report),
    ).save(folder)  # fmt: skip
    names = {f.name for f in dataclasses.fields(method)}
    options = {k: v for k, v in found.options.items() if k in names}
    if "profile" in names and found.tensors:
        options["profile"] = str(folder)
    return dataclasses.replace(method, **options)


def kept(method: Method, x: AttnInput) -> float:
    """Mean over sampled rows and all heads of the attention mass that a method keeps of a call."""
    rows = sampled(x.q.shape[2], x.device)
    plan, state = planned(method, x)
    lse = attended(method, x, plan, state, lse=True)[1]
    full = attend(x.q, x.kv, None, scale=x.scale, return_lse=True)[1]
    return float((lse[0][:, rows] - full[0][:, rows]).exp().mean())


def label(text: str, target: Target) -> str:
    """What a row of a calibrated recipe is called."""
    return f"{text} at {target}"


def slug(text: str, target: Target, x: AttnInput) -> str:
    """The folder of its profile."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", f"{text} {target} {x.q.shape[2]}").strip("-")
