"""What methods with a profile of one number per layer and query head share: the numbers of a layer, on its device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..profile import of
from .base import AttnInput, State


def per_head(
    method: str, path: str | None, name: str, x: AttnInput, state: State, dtype: torch.dtype | None = None
) -> Tensor | None:
    """`[H]`, what the tensor `name` `[layers, H]` of the profile at `path` has for this call; None without a path.

    method: its id. dtype: by default the stored one. It is copied to the device once for each layer of a generation.
    """
    if (found := of(method, path)) is None:
        return None
    key = f"{method}.{path}.{x.layer}"
    held: Tensor | None = state.run.get(key)
    if held is None or held.device != x.device:
        table, want = found.tensors[name], [x.layers, x.all_lists(x.q.shape[1])]
        if (have := list(table.shape)) != want:
            raise ConfigError(f"{method}: profile expected {name} [layers, heads] = {want}, got {have}")
        held = state.run[key] = table[x.layer].to(x.device, dtype)
    return x.own_lists(held)
