"""The curriculum: which text length is trained now, and what the model gets right at which length."""

from __future__ import annotations

from .texts import KINDS, gate

# (length, share of the time at which the next one comes at the latest): short ones may take long, since nothing is learned
# from long texts before a value is bound to its key, but they are over sooner; the last third is for 32K in any case
RUNGS = ((64, 0.1), (128, 0.3), (256, 0.38), (512, 0.44), (2048, 0.52), (8192, 0.6), (32768, 0.94), (65536, 1.0))
SOLVED, MASTERED = 0.97, 0.99  # what it takes to leave a length, from 8K on
ENOUGH = 60  # answers of a kind before its accuracy counts


class Ladder:
    """Moves to the next length once every kind of `texts.gate` is right in 97 % of recent answers (from 8K on: 99 %), or
    its time is over.

    Training texts never come twice, so accuracy on them is accuracy on unseen ones.
    """

    def __init__(self, rungs: tuple[tuple[int, float], ...] = RUNGS) -> None:
        self.rungs, self.at, self.steps = rungs, 0, 0
        self.seen: dict[tuple[int, str], tuple[float, float]] = {}  # answers and hits, both fading
        self.moves: list[str] = []

    @property
    def length(self) -> int:
        return self.rungs[self.at][0]

    def saw(self, length: int, answers: list[float], hits: list[float]) -> None:
        """Count a batch of this length; the memory is some 400 answers of a kind."""
        self.steps += length == self.length
        for kind, n, right in zip(KINDS, answers, hits):
            if n:
                had, hit = self.seen.get((length, kind), (0.0, 0.0))
                keep = max(0.0, 1 - n / 400)
                self.seen[length, kind] = (had * keep + n, hit * keep + right)

    def accuracy(self, length: int) -> dict[str, float]:
        """Share of answers right, per kind that was asked for at this length."""
        return {k: self.seen[length, k][1] / self.seen[length, k][0] for k in KINDS if (length, k) in self.seen}

    def solved(self, length: int) -> float:
        """The worst accuracy among the kinds that count, 0 while one of them was hardly asked for."""
        if any(self.seen.get((length, k), (0.0, 0.0))[0] < ENOUGH for k in gate(length)):
            return 0.0
        return min(self.accuracy(length)[k] for k in gate(length))

    def move(self, share: float) -> bool:
        """Whether the next length begins, `share` of the time being used up."""
        if self.at + 1 == len(self.rungs):
            return False
        wanted = SOLVED if self.length < 8192 else MASTERED
        over, solved = share >= self.rungs[self.at][1], self.steps >= 20 and self.solved(self.length) >= wanted
        if over or solved:
            self.moves.append(f"{self.length} {'solved' if solved else 'out of time'} at {share:.0%} of the time")
            self.at, self.steps = self.at + 1, 0
        return over or solved
