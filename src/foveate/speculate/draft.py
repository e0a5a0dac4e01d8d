"""What a small draft model says about a prompt: which tokens the target needs (SpecPC), and a guess of the answer (SpecKV).

Galim et al. 2025, "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373). Both models must share a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.context import ContextCache, ContextLayer
from ..adapters.transformers import Handle, handle_of, use
from ..errors import ConfigError, ShapeError
from ..methods import speckv, specpc
from ..methods.specpc import SpecPC
from ..recipe import Recipe


@dataclass(frozen=True)
class Compressed:
    """A shorter prompt.

    Attributes:
        ids: int64 `[1, C]`, in the original order; the target gives them new positions 0..C-1.
        positions: int64 `[C]`, where they stood. guess: int64 `[1, a]`, what the draft would answer (`lookahead` tokens).
        score: fp32 `[N]`, the tokens' importance, or None for a prompt that stayed whole.
    """

    ids: Tensor
    positions: Tensor
    guess: Tensor
    score: Tensor | None = None


def guess(draft: Any, ids: Tensor, tokens: int, eos: int | list[int] | None = None) -> Tensor:
    """The draft model's greedy answer to ids `[1, N]`: int64 `[1, a]`, a <= tokens, its end token included, no padding.

    `eos`: end tokens; those of the draft's generation config by default.
    """
    _one(ids)
    return _continue(draft, None, ids, tokens, eos)


@torch.no_grad()  # type: ignore[untyped-decorator]
def compress_prompt(
    draft: Any,
    ids: Tensor,
    method: SpecPC | None = None,
    *,
    chunk: int | None = None,
    eos: int | list[int] | None = None,
) -> Compressed:
    """SpecPC: run ids `[1, N]` through the draft and keep the tokens it attends to.

    Args:
        draft: a small causal model without a recipe of its own. Its first `first_layer` layers are not asked.
        method: its settings, `SpecPC()` by default; `SpecPC.make("qwen", capacity=1024)` takes a preset.
        chunk: tokens a call, for long prompts.
        eos: end tokens of the guess (see `guess`).

    Raises:
        ConfigError: a window longer than the prompt, or a draft with too few layers. ShapeError: more than one row.
    """
    _one(ids)
    method = SpecPC() if method is None else method
    n = ids.shape[1]
    if method.window > n:
        raise ConfigError(f"specpc: window expected at most the prompt's {n} tokens, got {method.window}")
    if n <= method.capacity:
        answer = _continue(draft, None, ids, method.lookahead, eos)
        return Compressed(ids, torch.arange(n, device=ids.device), answer)
    with use(draft, Recipe(prefill=method, decode=method)) as handle:
        if method.first_layer >= len(handle.layers):
            raise ConfigError(
                f"specpc: first_layer expected below the draft's {len(handle.layers)} layers, got {method.first_layer}"
            )
        cache = _cache(handle, {specpc.PROMPT: n})
        answer = _continue(draft, cache, ids, method.lookahead, eos, chunk)
        score = cache.run[specpc.SCORE]
    kept = method.pick(score).to(ids.device)
    return Compressed(ids[:, kept], kept, answer, score)


@torch.no_grad()  # type: ignore[untyped-decorator]
def look_ahead(model: Any, ids: Tensor, answer: Tensor, *, chunk: int | None = None) -> ContextCache:
    """SpecKV: the cache of ids `[1, N]` but the last token, compressed by what `answer` `[1, a]` looks at.

    The model must run under a recipe with `speckv`. Continue with `model.generate(ids, past_key_values=cache)`, which
    feeds the last prompt token at its true position N - 1. A prompt that fits in the capacity stays whole, and no guess
    is run. `answer` may come from `guess(draft, ids, tokens)` or from `compress_prompt(...).guess` (SpecKV-PC: the
    compressed ids and that guess, one draft run for both). `chunk`: tokens a call.
    """
    _one(ids)
    handle = handle_of(model)
    method = next((m for m in handle.recipe.methods if isinstance(m, speckv.SpecKV)), None)
    if method is None:
        raise ConfigError(f"recipe: expected one with speckv, got {handle.recipe}")
    if handle.recipe.compress_at != "end":
        raise ConfigError("recipe: expected compress_at='end', since the guess is rolled back before the cache shrinks")
    n = ids.shape[1]
    if n < 2:
        raise ShapeError(f"ids: expected at least two tokens, got {n}")
    cache = _cache(handle, {})
    if method.capacity is not None and n - 1 <= method.capacity:
        answer = answer[:, :0]
    else:
        cache.run[speckv.PROMPT] = n
    _read(model, cache, torch.cat([ids, answer.to(ids)], 1), chunk)
    cache.run.pop(speckv.PROMPT, None)
    cache.crop(-(answer.shape[1] + 1))
    return cache.compress()


def _one(ids: Tensor) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ShapeError(f"ids: expected one row [1, N], got {list(ids.shape)}")


def _cache(handle: Handle, run: dict[str, Any]) -> ContextCache:
    cache = ContextCache([ContextLayer() for _ in handle.layers], handle)
    cache.run = run
    return cache


def _read(model: Any, cache: ContextCache | None, ids: Tensor, chunk: int | None) -> Any:
    """Run ids through the model in calls of at most `chunk` tokens (at least 2: one alone would be a decode step)."""
    n, lo, out = ids.shape[1], 0, None
    while lo < n:
        size = n - lo if chunk is None else min(n - lo, max(2, chunk))
        size += int(n - lo - size == 1)
        options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        out = model(input_ids=ids[:, lo : lo + size], past_key_values=cache, use_cache=True, **options)
        cache, lo = out.past_key_values, lo + size
    return out


@torch.no_grad()  # type: ignore[untyped-decorator]
def _continue(
    model: Any, cache: Any, ids: Tensor, tokens: int, eos: int | list[int] | None, chunk: int | None = None
) -> Tensor:
    """Greedy tokens after ids, int64 `[1, a]`: the first of `tokens` steps is the prompt itself."""
    if tokens < 1:
        raise ConfigError(f"tokens: expected at least 1, got {tokens}")
    ends = model.generation_config.eos_token_id if eos is None else eos
    stop = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    out = _read(model, cache, ids, chunk)
    found: list[Tensor] = []
    while True:
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        found.append(token)
        if len(found) == tokens or (stop and int(token) in stop):
            return torch.cat(found, 1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
