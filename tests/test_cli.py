"""The command line: what it prints, what it writes, and one line with exit code 2 for everything a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate import cli, models
from foveate.registry import METHODS
from tests.tiny import save_model

TINY = "prefill=streaming_llm:sink=2,window=9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 3)
    return str(path)


def call(*args: str, stdin: str | None = None):
    return CliRunner().invoke(cli.app, list(args), input=stdin)


def complaint(result, code: int = 2) -> str:
    """The one line on stderr."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("foveate: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


# ---------------------------------------------------------------------- what works
@pytest.mark.parametrize("command", [[], ["compare"], ["run"], ["methods"], ["doctor"], ["bench"], ["bench", "decode"]])
def test_help(command):
    got = call(*command, "--help")
    assert got.exit_code == 0 and "Usage" in got.stdout


def test_version():
    got = call("--version")
    assert got.exit_code == 0 and got.stdout == f"foveate {foveate.__version__}\n"


def test_help_needs_no_model_library():
    """Help and errors must come at once: nothing of transformers, matplotlib or the kernels' compilers is imported."""
    code = (
        "import sys, foveate.cli\n"
        "heavy = {'transformers', 'matplotlib', 'jinja2', 'torch._inductor', 'safetensors'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_methods_table_and_json():
    table = call("methods")
    assert table.exit_code == 0 and all(name in table.stdout for name in METHODS)
    assert "Pages ranked by an upper bound" in table.stdout  # what a method does, not only what it is called
    page = call("methods", "quest").stdout
    assert "foveate compare --recipes 'dense; quest@8k'" in page and "Mind that" in page
    assert "Try it" not in call("methods", "dsa").stdout  # needs weights: a command that cannot run is no help
    listed = json.loads(call("methods", "--json").stdout)
    assert [m["id"] for m in listed] == list(METHODS)
    streaming = next(m for m in listed if m["id"] == "streaming_llm")
    assert (
        streaming["options"] == {"sink": 4, "window": 2044, "positions": "text"}
        and streaming["presets"]["8k"]["window"] == 1020
    )
    assert set(streaming["roles"]) == {"prefill", "decode", "cache"} and "2309.17453" in streaming["source"]


def test_doctor():
    got = call("doctor", "--device", "cpu", "--no-test", "--json")
    assert got.exit_code == 0, got.output
    data = json.loads(got.stdout)
    assert data["healthy"] and not data["tested"] and torch.__version__.startswith(data["versions"]["torch"])
    dense = next(s for s in data["served"] if s["sample"] == "prefill, dense")
    assert dense["backend"] == "sdpa"
    assert all(s["backend"] for s in data["served"])
    shown = call("doctor", "--device", "cpu", "--no-test")
    assert shown.exit_code == 0 and "prefill, dense" in shown.stdout and "C++ compiler" in shown.stdout
    assert "Nothing was computed" in shown.stdout and "computes correctly" not in shown.stdout


def test_doctor_finds_a_backend_that_computes_wrongly(monkeypatch):
    from foveate import doctor
    from foveate.kernels import torch_gather

    few = doctor.samples(torch.device("cpu"), torch.float32, n=256)
    monkeypatch.setattr(doctor, "samples", lambda device, dtype: [s for s in few if s.name == "decode, single entries"])
    fine = call("doctor", "--device", "cpu")
    assert fine.exit_code == 0 and "Everything that runs here computes correctly" in fine.stdout
    good = torch_gather.forward
    monkeypatch.setattr(torch_gather, "forward", lambda *a, **k: (good(*a, **k)[0] + 0.01, None, None))
    got = call("doctor", "--device", "cpu")
    assert got.exit_code == 1 and "wrongly" in got.stdout


def test_compare_writes_table_report_and_json(folder, text, tmp_path):
    place = str(tmp_path / "page"), str(tmp_path / "out" / "figures.json")
    got = call("compare", "--model", folder, "-p", text, "-r", TINY, "--recipes", "streaming_llm:window=300 ; dense",
               "--new-tokens", "3", "--dtype", "fp32", "--report", place[0], "--json", place[1])  # fmt: skip
    assert got.exit_code == 0, got.output
    data = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert [r["recipe"] for r in data["rows"]] == ["dense", TINY, "streaming_llm:window=300"]
    assert data["facts"]["prompt"] == "prompt.txt" and data["facts"]["dtype"] == "float32"
    page = (tmp_path / "page" / "index.html").read_text()
    assert "streaming_llm:window=300" in page.replace("<wbr>", "")
    assert "first token" in got.stdout and "KL" in got.stdout


def test_compare_json_on_stdout_is_json_alone(folder, text, tmp_path):
    got = call("compare", "--model", folder, "--prompt", text, "-r", TINY, "--new-tokens", "2", "--dtype", "fp32",
               "--report", str(tmp_path), "--json", "-")  # fmt: skip
    assert got.exit_code == 0, got.output
    assert len(json.loads(got.stdout)["rows"]) == 2


def test_compare_with_a_recipe_that_fails_says_so_and_exits_1(folder, text, tmp_path, monkeypatch):
    from foveate.methods.streaming_llm import StreamingLLM

    def broken(self, x, state):
        raise RuntimeError("a fault")

    monkeypatch.setattr(StreamingLLM, "plan", broken)
    got = call("compare", "--model", folder, "--prompt", text, "-r", TINY, "--new-tokens", "2", "--dtype", "fp32",
               "--report", str(tmp_path))  # fmt: skip
    assert got.exit_code == 1 and "did not run" in got.stdout and "a fault" in got.stdout
    assert "did not run" in (tmp_path / "index.html").read_text()


def test_run_streams_the_same_text_as_generate(folder, text):
    got = call(
        "run", "dense", "--model", folder, "--prompt", text, "--new-tokens", "6", "--dtype", "fp32", "--device", "cpu"
    )
    assert got.exit_code == 0, got.output
    net, tokenizer = models.load(folder, device="cpu", dtype="fp32")
    from foveate.prompts import text_prompt

    ids = text_prompt(tokenizer, Path(text).read_text()).ids
    want = tokenizer.decode(
        net.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert got.stdout.strip() == want.strip()
    assert "first token after" in got.stderr


def test_run_reads_standard_input(folder):
    got = call("run", TINY, "--model", folder, "-p", "-", "--new-tokens", "2", "--dtype", "fp32", stdin="hello there, you")
    assert got.exit_code == 0, got.output
    assert "17 tokens in" in got.stderr


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_bench(folder, tmp_path, monkeypatch, what):
    monkeypatch.setattr("foveate.prompts.essays", lambda: ["some words of an essay. " * 50])
    out = tmp_path / "bench.json"
    got = call("bench", what, "--model", folder, "--tokens", "200", "--rounds", "2", "-r", TINY, "--dtype", "fp32",
               "--json", str(out))  # fmt: skip
    assert got.exit_code == 0, got.output
    from foveate.bench.results import load

    rows = load(out)["rows"]
    assert [r["impl"] for r in rows] == ["transformers sdpa", "dense", TINY]
    assert all(len(r["params"]["samples"]) == 2 and r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"] for r in rows)
    assert next(r for r in rows if r["impl"] == "dense")["params"]["of_dense"] == pytest.approx(1.0)
    assert all(r["impl"] in got.stdout for r in rows)


def test_bench_kernels(tmp_path):
    out = tmp_path / "kernels.json"
    got = call("bench", "kernels", "--device", "cpu", "--lengths", "256", "--rounds", "1", "--against", "sdpa,torch",
               "--json", str(out))  # fmt: skip
    assert got.exit_code == 0, got.output
    rows = json.loads(out.read_text())["rows"]
    assert {r["impl"] for r in rows} == {"sdpa", "torch"}


# ---------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize(
    "args, message",
    [
        (["nope"], "No such command"),
        (["compare", "--nope"], "No such option"),
        (["compare", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["compare", "-r", "quesst"], "did you mean 'quest'"),
        (["compare", "-r", "streaming_llm:windw=3"], "did you mean 'window'"),
        (["compare", "-r", "streaming_llm:window=-3"], "window expected >= 1, got -3"),
        (["compare", "-r", "streaming_llm:window=big"], "window expected int"),
        (["compare", "-r", "streaming_llm@9k"], "unknown preset '9k'"),
        (["compare", "-r", "cache=quest"], "cannot serve as cache"),
        (["compare", "-r", "quest+quest"], "nothing left to do"),
        (["compare", "--recipes", " ; "], "expected at least one recipe"),
        (["compare", "--model", "missing.gguf"], "no file missing.gguf"),
        (["compare", "--model", "./missing"], "no such file or folder"),
        (["compare", "--model", "smollm"], "did you mean 'smollm2'"),
        (["compare", "--device", "tpu"], "device"),
        (["compare", "--device", "cuda:77"], "CUDA devices"),
        (["compare", "--dtype", "bfloat61"], "did you mean 'bfloat16'"),
        (["run", "dense", "--model", "missing.gguf"], "no file missing.gguf"),
        (["run"], "Missing argument"),
        (["run", "nope"], "unknown id 'nope'"),
        (["bench", "prefill", "-r", "nope"], "unknown id 'nope'"),
        (["bench", "kernels", "--device", "cpu", "--lengths", "a,b"], "expected whole numbers"),
        (["bench", "kernels", "--device", "cpu", "--against", "torhc"], "did you mean 'torch'"),
        (["doctor", "--dtype", "int8"], "unknown 'int8'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    assert message in complaint(call(*args))


def test_bad_input_that_needs_the_model(folder, text, tmp_path):
    base = ["compare", "--model", folder, "--dtype", "fp32", "-r", TINY, "--report", str(tmp_path)]
    long = tmp_path / "long.txt"
    long.write_text("word " * 200)
    assert "exceed the model's 512 positions" in complaint(call(*base, "--prompt", str(long)))
    assert "cannot read" in complaint(call(*base, "--prompt", str(tmp_path / "missing.txt")))
    assert "leave it out with --prompt" in complaint(call(*base, "--prompt", text, "--tokens", "100"))
    assert "new_tokens: expected at least 2" in complaint(call(*base, "--prompt", text, "--new-tokens", "1"))
    assert "unknown name 'fast'" in complaint(call(*base, "--prompt", text, "--backend", "fast"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in complaint(call(*base, "--prompt", str(tmp_path / "bytes.txt")))
    (tmp_path / "empty.txt").write_text("")
    assert "expected some text" in complaint(call(*base, "--prompt", str(tmp_path / "empty.txt")))


def test_places_that_cannot_be_written_are_found_before_the_work(folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in complaint(call("compare", "--model", folder, "-r", TINY, "--report", str(file)))
    assert "is a folder" in complaint(call("compare", "--model", folder, "-r", TINY, "--json", str(tmp_path)))


def test_full_disk_keeps_the_old_report(folder, text, tmp_path, monkeypatch):
    import os

    (tmp_path / "index.html").write_text("the old report")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    got = call("compare", "--model", folder, "--prompt", text, "-r", TINY, "--new-tokens", "2", "--dtype", "fp32",
               "--report", str(tmp_path))  # fmt: skip
    line = complaint(got)
    assert "No space left on device" in line and "unchanged" in line
    assert (tmp_path / "index.html").read_text() == "the old report"
    assert not list(tmp_path.glob(".*"))


def test_debug_shows_the_traceback():
    got = call("compare", "-r", "quesst", "--debug")
    assert got.exit_code == 2 and "Traceback" in got.stderr and got.stderr.splitlines()[-1].startswith("foveate: ")


def test_ctrl_c(monkeypatch, folder, text):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", stop)
    assert complaint(call("run", "dense", "--model", folder, "-p", text), 130) == "foveate: stopped"


def test_the_entry_point_exits_with_the_code():
    done = subprocess.run([sys.executable, "-m", "foveate.cli", "compare", "-r", "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and not done.stdout
