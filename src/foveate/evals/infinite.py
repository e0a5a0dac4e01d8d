"""The synthetic tasks of InfiniteBench: Zhang et al. 2024, "InfiniteBench: Extending Long Context Evaluation Beyond 100K
Tokens" (arXiv 2402.13718).

Prompts are those of OpenBMB/InfiniteBench (MIT) for base models, word for word; scores depend on them. What they let the
answer begin with ("The pass key is") is the forced start of the answer here. Two of them name what is asked before the
context (`MathFind`, `CodeRun`), so that the protocol "unseen" hides only the repeated question there. Lengths are fitted
to the model's tokens, where upstream takes fixed counts meant for 100K tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from .place import depth_of, joined, uuid4
from .task import Sample, Task, Turn
from .text import NOISE, Source

PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information.\n\n"
)
PASSKEY_LINE = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_ASK = "\n\nWhat is the pass key?"
PASSKEY_PREFIX = "The pass key is"
NUMBER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it. "
    "I will quiz you about the important information there.\n\n"
)
NUMBER_LINE = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
NUMBER_ASK = "\n\nWhat is the sequence of digits?"
NUMBER_PREFIX = "The sequence of digits is"
KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
KV_CONTEXT = "JSON data:\n{"
KV_ASK = 'Key: "{key}"'  # after "}" and three line breaks
KV_PREFIX = "The value associated with the specified key is:"
FIND = "What is {target} in the following list?\n\n"
FIND_ASK = "\n\nYou should answer with only one number, no other words."
CODE = "There is a function called {func} in the following Python code.\n\n"
CODE_CONTEXT = "\nHere is the content of functions_module.py:\n\n"
CODE_ASK = "\n\nPlease compute the exact value of {call}."


@dataclass(frozen=True)
class PassKey(Task):
    """Five digits in `size` sentences of noise, twice in one line. `depths`: the depths from 0 to 1 the samples take."""

    depths: int = 11
    suite: ClassVar[str] = "infinite"
    metric: ClassVar[str] = "first_integer"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        key = "".join(str(rng.randrange(10)) for _ in range(5))
        return self._hide(size, index, key, PASSKEY, PASSKEY_LINE, PASSKEY_ASK, PASSKEY_PREFIX, 6)

    def _hide(
        self, size: int, index: int, key: str, head: str, line: str, question: str, prefix: str, new_tokens: int
    ) -> Sample:
        lines = _noise(size)
        depth = depth_of(index, self.depths)
        at = round(depth * len(lines))
        context, spans = joined([*lines[:at], line.format(key=key), *lines[at:]], "\n", [at], len(head))
        return Sample(
            text=head + context + question,
            question_at=len(head) + len(context) + 2,
            answers=(key,),
            needles=tuple(spans),
            max_new_tokens=new_tokens,
            prefix=prefix,
            pad_at=len(head),
            meta={"depth": depth, "haystack": "noise"},
        )


@dataclass(frozen=True)
class NumberString(PassKey):
    """Ten digits with runs of the same one: a digit five times copied where it stands. A test of exact copying."""

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        digits = [str(rng.randrange(10)) for _ in range(5)]
        for _ in range(5):
            at = rng.randrange(len(digits))
            digits.insert(at, digits[at])
        return self._hide(size, index, "".join(digits), NUMBER, NUMBER_LINE, NUMBER_ASK, NUMBER_PREFIX, 12)


@dataclass(frozen=True)
class KeyValue(Task):
    """One of many random UUID keys. `depths`: the depths that the samples take. `turns`: further keys of the same text."""

    depths: int = 11
    turns: int = 3
    suite: ClassVar[str] = "infinite"
    metric: ClassVar[str] = "words"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        asked, *others = [(uuid4(rng), uuid4(rng)) for _ in range(1 + self.turns)]
        depth = depth_of(index, self.depths)
        total = size + 1 + self.turns
        at = round(depth * (total - 1))
        rest = [*others, *((uuid4(rng), uuid4(rng)) for _ in range(size))]
        rng.shuffle(rest)
        rest.insert(at, asked)
        head = KV + KV_CONTEXT
        records, spans = joined([f'"{k}": "{v}"' for k, v in rest], ", ", [at], len(head))
        context = head + records + "}\n\n\n"
        return Sample(
            text=context + KV_ASK.format(key=asked[0]),
            question_at=len(context),
            answers=(asked[1],),
            needles=tuple(spans),
            max_new_tokens=50,
            prefix=KV_PREFIX,
            pad_at=len(KV),
            turns=tuple(Turn(KV_ASK.format(key=k), KV_PREFIX, (v,)) for k, v in others),
            meta={"depth": depth, "pairs": total},
        )


KINDS = (
    *("largest number", "second largest number", "third largest number"),
    *("smallest number", "second smallest number", "third smallest number"),
    "median number",
)


@dataclass(frozen=True)
class MathFind(Task):
    """The first, second or third largest or smallest distinct number of a list, or its median; the kinds take turns.

    Numbers are 0 to 99, one of the two bounds drawn up to 20 further in, so that the answer is no constant. No single
    place of the text holds the answer, so there are no needles. A list of even length may have a median of one half:
    the answer gets 6 tokens where upstream gives 3, since many tokenizers spell digits one by one.
    """

    suite: ClassVar[str] = "infinite"
    metric: ClassVar[str] = "first_number"
    least: ClassVar[int] = 20

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        kind = KINDS[index % len(KINDS)]
        low, high = 0, 99
        if "smallest" in kind or (kind == "median number" and rng.random() < 0.5):
            low = rng.randint(0, 19)
        else:
            high = rng.randint(79, 99)
        numbers = [rng.randint(low, high) for _ in range(size)]
        head = FIND.format(target=f"the {kind}")
        context = str(numbers)
        return Sample(
            text=head + context + FIND_ASK,
            question_at=len(head) + len(context) + 2,
            answers=(_found(numbers, kind),),
            needles=(),
            max_new_tokens=6,
            prefix=f"The {kind} of the list is:",
            pad_at=0,
            meta={"kind": kind, "numbers": size},
        )


def _found(numbers: list[int], kind: str) -> str:
    ordered = sorted(numbers)
    if kind == "median number":
        return f"{(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2:g}"
    rank = ("second" in kind) + 2 * ("third" in kind)
    return str(sorted(set(numbers), reverse="largest" in kind)[rank])


@dataclass(frozen=True)
class CodeRun(Task):
    """The value of a call in Python functions that call one another, `levels` deep: a thread in disguise. `size` of
    them are off the way.

    Samples take the numbers of levels in turn. A function of one level adds a constant to the value of one of the next;
    the functions are sorted by their random numbers.
    """

    levels: tuple[int, ...] = (2, 4, 6, 8, 10)
    suite: ClassVar[str] = "infinite"
    metric: ClassVar[str] = "last_integer"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        levels = self.levels[index % len(self.levels)]
        chain = rng.sample(range(1, 1101), levels)
        added = [rng.randint(-12, 17) for _ in chain]
        x = rng.randint(-10, 10)
        bodies = {f: _function(f, g, c) for f, g, c in zip(chain, [*chain[1:], None], added, strict=True)}
        free = [i for i in range(1, max(1100, 2 * (size + levels)) + 1) if i not in bodies]
        tiers = [[f] for f in chain]  # the functions of each level
        for i, f in enumerate(rng.sample(free, size)):
            tiers[i % levels].append(f)
        for depth, tier in enumerate(tiers):
            for f in tier[1:]:
                called = rng.choice(tiers[depth + 1]) if depth + 1 < levels else None
                bodies[f] = _function(f, called, rng.randint(-12, 17))
        ordered = sorted(bodies)
        head = CODE.format(func=f"func_{chain[0]}")
        start = len(head) + len(CODE_CONTEXT)
        code, spans = joined([bodies[f] for f in ordered], "\n\n", [ordered.index(f) for f in chain], start)
        context = head + CODE_CONTEXT + code
        call = f"func_{chain[0]}({x})"
        return Sample(
            text=context + CODE_ASK.format(call=call),
            question_at=len(context) + 2,
            answers=(str(x + sum(added)),),
            needles=tuple(spans),
            max_new_tokens=5,
            prefix=f"The value of {call} is",
            pad_at=len(head),
            meta={"levels": levels, "functions": len(bodies)},
        )


def _function(name: int, called: int | None, added: int) -> str:
    value = "x" if called is None else f"func_{called}(x)"
    plus = "" if added == 0 else f" {'-' if added < 0 else '+'} {abs(added)}"
    return f"def func_{name}(x):\n    return {value}{plus}"


def _noise(sentences: int) -> list[str]:
    """Lines of the five sentences of noise; the last may hold fewer."""
    line = [NOISE[i % len(NOISE)] for i in range(sentences)]
    return [" ".join(line[i : i + len(NOISE)]) for i in range(0, sentences, len(NOISE))]


TASKS: tuple[Task, ...] = (
    PassKey("passkey"),
    NumberString("number_string"),
    KeyValue("kv_retrieval"),
    MathFind("math_find"),
    CodeRun("code_run"),
)
