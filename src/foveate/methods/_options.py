"""Hyperparameters: the fields of a method, with the values they may take and what they are in words."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from ..errors import ConfigError

SHARE = "one list for each query head, or for the heads of a kv head"


def option(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    help: str = "",
) -> Any:
    """A hyperparameter: its published default and the values it may take. Given by keyword only.

    help: what it is, with its unit, in 3 to 10 words without a full stop. Knobs that mean the same say it in the same
    words in every method.
    """
    return field(default=default, kw_only=True, metadata={"range": (low, high), "choices": choices, "help": help})


def shared(default: str = "head") -> Any:
    """The hyperparameter `share` of methods that can give the query heads of a kv head one list."""
    return option(default, choices=("head", "group"), help=SHARE)


def check_type(owner: str, f: dataclasses.Field[Any], value: Any) -> None:
    """ConfigError, which names the method `owner`, unless the value has the type of its field."""
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    names = [part.strip() for part in (f.type.__name__ if isinstance(f.type, type) else str(f.type)).split("|")]
    if value is None and "None" in names:
        return
    for name in names:
        want = kinds.get(name)
        if want is None:
            if name != "None":
                return  # a type this check knows nothing about
        elif isinstance(value, want) and (name == "bool" or not isinstance(value, bool)):  # type: ignore[arg-type]
            return
    raise ConfigError(f"{owner}: {f.name} expected {' | '.join(names)}, got {value!r} ({type(value).__name__})")
