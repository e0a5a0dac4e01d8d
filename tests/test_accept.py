"""How many drafts stand: what a generation counts, what the benchmark makes of it, and its file."""

from __future__ import annotations

import pytest
import torch
from benchmarks import accept_run

import foveate
from foveate import speculate
from foveate.bench import results
from foveate.speculate import loop
from tests.models import tiny, tokens

RECIPE = "decode=streaming_llm:sink=1,window=41"
SMALL = ["--model", "needle", "--device", "cpu", "--dtype", "fp32", "--lengths", "300", "--samples", "1", "--new", "14",
         "--least", "24", "--shares", "0.1"]  # fmt: skip
PILLAR = "pillar_attn:draft={draft},ratio={share},least={least}"


# ---------------------------------------------------------------------- counts
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_cycles_say_what_stood(rows):
    """Of every cycle, by what the tokens of two models say: drafts from sparse steps, against the dense sequence."""
    model, ids, stats = tiny(num_hidden_layers=2), tokens(rows, 40), speculate.Stats()
    options = dict(max_new_tokens=21, do_sample=False, pad_token_id=0, eos_token_id=None)
    drafted, forward = [], loop.Loop._draw
    with pytest.MonkeyPatch.context() as patch, foveate.use(model, RECIPE):
        patch.setattr(loop.Loop, "_draw", lambda self, s: (drafted.append(out := forward(self, s)), out)[1])
        got = model.generate(ids, custom_generate=speculate.generate, draft=4, stats=stats, **options)
    guesses, at, lengths = iter(drafted), 40, []
    for k, stood in stats.stood:
        one = torch.stack([next(guesses)[0] for _ in range(k)], 1)
        right = got[:, at : at + k]
        same = (one[:, : right.shape[1]] == right).long().cumprod(1).sum(1)
        assert int(same.min()) == min(stood, right.shape[1])  # what stands behind the last token cannot be seen here
        at += stood + 1
        lengths.append(k)
    assert len(stats.stood) == stats.cycles and lengths[0] == 4 and next(guesses, None) is None
    assert stats.accepted == rows * sum(s for _, s in stats.stood) and stats.drafted == rows * sum(lengths)
    assert len({s for _, s in stats.stood}) > 1 and sum(s + 1 for _, s in stats.stood) >= stats.emitted // rows == 21


def test_a_subclass_is_told_of_every_cycle():
    class Told(speculate.Stats):
        def cycle(self, drafted, stood, rows):
            super().cycle(drafted, stood, rows)
            said.append((drafted, stood, rows))

        def __len__(self):  # an object that is false is still the caller's
            return 0

    model, said, stats = tiny(num_hidden_layers=2), [], Told()
    with foveate.use(model, RECIPE):
        speculate.generate(model, tokens(2, 20), max_new_tokens=6, do_sample=False, eos_token_id=None, draft=3, stats=stats)
    assert said and [s[:2] for s in said] == stats.stood and all(s[2] == 2 for s in said)


def test_what_the_counts_mean():
    costs = (1.0, 2.0, 1.5)
    runs = [([(2, 1), (2, 2), (2, 0), (2, 2)], 9), ([(2, 2), (2, 1), (1, 0)], 6)]
    assert accept_run.judged(*runs[0]) == [(2, 1, False), (2, 2, False), (2, 0, False), (2, 2, False)]
    assert accept_run.judged([(4, 4), (4, 3)], 7) == [(4, 4, False), (4, 2, True)]  # two of the last cycle were emitted
    facts = accept_run.counts(runs, 2, costs)
    assert facts["tokens"] == 15 and facts["cycles"] == 7 and facts["token_cycle"] == 2.14
    assert facts["first"] == 1.5 and facts["full_cycles"] == 4 and facts["accepted"] == 1.25
    assert facts["stood"] == "0:1 1:1 2:2" and facts["reach"] == "0.750 0.500"
    # judged: 1 of 2, 2, 0 of 1, 2; 2, 1 of 2, 0 of 1
    assert facts["each"] == round(8 / 12, 4)
    assert facts["best_8b"] == 1 and facts["at_8b"] == 0.875  # 1.5 * 1.75 / 3; with two 1.5 * 2.25 / 4
    assert accept_run.reckoned([1.0] * 8, (6.3, 13.1, 9.23)) == (8, pytest.approx(9 * 9.23 / 63.5))
    assert accept_run.until([5, 2, 7], [7, 2]) == [5, 2] and accept_run.until([5, 6], [2]) == [5, 6]
    only = accept_run.counts([([(8, 5)], 4)], 8, costs)  # one answer, cut in its first cycle: nothing is known of full ones
    assert only["each"] == 1.0 and "accepted" not in only and "first" not in only


# ---------------------------------------------------------------------- the run
def test_a_run_writes_rows_and_goes_on_where_it_ended(tmp_path, capsys):
    out = tmp_path / "accept.json"
    accept_run.main([*SMALL, "--tasks", "continue,needle_word,vt", "--drafters", PILLAR, "--drafts", "3", "--out", str(out)])
    assert capsys.readouterr().out.count("# 300 tokens, vt left out: task vt") == 1
    data = results.load(out)
    assert data["bench"] == "accept" and data["facts"]["model"] == "needle" and len(data["rows"]) == 4
    by = {(r["case"], r["impl"]): r for r in data["rows"]}
    row = by["300 tokens, continue", "pillar_attn:draft=3,ratio=0.1,least=24, 3 drafts"]["params"]
    assert row["same"] + row["ties"] == 1 and row["wrong"] == 0 and row["drafts"] == 3 and row["way"] == "plain"
    assert row["tokens"] == by["300 tokens, continue", "dense"]["params"]["tokens"]
    assert 1 <= row["token_cycle"] <= 4 and 0 <= row["each"] <= 1 and row["gain"] > 0
    drafters = f"{PILLAR};decode=quest:budget={{budget}},dense_layers=0"
    more = [*SMALL, "--tasks", "continue", "--drafters", drafters, "--drafts", "3", "--out", str(out)]
    accept_run.main([*more, "--seconds", "0"])
    assert "the time is over" in capsys.readouterr().out and results.load(out)["rows"] == data["rows"]
    accept_run.main(more)
    again = results.load(out)["rows"]
    assert again[:4] == data["rows"] and len(again) == 5 and "quest:budget=30" in again[4]["impl"]
    with pytest.raises(SystemExit, match="other settings"):
        accept_run.main([*more, "--new", "9"])


def test_tokens_that_are_not_dense_fail_the_run(tmp_path, monkeypatch):
    """Drafts that all stand are drafts nobody verified."""

    def everything(drafted, target):
        return drafted.new_full((len(drafted),), drafted.shape[1]), torch.cat([drafted, target[:, -1:]], 1)

    monkeypatch.setattr(loop, "match", everything)
    out = tmp_path / "accept.json"
    options = [
        "--tasks",
        "continue",
        "--drafters",
        "decode=streaming_llm:sink=0,window=1",
        "--drafts",
        "3",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit, match="other tokens than dense"):
        accept_run.main([*SMALL, *options])
    assert any(r["params"].get("wrong") for r in results.load(out)["rows"])


@pytest.mark.parametrize("options,word", [
    (["--new", "500"], "--new: expected at most 448"), (["--way", "fast"], "--way: expected auto or one of graphs"),
    (["--costs", "1,2"], "--costs: expected three numbers"),
])  # fmt: skip
def test_refusals(options, word, capsys):
    with pytest.raises(SystemExit):
        accept_run.main(options)
    assert word in capsys.readouterr().err
