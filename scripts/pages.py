"""Write docs/methods: a page for every method of the registry, with its picture, and their table. `--check` changes
nothing and fails when one is stale.

    python scripts/pages.py [--check]

Text comes from the class (`foveate.catalogue`), figures from the committed rows of benchmarks/results that name the
method, beside dense in the same file. A picture that shows the same pairs stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import pictures  # noqa: E402

from foveate.bench.tables import compare_table  # noqa: E402
from foveate.catalogue import SERVES, Entry, entry, shown  # noqa: E402
from foveate.evals.frontier import COLUMNS, dense_of, load_summary, points_of  # noqa: E402
from foveate.evals.pareto import Point  # noqa: E402
from foveate.registry import METHODS, get  # noqa: E402

RESULTS, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "methods"


def results() -> dict[str, dict[str, Any]]:
    """Committed result files by name."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        found[path.stem] = load_summary(path) if path.stem.startswith("eval_") else json.loads(path.read_text())
    return found


def names(text: str, name: str) -> bool:
    """Whether a recipe, or what a benchmark calls an implementation, names this method."""
    if name == "dense":  # part of half of all names
        return text == "dense"
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


# ---------------------------------------------------------------------- what was measured
def measured(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """Paragraphs and tables with every committed figure of this method."""
    parts: list[str] = []
    for stem, data in found.items():
        if "points" in data:
            parts += _quality(name, stem, data)
        elif "bench" not in data:
            rows = [r for r in data["rows"] if names(r["recipe"], name) or r["recipe"] == "dense"]
            if any(names(r["recipe"], name) for r in rows):
                facts = data["facts"]
                where = ", ".join(str(facts[k]) for k in ("model", "prompt", "dtype", "device", "date") if facts.get(k))
                parts += [f"### {stem}", f"`foveate compare`: {where}.", compare_table(rows)]
        else:
            parts += _timed(name, stem, data)
    return parts


def _quality(name: str, stem: str, data: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    found = points_of(data)
    for protocol, points in found.items():
        mine = [p for p in points if names(p.recipe, name)]
        if protocol is not None and all(p.quality is None for p in mine):
            continue  # nothing but its costs, which stand in the table of another protocol, too
        lengths = {p.length for p in mine}
        own = [p for p in points if p.length in lengths and (p in mine or p.dense)]
        if mine:
            parts += [f"Protocol {protocol}:" if protocol else "Without scores that count:", _points(own)]
    facts = data["facts"]
    where = ", ".join(str(facts[k]) for k in ("model", "dtype") if facts.get(k))
    return [f"### {stem}", f"{where}, {data['device']}, {data['date'][:10]}.", *parts] if parts else []


def _points(own: list[Point]) -> str:
    """Points as rows, without columns that none of them fills."""
    cells = [[cell(p, dense_of(own, p.length)) for _, cell in COLUMNS] for p in own]
    used = [i for i in range(len(COLUMNS)) if any(row[i] not in ("-", "0") for row in cells)]
    lines = [
        "| length | recipe | " + " | ".join(COLUMNS[i][0] for i in used) + " |",
        "| ---: | --- |" + " ---: |" * len(used),
    ]
    lines += [f"| {p.length:,} | `{p.recipe}` | {' | '.join(row[i] for i in used)} |" for p, row in zip(own, cells)]
    return "\n".join(lines)


def _timed(name: str, stem: str, data: dict[str, Any]) -> list[str]:
    rows = [r for r in data["rows"] if names(r["impl"], name)]
    if not rows:
        return []
    of = lambda r: (r["case"], *((r.get("params") or {}).get(k) for k in ("b", "n", "N", "tokens")))  # noqa: E731
    cases = {of(r) for r in rows}
    base = [r for r in data["rows"] if of(r) in cases and r["impl"].startswith("dense") and r not in rows]
    lines = ["| case | what | of | median | min to max | density |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for r in sorted([*base, *rows], key=lambda r: [str(x or "").rjust(12) for x in of(r)]):
        params = r.get("params") or {}
        size = ", ".join(f"{k} {params[k]}" for k in ("b", "n", "N", "tokens") if k in params)
        ms, density = r["ms"], "-" if r.get("density") is None else f"{r['density']:.3f}"
        lines.append(
            f"| {r['case']} | {r['impl']} | {size or '-'} | {ms['median']:.3f} ms | {ms['min']:.3f} to {ms['max']:.3f} | "
            f"{density} |"
        )
    return [f"### {stem}", f"`{data['bench']}`: {data['device']}, {data['date'][:10]}.", "\n".join(lines)]


# ---------------------------------------------------------------------- pages
def page(e: Entry, picture: pictures.Picture | None, found: dict[str, dict[str, Any]]) -> str:
    """The page of one method."""
    facts = f"Serves {', '.join(f'`{r}`' for r in e.roles)}; selection: {e.selection}; lists per {e.share}; needs {e.needs}"
    parts = [f"# {e.title}", f"`{e.id}`. {e.line}", f"{facts}; {e.status}. Source: {e.source or e.paper}"]
    parts += [e.paper, _rewrapped(e.text)] if e.text else [e.paper]
    parts.append("## A layout it made")
    if picture is None:
        parts.append(
            "There is no picture: with one layer of the small example that all pages share it leaves nothing out that a "
            "picture of pairs could show."
        )
    else:
        parts += [f"![Pairs that {e.id} computes]({e.id}.png)", _caption(picture)]
    recipes = e.id if e.id == "dense" else f"dense; {e.example}"
    parts += ["## Use", f"```bash\nfoveate compare --recipes '{recipes}'\n```", _listed("Use it for", e.use)]
    if e.avoid:
        parts.append(_listed("Mind that", e.avoid))
    parts += ["## Options", _options(e)]
    rows = measured(e.id, found)
    parts.append("## Measured")
    if rows:
        parts.append(
            "Every committed row that names it, with dense from the same run; "
            "[BENCHMARKS.md](../../BENCHMARKS.md) has the rest and says how to read them."
        )
    parts += rows or ["No committed result names it yet."]
    return "\n\n".join(p for p in parts if p) + "\n"


def _rewrapped(text: str) -> str:
    """The docstring as Markdown: an indented list of names becomes a list."""
    out, before = [], ""
    for line in text.split("\n"):
        named = re.match(r"    (\w+): ", line)
        if named:
            if before and not before.startswith("    "):
                out.append("")
            line = f"- `{named[1]}`: {line[named.end() :]}"
        elif line.startswith("        "):
            line = f"  {line.strip()}"
        elif line.startswith("- ") and before and not before.startswith(("- ", "  ")):
            out.append("")
        before = "    " if named or line.startswith("  ") else line
        out.append(line)
    return "\n".join(out)


def _caption(picture: pictures.Picture) -> str:
    p = pictures
    how = (
        f"All {p.TOKENS} tokens are read in one call."
        if picture.role in ("prefill", "heads")
        else f"The first {p.PROMPT} tokens are the prompt (pale: read with dense attention); the others come one by one."
    )
    own = hasattr(get(picture.part.split(":")[0]), "attend")
    more = " The method has arithmetic of its own, which may add to these pairs." if own else ""
    return (
        f"Rows are queries and columns keys, for each of {p.HEADS} query heads (two kv heads) on {p.TOKENS} synthetic "
        f"tokens. Blue pairs are computed, grey ones left out. {how}{more} Settings, small enough for so short a text: "
        f"`{picture.role}={picture.part}`."
    )


def _listed(title: str, lines: tuple[str, ...]) -> str:
    return f"{title}\n\n" + "\n".join(f"- {line}" for line in lines)


def _options(e: Entry) -> str:
    if not e.options:
        return "It has none."
    lines = ["| option | default | values | what it is |", "| --- | --- | --- | --- |"]
    lines += [f"| `{o.name}` | {shown(o.default)} | {o.values} | {o.help} |" for o in e.options]
    presets = [f"- `@{k}`: {', '.join(f'`{n}={shown(v)}`' for n, v in values.items())}" for k, values in e.presets.items()]
    return "\n".join(lines) + ("\n\nPresets:\n\n" + "\n".join(presets) if presets else "")


def index(entries: list[Entry]) -> str:
    """The table of all methods."""
    lines = [
        "# Methods",
        "",
        "Generated by `make benchmarks` from the registry; `foveate methods` prints the same in a terminal. What the roles "
        "mean: " + "; ".join(f"`{role}`: {text}" for role, text in SERVES.items()) + ".",
        "",
        "| method | serves | what it does | needs | source |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| [`{e.id}`]({e.id}.md) | {', '.join(e.roles)} | {e.line} | {e.needs} | {e.source or e.paper} |" for e in entries
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- files
def render(drawn: dict[str, pictures.Picture | None]) -> dict[Path, str]:
    """Every page and its text."""
    found, entries = results(), [entry(name) for name in METHODS]
    pages = {PAGES / f"{e.id}.md": page(e, drawn[e.id], found) for e in entries}
    return {PAGES / "README.md": index(entries)} | pages


def stale(pages: dict[Path, str], drawn: dict[str, pictures.Picture | None]) -> list[Path]:
    """Files that are missing, differ from what they should be, or belong to no method."""
    out = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    wanted = {PAGES / f"{name}.png": picture for name, picture in drawn.items() if picture is not None}
    for path, picture in wanted.items():
        if not path.exists() or not pictures.same(path.read_bytes(), picture.pixels):
            out.append(path)
    there = [*PAGES.glob("*.md"), *PAGES.glob("*.png")]
    return out + [path for path in there if path not in pages and path not in wanted]


def main() -> None:
    drawn = {name: pictures.draw(name) for name in METHODS}
    pages = render(drawn)
    old = stale(pages, drawn)
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale, run `make benchmarks`: {', '.join(p.name for p in old)}" if old else 0)
    PAGES.mkdir(parents=True, exist_ok=True)
    for path in old:
        picture = drawn.get(path.stem)
        if path in pages:
            path.write_text(pages[path])
        elif path.suffix == ".png" and picture is not None:
            path.write_bytes(pictures.png(picture.pixels))
        else:
            path.unlink()
    print("wrote " + (", ".join(p.name for p in old) or "nothing, all is up to date"))


if __name__ == "__main__":
    main()
