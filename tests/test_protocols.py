"""How samples are put to a model: against plain transformers, against each other, and in batches."""

from __future__ import annotations

import pytest
import torch

from foveate.adapters.transformers import use
from foveate.errors import ConfigError
from foveate.evals import protocols
from foveate.evals.protocols import Reader, ask
from foveate.evals.task import Sample, Turn, encode
from tests.tiny import save_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from foveate.models import load

    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return load(str(folder), device="cpu", dtype="fp32")


def sample(words: int, answer: str = "~~", turns: tuple[Turn, ...] = (), new: int = 12) -> Sample:
    text = " ".join(f"w{i % 7}x{i % 5}" for i in range(words)) + " What is it?"
    return Sample(text, text.index("What"), (answer,), ((0, 4),), new, prefix="It is", turns=turns)


def encoded(tokenizer, *samples: Sample):
    return [(s, encode(tokenizer, s)) for s in samples]


def plain(model, tokenizer, ids: list[int], new: int) -> str:
    """The greedy answer of transformers itself, one row, no cache of ours."""
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                         max_new_tokens=new, do_sample=False)  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("protocol", ["seen", "unseen", "chunked"])
def test_dense_gives_what_plain_transformers_gives(loaded, protocol):
    model, tokenizer = loaded
    batch = encoded(tokenizer, sample(30), sample(37), sample(8))
    want = [plain(model, tokenizer, e.ids, 12) for _, e in batch]
    with use(model, "dense"):
        got = ask(model, tokenizer, batch, "all", protocol, chunk=50)
    assert [a.texts[0] for a in got] == want
    assert [a.texts[0] for a in ask(model, tokenizer, batch, "all", protocol, chunk=50)] == want  # without a recipe


def test_a_full_score_ends_an_answer_early_and_alone(loaded):
    model, tokenizer = loaded
    long = plain(model, tokenizer, encode(tokenizer, sample(30)).ids, 24)
    early = sample(30, answer=long[:2], new=24)
    batch = encoded(tokenizer, early, sample(30, new=24))
    with use(model, "dense"):
        first, second = ask(model, tokenizer, batch, "all", "seen")
        alone = ask(model, tokenizer, batch[:1], "all", "seen")[0]
    assert first.score == 1.0 and len(first.texts[0]) < len(long)
    assert second.score == 0.0 and second.texts[0] == long
    assert alone.texts == first.texts


def test_unseen_compresses_before_the_question_and_only_then(loaded):
    model, tokenizer = loaded
    (pair,) = encoded(tokenizer, sample(40))
    _, e = pair
    lengths = []
    with use(model, "cache=snapkv:capacity=24,window=8") as handle:
        reader = Reader(model, tokenizer, 1, lambda tokens: None)
        reader.read([e.ids[: e.question_at]])
        reader.compress()
        lengths.append(reader.cache.layers[0].cache.store.lens[0][0])
        last = reader.read([e.ids[e.question_at :]])
        reader.keep()
        reader.generate(last, 4, [("~~",)], "all")
        lengths.append(reader.cache.layers[0].cache.store.lens[0][0])
        seen = Reader(model, tokenizer, 1, lambda tokens: None)
        seen.generate(seen.read([e.ids]), 4, [("~~",)], "all")
        assert handle.notes is not None
    asked = len(e.ids) - e.question_at
    assert lengths == [24, 24 + asked + 3]
    assert seen.cache.layers[0].cache.store.lens[0][0] == 24 + 3


def test_turns_go_on_in_the_same_cache(loaded):
    model, tokenizer = loaded
    turn = Turn("And what else?", "Also", ("~~",))
    (pair,) = encoded(tokenizer, sample(30, turns=(turn, turn)))
    with use(model, "dense"):
        got = ask(model, tokenizer, [pair], "all", "turns")[0]
    assert len(got.texts) == 3
    said = got.texts[0][::2]  # this tokenizer puts a space between characters when it decodes
    ids = pair[1].ids + tokenizer(said, add_special_tokens=False)["input_ids"]
    ids += tokenizer("\nAnd what else?\nAlso", add_special_tokens=False)["input_ids"]
    assert got.texts[1] == plain(model, tokenizer, ids, 12)


def test_bad_protocols_are_one_line(loaded):
    with pytest.raises(ConfigError, match="unknown 'sen'; did you mean 'seen'"):
        protocols.check_protocols(["sen"])
    with pytest.raises(ConfigError, match="at least one"):
        protocols.check_protocols([])
