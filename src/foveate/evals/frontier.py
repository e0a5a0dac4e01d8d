"""Quality against cost as text: Markdown, CSV, JSON, and the compact summary that BENCHMARKS.md is made from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FoveateError
from ..report.files import write_atomic
from ..report.table import percent, seconds, size, times
from .pareto import COSTS, Point, by_protocol, front, scored_tasks
from .results import COUNTS, Results
from .statistics import Cell, Paired, cells

SCHEMA = 1
AXES = {
    "density": "pairs of the prefill",
    "first_token": "time to first token",
    "step": "decode step",
    "kv_bytes": "KV bytes",
}


# ---------------------------------------------------------------------- tables
def signed(value: Paired | None, form: Callable[[float], str]) -> str:
    """A difference with its interval: "0.4 (-0.9 to 1.8)"."""
    return "-" if value is None else f"{form(value.mean)} ({form(value.low)} to {form(value.high)})"


def gap(value: Paired | None, form: Callable[[float], str]) -> str:
    """A difference to dense, with a plus sign where it is positive; "" for none."""
    text = "" if value is None else signed(value, form)
    return f"+{text}" if value is not None and value.mean > 0 and form(value.mean).strip("0.") else text


def score(value: float) -> str:
    """A score or a difference of scores, in points of 100. A tiny negative one is no "-0.0"."""
    return f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0")


def nats(value: float) -> str:
    return f"{value + 0.0:.4f}".replace("-0.0000", "0.0000")


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


COLUMNS: tuple[tuple[str, Callable[[Point, Point | None], str]], ...] = (
    ("score", lambda p, d: "-" if p.quality is None else score(p.quality)),
    ("loss (95 %)", lambda p, d: "0" if p.dense and p.quality is not None else signed(p.loss, score)),
    ("samples", lambda p, d: f"{p.n}" if p.n else "-"),
    ("KL", lambda p, d: "-" if p.kl is None else nats(p.kl)),
    ("KL, decode", lambda p, d: "-" if p.decode_kl is None else nats(p.decode_kl)),
    ("NLL delta (95 %)", lambda p, d: signed(p.nll, nats)),
    ("NLL delta, decode", lambda p, d: signed(p.decode_nll, nats)),
    ("density", lambda p, d: _share(p.density)),
    ("computed", lambda p, d: _share(p.computed)),
    ("density, decode", lambda p, d: _share(p.decode_density)),
    ("first token", lambda p, d: _relative(p, d, "first_token", seconds)),
    ("decode step", lambda p, d: _relative(p, d, "step", seconds)),
    ("KV", lambda p, d: _relative(p, d, "kv_bytes", size)),
)  # fmt: skip


WIDE = ("samples", "NLL delta (95 %)", "NLL delta, decode", "computed")  # left out of a terminal; the files have them


def _relative(p: Point, d: Point | None, name: str, form: Callable[[float | None], str]) -> str:
    value, base = p.value(name), d.value(name) if d is not None else None
    if value is None or base is None or d is p:
        return form(value)
    return f"{form(value)} ({times(value, base)})"


def dense_of(found: Sequence[Point], length: int) -> Point | None:
    """Dense's point at a length."""
    return next((p for p in found if p.dense and p.length == length), None)


def marked(found: Sequence[Point]) -> list[tuple[Point, list[str]]]:
    """Each point with the costs against which it lies on the front of its length."""
    on = {x: {id(p) for p in front(found, x)} for x in COSTS}
    return [(p, [x for x in COSTS if id(p) in on[x]]) for p in found]


def table(found: Sequence[Point]) -> str:
    """Markdown, one row a point. Scores and losses are points of 100; a loss is positive where dense is better."""
    head = ["length", "recipe", *(title for title, _ in COLUMNS), "on the front of"]
    lines = ["| " + " | ".join(head) + " |", "| ---: | --- |" + " ---: |" * len(COLUMNS) + " --- |"]
    for p, on in marked(found):
        values = [cell(p, dense_of(found, p.length)) for _, cell in COLUMNS]
        lines.append(
            f"| {p.length:,} | `{p.recipe}` | " + " | ".join(values) + f" | {', '.join(AXES[x] for x in on) or '-'} |"
        )
    return "\n".join(lines) + "\n"


def terminal(found: Sequence[Point]) -> list[Any]:
    """The columns that fit a terminal as one rich table a length, without those that are empty there."""
    from rich.table import Table

    out = []
    for length in sorted({p.length for p in found}):
        own, d = [(p, on) for p, on in marked(found) if p.length == length], dense_of(found, length)
        columns = [(title, [cell(p, d) for p, _ in own]) for title, cell in COLUMNS if title not in WIDE]
        columns = [(title, cells) for title, cells in columns if set(cells) != {"-"}]
        columns.append(("on the front of", [", ".join(AXES[x] for x in on) or "-" for _, on in own]))
        shown = Table(title=f"{length:,} tokens", title_justify="left")
        shown.add_column("recipe", min_width=min(32, max(len(p.recipe) for p, _ in own)), overflow="fold")
        for title, _ in columns:
            shown.add_column(title, justify="left" if title == "on the front of" else "right")
        for row, (p, _) in enumerate(own):
            shown.add_row(p.recipe, *(cells[row] for _, cells in columns))
        out.append(shown)
    return out


def _csv(found: Sequence[Point]) -> str:
    out = io.StringIO()
    names = [f.name for f in fields(Point)]
    writer = csv.writer(out, lineterminator="\n")
    wide = ("loss", "nll", "decode_nll")
    columns = [c for n in names for c in ((n, f"{n}_low", f"{n}_high", f"{n}_n") if n in wide else (n,))]
    writer.writerow([*columns, "front"])
    for p, on in marked(found):
        row: list[object] = []
        for name in names:
            value = getattr(p, name)
            if name in wide:
                row += ["", "", "", ""] if value is None else [value.mean, value.low, value.high, value.n]
            else:
                row.append("" if value is None else " ".join(value) if isinstance(value, tuple) else value)
        writer.writerow([*row, " ".join(on)])
    return out.getvalue()


def _json(found: Sequence[Point]) -> str:
    return json.dumps([{**asdict(p), "front": on} for p, on in marked(found)], indent=1, allow_nan=False) + "\n"


KINDS: dict[str, Callable[[Sequence[Point]], str]] = {"md": table, "csv": _csv, "json": _json}


def text_of(found: Sequence[Point], kind: str) -> str:
    """The points as "md", "csv" or "json" text. ConfigError for another kind."""
    if kind not in KINDS:
        raise ConfigError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](found)


def write(found: Sequence[Point], path: str | Path) -> Path:
    """Write the points in the format that the path's ending names (.md, .csv or .json)."""
    return write_atomic(path, text_of(found, Path(path).suffix.removeprefix(".").lower()))


def point_of(data: dict) -> Point:
    """A point from its JSON."""
    values = {f.name: data[f.name] for f in fields(Point) if f.name in data}
    for name in ("loss", "nll", "decode_nll"):
        values[name] = Paired(**values[name]) if values.get(name) is not None else None
    return Point(**{**values, "tasks": tuple(values.get("tasks", ())), "protocols": tuple(values.get("protocols", ()))})


# ---------------------------------------------------------------------- summary
KEPT = ("score", "needle_hit", "nll", "long_nll", "kl", "kl_max", "same", "mass", "mass_low", "error")  # and "nll@P"


def summary(results: Results) -> dict[str, Any]:
    """A results folder as one small JSON value: facts, means with paired differences, points. Answers are left out.

    It has the keys of a bench result (`bench.results`), with no rows of timings, so that one folder holds both. A cell
    and a point name their recipe by its place in "recipes"; figures have six digits.
    """
    facts = results.facts
    counts = scored_tasks(results)
    recipes = {r.settings: r.recipe for r in sorted(results.records, key=lambda r: r.recipe != "dense")}
    place = {settings: i for i, settings in enumerate(recipes)}
    present = {v for r in results.records for v in r.values if r.suite != "cost"}
    names = [v for v in KEPT if v in present] + sorted(
        (v for v in present if v.startswith("nll@")), key=lambda v: int(v[4:])
    )
    return {
        "schema": SCHEMA,
        "bench": "eval",
        "device": str(facts.get("hardware") or facts.get("device") or "unknown"),
        "versions": facts.get("versions") or {},
        "commit": facts.get("commit"),
        "date": str(facts.get("date") or ""),
        "rows": [],
        "facts": {k: v for k, v in facts.items() if k not in ("versions", "commit", "date", "schema")},
        "records": len(results.records),
        "recipes": [{"recipe": name, "settings": settings} for settings, name in recipes.items()],
        "cells": [
            {**_small(c, place), "counts": (c.task, c.length, c.protocol) in counts}
            if value == "score"
            else _small(c, place)
            for value in names
            for c in cells(results, value)
        ],
        "points": [
            {"protocol": protocol, **_small(p, place), "front": on}
            for protocol, found in by_protocol(results).items()
            for p, on in marked(found)
        ],
    }


def _small(value: Cell | Point, place: dict[str, int]) -> dict[str, Any]:
    data = {k: _six(v) for k, v in asdict(value).items() if v is not None}
    return {"recipe": place[data.pop("settings")], **{k: v for k, v in data.items() if k != "recipe"}}


def _six(value: Any) -> Any:
    """Floats with six digits, inside of dicts too."""
    if isinstance(value, dict):
        return {k: _six(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_summary(results: Results, path: str | Path) -> Path:
    """Write a summary as JSON with one cell or point a line, so that a change shows as a few lines."""
    data = summary(results)
    lines = []
    for key, value in data.items():
        listed = isinstance(value, list) and value
        text = (
            ",\n".join(f"  {json.dumps(v, allow_nan=False)}" for v in value)
            if listed
            else json.dumps(value, allow_nan=False)
        )
        lines.append(f'"{key}": ' + (f"[\n{text}\n ]" if listed else text))
    return write_atomic(path, "{\n " + ",\n ".join(lines) + "\n}\n")


def load_summary(path: str | Path) -> dict[str, Any]:
    """Read what `summary` made. FoveateError naming the file and what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise FoveateError(f"summary: cannot read {path}: {err}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("bench") != "eval":
        raise FoveateError(f"summary: expected an evaluation of schema {SCHEMA} in {path}, got something else")
    if missing := [k for k in ("facts", "recipes", "cells", "points") if k not in data]:
        raise FoveateError(f"summary: {path} lacks {', '.join(missing)}")
    return data


def points_of(data: dict[str, Any]) -> dict[str | None, list[Point]]:
    """The points of a summary by protocol."""
    found: dict[str | None, list[Point]] = {}
    for p in data["points"]:
        found.setdefault(p["protocol"], []).append(point_of({**p, **data["recipes"][p["recipe"]]}))
    return found


def markdown(data: dict[str, Any], drawing: str | None = None) -> str:
    """A summary for BENCHMARKS.md: facts, the points, scores by task. `drawing`: address of the fronts' picture."""
    facts = data["facts"]
    named = [str(facts[k]) for k in ("model", "config", "dtype", "text") if facts.get(k)]
    parts = [
        f"Evaluation: {', '.join([*named, data['device']])}, commit `{(data['commit'] or 'unknown')[:12]}`, {data['date']}."
    ]
    if drawing:
        parts.append(f"![fronts of quality against cost]({drawing})")
        numbered = ", ".join(f"{i} `{r['recipe']}`" for i, r in enumerate(data["recipes"], 1))
        parts.append(
            f"Numbers of the drawing: {numbered}. Dense is the diamond; upright lines are 95 % intervals of the loss."
        )
    if data["points"]:
        parts.append(
            f"Scores and losses are points of 100, over tasks where dense scores at least {COUNTS:.0%}, on common samples; "
            "losses are positive where dense is better, with 95 % intervals; brackets at costs: relative to dense."
        )
    for protocol, found in points_of(data).items():
        parts += [f"Protocol {protocol}:" if protocol else "Without scores that count:", table(found).rstrip()]
    return "\n\n".join(parts + [_scores(data, protocol) for protocol in _protocols(data["cells"])])


def _protocols(found: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(c["protocol"] for c in found if c["value"] == "score"))


def _scores(data: dict[str, Any], protocol: str) -> str:
    """Scores by task, recipes as columns: score, difference to dense with interval, samples."""
    own = [c for c in data["cells"] if c["value"] == "score" and c["protocol"] == protocol]
    recipes = sorted({c["recipe"] for c in own})
    at = {(c["recipe"], c["suite"], c["task"], c["length"]): c for c in own}
    lines = [
        f"Scores by task, protocol {protocol} (tasks in brackets do not count):\n",
        "| task | length | " + " | ".join(f"`{data['recipes'][i]['recipe']}`" for i in recipes) + " |",
        "| --- | ---: |" + " ---: |" * len(recipes),
    ]
    for suite, task, length in dict.fromkeys((c["suite"], c["task"], c["length"]) for c in own):
        line = [at.get((i, suite, task, length)) for i in recipes]
        name = f"{suite}/{task}" if any(c and c["counts"] for c in line) else f"({suite}/{task})"
        lines.append(f"| {name} | {length:,} | " + " | ".join(map(_score_cell, line)) + " |")
    return "\n".join(lines)


def _score_cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    gap = "" if cell.get("against") is None else f", {signed(Paired(**cell['against']), score)}"
    return f"{score(cell['mean'])}{gap}, n {cell['n']}"
