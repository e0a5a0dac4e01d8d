"""Endless training batches from `texts`, made by worker processes; the trainer sets the length while they run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..text import Source
from .texts import KINDS, Text, Writer, fitting

POSITIONS = 65536
ANSWER, ELSE = 1.0, 0.05  # weights of the loss in an answer, and elsewhere
EARLIER = 0.33  # share of batches of earlier lengths
SAMPLED = 0.04  # share of the other tokens that are predicted at all
Batch = dict[str, Tensor]


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Batches of `tokens` tokens, half as many up to 2,048 a row, where steps count more: rows of one length each.

    A batch holds `ids`, `pos` int32 `[R, N]`; `weight` float32 `[R, N]`, of the loss at predicting this token; `answer`
    int32 `[R, N]`, 0 or a number of the answer times 16 plus 1 + the index of its kind in `texts.KINDS`.
    `length`, a shared tensor, is the current N; a third of the batches have an earlier one, half of them the last,
    so nothing is forgotten.
    """

    def __init__(self, tokenizer: Any, source: Source, seed: int, tokens: int, ladder: tuple[int, ...]) -> None:
        self.tokenizer, self.source, self.seed, self.tokens, self.ladder = tokenizer, source, seed, tokens, ladder
        self.length = torch.tensor([ladder[0]]).share_memory_()

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        torch.set_num_threads(1)
        rng = random.Random(f"{self.seed}/{0 if info is None else info.id}")
        writer = Writer(self.tokenizer, self.source, rng)
        while True:
            now = int(self.length[0])
            earlier = [n for n in self.ladder if n < now]
            back = earlier and rng.random() < EARLIER
            n = rng.choice([*earlier, *[earlier[-1]] * len(earlier)]) if back else now
            yield batch(writer, max(1, self.tokens // n // (2 if n <= 2048 else 1)), n, rng)


def batch(writer: Writer, rows: int, n: int, rng: random.Random) -> Batch:
    """`rows` texts of at most n tokens, padded at the end, where causal attention does not see it."""
    shares = fitting(n)
    kinds = rng.choices(list(shares), weights=list(shares.values()), k=rows)
    noise = np.random.default_rng(rng.getrandbits(64))
    ids, pos = np.zeros((rows, n), np.int32), np.zeros((rows, n), np.int32)
    weight, answer = np.zeros((rows, n), np.float32), np.zeros((rows, n), np.int32)
    for r, kind in enumerate(kinds):
        text = writer.text(kind, n)
        _fill(text, ids[r], weight[r], answer[r], noise)
        pos[r] = positions(n, noise, _places(text, kind, writer)) if n > 64 else np.arange(n)
    arrays = {"ids": ids, "pos": pos, "weight": weight, "answer": answer}
    return {name: torch.from_numpy(a) for name, a in arrays.items()}


def _fill(text: Text, ids: np.ndarray, weight: np.ndarray, answer: np.ndarray, noise: np.random.Generator) -> None:
    k = len(text.ids)
    ids[:k] = text.ids
    weight[:k] = ELSE * (noise.random(k) < SAMPLED)
    for a, b, soft in text.soft:
        weight[a:b] = soft
    for number, (a, b, kind) in enumerate(text.answers, 1):
        weight[a:b] = ANSWER
        answer[a:b] = number * 16 + 1 + KINDS.index(kind)


def _places(text: Text, kind: str, writer: Writer) -> np.ndarray:
    """Where positions may jump: after a line or a sentence that precedes the questions. The distance of a value from its
    key, or of an answer from the words of its question, is what the model goes by, and stays as it will be in use."""
    end = min((a for a, _, _ in text.soft), default=len(text.ids)) if kind != "repeat" else 0
    stops = np.isin(np.array(text.ids[: max(0, end - 1)], np.int64), (writer.nl[0], writer.dot[0]))
    return np.nonzero(stops)[0] + 1


def positions(n: int, noise: np.random.Generator, places: np.ndarray) -> np.ndarray:
    """Position ids int `[n]`, ascending: half of the time with up to eight jumps at some of the `places`, so that short
    texts reach over distances up to 64K (Zhu et al. 2023, "PoSE", arXiv 2309.10400); the rest are 0 .. n - 1, as in use."""
    out = np.arange(n, dtype=np.int64)
    spare = POSITIONS - n
    if spare <= 0 or not len(places) or noise.random() < 0.5:
        return out
    stretch = min(spare, int(np.exp(noise.uniform(np.log(64), np.log(POSITIONS)))))
    jumps = noise.integers(1, 9)
    cuts = np.sort(noise.choice(places, size=jumps))
    sizes = noise.dirichlet(np.ones(jumps)) * stretch
    for cut, size in zip(cuts, sizes):
        out[cut:] += int(size)
    return out


def loader(stream: Stream, workers: int) -> Iterator[Batch]:
    """The stream through `workers` processes (0: in this one). To be called before the GPU is touched: it forks."""
    if workers == 0:
        return iter(stream)
    made = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4, multiprocessing_context="fork")
    return iter(made)
