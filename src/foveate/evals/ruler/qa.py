"""RULER's questions about documents: qa_1 from SQuAD 2.0, qa_2 from HotpotQA, read from the user's files.

Template and answer prefix are those of NVIDIA/RULER (Apache-2.0, Hsieh et al. 2024, arXiv 2404.06654). The data sets are
not part of this library: "dev-v2.0.json" of SQuAD (Rajpurkar et al. 2018, arXiv 1806.03822, CC BY-SA 4.0) and
"hotpot_dev_distractor_v1.json" of HotpotQA (Yang et al. 2018, arXiv 1809.09600, CC BY-SA 4.0).
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ...errors import ConfigError
from ..task import Sample, Task
from ..text import Source
from .documents import documents_sample


class Item(NamedTuple):
    """A question: its references, and numbers of the documents that are always there, that are needed, that come next."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


class Data(NamedTuple):
    items: tuple[Item, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Qa(Task):
    """Question `index` of the file among its own and other documents; a unit is one word of the others.

    `data`: "squad" (one paragraph answers; other paragraphs of its article come before random ones) or "hotpotqa" (the
    ten paragraphs of the question, two of which are needed, then random ones). Answers of real data may also occur in
    other documents, and a yes or no of HotpotQA in none.
    """

    data: str = "squad"
    max_new_tokens: int = 32

    suite: ClassVar[str] = "ruler"
    metric: ClassVar[str] = "any"

    def build(self, size: int, rng: random.Random, source: Source, index: int) -> Sample:
        if (why := self.needs(source)) is not None:
            raise ConfigError(f"task {self.name}: {why}")
        data = _load(self.name, self.data, source.files[self.name])
        item = data.items[index % len(data.items)]
        texts = data.documents
        return documents_sample(
            item.query,
            item.answers,
            [(texts[i], texts[i] if i in item.needed else None) for i in item.gold],
            (texts[i] for i in _others(item, len(texts), rng)),
            size,
            rng,
            self.max_new_tokens,
            {"data": self.data, "hops": len(item.needed)},
        )

    def needs(self, source: Source) -> str | None:
        if self.name in source.files:
            return None
        return f"needs a data file named {self.name}, {_FILES[self.data]}, got none"


def _others(item: Item, documents: int, rng: random.Random) -> Iterator[int]:
    """Endless numbers of other documents: those of the same article, then random ones, each once while there are any."""
    near = rng.sample(item.near, len(item.near))
    yield from near
    while True:
        seen = {*item.gold, *near}
        if len(seen) >= documents:  # a file of one article
            seen, near = {*item.gold}, []
        while len(seen) < documents:
            i = rng.randrange(documents)
            if i not in seen:
                seen.add(i)
                yield i
        near = []


def _load(task: str, data: str, path: Path) -> Data:
    try:
        stamp = path.stat()
        return _parsed(task, data, path, stamp.st_mtime_ns, stamp.st_size)
    except OSError as err:
        raise ConfigError(f"task {task}: cannot read {path}: {err.strerror}") from err


@functools.lru_cache(maxsize=4)
def _parsed(task: str, data: str, path: Path, changed: int, size: int) -> Data:
    """The file's questions and documents. `changed` and `size` only tell a new file from the one read before."""
    try:
        read = _READ[data](json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        what = f"{type(err).__name__}: {err}".splitlines()[0]
        raise ConfigError(f"task {task}: {path} is not {_FILES[data]} ({what})") from err
    if not read.items or len(read.documents) <= max(len(item.gold) for item in read.items):
        raise ConfigError(f"task {task}: {path} holds no questions or too few documents")
    return read


def _squad(raw: Any) -> Data:
    articles = [[p["context"].strip() for p in article["paragraphs"]] for article in raw["data"]]
    documents = sorted({text for texts in articles for text in texts})
    number = {text: i for i, text in enumerate(documents)}
    items = []
    for article, texts in zip(raw["data"], articles):
        for paragraph, text in zip(article["paragraphs"], texts):
            gold = number[text]
            near = tuple(sorted({number[t] for t in texts} - {gold}))
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(a["text"].strip() for a in qa["answers"]))
                if not qa.get("is_impossible", False) and answers:
                    items.append(Item(qa["question"].strip(), answers, (gold,), (gold,), near))
    return Data(tuple(items), tuple(documents))


def _hotpot(raw: Any) -> Data:
    contexts = [[(title, f"{title}\n{''.join(said)}".strip()) for title, said in one["context"]] for one in raw]
    documents = sorted({text for context in contexts for _, text in context})
    number = {text: i for i, text in enumerate(documents)}
    items = []
    for one, context in zip(raw, contexts):
        gold = tuple(dict.fromkeys(number[text] for _, text in context))
        facts = {title for title, _ in one["supporting_facts"]}
        needed = tuple(dict.fromkeys(number[text] for title, text in context if title in facts))
        items.append(Item(one["question"].strip(), (one["answer"].strip(),), gold, needed or gold, ()))
    return Data(tuple(items), tuple(documents))


_READ = {"squad": _squad, "hotpotqa": _hotpot}
_FILES = {
    "squad": 'the JSON of SQuAD 2.0 ("dev-v2.0.json")',
    "hotpotqa": 'the JSON of HotpotQA ("hotpot_dev_distractor_v1.json")',
}

QA: tuple[Qa, ...] = (Qa("qa_1"), Qa("qa_2", data="hotpotqa"))
