"""Offline search: how a method says what can be calibrated, and the contract of its own procedure.

Two ways. A method with a `knob` is bisected by the generic search until the target holds. A method with a procedure of
its own returns a `Search` from `Method.search(target)`; the loop feeds it one layer of one prompt at a time, in bounded
memory, as often as it asks, and writes what `finish` returns as a `Profile`. Neither knows a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..errors import ConfigError
from .base import AttnInput, Method

KINDS = ("recall", "density", "loss")


@dataclass(frozen=True)
class Target:
    """What a search aims at.

    Attributes:
        kind: "recall", the attention mass a plan keeps, exp(lse_sparse - lse_full), mean over rows and heads, at least;
            "density", the part of causal pairs computed, at most; "loss", relative L1 error of the attention output,
            at most.
        value: between 0 and 1.
        by_head: of a recall target: methods with a setting per head look for the settings that hold it with the fewest
            computed pairs in all, so that a head costs what it needs; other methods take it as a plain recall target.
    """

    kind: str = "recall"
    value: float = 0.95
    by_head: bool = False

    @staticmethod
    def parse(text: str) -> Target:
        """From "recall=0.95", "density=0.1" or "loss=1%"; "mass=0.95" is a recall target by head."""
        kind, eq, number = text.partition("=")
        by_head = kind.strip() == "mass"
        kind = "recall" if by_head else kind
        try:
            value = float(number.rstrip("% ")) / (100 if number.strip().endswith("%") else 1)
        except ValueError:
            value = math.nan
        if kind.strip() not in KINDS or not eq or not 0 < value <= 1:
            raise ConfigError(
                f"target: expected recall=, density= or loss= (or mass=) with a number between 0 and 1, got {text!r}"
            )
        return Target(kind.strip(), value, by_head)

    def __str__(self) -> str:
        return f"{'mass' if self.by_head else self.kind}={self.value:g}"


@dataclass(frozen=True)
class Knob:
    """One hyperparameter that trades attention mass for speed.

    Attributes:
        name: the field. low, high: where to look. more: True if larger values keep more pairs.
        log: bisect the logarithm. whole: integers only.
    """

    name: str
    low: float
    high: float
    more: bool = True
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Found:
    """What a search found: hyperparameters, tensors for the profile (per layer and head), and figures for its report."""

    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


class Search(Protocol):
    """A method's own offline procedure.

    Attributes:
        passes: how often it wants to see all prompts (a distillation: its epochs).
        wants_grad: it reads the gradient of the model's loss by each layer's attention output.

    A search that wants other prompts than texts has `prompts(tokenizer, length, count, seed) -> list[Tensor]`.
    """

    passes: int
    wants_grad: bool

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        """One layer of one prompt: queries and the whole prompt's keys and values in `x` (start 0), the dense output
        `[1, H, N, Dv]`, and with `wants_grad` the loss's gradient by it, same shape. Called for layer 0, 1, ... of one
        prompt, then of the next. Nothing of x may be kept beyond what fits in memory for all layers.
        """

    def end_pass(self) -> None:
        """All prompts were shown once more."""

    def finish(self) -> Found:
        """What was found, after the last pass."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that `resume` continues from, at the end of a prompt."""

    def resume(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken."""


def searchable(method: Method) -> str | None:
    """None if this method can be calibrated, else the reason it cannot."""
    if method.knob is None and type(method).search is Method.search:
        return f"{method.id} has no hyperparameter that trades quality for speed and no search of its own"
    return None
