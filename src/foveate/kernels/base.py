"""What every backend module offers, and the request it is asked about.

A backend is a module with

    NAME: str
    supports(q, kv, layout, want) -> None | str      the reason it cannot serve this request
    forward(q, kv, layout, *, scale, softcap, want) -> (out, lse | None, mass | None)
    backward(...)                                     optional; see torch_gather.backward
    tiling(layout) -> (block_q, block_k) | None       the aligned grid it rounds to; None: walks lists as they are

out has the dtype of q, lse is fp32 (fp64 for fp64 inputs), natural log; empty rows give 0 and -inf.
mass is fp32 `[B, H, M]`: the sum over query rows of the probability each entry received.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Want:
    """What the caller needs besides the output."""

    lse: bool = False
    mass: bool = False
    grad: bool = False
    softcap: bool = False


# All sixteen, for calls that are bound by the host; a dict, since torch.compile warns of functools' caches.
WANTS = {flags: Want(*flags) for flags in product((False, True), repeat=4)}
