"""What the pages say is true: generated parts are fresh, code blocks run, the worked example is a method."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foveate
from foveate import registry
from foveate.evals.frontier import write_summary
from tests.drive import Drive, oracle, qkv
from tests.eval_records import evaluation
from tests.models import tiny, tokens

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def test_generated_pages_are_fresh():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "render.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def render(tmp_path, monkeypatch):
    """scripts/render.py over a folder of its own, with one evaluation and one comparison in it."""
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    shutil.copy(ROOT / "benchmarks" / "results" / "cpu_compare.json", tmp_path / "results")
    write_summary(evaluation(lengths=(4096,), samples=6), tmp_path / "results" / "eval_made_up.json")
    return module


def test_an_evaluation_is_rendered_with_its_drawing(render, tmp_path):
    pages = render.render()
    page, figure = pages[ROOT / "BENCHMARKS.md"], tmp_path / "figures" / "eval_made_up.svg"
    assert "## eval_made_up" in page and "Protocol unseen:" in page and "| ruler/easy |" in page
    assert "](benchmarks/figures/eval_made_up.svg)" in page and pages[figure].startswith("<svg")
    assert "## cpu_compare\n" in page and "holds the fact" in page  # the others are rendered as before


def test_a_drawing_is_redone_only_when_its_figures_change(render, tmp_path):
    figure = tmp_path / "figures" / "eval_made_up.svg"
    figure.parent.mkdir()
    made = render.render()[figure]
    figure.write_text(made.replace("<svg", "<svg data-by='another matplotlib'", 1))
    assert render.render()[figure] == figure.read_text()  # same figures: what is there is fresh
    write_summary(evaluation(lengths=(4096,), samples=7), tmp_path / "results" / "eval_made_up.json")
    assert render.render()[figure] not in (made, figure.read_text())


@torch.no_grad()
def test_readme_examples_run(tmp_path, monkeypatch):
    """Every python block of the README, in order and in one namespace, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    ids = tokens(1, 60)
    q, k, v = qkv(1, 8, 2, 4096)
    scope = dict(
        model=tiny(),
        inputs=dict(input_ids=ids, max_new_tokens=3, pad_token_id=0),
        document=dict(input_ids=ids),
        question=dict(input_ids=torch.cat([ids, tokens(1, 5, seed=1)], 1), max_new_tokens=3, pad_token_id=0),
        q=q, k=k, v=v,
    )  # fmt: skip
    found = blocks("README.md")
    assert len(found) >= 4
    for code in found:
        exec(compile(code, "README.md", "exec"), scope)
    assert (tmp_path / "context.safetensors").exists() and scope["again"].nbytes > 0


@pytest.fixture
def worked_example(monkeypatch):
    """The method of ARCHITECTURE.md, put where its page says it goes."""
    code = (
        blocks("ARCHITECTURE.md")[0].replace("from ..", "from foveate.").replace("from .base", "from foveate.methods.base")
    )
    module = type(sys)("foveate.methods.dilated")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "ARCHITECTURE.md", "exec"), module.__dict__)
    monkeypatch.setitem(registry.METHODS, "dilated", "foveate.methods.dilated:Dilated")
    yield
    registry.get.cache_clear()


def test_the_worked_example_is_a_method(worked_example):
    """Two entries, one file: it parses as text, equals dense at full budget, drops pairs at a small one, and decodes."""
    q, k, v = qkv(1, 4, 2, 152)
    for text, full in (("dilated:every=1", True), ("dilated:window=20,every=3", False)):
        drive = Drive(text)
        got = torch.cat([drive(*(t[:, :, :151] for t in (q, k, v))), drive(*(t[:, :, 151:] for t in (q, k, v)))], 2)
        if full:
            torch.testing.assert_close(got, oracle(q, (k, v)), atol=1e-5, rtol=1e-5)
        else:
            assert all(plan.density(x.kv) < 0.9 for x, plan, _ in drive.watch.calls)
    row = blocks("ARCHITECTURE.md")[1]
    assert '"dilated": "foveate.methods.dilated:Dilated"' in row and 'Row("dilated"' in row


def test_architecture_names_what_exists():
    """Every file and folder the pages name is there."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"):
        for name in re.findall(r"`((?:src|tests|benchmarks|requirements|scripts)/[\w/.]+)`", (ROOT / page).read_text()):
            if "dilated" not in name:
                assert (ROOT / name).exists(), f"{page} names {name}"


def test_public_names_are_documented():
    for name in foveate.__all__:
        assert (getattr(foveate, name).__doc__ or "").strip(), f"foveate.{name} has no docstring"
