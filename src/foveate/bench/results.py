"""Result files of benchmarks: what was run where, one row per case and implementation.

    {"schema": 1, "bench", "device", "versions", "commit", "date",
     "rows": [{"case", "impl", "params", "ms": {"median", "min", "max"}, "tflops", "density", "max_error"}]}

Everything that README and BENCHMARKS.md say about speed is generated from such files.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..errors import FoveateError

SCHEMA = 1
_KEYS = ("schema", "bench", "device", "versions", "commit", "date", "rows")
_ROW_KEYS = ("case", "impl", "params", "ms", "tflops", "density", "max_error")


class ResultError(FoveateError):
    """A file that is no result file, or one of another schema."""


@dataclass(frozen=True)
class Row:
    """One implementation on one case.

    Attributes:
        case, impl, params: what ran, on what; params are plain numbers and strings.
        ms: median, min and max of one call, milliseconds.
        tflops: 1e12 operations a second over the pairs this implementation was asked for (2 (D + Dv) a pair).
        density: those pairs / the visible pairs.
        max_error: largest difference from fp64 on sampled rows; None where it was not looked at.
    """

    case: str
    impl: str
    params: dict[str, Any] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)
    tflops: float | None = None
    density: float | None = None
    max_error: float | None = None


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, min and max of samples in milliseconds."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def result(bench: str, rows: Sequence[Row], device: torch.device | str, **extra: Any) -> dict[str, Any]:
    """A result with the facts of this machine and moment."""
    from ..doctor import device_name, versions

    return {
        "schema": SCHEMA,
        "bench": bench,
        "device": device_name(torch.device(device)),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **extra,
        "rows": [asdict(row) for row in rows],
    }


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" when files differ from it; None outside of one.

    `FOVEATE_COMMIT` names it where the checkout travelled without its history.
    """
    if named := os.environ.get("FOVEATE_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        git = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: str | Path, data: dict[str, Any]) -> Path:
    """Write a result as JSON: complete or not at all. Raises ResultError if `load` would refuse it."""
    _check(str(path), data)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Read a result file. Raises ResultError naming the file and what is wrong with it."""
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as err:
        raise ResultError(f"{path}: not JSON ({err})") from None
    _check(str(path), data)
    return data


def load_all(folder: str | Path) -> list[dict[str, Any]]:
    """Every result file of a folder, oldest first."""
    return sorted((load(p) for p in Path(folder).glob("*.json")), key=lambda r: r["date"])


def _check(path: str, data: Any) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ResultError(f"{path}: expected a result of schema {SCHEMA}, got {got}")
    if missing := [k for k in _KEYS if k not in data]:
        raise ResultError(f"{path}: expected the keys {', '.join(_KEYS)}; missing {', '.join(missing)}")
    for i, row in enumerate(data["rows"]):
        if missing := [k for k in _ROW_KEYS if k not in row]:
            raise ResultError(f"{path}: row {i} lacks {', '.join(missing)}")
        if missing := [k for k in ("median", "min", "max") if k not in row["ms"]]:
            raise ResultError(f"{path}: ms of row {i} lacks {', '.join(missing)}")
