"""Needle, threads, InfiniteBench and MQAR: solvable from the text alone, nowhere else, at any length, on any machine."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from foveate.errors import ConfigError
from foveate.evals import infinite, mqar, needle, threads
from foveate.evals.place import depth_of, joined
from foveate.evals.scoring import METRICS
from foveate.evals.task import make, rng_of
from foveate.evals.text import NOISE, Source, _pseudo_english, _pseudo_words
from foveate.prompts import FACT

TASKS = {t.name: t for m in (needle, threads, infinite, mqar) for t in m.TASKS}
PAIR = re.compile(r'"([^"]+)": "([^"]+)"')
QUOTED = re.compile(r'"([0-9a-f-]{36})"')

# sha256 over text, answers, needles and turns of samples 0 and 1, seed 0, 2,000 tokens of `tokenizer()`
GOLDEN: dict[str, str] = {
    "needle": "f1e6f4d0f9a500a0",
    "needle_word": "49ba1d149c06f277",
    "needle_multi": "052df99b8d0ff0e9",
    "threads_single": "07d7a6c07883555e",
    "threads_multiple": "4bc483ca2eb8b4d0",
    "threads_conditional": "41d548bf2e630661",
    "threads_forward": "dac944a611370559",
    "threads_backward": "a8df5b3f1e85b868",
    "threads_random": "e6777b149651520a",
    "threads_parallel": "b76a984334b606d5",
    "threads_branched": "cc982f13b96dd299",
    "passkey": "6b2dff5ae70e346b",
    "number_string": "618307c085437635",
    "kv_retrieval": "901958c3ff29d0c2",
    "math_find": "8f39d854c460c97b",
    "code_run": "377f63d91719e1d4",
    "mqar": "acd12adb820ab56f",
}


@pytest.fixture(scope="module")
def source():
    return made_source()


def made_source():
    words = _pseudo_words()
    return Source(*words, tuple(_pseudo_english(words, 20_000).split()), "test")


def tokenizer(pattern=r" ?[A-Za-z]{1,6}|[0-9]{1,3}| ?[^A-Za-z0-9\s]|\s"):
    """Short pieces of words, digits in threes, marks: about what a trained tokenizer does. All ids are the same."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def characters():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(map(chr, [*range(128)]))}, unk_token="\x00"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="\x00", clean_up_tokenization_spaces=False)


def shortest(task, tok, source, index=0):
    """The least length a task can be made for, found from its own refusal."""
    with pytest.raises(ConfigError) as err:
        make(task, tok, 1, index, 0, source)
    return int(re.search(r"takes (\d+) tokens", str(err.value)).group(1))


def solve(name, sample):
    """The answer, worked out from the text as a reader would, by means unlike the maker's."""
    text, question = sample.text[: sample.question_at], sample.text[sample.question_at :]
    if name == "needle_word":
        return re.search(r'secret password is "(\w+)"', text).group(1)
    if name.startswith("needle"):
        asked = re.search(r"special magic (.*) numbers?\?", question).group(1)
        found = [re.search(rf"special magic {c} number is: (\d+)", text).group(1) for c in re.split(", | and ", asked)]
        return ", ".join(found)
    if name in ("passkey", "number_string"):
        return re.search(r"is (\d+)\. Remember it", text).group(1)
    if name == "math_find":
        return find(ast.literal_eval(re.search(r"\[.*\]", text).group()), sample.meta["kind"])
    if name == "code_run":
        scope: dict = {}
        exec(text[text.index("def ") :], scope)
        return str(eval(re.search(r"func_\d+\(-?\d+\)", question).group(), scope))
    if name == "mqar":
        lines = dict(line.split() for line in text.split("\n") if len(line.split()) == 2)
        asked = re.search(r"partners of (.*)\?", question).group(1)
        return ", ".join(lines[key] for key in re.split(", | and ", asked))
    pairs = PAIR.findall(text)
    if name == "threads_conditional":
        mark = re.search(r'character "(.)"', question).group(1)
        return str([v for k, v in pairs if mark in k])
    if name == "threads_branched":
        return max(branches(pairs, QUOTED.findall(question)[0]), key=len)[-1]
    ends = []
    for key in QUOTED.findall(question):
        value = dict(pairs)[key]
        while name not in ("threads_single", "threads_multiple", "kv_retrieval") and value in dict(pairs):
            value = dict(pairs)[value]
        ends.append(value)
    return ", ".join(ends)


def find(numbers, kind):
    if "median" in kind:
        return f"{np.median(numbers):g}"
    for word in ("second", "third"):
        for _ in range({"second": 1, "third": 2}[word] if word in kind else 0):
            gone = max(numbers) if "largest" in kind else min(numbers)
            numbers = [n for n in numbers if n != gone]
    return str(max(numbers) if "largest" in kind else min(numbers))


def branches(pairs, key):
    """All ways from a key to values that are no keys."""
    nexts = [v for k, v in pairs if k == key]
    return [[v, *rest] for v in nexts for rest in branches(pairs, v)] if nexts else [[]]


def digest(name, tok, source):
    out = hashlib.sha256()
    for index in (0, 1):
        s, e = make(TASKS[name], tok, 2000, index, 0, source)
        turns = [[t.question, t.prefix, t.answers] for t in s.turns]
        out.update(json.dumps([s.text, s.prefix, s.question_at, s.answers, s.needles, turns, e.needles]).encode())
    return out.hexdigest()[:16]


def digests():
    tok, source = tokenizer(), made_source()
    return {name: digest(name, tok, source) for name in TASKS}


@pytest.fixture(scope="module")
def here():
    return digests()


def test_golden(here):
    """A change of any text or draw is a change of the benchmark: figures of before and after do not compare."""
    assert here == GOLDEN


def test_the_same_in_another_process(here):
    code = "import json, tests.test_eval_tasks as t; print(json.dumps(t.digests()))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert json.loads(said) == here


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [512, 4096])
def test_length(name, length, source):
    tok, task = tokenizer(), TASKS[name]
    for index in (0, 3):
        length = max(length, round(1.3 * shortest(task, tok, source, index)))  # the draws depend on the length
        sample, encoded = make(task, tok, length, index, 0, source)
        assert 0.99 * length <= encoded.tokens + sample.max_new_tokens <= length
        assert sample.text == sample.text.strip()


@pytest.mark.parametrize("name", TASKS)
def test_spans_and_question(name, source):
    tok = characters()
    for index in range(4):
        sample, encoded = make(TASKS[name], tok, 6000, index, 0, source)
        assert [tok.decode(encoded.ids[a:b]) for a, b in encoded.needles] == [sample.text[a:b] for a, b in sample.needles]
        assert bool(sample.needles) == (name != "math_find")
        assert tok.decode(encoded.ids[encoded.question_at :]).startswith(sample.text[sample.question_at :])
        assert all(b <= sample.question_at for _, b in sample.needles)
        text, at = sample.text, sample.question_at
        assert text[at - 1] == "\n" and text[at].isupper()
        assert all(text[a - 1 : a] in ("", "\n", " ", "{") and text[b] in "\n,}" for a, b in sample.needles)
        first, last = encoded.needles[0] if encoded.needles else (0, 0)
        if "depth" in sample.meta:  # of the haystack, which ends before the question
            assert abs(first / (encoded.question_at - (last - first)) - sample.meta["depth"]) < 0.06


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1500, 12000])
def test_solvable_from_the_text_and_only_there(name, length, source):
    score = METRICS[TASKS[name].metric]
    for index in range(7 if length < 5000 else 2):
        sample, _ = make(TASKS[name], tokenizer(), length, index, 1, source)
        said = solve(name, sample)
        assert score(said, sample.answers) == 1.0
        for blind in ("", sample.prefix, sample.text[sample.question_at :], " ".join(NOISE)):
            assert score(blind, sample.answers) == 0.0 or name in ("math_find", "code_run")
        if name not in ("math_find", "code_run"):  # the answer stands in its needle and nowhere else
            rest = list(sample.text)
            for a, b in sample.needles:
                rest[a:b] = "\x00" * (b - a)
            assert not any(answer in "".join(rest).lower() for answer in sample.answers)
            assert all(any(answer in sample.text[a:b] for a, b in sample.needles) for answer in sample.answers)


@pytest.mark.parametrize("name", TASKS)
def test_the_question_does_not_depend_on_the_length(name, source):
    task = TASKS[name]
    a, b = (task.build(n, rng_of(0, name, 1000, 2), source, 2) for n in (50, 400))
    assert len(b.text) > len(a.text)
    assert a.text[a.question_at :] == b.text[b.question_at :] and a.prefix == b.prefix and a.turns == b.turns
    if name != "math_find":  # an aggregate changes with its list
        assert a.answers == b.answers
        assert [a.text[i:j] for i, j in a.needles] == [b.text[i:j] for i, j in b.needles]


@pytest.mark.parametrize("name", ["math_find", "code_run", "passkey"])
def test_the_best_constant_answer_is_near_chance(name, source):
    answers = [TASKS[name].build(600, rng_of(0, name, 1, i), source, i).answers[0] for i in range(140)]
    assert max(answers.count(a) for a in answers) <= 0.12 * len(answers)


@pytest.mark.parametrize("name", ["threads_single", "kv_retrieval"])
def test_turns_ask_other_keys_of_the_same_text(name, source):
    sample, _ = make(TASKS[name], tokenizer(), 3000, 0, 0, source)
    known = dict(PAIR.findall(sample.text))
    keys = [QUOTED.findall(t.question)[0] for t in sample.turns]
    assert len({*keys, *QUOTED.findall(sample.text[sample.question_at :])}) == 4
    assert [(known[k],) for k in keys] == [t.answers for t in sample.turns]


def test_keys_are_unique_and_chains_end(source):
    for name in (n for n in TASKS if n.startswith("threads") or n == "kv_retrieval"):
        sample, _ = make(TASKS[name], tokenizer(), 6000, 5, 0, source)
        pairs = PAIR.findall(sample.text)
        keys, values = zip(*pairs, strict=True)
        assert len(set(values)) == len(values)
        assert name == "threads_branched" or len(set(keys)) == len(keys)
        marked = [PAIR.findall(sample.text[a:b])[0] for a, b in sample.needles]
        assert not set(sample.answers) & set(keys)
        links = [v for v in values if v in set(keys)]
        assert set(links) <= {v for _, v in marked}  # no pair goes on but those of the threads
        assert json.loads(sample.text[: sample.question_at]) if name.startswith("threads") else True


@pytest.mark.parametrize("hops", [2, 7])
@pytest.mark.parametrize("direction, rises", [("forward", True), ("backward", False), ("random", None)])
def test_direction(direction, rises, hops, source):
    seen = set()
    for index in range(12):
        for task in (threads.Chain("x", hops, direction), threads.Parallel("x", hops, direction, threads=3)):
            sample = task.build(60, random.Random(index), source, index)
            for t in range(len(sample.needles) // hops):
                starts = [a for a, _ in sample.needles[t * hops : (t + 1) * hops]]
                up = [a < b for a, b in zip(starts, starts[1:])]
                seen |= set(up)
                pairs = [PAIR.findall(sample.text[a:b])[0] for a, b in sample.needles[t * hops : (t + 1) * hops]]
                assert all(x[1] == y[0] for x, y in zip(pairs, pairs[1:]))
                assert pairs[-1][1] == sample.answers[t]
    assert seen == ({True, False} if rises is None else {rises})
    with pytest.raises(ConfigError, match="direction: expected forward"):
        threads.Chain("x", direction="up")


@pytest.mark.parametrize("hops, ways", [(2, 2), (4, 2), (6, 3)])
def test_one_branch_is_the_longest(hops, ways, source):
    for index in range(20):
        sample = threads.Branched("x", hops, ways).build(40, random.Random(index), source, index)
        pairs = PAIR.findall(sample.text[: sample.question_at])
        start = QUOTED.findall(sample.text[sample.question_at :])[0]
        found = sorted(branches(pairs, start), key=len)
        assert len(found) == 1 + (hops - 1) * (ways - 1)
        assert len(found[-1]) == hops > len(found[-2]) and found[-1][-1] == sample.answers[0]
        place = {v: i for i, (_, v) in enumerate(pairs)}
        assert all(place[a] < place[b] for branch in found for a, b in zip(branch, branch[1:]))


def test_clustered_needles_are_neighbours(source):
    sample = threads.Conditional("x", needles=4, clustered=True).build(50, random.Random(3), source, 0)
    spans = sorted(sample.needles)
    assert all(b[0] - a[1] == len(", ") for a, b in zip(spans, spans[1:]))
    mark = sample.meta["mark"]
    assert sum(mark in k for k, _ in PAIR.findall(sample.text[: sample.question_at])) == 4
    task = threads.Multiple("x", needles=4, clustered=True)
    assert len({min(task.build(50, random.Random(i), source, 0).needles) for i in range(10)}) > 5  # not always the first


def test_depths_cover_the_grid():
    for grid in (1, 2, 10, 11):
        depths = sorted(depth_of(i, grid) for i in range(grid, 2 * grid))
        assert depths == [i / max(1, grid - 1) for i in range(grid)]
    few = sorted(depth_of(i, 10) for i in range(4))
    assert max(b - a for a, b in zip(few, few[1:])) < 0.45 and few[-1] > 0.6


def test_joined():
    text, spans = joined(["a", "bc", "", "d"], "--", [3, 1], 10)
    assert text == "a--bc----d" and spans == [(19, 20), (13, 15)]


def test_number_strings_have_runs(source):
    for i in range(30):
        key = infinite.NumberString("x").build(3, random.Random(i), source, i).answers[0]
        runs = [len(m.group()) for m in re.finditer(r"(\d)\1*", key)]
        assert len(key) == 10 and len(runs) <= 5


def test_word_is_in_the_words_of_the_demo(source):
    sample, _ = make(TASKS["needle_word"], tokenizer(), 900, 0, 0, source)
    (a, b), (word,) = sample.needles[0], sample.answers
    assert sample.text[a:b] == FACT.replace("bluebird", word)


def test_secrets_are_nowhere_in_the_haystack_at_any_length(source):
    prose = " ".join(source.prose).lower()
    for i in range(40):
        for name in ("needle", "needle_word", "needle_multi"):
            made = TASKS[name].build(30, random.Random(i), source, i)
            assert not any(answer in prose for answer in made.answers)
    words = ("apple", "bread")
    full = Source(words, words, words, ("apple", "and", "bread."), "all nouns")
    with pytest.raises(ConfigError, match="text: expected one that lacks some nouns"):
        TASKS["needle_word"].build(30, random.Random(0), full, 0)
    assert "needs a list of nouns" in TASKS["needle_word"].needs(Source((), (), (), ("a.",), "none"))


def test_mqar_has_keys_beyond_the_adjectives(source):
    sample = mqar.Recall("mqar").build(1500, random.Random(0), source, 0)
    keys = [line.split()[0] for line in sample.text[: sample.question_at].split("\n") if len(line.split()) == 2]
    assert len(keys) == len(set(keys)) == 1504 and any("-" in k for k in keys)
    empty = Source((), (), (), (), "")
    assert "needs more adjectives" in mqar.Recall("mqar").needs(empty)


class Scripted:
    """Hands out these draws instead of random ones."""

    def __init__(self, *draws):
        self.draws = list(draws)
        self.seen = []

    def choice(self, a, size, replace, p=None):
        self.seen.append((list(a), p))
        return np.array(self.draws.pop(0))


def test_mqar_worked_example():
    """Keys 1 and 4, values 7 and 11, the first key asked in slot 1 and the second in slot 0."""
    rng = Scripted([1, 4], [7, 11], [1, 0])
    with pytest.raises(ConfigError, match="vocab"):
        mqar.mqar_batch(12, 16, 2, rng=rng)
    inputs, labels = mqar.mqar_batch(17, 16, 2, rng=rng)
    assert inputs.tolist() == [[1, 7, 4, 11, 4, 0, 1, *[0] * 9]]
    assert labels.tolist() == [[*[-100] * 4, 11, -100, 7, *[-100] * 9]]


def test_mqar_batch_properties():
    rng = np.random.default_rng(0)
    for power, fill, passes in [(0.01, "zero", 1), (1.0, "random", 1), (0.01, "zero", 2)]:
        inputs, labels = mqar.mqar_batch(256, 64, 4, rng=rng, batch=50, power=power, fill=fill, passes=passes)
        assert inputs.shape == labels.shape == (50, 64) and inputs.dtype == labels.dtype == torch.int64
        for row, wanted in zip(inputs.tolist(), labels.tolist()):
            told = dict(zip(row[0:8:2], row[1:8:2]))
            assert row[: 8 * passes] == row[:8] * passes
            assert all(1 <= k < 128 for k in told) and all(128 <= v < 256 for v in told.values()) and len(told) == 4
            asked = [i for i, w in enumerate(wanted) if w != mqar.IGNORED]
            assert sorted(row[i] for i in asked) == sorted(told) and all(told[row[i]] == wanted[i] for i in asked)
            assert all(i >= 8 * passes and i % 2 == 0 for i in asked)
            assert fill == "random" or all(t == 0 for i, t in enumerate(row) if i >= 8 * passes and i not in asked)


def test_mqar_slots_follow_the_power_law():
    rng = np.random.default_rng(1)
    _, labels = mqar.mqar_batch(4096, 60, 1, rng=rng, batch=6000, power=0.01)
    slots = ((labels != mqar.IGNORED).float().argmax(dim=1) - 2) // 2
    weights = np.arange(1, 30) ** -0.99
    for slot in (0, 1, 10):
        share, wanted = float((slots == slot).float().mean()), weights[slot] / weights.sum()
        assert abs(share - wanted) < 4 * (wanted / 6000) ** 0.5
    _, full = mqar.mqar_batch(4096, 16, 4, rng=rng, power=0.01)  # 4 pairs fill all 4 slots
    assert (full != mqar.IGNORED).nonzero()[:, 1].tolist() == [8, 10, 12, 14]


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(length=15), "length: expected an even number of at least 16"),
        (dict(length=14), "length: expected an even number of at least 16"),
        (dict(passes=2, length=22), "length: expected an even number of at least 24"),
        (dict(vocab=16, length=16), "vocab: expected more than 16"),
        (dict(fill="ones"), "fill: expected zero or random"),
    ],
)
def test_mqar_refuses(asked, message):
    with pytest.raises(ConfigError, match=message):
        mqar.mqar_batch(**{"vocab": 256, "length": 64, "pairs": 4, "rng": np.random.default_rng(0), **asked})
