"""One self-contained HTML page of an evaluation: fronts, needle grids, perplexity by position, tasks, agreement.

Sections without records are left out. Every score says under which protocol it was asked and over how many samples.
"""

from __future__ import annotations

import statistics
from importlib import resources
from pathlib import Path
from typing import Any

from ..evals.frontier import COLUMNS, dense_of, gap, marked, nats, score
from ..evals.pareto import Point, by_protocol, points, scored_tasks, suite_means
from ..evals.results import COUNTS, Record, Results
from ..evals.statistics import Cell, cells
from . import eval_plots, plots
from .files import write_atomic
from .page import _breakable as breakable
from .table import percent

AGREEMENT = (
    ("KL", "kl", "divergence of the next-token distribution from dense's, nats, mean over positions"),
    ("largest KL", "kl_max", "the same, largest over positions, mean over texts"),
    ("same next token", "same", "share of positions at which the most likely next token is dense's"),
    ("mass kept", "mass", "attention probability on the pairs computed, mean over heads and sampled rows"),
    ("mass, lowest 1 %", "mass_low", "the same, first percentile over heads and sampled rows"),
    ("output error", "error", "relative error of the layers' outputs, mean"),
    ("density", "density", "pairs named, of the visible ones"),
    ("computed", "computed", "pairs computed after rounding to the kernel's grid"),
)
WATCHED = (
    ("needle seen", "needle_hit", "share of layers and heads whose layout names a key of each needle for the question"),
    ("mass kept", "mass", "attention probability on the pairs computed, prefill"),
    ("density", "density", "pairs named in prefill, of the visible ones"),
    ("computed", "computed", "pairs computed in prefill, of the visible ones"),
    ("mass kept, decode", "decode_mass", "attention probability on the entries read, decode"),
    ("density, decode", "decode_density", "entries named in decode, of all tokens seen"),
)
FRONTS = {"density": "density", "first_token": "first token", "step": "step", "kv_bytes": "KV"}  # short, for a column
ASKED = {
    "seen": "question seen",
    "unseen": "question unseen by the cache policy",
    "chunked": "question seen, prompt in chunks",
    "turns": "several questions on one compressed cache",
}


def write(results: Results, folder: str | Path) -> Path:
    """Render to `folder/index.html`; the old page stays if that fails. Returns the path."""
    return write_atomic(Path(folder) / "index.html", render(results))


def render(results: Results) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["breakable"] = breakable
    source = resources.files(__package__).joinpath("evals.html.j2").read_text(encoding="utf-8")
    recipes = recipes_of(results)
    numbers = {r["settings"]: r["number"] for r in recipes}
    drawn = plots.available()
    return env.from_string(source).render(
        facts=results.facts,
        recipes=recipes,
        records=len(results.records),
        drawn=drawn,
        fronts=_fronts(results, numbers, drawn),
        needles=_needles(results, recipes),
        positions=_positions(results, numbers, drawn),
        suites=_suites(results, recipes),
        agreement=_agreement(results, recipes),
        watched=_watched(results, recipes),
        columns=[title for title, _ in COLUMNS],
        titles={"agreement": AGREEMENT, "watched": WATCHED},
        asked=ASKED,
        least=f"{COUNTS:.0%}".replace("%", " %"),
        notes=_notes(results),
    )


def recipes_of(results: Results) -> list[dict[str, Any]]:
    """Every recipe with its row number and colour, dense first, then as they came."""
    found = {r.settings: r.recipe for r in sorted(results.records, key=lambda r: r.recipe != "dense")}
    return [
        {"number": i + 1, "settings": settings, "name": name, "colour": plots.colour(i)}
        for i, (settings, name) in enumerate(found.items())
    ]


def _svg(text: str | None) -> Any:
    from markupsafe import Markup

    return Markup(text) if text else None


def _fronts(results: Results, numbers: dict[str, int], drawn: bool) -> list[dict[str, Any]]:
    """One block a protocol and length: scores of two protocols are not mixed."""
    found = []
    for protocol, every in by_protocol(results).items():
        for length in dict.fromkeys(p.length for p in every):
            own = [p for p in every if p.length == length]
            if any(p.value(x) is not None for p in own for x in ("quality", "first_token", "density", "nll")):
                found.append({"length": length, "protocol": protocol, **_front(own, numbers, drawn)})
    return found


def _front(own: list[Point], numbers: dict[str, int], drawn: bool) -> dict[str, Any]:
    panels = [eval_plots.front_panel(own, x, numbers) for x in eval_plots.PANELS] if drawn else []
    dense = dense_of(own, own[0].length)
    return {
        "panels": [_svg(p) for p in panels if p],
        "tasks": next((p.tasks for p in own if p.tasks), ()),
        "n": max(p.n for p in own),
        "rounds": max(p.rounds for p in own),
        "rows": [
            {
                "number": numbers[p.settings],
                "colour": plots.colour(numbers[p.settings] - 1),
                "name": p.recipe,
                "cells": [_split(cell(p, dense)) for _, cell in COLUMNS],
                "front": ", ".join(FRONTS[x] for x in on),
            }
            for p, on in marked(own)
        ],
    }


def _split(text: str) -> tuple[str, str]:
    """ "0.4 (-0.9 to 1.8)" as figure and detail."""
    figure, _, detail = text.partition(" (")
    return figure, detail.removesuffix(")")


def _needles(results: Results, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    grids: dict[tuple[str, str], dict[str, dict[tuple[float, int], list[float]]]] = {}
    for r in results.records:
        depth = r.meta.get("depth", r.meta.get("first_depth"))
        if r.suite == "needle" and "score" in r.values and depth is not None:
            grid = grids.setdefault((r.task, r.protocol), {}).setdefault(r.settings, {})
            grid.setdefault((round(float(depth), 3), r.length), []).append(r.values["score"])
    return [
        {
            "task": task,
            "protocol": protocol,
            "pictures": [
                {**r, "n": sum(map(len, own[r["settings"]].values())), "svg": _svg(eval_plots.needle_grid(
                    {cell: (statistics.fmean(v), len(v)) for cell, v in own[r["settings"]].items()}
                ))}
                for r in recipes
                if r["settings"] in own
            ],
        }
        for (task, protocol), own in grids.items()
    ]  # fmt: skip


def _positions(results: Results, numbers: dict[str, int], drawn: bool) -> list[dict[str, Any]]:
    """Perplexity: totals in a table, differences by position in a drawing."""
    buckets = {v for r in results.records if r.suite == "perplexity" for v in r.values if v.startswith("nll@")}
    by = {v: _cells(results, v, "perplexity") for v in ("nll", "long_nll", *sorted(buckets, key=_bucket))}
    keys = dict.fromkeys(k[1:] for k in by["nll"])
    found = []
    for place in sorted(keys, key=lambda k: (k[1] != "prefill", k[0])):
        here = [v for v in by if any(k[1:] == place for k in by[v])]
        rows: list[dict[str, Any]] = []
        lines = []
        for settings, number in numbers.items():
            if (whole := by["nll"].get((settings, *place))) is None:
                continue
            line = {v: by[v].get((settings, *place)) for v in here}
            rows.append({"number": number, "colour": plots.colour(number - 1), "name": whole.recipe, "n": whole.n,
                         "cells": [_nll(c) for c in line.values()]})  # fmt: skip
            gaps = {_bucket(v): c.against for v, c in line.items() if v in buckets and c and c.against}
            if gaps:
                lines.append((number, gaps))
        titles = [f"from {_bucket(v):,}" if v in buckets else {"nll": "all", "long_nll": "key tokens"}[v] for v in here]
        drawing = eval_plots.position_panel(lines) if drawn and lines else None
        found.append({"length": place[0], "protocol": place[1], "rows": rows, "titles": titles, "svg": _svg(drawing)})
    return found


def _bucket(name: str) -> int:
    return int(name.removeprefix("nll@"))


def _cells(results: Results, value: str, suite: str) -> dict[tuple[str, int, str], Cell]:
    own = Results(results.facts, [r for r in results.records if r.suite == suite])
    return {(c.settings, c.length, c.protocol): c for c in cells(own, value)}


def _nll(cell: Cell | None) -> tuple[str, str]:
    if cell is None:
        return "-", ""
    return f"{cell.mean:.3f}", gap(cell.against, nats)


def _suites(results: Results, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table a suite and protocol: task rows by length, recipe columns, the mean of counting tasks at the end."""
    every = cells(results)
    counts = scored_tasks(results)
    found = []
    for suite, protocol in dict.fromkeys((c.suite, c.protocol) for c in every):
        own = [c for c in every if (c.suite, c.protocol) == (suite, protocol)]
        columns = [r for r in recipes if any(c.settings == r["settings"] for c in own)]
        at = {(c.settings, c.task, c.length): c for c in own}
        rows: list[dict[str, Any]] = []
        for length in sorted({c.length for c in own}):
            tasks = list(dict.fromkeys(c.task for c in own if c.length == length))
            for task in tasks:
                line = [at.get((r["settings"], task, length)) for r in columns]
                rows.append({
                    "length": length, "task": task, "counts": (task, length, protocol) in counts, "mean": False,
                    "dense": any(c is not None and c.recipe == "dense" for c in line),
                    **_counted([None if c is None else (score(c.mean), gap(c.against, score), c.n) for c in line]),
                })  # fmt: skip
            rows += _mean_row(results, suite, protocol, length, counts, columns)
        found.append({"suite": suite, "protocol": protocol, "columns": columns, "rows": rows})
    return found


def _mean_row(
    results: Results,
    suite: str,
    protocol: str,
    length: int,
    counts: set[tuple[str, int, str]],
    columns: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    groups: dict[str, list[Record]] = {}
    for r in results.records:
        if (r.suite, r.length) == (suite, length):
            groups.setdefault(r.settings, []).append(r)
    means = suite_means(groups, counts, protocol)
    if not means or len(next(iter(means.values()))[2]) < 2:
        return []
    tasks = len(next(iter(means.values()))[2])
    line = [means.get(c["settings"]) for c in columns]
    shown = _counted([None if m is None else (score(m[0]), gap(m[1], score), m[3]) for m in line])
    name = f"mean of {tasks} that count, common samples"
    return [{"length": length, "task": name, "counts": True, "mean": True, "dense": True, **shown}]


def _counted(line: list[tuple[str, str, int] | None]) -> dict[str, Any]:
    """Cells (figure, difference, samples); the samples stand once in front where all cells have the same."""
    sizes = {cell[2] for cell in line if cell is not None}
    same = sizes.pop() if len(sizes) == 1 else None
    return {"n": same, "cells": [("-", "", 0) if c is None else (c[0], c[1], 0 if same else c[2]) for c in line]}


def _agreement(results: Results, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {value: _cells(results, value, "agreement") for _, value, _ in AGREEMENT}
    keys = dict.fromkeys(k[1:] for found in by.values() for k in found)
    out = []
    for length, protocol in sorted(keys, key=lambda k: (k[1] != "prefill", k[0])):
        rows = []
        for r in recipes:
            line = [by[value].get((r["settings"], length, protocol)) for _, value, _ in AGREEMENT]
            if any(line):
                figures = ["-" if c is None else _agreed(c) for c in line]
                rows.append({**r, "cells": figures, "n": max(c.n for c in line if c is not None)})
        out.append({"length": length, "protocol": protocol, "rows": rows})
    return out


def _agreed(cell: Cell) -> str:
    if cell.value.startswith("kl"):
        return nats(cell.mean)
    return f"{cell.mean:.4f}" if cell.value == "error" else percent(cell.mean)


def _watched(results: Results, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What layouts named on the samples that were watched, by suite, length and protocol."""
    seen: dict[tuple[str, int, str], dict[str, list[Record]]] = {}
    for r in results.records:
        if "score" in r.values and any(name in r.values for _, name, _ in WATCHED):
            seen.setdefault((r.suite, r.length, r.protocol), {}).setdefault(r.settings, []).append(r)
    out = []
    for (suite, length, protocol), groups in seen.items():
        rows = []
        for recipe in recipes:
            own = groups.get(recipe["settings"], [])
            values = [[x.values[name] for x in own if name in x.values] for _, name, _ in WATCHED]
            if own:
                rows.append({**recipe, "cells": [percent(statistics.fmean(v)) if v else "-" for v in values], "n": len(own)})
        out.append({"suite": suite, "length": length, "protocol": protocol, "rows": rows})
    return out


def _notes(results: Results) -> list[str]:
    """What is not in the means, and why."""
    found = []
    counts = scored_tasks(results)
    scored = dict.fromkeys((r.task, r.length, r.protocol) for r in results.records if "score" in r.values)
    dropped: dict[tuple[int, str], list[str]] = {}
    for task, length, protocol in scored:
        if (task, length, protocol) not in counts:
            dropped.setdefault((length, protocol), []).append(task)
    for (length, protocol), tasks in sorted(dropped.items()):
        found.append(
            f"{length:,} tokens, {protocol}: {', '.join(tasks)} do not count: dense scores below {COUNTS:.0%} there "
            "(or was not asked), so a loss has nothing to show in."
        )
    for p in points(results):
        asked = any("score" in r.values and r.settings == p.settings and r.length == p.length for r in results.records)
        if asked and p.quality is None and any(n == p.length for _, n, _ in counts):
            found.append(
                f"{p.length:,} tokens: {p.recipe} has fewer than half of dense's counting samples and is not compared."
            )
    return found
