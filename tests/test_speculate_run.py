"""The benchmark of speculation cycles, dry: its parts, what it says, and that nothing is recorded while the clock runs."""

from __future__ import annotations

import json

import pytest
from benchmarks import speculate_run, step_run

from foveate.adapters import transformers as adapter
from tests.test_graphs import Dry


def test_a_dry_run_writes_a_cycle_and_its_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(step_run.WAYS, "plain", ("", {"graphs": True}))
    monkeypatch.setattr(adapter, "Graphs", Dry)
    monkeypatch.setattr(step_run, "TINY", step_run.TINY | {"num_hidden_layers": 2})
    out = tmp_path / "speculate.json"
    options = ["--tiny", "--cases", "140x2", "--draft", "3", "--accepted", "1", "--cycles", "2", "--out", str(out)]
    speculate_run.main(options)
    rows = {r["impl"]: r for r in json.loads(out.read_text())["rows"]}
    assert list(rows) == [f"{part}, plain" for part in ("cycle", *speculate_run.PARTS, "verify eager")]
    cycle = rows["cycle, plain"]
    assert cycle["params"]["captures"] == 0 and cycle["params"]["replays"] == 6 and cycle["params"]["verifications"] == 2
    at, gain = ([float(x) for x in cycle["params"][name].split()] for name in ("token_ms_at", "gain_at"))
    assert len(at) == len(gain) == 4 and at[1] == cycle["params"]["token_ms"]
    assert gain[3] == pytest.approx(4 * gain[0], abs=0.01)
    assert cycle["params"]["token_ms"] == pytest.approx(cycle["ms"]["median"] / 2, abs=1e-3)
    parts = sum(rows[f"{part}, plain"]["ms"]["min"] for part in speculate_run.PARTS)
    assert 0 < parts <= cycle["ms"]["max"] and capsys.readouterr().out.count("140 tokens, batch 2") == 6


@pytest.mark.parametrize("options,word", [
    (["--tiny", "--accepted", "9"], "--accepted: expected 0 to 8"), (["--tiny", "--cycles", "80"], "--cycles"),
    (["--ways", "graph"], "--ways: expected some of graphs, compiled, tuned, plain, got graph"),
])  # fmt: skip
def test_refusals(options, word, capsys):
    with pytest.raises(SystemExit):
        speculate_run.main(options)
    assert word in capsys.readouterr().err
