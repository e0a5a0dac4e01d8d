"""Write what is generated: the tables of README.md from the registry and the results, BENCHMARKS.md from
benchmarks/results/*.json with the drawings in benchmarks/figures, and the break-even lengths that length gates use.
`--check` changes nothing and fails when a file is stale.

    python scripts/render.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
LENGTHS = ROOT / "src" / "foveate" / "assets" / "breakeven.json"


def results() -> dict[str, dict[str, Any]]:
    """Committed result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def evaluations(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of them that are summaries of evaluations."""
    from foveate.evals.frontier import load_summary

    return {stem: load_summary(RESULTS / f"{stem}.json") for stem in found if stem.startswith("eval_")}


def drawings(found: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """Fronts of every evaluation, throughput of kernels. A drawing made from the same figures stays as it is: another
    matplotlib draws the same points with other bytes."""
    from foveate.evals.frontier import points_of
    from foveate.report.bench_plots import drawing, reused
    from foveate.report.eval_plots import digest, fronts_file

    out = {}
    for stem, data in evaluations(found).items():
        if len(data["recipes"]) < 2:  # dense alone has no front
            continue
        path, own = FIGURES / f"{stem}.svg", points_of(data)
        there = path.read_text() if path.exists() else ""
        numbers = {r["settings"]: i for i, r in enumerate(data["recipes"], 1)}
        text = there if f"made from {digest(own)} " in there else fronts_file(own, numbers)
        if text is not None:
            out[path] = text
    for stem, data in found.items():
        path = FIGURES / f"{stem}.svg"
        there = path.read_text() if path.exists() else ""
        text = there if "bench" in data and reused(there, data) else drawing(stem, data)
        if text is not None:
            out[path] = text
    return out


# ---------------------------------------------------------------------- README
def methods_table() -> str:
    from foveate.registry import METHODS, get

    lines = [
        "| method | serves | selection | lists per | needs | presets | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in METHODS:
        m = get(name)
        share = m.share if isinstance(m.share, str) else "head"
        presets = ", ".join(f"`@{p}`" for p in m.presets) or "-"
        lines.append(f"| `{name}` | {', '.join(m.roles)} | {m.selection} | {share} | {m.needs} | {presets} | {m.source} |")
    return "\n".join(lines)


def figures(found: dict[str, dict[str, Any]]) -> str:
    """The figures README shows, each straight from a row of a result file."""
    from foveate.bench.tables import compare_table

    out = []
    if (demo := found.get("cpu_compare")) is not None:
        facts, rows = demo["facts"], demo["rows"]
        out.append(
            f"`foveate compare`, {facts['model']} reading {facts['prompt']}, {facts['dtype']}, {facts['device']} "
            f"(one run, {facts['date']}):\n\n" + compare_table(rows)
        )
    for stem in ("cpu_prefill", "cpu_decode"):
        if (bench := found.get(stem)) is not None:
            out.append(f"{bench_title(bench)}:\n\n" + end_to_end_table(bench))
    if (blocks := found.get("h100_blocks_fa4")) is not None:
        out.append(
            f"Block lists on one {blocks['device']}, 32 query and 8 kv heads, D 128, bf16, causal, blocks of 128 queries; "
            "TFLOP/s over kept pairs, all in one process:\n\n"
            "![TFLOP/s against density](benchmarks/figures/h100_blocks_fa4.svg)\n\n" + blocks_table(blocks)
        )
    if (columns := found.get("h100_columns")) is not None:
        out.append(
            f"Tiles and single keys (96 tiles of 64 and 900 keys for each block of queries) on one {columns['device']}, the "
            "same heads; TFLOP/s over kept pairs:\n\n" + columns_table(columns)
        )
    if (pages := found.get("h100_decode_pages")) is not None:
        out.append(
            f"One decode step of one layer on one {pages['device']}, 32 query and 8 kv heads, D 128, bf16, 2,048 tokens "
            "kept, page bounds, selection and attention included, in a CUDA graph:\n\n" + decode_table(pages)
        )
    if (steps := found.get("h100_step")) is not None:
        out.append(
            f"A whole decode step of a model of Llama-3-8B's shape on one {steps['device']}, bf16, random weights and "
            "contexts, replayed as a CUDA graph; in brackets what is left after the step of `no attention` is taken off:\n\n"
            + "\n\n".join(step_table(found[s]) for s in ("h100_step", "h100_step_32k") if s in found)
        )
    if (backward := found.get("h100_backward")) is not None:
        out.append(
            f"Backward of block lists on one {backward['device']}, the same shapes, 32K tokens; TFLOP/s over kept pairs:\n\n"
            + "\n\n".join(backward_table(found[s]) for s in ("h100_backward", "h100_backward_64") if s in found)
        )
    if (quality := evaluations(found).get("eval_smollm2")) is not None:
        names = "; ".join(f"{i} `{r['recipe']}`" for i, r in enumerate(quality["recipes"], 1))
        out.append(
            f"Quality against cost of {quality['facts']['model']} on one {quality['facts']['hardware']}, over retrieval "
            "tasks that dense does; a model of 135 million parameters tests methods, it does not stand for large models. "
            f"{names}:\n\n![Score against density, time and memory](benchmarks/figures/eval_smollm2.svg)"
        )
    return "\n\n".join(out)


def columns_table(data: dict[str, Any]) -> str:
    """TFLOP/s by case, through `attend`."""
    rows = [r for r in data["rows"] if r["impl"] != "gluon kernel"]
    title = {"gluon": "foveate gluon", "triton": "foveate triton", "cudnn": "cuDNN, dense"}
    lines = [f"| case | density | {' | '.join(title.values())} |", "| --- " * (2 + len(title)) + "|"]
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = {r["impl"]: r for r in rows if r["case"] == case}
        cells = [f"{mine[i]['tflops']:.0f}" if i in mine else "-" for i in title]
        lines.append(f"| {case} | {min(r['density'] for r in mine.values()):.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_table(data: dict[str, Any]) -> str:
    """Microseconds of a whole decode step by batch and length."""
    rows = [r for r in data["rows"] if ":" not in r["impl"]]
    impls = list(dict.fromkeys(r["impl"] for r in rows))
    lines = ["| batch | tokens | " + " | ".join(impls) + " |", "| --- " * (2 + len(impls)) + "|"]
    for b, n in sorted({(r["params"]["b"], r["params"]["n"]) for r in rows}):
        mine = {r["impl"]: 1000 * r["ms"]["median"] for r in rows if (r["params"]["b"], r["params"]["n"]) == (b, n)}
        lines.append(f"| {b} | {n} | " + " | ".join(f"{mine[i]:.0f} us" if i in mine else "-" for i in impls) + " |")
    return "\n".join(lines)


def step_table(data: dict[str, Any]) -> str:
    """Milliseconds of a replayed step by recipe and case, attention's part of it, and those of a plain step."""
    rows = data["rows"]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    heads = [f"{c} | density | without graphs" for c in cases]
    lines = ["| recipe | " + " | ".join(heads) + " |", "| --- " * (1 + 3 * len(cases)) + "|"]
    for recipe in dict.fromkeys(r["params"]["recipe"] for r in rows):
        cells = []
        for c in cases:
            mine = {r["params"]["graphs"]: r for r in rows if (r["case"], r["params"]["recipe"]) == (c, recipe)}
            part = mine[1]["params"].get("attention_ms") if 1 in mine else None
            bracket = "" if part is None else f" ({part:.2f})"
            density = next((r["density"] for r in mine.values() if r["density"] is not None), None)
            cells.append(f"{mine[1]['ms']['median']:.2f} ms{bracket}" if 1 in mine else "-")
            cells.append("-" if density is None else f"{density:.3f}")
            cells.append(f"{mine[0]['ms']['median']:.2f} ms" if 0 in mine else "-")
        lines.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def backward_table(data: dict[str, Any]) -> str:
    """TFLOP/s by case and whole implementation (not its parts)."""
    rows = [r for r in data["rows"] if r["tflops"] and not r["impl"].startswith(("dq", "dkdv", "fa4 attend"))]
    least = {r["case"]: min(o["density"] for o in rows if o["case"] == r["case"]) for r in rows}
    rows.sort(key=lambda r: (-r["params"]["width"], -least[r["case"]], r["impl"] != "ours"))
    impls = list(dict.fromkeys(r["impl"] for r in rows))
    title = {"ours": "foveate gluon", "triton": "foveate triton", "cudnn": "cuDNN, dense", "flash": "PyTorch flash, dense"}
    title |= {"fa4": "FlashAttention-4", "fa4 dense": "FlashAttention-4, dense"}
    named = " | ".join(title.get(i, i) for i in impls)
    lines = [f"| case | density | {named} |", "| --- " * (2 + len(impls)) + "|"]
    for case in dict.fromkeys(r["case"] for r in rows):
        mine = {r["impl"]: r for r in rows if r["case"] == case}
        cells = [f"{mine[i]['tflops']:.0f}" if i in mine else "-" for i in impls]
        lines.append(f"| {case} | {least[case]:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_title(bench: dict[str, Any]) -> str:
    p = bench["rows"][0]["params"] | bench.get("facts", {})
    facts = ", ".join(f"{k} {v}" for k, v in p.items() if k in ("model", "tokens", "dtype"))
    return f"`foveate bench {bench['bench']}` ({facts}; {bench['device']}), alternating rounds in one process"


def end_to_end_table(bench: dict[str, Any]) -> str:
    base = bench["rows"][0]["ms"]["median"]
    lines = ["| what | median | spread | of the first row |", "| --- | --- | --- | --- |"]
    for r in bench["rows"]:
        ms = r["ms"]
        lines.append(
            f"| {r['impl']} | {ms['median']:.0f} ms | {ms['min']:.0f} to {ms['max']:.0f} | {ms['median'] / base:.2f} |"
        )
    return "\n".join(lines)


def blocks_table(data: dict[str, Any]) -> str:
    """TFLOP/s by case (rows) and implementation (columns) at D 128."""
    rows = [r for r in data["rows"] if r["params"]["D"] == 128]
    impls = [i for i in ("gluon", "fa4", "triton", "cudnn") if any(r["impl"] == i for r in rows)]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    title = {"gluon": "foveate gluon", "triton": "foveate triton", "fa4": "FlashAttention-4", "cudnn": "cuDNN, dense"}
    lines = [
        "| tokens | key block | density | " + " | ".join(title[i] for i in impls) + " |",
        "| --- " * (3 + len(impls)) + "|",
    ]
    for case in cases:
        mine = {r["impl"]: r for r in rows if r["case"] == case}
        one = next(iter(mine.values()))
        density = min(r["density"] for r in mine.values())
        cells = [f"{mine[i]['tflops']:.0f}" if i in mine else "-" for i in impls]
        lines.append(f"| {one['params']['N']} | {one['params']['width']} | {density:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- BENCHMARKS.md
def benchmarks(found: dict[str, dict[str, Any]], figures: Iterable[Path]) -> str:
    from foveate.bench import breakeven
    from foveate.bench.tables import compare_table, prefill_table
    from foveate.evals.frontier import markdown

    parts = [
        "# Benchmarks",
        "Generated by `make benchmarks` from `benchmarks/results/*.json`; every figure comes from a run, with the dense "
        "baseline in the same process. Medians, with the smallest and largest sample. What was expected, and why it came "
        "out otherwise, is in [benchmarks/NOTES.md](benchmarks/NOTES.md).",
    ]
    drawn = {path.stem: f"benchmarks/figures/{path.name}" for path in figures}
    summaries = evaluations(found)
    for stem, data in found.items():
        parts.append(f"## {stem}")
        if stem in summaries:
            parts.append(markdown(summaries[stem], drawn.get(stem)))
            continue
        if "bench" not in data:  # a comparison
            facts = data["facts"]
            parts.append(f"{facts['model']}, {facts['prompt']}, {facts['dtype']}, {facts['device']}, {facts['date']}.")
            parts.append(compare_table(data["rows"]))
            continue
        versions = ", ".join(
            f"{k} {v}" for k, v in data["versions"].items() if k in ("python", "torch", "triton", "transformers")
        )
        parts.append(f"{data['bench']}: {data['device']}, {versions}, commit `{data['commit'][:12]}`, {data['date']}.")
        if stem in drawn:
            parts.append(f"![{stem}]({drawn[stem]})")
        if data["bench"] == "breakeven":
            parts.append(BREAKEVEN)
            parts.append(breakeven.markdown(data))
            continue
        if data["bench"] == "prefill attention":
            parts.append(PREFILL)
            parts.append(prefill_table(data))
            continue
        parts.append(rows_table(data["rows"]))
    return "\n\n".join(parts) + "\n"


PREFILL = (
    "One layer with the heads of Llama-3-8B on made queries and keys (half of the heads peaked, some diagonal, some "
    "clustered, one in eight flat): masses compare recipes with each other and say nothing about a model. Estimator, "
    "selection and attention are all counted; recipes and cuDNN's dense attention take turns in one process."
)

BREAKEVEN = (
    "Prefill: one layer on made prompts (see above), estimator included, beside the faster of PyTorch's and our dense "
    "attention. Decode: a step of all 32 attention layers, replayed as a CUDA graph where the method can be captured, "
    "beside dense steps. `foveate bench breakeven` measures another machine; `gate=True` runs dense below these lengths."
)


def lengths(found: dict[str, dict[str, Any]]) -> str:
    """The table of break-even lengths that comes with the package, the newest measurement of each."""
    from foveate.bench.breakeven import entries
    from foveate.payoff import dumped, merged

    data = sorted((d for d in found.values() if d.get("bench") == "breakeven"), key=lambda d: d["date"])
    return dumped(merged(*(entries(d) for d in data)))


def rows_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | impl | parameters | median | min to max | TFLOP/s | density | largest error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        params = ", ".join(f"{k}={v}" for k, v in (r.get("params") or {}).items() if isinstance(v, (int, float, str)))
        ms = r["ms"]
        number = lambda x, form: "-" if x is None else format(x, form)  # noqa: E731
        lines.append(
            f"| {r['case']} | {r['impl']} | {params} | {ms['median']:.3f} ms | {ms['min']:.3f} to {ms['max']:.3f} | "
            f"{number(r.get('tflops'), '.0f')} | {number(r.get('density'), '.3f')} | {number(r.get('max_error'), '.1e')} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------- files
def put(text: str, name: str, new: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{new}\n{end}{tail}"


def render() -> dict[Path, str]:
    """Every generated file and its contents."""
    found = results()
    readme = ROOT / "README.md"
    text = put(readme.read_text(), "methods", methods_table())
    drawn = drawings(found)
    pages = {readme: put(text, "figures", figures(found)), ROOT / "BENCHMARKS.md": benchmarks(found, drawn)}
    return pages | {LENGTHS: lengths(found)} | drawn


def main() -> None:
    pages = render()
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale, run `make benchmarks`: {', '.join(p.name for p in stale)}" if stale else 0)
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    print("wrote " + (", ".join(p.name for p in stale) or "nothing, all is up to date"))


if __name__ == "__main__":
    main()
