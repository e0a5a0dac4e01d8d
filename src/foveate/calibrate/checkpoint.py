"""A calibration's folder: what it was asked for, and where it stands, on disk after every prompt.

`calibration.json` holds the facts, `state.safetensors` the search, `draft` the profile of a finished first stage. Only the
profile and the facts are left at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError
from ..report.files import write_atomic

SCHEMA = 1
_AT = "position"  # the name of the position among the tensors


class Checkpoint:
    """The folder of one calibration. Raises ConfigError if it was begun with other facts."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, {"schema": SCHEMA, **facts}
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"out: {folder} is a file; give a folder")
        file = folder / "calibration.json"
        if file.exists():
            self._check(file)
        elif (folder / "profile.json").exists():
            raise ConfigError(f"out: {folder} holds a profile that no calibration left there; use another --out")
        else:
            write_atomic(file, json.dumps(self.facts, indent=1) + "\n")

    def _check(self, file: Path) -> None:
        try:
            old = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise ConfigError(f"out: cannot read {file}: {err}") from err
        if not isinstance(old, dict):
            raise ConfigError(f"out: {file} is damaged; use another --out")
        now = json.loads(json.dumps(self.facts))
        wrong = [f"{n} {old.get(n)!r} there, {v!r} now" for n, v in now.items() if old.get(n) != v]
        if wrong:
            raise ConfigError(f"out: {self.folder} holds another calibration ({'; '.join(wrong)}); use another --out")

    # ------------------------------------------------------------------ where it stands
    @property
    def finished(self) -> bool:
        return (self.folder / "profile.json").is_file()

    @property
    def draft(self) -> Path:
        """A profile that is not checked yet."""
        return self.folder / "draft"

    def load(self) -> tuple[tuple[int, int, int], dict[str, Tensor]]:
        """((stage, pass, prompt) that comes next, the search's tensors); ((0, 0, 0), {}) at the beginning."""
        file = self.folder / "state.safetensors"
        if not file.exists():
            return (0, 0, 0), {}
        try:
            tensors = load_file(file)
            stage, done, prompt = tensors.pop(_AT).tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as err:
            raise ConfigError(f"out: cannot read {file}: {err}; use another --out") from err
        return (stage, done, prompt), tensors

    def save(self, position: tuple[int, int, int], tensors: dict[str, Tensor]) -> None:
        """On disk, whole, when this returns."""
        part = self.folder / ".state.part"
        plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file({**plain, _AT: torch.tensor(position)}, part)
        os.replace(part, self.folder / "state.safetensors")

    def clear(self) -> None:
        (self.folder / "state.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.draft, ignore_errors=True)
