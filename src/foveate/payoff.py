"""From which length a method pays: as measured on this device, else by the method's own rule. Length gates ask here.

`assets/breakeven.json` holds what was measured on the devices of `benchmarks/results`, `breakeven.json` in the cache folder
what `foveate bench breakeven` measured here, which is heard first. Both map

    device -> method with every hyperparameter -> phase -> {"length", "shortest", "longest", "shape", "commit", "date"}

where `length` is the break-even in tokens, None where dense was never slower, and `shortest` and `longest` are the ends of
the lengths that were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from . import registry
from .errors import ConfigError, FoveateError
from .methods.base import Method

PACKAGED = Path(__file__).parent / "assets" / "breakeven.json"
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


@dataclass(frozen=True)
class PayOff:
    """Dense attention serves calls over fewer than `length` tokens, and `why`: a clause for the user."""

    length: int
    why: str

    def __str__(self) -> str:
        return f"dense below {self.length:,} tokens: {self.why}"


@lru_cache(maxsize=512)
def pay_off(method: Method, phase: str, device: torch.device) -> PayOff:
    """From which length `method` pays in "prefill" or "decode" on `device`.

    A measurement of exactly these hyperparameters counts first. One of the method's defaults counts where `min_length`, the
    method's own rule, is the same for both, so that what differs is no budget, and where decode steps of both are captured
    or both are not. Else it is that rule.

    Raises:
        ConfigError: a table that cannot be read.
    """
    from .doctor import device_name  # late: a name is all this needs of what users see

    name = device_name(device)
    found = [entry for table in (read(own_file()), read(PACKAGED)) for entry in table.get(name, {}).items()]
    plain: Method | None = None
    with suppress(FoveateError):  # some have no defaults that stand alone
        plain = type(method).make()
    for wanted, words in ((method, ""), (plain, " at its default settings")):
        if wanted is None or _kind(wanted, phase) != _kind(method, phase):
            continue
        for text, phases in found:
            if phase in phases and _is(text, wanted):
                return _measured(phases[phase], f"measured on {name}{words}")
    return PayOff(method.min_length, f"its own rule, as nothing like it was measured on {name}")


def _measured(entry: Mapping[str, Any], where: str) -> PayOff:
    where = f"{where}, {entry['shape']}"
    if entry["length"] is None:
        return PayOff(entry["longest"] + 1, f"never faster up to {entry['longest']:,}, {where}")
    return PayOff(entry["length"], where)


def _kind(method: Method, phase: str) -> tuple[int, bool]:
    return method.min_length, phase == "decode" and method.phase(0) is None


def _is(text: str, method: Method) -> bool:
    """Whether `text` describes this method. Texts are read, not compared: an option added later has its default."""
    if text.partition(":")[0] != method.id:
        return False
    with suppress(FoveateError):  # an option that is no more
        return registry.parse(text) == method
    return False


# ---------------------------------------------------------------------- tables
def own_file() -> Path:
    """Where this user's measurements are kept."""
    from .models import cache_folder

    return cache_folder() / "breakeven.json"


def read(path: Path) -> Table:
    """A table; empty where there is no file. Raises ConfigError for one that cannot be read."""
    try:
        table = json.loads(path.read_text())
        for phases in (p for methods in table.values() for p in methods.values()):
            for entry in phases.values():
                length, longest = entry["length"], entry["longest"]
                if not isinstance(longest, int) or not isinstance(length, int | None) or "shape" not in entry:
                    raise ValueError(f"an entry is {entry}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as err:
        raise ConfigError(
            f"breakeven: {path} is no table of break-even lengths ({type(err).__name__}: {err}); delete it and run "
            "foveate bench breakeven again"
        ) from err
    return table  # type: ignore[no-any-return]


def merged(*tables: Table) -> Table:
    """One table; where two know the same method, phase and device, the later one counts."""
    out: Table = {}
    for table in tables:
        for device, methods in table.items():
            for method, phases in methods.items():
                out.setdefault(device, {}).setdefault(method, {}).update(phases)
    return out


def remember(table: Table) -> Path:
    """Add measurements to this user's; gates use them from now on."""
    from .report.files import write_atomic

    path = own_file()
    write_atomic(path, dumped(merged(read(path), table)))
    pay_off.cache_clear()
    return path


def dumped(table: Table) -> str:
    """A table as the text of its file."""
    return json.dumps(table, indent=1, sort_keys=True, allow_nan=False) + "\n"
