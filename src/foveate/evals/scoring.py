"""The suites' own metrics: a prediction and its references to a score from 0 to 1.

A metric whose score can only grow while more text is generated is in `GROWS`: once it is 1 the generation may stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]


def clean(text: str) -> str:
    """RULER's post-processing: control characters become line breaks, white space around is dropped."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def contains_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all: the share of references found in the prediction, whatever the case."""
    text = clean(prediction).lower()
    return sum(a.lower() in text for a in answers) / len(answers)


def contains_any(prediction: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part: any reference is found."""
    text = clean(prediction).lower()
    return float(any(a.lower() in text for a in answers))


def starts_with(prediction: str, answers: Sequence[str]) -> float:
    """Needle Threading's: a reference is what the prediction begins with, after white space and quotes."""
    text = prediction.lstrip(" \t\r\n\"'`")
    return float(any(text.startswith(a) for a in answers))


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's passkey: the first run of digits is a reference, digit by digit (the sign is not looked at)."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found.group() in answers)


def among_words(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's kv_retrieval: a reference is one of the words between white space and punctuation but hyphens."""
    words = re.split(r"[\s:\"'.,?!{}]+", prediction)
    return float(any(a in words for a in answers))


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's math_find: the first number, whole or with decimals, equals a reference."""
    found = re.search(r"[0-9]+\.[0-9]+|[0-9]+", prediction)
    return float(found is not None and any(float(found.group()) == float(a) for a in answers))


def last_integer(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's code_run: the last word, read as an integer, equals a reference."""
    words = re.sub(r"[.`'\":]", " ", prediction).split()
    if not words or re.fullmatch(r"[+-]?[0-9]{1,18}", words[-1]) is None:
        return 0.0
    return float(any(int(words[-1]) == int(a) for a in answers))


METRICS: dict[str, Metric] = {
    "all": contains_all,
    "any": contains_any,
    "starts": starts_with,
    "first_integer": first_integer,
    "words": among_words,
    "first_number": first_number,
    "last_integer": last_integer,
}
GROWS = {"all", "any", "starts"}
