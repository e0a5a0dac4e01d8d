"""What a comparison or a timing says of its model, prompt and machine."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import torch

from .prompts import Prompt


def facts(model: Any, prompt: Prompt, new_tokens: int, backend: str | None, seed: int, name: str) -> dict[str, Any]:
    """Everything a reader needs to judge and repeat a run."""
    from .doctor import device_name, versions

    config = model.get_decoder().config
    device = next(model.parameters()).device
    heads = config.num_attention_heads
    return {
        "model": name or str(getattr(config, "_name_or_path", "")) or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "positions": getattr(config, "max_position_embeddings", None),
        "prompt": prompt.name,
        "prompt_tokens": prompt.tokens,
        "needle": prompt.needle,
        "answer": prompt.answer,
        "new_tokens": new_tokens,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "backend": backend or "auto",
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
