"""The run under compute-sanitizer, without the tool: how its output is read, what a machine without it is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import racecheck
from benchmarks import sanitize_run as run

from foveate.bench import results

HEAD = "========= COMPUTE-SANITIZER\n"
FOUND = HEAD + (
    "========= Invalid __global__ write of size 4 bytes\n"
    "=========     at _past_the_end+0x50\n"
    "========= \n"
    "========= ERROR SUMMARY: 1 error\n"
)
HAZARDS = HEAD + (
    "========= Error: Race reported between Write access and Read access\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
)


@pytest.mark.parametrize("code,text,checked,state", [
    (0, HEAD + "========= ERROR SUMMARY: 0 errors\n", True, "clean"),
    (0, HEAD + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True, "clean"),
    (run.FOUND, FOUND, True, "1 errors"),
    (0, FOUND, True, "1 errors"),  # whatever the exit code says
    (0, HAZARDS, True, "2 errors"),
    (0, "", True, "failed"),  # the tool did not run: no summary
    (0, "", False, "clean"),
    (1, "Traceback ...\nValueError: no", False, "failed"),
    (1, "Traceback ...\n" + HEAD + "========= ERROR SUMMARY: 0 errors\n", True, "failed"),  # the case itself failed
    (run.SKIPPED, "needs a Hopper GPU\n", False, "skipped"),
])  # fmt: skip
def test_verdicts(code, text, checked, state):
    got = run.verdict(code, text, 1.0, checked)
    assert got.state == state
    if text == FOUND:
        assert got.first.startswith("Invalid __global__ write of size 4 bytes; at _past_the_end")
    if state == "skipped":
        assert got.first == "needs a Hopper GPU"


def test_a_process_that_hangs_is_ended():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    assert run.launch(sleep, {}, 0.5, began + 10, True).state == "out of time"
    assert run.launch(sleep, {}, 0.5, began - 1, True).state == "not run"
    assert time.monotonic() - began < 20


def test_a_machine_without_the_tool_is_told_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "tool", lambda: None)
    out = tmp_path / "sanitize.json"
    monkeypatch.setattr(sys, "argv", ["sanitize_run.py", "--out", str(out)])
    assert run.main() == 0
    assert "compute-sanitizer is neither on PATH nor in CUDA's folder" in capsys.readouterr().out
    assert results.load(out)["skipped"] and results.load(out)["rows"] == []


def test_the_table_counts_what_is_not_clean(tmp_path, monkeypatch, capsys):
    """A planted fault that is found is as it should be; one that is not makes the run fail, and so does any other find."""
    out = tmp_path / "sanitize.json"
    monkeypatch.setattr(run, "tool", lambda: "compute-sanitizer")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.results, "result", lambda bench, rows, device, **more: {"rows": rows, **more})
    monkeypatch.setattr(run.results, "write", lambda path, data: None)
    monkeypatch.setattr(sys, "argv", ["sanitize_run.py", "--out", str(out), "--only", "walk"])
    monkeypatch.setattr(run, "version", lambda program: "Version 1")
    for planted, other, code in (("1 errors", "clean", 0), ("clean", "clean", 1), ("1 errors", "2 errors", 1)):
        under = {run.PLANTED: planted, "walk": other, "walk decode": "clean"}

        def all_of(names, which, *_, under=under):
            return {n: run.Verdict(under.get(n, "clean") if which else "clean", 1.0) for n in names}

        monkeypatch.setattr(run, "all_of", all_of)
        assert run.main() == code
    assert "was not found" in capsys.readouterr().out


# ---------------------------------------------------------------------- races
def _line(name, text):
    """file:line of the first line of a Gluon kernel's source that holds `text`."""
    lines = (racecheck.GLUON / name).read_text().splitlines()
    return f"{name}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


WORDS = _line("tile.py", "words.index(line).store"), _line("masks.py", "words.index(i).load")
PLACES = _line("columns.py", "places.index(slot).store"), _line("masks.py", "places.index(slot).load")
SUMS = _line("backward_kernel.py", "sums.index(slot * 2).store"), _line("backward_kernel.py", "sums.index(slot * 2).load")


def report(*races):
    body = "".join(
        f"========= Error: Race reported between {how} access at attend_kernel+0x10 in {first}\n"
        f"=========     and {other} access at attend_kernel+0x20 in {second} [{n} hazards]\n========= \n"
        for how, first, other, second, n in races
    )
    return HEAD + body + f"========= RACECHECK SUMMARY: {len(races)} hazards displayed ({len(races)} errors, 0 warnings)\n"


@pytest.mark.parametrize("races,state,kinds", [
    ([("Write", WORDS[0], "Read", WORDS[1], 7)], "known", ("words",)),
    ([("Write", SUMS[0], "Read", SUMS[1], 7)], "known", ("sums",)),
    ([("Read", WORDS[1], "Write", WORDS[0], 7), ("Write", PLACES[0], "Read", PLACES[1], 1)], "known", ("places", "words")),
    ([("Write", WORDS[0], "Write", WORDS[0], 7)], "1 errors", ()),  # two producers?
    ([("Write", WORDS[0], "Read", PLACES[1], 7)], "1 errors", ()),  # one kind over another
    ([("Write", WORDS[0], "Read", "masks.py:1", 7)], "1 errors", ()),
    ([("Write", WORDS[0], "Read", WORDS[1], 7), ("Write", "walk.py:12", "Read", "walk.py:13", 1)], "2 errors", ()),
])  # fmt: skip
def test_known_races_are_told_from_others(races, state, kinds):
    got = run.verdict(run.FOUND, report(*races), 1.0, True)
    assert (got.state, got.kinds) == (state, kinds)
    if state != "known":
        assert "attend_kernel: Write" in got.first and "hazards" in got.first


def test_a_race_without_line_numbers_or_of_unknown_form_counts():
    bare = report(("Write", WORDS[0], "Read", WORDS[1], 7)).replace(f" in {WORDS[0]}", "")
    assert run.verdict(run.FOUND, bare, 1.0, True).state == "1 errors"
    odd = report(("Write", WORDS[0], "Read", WORDS[1], 7)).replace("Write access at", "Write somewhere")
    assert run.verdict(run.FOUND, odd, 1.0, True).state == "1 errors"
    assert run.verdict(1, report(("Write", WORDS[0], "Read", WORDS[1], 7)), 1.0, True).state != "known"  # the case failed


@pytest.mark.parametrize("raced,handed,state,kinds,bad", [
    ("1 errors", "1 errors", "clean", (), 0),
    ("1 errors", "1 errors", "known", ("words",), 0),
    ("1 errors", "clean", "known", ("words",), 1),  # the tool follows such orders, and does not see this one
    ("1 errors", "clean", "known", ("cleaned keys",), 0),
    ("clean", "1 errors", "clean", (), 1),  # a tool that finds nothing
    ("1 errors", "1 errors", "3 errors", (), 1),
    ("1 errors", "1 errors", "out of time", (), 1),
    ("1 errors", "1 errors", "not run", (), 1),
])  # fmt: skip
def test_what_counts_under_racecheck(raced, handed, state, kinds, bad):
    v = {run.RACED: raced, run.HANDED: handed}
    done = {n: run.Verdict(x, 1.0) for n, x in v.items()} | {"gluon lists": run.Verdict(state, 1.0, "", kinds)}
    assert run.count("racecheck", done) == bad


def test_options_follow_the_version():
    assert "--racecheck-indirect-barrier-dependency" in racecheck.options("... --racecheck-indirect-barrier-dependency arg")
    assert "--racecheck-indirect-barrier-dependency" not in racecheck.options("newer ones follow by default")


def test_a_case_that_cannot_run_here_says_so():
    done = subprocess.run(
        [sys.executable, Path(run.__file__), "--case", "gluon lists", "--device", "cpu"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (run.SKIPPED, "needs a Hopper GPU"), done.stderr
