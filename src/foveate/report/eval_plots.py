"""Figures of an evaluation: fronts of quality against cost, needle grids, perplexity by position. All SVG text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from ..evals.pareto import Point, front
from ..evals.statistics import Paired
from .plots import BLUE, FAINT, INK, ORANGE, colour, subplots, svg

PANELS = {
    "density": ("pairs named in prefill, of the visible", 1.0),
    "first_token": ("time to first token, s", 1.0),
    "step": ("decode step, ms", 1e-3),
    "kv_bytes": ("KV cache, MiB", 2.0**20),
}
CROWDED = 96  # cells of a needle grid from which on numbers are left out
# What the page's variables are where a drawing stands alone.
STYLE = (  # with a ground of its own: a page may be light while the system is dark
    "<style>:root{--ink:#1d2025;--line:#d9dce1;--font:system-ui,sans-serif;background:#fff}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e3e5e9;--line:#3a3f47;background:#16181c}}</style>"
)


def front_panel(found: Sequence[Point], x: str, numbers: dict[str, int]) -> str | None:
    """Score against one cost for the points of one length, the front as a line. None where nothing was measured.

    Args:
        numbers: {settings: row number} that labels and colours a point; dense is a diamond, others are discs. The
            vertical line of a point is the interval of its loss.
    """
    if not _known(found, x):
        return None
    figure, (axis,) = subplots(1, 1, (5.2, 3.1))
    _draw_front(axis, found, x, numbers)
    return svg(figure)


def fronts_file(found: dict[str | None, list[Point]], numbers: dict[str, int]) -> str | None:
    """All protocols and lengths (rows) and costs (columns) in one drawing that stands alone, light and dark; or None."""
    rows = [
        (f"{length:,} tokens" + (f", {protocol}" if protocol else ""), [p for p in every if p.length == length])
        for protocol, every in found.items()
        for length in dict.fromkeys(p.length for p in every)
    ]
    rows = [(title, own) for title, own in rows if any(_known(own, x) for x in PANELS)]
    if not rows:
        return None
    figure, axes = subplots(len(rows), len(PANELS), (13.0, 2.9 * len(rows)))
    for line, (title, own) in enumerate(rows):
        for place, x in enumerate(PANELS):
            axis = axes[line * len(PANELS) + place]
            if _known(own, x):
                _draw_front(axis, own, x, numbers)
            else:
                axis.set_axis_off()
            if place == 0:
                axis.set_title(title, loc="left", fontsize=10, color=INK)
    text = svg(figure)
    at = text.index(">", text.index("<svg")) + 1
    return f"{text[:at]}\n<!-- made from {digest(found)} -->\n{STYLE}{text[at:]}"


def digest(found: dict[str | None, list[Point]]) -> str:
    """What a drawing was made from, so that it is redone when figures change and not when matplotlib does."""
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _known(found: Sequence[Point], x: str) -> list[tuple[Point, float, float]]:
    pairs = [(p, p.value(x), p.value("quality")) for p in found]
    return [(p, a, b) for p, a, b in pairs if a is not None and b is not None]


def _draw_front(axis: Any, found: Sequence[Point], x: str, numbers: dict[str, int]) -> None:
    title, unit = PANELS[x]
    known = [(p, a / unit, 100 * b) for p, a, b in _known(found, x)]
    best = [(a / unit, 100 * b) for _, a, b in _known(front(found, x), x)]
    spans = [(p, a, *_span(p, b)) for p, a, b in known]
    high = max(s[3] for s in spans)
    low = min(high - 4.0, *(s[2] for s in spans))  # scores that are all alike must not look far apart
    right = max(a for _, a, _ in known) * 1.12 or 1.0
    pad = 0.08 * (high - low)
    axis.set_xlim(0, right)
    axis.set_ylim(low - pad, high + pad)
    xs, ys = [a for a, _ in best], [b for _, b in best]
    axis.step([*xs, right], [*ys, ys[-1]], where="post", color=INK, lw=1.1, alpha=0.55, zorder=1)
    for p, a, lo, hi in spans:
        axis.plot([a, a], [lo, hi], color=_colour(p, numbers), lw=1.4, alpha=0.45, zorder=2)
    for p, a, b in known:
        axis.scatter([a], [b], s=80, marker="D" if p.dense else "o", color=_colour(p, numbers), zorder=3, linewidths=0)
    for a, b, text in _labels(known, right, high - low + 2 * pad, numbers):
        axis.annotate(text, (a, b), xytext=(7, 3), textcoords="offset points", color=INK, fontsize=9, zorder=4)
    axis.set_xlabel(title)
    axis.set_ylabel("score")


def _span(p: Point, score: float) -> tuple[float, float]:
    """The interval of the loss, hung on the point's own score."""
    if p.loss is None:
        return score, score
    return score - 100 * (p.loss.high - p.loss.mean), score + 100 * (p.loss.mean - p.loss.low)


def _colour(p: Point, numbers: dict[str, int]) -> str:
    return colour(numbers[p.settings] - 1)


def _labels(
    known: Sequence[tuple[Point, float, float]], width: float, height: float, numbers: dict[str, int]
) -> list[tuple[float, float, str]]:
    """One label for points whose labels would print over each other: (x, y, "2, 5")."""
    groups: list[list[tuple[Point, float, float]]] = []
    for point in sorted(known, key=lambda k: numbers[k[0].settings]):
        near = (g for g in groups if abs(g[0][1] - point[1]) < 0.05 * width and abs(g[0][2] - point[2]) < 0.07 * height)
        if (group := next(near, None)) is not None:
            group.append(point)
        else:
            groups.append([point])
    return [(max(a for _, a, _ in g), g[0][2], ", ".join(str(numbers[p.settings]) for p, _, _ in g)) for g in groups]


def needle_grid(scores: dict[tuple[float, int], tuple[float, int]]) -> str:
    """Depth (rows, 0 to 1 from the start of the text) by length (columns): the score as colour, and as a number.

    Args:
        scores: {(depth, length): (mean score 0 to 1, samples)}; a cell without samples stays empty.
    """
    depths, lengths = sorted({d for d, _ in scores}), sorted({n for _, n in scores})
    wide, high, left, top = 46, 20, 40, 18
    numbered = len(depths) * len(lengths) <= CROWDED
    width, height = left + wide * len(lengths) + 4, top + high * len(depths) + 4
    text = 'font-size="11" fill="var(--ink)" font-family="var(--font)"'
    out = [f'<svg viewBox="0 0 {width} {height}" style="max-width:{round(1.25 * width)}px" role="img">']
    for i, n in enumerate(lengths):
        name = f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"
        out.append(f'<text x="{left + wide * (i + 0.5)}" y="12" text-anchor="middle" {text}>{name}</text>')
    for j, d in enumerate(depths):
        y = top + high * j
        out.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end" {text}>{100 * d:.0f} %</text>')
        for i, n in enumerate(lengths):
            if (d, n) not in scores:
                continue
            mean, count = scores[d, n]
            r, g, b = (round(o + (u - o) * mean) for o, u in zip(ORANGE, BLUE, strict=True))
            x, label = left + wide * i, f"{n:,} tokens, depth {100 * d:.0f} %: {100 * mean:.0f} ({count} samples)"
            out.append(
                f'<rect x="{x}" y="{y}" width="{wide - 1.5}" height="{high - 1.5}" rx="1.5" '
                f'fill="rgb({r},{g},{b})" fill-opacity="0.5"><title>{label}</title></rect>'
            )
            if numbered:
                out.append(
                    f'<text x="{x + wide / 2 - 1}" y="{y + 13.5}" text-anchor="middle" {text}>{100 * mean:.0f}</text>'
                )
    return "".join(out) + "</svg>"


def position_panel(lines: Sequence[tuple[int, dict[int, Paired]]]) -> str:
    """NLL minus dense's by position, one line a recipe with intervals.

    Args:
        lines: (row number, {bucket start P: difference over positions P to 2 P - 1}).
    """
    figure, (axis,) = subplots(1, 1, (5.2, 3.1))
    places = sorted({p for _, own in lines for p in own})
    axis.set_yscale("symlog", linthresh=0.01, linscale=0.7)  # one recipe far off must not flatten the others
    axis.axhline(0, color=FAINT, lw=1.2, zorder=1)
    for at, (number, own) in enumerate(lines):
        nudge = 0.16 * ((at + 0.5) / len(lines) - 0.5) * 2  # intervals side by side, not over each other
        xs = [places.index(p) + nudge for p in sorted(own)]
        gaps = [own[p] for p in sorted(own)]
        reach = [[g.mean - g.low for g in gaps], [g.high - g.mean for g in gaps]]
        axis.errorbar(xs, [g.mean for g in gaps], yerr=reach, color=colour(number - 1), lw=1.3, elinewidth=1.0,
                      marker="o", ms=4.5, zorder=2)  # fmt: skip
        axis.annotate(
            str(number), (xs[-1], gaps[-1].mean), xytext=(7, -3), textcoords="offset points", color=INK, fontsize=9
        )
    axis.set_xticks(range(len(places)), [_short(p) for p in places])
    axis.set_xlim(-0.4, len(places) - 0.4)
    axis.set_xlabel("from position (to twice it)")
    axis.set_ylabel("NLL minus dense's, nats")
    return svg(figure)


def _short(position: int) -> str:
    return f"{position // 1024}K" if position >= 1024 and position % 1024 == 0 else f"{position}"
