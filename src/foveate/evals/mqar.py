"""Multi-query associative recall: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language
Models" (arXiv 2312.04927). Pairs of a key and a value, then some of the keys again: what are their values?

`mqar_batch` is the paper's task on token ids, for training small models from scratch: the recall axis of trained and
linear methods. The task "mqar" asks the same of a language model, in words; its prompt is ours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .place import joined
from .task import Sample, Task
from .text import NOISE, Source

IGNORED = -100  # the label of a position without a question, as torch's cross_entropy skips it
HEAD = "Each line below holds a word and its partner. Memorize the partners.\n\n"
ASK = "\n\nWhat are the partners of {keys}? Give only the {n} partners, in this order, separated by commas."
PREFIX = "The partners are:"


def mqar_batch(
    vocab: int,
    length: int,
    pairs: int,
    *,
    rng: Any,
    batch: int = 1,
    power: float = 0.01,
    passes: int = 1,
    fill: str = "zero",
) -> tuple[Tensor, Tensor]:
    """(inputs, labels), int64 `[batch, length]` each, of MQAR.

    The prefix k1 v1 k2 v2 ... stands first (`passes` times), keys in 1 .. vocab / 2 - 1, values in vocab / 2 .. vocab - 1.
    What follows are slots of two positions; every key stands at the start of one of them, and its value is the label at
    the key's own position. All other labels are -100. Slot j = 1, 2, ... is drawn with a weight of j^(power - 1), without
    replacement: with a small power the questions crowd after the prefix. Where all slots are used, it has no effect.

    Args:
        rng: a `numpy.random.Generator`. batch: number of sequences.
        power: 1 for uniform slots. passes: 2 and more is the variant of "Just Read Twice" (Arora et al. 2024).
        fill: "zero" for token 0 between the questions, "random" for any token (a key that comes by so has no label).

    Raises:
        ConfigError: an odd length, or one without room for the pairs, too small a vocabulary, an unknown fill.
    """
    if length % 2 or pairs < 1 or passes < 1 or 2 * pairs * (passes + 1) > length:
        need = 2 * max(pairs, 1) * (max(passes, 1) + 1)
        raise ConfigError(
            f"length: expected an even number of at least {need} for {pairs} pairs and {passes} passes, got {length}"
        )
    if vocab <= length or pairs > vocab // 2 - 1:
        raise ConfigError(f"vocab: expected more than {max(length, 2 * pairs + 1)}, got {vocab}")
    if fill not in ("zero", "random"):
        raise ConfigError(f"fill: expected zero or random, got {fill!r}")
    start = 2 * pairs * passes
    slots = (length - start) // 2
    weights = np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
    weights /= weights.sum()
    inputs = np.zeros((batch, length), dtype=np.int64)
    labels = np.full((batch, length), IGNORED, dtype=np.int64)
    for row in range(batch):
        keys = rng.choice(np.arange(1, vocab // 2), size=pairs, replace=False)
        values = rng.choice(np.arange(vocab // 2, vocab), size=pairs, replace=False)
        at = start + 2 * rng.choice(np.arange(slots), size=pairs, replace=False, p=weights)
        inputs[row, :start] = np.tile(np.stack([keys, values], axis=1).reshape(-1), passes)
        inputs[row, at] = keys
        labels[row, at] = values
    if fill == "random":
        empty = inputs == 0
        inputs[empty] = rng.integers(0, vocab, size=int(empty.sum()))
    return torch.from_numpy(inputs), torch.from_numpy(labels)


@dataclass(frozen=True)
class Recall(Task):
    """Lines of an adjective and a noun; the nouns of `queries` adjectives are asked for.

    Where there are more lines than adjectives (some 6,000 tokens), further keys are an adjective and a verb with a
    hyphen. No other word of the text holds an answer.
    """

    queries: int = 4
    suite: ClassVar[str] = "mqar"

    def needs(self, source: Source) -> str | None:
        if len(_short(source.adjectives)) < 2 * self.queries or len(_short(source.nouns)) < 20 * self.queries:
            return "needs more adjectives and nouns of 3 to 8 letters than the word lists hold"
        return None

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        adjectives, nouns = _short(source.adjectives), _short(source.nouns)
        keys = rng.sample(adjectives, self.queries)
        told = " ".join([HEAD, ASK, PREFIX, *NOISE, *keys]).lower()
        values: list[str] = []
        while len(values) < self.queries:
            noun = rng.choice(nouns)
            if noun not in told and not any(noun in v or v in noun for v in values):
                values.append(noun)
        apart = lambda word: not any(v in word for v in values)  # noqa: E731
        others = [a for a in adjectives if a not in keys and apart(a)]
        rng.shuffle(others)
        fillers = [n for n in nouns if apart(n)]
        lines = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
        lines += [f"{key} {rng.choice(fillers)}" for key in others[:size]]
        lines += [f"{key} {rng.choice(fillers)}" for key in _compounds(rng, others, source, size - len(others), apart)]
        order = list(range(len(lines)))
        rng.shuffle(order)
        context, spans = joined([lines[i] for i in order], "\n", [order.index(i) for i in range(self.queries)], len(HEAD))
        asked = f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]
        return Sample(
            text=HEAD + context + ASK.format(keys=asked, n=self.queries),
            question_at=len(HEAD) + len(context) + 2,
            answers=tuple(values),
            needles=tuple(spans),
            max_new_tokens=8 * self.queries,
            prefix=PREFIX,
            pad_at=0,
            meta={"queries": self.queries, "pairs": len(lines), "prompts": "own"},
        )


def _short(words: tuple[str, ...]) -> list[str]:
    return [w for w in words if w.isascii() and w.isalpha() and w.islower() and 3 <= len(w) <= 8]


def _compounds(rng: random.Random, adjectives: list[str], source: Source, n: int, apart: Any) -> list[str]:
    """`n` distinct keys of an adjective and a verb."""
    verbs = [v for v in _short(source.verbs) if apart(v)]
    if n > len(adjectives) * len(verbs):
        raise ConfigError(f"task mqar: the word lists give fewer than {n} further keys")
    made: dict[str, None] = {}
    while len(made) < n:
        made[f"{rng.choice(adjectives)}-{rng.choice(verbs)}"] = None
    return list(made)


TASKS: tuple[Task, ...] = (Recall("mqar"),)
