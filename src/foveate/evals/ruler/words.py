"""RULER's aggregation tasks: common words of a numbered list (cwe), frequent words of a coded text (fwe).

Templates and answer prefixes are those of NVIDIA/RULER (Apache-2.0, Hsieh et al. 2024, arXiv 2404.06654). An answer needs
the counts of the whole list, so the list as a whole is the needle.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..task import Sample, Task
from ..text import Source

CWE_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


class Repeats(NamedTuple):
    """How often a common and another word stands in the list and in the example, and the example's different words."""

    common: int
    other: int
    example_common: int
    example_other: int
    example_words: int

    @property
    def example(self) -> int:
        """Entries of the example."""
        return COMMON * self.example_common + (self.example_words - COMMON) * self.example_other


COMMON = 10
SHORT, LONG = Repeats(6, 1, 3, 1, 20), Repeats(30, 3, 10, 3, 40)
# RULER changes from the short to the long form at 4,096 tokens. A task does not see tokens, so the change is at the first
# size at which the long form exists: with 4 to 7 tokens an entry that is between 2,300 and 3,900 tokens.
LONG_FROM = LONG.example + COMMON * LONG.common + COMMON * LONG.other


@dataclass(frozen=True)
class CommonWords(Task):
    """Ten words are repeated often, all others seldom; which are the ten? A unit is an entry of the list or the example.

    One worked example of other words comes first. Words that are part of another word are never among the ten, because
    the metric looks for them in the answer. Where the word list ends (128K tokens), numbered words go on.
    """

    max_new_tokens: int = 120

    suite: ClassVar[str] = "ruler"
    least: ClassVar[int] = SHORT.example + COMMON * SHORT.common + COMMON * SHORT.other

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        repeats = LONG if size >= LONG_FROM else SHORT
        pool = rng.sample(source.words, len(source.words))
        listed = "\n".join(pool)
        common: list[str] = []
        for word in pool:
            if len(common) == COMMON:
                break
            if listed.count(word) == 1:
                common.append(word)
        rest = [w for w in pool if w not in common]
        shown, rest = rest[: LONG.example_words], rest[LONG.example_words :]
        shown = shown[: repeats.example_words]
        example = _numbered(shown, repeats.example_common, repeats.example_other, rng)

        others = (size - repeats.example - COMMON * repeats.common) // repeats.other
        rest += [f"word{i}" for i in range(len(rest), others)]
        context = _numbered([*common, *rest[:others]], repeats.common, repeats.other, rng)
        solved = " ".join(f"{i + 1}. {word}" for i, word in enumerate(shown[:COMMON]))
        head = f"{CWE_TEMPLATE.format(context=example)}{CWE_PREFIX} {solved}\n{CWE_TEMPLATE.split('{context}')[0]}"
        end = len(head) + len(context)
        return Sample(
            text=f"{head}{context}{CWE_TEMPLATE.split('{context}')[1]}",
            question_at=end + 1,
            answers=tuple(common),
            needles=((len(head), end),),
            max_new_tokens=self.max_new_tokens,
            prefix=CWE_PREFIX,
            pad_at=0,
            meta={"common": repeats.common, "other": repeats.other, "words": COMMON + others, "examples": 1},
        )

    def needs(self, source: Source) -> str | None:
        least = COMMON + LONG.example_words + COMMON
        return None if len(source.words) >= least else f"needs {least} different words, got {len(source.words)}"


def _numbered(words: Sequence[str], common: int, other: int, rng: random.Random) -> str:
    """ "1. word 2. word ..." with the first ten words `common` times and the others `other` times, shuffled."""
    entries = [*words[:COMMON]] * common + [*words[COMMON:]] * other
    rng.shuffle(entries)
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(entries))


@dataclass(frozen=True)
class FrequentWords(Task):
    """The word of rank k stands floor(size / (k^2 zeta(2))) times in the text; rank 1 is "..."; which are ranks 2 to 4?

    RULER bounds the ranks by a fiftieth of the tokens; from about 800 tokens on, fewer than that appear at all.
    """

    max_new_tokens: int = 50

    suite: ClassVar[str] = "ruler"
    least: ClassVar[int] = 74  # from here on ranks 4 and 5 differ by more than 1 before rounding down, so never tie

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        known = FWE_TEMPLATE.lower()
        words, counts = ["..."], frequencies(size)
        while len(words) < max(4, len(counts)):
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in words and word not in known:
                words.append(word)
        text = [word for word, n in zip(words, counts) for _ in range(n)]
        rng.shuffle(text)
        context = " ".join(text)
        head, tail = FWE_TEMPLATE.split("{context}")
        return Sample(
            text=f"{head}{context}{tail}",
            question_at=len(head) + len(context) + 1,
            answers=tuple(words[1:4]),
            needles=((len(head), len(head) + len(context)),),
            max_new_tokens=self.max_new_tokens,
            prefix=FWE_PREFIX,
            pad_at=0,
            meta={"alpha": 2.0, "counts": counts[:5], "words": len(counts)},
        )


def frequencies(size: int) -> list[int]:
    """How often the words of rank 1, 2, ... appear, as long as they do."""
    first = size * 6 / math.pi**2
    return [int(first / rank**2) for rank in range(1, math.isqrt(int(first)) + 1)]


CWE, FWE = CommonWords("cwe"), FrequentWords("fwe")
