"""Needle in a haystack: one fact in essays, over a grid of depths and lengths.

The grid is that of gkamradt/LLMTest_NeedleInAHaystack (MIT), whose closing request is kept word for word. Needle and
question are those of the variant without a judge and without world knowledge, a seeded number of a seeded city, found in
the answer or not: Arize's (Dhinakaran 2024), used by MInference (MIT). Where upstream moves the needle back to the last
token that is a full stop, sentences are counted here: token lists miss ".\\n" and the like.

The task saturates: a method that passes it may still fail everything else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..prompts import ANSWER, FACT, QUESTION
from .place import depth_of, joined
from .task import Sample, Task
from .text import NOISE, Source

NEEDLE = "The special magic {city} number is: {number}"
ASK = "What is the special magic {city} number?"
ASK_MANY = "What are the special magic {cities} numbers?"  # ours, for several needles
REQUEST = " Don't give information outside the document or repeat your findings"
CITIES = (
    *("Accra", "Ankara", "Athens", "Baku", "Bogota", "Cairo", "Chicago", "Dakar", "Delhi", "Denver", "Dublin", "Hanoi"),
    *("Havana", "Helsinki", "Jakarta", "Kampala", "Lagos", "Lima", "Lisbon", "Madrid", "Manila", "Melbourne", "Nairobi"),
    *("Oslo", "Paris", "Prague", "Quito", "Riga", "Santiago", "Seoul", "Sofia", "Tallinn", "Tokyo", "Toronto", "Vienna"),
)


@dataclass(frozen=True)
class Needle(Task):
    """A seven-digit number of a city in `size` words of essays. `depths`: how many depths from 0 to 1 the samples take."""

    depths: int = 10
    suite: ClassVar[str] = "needle"
    least: ClassVar[int] = 20

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        city = rng.choice(CITIES)
        number = _number(rng, _prose(source))
        depth = depth_of(index, self.depths)
        context, needles = planted(source, size, [NEEDLE.format(city=city, number=number)], [depth])
        return Sample(
            text=f"{context}\n\n{ASK.format(city=city)}{REQUEST}",
            question_at=len(context) + 2,
            answers=(number,),
            needles=needles,
            max_new_tokens=24,
            prefix=NEEDLE.format(city=city, number="").rstrip(),
            pad_at=0,
            meta={"depth": depth, "haystack": "essays"},
        )


@dataclass(frozen=True)
class Word(Task):
    """A password, a noun, in the wording of the demo: models too small for seven digits hold a word."""

    depths: int = 10
    suite: ClassVar[str] = "needle"
    least: ClassVar[int] = 20

    def needs(self, source: Source) -> str | None:
        return None if _nouns(source) else "needs a list of nouns of 5 to 9 letters"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        told = " ".join([_prose(source), FACT, QUESTION, *NOISE]).lower()
        nouns = _nouns(source)
        word = next((w for w in (rng.choice(nouns) for _ in range(1000)) if w not in told), None)
        if word is None:
            raise ConfigError("text: expected one that lacks some nouns of the word list, got one with all that were tried")
        depth = depth_of(index, self.depths)
        context, needles = planted(source, size, [FACT.replace(ANSWER, word)], [depth])
        return Sample(
            text=f"{context}\n\n{QUESTION}",
            question_at=len(context) + 2,
            answers=(word,),
            needles=needles,
            max_new_tokens=24,
            pad_at=0,
            meta={"depth": depth, "haystack": "essays", "prompts": "own"},
        )


@dataclass(frozen=True)
class Several(Task):
    """Several cities at once: the first needle at the depth, each further one (1 - depth) / `needles` deeper."""

    needles: int = 3
    depths: int = 10
    suite: ClassVar[str] = "needle"
    least: ClassVar[int] = 20

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        cities = rng.sample(CITIES, self.needles)
        prose = _prose(source)
        numbers: dict[str, None] = {}
        while len(numbers) < self.needles:
            numbers[_number(rng, prose)] = None
        first = depth_of(index, self.depths)
        depths = [first + i * (1 - first) / self.needles for i in range(self.needles)]
        facts = [NEEDLE.format(city=c, number=n) for c, n in zip(cities, numbers, strict=True)]
        context, needles = planted(source, size, facts, depths)
        asked = f"{', '.join(cities[:-1])} and {cities[-1]}" if len(cities) > 1 else cities[0]
        return Sample(
            text=f"{context}\n\n{ASK_MANY.format(cities=asked)}{REQUEST}",
            question_at=len(context) + 2,
            answers=tuple(numbers),
            needles=needles,
            max_new_tokens=16 * self.needles,
            prefix=f"The special magic {asked} numbers are:",
            pad_at=0,
            meta={"first_depth": first, "needles": self.needles, "haystack": "essays", "prompts": "own"},
        )


def planted(source: Source, words: int, facts: list[str], depths: list[float]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """`words` words of prose with each fact on a line of its own after that share of the sentences, and the facts' spans.

    `depths` must rise. The last sentence may be cut short.
    """
    sentences = source.sentences(words)
    parts: list[str] = []
    marked = []
    done = 0
    for fact, depth in zip(facts, depths, strict=True):
        at = int(len(sentences) * depth + 1e-9)
        parts += [" ".join(sentences[done:at])] if at > done else []
        marked.append(len(parts))
        parts.append(fact)
        done = at
    parts += [" ".join(sentences[done:])] if done < len(sentences) else []
    text, spans = joined(parts, "\n", marked)
    return text, tuple(spans)


def _nouns(source: Source) -> list[str]:
    return [n for n in source.nouns if n.isascii() and n.isalpha() and n.islower() and 5 <= len(n) <= 9]


def _prose(source: Source) -> str:
    return " ".join(source.prose).lower()


def _number(rng: random.Random, prose: str) -> str:
    """Seven digits that the haystack does not hold."""
    while (number := str(rng.randrange(10**6, 10**7))) in prose:
        pass
    return number


TASKS: tuple[Task, ...] = (Needle("needle"), Word("needle_word"), Several("needle_multi"))
