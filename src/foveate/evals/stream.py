"""Running text: documents of prose, what dense attention predicts on them, and which tokens need the long context.

No table of logits for a whole document is ever held: the model's head is applied to final hidden states, `ROWS` at a
time. Loss `i` is that of token i + 1, given the tokens up to i.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapters.context import ContextCache
from ..adapters.transformers import use
from ..errors import ConfigError, ShapeError, UnsupportedError
from .task import rng_of
from .text import Source

ROWS = 512  # rows of logits at once
SHORT = 4096  # tokens of the short context of LongPPL
GAIN = 2.0  # nats a key token gains from the long context, at least
KNOWN = 2.0  # nats of a key token's loss in the long context, at most
FEWEST = 50  # key tokens that make a figure
Tick = Callable[[int], None]  # tokens read


# ---------------------------------------------------------------------- documents
class Documents(list[Tensor]):
    """Token ids int64 `[1, length]`, one tensor a document. `notes`: sentences for the reader."""

    notes: list[str]


def documents(tokenizer: Any, source: Source, length: int, samples: int, seed: int) -> Documents:
    """`samples` stretches of the source's prose of exactly `length` tokens, special tokens in front as the tokenizer wants.

    Document i depends on (seed, length, i) and not on how many there are. Starts are spread evenly over the prose (by the
    golden ratio) and lie at beginnings of sentences where there are some. Text that is too short is repeated, which a
    note says.

    Raises:
        ConfigError: a length below 2, fewer than one sample, or a source without prose.
    """
    for name, value, least in (("length", length, 2), ("samples", samples, 1)):
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
    total = len(source.prose)
    if total == 0:
        raise ConfigError("source: expected some prose, got none")
    first = rng_of(seed, "stream", length, 0).random()
    made, used = Documents(), 0
    for i in range(samples):
        start = _sentence(source.prose, int((first + i * 0.6180339887498949) % 1.0 * total))
        ids, words = _tokens(tokenizer, source.prose, start, length)
        made.append(torch.tensor([ids], dtype=torch.int64))
        used = max(used, words)
    made.notes = []
    if used > total:
        made.notes.append(f"the text has {total} words, about {used} were needed: it is repeated within a document")
    elif used * samples > total:
        made.notes.append(f"the text has {total} words, {samples} documents of about {used} overlap")
    return made


def _sentence(prose: tuple[str, ...], at: int) -> int:
    """The first word at or after `at` (around the end) that begins a sentence; `at` where none does."""
    n = len(prose)
    ends = (i % n for i in range(at, at + n) if re.search(r"[.!?][\"')\]]*$", prose[(i - 1) % n]))
    return next(ends, at)


def _tokens(tokenizer: Any, prose: tuple[str, ...], start: int, length: int) -> tuple[list[int], int]:
    """(the first `length` token ids of the prose from word `start`, about how many words they are)."""
    words, before = length, -1
    while True:
        text = " ".join(prose[(start + i) % len(prose)] for i in range(words))
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > length:  # more than asked: a token that the tokenizer puts at the end is cut off
            return list(ids[:length]), -(-words * length // len(ids))
        if len(ids) <= before:
            raise ConfigError(f"tokenizer: {words} words give {len(ids)} tokens; it seems to cut long texts")
        words, before = 2 * words, len(ids)


# ---------------------------------------------------------------------- from hidden states to logits
class Head:
    """The map from final hidden states `[n, C]` to logits fp32 `[n, vocabulary]`, computed in the model's own dtype."""

    def __init__(self, model: Any):
        self.module = model.get_output_embeddings()
        if self.module is None:
            raise UnsupportedError(f"model: {type(model).__name__} has no output embeddings to make logits with")
        config = model.get_decoder().config
        self.scale = 1.0
        for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
            if (value := getattr(config, name, None)) is not None:
                self.scale *= float(value) ** power
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.module(hidden)
        logits = logits * self.scale if self.scale != 1.0 else logits
        logits = self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        return logits.float()  # type: ignore[no-any-return]

    def tables(self, hidden: Tensor, rows: int = ROWS) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits fp32 `[<= rows, vocabulary]`) over all rows of hidden `[N, C]`."""
        for first in range(0, hidden.shape[0], rows):
            yield first, self(hidden[first : first + rows])

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy fp32 `[n]` on the CPU of targets int64 `[n]` under the rows of hidden `[n, C]`, nats."""
        parts = [cross_entropy(t, targets[i : i + len(t)], reduction="none").cpu() for i, t in self.tables(hidden)]
        return torch.cat(parts) if parts else torch.zeros(0)


# ---------------------------------------------------------------------- what dense attention gives
@dataclass
class Reference:
    """What dense attention gives on one document, through the same adapter as every recipe.

    Attributes:
        ids: int64 `[1, N]`. steps: the last tokens, which are decoded one by one. backend: kernels asked for, or None.
        head: logits of this model. hidden: `[N, C]` final hidden states, on the model's device, in its dtype.
        nll: fp32 `[N - 1]` on the CPU, nats. keys: bool `[N - 1]`, losses of LongPPL's key tokens; None if they were
            not asked for or are fewer than `FEWEST`. cache: of the first N - steps tokens; fork before use.
        notes: sentences for the reader. measured: what other modules found out about dense on this document.
    """

    ids: Tensor
    steps: int
    backend: str | None
    head: Head
    hidden: Tensor
    nll: Tensor
    keys: Tensor | None
    cache: ContextCache
    notes: list[str] = field(default_factory=list)
    measured: dict[Any, Any] = field(default_factory=dict)


def reference(
    model: Any,
    ids: Tensor,
    *,
    steps: int = 64,
    longppl: bool = False,
    backend: str | None = None,
    tick: Tick = lambda tokens: None,
) -> Reference:
    """Run dense attention over a document.

    Args:
        ids: int64 `[1, N]`. steps: tokens at the end that `agreement.measure` decodes, 2 to N - 2.
        longppl: find LongPPL's key tokens as well, which reads about five times as many tokens.

    Raises:
        ShapeError, ConfigError: ids or steps that do not fit. UnsupportedError: a model that cannot be served, or one
        that treats its logits in a way this module does not know.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.dtype != torch.int64:
        raise ShapeError(f"ids: expected int64 [1, tokens], got {ids.dtype} {list(ids.shape)}")
    n = ids.shape[1]
    if not 2 <= steps <= n - 2:  # a prompt of one token would be a decode step, and the last step predicts nothing
        raise ConfigError(f"steps: expected 2 to {n - 2} for a document of {n} tokens, got {steps}")
    head = Head(model)
    ids = ids.to(next(model.parameters()).device)
    with use(model, "dense", backend=backend), torch.no_grad():
        out = model.get_decoder()(input_ids=ids, use_cache=True)
        tick(n)
        hidden, cache = out.last_hidden_state[0], out.past_key_values
        for layer in cache.layers:
            layer.crop(-steps)
        _check_head(model, head, ids)
        nll = head.losses(hidden[:-1], ids[0, 1:])
        found = Reference(ids, steps, backend, head, hidden, nll, None, cache)
        if longppl:
            short, stride = short_context(n)
            keys = key_tokens(nll, short_losses(model, head, ids, short, stride, tick))
            count = int(keys.sum())
            found.notes.append(f"LongPPL: {count} key tokens, short context {short}, stride {stride}")
            if count < FEWEST:
                found.notes.append(f"LongPPL: {count} key tokens are fewer than {FEWEST}; not reported")
            found.keys = keys if count >= FEWEST else None
    return found


def _check_head(model: Any, head: Head, ids: Tensor) -> None:
    """UnsupportedError if the model does more to its logits than `Head` does."""
    few = ids[:, :8]
    want = model(input_ids=few, use_cache=False).logits[0].float()
    got = head(model.get_decoder()(input_ids=few, use_cache=False).last_hidden_state[0])
    far = float((want - got).abs().max()) if want.shape == got.shape else float("inf")
    if not far <= 4 * torch.finfo(next(model.parameters()).dtype).eps * float(want.abs().max()):
        raise UnsupportedError(f"model: {type(model).__name__} changes its logits in an unknown way (by up to {far:.3g})")


# ---------------------------------------------------------------------- LongPPL
def short_context(length: int) -> tuple[int, int]:
    """(tokens of the short context, stride of its windows) for documents of `length` tokens: 4096 and 1024, scaled down
    where the document has less than two short contexts. ConfigError below 16 tokens."""
    if length < 16:
        raise ConfigError(f"length: LongPPL expects at least 16 tokens, got {length}")
    short = min(SHORT, length // 2)
    return short, max(1, short // 4)


def short_losses(model: Any, head: Head, ids: Tensor, short: int, stride: int, tick: Tick = lambda tokens: None) -> Tensor:
    """Loss fp32 `[N - 1]` of each token of ids `[1, N]` given a short context; NaN where the short one is the whole one.

    Token t is predicted in a window that starts at a multiple of `stride` and holds `short` to `short + stride - 1`
    tokens before t. The model must run dense. Fang et al. 2024, "What is Wrong with Perplexity for Long-context Language
    Modeling?" (arXiv 2410.23771).
    """
    n = ids.shape[1]
    out = torch.full((n - 1,), float("nan"))
    for start in range(stride, n - short, stride):  # the window at 0 is the whole context of its tokens
        window = ids[:, start : start + short + stride]
        hidden = model.get_decoder()(input_ids=window, use_cache=False).last_hidden_state[0]
        tick(window.shape[1])
        losses = head.losses(hidden[short - 1 : -1], window[0, short:])
        out[start + short - 1 : start + short - 1 + len(losses)] = losses
    return out


def key_tokens(full: Tensor, short: Tensor) -> Tensor:
    """bool `[N - 1]`: tokens that the model predicts well, and only, with the long context. False where short is NaN."""
    return (short - full > GAIN) & (full < KNOWN)
