"""A tiny random Llama and a tokenizer of words, for tests of everything above the adapter."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.prompts import Prompt


class Words:
    """One token per character group; the chat template wraps a message in two marks. Enough of a tokenizer for tests."""

    eos_token_id = 2
    chat_template = "<user> ... <end>"

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=True):
        return f"<user> {messages[0]['content']} <end>"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [3 + sum(map(ord, word)) % 90 for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{int(i)}" for i in ids)


def llama(layers: int = 3, heads: int = 4, groups: int = 2, positions: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=101,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval()


def random_prompt(tokens: int = 150, answer: str | None = None) -> Prompt:
    ids = torch.randint(3, 101, (1, tokens), generator=torch.Generator().manual_seed(1))
    return Prompt(ids, "random", f"{tokens} random tokens", answer)


def save_model(folder) -> str:
    """A folder as `save_pretrained` writes it: the tiny Llama with a real tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<s>", "</s>", *sorted({chr(c) for c in range(32, 127)} | {"\n"})]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    llama(layers=2).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return str(folder)
