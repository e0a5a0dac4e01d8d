"""Partial softmaxes of one call put together: by one kernel where there is one, else as `combine.merge` says."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import combine


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) of one softmax over the disjoint union of the parts' keys: `combine.merge`, in one pass on a GPU.

    parts: (out `[B, H, N, Dv]`, lse fp32 `[B, H, N]`) of each.
    """
    on_device = parts[0][0].device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if on_device and not torch.compiler.is_compiling() and (twin := _twin()) is not None and twin.why_not(parts) is None:
        out, lse = twin.merge(parts)
        return out, lse
    return combine.merge(parts)


@functools.cache
def _twin() -> ModuleType | None:
    try:
        return importlib.import_module(".triton.merge_launch", __package__)
    except ImportError:
        return None
