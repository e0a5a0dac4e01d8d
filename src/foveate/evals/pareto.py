"""One point a recipe and length: what it loses against dense and what it costs; and which points no other one beats.

Quality is measured where there is something to lose: on (task, length, protocol) where dense scores at least 60 %, and
on the samples that every recipe has. So recipes are compared on the same questions, and no recipe looks good because
it was asked the easy ones.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from .results import COUNTS, Record, Results
from .statistics import Paired, cells, counting, paired, stratified

COSTS = ("density", "first_token", "step", "kv_bytes")  # x of the fronts, smaller is better
HIGHER = ("quality", "same", "mass")  # values of which more is better; of all others less is
PARTIAL = 0.5  # a recipe with fewer of dense's samples is not compared: it would take the samples from all others

Key = tuple[str, str, int]  # (task, protocol, index) of a sample at one length


@dataclass(frozen=True)
class Point:
    """One recipe at one length. None stands for what was not measured.

    Attributes:
        recipe, settings, length: which. dense: whether it is the baseline.
        quality: mean score, 0 to 1, over `tasks` (each weighs the same) under `protocols`, over `n` samples.
        loss: dense's score minus this one's over the same samples, with a bootstrap interval; None for dense itself.
        kl, decode_kl: mean KL(dense || this) of the next token, nats. same: share of positions with dense's next token.
        mass: attention probability on the pairs computed. nll, decode_nll: minus dense's over the same texts, nats.
        density, computed: pairs of the prefill named and computed, of the visible ones; decode_*: the same for decode.
        first_token, step: seconds, median over `rounds`. kv_bytes: of the cache.
    """

    recipe: str
    settings: str
    length: int
    dense: bool = False
    quality: float | None = None
    loss: Paired | None = None
    n: int = 0
    tasks: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    kl: float | None = None
    decode_kl: float | None = None
    same: float | None = None
    mass: float | None = None
    nll: Paired | None = None
    decode_nll: Paired | None = None
    density: float | None = None
    computed: float | None = None
    decode_density: float | None = None
    decode_computed: float | None = None
    first_token: float | None = None
    step: float | None = None
    kv_bytes: float | None = None
    rounds: int = 0

    def value(self, name: str) -> float | None:
        """A field as a number: the mean of a difference; None where it is missing or not finite."""
        found = getattr(self, name)
        if found is None and self.dense and name in ("loss", "nll", "decode_nll", "kl", "decode_kl"):
            return 0.0
        number = found.mean if isinstance(found, Paired) else found
        return None if number is None or not math.isfinite(number) else float(number)


def points(
    results: Results, protocols: Collection[str] | None = None, least: float = COUNTS, baseline: str = "dense"
) -> list[Point]:
    """Every recipe at every length at which it has any record: by length, dense first, then as they came.

    Args:
        protocols: scores under these only ("seen", "unseen", ...); None takes all. least: what dense must score.
    """
    by_length: dict[int, dict[str, list[Record]]] = {}
    order = list(dict.fromkeys(r.settings for r in sorted(results.records, key=lambda r: r.recipe != baseline)))
    for r in results.records:
        by_length.setdefault(r.length, {}).setdefault(r.settings, []).append(r)
    counts = scored_tasks(results, least, baseline)
    found = []
    for length, groups in sorted(by_length.items()):
        ordered = {s: groups[s] for s in order if s in groups}
        scores = common_scores(ordered, counts, protocols, baseline)
        base = next((g for g in ordered.values() if g[0].recipe == baseline), [])
        for settings, group in ordered.items():
            values = {**_quality(scores, settings, base), **_streams(group, base), **_costs(group)}
            dense = group[0].recipe == baseline
            found.append(Point(group[0].recipe, settings, length, dense, **values))
    return found


def by_protocol(results: Results) -> dict[str | None, list[Point]]:
    """Points with the scores of one protocol each, in the order of the records, so that no table mixes protocols.

    Lengths at which a protocol's tasks do not count are left out of it while another protocol has them. Where nothing
    was scored, all points stand under None.
    """
    protocols = dict.fromkeys(r.protocol for r in results.records if "score" in r.values)
    found: dict[str | None, list[Point]] = {}
    for protocol in protocols:
        every = points(results, [protocol])
        used = {p.length for p in every if p.quality is not None}
        if own := [p for p in every if p.length in used]:
            found[protocol] = own
    shown = {p.length for own in found.values() for p in own}
    if rest := [p for p in points(results, ()) if p.length not in shown]:
        found[None] = rest
    return found


def scored_tasks(results: Results, least: float = COUNTS, baseline: str = "dense") -> set[tuple[str, int, str]]:
    """(task, length, protocol) where dense scores at least `least`."""
    own = Results(results.facts, [r for r in results.records if r.recipe == baseline])
    return counting(cells(own, "score", baseline), least, baseline)


def common_scores(
    groups: dict[str, list[Record]],
    counts: Collection[tuple[str, int, str]],
    protocols: Collection[str] | None = None,
    baseline: str = "dense",
) -> dict[str, dict[Key, float]]:
    """{settings: {sample: score}} of one length, on counting samples that all of them have; dense is among them.

    Recipes with fewer than half of dense's samples are left out (a run that was stopped), so that they do not take the
    samples away from all others. Empty where dense has none.
    """
    all_scores: dict[str, dict[Key, float]] = {}
    dense: dict[Key, float] = {}
    for settings, group in groups.items():
        mine = {
            (r.task, r.protocol, r.index): r.values["score"]
            for r in group
            if "score" in r.values
            and (r.task, r.length, r.protocol) in counts
            and (protocols is None or r.protocol in protocols)
        }
        all_scores[settings] = mine
        if group[0].recipe == baseline:
            dense = mine
    full = {s: mine for s, mine in all_scores.items() if dense and len(mine.keys() & dense) >= PARTIAL * len(dense)}
    shared = set(dense).intersection(*full.values()) if full else set()
    return {s: {k: mine[k] for k in dense if k in shared} for s, mine in full.items()} if shared else {}


def by_question(scores: dict[Key, float]) -> dict[str, dict[int, float]]:
    """{task: {index: mean score over protocols}}: one question under two protocols is still one question."""
    found: dict[str, dict[int, list[float]]] = {}
    for (task, _, index), score in scores.items():
        found.setdefault(task, {}).setdefault(index, []).append(score)
    return {task: {i: statistics.fmean(v) for i, v in own.items()} for task, own in found.items()}


def suite_means(
    groups: dict[str, list[Record]], counts: set[tuple[str, int, str]], protocol: str
) -> dict[str, tuple[float, Paired | None, list[str], int]]:
    """{settings: (mean score, minus dense, tasks, samples)} over counting tasks and common samples of one length."""
    scores = common_scores(groups, counts, [protocol])
    base = next((s for s in scores if groups[s][0].recipe == "dense"), None)
    found: dict[str, tuple[float, Paired | None, list[str], int]] = {}
    for settings, mine in scores.items():
        tasks: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        for key, value in mine.items():
            tasks.setdefault(key[0], []).append(value)
            theirs.setdefault(key[0], []).append(scores[base][key] if base else value)
        gap = stratified([(tasks[t], theirs[t]) for t in tasks]) if base not in (None, settings) else None
        found[settings] = statistics.fmean(map(statistics.fmean, tasks.values())), gap, list(tasks), len(mine)
    return found


def _quality(scores: dict[str, dict[Key, float]], settings: str, base: list[Record]) -> dict:
    if settings not in scores:
        return {}
    mine = by_question(scores[settings])
    values = {
        "quality": statistics.fmean(statistics.fmean(own.values()) for own in mine.values()),
        "n": sum(len(own) for own in mine.values()),
        "tasks": tuple(mine),
        "protocols": tuple(sorted({protocol for _, protocol, _ in scores[settings]})),
    }
    if base and settings != base[0].settings:
        dense = by_question(scores[base[0].settings])
        values["loss"] = stratified([(list(dense[t].values()), [mine[t][i] for i in dense[t]]) for t in dense])
    return values


def _streams(group: list[Record], base: list[Record]) -> dict:
    """Agreement and perplexity."""
    agree = {p: [r for r in group if r.suite == "agreement" and r.protocol == p] for p in ("prefill", "decode")}
    values: dict = {name: _mean(agree["prefill"], name) for name in ("kl", "same", "mass")}
    values["decode_kl"] = _mean(agree["decode"], "kl")
    for name, protocol in (("nll", "prefill"), ("decode_nll", "decode")):
        mine, dense = (
            {r.index: r.values["nll"] for r in g if r.suite == "perplexity" and r.protocol == protocol and "nll" in r.values}
            for g in (group, base)
        )
        both = [i for i in mine if i in dense]
        if both and group is not base:
            values[name] = paired([mine[i] for i in both], [dense[i] for i in both])
    return values


def _costs(group: list[Record]) -> dict:
    timed = [r for r in group if r.suite == "cost"]
    agree = [r for r in group if r.suite == "agreement" and r.protocol == "prefill"]
    scored = [r for r in group if "score" in r.values]
    values: dict = {name: _median(timed, name) for name in ("first_token", "step", "kv_bytes")}
    for name in ("density", "computed", "decode_density", "decode_computed"):
        sources = (_median(timed, name), _mean(agree, name), _mean(scored, name))  # the timed prompt's own, if measured
        values[name] = next((v for v in sources if v is not None), None)
    return values | {"rounds": sum("first_token" in r.values for r in timed)}


def _mean(records: Iterable[Record], name: str) -> float | None:
    return _over(statistics.fmean, records, name)


def _median(records: Iterable[Record], name: str) -> float | None:
    return _over(statistics.median, records, name)


def _over(how: Callable[[list[float]], float], records: Iterable[Record], name: str) -> float | None:
    found = [r.values[name] for r in records if name in r.values]
    return float(how(found)) if found else None


def front(found: Sequence[Point], x: str, y: str = "quality") -> list[Point]:
    """The points that no other point of their length beats, in the order of x: none is as good in both and better in one.

    Args:
        x, y: names of values; which way is better follows from the name (`HIGHER`, all others: less). Points that lack
            one are on no front; equal points are on it together.
    """
    known = []
    for p in found:
        a, b = p.value(x), p.value(y)
        if a is not None and b is not None:
            known.append((-a if x in HIGHER else a, -b if y in HIGHER else b, p))
    best = [
        (a, b, p)
        for a, b, p in known
        if not any(q.length == p.length and c <= a and d <= b and (c < a or d < b) for c, d, q in known)
    ]
    return [p for _, _, p in sorted(best, key=lambda t: (t[2].length, t[0], t[1]))]
