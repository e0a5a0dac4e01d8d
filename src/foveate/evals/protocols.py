"""How a sample is put to a model, and the answer taken from it: greedy, in batches, under whatever recipe is applied.

    seen      the whole prompt at once; a cache policy is applied after it and has seen the question
    unseen    the text first, then the cache policy, then the question: one context compressed for any question
    chunked   the prompt in pieces of `chunk` tokens, as a serving engine would feed it
    turns     unseen, then further questions one after the other on the same compressed cache

Under a recipe without a cache policy "unseen" differs from "seen" in that text and question are two prefill calls.
A model without a recipe runs as plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.context import ContextCache
from ..errors import ConfigError, nearest
from ..measure import end_tokens
from ..prompts import chat
from .scoring import GROWS, METRICS
from .task import Encoded, Sample, Turn

PROTOCOLS = ("seen", "unseen", "chunked", "turns")
CHUNK = 1024
LOOK_EVERY = 4  # steps between two looks at the answers so far, to stop early


@dataclass(frozen=True)
class Answer:
    """Texts of a sample's answers (one, or one a turn) and their mean score, 0 to 1."""

    texts: tuple[str, ...]
    score: float


def check_protocols(names: Sequence[str]) -> None:
    """ConfigError for an unknown name or none at all."""
    for name in names:
        if name not in PROTOCOLS:
            raise ConfigError(f"protocols: unknown {name!r}{nearest(name, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}")
    if not names:
        raise ConfigError(f"protocols: expected at least one of {', '.join(PROTOCOLS)}, got none")


def ask(
    model: Any,
    tokenizer: Any,
    batch: Sequence[tuple[Sample, Encoded]],
    metric: str,
    protocol: str,
    *,
    chunk: int = CHUNK,
    tick: Callable[[int], None] = lambda tokens: None,
) -> list[Answer]:
    """Answers to a batch of samples of one task. `tick` hears of tokens read and steps taken.

    An answer ends at the model's end of text, at `max_new_tokens`, or (for metrics that can only grow) soon after it has
    its full score.
    """
    reader = Reader(model, tokenizer, len(batch), tick)
    ids = [encoded.ids for _, encoded in batch]
    cuts = [encoded.question_at for _, encoded in batch]
    if protocol in ("unseen", "turns"):
        reader.read([row[:at] for row, at in zip(ids, cuts, strict=True)])
        reader.compress()
        last = reader.read([row[at:] for row, at in zip(ids, cuts, strict=True)])
        reader.keep()
    else:
        last = reader.read(ids, chunk if protocol == "chunked" else None)
    limit = max(sample.max_new_tokens for sample, _ in batch)
    texts = [[text] for text in reader.generate(last, limit, [s.answers for s, _ in batch], metric)]
    wanted = [[sample.answers] for sample, _ in batch]
    if protocol == "turns":
        (sample, _), said = batch[0], texts[0]
        history = sample.text, sample.prefix + said[0]
        for turn in sample.turns:
            history, more = _next(tokenizer, history, turn)
            last = reader.read([reader.unread[0] + more])
            reader.keep()
            said.append(reader.generate(last, limit, [turn.answers], metric)[0])
            history = history[0], history[1] + said[-1]
            wanted[0].append(turn.answers)
    score = METRICS[metric]
    return [
        Answer(tuple(said), sum(score(t, a) for t, a in zip(said, answers, strict=True)) / len(said))
        for said, answers in zip(texts, wanted, strict=True)
    ]


def _next(tokenizer: Any, history: tuple[str, str], turn: Turn) -> tuple[tuple[str, str], list[int]]:
    """(what was said so far with this question, the tokens that put the question)."""
    asked, answered = history
    if getattr(tokenizer, "chat_template", None) is None:
        more = f"\n{turn.question}\n{turn.prefix}"
        return (asked, answered + more), list(tokenizer(more, add_special_tokens=False)["input_ids"])
    talk = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
        {"role": "user", "content": turn.question},
    ]
    before = chat(tokenizer, asked) + answered
    whole = str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)) + turn.prefix
    # A template may strip the answer; what follows it is the end of its message and the new question.
    at = len(before) if whole.startswith(before) else whole.rindex(turn.question)
    return (asked, answered + whole[at:]), list(tokenizer(whole[at:], add_special_tokens=False)["input_ids"])


@dataclass
class Reader:
    """A batch of rows being read and continued. Rows of different length are padded on the left of each call."""

    model: Any
    tokenizer: Any
    rows: int
    tick: Callable[[int], None]
    cache: Any = None
    seen: list[int] = field(default_factory=list)
    unread: list[list[int]] = field(default_factory=list)  # the end of each answer, which the model has not read yet
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.seen = [0] * self.rows
        self.ends = end_tokens(self.model, self.tokenizer)

    def read(self, rows: Sequence[Sequence[int]], chunk: int | None = None) -> Tensor:
        """Feed these tokens (in pieces of `chunk`). Returns the logits after each row's last token, `[B, V]`."""
        wide = max(len(row) for row in rows)
        ids = torch.zeros(self.rows, wide, dtype=torch.int64)
        real = torch.zeros(self.rows, wide, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, wide - len(row) :] = torch.tensor(row, dtype=torch.int64)
            real[i, wide - len(row) :] = 1
        out = None
        for first in range(0, wide, chunk or wide):
            piece = slice(first, first + (chunk or wide))
            out = self._forward(ids[:, piece].to(self.device), real[:, piece].to(self.device))
        assert out is not None
        return out

    def compress(self) -> None:
        """Apply the recipe's cache policy to what was read so far."""
        if isinstance(self.cache, ContextCache):
            self.cache.compress()

    def keep(self) -> None:
        """Leave what was read since the last compression as it is."""
        if isinstance(self.cache, ContextCache):
            self.cache.skip_compression()

    def generate(self, logits: Tensor, limit: int, answers: Sequence[Sequence[str]], metric: str) -> list[str]:
        """Greedy continuations of all rows, each cut at its end of text."""
        said: list[list[int]] = [[] for _ in range(self.rows)]
        over = [False] * self.rows
        one = torch.ones(self.rows, 1, dtype=torch.int64, device=self.device)
        for step in range(limit):
            chosen = logits.argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                over[i] = over[i] or token in self.ends
                if not over[i]:
                    said[i].append(token)
            if metric in GROWS and step % LOOK_EVERY == LOOK_EVERY - 1:  # row by row: the batch does not matter
                for i, (tokens, wanted) in enumerate(zip(said, answers, strict=True)):
                    over[i] = over[i] or METRICS[metric](self._text(tokens), wanted) >= 1.0
            if all(over) or step == limit - 1:
                self.unread = [[t] for t in chosen.tolist()]
                break
            logits = self._forward(chosen[:, None], one)
        self.unread = [t if t[0] not in self.ends else [] for t in self.unread]
        return [self._text(tokens) for tokens in said]

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _forward(self, ids: Tensor, real: Tensor) -> Tensor:
        self.mask = real if self.mask is None else torch.cat([self.mask, real], 1)
        start = torch.tensor(self.seen, device=self.device)[:, None]
        at = (start + real.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=at,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        self.seen = [s + n for s, n in zip(self.seen, real.sum(-1).tolist(), strict=True)]
        self.tick(int(ids.shape[1]))
        return out.logits[:, -1].float()
