"""Result files as Markdown, where one row a measurement would not show what matters."""

from __future__ import annotations

from typing import Any


def prefill_table(data: dict[str, Any]) -> str:
    """A result of `benchmarks/prefill_run.py`: for each length its rows by mass kept, and what kind of head keeps it."""
    head = "| recipe | mass kept | computed | plan ms | attend ms | plan, of cuDNN | speed-up over cuDNN |"
    lines = []
    for case in dict.fromkeys(r["case"] for r in data["rows"]):
        mine = sorted((r for r in data["rows"] if r["case"] == case), key=lambda r: -_mass(r))
        dense = next((r["ms"]["median"] for r in mine if r["impl"] == "dense, cuDNN"), None)
        lines += [f"**{case}**", "", head, "| --- " * 7 + "|"]
        for r in mine:
            p, ms = r["params"], r["ms"]["median"]
            if "mass" not in p:
                lines.append(
                    f"| {r['impl']} | 1 | 1 | - | {ms:.2f} | - | {dense / ms:.2f} |" if dense else f"| {r['impl']} |"
                )
                continue
            # Other distances or other keys give other logits, and no share of dense's mass.
            mass = f"{p['mass']:.3f}" if _mass(r) >= 0 else "other logits"
            share = f"{p['plan_ms'] / dense:.1%}" if dense else "-"
            lines.append(
                f"| `{r['impl']}` | {mass} | {p['density_computed']:.3f} | {p['plan_ms']:.2f} | {p['attend_ms']:.2f} | "
                f"{share} | {p['speedup']:.2f} |"
            )
        lines += ["", *_kinds(mine, data.get("floors", {}).get(case.split()[0], {}))]
    return "\n".join(lines).rstrip()


def _kinds(rows: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> list[str]:
    """Where mass and pairs of these rows lie, by kind of head, and what an oracle would need: a table, or nothing."""
    rows = [r for r in rows if r["params"].get("kinds") and _mass(r) >= 0]
    if not rows:
        return []
    kinds = list(rows[0]["params"]["kinds"])
    lines = ["| mass kept of pairs named | all heads | " + " | ".join(kinds) + " |", "| --- " * (2 + len(kinds)) + "|"]
    cell = lambda mass, density: f"{mass:.3f} of {density:.1%}"  # noqa: E731
    for r in rows:
        p = r["params"]
        each = [cell(p["kinds"][k]["mass"], p["kinds"][k]["density"]) for k in kinds]
        lines.append(f"| `{r['impl']}` | {cell(p['mass'], r['density'])} | {' | '.join(each)} |")
    for unit, found in floors.items():
        each = [cell(found[f"{k} mass"], found[f"{k} density"]) if f"{k} mass" in found else "-" for k in kinds]
        lines.append(f"| an oracle, units of {unit} | {cell(0.95, found['density'])} | {' | '.join(each)} |")
    return [*lines, ""]


def compare_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `foveate compare`, as its JSON has them."""
    lines = [
        "| recipe | first token | decode | computed in prefill | KV memory | KL to dense | mass kept | holds the fact |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        if r["error"]:
            lines.append(f"| `{r['recipe']}` | did not run: {r['error']} | | | | | | |")
            continue
        lines.append(
            f"| `{r['recipe']}` | {r['first_token']:.2f} s | {r['tokens_per_second']:.1f}/s | {r['prefill_computed']:.0%} | "
            f"{r['kv_bytes'] / 2**20:.0f} MiB | {r['kl']:.3f} | {r['mass']:.0%} / {r['decode_mass']:.0%} | "
            f"{'yes' if r['answered'] else 'no'} |"
        )
    return "\n".join(lines)


def _mass(row: dict[str, Any]) -> float:
    """For the order of rows: dense first, what has no share of dense's mass last."""
    mass = float(row["params"].get("mass", 2.0))
    return mass if mass <= 1.001 or "mass" not in row["params"] else -1.0
