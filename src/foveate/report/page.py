"""One self-contained HTML page of a comparison."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path
from typing import Any

from ..measure import Comparison
from . import plots
from .files import write_atomic
from .table import COLUMNS, percent, summary


def write(comparison: Comparison, folder: str | Path, command: list[str] | None = None) -> Path:
    """Render to `folder/index.html`; the old report stays if that fails. Returns the path."""
    return write_atomic(Path(folder) / "index.html", render(comparison, command))


def render(comparison: Comparison, command: list[str] | None = None) -> str:
    """The page as text. `command`: the words of the command line that reproduces it."""
    from jinja2 import Environment, StrictUndefined

    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["percent"] = percent
    env.filters["breakable"] = _breakable
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return env.from_string(source).render(
        facts=comparison.facts,
        rows=[_row(i, comparison) for i in range(len(comparison.rows))],
        columns=COLUMNS,
        summary=summary(comparison),
        command=shlex.join(command) if command else None,
        drawn=_drawn(comparison) if plots.available() else None,
    )


def _row(index: int, comparison: Comparison) -> dict[str, Any]:
    row = comparison.rows[index]
    cells = [column.cell(row, comparison.dense) for column in COLUMNS]
    return {"number": index + 1, "colour": plots.colour(index), "data": row, "cells": cells}


def _drawn(comparison: Comparison) -> dict[str, Any]:
    """Everything matplotlib makes, as SVG text and data addresses."""
    from markupsafe import Markup

    looks = _looks(comparison)
    maps = [
        {
            "rows": look["rows"],
            "computed": plots.head_map(look["row"].head_density),
            "missed": plots.missed_map(look["row"].head_mass),
        }
        for look in looks
        if look["row"].head_density and look["row"].head_mass
    ]
    gallery = [
        {
            "layer": picture.layer,
            "head": picture.head,
            "mass": plots.mass_picture(picture),
            "cells": [
                (look["rows"], plots.layout_picture(mine), mine.kept)
                for look in looks
                if (mine := plots.pictures_of(look["row"]).get((picture.layer, picture.head))) is not None
            ],
        }
        for picture in comparison.dense.pictures
        if looks
    ]
    shape = comparison.dense.head_density
    return {
        "speed": Markup(plots.speed_against_agreement(comparison)),
        "bytes": Markup(plots.kv_bars(comparison)),
        "maps": maps,
        "shape": (len(shape), len(shape[0])) if shape else (0, 0),
        "gallery": gallery,
    }


def _looks(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows whose prefill left anything out; rows with the same pictures (one prefill method) stand together."""
    found: list[dict[str, Any]] = []
    for i, row in enumerate(comparison.rows):
        if not any(_drops(picture) for picture in row.pictures):
            continue
        label = {"number": i + 1, "colour": plots.colour(i), "name": row.recipe}
        same = next((look for look in found if look["row"].pictures == row.pictures), None)
        if same is not None:
            same["rows"].append(label)
        else:
            found.append({"row": row, "rows": [label]})
    return found


def _breakable(text: str) -> Any:
    """A recipe's text with places where a narrow column may break it."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([+:,@]|=)", r"\1<wbr>", str(escape(text))))


def _drops(picture: Any) -> bool:
    """Whether this head left out anything that is visible (an empty cell above the diagonal is not)."""
    return any(
        c < 1.0 and m > 0 for cs, ms in zip(picture.computed, picture.mass, strict=True) for c, m in zip(cs, ms, strict=True)
    )
