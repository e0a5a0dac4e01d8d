"""Every error Foveate raises on purpose. Each message names the argument, what came and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoveateError(ValueError):
    """Base class. A `ValueError`, so that callers who do not know Foveate still catch it sensibly."""


class ShapeError(FoveateError):
    """Shapes, dtypes or devices of tensors that do not fit together."""


class LayoutError(FoveateError):
    """A layout that cannot be executed: indices out of range, unsorted, duplicated, counts beyond the width."""


class ConfigError(FoveateError):
    """An unknown method or hyperparameter, a value out of range, or a recipe whose parts do not fit together."""


class UnsupportedError(FoveateError):
    """A model, a cache operation or a backend that cannot serve the request. The message is the reason."""


class CacheError(FoveateError):
    """A cache operation that would silently lose or invent entries."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
