"""RULER's needles in a haystack: eight tasks that differ in the haystack, the kinds of keys and values, and their numbers.

Template, needle and answer prefix are those of NVIDIA/RULER (Apache-2.0, Hsieh et al. 2024, arXiv 2404.06654).
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..task import Sample, Task, Turn
from ..text import NOISE, Source
from .haystack import depth, join, moved, noise, plant

TEMPLATE = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What are all the special magic {type} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {type} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {type} for {key} is: {value}."
DEPTHS = tuple(round(i * 100 / 39) for i in range(40))  # per cent of the sentences
TURNS = 3


@dataclass(frozen=True)
class Niah(Task):
    """Keys with values in a haystack; the question asks for all values of the queried keys.

    `haystack`: "noise" (a unit of filler is one sentence), "essay" (one word) or "needles" (one more needle).
    `key`, `value`: "numbers", "words" or "uuids". `keys`, `values`, `queries`: keys planted, values of each, keys asked for.
    Where other keys are in the text, `turns` ask for up to three of them.
    """

    haystack: str = "essay"
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_new_tokens: int = 128

    suite: ClassVar[str] = "ruler"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        fresh = _Fresh(rng, source, " ".join(source.prose) if self.haystack == "essay" else "")
        held = {}
        for _ in range(max(self.keys, self.queries)):
            held[fresh(self.key)] = [fresh(self.value) for _ in range(self.values)]
        asked = rng.sample(list(held), self.queries)
        planted = [(key, value) for key, values in held.items() for value in values]
        rng.shuffle(planted)
        others = [(key, values[0]) for key, values in held.items() if key not in asked]
        needles = [self._needle(*pair) for pair in planted]

        between = "\n"
        if self.haystack == "essay":
            lines, between = source.sentences(size), " "
            at = sorted(int(len(lines) * percent / 100) for percent in rng.sample(DEPTHS, len(needles)))
        elif self.haystack == "noise":
            lines = noise(len(NOISE) * len(needles) + size - 1)
            at = sorted(rng.sample(range(len(lines)), len(needles)))
        else:
            others = [(fresh(self.key), fresh(self.value)) for _ in range(TURNS + size - 1)]
            lines = [self._needle(*pair) for pair in others]
            at = sorted(rng.sample(range(len(lines)), len(needles)))
        pieces, where = plant(lines, needles, at)
        wanted = [i for i, (key, _) in zip(where, planted) if key in asked]
        context, spans = join(pieces, wanted, between)

        head, question, prefix = self._words(asked)
        meta = {"haystack": self.haystack, "keys": len(held), "values": self.values, "queries": self.queries}
        if len(spans) == 1:
            meta["depth"] = depth(spans[0], len(context))
        return Sample(
            text=f"{head}{context}\n{question}",
            question_at=len(head) + len(context) + 1,
            answers=tuple(value for key in asked for value in held[key]),
            needles=moved(spans, len(head)),
            max_new_tokens=self.max_new_tokens,
            prefix=prefix,
            pad_at=len(head),
            turns=self._turns(others, rng) if self.queries == 1 else (),
            meta=meta,
        )

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(type=self.value, key=key, value=value)

    def _words(self, asked: Sequence[str]) -> tuple[str, str, str]:
        """(what precedes the context, the question, the answer prefix)."""
        template, prefix, kind = TEMPLATE, PREFIX, self.value
        if self.queries * self.values == 1:  # RULER's own edits for a single answer
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            prefix, kind = prefix.replace("are", "is"), kind.removesuffix("s")
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        head, question = template.split("{context}\n")
        return head.format(type=kind), question.format(type=kind, query=query), prefix.format(type=kind, query=query)

    def _turns(self, others: Sequence[tuple[str, str]], rng: random.Random) -> tuple[Turn, ...]:
        chosen = rng.sample(list(others), min(TURNS, len(others)))
        turns = []
        for key, value in chosen:
            _, question, prefix = self._words([key])
            turns.append(Turn(question, prefix, (value,)))
        return tuple(turns)


class _Fresh:
    """Draws keys and values that were not drawn before and are not in the haystack's own text."""

    def __init__(self, rng: random.Random, source: Source, text: str) -> None:
        self.rng, self.source, self.text = rng, source, text
        self.drawn: set[str] = set()

    def __call__(self, kind: str) -> str:
        while True:
            made = self._one(kind)
            if made not in self.drawn and made not in self.text:
                self.drawn.add(made)
                return made

    def _one(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randrange(10**6, 10**7))
        if kind == "words":
            return f"{self.rng.choice(self.source.adjectives)}-{self.rng.choice(self.source.nouns)}"
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))


NIAH: tuple[Niah, ...] = (
    Niah("niah_single_1", haystack="noise"),
    Niah("niah_single_2"),
    Niah("niah_single_3", value="uuids"),
    Niah("niah_multikey_1", keys=4),
    Niah("niah_multikey_2", haystack="needles"),
    Niah("niah_multikey_3", haystack="needles", key="uuids", value="uuids"),
    Niah("niah_multivalue", values=4),
    Niah("niah_multiquery", queries=4),
)
