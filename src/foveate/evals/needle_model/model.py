"""The needle model's shape, its forward pass in training, and the loss over the tokens worth predicting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from .stream import POSITIONS, Batch
from .texts import KINDS
from .weights import begin

NUMBERS = 128  # more than a text has answers


@dataclass(frozen=True)
class Shape:
    """Sizes of the Llama. `theta`: base of the rotary angles; so large that most of a head's dimensions hardly turn over
    64K tokens and are free to hold content. `begun`: starting weights of `weights.begin` instead of small random ones."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    inner: int = 768
    theta: float = 1e8
    begun: bool = True

    def model(self, tokenizer: Any) -> LlamaForCausalLM:
        """A model of this shape with random weights (torch's global generator), float32."""
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        if self.begun:
            begin(model)
        return model

    def told(self) -> dict[str, Any]:
        return asdict(self)


def hidden(model: LlamaForCausalLM, ids: Tensor, pos: Tensor) -> Tensor:
    """Last hidden states `[R, N, D]`, plain causal attention over whole rows.

    The layers are called one by one because the model's own forward takes jumps in `pos` for borders between packed
    sequences and masks across them.
    """
    core = model.model
    h = core.embed_tokens(ids)
    angles = core.rotary_emb(h, position_ids=pos)
    for layer in core.layers:
        out = layer(h, attention_mask=None, position_ids=pos, position_embeddings=angles)
        h = out[0] if isinstance(out, tuple) else out
    return core.norm(h)


def loss_and_hits(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, answers, hits): the weighted mean cross-entropy, and per kind of `texts.KINDS`, float `[kinds]`, how many
    answers the batch asked for and how many would be right in every token. `batch` as `stream.Stream` makes it, int64."""
    h = hidden(model, batch["ids"], batch["pos"])[:, :-1]
    weight, target, number = batch["weight"][:, 1:], batch["ids"][:, 1:], batch["answer"][:, 1:]
    chosen = weight > 0
    logits = model.lm_head(h[chosen]).float()
    weight, target, number = weight[chosen], target[chosen], number[chosen]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    with torch.no_grad():
        rows = torch.arange(chosen.shape[0], device=chosen.device)[:, None].expand_as(chosen)[chosen]
        asked = number > 0
        group = (rows * NUMBERS + number // 16)[asked]
        size = chosen.shape[0] * NUMBERS
        right = (logits.argmax(-1) == target)[asked].float()
        whole = torch.ones(size, device=h.device).scatter_reduce(0, group, right, "amin")
        kind = torch.zeros(size, dtype=torch.long, device=h.device).scatter_reduce(0, group, number[asked] % 16, "amax")
        answers = torch.zeros(len(KINDS) + 1, device=h.device).index_add_(0, kind, torch.ones_like(whole))
        hits = torch.zeros(len(KINDS) + 1, device=h.device).index_add_(0, kind, whole)
    return loss, answers[1:], hits[1:]
