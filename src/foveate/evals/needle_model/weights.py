"""Starting weights that know how to look: heads of the first layer gather the words a few tokens back, heads of the later
ones attend to tokens that have gathered what the query holds, and pass on what they find.

From ordinary random weights a small Llama takes very long to bind a value to its key: a head that gathers the key and a
head that looks for it are of no use without each other, so neither is learned. The pieces given here are those that
trained attention is known to hold (Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", arXiv
2305.09828; Olsson et al. 2022, "In-context learning and induction heads", arXiv 2209.11895). All of it is trained
afterwards like any other weight, and a model that begins so has still everything to learn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

COMMON = 0.7  # size of the part all embeddings share, beside a random part of size 1: what positional heads look at
# of the first layer's heads: tokens back, and the fastest rotation taken into account (radians a token), so the width
GATHER = ((1, 9.0), (2, 9.0), (3, 9.0), (4, 9.0), (5, 0.4), (9, 0.2), (13, 0.2), (28, 0.1))
AWAY = (0.1, 9.0)  # rotations by which a head keeps off the query's own neighbourhood
FAST, SLOW = 0.02, 2.4e-5  # radians a token: good for positions; a quarter turn or less over 64K tokens, good for content
POSITIONAL, CONTENT = 0.6, 2.0  # sizes of the rows of q and k
GATHERED, FOUND = 0.6, 0.5  # sizes of what the heads of the first layer and of the others add to the stream
# of a kv head in a later layer: does the query hold its own word or a gathered one, and is it kept off itself
LOOKS = (("own", False), ("gathered", True), ("own", False), ("gathered", True))


@torch.no_grad()
def begin(model: LlamaForCausalLM) -> None:
    """Overwrite the random weights of `model` (torch's global generator decides)."""
    config: Any = model.config
    size, dim, half = config.hidden_size, config.head_dim, config.head_dim // 2
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group = heads // kv_heads
    speed = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    fast, slow = speed > FAST, torch.cat([speed < SLOW] * 2)
    unit = torch.nn.functional.normalize(torch.randn(size), dim=0)
    table = model.model.embed_tokens.weight
    words = torch.randn_like(table)
    words -= (words @ unit)[:, None] * unit  # so that all tokens look alike to a positional head
    table.copy_(words + COMMON * math.sqrt(size) * unit)
    model.model.norm.weight.fill_(1 / math.sqrt(size))  # the same table makes the logits
    turn = _orthogonal(size, size)  # what is gathered must not be taken for a token's own word
    code = _orthogonal(min(dim, size), size)  # the part of a word that is gathered
    code -= (code @ unit)[:, None] * unit
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        key, query = torch.randn(kv_heads, dim, size) * 0.01, torch.randn(heads, dim, size) * 0.01
        value = torch.stack([code] * kv_heads) if number == 0 else _orthogonal(kv_heads * dim, size).view(kv_heads, -1, size)
        out = value.repeat_interleave(group, dim=0)  # [heads, dim, size]
        out = GATHERED * out @ turn.T if number == 0 else FOUND * out
        first = torch.arange(half)
        for h in range(heads):
            k = h // group
            look, away = LOOKS[k % len(LOOKS)]
            if number == 0:
                offset, widest = GATHER[h % len(GATHER)]
                used, angle, scale = fast & (speed <= widest), speed * offset, POSITIONAL
            else:
                used, angle = fast & (speed >= AWAY[0]), torch.full_like(speed, math.pi)
                scale = POSITIONAL / 2 if away else 0.0
            # logit: the sum of cos((distance - offset) * speed) over the pairs used, or its opposite
            at = first[used]
            if h % group == 0:
                key[k, first[fast]] += POSITIONAL * unit
            query[h, at] += scale * torch.cos(angle[used])[:, None] * unit
            query[h, at + half] += scale * -torch.sin(angle[used])[:, None] * unit
            if number > 0:
                if h % group == 0:
                    content = CONTENT * _orthogonal(int(slow.sum()), len(code)) @ code
                    key[k, slow] += content @ turn.T
                query[h, slow] += content if look == "own" else content @ turn.T
        attention.q_proj.weight.copy_(query.reshape(-1, size))
        attention.k_proj.weight.copy_(key.reshape(-1, size))
        attention.v_proj.weight.copy_(value.reshape(-1, size))
        attention.o_proj.weight.copy_(out.reshape(-1, size).T)
        torch.nn.init.normal_(mlp.gate_proj.weight, std=1 / math.sqrt(size))
        torch.nn.init.normal_(mlp.up_proj.weight, std=1 / math.sqrt(size))
        torch.nn.init.normal_(mlp.down_proj.weight, std=0.3 / math.sqrt(config.intermediate_size))


def _orthogonal(rows: int, columns: int) -> Tensor:
    """`[rows, columns]` with orthonormal rows, or columns where there are more rows."""
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))
