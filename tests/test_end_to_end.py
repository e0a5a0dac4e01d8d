"""SmolLM2 finds a planted fact under every default recipe, through the same `generate` a user calls."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import models, prompts
from foveate.measure import DEFAULT_RECIPES

pytestmark = pytest.mark.model
TOKENS = 1500


@pytest.fixture(scope="module")
def smollm2():
    return models.load("smollm2", device="cpu", dtype="fp32")


@pytest.mark.parametrize("recipe", DEFAULT_RECIPES)
@torch.no_grad()
def test_finds_the_planted_fact(smollm2, recipe):
    """Budgets are the presets for 8K tokens, scaled to this prompt; StreamingLLM sees its window alone by design."""
    model, tokenizer = smollm2
    depth = 0.8 if recipe.startswith("streaming_llm") else 0.5
    prompt = prompts.needle_prompt(tokenizer, TOKENS, depth=depth)
    small = recipe.replace("minference@8k", "minference:columns=200,diagonals=50,local=50")
    small = small.replace("flexprefill@8k", "flexprefill:gamma=0.9,min_budget=256").replace("quest@8k", "quest:budget=512")
    small = small.replace("snapkv@8k", "snapkv:capacity=512,kernel=7,pooling=max")
    small = small.replace("streaming_llm@8k", "streaming_llm:sink=4,window=508")
    with foveate.use(model, small) as handle:
        ids = prompt.ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert prompt.answered(answer), f"{small} answered {answer!r}; notes: {handle.notes}"
