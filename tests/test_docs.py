"""What the pages say is true: generated parts are fresh, code blocks run, the worked example is a method."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import foveate
from foveate import registry
from foveate.catalogue import entry
from foveate.errors import ConfigError
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


def timed(case: str, impl: str, ms: float, **params) -> dict:
    return {"case": case, "impl": impl, "ms": {"median": ms}, "density": 0.1, "tflops": 1.0, "params": params}


def prefill_result(date: str, *rows: tuple[str, float, float]) -> dict:
    """A timing of prefill attention on made-up cards; rows: (recipe, milliseconds, mass kept)."""
    made = [
        timed("131072 tokens", f"{name} at mass=0.95", ms, n=131072, recipe=name, calibration={}, mass=mass, plan_ms=1.0,
              attend_ms=ms - 1, mass_least_head=0.5, density_computed=0.2, speedup=200 / ms)
        for name, ms, mass in rows
    ]  # fmt: skip
    dense = [timed("131072 tokens", f"dense, {who}", ms, n=131072) for who, ms in (("cuDNN", 200.0), ("ours", 180.0))]
    return {"bench": "prefill attention", "device": "NVIDIA X1 80GB", "date": date, "rows": made + dense}


def test_front_page_of_nothing(render):
    """Without result files there is no figure, and nothing breaks."""
    assert render.front_page.headline({}).count("\n") == 1 and render.front_page.figures({}, {}) == ""


def test_front_page_names_the_fastest_that_keeps_the_mass(render):
    """The newest file counts; a recipe that keeps too little, or other logits, is never the headline; recipes are many."""
    front = render.front_page
    old = prefill_result("2026-01-01", ("first", 10.0, 0.99))
    new = prefill_result("2026-01-02", ("fast", 20.0, 0.90), ("best", 40.0, 0.95), ("slow", 80.0, 0.97), ("odd", 5.0, 7.0))
    text = front.headline({"a": new, "b": old})
    assert "`best` calibrated by head" in text and "**5.0x**" in text and "95.0 % of the attention mass" in text
    assert "`slow` calibrated by head" in text and "**2.5x**" in text and "; X1 |" in text
    assert not any(name in text for name in ("first", "fast`", "odd"))
    many = prefill_result("2026-01-03", *((f"m{i:02}", 10.0 + i, 0.95) for i in range(12)))
    table = front.prompt_table(many)
    assert "`m07 at mass=0.95`" in table and "m08" not in table and "4 slower rows are in BENCHMARKS.md" in table
    assert "| dense, cuDNN | 128K | 100 % |" in table  # dense stands beside them however many there are


def step_result(date: str, *recipes: str, case: str = "131072 tokens, batch 1") -> dict:
    rows = [timed(case, f"{r}, compiled", 10.0 - i, recipe=f"{r}, compiled", graphs=1) for i, r in enumerate(recipes)]
    return {"bench": "step", "device": "NVIDIA X1 80GB", "date": date, "rows": rows}


def test_front_page_takes_the_fullest_and_newest_steps(render):
    front = render.front_page
    quest = "quest:page=64,share=group"
    full, short = step_result("2026-01-01", "dense", quest, "cache=kivi:bits=4"), step_result("2026-01-02", "dense", quest)
    again = step_result("2026-01-03", "dense", quest, "cache=kivi:bits=4", "a new recipe")
    found = {"a": full, "b": short, "c": step_result("2026-01-04", "no attention")}
    assert list(front.steps(found).values()) == [full] and list(front.steps({"d": again, **found}).values()) == [again]
    table = front.whole_table({"d": again})
    assert "| recipe | 1 x 128K tokens, X1 |" in table and "new recipe" not in table and f"| `{quest}` | 9.00 ms |" in table
    assert "| 10.0 ms ours | 9.00 ms, `quest:page=64,share=group` | **1.1x** |" in front.headline({"d": again})


def test_front_page_says_how_many_drafts_must_stand(render):
    facts = {"token_ms_at": "30.0 15.0 5.0", "dense_ms": 10.0, "draft": 2, "even_at": 2.5}
    drafts = {"device": "NVIDIA X1", "rows": [timed("131072 tokens, batch 1", "cycle, compiled", 30.0, **facts)]}
    text = render.front_page.headline({"h200_speculate": drafts})
    assert "| 10.0 ms ours | 5.00 ms, `pillar_attn` drafts, if all 2 stand | **2.0x** | even at 1.5 of 2;" in text


def test_front_page_says_where_another_is_faster(render):
    rows = [timed(c, i, 1.0, N=32768, D=128, width=128) | {"tflops": t}
            for c, i, t in (("a", "gluon", 5.0), ("a", "fa4", 4.0), ("b", "gluon", 3.0), ("b", "fa4", 4.0))]  # fmt: skip
    text = " ".join(render.front_page._slower({"rows": rows}, None))
    assert text == "FlashAttention-4 is faster in 1 of the 2 cases measured: 32K at 0.10 (4 against 3)."


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
    exec(compile(code, "ARCHITECTURE.md", "exec", dont_inherit=True), module.__dict__)
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
    assert [str(o.values) for o in entry("dilated").options] == ["int, at least 1"] * 2
    with pytest.raises(ConfigError, match="window expected int"):
        Drive("dilated:window=wide")
    row = blocks("ARCHITECTURE.md")[1]
    assert '"dilated": "foveate.methods.dilated:Dilated"' in row and 'Row("dilated"' in row


FRAME = """
from __future__ import annotations
from dataclasses import dataclass
from foveate.layout import Layout
from foveate.methods.base import AttnInput, Method, State, option
{imports}

@dataclass(frozen=True)
class Means(Method):
    keep: int = option(20, low=2)
    block = 16
    id, roles, selection = "means", ("prefill",), "prompt"
{plan}"""


def test_the_plan_of_the_page_is_one(monkeypatch):
    """The lines that look at content, with the imports that the page names: dense with room for every block, else less,
    and a chunk gets the blocks that the whole prompt gets."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    imports = re.search(r"\(with `(from \.\.scores[^`]+)`", text)[1].replace("from ..", "from foveate.")
    module = type(sys)("foveate.methods.means")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = FRAME.format(imports=imports, plan=textwrap.indent(blocks("ARCHITECTURE.md")[2], " " * 4))
    exec(compile(source, "ARCHITECTURE.md", "exec", dont_inherit=True), module.__dict__)
    monkeypatch.setitem(registry.METHODS, "means", "foveate.methods.means:Means")
    q, k, v = qkv(1, 4, 2, 152)
    torch.testing.assert_close(Drive("means")(q, k, v), oracle(q, (k, v)), atol=1e-5, rtol=1e-5)
    drive, split = Drive("means:keep=3"), Drive("means:keep=3")
    whole = drive(q, k, v)
    assert drive.watch.calls[0][1].density(drive.watch.calls[0][0].kv) < 0.8
    parts = [split(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 80), (80, 152))]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)
    registry.get.cache_clear()


def test_architecture_names_what_exists():
    """Every file and folder the pages name is there."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"):
        for name in re.findall(r"`((?:src|tests|benchmarks|requirements|scripts)/[\w/.]+)`", (ROOT / page).read_text()):
            if "dilated" not in name:
                assert (ROOT / name).exists(), f"{page} names {name}"


def test_public_names_are_documented():
    for name in foveate.__all__:
        assert (getattr(foveate, name).__doc__ or "").strip(), f"foveate.{name} has no docstring"
