"""The benchmark of whole decode steps, as a dry run: its caches, its floor, its file and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from benchmarks import step_run

import foveate
from foveate.bench import results
from foveate.recipe import Recipe
from tests.models import tiny, tokens


def tables():
    path = Path(__file__).parents[1] / "scripts" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_writes_a_result_and_leaves_out_what_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_run, "WARM", 3)
    out = tmp_path / "step.json"
    recipes = (
        "dense; decode=quest:budget=32,dense_layers=0; lserve:budget=64; decode=lserve:assign=even,budget=192,refresh=2"
    )
    step_run.main(["--tiny", "--cases", "300x1,80x2", "--recipes", recipes, "--out", str(out)])
    data = results.load(out)
    assert data["bench"] == "step" and len(data["rows"]) == 2 * 4  # the floor and three recipes; one has no gates
    said = capsys.readouterr().out
    assert said.count("left out: ConfigError: lserve: sparsity=0.5 needs gates") == 2
    by = {(r["case"], r["params"]["recipe"]): r for r in data["rows"]}
    long = "300 tokens, batch 1"
    assert by[long, "dense"]["density"] == 1.0 and by[long, step_run.NOTHING]["density"] is None
    quest = by[long, "decode=quest:budget=32,dense_layers=0"]
    assert quest["density"] == pytest.approx((16 + 301 % 16) / 301)  # one page and the newest one
    assert by[long, "dense"]["params"]["b"] == 1 and by["80 tokens, batch 2", "dense"]["params"]["n"] == 80
    for r in data["rows"]:
        floor = by[r["case"], step_run.NOTHING]["ms"]["median"]
        if r["params"]["recipe"] != step_run.NOTHING:
            assert r["params"]["attention_ms"] == pytest.approx(r["ms"]["median"] - floor, abs=2e-3)
    for r in data["rows"]:  # as if they had been replayed
        r["params"]["graphs"] = 1
    table = tables().step_table(data)
    assert table.count("\n") == 5 and "| `dense` |" in table and "| 0.096 |" in table


def test_a_context_is_what_a_prompt_leaves():
    """Steps over a cache built from entries give what the model gives after it has read them."""
    model, ids, more = tiny(), tokens(2, 50), tokens(2, 6, seed=4)
    with torch.no_grad(), foveate.use(model, "dense") as handle:
        cache = model(ids, use_cache=True).past_key_values
        room = lambda t: torch.nn.functional.pad(t, (0, 0, 0, step_run.ROOM), value=float("nan"))  # noqa: E731
        entries = [tuple(room(t[:, :, :50].clone()) for t in (x.cache.store.k, x.cache.store.v)) for x in cache.layers]
        made = step_run.context(entries, 50, handle)
        for i in range(6):
            want, got = (
                model(input_ids=more[:, i : i + 1], past_key_values=c, use_cache=True).logits for c in (cache, made)
            )
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert (
            made.seen == [56, 56] and entries[0][0].data_ptr() == made.layers[0].cache.store.k.data_ptr()
        )  # nothing copied


def test_the_floor_is_not_attention():
    model, ids = tiny(), tokens(1, 30)
    with torch.no_grad(), foveate.use(model, Recipe(decode=step_run.Nothing())):
        cache = model(ids, use_cache=True).past_key_values
        a = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
    with torch.no_grad(), foveate.use(model, "dense"):
        cache = model(ids, use_cache=True).past_key_values
        b = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert float((a - b).abs().max()) > 1e-3


def test_replayed_steps_of_a_made_context():
    """Over the benchmark's own cache with graphs: all steps replayed, the store not copied."""
    from tests.test_graphs import dry

    model = tiny()
    entries = step_run.memory(model, 2, 60)
    handle = dry(model, "decode=lserve:assign=even,page=8,logical=4,budget=24,sink=8,window=8,share=group")
    cache = step_run.context(entries, 60, handle)
    with torch.no_grad():
        for _ in range(20):
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert handle.graphs.replays >= 17 and not handle.notes and cache.seen == [80, 80]
    assert cache.layers[0].cache.store.k.data_ptr() == entries[0][0].data_ptr()
    handle.remove()


def test_launches_are_told():
    """Eight layers of two kernels with gaps of 1, after one that is no layer's."""
    ran, now = [], 0.0
    for name, us in [("embed", 4.0), *[("norm", 2.0), ("product", 10.0)] * 8]:
        ran.append((now, now + us, name))
        now += us + 1
    said = step_run.told(ran, 8)
    assert said[0].startswith("   0.080 ms     8 launches ( 1.00 a layer) of    10.0 us  product")
    assert said[-2].startswith("   0.016 ms between 17 launches; 0.100 of 0.116 ms busy")
    assert said[-1] == "a layer in its order: product | norm" and len(said) == 5
    assert step_run.told([], 8) == ["the profiler saw no launch"]


def test_more_steps_than_a_context_has_room_for_are_refused(capsys):
    with pytest.raises(SystemExit):
        step_run.main(["--tiny", "--steps", "487"])
    assert "--steps: expected at most 486" in capsys.readouterr().err
