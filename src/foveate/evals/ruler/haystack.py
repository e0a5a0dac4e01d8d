"""Noise lines, and text pieces put together so that the planted ones can be found again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..text import NOISE

Span = tuple[int, int]  # (first, last + 1) characters


def noise(sentences: int) -> list[str]:
    """RULER's noise: lines of its five sentences, the last line shorter when `sentences` is no multiple of five."""
    return [" ".join(NOISE[: sentences - at]) for at in range(0, sentences, len(NOISE))]


def plant(lines: Sequence[str], needles: Sequence[str], at: Sequence[int]) -> tuple[list[str], list[int]]:
    """`lines` with needle j put before line `at[j]` (ascending; len(lines) for the end), and where the needles are now."""
    pieces = list(lines)
    for j, (needle, line) in enumerate(zip(needles, at)):
        pieces.insert(line + j, needle)
    return pieces, [line + j for j, line in enumerate(at)]


def join(pieces: Sequence[str], planted: Collection[int], between: str) -> tuple[str, list[Span]]:
    """The pieces as one text, and the characters of those numbered in `planted`, in the order of the text.

    White space at the end of a piece is in the text but not in its span.
    """
    marked, spans, at = set(planted), [], 0
    for i, piece in enumerate(pieces):
        if i in marked:
            spans.append((at, at + len(piece.rstrip())))
        at += len(piece) + len(between)
    return between.join(pieces), spans


def moved(spans: Sequence[Span], by: int) -> tuple[Span, ...]:
    """The spans `by` characters further on."""
    return tuple((a + by, b + by) for a, b in spans)


def depth(span: Span, length: int) -> float:
    """Where a span begins in a context of `length` characters: 0 first, 1 last."""
    return round(span[0] / max(1, length - (span[1] - span[0])), 4)
