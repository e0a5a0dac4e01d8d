"""An evaluation for the terminal: one small table a suite, recipes as rows, lengths and protocols as columns."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..evals.frontier import gap, nats, score
from ..evals.pareto import Point, points, scored_tasks, suite_means
from ..evals.results import COUNTS, Record, Results
from ..evals.statistics import cells
from .console import stdout
from .table import percent, seconds, size, times

Shown = tuple[str, str]  # a figure and the line below it


def print_results(results: Results) -> None:
    """Tables on stdout: mean scores with paired differences, perplexity, agreement, cost. Empty ones are left out."""
    out = stdout()
    recipes = {r.settings: r.recipe for r in sorted(results.records, key=lambda r: r.recipe != "dense")}
    if not recipes:
        out.print("no records")
        return
    facts = ", ".join(str(results.facts[k]) for k in ("model", "dtype", "text") if results.facts.get(k))
    out.print(f"{facts}: {len(results.records):,} records", highlight=False, markup=False)
    for title, columns in _tables(results, recipes):
        if not columns:
            continue
        table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("recipe", overflow="fold", min_width=18, max_width=40)
        for name in columns:
            table.add_column(name, justify="right")
        for settings, recipe in recipes.items():
            line = [column.get(settings) for column in columns.values()]
            if any(line):
                table.add_row(escape(recipe), *(_cell(shown) for shown in line))
        out.print(table)
    out.print(
        f"Scores: points of 100 over tasks where dense scores at least {COUNTS:.0%}, on samples that all recipes have; "
        "below them the difference to dense with its 95 % interval.",
        style="dim",
        highlight=False,
    )


def _cell(shown: Shown | None) -> str:
    if shown is None:
        return "-"
    figure, detail = shown
    return f"{escape(figure)}\n[dim]{escape(detail)}[/dim]" if detail else escape(figure)


def _tables(results: Results, recipes: dict[str, str]) -> list[tuple[str, dict[str, dict[str, Shown]]]]:
    """(title, {column: {settings: shown}}) of every table."""
    suites = dict.fromkeys(r.suite for r in results.records if "score" in r.values)
    found = [(suite, _scores(results, suite)) for suite in suites]
    found.append(("perplexity (nats)", _stream(results, "perplexity", "nll", nats)))
    for title, value, form in (("KL from dense (nats)", "kl", nats), ("same next token as dense", "same", percent)):
        found.append((f"agreement: {title}", _stream(results, "agreement", value, form)))
    return [*found, ("cost", _costs(points(results)))]


def _scores(results: Results, suite: str) -> dict[str, dict[str, Shown]]:
    counts = scored_tasks(results)
    keys: dict[tuple[int, str], dict[str, list[Record]]] = {}
    for r in results.records:
        if r.suite == suite and "score" in r.values:
            keys.setdefault((r.length, r.protocol), {}).setdefault(r.settings, []).append(r)
    columns = {}
    for (length, protocol), groups in sorted(keys.items()):
        own = {r.task for group in groups.values() for r in group}
        means = suite_means(groups, counts, protocol)
        used = len({t for _, _, tasks, _ in means.values() for t in tasks})
        name = f"{length:,} {protocol}\n{used} of {len(own)} task{'s' * (len(own) != 1)} count"
        columns[name] = {s: (score(mean), f"{gap(loss, score)} n {n}".strip()) for s, (mean, loss, _, n) in means.items()}
        if not means:
            columns[name] = dict.fromkeys(groups, (f"dense < {100 * COUNTS:.0f}", ""))
    return columns


def _stream(results: Results, suite: str, value: str, form: Callable[[float], str]) -> dict[str, dict[str, Shown]]:
    own = Results(results.facts, [r for r in results.records if r.suite == suite])
    columns: dict[str, dict[str, Shown]] = {}
    for c in sorted(cells(own, value), key=lambda c: (c.protocol != "prefill", c.length)):
        more = gap(c.against, nats) if value == "nll" else ""
        columns.setdefault(f"{c.length:,} {c.protocol}", {})[c.settings] = (form(c.mean), f"{more} n {c.n}".strip())
    return columns


def _costs(found: list[Point]) -> dict[str, dict[str, Shown]]:
    columns: dict[str, dict[str, Shown]] = {}
    for length in sorted({p.length for p in found if p.rounds}):
        own = [p for p in found if p.length == length and p.rounds]
        dense = next((p for p in own if p.dense), None)
        for title, name, form in (
            ("first token", "first_token", seconds),
            ("step", "step", seconds),
            ("KV", "kv_bytes", size),
        ):
            columns[f"{length:,}\n{title}"] = {
                p.settings: (form(p.value(name)), times(p.value(name), dense.value(name)) if dense else "") for p in own
            }
        columns[f"{length:,}\ndensity"] = {
            p.settings: (percent(p.density), "" if p.computed is None else f"computed {percent(p.computed)}") for p in own
        }
    return columns
