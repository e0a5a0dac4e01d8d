"""Result files as Markdown tables that show what matters: one row a case, implementations beside each other."""

from __future__ import annotations

from typing import Any


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


def blocks_table(data: dict[str, Any], width: int | None = None) -> str:
    """TFLOP/s by case (rows) and implementation (columns) at D 128, `width`: of this key block alone."""
    blocks = (r for r in data["rows"] if " keep " in r["case"] and r["params"]["D"] == 128)
    rows = [r for r in blocks if width in (None, r["params"]["width"])]
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
