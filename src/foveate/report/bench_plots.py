"""Drawings of kernel benchmarks: throughput against density, estimators against length. SVG text that stands alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .eval_plots import STYLE
from .plots import INK, colour, subplots, svg

BLOCKS = {"gluon": "foveate, Gluon", "fa4": "FlashAttention-4", "triton": "foveate, Triton", "cudnn": "cuDNN, dense"}
BACKWARD = {
    "ours": "foveate, Triton",
    "fa4": "FlashAttention-4",
    "flash": "FlashAttention-2, dense",
    "cudnn": "cuDNN, dense",
}


def drawing(stem: str, data: dict[str, Any]) -> str | None:
    """The drawing of a result file, or None for files without one."""
    if stem not in _DRAWN:
        return None
    text = svg(_DRAWN[stem](data["rows"]))
    at = text.index(">", text.index("<svg")) + 1
    return f"{text[:at]}\n<!-- made from {digest(data)} -->\n{STYLE}{text[at:]}"


def digest(data: dict[str, Any]) -> str:
    """What a drawing was made from, so that it is redone when figures change and not when matplotlib does."""
    return hashlib.sha256(json.dumps(data["rows"], sort_keys=True).encode()).hexdigest()[:16]


def _blocks(rows: list[dict[str, Any]]) -> Any:
    mine = [r for r in rows if r["params"]["D"] == 128]
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


def reused(there: str, data: dict[str, Any]) -> bool:
    """Whether `there` was drawn from the same figures."""
    return f"made from {digest(data)} " in there


_DRAWN = {"h100_blocks_fa4": _blocks, "h100_backward": _backward, "h100_estimate": _estimate}
