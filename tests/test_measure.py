"""The side-by-side measurement on a tiny random model: every figure against what it must be."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from foveate import measure
from foveate.adapters.transformers import use
from foveate.diagnosis import GRID, sample_rows
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout, Part, Parts
from foveate.measure import _busy, _kl, compare
from foveate.payoff import PayOff
from foveate.recipe import Recipe
from tests.tiny import Words, llama, random_prompt

FULL = "streaming_llm:window=400"
SPARSE = "prefill=streaming_llm:sink=4,window=20+decode=streaming_llm:sink=4,window=20"
EVICT = "cache=streaming_llm:sink=4,window=40"
NEW = 5


@pytest.fixture(scope="module")
def result():
    seen = []
    prompt = random_prompt(150, answer="w")
    got = compare(llama(), Words(), prompt, [FULL, SPARSE, EVICT], new_tokens=NEW, progress=lambda w, s: seen.append((w, s)))
    return got, seen


def test_dense_is_first_and_its_own_measure(result):
    dense = result[0].rows[0]
    assert dense.recipe == "dense" and len(result[0].rows) == 4
    assert dense.kl == 0 and dense.same_tokens == dense.same_greedy == dense.tokens == NEW
    assert dense.prefill_density == dense.prefill_computed == dense.decode_density == dense.decode_computed == 1.0
    assert dense.mass == pytest.approx(1.0, abs=1e-6) and dense.decode_mass == pytest.approx(1.0, abs=1e-6)
    assert dense.answered is True


def test_full_budget_agrees_exactly(result):
    dense, full = result[0].rows[:2]
    assert full.kl == pytest.approx(0.0, abs=1e-6) and full.same_tokens == NEW and full.same_greedy == NEW
    assert full.prefill_density == 1.0 and full.decode_density == 1.0
    assert full.mass == pytest.approx(1.0, abs=1e-6) and full.decode_mass == pytest.approx(1.0, abs=1e-6)
    assert full.answer == dense.answer


def test_sparse_densities_are_the_rule_counted_by_hand(result):
    row = result[0].rows[2]
    pairs = sum(len({j for j in range(i + 1) if j < 4 or i - j < 20}) for i in range(150))
    assert row.prefill_density == pytest.approx(pairs / (150 * 151 / 2), abs=1e-9)
    steps = range(150, 150 + NEW - 1)
    assert row.decode_density == pytest.approx(24 * len(steps) / sum(t + 1 for t in steps), abs=1e-9)
    assert row.prefill_computed >= row.prefill_density
    assert 0 < row.mass < 1 and 0 < row.decode_mass < 1
    assert row.kl > 0 and row.kl_max >= row.kl


def test_eviction_counts_against_all_tokens_seen(result):
    dense, row = result[0].rows[0], result[0].rows[3]
    steps = range(150, 150 + NEW - 1)
    assert row.prefill_density == 1.0 and row.mass == pytest.approx(1.0, abs=1e-6)
    assert row.decode_density == pytest.approx(44 * len(steps) / sum(t + 1 for t in steps), abs=1e-9)
    assert row.decode_mass < 1
    assert row.kv_bytes < dense.kv_bytes
    per_layer = 44 * 2 * (8 + 8) * 4 + 44 * 2 * 4  # keys and values of 44 entries, two kv heads of 8; positions int32
    assert row.kv_bytes == 3 * per_layer
    assert any("compresses" in note for note in row.notes)


def test_mass_kept_is_the_softmax_mass_of_named_pairs():
    """Against plain attention probabilities of the model, on the rows the diagnosis samples."""
    from foveate.diagnosis import Diagnosis
    from foveate.recipe import Recipe

    model, prompt = llama(layers=1), random_prompt(90)
    recipe = Recipe.of("prefill=streaming_llm:sink=2,window=7")
    watch = Diagnosis(recipe, None, ((0, 1),), seed=5)
    with use(model, recipe) as handle, torch.no_grad():
        handle.meter = watch
        model(input_ids=prompt.ids, use_cache=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model(input_ids=prompt.ids, output_attentions=True).attentions[0][0]  # [H, N, N]
    i, j = torch.arange(90)[:, None], torch.arange(90)
    named = (j <= i) & ((j < 2) | (i - j < 7))
    rows = sample_rows(90, 5)
    want = (p * named).sum(-1)[:, rows].mean(-1)
    torch.testing.assert_close(watch.mass["prefill"][0][0], want, atol=1e-5, rtol=1e-5)
    picture = watch.pictures[0]
    assert (picture.layer, picture.head) == (0, 1)
    assert picture.kept == pytest.approx(float(want[1]), abs=1e-4)
    cells = torch.tensor(picture.mass)
    assert cells.shape == (GRID, GRID)
    torch.testing.assert_close(cells.sum(-1), torch.ones(GRID), atol=5e-3, rtol=0)
    cell = torch.arange(90) * GRID // 90
    pooled = torch.zeros(GRID, GRID).index_add_(1, cell, p[1, rows])
    torch.testing.assert_close(cells, pooled, atol=1e-3, rtol=0)


def test_a_part_over_the_same_entries_by_number_counts():
    """What duo_attention plans on a GPU over the cache it has cut; parts with keys of their own count for nothing."""
    from foveate.diagnosis import of_entries
    from foveate.methods.base import AttnInput

    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 20, 8)
    kv = KV.dense(k, k, pos=torch.arange(30, 50).expand(1, 2, 20))
    x = AttnInput(q, kv, "decode", 0, 1, 1.0, q_pos=torch.tensor([[49]]))
    near = Layout.static(x.shape, sink=2, window=5)
    counted, other = replace(kv, pos=None), KV.dense(k[:, :, :4], k[:, :, :4])
    ((layout, view),) = of_entries(x, Parts((Part(near, kv=counted), Part(Layout.dense(1, 2, 1, 4), kv=other))))
    assert view is counted and layout.pairs(view).tolist() == [[7, 7]]
    assert of_entries(x, Parts((Part(near, q=q.clone()),))) == [] and of_entries(x, near)[0][1] is kv


def test_numbers_add_up(result):
    for row in result[0].rows:
        assert row.error is None and row.first_token > 0 and row.tokens_per_second > 0 and row.first_token_cpu > 0
        assert 0 <= row.estimator < 1 and 0 <= row.decode_estimator < 1
        assert len(row.head_density) == len(row.head_mass) == 3 and all(len(h) == 4 for h in row.head_mass)
        assert row.backends and row.settings


def test_progress_rises_to_one(result):
    shares = [share for _, share in result[1]]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1.0)
    assert {what.partition(": ")[2] for what, _ in result[1]} == {"warm-up", "timed", "diagnosis"}


def test_json_holds_every_figure_and_no_nan(result):
    data = json.loads(result[0].to_json())
    assert [r["recipe"] for r in data["rows"]] == [r.recipe for r in result[0].rows]
    assert data["rows"][2]["kl"] == result[0].rows[2].kl
    assert data["facts"]["prompt_tokens"] == 150 and torch.__version__.startswith(data["facts"]["versions"]["torch"])
    assert "pictures" not in data["rows"][0]


def test_a_failing_recipe_does_not_stop_the_others(monkeypatch):
    from foveate.methods.streaming_llm import StreamingLLM

    good = StreamingLLM.plan

    def bad(self, x, state):
        if self.window == 13:
            raise RuntimeError("a fault\nin a method")
        return good(self, x, state)

    monkeypatch.setattr(StreamingLLM, "plan", bad)
    got = compare(llama(), Words(), random_prompt(60), ["prefill=streaming_llm:window=13", FULL], new_tokens=2)
    assert got.rows[1].error == "RuntimeError: a fault in a method" and got.rows[1].kl is None
    assert got.rows[2].error is None and got.rows[2].same_tokens == 2
    json.loads(got.to_json())


def test_the_model_is_left_as_it_was():
    model = llama()
    before = model.config._attn_implementation
    compare(model, Words(), random_prompt(60), [FULL], new_tokens=2)
    assert model.config._attn_implementation == before
    with use(model, "dense"):  # a recipe left applied would make this raise
        pass


def test_duplicates_and_dense_are_run_once():
    got = compare(llama(), Words(), random_prompt(40), ["dense", FULL, FULL], new_tokens=2)
    assert [r.recipe for r in got.rows] == ["dense", FULL]


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(new_tokens=1), "new_tokens: expected at least 2"),
        (dict(new_tokens=500), "exceed the model's 512 positions"),
        (dict(recipes=["nope"]), "unknown id 'nope'"),
        (dict(recipes=["cache=quest"]), "cannot serve as cache"),
        (dict(backend="nope"), "unknown name 'nope'"),
    ],
)
def test_bad_input(asked, message):
    with pytest.raises(ConfigError, match=message):
        compare(llama(), Words(), random_prompt(40), **({"recipes": [FULL], "new_tokens": 2} | asked))


def test_kl_against_the_definition():
    a, b = torch.randn(4, 50), torch.randn(4, 50)
    p, q = a.softmax(-1), b.softmax(-1)
    want = torch.stack([(pi * (pi / qi).log()).sum() for pi, qi in zip(p, q, strict=True)])
    torch.testing.assert_close(_kl(a, b), want, atol=1e-5, rtol=1e-5)
    assert float(_kl(a, a).max()) == 0


@pytest.mark.parametrize("n", [1, 2, GRID - 1, GRID, GRID + 1, 1000])
def test_sampled_rows_are_spread_and_end_with_the_last(n):
    rows = sample_rows(n, 3)
    assert len(rows) == min(n, GRID) and rows[-1] == n - 1
    assert (rows[1:] > rows[:-1]).all() and rows[0] >= 0
    assert rows[0] <= math.ceil(n / GRID)


def test_a_busy_machine_is_said_to_be_busy():
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    assert _busy(cpu, 10.0, 9.5 * threads) == [] and _busy(cpu, 0.2, 0.01) == []
    assert "got 30% of its" in _busy(cpu, 10.0, 3.0 * threads)[0]
    assert _busy(torch.device("cuda"), 10.0, 0.1) == []


def test_notes_name_the_length_that_gates_use(monkeypatch):
    """A break-even measured on this device counts, by phase, before the method's own rule."""
    lengths = {"prefill": 900, "decode": 100}
    monkeypatch.setattr(measure, "pay_off", lambda method, phase, device: PayOff(lengths[phase], "measured"))
    said = measure._notes(Recipe.of("minference+quest"), [], 500, [], torch.device("cpu"))
    assert said == ["minference: 500 tokens are below its pay-off length of 900; run anyway"]
