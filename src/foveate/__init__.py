"""Foveate: attention only where it matters. Methods of sparse attention over one index format, on real models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import FoveateError

if TYPE_CHECKING:
    from .adapters.transformers import apply, remove, use
    from .combine import merge
    from .kernels.dispatch import attend, explain
    from .kv import KV
    from .layout import Layout, Part, Parts
    from .recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "KV", "FoveateError", "Layout", "Part", "Parts", "Recipe", "apply", "attend", "explain", "list_methods",
    "merge", "remove", "use",
]  # fmt: skip

# Public names are imported when they are first used: the command prints its help without loading torch, and kernels
# need torch alone, without transformers. No name here may equal that of a submodule, which an import would put in its place.
_HOME = {
    "KV": "kv", "Layout": "layout", "Part": "layout", "Parts": "layout", "Recipe": "recipe", "merge": "combine",
    "attend": "kernels.dispatch", "explain": "kernels.dispatch",
    "apply": "adapters.transformers", "remove": "adapters.transformers", "use": "adapters.transformers",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"foveate.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def list_methods() -> list[str]:
    """The ids of all methods. (`foveate.methods` is the package that holds them.)"""
    from .registry import METHODS

    return list(METHODS)
