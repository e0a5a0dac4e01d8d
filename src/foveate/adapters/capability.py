"""What the transformers adapter can serve, found out from what a model is, not from a list of names."""

from __future__ import annotations

from typing import Any

LAYER_TYPES = ("full_attention", "sliding_attention")


def why_not(model: Any) -> str | None:
    """The reason this model cannot run under a recipe, or None."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        return f"expected a transformers model, got {type(model).__name__}"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models attend across two sequences (cross-attention), which recipes do not describe"
    decoder = model.get_decoder()
    text = getattr(decoder, "config", config)
    if not getattr(type(decoder), "_supports_attention_backend", False):
        return f"{type(decoder).__name__} does not call transformers' attention interface"
    if getattr(text, "kv_lora_rank", None):
        return "multi-head latent attention (MLA) stores one latent per token instead of keys and values per head"
    if getattr(text, "add_cross_attention", False):
        return "cross-attention layers read keys of another sequence"
    if getattr(text, "kv_sharing_modes", None) or getattr(text, "num_kv_shared_layers", 0):
        return "layers that reuse the keys of another layer are not supported"
    odd = sorted(set(getattr(text, "layer_types", None) or ()) - set(LAYER_TYPES))
    if odd:
        return f"layers of type {', '.join(odd)}; supported: {', '.join(LAYER_TYPES)}"
    if getattr(text, "use_bidirectional_attention", False):
        return "bidirectional attention is not causal"
    layers = attention_layers(decoder)
    if not layers:
        return f"no attention layers with a layer_idx were found in {type(decoder).__name__}"
    return None


def attention_layers(decoder: Any) -> list[Any]:
    """The decoder's attention modules, by layer index: those that know their layer and project to keys and queries."""
    found = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and any(hasattr(module, n) for n in ("q_proj", "qkv_proj", "query_key_value", "c_attn")):
            found[index] = module
    return [found[i] for i in sorted(found)]


def fingerprint(model: Any) -> str:
    """What a saved context must match: the shapes and rotation its keys were made with, and the model's name."""
    config = getattr(model.get_decoder(), "config", model.config)
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
             "vocab_size", "rope_parameters")  # fmt: skip
    return "; ".join(f"{n}={getattr(config, n, None)}" for n in names)
