"""RULER: every task is solved from its text alone by a few lines that know its rules, fits its length, and never changes."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.errors import ConfigError
from foveate.evals.ruler import RULER_11
from foveate.evals.ruler.haystack import join, noise, plant
from foveate.evals.ruler.niah import Niah
from foveate.evals.ruler.synth import _name
from foveate.evals.ruler.words import CWE, FWE, LONG, LONG_FROM, SHORT, frequencies
from foveate.evals.scoring import METRICS
from foveate.evals.suites import choose
from foveate.evals.task import make, rng_of
from foveate.evals.text import NOISE, Source
from tests.ruler_cases import (
    BY_NAME,
    CASES,
    SMALL,
    TASKS,
    all_fingerprints,
    last_prompt,
    solve,
    solve_cwe,
    solve_documents,
    solve_niah,
    solve_vt,
    source_with,
    tokenizer,
    write_data,
)

# sha256 of samples 0 and 1 of seed 0 at both lengths: text, references, spans, tokens. Another hash is another benchmark.
GOLDEN = {
    "niah_single_1": "0c31f181c8573b1a",
    "niah_single_2": "bf53c31f80a8a8e3",
    "niah_single_3": "3a70aa083d5547eb",
    "niah_multikey_1": "a6f92e443c05a354",
    "niah_multikey_2": "59d9bd62d3dfcd29",
    "niah_multikey_3": "8e729470d875c53a",
    "niah_multivalue": "4ec69091bc1518d4",
    "niah_multiquery": "df38d2749792ae86",
    "vt": "de5e817066c111d7",
    "cwe": "9d6a90de63dd0518",
    "fwe": "19bd117e1cba2d12",
    "qa_1": "d36eca371eb1fd1c",
    "qa_2": "8050b70e4eb06b8c",
    "qa_synth_1": "0585eebc7169ce5f",
    "qa_synth_2": "b95097b971e2a72b",
}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Source:
    return source_with(write_data(tmp_path_factory.mktemp("ruler")))


@pytest.fixture(scope="session")
def fingerprints(tmp_path_factory) -> dict[str, str]:
    return all_fingerprints(str(tmp_path_factory.mktemp("prints")))


# ------------------------------------------------------------------ all tasks
@pytest.mark.parametrize("name, length", CASES)
def test_sample(name, length, source):
    task = BY_NAME[name]
    for index in range(4):
        sample, encoded = make(task, tokenizer(), length, index, 0, source)
        assert length * 0.99 <= encoded.tokens + sample.max_new_tokens <= length
        assert sample.text == sample.text.strip()
        assert solve(task, sample) == set(sample.answers) and len(set(sample.answers)) == len(sample.answers)

        whole = f"{sample.text}\n{sample.prefix}"
        offsets = tokenizer()(whole, return_offsets_mapping=True)["offset_mapping"]
        for (first, last), (a, b) in zip(encoded.needles, sample.needles):
            assert whole[offsets[first][0] : offsets[last - 1][1]].strip() == sample.text[a:b] == sample.text[a:b].strip()
        held = " ".join(sample.text[a:b] for a, b in sample.needles)
        assert all(answer in held for answer in sample.answers)

        question = sample.text[sample.question_at :]
        assert question.startswith("What " if isinstance(task, Niah) else "Question: ") and "\n" not in question
        assert whole[offsets[encoded.question_at][0] :].lstrip().startswith(question)
        rest = sample.text
        for a, b in sorted(sample.needles, reverse=True):
            rest = rest[:a] + rest[b:]
        assert not any(re.search(rf"\b{re.escape(a)}\b", rest + sample.prefix) for a in sample.answers)


@pytest.mark.parametrize("name", BY_NAME)
def test_scores(name, source):
    task, length = BY_NAME[name], SMALL.get(name, 512)
    metric = METRICS[task.metric]
    samples = [make(task, tokenizer(), length, i, 0, source)[0] for i in range(3)]
    for sample, other in zip(samples, samples[1:]):
        assert metric(", ".join(sample.answers), sample.answers) == 1.0
        assert metric("", sample.answers) == metric("I do not know.", sample.answers) == 0.0
        assert metric(", ".join(other.answers), sample.answers) == 0.0
        if "examples" in sample.meta:  # who repeats the answer of the worked example has nothing
            shown = sample.text.split(sample.prefix[:40])[1].split("\n")[0]
            assert len(shown.split()) >= 5 and metric(shown, sample.answers) == 0.0


@pytest.mark.parametrize("name", BY_NAME)
def test_other_seed_other_sample_same_question_at_every_size(name, source):
    task = BY_NAME[name]
    length = SMALL.get(name, 512)
    texts = {make(task, tokenizer(), length, i, s, source)[0].text for i in (0, 1) for s in (0, 1)}
    assert len(texts) == 4
    built = [task.build(task.least + n, rng_of(0, name, 4096, 5), source, 5) for n in (0, 1, 7, 200, 700)]
    assert len({(s.answers, s.prefix, s.text[s.question_at :]) for s in built}) == 1
    assert len({s.text for s in built}) > 3 and len(built[-1].text) > len(built[0].text)


def test_golden(fingerprints):
    assert fingerprints == GOLDEN


def test_same_in_another_process(fingerprints, tmp_path):
    code = (
        "import json, sys; from tests.ruler_cases import all_fingerprints; print(json.dumps(all_fingerprints(sys.argv[1])))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == fingerprints


def test_names():
    assert len(RULER_11) == 11 and len(BY_NAME) == len(TASKS) == 15
    assert [t.name for t in choose(["ruler", "synth"])[0]] == [t.name for t in TASKS]
    assert all(t.name.startswith("qa_synth") == (t.suite == "synth") for t in TASKS)
    assert {t.name for t in TASKS} - set(RULER_11) == {"qa_1", "qa_2", "qa_synth_1", "qa_synth_2"}


@pytest.mark.parametrize("name", BY_NAME)
def test_only_stand_ins_say_so(name, source):
    sample = BY_NAME[name].build(BY_NAME[name].least, rng_of(0, name, 1, 0), source, 0)
    assert sample.meta.get("stand_in", False) is name.startswith("qa_synth")
    assert json.loads(json.dumps(sample.meta)) == sample.meta


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "qa_1", "qa_synth_1"]
)
def test_depths_cover_the_text(name, source):
    bins = Counter()
    for i in range(200):
        sample = BY_NAME[name].build(300, rng_of(0, name, 4096, i), source, i)
        assert 0.0 <= sample.meta["depth"] <= 1.0
        assert abs(sample.meta["depth"] - sample.needles[0][0] / sample.question_at) < 0.3
        bins[min(4, int(sample.meta["depth"] * 5))] += 1
    assert min(bins[b] for b in range(5)) >= 15  # 40 expected, deviation 5.7


# ------------------------------------------------------------------ needles in a haystack
def test_words_of_the_prompts(source):
    one = BY_NAME["niah_single_3"].build(50, rng_of(0, "x", 1, 0), source, 0)
    key = re.search(r"uuid for (\S+)", one.prefix)[1]
    assert one.text.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    assert one.text.endswith(f"\nWhat is the special magic uuid for {key} mentioned in the provided text?")
    assert one.prefix == f" The special magic uuid for {key} mentioned in the provided text is"
    assert f"One of the special magic uuids for {key} is: {one.answers[0]}." in one.text
    four = BY_NAME["niah_multiquery"].build(50, rng_of(0, "x", 1, 0), source, 0)
    assert four.text.startswith("Some special magic numbers are hidden within the following text.")
    assert re.search(
        r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided text\?$", four.text
    )
    assert four.prefix.startswith(" The special magic numbers for ") and four.prefix.endswith(" in the provided text are")


@pytest.mark.parametrize("task", [t for t in TASKS if isinstance(t, Niah)], ids=lambda t: t.name)
@pytest.mark.parametrize("size", [1, 400])
def test_needles(task, size, source):
    for index in range(5):
        sample = task.build(size, rng_of(1, task.name, 1, index), source, index)
        pairs = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.text)
        keys, values = Counter(k for k, _ in pairs), Counter(v for _, v in pairs)
        assert set(values.values()) == {1} and set(keys.values()) == {task.values}
        assert len(keys) == (size + 3 if task.haystack == "needles" else max(task.keys, task.queries))
        assert len(sample.needles) == task.values * task.queries
        for key, value in pairs:
            assert re.fullmatch(PATTERN[task.key], key) and re.fullmatch(PATTERN[task.value], value)
        if task.haystack == "needles" or task.keys > 1:
            asked = [t.question for t in sample.turns] + [sample.text[sample.question_at :]]
            assert len(set(asked)) == len(asked) == 4
            assert all(solve_niah(sample, t.question) == set(t.answers) for t in sample.turns)
            assert all(re.search(r" for \S+", t.prefix)[0] in t.question for t in sample.turns)
        else:
            assert sample.turns == ()


PATTERN = {
    "numbers": r"[1-9]\d{6}",
    "words": r"[a-z]+-[a-z]+",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def test_values_are_not_in_the_essays(source):
    """With a prose that holds every number but a few, the value is one of the few."""
    free = {1_000_000 + 1000 * i for i in range(9000)}
    crowd = " ".join(str(n) for n in range(10**6, 10**6 + 60_000) if n not in free)
    crowded = replace(source, prose=tuple(crowd.split()))
    rng = random.Random(0)
    rng.randrange = lambda low, high: low + int(random.Random.random(rng) * 60_000)  # values only from the crowd
    sample = BY_NAME["niah_single_2"].build(100, rng, crowded, 0)
    assert int(sample.answers[0]) in free


def test_keys_differ_where_words_are_few(source):
    few = replace(source, adjectives=("old", "new"), nouns=("cat", "dog", "owl"))
    for i in range(20):
        sample = BY_NAME["niah_multiquery"].build(50, rng_of(0, "x", 1, i), few, i)
        assert len(set(re.findall(r"numbers for (\S+) is:", sample.text))) == 4


def test_needles_come_in_any_order(source):
    orders = set()
    for i in range(20):
        sample = BY_NAME["niah_multivalue"].build(50, rng_of(0, "x", 1, i), source, i)
        orders.add(tuple(sorted(range(4), key=lambda j: sample.text.index(sample.answers[j]))))
    assert len(orders) > 5


def test_planted_pieces_are_found():
    pieces, where = plant(["a", "b"], ["X ", "Y", "Z"], [0, 1, 2])
    assert pieces == ["X ", "a", "Y", "b", "Z"] and where == [0, 2, 4]
    assert join(pieces, where, "--") == ("X --a--Y--b--Z", [(0, 1), (7, 8), (13, 14)])


def test_noise_lines():
    assert noise(7) == [" ".join(NOISE), " ".join(NOISE[:2])]
    assert noise(10) == [" ".join(NOISE)] * 2 and noise(1) == [NOISE[0]]


def test_unit_of_noise_is_a_sentence(source):
    task = BY_NAME["niah_single_1"]
    texts = [task.build(n, rng_of(0, "x", 1, 0), source, 0).text for n in range(1, 12)]
    assert [sum(text.count(s) for s in NOISE) for text in texts] == list(range(5, 16))


# ------------------------------------------------------------------ chains and words
def test_chain(source):
    sample = BY_NAME["vt"].build(100, rng_of(0, "vt", 1, 0), source, 0)
    value = re.search(r"assigned the value (\d+), they are: $", sample.prefix)[1]
    a, b, c, d, e = sample.answers
    lines = [sample.text[i:j] for i, j in sample.needles]
    assert lines == [
        f"VAR {a} = {value}",
        f"VAR {b} = VAR {a}",
        f"VAR {c} = VAR {b}",
        f"VAR {d} = VAR {c}",
        f"VAR {e} = VAR {d}",
    ]
    assert all(re.fullmatch("[A-Z]{5}", name) for name in sample.answers)
    example = sample.text[: -len(last_prompt(sample))]
    assert re.search(r", 5 variables are assigned the value \d{5}, they are:  [A-Z]{3}( [A-Z]{3}){4}\n\n$", example)
    assert value not in example
    longer = replace(BY_NAME["vt"], hops=9, max_new_tokens=80)
    sample = longer.build(200, rng_of(0, "vt", 1, 0), source, 0)
    assert len(sample.answers) == len(sample.needles) == 10 and sample.max_new_tokens == 80
    assert "10 variables" in sample.prefix and solve_vt(sample) == set(sample.answers)


@pytest.mark.parametrize("size, form", [(CWE.least, SHORT), (LONG_FROM - 1, SHORT), (LONG_FROM, LONG), (3000, LONG)])
def test_common_words(size, form, source):
    sample = CWE.build(size, rng_of(0, "cwe", 1, 0), source, 0)
    first, second = (re.findall(r"(\d+)\. (\S+)", part) for part in re.findall(r"often\.\n(.+)\nQuestion", sample.text))
    assert [int(n) for n, _ in second] == list(range(1, len(second) + 1))
    assert len(first) == form.example and size - form.other < len(first) + len(second) <= size
    counts, shown = Counter(w for _, w in second), Counter(w for _, w in first)
    assert all(counts[w] == (form.common if w in sample.answers else form.other) for w in counts)
    assert sorted(shown.values(), reverse=True)[:11] == [form.example_common] * 10 + [form.example_other]
    assert not set(shown) & set(counts)
    for part, common in ((first, shown.most_common(10)), (second, counts.most_common(10))):  # shuffled: all over the list
        places = [i / len(part) for i, (_, w) in enumerate(part) if w in dict(common)]
        assert abs(sum(places) / len(places) - 0.5) < 0.15 and places[-1] > 0.8
    everything = "\n".join(source.words)
    assert all(everything.count(w) == 1 for w in sample.answers)


def test_more_common_words_than_the_list_has(source):
    sample = CWE.build(3 * len(source.words) + 3000, rng_of(0, "cwe", 1, 0), source, 0)
    assert solve_cwe(sample) == set(sample.answers) and re.search(r"\d+\. word\d+", sample.text)


def test_frequencies_have_no_ties():
    for size in [*range(FWE.least, 2000), 10_000, 123_456]:
        counts = [*frequencies(size), 0]
        assert counts[1] > counts[2] > counts[3] > counts[4], size
    ties = [n for n in range(20, FWE.least) if len(set([*frequencies(n), 0, 0, 0, 0][1:5])) < 4]
    assert ties  # below the least size some do tie
    assert frequencies(1000)[:4] == [607, 151, 67, 37] and frequencies(1000)[-1] >= 1


# ------------------------------------------------------------------ documents
def test_documents_are_numbered_and_whole(source):
    sample = BY_NAME["qa_1"].build(400, rng_of(0, "qa_1", 1, 0), source, 3)
    numbers = [int(n) for n in re.findall(r"^Document (\d+):$", sample.text, flags=re.M)]
    assert numbers == list(range(1, sample.meta["documents"] + 1)) and len(numbers) > 10
    whole = {p["context"] for a in json.loads(source.files["qa_1"].read_text())["data"] for p in a["paragraphs"]}
    found = re.findall(r"^Document \d+:\n(.+)$", sample.text, flags=re.M)
    assert len([d for d in found if d not in whole]) <= 1 and len(set(found)) == len(found)
    gold = sample.text[slice(*sample.needles[0])]
    assert gold in whole and "Stone 03 has mark 03x." in gold


def test_same_article_comes_first(source):
    sample = BY_NAME["qa_1"].build(60, rng_of(0, "qa_1", 1, 0), source, 6)  # stone 11, four other paragraphs of article 1
    assert set(re.findall(r"Stone (\d)\d has", sample.text)) == {"1"}


def test_two_supporting_documents(source):
    sample = BY_NAME["qa_2"].build(30, rng_of(0, "qa_2", 1, 0), source, 2)
    held = [sample.text[a:b] for a, b in sample.needles]
    assert sorted(h.split("\n")[0] for h in held) == ["Person 2", "Place 2"]
    assert all(f"Other 2{i}\n" in sample.text for i in range(3))


def test_two_hops_need_two_sentences(source):
    sample = BY_NAME["qa_synth_2"].build(100, rng_of(0, "x", 1, 0), source, 0)
    assert len(sample.needles) == 2
    work, seat = sorted((sample.text[a:b] for a, b in sample.needles), key=lambda s: "seat" in s)
    company = re.fullmatch(r"\w+ \w+ works for the company (\w+)\.", work)[1]
    assert seat == f"The company {company} has its seat in the city of {sample.answers[0]}."


def test_made_up_names_differ():
    made: set[str] = set()
    rng = random.Random(0)
    assert len({_name(rng, made) for _ in range(8000)}) == 8000  # two million are possible: drawn blindly, some repeat


def test_more_documents_than_the_file_has(source):
    sample = BY_NAME["qa_1"].build(5000, rng_of(0, "qa_1", 1, 0), source, 0)
    assert solve_documents(sample) == set(sample.answers) and sample.text.count("Stone 00 has") == 1


def test_files(source, tmp_path):
    assert BY_NAME["qa_1"].needs(replace(source, files={})).startswith("needs a data file named qa_1, the JSON of SQuAD 2.0")
    assert "HotpotQA" in BY_NAME["qa_2"].needs(replace(source, files={"qa_1": source.files["qa_1"]}))
    assert BY_NAME["qa_1"].needs(source) is None
    with pytest.raises(ConfigError, match="task qa_1: needs a data file"):
        make(BY_NAME["qa_1"], tokenizer(), 1024, 0, 0, replace(source, files={}))
    bad = {
        "missing": (None, "cannot read"),
        "text": (b"not json", "is not the JSON of SQuAD 2.0 .*JSONDecodeError"),
        "bytes": (b"\xff\xfe\x00", "is not the JSON of SQuAD 2.0 .*UnicodeDecodeError"),
        "list": (b"[1, 2]", "is not the JSON of SQuAD 2.0 .*TypeError"),
        "keys": (b'{"data": [{"title": "x"}]}', "is not the JSON of SQuAD 2.0 .*KeyError"),
        "empty": (b'{"data": []}', "holds no questions or too few documents"),
    }
    for name, (content, message) in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"task qa_1: .*{name} ?{message}" if content else f"task qa_1: {message}"):
            BY_NAME["qa_1"].build(10, random.Random(0), replace(source, files={"qa_1": path}), 0)


def test_a_changed_file_is_read_again(source, tmp_path):
    path = tmp_path / "squad.json"
    text = source.files["qa_1"].read_text()
    task, own = BY_NAME["qa_1"], replace(source, files={"qa_1": path})
    path.write_text(text)
    assert task.build(10, random.Random(0), own, 0).answers == ("mark 00x",)
    path.write_text(text.replace("mark 00x", "mark 00xyz"))
    assert task.build(10, random.Random(0), own, 0).answers == ("mark 00xyz",)


@pytest.mark.model
def test_real_tokenizer_and_text():
    from foveate.models import load

    smol = load()[1]
    source = Source.of()
    for name in (*RULER_11, "qa_synth_1", "qa_synth_2"):
        sample, encoded = make(BY_NAME[name], smol, 4096, 0, 0, source)
        assert 4096 * 0.99 <= encoded.tokens + sample.max_new_tokens <= 4096, name
        assert solve(BY_NAME[name], sample) == set(sample.answers), name
        assert len(smol(" " + ", ".join(sample.answers))["input_ids"]) <= sample.max_new_tokens, name
        for (first, last), (a, b) in zip(encoded.needles, sample.needles):
            assert sample.text[a:b] in smol.decode(encoded.ids[first:last]), name
