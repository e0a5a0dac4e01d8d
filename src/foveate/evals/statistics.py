"""Paired statistics: two recipes are compared on the same samples, never by bare means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .results import Record, Results

ROUNDS = 2000  # bootstrap resamples


@dataclass(frozen=True)
class Paired:
    """The mean of differences over `n` common samples, with a bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def paired(ours: Sequence[float], base: Sequence[float], level: float = 0.95, seed: int = 0) -> Paired:
    """Mean of ours - base and the percentile bootstrap interval over samples. Deterministic.

    Raises:
        ConfigError: no samples, or two numbers of them.
    """
    return stratified([(ours, base)], level, seed)


def stratified(groups: Sequence[tuple[Sequence[float], Sequence[float]]], level: float = 0.95, seed: int = 0) -> Paired:
    """Mean over groups of the mean of ours - base, each group (a task) with the same weight whatever its samples.

    The bootstrap draws samples inside each group, so the interval speaks about other samples of these tasks, not about
    other tasks. `n` counts all samples. Deterministic.

    Raises:
        ConfigError: no groups, a group without samples, or two numbers of them.
    """
    if not groups:
        raise ConfigError("paired: expected at least one group of samples, got none")
    generator = torch.Generator().manual_seed(seed)
    mean, means = 0.0, torch.zeros(ROUNDS, dtype=torch.float64)
    for ours, base in groups:
        if len(ours) != len(base) or not ours:
            raise ConfigError(f"paired: expected the same samples on both sides, got {len(ours)} and {len(base)}")
        gap = torch.tensor(ours, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
        draws = torch.randint(len(gap), (ROUNDS, len(gap)), generator=generator)
        means += gap[draws].mean(-1) / len(groups)
        mean += float(gap.mean()) / len(groups)
    edge = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return Paired(mean, low, high, sum(len(ours) for ours, _ in groups))


@dataclass(frozen=True)
class Cell:
    """One recipe on one task at one length under one protocol.

    Attributes:
        mean: of the value over its n samples. against: minus dense on the common samples (None: no dense there, or this
            is dense). same: share of common samples whose answer is dense's, word for word.
    """

    recipe: str
    settings: str
    suite: str
    task: str
    length: int
    protocol: str
    value: str
    mean: float
    n: int
    against: Paired | None = None
    same: float | None = None


def cells(results: Results, value: str = "score", baseline: str = "dense") -> list[Cell]:
    """Every cell that has this value, in the order of the records; `baseline` is a recipe's name."""
    groups: dict[tuple[str, str, int, str], list[Record]] = {}
    for r in results.records:
        if value in r.values:
            groups.setdefault((r.settings, r.task, r.length, r.protocol), []).append(r)
    base = {
        (r.task, r.length, r.protocol, r.index): r for r in results.records if r.recipe == baseline and value in r.values
    }
    return [_cell(group, base, value, baseline) for group in groups.values()]


def _cell(group: list[Record], base: dict[tuple[str, int, str, int], Record], value: str, baseline: str) -> Cell:
    first = group[0]
    pairs = [(r, base[k]) for r in group if (k := (r.task, r.length, r.protocol, r.index)) in base]
    against = same = None
    if pairs and first.recipe != baseline:
        against = paired([r.values[value] for r, _ in pairs], [d.values[value] for _, d in pairs])
        if any(r.text or d.text for r, d in pairs):
            same = sum(r.text == d.text for r, d in pairs) / len(pairs)
    mean = sum(r.values[value] for r in group) / len(group)
    return Cell(first.recipe, first.settings, first.suite, first.task, first.length, first.protocol, value, mean,
                len(group), against, same)  # fmt: skip


def counting(found: Iterable[Cell], least: float, baseline: str = "dense") -> set[tuple[str, int, str]]:
    """(task, length, protocol) where the baseline scores at least `least`: elsewhere a loss has nothing to show in."""
    return {(c.task, c.length, c.protocol) for c in found if c.recipe == baseline and c.mean >= least}
