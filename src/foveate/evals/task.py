"""What an evaluation task is: a seeded maker of questions about long texts, fitted to a length in tokens.

A task knows how to build a `Sample` from a number of filler units; `make` finds the number that fills a budget for a
given tokenizer. Sample i of a task depends on (seed, task, length, i) and nothing else: not on the samples before it,
not on the search for the length, not on the machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..errors import ConfigError
from ..prompts import chat
from .text import NOISE, Source

SLACK = 0.01  # a sample may be this much shorter than asked, never longer


@dataclass(frozen=True)
class Turn:
    """A further question about the same text: the user's words, the forced start of the answer, the references."""

    question: str
    prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One question about one long text.

    Attributes:
        text: the user's message, without white space around it. question_at: the character where the part begins that
            a cache policy must not see under the protocol "unseen" (len(text) if the question is only in `prefix`).
        prefix: the forced start of the answer, "" for none. answers: references, as the metric wants them.
        needles: (first, last + 1) characters of `text` that an answer cannot do without.
        max_new_tokens: the longest answer. pad_at: a character where filler sentences may be put, or None.
        turns: further questions about the same text. meta: the difficulty knobs, plain JSON values.
    """

    text: str
    question_at: int
    answers: tuple[str, ...]
    needles: tuple[tuple[int, int], ...]
    max_new_tokens: int
    prefix: str = ""
    pad_at: int | None = None
    turns: tuple[Turn, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def padded(self, sentences: Sequence[str]) -> Sample:
        """The same question with these sentences inserted at `pad_at`."""
        at, more = self.pad_at, "".join(s + " " for s in sentences)
        if at is None or not more:
            return self
        move = lambda i: i + len(more) if i >= at else i  # noqa: E731
        return replace(
            self,
            text=self.text[:at] + more + self.text[at:],
            question_at=move(self.question_at),
            needles=tuple((move(a), move(b)) for a, b in self.needles),
        )


@dataclass(frozen=True)
class Encoded:
    """A sample in tokens.

    Attributes:
        ids: the whole prompt, template and answer prefix included. question_at: the first token that may belong to
            the question. needles: (first, last + 1) tokens of each needle.
    """

    ids: list[int]
    question_at: int
    needles: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Task:
    """Base of all tasks: the name it is asked for by, its suite, its metric (a key of `scoring.METRICS`).

    Fields of subclasses are the difficulty knobs. `step`: filler units that are added at once; `least`: the fewest.
    """

    name: str
    suite: ClassVar[str] = ""
    metric: ClassVar[str] = "all"
    step: ClassVar[int] = 1
    least: ClassVar[int] = 1

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        """The sample with `size` units of filler. Draws that do not depend on `size` come first, so that the question
        stays the same while the length is searched. `index` numbers the samples: grids (depth) run over it."""
        raise NotImplementedError

    def needs(self, source: Source) -> str | None:
        """Why this task cannot be made from this source (a missing word list or data file), or None."""
        return None


def rng_of(seed: int, task: str, length: int, index: int) -> random.Random:
    """The generator of one sample."""
    digest = hashlib.sha256(f"{seed}/{task}/{length}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def make(task: Task, tokenizer: Any, length: int, index: int, seed: int, source: Source) -> tuple[Sample, Encoded]:
    """Sample `index` of a task whose prompt and longest answer together take 99 % to 100 % of `length` tokens.

    Where one unit of filler is more than 1 % of the length, a few filler sentences fill the rest.

    Raises:
        ConfigError: the length has no room for the question, or the task cannot be made from this source.
    """
    if (why := task.needs(source)) is not None:
        raise ConfigError(f"task {task.name}: {why}")

    def build(units: int) -> tuple[Sample, int]:
        sample = task.build(task.least + units * task.step, rng_of(seed, task.name, length, index), source, index)
        return sample, count(tokenizer, sample) + sample.max_new_tokens

    sample, base = build(0)
    if base > length:
        raise ConfigError(f"task {task.name}: its shortest sample takes {base} tokens, more than the length {length}")
    low, high, used = 0, None, base  # units that fit, units that do not, tokens of the former
    guess = max(1, (length - base) // 16)
    while high is None or high - low > 1:
        longer, tokens = build(guess)
        if tokens <= length:
            low, sample, used = guess, longer, tokens
            if tokens >= length * (1 - SLACK / 4):
                break
        else:
            high = guess
        each = max((tokens - base) / guess, 0.1)  # tokens a unit: the count is nearly linear, so few trials are needed
        guess = max(low + 1, guess + int((length - tokens) // each))
        guess = guess if high is None else min(guess, high - 1)
    if used < length * (1 - SLACK):
        sample = _fill(sample, length - used, lambda s: count(tokenizer, s) + s.max_new_tokens <= length)
    return sample, encode(tokenizer, sample)


def _fill(sample: Sample, room: int, fits: Callable[[Sample], bool]) -> Sample:
    """The sample with as many filler sentences as fit into `room` tokens."""
    for n in range(room // 3, 0, -1):
        longer = sample.padded([NOISE[i % len(NOISE)] for i in range(n)])
        if fits(longer):
            return longer
    return sample


def count(tokenizer: Any, sample: Sample) -> int:
    """Tokens of the prompt, template and answer prefix included."""
    templated = getattr(tokenizer, "chat_template", None) is not None
    whole = chat(tokenizer, sample.text) + sample.prefix
    return len(tokenizer(whole, add_special_tokens=not templated, verbose=False)["input_ids"])


def encode(tokenizer: Any, sample: Sample) -> Encoded:
    """The sample as the model gets it: the text in its chat template, then the answer prefix.

    Raises:
        ConfigError: a tokenizer that cannot say where a token lies in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"tokenizer: expected one that gives character offsets (a fast tokenizer), got {type(tokenizer).__name__}"
        )
    whole = chat(tokenizer, sample.text)
    at = whole.find(sample.text)
    if at < 0:
        raise ConfigError("tokenizer: its chat template changes the text of the message; needles cannot be located")
    templated = getattr(tokenizer, "chat_template", None) is not None
    made = tokenizer(whole + sample.prefix, add_special_tokens=not templated, return_offsets_mapping=True, verbose=False)
    offsets = made["offset_mapping"]
    ends = [b for _, b in offsets]
    needles = tuple(_span(offsets, at + a, at + b) for a, b in sample.needles)
    question = at + sample.question_at
    first = next((i for i, end in enumerate(ends) if end > question), len(ends))
    return Encoded(list(made["input_ids"]), first, needles)


def _span(offsets: Sequence[tuple[int, int]], first: int, last: int) -> tuple[int, int]:
    """Tokens that hold any of the characters first .. last - 1."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    if not inside:
        raise ConfigError(f"tokenizer: no token covers the characters {first} to {last} of the prompt")
    return inside[0], inside[-1] + 1
