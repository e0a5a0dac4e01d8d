"""Putting needles into haystacks: where the parts of a text end up, and which depth a sample gets."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Sequence


def joined(parts: Sequence[str], separator: str, marked: Sequence[int], start: int = 0) -> tuple[str, list[tuple[int, int]]]:
    """The parts in one text, and (first, last + 1) characters of the marked ones, in the order of `marked`.

    `start`: the character at which the text will stand in the message.
    """
    spans: dict[int, tuple[int, int]] = dict.fromkeys(marked, (0, 0))
    at = start
    for i, part in enumerate(parts):
        if i in spans:
            spans[i] = (at, at + len(part))
        at += len(part) + len(separator)
    return separator.join(parts), list(spans.values())


def depth_of(index: int, grid: int) -> float:
    """The depth of sample `index`: 0, 1 / (grid - 1), ..., 1, each once in every `grid` samples.

    The order jumps by about 0.62 of the grid, so that a handful of samples is spread over all depths, too.
    """
    step = next(s for s in range(max(1, round(0.62 * grid)), 2 * grid + 2) if math.gcd(s, grid) == 1)
    return (index * step % grid) / max(1, grid - 1)


def uuid4(rng: random.Random) -> str:
    """A random UUID of version 4: 122 random bits."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
