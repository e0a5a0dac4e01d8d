"""The needle model: its tokenizer, its training texts against the real tasks, and training itself at toy size."""

from __future__ import annotations

import json
import os
import random
import re
import signal

import numpy as np
import pytest
import torch

from foveate.errors import ConfigError
from foveate.evals.mqar import _short
from foveate.evals.needle_model import artefact, stream, texts
from foveate.evals.needle_model.check import Cases, _case, _start
from foveate.evals.needle_model.ladder import RUNGS, Ladder
from foveate.evals.needle_model.model import Shape, hidden, loss_and_hits
from foveate.evals.needle_model.tokenizer import build, piece
from foveate.evals.needle_model.train import Recipe, train
from foveate.evals.text import NOISE, Source

TINY = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, inner=48)


@pytest.fixture(scope="module")
def source() -> Source:
    """Some hundred words of the lists, and prose that is noise."""
    full = Source.of()
    lists = (_short(words)[:n] for words, n in ((full.nouns, 260), (full.adjectives, 90), (full.verbs, 60)))
    nouns, adjectives, verbs = (tuple(words) for words in lists)
    return Source((*nouns, "ball-point"), adjectives, verbs, tuple(" ".join(NOISE * 60).split()), "words of the tests")


@pytest.fixture(scope="module")
def tokenizer(source):
    return build(source)


# ---------------------------------------------------------------------- tokenizer
CASES = [
    "The grass is green. Here we go.\nThe sky is blue.\n The sun",
    " leading and  double  spaces \n\n and\n  more",
    'quotes "so" and " so ", (brackets) ( wide ), a-b - c -d - -e --f',
    "VAR ABCDE = 12345\nVAR VARAA = VAR ABCDE ",
    "9f3a-0b1c {'x': 1} jalapeño €5 — “q” Don't McX SUV I A",
    "\n",
    "",
    "-\n-",
]


@pytest.mark.parametrize("text", CASES)
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids


def test_decoding_gives_random_texts_back(tokenizer):
    rng, parts = random.Random(0), [*' \n-"(.,:1a', "The", "magic", " number", "VAR", "é", "Zq"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text, repr(text)


def test_a_word_is_one_token_wherever_it_stands(tokenizer, source):
    noun, adjective = source.nouns[3], source.adjectives[2]
    token = tokenizer.convert_tokens_to_ids("▁" + noun)
    for text in (noun, f"The {noun}.", f"\n{noun}", f'"{noun}"', f"{adjective}-{noun}", f"a {adjective}-{noun} is"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(token) == 1, text
    assert len(tokenizer(f" {adjective}-{noun}", add_special_tokens=False)["input_ids"]) == 4  # a real space, three parts


def test_offsets_cover_the_text(tokenizer):
    text = CASES[0] + " for a-b is: 1234567."
    made = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    covered = sorted({i for a, b in made["offset_mapping"] for i in range(a, b)})
    assert covered == list(range(len(text)))
    at = text.index("1234567")
    digits = [t for t, (a, b) in zip(made["input_ids"], made["offset_mapping"]) if a >= at and b <= at + 7]
    assert tokenizer.convert_ids_to_tokens(digits) == ["123", "456", "7"]


def test_the_vocabulary_is_made_not_trained(source, tokenizer):
    again = build(source)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template is None and again.is_fast


# ---------------------------------------------------------------------- texts
@pytest.fixture(scope="module")
def writer(tokenizer, source):
    return texts.Writer(tokenizer, source, random.Random(5))


@pytest.mark.parametrize("kind", texts.SHARES)
@pytest.mark.parametrize("n", [256, 700, 3000])
def test_parts_make_the_tokens_of_the_whole(writer, tokenizer, kind, n):
    """What is put together from tokens is what the tokenizer makes of the same text."""
    for _ in range(3):
        ids = writer.text(kind, n).ids
        assert n * 0.6 < len(ids) <= n
        at = [i for i, t in enumerate(ids) if t == writer.eos]
        for a, b in zip([0, *at], [*at, len(ids)]):
            part = ids[a + 1 : b]
            assert piece(tokenizer, tokenizer.decode(part)) == part if part else True


def shape_of(text: str, source: Source) -> set[str]:
    """The different lines of a text with keys, values and names replaced by marks."""
    words = "|".join(sorted(map(re.escape, (*source.nouns, *source.adjectives, *source.verbs)), key=len, reverse=True))
    for mark, pattern in (
        ("<uuid>", r"[0-9a-f]{8}-[0-9a-f-]{27}"),
        ("<number>", r"\b\d{5,7}\b"),
        ("<key>", rf"\b(?:{words})-(?:{words})\b"),
        ("<name>", r"\b(?!VAR\b)[A-Z]{3,5}\b"),
    ):
        text = re.sub(pattern, mark, text)
    if "partner" in text:
        text = re.sub(rf"(?m)^(?:<key>|{words}) (?:{words})$", "<pair>", text)
        text = re.sub(r"(partners (?:of|are:) )([a-z-]+(?:, | and )?)+(?=[?.\n])", r"\1<words>", text)
    filler = "|".join(map(re.escape, NOISE))
    text = re.sub(rf"(?m)^(?:(?:{filler}) )+(?=One of)", "", text)  # what `make` fills the last per cent with
    return set(text.split("\n"))


@pytest.mark.parametrize(
    "task, kind, answer",
    [
        ("niah_single_1", "noise", " 1234567."),
        ("niah_multikey_2", "needles", " 1234567."),
        ("niah_multikey_3", "uuid", " 12345678-1234-4123-8123-123456789abc."),
        ("mqar", "mqar", " able, bad, cool, dear."),
        ("vt", "vt", " ABCDE FGHIJ KLMNO PQRST UVWXY"),
    ],
)
def test_training_texts_look_like_the_tasks(tokenizer, source, writer, task, kind, answer):
    """Line by line, up to the drawn keys and values, a training text is a real prompt followed by its answer."""
    _start(tokenizer, source, 0)
    case = _case(task, 1400, 0)
    real = shape_of(tokenizer.decode(case.ids, skip_special_tokens=True) + answer, source)
    whole = " ".join(NOISE)
    real = {line for line in real if line in ("", whole) or not whole.startswith(line)}  # without the last line, cut short
    missing = real
    for _ in range(200):
        made = writer.text(kind, 1400 if kind != "vt" else 2000)
        missing = real - shape_of(tokenizer.decode(made.ids, skip_special_tokens=True), source)
        if not missing:
            return
    raise AssertionError(f"missing: {sorted(missing)}")


def test_answers_are_right_and_in_place(writer, tokenizer):
    """Every number asked for stands after its key in the text, in the order of the text."""
    for _ in range(20):
        made = writer.text("needles", 900)
        text = tokenizer.decode(made.ids, skip_special_tokens=True)
        context = text.split("\nWhat ")[0]
        for a, b, kind in made.answers:
            prompt = tokenizer.decode(made.ids[:a]).rsplit("\n", 1)[1]
            keys = re.search(r"for (.*) mentioned", prompt).group(1).replace(", and ", ", ").split(", ")
            want = [v for key in keys for v in re.findall(rf"for {re.escape(key)} is: (\d+)\.", context)]
            got = re.findall(r"\d+", tokenizer.decode(made.ids[a:b]))
            assert got == want and want
            assert made.ids[b - 1] == writer.eos


# ---------------------------------------------------------------------- batches
def test_batches(writer):
    rng = random.Random(1)
    b = stream.batch(writer, 6, 512, rng)
    assert b["ids"].shape == b["pos"].shape == b["weight"].shape == b["answer"].shape == (6, 512)
    assert (b["weight"][b["answer"] > 0] == stream.ANSWER).all()
    assert 0.02 < float((b["weight"] > 0).float().mean()) < 0.6
    kinds = (b["answer"][b["answer"] > 0] % 16 - 1).unique().tolist()
    assert all(0 <= k < len(texts.KINDS) for k in kinds)


def test_positions_reach_far_and_keep_order(writer):
    noise = np.random.default_rng(0)
    many = [stream.positions(512, noise, np.array([60, 100, 300])) for _ in range(400)]
    assert all((np.diff(p) >= 1).all() and p[0] == 0 and p[-1] < stream.POSITIONS for p in many)
    assert sum((p == np.arange(512)).all() for p in many) in range(150, 250)
    assert max(p[-1] for p in many) > 40_000
    assert {int(i) + 1 for p in many for i in np.nonzero(np.diff(p) > 1)[0]} == {60, 100, 300}
    assert (stream.positions(512, noise, np.array([], int)) == np.arange(512)).all()


@pytest.mark.parametrize("kind", texts.SHARES)
def test_positions_jump_between_lines_and_sentences_only(writer, tokenizer, kind):
    """Never inside a needle, a question or an answer."""
    made = writer.text(kind, 700)
    places = stream._places(made, kind, writer)
    assert (len(places) > 3) == (kind != "repeat")
    assert all(made.ids[i - 1] in (writer.nl[0], writer.dot[0]) for i in places)
    if made.soft and kind != "repeat":
        assert max(places) <= min(a for a, _, _ in made.soft)


def test_an_echo_tells_the_value_of_its_key_again(writer, tokenizer):
    for n in (64, 300, 2000):
        made = writer.text("echo", n)
        assert len(made.ids) <= n and len(made.answers) > 1
        for a, b, kind in made.answers:
            assert kind == "echo"
            start = max(i for i in range(a) if made.ids[i] in (writer.nl[0], writer.bos)) + 1
            line = made.ids[start:b]
            seen = any(made.ids[i : i + len(line)] == line for i in range(1, start))
            assert seen, tokenizer.decode(line)


# ---------------------------------------------------------------------- model
@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return TINY.model(tokenizer)


def test_training_forward_is_the_models_own(model, tokenizer):
    ids = torch.randint(4, len(tokenizer), (2, 50), generator=torch.Generator().manual_seed(0))
    pos = torch.arange(50).expand(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(hidden(model, ids, pos), model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
        jumped = hidden(model, ids, pos + 1000 * (pos > 25))
        assert (jumped[:, -1] - hidden(model, ids[:, 26:], pos[:, 26:])[:, -1]).abs().max() > 1e-3  # no border at the jump


def test_hits_count_whole_answers(writer, model):
    """An answer counts if all of its tokens are the most likely ones: checked with a head that knows the next token."""
    b = {k: v.long() if not v.is_floating_point() else v for k, v in stream.batch(writer, 8, 400, random.Random(3)).items()}
    numbers = [sorted({int(x) for x in row[row > 0]}) for row in b["answer"]]
    _, answers, hits = loss_and_hits(model, b)
    assert int(answers.sum()) == sum(map(len, numbers)) > 0 and int(hits.sum()) == 0

    class Oracle(torch.nn.Module):
        def __init__(self, wrong: torch.Tensor | None) -> None:
            super().__init__()
            self.wrong = wrong

        def forward(self, h):
            chosen = b["weight"][:, 1:] > 0
            target = b["ids"][:, 1:].clone()
            if self.wrong is not None:
                target[self.wrong[:, 1:]] = 0
            return torch.nn.functional.one_hot(target[chosen], model.config.vocab_size).float() * 30

    row = next(r for r, found in enumerate(numbers) if found)
    one = torch.zeros_like(b["answer"], dtype=torch.bool)
    one[row, int((b["answer"][row] == numbers[row][0]).nonzero()[0])] = True  # one token of one answer
    kept = model.lm_head
    try:
        for wrong, missing in ((None, 0), (one, 1)):
            model.lm_head = Oracle(wrong)
            _, answers, hits = loss_and_hits(model, b)
            assert int((answers - hits).sum()) == missing
    finally:
        model.lm_head = kept


def test_the_ladder_moves_when_solved_or_late():
    all_kinds = [100.0] * len(texts.KINDS)
    ladder = Ladder(((512, 0.5), (2048, 1.0)))
    for _ in range(30):
        ladder.saw(512, all_kinds, [96.0] * len(texts.KINDS))
    assert not ladder.move(0.2) and ladder.length == 512
    for _ in range(30):
        ladder.saw(512, all_kinds, all_kinds)
    assert ladder.move(0.2) and ladder.length == 2048 and not ladder.move(0.99)
    late = Ladder(((512, 0.5), (2048, 1.0)))
    assert not late.move(0.49) and late.move(0.5) and "out of time" in late.moves[0]
    assert late.solved(2048) == 0.0  # nothing was asked yet


def test_a_rung_asks_for_what_has_room_in_it(writer):
    """What gates a length is trained there, and really has room: else the ladder could only wait for its time to be over."""
    for n, _ in RUNGS:
        assert set(texts.gate(n)) <= set(texts.fitting(n)) <= set(texts.SHARES)
        assert sum(texts.fitting(n).values()) == pytest.approx(1)
        if n > 512:
            continue
        for kind in set(texts.gate(n)):
            assert sum(bool(writer.text(kind, n).answers) for _ in range(20)) > 12, (n, kind)


def test_the_first_weights_look_where_they_should(tokenizer):
    """Heads of the first layer look a few tokens back; in a block said twice, later heads find the first time."""
    torch.manual_seed(0)
    net = Shape().model(tokenizer)
    net.set_attn_implementation("eager")
    ids = torch.randint(400, len(tokenizer), (1, 120))
    ids[0, 60:] = ids[0, :60]
    with torch.no_grad():
        seen = net(ids, output_attentions=True).attentions
    back = [100 - int(seen[0][0, h, 100].argmax()) for h in range(4)]
    assert back == [1, 2, 3, 4]
    assert any(seen[1][0, h, 100, 40] > 0.5 for h in range(8))
    torch.manual_seed(0)
    plain = Shape(begun=False).model(tokenizer)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        assert max(float(a[0, :, 100, 40].max()) for a in plain(ids, output_attentions=True).attentions) < 0.1


# ---------------------------------------------------------------------- training
def small(**more) -> Recipe:
    plan = (("niah_multikey_2", 400, 1),)
    return Recipe(shape=TINY, rungs=((256, 1.0),), tokens=2048, rate=8e-3, warm=5, plan=plan, tick=2.0, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source):
    out, lines = tmp_path_factory.mktemp("needle"), []
    summary = train(out, minutes=0.3, seed=3, device="cpu", say=lines.append, recipe=small(), source=source, workers=0)
    return out, summary, lines


def test_training_learns_and_keeps_the_time(trained):
    out, summary, lines = trained
    assert summary["steps"] > 3 and summary["loss"] < summary["first_loss"] - 0.1
    assert summary["seconds"] < 0.3 * 60 + 60
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["steps"] == summary["steps"] and log[0]["length"] == 256
    assert [row["task"] for row in summary["check"]] == ["niah_multikey_2"]
    assert "| niah_multikey_2 | 400 | 1 |" in (out / "README.md").read_text()


def test_the_folder_is_an_ordinary_model(trained, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = trained[0]
    net, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert net.dtype == torch.bfloat16 and net.config.max_position_embeddings == 65536
    assert words.is_fast and words.chat_template is None
    for text in CASES:
        assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == text


def test_training_goes_on_from_a_folder_and_stops_on_sigterm(trained, tmp_path, source):
    """The first log line raises SIGTERM; weights and log are there all the same, and nothing is checked."""
    sent: list[str] = []

    def say(line: str) -> None:
        if " s, step " in line and not sent:
            sent.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    recipe = small(start=trained[0])
    summary = train(tmp_path, minutes=5, seed=4, device="cpu", say=say, recipe=recipe, source=source, workers=0)
    assert summary["stopped"] and summary["check"] == [] and summary["seconds"] < 200
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "model.safetensors").is_file() and "earlier run" in (tmp_path / "README.md").read_text()
    assert summary["first_loss"] < trained[1]["first_loss"] - 0.1


def test_what_cannot_be_trained_is_refused(tmp_path, source, trained):
    with pytest.raises(ConfigError, match="minutes"):
        train(tmp_path, minutes=0, source=source)
    with pytest.raises(ConfigError, match="wonderwords"):
        train(tmp_path, source=Source(source.nouns, source.adjectives, source.verbs, source.prose, "pseudo-words"))
    with pytest.raises(ConfigError, match="start"):
        artefact.load(tmp_path / "nothing", None)
    with pytest.raises(ConfigError, match="tokens"):
        artefact.load(trained[0], range(7))


def test_workers_give_batches_and_samples(tokenizer, source):
    made = stream.Stream(tokenizer, source, 0, 1024, (256, 512))
    batches = stream.loader(made, 1)
    assert next(batches)["ids"].shape == (2, 256)
    made.length[0] = 512  # heard by the worker at its next batch
    assert (1, 512) in [tuple(next(batches)["ids"].shape) for _ in range(40)]
    cases = Cases((("niah_single_1", 400, 2), ("nonsense", 400, 1)), tokenizer, source, 0, 1)
    for future in cases.futures:
        future.exception(timeout=120)
    got = list(cases)
    assert [c.task for c in got] == ["niah_single_1"] * 2 and got[0].ids != got[1].ids
    assert any("nonsense" in reason for reason in cases.errors())
    cases.close()


# ---------------------------------------------------------------------- what ships
@pytest.mark.skipif(not (artefact.FOLDER / "model.safetensors").is_file(), reason="the weights were not trained yet")
def test_the_shipped_model_finds_a_needle():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foveate.evals.needle_model.check import answer

    net = AutoModelForCausalLM.from_pretrained(artefact.FOLDER, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(artefact.FOLDER)
    assert sum(p.numel() for p in net.parameters()) <= 8_000_000
    assert (artefact.FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    head, question, prefix = texts._forms(False)
    needle = "One of the special magic numbers for happy-zebra is: 4712345."
    lines = [" ".join(NOISE)] * 40
    lines[17] = needle
    kind = {"type": "number", "query": "happy-zebra"}
    text = head.format(**kind) + "\n".join(lines) + "\n" + question.format(**kind) + "\n" + prefix.format(**kind)
    made = answer(net, words(text)["input_ids"], 16, words.eos_token_id)
    assert words.decode(made, skip_special_tokens=True).strip() == "4712345."


# ---------------------------------------------------------------------- the shipped weights, as the evaluation uses them
def test_the_shipped_model_tells_recipes_apart(tmp_path):
    """A small grid: dense answers, a window without the needle does not, a page budget that holds it does."""
    from foveate.evals import run
    from foveate.models import load

    model, own = load("needle", device="cpu", dtype="fp32")
    assert isinstance(model.config.max_position_embeddings, int) and model.config.max_position_embeddings == 65536
    recipes = ["streaming_llm:window=96,sink=4", "quest:budget=512"]
    results = run(model, own, out=tmp_path, name="needle", recipes=recipes, suites=["niah_single_1", "mqar"],
                  lengths=[1536], samples=3, rounds=0, looks=1)  # fmt: skip
    mean = lambda recipe, task: sum(  # noqa: E731
        r.values["score"] for r in results.records if (r.recipe, r.task) == (recipe, task)
    ) / 3  # fmt: skip
    assert mean("dense", "niah_single_1") == 1.0 and mean("dense", "mqar") >= 0.9
    assert mean("quest:budget=512", "niah_single_1") == 1.0
    assert mean("streaming_llm:window=96,sink=4", "mqar") < 0.5
    hit = {r.recipe: r.values["needle_hit"] for r in results.records if r.index == 0 and r.task == "mqar"}
    assert hit["dense"] == 1.0 and hit["streaming_llm:window=96,sink=4"] < 0.5
