"""Runs one small case of every kernel family under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize_run.py [--out FILE.json] [--tool memcheck,racecheck] [--only TEXT,TEXT] [--jobs 8]
        [--limit 60] [--budget 100] [--raw]
    python benchmarks/sanitize_run.py --case NAME [--device cpu]     one case by itself, without the sanitizer

Each case is a process. All run plainly first, which compiles their kernels into one folder and shows those that fail by
themselves; then again under each tool, several at a time, with PyTorch's caching allocator off so that every tensor is an
allocation of its own and memcheck sees its end. `--limit` ends a process after so many seconds, `--budget` is the time in
which processes of one tool may begin, in the order of `sanitize_cases.py`. Two cases are faults, "planted" a write past the
end of a tensor (memcheck), "raced" a race (racecheck): a tool that finds nothing there finds nothing elsewhere either, and
the run says so. racecheck's reports about words that Gluon partitions hand over are "known" while the case "handed over" is
reported, too, those about the start of partitions while "partitions" is (`racecheck.py`); all others, and what was cut off,
count, and the file lists them. `--raw` keeps what racecheck printed in FILE.json.d/CASE.txt. Exits with 1 if anything was
found that was not planted or known. Without compute-sanitizer the file says why it is empty.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks import racecheck  # noqa: E402
from benchmarks.sanitize_cases import CASES, HANDED, PLANTED, RACED, SKIPPED, STARTED, run_case  # noqa: E402

from foveate.bench import results  # noqa: E402

FOUND = 86  # exit code of a tool that found something
FAULTS = {"memcheck": PLANTED, "racecheck": RACED}  # what a tool must find
OTHERS = {"memcheck": {RACED, HANDED, STARTED}, "racecheck": {PLANTED}}  # what is not for it
RAW = 200_000  # characters of a case's output to keep


# ---------------------------------------------------------------------- the tool
class Verdict(NamedTuple):
    """What a run of one case came to. state: clean, skipped, failed, out of time, not run, known (races of the `kinds` of
    `racecheck.py` alone), or "N errors". known, unknown: all races, a line for each pair of accesses."""

    state: str
    seconds: float
    first: str = ""
    kinds: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def tool() -> str | None:
    """The path of compute-sanitizer, or None."""
    homes = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    places = [f"{home}/bin" for home in (*homes, "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def version(program: str) -> str:
    """What follows races depends on it."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return next((line.strip() for line in said.splitlines() if line.startswith("Version")), "unknown")


def verdict(code: int, text: str, seconds: float, checked: bool) -> Verdict:
    """Read the exit code and the output of a case, run under a tool (`checked`) or by itself."""
    lines = text.splitlines()
    if code == SKIPPED:
        return Verdict("skipped", seconds, next((x for x in reversed(lines) if x.strip() and "=====" not in x), ""))
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    if checked and summary:
        number = sum(map(int, summary))
        groups, others = racecheck.grouped(racecheck.read(text))
        known = tuple(f"{kernel}: {kind}, {hazards} hazards" for (kernel, kind), hazards in groups.items())
        if unknown := tuple(racecheck.listed(others)):
            return Verdict(f"{number} errors", seconds, "; ".join(unknown[:3]), (), known, unknown)
        if number and known and code in (0, FOUND):
            return Verdict("known", seconds, "; ".join(known), tuple(sorted({kind for _, kind in groups})), known)
        if number:
            found = [x.strip("= ") for x in lines if x.startswith("=========") and x.strip("= ") and "COMPUTE-SAN" not in x]
            return Verdict(f"{number} errors", seconds, "; ".join(found[:3]))
    if code == 0 and (summary or not checked):
        return Verdict("clean", seconds)
    return Verdict("failed", seconds, next((x for x in reversed(lines) if x.strip()), f"exit {code}"))


def keep(path: Path, text: str) -> None:
    """Write what a tool said, the middle cut out where that is long: its last line counts what it found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = RAW // 2
    path.write_text(text if len(text) <= RAW else f"{text[:half]}\n(cut here)\n{text[-half:]}")


def launch(
    command: list[str], env: dict[str, str], limit: float, until: float, checked: bool, raw: Path | None = None
) -> Verdict:
    """Run a command. limit: its seconds; until: when it may begin at the latest; raw: the file that keeps its output."""
    began = time.monotonic()
    if began > until:
        return Verdict("not run", 0.0)
    try:
        done = subprocess.run(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        if raw is not None:
            keep(raw, said)
        return Verdict("out of time", time.monotonic() - began, "; ".join(map(str, racecheck.read(said)[:3])))
    if raw is not None:
        keep(raw, done.stdout)
    return verdict(done.returncode, done.stdout, time.monotonic() - began, checked)


def options(program: str, which: str) -> list[str]:
    """What a tool is told besides."""
    if which != "racecheck":
        return ["--report-api-errors", "no"]
    return racecheck.options(subprocess.run([program, "--help"], capture_output=True, text=True).stdout)


def count(which: str, done: dict[str, Verdict]) -> int:
    """Verdicts of a tool to look at, those that are missing among them."""
    fault, none, bad = FAULTS.get(which), Verdict("", 0), 0
    reported = {HANDED} if "error" in done.get(HANDED, none).state else set()
    if done.get(STARTED, none).state == "known":  # all that was reported is the start of its partitions
        reported.add(STARTED)
    for name, v in done.items():
        if v.state == "known" and (ours := racecheck.unexcused(v.kinds, reported)):
            bad += 1
            print(f"# {name}: no control was reported for {', '.join(ours)}; look at these")
        bad += v.state not in ("clean", "known") and name != fault and not (name == HANDED and "error" in v.state)
    if fault is not None and "error" not in done.get(fault, none).state:
        bad += 1
        print("# the planted fault was not found: the other verdicts mean nothing here")
    return bad


def all_of(names: list[str], which: str | None, program: str, args: argparse.Namespace, cache: str) -> dict[str, Verdict]:
    """Every case under a tool of compute-sanitizer, or (None) plainly."""
    env = {**os.environ, "TRITON_CACHE_DIR": cache, "CUDA_MODULE_LOADING": "LAZY"}
    before: list[str] = []
    if which is not None:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        before = [program, "--tool", which, "--error-exitcode", str(FOUND), *options(program, which)]
    own = [sys.executable, str(Path(__file__).resolve()), "--case"]
    until = time.monotonic() + (args.budget if which is not None else 10 * args.budget)
    with ThreadPoolExecutor(args.jobs) as pool:
        raw = {
            n: Path(f"{args.out}.d", f"{n.replace(' ', '_')}.txt") if args.raw and which == "racecheck" else None
            for n in names
        }
        runs = {n: pool.submit(launch, [*before, *own, n], env, args.limit, until, which is not None, raw[n]) for n in names}
        return {n: run.result() for n, run in runs.items()}


def row(name: str, which: str, v: Verdict) -> results.Row:
    """A verdict as a line of the table and as a row of the file."""
    print(f"{which:<10}{name:<18}{v.state:<14}{v.seconds:6.1f} s  {v.first[:150]}", flush=True)
    more = {"kinds": ", ".join(v.kinds), "known": "; ".join(v.known), "unknown": "; ".join(v.unknown)}
    params = {"state": v.state, "first": v.first[:300], **{what: text for what, text in more.items() if text}}
    return results.Row(name, which, params, results.spread([1e3 * v.seconds]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "sanitize.json")
    parser.add_argument("--tool", "--tools", dest="tools", type=lambda t: t.split(","), default=["memcheck"])
    parser.add_argument("--only", default="", help="cases whose names hold one of these texts, beside those that calibrate")
    parser.add_argument("--raw", action="store_true", help="keep what racecheck printed about each case")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=60, help="seconds of a process")
    parser.add_argument("--budget", type=float, default=100, help="seconds in which processes of a tool may begin")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--device", default="cuda", help="with --case: cpu runs in the interpreter (TRITON_INTERPRET=1)")
    args = parser.parse_args()
    if args.case:
        return run_case(args.case, args.device)
    program = tool()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if program is None or device == "cpu":
        why = "compute-sanitizer is neither on PATH nor in CUDA's folder" if program is None else "no CUDA device"
        print(f"not run: {why}")
        results.write(args.out, results.result("sanitize", [], device, skipped=why))
        return 0
    faults = {f for which in args.tools for f in (*FAULTS.values(), HANDED, STARTED) if f not in OTHERS.get(which, ())}
    names, bad = [n for n in CASES if n in faults or any(only in n for only in args.only.split(","))], 0
    with tempfile.TemporaryDirectory() as cache:
        plain = all_of(names, None, program, args, cache)
        rows = [row(n, "plain", v) for n, v in plain.items()]
        bad += sum(v.state not in ("clean", "skipped") for v in plain.values())
        for which in args.tools:
            some = [n for n in names if plain[n].state == "clean" and n not in OTHERS.get(which, ())]
            done = all_of(some, which, program, args, cache)
            rows += [row(n, which, v) for n, v in done.items()]
            bad += count(which, done)
    results.write(args.out, results.result("sanitize", rows, device, tool=version(program)))
    print("all clean" if not bad else f"{bad} verdicts to look at")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
