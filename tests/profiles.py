"""Profiles made on the fly, for table rows of methods that need one. A folder lives as long as this process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache

import torch
from torch import Tensor

from foveate.profile import Profile


def folder(profile: Profile) -> str:
    """Write `profile` to a temporary folder and return its path."""
    path = tempfile.mkdtemp(prefix="foveate_profile_")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return str(profile.save(path))


def gates(d: int, heads: int = 1, noise: float = 0.02, layers: int = 4, query: int = 0) -> dict[str, Tensor]:
    """Weights that see what stands out: a block of keys is the sum of its maxima and its minima, and a little noise."""
    gen, eye = torch.Generator().manual_seed(5), torch.eye(d)
    plain = torch.cat([eye, eye, 0 * eye])
    out = {f"layer.{i}.k": plain + noise * torch.randn(heads, 3 * d, d, generator=gen) for i in range(layers)}
    if query:
        out |= {f"layer.{i}.q": eye + noise * torch.randn(query, d, d, generator=gen) for i in range(layers)}
    return out


@cache
def seer_profile(d: int = 16, heads: int = 1, noise: float = 0.02, query: int = 0) -> str:
    """Gates for SeerAttention, one for all heads unless `heads` says otherwise."""
    return folder(Profile("seerattention", tensors=gates(d, heads, noise, query=query)))
