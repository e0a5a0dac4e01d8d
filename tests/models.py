"""Tiny random models of the families the transformers adapter is tested on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, max_position_embeddings=512,
)  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "mistral": dict(sliding_window=None),
    "mistral_window": dict(sliding_window=24),
    "gemma3_text": dict(
        head_dim=16, sliding_window=24, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "gemma2": dict(head_dim=16, sliding_window=24, num_hidden_layers=2),
    "phi3": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
    "olmo2": {},
    "granite": {},
    "glm4": dict(head_dim=16),
    "cohere2": dict(sliding_window=24, num_hidden_layers=4, head_dim=16),
    "smollm3": dict(num_hidden_layers=4),
    "gpt_oss": dict(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=24, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def tiny(family: str = "llama", seed: int = 0, **options):
    kind = family.removesuffix("_window")
    config = AutoConfig.for_model(kind, **{**BASE, **FAMILIES[family], **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, p in model.named_parameters():  # attention that is not uniform, sinks that are not zero
        if p.dim() == 1 and name.endswith("sinks"):
            torch.nn.init.normal_(p)
    return model


def tokens(b: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 101, (b, n), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, mask=None, **options):
    defaults = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, output_logits=True)
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **(defaults | options))
