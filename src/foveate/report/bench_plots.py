"""Drawings of kernel benchmarks: throughput against density, estimators and speed-ups against length, where time goes.
SVG text that stands alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..bench.breakeven import crossing
from .eval_plots import STYLE
from .plots import INK, PALETTE, colour, subplots, svg

BLOCKS = {"gluon": "foveate, Gluon", "fa4": "FlashAttention-4", "triton": "foveate, Triton", "cudnn": "cuDNN, dense"}
BACKWARD = {
    "ours": "foveate, Triton",
    "fa4": "FlashAttention-4",
    "flash": "FlashAttention-2, dense",
    "cudnn": "cuDNN, dense",
}
CUT = 2.0  # of dense's time, where bars are cut


def drawing(stem: str, data: dict[str, Any]) -> str | None:
    """The drawing of a result file, or None for files without one."""
    make = _DRAWN.get(stem) or _KINDS.get(data.get("bench", ""))
    if make is None or not data["rows"]:
        return None
    figure = make(data["rows"])
    if figure is None:
        return None
    text = svg(figure)
    at = text.index(">", text.index("<svg")) + 1
    return f"{text[:at]}\n<!-- made from {digest(data)} -->\n{STYLE}{text[at:]}"


def digest(data: dict[str, Any]) -> str:
    """What a drawing was made from, so that it is redone when figures change and not when matplotlib does."""
    return hashlib.sha256(json.dumps(data["rows"], sort_keys=True).encode()).hexdigest()[:16]


def _blocks(rows: list[dict[str, Any]]) -> Any:
    mine = [r for r in rows if r["params"]["D"] == 128 and " keep " in r["case"]]  # block lists
    panels = sorted({(r["params"]["N"], r["params"]["width"]) for r in mine}, key=lambda p: (p[0], -p[1]))
    figure, axes = subplots(1, len(panels), (4.6 * len(panels), 3.4))
    for axis, (n, width) in zip(axes, panels, strict=True):
        own = [r for r in mine if (r["params"]["N"], r["params"]["width"]) == (n, width)]
        _throughput(axis, own, BLOCKS)
        axis.set_title(f"{n // 1024}K tokens, key blocks of {width}", loc="left", fontsize=10, color=INK)
    return figure


def _backward(rows: list[dict[str, Any]]) -> Any:
    widths = sorted({r["params"]["width"] for r in rows}, reverse=True)
    figure, axes = subplots(1, len(widths), (4.6 * len(widths), 3.4))
    for axis, width in zip(axes, widths, strict=True):
        _throughput(axis, [r for r in rows if r["params"]["width"] == width and r["tflops"]], BACKWARD)
        axis.set_title(f"backward, 32K tokens, key blocks of {width}", loc="left", fontsize=10, color=INK)
    return figure


def _throughput(axis: Any, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """TFLOP/s over kept pairs against density; an implementation that computes everything is a level line."""
    for i, (impl, title) in enumerate(names.items(), 1):
        found = sorted((r["density"], r["tflops"]) for r in rows if r["impl"] == impl)
        if not found:
            continue
        if min(d for d, _ in found) > 0.99:
            axis.axhline(sum(t for _, t in found) / len(found), color=colour(0), lw=1.2, ls=(0, (4, 3)))
            at = (1.0, found[0][1])
            style: dict[str, Any] = dict(xytext=(-4, 4), textcoords="offset points", ha="right", fontsize=8, color=INK)
            axis.annotate(title, at, xycoords=("axes fraction", "data"), **style)
            continue
        axis.plot(*zip(*found, strict=True), color=colour(i), lw=1.6, marker="o", ms=4, label=title)
    axis.set_xscale("log")
    low = min(r["density"] for r in rows)
    ticks = [d for d in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if d >= 0.8 * low]
    axis.set_xticks(ticks, [f"{100 * d:g} %" for d in ticks])
    axis.set_xticks([], minor=True)
    axis.set_ylim(0, 1.12 * max(r["tflops"] for r in rows))
    axis.set_xlabel("density, pairs kept of the visible")
    axis.set_ylabel("TFLOP/s over kept pairs")
    axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")


def _estimate(rows: list[dict[str, Any]]) -> Any:
    """Share of dense attention's time that an estimator takes, by length."""
    lengths = sorted({r["params"]["n"] for r in rows})
    shown = list(dict.fromkeys(r["impl"] for r in rows if r["impl"].startswith("plan of") and r["impl"].endswith(": fused")))
    figure, (axis,) = subplots(1, 1, (6.4, 3.4))
    for i, impl in enumerate(shown, 1):
        found = {r["params"]["n"]: 100 * r["params"]["share"] for r in rows if r["impl"] == impl}
        points = [(n, found[n]) for n in lengths if n in found]
        axis.plot(*zip(*points, strict=True), color=colour(i), lw=1.6, marker="o", ms=4, label=impl.removesuffix(": fused"))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("estimator, % of cuDNN's dense time")
    axis.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def _breakeven(rows: list[dict[str, Any]]) -> Any:
    """Speed-up over dense against length with the break-even marked, and below it where the time goes at the longest."""
    phases = list(dict.fromkeys(r["params"]["phase"] for r in rows))
    most = max(len({r["impl"] for r in rows if r["params"]["phase"] == p}) for p in phases)
    figure, axes = subplots(2, len(phases), (5.4 * len(phases), 4.6 + 0.42 * most))
    for i, phase in enumerate(phases):
        mine = [r for r in rows if r["params"]["phase"] == phase]
        axes[i].set_title(phase, loc="left", fontsize=10, color=INK)
        _speedups(axes[i], mine)
        longest = max(r["params"]["n"] for r in mine)
        last = [r for r in mine if r["params"]["n"] == longest and "plan_ms" in r["params"]]
        _times(axes[len(phases) + i], [(r["impl"], r["params"], r["params"]["dense_median"]) for r in last])
        axes[len(phases) + i].set_title(f"{longest / 1024:g}K tokens", loc="left", fontsize=10, color=INK)
    return figure


def _speedups(axis: Any, rows: list[dict[str, Any]]) -> None:
    lengths = sorted({r["params"]["n"] for r in rows})
    axis.axhline(1.0, color=colour(0), lw=1.2, ls=(0, (4, 3)))
    for i, impl in enumerate(dict.fromkeys(r["impl"] for r in rows), 1):
        points = sorted((r["params"]["n"], r["params"]["speedup"]) for r in rows if r["impl"] == impl)
        at = crossing(points)
        style = dict(color=PALETTE[1 + (i - 1) % (len(PALETTE) - 1)], marker="os^D"[(i - 1) // (len(PALETTE) - 1) % 4])
        said = "never up to here" if at is None else f"from {at:,}"
        axis.plot(*zip(*points, strict=True), lw=1.6, ms=3, label=f"{_cut(impl)}: {said}", **style)
        if at is not None:
            axis.plot([at], [max(1.0, points[0][1]) if at == points[0][0] else 1.0], **style, ms=8, mfc="none", mew=1.6)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n / 1024:g}K" for n in lengths])
    axis.set_xticks([], minor=True)
    axis.set_yscale("log", base=2)
    values = [r["params"]["speedup"] for r in rows]
    ticks = [t for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16) if min(values) / 1.5 < t < max(values) * 1.5]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlabel("tokens; a ring marks the break-even")
    axis.set_ylabel("speed-up over dense")
    axis.legend(fontsize=7, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(0.0, -0.2))


def _prefill(rows: list[dict[str, Any]]) -> Any:
    """Where the time of prefill attention goes, a panel a length, fastest first."""
    cases = list(dict.fromkeys(r["case"] for r in rows))
    found = {}
    for case in cases:
        own = [r for r in rows if r["case"] == case]
        dense = next((r["ms"]["median"] for r in own if r["impl"] == "dense, cuDNN"), None)
        if dense is not None:
            found[case] = [(r["impl"], r["params"], dense) for r in own if "plan_ms" in r["params"]]
    if not found:
        return None
    tall = max(len(bars) for bars in found.values())
    figure, axes = subplots(1, len(found), (6.2 * len(found), 1.2 + 0.24 * tall))
    for axis, (case, bars) in zip(axes, found.items(), strict=True):
        bars.sort(key=lambda b: b[1]["plan_ms"] + b[1]["attend_ms"])
        _times(axis, bars)
        axis.set_title(case, loc="left", fontsize=10, color=INK)
    return figure


def _times(axis: Any, bars: list[tuple[str, dict[str, Any], float]]) -> None:
    """(name, its `plan_ms` and `attend_ms`, milliseconds of dense) as stacked bars in shares of dense; long ones are cut."""
    places = range(len(bars))
    plan = [p["plan_ms"] / dense for _, p, dense in bars]
    rest = [p["attend_ms"] / dense for _, p, dense in bars]
    axis.barh(places, plan, color=PALETTE[2], height=0.66, label="estimate and select")
    axis.barh(places, rest, left=plan, color=PALETTE[1], height=0.66, label="attend")
    end = min(CUT, 1.15 * max([1.0, *(a + b for a, b in zip(plan, rest, strict=True))]))
    for place, (a, b) in enumerate(zip(plan, rest, strict=True)):
        inside = a + b > 0.9 * end
        text = dict(xytext=(-4 if inside else 4, -3), textcoords="offset points", color="#fff" if inside else INK)
        axis.annotate(f"{a + b:.2f}", (min(a + b, end), place), ha="right" if inside else "left", fontsize=7, **text)
    axis.axvline(1.0, color=colour(0), lw=1.2, ls=(0, (4, 3)))
    axis.set_yticks(list(places), [_cut(name) for name, _, _ in bars], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, end)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("time, dense = 1")
    axis.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def _cut(text: str) -> str:
    text = text.removeprefix("prefill=").removeprefix("decode=")
    return text if len(text) <= 44 else text[:41] + "..."


def reused(there: str, data: dict[str, Any]) -> bool:
    """Whether `there` was drawn from the same figures."""
    return f"made from {digest(data)} " in there


_DRAWN = {"h100_blocks_fa4": _blocks, "h200_blocks_fa4": _blocks, "h100_backward": _backward, "h100_estimate": _estimate}
_KINDS = {"breakeven": _breakeven, "prefill attention": _prefill}
