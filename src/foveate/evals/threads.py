"""Needle Threading: Roberts, Han and Albanie 2024, "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale
Haystacks?" (arXiv 2411.05000). A haystack is one JSON object of random UUID pairs; the tasks look up one or several
keys, or follow a value that is the key of another pair.

The prompt of `Single` is that of jonathan-roberts1/needle-threading, word for word, its final space left to the answer.
The authors' other prompts are not public in text form; those here are ours and say `"prompts": "own"` in `meta`.
Sizes are fitted to tokens here; upstream counts characters, which does not compare between tokenizers.

UUIDs have 122 random bits, so that keys and values are distinct and no chain goes on by accident.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .place import depth_of, joined, uuid4
from .task import Sample, Task, Turn
from .text import Source

Pair = tuple[str, str]

SINGLE = 'Extract the value corresponding to the specified key in the JSON object. Key: "{key}"'
SINGLE_PREFIX = " Corresponding value:"
MULTIPLE = (
    "Extract the values corresponding to the specified keys in the JSON object. Keys: {keys}\n"
    "Give the values as a Python list, in the order of the keys, and nothing else."
)
CONDITIONAL = (
    'Extract the values corresponding to all keys in the JSON object that contain the character "{mark}".\n'
    "Give the values as a Python list and nothing else."
)
VALUES_PREFIX = " Corresponding values:"
RULE = "In the JSON object above, the value of a pair may be the key of another pair. "
CHAIN = RULE + (
    "Start at the key below and look up its value. While that value is itself a key, look up its value in turn. "
    'Give only the last value, which is not a key.\nStart: "{key}"'
)
PARALLEL = RULE + (
    "For each of the start keys below, look up its value. While that value is itself a key, look up its value in turn. "
    "Give only the last values, which are not keys, as a Python list in the order of the start keys.\nStart: {keys}"
)
BRANCHED = RULE + (
    "The same key may stand in several pairs; each of them is a branch. Start at the key below and follow every branch "
    "until its value is not a key. Give only the last value of the longest branch.\n"
    'Start: "{key}"'
)
LAST_PREFIX = " Last value:"
LASTS_PREFIX = " Last values:"
VALUE_TOKENS = 48  # a UUID takes 18 to 40 tokens, quotes and separators not counted


@dataclass(frozen=True)
class Single(Task):
    """One key. `depths`: the depths from 0 to 1 that the samples take. `turns`: more keys, asked of the same haystack."""

    depths: int = 11
    turns: int = 3
    suite: ClassVar[str] = "threads"
    metric: ClassVar[str] = "starts"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        asked, *others = _pairs(rng, 1 + self.turns)
        depth = depth_of(index, self.depths)
        total = size + 1 + self.turns
        at = round(depth * (total - 1))
        free = rng.sample(range(total - 1), self.turns)  # places of the others, counted without the first
        places = [at, *(i + (i >= at) for i in free)]
        return _sample(
            *_haystack(rng, [asked, *others], places, total, needles=1),
            SINGLE.format(key=asked[0]),
            SINGLE_PREFIX,
            [asked[1]],
            {"depth": depth},
            tuple(Turn(SINGLE.format(key=k), SINGLE_PREFIX, (v,)) for k, v in others),
        )


@dataclass(frozen=True)
class Multiple(Task):
    """Several keys at once, anywhere or (`clustered`) next to one another."""

    needles: int = 5
    clustered: bool = False
    suite: ClassVar[str] = "threads"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        pairs = _pairs(rng, self.needles)
        return self._ask(size, rng, pairs, MULTIPLE.format(keys=_listed([k for k, _ in pairs])), {})

    def _ask(self, size: int, rng: random.Random, pairs: list[Pair], question: str, meta: dict) -> Sample:
        total = size + self.needles
        if self.clustered:
            first = rng.randrange(size + 1)
            places = rng.sample(range(first, first + self.needles), self.needles)
        else:
            places = rng.sample(range(total), self.needles)
        values = [v for _, v in pairs]
        meta = {"needles": self.needles, "clustered": self.clustered, "prompts": "own", **meta}
        return _sample(*_haystack(rng, pairs, places, total), question, VALUES_PREFIX, values, meta)


@dataclass(frozen=True)
class Conditional(Multiple):
    """All keys that hold a mark, "*" or "&", in place of a hex digit: what is asked for resembles no key as a whole."""

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        mark = rng.choice("*&")
        pairs = []
        for key, value in _pairs(rng, self.needles):
            at = rng.choice([i for i, c in enumerate(key) if c != "-"])
            pairs.append((key[:at] + mark + key[at + 1 :], value))
        return self._ask(size, rng, pairs, CONDITIONAL.format(mark=mark), {"mark": mark})


@dataclass(frozen=True)
class Chain(Task):
    """A thread of `hops` pairs. Each next pair stands later ("forward"), earlier ("backward") or anywhere ("random")."""

    hops: int = 4
    direction: str = "forward"
    suite: ClassVar[str] = "threads"
    metric: ClassVar[str] = "starts"

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "backward", "random"):
            raise ConfigError(f"direction: expected forward, backward or random, got {self.direction!r}")

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        thread = _thread(rng, self.hops)
        return self._ask(size, rng, [thread], CHAIN.format(key=thread[0][0]), LAST_PREFIX)

    def _ask(self, size: int, rng: random.Random, threads: list[list[Pair]], question: str, prefix: str) -> Sample:
        total = size + self.hops * len(threads)
        taken = sorted(rng.sample(range(total), self.hops * len(threads)))
        owners = [t for t in range(len(threads)) for _ in range(self.hops)]
        rng.shuffle(owners)
        places: list[int] = []
        for t in range(len(threads)):
            own = [at for at, owner in zip(taken, owners, strict=True) if owner == t]
            if self.direction == "backward":
                own.reverse()
            elif self.direction == "random":
                rng.shuffle(own)
            places += own
        pairs = [pair for thread in threads for pair in thread]
        meta = {"hops": self.hops, "threads": len(threads), "direction": self.direction, "prompts": "own"}
        ends = [thread[-1][1] for thread in threads]
        return _sample(*_haystack(rng, pairs, places, total), question, prefix, ends, meta)


@dataclass(frozen=True)
class Parallel(Chain):
    """Several threads of equal length, to be followed at once."""

    threads: int = 3
    metric: ClassVar[str] = "all"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        threads = [_thread(rng, self.hops) for _ in range(self.threads)]
        question = PARALLEL.format(keys=_listed([thread[0][0] for thread in threads]))
        return self._ask(size, rng, threads, question, LASTS_PREFIX)


@dataclass(frozen=True)
class Branched(Task):
    """A thread whose every key but the last stands in `branches` pairs; only one branch reaches `hops` pairs.

    A branch that leaves the thread may go on for some pairs, but ends before the thread does. Next pairs stand later.
    """

    hops: int = 4
    branches: int = 2
    suite: ClassVar[str] = "threads"
    metric: ClassVar[str] = "starts"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        thread = _thread(rng, self.hops)
        steps = [[pair] for pair in thread]  # the pairs by their distance from the start
        for step in range(self.hops - 1):
            for _ in range(self.branches - 1):
                key = thread[step][0]
                for after in range(step, rng.randrange(step + 1, self.hops)):
                    value = uuid4(rng)
                    steps[after].append((key, value))
                    key = value
        pairs = []
        for together in steps:
            rng.shuffle(together)
            pairs += together
        total = size + len(pairs)
        places = sorted(rng.sample(range(total), len(pairs)))
        meta = {"hops": self.hops, "branches": self.branches, "pairs": len(pairs), "prompts": "own"}
        question = BRANCHED.format(key=thread[0][0])
        return _sample(*_haystack(rng, pairs, places, total), question, LAST_PREFIX, [thread[-1][1]], meta)


def _pairs(rng: random.Random, n: int) -> list[Pair]:
    return [(uuid4(rng), uuid4(rng)) for _ in range(n)]


def _thread(rng: random.Random, hops: int) -> list[Pair]:
    """Pairs of which each value is the next key."""
    stops = [uuid4(rng) for _ in range(hops + 1)]
    return list(zip(stops[:-1], stops[1:], strict=True))


def _listed(keys: list[str]) -> str:
    return "[" + ", ".join(f'"{key}"' for key in keys) + "]"


def _haystack(
    rng: random.Random, pairs: list[Pair], places: list[int], total: int, needles: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """A JSON object of `total` pairs, these at those places and fresh ones elsewhere; the spans of the first `needles`.

    The text is put together by hand: a key of the branched task stands in it more than once.
    """
    chosen = dict(zip(places, pairs, strict=True))
    filled = [chosen.get(i) or (uuid4(rng), uuid4(rng)) for i in range(total)]
    text, spans = joined([f'"{k}": "{v}"' for k, v in filled], ", ", places[:needles], start=1)
    return "{" + text + "}", spans


def _sample(
    haystack: str,
    spans: list[tuple[int, int]],
    question: str,
    prefix: str,
    answers: list[str],
    meta: dict,
    turns: tuple[Turn, ...] = (),
) -> Sample:
    return Sample(
        text=f"{haystack}\n{question}",
        question_at=len(haystack) + 1,
        answers=tuple(answers),
        needles=tuple(spans),
        max_new_tokens=VALUE_TOKENS * len(answers),
        prefix=prefix,
        pad_at=0,
        turns=turns,
        meta=meta,
    )


TASKS: tuple[Task, ...] = (
    Single("threads_single"),
    Multiple("threads_multiple"),
    Conditional("threads_conditional"),
    Chain("threads_forward", direction="forward"),
    Chain("threads_backward", direction="backward"),
    Chain("threads_random", direction="random"),
    Parallel("threads_parallel"),
    Branched("threads_branched"),
)
