"""Evaluation: what each method costs and what it loses, on the user's own model.

    results = foveate.evals.run(model, tokenizer, recipes=["flexprefill@8k"], suites=["ruler"], lengths=[4096], out="eval")
    print(foveate.evals.recommend(results, length=4096, max_loss=0.01).reason)

A task makes samples (`task`), a protocol puts them to the model (`protocols`), a results folder keeps every answer
(`results`), and what is said about recipes is always a paired difference to dense on the same samples (`statistics`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choice import Recommendation, recommend
    from .frontier import write_summary
    from .pareto import Point, front, points
    from .results import Record, Results
    from .runner import run
    from .statistics import Cell, Paired, cells, paired
    from .task import Encoded, Sample, Task, make
    from .text import Source

__all__ = [
    "Cell", "Encoded", "Paired", "Point", "Recommendation", "Record", "Results", "Sample", "Source", "Task",
    "cells", "front", "make", "paired", "points", "recommend", "run", "write_summary",
]  # fmt: skip

# As in foveate/__init__.py: imported when first used, and no name equals that of a submodule.
_HOME = {
    "run": "runner", "Results": "results", "Record": "results",
    "cells": "statistics", "Cell": "statistics", "paired": "statistics", "Paired": "statistics",
    "points": "pareto", "Point": "pareto", "front": "pareto",
    "recommend": "choice", "Recommendation": "choice", "write_summary": "frontier",
    "Task": "task", "Sample": "task", "Encoded": "task", "make": "task", "Source": "text",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
