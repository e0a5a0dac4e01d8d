"""The needle model's tokenizer: one token a word of the tasks, three digits, a capital or a sign each; nothing is unknown.

A word is one and the same token wherever it stands. Its token carries the space before it ("▁grass"), and after a line
break, hyphen, quote or bracket, where no space stands, that space is merely implied. A real space there is written
with a mark of its own, so that decoding gives the text back. Keys like "noisy-cat" are then the same three tokens in
the text, in the question and at the start of a line, and a word list of 8,000 words needs 8,000 tokens.

Digits go in threes from the left, as in Llama 3 ("123", "456", "7"): a number of seven digits is three tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .. import mqar
from ..ruler import niah, tracking
from ..text import NOISE, Source

SPACE, REAL = "▁", "␣"  # the space before a word; a real space where one would only be implied
OPENERS = ("\n", "-", '"', "(")
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
# Words of the tasks' prompts, whether a word list holds them or not; the rest of the vocabulary comes from the source.
PROMPTS = (niah.TEMPLATE, niah.PREFIX, niah.NEEDLE, tracking.TEMPLATE, tracking.PREFIX, mqar.HEAD, mqar.ASK, mqar.PREFIX)
FURTHER = """
A is it number numbers word words uuid uuids VAR pass key Key Value value Remember There an important info inside lot
irrelevant find test your other values list Read Corresponding corresponding Extract specified JSON object secret password
city below Don give information outside the document or repeat findings these
"""
SUFFIXES = ("s", "ed", "ing", "er", "ly", "es", "al", "ion", "ment", "ness", "ity", "able", "ive", "th", "en", "or")
PROSE_WORDS = 1000  # the most frequent words of the prose that are in no list


def build(source: Source) -> Any:
    """The tokenizer of these word lists, as a transformers fast tokenizer with offsets, BOS and no chat template.

    The same source gives the same tokenizer: nothing is trained. About 10,700 tokens with the lists of wonderwords.
    """
    core = Tokenizer(models.Unigram(_vocabulary(source), unk_id=3, byte_fallback=True))
    opener = "".join(map(re.escape, OPENERS))
    marked: list[Any] = [normalizers.Prepend(SPACE), normalizers.Replace(Regex(f"(?<=[{opener}]) "), REAL + " ")]
    for c in OPENERS:
        marked.append(normalizers.Replace(Regex(re.escape(c) + "(?=[A-Za-z])"), c + SPACE))
    core.normalizer = normalizers.Sequence([*marked, normalizers.Replace(" ", SPACE)])
    # words; up to three digits; one capital alone; the word of variable tracking; else single characters
    pattern = f"{SPACE}?[A-Z]?[a-z]+|[0-9]{{1,3}}|{SPACE}?VAR(?![A-Za-z])|{SPACE}?[A-Z](?![A-Za-z])|[\\s\\S]"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain: list[Any] = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(SPACE, 1, 0)]
    for c in OPENERS:
        plain.append(decoders.Replace(c + REAL + SPACE, c + " "))
        plain.append(decoders.Replace(c + SPACE, c))
    core.decoder = decoders.Sequence([*plain, decoders.Replace(SPACE, " ")])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=65536,
        padding_side="left",
    )


def _vocabulary(source: Source) -> list[tuple[str, float]]:
    """Tokens with their scores: a whole word always wins over its letters."""
    words: dict[str, None] = {}
    for text in (*PROMPTS, FURTHER, *NOISE, *source.words):
        for word in re.findall(r"[A-Z]?[a-z]+|VAR|[A-Z](?![A-Za-z])", text):
            words[word] = None
    spoken = Counter(re.findall(r"[A-Z]?[a-z]+", " ".join(source.prose)))
    frequent = sorted((w for w in spoken if w not in words), key=lambda w: (-spoken[w], w))
    words.update(dict.fromkeys(frequent[:PROSE_WORDS]))
    signs = ["\n", *map(chr, range(33, 127)), REAL, SPACE, *(c for c in _letters(source) if ord(c) > 126)]
    vocabulary = dict.fromkeys([PAD, BOS, EOS, UNKNOWN], 0.0)
    vocabulary.update({f"<0x{i:02X}>": -20.0 for i in range(256)})
    vocabulary.update(dict.fromkeys(signs, -4.0))
    vocabulary.update({d: -1.0 for d in digits()})
    vocabulary.update({s: -6.0 for s in SUFFIXES if len(s) > 1})
    vocabulary.update({SPACE + w: -1.0 for w in words})
    return list(vocabulary.items())


def digits() -> list[str]:
    """What a token of digits may be: "00" to "99" and "000" to "999"; a single digit is one of the signs."""
    return [f"{i:0{width}}" for width in (2, 3) for i in range(10**width)]


def _letters(source: Source) -> list[str]:
    return sorted({c for word in source.words for c in word})


def piece(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a part of a longer text, so that parts put together are the tokens of the whole.

    A part may start with anything; where it starts with a letter it must follow one of `OPENERS` or open the text.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if text[:1].isascii() and text[:1].isalpha() else ids[1:]  # the tokenizer put a space in front
