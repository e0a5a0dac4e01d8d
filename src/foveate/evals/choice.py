"""Which recipe to take for a length and a loss one can live with, with the measured reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..report.table import times
from .frontier import AXES, score
from .pareto import COSTS, Point, points
from .results import COUNTS, Results

FEW = 30  # fewer samples than this, and a bootstrap interval is itself a guess


@dataclass(frozen=True)
class Recommendation:
    """A choice and its measured reason.

    Attributes:
        point, dense: the recipe chosen and the baseline, at the length `point.length`, which was measured.
        asked: the length asked for. by: the cost that was made small. reason: one sentence.
        warnings: what to know before relying on it. others: the points that were admissible, best first.
    """

    point: Point
    dense: Point
    asked: int
    by: str
    reason: str
    warnings: tuple[str, ...]
    others: tuple[Point, ...]


def recommend(
    results: Results, length: int, max_loss: float = 0.01, by: str = "first_token", protocols: Sequence[str] | None = None
) -> Recommendation:
    """The recipe of least cost whose measured loss against dense is at most `max_loss`.

    It lies on the Pareto front of quality against that cost: whatever beat it would be admissible too. The loss is the
    point estimate; where its interval does not exclude a larger one, a warning says so. Dense is admissible, so there is
    always an answer where there are measurements.

    Args:
        length: tokens. The nearest measured length is used (of two equally near ones the longer) and named.
        max_loss: in score, 0.01 is one point of 100. by: "first_token", "step" or "kv_bytes".
        protocols: scores under these only; None takes all.

    Raises:
        ConfigError: a bad argument; no dense, no cost records, no task that counts; nothing measured within a factor 2.
    """
    if by not in COSTS or by == "density":
        raise ConfigError(f"by: expected {', '.join(c for c in COSTS if c != 'density')}, got {by!r}")
    if not 0 <= max_loss <= 1:
        raise ConfigError(f"max_loss: expected a share of the score from 0 to 1 (0.01 is one point of 100), got {max_loss}")
    if length < 1:
        raise ConfigError(f"length: expected at least 1 token, got {length}")
    found = points(results, protocols)
    dense = _measured_near(found, length, by, protocols)
    here = [p for p in found if p.length == dense.length and p.value(by) is not None and p.quality is not None]
    good = [p for p in here if (p.value("loss") or 0.0) <= max_loss + 1e-9]  # 1 of 100 lost is a loss of 0.01
    good.sort(key=lambda p: (p.value(by), -(p.quality or 0.0), not p.dense))
    best = good[0]
    missing = [p.recipe for p in found if p.length == dense.length and p not in here]
    return Recommendation(
        best,
        dense,
        length,
        by,
        _reason(best, dense, by, max_loss),
        tuple(_warnings(best, length, max_loss, missing)),
        tuple(good),
    )


def _measured_near(found: Sequence[Point], length: int, by: str, protocols: Sequence[str] | None) -> Point:
    """Dense's point at the measured length nearest to `length`. ConfigError says what is missing."""
    dense = [p for p in found if p.dense]
    if not dense:
        raise ConfigError("results: expected records of the recipe dense, found none; every loss is measured against it")
    if not any(p.value(by) is not None for p in dense):
        raise ConfigError(f"results: expected cost records ({by}) of dense, found none; run foveate eval with costs")
    if not any(p.quality is not None for p in dense):
        under = f" under {', '.join(protocols)}" if protocols else ""
        raise ConfigError(f"results: no task counts: dense scores less than {COUNTS:.0%} on all of them{under}")
    usable = [p for p in dense if p.value(by) is not None and p.quality is not None]
    far = lambda p: (abs(math.log(p.length / length)), -p.length)  # noqa: E731
    near = [p for p in usable if length / 2 <= p.length <= length * 2]
    if not near:
        had = ", ".join(f"{p.length:,}" for p in usable) or "none"
        raise ConfigError(
            f"length: nothing measured from {length // 2:,} to {length * 2:,} tokens; lengths with costs and scores: {had}"
        )
    return min(near, key=far)


def _reason(best: Point, dense: Point, by: str, max_loss: float) -> str:
    if best.dense:
        return (
            f"dense: at {best.length:,} tokens no recipe with a loss of at most {score(max_loss)} points has less {AXES[by]}"
        )
    per_task = best.n / len(best.tasks)
    tasks = f"{len(best.tasks)} task{'s' * (len(best.tasks) > 1)}"
    samples = f"{tasks} x {per_task:.0f} samples" if per_task.is_integer() else f"{tasks}, {best.n} samples"
    density = next(((n, v) for n, v in (("density", best.density), ("decode density", best.decode_density))
                    if v is not None and (v < 1 or n != "density")), None)  # fmt: skip
    parts = [
        f"{best.recipe}: {times(best.value(by), dense.value(by))} dense's {AXES[by]} at {best.length:,} tokens",
        f"loss {score(best.value('loss') or 0.0)} points ({_interval(best)}) over {samples} ({', '.join(best.protocols)})",
    ]
    return ", ".join(parts + ([f"{density[0]} {density[1]:.2f}"] if density else []))


def _interval(p: Point) -> str:
    return f"{score(p.loss.low)} to {score(p.loss.high)}" if p.loss else "baseline"


def _warnings(best: Point, asked: int, max_loss: float, missing: Sequence[str]) -> list[str]:
    found = []
    if best.length != asked:
        found.append(f"nothing was measured at {asked:,} tokens; this is the result at {best.length:,}")
    if best.loss is not None:
        bound = min(1.0, 3 / best.n)  # 95 % bound on how often answers differ when none of n did ("rule of three")
        if best.loss.high > max_loss:
            found.append(f"the interval does not exclude a loss above {score(max_loss)} points ({_interval(best)})")
        elif best.loss.low == best.loss.high and bound > max_loss:
            found.append(f"no difference in {best.n} samples does not exclude a loss of up to {score(bound)} points")
        if best.n < FEW * len(best.tasks):
            found.append(f"{best.n / len(best.tasks):.0f} samples a task are few: expect other samples to give another loss")
    if best.rounds == 1:
        found.append("costs were timed in one round only")
    if missing:
        found.append(f"not compared, for lack of costs or of samples at this length: {', '.join(missing)}")
    return found
