"""Self-speculative decoding: the recipe's decode method drafts, dense attention on the same cache verifies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..adapters.transformers import handle_of
from ..errors import ConfigError, UnsupportedError
from ..methods.base import Method
from ..recipe import Recipe
from .accept import match, reject

DRAFT = 8  # tokens drafted a cycle where the method says nothing
KNOWN = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position")


@dataclass
class Stats:
    """What a generation did. `accepted` counts drafted tokens that stood, of `drafted`; `emitted` tokens came of
    `cycles` verifications, over all rows of a batch. `stood` lists the cycles: (tokens drafted a row, how many of them
    stood in every row). Also what stands behind an end token counts, but is not emitted."""

    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    stood: list[tuple[int, int]] = field(default_factory=list)

    def cycle(self, drafted: int, stood: int, rows: int) -> None:
        """Count a cycle of `rows` rows. Called once the host knows what stands, so a subclass may take the time here."""
        self.cycles += 1
        self.drafted += drafted * rows
        self.accepted += stood * rows
        self.stood.append((drafted, stood))

    @property
    def rate(self) -> float:
        """Accepted part of the drafted tokens."""
        return self.accepted / max(1, self.drafted)


@torch.no_grad()  # type: ignore[untyped-decorator]
def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    draft: int | None = None,
    stats: Stats | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate with sparse drafts and dense verification (Zhao et al. 2025, arXiv 2512.01278), losing nothing.

    The model needs a recipe, applied before, whose decode method drafts: `foveate.apply(model, "pillar_attn")`. A cycle
    drafts `draft` tokens one by one, forgets their keys and values, runs them again in one dense call, and keeps those
    that stand. Under a recipe applied with `graphs=True` drafted steps are replayed as CUDA graphs from one cycle to the
    next, and so is the verification from the third cycle on (with drafts of one token nothing is). Greedy tokens are those
    of dense attention (up to ties in floating point); sampled ones have its distribution. Rows of a batch advance together,
    by what the worst of them accepted.

    Works as `model.generate(ids, custom_generate=foveate.speculate.generate, ...)` and, with the same options, as
    `foveate.speculate.generate(model, ids, ...)`.

    Args:
        draft: tokens a cycle; the method's own number, or 8.
        stats: counts are added to it.

    Raises:
        ConfigError: no recipe, one that is not dense in prefill, or that evicts. UnsupportedError: beams, or outputs
        other than tokens and the cache.
    """
    if generation_config is None or logits_processor is None or stopping_criteria is None:
        given: dict[str, Any] = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
        given |= {"generation_config": generation_config, "draft": draft, "stats": stats}
        kwargs |= {k: v for k, v in given.items() if v is not None}
        return model.generate(input_ids, custom_generate=generate, **kwargs)  # type: ignore[no-any-return]
    recipe = handle_of(model).recipe
    loop = Loop(model, logits_processor, generation_config, _length(recipe, draft), Stats() if stats is None else stats)
    _check(recipe, generation_config, kwargs)
    ids, cache = loop.run(input_ids, stopping_criteria, kwargs.get("past_key_values"), kwargs.get("attention_mask"))
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)
    return ids


def _length(recipe: Recipe, draft: int | None) -> int:
    length = getattr(recipe.decode, "draft", DRAFT) if draft is None else draft
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"draft: expected at least 1 token, got {length!r}")
    return length


def _check(recipe: Recipe, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    for role in ("prefill", "heads"):
        method = getattr(recipe, role)
        if isinstance(method, Method) and method.id != "dense":
            raise ConfigError(
                f"recipe: expected dense attention in prefill, which verifies the drafts, got {role}={method.id}"
            )
    if recipe.evicts:
        raise ConfigError(f"recipe: expected no cache policy, since drafts are rolled back, got cache={recipe.cache.id}")  # type: ignore[union-attr]
    if (config.num_beams or 1) != 1:
        raise UnsupportedError(f"num_beams: expected 1 with sparse drafts, got {config.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise UnsupportedError(f"{name}: sparse drafts give tokens and the cache only")
    if more := sorted(k for k, v in kwargs.items() if k not in KNOWN and v is not None and v is not False):
        raise UnsupportedError(f"{', '.join(more)}: not supported with sparse drafts")


class Loop:
    """One generation. The cache holds all tokens but the last ones, `ids[:, cached:]`, which every cycle runs first.

    A cycle looks at the device twice: at what stands, and at what ended. (Where rows are padded, the rollbacks of a cache
    look at its padding as well.)
    """

    def __init__(self, model: Any, processor: LogitsProcessorList, config: GenerationConfig, draft: int, stats: Stats):
        self.model, self.processor, self.draft, self.stats = model, processor, draft, stats
        self.sample, self.chunk = bool(config.do_sample), getattr(config, "prefill_chunk_size", None)
        self.end = config.max_length
        pad = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
        self.pad = pad[0] if isinstance(pad, (list, tuple)) else pad
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.pads: Tensor | None = None  # int64 [B, 1], padding of each row, once the mask is behind

    def run(self, ids: Tensor, stop: StoppingCriteriaList, cache: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        """(`[B, n]` all tokens, the cache of all but the last)."""
        self.cache, self.mask = cache, mask
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self._prefill(ids)
        going = ids.shape[1] < self.end
        while going:
            tokens = self._cycle(ids, min(self.draft, max(1, self.end - ids.shape[1] - 1)), alive)
            ids, alive, going = self._append(ids, tokens[:, : self.end - ids.shape[1]], alive, stop)
            self._crop(ids.shape[1] - 1)
            going = going and ids.shape[1] < self.end
        return ids, self.cache

    # ------------------------------------------------------------------ a cycle
    def _prefill(self, ids: Tensor) -> None:
        """Run the prompt but its last token. One token alone would be a decode step, which is not dense: the first cycle
        takes it along."""
        last = ids.shape[1] - 1
        while last - self.cached > 1:
            size = last - self.cached if not self.chunk else min(last - self.cached, max(2, self.chunk))
            if last - self.cached - size == 1:
                size += 1
            self._forward(ids[:, : self.cached + size], 1)

    def _cycle(self, ids: Tensor, k: int, alive: Tensor) -> Tensor:
        """int64 `[B, n]`, n >= 1: the tokens that follow `ids`; `alive` bool `[B]`, rows that have not ended."""
        kept, n = self.cached, ids.shape[1]
        known, probs = torch.cat([ids, ids.new_zeros(len(ids), k)], 1), []
        for i in range(n, n + k):
            scores = self._scores(known[:, :i], self._forward(known[:, :i], 1)[:, -1])
            known[:, i], p = self._draw(scores)
            probs.append(p)
        self._crop(kept)  # keys and values of a draft were computed from sparse attention
        logits, guess = self._forward(known, k + 1), known[:, n:]
        if self.processor:
            target = torch.stack([self._scores(known[:, : n + i], logits[:, i]) for i in range(k + 1)], 1)
        else:
            target = logits.to(dtype=torch.float32, device=ids.device)
        if self.sample:
            accepted, tokens = reject(guess, torch.stack(probs, 1), target.softmax(-1))
        else:
            accepted, tokens = match(guess, target.argmax(-1))
        least, rows = torch.stack([torch.where(alive, accepted, k).min(), alive.sum()]).tolist()  # one look at the device
        self.stats.cycle(k, least, rows)
        return tokens[:, : least + 1]

    def _append(self, ids: Tensor, tokens: Tensor, alive: Tensor, stop: StoppingCriteriaList) -> tuple[Tensor, Tensor, bool]:
        """Add tokens one by one until every row has ended: (ids, rows still alive, whether there is one)."""
        start, left = ids.shape[1], [alive]
        ids = torch.cat([ids, tokens], 1)
        for i in range(start, ids.shape[1]):
            if self.pad is not None:
                ids[:, i] = torch.where(left[-1], ids[:, i], self.pad)
            left.append(left[-1] & ~stop(ids[:, : i + 1], None))  # type: ignore[arg-type]
        counts = torch.stack([row.sum() for row in left]).tolist()  # the one look at what ended
        n = next((i for i, c in enumerate(counts) if c == 0), len(left) - 1)
        self.stats.emitted += sum(counts[:n])
        return ids[:, : start + n], left[n], counts[n] > 0

    def _scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits `[B, V]` after everything the caller asked for: temperature, top-k, penalties."""
        logits = logits.to(dtype=torch.float32, device=ids.device)
        return self.processor(ids, logits) if self.processor else logits  # type: ignore[arg-type,return-value]

    def _draw(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.sample:
            return scores.argmax(-1), None
        p = scores.softmax(-1)
        return torch.multinomial(p, 1)[:, 0], p

    # ------------------------------------------------------------------ the model
    @property
    def cached(self) -> int:
        """Tokens in the cache, padding included."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def _crop(self, n: int) -> None:
        if self.cached > n:
            self.cache.crop(n - self.cached)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        """Logits `[B, keep, V]` of the last tokens of ids, after running those that are not cached yet."""
        old, (b, n) = self.cached, ids.shape
        mask = self.mask
        if mask is None or old >= mask.shape[1]:  # what is new is real, which the mask would say by a look at the device
            if mask is not None:
                self.pads = (mask == 0).sum(-1, keepdim=True) if self.pads is None else self.pads
                mask = None
            at = torch.arange(old, n, device=ids.device).expand(b, -1)
            at = at if self.pads is None else (at - self.pads).clamp(min=0)
        else:
            mask = torch.cat([mask, mask.new_ones(b, n - mask.shape[1])], 1) if n > mask.shape[1] else mask[:, :n]
            at = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, old:]
        options = {"logits_to_keep": keep} if self.model._supports_logits_to_keep() else {}
        out = self.model(
            input_ids=ids[:, old:],
            attention_mask=mask,
            position_ids=at,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
        self.cache = out.past_key_values
        return out.logits[:, -keep:]  # type: ignore[no-any-return]
