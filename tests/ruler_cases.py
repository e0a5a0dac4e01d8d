"""For the tests of RULER: text and data files that never change, a tokenizer, and solvers that read the text alone."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.evals import ruler
from foveate.evals.ruler import synth
from foveate.evals.ruler.niah import Niah
from foveate.evals.task import make
from foveate.evals.text import Source

TASKS = (*ruler.TASKS, *synth.TASKS)
BY_NAME = {t.name: t for t in TASKS}
SMALL = {"vt": 1024, "cwe": 1024, "niah_multikey_3": 1024}  # 512 has no room for these
CASES = [(t.name, n) for t in TASKS for n in (SMALL.get(t.name, 512), 4096)]


def words_of(count: int, ending: str, rng: random.Random) -> tuple[str, ...]:
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randrange(2, 4))) + ending] = None
    return tuple(made)


def write_data(folder: Path) -> dict[str, Path]:
    """Tiny files in the forms of SQuAD 2.0 and HotpotQA."""
    rng = random.Random(7)
    words = words_of(300, "n", rng)

    def about(what: str) -> str:
        said = [f"{rng.choice(words)} {rng.choice(words)} and {rng.choice(words)}." for _ in range(4)]
        return " ".join([*said[:2], what, *said[2:]])

    articles = []
    for a in range(4):
        paragraphs = []
        for p in range(5):
            qas = [
                {
                    "question": f"What is the mark of stone {a}{p}? ",
                    "is_impossible": False,
                    "answers": [{"text": f"mark {a}{p}x", "answer_start": 0}, {"text": f"mark {a}{p}x", "answer_start": 0}],
                },
                {"question": "Unanswerable?", "is_impossible": True, "answers": []},
            ]
            paragraphs.append({"context": about(f"Stone {a}{p} has mark {a}{p}x."), "qas": qas})
        articles.append({"title": f"T{a}", "paragraphs": paragraphs})
    squad = folder / "squad.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")

    questions = []
    for q in range(6):
        context = [
            [f"Person {q}", [about(f"Person {q} lives in place {q}."), " More."]],
            [f"Place {q}", [about(f"The colour of place {q} is hue {q}y.")]],
            *([f"Other {q}{i}", [about("Nothing.")]] for i in range(3)),
        ]
        facts = [[f"Person {q}", 0], [f"Place {q}", 0]]
        asked = f"What is the colour of the place of person {q}?"
        questions.append(
            {"_id": str(q), "question": asked, "answer": f"hue {q}y", "context": context, "supporting_facts": facts}
        )
    hotpot = folder / "hotpot.json"
    hotpot.write_text(json.dumps(questions), encoding="utf-8")
    return {"qa_1": squad, "qa_2": hotpot}


@functools.cache
def tokenizer():
    """Up to five letters, a digit, a mark or a white space is a token; enough to count and to locate."""
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]{1,5}|\d| ?[^\sA-Za-z\d]|\s"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def source_with(files: dict[str, Path]) -> Source:
    rng = random.Random(3)
    nouns, adjectives, verbs = words_of(3000, "", rng), words_of(900, "y", rng), words_of(900, "ken", rng)
    prose: list[str] = []
    while len(prose) < 3000:
        sentence = [rng.choice(nouns) for _ in range(rng.randrange(5, 15))]
        prose += [*sentence[:-1], sentence[-1] + "."]
    return Source(nouns, adjectives, verbs, tuple(prose), "test words", files)


def all_fingerprints(folder: str) -> dict[str, str]:
    source = source_with(write_data(Path(folder)))
    digests = {name: hashlib.sha256() for name in BY_NAME}
    for name, length in CASES:
        for index in (0, 1):
            sample, encoded = make(BY_NAME[name], tokenizer(), length, index, 0, source)
            turns = [[t.question, t.prefix, t.answers] for t in sample.turns]
            seen = [sample.text, sample.prefix, sample.answers, sample.needles, sample.question_at, sample.meta, turns]
            digests[name].update(json.dumps([*seen, encoded.ids, encoded.question_at, encoded.needles]).encode())
    return {name: digest.hexdigest()[:16] for name, digest in digests.items()}


# ------------------------------------------------------------------ solvers: the answers from the text alone
def last_prompt(sample) -> str:
    """The text after the worked example, if there is one."""
    starts = ("Memorize and track", "Below is a numbered list")
    return sample.text[max(0, *(sample.text.rfind(s) for s in starts)) :]


def solve_niah(sample, question: str) -> set[str]:
    keys = re.search(r" for (.+) mentioned in the provided text\?$", question)[1]
    held = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.text)
    return {value for key, value in held if key in re.split(r", and |, ", keys)}


def solve_vt(sample) -> set[str]:
    text = last_prompt(sample)
    wanted = re.search(r"assigned the value (\d+) in", text)[1]
    memory: dict[str, str] = {}
    for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", text, flags=re.M):
        memory[name] = memory.get(value, value)
    return {name for name, value in memory.items() if value == wanted}


def solve_cwe(sample) -> set[str]:
    counted = Counter(re.findall(r"\d+\. (\S+)", last_prompt(sample))).most_common(11)
    assert counted[9][1] > counted[10][1]
    return {word for word, _ in counted[:10]}


def solve_fwe(sample) -> set[str]:
    counted = Counter(sample.text.split("coded words. ")[1].split("\n")[0].split()).most_common(5)
    counts = [n for _, n in counted]
    assert counts == sorted(set(counts), reverse=True) and counted[0][0] == "..."
    return {word for word, _ in counted[1:4]}


def solve_documents(sample) -> set[str]:
    text, question = sample.text[: sample.question_at], sample.text[sample.question_at :]
    if stone := re.search(r"stone (\d+)\?", question):
        return set(re.findall(rf"Stone {stone[1]} has (mark \w+)\.", text))
    if person := re.search(r"of person (\d+)\?", question):
        place = re.search(rf"Person {person[1]} lives in (place \d+)\.", text)[1]
        return set(re.findall(rf"The colour of {place} is (hue \w+)\.", text))
    who = re.search(r"[A-Z][a-z]{6} [A-Z][a-z]{6}", question)[0]
    if question.startswith("Question: In which city"):
        company = re.search(rf"{who} works for the company (\w+)\.", text)[1]
        return set(re.findall(rf"The company {company} has its seat in the city of (\w+)\.", text))
    kinds = {
        "town": rf"{who} was born in the town of (\w+)",
        "company": rf"{who} works for the company (\w+)",
        "sister": rf"The sister of {who} is called (\w+)",
        "dog": rf"{who} has a dog by the name of (\w+)",
        "island": rf"{who} wrote a book about the island of (\w+)",
    }
    kind = next(k for k in kinds if k in question)
    return set(re.findall(kinds[kind], text))


def solve(task, sample) -> set[str]:
    if isinstance(task, Niah):
        return solve_niah(sample, sample.text[sample.question_at :])
    solvers = {"vt": solve_vt, "cwe": solve_cwe, "fwe": solve_fwe}
    return solvers.get(task.name, solve_documents)(sample)
