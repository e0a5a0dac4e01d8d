"""Measures the needle model with the real tasks: samples of `evals.task.make`, greedy decoding, the tasks' own metrics."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from ..scoring import METRICS
from ..suites import choose
from ..task import make
from ..text import Source

# (task, length, samples), the ones that matter first
PLAN = (
    *(("niah_single_1", 32768, 100), ("niah_multikey_2", 32768, 100), ("mqar", 32768, 100)),
    *(("niah_multikey_1", 32768, 50), ("niah_multiquery", 32768, 50), ("niah_multivalue", 32768, 50), ("vt", 32768, 30)),
    *(("niah_multikey_2", 65536, 30), ("niah_single_1", 65536, 20), ("mqar", 65536, 20), ("niah_multikey_3", 32768, 20)),
)
HELD_OUT = 104729  # added to the seed: no training text comes from this stream


class Case(NamedTuple):
    task: str
    length: int
    ids: list[int]
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int


_held: dict[str, Any] = {}


def _start(tokenizer: Any, source: Source, seed: int) -> None:
    torch.set_num_threads(1)
    _held.update(tokenizer=tokenizer, source=source, seed=seed)


def _case(task: str, length: int, index: int) -> Case:
    (found,), _ = choose([task])
    sample, encoded = make(found, _held["tokenizer"], length, index, _held["seed"] + HELD_OUT, _held["source"])
    return Case(task, length, encoded.ids, sample.answers, found.metric, sample.max_new_tokens)


class Cases:
    """Held-out samples, built by `workers` processes while the training runs (0: when they are asked for)."""

    def __init__(
        self, plan: Sequence[tuple[str, int, int]], tokenizer: Any, source: Source, seed: int, workers: int
    ) -> None:
        self.plan, self.held = plan, (tokenizer, source, seed)
        self.pool: ProcessPoolExecutor | None = None
        self.futures: list[Future[Case]] = []
        if workers:
            context = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=self.held)
            self.futures = [self.pool.submit(_case, t, n, i) for t, n, count in plan for i in range(count)]

    def __iter__(self) -> Iterator[Case]:
        """The samples that are ready, in turns over the tasks, so that a cut leaves some of each."""
        if self.pool is None:
            _start(*self.held)
            for task, length, count in self.plan:
                for i in range(count):
                    yield _case(task, length, i)
            return
        groups: dict[tuple[str, int], list[Case]] = {}
        for f in self.futures:
            if f.done() and not f.cancelled() and f.exception() is None:
                case = f.result()
                groups.setdefault((case.task, case.length), []).append(case)
        for turn in range(max((len(g) for g in groups.values()), default=0)):
            for group in groups.values():
                if turn < len(group):
                    yield group[turn]

    def errors(self) -> list[str]:
        """What kept samples from being built, each reason once."""
        failed = [f.exception() for f in self.futures if f.done() and not f.cancelled()]
        return sorted({f"{type(e).__name__}: {e}" for e in failed if e is not None})

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


@torch.inference_mode()
def answer(model: Any, ids: Sequence[int], limit: int, eos: int) -> list[int]:
    """Greedy continuation of one prompt with dense attention, without the end-of-text token."""
    device = next(model.parameters()).device
    fed, cache, out = torch.tensor([list(ids)], device=device), None, []
    for _ in range(limit):
        made = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, token = made.past_key_values, int(made.logits[0, -1].argmax())
        if token == eos:
            break
        out.append(token)
        fed = torch.tensor([[token]], device=device)
    return out


def check(model: Any, tokenizer: Any, cases: Cases, seconds: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows {task, length, n, score, exact} of all samples that fit into the time. `exact`: share of full scores."""
    began, scores = time.monotonic(), {}  # type: float, dict[tuple[str, int], list[float]]
    for case in cases:
        if time.monotonic() - began > seconds:
            break
        limit = min(case.max_new_tokens, 64)
        text = tokenizer.decode(answer(model, case.ids, limit, tokenizer.eos_token_id), skip_special_tokens=True)
        scores.setdefault((case.task, case.length), []).append(METRICS[case.metric](text, case.answers))
    rows = []
    for (task, length), got in scores.items():
        score, exact = sum(got) / len(got), sum(s == 1 for s in got) / len(got)
        rows.append({"task": task, "length": length, "n": len(got), "score": score, "exact": exact})
        say(f"check {task:16} {length:6}: {100 * score:5.1f} % of {len(got)}")
    return rows
