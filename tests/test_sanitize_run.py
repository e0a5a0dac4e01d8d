"""The run under compute-sanitizer, without the tool: how its output is read, what a machine without it is told."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import racecheck
from benchmarks import sanitize_run as run

from foveate.bench import results
from foveate.kernels import gluon
from tests.test_gluon_words import KERNELS, Code, meta

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
DEF, CALL = _line("kernel.py", "def attend_kernel("), _line("kernel.py", "gl.warp_specialize(")
OTHER = _line("private_kernel.py", "def private_kernel(")
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
    ([("Read", DEF, "Write", CALL, 16), ("Read", DEF, "Write", DEF, 26)], "known", (racecheck.CAPTURES,)),
    ([("Write", DEF, "Write", CALL, 7)], "known", (racecheck.CAPTURES,)),
    ([("Read", DEF, "Write", WORDS[0], 7)], "1 errors", ()),  # what starts a partition over its words
    ([("Read", DEF, "Write", _line("kernel.py", "def _consumer("), 7)], "1 errors", ()),  # not the kernel's own line
    ([("Read", DEF, "Write", OTHER, 7)], "1 errors", ()),  # nor this kernel's
    ([("Write", WORDS[0], "Write", WORDS[0], 7)], "1 errors", ()),  # two producers?
    ([("Write", WORDS[0], "Read", PLACES[1], 7)], "1 errors", ()),  # one kind over another
    ([("Write", WORDS[0], "Read", "masks.py:1", 7)], "1 errors", ()),
    ([("Write", WORDS[0], "Read", WORDS[1], 7), ("Write", "walk.py:12", "Read", "walk.py:13", 1)], "2 errors", ()),
])  # fmt: skip
def test_known_races_are_told_from_others(races, state, kinds):
    got = run.verdict(run.FOUND, report(*races), 1.0, True)
    assert (got.state, got.kinds) == (state, kinds)
    if state != "known":
        assert "attend_kernel: " in got.first and "hazards" in got.first and got.unknown


@pytest.mark.parametrize("kernel,kind", [("_started", racecheck.CAPTURES), ("_raced", None), ("_write", None)])
def test_only_kernels_that_start_partitions_have_captures(kernel, kind):
    lines = Path(racecheck.__file__).read_text().splitlines()
    at = next(i for i, line in enumerate(lines, 1) if f"def {kernel}(" in line)
    assert racecheck.Access("Read", kernel, f"racecheck.py:{at}").kind() == kind


def test_all_unknown_races_are_listed_in_groups():
    """Also those behind the third, and known ones beside them; the same pair of another launch is counted, not repeated."""
    races = [("Write", f"walk.py:{i}", "Read", "walk.py:9", i) for i in (1, 2, 3, 4, 1)] + [("Read", DEF, "Write", CALL, 5)]
    got = run.verdict(run.FOUND, report(*races), 1.0, True)
    assert got.state == "6 errors" and len(got.unknown) == 4
    assert "walk.py:1 and Read walk.py:9, 2 hazards, 2 reports" in got.unknown[0]
    params = run.row("gluon lists", "racecheck", got).params
    assert "walk.py:4 and Read walk.py:9, 4 hazards, 1 reports" in params["unknown"]
    assert params["known"] == f"attend_kernel: {racecheck.CAPTURES}, 5 hazards"


def test_raw_output_is_kept(tmp_path, monkeypatch):
    """Of a case that ends and of one that hangs; a long one keeps its end, where the summary is."""
    text, file = report(("Write", "walk.py:1", "Read", "walk.py:9", 3)), tmp_path / "out.json.d" / "case.txt"
    say = [sys.executable, "-c", f"print({text!r}, flush=True)"]
    run.launch(say, {}, 20, time.monotonic() + 10, True, file)
    assert file.read_text().strip() == text.strip()
    monkeypatch.setattr(run, "RAW", 100)
    file.unlink()
    run.launch([*say[:2], say[2] + ";import time;time.sleep(60)"], {}, 2, time.monotonic() + 10, True, file)
    assert file.read_text() == f"{text[:50]}\n(cut here)\n{text[-49:]}\n"


def test_only_the_named_cases_and_those_that_calibrate_run(tmp_path, monkeypatch):
    asked = {}

    def launch(command, env, limit, until, checked, raw=None):
        asked[command[-1], checked] = raw
        return run.Verdict("1 errors" if checked and command[-1] in (run.RACED, run.HANDED) else "clean", 1.0)

    monkeypatch.setattr(run, "launch", launch)
    monkeypatch.setattr(run, "tool", lambda: "true")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.results, "result", lambda *args, **more: {})
    monkeypatch.setattr(run.results, "write", lambda path, data: None)
    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--tool", "racecheck", "--only", "gluon,low", "--raw"])
    assert run.main() == 0
    gluon_cases = {"gluon lists", "gluon private", "gluon backward", "low bits"}
    assert {n for n, checked in asked if checked} == {run.RACED, run.HANDED, run.STARTED} | gluon_cases
    assert {n for n, checked in asked if not checked} == {n for n, checked in asked if checked}
    assert asked["gluon lists", True] == tmp_path / "r.json.d" / "gluon_lists.txt" and asked["gluon lists", False] is None


def test_a_race_without_line_numbers_or_of_unknown_form_counts():
    bare = report(("Write", WORDS[0], "Read", WORDS[1], 7)).replace(f" in {WORDS[0]}", "")
    assert run.verdict(run.FOUND, bare, 1.0, True).state == "1 errors"
    odd = report(("Write", WORDS[0], "Read", WORDS[1], 7)).replace("Write access at", "Write somewhere")
    assert run.verdict(run.FOUND, odd, 1.0, True).state == "1 errors"
    assert run.verdict(1, report(("Write", WORDS[0], "Read", WORDS[1], 7)), 1.0, True).state != "known"  # the case failed


@pytest.mark.parametrize("raced,handed,started,state,kinds,bad", [
    ("1 errors", "1 errors", "clean", "clean", (), 0),
    ("1 errors", "1 errors", "clean", "known", ("words",), 0),
    ("1 errors", "clean", "known", "known", ("words",), 1),  # the tool follows such orders, and does not see this one
    ("1 errors", "clean", "clean", "known", ("cleaned keys",), 0),
    ("1 errors", "clean", "known", "known", (racecheck.CAPTURES,), 0),
    ("1 errors", "1 errors", "known", "known", (racecheck.CAPTURES, "words"), 0),
    ("1 errors", "1 errors", "clean", "known", (racecheck.CAPTURES,), 1),
    ("1 errors", "1 errors", "2 errors", "clean", (), 1),  # partitions that start, and something else
    ("1 errors", "1 errors", "failed", "known", (racecheck.CAPTURES,), 2),  # a control that did not run excuses nothing
    ("1 errors", "out of time", "known", "known", ("words",), 2),
    ("clean", "1 errors", "known", "clean", (), 1),  # a tool that finds nothing
    ("1 errors", "1 errors", "known", "3 errors", (), 1),
    ("1 errors", "1 errors", "known", "out of time", (), 1),
    ("1 errors", "1 errors", "known", "not run", (), 1),
])  # fmt: skip
def test_what_counts_under_racecheck(raced, handed, started, state, kinds, bad):
    v = {run.RACED: raced, run.HANDED: handed}
    done = {n: run.Verdict(x, 1.0) for n, x in v.items()} | {"gluon lists": run.Verdict(state, 1.0, "", kinds)}
    done[run.STARTED] = run.Verdict(started, 1.0, "", (racecheck.CAPTURES,) if started == "known" else ())
    assert run.count("racecheck", done) == bad


# ---------------------------------------------------------------------- the start of partitions, in PTX
ORDERED = {"st": {0, 3}, "ld": {1, 4, 7}, "other": set(), "ret": {1, 4, 7}}  # 4 and 7: worker warps begin again


def epochs(ptx):
    """{"st": .., "ld": .., "other": ..}: how many barriers of the whole CTA a thread may have passed at each access of
    shared memory that has a line of kind `CAPTURES`; "ret": and at the end, wherever a jump into a partition may lead.

    Such barriers name no number of threads, so the k-th that one thread passes is the k-th of all. Two accesses with
    different counts are ordered.
    """
    files = {i: Path(name).name for i, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    name = re.search(r"\.entry (\w+)", ptx)[1]
    code = Code(re.sub(r"^\s*\.loc\s+(\d+) (\d+) .*$", r"loc \1 \2;", ptx, flags=re.M))
    assert {x for x in code.text if re.search(r"\bbar(rier)?\.sync\s+1\b", x)} == {"barrier.sync \t1;"}
    at, where = "", []
    for text in code.text:
        if found := re.match(r"loc (\d+) (\d+);", text):
            at = f"{files[found[1]]}:{found[2]}"
        where.append(at)
    passed = {"st": set(), "ld": set(), "other": set(), "ret": set()}
    todo, seen = [(0, 0)], set()
    while todo:
        i, k = todo.pop()
        if (i, k) in seen or k > 7:
            continue
        seen.add((i, k))
        text = code.text[i]
        touches = re.search(r"\.shared|matrix|cp\.async", text)
        if touches and racecheck.Access("", name, where[i]).kind() == racecheck.CAPTURES:
            passed[text[:2] if re.match(r"(st|ld)\.shared", text) else "other"].add(k)
        if text == "ret;":
            passed["ret"].add(k)
        k += text == "barrier.sync \t1;"
        todo += [(j, k) for j in code.after[i]]
    return passed


def compiled(kernel):
    if (why := gluon._missing()) is not None:
        pytest.skip(why)
    from foveate.kernels.gluon.shim import compile_sm90

    return compile_sm90(*kernel()).asm["ptx"]


def _control():
    return racecheck._started, (meta(4, 288), meta(4)), dict(num_warps=4, maxnreg=168)


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "private"] + ["control"])
def test_the_start_of_partitions_is_ordered(name):
    """Stored before the first barrier and behind the third, loaded behind the second of each start; nothing in between."""
    ptx = compiled(KERNELS.get(name, _control))
    assert epochs(ptx) == ORDERED
    if name != "control":
        return
    assert re.search(r"st\.shared\.b32 \s*\[global_smem\S*\], %r", ptx)  # it has captures, too
    # Faults planted in the PTX: any barrier left out, a barrier of some warps, an access while partitions work.
    lines = ptx.splitlines()
    barriers = [i for i, x in enumerate(lines) if "barrier.sync" in x]
    for i in barriers:
        assert epochs("\n".join(lines[:i] + lines[i + 1 :])) != ORDERED, f"barrier {i} is not needed"
    assert len(barriers) > 8
    with pytest.raises(AssertionError):
        epochs(ptx.replace("barrier.sync \t1;", "barrier.sync \t1, 128;", 1))
    work = next(i for i, x in enumerate(lines) if "st.global" in x)
    start = next(i for i, x in enumerate(lines) if "st.shared" in x)
    label = next(x for x in reversed(lines[:start]) if x.strip().startswith(".loc"))
    assert 2 in epochs("\n".join([*lines[:work], label, lines[start], *lines[work:]]))["st"]


def test_options_follow_the_version():
    assert "--racecheck-indirect-barrier-dependency" in racecheck.options("... --racecheck-indirect-barrier-dependency arg")
    assert "--racecheck-indirect-barrier-dependency" not in racecheck.options("newer ones follow by default")


def test_a_case_that_cannot_run_here_says_so():
    done = subprocess.run(
        [sys.executable, Path(run.__file__), "--case", "gluon lists", "--device", "cpu"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (run.SKIPPED, "needs a Hopper GPU"), done.stderr
