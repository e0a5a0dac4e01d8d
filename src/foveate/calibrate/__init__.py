"""Calibration: a method's offline search on the user's own model and texts, as a profile that others can load.

    profile = foveate.calibrate.run(model, tokenizer, "minference", out="plan", target="recall=0.95")
    foveate.apply(model, "minference:profile=plan")

`capture` hands queries, keys and values of one layer at a time to a search, which is the method's own
(`Method.search`), the bisection of its knob (`generic`), or a procedure that needs the whole model (`duo`). `loop` feeds
it, keeps its state on disk after every prompt, checks what it found on prompts it has not seen, and writes the profile.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generic import Bisect, Figures, judge
    from .loop import run

__all__ = ["Bisect", "Figures", "judge", "run"]

# As in foveate/__init__.py: imported when first used, and no name equals that of a submodule.
_HOME = {"run": "loop", "Bisect": "generic", "Figures": "generic", "judge": "generic"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
