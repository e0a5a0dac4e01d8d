"""Stand-ins for qa_1 and qa_2 without data files: questions about made-up people and companies.

The prompt is RULER's; the facts are drawn from the seed, so no model knows them. A figure of these tasks is not a figure
of RULER (`meta["stand_in"]`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..task import Sample, Task
from ..text import Source
from .documents import documents_sample

# Every kind of fact of a person: its sentence and its question.
FACTS = {
    "born": ("{who} was born in the town of {what}.", "In which town was {who} born?"),
    "work": ("{who} works for the company {what}.", "For which company does {who} work?"),
    "sister": ("The sister of {who} is called {what}.", "What is the sister of {who} called?"),
    "dog": ("{who} has a dog by the name of {what}.", "What is the name of the dog of {who}?"),
    "book": ("{who} wrote a book about the island of {what}.", "About which island did {who} write a book?"),
}
SEAT = "The company {who} has its seat in the city of {what}."
FOUNDER = "The company {who} was founded by a merchant called {what}."
RIVAL = "Its oldest rival is the company {what}."
TWO_HOPS = "In which city is the seat of the company that {who} works for?"


@dataclass(frozen=True)
class SynthQa(Task):
    """One question about one person (`hops` 1) or about the seat of a person's company (2). A unit is one word of the
    other documents, which tell of other people and companies; every made-up name stands for one thing only."""

    hops: int = 1
    max_new_tokens: int = 32

    suite: ClassVar[str] = "synth"
    metric: ClassVar[str] = "any"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        made: set[str] = set()
        who, facts = _person(rng, made)
        if self.hops == 1:
            kind = rng.choice(sorted(facts))
            gold: list[tuple[str, str | None]] = [(_text(facts, rng), facts[kind][0])]
            query, answer = FACTS[kind][1].format(who=who), facts[kind][1]
        else:
            answer = _name(rng, made)
            seat, company = _company(facts["work"][1], answer, rng, made)
            gold = [(_text(facts, rng), facts["work"][0]), (company, seat)]
            query = TWO_HOPS.format(who=who)
        return documents_sample(
            query,
            (answer,),
            gold,
            _others(self.hops == 2, rng, made),
            size,
            rng,
            self.max_new_tokens,
            {"stand_in": True, "hops": self.hops},
        )


def _name(rng: random.Random, made: set[str]) -> str:
    """A new name of seven letters; equal lengths keep one name from being part of another."""
    while True:
        name = "".join(rng.choice("bdfghklmnprstvz") + rng.choice("aeiou") for _ in range(3)) + rng.choice("lmnrst")
        if name not in made:
            made.add(name)
            return name.capitalize()


def _person(rng: random.Random, made: set[str]) -> tuple[str, dict[str, tuple[str, str]]]:
    """(name, kind -> (sentence, value)) for the work and two to four other kinds."""
    who = f"{_name(rng, made)} {_name(rng, made)}"
    others = [kind for kind in FACTS if kind != "work"]
    kinds = ["work", *rng.sample(others, rng.randrange(2, len(others) + 1))]
    facts = {}
    for kind in kinds:
        what = _name(rng, made)
        facts[kind] = (FACTS[kind][0].format(who=who, what=what), what)
    return who, facts


def _text(facts: dict[str, tuple[str, str]], rng: random.Random) -> str:
    sentences = [sentence for sentence, _ in facts.values()]
    rng.shuffle(sentences)
    return " ".join(sentences)


def _company(name: str, city: str, rng: random.Random, made: set[str]) -> tuple[str, str]:
    """(the sentence with its city, the whole document)."""
    seat = SEAT.format(who=name, what=city)
    founder = FOUNDER.format(who=name, what=f"{_name(rng, made)} {_name(rng, made)}")
    sentences = [seat, founder]
    rng.shuffle(sentences)
    return seat, " ".join([*sentences, RIVAL.format(what=_name(rng, made))])


def _others(companies: bool, rng: random.Random, made: set[str]) -> Iterator[str]:
    """Documents of other people, each followed by that of their company where `companies`."""
    while True:
        _, facts = _person(rng, made)
        yield _text(facts, rng)
        if companies:
            yield _company(facts["work"][1], _name(rng, made), rng, made)[1]


TASKS: tuple[SynthQa, ...] = (SynthQa("qa_synth_1"), SynthQa("qa_synth_2", hops=2))
