"""Foveate: attention only where it matters. Methods of sparse attention over one index format, on real models."""

from __future__ import annotations

from typing import Any

from .errors import FoveateError
from .kernels.dispatch import attend, explain
from .kv import KV
from .layout import Layout, Part, Parts
from .merge import merge
from .recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "KV", "FoveateError", "Layout", "Part", "Parts", "Recipe", "apply", "attend", "explain", "list_methods",
    "merge", "remove", "use",
]  # fmt: skip

_LAZY = {"apply": "transformers", "remove": "transformers", "use": "transformers"}


def __getattr__(name: str) -> Any:
    """The transformers adapter is imported when it is first used, so that the kernels need torch alone."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"foveate.adapters.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def list_methods() -> list[str]:
    """The ids of all methods. (`foveate.methods` is the package that holds them.)"""
    from .registry import METHODS

    return list(METHODS)
