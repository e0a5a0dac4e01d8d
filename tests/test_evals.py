"""A whole evaluation on a tiny model: what is written, resumed, refused, and what the numbers say."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from foveate.cli import app
from foveate.errors import ConfigError
from foveate.evals import Results, Source, cells, run
from foveate.evals.results import ResultsError, Store, join
from foveate.evals.scoring import METRICS
from foveate.evals.suites import SUITES, choose, tasks_of
from foveate.evals.task import make
from tests.tiny import llama, save_model

TASKS = ["infinite/passkey", "needle/needle_word"]
RECIPES = ["streaming_llm:window=64,sink=4", "cache=snapkv:capacity=96,window=16"]
QUICK = dict(lengths=[900], samples=3, rounds=1, looks=1, steps=8, batch=2)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return llama(layers=2, positions=2048), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def done(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    results = run(*loaded, out=folder, recipes=RECIPES, suites=[*TASKS, "perplexity", "agreement"],
                  protocols=["seen", "unseen"], name="tiny", **QUICK)  # fmt: skip
    return folder, results


def test_every_cell_is_there_once(done):
    folder, results = done
    keys = [r.key for r in results.records]
    assert len(keys) == len(set(keys))
    tasks = [r for r in results.records if r.suite in SUITES]
    assert len(tasks) == 3 * 2 * 2 * 3  # recipes, tasks, protocols, samples
    assert {r.task for r in results.records} == {"passkey", "needle_word", "perplexity", "agreement", "cost"}
    assert all(0.0 <= r.values["score"] <= 1.0 for r in tasks)
    assert all(0 < r.tokens <= 900 for r in tasks)
    again = Results.load(folder)
    assert [r.key for r in again.records] == keys and again.facts == results.facts


def test_watched_samples_say_what_was_computed(done):
    _, results = done
    looked = {
        (r.recipe, r.task): r.values
        for r in results.records
        if r.index == 0 and r.protocol == "seen" and "score" in r.values
    }
    dense, streaming = (looked[name, "passkey"] for name in ("dense", RECIPES[0]))
    assert dense["density"] == pytest.approx(1.0) and dense["mass"] == pytest.approx(1.0, abs=1e-5)
    assert dense["needle_hit"] == 1.0
    assert streaming["density"] < 0.3 and streaming["mass"] < 1.0
    assert all("density" not in r.values for r in results.records if r.suite in SUITES and r.index > 0)


def test_streams_measure_each_recipe_against_dense(done):
    _, results = done
    kl = {(r.recipe, r.protocol): r.values["kl"] for r in results.records if r.task == "agreement"}
    assert kl["dense", "prefill"] == pytest.approx(0, abs=1e-6)
    assert kl[RECIPES[0], "prefill"] > 1e-4
    assert kl[RECIPES[1], "prefill"] == pytest.approx(0, abs=1e-6) and kl[RECIPES[1], "decode"] > 1e-6
    cost = [r for r in results.records if r.task == "cost" and r.recipe == RECIPES[1]]
    assert cost[0].values["kv_bytes"] < 0.5 * next(
        r.values["kv_bytes"] for r in results.records if r.task == "cost" and r.recipe == "dense"
    )


def test_dense_scores_are_those_of_plain_transformers(loaded, done):
    model, tokenizer = loaded
    _, results = done
    source = Source.of()
    task = choose(["infinite/passkey"])[0][0]
    for index in range(3):
        sample, encoded = make(task, tokenizer, 900, index, 0, source)
        ids = torch.tensor([encoded.ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=sample.max_new_tokens, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        (record,) = [r for r in results.records
                     if (r.recipe, r.task, r.protocol, r.index) == ("dense", "passkey", "seen", index)]  # fmt: skip
        assert record.text == text and record.values["score"] == METRICS[task.metric](text, sample.answers)


def test_a_killed_run_goes_on_where_it_stopped(loaded, done, tmp_path):
    _, whole = done
    stop = 7

    def progress(what: str, share: float) -> None:
        if len(Results.load(tmp_path).records) >= stop:
            raise KeyboardInterrupt

    options = dict(recipes=RECIPES, suites=TASKS, name="tiny", **{**QUICK, "rounds": 0})
    with pytest.raises(KeyboardInterrupt):
        run(*loaded, out=tmp_path, progress=progress, **options)
    before = (tmp_path / "records.jsonl").read_bytes()
    assert before.count(b"\n") >= stop
    with open(tmp_path / "records.jsonl", "ab") as file:
        file.write(b'{"recipe": "dense", "settings"')  # a process killed while it wrote
    results = run(*loaded, out=tmp_path, **options)
    assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
    same = {r.key: (r.text, r.values["score"]) for r in whole.records if r.protocol == "seen" and "score" in r.values}
    assert {r.key: (r.text, r.values["score"]) for r in results.records} == same


def test_other_facts_are_refused_and_nothing_is_touched(loaded, done):
    folder, _ = done
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ResultsError, match="seed 0 there, 1 now"):
        run(*loaded, out=folder, recipes=RECIPES, suites=TASKS, name="tiny", seed=1, **QUICK)
    other = llama(layers=2, positions=2048)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ResultsError, match="weights"):
        run(other, loaded[1], out=folder, recipes=RECIPES, suites=TASKS, name="tiny", **QUICK)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_folders_of_one_evaluation_are_joined(done, tmp_path):
    _, results = done
    facts = {k: v for k, v in results.facts.items() if k != "schema"}
    half = len(results.records) // 2
    for name, records in (("a", results.records[: half + 3]), ("b", results.records[half:])):
        with Store(tmp_path / name, facts) as store:
            for record in records:
                store.add(record)
    whole = join(tmp_path / "whole", [tmp_path / "a", tmp_path / "b"])
    assert [r.key for r in whole.records] == [r.key for r in results.records]
    with Store(tmp_path / "c", {**facts, "dtype": "other"}):
        pass
    with pytest.raises(ResultsError, match="dtype"):
        join(tmp_path / "whole", [tmp_path / "c"])


def test_two_processes_do_not_share_a_folder(tmp_path):
    facts = {"model": "x"}
    with Store(tmp_path, facts), pytest.raises(ResultsError, match="another process"):
        Store(tmp_path, facts)
    Store(tmp_path, facts).__exit__()


def test_a_recipe_that_fails_does_not_lose_the_others(loaded, tmp_path):
    told: list[str] = []
    results = run(*loaded, out=tmp_path, recipes=["minference", "quest"], suites=["infinite/passkey"], name="tiny",
                  backend="sdpa", say=told.append, **{**QUICK, "rounds": 0})  # fmt: skip
    assert {c.recipe for c in cells(results)} >= {"dense"}
    assert any("sdpa" in text for text in told)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(suites=["rular"]), "suites: unknown 'rular'; did you mean 'ruler'"),
        (dict(suites=["ruler/vtt"]), "ruler has no task 'vtt'; did you mean 'vt'"),
        (dict(suites=[]), "at least one suite"),
        (dict(samples=0), "samples: expected at least 1, got 0"),
        (dict(lengths=[4096]), "lengths: 4096 is beyond the model's 2048 positions"),
        (dict(lengths=[]), "lengths: expected at least one"),
        (dict(lengths=[40]), "shortest sample takes"),
        (dict(protocols=["sen"]), "did you mean 'seen'"),
        (dict(recipes=["flexprefil"]), "did you mean 'flexprefill'"),
        (dict(suites=["qa_1"]), "qa_1"),
        (dict(batch=0), "batch: expected at least 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(loaded, tmp_path, change, message):
    options = dict(recipes=RECIPES, suites=TASKS, name="tiny", **QUICK) | change
    with pytest.raises(ConfigError, match=message) as err:
        run(*loaded, out=tmp_path / "out", **options)
    assert "\n" not in str(err.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_spell_answers_is_refused(loaded, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "e": 2, " ": 3}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    poor = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    with pytest.raises(ConfigError, match="cannot spell the answers of passkey"):
        run(loaded[0], poor, out=tmp_path, recipes=[], suites=["passkey"], name="tiny", **QUICK)


def test_all_task_names_differ():
    names = [t.name for s in SUITES for t in tasks_of(s)]
    assert len(names) == len(set(names))
    assert all(t.suite == s and t.metric in METRICS for s in SUITES for t in tasks_of(s))


def test_the_commands(tmp_path):
    save_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    out = tmp_path / "out"
    model = ["--model", str(tmp_path / "model"), "--device", "cpu", "--dtype", "fp32"]
    what = ["--recipes", RECIPES[0], "--suites", "passkey", "--lengths", "900", "--samples", "2", "--rounds", "1"]
    word = ["eval", *model, *what, "--out", str(out)]
    first = CliRunner().invoke(app, word)
    assert first.exit_code == 0, first.output
    lines = (out / "records.jsonl").read_bytes()
    second = CliRunner().invoke(app, word)
    assert second.exit_code == 0 and (out / "records.jsonl").read_bytes() == lines
    assert (out / "index.html").exists()
    front = CliRunner().invoke(app, ["frontier", "--out", str(out), "--summary", str(tmp_path / "eval_tiny.json")])
    assert front.exit_code == 0, front.output
    assert "900 tokens" in front.output and "NLL delta" not in front.output  # the files have all columns
    assert all((out / f"frontier.{kind}").exists() for kind in ("md", "csv", "json"))
    chosen = CliRunner().invoke(app, ["recommend", "--out", str(out), "--length", "900"])
    assert chosen.exit_code == 2  # a random model does not answer: no task counts
    empty = CliRunner().invoke(app, ["frontier", "--out", str(tmp_path / "nothing")])
    assert empty.exit_code == 2
