"""Results for the terminal: the table of a comparison and of a checkup."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..doctor import Checkup
from ..measure import Comparison
from .console import stdout
from .table import COLUMNS


def print_comparison(result: Comparison) -> None:
    """One table on stdout, then the notes."""
    out, facts = stdout(), result.facts
    title = f"{facts['model']}, {facts['prompt']}, {facts['dtype']}, {facts['device']}"
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("recipe", overflow="fold", min_width=18, max_width=34)
    for column in COLUMNS:
        last = column is COLUMNS[-1]
        table.add_column(column.title, justify="left" if last else "right", overflow="fold", min_width=16 if last else None)
    notes = []
    for row in result.rows:
        if row.error is not None:
            table.add_row(escape(row.recipe), *["-"] * (len(COLUMNS) - 1), "[red]did not run[/red]", end_section=True)
            notes.append(f"{row.recipe}: did not run: {row.error}")
            continue
        cells = [column.cell(row, result.dense) for column in COLUMNS]
        cells[-1] = (cells[-1][0], {"yes": "holds the fact", "no": "misses the fact"}.get(cells[-1][1], ""))
        shown = (f"{escape(figure)}\n[dim]{escape(detail)}[/dim]" for figure, detail in cells)
        table.add_row(escape(row.recipe), *shown, end_section=True)
        notes += [f"{row.recipe}: {note}" for note in row.notes]
    out.print(table)
    for note in notes:
        out.print(f"- {note}", style="dim", highlight=False, markup=False)


def print_checkup(report: Checkup) -> None:
    """Facts, backends with their self-test, advice."""
    out = stdout()
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("versions", ", ".join(f"{name} {v or 'missing'}" for name, v in report.versions.items()))
    facts.add_row("devices", "\n".join(report.devices))
    facts.add_row("C++ compiler", report.compiler or "none: compiled FlexAttention cannot run on the CPU")
    facts.add_row("faster on the CPU", report.dtype)
    facts.add_row("cache folder", report.cache)
    out.print(facts)
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nWhich backend runs what", title_justify="left")
    for title in ("layout", "runs on", "self-test (largest error)", "why not the others"):
        table.add_column(title, overflow="fold")
    for one in report.served:
        errors = ", ".join(f"{name} {e:.1e}" if isinstance(e, float) else f"{name} {e}" for name, e in one.errors.items())
        reasons = "\n".join(f"{name}: {why}" for name, why in one.reasons.items())
        table.add_row(one.sample, one.backend or "nothing", errors if one.passed else f"[red]{errors}[/red]", reasons)
    out.print(table)
    for line in report.advice:
        out.print(f"- {line}", highlight=False)
    if not report.tested:
        verdict = "Nothing was computed: leave out --no-test to check it."
    elif report.healthy:
        verdict = "Everything that runs here computes correctly."
    else:
        verdict = "[red]Something computes wrongly.[/red]"
    out.print(f"\n{verdict}")
