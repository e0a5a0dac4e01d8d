"""Prompts to calibrate on, and queries, keys and values of one layer at a time while the model reads them densely."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..adapters.transformers import use
from ..errors import ConfigError
from ..evals.needle import Needle
from ..evals.stream import Head
from ..evals.task import Task, make
from ..evals.text import Source
from ..evals.threads import Single
from ..kernels.dispatch import attend
from ..methods.base import AttnInput, Method, State
from ..prompts import read_text
from ..recipe import Recipe

TASKS: tuple[Task, ...] = (Single("single"), Needle("needle"))  # key-value pairs, as published; a fact in essays
LEAST = 512  # tokens below which the built-in tasks have no room; prose alone then

Take = Callable[[AttnInput, Tensor], None]  # (one layer's call, its dense output [1, H, N, Dv])
TakeGrad = Callable[[AttnInput, Tensor, Tensor], None]  # the same and the loss's gradient by the output


# ---------------------------------------------------------------------- prompts
def prompts(tokenizer: Any, files: Sequence[str | Path], length: int, count: int, seed: int) -> list[Tensor]:
    """`count` prompts int64 `[1, <= length]`: disjoint stretches of the files' text, or the built-in mix.

    The mix is prose and retrieval in turn: essays, JSON pairs with one key asked for, a number planted in essays. A
    task's prompt is up to 1 % shorter, and leaves room for its answer.

    Raises:
        ConfigError: a file that is no UTF-8 text, or too little text for so many prompts of this length.
    """
    if length < 2 or count < 1:
        raise ConfigError(f"length and samples: expected at least 2 tokens and 1 prompt, got {length} and {count}")
    if files:
        return _windows(tokenizer, "\n\n".join(read_text("data", f) for f in files), length, count, seed)
    source = Source.of()
    fits = length >= LEAST and getattr(tokenizer, "is_fast", False)
    kinds = [None, *TASKS] if fits else [None]
    order = [kinds[i % len(kinds)] for i in range(count)]
    prose = iter(_windows(tokenizer, " ".join(source.prose), length, order.count(None), seed))
    out = []
    for i, task in enumerate(order):
        if task is None:
            out.append(next(prose))
        else:
            out.append(torch.tensor([make(task, tokenizer, length, i, seed, source)[1].ids]))
    return out


def _windows(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Tensor]:
    """`count` disjoint stretches of the text's tokens, each behind the model's first token if it has one."""
    lead = list(tokenizer("", verbose=False)["input_ids"])[:1]
    ids = list(tokenizer(text, verbose=False)["input_ids"])[len(lead) :]
    each = length - len(lead)
    slots = len(ids) // each
    if slots < count:
        raise ConfigError(
            f"data: {count} prompts of {length} tokens need {count * each:,} tokens of text, got {len(ids):,}; "
            "give more text, fewer samples or a shorter length"
        )
    picked = random.Random(seed).sample(range(slots), count)
    return [torch.tensor([lead + ids[i * each : (i + 1) * each]]) for i in picked]


def digest(texts: Sequence[Tensor]) -> str:
    """A hash of what was read: all tokens of all prompts, in order."""
    seen = hashlib.sha256()
    for ids in texts:
        seen.update(f"{ids.shape[1]};".encode() + ids.cpu().numpy().tobytes())
    return seen.hexdigest()[:16]


# ---------------------------------------------------------------------- capture
@dataclass(frozen=True)
class Capture(Method):
    """Dense attention that shows each layer's call to `take(x, out, lse)` and forgets it."""

    take: Any = None
    backend: str | None = None

    id: ClassVar[str] = "capture"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)

    def attend(self, x: AttnInput, plan: Any, state: State) -> tuple[Tensor, Tensor, None]:
        cap, back = x.softcap, self.backend
        out, lse = attend(x.q, x.kv, plan, scale=x.scale, softcap=cap, return_lse=True, backend=back)
        self.take(x, out)
        return out, lse, None


class _EnoughError(Exception):
    """Leaves a forward behind the last layer that is wanted."""


def each_layer(model: Any, ids: Tensor, take: Take, layers: Sequence[int] | None = None, backend: str | None = None) -> None:
    """Call `take(x, out)` for the chosen layers (None: all) of one dense forward over ids `[1, N]`, in order.

    Only one layer's queries, keys and values exist at a time. Layers with the model's own sliding window are left out:
    no method serves them.
    """
    last = None if layers is None else max(layers)

    def see(x: AttnInput, out: Tensor) -> None:
        if layers is None or x.layer in layers:
            take(x, out)
        if x.layer == last:
            raise _EnoughError

    recipe = Recipe(prefill=Capture(take=see, backend=backend))
    with use(model, recipe, backend=backend), torch.no_grad(), contextlib.suppress(_EnoughError):
        model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)


def each_gradient(
    model: Any, ids: Tensor, take: TakeGrad, layers: Sequence[int] | None = None, backend: str | None = None
) -> None:
    """`each_layer` with the gradient of the mean next-token loss by each layer's attention output, in fp32.

    The activations of one prompt are in memory at once.
    """
    held: list[tuple[AttnInput, Tensor]] = []

    def see(x: AttnInput, out: Tensor) -> None:
        if layers is None or x.layer in layers:
            out.retain_grad()
            held.append((x, out))

    ids = ids.to(model.device)
    with in_fp32(model), use(model, Recipe(prefill=Capture(take=see, backend=backend)), backend=backend):
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
        hidden.backward(_hidden_gradient(Head(model), hidden.detach()[0, :-1], ids[0, 1:]))
    with torch.no_grad():
        for i, (x, out) in enumerate(held):
            held[i] = None  # type: ignore[call-overload]
            if out.grad is not None:
                take(_detached(x), out.detach(), out.grad)


def _hidden_gradient(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the mean loss by hidden states `[1, n + 1, C]`, a few rows of logits at a time."""
    parts = []
    for first in range(0, hidden.shape[0], 256):
        rows = hidden[first : first + 256].detach().requires_grad_()
        loss = cross_entropy(head(rows), targets[first : first + 256], reduction="sum") / len(targets)
        parts.append(torch.autograd.grad(loss, rows)[0])
    return torch.cat([*parts, torch.zeros_like(parts[0][:1])])[None]  # the last token predicts nothing we know


def _detached(x: AttnInput) -> AttnInput:
    from dataclasses import replace

    return replace(x, q=x.q.detach(), kv=replace(x.kv, k=x.kv.k.detach(), v=x.kv.v.detach()))


@contextlib.contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """The model in fp32 and with parameters that want no gradient, and as it was afterwards (bf16 and fp16 come back
    bit for bit)."""
    was = [(p, p.dtype, p.requires_grad) for p in (*model.parameters(), *model.buffers())]
    try:
        for p, dtype, _ in was:
            if dtype.is_floating_point:
                p.requires_grad_(False)
                p.data = p.data.float()
        yield
    finally:
        for p, dtype, wanted in was:
            if dtype.is_floating_point:
                p.data = p.data.to(dtype)
                p.requires_grad_(wanted)
