"""RULER's variable tracking: a chain of assignments hidden in noise; which variables hold the value?

Template, answer prefix and lines are those of NVIDIA/RULER (Apache-2.0, Hsieh et al. 2024, arXiv 2404.06654), the double
space in the worked example included.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from ..task import Sample, Task
from ..text import NOISE, Source
from .haystack import Span, join, moved, noise, plant

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: "
)


@dataclass(frozen=True)
class Tracking(Task):
    """One chain "VAR A = 12345", "VAR B = VAR A", ... in noise, after one worked example. A unit is a noise sentence.

    `hops`: assignments after the first. `example_lines`: noise lines of the example, which RULER fits to 500 tokens.
    `max_new_tokens`: RULER's 30 cut the answer off where names of five capitals take more than five tokens each; raise it
    for such tokenizers and say so beside the figure.
    """

    hops: int = 4
    max_new_tokens: int = 30
    example_lines: int = 14

    suite: ClassVar[str] = "ruler"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        value, shown = (str(v) for v in rng.sample(range(10000, 99999), 2))
        names, short = (_names(self.hops + 1, letters, rng) for letters in (5, 3))
        context, _ = _hidden(_chain(short, shown), noise(len(NOISE) * self.example_lines), rng)
        example = self._ask(context, shown) + self._prefix(shown) + " " + " ".join(short) + "\n\n"
        chain = _chain(names, value)
        context, spans = _hidden(chain, noise(len(NOISE) * len(chain) + size - 1), rng)
        head = example + TEMPLATE.split("{context}")[0]
        return Sample(
            text=example + self._ask(context, value),
            question_at=len(head) + len(context) + 1,
            answers=tuple(names),
            needles=moved(spans, len(head)),
            max_new_tokens=self.max_new_tokens,
            prefix=self._prefix(value),
            pad_at=len(head),
            meta={"haystack": "noise", "chains": 1, "hops": self.hops, "examples": 1},
        )

    @staticmethod
    def _ask(context: str, value: str) -> str:
        return TEMPLATE.format(context=context, query=value)

    def _prefix(self, value: str) -> str:
        return PREFIX.format(num_v=self.hops + 1, query=value)


def _names(n: int, letters: int, rng: random.Random) -> list[str]:
    """`n` different names; none is the keyword of the lines."""
    made: dict[str, None] = {}
    while len(made) < n:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name != "VAR":
            made[name] = None
    return list(made)


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:]))]


def _hidden(chain: list[str], lines: list[str], rng: random.Random) -> tuple[str, list[Span]]:
    """The noise with the chain's lines in order at random places, and the characters of the chain."""
    pieces, where = plant(lines, chain, sorted(rng.sample(range(len(lines)), len(chain))))
    return join(pieces, where, "\n")


VT = Tracking("vt")
