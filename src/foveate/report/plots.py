"""Figures of the page. Lines and text are SVG in the page's own colours, heat maps are small PNGs; nothing is linked."""

from __future__ import annotations

import base64
import io
from typing import Any

from ..diagnosis import Picture
from ..measure import Comparison, Row

PALETTE = ("#8a8f98", "#4c78a8", "#e07b28", "#3f9b57", "#c8474f", "#9467a8", "#8c6a4f", "#2f9a9a", "#b5a21e", "#d16ba5")
INK, FAINT = "#010203", "#040506"  # stand for the page's CSS variables, see svg
BLUE, ORANGE = (0x3B, 0x76, 0xB5), (0xE0, 0x6A, 0x1B)
FULL = 0.25  # attention mass of a cell that is drawn at full strength


def colour(index: int) -> str:
    """The colour of a row; dense, the first, is grey."""
    return PALETTE[index % len(PALETTE)]


def available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def speed_against_agreement(comparison: Comparison) -> str:
    """Two panels, first token and decode: speed relative to dense against KL from dense. Top right is best. SVG."""
    dense, rows = comparison.dense, [(i, r) for i, r in enumerate(comparison.rows) if r.error is None]
    figure, axes = subplots(1, 2, (9.6, 3.4))
    panels = (
        ("first token", [(i, _ratio(dense.first_token, r.first_token), r.kl) for i, r in rows]),
        ("decode", [(i, _ratio(r.tokens_per_second, dense.tokens_per_second), r.kl) for i, r in rows]),
    )
    for axis, (title, points) in zip(axes, panels, strict=True):
        known = [(i, x, max(y, 0.0)) for i, x, y in points if x is not None and y is not None]
        axis.set_yscale("symlog", linthresh=1e-3, linscale=0.6)
        top = max([y for _, _, y in known] + [1e-2])
        axis.set_ylim(top * 2.5, -4e-4)
        lo, hi = min([x for _, x, _ in known] + [1.0]), max([x for _, x, _ in known] + [1.0])
        pad = 0.12 * max(hi - lo, 0.3)
        axis.set_xlim(lo - pad, hi + pad)
        axis.axvline(1.0, color=FAINT, lw=1, ls=(0, (3, 3)), zorder=0)
        for i, x, y in known:
            axis.scatter([x], [y], s=95, color=colour(i), zorder=3, linewidths=0)
        for x, y, text in _clusters(known, (hi - lo) + 2 * pad):
            axis.annotate(text, (x, y), xytext=(8, -3), textcoords="offset points", color=INK, fontsize=9)
        axis.set_xlabel(f"speed of the {title}, dense = 1")
        axis.set_ylabel("KL from dense (nats), better upwards")
    return svg(figure)


def _clusters(points: list[tuple[int, float, float]], width: float) -> list[tuple[float, float, str]]:
    """One label for points that would print over each other: (x, y, "2, 5")."""
    groups: list[list[tuple[int, float, float]]] = []
    for point in points:
        near = (g for g in groups if abs(g[0][1] - point[1]) < 0.05 * width and _close(g[0][2], point[2]))
        if (group := next(near, None)) is not None:
            group.append(point)
        else:
            groups.append([point])
    return [(max(p[1] for p in g), g[0][2], ", ".join(str(p[0] + 1) for p in g)) for g in groups]


def _close(a: float, b: float) -> bool:
    small, large = sorted((max(a, 1e-3), max(b, 1e-3)))
    return large / small < 1.6


def kv_bars(comparison: Comparison) -> str:
    """Bytes of every row's cache. SVG."""
    rows = [(i, r) for i, r in enumerate(comparison.rows) if r.kv_bytes is not None]
    figure, (axis,) = subplots(1, 1, (9.6, 0.5 + 0.34 * len(rows)))
    values = [(r.kv_bytes or 0) / 2**20 for _, r in rows]
    places = list(range(len(rows)))
    axis.barh(places, values, color=[colour(i) for i, _ in rows], height=0.62, zorder=3)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:,.1f}" if value < 100 else f"{value:,.0f}", (value, place), xytext=(5, -3),
                      textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
    axis.set_yticks(places, [f"{i + 1}  {_short(r.recipe)}" for i, r in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max([*values, 1e-9]))
    axis.set_xlabel("MiB allocated")
    axis.grid(axis="y", visible=False)
    return svg(figure)


def head_map(values: list[list[float]]) -> str:
    """`[layers][heads]` in 0..1 as a PNG data address, layers from left to right."""
    return _png([[(*BLUE, min(1.0, v)) for v in column] for column in zip(*values, strict=True)])


def missed_map(kept: list[list[float]]) -> str:
    """`[layers][heads]` of mass kept, drawn as the mass left out (full colour from `FULL`)."""
    return _png([[(*ORANGE, _strength(1 - v)) for v in column] for column in zip(*kept, strict=True)])


def mass_picture(picture: Picture) -> str:
    """The dense attention mass of one head. PNG data address."""
    return _png([[(*ORANGE, _strength(v)) for v in row] for row in picture.mass])


def layout_picture(picture: Picture) -> str:
    """What one head computed (blue) and the attention mass outside of it (orange). PNG data address."""
    rows = zip(picture.computed, picture.mass, strict=True)
    return _png([[_over(c, _strength(m * (1 - c))) for c, m in zip(*row, strict=True)] for row in rows])


def _strength(mass: float) -> float:
    return float(min(1.0, mass / FULL) ** 0.5)


def _over(computed: float, missed: float) -> tuple[float, float, float, float]:
    """Orange at `missed` over blue at `computed`: colour and opacity."""
    blue = 0.85 * min(1.0, computed) * (1 - missed)
    alpha = missed + blue
    if alpha <= 0:
        return 0, 0, 0, 0
    r, g, b = ((missed * o + blue * c) / alpha for o, c in zip(ORANGE, BLUE, strict=True))
    return r, g, b, alpha


# ---------------------------------------------------------------------- matplotlib
def subplots(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    """(figure, its axes row by row) in the page's style; `inches` is width and height."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")  # no pyplot: no global state, no display
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as SVG text whose inks and font are the page's CSS variables."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "foveate"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    return text.replace("font: 9px 'sans-serif'", "font: 9px var(--font)").replace("sans-serif", "var(--font)")


def _png(rows: list[list[tuple[float, float, float, float]]]) -> str:
    """Pixels (r, g, b of 255, opacity of 1) as a data address; the page scales them up without smoothing."""
    import numpy as np
    from matplotlib.image import imsave

    pixels = np.array(rows, dtype=np.float64)
    pixels[..., 3] = pixels[..., 3].clip(0, 1) * 255
    out = io.BytesIO()
    imsave(out, pixels.round().astype(np.uint8), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _short(text: str) -> str:
    return text if len(text) <= 44 else text[:41] + "..."


def pictures_of(row: Row) -> dict[tuple[int, int], Picture]:
    """A row's pictures by (layer, head)."""
    return {(p.layer, p.head): p for p in row.pictures}
