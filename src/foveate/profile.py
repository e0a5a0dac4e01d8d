"""Profiles: what an offline search found for one model, as a folder of JSON and safetensors that anybody can read.

    NAME/profile.json          format, version, method and its options, model, its configuration, data, seed, date
    NAME/tensors.safetensors   what is no plain value: gates, thresholds per layer and head

`foveate calibrate` writes them; a method's `profile` option names the folder. Never pickle.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ConfigError

FORMAT, VERSION = "foveate-profile", 1


@dataclass(frozen=True)
class Profile:
    """What was found and for whom.

    Attributes:
        method: registry id. options: the method's hyperparameters that the search chose (plain JSON values).
        tensors: by name, what the method reads itself.
        model: name of the model; fingerprint: what its configuration must be (`adapters.capability.fingerprint`).
        data: hash of the calibration texts. seed. date: ISO 8601, UTC. target: text such as "recall=0.95".
        report: figures of the search: error or recall on calibration and held-out prompts, density, seconds.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    model: str = ""
    fingerprint: str = ""
    data: str = ""
    seed: int = 0
    date: str = ""
    target: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder `path`. `profile.json` appears last, so a folder without it is an unfinished one."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").unlink(missing_ok=True)
        if self.tensors:
            save_file({k: t.detach().cpu().contiguous() for k, t in self.tensors.items()}, folder / "tensors.safetensors")
        plain = {n: getattr(self, n) for n in _PLAIN}
        plain["date"] = self.date or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        text = json.dumps({"format": FORMAT, "version": VERSION, "tensors": sorted(self.tensors)} | plain, indent=1)
        part = folder / ".profile.json.part"
        part.write_text(text + "\n")
        os.replace(part, folder / "profile.json")
        load.cache_clear()
        return folder

    def check(self, fingerprint: str) -> None:
        """ConfigError unless this profile was made for a model of this configuration."""
        if self.fingerprint and fingerprint != self.fingerprint:
            made, have = (set(text.split("; ")) for text in (self.fingerprint, fingerprint))
            raise ConfigError(
                f"profile: made for {self.model or 'another model'} ({self.method}) with {', '.join(sorted(made - have))}, "
                f"but this model has {', '.join(sorted(have - made))}; run `foveate calibrate {self.method}` for it"
            )


_PLAIN = ("method", "options", "model", "fingerprint", "data", "seed", "date", "target", "report")


@lru_cache(maxsize=16)
def load(path: str) -> Profile:
    """The profile in the folder `path`. Raises ConfigError with the reason if there is none that can be read."""
    folder = Path(path)
    file = folder / "profile.json"
    if not file.is_file():
        raise ConfigError(f"profile: expected a folder with profile.json, got {path!r}")
    try:
        plain = json.loads(file.read_text())
    except (OSError, ValueError) as err:
        raise ConfigError(f"profile: {file.name} in {path!r} cannot be read: {err}") from err
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ConfigError(f"profile: expected format {FORMAT!r} in {path!r}, got {_format(plain)!r}")
    if plain.get("version") != VERSION:
        raise ConfigError(f"profile: expected version {VERSION} in {path!r}, got {plain.get('version')!r}")
    if missing := [n for n in _PLAIN if n not in plain]:
        raise ConfigError(f"profile: {path!r} lacks {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    if plain.get("tensors"):
        try:
            tensors = load_file(folder / "tensors.safetensors")
        except (OSError, SafetensorError) as err:
            raise ConfigError(f"profile: tensors.safetensors in {path!r} cannot be read: {err}") from err
        if lost := sorted(set(plain["tensors"]) - set(tensors)):
            raise ConfigError(f"profile: tensors.safetensors in {path!r} lacks {', '.join(lost)}")
    return Profile(tensors=tensors, **{n: plain[n] for n in _PLAIN})


def _format(plain: Any) -> Any:
    return plain.get("format") if isinstance(plain, dict) else type(plain).__name__


def of(method: str, path: str | None) -> Profile | None:
    """The profile at `path` for a method id, None without a path. Raises ConfigError if another method made it."""
    if path is None:
        return None
    profile = load(path)
    if profile.method != method:
        raise ConfigError(f"profile: {path!r} was made for {profile.method}, expected one for {method}")
    return profile
