"""The bridge to lm-evaluation-harness: its own tasks under a recipe, and our results in its form."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from foveate.evals.results import Results
from tests.eval_records import evaluation
from tests.tiny import llama, save_model

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the eval extra)")

TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return llama(layers=2, positions=1024), AutoTokenizer.from_pretrained(folder)


def score(loaded, folder, recipe: str, kind: str):
    """(metrics, samples) of a task with two questions, one of them long, in one padded batch."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from foveate.evals.lm_eval import FoveateLM

    rows = [{"question": "abcd " * 60 + "why?", "answer": "so"}, {"question": "what is it?", "answer": "no"}]
    (folder / "data.json").write_text("\n".join(json.dumps(row) for row in rows))
    output, more = {
        "generate": (
            "generate_until",
            "generation_kwargs: {until: ['@@'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]",
        ),
        "likelihood": ("loglikelihood", "metric_list: [{metric: perplexity}]"),
    }[kind]  # fmt: skip
    (folder / f"{kind}.yaml").write_text(TASK.format(kind=kind, file=folder / "data.json", output=output, more=more))
    model = FoveateLM(loaded[0], recipe=recipe, tokenizer=loaded[1], batch_size=2)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    name = f"tiny_{kind}"
    got = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True)
    return got["results"][name], got["samples"][name]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_generation_runs_under_the_recipe(loaded, tmp_path):
    model, tokenizer = loaded
    answers = {}
    for recipe in ("dense", "streaming_llm:window=24,sink=2"):
        _, samples = score(loaded, tmp_path, recipe, "generate")
        answers[recipe] = {s["doc"]["question"]: s["resps"][0][0] for s in samples}
    for question, answer in answers["dense"].items():
        ids = torch.tensor([tokenizer(question)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    sparse = answers["streaming_llm:window=24,sink=2"]
    assert sparse["what is it?"] == answers["dense"]["what is it?"]  # shorter than the window
    assert sparse != answers["dense"]


def test_likelihoods_see_the_prefill_and_warn_for_decode(loaded, tmp_path, caplog):
    found = {}
    with caplog.at_level(logging.WARNING, logger="foveate"):
        for recipe in ("dense", "streaming_llm:window=24,sink=2", "quest:budget=32,page=16"):
            caplog.clear()
            metrics, _ = score(loaded, tmp_path, recipe, "likelihood")
            found[recipe] = metrics["perplexity,none"]
            assert ("measure dense attention" in caplog.text) == recipe.startswith("quest")
    dense, sparse, quest = found.values()
    assert quest == pytest.approx(dense, rel=1e-5) and sparse != pytest.approx(dense, rel=1e-4)


def test_our_results_in_the_harness_form():
    from foveate.evals.lm_eval import export
    from foveate.evals.statistics import cells

    results: Results = evaluation()
    recipe = next(c.recipe for c in cells(results) if c.recipe != "dense")
    data = json.loads(json.dumps(export(results, recipe)))
    mine = [c for c in cells(results) if c.recipe == recipe]
    assert set(data["results"]) == {c.task for c in mine}
    for c in mine:
        assert data["results"][c.task][f"{c.length},{c.protocol}"] == c.mean
    assert data["config"]["model_args"]["recipe"] == recipe
