"""Questions about documents: RULER's qa prompt with the documents that answer and as many others as fit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from ..task import Sample
from .haystack import Span, depth, join, moved

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}"
)
PREFIX = " Answer:"


def documents_sample(
    query: str,
    answers: Sequence[str],
    gold: Sequence[tuple[str, str | None]],
    others: Iterator[str],
    words: int,
    rng: random.Random,
    max_new_tokens: int,
    meta: dict[str, object],
) -> Sample:
    """The sample with `words` words of other documents, all shuffled and numbered.

    Args:
        gold: (document, the part of it an answer cannot do without, or None for no part) in any order.
        others: endless; the last one taken is cut to the words that are left, so that a length is met.
    """
    documents: list[tuple[str, str | None]] = list(gold)
    while words > 0:
        document = next(others)
        held = document.split(" ")
        documents.append((" ".join(held[:words]).rstrip(), None))
        words -= len(held)
    rng.shuffle(documents)
    pieces = [f"Document {i + 1}:\n{text}" for i, (text, _) in enumerate(documents)]
    wanted = [i for i, (_, part) in enumerate(documents) if part is not None]
    context, whole = join(pieces, wanted, "\n\n")
    spans: list[Span] = []
    for i, (start, _) in zip(wanted, whole):
        part = documents[i][1] or ""
        at = context.index(part, start)
        spans.append((at, at + len(part)))
    head, tail = TEMPLATE.split("{context}")
    tail = tail.format(query=query)
    if len(spans) == 1:
        meta = {**meta, "depth": depth(spans[0], len(context))}
    return Sample(
        text=f"{head}{context}{tail}",
        question_at=len(head) + len(context) + tail.index("Question: "),
        answers=tuple(answers),
        needles=moved(spans, len(head)),
        max_new_tokens=max_new_tokens,
        prefix=PREFIX,
        pad_at=len(head),
        meta={**meta, "documents": len(documents)},
    )
